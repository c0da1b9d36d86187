//! A reading of the wall clock and the host's TSC together: a guest that is told both, and whose clocks go
//! on from there, knows what time it is however long it took until it first ran.

use std::time::{SystemTime, UNIX_EPOCH};

/// How often the two are read; the pair that was read fastest counts.
const TRIES: usize = 5;

/// A pair that took fewer ticks to read, about 2 µs, is not read again.
const CLOSE: u64 = 5_000;

/// One moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment {
    /// Nanoseconds since the epoch.
    pub(crate) wall_clock_ns: u64,
    /// The host's TSC in ticks.
    pub(crate) tsc: u64,
}

impl Moment {
    pub(crate) fn now() -> Self {
        let mut best = Self { wall_clock_ns: 0, tsc: 0 };
        let mut width = u64::MAX;
        for _ in 0..TRIES {
            let before = tsc();
            let wall_clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let took = tsc().wrapping_sub(before);
            if took < width {
                width = took;
                let wall_clock_ns = wall_clock.as_nanos() as u64;
                best = Self { wall_clock_ns, tsc: before.wrapping_add(took / 2) };
            }
            if width < CLOSE {
                break;
            }
        }
        best
    }
}

fn tsc() -> u64 {
    // SAFETY: RDTSC exists on every x86_64 CPU and touches nothing but registers; Linux lets user space
    // use it unless a process asked otherwise (PR_SET_TSC), which this one does not.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn both_clocks_are_read_together() {
        let (first, instant) = (Moment::now(), std::time::Instant::now());
        std::thread::sleep(Duration::from_millis(20));
        let (second, passed) = (Moment::now(), instant.elapsed());
        let wall = Duration::from_nanos(second.wall_clock_ns - first.wall_clock_ns);
        // Somebody may set the clock meanwhile, but hardly by this much.
        assert!(wall.abs_diff(passed) < Duration::from_millis(5), "{wall:?} {passed:?}");
        assert!(second.tsc > first.tsc);
    }
}
