//! What KVM lets guests do beyond what their CPUID says, switched off: it is state that a reset could
//! not put back, or that no snapshot has.

use std::ops::RangeInclusive;

use kvm_bindings::{
    KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_CAP_PMU_CAPABILITY, KVM_CAP_X86_MSR_FILTER,
    KVM_PMU_CAP_DISABLE, kvm_enable_cap,
};
use kvm_ioctls::{Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd};

/// MSRs that guests could write whatever their CPUID says, and that can't be put back. VM_CR (AMD APM
/// vol. 2, 15.30.1): once it is locked not even the host sets it.
const DENIED: [RangeInclusive<u32>; 1] = [0xc001_0114..=0xc001_0114];

/// Confines a VM that has no vCPUs yet.
///
/// # Errors
/// KVM's. One that can't do this is no error where the tests of the MSRs (`tests/msrs.rs`) find nothing
/// to keep away.
pub fn vm(kvm: &Kvm, vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    let can = |capability: u32| kvm.check_extension_raw(capability.into());
    // Counters and their events are the host's to see (SDM vol. 3, 20).
    if can(KVM_CAP_PMU_CAPABILITY) & KVM_PMU_CAP_DISABLE as i32 != 0 {
        vm.enable_cap(&capability(KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE))?;
    }
    // It waits for the end of all that KVM does with the VM: only where there is something to deny.
    if is_amd() && can(KVM_CAP_X86_MSR_FILTER) > 0 {
        let ranges = DENIED.map(|msrs| MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base: *msrs.start(),
            msr_count: msrs.end() - msrs.start() + 1,
            // A bit that is not set denies.
            bitmap: &[0],
        });
        vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges)?;
    }
    Ok(())
}

/// Confines a vCPU to the paravirtual features of its CPUID, which it has by now.
///
/// # Errors
/// KVM's.
pub fn vcpu(kvm: &Kvm, vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let capability = capability(KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1);
    match kvm.check_extension_raw(capability.cap.into()) {
        1.. => vcpu.enable_cap(&capability),
        _ => Ok(()),
    }
}

fn capability(cap: u32, argument: u32) -> kvm_enable_cap {
    kvm_enable_cap { cap, args: [argument.into(), 0, 0, 0], ..Default::default() }
}

/// AMD, and Hygon, which is AMD's (CPUID leaf 0).
fn is_amd() -> bool {
    let leaf = core::arch::x86_64::__cpuid(0);
    let name = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat();
    name == b"AuthenticAMD" || name == b"HygonGenuine"
}
