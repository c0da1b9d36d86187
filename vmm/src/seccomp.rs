//! What each thread may ask of the kernel. Everything else kills the process.
//!
//! | thread | from when | what it does then |
//! |---|---|---|
//! | device (main) | the shell stands | control socket, epoll, thaw and save, vsock |
//! | vCPU | its first instruction | KVM_RUN, device work of its exits, vCPU state |
//!
//! Neither opens, connects, executes, clones or signals anything but this process's own threads.

use std::collections::BTreeSet;

use seccompiler::{BpfProgram, sock_filter};

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
    (libc::SYS_mremap, "allocator; huge pages in reserve to their regions"),
    (libc::SYS_mprotect, "allocator (thread arenas)"),
    (libc::SYS_madvise, "allocator; huge and populated pages of guest memory"),
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
    let extra = match thread {
        Thread::Device => DEVICE,
        Thread::Vcpu => &[],
    };
    let numbers = COMMON.iter().chain(extra).map(|&(number, _)| number as u32).collect();
    seccompiler::apply_filter(&program(numbers)).map_err(|error| SeccompError(error.to_string()))
}

/// A program that allows these system calls, whatever their arguments, and kills the process at
/// any other.
///
/// It looks for the number by bisection. A filter's price is paid when it is installed: the kernel
/// runs it once for each system call that there is, to learn which it always allows, and that is
/// ten times as long with a comparison for each number in turn.
fn program(allowed: BTreeSet<u32>) -> BpfProgram {
    // Of `struct seccomp_data`.
    const NUMBER: u32 = 0;
    const ARCHITECTURE: u32 = 4;
    const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

    // Numbers at which the answer changes; below the first it is no. Numbers of the x32 ABI have a
    // high bit set, which puts them above the last.
    let mut turns = Vec::new();
    for &number in &allowed {
        match turns.last_mut() {
            Some(end) if *end == number => *end += 1,
            _ => turns.extend([number, number + 1]),
        }
    }
    let mut program = vec![
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, ARCHITECTURE),
        jump(libc::BPF_JEQ, AUDIT_ARCH_X86_64, 1, 0),
        statement(libc::BPF_RET, libc::SECCOMP_RET_KILL_PROCESS),
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, NUMBER),
    ];
    bisect(&turns, false, &mut program);
    program
}

/// Appends the decision about a number between two turns: `answer` below the first of `turns`, and
/// the opposite after each.
fn bisect(turns: &[u32], answer: bool, program: &mut BpfProgram) {
    if turns.is_empty() {
        let answer = if answer { libc::SECCOMP_RET_ALLOW } else { libc::SECCOMP_RET_KILL_PROCESS };
        program.push(statement(libc::BPF_RET, answer));
        return;
    }
    let middle = turns.len() / 2;
    let here = program.len();
    program.push(jump(libc::BPF_JGE, turns[middle], 0, 0));
    bisect(&turns[..middle], answer, program);
    // At most two instructions a turn: 200 with all tables above, and the test of this module.
    program[here].jt = (program.len() - here - 1) as u8;
    bisect(&turns[middle + 1..], answer ^ middle.is_multiple_of(2), program);
}

fn statement(code: u32, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

fn jump(test: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code: (libc::BPF_JMP | test | libc::BPF_K) as u16, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program of this module's few instructions.
    fn run(program: &[sock_filter], architecture: u32, number: u32) -> u32 {
        let (mut at, mut loaded) = (0, 0);
        loop {
            let now = &program[at];
            at += 1;
            match u32::from(now.code) {
                0x20 => loaded = if now.k == 0 { number } else { architecture },
                0x15 => at += usize::from(if loaded == now.k { now.jt } else { now.jf }),
                0x35 => at += usize::from(if loaded >= now.k { now.jt } else { now.jf }),
                0x06 => return now.k,
                code => panic!("instruction {code:#x}"),
            }
        }
    }

    #[test]
    fn exactly_the_listed_calls_of_this_architecture_are_allowed() {
        let numbers: BTreeSet<u32> =
            COMMON.iter().chain(DEVICE).map(|&(number, _)| number as u32).collect();
        let filter = program(numbers.clone());
        assert!(filter.len() < usize::from(u8::MAX), "jumps are bytes");
        for number in (0..1024).chain([0x4000_0000, 0x4000_0001, u32::MAX]) {
            let allowed = run(&filter, 0xc000_003e, number) == libc::SECCOMP_RET_ALLOW;
            assert_eq!(allowed, numbers.contains(&number), "system call {number}");
            assert_eq!(run(&filter, 0x4000_0003, number), libc::SECCOMP_RET_KILL_PROCESS);
        }
    }

    #[test]
    fn bisection_is_short() {
        let numbers: BTreeSet<u32> = COMMON.iter().map(|&(number, _)| number as u32).collect();
        let filter = program(numbers);
        // Four instructions before it, seven levels, the answer.
        for number in 0..1024 {
            let mut steps = 0;
            let (mut at, mut done) = (4, false);
            while !done {
                steps += 1;
                let now = &filter[at];
                done = now.code == 0x06;
                at += 1 + usize::from(if number >= now.k { now.jt } else { now.jf });
            }
            assert!(steps <= 8, "system call {number}: {steps} steps");
        }
    }

    #[test]
    fn nothing_allowed_kills() {
        assert_eq!(run(&program(BTreeSet::new()), 0xc000_003e, 0), libc::SECCOMP_RET_KILL_PROCESS);
    }
}
