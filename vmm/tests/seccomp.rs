//! What a confined thread may not do kills the whole process, with SIGSYS. Each case is a process
//! of its own: this test program, run again.

use std::{
    os::unix::process::ExitStatusExt,
    process::{Command, ExitStatus},
};

use firn_vmm::seccomp::{Thread, confine};

const CASE: &str = "FIRN_SECCOMP_CASE";

/// System calls that neither thread may make, with harmless arguments.
fn forbidden() -> Vec<(&'static str, fn() -> libc::c_long)> {
    // SAFETY (each): a raw system call whose arguments are null or constants; if the kernel
    // carried it out, it would fail or affect this short-lived process only.
    vec![
        ("openat", || unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, c"/".as_ptr(), 0) }),
        ("open", || unsafe { libc::syscall(libc::SYS_open, c"/".as_ptr(), 0) }),
        ("socket", || unsafe { libc::syscall(libc::SYS_socket, libc::AF_UNIX, libc::SOCK_STREAM, 0) }),
        ("connect", || unsafe { libc::syscall(libc::SYS_connect, -1, 0, 0) }),
        ("execve", || unsafe { libc::syscall(libc::SYS_execve, 0, 0, 0) }),
        ("execveat", || unsafe { libc::syscall(libc::SYS_execveat, -1, 0, 0, 0, 0) }),
        ("fork", || unsafe { libc::syscall(libc::SYS_fork) }),
        ("clone", || unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) }),
        ("clone3", || unsafe { libc::syscall(libc::SYS_clone3, 0, 0) }),
        ("ptrace", || unsafe { libc::syscall(libc::SYS_ptrace, libc::PTRACE_TRACEME, 0, 0, 0) }),
        ("kill", || unsafe { libc::syscall(libc::SYS_kill, 0, 0) }),
        ("prctl", || unsafe { libc::syscall(libc::SYS_prctl, libc::PR_GET_DUMPABLE, 0, 0, 0, 0) }),
        ("memfd_create", || unsafe { libc::syscall(libc::SYS_memfd_create, c"x".as_ptr(), 0) }),
        ("io_uring_setup", || unsafe { libc::syscall(libc::SYS_io_uring_setup, 0, 0) }),
        ("bpf", || unsafe { libc::syscall(libc::SYS_bpf, 0, 0, 0) }),
        ("unlinkat", || unsafe { libc::syscall(libc::SYS_unlinkat, -1, c"x".as_ptr(), 0) }),
    ]
}

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
    let (thread, call) = case.split_once(':').unwrap();
    let calls = forbidden();
    let act = calls.iter().find(|(name, _)| *name == call).map(|(_, act)| *act);
    confine(if thread == "device" { Thread::Device } else { Thread::Vcpu }).unwrap();
    if let Some(act) = act {
        act();
    }
    // What a confined thread lives on: memory, locks, descriptors that it has.
    let grown: Vec<u8> = vec![1; 4 << 20];
    assert_eq!(grown.iter().filter(|&&b| b == 1).count(), 4 << 20);
    // SAFETY: ends the process at once, without running anything that is not confined.
    unsafe { libc::_exit(0) };
}

#[test]
fn forbidden_calls_kill_the_process() {
    for thread in ["device", "vcpu"] {
        for (name, _) in forbidden() {
            let status = run(&format!("{thread}:{name}"));
            assert_eq!(status.signal(), Some(libc::SIGSYS), "{thread} {name}: {status}");
        }
    }
    // Only the device thread kicks others, and only it waits for events.
    assert_eq!(run("device:nothing").code(), Some(0));
    assert_eq!(run("vcpu:nothing").code(), Some(0));
}
