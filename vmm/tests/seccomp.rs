//! What a confined thread may not do kills the whole process, with SIGSYS. Each case is a process
//! of its own: this test program, run again.

use std::{
    os::unix::process::ExitStatusExt,
    process::{Command, ExitStatus},
};

use firn_pages::ioctl::PAGEMAP_SCAN;
use firn_vmm::{
    descriptors::{BELL, CONTROL, DISKS, EPOLL, MEMORY, RECEIVED, STREAM, VCPUS, VM},
    seccomp::{Thread, confine, tame_allocator},
};

const CASE: &str = "FIRN_SECCOMP_CASE";

/// A system call with its first three arguments.
type Call = (&'static str, libc::c_long, [libc::c_long; 3]);

const fn call(name: &'static str, number: libc::c_long) -> Call {
    (name, number, [0; 3])
}

/// A system call on a descriptor.
const fn on(name: &'static str, number: libc::c_long, descriptor: i32) -> Call {
    (name, number, [descriptor as libc::c_long, 0, 0])
}

const fn ioctl(name: &'static str, descriptor: i32, request: libc::c_long) -> Call {
    (name, libc::SYS_ioctl, [descriptor as libc::c_long, request, 0])
}

/// The vCPU thread that is tried.
const VCPU: u8 = 1;
const OWN_VCPU: i32 = VCPUS.start + VCPU as i32;

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
    call("dup3", libc::SYS_dup3),
    call("statx", libc::SYS_statx),
    ioctl("KVM_CREATE_VM", 4, 0xae01),
    ioctl("KVM_CREATE_VCPU", VM.start, 0xae41),
    ioctl("KVM_SET_USER_MEMORY_REGION", VM.start, 0x4020_ae46),
    ioctl("KVM_IRQ_LINE on a vCPU", OWN_VCPU, 0x4008_ae61),
    ioctl("TIOCSTI", 2, libc::TIOCSTI as libc::c_long),
    ("mmap(PROT_EXEC)", libc::SYS_mmap, [0, 4096, (libc::PROT_READ | libc::PROT_EXEC) as _]),
    on("recvmsg on a disk", libc::SYS_recvmsg, DISKS.start),
    on("sendmsg on the control socket", libc::SYS_sendmsg, CONTROL.start),
    on("shutdown of the control socket", libc::SYS_shutdown, CONTROL.start),
    on("close of the control socket", libc::SYS_close, CONTROL.start),
    on("close of the VM", libc::SYS_close, VM.start),
    on("close beyond the plan", libc::SYS_close, DISKS.end),
    on("write to a disk", libc::SYS_write, DISKS.start),
    on("write to the snapshot", libc::SYS_write, MEMORY.start),
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
    call("sched_yield", libc::SYS_sched_yield),
    ioctl("KVM_SET_CLOCK", VM.start, 0x4030_ae7b),
    ioctl("KVM_RUN of another vCPU", OWN_VCPU - 1, 0xae80),
    on("preadv of the snapshot", libc::SYS_preadv, MEMORY.start),
    on("preadv of what was just received", libc::SYS_preadv, RECEIVED.start),
    on("pwritev to the control socket", libc::SYS_pwritev, CONTROL.start),
    on("pwritev beyond the plan", libc::SYS_pwritev, DISKS.end),
    on("recvmsg on the control socket", libc::SYS_recvmsg, CONTROL.start),
    on("close of a disk", libc::SYS_close, DISKS.start),
    on("write to the invoke stream", libc::SYS_write, STREAM.start),
];

/// What the device thread may not do either: the vCPUs are not its own.
const FORBIDDEN_TO_THE_DEVICE_THREAD: &[Call] = &[
    ioctl("KVM_RUN", OWN_VCPU, 0xae80),
    ioctl("KVM_SET_REGS", OWN_VCPU, 0x4090_ae82),
    ioctl("PAGEMAP_SCAN of the snapshot", MEMORY.start, PAGEMAP_SCAN as _),
    ("F_DUPFD", libc::SYS_fcntl, [RECEIVED.start as _, libc::F_DUPFD as _, 0]),
    ("F_SETFL", libc::SYS_fcntl, [CONTROL.start as _, libc::F_SETFL as _, 0]),
    (
        "F_DUPFD_CLOEXEC of the control socket",
        libc::SYS_fcntl,
        [CONTROL.start as _, libc::F_DUPFD_CLOEXEC as _, 0],
    ),
    ("EPOLL_CTL_DEL", libc::SYS_epoll_ctl, [EPOLL.start as _, libc::EPOLL_CTL_DEL as _, 3]),
    ("epoll_ctl of a disk", libc::SYS_epoll_ctl, [EPOLL.start as _, 1, DISKS.start as _]),
    on("preadv", libc::SYS_preadv, DISKS.start),
    on("pwrite64 to a disk", libc::SYS_pwrite64, DISKS.start),
    on("pwrite64 to the snapshot", libc::SYS_pwrite64, MEMORY.start),
    on("read of the control socket", libc::SYS_read, CONTROL.start),
    on("write to the bell", libc::SYS_write, BELL.start),
    on("sendto on the invoke stream", libc::SYS_sendto, STREAM.start),
    ("tgkill of another process", libc::SYS_tgkill, [1, 1, 0]),
];

/// What both may do. It fails, since nothing is open at these numbers, but it comes back.
const ALLOWED: &[Call] = &[
    ioctl("KVM_IRQ_LINE", VM.start, 0x4008_ae61),
    on("close", libc::SYS_close, STREAM.start),
    on("recvmsg", libc::SYS_recvmsg, STREAM.start),
];

const ALL: [&[Call]; 4] = [FORBIDDEN, FORBIDDEN_TO_VCPUS, FORBIDDEN_TO_THE_DEVICE_THREAD, ALLOWED];

fn run(case: &str) -> (ExitStatus, String) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--include-ignored"])
        .env(CASE, case)
        .output()
        .unwrap();
    (output.status, String::from_utf8_lossy(&output.stderr).into_owned())
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
    let thread = if thread == "device" { Thread::Device } else { Thread::Vcpu(VCPU) };
    std::thread::spawn(move || {
        // Whatever the test harness has open is out of the way of what is tried.
        // SAFETY: nothing in this process goes on that has a descriptor from 3 on.
        unsafe { libc::close_range(3, u32::MAX, 0) };
        confine(thread).unwrap();
        if let Some(&(_, number, [a, b, c])) = call {
            // SAFETY: pointers are null, so no call reads or writes memory of ours; and one that the
            // filter let through would at worst map a page, fork or fail in this short-lived process.
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
    for (thread, own) in [("device", FORBIDDEN_TO_THE_DEVICE_THREAD), ("vCPU", FORBIDDEN_TO_VCPUS)]
    {
        for (name, number, _) in FORBIDDEN.iter().chain(own) {
            let (status, said) = run(&format!("{thread}:{name}"));
            assert_eq!(status.signal(), Some(libc::SIGSYS), "{thread} {name}: {status} {said}");
            // Builds with debug assertions say what it was.
            let says = format!("{thread} thread refuses system call {number}");
            assert_eq!(said.contains(&says), cfg!(debug_assertions), "{name}: {said}");
        }
        for name in ALLOWED.iter().map(|(name, ..)| *name).chain(["nothing"]) {
            let (status, said) = run(&format!("{thread}:{name}"));
            assert_eq!(status.code(), Some(0), "{thread} {name}: {said}");
        }
    }
}
