//! What a confined thread may not do kills the whole process, with SIGSYS. Each case is a process
//! of its own: this test program, run again.

use std::{
    os::unix::process::ExitStatusExt,
    process::{Command, ExitStatus},
};

use firn_vmm::seccomp::{Thread, confine, tame_allocator};

const CASE: &str = "FIRN_SECCOMP_CASE";

/// A system call with its first three arguments.
type Call = (&'static str, libc::c_long, [libc::c_long; 3]);

const fn call(name: &'static str, number: libc::c_long) -> Call {
    (name, number, [0; 3])
}

/// What neither thread may do.
const FORBIDDEN: &[Call] = &[
    call("openat", libc::SYS_openat),
    call("openat2", libc::SYS_openat2),
    call("open", libc::SYS_open),
    call("socket", libc::SYS_socket),
    call("socketpair", libc::SYS_socketpair),
    call("connect", libc::SYS_connect),
    call("accept4", libc::SYS_accept4),
    call("execve", libc::SYS_execve),
    call("execveat", libc::SYS_execveat),
    call("fork", libc::SYS_fork),
    call("vfork", libc::SYS_vfork),
    call("clone", libc::SYS_clone),
    call("clone3", libc::SYS_clone3),
    call("ptrace", libc::SYS_ptrace),
    call("process_vm_writev", libc::SYS_process_vm_writev),
    call("kill", libc::SYS_kill),
    call("prctl", libc::SYS_prctl),
    call("memfd_create", libc::SYS_memfd_create),
    call("io_uring_setup", libc::SYS_io_uring_setup),
    call("userfaultfd", libc::SYS_userfaultfd),
    call("bpf", libc::SYS_bpf),
    call("unlinkat", libc::SYS_unlinkat),
    call("mprotect", libc::SYS_mprotect),
    ("ioctl(KVM_CREATE_VM)", libc::SYS_ioctl, [-1, 0xae01, 0]),
    ("ioctl(KVM_SET_USER_MEMORY_REGION)", libc::SYS_ioctl, [-1, 0x4020_ae46, 0]),
    ("ioctl(TIOCSTI)", libc::SYS_ioctl, [-1, libc::TIOCSTI as libc::c_long, 0]),
    ("mmap(PROT_EXEC)", libc::SYS_mmap, [0, 4096, (libc::PROT_READ | libc::PROT_EXEC) as _]),
];

/// What a vCPU thread may not do either.
const FORBIDDEN_TO_VCPUS: &[Call] = &[
    ("mmap", libc::SYS_mmap, [0, 4096, libc::PROT_READ as _]),
    call("munmap", libc::SYS_munmap),
    call("madvise", libc::SYS_madvise),
    call("pread64", libc::SYS_pread64),
    call("ftruncate", libc::SYS_ftruncate),
    call("epoll_ctl", libc::SYS_epoll_ctl),
    call("fcntl", libc::SYS_fcntl),
    call("tgkill", libc::SYS_tgkill),
    ("ioctl(KVM_SET_CLOCK)", libc::SYS_ioctl, [-1, 0x4030_ae7b, 0]),
];

/// What the device thread may not do either: the vCPUs are not its own.
const FORBIDDEN_TO_THE_DEVICE_THREAD: &[Call] = &[
    ("ioctl(KVM_RUN)", libc::SYS_ioctl, [-1, 0xae80, 0]),
    ("ioctl(KVM_SET_REGS)", libc::SYS_ioctl, [-1, 0x4090_ae82, 0]),
    ("fcntl(F_DUPFD)", libc::SYS_fcntl, [0, libc::F_DUPFD as _, 0]),
    ("tgkill of another process", libc::SYS_tgkill, [1, 1, 0]),
];

/// What both may do: it fails, but it comes back.
const ALLOWED: &[Call] = &[
    ("ioctl(KVM_IRQ_LINE)", libc::SYS_ioctl, [-1, 0x4008_ae61, 0]),
    ("close", libc::SYS_close, [-1, 0, 0]),
    ("preadv", libc::SYS_preadv, [-1, 0, 0]),
];

const ALL: [&[Call]; 4] = [FORBIDDEN, FORBIDDEN_TO_VCPUS, FORBIDDEN_TO_THE_DEVICE_THREAD, ALLOWED];

fn run(case: &str) -> ExitStatus {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--include-ignored"])
        .env(CASE, case)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap()
}

#[test]
#[ignore = "the other half of the tests below"]
fn child() {
    let Ok(case) = std::env::var(CASE) else { return };
    let (thread, name) = case.split_once(':').unwrap();
    let call = ALL.into_iter().flatten().find(|(known, ..)| *known == name);
    tame_allocator();
    // The threads that the test harness has started have arenas of their own already: one of ours,
    // with the only heap that there is from now on.
    let thread = if thread == "device" { Thread::Device } else { Thread::Vcpu };
    std::thread::spawn(move || {
        confine(thread).unwrap();
        if let Some(&(_, number, [a, b, c])) = call {
            // SAFETY: descriptors are invalid and pointers null, so no call in the tables reads or
            // writes memory of ours; and one that the filter let through would at worst map a page,
            // fork or fail in this short-lived process.
            unsafe { libc::syscall(number, a, b, c, 0, 0, 0) };
        }
        // What a confined thread lives on: memory, locks, descriptors that it has.
        let grown: Vec<u8> = vec![1; 4 << 20];
        assert_eq!(grown.iter().filter(|&&b| b == 1).count(), 4 << 20);
        // SAFETY: ends the process at once, without running anything that is not confined.
        unsafe { libc::_exit(0) };
    })
    .join()
    .unwrap();
}

#[test]
fn forbidden_calls_kill_the_process() {
    for (thread, own) in [("device", FORBIDDEN_TO_THE_DEVICE_THREAD), ("vcpu", FORBIDDEN_TO_VCPUS)]
    {
        for (name, ..) in FORBIDDEN.iter().chain(own) {
            let status = run(&format!("{thread}:{name}"));
            assert_eq!(status.signal(), Some(libc::SIGSYS), "{thread} {name}: {status}");
        }
        for name in ALLOWED.iter().map(|(name, ..)| *name).chain(["nothing"]) {
            assert_eq!(run(&format!("{thread}:{name}")).code(), Some(0), "{thread} {name}");
        }
    }
}
