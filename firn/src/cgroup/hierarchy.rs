//! The mounted hierarchies, and which of them have the controllers that limit VMs.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::error::CgroupError;

/// Where this process steps aside to.
pub(super) const ASIDE: &str = "firn-host";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Controller {
    Memory,
    Cpu,
    Pids,
    Io,
}

impl Controller {
    pub(super) const ALL: [Self; 4] = [Self::Memory, Self::Cpu, Self::Pids, Self::Io];

    /// Its name in version 2.
    pub(super) fn name(self) -> &'static str {
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
pub(super) struct Hierarchy {
    pub(super) mount: PathBuf,
    pub(super) unified: bool,
    pub(super) controllers: Vec<Controller>,
}

/// The group of version 2, below its mount, that is Firn's to divide; `None`: all of the machine's.
///
/// Without privilege it is the one that this process was put in, if whoever started us has delegated it.
/// Under systemd a service has the group that it was put in, and no other may make groups elsewhere,
/// root or not: there `Delegate=yes` makes it the service's, which the group's attributes say.
/// ("Control Group APIs and Delegation", systemd.io.)
pub(super) fn delegated(mounts: &str, own_groups: &str, rootless: bool) -> Option<PathBuf> {
    let group = own_group(own_groups);
    if rootless {
        return Some(group);
    }
    let mount = mounts.lines().filter_map(parse_mount).find(|mount| mount.kind == "cgroup2")?;
    let path = mount.path.join(&group);
    let has = fs::read_to_string(path.join("cgroup.controllers")).unwrap_or_default();
    // Root's limits hold everywhere or are an error: part of them elsewhere would be neither.
    let all = [Controller::Memory, Controller::Cpu, Controller::Pids]
        .iter()
        .all(|controller| has.split_whitespace().any(|name| name == controller.name()));
    (all && is_delegated(&path)).then_some(group)
}

/// Whether systemd has marked a group as one that its members divide.
fn is_delegated(group: &Path) -> bool {
    ["trusted.delegate", "user.delegate"].iter().any(|name| {
        let mut value = [0; 1];
        rustix::fs::getxattr(group, *name, &mut value).is_ok_and(|length| &value[..length] == b"1")
    })
}

/// The group of version 2 that this process was put in, from the lines of `/proc/self/cgroup`.
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
pub(super) fn find(
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

pub(super) struct Mount<'a> {
    pub(super) path: PathBuf,
    pub(super) kind: &'a str,
    options: &'a str,
}

/// One line of `mountinfo`, if it is a cgroup mount: `id parent dev root PATH options… - KIND
/// source OPTIONS`.
pub(super) fn parse_mount(line: &str) -> Option<Mount<'_>> {
    let (head, tail) = line.split_once(" - ")?;
    let path = head.split(' ').nth(4)?;
    let mut tail = tail.split(' ');
    let kind = tail.next().filter(|kind| matches!(*kind, "cgroup" | "cgroup2"))?;
    let options = tail.nth(1)?;
    // Nobody mounts control groups on a path with blanks, which would be octal here.
    (!path.contains('\\')).then(|| Mount { path: PathBuf::from(path), kind, options })
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
    fn root_divides_what_is_delegated_to_it_and_else_the_machine() {
        let dir = tempfile::tempdir_in(".").unwrap();
        let mount = dir.path().canonicalize().unwrap();
        let mounts = format!("30 21 0:26 / {} rw - cgroup2 none rw", mount.display());
        let service = mount.join("system.slice/firnd.service");
        fs::create_dir_all(&service).unwrap();
        let own = "0::/system.slice/firnd.service/firn-host\n";
        let delegated = || delegated(&mounts, own, false);
        assert_eq!(delegated(), None, "no controllers, no mark");
        fs::write(service.join("cgroup.controllers"), "cpu io memory pids\n").unwrap();
        assert_eq!(delegated(), None, "a service that may not divide its group");
        let flags = rustix::fs::XattrFlags::empty();
        if let Err(error) = rustix::fs::setxattr(&service, "user.delegate", b"1", flags) {
            eprintln!("skipped: {error}");
            return;
        }
        assert_eq!(delegated().as_deref(), Some(Path::new("system.slice/firnd.service")));
        fs::write(service.join("cgroup.controllers"), "memory pids\n").unwrap();
        assert_eq!(delegated(), None, "CPU time would be unlimited");
        fs::write(service.join("cgroup.controllers"), "cpu memory pids\n").unwrap();
        rustix::fs::setxattr(&service, "user.delegate", b"0", flags).unwrap();
        assert_eq!(delegated(), None);
    }
}
