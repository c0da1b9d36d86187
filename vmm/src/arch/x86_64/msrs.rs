//! MSRs that a guest can write and that no snapshot keeps.
//!
//! `KVM_GET_MSR_INDEX_LIST` names what a migration needs, which is not all that KVM stores: memory
//! types, machine-check banks and a few more keep whatever a guest has written. A thawed vCPU has
//! their power-on values, since it has never run; a reset one must get them back, or they would
//! carry messages from one request to the next. A test (`tests/msrs.rs`) goes through the MSR
//! space of the KVM that it runs on and fails for every MSR that keeps a value and is neither in
//! KVM's list nor here.

use std::ops::RangeInclusive;

use kvm_ioctls::VcpuFd;

use super::vcpu_state::{VcpuStateError, read_msrs, retain_prefix_failures, retain_writable};

/// Enables asynchronous page faults.
const ASYNC_PF_EN: u32 = 0x4b56_4d02;

/// Its low byte says how many banks of machine-check registers there are. Only the host can set it.
const MCG_CAP: u32 = 0x179;

/// Where MSRs that KVM stores and does not list may be. Asking for one that is not there ends the
/// ioctl, so gaps are left out: a shell should stand soon.
const CANDIDATES: [RangeInclusive<u32>; 14] = [
    // Performance counters (AMD's: below) and their event selectors.
    0xc1..=0xc8,
    0x186..=0x18d,
    // Machine check: MCG_CAP, MCG_STATUS, MCG_CTL; banks: see `bank_registers`.
    MCG_CAP..=0x17b,
    // Debug control, last branch.
    0x1d9..=0x1de,
    // Memory types: variable and fixed ranges, PAT, default.
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    0x277..=0x277,
    0x2ff..=0x2ff,
    // KERNEL_GS_BASE, TSC_AUX and TSC_RATIO, which KVM lists only where the host's CPU has them.
    0xc000_0102..=0xc000_0104,
    // AMD: event selectors and counters, SYSCFG, HWCR, and errata that guests may know of.
    0xc001_0000..=0xc001_001f,
    // AMD: OS visible workarounds, which guests can set whose CPUID has them.
    0xc001_0140..=0xc001_0141,
    0xc001_1020..=0xc001_102f,
];

/// Machine check: CTL, STATUS, ADDR, MISC and CTL2 of each bank.
fn bank_registers(banks: u8) -> impl Iterator<Item = u32> {
    let banks = u32::from(banks.min(32));
    (0x400..0x400 + 4 * banks).chain(0x280..0x280 + banks)
}

/// What a reset sets before the MSRs that are `listed`: those beyond them that this KVM stores, with
/// the values of a vCPU that has never run.
///
/// # Errors
/// KVM's.
pub fn beyond(vcpu: &VcpuFd, listed: &[(u32, u64)]) -> Result<Vec<(u32, u64)>, VcpuStateError> {
    let is_listed = |wanted: u32| listed.iter().any(|(index, _)| *index == wanted);
    let banks = read_msrs(vcpu, &[MCG_CAP])?.first().map_or(0, |&(_, value)| value as u8);
    let candidates = CANDIDATES.into_iter().flatten().chain(bank_registers(banks));
    let mut indices: Vec<u32> = candidates.filter(|index| !is_listed(*index)).collect();
    retain_prefix_failures(&mut indices, |msrs| vcpu.get_msrs(msrs))?;
    let values = read_msrs(vcpu, &indices)?;
    let mut values = retain_writable(vcpu, values)?;
    if is_listed(ASYNC_PF_EN) {
        // Off, before the snapshot's value: KVM then drops the page faults that it still owes an
        // answer to, which the next guest has not asked about.
        values.push((ASYNC_PF_EN, 0));
    }
    Ok(values)
}
