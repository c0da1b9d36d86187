//! The state of a VM beyond its vCPUs: interrupt controllers and clock.

use kvm_bindings::{
    KVM_CLOCK_HOST_TSC, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    kvm_clock_data, kvm_irqchip,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::tsc;
use crate::hold;

/// How far two readings of the host's TSC may lie apart for what was done between them to be one moment:
/// about a hundred microseconds.
const CLOSE: u64 = 250_000;

/// Attempts to do it in a moment. A thread that is throttled needs a second one; what never gets there is
/// an emulated CPU, which is slow each time.
const ATTEMPTS: u32 = 5;

/// Interrupt controllers and clock.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VmState {
    irqchips: [kvm_irqchip; 3],
    /// kvmclock in nanoseconds.
    clock_ns: u64,
}

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

impl VmState {
    /// Reads the state while all vCPUs are stopped, and the host's TSC at the moment of the clock.
    ///
    /// # Errors
    /// KVM's.
    pub fn save(vm: &VmFd) -> Result<(Self, u64), kvm_ioctls::Error> {
        let (clock, read_at) = in_a_moment(|_| vm.get_clock())?;
        let known = clock.flags & KVM_CLOCK_HOST_TSC != 0;
        let (clock_ns, host_tsc) = (clock.clock, if known { clock.host_tsc } else { read_at });
        let mut irqchips = [kvm_irqchip::default(); 3];
        for (chip, id) in irqchips.iter_mut().zip(CHIPS) {
            chip.chip_id = id;
            vm.get_irqchip(chip)?;
        }
        Ok((Self { irqchips, clock_ns }, host_tsc))
    }

    /// Writes the state before any vCPU's and before any interrupt is raised; as [`Self::restore_clock`].
    ///
    /// # Errors
    /// KVM's.
    pub fn restore(&self, vm: &VmFd, at: u64, tsc_khz: u32) -> Result<(), kvm_ioctls::Error> {
        // The chips' ids come from the snapshot: only the three that exist, each once.
        for (chip, id) in self.irqchips.iter().zip(CHIPS) {
            let mut chip = *chip;
            chip.chip_id = id;
            vm.set_irqchip(&chip)?;
        }
        self.restore_clock(vm, at, tsc_khz)
    }

    /// Sets kvmclock alone, as if it had gone on when the host's TSC, of `tsc_khz`, read `at`: from
    /// then on guest TSCs must go on, too.
    ///
    /// # Errors
    /// KVM's.
    pub fn restore_clock(&self, vm: &VmFd, at: u64, tsc_khz: u32) -> Result<(), kvm_ioctls::Error> {
        // No KVM_CLOCK_REALTIME: the guest's clock goes on from where it stopped; wall-clock time
        // is the guest init's to step.
        let ((), _) = in_a_moment(|now| {
            // Two CPUs may differ by little.
            let ticks = (now.wrapping_sub(at) as i64).max(0) as u128;
            let passed = (ticks * 1_000_000 / u128::from(tsc_khz.max(1))) as u64;
            let clock = self.clock_ns.saturating_add(passed);
            vm.set_clock(&kvm_clock_data { clock, ..Default::default() })
        })?;
        Ok(())
    }
}

/// Does something, which is told the host's TSC, until it has taken a moment: what it gave last, and the
/// host's TSC in its middle.
fn in_a_moment<T>(
    mut work: impl FnMut(u64) -> Result<T, kvm_ioctls::Error>,
) -> Result<(T, u64), kvm_ioctls::Error> {
    let mut attempt = 0;
    loop {
        let before = tsc::now();
        let done = work(before)?;
        hold::clock();
        let took = tsc::now().wrapping_sub(before);
        attempt += 1;
        if took <= CLOSE || attempt == ATTEMPTS {
            return Ok((done, before.wrapping_add(took / 2)));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kvm_ioctls::Kvm;

    use super::*;

    /// A thread that is stopped between clock and TSC tries again: guest clock and guest TSC go on as one.
    #[test]
    fn clock_and_tsc_are_of_one_moment() {
        let Ok(kvm) = Kvm::new() else {
            eprintln!("skipped: no /dev/kvm");
            return;
        };
        let vm = kvm.create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let khz = u64::from(vcpu.get_tsc_khz().unwrap());
        let now = |vm: &VmFd| in_a_moment(|_| vm.get_clock()).unwrap();
        for _ in 0..20 {
            hold::stop_once(Duration::from_millis(5));
            let (saved, saved_at) = VmState::save(&vm).unwrap();
            let (clock, at) = now(&vm);
            let passed = at.wrapping_sub(saved_at) as i64 * 1_000_000 / khz as i64;
            let skew = clock.clock as i64 - saved.clock_ns as i64 - passed;
            assert!(skew.abs() < 1_000_000, "saved {skew} ns apart");

            hold::stop_once(Duration::from_millis(5));
            // The clock is set a while after the moment from which it goes on.
            let moment = tsc::now();
            std::thread::sleep(Duration::from_millis(2));
            saved.restore(&vm, moment, khz as u32).unwrap();
            let (clock, at) = now(&vm);
            let passed = at.wrapping_sub(moment) as i64 * 1_000_000 / khz as i64;
            let skew = clock.clock as i64 - saved.clock_ns as i64 - passed;
            assert!(skew.abs() < 1_000_000, "restored {skew} ns apart");
        }
    }
}
