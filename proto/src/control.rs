//! The control protocol: host ↔ `firn-vmm`.
//!
//! One `SOCK_SEQPACKET` datagram is one message; descriptors ride with it as `SCM_RIGHTS`, in the
//! order that each message documents. The host sends one [`ToVmm`] at a time and waits for its
//! answer; [`FromVmm::Exited`] may come at any time and is the last message.
//!
//! The order of a VMM's life: [`ToVmm::Build`] once, then one of [`ToVmm::Boot`] and
//! [`ToVmm::Thaw`], then any of the others.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::CodecError;

/// Version of this protocol; the first field of [`ShellConfig`].
pub const VERSION: u16 = 4;

/// So many bytes come first on the invoke connection of a thaw or reset, in one piece: the host's TSC, a
/// little-endian `u64`, at the moment when the guest's clocks go on. They are for the VMM; a guest that
/// runs before they come does so by clocks that went on when it ran.
///
/// A moment that the host has chosen is one that it can tell the guest ([`crate::guest::Renew`]).
pub const MOMENT: usize = 8;

/// Longest message in bytes.
pub const MAX_MESSAGE: usize = 64 * 1024;

/// Most descriptors that one message carries.
pub const MAX_DESCRIPTORS: usize = 32;

/// Most block devices of one microVM.
pub const MAX_DISKS: usize = 8;

/// Most huge pages that a shell keeps in reserve.
pub const MAX_SPARES: u16 = 512;

/// Most runs of pages in one list of a [`MemoryPlan`].
pub const MAX_RUNS: usize = 4096;

/// Most vCPUs of one microVM.
pub const MAX_VCPUS: u8 = 8;

/// Descriptor number of the control socket in a VMM process.
pub const CONTROL_FD: i32 = 3;

/// Descriptor number of `/dev/kvm` in a VMM process.
pub const KVM_FD: i32 = 4;

/// vsock port on the host (CID 2) that `firn-init` connects to: the invoke connection.
pub const INVOKE_PORT: u32 = 1024;

/// Everything about a microVM that does not depend on what runs in it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ShellConfig {
    /// [`VERSION`] of the sender.
    pub version: u16,
    /// Number of vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Name of the CPUID template.
    pub cpu_template: CpuTemplate,
    /// Block devices, in the order of their slots (`/dev/vda` is slot 0).
    pub disks: Vec<DiskKind>,
    /// Give the guest a 16550A on port 0x3f8 whose output goes to the VMM's standard error.
    pub serial: bool,
    /// Huge pages, of 2 MiB each, to have zeroed and ready for [`MemoryPlan::copied`], at most
    /// [`MAX_SPARES`].
    pub spares: u16,
}

/// Consecutive 4 KiB pages of guest memory, counted as in a linear memory file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageRun {
    /// The first page.
    pub first: u32,
    /// How many.
    pub pages: u32,
}

/// How a thaw treats pages of guest memory that the snapshot does not hold, or that the guest is
/// known to write soon. All else is mapped from the snapshot and copied page by page when it is
/// written.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPlan {
    /// In ascending order and disjoint: pages that are holes in the snapshot's file. The guest gets
    /// memory of its own there: a hole that it reads or writes through a mapping would become a page
    /// of the file, which nobody gives back.
    pub holes: Vec<PageRun>,
    /// In ascending order and disjoint: all pages that are not zero, and no holes, in those regions
    /// of 2 MiB which are to be copied whole, each into a huge page.
    pub copied: Vec<PageRun>,
    /// Pages to be copied one by one before the guest runs.
    pub populated: Vec<PageRun>,
}

/// What CPU the guest sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum CpuTemplate {
    /// The host's own features, as far as KVM supports them.
    Host,
    /// What a fleet of hosts has whose CPUs are of level x86-64-v2 at least, and no more.
    X86_64V2,
    /// What a fleet of hosts has whose CPUs are of level x86-64-v3 at least, and no more.
    X86_64V3,
}

impl CpuTemplate {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Host, Self::X86_64V2, Self::X86_64V3];
}

impl fmt::Display for CpuTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Host => "host",
            Self::X86_64V2 => "x86-64-v2",
            Self::X86_64V3 => "x86-64-v3",
        })
    }
}

/// There is no CPU template of this name.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no CPU template {0:?}; there are host, x86-64-v2 and x86-64-v3")]
pub struct UnknownTemplate(String);

impl FromStr for CpuTemplate {
    type Err = UnknownTemplate;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|template| template.to_string() == name);
        found.ok_or_else(|| UnknownTemplate(name.to_owned()))
    }
}

/// What a block device may do, fixed when the shell is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum DiskKind {
    /// The guest may only read (`VIRTIO_BLK_F_RO`).
    ReadOnly,
    /// Writes go to a private delta; the backing stays as it is.
    CopyOnWrite,
}

/// Where a block device's bytes come from. Each variant names the descriptors that it takes from
/// the message, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskSource {
    /// No medium: capacity 0. Takes no descriptor.
    Empty,
    /// A read-only backing. Takes one descriptor: the backing.
    ReadOnly,
    /// Takes two descriptors: the immutable backing and an empty private delta.
    CopyOnWrite,
    /// Takes three descriptors: the immutable backing, the immutable delta of the snapshot that is
    /// being thawed (its block bitmap is part of the snapshot's state), an empty private delta.
    CopyOnWriteThawed,
}

impl DiskSource {
    /// How many descriptors of the message belong to this source.
    pub fn descriptors(self) -> usize {
        match self {
            Self::Empty => 0,
            Self::ReadOnly => 1,
            Self::CopyOnWrite => 2,
            Self::CopyOnWriteThawed => 3,
        }
    }
}

/// Host to VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ToVmm {
    /// Build the microVM: everything that does not depend on the function. Answer:
    /// [`FromVmm::Ready`]. No descriptors.
    Build(ShellConfig),
    /// Load a kernel and start. Descriptors: kernel; initramfs, if `initramfs`; the host's end of
    /// the invoke connection (a `SOCK_STREAM` socket); then each disk's. Answer:
    /// [`FromVmm::Booted`].
    Boot {
        /// Kernel command line without the devices, which the VMM appends.
        cmdline: String,
        /// Whether an initramfs follows the kernel.
        initramfs: bool,
        /// One for each of [`ShellConfig::disks`].
        disks: Vec<DiskSource>,
    },
    /// Restore a snapshot and run. Descriptors: guest memory (a file at least as long as guest
    /// memory, mapped privately), VMM state, the host's end of the invoke connection (its first
    /// [`MOMENT`] bytes are for the VMM; others that are already readable from it are put into the
    /// receive queue before the guest runs), then each disk's. Answer: [`FromVmm::Thawed`].
    Thaw {
        /// One for each of [`ShellConfig::disks`].
        disks: Vec<DiskSource>,
        /// Run at once; otherwise stay paused.
        resume: bool,
        /// What to copy before the guest runs.
        plan: MemoryPlan,
    },
    /// Replace a block device's medium while the guest runs and tell the guest (configuration
    /// change interrupt). Descriptors: the source's. Answer: [`FromVmm::Done`].
    Attach {
        /// Index into [`ShellConfig::disks`].
        slot: u8,
        /// The new medium.
        source: DiskSource,
    },
    /// Stop all vCPUs. Bytes on the invoke connection resume them. Answer: [`FromVmm::Paused`].
    Pause,
    /// Give back memory that the paused microVM holds without need: pages that a [`MemoryPlan`]
    /// had copied and the guest has not changed. Answer: [`FromVmm::Reclaimed`].
    Reclaim,
    /// Let the vCPUs run again. Answer: [`FromVmm::Done`].
    Resume,
    /// Write the paused microVM down; it stays paused. Of guest memory only what differs from the
    /// snapshot that it was thawed from, if it was. Descriptors: an empty file for guest memory, an
    /// empty file for the VMM's state, the VMM's own pagemap as for [`ToVmm::Reset`], then an empty
    /// file for the delta of each copy-on-write disk, in slot order. Answer: [`FromVmm::Saved`].
    Save,
    /// Report counters. Answer: [`FromVmm::Stats`].
    Stats,
    /// End the process. Answer: [`FromVmm::Exited`].
    Stop,
    /// Put a thawed microVM, running or paused, back to its snapshot: every page that was written,
    /// vCPUs, interrupt controllers, clocks, devices, disks. It stays paused, and its clocks stand,
    /// until bytes come on the invoke connection (or are there already), of which the first
    /// [`MOMENT`] are for the VMM. Descriptors: a new host end of the invoke connection, which
    /// replaces the old one with all that is still in it; the
    /// VMM's own `/proc/PID/pagemap`, opened without CAP_SYS_ADMIN, so that it tells no physical
    /// addresses. Refused after [`ToVmm::Attach`]. Answer: [`FromVmm::Reset`]; a reset that fails
    /// once it has begun ends the process.
    Reset,
    /// Say where the guest stands, for an error message: it did not answer. A running guest is
    /// stopped for a moment. Answer: [`FromVmm::Diagnosis`].
    Diagnose,
}

/// VMM to host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum FromVmm {
    /// The shell stands and waits.
    Ready(Stamps),
    /// The kernel is loaded and the vCPUs have been told to run.
    Booted(Stamps),
    /// The snapshot is restored and the vCPUs have been told to run (or stay paused, as asked).
    Thawed(Stamps),
    /// The request is done.
    Done,
    /// Memory was given back: so many 4 KiB pages of the guest's.
    Reclaimed(u64),
    /// The microVM is written down.
    Saved(SaveReport),
    /// Counters since the process started.
    Stats(Stats),
    /// The request failed. After a failed `Build`, `Boot` or `Thaw` the process ends.
    Failed(Failure),
    /// The guest, or the VMM, ended; the process exits with [`ExitReason::code`].
    Exited(Exit),
    /// The microVM is as its snapshot was.
    Reset(ResetReport),
    /// Where the guest stands, in one line of text: registers, interrupts on their way, queues.
    Diagnosis(String),
    /// All vCPUs are stopped. So many interrupts were raised again since the last such answer or
    /// [`FromVmm::Reset`] (see [`Stats::interrupts_raised_again`]).
    Paused(u64),
}

/// One moment of the VMM's work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Phase {
    /// First instruction of `main`.
    ProcessStart,
    /// VM, vCPUs, irqchip, memslot and devices stand; the cage is closed.
    ShellReady,
    /// The request was received.
    Received,
    /// Guest memory is mapped (thaw), the kernel is loaded (boot), or all pages that were written
    /// are back (reset).
    Mapped,
    /// The pages of the [`MemoryPlan`] are copied (thaw).
    Populated,
    /// Devices, irqchip and clock are restored and the first message is queued.
    DevicesSet,
    /// The first vCPU has its registers.
    VcpuSet,
    /// Just before the first `KVM_RUN`.
    Entered,
    /// The first `KVM_RUN` that came back to user space.
    FirstExit,
    /// The first byte from the guest reached the host's socket.
    FirstByte,
    /// All vCPUs are stopped and drained (reset).
    Stopped,
}

/// Moments in nanoseconds of `CLOCK_MONOTONIC`, in the order in which they were taken.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamps(pub Vec<(Phase, u64)>);

impl Stamps {
    /// The stamp of `phase` in nanoseconds of `CLOCK_MONOTONIC`, if it was taken.
    pub fn get(&self, phase: Phase) -> Option<u64> {
        self.0.iter().find(|(p, _)| *p == phase).map(|&(_, ns)| ns)
    }
}

/// What [`ToVmm::Save`] wrote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveReport {
    /// Length of guest memory in bytes.
    pub memory_bytes: u64,
    /// Pages of 4 KiB that the memory file holds (the others are holes).
    pub pages_written: u64,
    /// Length in bytes of the VMM's state at the start of the state file.
    pub state_bytes: u64,
    /// Length in bytes of the page bitmap that follows it: one bit for each 4 KiB page of the
    /// memory file, least significant bit first, set where the page was written.
    pub bitmap_bytes: u64,
    /// How long the vCPUs had been stopped when writing ended, in nanoseconds.
    pub duration_ns: u64,
    /// What the guest's TSC reads at the [`MOMENT`] of a thaw or reset, in ticks.
    pub guest_tsc: u64,
    /// Its frequency in kHz.
    pub tsc_khz: u32,
}

/// What [`ToVmm::Reset`] did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResetReport {
    /// `Received`, `Stopped`, `Mapped`, `DevicesSet`, `VcpuSet` of this reset.
    pub stamps: Stamps,
    /// Pages of 4 KiB that were copied back.
    pub pages: u64,
    /// From the request to the last vCPU's restored state, in nanoseconds.
    pub duration_ns: u64,
    /// As in [`FromVmm::Paused`].
    pub interrupts_raised_again: u64,
}

/// Counters of a VMM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// All moments so far.
    pub stamps: Stamps,
    /// Returns of `KVM_RUN` to user space, by name of the reason.
    pub exits: Vec<(String, u64)>,
    /// Counters of the VM and of each vCPU from `KVM_GET_STATS_FD`, by name; empty where the
    /// kernel has none.
    pub kvm: Vec<(String, u64)>,
    /// Guest TSC minus host TSC in ticks: what converts the guest's `rdtsc` to the host's.
    pub tsc_offset: i64,
    /// TSC frequency in kHz.
    pub tsc_khz: u32,
    /// Whether the vCPUs are stopped.
    pub paused: bool,
    /// Where guest memory starts in the VMM's address space. It is one range, in the order of a
    /// linear memory file.
    pub memory_address: u64,
    /// Interrupts that were raised again because the guest, though it ran, had not acknowledged
    /// them.
    pub interrupts_raised_again: u64,
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Class of the failure.
    pub kind: FailureKind,
    /// One sentence with the offending values.
    pub message: String,
}

/// Classes of [`Failure`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum FailureKind {
    /// The request makes no sense here and now.
    BadRequest,
    /// The kernel image can't be booted.
    BadKernel,
    /// The snapshot's bytes are not what they should be.
    SnapshotCorrupt,
    /// The snapshot has another format version.
    SnapshotVersion,
    /// The snapshot was made on a CPU that this one can't stand in for.
    SnapshotCpu,
    /// The snapshot's memory size, vCPUs or devices are not this shell's.
    SnapshotShape,
    /// KVM refused.
    Kvm,
    /// A file could not be read, written or mapped (disk full, for one).
    Io,
}

/// How a microVM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Class of the end.
    pub reason: ExitReason,
    /// What is known beyond it: registers, bytes at RIP, an error.
    pub detail: String,
}

/// Classes of [`Exit`], each with its exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ExitReason {
    /// The host asked for it, or closed the control socket.
    Stopped,
    /// The guest asked for a reset or power-off.
    GuestShutdown,
    /// The guest's kernel or init panicked and said so.
    GuestPanic,
    /// Triple fault.
    TripleFault,
    /// KVM could not emulate an instruction.
    EmulationFailure,
    /// KVM failed otherwise (`KVM_EXIT_INTERNAL_ERROR`, `KVM_EXIT_FAIL_ENTRY`).
    KvmInternalError,
    /// The guest did to a device what no driver may do.
    DeviceViolation,
    /// KVM would not restore a vCPU of a guest that waited fresh: what the host has sent since has
    /// not reached the guest, and no vCPU has run.
    NotRestored,
    /// The VMM itself failed.
    VmmError,
}

impl ExitReason {
    /// The process's exit code.
    pub fn code(self) -> i32 {
        match self {
            Self::Stopped | Self::GuestShutdown => 0,
            Self::GuestPanic => 10,
            Self::TripleFault => 11,
            Self::EmulationFailure => 12,
            Self::KvmInternalError => 13,
            Self::DeviceViolation => 14,
            Self::NotRestored => 15,
            Self::VmmError => 20,
        }
    }
}

/// Encodes a message.
///
/// # Errors
/// [`CodecError::TooLong`] over [`MAX_MESSAGE`].
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, CodecError> {
    crate::encode(message, Vec::new(), MAX_MESSAGE)
}

/// Decodes a whole message from the host.
///
/// # Errors
/// Any [`CodecError`].
pub fn decode_to_vmm(bytes: &[u8]) -> Result<ToVmm, CodecError> {
    crate::decode(bytes, MAX_MESSAGE)
}

/// Decodes a whole message from a VMM.
///
/// # Errors
/// Any [`CodecError`].
pub fn decode_from_vmm(bytes: &[u8]) -> Result<FromVmm, CodecError> {
    crate::decode(bytes, MAX_MESSAGE)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn build_round_trips() {
        let message = ToVmm::Build(ShellConfig {
            version: VERSION,
            vcpus: 2,
            memory_mib: 128,
            cpu_template: CpuTemplate::Host,
            disks: vec![DiskKind::ReadOnly, DiskKind::CopyOnWrite],
            serial: false,
            spares: 4,
        });
        assert_eq!(decode_to_vmm(&encode(&message).unwrap()), Ok(message));
    }

    #[test]
    fn trailing_bytes_are_refused() {
        let mut bytes = encode(&ToVmm::Pause).unwrap();
        bytes.push(0);
        assert_eq!(decode_to_vmm(&bytes), Err(CodecError::Trailing(1)));
    }

    #[test]
    fn cpu_templates_have_names() {
        for template in CpuTemplate::ALL {
            assert_eq!(template.to_string().parse(), Ok(template));
        }
        let error = "x86-64-v9".parse::<CpuTemplate>().unwrap_err().to_string();
        assert!(error.contains("\"x86-64-v9\"") && error.contains("x86-64-v3"), "{error}");
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = decode_to_vmm(&bytes);
            let _ = decode_from_vmm(&bytes);
        }
    }
}
