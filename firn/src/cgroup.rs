//! Control groups of the microVMs: version 2, version 1 where the host still has it, or a mix.
//!
//! ```text
//!  <hierarchy>/firn/<host id>/<vm>
//! ```
//!
//! In version 2 a VMM starts in its group; in version 1 the jailer moves it there.
//!
//! All files of a VM's group that are written later are opened when the group is made; writing
//! them on the request path opens nothing.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::dir::Dir;

/// Length of a CPU accounting period.
const PERIOD_US: u64 = 100_000;

/// How long a group may take to become empty after its processes were killed.
const EMPTY_WITHIN: Duration = Duration::from_secs(10);

/// How often a directory is made that others may remove while it is empty.
const ATTEMPTS: usize = 100;

/// Of all hosts on a machine.
const FIRN: &str = "firn";

/// Where this process steps aside to.
const ASIDE: &str = "firn-host";

/// Why there are no usable control groups.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CgroupError {
    #[error("no hierarchy has the controller {0} (is a cgroup file system mounted?)")]
    Missing(&'static str),
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::Io { path, source }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Controller {
    Memory,
    Cpu,
    Pids,
    Io,
}

impl Controller {
    const ALL: [Self; 4] = [Self::Memory, Self::Cpu, Self::Pids, Self::Io];

    /// Its name in version 2.
    fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Cpu => "cpu",
            Self::Pids => "pids",
            Self::Io => "io",
        }
    }
}

/// A mounted hierarchy and what we use it for.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    mount: PathBuf,
    unified: bool,
    controllers: Vec<Controller>,
}

/// What a VM may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) memory_bytes: u64,
    pub(crate) pids: u64,
    /// Share of a busy disk; see [`io_weight`](crate::config::io_weight).
    pub(crate) io_weight: u64,
}

/// This host's part of every hierarchy.
#[derive(Debug)]
pub(crate) struct Cgroups {
    parts: Vec<Arc<Part>>,
    throttle: Option<Throttle>,
}

/// Most bytes a second that each VM may read from a disk, and as many that it may write.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Throttle {
    /// Major and minor number.
    device: (u32, u32),
    bytes_per_second: u64,
}

impl Throttle {
    fn apply(&self, dir: &Dir, unified: bool) -> io::Result<()> {
        let Self { device: (major, minor), bytes_per_second: most } = self;
        if unified {
            return dir.write("io.max", &format!("{major}:{minor} rbps={most} wbps={most}"));
        }
        ["blkio.throttle.read_bps_device", "blkio.throttle.write_bps_device"]
            .iter()
            .try_for_each(|name| dir.write(name, &format!("{major}:{minor} {most}")))
    }
}

/// The disk that the file system of `dir` lies on; a partition's disk, because only whole disks have
/// limits.
fn disk_of(dir: &Dir) -> io::Result<(u32, u32)> {
    let device = rustix::fs::fstat(dir)?.st_dev;
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let entry = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}"))?;
    let disk = match entry.join("partition").exists() {
        true => entry.parent().unwrap_or(&entry),
        false => &entry,
    };
    let numbers = fs::read_to_string(disk.join("dev"))?;
    let numbers = numbers
        .trim()
        .split_once(':')
        .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    numbers.ok_or_else(|| io::Error::other("no device number"))
}

/// This host's part of one hierarchy.
#[derive(Debug)]
struct Part {
    unified: bool,
    controllers: Vec<Controller>,
    /// `firn` and what it lies in.
    firn: Dir,
    mount: Dir,
    dir: Dir,
    host_id: String,
}

impl Cgroups {
    /// Finds the hierarchies and makes this host's part of each.
    pub(crate) fn open(host_id: &str) -> Result<Self, CgroupError> {
        let text = |path: &Path| fs::read_to_string(path).map_err(at(path));
        let mounts = text(Path::new("/proc/self/mountinfo"))?;
        let delegated = match crate::launch::is_rootless() {
            true => Some(own_group(&text(Path::new("/proc/self/cgroup"))?)),
            false => None,
        };
        let hierarchies = find(&mounts, delegated.as_deref(), |mount| {
            fs::read_to_string(mount.join("cgroup.controllers")).unwrap_or_default()
        })?;
        Self::in_hierarchies(host_id, hierarchies)
    }

    fn in_hierarchies(host_id: &str, hierarchies: Vec<Hierarchy>) -> Result<Self, CgroupError> {
        let parts = hierarchies.into_iter().map(|hierarchy| {
            let mount = hierarchy.mount.clone();
            Part::make(hierarchy, host_id).map(Arc::new).map_err(at(&mount))
        });
        Ok(Self { parts: parts.collect::<Result<_, _>>()?, throttle: None })
    }

    /// From now on each VM reads at most so many bytes a second from the disk of `dir`, and writes as
    /// many.
    ///
    /// # Errors
    /// There is no such disk, or nothing that could hold VMs to it.
    pub(crate) fn throttle(&mut self, dir: &Dir, bytes_per_second: u64) -> io::Result<()> {
        if !self.parts.iter().any(|part| part.controllers.contains(&Controller::Io)) {
            return Err(io::Error::other(
                "there is no control group controller for input and output",
            ));
        }
        let device = disk_of(dir).map_err(|e| {
            let path = dir.path().display();
            io::Error::new(e.kind(), format!("{path} is on no disk that can be limited: {e}"))
        })?;
        self.throttle = Some(Throttle { device, bytes_per_second });
        // Tried at once: not every device takes limits.
        let probe = Limits { memory_bytes: 1 << 20, pids: 1, io_weight: 100 };
        self.create("vm-0", probe).map(drop)
    }

    /// Makes the group `name` with `limits`.
    pub(crate) fn create(&self, name: &str, limits: Limits) -> io::Result<Group> {
        let mut group = Group::default();
        name.clone_into(&mut group.name);
        for part in &self.parts {
            // Pushed before anything can fail, so that dropping the group removes it.
            group.parts.push(part.clone());
            let dir = part.dir.make(name, 0o755)?;
            for controller in &part.controllers {
                group.open(&dir, part.unified, *controller, limits, self.throttle.as_ref())?;
            }
            if part.unified {
                group.unified = Some(dir);
            } else {
                group.procs.push(dir.writable("cgroup.procs")?.into());
            }
        }
        group.set_memory(limits.memory_bytes)?;
        Ok(group)
    }

    /// Kills every process in groups of an earlier life and removes the groups. Returns how many
    /// groups there were.
    pub(crate) fn remove_leftovers(&self) -> Result<usize, CgroupError> {
        let mut count = 0;
        for part in &self.parts {
            for name in part.dir.dirs().map_err(at(part.dir.path()))? {
                count += 1;
                let end = std::time::Instant::now() + EMPTY_WITHIN;
                loop {
                    part.kill_members(&name);
                    match part.dir.remove_dir(&name) {
                        Ok(()) => break,
                        Err(e) if e.kind() == io::ErrorKind::NotFound => break,
                        Err(source) if std::time::Instant::now() > end => {
                            return Err(CgroupError::Io { path: name, source });
                        }
                        Err(_) => std::thread::sleep(Duration::from_millis(5)),
                    }
                }
            }
        }
        Ok(count)
    }

    /// Removes this host's (empty) part, and firn's if no other host uses it.
    pub(crate) fn remove(&self) {
        for part in &self.parts {
            if part.firn.remove_dir(&part.host_id).is_ok() {
                let _ = part.mount.remove_dir(FIRN);
            }
        }
    }
}

impl Part {
    fn make(hierarchy: Hierarchy, host_id: &str) -> io::Result<Self> {
        let Hierarchy { mount, unified, controllers } = hierarchy;
        let mount = Dir::open(&mount)?;
        let enable: Vec<_> = controllers.iter().map(|c| format!("+{}", c.name())).collect();
        let enable = |level: &Dir| match unified {
            true => let_children_have(level, &enable.join(" ")),
            false => Ok(()),
        };
        enable(&mount)?;
        let make = || {
            let firn = mount.ensure(FIRN, 0o755)?;
            enable(&firn)?;
            let dir = firn.ensure(host_id, 0o755)?;
            Ok((firn, dir))
        };
        let mut made = make();
        for _ in 0..ATTEMPTS {
            match &made {
                // The last host but this one has removed what was empty.
                Err(error) if is_gone(error) => made = make(),
                _ => break,
            }
        }
        let (firn, dir) = made?;
        enable(&dir)?;
        Ok(Self { unified, controllers, firn, mount, dir, host_id: host_id.to_owned() })
    }

    fn kill_members(&self, name: &Path) {
        let procs = self.dir.read(name.join("cgroup.procs")).unwrap_or_default();
        for pid in
            procs.lines().filter_map(|l| l.parse().ok()).filter_map(rustix::process::Pid::from_raw)
        {
            // The pid can't be someone else's for long enough to matter: it was a member a moment
            // ago, and members of our groups are VMMs only.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

/// Whether a directory was removed that is still open.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

/// Enables controllers for the groups in `level`.
fn let_children_have(level: &Dir, controllers: &str) -> io::Result<()> {
    const CONTROL: &str = "cgroup.subtree_control";
    match level.write(CONTROL, controllers) {
        // A group other than the true root can't have both processes and controllers for its
        // children. In a container the root that we see is such a group, with us in it: step aside.
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
            let leaf = level.ensure(ASIDE, 0o755)?;
            leaf.write("cgroup.procs", &std::process::id().to_string())?;
            level.write(CONTROL, controllers)
        }
        other => other,
    }
}

/// The group of version 2 that this process was put in, from the lines of `/proc/self/cgroup`: without
/// privilege only that can be ours, if whoever started us has delegated it (systemd: `Delegate=yes`).
fn own_group(lines: &str) -> PathBuf {
    let path = lines.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let path = Path::new(path);
    // A life before, or another host in this process, has stepped aside.
    match path.file_name() {
        Some(name) if name == ASIDE => path.parent().unwrap_or(path).to_owned(),
        _ => path.to_owned(),
    }
}

/// Finds a hierarchy for every controller in the lines of `mountinfo`; with `delegated`, whatever there
/// is below that group of version 2.
fn find(
    mountinfo: &str,
    delegated: Option<&Path>,
    unified_controllers: impl Fn(&Path) -> String,
) -> Result<Vec<Hierarchy>, CgroupError> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for controller in Controller::ALL {
        let legacy = if controller == Controller::Io { "blkio" } else { controller.name() };
        let mut mounts =
            mountinfo.lines().filter_map(parse_mount).filter(|mount| match mount.kind {
                "cgroup2" => {
                    unified_controllers(&mount.path.join(delegated.unwrap_or(Path::new(""))))
                        .split_whitespace()
                        .any(|name| name == controller.name())
                }
                _ => delegated.is_none() && mount.options.split(',').any(|option| option == legacy),
            });
        let Some(mut mount) = mounts.next() else {
            if delegated.is_none() && controller != Controller::Io {
                return Err(CgroupError::Missing(controller.name()));
            }
            let controller = controller.name();
            tracing::warn!(
                controller,
                "no such control group controller: microVMs have no limit of it"
            );
            continue;
        };
        if let Some(delegated) = delegated {
            mount.path.push(delegated);
        }
        match found.iter_mut().find(|h| h.mount == mount.path) {
            Some(hierarchy) => hierarchy.controllers.push(controller),
            None => found.push(Hierarchy {
                mount: mount.path,
                unified: mount.kind == "cgroup2",
                controllers: vec![controller],
            }),
        }
    }
    match found.is_empty() {
        true => Err(CgroupError::Missing(Controller::ALL[0].name())),
        false => Ok(found),
    }
}

struct Mount<'a> {
    path: PathBuf,
    kind: &'a str,
    options: &'a str,
}

/// One line of `mountinfo`, if it is a cgroup mount: `id parent dev root PATH options… - KIND
/// source OPTIONS`.
fn parse_mount(line: &str) -> Option<Mount<'_>> {
    let (head, tail) = line.split_once(" - ")?;
    let path = head.split(' ').nth(4)?;
    let mut tail = tail.split(' ');
    let kind = tail.next().filter(|kind| matches!(*kind, "cgroup" | "cgroup2"))?;
    let options = tail.nth(1)?;
    // Nobody mounts control groups on a path with blanks, which would be octal here.
    (!path.contains('\\')).then(|| Mount { path: PathBuf::from(path), kind, options })
}

/// The control group of one VM. Dropping it removes it if it is empty.
#[derive(Debug, Default)]
pub(crate) struct Group {
    name: String,
    parts: Vec<Arc<Part>>,
    /// Its directory in version 2.
    unified: Option<Dir>,
    /// `cgroup.procs` in each hierarchy of version 1.
    procs: Vec<OwnedFd>,
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
    fn open(
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
        let remove = |part: &Part| match part.dir.remove_dir(&self.name) {
            Err(e) => e.kind() == io::ErrorKind::NotFound,
            Ok(()) => true,
        };
        self.parts.iter().filter(|part| !remove(part)).count() == 0
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

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "\
25 21 0:22 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
26 25 0:23 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct
28 25 0:27 / /sys/fs/cgroup/blkio rw,relatime - cgroup cgroup rw,blkio
27 25 0:24 / /sys/fs/cgroup/memory rw,relatime shared:3 - cgroup cgroup rw,memory
28 25 0:25 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
29 25 0:26 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw";

    #[test]
    fn version_1_is_found_beside_an_empty_version_2() {
        let found = find(V1, None, |_| String::new()).unwrap();
        let mounts: Vec<_> = found.iter().map(|h| (h.mount.to_str().unwrap(), h.unified)).collect();
        assert_eq!(
            mounts,
            [
                ("/sys/fs/cgroup/memory", false),
                ("/sys/fs/cgroup/cpu", false),
                ("/sys/fs/cgroup/pids", false),
                ("/sys/fs/cgroup/blkio", false)
            ]
        );
    }

    #[test]
    fn version_2_has_one_hierarchy_for_all() {
        let line = "30 21 0:26 / /sys/fs/cgroup rw - cgroup2 none rw,favordynmods";
        let found = find(line, None, |_| "cpuset cpu io memory pids\n".into()).unwrap();
        assert_eq!(found.len(), 1);
        assert!(found[0].unified);
        assert_eq!(found[0].controllers, Controller::ALL);
        let found = find(line, None, |_| "cpu memory pids".into()).unwrap();
        assert_eq!(found[0].controllers, Controller::ALL[..3], "nothing ends without io");
    }

    #[test]
    fn what_is_missing_is_named() {
        let found = find("", None, |_| String::new()).unwrap_err();
        assert!(found.to_string().contains("controller memory"), "{found}");
        let found = find(V1.lines().nth(3).unwrap(), None, |_| String::new()).unwrap_err();
        assert!(found.to_string().contains("controller cpu"), "{found}");
    }

    #[test]
    fn without_privilege_only_a_delegated_group_is_used() {
        let line = "30 21 0:26 / /sys/fs/cgroup rw - cgroup2 none rw";
        let group = own_group("12:cpu:/x\n0::/user.slice/firn.service/firn-host\n");
        assert_eq!(group, Path::new("user.slice/firn.service"));
        assert_eq!(own_group("1:cpu:/x\n"), Path::new(""));
        let found = find(line, Some(&group), |path| {
            assert_eq!(path, Path::new("/sys/fs/cgroup/user.slice/firn.service"));
            "memory pids".into()
        });
        let found = found.unwrap();
        assert_eq!(found[0].controllers, [Controller::Memory, Controller::Pids]);
        assert_eq!(found[0].mount, Path::new("/sys/fs/cgroup/user.slice/firn.service"));
        assert!(find(V1, Some(Path::new("x")), |_| String::new()).is_err(), "version 1 has none");
    }

    #[test]
    fn hosts_come_and_go_beside_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let come_and_go = |id: &str| {
            for _ in 0..300 {
                let mount = dir.path().to_owned();
                let hierarchy = Hierarchy { mount, unified: false, controllers: Vec::new() };
                Cgroups::in_hierarchies(id, vec![hierarchy]).unwrap().remove();
            }
        };
        std::thread::scope(|scope| {
            for id in ["a", "b", "c"] {
                let come_and_go = &come_and_go;
                scope.spawn(move || come_and_go(id));
            }
        });
        assert!(fs::read_dir(dir.path()).unwrap().next().is_none(), "nothing is left");
    }

    /// Where the controllers are in version 1, version 2 is there all the same: what differs
    /// between them beyond limits is tested on it.
    #[tokio::test]
    async fn a_process_starts_in_its_group_of_version_2() {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mount = mounts.lines().filter_map(parse_mount).find(|m| m.kind == "cgroup2");
        let Some(mount) = mount.filter(|_| rustix::process::getuid().is_root()) else {
            eprintln!("skipped: needs root and version 2");
            return;
        };
        let hierarchy = Hierarchy { mount: mount.path, unified: true, controllers: Vec::new() };
        let id = format!("test2-{}", std::process::id());
        let cgroups = Cgroups::in_hierarchies(&id, vec![hierarchy]).unwrap();
        let group =
            cgroups.create("vm-1", Limits { memory_bytes: 1, pids: 1, io_weight: 100 }).unwrap();
        assert!(group.procs().is_empty(), "nothing to move it by");
        let sleep = File::open("/bin/sleep").unwrap();
        let arguments = [c"sleep".to_owned(), c"600".to_owned()];
        let null = File::open("/dev/null").unwrap();
        let sleeper =
            crate::launch::launch(sleep.as_fd(), &arguments, &[null.as_fd(); 3], group.unified())
                .unwrap();
        let dir = group.unified.as_ref().unwrap();
        assert_eq!(dir.read("cgroup.procs").unwrap().trim(), sleeper.pid.to_string());
        let reaper = std::thread::spawn(move || crate::process::wait(&sleeper.pidfd).unwrap());
        assert_eq!(cgroups.remove_leftovers().unwrap(), 1);
        assert_eq!(reaper.join().unwrap().signal, Some(libc::SIGKILL));
        assert!(group.remove().await);
        let part = cgroups.parts[0].dir.path().to_owned();
        cgroups.remove();
        assert!(!part.exists());
    }

    #[test]
    fn a_disk_is_throttled_and_nothing_else() {
        let id = format!("test3-{}", std::process::id());
        let root = rustix::process::getuid().is_root();
        let Some(mut cgroups) = Cgroups::open(&id).ok().filter(|_| root) else {
            eprintln!("skipped: needs root and control groups");
            return;
        };
        let error = cgroups.throttle(&Dir::open(Path::new("/proc")).unwrap(), 1 << 20).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("on no disk") || error.contains("no control group"), "{error}");
        let root = Dir::open(Path::new("/")).unwrap();
        match disk_of(&root).and_then(|disk| cgroups.throttle(&root, 1 << 20).map(|()| disk)) {
            Ok((major, minor)) => {
                let limits = Limits { memory_bytes: 64 << 20, pids: 9, io_weight: 250 };
                let group = cgroups.create("vm-1", limits).unwrap();
                let found: Vec<_> = ["io.max", "blkio.throttle.write_bps_device"]
                    .iter()
                    .flat_map(|name| cgroups.parts.iter().map(move |part| (part, name)))
                    .filter_map(|(part, name)| part.dir.dir("vm-1").ok()?.read(name).ok())
                    .collect();
                let disk = format!("{major}:{minor} ");
                let held = |text: &String| text.contains(&disk) && text.contains("1048576");
                assert!(found.iter().any(held), "{found:?}");
                drop(group);
            }
            Err(error) => eprintln!("not tested: {error}"),
        }
        cgroups.remove();
        assert!(cgroups.parts.iter().all(|part| !part.dir.path().exists()));
    }

    #[tokio::test]
    async fn a_group_is_made_limited_and_removed() {
        if !rustix::process::getuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let id = format!("test-{}", std::process::id());
        let cgroups = match Cgroups::open(&id) {
            Ok(cgroups) => cgroups,
            Err(error) => {
                eprintln!("skipped: {error}");
                return;
            }
        };
        let limits = Limits { memory_bytes: 64 << 20, pids: 9, io_weight: 250 };
        let group = cgroups.create("vm-1", limits).unwrap();
        group.set_cpu(128).unwrap();
        group.set_memory(96 << 20).unwrap();
        let dirs: Vec<_> = cgroups.parts.iter().map(|part| part.dir.path().join("vm-1")).collect();
        let read = |name: &str| dirs.iter().find_map(|d| fs::read_to_string(d.join(name)).ok());
        assert_eq!(read("pids.max").as_deref(), Some("9\n"));
        let memory = read("memory.max").or_else(|| read("memory.limit_in_bytes"));
        assert_eq!(memory.as_deref(), Some("100663296\n"));
        let cpu = read("cpu.max").or_else(|| read("cpu.cfs_quota_us")).unwrap();
        assert!(cpu.starts_with("7235"), "{cpu}");
        let io = ["io.weight", "io.bfq.weight", "blkio.bfq.weight", "blkio.weight"];
        match io.into_iter().find_map(read) {
            Some(weight) => assert!(weight.contains("250"), "{weight}"),
            None => eprintln!("not tested: this kernel has no weights of input and output"),
        }
        // Left behind by a life that was killed, with a process in it.
        let mut sleeper = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        for dir in &dirs {
            fs::write(dir.join("cgroup.procs"), sleeper.id().to_string()).unwrap();
        }
        // The zombie leaves its group when it is waited for or not, but be safe.
        let reaper = std::thread::spawn(move || sleeper.wait().unwrap());
        assert_eq!(cgroups.remove_leftovers().unwrap(), dirs.len());
        assert!(!reaper.join().unwrap().success());
        assert!(dirs.iter().all(|d| !d.exists()));
        assert!(group.remove().await);
        cgroups.remove();
        assert!(cgroups.parts.iter().all(|part| !part.dir.path().exists()));
    }
}
