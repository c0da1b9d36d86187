//! Time-stamp counters: the host's, and how KVM makes a guest's of it.

use serde::{Deserialize, Serialize};

/// Largest difference of TSC frequencies that is not scaled, in millionths: what NTP corrects without
/// stepping, and what KVM takes for the same (its parameter `tsc_tolerance_ppm`).
const TOLERANCE_PPM: u64 = 250;

/// Bits behind the point of the ratio: in VMX's TSC multiplier (SDM vol. 3, 26.6.5), and in SVM's TSC ratio
/// (AMD APM vol. 2, 15.30.5).
const INTEL: u32 = 48;
const AMD: u32 = 32;

/// Reads this CPU's time-stamp counter, in ticks.
pub fn now() -> u64 {
    // SAFETY: RDTSC exists on every x86_64 CPU and is permitted in user mode unless the process
    // asked otherwise (PR_SET_TSC), which Firn doesn't; it has no side effects.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// How often a guest's TSC ticks, and how KVM makes that of the host's: it multiplies by a ratio, then adds
/// an offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frequency {
    /// The guest's frequency in kHz.
    pub khz: u32,
    /// The ratio with its bits behind the point; `None`: one.
    ratio: Option<(u64, u32)>,
}

impl Frequency {
    /// A guest's that ticks as its host does.
    pub fn of_host(khz: u32) -> Self {
        Self { khz, ratio: None }
    }

    /// A guest's of `khz` on a host of `host_khz`.
    pub fn on_host(khz: u32, host_khz: u32) -> Self {
        let (guest, host) = (u64::from(khz), u64::from(host_khz));
        if guest.abs_diff(host) * 1_000_000 <= host * TOLERANCE_PPM {
            return Self::of_host(khz);
        }
        let bits = if of_amd() { AMD } else { INTEL };
        let ratio = (u128::from(guest) << bits) / u128::from(host.max(1));
        Self { khz, ratio: Some((ratio as u64, bits)) }
    }

    /// Whether KVM multiplies.
    pub fn is_scaled(self) -> bool {
        self.ratio.is_some()
    }

    /// What the guest's TSC reads, but for its offset, when the host's reads `host`.
    pub fn scale(self, host: u64) -> u64 {
        match self.ratio {
            None => host,
            // The bits may be a snapshot's.
            Some((ratio, bits)) => {
                (u128::from(host) * u128::from(ratio)).checked_shr(bits).unwrap_or(0) as u64
            }
        }
    }
}

/// Whether this CPU is one of AMD's kind: it has SVM instead of VMX.
fn of_amd() -> bool {
    let vendor = core::arch::x86_64::__cpuid(0);
    [*b"Auth", *b"Hygo"].map(u32::from_le_bytes).contains(&vendor.ebx)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ntp_corrects_is_not_scaled() {
        for khz in [2_000_000, 2_000_500, 1_999_500] {
            let same = Frequency::on_host(khz, 2_000_000);
            assert_eq!((same.khz, same.is_scaled(), same.scale(77)), (khz, false, 77));
        }
        assert!(Frequency::on_host(2_000_501, 2_000_000).is_scaled());
        assert!(Frequency::on_host(1_999_499, 2_000_000).is_scaled());
    }

    /// After a year the host's TSC has 10^17 ticks: the ratio's own rounding is all that is lost.
    #[test]
    fn a_second_of_the_hosts_is_a_second_of_the_guests() {
        let (guest, host) = (2_400_001_u64, 3_000_000_u64);
        let frequency = Frequency::on_host(guest as u32, host as u32);
        let year = 365 * 86_400 * host * 1000;
        let second = frequency.scale(year + host * 1000) - frequency.scale(year);
        assert!(second.abs_diff(guest * 1000) <= 2, "{second}");
        assert_eq!(Frequency::on_host(1, 0).scale(1), 1, "a host that has none");
    }

    #[test]
    fn a_ratio_that_no_cpu_has_scales_to_something() {
        let odd = Frequency { khz: 1, ratio: Some((u64::MAX, u32::MAX)) };
        assert_eq!(odd.scale(u64::MAX), 0);
    }
}
