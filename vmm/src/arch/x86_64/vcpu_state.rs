//! The state of one vCPU: what is read at a save and written at a thaw or reset, in the order that
//! KVM's interfaces between registers demand.
//!
//! Save: MP_STATE first (reading it makes KVM accept pending INIT and SIPI), events last.
//! Restore: MP_STATE, REGS, SREGS, XSAVE, XCRS, debug registers, LAPIC, MSRs with TSC_DEADLINE
//! after all others (before the LAPIC's timer mode is known its value is dropped, and the guest
//! would sleep for ever), events, KVMCLOCK_CTRL.

use std::os::fd::AsRawFd;

use firn_pages::ioctl::{KVM_GET_DEVICE_ATTR, KVM_SET_DEVICE_ATTR, Opcode};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, Msrs, kvm_debugregs,
    kvm_device_attr, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use super::tsc::{self, Frequency};
use crate::stats::ioctl_error;

pub(super) const MSR_TSC: u32 = 0x10;
pub(super) const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// Its first bit is fast string operations.
const MSR_MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;

/// Type of memory that no other range register names, and whether these count at all.
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRRS_ON: u64 = 1 << 11;
const WRITE_BACK: u64 = 6;

/// MSRs that one ioctl may read or write at most.
const MSRS_AT_ONCE: usize = 255;

/// MSRs of one probing ioctl. Each one that KVM does not have ends the ioctl early, and the rest of
/// the batch was copied in for nothing; of the candidates beyond KVM's list most are not there.
const MSRS_TO_PROBE: usize = 16;

/// A vCPU's state could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum VcpuStateError {
    /// KVM refused one part.
    #[error("KVM {what}: {source}")]
    Kvm {
        /// Which ioctl.
        what: &'static str,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// KVM stopped in the middle of the MSRs that it was to read.
    #[error("KVM would not read MSR {index:#x}")]
    ReadMsr {
        /// The first that failed.
        index: u32,
    },
    /// KVM stopped in the middle of the MSRs that it was to set.
    #[error("KVM would not set MSR {index:#x} to {value:#x}")]
    SetMsr {
        /// The first that failed.
        index: u32,
        /// What it was to be.
        value: u64,
    },
    /// KVM can't set a guest's TSC.
    #[error(
        "this host's KVM has no KVM_VCPU_TSC_CTRL (Linux has it from 5.16 on): the clocks of thawed \
         guests would be wrong"
    )]
    NoTscOffset,
    /// The guest of the snapshot has used an MSR that this host's KVM does not know.
    #[error("MSR {index:#x} is {value:#x} in the snapshot and not settable on this host")]
    UnknownMsr {
        /// Its index.
        index: u32,
        /// What it was to be.
        value: u64,
    },
    /// KVM was told to have a guest's TSC tick as it did where it was saved, and does not.
    #[error("KVM does not scale the TSC to {khz} kHz: it reads {found}, not {expected}")]
    NotScaled {
        /// The frequency.
        khz: u32,
        /// What it reads without an offset.
        found: u64,
        /// What it should read.
        expected: u64,
    },
}

fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VcpuStateError {
    move |source| VcpuStateError::Kvm { what, source }
}

impl VcpuStateError {
    /// As if KVM had refused, for tests.
    pub fn refused() -> Self {
        kvm("SET_REGS")(kvm_ioctls::Error::new(libc::EINVAL))
    }
}

/// Registers of one vCPU.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<(u32, u64)>,
    events: kvm_vcpu_events,
    /// Guest TSC minus host TSC, scaled, in ticks, on the host that saved.
    tsc_offset: i64,
}

/// What firmware would leave, to a vCPU that has never run: Linux takes it over, and without it believes
/// that copying by string instructions is slow (SDM vol. 4, IA32_MISC_ENABLE) and memory is uncached by
/// default (SDM vol. 3, 13.11.2.1). Thaw and reset build on a vCPU that has it.
///
/// # Errors
/// KVM's. [`VcpuStateError::NoTscOffset`] where a guest's TSC can't go on from where it was saved.
pub fn prepare(vcpu: &VcpuFd) -> Result<(), VcpuStateError> {
    if tsc_offset(vcpu).is_none() {
        return Err(VcpuStateError::NoTscOffset);
    }
    set_msrs(vcpu, &[(MSR_MISC_ENABLE, FAST_STRINGS), (MSR_MTRR_DEF_TYPE, MTRRS_ON | WRITE_BACK)])
}

/// Which MSRs make up a vCPU's state on this host, with the values of one that has never run: all that KVM
/// lists and lets us write back.
///
/// What can't be written back from user space can't have been written by the guest either: KVM
/// checks both through the same function, and the host's check is the laxer one.
///
/// # Errors
/// KVM's.
pub fn msr_list(kvm_fd: &Kvm, vcpu: &VcpuFd) -> Result<Vec<(u32, u64)>, VcpuStateError> {
    let list = kvm_fd.get_msr_index_list().map_err(kvm("GET_MSR_INDEX_LIST"))?;
    let mut indices: Vec<u32> = list
        .as_slice()
        .iter()
        .copied()
        // The TSC is set by its offset; see `tsc_offset`.
        .filter(|&index| index != MSR_TSC && index != MSR_TSC_DEADLINE)
        .collect();
    retain_prefix_failures(&mut indices, |msrs| vcpu.get_msrs(msrs))?;
    let mut writable = retain_writable(vcpu, read_msrs(vcpu, &indices)?)?;
    if kvm_fd.check_extension(Cap::TscDeadlineTimer) {
        writable.push((MSR_TSC_DEADLINE, 0));
    }
    Ok(writable)
}

/// Drops from `values` those that KVM does not let us write back.
pub(super) fn retain_writable(
    vcpu: &VcpuFd,
    mut values: Vec<(u32, u64)>,
) -> Result<Vec<(u32, u64)>, VcpuStateError> {
    // The first refusal names an MSR to leave out; go on behind it.
    let mut writable = Vec::with_capacity(values.len());
    while !values.is_empty() {
        let batch = &values[..values.len().min(MSRS_TO_PROBE)];
        let done = vcpu.set_msrs(&msrs_of(batch)?).map_err(kvm("SET_MSRS"))?;
        writable.extend(&values[..done]);
        let refused = usize::from(done < batch.len());
        values.drain(..done + refused);
    }
    Ok(writable)
}

/// Drops from `indices` those that KVM can't read.
pub(super) fn retain_prefix_failures(
    indices: &mut Vec<u32>,
    get: impl Fn(&mut Msrs) -> Result<usize, kvm_ioctls::Error>,
) -> Result<(), VcpuStateError> {
    let mut from = 0;
    while from < indices.len() {
        let batch = indices[from..].iter().take(MSRS_TO_PROBE);
        let entries: Vec<_> = batch.map(|&index| (index, 0)).collect();
        let done = get(&mut msrs_of(&entries)?).map_err(kvm("GET_MSRS"))?;
        from += done;
        if done < entries.len() {
            indices.remove(from);
        }
    }
    Ok(())
}

fn msrs_of(values: &[(u32, u64)]) -> Result<Msrs, VcpuStateError> {
    let entries: Vec<kvm_msr_entry> = values
        .iter()
        .map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() })
        .collect();
    Msrs::from_entries(&entries).map_err(|_| kvm("MSRS")(kvm_ioctls::Error::new(libc::E2BIG)))
}

pub(super) fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, VcpuStateError> {
    let mut values = Vec::with_capacity(indices.len());
    for batch in indices.chunks(MSRS_AT_ONCE) {
        let entries: Vec<_> = batch.iter().map(|&index| (index, 0)).collect();
        let mut msrs = msrs_of(&entries)?;
        let done = vcpu.get_msrs(&mut msrs).map_err(kvm("GET_MSRS"))?;
        if let Some(&index) = batch.get(done) {
            return Err(VcpuStateError::ReadMsr { index });
        }
        values.extend(msrs.as_slice().iter().map(|entry| (entry.index, entry.data)));
    }
    Ok(values)
}

impl VcpuState {
    /// Reads the state of a stopped vCPU whose I/O completions have been drained. `listed`: what
    /// [`msr_list`] gave on this host.
    ///
    /// # Errors
    /// KVM's.
    pub fn save(vcpu: &VcpuFd, listed: &[(u32, u64)]) -> Result<Self, VcpuStateError> {
        let mp_state = vcpu.get_mp_state().map_err(kvm("GET_MP_STATE"))?;
        let regs = vcpu.get_regs().map_err(kvm("GET_REGS"))?;
        let sregs = vcpu.get_sregs().map_err(kvm("GET_SREGS"))?;
        let xsave = vcpu.get_xsave().map_err(kvm("GET_XSAVE"))?;
        let xcrs = vcpu.get_xcrs().map_err(kvm("GET_XCRS"))?;
        let debug = vcpu.get_debug_regs().map_err(kvm("GET_DEBUGREGS"))?;
        let lapic = vcpu.get_lapic().map_err(kvm("GET_LAPIC"))?;
        let indices: Vec<u32> = listed.iter().map(|&(index, _)| index).collect();
        let msrs = read_msrs(vcpu, &indices)?;
        let events = vcpu.get_vcpu_events().map_err(kvm("GET_VCPU_EVENTS"))?;
        let tsc_offset = tsc_offset(vcpu).unwrap_or(0);
        Ok(Self { mp_state, regs, sregs, xsave, xcrs, debug, lapic, msrs, events, tsc_offset })
    }

    /// Makes the state one of this host, whose KVM may have other MSRs than the one that saved it: what
    /// it lacks may go if no guest has changed it, and what it has besides is as in a vCPU that has never
    /// run. `theirs` and `ours` are the MSRs of such a vCPU, there and here.
    ///
    /// # Errors
    /// [`VcpuStateError::UnknownMsr`].
    pub fn adapt(
        &mut self,
        theirs: &[(u32, u64)],
        ours: &[(u32, u64)],
    ) -> Result<(), VcpuStateError> {
        if self.msrs.iter().map(|msr| msr.0).eq(ours.iter().map(|msr| msr.0)) {
            return Ok(());
        }
        let has = |msrs: &[(u32, u64)], wanted: u32| msrs.iter().any(|(index, _)| *index == wanted);
        let (known, unknown): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.msrs).into_iter().partition(|(index, _)| has(ours, *index));
        if let Some(&(index, value)) = unknown.iter().find(|msr| !theirs.contains(msr)) {
            return Err(VcpuStateError::UnknownMsr { index, value });
        }
        // The deadline of a timer stays the last one.
        self.msrs = ours.iter().copied().filter(|(index, _)| !has(&known, *index)).collect();
        self.msrs.extend(known);
        Ok(())
    }

    /// How many MSRs it has.
    pub fn msr_count(&self) -> usize {
        self.msrs.len()
    }

    /// Guest TSC minus host TSC, scaled, in ticks, as saved.
    pub fn tsc_offset(&self) -> i64 {
        self.tsc_offset
    }

    /// Writes the state to a stopped and drained vCPU. `tsc_offset`: see [`set_tsc_offset`].
    ///
    /// # Errors
    /// KVM's; a short count of MSRs is one.
    pub fn restore(&self, vcpu: &VcpuFd, tsc_offset: i64) -> Result<(), VcpuStateError> {
        vcpu.set_mp_state(self.mp_state).map_err(kvm("SET_MP_STATE"))?;
        vcpu.set_regs(&self.regs).map_err(kvm("SET_REGS"))?;
        vcpu.set_sregs(&self.sregs).map_err(kvm("SET_SREGS"))?;
        // SAFETY: `kvm_xsave` is 4096 bytes. KVM_SET_XSAVE reads more only where the vCPU has
        // dynamically enabled features (AMX), which the CPUID template never offers.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(kvm("SET_XSAVE"))?;
        // A host without XSAVE (Linux with `noxsave`, for one) has none, and refuses to set none.
        if self.xcrs.nr_xcrs > 0 {
            vcpu.set_xcrs(&self.xcrs).map_err(kvm("SET_XCRS"))?;
        }
        vcpu.set_debug_regs(&self.debug).map_err(kvm("SET_DEBUGREGS"))?;
        vcpu.set_lapic(&self.lapic).map_err(kvm("SET_LAPIC"))?;
        // Before the deadline MSR, which counts in guest TSC.
        set_tsc_offset(vcpu, tsc_offset)?;
        set_msrs(vcpu, &self.msrs)?;
        vcpu.set_vcpu_events(&self.events).map_err(kvm("SET_VCPU_EVENTS"))?;
        mark_paused(vcpu);
        Ok(())
    }

    /// Writes again what has gone on since [`Self::restore`] although the vCPU did not run: TSC and
    /// timer.
    ///
    /// # Errors
    /// KVM's.
    pub fn restore_clocks(&self, vcpu: &VcpuFd, tsc_offset: i64) -> Result<(), VcpuStateError> {
        // A timer that is not armed by its MSR counts in the LAPIC.
        vcpu.set_lapic(&self.lapic).map_err(kvm("SET_LAPIC"))?;
        set_tsc_offset(vcpu, tsc_offset)?;
        let deadline = self.msrs.iter().find(|(index, _)| *index == MSR_TSC_DEADLINE);
        set_msrs(vcpu, deadline.map_or(&[], std::slice::from_ref))?;
        mark_paused(vcpu);
        Ok(())
    }
}

/// Makes KVM accept what other vCPUs have sent to this stopped one, INIT, SIPI and NMI, which it
/// would otherwise keep beside the state that is about to be restored, and act on afterwards.
///
/// # Errors
/// KVM's.
pub fn accept_pending(vcpu: &VcpuFd) -> Result<(), VcpuStateError> {
    vcpu.get_mp_state().map_err(kvm("GET_MP_STATE"))?;
    vcpu.get_vcpu_events().map_err(kvm("GET_VCPU_EVENTS"))?;
    Ok(())
}

/// Whether the stopped vCPU waits in HLT.
pub fn is_halted(vcpu: &VcpuFd) -> bool {
    vcpu.get_mp_state().is_ok_and(|state| state.mp_state == KVM_MP_STATE_HALTED)
}

/// Writes MSRs, all or an error.
///
/// # Errors
/// KVM's; a short count is one.
pub fn set_msrs(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<(), VcpuStateError> {
    for batch in values.chunks(MSRS_AT_ONCE) {
        let done = vcpu.set_msrs(&msrs_of(batch)?).map_err(kvm("SET_MSRS"))?;
        if let Some(&(index, value)) = batch.get(done) {
            return Err(VcpuStateError::SetMsr { index, value });
        }
    }
    Ok(())
}

/// Enables in XCR0 all that the guest's CPUID offers, before it runs.
///
/// Linux does the same as its first XSETBV. Where a hypervisor does not intercept that instruction
/// (QEMU's emulated SVM), KVM would never learn of it: it would report the size of an x87-only
/// XSAVE area, which makes Linux give up AVX, and a snapshot would hold the wrong XCR0.
///
/// # Errors
/// KVM's.
pub fn enable_xsave(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    const XSAVE: u32 = 1 << 26;
    let cpuid = vcpu.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES)?;
    let leaf = |function| cpuid.as_slice().iter().find(move |e| (e.function, e.index) == function);
    let Some(features) =
        leaf((0xd, 0)).filter(|_| leaf((1, 0)).is_some_and(|l| l.ecx & XSAVE != 0))
    else {
        return Ok(());
    };
    let mut xcrs = vcpu.get_xcrs()?;
    xcrs.nr_xcrs = 1;
    xcrs.xcrs[0].xcr = 0;
    xcrs.xcrs[0].value = u64::from(features.eax) | u64::from(features.edx) << 32;
    vcpu.set_xcrs(&xcrs)
}

/// Tells the guest's kvmclock that the host had stopped it, lest its watchdogs bark.
///
/// A guest without kvmclock has nothing to be told (`EINVAL`), which is no error.
pub fn mark_paused(vcpu: &VcpuFd) {
    let _ = vcpu.kvmclock_ctrl();
}

/// Has the TSC of a vCPU that has never run tick by a frequency that is not the host's, and makes sure that
/// it does; without effect where it is the host's. Its offset is to be set anew afterwards.
///
/// # Errors
/// KVM's; [`VcpuStateError::NotScaled`].
pub fn set_frequency(vcpu: &VcpuFd, frequency: Frequency) -> Result<(), VcpuStateError> {
    if !frequency.is_scaled() {
        return Ok(());
    }
    vcpu.set_tsc_khz(frequency.khz).map_err(kvm("SET_TSC_KHZ"))?;
    set_tsc_offset(vcpu, 0)?;
    // A millisecond either way: two CPUs of the host may differ by little.
    let slack = u64::from(frequency.khz);
    let before = frequency.scale(tsc::now()).saturating_sub(slack);
    let found = read_msrs(vcpu, &[MSR_TSC])?.first().map_or(0, |&(_, value)| value);
    let after = frequency.scale(tsc::now()).saturating_add(slack);
    match (before..=after).contains(&found) {
        true => Ok(()),
        false => Err(VcpuStateError::NotScaled { khz: frequency.khz, found, expected: after }),
    }
}

/// Sets guest TSC minus host TSC, scaled: for all vCPUs from one moment, so that they stay as synchronous
/// as they were.
///
/// By attribute, never by writing MSR 0x10: KVM takes a write within a second of the expected
/// value for an attempt at synchronising vCPUs and changes it (`kvm_synchronize_tsc`).
///
/// # Errors
/// KVM's.
pub fn set_tsc_offset(vcpu: &VcpuFd, offset: i64) -> Result<(), VcpuStateError> {
    let mut value = offset;
    tsc_attribute(vcpu, KVM_SET_DEVICE_ATTR, &mut value).map_err(kvm("SET_DEVICE_ATTR(TSC_OFFSET)"))
}

/// Reads guest TSC minus host TSC; `None` where KVM doesn't tell.
pub fn tsc_offset(vcpu: &VcpuFd) -> Option<i64> {
    let mut offset = 0;
    tsc_attribute(vcpu, KVM_GET_DEVICE_ATTR, &mut offset).ok().map(|()| offset)
}

fn tsc_attribute(vcpu: &VcpuFd, request: Opcode, value: &mut i64) -> Result<(), kvm_ioctls::Error> {
    let attribute = kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: value as *mut i64 as u64,
        flags: 0,
    };
    // SAFETY: the descriptor is a vCPU's; both requests read `attribute`, and read or write the 8 bytes
    // at its `addr`, which is `value`: borrowed mutably, so alive, writable and unaliased across the
    // call.
    let result = unsafe { libc::ioctl(vcpu.as_raw_fd(), request.into(), &attribute) };
    ioctl_error(result)
        .map(drop)
        .map_err(|error| kvm_ioctls::Error::new(error.raw_os_error().unwrap_or(libc::EIO)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(msrs: &[(u32, u64)]) -> VcpuState {
        VcpuState {
            mp_state: Default::default(),
            regs: Default::default(),
            sregs: Default::default(),
            xsave: Default::default(),
            xcrs: Default::default(),
            debug: Default::default(),
            lapic: Default::default(),
            msrs: msrs.to_vec(),
            events: Default::default(),
            tsc_offset: 0,
        }
    }

    #[test]
    fn msrs_that_a_fleets_host_lacks_may_go_if_no_guest_has_changed_them() {
        let theirs = [(1, 0), (2, 7), (MSR_TSC_DEADLINE, 0)];
        let same = [(1, 5), (2, 7), (MSR_TSC_DEADLINE, 9)];
        let adapted = |msrs: &[(u32, u64)], ours: &[(u32, u64)]| {
            let mut state = state(msrs);
            state.adapt(&theirs, ours).map(|()| state.msrs)
        };
        assert_eq!(adapted(&same, &[(1, 1), (2, 2), (MSR_TSC_DEADLINE, 0)]).unwrap(), same);
        // Neither 2, which is as it was, nor the value that this host's 3 was saved with: it was not.
        let ours = [(1, 0), (3, 4), (MSR_TSC_DEADLINE, 0)];
        assert_eq!(adapted(&same, &ours).unwrap(), [(3, 4), (1, 5), (MSR_TSC_DEADLINE, 9)]);
        let error = adapted(&[(1, 5), (2, 8)], &ours).unwrap_err().to_string();
        assert_eq!(error, "MSR 0x2 is 0x8 in the snapshot and not settable on this host");
    }
}
