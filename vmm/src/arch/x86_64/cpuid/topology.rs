//! The topology that guests see: made here, so that it is the same on any host.

use super::leaf::Leaf;

const LEAF_FEATURES: u32 = 1;
const LEAF_CACHE: u32 = 4;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_AMD_FEATURES: u32 = 0x8000_0001;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;
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

/// Puts in the leaves of topology, whether or not KVM has them; [`of_vcpu`] fills them.
///
/// KVM's own tell the host's topology, or nothing, or are not there, depending on its version and the CPU.
///
/// `highest` and `highest_extended` are the last leaves that KVM has.
pub(super) fn make(leaves: &mut Vec<Leaf>, highest: u32, highest_extended: u32) {
    // Leaf 0x1F only where there are leaves that far; leaf 0xB belongs to the x2APIC, which is there.
    let mut more = vec![LEAF_TOPOLOGY];
    more.extend((highest >= LEAF_TOPOLOGY_V2).then_some(LEAF_TOPOLOGY_V2));
    more.extend((highest_extended >= LEAF_AMD_TOPOLOGY_V2).then_some(LEAF_AMD_TOPOLOGY_V2));
    let made = [LEAF_TOPOLOGY, LEAF_TOPOLOGY_V2, LEAF_AMD_TOPOLOGY, LEAF_AMD_TOPOLOGY_V2];
    leaves.retain(|leaf| !made.contains(&leaf.function));
    for function in more {
        // Two levels, and the one that ends the list.
        let levels =
            (0..3).map(|index| Leaf { function, index, flags: INDEXED, registers: [0; 4] });
        leaves.extend(levels);
    }
    let features = leaves.iter().find(|leaf| leaf.function == LEAF_AMD_FEATURES);
    if features.is_some_and(|leaf| leaf.registers[2] & TOPOLOGY_EXTENSIONS != 0) {
        let function = LEAF_AMD_TOPOLOGY;
        leaves.push(Leaf { function, index: 0, flags: 0, registers: [0; 4] });
    }
}

/// A leaf for one vCPU of `vcpus`: one thread a core, all cores in one package.
pub(super) fn of_vcpu(mut leaf: Leaf, id: u8, vcpus: u8) -> Leaf {
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
    fn topology_numbers_vcpus_and_hides_the_hosts() {
        let features = leaf(1, 0, [0, 0x0800, 0, 1 << 28]);
        let one = of_vcpu(features, 0, 1);
        assert_eq!(one.registers[1] >> 16 & 0xff, 1);
        assert_eq!(one.registers[3] & (1 << 28), 0);
        let third = of_vcpu(features, 2, 4);
        assert_eq!(third.registers[1] >> 24, 2);
        assert_eq!(of_vcpu(leaf(0xb, 1, [0; 4]), 2, 4).registers, [2, 4, 0x201, 2]);
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
            leaf(0x8000_0008, 0, [48, 0, 0, 0]),
            leaf(0x8000_001d, 3, [3 << 5 | 3, 0, 0, 0]),
            host(0x8000_001e, 0),
            host(0x8000_0026, 0),
        ];
        for (mut leaves, expected) in
            [(intel, vec![0xb, 0x1f]), (old, vec![0xb]), (amd, vec![0xb, 0x8000_001e, 0x8000_0026])]
        {
            let highest = |of: u32| leaves.iter().find(|l| l.function == of).unwrap().registers[0];
            let (basic, extended) = (highest(0), highest(0x8000_0000));
            make(&mut leaves, basic, extended);
            let made = [0xb, 0x1f, 0x8000_001e, 0x8000_0026];
            let mut found: Vec<u32> = leaves.iter().map(|leaf| leaf.function).collect();
            found.sort();
            found.dedup();
            found.retain(|function| made.contains(function));
            assert_eq!(found, expected);
            for id in 0..6 {
                let get = |function, index| {
                    let leaf = leaves.iter().find(|l| (l.function, l.index) == (function, index));
                    leaf.map(|leaf| of_vcpu(*leaf, id, 6).registers)
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
