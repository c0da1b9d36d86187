//! What a confined thread may not do kills the whole process, with SIGSYS. Each case is a process
//! of its own: this test program, run again.

use std::{
    os::unix::process::ExitStatusExt,
    process::{Command, ExitStatus},
};

use firn_vmm::seccomp::{Thread, confine};

const CASE: &str = "FIRN_SECCOMP_CASE";

/// System calls that neither thread may make.
const FORBIDDEN: &[(&str, libc::c_long)] = &[
    ("openat", libc::SYS_openat),
    ("open", libc::SYS_open),
    ("socket", libc::SYS_socket),
    ("connect", libc::SYS_connect),
    ("execve", libc::SYS_execve),
    ("execveat", libc::SYS_execveat),
    ("fork", libc::SYS_fork),
    ("vfork", libc::SYS_vfork),
    ("clone", libc::SYS_clone),
    ("clone3", libc::SYS_clone3),
    ("ptrace", libc::SYS_ptrace),
    ("kill", libc::SYS_kill),
    ("prctl", libc::SYS_prctl),
    ("memfd_create", libc::SYS_memfd_create),
    ("io_uring_setup", libc::SYS_io_uring_setup),
    ("bpf", libc::SYS_bpf),
    ("unlinkat", libc::SYS_unlinkat),
];

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
    let number = FORBIDDEN.iter().find(|(name, _)| *name == call).map(|&(_, number)| number);
    confine(if thread == "device" { Thread::Device } else { Thread::Vcpu }).unwrap();
    if let Some(number) = number {
        // SAFETY: all arguments are 0, so no call in the table reads or writes memory of ours; and
        // one that the filter let through would at worst fork or fail in this short-lived process.
        unsafe { libc::syscall(number, 0, 0, 0, 0, 0, 0) };
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
        for (name, _) in FORBIDDEN {
            let status = run(&format!("{thread}:{name}"));
            assert_eq!(status.signal(), Some(libc::SIGSYS), "{thread} {name}: {status}");
        }
    }
    assert_eq!(run("device:nothing").code(), Some(0));
    assert_eq!(run("vcpu:nothing").code(), Some(0));
}
