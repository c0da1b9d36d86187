//! Builds with debug assertions only: instead of being killed without a word, a thread that asks for
//! what it may not have says what that was, and then dies of the same signal.
//!
//! With [`RECORD`] in the environment, what is allowed is trapped, too: the filter's answer carries the
//! entry, the signal handler notes it and makes the call itself, from the one instruction that
//! the filter lets through. So the filter that is tested is the one that tells, and no tracer has to
//! understand what it sees.

use std::{
    fs::File,
    io,
    sync::{
        LazyLock,
        atomic::{AtomicPtr, AtomicU32, Ordering},
    },
};

use super::{
    Thread,
    program::Answers,
    table::{self, Entry},
};

/// Names a file of [`RECORD_BYTES`]: for each entry of the device thread's table, and then of the vCPU
/// threads', how often it was used, in 32 bits.
pub const RECORD: &str = "FIRN_SYSTEM_CALLS";

/// Length of the record.
pub const RECORD_BYTES: usize = 4096;

/// In what the filter says: a vCPU thread.
const VCPU: u32 = 1 << 15;

/// The record; null: there is none.
static USED: AtomicPtr<u32> = AtomicPtr::new(std::ptr::null_mut());

/// What filters of this build answer. Installs the handler at the first call.
pub(super) fn answers(thread: Thread) -> io::Result<Answers> {
    static INSTALLED: LazyLock<Result<(), io::ErrorKind>> =
        LazyLock::new(|| install().map_err(|error| error.kind()));
    (*INSTALLED)?;
    let answers = Answers { refused: libc::SECCOMP_RET_TRAP | bit(thread), ..Answers::KILL };
    Ok(match USED.load(Ordering::Acquire).is_null() {
        true => answers,
        false => Answers { allowed: note, exempt: Some(instruction()), ..answers },
    })
}

fn bit(thread: Thread) -> u32 {
    if thread == Thread::Device { 0 } else { VCPU }
}

/// What the filter says for an entry that is to be noted: one more than its index.
fn note(thread: Thread, index: usize, _: &Entry) -> u32 {
    libc::SECCOMP_RET_TRAP | bit(thread) | (index as u32 + 1)
}

/// Where an entry is in the record.
pub fn place(thread: Thread, index: usize) -> usize {
    match thread {
        Thread::Device => index,
        Thread::Vcpu(_) => table::entries(Thread::Device).count() + index,
    }
}

fn install() -> io::Result<()> {
    if let Some(path) = std::env::var_os(RECORD) {
        let file = File::options().read(true).write(true).open(path)?;
        let (protection, flags) = (
            rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
            rustix::mm::MapFlags::SHARED,
        );
        // SAFETY: a new mapping at an address of the kernel's choice. It is never taken away.
        let record = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), RECORD_BYTES, protection, flags, &file, 0)
        };
        USED.store(record?.cast(), Ordering::Release);
    }
    // SAFETY: all-zero is a valid `sigaction` (an empty mask).
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handle as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: `action` is initialised and alive; the handler is async-signal-safe: it touches
    // registers, statics and its stack, and makes system calls by `call`.
    match unsafe { libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

std::arch::global_asm!(
    // As `syscall(2)`, but the arguments are in memory: number, then six.
    ".globl firn_call",
    "firn_call:",
    "mov r11, rdi",
    "mov rax, [r11]",
    "mov rdi, [r11 + 8]",
    "mov rsi, [r11 + 16]",
    "mov rdx, [r11 + 24]",
    "mov r10, [r11 + 32]",
    "mov r8, [r11 + 40]",
    "mov r9, [r11 + 48]",
    "syscall",
    ".globl firn_called",
    "firn_called:",
    "ret",
);

unsafe extern "C" {
    fn firn_call(call: &[libc::greg_t; 7]) -> libc::greg_t;
    fn firn_called();
}

/// What the kernel gives as the place of the system calls of [`firn_call`].
fn instruction() -> u64 {
    firn_called as *const () as u64
}

extern "C" fn handle(_: libc::c_int, info: &libc::siginfo_t, context: &mut libc::ucontext_t) {
    let registers = &mut context.uc_mcontext.gregs;
    let [number, first, second, third] =
        [libc::REG_RAX, libc::REG_RDI, libc::REG_RSI, libc::REG_RDX].map(|r| registers[r as usize]);
    let [fourth, fifth, sixth] =
        [libc::REG_R10, libc::REG_R8, libc::REG_R9].map(|r| registers[r as usize]);
    let call = [number, first, second, third, fourth, fifth, sixth];
    // What the filter has said, after `SECCOMP_RET_TRAP`.
    let said = info.si_errno as u32;
    let thread = if said & VCPU == 0 { Thread::Device } else { Thread::Vcpu(0) };
    let used = USED.load(Ordering::Acquire);
    match (said & !VCPU) as usize {
        0 => say(thread, &call),
        entry => {
            // SAFETY: the record is longer than both tables together, and mapped for ever; whoever
            // writes to it, here and in other processes, does so by these lines.
            let count = unsafe { AtomicU32::from_ptr(used.add(place(thread, entry - 1))) };
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
    // SAFETY: an allowed call is the one that the code below this handler wanted to make, with its
    // own arguments. A refused one is refused again, and since SIGSYS is blocked here, that is the
    // end of the process.
    registers[libc::REG_RAX as usize] = unsafe { firn_call(&call) };
}

/// Writes what was refused to standard error.
fn say(thread: Thread, call: &[libc::greg_t; 7]) {
    use io::Write;
    let mut line = [0; 256];
    let mut rest = line.as_mut_slice();
    let known = table::entries(thread).find(|entry| i64::from(entry.number) == call[0]);
    let _ = write!(
        rest,
        "firn-vmm: the filter of the {} refuses system call {}",
        match thread {
            Thread::Device => "device thread",
            Thread::Vcpu(_) => "vCPU thread",
        },
        call[0]
    );
    let _ = match known {
        Some(entry) => write!(rest, " ({})", entry.call()),
        None => Ok(()),
    };
    let _ = writeln!(rest, " with {:#x}, {:#x}, {:#x}, {:#x}", call[1], call[2], call[3], call[4]);
    let length = 256 - rest.len();
    let line = line.as_ptr() as libc::greg_t;
    // SAFETY: the kernel reads `length` bytes of `line`, which is alive.
    unsafe { firn_call(&[libc::SYS_write, 2, line, length as libc::greg_t, 0, 0, 0]) };
}
