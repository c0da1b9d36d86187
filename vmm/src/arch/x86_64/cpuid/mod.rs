//! What CPU the guest sees: of KVM's offer what is on a list ([`allowed`]), completed with a topology of
//! our own and what KVM leaves to us.
//!
//! The table without the per-vCPU parts is also a snapshot's *CPU signature*: a snapshot may only
//! be thawed where the template yields the same table, and a refusal names the first difference.

mod allowed;
mod fleet;
mod leaf;
mod topology;

use firn_proto::control::CpuTemplate;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};

pub use self::{allowed::XCR0, leaf::Leaf};

/// All that guests may see of a CPU, as a table in Markdown: `docs/cpu-state.md` has it.
pub fn table() -> String {
    allowed::table()
}

/// What guests of a fleet see of a CPU, as lists in Markdown: `docs/cpu-state.md` has them.
pub fn fleets() -> String {
    fleet::lists()
}

/// A host can't give the CPU of a template to its guests.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// KVM refused to say what it offers.
    #[error("KVM {what}: {source}")]
    Kvm {
        /// Which ioctl.
        what: &'static str,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// The host's CPU, or its KVM, has less than all CPUs of the fleet.
    #[error("CPU template {template}: this host has no {}", lacks.join(", "))]
    Lacks {
        /// The template.
        template: CpuTemplate,
        /// Names of features.
        lacks: Vec<&'static str>,
    },
}

fn kvm_error(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> TemplateError {
    move |source| TemplateError::Kvm { what, source }
}

/// The CPU that a shell gives to its guest, without what differs between its vCPUs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signature {
    /// What it was made by.
    pub template: CpuTemplate,
    /// All leaves, by function and index.
    pub leaves: Vec<Leaf>,
    /// MSRs that tell guests what the CPU can, or need not mitigate: index and value.
    pub features: Vec<(u32, u64)>,
}

const LEAF_VENDOR: u32 = 0;
const LEAF_FEATURES: u32 = 1;
const LEAF_DESCRIPTORS: u32 = 2;
const LEAF_CACHE: u32 = 4;
const LEAF_EXTENDED: u32 = 7;
const LEAF_XSAVE: u32 = 0xd;
const LEAF_KVM: u32 = 0x4000_0000;
const LEAF_MAXIMUM: u32 = 0x8000_0000;
const LEAF_L2: u32 = 0x8000_0006;

/// In ECX of leaf 1. x2APIC and the TSC-deadline timer are emulated by the in-kernel LAPIC, and older
/// kernels leave announcing them to user space.
const X2APIC: u32 = 1 << 21;
const DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;

/// In EDX of leaf 7: cores of several kinds. KVM does not pass it on.
const HYBRID: u32 = 1 << 15;

/// Bytes of the part of an XSAVE area that every one has (SDM vol. 1, 13.4.1 and 13.4.2).
const XSAVE_LEGACY: u32 = 512 + 64;

/// Feature MSRs that guests read: IA32_ARCH_CAPABILITIES, and AMD's DE_CFG.
const ARCH_CAPABILITIES: u32 = 0x10a;
const DE_CFG: u32 = 0xc001_1029;

impl Signature {
    /// What `template` yields on this host.
    ///
    /// # Errors
    /// KVM's; [`TemplateError::Lacks`].
    pub fn of_host(kvm: &Kvm, template: CpuTemplate) -> Result<Self, TemplateError> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm_error("GET_SUPPORTED_CPUID"))?;
        let offered: Vec<Leaf> = supported.as_slice().iter().map(Leaf::from).collect();
        let hybrid = core::arch::x86_64::__cpuid_count(LEAF_EXTENDED, 0).edx & HYBRID != 0;
        let deadline_timer = kvm.check_extension(Cap::TscDeadlineTimer);
        let leaves = make(&offered, template, deadline_timer, hybrid)
            .map_err(|lacks| TemplateError::Lacks { template, lacks })?;
        let features = match template {
            CpuTemplate::Host => features(kvm, &[ARCH_CAPABILITIES, DE_CFG]),
            // A fleet's guests have no CPUID bit for the other one.
            _ => features(kvm, &[DE_CFG]),
        };
        Ok(Self { template, leaves, features: features.map_err(kvm_error("GET_MSRS"))? })
    }

    /// The table for one vCPU of `vcpus`.
    ///
    /// # Errors
    /// If there are more leaves than KVM takes.
    pub fn for_vcpu(&self, id: u8, vcpus: u8) -> Result<CpuId, kvm_ioctls::Error> {
        let leaves = self.leaves.iter().map(|leaf| topology::of_vcpu(*leaf, id, vcpus));
        let entries: Vec<kvm_cpuid_entry2> = leaves.map(kvm_cpuid_entry2::from).collect();
        CpuId::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))
    }

    /// The first difference to `other` in words, if there is one.
    pub fn difference(&self, other: &Self) -> Option<String> {
        if self.template != other.template {
            return Some(format!(
                "the CPU template is {} in the snapshot, {} on this host",
                self.template, other.template
            ));
        }
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
        if let Some(leaf) = other.leaves.iter().find(|leaf| find(self, leaf).is_none()) {
            let Leaf { function, index, .. } = leaf;
            return Some(format!(
                "CPUID leaf {function:#x}.{index} is on this host but not in the snapshot"
            ));
        }
        let value = |of: &Self, msr| of.features.iter().find(|f| f.0 == msr).map(|f| f.1);
        self.features.iter().chain(&other.features).find_map(|&(msr, _)| {
            match (value(self, msr), value(other, msr)) {
                (Some(mine), Some(theirs)) if mine == theirs => None,
                (Some(mine), Some(theirs)) => Some(format!(
                    "MSR {msr:#x} is {mine:#x} in the snapshot, {theirs:#x} on this host"
                )),
                (Some(_), None) => {
                    Some(format!("MSR {msr:#x} is in the snapshot but not on this host"))
                }
                (None, _) => Some(format!("MSR {msr:#x} is on this host but not in the snapshot")),
            }
        })
    }
}

/// Those of `wanted` that KVM has, with their values.
fn features(kvm: &Kvm, wanted: &[u32]) -> Result<Vec<(u32, u64)>, kvm_ioctls::Error> {
    let known = kvm.get_msr_feature_index_list()?;
    let known = wanted.iter().copied().filter(|index| known.as_slice().contains(index));
    let entries: Vec<_> =
        known.map(|index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut msrs = Msrs::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?;
    let read = kvm.get_msrs(&mut msrs)?;
    Ok(msrs.as_slice().iter().take(read).map(|msr| (msr.index, msr.data)).collect())
}

/// Makes a guest's leaves of those that KVM offers.
///
/// On a host whose cores are of several kinds, caches are not told: they are what differs.
///
/// # Errors
/// What the template needs and KVM does not offer.
fn make(
    offered: &[Leaf],
    template: CpuTemplate,
    deadline_timer: bool,
    hybrid: bool,
) -> Result<Vec<Leaf>, Vec<&'static str>> {
    let highest = |function| {
        // Leaves of topology that not every host has are not a fleet's.
        let leaf = offered.iter().find(|leaf| leaf.function == function);
        leaf.filter(|_| template == CpuTemplate::Host).map_or(0, |leaf| leaf.registers[0])
    };
    let mut leaves: Vec<Leaf> = offered.iter().filter_map(allow).collect();
    fleet::narrow(&mut leaves, template)?;
    topology::make(&mut leaves, highest(LEAF_VENDOR), highest(LEAF_MAXIMUM));
    if hybrid {
        leaves.retain(|leaf| ![LEAF_DESCRIPTORS, LEAF_CACHE, LEAF_L2].contains(&leaf.function));
    }
    leaves.sort_by_key(|leaf| (leaf.function, leaf.index));
    complete(&mut leaves, deadline_timer);
    Ok(leaves)
}

/// What of a leaf is for guests, if any.
fn allow(offered: &Leaf) -> Option<Leaf> {
    let mask = allowed::mask(offered.function, offered.index)?;
    let mut leaf = *offered;
    leaf.registers.iter_mut().zip(mask).for_each(|(register, mask)| *register &= mask);
    Some(leaf)
}

/// Adds what KVM leaves to us, and what depends on the other leaves.
fn complete(leaves: &mut [Leaf], deadline_timer: bool) {
    let last = |range: std::ops::Range<u32>| {
        leaves.iter().map(|leaf| leaf.function).filter(|f| range.contains(f)).max().unwrap_or(0)
    };
    let (basic, kvm) = (last(0..LEAF_KVM), last(LEAF_KVM..LEAF_MAXIMUM));
    let extended = last(LEAF_MAXIMUM..u32::MAX);
    let of_extended = leaves.iter().filter(|leaf| leaf.function == LEAF_EXTENDED);
    let sub_leaves = of_extended.map(|leaf| leaf.index).max().unwrap_or(0);
    let components = leaves.iter().filter(|leaf| leaf.function == LEAF_XSAVE && leaf.index > 1);
    let area = components.map(|leaf| leaf.registers[0].saturating_add(leaf.registers[1])).max();
    for leaf in leaves {
        let [eax, _, ecx, _] = &mut leaf.registers;
        match (leaf.function, leaf.index) {
            (LEAF_VENDOR, _) => *eax = basic,
            (LEAF_FEATURES, _) => {
                *ecx |= HYPERVISOR | X2APIC | if deadline_timer { DEADLINE } else { 0 };
            }
            (LEAF_EXTENDED, 0) => *eax = sub_leaves,
            (LEAF_XSAVE, 0) => *ecx = area.unwrap_or(0).max(XSAVE_LEGACY),
            (LEAF_KVM, _) => *eax = kvm,
            (LEAF_MAXIMUM, _) => *eax = extended,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, registers: [u32; 4]) -> Leaf {
        Leaf { function, index, flags: 0, registers }
    }

    fn signature(leaves: Vec<Leaf>) -> Signature {
        Signature { template: CpuTemplate::Host, leaves, features: Vec::new() }
    }

    #[test]
    fn difference_names_leaf_register_and_values() {
        let a = signature(vec![leaf(7, 0, [1, 2, 3, 4])]);
        let b = signature(vec![leaf(7, 0, [1, 2, 9, 4])]);
        assert_eq!(a.difference(&a), None);
        let text = a.difference(&b).unwrap();
        assert!(text.contains("0x7.0") && text.contains("ECX") && text.contains("0x00000009"));
        assert!(a.difference(&signature(vec![])).unwrap().contains("not on this host"));
    }

    #[test]
    fn a_differing_feature_msr_is_named() {
        let of = |features: Vec<(u32, u64)>| Signature { features, ..signature(vec![]) };
        let (a, b) = (of(vec![(0x10a, 1)]), of(vec![(0x10a, 3)]));
        assert_eq!(a.difference(&a), None);
        let text = a.difference(&b).unwrap();
        assert!(text.contains("MSR 0x10a is 0x1") && text.contains("0x3 on this host"), "{text}");
        assert!(a.difference(&of(vec![])).unwrap().contains("not on this host"));
        assert!(of(vec![]).difference(&a).unwrap().contains("not in the snapshot"));
    }

    fn host(offered: &[Leaf], deadline_timer: bool, hybrid: bool) -> Vec<Leaf> {
        make(offered, CpuTemplate::Host, deadline_timer, hybrid).unwrap()
    }

    /// A CPU that can all that can be said.
    fn everything() -> Vec<Leaf> {
        let ones = [u32::MAX; 4];
        let plain =
            (0..0x30).chain(LEAF_KVM..LEAF_KVM + 0x20).chain(LEAF_MAXIMUM..LEAF_MAXIMUM + 0x30);
        let mut leaves: Vec<Leaf> =
            plain.filter(|f| ![7, 0xd].contains(f)).map(|f| leaf(f, 0, ones)).collect();
        leaves.extend((0..4).map(|index| leaf(7, index, ones)));
        leaves.extend((0..2).map(|index| leaf(0xd, index, ones)));
        leaves.extend((2..20).map(|index| leaf(0xd, index, [64, 576 + 64 * index, 0, 0])));
        leaves
    }

    #[test]
    fn guests_see_what_is_on_the_list_and_nothing_else() {
        let made = host(&everything(), true, false);
        for leaf in &made {
            for vcpu in 0..6 {
                let seen = topology::of_vcpu(*leaf, vcpu, 6).registers;
                let may = allowed::tests::visible(leaf.function, leaf.index);
                for (seen, may) in seen.iter().zip(may) {
                    assert_eq!(seen & !may, 0, "leaf {:#x}.{}", leaf.function, leaf.index);
                }
            }
        }
        let get = |function, index| {
            let mut found = made.iter().filter(|l| (l.function, l.index) == (function, index));
            found.next().map(|leaf| leaf.registers)
        };
        assert_eq!(get(0, 0).unwrap()[0], 0x1f, "the last basic leaf that is there");
        assert_eq!(get(7, 0).unwrap()[0], 2);
        assert_eq!(get(LEAF_KVM, 0).unwrap()[0], LEAF_KVM + 1);
        assert_eq!(get(LEAF_MAXIMUM, 0).unwrap()[0], 0x8000_0026);
        assert_eq!(get(0xd, 0).unwrap(), [allowed::XCR0, 0, 576 + 64 * 7 + 64, 0]);
        assert_eq!([get(0xa, 0), get(0x12, 0), get(0x8000_000a, 0), get(0xd, 9)], [None; 4]);
        assert!(made.is_sorted_by_key(|leaf| (leaf.function, leaf.index)));
    }

    #[test]
    fn a_cpu_of_two_kinds_of_cores_does_not_tell_its_caches() {
        let made = host(&everything(), true, true);
        assert!(!made.iter().any(|leaf| [2, 4, 0x8000_0006].contains(&leaf.function)));
        assert!(made.iter().any(|leaf| leaf.function == 0x8000_0008));
    }

    #[test]
    fn the_least_cpu_has_what_every_guest_has() {
        let made = host(&[leaf(0, 0, [1, 0, 0, 0]), leaf(1, 0, [0; 4])], false, false);
        assert_eq!(made[0].registers[0], 0xb);
        assert_eq!(made[1].registers[2], HYPERVISOR | X2APIC);
    }

    /// Whatever a host has beyond the level, whatever it is called and however large its caches are.
    #[test]
    fn hosts_of_a_fleet_have_one_signature() {
        let vendor = |leaves: &mut Vec<Leaf>, name: &[u8; 12]| {
            for leaf in leaves.iter_mut().filter(|leaf| leaf.function == LEAF_VENDOR) {
                let word = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
                leaf.registers = [leaf.registers[0], word(0), word(8), word(4)];
            }
        };
        let (v2, v3) = (CpuTemplate::X86_64V2, CpuTemplate::X86_64V3);
        let (intel, amd) = (b"GenuineIntel", b"AuthenticAMD");
        for (name, template, model) in [
            (intel, v2, 0x0001_06a5),
            (intel, v3, 0x0003_06c3),
            (amd, v2, 0x0083_0f10),
            (amd, v3, 0x0083_0f10),
        ] {
            let mut best = everything();
            vendor(&mut best, name);
            best.iter_mut().filter(|l| l.function == 0x8000_0008).for_each(|l| {
                l.registers[0] = 57 << 8 | 46;
            });
            // The least that is of the fleet: what the other one leaves of the best.
            let seen = make(&best, template, true, false).unwrap();
            let mut least = seen.clone();
            least.iter_mut().filter(|l| l.function == 0x8000_0008).for_each(|l| {
                l.registers[0] = 48 << 8 | 46;
            });
            least.iter_mut().filter(|l| l.function == 1).for_each(|l| l.registers[0] = 0x1234);
            least.retain(|l| l.function != 0xb);
            assert_eq!(make(&least, template, true, true).unwrap(), seen);
            let get = |function, index| {
                let found = seen.iter().find(|l| (l.function, l.index) == (function, index));
                found.map(|leaf| leaf.registers)
            };
            assert_eq!(get(1, 0).unwrap()[0], model);
            assert_eq!(get(0x8000_0008, 0).unwrap()[0], 48 << 8 | 46);
            assert_eq!(get(0x8000_0002, 0).unwrap()[..2], [0x2d36_3878, 0x762d_3436]);
            let xsave = (template == CpuTemplate::X86_64V3).then_some([7, 0, 576 + 64 * 2 + 64, 0]);
            assert_eq!(get(0xd, 0), xsave);
            for absent in [2, 4, 0x1f, 0x8000_0006, 0x8000_0007, 0x8000_001d, 0x8000_0026] {
                assert_eq!(get(absent, 0), None, "{absent:#x}");
            }
        }
    }

    /// Whichever of its CPUs asks: of a host whose CPUs differ, snapshots would fit some of the time.
    #[test]
    fn the_signature_is_the_hosts_and_not_a_cpus() {
        let Ok(kvm) = Kvm::new() else {
            eprintln!("skipped: no /dev/kvm");
            return;
        };
        let all = rustix::thread::sched_getaffinity(None).unwrap();
        let mut first = None;
        for cpu in (0..rustix::thread::CpuSet::MAX_CPU).filter(|cpu| all.is_set(*cpu)) {
            let mut one = rustix::thread::CpuSet::new();
            one.set(cpu);
            rustix::thread::sched_setaffinity(None, &one).unwrap();
            let found = Signature::of_host(&kvm, CpuTemplate::Host).unwrap();
            let first = first.get_or_insert_with(|| found.clone());
            assert_eq!(first.difference(&found), None, "CPU {cpu}");
        }
        let count = |leaves: &[Leaf]| -> u32 {
            leaves.iter().flat_map(|leaf| leaf.registers).map(u32::count_ones).sum()
        };
        let offered = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        let offered: Vec<Leaf> = offered.as_slice().iter().map(Leaf::from).collect();
        let leaves = first.unwrap().leaves;
        eprintln!(
            "KVM offers {} leaves with {} bits, guests see {} with {}",
            offered.len(),
            count(&offered),
            leaves.len(),
            count(&leaves)
        );
    }
}
