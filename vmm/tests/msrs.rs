//! No MSR keeps what a guest wrote over a reset: every MSR of this machine's KVM that stores a
//! value is in a vCPU's state, or goes back to its power-on value.

use std::collections::BTreeSet;

use firn_proto::control::CpuTemplate;
use firn_vmm::arch::{cpuid::Signature, msrs, vcpu_state};
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

/// Where KVM looks for MSRs: Intel's, Hyper-V's, its own, AMD's.
const SPACE: [std::ops::Range<u32>; 5] = [
    0..0x2000,
    0x4000_0000..0x4000_0200,
    0x4b56_4d00..0x4b56_4d20,
    0xc000_0000..0xc000_1000,
    0xc001_0000..0xc001_2000,
];

/// What other parts of a vCPU's state hold.
fn held_elsewhere(index: u32) -> bool {
    match index {
        // TSC: by its offset. APIC base: in the special registers.
        0x10 | 0x1b => true,
        // The LAPIC's registers.
        0x800..=0x8ff => true,
        // EFER, FS and GS base: in the special registers.
        0xc000_0080 | 0xc000_0100 | 0xc000_0101 => true,
        _ => false,
    }
}

fn read(vcpu: &VcpuFd, index: u32) -> Option<u64> {
    let mut msrs = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }]).unwrap();
    (vcpu.get_msrs(&mut msrs).unwrap() == 1).then(|| msrs.as_slice()[0].data)
}

fn write(vcpu: &VcpuFd, index: u32, data: u64) -> bool {
    let entry = kvm_msr_entry { index, data, ..Default::default() };
    vcpu.set_msrs(&Msrs::from_entries(&[entry]).unwrap()).unwrap() == 1
}

/// Whether some write to the MSR changes what is read from it.
fn keeps_a_value(vcpu: &VcpuFd, index: u32) -> bool {
    let Some(before) = read(vcpu, index) else { return false };
    let patterns = (0..64).map(|bit| before ^ 1 << bit).chain([0, u64::MAX, !before]);
    let mut keeps = false;
    for pattern in patterns {
        if write(vcpu, index, pattern) && read(vcpu, index) != Some(before) {
            keeps = true;
            write(vcpu, index, before);
        }
    }
    keeps
}

#[test]
fn every_msr_that_keeps_a_value_goes_back() {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            eprintln!("skipped: /dev/kvm: {error}");
            return;
        }
    };
    let vm = kvm.create_vm().unwrap();
    vm.create_irq_chip().unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let signature = Signature::of_host(&kvm, CpuTemplate::Host).unwrap();
    vcpu.set_cpuid2(&signature.for_vcpu(0, 1).unwrap()).unwrap();
    let listed = vcpu_state::msr_list(&kvm, &vcpu).unwrap();
    let beyond = msrs::beyond(&vcpu, &listed).unwrap();
    // Writing the power-on values is possible, as a whole.
    vcpu_state::set_msrs(&vcpu, &beyond).unwrap();

    // What describes the CPU to the guest is the host's to write, never the guest's.
    let features = kvm.get_msr_feature_index_list().unwrap();
    let covered: BTreeSet<u32> = listed
        .iter()
        .copied()
        .chain(beyond.iter().map(|&(index, _)| index))
        .chain(features.as_slice().iter().copied())
        .collect();
    let mut storing = 0;
    let mut leaking = Vec::new();
    for index in SPACE.into_iter().flatten() {
        if !keeps_a_value(&vcpu, index) {
            continue;
        }
        storing += 1;
        if !covered.contains(&index) && !held_elsewhere(index) {
            leaking.push(format!("{index:#x}"));
        }
    }
    eprintln!(
        "{storing} MSRs store values; state has {}, {} more go back to power-on values",
        listed.len(),
        beyond.len()
    );
    assert!(storing > 10, "the probe finds nothing");
    assert!(leaking.is_empty(), "{}: {leaking:?}", leaking.len());
}
