//! Whether the host has memory for one more instance.
//!
//! Guest memory is mapped privately and filled as it is touched, so its size says little about
//! what an instance costs. What counts is what the kernel says is available now, less a first
//! share for every instance that was admitted since it was last asked. Reading `/proc/meminfo`
//! takes longer than a thaw should wait: housekeeping does it, not requests.

use std::{
    fs,
    sync::atomic::{AtomicI64, Ordering},
};

/// Most MiB that an instance is expected to touch before the next look at the host.
const FIRST_SHARE_MIB: u32 = 64;

/// Keeps count of the host's memory.
#[derive(Debug)]
pub struct Admission {
    reserve_mib: i64,
    headroom_mib: AtomicI64,
}

impl Admission {
    /// Leaves `reserve_mib` of the host's memory alone.
    pub fn new(reserve_mib: u64) -> Self {
        let reserve_mib = i64::try_from(reserve_mib).unwrap_or(i64::MAX);
        let admission = Self { reserve_mib, headroom_mib: AtomicI64::new(0) };
        admission.refresh();
        admission
    }

    /// Asks the kernel.
    pub fn refresh(&self) {
        // A host that does not say is taken to have enough: its own limits will tell.
        let available = available_mib().unwrap_or(i64::MAX / 2);
        self.headroom_mib.store(available.saturating_sub(self.reserve_mib), Ordering::Relaxed);
    }

    /// Admits an instance with `memory_mib` of guest memory, if there is room.
    pub fn admit(&self, memory_mib: u32) -> bool {
        let share = i64::from(memory_mib.min(FIRST_SHARE_MIB));
        let take = |headroom: i64| (headroom >= share).then_some(headroom - share);
        self.headroom_mib.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }
}

fn available_mib() -> Option<i64> {
    parse(&fs::read_to_string("/proc/meminfo").ok()?)
}

fn parse(meminfo: &str) -> Option<i64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<i64>().ok().map(|kib| kib / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read() {
        assert_eq!(parse("MemTotal:  9 kB\nMemAvailable:   204800 kB\n"), Some(200));
        assert_eq!(parse("MemTotal: 9 kB\n"), None);
    }

    #[test]
    fn room_runs_out_and_comes_back() {
        let admission = Admission::new(0);
        admission.headroom_mib.store(150, Ordering::Relaxed);
        assert!(admission.admit(128) && admission.admit(10_240));
        assert!(!admission.admit(128));
        admission.refresh();
        assert!(admission.admit(128));
        assert!(!Admission::new(u64::MAX).admit(128));
    }
}
