//! Whether the host has memory and disk space for one more instance.
//!
//! Guest memory is mapped privately and filled as it is touched, so its size says little about
//! what an instance costs. What counts is what the kernel says is available now, less a first
//! share for every instance that is just starting. Reading `/proc/meminfo` takes longer than a
//! thaw should wait: housekeeping does it, and requests only where memory is short.
//!
//! Each instance's `/tmp` is bounded, their sum is not. While the file system of the state directory
//! has less than its reserve left, there are no new instances, and idle ones make way; those that are
//! busy can still write.

use std::{
    fs,
    path::PathBuf,
    sync::atomic::{AtomicBool, AtomicI64, Ordering::Relaxed},
};

/// Most MiB that an instance is expected to touch until it has served its first request.
const FIRST_SHARE_MIB: u32 = 64;

/// What instances leave alone.
#[derive(Debug, Clone)]
pub struct Reserve {
    /// Of the host's memory, in MiB.
    pub memory_mib: u64,
    /// Of the file system with this directory, in MiB.
    pub disk_mib: u64,
    /// The directory in which instances' files are.
    pub dir: PathBuf,
}

/// Keeps count of the host's memory and disk space.
#[derive(Debug)]
pub struct Admission {
    reserve: Reserve,
    disk_is_short: AtomicBool,
    /// What may still be given away before the kernel is asked again.
    headroom_mib: AtomicI64,
    /// Shares of instances that are starting: given away, but not yet seen by the kernel.
    starting_mib: AtomicI64,
}

/// An instance that is starting; dropped when it has served its first request.
#[derive(Debug)]
pub struct Admitted<'a> {
    admission: &'a Admission,
    share_mib: i64,
}

impl Drop for Admitted<'_> {
    fn drop(&mut self) {
        self.admission.starting_mib.fetch_sub(self.share_mib, Relaxed);
    }
}

impl Admission {
    /// Leaves the reserve alone.
    pub fn new(reserve: Reserve) -> Self {
        let admission = Self {
            reserve,
            disk_is_short: AtomicBool::new(false),
            headroom_mib: AtomicI64::new(0),
            starting_mib: AtomicI64::new(0),
        };
        admission.refresh();
        admission
    }

    /// Asks the kernel.
    pub fn refresh(&self) {
        // A host that does not say is taken to have enough: its own limits will tell.
        self.update(available_mib().unwrap_or(i64::MAX / 4));
        let short = rustix::fs::statvfs(&self.reserve.dir)
            .is_ok_and(|fs| (fs.f_bavail * fs.f_frsize) >> 20 < self.reserve.disk_mib);
        if short != self.disk_is_short.swap(short, Relaxed) {
            let dir = self.reserve.dir.display();
            match short {
                true => tracing::warn!(%dir, "disk space is short: no new instances"),
                false => tracing::info!(%dir, "there is disk space again"),
            }
        }
    }

    /// Whether idle instances should make way although nobody waits.
    pub fn disk_is_short(&self) -> bool {
        self.disk_is_short.load(Relaxed)
    }

    fn update(&self, available_mib: i64) {
        let reserve_mib = i64::try_from(self.reserve.memory_mib).unwrap_or(i64::MAX);
        let given = reserve_mib.saturating_add(self.starting_mib.load(Relaxed));
        self.headroom_mib.store(available_mib.saturating_sub(given), Relaxed);
    }

    /// Admits an instance with `memory_mib` of guest memory, if there is room.
    pub fn admit(&self, memory_mib: u32) -> Option<Admitted<'_>> {
        if self.disk_is_short() {
            return None;
        }
        let share_mib = i64::from(memory_mib.min(FIRST_SHARE_MIB));
        let take = |headroom: i64| (headroom >= share_mib).then_some(headroom - share_mib);
        self.headroom_mib.fetch_update(Relaxed, Relaxed, take).ok()?;
        self.starting_mib.fetch_add(share_mib, Relaxed);
        Some(Admitted { admission: self, share_mib })
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

    fn reserve(memory_mib: u64, disk_mib: u64) -> Reserve {
        Reserve { memory_mib, disk_mib, dir: std::env::temp_dir() }
    }

    #[test]
    fn nobody_is_admitted_to_a_full_disk() {
        let full = Admission::new(reserve(0, u64::MAX));
        assert!(full.disk_is_short() && full.admit(128).is_none());
        let free = Admission::new(reserve(0, 0));
        assert!(!free.disk_is_short() && free.admit(128).is_some());
    }

    #[test]
    fn room_runs_out_and_comes_back() {
        let admission = Admission::new(reserve(0, 0));
        admission.update(150);
        let (first, second) = (admission.admit(128), admission.admit(10_240));
        assert!(first.is_some() && second.is_some());
        assert!(admission.admit(128).is_none());
        admission.update(150);
        assert!(admission.admit(128).is_none(), "two are still starting");
        drop(first);
        admission.update(150);
        assert!(admission.admit(128).is_some());
        assert!(Admission::new(reserve(u64::MAX, 0)).admit(128).is_none());
    }
}
