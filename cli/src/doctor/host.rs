//! What the machine beside KVM offers: control groups, rights, programs, memory, and what a host
//! of strangers' functions should have switched off.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::{Finding, Severity};

/// Controllers that the jail sets limits with.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// Memory below which nothing but the smallest functions fits.
const LITTLE_MEMORY_MIB: u64 = 1024;

/// Looks at everything.
pub fn examine() -> Vec<Finding> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let mut findings = vec![
        user(rustix::process::geteuid().is_root()),
        control_groups(&read("/proc/self/mountinfo"), |path| {
            fs::read_to_string(path).unwrap_or_default()
        }),
        programs(std::env::var("PATH").unwrap_or_default().as_str()),
        memory(&read("/proc/meminfo")),
    ];
    findings.extend(huge_pages(&read("/sys/kernel/mm/transparent_hugepage/shmem_enabled")));
    findings.extend(sharing(
        &read("/sys/devices/system/cpu/smt/active"),
        &read("/proc/swaps"),
        &read("/sys/kernel/mm/ksm/run"),
    ));
    findings
}

fn user(root: bool) -> Finding {
    let why = "The jail gives every microVM its own user, namespaces and control group, which \
               takes root to set up; it then drops every right.";
    if root {
        return Finding::new("host.user", Severity::Ok, "you are root", why);
    }
    Finding::new("host.user", Severity::Error, "you are not root", why)
        .fix("Run this, and the daemon, with sudo.")
}

/// Which controllers are mounted where; `read` reads a file of a hierarchy.
fn control_groups(mounts: &str, read: impl Fn(&str) -> String) -> Finding {
    let id = "host.cgroups";
    let why = "Control groups hold a microVM to its memory and CPU.";
    let mut one = BTreeSet::new();
    let mut two = BTreeSet::new();
    for line in mounts.lines() {
        // `… mount-point options… - type source super-options`
        let Some((mount, kind)) = line.split_once(" - ") else { continue };
        let point = mount.split(' ').nth(4).unwrap_or_default();
        let mut kind = kind.split(' ');
        match (kind.next(), kind.nth(1)) {
            (Some("cgroup"), Some(options)) => one.extend(wanted(options.split(','))),
            (Some("cgroup2"), _) => {
                let controllers = read(&format!("{point}/cgroup.controllers"));
                two.extend(wanted(controllers.split_whitespace()));
            }
            _ => {}
        }
    }
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
        let what = format!("control groups v2 with {}", list(&two));
        return Finding::new(id, Severity::Ok, what, why);
    }
    let what = format!("control groups v1 with {}", list(&one));
    Finding::new(id, Severity::Note, what, "Firn uses them; v2 is what new systems have.")
}

fn wanted<'a>(names: impl Iterator<Item = &'a str>) -> impl Iterator<Item = String> {
    names.filter(|name| CONTROLLERS.contains(name)).map(str::to_owned)
}

fn programs(path: &str) -> Finding {
    let id = "host.mkfs-erofs";
    let why = "A function's code becomes a read-only disk when it is uploaded.";
    let found = path.split(':').any(|directory| Path::new(directory).join("mkfs.erofs").exists());
    if found {
        return Finding::new(id, Severity::Ok, "mkfs.erofs is installed", why);
    }
    Finding::new(id, Severity::Error, "mkfs.erofs is not installed", why)
        .fix("Install it: `sudo apt-get install erofs-utils`.")
}

fn memory(meminfo: &str) -> Finding {
    let available = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
        .unwrap_or(0)
        / 1024;
    let id = "host.memory";
    let what = format!("{available} MiB of memory available");
    let why = "Each instance takes at most its function's memory size, snapshots what they hold.";
    if available >= LITTLE_MEMORY_MIB {
        return Finding::new(id, Severity::Ok, what, why);
    }
    Finding::new(id, Severity::Warning, what, why)
        .fix(format!("Free some: at least {LITTLE_MEMORY_MIB} MiB are advised."))
}

fn huge_pages(setting: &str) -> Option<Finding> {
    // The choice in use stands in brackets.
    let chosen = setting.split('[').nth(1)?.split(']').next()?;
    let id = "host.huge-pages";
    let what = format!("huge pages for shared memory: {chosen}");
    let why = "A snapshot that lies in huge pages is mapped into a guest with fewer page faults.";
    Some(if ["always", "within_size", "advise", "force"].contains(&chosen) {
        Finding::new(id, Severity::Ok, what, why)
    } else {
        Finding::new(id, Severity::Note, what, why)
            .fix("`echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled`, as root.")
    })
}

/// What lets one tenant's function learn about another's.
fn sharing(smt: &str, swaps: &str, ksm: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut note = |id, what: &str, why, fix: &str| {
        findings.push(Finding::new(id, Severity::Note, what, why).fix(fix));
    };
    if smt.trim() == "1" {
        note(
            "host.smt",
            "two hardware threads share a core",
            "Functions of strangers on one core can spy on each other through its caches.",
            "For hostile tenants: `echo off > /sys/devices/system/cpu/smt/control`, as root.",
        );
    }
    if swaps.lines().count() > 1 {
        note(
            "host.swap",
            "swap is on",
            "Guest memory, secrets included, may stay on a disk.",
            "For hostile tenants: `swapoff --all`, or an encrypted swap.",
        );
    }
    if ksm.trim() == "1" {
        note(
            "host.ksm",
            "the kernel merges equal pages (KSM)",
            "How long a write takes tells a guest what others have in memory.",
            "For hostile tenants: `echo 2 > /sys/kernel/mm/ksm/run`, as root.",
        );
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "30 25 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      31 25 0:27 / /sys/fs/cgroup/cpu rw shared:3 - cgroup cgroup rw,cpuacct,cpu\n\
                      32 25 0:28 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n";
    const V2: &str = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,favordynmods\n";

    #[test]
    fn control_groups_of_both_versions_are_found() {
        assert_eq!(control_groups(V1, |_| String::new()).severity, Severity::Note);
        let two = control_groups(V2, |path| {
            assert_eq!(path, "/sys/fs/cgroup/cgroup.controllers");
            "cpuset cpu io memory pids\n".into()
        });
        assert_eq!(two.severity, Severity::Ok);
        assert!(two.what.contains("cpu, memory, pids"));
    }

    #[test]
    fn missing_controllers_are_named() {
        let finding = control_groups(V2, |_| "cpu pids".into());
        assert_eq!(finding.severity, Severity::Error);
        assert!(finding.what.contains("memory") && !finding.what.contains("cpu"));
        assert_eq!(control_groups("", |_| String::new()).severity, Severity::Error);
    }

    #[test]
    fn settings_are_read_as_the_kernel_writes_them() {
        let advise = huge_pages("always within_size [advise] never deny force\n").unwrap();
        assert_eq!(advise.severity, Severity::Ok);
        let never = huge_pages("always within_size advise [never] deny force\n").unwrap();
        assert_eq!(never.severity, Severity::Note);
        assert_eq!(huge_pages(""), None);
        assert_eq!(memory("MemTotal: 9 kB\nMemAvailable:  4194304 kB\n").severity, Severity::Ok);
        assert_eq!(memory("MemAvailable: 1024 kB\n").severity, Severity::Warning);
        let ids: Vec<_> =
            sharing("1\n", "Filename\n/dev/x\n", "1\n").iter().map(|f| f.id).collect();
        assert_eq!(ids, ["host.smt", "host.swap", "host.ksm"]);
        assert!(sharing("0\n", "Filename\n", "0\n").is_empty());
    }
}
