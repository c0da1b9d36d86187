//! Control groups of the microVMs: version 2, version 1 where the host still has it, or a mix.
//!
//! ```text
//!  <hierarchy>/firn/<host id>/<vm>
//! ```
//!
//! Where a group of version 2 was delegated to this process, it stands for the whole hierarchy.
//!
//! In version 2 a VMM starts in its group; in version 1 the jailer moves it there.
//!
//! All files of a VM's group that are written later are opened when the group is made; writing
//! them on the request path opens nothing.

mod error;
mod group;
mod hierarchy;
mod throttle;

use std::{fs, io, path::Path, sync::Arc, time::Duration};

pub(crate) use self::{
    error::CgroupError,
    group::{Group, Limits},
};
use self::{
    error::at,
    group::EMPTY_WITHIN,
    hierarchy::{ASIDE, Controller, Hierarchy},
    throttle::{Throttle, disk_of},
};
use crate::dir::Dir;

/// How often a directory is made that others may remove while it is empty.
const ATTEMPTS: usize = 100;

/// Of all hosts on a machine.
const FIRN: &str = "firn";

/// This host's part of every hierarchy.
#[derive(Debug)]
pub(crate) struct Cgroups {
    parts: Vec<Arc<Part>>,
    throttle: Option<Throttle>,
}

/// This host's part of one hierarchy.
#[derive(Debug)]
struct Part {
    unified: bool,
    controllers: Vec<Controller>,
    /// `firn` and what it lies in.
    firn: Dir,
    mount: Dir,
    dir: Arc<Dir>,
    host_id: String,
}

impl Cgroups {
    /// Finds the hierarchies and makes this host's part of each.
    pub(crate) fn open(host_id: &str) -> Result<Self, CgroupError> {
        let text = |path: &Path| fs::read_to_string(path).map_err(at(path));
        let mounts = text(Path::new("/proc/self/mountinfo"))?;
        let own = text(Path::new("/proc/self/cgroup"))?;
        let delegated = hierarchy::delegated(&mounts, &own, crate::launch::is_rootless());
        let hierarchies = hierarchy::find(&mounts, delegated.as_deref(), |mount| {
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
            group.parents.push(part.dir.clone());
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
        let (dir, host_id) = (Arc::new(dir), host_id.to_owned());
        Ok(Self { unified, controllers, firn, mount, dir, host_id })
    }

    fn kill_members(&self, name: &Path) {
        // All at once, and those that are being made, where the kernel has it (Linux 5.14).
        let kill = || self.dir.dir(name)?.write("cgroup.kill", "1");
        if self.unified && kill().is_ok() {
            return;
        }
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

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsFd};

    use super::{hierarchy::parse_mount, *};

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
