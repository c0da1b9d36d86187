//! Where a guest stands, in words for an error message: what one asks first of a guest that should have
//! answered and did not.

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, kvm_irqchip, kvm_lapic_state};
use kvm_ioctls::{VcpuFd, VmFd};

use super::vcpu_state;

/// Offsets of the LAPIC's registers: interrupts in service, and requested.
const IN_SERVICE: usize = 0x100;
const REQUESTED: usize = 0x200;

/// An entry of the IOAPIC's redirection table (82093AA, §3.2.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Redirection(u64);

impl Redirection {
    /// The entry of a pin.
    ///
    /// # Errors
    /// KVM's.
    pub fn of(vm: &VmFd, pin: u32) -> Result<Self, kvm_ioctls::Error> {
        let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
        vm.get_irqchip(&mut chip)?;
        // SAFETY: KVM has filled in this member of the union, as `chip_id` asks, and all its fields are
        // plain integers.
        let entries = unsafe { &chip.chip.ioapic.redirtbl };
        // SAFETY: each entry is a union of one integer and its bit fields: any bits are valid.
        Ok(Self(entries.get(pin as usize).map_or(0, |entry| unsafe { entry.bits })))
    }

    /// Whether the vCPU with this id is a destination, as Linux numbers its CPUs: by APIC id in
    /// physical mode, by a bit each in logical (flat) mode.
    pub fn reaches(self, vcpu: u8) -> bool {
        let destination = (self.0 >> 56) as u8;
        match self.0 >> 11 & 1 {
            0 => destination == vcpu || destination == 0xff,
            _ => vcpu < 8 && destination >> vcpu & 1 != 0,
        }
    }
}

impl std::fmt::Display for Redirection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self(bits) = *self;
        let bit = |at: u32| bits >> at & 1;
        let mode = if bit(11) == 0 { "physical" } else { "logical" };
        let (vector, destination) = (bits & 0xff, bits >> 56);
        write!(
            f,
            "vector {vector:#x} to {mode} {destination:#x}, masked {}, remote IRR {}",
            bit(16),
            bit(14)
        )
    }
}

/// Registers, interrupt flag and LAPIC of a stopped vCPU, as far as they can be had.
pub fn vcpu(vcpu: &VcpuFd, id: u8) -> String {
    let registers = match vcpu.get_regs() {
        Ok(regs) => format!("RIP {:#x}, IF {}", regs.rip, regs.rflags >> 9 & 1),
        Err(error) => format!("registers: {error}"),
    };
    let halted = if vcpu_state::is_halted(vcpu) { "halted" } else { "not halted" };
    let lapic = match vcpu.get_lapic() {
        Ok(lapic) => format!(
            "LAPIC {}, IRR {:x?}, ISR {:x?}",
            if lapic.regs[0xf1] & 1 != 0 { "on" } else { "off" },
            vectors(&lapic, REQUESTED),
            vectors(&lapic, IN_SERVICE)
        ),
        Err(error) => format!("LAPIC: {error}"),
    };
    format!("vCPU {id}: {registers}, {halted}, {lapic}")
}

/// The vectors whose bits are set in eight registers of 32, 16 bytes apart.
fn vectors(lapic: &kvm_lapic_state, from: usize) -> Vec<usize> {
    let is_set = |vector: &usize| {
        let byte = lapic.regs[from + vector / 32 * 0x10 + vector % 32 / 8] as u8;
        byte >> (vector % 8) & 1 != 0
    };
    (0..256).filter(is_set).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_are_found_where_the_lapic_has_them() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[REQUESTED + 0x10 + 2] = 0x20;
        lapic.regs[IN_SERVICE + 0x70 + 3] = i8::MIN;
        assert_eq!(vectors(&lapic, REQUESTED), [0x35]);
        assert_eq!(vectors(&lapic, IN_SERVICE), [0xff]);
    }

    #[test]
    fn redirections_say_whom_they_reach() {
        let physical = Redirection(3 << 56 | 0x35);
        assert_eq!([2, 3].map(|id| physical.reaches(id)), [false, true]);
        let logical = Redirection(0b101 << 56 | 1 << 11 | 1 << 16 | 0x35);
        assert_eq!([0, 1, 2, 9].map(|id| logical.reaches(id)), [true, false, true, false]);
        let text = "vector 0x35 to logical 0x5, masked 1, remote IRR 0";
        assert_eq!(logical.to_string(), text);
    }
}
