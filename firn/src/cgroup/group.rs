//! The control group of one VM.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use super::{hierarchy::Controller, throttle::Throttle};
use crate::dir::Dir;

/// Length of a CPU accounting period.
const PERIOD_US: u64 = 100_000;

/// How long a group may take to become empty after its processes were killed.
pub(super) const EMPTY_WITHIN: Duration = Duration::from_secs(10);

/// What a VM may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) memory_bytes: u64,
    pub(crate) pids: u64,
    /// Share of a busy disk; see [`io_weight`](crate::config::io_weight).
    pub(crate) io_weight: u64,
}

/// The control group of one VM. Dropping it removes it if it is empty.
#[derive(Debug, Default)]
pub(crate) struct Group {
    pub(super) name: String,
    /// Where it has a directory: those that all VMs' lie in.
    pub(super) parents: Vec<Arc<Dir>>,
    /// Its directory in version 2.
    pub(super) unified: Option<Dir>,
    /// `cgroup.procs` in each hierarchy of version 1.
    pub(super) procs: Vec<OwnedFd>,
    /// Files that take the memory limit, in the order in which they must be raised.
    memory: Vec<File>,
    cpu: Option<Cpu>,
    /// Quota that is in force; 0: none.
    quota_us: AtomicU64,
}

#[derive(Debug)]
enum Cpu {
    Unified { max: File, burst: Option<File> },
    Legacy { quota: File, burst: Option<File> },
}

impl Group {
    pub(super) fn open(
        &mut self,
        dir: &Dir,
        unified: bool,
        controller: Controller,
        limits: Limits,
        throttle: Option<&Throttle>,
    ) -> io::Result<()> {
        match (controller, unified) {
            (Controller::Memory, true) => {
                self.memory.push(dir.writable("memory.max")?);
                // Half a VMM is of no use. Old kernels don't have it; their OOM killer finds the
                // only process anyway.
                let _ = dir.write("memory.oom.group", "1");
            }
            (Controller::Memory, false) => {
                self.memory.push(dir.writable("memory.limit_in_bytes")?);
            }
            (Controller::Cpu, true) => {
                let burst = dir.writable("cpu.max.burst").ok();
                self.cpu = Some(Cpu::Unified { max: dir.writable("cpu.max")?, burst });
            }
            (Controller::Cpu, false) => {
                dir.writable("cpu.cfs_period_us")?
                    .write_all_at(PERIOD_US.to_string().as_bytes(), 0)?;
                let burst = dir.writable("cpu.cfs_burst_us").ok();
                let quota = dir.writable("cpu.cfs_quota_us")?;
                self.cpu = Some(Cpu::Legacy { quota, burst });
            }
            (Controller::Pids, _) => {
                dir.write("pids.max", &limits.pids.to_string())?;
            }
            (Controller::Io, unified) => {
                // Which of them the kernel has depends on its schedulers; none is no error.
                let (any, bfq) = match unified {
                    true => ("io.weight", "io.bfq.weight"),
                    false => ("blkio.weight", "blkio.bfq.weight"),
                };
                let _ = dir.write(any, &limits.io_weight.to_string());
                let _ = dir.write(bfq, &limits.io_weight.to_string());
                if let Some(throttle) = throttle {
                    throttle.apply(dir, unified)?;
                }
            }
        }
        Ok(())
    }

    /// The group of version 2, for a process to start in.
    pub(crate) fn unified(&self) -> Option<BorrowedFd<'_>> {
        self.unified.as_ref().map(AsFd::as_fd)
    }

    /// Descriptors of `cgroup.procs`, one a hierarchy of version 1, for the jailer.
    pub(crate) fn procs(&self) -> &[OwnedFd] {
        &self.procs
    }

    /// Sets the memory limit.
    pub(crate) fn set_memory(&self, bytes: u64) -> io::Result<()> {
        self.memory.iter().try_for_each(|file| file.write_all_at(bytes.to_string().as_bytes(), 0))
    }

    /// Limits CPU time to a share in proportion to `memory_mb`. What a period did not use may be
    /// used in the next, so that short bursts don't wait for a period to end.
    pub(crate) fn set_cpu(&self, memory_mb: u32) -> io::Result<()> {
        let quota = crate::config::cpu_quota_us(memory_mb, PERIOD_US);
        let (file, burst, line) = match &self.cpu {
            _ if self.quota_us.swap(quota, Ordering::Relaxed) == quota => return Ok(()),
            Some(Cpu::Unified { max, burst }) => (max, burst, format!("{quota} {PERIOD_US}")),
            Some(Cpu::Legacy { quota: file, burst }) => (file, burst, quota.to_string()),
            None => return Ok(()),
        };
        // A burst may not be above its quota, whichever is written first.
        set_burst(burst.as_ref(), 0);
        file.write_all_at(line.as_bytes(), 0)?;
        set_burst(burst.as_ref(), quota);
        Ok(())
    }

    /// Removes the group once its processes are gone; false if they would not go.
    pub(crate) async fn remove(&self) -> bool {
        let end = tokio::time::Instant::now() + EMPTY_WITHIN;
        let mut pause = Duration::from_millis(1);
        while !self.try_remove() {
            if tokio::time::Instant::now() > end {
                tracing::warn!(vm = self.name, "control groups can't be removed");
                return false;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
        true
    }

    fn try_remove(&self) -> bool {
        let remove = |parent: &Dir| match parent.remove_dir(&self.name) {
            Err(e) => e.kind() == io::ErrorKind::NotFound,
            Ok(()) => true,
        };
        self.parents.iter().filter(|parent| !remove(parent)).count() == 0
    }
}

/// Bursts are a refinement: where the kernel refuses, the quota alone holds.
fn set_burst(file: Option<&File>, burst: u64) {
    if let Some(file) = file
        && let Err(error) = file.write_all_at(burst.to_string().as_bytes(), 0)
    {
        tracing::debug!(%error, "no CPU bursts");
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.try_remove();
    }
}
