//! Building a shell: everything that does not depend on what will run.

use std::{
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, RawFd},
    sync::{Arc, atomic::AtomicU64},
};

use firn_proto::control::{self, FailureKind, ShellConfig};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::{Deaf, RequestError, Result, State, Vm, io_error, kvm_error};
use crate::{
    arch::{self, confine, cpuid::Signature, msrs, tsc::Frequency, vcpu_state},
    descriptors::{Numbers, VCPUS, VM, place},
    machine::Machine,
    memory::Memory,
    plan::Spares,
    stats::{Clock, ExitCounters, KvmStats},
    vcpu::{self, Shared, Vcpu},
};

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
        let listed_msrs = vcpu_state::msr_list(kvm, &descriptors[0])
            .map_err(|error| RequestError::refused(FailureKind::Kvm, error))?;
        let unlisted_msrs = msrs::beyond(&descriptors[0], &listed_msrs)
            .map_err(|error| RequestError::refused(FailureKind::Kvm, error))?;
        let host_khz = descriptors[0].get_tsc_khz().map_err(kvm_error("GET_TSC_KHZ"))?;

        let shared = Arc::new(Shared {
            machine: machine.clone(),
            memory: memory.clone(),
            clock: clock.clone(),
            exits: Arc::new(ExitCounters::default()),
            listed_msrs,
            unlisted_msrs,
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
