//! What a host is made with: directories, limits and the size classes of its microVMs.

use std::{fmt, ops::Range, path::PathBuf, str::FromStr, sync::Arc};

use firn_proto::control::CpuTemplate;

use crate::keys::KeyService;

/// How a [`Host`](crate::Host) runs.
#[derive(Debug, Clone)]
pub struct HostConfig {
    /// The installation: `bin/`, `kernel/`, `images/`.
    pub artifacts: PathBuf,
    /// The state directory; everything in its `run/` belongs to one life of one host.
    pub state: PathBuf,
    /// Shells that are kept ready for each class that is in use.
    pub shells: usize,
    /// Most huge pages of 2 MiB that each shell keeps zeroed for what a thaw copies. It keeps no
    /// more than one of the last 16 thaws of its class has needed.
    pub spare_pages: u16,
    /// A thaw copies a region of 2 MiB that clones write to whole, into a huge page, if that is
    /// known to save at least so many page faults for each 512 pages that it has to copy.
    pub dense_pages: u32,
    /// What CPU guests see: this host's, or what each host of a fleet has, so that a snapshot of one is
    /// thawed on another. Snapshots of another template are refused.
    pub cpu_template: CpuTemplate,
    /// Where the memory of resident snapshots lies on machines with several NUMA nodes.
    pub numa: Numa,
    /// Give every guest a serial console whose output is logged at debug level.
    pub serial: bool,
    /// Multiplies every time limit that this crate sets by itself (boot, thaw, requests to the
    /// VMM, the grace after a function's own timeout): 1 on real hardware, more on slow rigs.
    pub patience: u32,
    /// Enforce CPU time in proportion to a function's memory.
    pub cpu_limits: bool,
    /// Most bytes a second that each microVM may read from the disk of the state directory, and as many
    /// that it may write. `None`: any, in competition with others in proportion to memory.
    pub io_bytes_per_second: Option<u64>,
    /// Run although the host has no control groups to limit microVMs with. Never in production. Without
    /// root it is so in any case: there are those that somebody has delegated.
    pub allow_no_cgroups: bool,
    /// What authenticates snapshots, and encrypts them if that is asked for. `None`: a
    /// [`LocalKeyFile`](crate::keys::LocalKeyFile), `master.key` in the state directory, made if it is
    /// not there.
    pub keys: Option<Arc<dyn KeyService>>,
    /// Encrypt what snapshots write to disk, and take only such that are encrypted. Costs time when
    /// they are made and made resident, none when they are thawed.
    pub encrypt_snapshots: bool,
    /// Users that VMMs run as, one each; nothing else on the machine may use them. Without root all run
    /// as this process's user, which then must be dumpable (`PR_SET_DUMPABLE`). The default lies above
    /// what systemd hands out to containers (524,288 to 1,879,048,191).
    pub uids: Range<u32>,
}

/// Where memory lies that all clones of a snapshot read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Numa {
    /// On the node where the snapshot is made resident: for hosts that are kept to one node.
    #[default]
    Local,
    /// On all nodes in turns: clones on each of them read as fast as on any other.
    Interleave,
}

impl fmt::Display for Numa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Local => "local",
            Self::Interleave => "interleave",
        })
    }
}

impl FromStr for Numa {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let found = [Self::Local, Self::Interleave].into_iter().find(|p| p.to_string() == name);
        found.ok_or_else(|| format!("there is no policy {name:?}; there are local and interleave"))
    }
}

impl HostConfig {
    /// The defaults: no shells kept ready, no serial console, all limits enforced, a key file in the
    /// state directory, snapshots authenticated and not encrypted.
    pub fn new(artifacts: impl Into<PathBuf>, state: impl Into<PathBuf>) -> Self {
        Self {
            artifacts: artifacts.into(),
            state: state.into(),
            shells: 0,
            spare_pages: 24,
            dense_pages: 21,
            cpu_template: CpuTemplate::Host,
            numa: Numa::Local,
            serial: false,
            patience: 1,
            cpu_limits: true,
            io_bytes_per_second: None,
            allow_no_cgroups: false,
            keys: None,
            encrypt_snapshots: false,
            uids: 1_900_000_000..1_900_060_000,
        }
    }

    /// For instances that are reset after each event. Every private page has to be put back each
    /// time, written or not: thaws copy only pages that are known to be written, no whole regions.
    #[must_use]
    pub fn for_resets(self) -> Self {
        Self { spare_pages: 0, dense_pages: u32::MAX, ..self }
    }
}

/// Memory in MB that buys one whole vCPU, as in Lambda.
const MB_PER_VCPU: u32 = 1769;

/// Sizes of guest memory in MiB that shells are built for; a function's exact size is enforced in
/// the guest.
const MEMORY_CLASSES: [u32; 13] =
    [128, 256, 512, 1024, 2048, 3072, 4096, 5120, 6144, 7168, 8192, 9216, 10240];

/// What a shell is built for: all that must be known before the function is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ShellClass {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
}

impl ShellClass {
    /// The class for a function of `memory_mb` MB: the smallest that holds it. Sizes above the
    /// largest class get the largest.
    pub fn for_memory(memory_mb: u32) -> Self {
        let memory_mib = MEMORY_CLASSES
            .into_iter()
            .find(|&class| class >= memory_mb)
            .unwrap_or(MEMORY_CLASSES[MEMORY_CLASSES.len() - 1]);
        let vcpus = memory_mb.div_ceil(MB_PER_VCPU).clamp(1, 6) as u8;
        Self { vcpus, memory_mib }
    }

    /// Guest memory in bytes.
    pub fn memory_bytes(self) -> u64 {
        u64::from(self.memory_mib) << 20
    }
}

/// CPU time for a function of `memory_mb` MB, in microseconds of CPU per `period_us`.
pub(crate) fn cpu_quota_us(memory_mb: u32, period_us: u64) -> u64 {
    (u64::from(memory_mb) * period_us / u64::from(MB_PER_VCPU)).max(1000)
}

/// Weight of a microVM with `memory_mib` MiB at a busy disk: 100, the default of everything else on
/// the machine, for the memory of one vCPU, and from 1 to 1000, which all schedulers take.
pub(crate) fn io_weight(memory_mib: u32) -> u64 {
    (u64::from(memory_mib) * 100 / u64::from(MB_PER_VCPU)).clamp(1, 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_hold_what_is_asked() {
        let class = |mb| {
            let c = ShellClass::for_memory(mb);
            (c.vcpus, c.memory_mib)
        };
        assert_eq!(class(128), (1, 128));
        assert_eq!(class(129), (1, 256));
        assert_eq!(class(1769), (1, 2048));
        assert_eq!(class(1770), (2, 2048));
        assert_eq!(class(3008), (2, 3072));
        assert_eq!(class(10240), (6, 10240));
        assert_eq!(class(u32::MAX), (6, 10240));
    }

    #[test]
    fn cpu_is_in_proportion_to_memory() {
        assert_eq!(cpu_quota_us(1769, 100_000), 100_000);
        assert_eq!(cpu_quota_us(3538, 100_000), 200_000);
        let (small, large) = (cpu_quota_us(128, 100_000), cpu_quota_us(256, 100_000));
        assert!(large.abs_diff(2 * small) <= 1, "{small} {large}");
    }

    #[test]
    fn weights_are_in_proportion_to_memory_and_valid() {
        assert_eq!([1, 128, 1769, 10_240, u32::MAX].map(io_weight), [1, 7, 100, 578, 1000]);
    }
}
