//! What the control messages do: build a shell, boot or thaw it, pause, resume, attach, save.
//!
//! A [`Vm`] is built once and never rebuilt. It is *empty* until boot or thaw, then *running* or
//! *paused*; a request that does not fit its state is refused and changes nothing.

mod reclaim;
mod reset;
mod running;

use std::{
    fs::File,
    io::Seek,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd},
        unix::{fs::FileExt, net::UnixStream},
    },
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use firn_proto::control::{
    self, DiskSource, Exit, Failure, FailureKind, MemoryPlan, Phase, SaveReport, ShellConfig, Stats,
};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use crate::{
    arch::{
        self, boot, confine,
        cpuid::Signature,
        msrs,
        tsc::{self, Frequency},
        vcpu_state,
        vm_state::VmState,
    },
    descriptors::{DISKS, MEMORY, Numbers, STREAM, VCPUS, VM, place},
    handover::Lapics,
    machine::{Machine, MachineRestoreError},
    memory::{Memory, MemoryError, written::own_pagemap},
    plan::{self, PlanError, Spares},
    snapshot::{self, SavedVm},
    stats::{Clock, ExitCounters, KvmStats, monotonic_ns},
    vcpu::{self, Command, Part, Reply, Shared, Vcpu},
};
use reset::Origin;
use running::{Deaf, State};

/// Why a request was not carried out.
#[derive(Debug)]
pub enum RequestError {
    /// It failed and the VMM goes on.
    Refused(Failure),
    /// The guest ended meanwhile.
    Ended(Exit),
}

impl RequestError {
    /// A failure of `kind` with `message`.
    pub fn refused(kind: FailureKind, message: impl ToString) -> Self {
        Self::Refused(Failure { kind, message: message.to_string() })
    }
}

impl From<MemoryError> for RequestError {
    fn from(error: MemoryError) -> Self {
        let kind = match error {
            MemoryError::Size(_) => FailureKind::BadRequest,
            MemoryError::FileSize { .. } => FailureKind::SnapshotShape,
            _ => FailureKind::Io,
        };
        Self::refused(kind, error)
    }
}

impl From<PlanError> for RequestError {
    fn from(error: PlanError) -> Self {
        match error {
            PlanError::Malformed(_) => Self::refused(FailureKind::BadRequest, error),
            PlanError::Kernel { .. } => Self::refused(FailureKind::Io, error),
            PlanError::Memory(error) => error.into(),
        }
    }
}

impl From<MachineRestoreError> for RequestError {
    fn from(error: MachineRestoreError) -> Self {
        Self::refused(FailureKind::SnapshotShape, error)
    }
}

fn kvm_error(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> RequestError {
    move |error| RequestError::refused(FailureKind::Kvm, format!("KVM {what}: {error}"))
}

fn io_error(what: &'static str) -> impl FnOnce(std::io::Error) -> RequestError {
    move |error| RequestError::refused(FailureKind::Io, format!("{what}: {error}"))
}

type Result<T> = std::result::Result<T, RequestError>;

/// One microVM.
pub struct Vm {
    config: ShellConfig,
    vm: Arc<VmFd>,
    memory: Arc<Memory>,
    spares: Spares,
    /// Ranges of regions that the thaw copied whole.
    copied: Vec<std::ops::Range<u64>>,
    machine: Arc<Machine>,
    signature: Signature,
    /// What the MSRs of a vCPU are that has never run.
    power_on_msrs: Vec<(u32, u64)>,
    /// The host's TSC frequency.
    host_khz: u32,
    /// Whether KVM can give guests another one.
    scales_tsc: bool,
    /// The guest's.
    tsc: Frequency,
    vcpus: Vec<Vcpu>,
    shared: Arc<Shared>,
    statistics: Vec<KvmStats>,
    clock: Arc<Clock>,
    tsc_offset: i64,
    state: State,
    /// What this VM was thawed from.
    origin: Option<Origin>,
    deaf: Deaf,
    /// Interrupts raised again that the host knows of.
    deaf_told: u64,
}

impl Vm {
    /// Builds everything that does not depend on what will run.
    ///
    /// # Errors
    /// [`RequestError::Refused`].
    pub fn build(config: ShellConfig, kvm: &Kvm, clock: Arc<Clock>) -> Result<Self> {
        check(&config)?;
        let vm = Arc::new(create_vm(kvm)?);
        // What real-mode guests need on Intel; the others ignore it.
        vm.set_identity_map_address(arch::IDENTITY_MAP_ADDRESS)
            .map_err(kvm_error("SET_IDENTITY_MAP_ADDR"))?;
        vm.set_tss_address(arch::TSS_ADDRESS).map_err(kvm_error("SET_TSS_ADDR"))?;
        vm.create_irq_chip().map_err(kvm_error("CREATE_IRQCHIP"))?;
        confine::vm(kvm, &vm).map_err(kvm_error("ENABLE_CAP or X86_SET_MSR_FILTER"))?;

        let memory = Arc::new(Memory::reserve(config.memory_mib)?);
        for (slot, region) in memory.regions().iter().enumerate() {
            let memslot = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: region.start,
                memory_size: region.bytes,
                userspace_addr: memory.host_address(region),
            };
            // SAFETY: the host range is a mapping of exactly this size that lives as long as
            // `memory`, which outlives the VM's last run: vCPU threads end with the process.
            unsafe { vm.set_user_memory_region(memslot) }
                .map_err(kvm_error("SET_USER_MEMORY_REGION"))?;
        }

        let spares = Spares::make(config.spares)?;
        let signature = Signature::of_host(kvm, config.cpu_template)
            .map_err(|error| RequestError::refused(FailureKind::Kvm, error))?;
        let machine = Arc::new(Machine::new(&config, memory.guest(), &vm));
        let mut statistics: Vec<_> = KvmStats::open(vm.as_ref(), "vm").into_iter().collect();
        let mut descriptors = Vec::with_capacity(usize::from(config.vcpus));
        for id in 0..config.vcpus {
            let fd = create_vcpu(&vm, id)?;
            let cpuid = signature.for_vcpu(id, config.vcpus).map_err(kvm_error("CPUID table"))?;
            fd.set_cpuid2(&cpuid).map_err(kvm_error("SET_CPUID2"))?;
            confine::vcpu(kvm, &fd).map_err(kvm_error("ENABLE_CAP"))?;
            vcpu_state::prepare(&fd)
                .map_err(|error| RequestError::refused(FailureKind::Kvm, error))?;
            statistics.extend(KvmStats::open(&fd, &format!("vcpu{id}")));
            descriptors.push(fd);
        }
        let listed = vcpu_state::msr_list(kvm, &descriptors[0])
            .map_err(|error| RequestError::refused(FailureKind::Kvm, error))?;
        let msrs: Vec<u32> = listed.iter().map(|&(index, _)| index).collect();
        let power_on_msrs = msrs::beyond(&descriptors[0], &msrs)
            .map_err(|error| RequestError::refused(FailureKind::Kvm, error))?;
        let host_khz = descriptors[0].get_tsc_khz().map_err(kvm_error("GET_TSC_KHZ"))?;

        let shared = Arc::new(Shared {
            machine: machine.clone(),
            memory: memory.clone(),
            clock: clock.clone(),
            exits: Arc::new(ExitCounters::default()),
            msrs,
            power_on_msrs,
            bell: vcpu::bell().map_err(io_error("eventfd"))?,
            raised_again: AtomicU64::new(0),
        });
        vcpu::install_kick_handler().map_err(io_error("sigaction"))?;
        let vcpus = descriptors
            .into_iter()
            .enumerate()
            .map(|(id, fd)| Vcpu::start(id as u8, fd, shared.clone()))
            .collect::<std::io::Result<Vec<_>>>()
            .map_err(io_error("vCPU thread"))?;
        Ok(Self {
            config,
            vm,
            memory,
            spares,
            copied: Vec::new(),
            machine,
            signature,
            power_on_msrs: listed,
            host_khz,
            scales_tsc: kvm.check_extension(Cap::TscControl),
            tsc: Frequency::of_host(host_khz),
            vcpus,
            shared,
            statistics,
            clock,
            tsc_offset: 0,
            state: State::Empty,
            origin: None,
            deaf: Deaf::default(),
            deaf_told: 0,
        })
    }

    /// The descriptor that is readable when a vCPU has ended by itself.
    pub fn bell(&self) -> RawFd {
        self.shared.bell.as_raw_fd()
    }

    /// What ended the guest, if something did.
    pub fn ended(&self) -> Option<Exit> {
        self.vcpus.iter().find_map(|vcpu| match vcpu.poll() {
            Some(Reply::Ended(exit)) => Some(exit),
            _ => None,
        })
    }

    /// Loads a kernel and starts. `watch` gets the invoke stream before the guest can close it.
    ///
    /// # Errors
    /// [`RequestError`]; the VM is of no further use then.
    pub fn boot(
        &mut self,
        cmdline: &str,
        initramfs: bool,
        disks: &[DiskSource],
        descriptors: Vec<OwnedFd>,
        watch: impl FnOnce(BorrowedFd<'_>) -> Result<()>,
    ) -> Result<()> {
        self.expect_empty()?;
        let expected = 2 + usize::from(initramfs) + count(disks);
        let mut descriptors = expect_descriptors(descriptors, expected)?;
        let mut kernel = File::from(next(&mut descriptors)?);
        let mut initramfs = match initramfs {
            true => Some(File::from(next(&mut descriptors)?)),
            false => None,
        };
        let stream = UnixStream::from(next_to(&STREAM, &mut descriptors)?);
        self.machine
            .install(disks, &mut all_to(&DISKS, descriptors)?)
            .map_err(|error| RequestError::refused(FailureKind::BadRequest, error))?;
        watch(stream.as_fd())?;
        self.machine.set_host_stream(stream, false);
        self.memory.advise_huge();
        let kernel_bytes = length(&kernel).map_err(io_error("kernel"))?;
        let regions = boot::written_first(self.memory.regions()[0].bytes, kernel_bytes);
        plan::furnish(&regions, &self.memory, &mut self.spares)?;
        let bad_kernel = |error: boot::BootError| {
            let kind = match error {
                boot::BootError::Cmdline(_) => FailureKind::BadRequest,
                boot::BootError::Read { .. } => FailureKind::Io,
                _ => FailureKind::BadKernel,
            };
            RequestError::refused(kind, error)
        };
        let devices = Machine::devices(&self.config.disks);
        let cmdline = boot::cmdline(cmdline, devices).map_err(bad_kernel)?;
        let vcpus = self.config.vcpus;
        let entry =
            boot::load(&self.memory, &mut kernel, initramfs.as_mut(), &cmdline, vcpus, devices)
                .map_err(bad_kernel)?;
        self.clock.stamp(Phase::Mapped);
        // The guest's TSC starts at 0 now, on all vCPUs.
        self.tsc_offset = (tsc::now() as i64).wrapping_neg();
        for (id, vcpu) in self.vcpus.iter().enumerate() {
            let entry = (id == 0).then_some(entry);
            vcpu.tell(Command::Boot { entry, tsc_offset: self.tsc_offset });
        }
        self.all_stopped()?;
        self.clock.stamp(Phase::VcpuSet);
        self.state = State::Paused(Lapics::of_power_on());
        self.run()?;
        self.spares.release();
        Ok(())
    }

    /// Restores a snapshot. `watch` gets the invoke stream before the guest can close it.
    ///
    /// # Errors
    /// [`RequestError`]; the VM is of no further use then.
    pub fn thaw(
        &mut self,
        disks: &[DiskSource],
        resume: bool,
        plan: &MemoryPlan,
        descriptors: Vec<OwnedFd>,
        watch: impl FnOnce(BorrowedFd<'_>) -> Result<()>,
    ) -> Result<()> {
        self.expect_empty()?;
        let mut descriptors = expect_descriptors(descriptors, 3 + count(disks))?;
        let memory = next_to(&MEMORY, &mut descriptors)?;
        let state = File::from(next(&mut descriptors)?);
        let stream = UnixStream::from(next_to(&STREAM, &mut descriptors)?);
        let mut media = all_to(&DISKS, descriptors)?;
        let saved = Arc::new(self.read_state(&state)?);
        self.tsc = Frequency::on_host(saved.tsc.khz, self.host_khz);
        self.memory.map_file(memory.as_fd())?;
        self.clock.stamp(Phase::Mapped);
        self.copied = plan::carry_out(plan, &self.memory, memory.as_fd(), &mut self.spares)?;
        self.clock.stamp(Phase::Populated);
        self.machine.install(disks, &mut media)?;
        self.machine.restore(&saved.machine)?;
        watch(stream.as_fd())?;
        self.machine.set_host_stream(stream, true);
        self.set_processors(&saved, Part::Thaw, resume)?;
        self.origin = Some(Origin::new(saved, memory));
        // The guest runs. What this thaw had no use for would count as the guest's memory.
        self.spares.release();
        Ok(())
    }

    fn read_state(&self, file: &File) -> Result<SavedVm> {
        let io = io_error("VM state");
        let length = length(file).unwrap_or(u64::MAX);
        if length > snapshot::MAX_BODY as u64 + 16 {
            return Err(RequestError::refused(
                FailureKind::SnapshotCorrupt,
                format!("VM state of {length} bytes is longer than any"),
            ));
        }
        let mut bytes = vec![0; length as usize];
        file.read_exact_at(&mut bytes, 0).map_err(io)?;
        let mut saved =
            SavedVm::decode(&bytes).map_err(|error| RequestError::refused(error.kind(), error))?;
        self.check_shape(&saved)?;
        for vcpu in &mut saved.vcpus {
            vcpu.adapt(&saved.power_on_msrs, &self.power_on_msrs)
                .map_err(|error| RequestError::refused(FailureKind::SnapshotCpu, error))?;
        }
        Ok(saved)
    }

    fn check_shape(&self, saved: &SavedVm) -> Result<()> {
        let shape = |message: String| RequestError::refused(FailureKind::SnapshotShape, message);
        let cpu = |message: String| RequestError::refused(FailureKind::SnapshotCpu, message);
        if saved.memory_mib != self.config.memory_mib {
            return Err(shape(format!(
                "snapshot has {} MiB of memory, this shell has {}",
                saved.memory_mib, self.config.memory_mib
            )));
        }
        if saved.vcpus.len() != usize::from(self.config.vcpus) {
            return Err(shape(format!(
                "snapshot has {} vCPUs, this shell has {}",
                saved.vcpus.len(),
                self.config.vcpus
            )));
        }
        if saved.disks != self.config.disks {
            return Err(shape(format!(
                "snapshot has disks {:?}, this shell has {:?}",
                saved.disks, self.config.disks
            )));
        }
        if let Some(difference) = saved.signature.difference(&self.signature) {
            return Err(cpu(difference));
        }
        if Frequency::on_host(saved.tsc.khz, self.host_khz).is_scaled() && !self.scales_tsc {
            return Err(cpu(format!(
                "TSC frequency is {} kHz in the snapshot, {} kHz on this host, whose KVM or CPU can't scale \
                 it (no KVM_CAP_TSC_CONTROL)",
                saved.tsc.khz, self.host_khz
            )));
        }
        Ok(())
    }

    /// Replaces a disk's medium.
    ///
    /// # Errors
    /// [`RequestError::Refused`].
    pub fn attach(
        &mut self,
        slot: u8,
        source: DiskSource,
        descriptors: Vec<OwnedFd>,
    ) -> Result<()> {
        let bad = |message: String| RequestError::refused(FailureKind::BadRequest, message);
        if matches!(self.state, State::Empty) {
            return Err(bad("nothing runs here yet".into()));
        }
        let lapics = self.state.lapics();
        let descriptors = expect_descriptors(descriptors, source.descriptors())?;
        self.machine
            .replace(usize::from(slot), source, &mut all_to(&DISKS, descriptors)?, lapics)
            .ok_or_else(|| bad(format!("there is no disk slot {slot}")))?
            .map_err(|error| bad(error.to_string()))?;
        if let Some(origin) = &mut self.origin {
            origin.attached = true;
        }
        Ok(())
    }

    /// Writes the paused VM down.
    ///
    /// # Errors
    /// [`RequestError::Refused`]; the VM stays as it was.
    pub fn save(&mut self, descriptors: Vec<OwnedFd>) -> Result<SaveReport> {
        if !self.state.is_paused() {
            return Err(self.misplaced("Paused"));
        }
        let started = monotonic_ns();
        let writable: Vec<usize> = Machine::writable_slots(&self.config.disks).collect();
        let mut descriptors = expect_descriptors(descriptors, 3 + writable.len())?;
        let memory_out = File::from(next(&mut descriptors)?);
        let mut state_out = File::from(next(&mut descriptors)?);
        let pagemap = own_pagemap(File::from(next(&mut descriptors)?))?;
        let origin = self.origin.as_ref();
        let base = origin.map(|origin| origin.source(self.memory.bytes())).transpose()?;
        self.machine
            .quiescent()
            .map_err(|error| RequestError::refused(FailureKind::BadRequest, error))?;

        for vcpu in &self.vcpus {
            vcpu.tell(Command::Save);
        }
        let vcpus = self
            .vcpus
            .iter()
            .map(|vcpu| match vcpu.reply() {
                Reply::Saved(state) => Ok(*state),
                reply => Err(unexpected(reply)),
            })
            .collect::<Result<Vec<_>>>()?;
        let (vm, host_tsc) =
            VmState::save(&self.vm).map_err(kvm_error("GET_IRQCHIP or GET_CLOCK"))?;
        for slot in writable {
            let delta = File::from(next(&mut descriptors)?);
            self.machine.save_delta(slot, &delta).map_err(io_error("disk delta"))?;
        }
        let saved = SavedVm {
            memory_mib: self.config.memory_mib,
            signature: self.signature.clone(),
            tsc: self.tsc,
            host_tsc,
            power_on_msrs: self.power_on_msrs.clone(),
            disks: self.config.disks.clone(),
            vm,
            vcpus,
            machine: self.machine.save(),
        };
        let guest_tsc = saved.guest_tsc(0);
        // SAFETY: every vCPU has answered `Saved` and waits for its next command, and devices
        // only work on vCPU threads or on this one, which is here.
        let written = unsafe { self.memory.save(&pagemap, base, &memory_out) };
        let pages = written.map_err(io_error("snapshot memory"))?;
        let bitmap = pages.to_bytes();
        let state =
            saved.encode().map_err(|error| RequestError::refused(FailureKind::Io, error))?;
        let written = state_out.rewind().and_then(|()| {
            use std::io::Write;
            state_out.write_all(&state)?;
            state_out.write_all(&bitmap)
        });
        written.map_err(io_error("snapshot state"))?;
        Ok(SaveReport {
            memory_bytes: self.memory.bytes(),
            pages_written: pages.count(),
            state_bytes: state.len() as u64,
            bitmap_bytes: bitmap.len() as u64,
            duration_ns: monotonic_ns() - started,
            guest_tsc,
            tsc_khz: self.tsc.khz,
        })
    }

    /// Counters since the process started.
    pub fn stats(&self) -> Stats {
        if let Some(ns) = self.machine.first_byte() {
            self.clock.stamp_at(Phase::FirstByte, ns);
        }
        let mut kvm = Vec::new();
        for file in &self.statistics {
            file.read(&mut kvm);
        }
        Stats {
            stamps: self.clock.stamps(),
            exits: self.shared.exits.read(),
            kvm,
            tsc_offset: self.tsc_offset,
            tsc_khz: self.tsc.khz,
            paused: self.state.is_paused(),
            memory_address: self.memory.host_pointer(0) as u64,
            interrupts_raised_again: self.shared.raised_again.load(Ordering::Relaxed),
        }
    }

    fn expect_empty(&self) -> Result<()> {
        match self.state {
            State::Empty => Ok(()),
            _ => Err(self.misplaced("Empty")),
        }
    }
}

fn unexpected(reply: Reply) -> RequestError {
    match reply {
        Reply::Ended(exit) => RequestError::Ended(exit),
        Reply::Failed(error) => RequestError::refused(FailureKind::Kvm, error),
        Reply::Stopped | Reply::Saved(_) | Reply::Described(_) => {
            RequestError::refused(FailureKind::Kvm, "a vCPU answered another question")
        }
    }
}

fn check(config: &ShellConfig) -> Result<()> {
    let bad = |message: String| Err(RequestError::refused(FailureKind::BadRequest, message));
    if config.version != control::VERSION {
        return bad(format!(
            "control protocol version {} is not {}",
            config.version,
            control::VERSION
        ));
    }
    if !(1..=control::MAX_VCPUS).contains(&config.vcpus) {
        return bad(format!("{} vCPUs are not within 1 to {}", config.vcpus, control::MAX_VCPUS));
    }
    if config.disks.len() > control::MAX_DISKS {
        return bad(format!("{} disks exceed {}", config.disks.len(), control::MAX_DISKS));
    }
    Ok(())
}

fn count(disks: &[DiskSource]) -> usize {
    disks.iter().map(|disk| disk.descriptors()).sum()
}

fn expect_descriptors(
    descriptors: Vec<OwnedFd>,
    expected: usize,
) -> Result<std::vec::IntoIter<OwnedFd>> {
    if descriptors.len() != expected {
        let message = format!("{} descriptors came, {expected} are needed", descriptors.len());
        return Err(RequestError::refused(FailureKind::BadRequest, message));
    }
    Ok(descriptors.into_iter())
}

fn next(descriptors: &mut impl Iterator<Item = OwnedFd>) -> Result<OwnedFd> {
    descriptors
        .next()
        .ok_or_else(|| RequestError::refused(FailureKind::BadRequest, "a descriptor is missing"))
}

/// The next descriptor, at its place.
fn next_to(numbers: &Numbers, descriptors: &mut impl Iterator<Item = OwnedFd>) -> Result<OwnedFd> {
    place(next(descriptors)?, numbers).map_err(io_error("descriptor"))
}

/// All descriptors that are left, at their places.
fn all_to(
    numbers: &Numbers,
    descriptors: impl Iterator<Item = OwnedFd>,
) -> Result<std::vec::IntoIter<OwnedFd>> {
    let placed = descriptors.map(|descriptor| place(descriptor, numbers));
    let placed: std::io::Result<Vec<_>> = placed.collect();
    Ok(placed.map_err(io_error("descriptors"))?.into_iter())
}

/// By `fstat`, which names no file: std asks by `statx`, which could.
fn length(file: &File) -> std::io::Result<u64> {
    Ok(rustix::fs::fstat(file)?.st_size as u64)
}

fn create_vm(kvm: &Kvm) -> Result<VmFd> {
    let vm = kvm.create_vm().map_err(kvm_error("CREATE_VM"))?;
    let placed = place_object(&vm, &VM)?;
    // SAFETY: the descriptor is of a VM, open, and nobody else's.
    unsafe { kvm.create_vmfd_from_rawfd(placed) }.map_err(kvm_error("GET_VCPU_MMAP_SIZE"))
}

fn create_vcpu(vm: &VmFd, id: u8) -> Result<VcpuFd> {
    let vcpu = vm.create_vcpu(u64::from(id)).map_err(kvm_error("CREATE_VCPU"))?;
    let placed = place_object(&vcpu, &VCPUS)?;
    debug_assert_eq!(placed, VCPUS.start + RawFd::from(id));
    // SAFETY: the descriptor is of a vCPU of this VM, open, and nobody else's.
    unsafe { vm.create_vcpu_from_rawfd(placed) }.map_err(kvm_error("vCPU's memory"))
}

/// Another descriptor of what KVM has made, at its place.
fn place_object(made: &impl AsRawFd, numbers: &Numbers) -> Result<RawFd> {
    // SAFETY: `made` is borrowed, and so open, until this returns.
    let made = unsafe { BorrowedFd::borrow_raw(made.as_raw_fd()) };
    Ok(place(made, numbers).map_err(io_error("descriptor"))?.into_raw_fd())
}

/// Takes over `/dev/kvm` at its fixed descriptor.
///
/// # Safety
/// The descriptor must be open and nobody else's.
pub unsafe fn kvm_at(descriptor: RawFd) -> Kvm {
    // SAFETY: the caller's promise.
    unsafe { Kvm::from_raw_fd(descriptor) }
}
