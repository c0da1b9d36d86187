//! One leaf of CPUID.

use kvm_bindings::kvm_cpuid_entry2;
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

impl From<&kvm_cpuid_entry2> for Leaf {
    fn from(entry: &kvm_cpuid_entry2) -> Self {
        Self {
            function: entry.function,
            index: entry.index,
            flags: entry.flags,
            registers: [entry.eax, entry.ebx, entry.ecx, entry.edx],
        }
    }
}

impl From<Leaf> for kvm_cpuid_entry2 {
    fn from(leaf: Leaf) -> Self {
        let [eax, ebx, ecx, edx] = leaf.registers;
        Self {
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
}
