//! What each thread may ask of the kernel, and with which arguments. Everything else kills the
//! process.
//!
//! | thread | from when | what it does then |
//! |---|---|---|
//! | device (main) | the shell stands | control socket, epoll, thaw and save, vsock |
//! | vCPU | its first instruction | KVM_RUN, device work of its exits, vCPU state |
//!
//! Neither opens, connects, executes, clones, makes memory executable, or signals anything but this
//! process's own threads. A vCPU thread, which acts on what the guest says, has the shorter table: it
//! allocates by `brk` alone ([`tame_allocator`]) and never ends, but waits for the process to.

use std::collections::BTreeMap;

use kvm_bindings as kvm;
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

/// What is asked of a call's arguments. The kernel takes the arguments that are looked at as 32 bits,
/// or (`prot`) decides by a bit among these.
#[derive(Debug, Clone, Copy)]
enum Check {
    /// Nothing.
    Any,
    /// The second argument is one of these: `ioctl` requests, `fcntl` commands.
    Second(&'static [u32]),
    /// The third has none of these bits: memory protections.
    ThirdLacks(u32),
    /// The first is this process.
    Ourselves,
}

/// A system call that is allowed, and why.
type Entry = (libc::c_long, Check, &'static str);

/// No mapping becomes executable.
const NO_CODE: Check = Check::ThirdLacks(libc::PROT_EXEC as u32);

/// `_IO`, `_IOR`, `_IOW`, `_IOWR` of `asm-generic/ioctl.h`.
const fn request(direction: u32, kind: u32, number: u32, bytes: usize) -> u32 {
    direction << 30 | (bytes as u32) << 16 | kind << 8 | number
}

const KVMIO: u32 = 0xae;

const fn kvm_none(number: u32) -> u32 {
    request(0, KVMIO, number, 0)
}

const fn kvm_write<T>(number: u32) -> u32 {
    request(1, KVMIO, number, size_of::<T>())
}

const fn kvm_read<T>(number: u32) -> u32 {
    request(2, KVMIO, number, size_of::<T>())
}

const fn kvm_both<T>(number: u32) -> u32 {
    request(3, KVMIO, number, size_of::<T>())
}

/// A device's interrupt, from whichever thread works for it.
const IRQ_LINE: u32 = kvm_write::<kvm::kvm_irq_level>(0x61);

/// Requests of vCPU threads: running, and a vCPU's state.
const VCPU_REQUESTS: &[u32] = &[
    kvm_none(0x80), // KVM_RUN
    IRQ_LINE,
    kvm_read::<kvm::kvm_regs>(0x81),
    kvm_write::<kvm::kvm_regs>(0x82),
    kvm_read::<kvm::kvm_sregs>(0x83),
    kvm_write::<kvm::kvm_sregs>(0x84),
    kvm_both::<kvm::kvm_translation>(0x85), // where a guest that ended stood
    kvm_both::<kvm::kvm_msrs>(0x88),
    kvm_write::<kvm::kvm_msrs>(0x89),
    kvm_read::<kvm::kvm_lapic_state>(0x8e),
    kvm_write::<kvm::kvm_lapic_state>(0x8f),
    kvm_both::<kvm::kvm_cpuid2>(0x91), // what XSAVE state there is
    kvm_read::<kvm::kvm_mp_state>(0x98),
    kvm_write::<kvm::kvm_mp_state>(0x99),
    kvm_read::<kvm::kvm_vcpu_events>(0x9f),
    kvm_write::<kvm::kvm_vcpu_events>(0xa0),
    kvm_read::<kvm::kvm_debugregs>(0xa1),
    kvm_write::<kvm::kvm_debugregs>(0xa2),
    kvm_read::<kvm::kvm_xsave>(0xa4),
    kvm_write::<kvm::kvm_xsave>(0xa5),
    kvm_read::<kvm::kvm_xcrs>(0xa6),
    kvm_write::<kvm::kvm_xcrs>(0xa7),
    kvm_none(0xad),                          // KVM_KVMCLOCK_CTRL
    kvm_write::<kvm::kvm_device_attr>(0xe1), // the TSC's offset: set, get, has
    kvm_write::<kvm::kvm_device_attr>(0xe2),
    kvm_write::<kvm::kvm_device_attr>(0xe3),
];

/// Requests of the device thread: the VM's state, and which pages were written.
const DEVICE_REQUESTS: &[u32] = &[
    IRQ_LINE,
    kvm_both::<kvm::kvm_irqchip>(0x62),
    kvm_read::<kvm::kvm_irqchip>(0x63), // KVM_SET_IRQCHIP, which its header has as a read
    kvm_write::<kvm::kvm_clock_data>(0x7b),
    kvm_read::<kvm::kvm_clock_data>(0x7c),
    request(3, 0x66, 16, 96), // PAGEMAP_SCAN
    libc::FIONBIO as u32,
];

/// Commands of the device thread to `fcntl`.
const COMMANDS: &[u32] =
    &[libc::F_GETFL as u32, libc::F_SETFL as u32, libc::F_GETFD as u32, libc::F_GET_SEALS as u32];

/// What both kinds of thread need.
const COMMON: &[Entry] = &[
    (libc::SYS_futex, Check::Any, "locks and channels"),
    (libc::SYS_sched_yield, Check::Any, "std's channels under contention"),
    (libc::SYS_preadv, Check::Any, "disks"),
    (libc::SYS_pwritev, Check::Any, "disks"),
    (libc::SYS_recvmsg, Check::Any, "invoke stream, control socket"),
    (libc::SYS_sendmsg, Check::Any, "invoke stream"),
    (libc::SYS_shutdown, Check::Any, "invoke stream, when the guest has said all"),
    (libc::SYS_close, Check::Any, "invoke stream, when both have; what was received for a request"),
    (libc::SYS_getrandom, Check::Any, "rng device; std's hash seeds"),
    (libc::SYS_clock_gettime, Check::Any, "stamps where the vDSO can't answer"),
    (libc::SYS_write, Check::Any, "bell, serial output and last words to standard error"),
    (libc::SYS_brk, Check::Any, "allocator"),
    (libc::SYS_exit_group, Check::Any, "end of the process"),
];

/// What vCPU threads need beside that.
const VCPU: &[Entry] = &[
    (libc::SYS_ioctl, Check::Second(VCPU_REQUESTS), "running the guest, vCPU state, interrupts"),
    (libc::SYS_rt_sigreturn, Check::Any, "the kick signal"),
];

/// What the device thread needs beside that.
const DEVICE: &[Entry] = &[
    (libc::SYS_ioctl, Check::Second(DEVICE_REQUESTS), "VM state, interrupts, written pages"),
    (libc::SYS_epoll_pwait, Check::Any, "its event loop"),
    (libc::SYS_epoll_ctl, Check::Any, "a new invoke stream"),
    (libc::SYS_read, Check::Any, "kernel and initramfs that are not sealed"),
    (libc::SYS_pread64, Check::Any, "state files, page tables, deltas that are saved"),
    (libc::SYS_pwrite64, Check::Any, "snapshot files"),
    (libc::SYS_lseek, Check::Any, "kernel, initramfs, snapshot files"),
    (libc::SYS_ftruncate, Check::Any, "deltas and snapshot files"),
    (libc::SYS_fstat, Check::Any, "lengths of received files"),
    (libc::SYS_statx, Check::Any, "the same, by std"),
    (libc::SYS_fcntl, Check::Second(COMMANDS), "seals, O_NONBLOCK; checks of std in debug builds"),
    (libc::SYS_recvfrom, Check::Any, "looking whether the host has written"),
    (libc::SYS_sendto, Check::Any, "control socket"),
    (libc::SYS_mmap, NO_CODE, "allocator; guest memory at a thaw"),
    (libc::SYS_munmap, Check::Any, "allocator; snapshots after a look at them"),
    (libc::SYS_mremap, Check::Any, "allocator; huge pages in reserve to their regions"),
    (libc::SYS_madvise, Check::Any, "huge and populated pages of guest memory"),
    (libc::SYS_getpid, Check::Any, "pthread_kill"),
    (libc::SYS_tgkill, Check::Ourselves, "kicking vCPUs out of KVM_RUN"),
    (libc::SYS_rt_sigprocmask, Check::Any, "pthread_kill"),
    (libc::SYS_sigaltstack, Check::Any, "std, at the end of the process"),
];

fn table(thread: Thread) -> impl Iterator<Item = &'static Entry> {
    let more = match thread {
        Thread::Device => DEVICE,
        Thread::Vcpu => VCPU,
    };
    COMMON.iter().chain(more)
}

/// Makes all threads of this process allocate from one heap that grows by `brk`, so that vCPU threads
/// need no other memory call. To be called before there is a second thread.
pub fn tame_allocator() {
    /// The largest that glibc takes: half of a heap's 64 MiB.
    const NEVER: libc::c_int = 32 << 20;
    // SAFETY: these set parameters of the allocator; a refused one would leave the default, and a
    // vCPU thread that went by it would be killed, not unconfined.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, NEVER);
    }
}

/// Confines the calling thread for good.
///
/// # Errors
/// [`SeccompError`] if the kernel takes no filter.
pub fn confine(thread: Thread) -> Result<(), SeccompError> {
    let allowed = table(thread).map(|&(call, check, _)| (call as u32, check)).collect();
    seccompiler::apply_filter(&program(&allowed, std::process::id()))
        .map_err(|error| SeccompError(error.to_string()))
}

/// What is asked at the end of a decision; `None`: nothing could help.
type Verdict = Option<Check>;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;

const fn argument(index: u32) -> u32 {
    16 + 8 * index
}

/// A program that allows these system calls with these arguments in process `pid`, and kills the
/// process at any other.
///
/// It looks for the number by bisection. A filter's price is paid when it is installed, too: the
/// kernel runs it once for each system call that there is, to learn which it always allows, and that
/// is ten times as long with a comparison for each number in turn.
fn program(allowed: &BTreeMap<u32, Check>, pid: u32) -> BpfProgram {
    const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

    // Where the verdict changes; below the first it is to kill. Numbers of the x32 ABI have a high
    // bit set, which puts them above the last.
    let mut turns: Vec<(u32, Verdict)> = Vec::new();
    for (&number, &check) in allowed {
        if turns.last().is_some_and(|&(end, _)| end == number) {
            turns.pop();
        }
        let goes_on = matches!(check, Check::Any)
            && turns.last().is_some_and(|(_, last)| matches!(last, Some(Check::Any)));
        if !goes_on {
            turns.push((number, Some(check)));
        }
        turns.push((number + 1, None));
    }
    let mut program = vec![
        load(ARCHITECTURE),
        jump(libc::BPF_JEQ, AUDIT_ARCH_X86_64, 1, 0),
        end(libc::SECCOMP_RET_KILL_PROCESS),
        load(NUMBER),
    ];
    bisect(&turns, None, pid, &mut program);
    program
}

/// Appends the decision about the value that was loaded: `below` what the first of `turns` names, and
/// from each on its verdict.
fn bisect(turns: &[(u32, Verdict)], below: Verdict, pid: u32, program: &mut BpfProgram) {
    if turns.is_empty() {
        conclude(below, pid, program);
        return;
    }
    let middle = turns.len() / 2;
    let here = program.len();
    program.push(jump(libc::BPF_JGE, turns[middle].0, 0, 0));
    bisect(&turns[..middle], below, pid, program);
    match u8::try_from(program.len() - here - 1) {
        Ok(distance) => program[here].jt = distance,
        Err(_) => {
            // Too far for a conditional jump: over an unconditional one, which goes further.
            program[here].jf = 1;
            let distance = program.len() - here - 1;
            program.insert(here + 1, statement(libc::BPF_JMP | libc::BPF_JA, distance as u32));
        }
    }
    bisect(&turns[middle + 1..], turns[middle].1, pid, program);
}

fn conclude(verdict: Verdict, pid: u32, program: &mut BpfProgram) {
    let kill = end(libc::SECCOMP_RET_KILL_PROCESS);
    let allow = end(libc::SECCOMP_RET_ALLOW);
    match verdict {
        None => program.push(kill),
        Some(Check::Any) => program.push(allow),
        Some(Check::Second(values)) => {
            let mut values = values.to_vec();
            values.sort_unstable();
            let mut turns = Vec::with_capacity(2 * values.len());
            for value in values {
                if turns.last().is_some_and(|&(end, _)| end == value) {
                    turns.pop();
                } else {
                    turns.push((value, Some(Check::Any)));
                }
                turns.push((value + 1, None));
            }
            program.push(load(argument(1)));
            bisect(&turns, None, pid, program);
        }
        Some(Check::ThirdLacks(bits)) => {
            program.extend([load(argument(2)), jump(libc::BPF_JSET, bits, 0, 1), kill, allow]);
        }
        Some(Check::Ourselves) => {
            program.extend([load(argument(0)), jump(libc::BPF_JEQ, pid, 1, 0), kill, allow]);
        }
    }
}

fn load(offset: u32) -> sock_filter {
    statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset)
}

fn end(verdict: u32) -> sock_filter {
    statement(libc::BPF_RET, verdict)
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

    const X86_64: u32 = 0xc000_003e;
    const PID: u32 = 7;

    /// Runs a program of this module's few instructions; with it, how many they were.
    fn run(
        program: &[sock_filter],
        architecture: u32,
        number: u32,
        arguments: [u32; 3],
    ) -> (u32, u32) {
        let (mut at, mut loaded, mut steps) = (0, 0, 0);
        loop {
            let now = &program[at];
            at += 1;
            steps += 1;
            let choose = |yes: bool| usize::from(if yes { now.jt } else { now.jf });
            match u32::from(now.code) {
                0x20 => {
                    loaded = match now.k {
                        NUMBER => number,
                        ARCHITECTURE => architecture,
                        offset => arguments[(offset as usize - 16) / 8],
                    }
                }
                0x05 => at += now.k as usize,
                0x15 => at += choose(loaded == now.k),
                0x35 => at += choose(loaded >= now.k),
                0x45 => at += choose(loaded & now.k != 0),
                0x06 => return (now.k, steps),
                code => panic!("instruction {code:#x}"),
            }
        }
    }

    fn filter(thread: Thread) -> (BTreeMap<u32, Check>, BpfProgram) {
        let allowed = table(thread).map(|&(call, check, _)| (call as u32, check)).collect();
        let program = program(&allowed, PID);
        (allowed, program)
    }

    fn allows(program: &[sock_filter], number: u32, arguments: [u32; 3]) -> bool {
        run(program, X86_64, number, arguments).0 == libc::SECCOMP_RET_ALLOW
    }

    #[test]
    fn exactly_the_listed_calls_of_this_architecture_are_allowed() {
        for thread in [Thread::Device, Thread::Vcpu] {
            let (allowed, program) = filter(thread);
            for number in (0..1024).chain([0x4000_0000, 0x4000_0001, u32::MAX]) {
                // Arguments that satisfy every check.
                let good = match allowed.get(&number) {
                    Some(Check::Second(values)) => [PID, values[0], 0],
                    _ => [PID, 0, 0],
                };
                assert_eq!(
                    allows(&program, number, good),
                    allowed.contains_key(&number),
                    "{number}"
                );
                let other = run(&program, 0x4000_0003, number, good).0;
                assert_eq!(other, libc::SECCOMP_RET_KILL_PROCESS);
            }
        }
    }

    #[test]
    fn arguments_are_looked_at() {
        let (_, device) = filter(Thread::Device);
        let (_, vcpu) = filter(Thread::Vcpu);
        let ioctl = libc::SYS_ioctl as u32;
        for request in VCPU_REQUESTS.iter().chain(DEVICE_REQUESTS) {
            for (program, requests) in [(&device, DEVICE_REQUESTS), (&vcpu, VCPU_REQUESTS)] {
                for near in [request - 1, *request, request + 1] {
                    let expected = requests.contains(&near);
                    assert_eq!(allows(program, ioctl, [0, near, 0]), expected, "{near:#x}");
                }
            }
        }
        let prot = |prot: libc::c_int| [0, 0, prot as u32];
        let mmap = libc::SYS_mmap as u32;
        assert!(allows(&device, mmap, prot(libc::PROT_READ | libc::PROT_WRITE)));
        assert!(!allows(&device, mmap, prot(libc::PROT_READ | libc::PROT_EXEC)));
        assert!(!allows(&vcpu, mmap, prot(libc::PROT_READ)));
        assert!(allows(&device, libc::SYS_tgkill as u32, [PID, 0, 0]));
        assert!(!allows(&device, libc::SYS_tgkill as u32, [1, 0, 0]));
    }

    #[test]
    fn requests_are_the_kernels() {
        // Of linux/kvm.h and linux/fs.h.
        for known in [0xae80, 0x4008_ae61, 0x8090_ae81, 0x4138_ae84, 0x4008_ae89, 0x4018_aee1] {
            assert!(VCPU_REQUESTS.contains(&known), "{known:#x}");
        }
        for known in [0xc208_ae62, 0x8208_ae63, 0x4030_ae7b, 0x8030_ae7c, 0xc060_6610, 0x5421] {
            assert!(DEVICE_REQUESTS.contains(&known), "{known:#x}");
        }
    }

    #[test]
    fn bisection_is_short() {
        for thread in [Thread::Device, Thread::Vcpu] {
            let (_, program) = filter(thread);
            for number in 0..1024 {
                let (_, steps) = run(&program, X86_64, number, [0; 3]);
                // Four instructions before it, seven levels; the same for arguments; long jumps.
                assert!(steps <= 24, "system call {number}: {steps} steps");
            }
        }
    }

    #[test]
    fn nothing_allowed_kills() {
        let program = program(&BTreeMap::new(), PID);
        assert_eq!(run(&program, X86_64, 0, [0; 3]).0, libc::SECCOMP_RET_KILL_PROCESS);
    }
}
