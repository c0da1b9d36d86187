//! Control groups: which controllers are mounted where, and how quickly processes change groups.

use std::collections::BTreeSet;

use super::{Finding, Severity, read};

/// Controllers that the jail sets limits with.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// The controller of disks, without which microVMs run all the same, by its names in version 2 and 1.
const DISKS: [&str; 2] = ["io", "blkio"];

/// Looks at everything.
pub fn examine() -> Vec<Finding> {
    let mounts = Mounts::parse(&read("/proc/self/mountinfo"), read);
    let mut findings = vec![controllers(&mounts)];
    findings.push(disks(&mounts));
    if let Some(point) = mounts.unified.as_deref().filter(|_| !rustix::process::geteuid().is_root())
    {
        let group = own_group(&read("/proc/self/cgroup"), point);
        let control = format!("{group}/cgroup.subtree_control");
        let ours = rustix::fs::access(control.as_str(), rustix::fs::Access::WRITE_OK).is_ok();
        findings.push(delegated(ours, &read(&format!("{group}/cgroup.controllers"))));
    }
    findings.extend(moves(&mounts));
    findings
}

/// What of `/proc/self/mountinfo` matters.
#[derive(Debug, Default)]
struct Mounts {
    /// Controllers of version 1.
    one: BTreeSet<String>,
    /// Controllers of version 2.
    two: BTreeSet<String>,
    /// Whether either has the controller of disks.
    disks: bool,
    /// Where version 2 is mounted, if it is.
    unified: Option<String>,
    /// Whether some hierarchy has been told to favour moves. The option is one of the whole kernel,
    /// whichever hierarchy shows it.
    favours_moves: bool,
}

impl Mounts {
    /// `read` reads a file of a hierarchy.
    fn parse(mountinfo: &str, read: impl Fn(&str) -> String) -> Self {
        let mut mounts = Self::default();
        let disks =
            |names: &str, separator| names.split(separator).any(|name| DISKS.contains(&name));
        for line in mountinfo.lines() {
            // `… mount-point options… - type source super-options`
            let Some((mount, kind)) = line.split_once(" - ") else { continue };
            let point = mount.split(' ').nth(4).unwrap_or_default();
            let mut kind = kind.split(' ');
            let (kind, options) = (kind.next(), kind.nth(1).unwrap_or_default());
            match kind {
                Some("cgroup") => {
                    mounts.one.extend(wanted(options.split(',')));
                    mounts.disks |= disks(options, ',');
                }
                Some("cgroup2") => {
                    let controllers = read(&format!("{point}/cgroup.controllers"));
                    mounts.two.extend(wanted(controllers.split_whitespace()));
                    mounts.disks |= disks(controllers.trim_end(), ' ');
                    mounts.unified = Some(point.to_owned());
                }
                _ => continue,
            }
            mounts.favours_moves |= options.split(',').any(|option| option == "favordynmods");
        }
        mounts
    }
}

fn wanted<'a>(names: impl Iterator<Item = &'a str>) -> impl Iterator<Item = String> {
    names.filter(|name| CONTROLLERS.contains(name)).map(str::to_owned)
}

fn controllers(mounts: &Mounts) -> Finding {
    let id = "host.cgroups";
    let why = "Control groups hold a microVM to its memory and CPU.";
    let Mounts { one, two, .. } = mounts;
    let list = |set: &BTreeSet<String>| set.iter().cloned().collect::<Vec<_>>().join(", ");
    let missing: Vec<&str> = CONTROLLERS
        .into_iter()
        .filter(|name| !one.contains(*name) && !two.contains(*name))
        .collect();
    if !missing.is_empty() {
        let what = format!("no control group controller for {}", missing.join(", "));
        return Finding::new(id, Severity::Error, what, why)
            .fix("Mount cgroup v2: `mount -t cgroup2 none /sys/fs/cgroup`.");
    }
    if one.is_empty() {
        let what = format!("control groups v2 with {}", list(two));
        return Finding::new(id, Severity::Ok, what, why);
    }
    let what = match (&mounts.unified, two.is_empty()) {
        (None, _) => format!("control groups v1 with {}", list(one)),
        (Some(_), true) => format!("control groups v1 with {}, and an empty v2", list(one)),
        (Some(_), false) => {
            format!("control groups of both versions: v1 with {}, v2 with {}", list(one), list(two))
        }
    };
    Finding::new(id, Severity::Note, what, "Firn uses them; v2 alone is what new systems have.")
        .fix("Boot with `systemd.unified_cgroup_hierarchy=1`, or whatever your init wants for it.")
}

/// Whether microVMs share disks by weight, and can be held to a rate.
fn disks(mounts: &Mounts) -> Finding {
    let id = "host.cgroups-io";
    let why = "By it microVMs share a busy disk in proportion to their memory, where the disk's scheduler \
               knows weights (BFQ, or io.cost.qos), and `firnd --io-bytes-per-second` holds each to a rate.";
    if mounts.disks {
        return Finding::new(id, Severity::Ok, "a control group controller for disks", why);
    }
    let what = "no control group controller for disks: one microVM may keep a disk busy";
    Finding::new(id, Severity::Note, what, why).fix(
        "Run a kernel with CONFIG_BLK_CGROUP, and don't keep `io` from Firn's group (systemd: \
         `Delegate=yes`).",
    )
}

/// Directory of the group that this process is in.
fn own_group(lines: &str, point: &str) -> String {
    let own = lines.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default();
    format!("{point}{own}")
}

/// What a daemon that is not root can limit: `ours` says whether it may make groups below its own.
fn delegated(ours: bool, controllers: &str) -> Finding {
    let id = "host.cgroups-delegated";
    let why = "Without root, microVMs are limited only below a control group that is this user's.";
    let fix = "Start the daemon as a service of your user with `Delegate=memory cpu pids io`.";
    let names: BTreeSet<_> = wanted(controllers.split_whitespace()).collect();
    if !ours || names.is_empty() {
        let what = "no control group is delegated to you: microVMs would have no limits";
        return Finding::new(id, Severity::Warning, what, why).fix(fix);
    }
    let list = names.iter().cloned().collect::<Vec<_>>().join(", ");
    let what = format!("a control group is delegated to you, with {list}");
    if names.len() == CONTROLLERS.len() {
        return Finding::new(id, Severity::Ok, what, why);
    }
    Finding::new(id, Severity::Warning, what, why).fix(fix)
}

/// Whether moving a process into a group waits for every CPU.
fn moves(mounts: &Mounts) -> Option<Finding> {
    let id = "host.cgroups-moves";
    let why = "For each new VM, KVM moves a thread of its own between groups. In the dev host VM \
               KVM_CREATE_VM took 12 ms with that wait and 0.3 without.";
    if mounts.favours_moves {
        let what = "processes change control groups without waiting (favordynmods)";
        return Some(Finding::new(id, Severity::Ok, what, why));
    }
    if mounts.one.is_empty() && mounts.two.is_empty() {
        return None;
    }
    let fix = match &mounts.unified {
        Some(point) if mounts.one.is_empty() => {
            format!("`mount -o remount,favordynmods {point}`, as root (Linux 6.0 or newer).")
        }
        _ => "Boot with `cgroup_favordynmods=true`.".to_owned(),
    };
    let what = "processes that change control groups wait for every CPU (no favordynmods)";
    Some(Finding::new(id, Severity::Note, what, why).fix(fix))
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "30 25 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      31 25 0:27 / /sys/fs/cgroup/cpu rw shared:3 - cgroup cgroup rw,cpuacct,cpu\n\
                      32 25 0:28 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n";
    const V2: &str = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,favordynmods\n";

    fn v1() -> Mounts {
        Mounts::parse(V1, |_| String::new())
    }

    fn v2(controllers: &str) -> Mounts {
        Mounts::parse(V2, |path| {
            assert_eq!(path, "/sys/fs/cgroup/cgroup.controllers");
            controllers.into()
        })
    }

    #[test]
    fn control_groups_of_both_versions_are_found() {
        assert_eq!(controllers(&v1()).severity, Severity::Note);
        let two = controllers(&v2("cpuset cpu io memory pids\n"));
        assert_eq!(two.severity, Severity::Ok);
        assert!(two.what.contains("cpu, memory, pids"));
    }

    #[test]
    fn a_mix_is_called_one() {
        let hybrid = |controllers: &'static str| {
            let text = format!("{V1}{}", V2.replace("cgroup rw", "cgroup/unified rw"));
            super::controllers(&Mounts::parse(&text, |_| controllers.into()))
        };
        assert!(hybrid("").what.ends_with("and an empty v2"));
        assert!(hybrid("pids").what.contains("v2 with pids"));
        assert_eq!(hybrid("").severity, Severity::Note);
    }

    #[test]
    fn missing_controllers_are_named() {
        let finding = controllers(&v2("cpu pids"));
        assert_eq!(finding.severity, Severity::Error);
        assert!(finding.what.contains("memory") && !finding.what.contains("cpu"));
        assert_eq!(controllers(&Mounts::default()).severity, Severity::Error);
    }

    #[test]
    fn a_lack_of_the_controller_for_disks_is_noted_and_no_error() {
        assert_eq!(disks(&v2("cpu io memory pids\n")).severity, Severity::Ok);
        assert_eq!(disks(&v2("cpu memory io\n")).severity, Severity::Ok);
        let without = v2("cpu memory pids\n");
        assert_eq!(disks(&without).severity, Severity::Note);
        assert_eq!(controllers(&without).severity, Severity::Ok);
        assert_eq!(disks(&v1()).severity, Severity::Note);
        let line = format!("{V1}33 25 0:29 / /sys/fs/cgroup/blkio rw - cgroup cgroup rw,blkio\n");
        assert_eq!(disks(&Mounts::parse(&line, |_| String::new())).severity, Severity::Ok);
    }

    #[test]
    fn what_is_not_delegated_is_said() {
        assert_eq!(own_group("1:cpu:/x\n0::/user.slice/a\n", "/cg"), "/cg/user.slice/a");
        assert_eq!(delegated(true, "cpu io memory pids").severity, Severity::Ok);
        assert_eq!(delegated(true, "memory pids").severity, Severity::Warning);
        assert!(delegated(false, "cpu memory pids").what.contains("no limits"));
        assert!(delegated(true, "").what.contains("no limits"));
    }

    #[test]
    fn moves_are_favoured_or_how_to_do_that_is_said() {
        assert_eq!(moves(&v2("cpu memory pids")).unwrap().severity, Severity::Ok);
        let plain = Mounts::parse(&V2.replace(",favordynmods", ""), |_| "memory".into());
        let finding = moves(&plain).unwrap();
        assert!(finding.fix.unwrap().contains("remount,favordynmods /sys/fs/cgroup"));
        assert!(moves(&v1()).unwrap().fix.unwrap().contains("cgroup_favordynmods=true"));
        assert_eq!(moves(&Mounts::default()), None);
    }
}
