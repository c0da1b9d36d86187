//! The clock of every stamp, and how a guest's is brought onto it.
//!
//! A guest stamps with its TSC. KVM adds a fixed offset to the host's TSC to make the guest's, and
//! the VMM reports that offset; so a guest's reading, minus the offset, is a reading of the host's
//! TSC. Two [`Anchor`]s, each a reading of TSC and `CLOCK_MONOTONIC` together, one before the
//! operation and one after, make it nanoseconds by straight interpolation. Neither the TSC's
//! frequency nor the slewing of `CLOCK_MONOTONIC` matters then.
//!
//! The error is the width of the anchors (the time between two readings of the TSC around one of
//! the clock; the narrowest of a few is kept) plus what slewing bends between them. Where KVM does
//! not apply the offset (some software KVMs), stamps land outside of their operation and are
//! dropped: see [`Trip::stamp`](crate::subject::Trip::stamp).

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds of `CLOCK_MONOTONIC`.
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// The host's TSC and its clock at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Anchor {
    tsc: u64,
    ns: u64,
}

/// How often an anchor is tried.
const TRIES: usize = 5;

impl Anchor {
    /// Takes one now. `None` where there is no TSC.
    pub fn take() -> Option<Self> {
        (0..TRIES)
            .filter_map(|_| {
                let before = tsc()?;
                let ns = now_ns();
                let after = tsc()?;
                let width = after.wrapping_sub(before);
                Some((width, Self { tsc: before.wrapping_add(width / 2), ns }))
            })
            .min_by_key(|(width, _)| *width)
            .map(|(_, anchor)| anchor)
    }

    /// The offset of a guest whose TSC read `guest` at this moment. For monitors that don't tell it:
    /// what a message says that has just arrived is older by its way, so moments that are derived
    /// from this offset come out late by as much.
    pub fn offset_of(self, guest: u64) -> i64 {
        guest.wrapping_sub(self.tsc) as i64
    }
}

/// When the guest's TSC read `guest`, in nanoseconds of `CLOCK_MONOTONIC`; `offset` is the guest's
/// TSC minus the host's. `None` if the anchors are no interval.
pub fn from_guest(anchors: (Anchor, Anchor), offset: i64, guest: u64) -> Option<u64> {
    let (first, last) = anchors;
    let host = guest.wrapping_sub(offset as u64);
    // Signed, because the reading may lie a little outside of the anchors.
    let ticks = i128::from(last.tsc.wrapping_sub(first.tsc) as i64);
    let ns = i128::from(last.ns) - i128::from(first.ns);
    if ticks <= 0 || ns <= 0 {
        return None;
    }
    let since = i128::from(host.wrapping_sub(first.tsc) as i64);
    u64::try_from(i128::from(first.ns) + since * ns / ticks).ok()
}

#[cfg(target_arch = "x86_64")]
fn tsc() -> Option<u64> {
    // SAFETY: every x86_64 CPU has the instruction, and Linux lets user space use it unless a
    // process asked otherwise (PR_SET_TSC), which this one does not. It touches no memory.
    Some(unsafe { core::arch::x86_64::_rdtsc() })
}

#[cfg(not(target_arch = "x86_64"))]
fn tsc() -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANCHORS: (Anchor, Anchor) =
        (Anchor { tsc: 10_000, ns: 5_000 }, Anchor { tsc: 30_000, ns: 15_000 });

    #[test]
    fn guest_readings_become_host_time() {
        // The guest's counter began at host TSC 8000.
        let offset = -8_000i64;
        assert_eq!(from_guest(ANCHORS, offset, 2_000), Some(5_000));
        assert_eq!(from_guest(ANCHORS, offset, 12_000), Some(10_000));
        assert_eq!(from_guest(ANCHORS, offset, 0), Some(4_000), "before the first anchor");
        // A guest counter ahead of the host's.
        assert_eq!(from_guest(ANCHORS, 7, 20_007), Some(10_000));
    }

    #[test]
    fn an_offset_from_a_message_that_has_just_arrived() {
        // The guest read 2000 when the host read 10,000 (5000 ns); 500 ticks earlier is 250 ns.
        let offset = ANCHORS.0.offset_of(2_000);
        assert_eq!(from_guest(ANCHORS, offset, 1_500), Some(4_750));
    }

    #[test]
    fn anchors_that_are_no_interval_say_nothing() {
        assert_eq!(from_guest((ANCHORS.0, ANCHORS.0), 0, 10_000), None);
        assert_eq!(from_guest((ANCHORS.1, ANCHORS.0), 0, 10_000), None);
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn our_own_tsc_lands_where_the_clock_says() {
        let first = Anchor::take().unwrap();
        let reading = tsc().unwrap();
        let at = now_ns();
        std::thread::sleep(std::time::Duration::from_millis(20));
        let last = Anchor::take().unwrap();
        let found = from_guest((first, last), 0, reading).unwrap();
        assert!(found.abs_diff(at) < 5_000_000, "{found} is not {at}");
    }
}
