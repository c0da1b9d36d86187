//! The state of a VM beyond its vCPUs: interrupt controllers and clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

/// Interrupt controllers and clock.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VmState {
    irqchips: [kvm_irqchip; 3],
    /// kvmclock in nanoseconds.
    clock_ns: u64,
}

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

impl VmState {
    /// Reads the state while all vCPUs are stopped.
    ///
    /// # Errors
    /// KVM's.
    pub fn save(vm: &VmFd) -> Result<Self, kvm_ioctls::Error> {
        let clock_ns = vm.get_clock()?.clock;
        let mut irqchips = [kvm_irqchip::default(); 3];
        for (chip, id) in irqchips.iter_mut().zip(CHIPS) {
            chip.chip_id = id;
            vm.get_irqchip(chip)?;
        }
        Ok(Self { irqchips, clock_ns })
    }

    /// Writes the state before any vCPU's and before any interrupt is raised.
    ///
    /// # Errors
    /// KVM's.
    pub fn restore(&self, vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
        // The chips' ids come from the snapshot: only the three that exist, each once.
        for (chip, id) in self.irqchips.iter().zip(CHIPS) {
            let mut chip = *chip;
            chip.chip_id = id;
            vm.set_irqchip(&chip)?;
        }
        self.restore_clock(vm)
    }

    /// Sets kvmclock alone.
    ///
    /// # Errors
    /// KVM's.
    pub fn restore_clock(&self, vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
        // No KVM_CLOCK_REALTIME: the guest's clock goes on from where it stopped; wall-clock time
        // is the guest init's to step.
        vm.set_clock(&kvm_clock_data { clock: self.clock_ns, ..Default::default() })
    }
}
