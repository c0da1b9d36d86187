//! The host's side of the control socket, and tiny guests: a page of machine code each, entered in
//! long mode at [`ENTRY`] with all of low memory identity mapped (see `arch/x86_64/boot.rs`).

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::{
    fs::File,
    io::{IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{fs::FileExt, net::UnixStream, process::CommandExt},
    },
    process::{Child, ChildStderr, Command, ExitStatus, Stdio},
};

use firn_pages::bitmap::Bitmap;
use firn_proto::control::{
    self, CONTROL_FD, CpuTemplate, DiskKind, DiskSource, FromVmm, KVM_FD, SaveReport, ShellConfig,
    ToVmm,
};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType,
};

/// Where a tiny guest's code is loaded and entered.
pub const ENTRY: u64 = 0x10_0000;

/// A `firn-vmm` process without a jail.
pub struct Vmm {
    socket: OwnedFd,
    child: Child,
    pub stderr: Option<ChildStderr>,
}

/// Opens `/dev/kvm`, or says why the calling test is skipped.
pub fn kvm() -> Option<File> {
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(file) => Some(file),
        Err(error) => {
            eprintln!("skipped: /dev/kvm: {error}");
            None
        }
    }
}

impl Vmm {
    /// Starts a process with the two descriptors that it inherits.
    pub fn spawn(kvm: &File) -> Self {
        Self::spawn_program(kvm, &program(), || Ok(()))
    }

    /// The same with a program of choice.
    pub fn spawn_program(
        kvm: &File,
        program: &str,
        prepare: impl Fn() -> std::io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        Self::spawn_in(kvm, program, None, prepare)
    }

    /// The same with a variable of its environment. `prepare` runs in the new process before the
    /// program does: it must be async-signal-safe.
    pub fn spawn_in(
        kvm: &File,
        program: &str,
        variable: Option<(&str, &str)>,
        prepare: impl Fn() -> std::io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let (control, kvm) = (theirs.as_raw_fd(), kvm.as_raw_fd());
        let mut command = Command::new(program);
        command.envs(variable);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        // SAFETY: dup2 and fcntl are async-signal-safe, as is what the caller gave. The sources are first moved out of the
        // way, since either may have the other's target number.
        unsafe {
            command.pre_exec(move || {
                let control = libc::fcntl(control, libc::F_DUPFD, 100);
                let kvm = libc::fcntl(kvm, libc::F_DUPFD, 100);
                if libc::dup2(control, CONTROL_FD) < 0 || libc::dup2(kvm, KVM_FD) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                libc::close_range(KVM_FD as u32 + 1, u32::MAX, 0);
                prepare()
            });
        }
        let mut child = command.spawn().unwrap();
        let stderr = child.stderr.take();
        Self { socket: ours, child, stderr }
    }

    /// Starts a process and builds a shell.
    pub fn shell(kvm: &File, config: &ShellConfig) -> Self {
        Self::spawn(kvm).build(config)
    }

    /// Builds a shell.
    pub fn build(self, config: &ShellConfig) -> Self {
        let vmm = self;
        match vmm.request(&ToVmm::Build(config.clone()), &[]) {
            FromVmm::Ready(_) => vmm,
            other => panic!("{other:?}"),
        }
    }

    pub fn send(&self, message: &ToVmm, descriptors: &[BorrowedFd<'_>]) {
        let bytes = control::encode(message).unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(descriptors)));
        }
        rustix::net::sendmsg(
            &self.socket,
            &[IoSlice::new(&bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )
        .unwrap();
    }

    pub fn receive(&self) -> FromVmm {
        let mut bytes = vec![0; control::MAX_MESSAGE];
        let mut ancillary = RecvAncillaryBuffer::new(&mut []);
        let received = rustix::net::recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut ancillary,
            RecvFlags::empty(),
        )
        .unwrap();
        assert_ne!(received.bytes, 0, "the VMM closed its socket: {}", self.last_words());
        control::decode_from_vmm(&bytes[..received.bytes]).unwrap()
    }

    pub fn request(&self, message: &ToVmm, descriptors: &[BorrowedFd<'_>]) -> FromVmm {
        self.send(message, descriptors);
        self.receive()
    }

    /// Boots a kernel with nothing else; returns our end of the invoke stream.
    pub fn boot(&self, kernel: &File) -> (FromVmm, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let message = ToVmm::Boot { cmdline: String::new(), initramfs: false, disks: Vec::new() };
        (self.request(&message, &[kernel.as_fd(), theirs.as_fd()]), ours)
    }

    /// Its `/proc/PID/pagemap`.
    pub fn pagemap(&self) -> File {
        File::open(format!("/proc/{}/pagemap", self.pid())).unwrap()
    }

    /// Saves a paused microVM, which was thawed from the memory `base` if it was thawed; returns all
    /// of its memory, and its state without the bitmap. `deltas` are empty files for those of its disks.
    pub fn save(&self, base: Option<&File>, deltas: &[BorrowedFd<'_>]) -> (File, File) {
        let (memory, state, _) = self.save_and_report(base, deltas);
        (memory, state)
    }

    /// The same, and what the VMM says of it.
    pub fn save_and_report(
        &self,
        base: Option<&File>,
        deltas: &[BorrowedFd<'_>],
    ) -> (File, File, SaveReport) {
        let (memory, state, pagemap) = (memfd(b""), memfd(b""), self.pagemap());
        let files = [memory.as_fd(), state.as_fd(), pagemap.as_fd()];
        let answer = self.request(&ToVmm::Save, &[&files, deltas].concat());
        let FromVmm::Saved(report) = answer else { panic!("{answer:?}") };
        assert_eq!(report.memory_bytes, memory.metadata().unwrap().len());
        let mut bitmap = vec![0; report.bitmap_bytes as usize];
        state.read_exact_at(&mut bitmap, report.state_bytes).unwrap();
        let pages = Bitmap::from_bytes(&bitmap, report.memory_bytes / 4096).unwrap();
        state.set_len(report.state_bytes).unwrap();
        let mut written = 0;
        let mut page = [0; 4096];
        for number in 0..report.memory_bytes / 4096 {
            if pages.contains(number) {
                written += 1;
            } else if let Some(base) = base {
                base.read_exact_at(&mut page, number * 4096).unwrap();
                if page != [0; 4096] {
                    memory.write_all_at(&page, number * 4096).unwrap();
                }
            }
        }
        assert_eq!(written, report.pages_written);
        (memory, state, report)
    }

    /// Waits for the process's end and returns all that it said on standard error.
    pub fn wait(mut self) -> (ExitStatus, String) {
        let mut said = Vec::new();
        if let Some(mut stderr) = self.stderr.take() {
            stderr.read_to_end(&mut said).unwrap();
        }
        (self.child.wait().unwrap(), String::from_utf8_lossy(&said).into_owned())
    }

    /// The end of what a VMM that is gone has said.
    fn last_words(&self) -> String {
        let mut said = vec![0; 4096];
        let count = self.stderr.as_ref().map_or(Ok(0), |pipe| rustix::io::read(pipe, &mut said));
        String::from_utf8_lossy(&said[..count.unwrap_or(0)]).into_owned()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The program under test: cargo's, or one that `FIRN_VMM` names (where tests run elsewhere).
pub fn program() -> String {
    std::env::var("FIRN_VMM").unwrap_or_else(|_| env!("CARGO_BIN_EXE_firn-vmm").into())
}

/// A shell of `vcpus` vCPUs and 16 MiB without disks.
pub fn config(vcpus: u8, serial: bool) -> ShellConfig {
    ShellConfig {
        version: control::VERSION,
        vcpus,
        memory_mib: 16,
        cpu_template: CpuTemplate::Host,
        disks: Vec::new(),
        serial,
        spares: 1,
    }
}

/// As [`config`], with disks.
pub fn config_with_disks(disks: &[DiskKind]) -> ShellConfig {
    ShellConfig { disks: disks.to_vec(), ..config(1, true) }
}

/// No media for `n` disks.
pub fn empty(n: usize) -> Vec<DiskSource> {
    vec![DiskSource::Empty; n]
}

/// `bytes` as they begin a new invoke connection: behind the moment when the guest's clocks go on.
pub fn from_now(bytes: &[u8]) -> Vec<u8> {
    let mut all = firn_vmm::arch::tsc::now().to_le_bytes().to_vec();
    all.extend(bytes);
    all
}

/// An anonymous file with `contents`.
pub fn memfd(contents: &[u8]) -> File {
    let mut file: File =
        rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .unwrap()
            .into();
    file.write_all(contents).unwrap();
    file
}

/// Memory of a snapshot, as it is thawed: nobody changes it any more.
pub fn sealed(memory: &File) -> BorrowedFd<'_> {
    fcntl_add_seals(memory, SealFlags::WRITE | SealFlags::SHRINK).unwrap();
    memory.as_fd()
}

/// An ELF kernel that is nothing but `code`, loaded and entered at [`ENTRY`].
pub fn elf(code: &[u8]) -> File {
    const HEADERS: u64 = 64 + 56;
    let mut file = Vec::new();
    file.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    file.extend_from_slice(&2u16.to_le_bytes()); // ET_EXEC
    file.extend_from_slice(&62u16.to_le_bytes()); // x86_64
    file.extend_from_slice(&1u32.to_le_bytes());
    for word in [ENTRY, 64, 0] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.extend_from_slice(&0u32.to_le_bytes());
    for half in [64u16, 56, 1, 64, 0, 0] {
        file.extend_from_slice(&half.to_le_bytes());
    }
    file.extend_from_slice(&1u32.to_le_bytes()); // PT_LOAD
    file.extend_from_slice(&7u32.to_le_bytes());
    for word in [HEADERS, ENTRY, ENTRY, code.len() as u64, code.len() as u64, 4096] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.extend_from_slice(code);
    memfd(&file)
}

/// Fields of a JSON object: smallest, median and 99th percentile of each column, in microseconds.
pub fn quantiles<const N: usize>(names: [&str; N], samples: &[[f64; N]]) -> String {
    let column = |(column, name): (usize, &str)| {
        let mut values: Vec<f64> = samples.iter().map(|sample| sample[column]).collect();
        values.sort_by(f64::total_cmp);
        let q = |p: f64| values[((values.len() - 1) as f64 * p) as usize];
        let (min, p50, p99) = (q(0.0), q(0.5), q(0.99));
        format!("\"{name}_us\":{{\"min\":{min:.0},\"p50\":{p50:.0},\"p99\":{p99:.0}}}")
    };
    names.into_iter().enumerate().map(column).collect::<Vec<_>>().join(",")
}
