//! What CPU the guest sees: KVM's supported CPUID, masked by a named template and completed with
//! each vCPU's own topology leaves.
//!
//! The table without the per-vCPU parts is also a snapshot's *CPU signature*: a snapshot may only
//! be thawed where the template yields the same table, and a refusal names the first difference.

use firn_proto::control::CpuTemplate;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};

/// One CPUID leaf of the signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leaf {
    /// EAX on entry.
    pub function: u32,
    /// ECX on entry.
    pub index: u32,
    /// KVM's flags (whether `index` matters).
    pub flags: u32,
    /// EAX, EBX, ECX, EDX.
    pub registers: [u32; 4],
}

/// The CPU that a shell gives to its guest, without what differs between its vCPUs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signature {
    /// All leaves in KVM's order.
    pub leaves: Vec<Leaf>,
}

const LEAF_VENDOR: u32 = 0;
const LEAF_FEATURES: u32 = 1;
const LEAF_CACHE: u32 = 4;
const LEAF_EXTENDED: u32 = 7;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_XSAVE: u32 = 0xd;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_AMD_MAXIMUM: u32 = 0x8000_0000;
const LEAF_AMD_FEATURES: u32 = 0x8000_0001;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;
const LEAF_SVM: u32 = 0x8000_000a;
const LEAF_AMD_CACHE: u32 = 0x8000_001d;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;
const LEAF_AMD_TOPOLOGY_V2: u32 = 0x8000_0026;

/// The entry is one of several with this function, told apart by ECX.
const INDEXED: u32 = kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX;

/// Leaf 0x8000001E and its like are there, in ECX of leaf 0x80000001.
const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;

/// Levels of leaves 0xB and 0x1F, in ECX.
const THREADS: u32 = 1 << 8;
const CORES: u32 = 2 << 8;

/// Levels of leaf 0x80000026, in ECX.
const AMD_CORE: u32 = 1 << 8;
const AMD_SOCKET: u32 = 4 << 8;

/// VMX, in ECX of leaf 1.
const VMX: u32 = 1 << 5;

/// SVM, in ECX of leaf 0x80000001.
const SVM: u32 = 1 << 2;

/// AMX state (XTILECFG, XTILEDATA): 8 KiB a vCPU that only AMX code needs.
const XCR0_AMX: u32 = 0b11 << 17;

impl Signature {
    /// What `template` yields on this host.
    ///
    /// # Errors
    /// KVM's.
    pub fn of_host(kvm: &Kvm, template: CpuTemplate) -> Result<Self, kvm_ioctls::Error> {
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        let deadline_timer = kvm.check_extension(Cap::TscDeadlineTimer);
        let mut leaves: Vec<Leaf> = supported.as_slice().iter().map(from_entry).collect();
        match template {
            // The one template so far; naming it here makes the compiler ask about the next.
            CpuTemplate::Host => {}
            _ => return Err(kvm_ioctls::Error::new(libc::EINVAL)),
        }
        for leaf in &mut leaves {
            normalise(leaf, deadline_timer);
        }
        leaves.retain(|leaf| !(leaf.function == LEAF_XSAVE && matches!(leaf.index, 17 | 18)));
        make_topology(&mut leaves);
        Ok(Self { leaves })
    }

    /// The table for one vCPU of `vcpus`.
    ///
    /// # Errors
    /// If there are more leaves than KVM takes.
    pub fn for_vcpu(&self, id: u8, vcpus: u8) -> Result<CpuId, kvm_ioctls::Error> {
        let entries: Vec<kvm_cpuid_entry2> =
            self.leaves.iter().map(|leaf| to_entry(&with_topology(*leaf, id, vcpus))).collect();
        CpuId::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))
    }

    /// The first difference to `other` in words, if there is one.
    pub fn difference(&self, other: &Self) -> Option<String> {
        let find = |table: &Self, leaf: &Leaf| {
            table
                .leaves
                .iter()
                .find(|l| l.function == leaf.function && l.index == leaf.index)
                .copied()
        };
        for leaf in &self.leaves {
            let name = format!("CPUID leaf {:#x}.{}", leaf.function, leaf.index);
            let Some(theirs) = find(other, leaf) else {
                return Some(format!("{name} is in the snapshot but not on this host"));
            };
            for (register, (mine, theirs)) in
                ["EAX", "EBX", "ECX", "EDX"].iter().zip(leaf.registers.iter().zip(theirs.registers))
            {
                if *mine != theirs {
                    return Some(format!(
                        "{name} {register} is {mine:#010x} in the snapshot, {theirs:#010x} on this host"
                    ));
                }
            }
        }
        other.leaves.iter().find(|leaf| find(self, leaf).is_none()).map(|leaf| {
            format!(
                "CPUID leaf {:#x}.{} is on this host but not in the snapshot",
                leaf.function, leaf.index
            )
        })
    }
}

fn from_entry(entry: &kvm_cpuid_entry2) -> Leaf {
    Leaf {
        function: entry.function,
        index: entry.index,
        flags: entry.flags,
        registers: [entry.eax, entry.ebx, entry.ecx, entry.edx],
    }
}

fn to_entry(leaf: &Leaf) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = leaf.registers;
    kvm_cpuid_entry2 {
        function: leaf.function,
        index: leaf.index,
        flags: leaf.flags,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

/// Puts in the leaves of topology, whether or not KVM has them; [`with_topology`] fills them.
///
/// KVM's own tell the host's topology, or nothing, or are not there, depending on its version and the CPU.
fn make_topology(leaves: &mut Vec<Leaf>) {
    let made = [LEAF_TOPOLOGY, LEAF_TOPOLOGY_V2, LEAF_AMD_TOPOLOGY, LEAF_AMD_TOPOLOGY_V2];
    leaves.retain(|leaf| !made.contains(&leaf.function));
    let register = |function, register: usize| {
        let leaf = leaves.iter().find(|leaf: &&Leaf| leaf.function == function);
        leaf.map_or(0, |leaf| leaf.registers[register])
    };
    // Leaf 0x1F only where there are leaves that far; leaf 0xB belongs to the x2APIC, which is there.
    let highest = register(LEAF_VENDOR, 0);
    let mut more = vec![LEAF_TOPOLOGY];
    more.extend((highest >= LEAF_TOPOLOGY_V2).then_some(LEAF_TOPOLOGY_V2));
    let mut single = Vec::new();
    if register(LEAF_AMD_FEATURES, 2) & TOPOLOGY_EXTENSIONS != 0 {
        single.push(LEAF_AMD_TOPOLOGY);
    }
    if register(LEAF_AMD_MAXIMUM, 0) >= LEAF_AMD_TOPOLOGY_V2 {
        more.push(LEAF_AMD_TOPOLOGY_V2);
    }
    for function in more {
        // Two levels, and the one that ends the list.
        let levels =
            (0..3).map(|index| Leaf { function, index, flags: INDEXED, registers: [0; 4] });
        leaves.extend(levels);
    }
    let plain = |function| Leaf { function, index: 0, flags: 0, registers: [0; 4] };
    leaves.extend(single.into_iter().map(plain));
    for leaf in leaves.iter_mut().filter(|leaf| leaf.function == LEAF_VENDOR) {
        leaf.registers[0] = highest.max(LEAF_TOPOLOGY);
    }
    leaves.sort_by_key(|leaf| (leaf.function, leaf.index));
}

/// Takes out what depends on the CPU that happened to answer, and adds what KVM leaves to us.
fn normalise(leaf: &mut Leaf, deadline_timer: bool) {
    let [eax, ebx, ecx, edx] = &mut leaf.registers;
    match (leaf.function, leaf.index) {
        (LEAF_FEATURES, _) => {
            // Initial APIC id and count of logical processors: `with_topology` fills them in.
            *ebx &= 0x0000_ffff;
            // Hypervisor present; x2APIC and the TSC-deadline timer are emulated by the in-kernel
            // LAPIC, and older kernels leave announcing them to user space.
            *ecx |= 1 << 31 | 1 << 21;
            // No function needs virtual machines of its own, and KVM's nested code, which is large,
            // stays out of a guest's reach.
            *ecx &= !VMX;
            if deadline_timer {
                *ecx |= 1 << 24;
            }
        }
        // Cores and threads that share a cache: with_topology.
        (LEAF_CACHE, _) => *eax &= 0x0000_3fff,
        (LEAF_EXTENDED, 0) => *edx &= !(1 << 22 | 1 << 24 | 1 << 25),
        (LEAF_EXTENDED, 1) => *eax &= !(1 << 21),
        (LEAF_XSAVE, 0) => {
            *eax &= !XCR0_AMX;
            // EBX is the size for the XCR0 of the moment; KVM computes it anew for each vCPU.
            *ebx = 0;
            // ECX is the size with all features: without AMX it ends where its area begins.
            *ecx = (*ecx).min(2816);
        }
        (LEAF_XSAVE, 1) => *ebx = 0,
        (LEAF_AMD_FEATURES, _) => *ecx &= !SVM,
        // Cores of the package and width of their ids: with_topology.
        (LEAF_AMD_SIZES, _) => *ecx &= !0xf0ff,
        (LEAF_AMD_CACHE, _) => *eax &= 0x0000_3fff,
        (LEAF_SVM, _) => leaf.registers = [0; 4],
        _ => {}
    }
}

/// One thread a core, all cores in one package.
fn with_topology(mut leaf: Leaf, id: u8, vcpus: u8) -> Leaf {
    let id = u32::from(id);
    let vcpus = u32::from(vcpus);
    // Bits of an APIC id that number the cores of the package, and ids that these make room for.
    let ids = vcpus.next_power_of_two();
    let core_bits = ids.trailing_zeros();
    let [eax, ebx, ecx, edx] = &mut leaf.registers;
    match (leaf.function, leaf.index) {
        (LEAF_FEATURES, _) => {
            *ebx |= id << 24 | vcpus << 16;
            if vcpus > 1 {
                *edx |= 1 << 28;
            } else {
                *edx &= !(1 << 28);
            }
        }
        (LEAF_CACHE | LEAF_AMD_CACHE, _) if *eax & 0x1f != 0 => {
            if leaf.function == LEAF_CACHE {
                *eax |= (ids - 1) << 26;
            }
            // The third level is shared by all, the others are a core's own.
            if *eax >> 5 & 7 == 3 {
                *eax |= (ids - 1) << 14;
            }
        }
        (LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2, 0) => {
            (*eax, *ebx, *ecx, *edx) = (0, 1, THREADS, id);
        }
        (LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2, 1) => {
            (*eax, *ebx, *ecx, *edx) = (core_bits, vcpus, CORES | 1, id);
        }
        (LEAF_AMD_TOPOLOGY_V2, 0) => (*eax, *ebx, *ecx, *edx) = (0, 1, AMD_CORE, id),
        (LEAF_AMD_TOPOLOGY_V2, 1) => {
            (*eax, *ebx, *ecx, *edx) = (core_bits, vcpus, AMD_SOCKET | 1, id);
        }
        (LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 | LEAF_AMD_TOPOLOGY_V2, index) => {
            (*ecx, *edx) = (index, id);
        }
        // One thread a core, one node.
        (LEAF_AMD_TOPOLOGY, _) => (*eax, *ebx, *ecx, *edx) = (id, id, 0, 0),
        (LEAF_AMD_SIZES, _) => *ecx |= core_bits << 12 | (vcpus - 1),
        _ => {}
    }
    leaf
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, registers: [u32; 4]) -> Leaf {
        Leaf { function, index, flags: 0, registers }
    }

    #[test]
    fn difference_names_leaf_register_and_values() {
        let a = Signature { leaves: vec![leaf(7, 0, [1, 2, 3, 4])] };
        let b = Signature { leaves: vec![leaf(7, 0, [1, 2, 9, 4])] };
        assert_eq!(a.difference(&a), None);
        let text = a.difference(&b).unwrap();
        assert!(text.contains("0x7.0") && text.contains("ECX") && text.contains("0x00000009"));
        assert!(a.difference(&Signature { leaves: vec![] }).unwrap().contains("not on this host"));
    }

    #[test]
    fn guests_have_no_virtual_machines_of_their_own() {
        let of = |function, register: usize| {
            let mut leaf = leaf(function, 0, [u32::MAX; 4]);
            normalise(&mut leaf, true);
            leaf.registers[register]
        };
        assert_eq!(of(1, 2) & VMX, 0);
        assert_eq!(of(0x8000_0001, 2) & SVM, 0);
        assert_eq!(of(0x8000_000a, 0), 0);
    }

    #[test]
    fn topology_numbers_vcpus_and_hides_the_hosts() {
        let mut features = leaf(1, 0, [0, 0xaabb_0800, 0, 1 << 28]);
        normalise(&mut features, true);
        assert_eq!(features.registers[1] >> 16, 0);
        assert_ne!(features.registers[2] & (1 << 24), 0);
        let one = with_topology(features, 0, 1);
        assert_eq!(one.registers[1] >> 16 & 0xff, 1);
        assert_eq!(one.registers[3] & (1 << 28), 0);
        let third = with_topology(features, 2, 4);
        assert_eq!(third.registers[1] >> 24, 2);
        assert_eq!(with_topology(leaf(0xb, 1, [0; 4]), 2, 4).registers, [2, 4, 0x201, 2]);
    }

    /// As Linux reads it (arch/x86/kernel/cpu/topology_ext.c, topology_amd.c): bits of the APIC id to the
    /// next level, and how many are in a package.
    #[test]
    fn six_vcpus_are_one_package_of_six_cores_on_any_host() {
        let intel = vec![leaf(0, 0, [0x20, 0, 0, 0]), leaf(0x8000_0000, 0, [0x8000_0008, 0, 0, 0])];
        let old = vec![leaf(0, 0, [7, 0, 0, 0]), leaf(0x8000_0000, 0, [0x8000_0008, 0, 0, 0])];
        let host = |function, index| leaf(function, index, [77; 4]);
        let amd = vec![
            leaf(0, 0, [0x10, 0, 0, 0]),
            host(0xb, 0),
            host(0xb, 7),
            leaf(0x8000_0000, 0, [0x8000_0026, 0, 0, 0]),
            leaf(0x8000_0001, 0, [0, 0, TOPOLOGY_EXTENSIONS, 0]),
            leaf(0x8000_0008, 0, [48, 0, 0xf07f, 0]),
            leaf(0x8000_001d, 3, [3 << 5 | 3 | 63 << 14, 0, 0, 0]),
            host(0x8000_001e, 0),
            host(0x8000_0026, 0),
        ];
        for (mut leaves, expected) in
            [(intel, vec![0xb, 0x1f]), (old, vec![0xb]), (amd, vec![0xb, 0x8000_001e, 0x8000_0026])]
        {
            leaves.iter_mut().for_each(|leaf| normalise(leaf, true));
            make_topology(&mut leaves);
            let made = [0xb, 0x1f, 0x8000_001e, 0x8000_0026];
            let mut found: Vec<u32> = leaves.iter().map(|leaf| leaf.function).collect();
            found.dedup();
            assert!(found.is_sorted() && found.contains(&0), "{found:x?}");
            found.retain(|function| made.contains(function));
            assert_eq!(found, expected);
            assert!(leaves[0].registers[0] >= 0xb);
            for id in 0..6 {
                let get = |function, index| {
                    let leaf = leaves.iter().find(|l| (l.function, l.index) == (function, index));
                    leaf.map(|leaf| with_topology(*leaf, id, 6).registers)
                };
                let id = u32::from(id);
                for function in [0xb, 0x1f].into_iter().filter(|f| expected.contains(f)) {
                    assert_eq!(get(function, 0), Some([0, 1, 0x100, id]));
                    assert_eq!(get(function, 1), Some([3, 6, 0x201, id]));
                    assert_eq!(get(function, 2), Some([0, 0, 2, id]));
                }
                if expected.contains(&0x8000_001e) {
                    assert_eq!(get(0x8000_001e, 0), Some([id, id, 0, 0]));
                    assert_eq!(get(0x8000_0008, 0), Some([48, 0, 3 << 12 | 5, 0]));
                    assert_eq!(get(0x8000_001d, 3).unwrap()[0], 3 << 5 | 3 | 7 << 14);
                    assert_eq!(get(0x8000_0026, 0), Some([0, 1, 0x100, id]));
                    assert_eq!(get(0x8000_0026, 1), Some([3, 6, 0x401, id]));
                }
            }
        }
    }
}
