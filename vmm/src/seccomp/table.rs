//! What each kind of thread may ask of the kernel, with which arguments, and why.
//!
//! `cargo xtask system-calls` says which entries the tests use. One that they can't reach says why
//! in `unseen`; one that nobody uses and that has no such reason does not belong here.

use firn_pages::ioctl::{
    KVM_GET_DEVICE_ATTR, KVM_SET_DEVICE_ATTR, KVMIO, Opcode, PAGEMAP_SCAN,
    opcode::{none, read, read_write, write},
};
use kvm_bindings as kvm;

use super::Thread;
use crate::descriptors::{
    BELL, CONTROL, DISKS, EPOLL, MEMORY, Numbers, RECEIVED, STANDARD_ERROR, STATISTICS, STREAM, VM,
};

/// A system call that is allowed, or one of its requests.
#[derive(Debug)]
pub struct Entry {
    /// The call.
    pub number: u32,
    name: &'static str,
    /// Of a call that is many in one: what its second argument is.
    pub request: Option<u32>,
    request_name: &'static str,
    /// What is asked of its other arguments.
    pub asks: &'static [Ask],
    /// What it is for.
    pub why: &'static str,
    /// Why no test can use it.
    pub unseen: Option<&'static str>,
}

/// What is asked of an argument. The kernel takes those that are looked at as 32 bits, or (`prot`)
/// decides by a bit among these.
#[derive(Debug)]
pub enum Ask {
    /// The argument with this index lies within one of these.
    Among(u32, &'static [Numbers]),
    /// It has none of these bits.
    Lacks(u32, u32),
    /// The first is this process.
    Ourselves,
    /// The first is this thread's vCPU.
    OwnVcpu,
}

impl Entry {
    /// Name of the call.
    pub fn call(&self) -> &'static str {
        self.name.trim_start_matches("SYS_")
    }

    /// Name of the call, and of the request.
    pub fn name(&self) -> String {
        format!("{} {}", self.call(), self.request_name).trim_end().to_owned()
    }
}

macro_rules! table {
    ($($call:ident $(($request:ident))?, [$($ask:expr),*], $why:literal $(, unseen: $unseen:literal)?;)*) => {
        &[$(Entry {
            number: libc::$call as u32,
            name: stringify!($call),
            request: table!(@request $($request)?),
            request_name: stringify!($($request)?),
            asks: &[$($ask),*],
            why: $why,
            unseen: table!(@reason $($unseen)?),
        }),*]
    };
    (@request) => { None };
    (@request $request:ident) => { Some($request) };
    (@reason) => { None };
    (@reason $unseen:literal) => { Some($unseen) };
}

/// The first argument, a descriptor, is of this kind.
const fn on(numbers: &'static [Numbers]) -> Ask {
    Ask::Among(0, numbers)
}

/// A mapping of no file, which calls say by -1; what begins there has no end.
const NO_FILE: Numbers = -1..0;

const NO_CODE: Ask = Ask::Lacks(2, libc::PROT_EXEC as u32);

// What `kvm-ioctls` calls: it keeps these numbers private.
const KVM_RUN: Opcode = none(KVMIO, 0x80);
const KVM_IRQ_LINE: Opcode = write::<kvm::kvm_irq_level>(KVMIO, 0x61);
const KVM_GET_REGS: Opcode = read::<kvm::kvm_regs>(KVMIO, 0x81);
const KVM_SET_REGS: Opcode = write::<kvm::kvm_regs>(KVMIO, 0x82);
const KVM_GET_SREGS: Opcode = read::<kvm::kvm_sregs>(KVMIO, 0x83);
const KVM_SET_SREGS: Opcode = write::<kvm::kvm_sregs>(KVMIO, 0x84);
const KVM_TRANSLATE: Opcode = read_write::<kvm::kvm_translation>(KVMIO, 0x85);
const KVM_GET_MSRS: Opcode = read_write::<kvm::kvm_msrs>(KVMIO, 0x88);
const KVM_SET_MSRS: Opcode = write::<kvm::kvm_msrs>(KVMIO, 0x89);
const KVM_GET_LAPIC: Opcode = read::<kvm::kvm_lapic_state>(KVMIO, 0x8e);
const KVM_SET_LAPIC: Opcode = write::<kvm::kvm_lapic_state>(KVMIO, 0x8f);
const KVM_GET_CPUID2: Opcode = read_write::<kvm::kvm_cpuid2>(KVMIO, 0x91);
const KVM_GET_MP_STATE: Opcode = read::<kvm::kvm_mp_state>(KVMIO, 0x98);
const KVM_SET_MP_STATE: Opcode = write::<kvm::kvm_mp_state>(KVMIO, 0x99);
const KVM_GET_VCPU_EVENTS: Opcode = read::<kvm::kvm_vcpu_events>(KVMIO, 0x9f);
const KVM_SET_VCPU_EVENTS: Opcode = write::<kvm::kvm_vcpu_events>(KVMIO, 0xa0);
const KVM_GET_DEBUGREGS: Opcode = read::<kvm::kvm_debugregs>(KVMIO, 0xa1);
const KVM_SET_DEBUGREGS: Opcode = write::<kvm::kvm_debugregs>(KVMIO, 0xa2);
const KVM_GET_XSAVE: Opcode = read::<kvm::kvm_xsave>(KVMIO, 0xa4);
const KVM_SET_XSAVE: Opcode = write::<kvm::kvm_xsave>(KVMIO, 0xa5);
const KVM_GET_XCRS: Opcode = read::<kvm::kvm_xcrs>(KVMIO, 0xa6);
const KVM_SET_XCRS: Opcode = write::<kvm::kvm_xcrs>(KVMIO, 0xa7);
const KVM_SET_TSC_KHZ: Opcode = none(KVMIO, 0xa2);
const KVM_KVMCLOCK_CTRL: Opcode = none(KVMIO, 0xad);

const KVM_GET_IRQCHIP: Opcode = read_write::<kvm::kvm_irqchip>(KVMIO, 0x62);
/// A write that its header has as a read.
const KVM_SET_IRQCHIP: Opcode = read::<kvm::kvm_irqchip>(KVMIO, 0x63);
const KVM_SET_CLOCK: Opcode = write::<kvm::kvm_clock_data>(KVMIO, 0x7b);
const KVM_GET_CLOCK: Opcode = read::<kvm::kvm_clock_data>(KVMIO, 0x7c);

const F_GETFD: u32 = libc::F_GETFD as u32;
const F_GET_SEALS: u32 = libc::F_GET_SEALS as u32;
const F_DUPFD_CLOEXEC: u32 = libc::F_DUPFD_CLOEXEC as u32;
const EPOLL_CTL_ADD: u32 = libc::EPOLL_CTL_ADD as u32;

/// vCPU threads, which run the guest and work for its devices.
const VCPU: &[Entry] = table! {
    SYS_ioctl(KVM_RUN),             [Ask::OwnVcpu], "running the guest";
    SYS_ioctl(KVM_IRQ_LINE),        [on(&[VM])],    "a device's interrupt";
    SYS_futex,                      [],             "locks; waiting for a command, answering it";
    SYS_preadv,                     [on(&[DISKS])], "disk reads, and blocks that are written in part";
    SYS_pwritev,                    [on(&[DISKS])], "disk writes";
    SYS_recvmsg,                    [on(&[STREAM])], "what the host says to the guest";
    SYS_sendmsg,                    [on(&[STREAM])], "what the guest says to the host";
    SYS_shutdown,                   [on(&[STREAM])], "the guest has said all";
    SYS_close,                      [on(&[STREAM])], "the guest has ended its connection";
    SYS_getrandom,                  [],             "rng device";
    SYS_write,                      [on(&[STANDARD_ERROR, BELL])], "serial output; the guest is over";
    SYS_brk,                        [],             "allocator",
        unseen: "which thread meets the heap's end is chance";
    SYS_rt_sigreturn,               [],             "the kick that ends KVM_RUN",
        unseen: "the recorder returns by the same call; each pause kicks";
    SYS_clock_gettime,              [],             "stamps",
        unseen: "only where the clock source has no vDSO";
    SYS_exit_group,                 [],             "a panic on this thread ends the process",
        unseen: "no input is known that makes one panic";

    SYS_ioctl(KVM_GET_REGS),        [Ask::OwnVcpu], "save; where a guest that ended stood";
    SYS_ioctl(KVM_SET_REGS),        [Ask::OwnVcpu], "boot, thaw, reset";
    SYS_ioctl(KVM_GET_SREGS),       [Ask::OwnVcpu], "save; where a guest that ended stood";
    SYS_ioctl(KVM_SET_SREGS),       [Ask::OwnVcpu], "boot, thaw, reset";
    SYS_ioctl(KVM_TRANSLATE),       [Ask::OwnVcpu], "the instruction that could not be emulated";
    SYS_ioctl(KVM_GET_MSRS),        [Ask::OwnVcpu], "save";
    SYS_ioctl(KVM_SET_MSRS),        [Ask::OwnVcpu], "thaw, reset";
    SYS_ioctl(KVM_GET_LAPIC),       [Ask::OwnVcpu], "save";
    SYS_ioctl(KVM_SET_LAPIC),       [Ask::OwnVcpu], "thaw, reset";
    SYS_ioctl(KVM_GET_CPUID2),      [Ask::OwnVcpu], "what XSAVE state there is";
    SYS_ioctl(KVM_GET_MP_STATE),    [Ask::OwnVcpu], "save; whether the vCPU is halted";
    SYS_ioctl(KVM_SET_MP_STATE),    [Ask::OwnVcpu], "thaw, reset";
    SYS_ioctl(KVM_GET_VCPU_EVENTS), [Ask::OwnVcpu], "save";
    SYS_ioctl(KVM_SET_VCPU_EVENTS), [Ask::OwnVcpu], "thaw, reset";
    SYS_ioctl(KVM_GET_DEBUGREGS),   [Ask::OwnVcpu], "save";
    SYS_ioctl(KVM_SET_DEBUGREGS),   [Ask::OwnVcpu], "thaw, reset";
    SYS_ioctl(KVM_GET_XSAVE),       [Ask::OwnVcpu], "save";
    SYS_ioctl(KVM_SET_XSAVE),       [Ask::OwnVcpu], "thaw, reset";
    SYS_ioctl(KVM_GET_XCRS),        [Ask::OwnVcpu], "save";
    SYS_ioctl(KVM_SET_XCRS),        [Ask::OwnVcpu], "boot, thaw, reset";
    SYS_ioctl(KVM_SET_TSC_KHZ),     [Ask::OwnVcpu], "thaw",
        unseen: "only a snapshot of a host whose TSC ticks otherwise needs it";
    SYS_ioctl(KVM_KVMCLOCK_CTRL),   [Ask::OwnVcpu], "the guest was paused";
    SYS_ioctl(KVM_SET_DEVICE_ATTR), [Ask::OwnVcpu], "the TSC's offset";
    SYS_ioctl(KVM_GET_DEVICE_ATTR), [Ask::OwnVcpu], "the TSC's offset";
};

/// The device thread, which carries out the host's requests.
const DEVICE: &[Entry] = table! {
    SYS_epoll_pwait,                [on(&[EPOLL])], "its event loop";
    SYS_epoll_ctl(EPOLL_CTL_ADD),   [on(&[EPOLL]), Ask::Among(2, &[STREAM])], "a new invoke stream";
    SYS_recvmsg,                    [on(&[CONTROL, STREAM])], "requests; what the host says to the guest";
    SYS_sendto,                     [on(&[CONTROL])], "answers";
    SYS_fcntl(F_DUPFD_CLOEXEC),     [on(&[RECEIVED])], "received descriptors to their places";
    SYS_fcntl(F_GET_SEALS),         [on(&[RECEIVED, MEMORY])], "whether kernel, initramfs, snapshots may be mapped";
    SYS_close,                      [on(&[RECEIVED, MEMORY, STREAM, DISKS])], "what a request brought, or replaced";
    SYS_fstat,                      [on(&[RECEIVED, MEMORY, DISKS])], "lengths of received files";
    SYS_read,                       [on(&[RECEIVED])], "kernel and initramfs that are not sealed";
    SYS_lseek,                      [on(&[RECEIVED, MEMORY])], "kernel, initramfs, snapshots";
    SYS_pread64,                    [on(&[RECEIVED, STATISTICS, DISKS])], "VM state, page tables, deltas";
    SYS_pwrite64,                   [on(&[RECEIVED])], "snapshot files";
    SYS_write,                      [on(&[STANDARD_ERROR, RECEIVED])], "last words; snapshot files";
    SYS_ftruncate,                  [on(&[RECEIVED, DISKS])], "snapshot files, deltas";
    SYS_mmap,                       [NO_CODE, Ask::Among(4, &[NO_FILE, RECEIVED, MEMORY])],
        "allocator; guest memory, and snapshots to read them";
    SYS_munmap,                     [],             "allocator; snapshots that were read";
    SYS_mremap,                     [],             "allocator; huge pages in reserve to their regions";
    SYS_madvise,                    [],             "huge, small and populated pages of guest memory";
    SYS_brk,                        [],             "allocator";
    SYS_futex,                      [],             "locks; commands to vCPUs and their answers";
    SYS_getpid,                     [],             "pthread_kill";
    SYS_tgkill,                     [Ask::Ourselves], "kicking vCPUs out of KVM_RUN";
    SYS_rt_sigprocmask,             [],             "pthread_kill";
    SYS_recvfrom,                   [on(&[STREAM])], "looking whether the host has written";
    SYS_sendmsg,                    [on(&[STREAM])], "what the guest says to the host";
    SYS_shutdown,                   [on(&[STREAM])], "the guest has said all";
    SYS_clock_gettime,              [],             "CPU time of vCPU threads; stamps where the clock source has no vDSO";
    SYS_exit_group,                 [],             "the end";

    SYS_ioctl(KVM_IRQ_LINE),        [on(&[VM])],    "the invoke stream's interrupt";
    SYS_ioctl(KVM_GET_IRQCHIP),     [on(&[VM])],    "save; whom an interrupt is for";
    SYS_ioctl(KVM_SET_IRQCHIP),     [on(&[VM])],    "thaw, reset";
    SYS_ioctl(KVM_GET_CLOCK),       [on(&[VM])],    "save";
    SYS_ioctl(KVM_SET_CLOCK),       [on(&[VM])],    "thaw, reset";
    SYS_ioctl(PAGEMAP_SCAN),        [on(&[RECEIVED])], "written pages, from Linux 6.7 on";
};

/// Builds with debug assertions, both threads: std looks whether what it closes is open.
const CHECKS: &[Entry] = if cfg!(debug_assertions) {
    table! {
        SYS_fcntl(F_GETFD),         [],             "std, when it closes", unseen: "not in every build that checks";
    }
} else {
    &[]
};

/// The entries of a thread.
pub fn entries(thread: Thread) -> impl Iterator<Item = &'static Entry> + Clone {
    let table = match thread {
        Thread::Device => DEVICE,
        Thread::Vcpu(_) => VCPU,
    };
    table.iter().chain(CHECKS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_the_kernels() {
        // Of linux/kvm.h and linux/fs.h.
        let of = |table: &[Entry]| table.iter().filter_map(|e| e.request).collect::<Vec<_>>();
        for known in [0xae80, 0x4008_ae61, 0x8090_ae81, 0x4138_ae84, 0x4008_ae89, 0x4018_aee1] {
            assert!(of(VCPU).contains(&known), "{known:#x}");
        }
        for known in [0xc208_ae62, 0x8208_ae63, 0x4030_ae7b, 0x8030_ae7c, 0xc060_6610] {
            assert!(of(DEVICE).contains(&known), "{known:#x}");
        }
    }
}
