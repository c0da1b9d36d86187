//! No MSR keeps what a guest wrote over a reset: every MSR of this machine's KVM by which a guest can leave something
//! behind is in a vCPU's state, or goes back to its power-on value.
//!
//! A guest does the writing: the host may write more, such as Hyper-V's MSRs and those of features that the guest's CPU
//! lacks.

use std::arch::x86_64::__cpuid;
use std::collections::BTreeSet;

use firn_proto::control::CpuTemplate;
use firn_vmm::arch::{confine, cpuid::Signature, msrs, vcpu_state};
use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

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

/// What a KVM that is neither on VMX nor on SVM, as on some development machines, has of its own and lets nobody reset.
/// No Linux has it.
fn software_kvm_keeps(index: u32) -> bool {
    let (vmx, svm) = (__cpuid(1).ecx >> 5 & 1, __cpuid(0x8000_0001).ecx >> 2 & 1);
    index == 0x4b56_4d10 && vmx == 0 && svm == 0
}

fn read(vcpu: &VcpuFd, index: u32) -> Option<u64> {
    let mut msrs = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }]).unwrap();
    (vcpu.get_msrs(&mut msrs).unwrap() == 1).then(|| msrs.as_slice()[0].data)
}

/// A guest in real mode that reads or writes one MSR at a time.
///
/// ```text
/// 0x034  vector 13, general protection ──▶ 0x1100
/// 0x1000 wrmsr; out 1     0x1010 rdmsr; out 1     0x1100 out 2
/// 0x2000 end of the stack
/// ```
struct Guest {
    vcpu: VcpuFd,
    // After the vCPU, which belongs to it.
    _vm: VmFd,
    _memory: GuestMemoryMmap,
}

/// How an access to an MSR ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    /// With this value in EDX:EAX.
    Done(u64),
    /// By a general protection fault.
    Refused,
    /// KVM could not go on with the guest, whose state is of no use any more.
    Ended,
}

const VECTOR: u64 = 13 * 4;
const WRITE: u64 = 0x1000;
const READ: u64 = 0x1010;
const REFUSED: u64 = 0x1100;
const STACK: u64 = 0x2000;
const ACCEPTED_PORT: u16 = 1;
const REFUSED_PORT: u16 = 2;

impl Guest {
    fn new(kvm: &Kvm) -> Self {
        let vm = kvm.create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), STACK as usize)]).unwrap();
        let region = kvm_userspace_memory_region {
            memory_size: STACK,
            userspace_addr: memory.get_host_address(GuestAddress(0)).unwrap() as u64,
            ..Default::default()
        };
        // SAFETY: the range is a mapping of that size, which `memory` owns and nobody borrows; it is dropped after
        // the VM.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
        let out = |port: u16| [0xe6, port as u8];
        let (accepted, refused) = (out(ACCEPTED_PORT), out(REFUSED_PORT));
        for (address, bytes) in [
            (VECTOR, &(REFUSED as u32).to_le_bytes()[..]),
            (WRITE, &[&[0x0f, 0x30], &accepted[..]].concat()),
            (READ, &[&[0x0f, 0x32], &accepted[..]].concat()),
            (REFUSED, &refused),
        ] {
            memory.write_slice(bytes, GuestAddress(address)).unwrap();
        }
        confine::vm(kvm, &vm).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let signature = Signature::of_host(kvm, CpuTemplate::Host).unwrap();
        vcpu.set_cpuid2(&signature.for_vcpu(0, 1).unwrap()).unwrap();
        confine::vcpu(kvm, &vcpu).unwrap();
        // The reset vector's segment is elsewhere.
        let mut special = vcpu.get_sregs().unwrap();
        (special.cs.base, special.cs.selector) = (0, 0);
        vcpu.set_sregs(&special).unwrap();
        Self { vcpu, _vm: vm, _memory: memory }
    }

    /// Runs the code at `rip`.
    fn run(&mut self, rip: u64, index: u32, data: u64) -> Access {
        let (low, high) = (data & 0xffff_ffff, data >> 32);
        let registers = kvm_regs {
            rip,
            rsp: STACK,
            rflags: 2,
            rcx: index.into(),
            rax: low,
            rdx: high,
            ..Default::default()
        };
        self.vcpu.set_regs(&registers).unwrap();
        let port = match self.vcpu.run() {
            Ok(VcpuExit::IoOut(port, _)) => port,
            other => {
                eprintln!("MSR {index:#x} at {rip:#x} with {data:#x}: {other:?}");
                return Access::Ended;
            }
        };
        // Completes the port's access.
        self.vcpu.set_kvm_immediate_exit(1);
        assert!(self.vcpu.run().is_err());
        self.vcpu.set_kvm_immediate_exit(0);
        let after = self.vcpu.get_regs().unwrap();
        match port {
            ACCEPTED_PORT => Access::Done(after.rdx << 32 | after.rax & 0xffff_ffff),
            REFUSED_PORT => Access::Refused,
            other => panic!("MSR {index:#x}, {data:#x}: port {other}"),
        }
    }

    /// What an MSR is to the guest and to the host; `None` if the guest has ended.
    fn sees(&mut self, index: u32) -> Option<(Option<u64>, Option<u64>)> {
        let to_guest = match self.run(READ, index, 0) {
            Access::Done(value) => Some(value),
            Access::Refused => None,
            Access::Ended => return None,
        };
        Some((to_guest, read(&self.vcpu, index)))
    }
}

/// Whether some write of a guest to the MSR changes what is read from it, by the guest or by the host. A guest that
/// ends is followed by another one.
fn leaves_a_value(kvm: &Kvm, guest: &mut Guest, index: u32) -> bool {
    let Some(before) = guest.sees(index) else { panic!("MSR {index:#x}: reading it ends a guest") };
    let Some(value) = before.0.or(before.1) else { return false };
    let patterns = (0..64).map(|bit| value ^ 1 << bit).chain([0, u64::MAX, !value]);
    let mut leaves = false;
    for pattern in patterns {
        let after = match guest.run(WRITE, index, pattern) {
            Access::Done(_) => guest.sees(index),
            Access::Refused => continue,
            Access::Ended => None,
        };
        if after != Some(before) {
            leaves |= after.is_some();
            *guest = Guest::new(kvm);
        }
    }
    leaves
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
    let mut guest = Guest::new(&kvm);
    let listed = vcpu_state::msr_list(&kvm, &guest.vcpu).unwrap();
    let beyond = msrs::beyond(&guest.vcpu, &listed).unwrap();
    // Writing the power-on values is possible, as a whole.
    vcpu_state::set_msrs(&guest.vcpu, &beyond).unwrap();

    // A guest does write: SYSENTER_CS is in every KVM.
    assert!(leaves_a_value(&kvm, &mut guest, 0x174), "the guest changes nothing");
    // And is refused: nothing has this number.
    assert_eq!(guest.run(WRITE, 0x1fff, 0), Access::Refused, "there is no such MSR");

    let covered: BTreeSet<u32> = listed.iter().chain(&beyond).map(|&(index, _)| index).collect();
    let others = |index: &u32| {
        !(covered.contains(index) || held_elsewhere(*index) || software_kvm_keeps(*index))
    };
    let leaking: Vec<String> = SPACE
        .into_iter()
        .flatten()
        .filter(others)
        .filter(|index| leaves_a_value(&kvm, &mut guest, *index))
        .map(|index| format!("{index:#x}"))
        .collect();
    eprintln!("state has {} MSRs, {} more go back to power-on values", listed.len(), beyond.len());
    assert!(leaking.is_empty(), "{}: {leaking:?}", leaking.len());
}
