//! What each thread may ask of the kernel. Everything else kills the process.
//!
//! | thread | from when | what it does then |
//! |---|---|---|
//! | device (main) | the shell stands | control socket, epoll, thaw and save, vsock |
//! | vCPU | its first instruction | KVM_RUN, device work of its exits, vCPU state |
//!
//! Neither opens, connects, executes, clones or signals anything but this process's own threads.

use std::collections::BTreeMap;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

/// Which thread is about to be confined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thread {
    /// The main thread.
    Device,
    /// A vCPU thread.
    Vcpu,
}

/// A filter could not be made or installed.
#[derive(Debug, thiserror::Error)]
#[error("seccomp: {0}")]
pub struct SeccompError(String);

/// What both kinds of thread need.
const COMMON: &[(libc::c_long, &str)] = &[
    (libc::SYS_ioctl, "KVM"),
    (libc::SYS_read, "eventfd"),
    (libc::SYS_write, "eventfd, serial output and last words to standard error"),
    (libc::SYS_readv, "as read"),
    (libc::SYS_writev, "as write, by std's stderr"),
    (libc::SYS_pread64, "disks, state files"),
    (libc::SYS_pwrite64, "disks, snapshot files"),
    (libc::SYS_preadv, "disks"),
    (libc::SYS_pwritev, "disks"),
    (libc::SYS_preadv2, "disks, by some libcs"),
    (libc::SYS_pwritev2, "disks, by some libcs"),
    (libc::SYS_ftruncate, "deltas and snapshot files"),
    (libc::SYS_fstat, "lengths of received files"),
    (libc::SYS_statx, "the same, by std"),
    (libc::SYS_newfstatat, "the same, by glibc (empty path)"),
    (libc::SYS_lseek, "kernel, initramfs, snapshot files"),
    (libc::SYS_recvmsg, "control socket, invoke stream"),
    (libc::SYS_recvfrom, "invoke stream"),
    (libc::SYS_sendmsg, "control socket, invoke stream"),
    (libc::SYS_sendto, "the same"),
    (libc::SYS_shutdown, "invoke stream"),
    (libc::SYS_close, "media that are replaced"),
    (libc::SYS_fcntl, "O_NONBLOCK; F_GETFD checks of std in debug builds"),
    (libc::SYS_getrandom, "rng device; std's hash seeds"),
    (libc::SYS_clock_gettime, "stamps where the vDSO can't answer"),
    (libc::SYS_futex, "locks and channels"),
    (libc::SYS_mmap, "allocator; guest memory at a thaw"),
    (libc::SYS_munmap, "allocator; end of a base mapping"),
    (libc::SYS_mremap, "allocator"),
    (libc::SYS_mprotect, "allocator (thread arenas)"),
    (libc::SYS_madvise, "allocator; huge pages of guest memory"),
    (libc::SYS_brk, "allocator"),
    (libc::SYS_rt_sigreturn, "the kick signal"),
    (libc::SYS_rt_sigprocmask, "std, around pthread_kill and thread ends"),
    (libc::SYS_sigaltstack, "std, at a thread's start and end"),
    (libc::SYS_sched_yield, "std's channels under contention"),
    (libc::SYS_gettid, "pthread_kill on oneself, abort"),
    (libc::SYS_getpid, "abort"),
    (libc::SYS_exit, "end of a thread"),
    (libc::SYS_exit_group, "end of the process"),
    (libc::SYS_restart_syscall, "after a stop signal"),
];

/// What the device thread needs beside that.
const DEVICE: &[(libc::c_long, &str)] = &[
    (libc::SYS_epoll_wait, "its event loop"),
    (libc::SYS_epoll_pwait, "the same, by some libcs"),
    (libc::SYS_epoll_pwait2, "the same"),
    (libc::SYS_epoll_ctl, "a new invoke stream"),
    (libc::SYS_tgkill, "kicking vCPUs out of KVM_RUN"),
];

/// Confines the calling thread for good.
///
/// # Errors
/// [`SeccompError`] if the kernel takes no filter.
pub fn confine(thread: Thread) -> Result<(), SeccompError> {
    let fail = |error: &dyn std::fmt::Display| SeccompError(error.to_string());
    let extra = match thread {
        Thread::Device => DEVICE,
        Thread::Vcpu => &[],
    };
    let rules: BTreeMap<_, _> =
        COMMON.iter().chain(extra).map(|&(number, _)| (number, Vec::new())).collect();
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )
    .map_err(|error| fail(&error))?;
    let program: BpfProgram = filter.try_into().map_err(|error| fail(&error))?;
    seccompiler::apply_filter(&program).map_err(|error| fail(&error))
}
