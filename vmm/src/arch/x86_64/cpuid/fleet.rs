//! What guests see of a CPU of a fleet: the same table on each host whose CPU has all of a level, so that
//! a snapshot of one is thawed on another.
//!
//! Levels are those of the x86-64 psABI, with what servers of that level have besides. Model, name and caches
//! would tell hosts apart, so model and name are a fleet's own and caches are not told. What stays the
//! host's must be the same on all: the vendor, the width of addresses, KVM's own leaves.

use firn_proto::control::CpuTemplate;

use super::{
    LEAF_EXTENDED, LEAF_FEATURES, LEAF_KVM, LEAF_MAXIMUM, LEAF_VENDOR, LEAF_XSAVE,
    allowed::{EAX, EBX, ECX, EDX},
    leaf::Leaf,
};

const LEAF_KVM_FEATURES: u32 = 0x4000_0001;
const LEAF_EXTENDED_FEATURES: u32 = 0x8000_0001;
const LEAF_NAME: u32 = 0x8000_0002;
const LEAF_SIZES: u32 = 0x8000_0008;

/// x87, SSE and AVX: the components of XSAVE whose places are the same on each CPU (SDM vol. 1, 13.4).
const COMPONENTS: u32 = 0b111;

/// Bits of linear addresses: those of four-level page tables.
const LINEAR: u32 = 48;

/// A feature that a CPU of a level has.
struct Feature {
    name: &'static str,
    function: u32,
    register: usize,
    bit: u32,
}

const fn feature(name: &'static str, function: u32, register: usize, bit: u32) -> Feature {
    Feature { name, function, register, bit }
}

/// Of each level: what every x86-64 CPU has, and what x86-64-v2 adds.
const V2: &[Feature] = &[
    feature("FPU", LEAF_FEATURES, EDX, 0),
    feature("DE", LEAF_FEATURES, EDX, 2),
    feature("PSE", LEAF_FEATURES, EDX, 3),
    feature("TSC", LEAF_FEATURES, EDX, 4),
    feature("MSR", LEAF_FEATURES, EDX, 5),
    feature("PAE", LEAF_FEATURES, EDX, 6),
    feature("MCE", LEAF_FEATURES, EDX, 7),
    feature("CX8", LEAF_FEATURES, EDX, 8),
    feature("APIC", LEAF_FEATURES, EDX, 9),
    feature("SEP", LEAF_FEATURES, EDX, 11),
    feature("MTRR", LEAF_FEATURES, EDX, 12),
    feature("PGE", LEAF_FEATURES, EDX, 13),
    feature("MCA", LEAF_FEATURES, EDX, 14),
    feature("CMOV", LEAF_FEATURES, EDX, 15),
    feature("PAT", LEAF_FEATURES, EDX, 16),
    feature("PSE36", LEAF_FEATURES, EDX, 17),
    feature("CLFSH", LEAF_FEATURES, EDX, 19),
    feature("MMX", LEAF_FEATURES, EDX, 23),
    feature("FXSR", LEAF_FEATURES, EDX, 24),
    feature("SSE", LEAF_FEATURES, EDX, 25),
    feature("SSE2", LEAF_FEATURES, EDX, 26),
    feature("SSE3", LEAF_FEATURES, ECX, 0),
    feature("SSSE3", LEAF_FEATURES, ECX, 9),
    feature("CMPXCHG16B", LEAF_FEATURES, ECX, 13),
    feature("SSE4.1", LEAF_FEATURES, ECX, 19),
    feature("SSE4.2", LEAF_FEATURES, ECX, 20),
    feature("POPCNT", LEAF_FEATURES, ECX, 23),
    feature("LAHF", LEAF_EXTENDED_FEATURES, ECX, 0),
    feature("SYSCALL", LEAF_EXTENDED_FEATURES, EDX, 11),
    feature("NX", LEAF_EXTENDED_FEATURES, EDX, 20),
    feature("RDTSCP", LEAF_EXTENDED_FEATURES, EDX, 27),
    feature("LM", LEAF_EXTENDED_FEATURES, EDX, 29),
];

/// What x86-64-v3 adds, and what else Haswell and Zen have that functions or their kernel use.
const V3: &[Feature] = &[
    feature("PCLMULQDQ", LEAF_FEATURES, ECX, 1),
    feature("FMA", LEAF_FEATURES, ECX, 12),
    feature("MOVBE", LEAF_FEATURES, ECX, 22),
    feature("AES", LEAF_FEATURES, ECX, 25),
    feature("XSAVE", LEAF_FEATURES, ECX, 26),
    feature("AVX", LEAF_FEATURES, ECX, 28),
    feature("F16C", LEAF_FEATURES, ECX, 29),
    feature("RDRAND", LEAF_FEATURES, ECX, 30),
    feature("FSGSBASE", LEAF_EXTENDED, EBX, 0),
    feature("BMI1", LEAF_EXTENDED, EBX, 3),
    feature("AVX2", LEAF_EXTENDED, EBX, 5),
    feature("SMEP", LEAF_EXTENDED, EBX, 7),
    feature("BMI2", LEAF_EXTENDED, EBX, 8),
    feature("LZCNT", LEAF_EXTENDED_FEATURES, ECX, 5),
    feature("XSAVEOPT", LEAF_XSAVE, EAX, 0),
];

impl Feature {
    /// The sub-leaf where the feature is: that of XSAVE's instructions is not the first.
    fn index(&self) -> u32 {
        u32::from(self.function == LEAF_XSAVE)
    }

    fn is_of(&self, leaf: &Leaf) -> bool {
        (self.function, self.index()) == (leaf.function, leaf.index)
    }
}

/// A level, and what a fleet of it calls its CPUs.
struct Level {
    features: &'static [&'static [Feature]],
    name: &'static [u8; 48],
    /// Family, model and stepping as leaf 1 has them: Nehalem's, Haswell's.
    intel: u32,
}

/// Family, model and stepping of Zen 2: kernels look at AMD's family where Intel has bits.
const AMD: u32 = 0x0083_0f10;

const fn padded(name: &[u8]) -> [u8; 48] {
    let mut padded = [0; 48];
    let mut n = 0;
    while n < name.len() {
        padded[n] = name[n];
        n += 1;
    }
    padded
}

impl Level {
    fn of(template: CpuTemplate) -> Option<Self> {
        match template {
            CpuTemplate::X86_64V2 => Some(Self {
                features: &[V2],
                name: const { &padded(b"x86-64-v2") },
                intel: 0x0001_06a5,
            }),
            CpuTemplate::X86_64V3 => Some(Self {
                features: &[V2, V3],
                name: const { &padded(b"x86-64-v3") },
                intel: 0x0003_06c3,
            }),
            _ => None,
        }
    }

    fn features(&self) -> impl Iterator<Item = &Feature> {
        self.features.iter().copied().flatten()
    }

    /// What guests see of a leaf; `None`: nothing.
    fn see(&self, leaf: &Leaf, amd: bool) -> Option<Leaf> {
        let mut seen = Leaf { registers: [0; 4], ..*leaf };
        for feature in self.features().filter(|feature| feature.is_of(leaf)) {
            seen.registers[feature.register] |= 1 << feature.bit;
        }
        let has_xsave = self.features().any(|feature| feature.function == LEAF_XSAVE);
        let model = if amd { AMD } else { self.intel };
        match (leaf.function, leaf.index) {
            (LEAF_VENDOR | LEAF_KVM | LEAF_KVM_FEATURES | LEAF_MAXIMUM | 6, _) => {
                seen.registers = leaf.registers;
            }
            (LEAF_FEATURES, _) => {
                seen.registers[EAX] = model;
                seen.registers[EBX] = leaf.registers[EBX];
            }
            (LEAF_EXTENDED, 0) => {}
            (LEAF_XSAVE, 0) if has_xsave => seen.registers[EAX] = COMPONENTS,
            (LEAF_XSAVE, 1) if has_xsave => {}
            (LEAF_XSAVE, index) if has_xsave && COMPONENTS >> index & 1 != 0 => {
                seen.registers = leaf.registers;
            }
            (LEAF_EXTENDED_FEATURES, _) if amd => seen.registers[EAX] = model,
            (LEAF_EXTENDED_FEATURES, _) => {}
            (LEAF_NAME..LEAF_NAME_END, _) => {
                let at = (leaf.function - LEAF_NAME) as usize * 16;
                let words = self.name[at..at + 16].chunks_exact(4);
                for (register, word) in seen.registers.iter_mut().zip(words) {
                    *register = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
                }
            }
            (LEAF_SIZES, _) => seen.registers[EAX] = leaf.registers[EAX] & 0xff | LINEAR << 8,
            _ => return None,
        }
        Some(seen)
    }
}

const LEAF_NAME_END: u32 = LEAF_NAME + 3;

/// Leaves only what the template's fleet has; without effect for a template that is no fleet's.
///
/// # Errors
/// The names of what this host's CPU lacks.
pub(super) fn narrow(
    leaves: &mut Vec<Leaf>,
    template: CpuTemplate,
) -> Result<(), Vec<&'static str>> {
    let Some(level) = Level::of(template) else { return Ok(()) };
    let has = |feature: &&Feature| {
        let mut leaves = leaves.iter().filter(|leaf| feature.is_of(leaf));
        leaves.any(|leaf| leaf.registers[feature.register] >> feature.bit & 1 != 0)
    };
    let lacks: Vec<_> = level.features().filter(|f| !has(f)).map(|f| f.name).collect();
    if !lacks.is_empty() {
        return Err(lacks);
    }
    let vendor = leaves.iter().find(|leaf| leaf.function == LEAF_VENDOR);
    let amd = vendor.is_some_and(|leaf| leaf.registers[EBX] == u32::from_le_bytes(*b"Auth"));
    *leaves = leaves.iter().filter_map(|leaf| level.see(leaf, amd)).collect();
    Ok(())
}

/// What guests of a fleet see, as lists in Markdown: `docs/cpu-state.md` has them.
pub(super) fn lists() -> String {
    let names = |features: &[Feature]| {
        features.iter().map(|feature| feature.name).collect::<Vec<_>>().join(", ")
    };
    format!("- `x86-64-v2`: {}\n- `x86-64-v3`, besides: {}\n", names(V2), names(V3))
}

#[cfg(test)]
mod tests {
    use super::{super::allowed, *};

    /// What KVM may give to guests is more than what a fleet has: each bit is allowed.
    #[test]
    fn a_fleets_features_are_on_the_list() {
        for feature in V2.iter().chain(V3) {
            let mask = allowed::mask(feature.function, feature.index()).unwrap();
            assert_ne!(mask[feature.register] >> feature.bit & 1, 0, "{}", feature.name);
        }
    }

    #[test]
    fn what_a_host_lacks_is_named() {
        let mut leaves = vec![Leaf { function: 1, index: 0, flags: 0, registers: [0, 0, 0, !0] }];
        let lacks = narrow(&mut leaves, CpuTemplate::X86_64V2).unwrap_err();
        assert_eq!(lacks[..3], ["SSE3", "SSSE3", "CMPXCHG16B"]);
        assert!(!lacks.contains(&"SSE2") && !lacks.contains(&"AVX"));
        assert!(narrow(&mut leaves, CpuTemplate::X86_64V3).unwrap_err().contains(&"AVX2"));
        narrow(&mut leaves, CpuTemplate::Host).unwrap();
        assert_eq!(leaves[0].registers[EDX], !0);
    }
}
