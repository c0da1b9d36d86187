//! What Firn needs of the machine beside KVM: a kernel, rights, programs, memory in large pages.

use std::path::Path;

use firn_pages::pagemap::Pagemap;

use super::{Finding, Severity, read};

/// Memory below which nothing but the smallest functions fits.
const LITTLE_MEMORY_MIB: u64 = 1024;

/// The oldest kernel that Firn has been run on.
const OLDEST_KERNEL: (u32, u32) = (6, 1);

/// Looks at everything.
pub fn examine() -> Vec<Finding> {
    let huge = |name: &str| read(&format!("/sys/kernel/mm/transparent_hugepage/{name}"));
    let mut findings = vec![
        user(rustix::process::geteuid().is_root(), super::cage::users_may_make_namespaces()),
        programs(std::env::var("PATH").unwrap_or_default().as_str()),
        memory(&read("/proc/meminfo")),
    ];
    let scans = Pagemap::open(std::process::id()).is_ok_and(|pagemap| pagemap.scans());
    findings.extend(kernel(&read("/proc/sys/kernel/osrelease"), scans));
    findings.extend(shared_huge_pages(&huge("shmem_enabled")));
    findings.extend(private_huge_pages(&huge("enabled")));
    findings
}

fn user(root: bool, namespaces: bool) -> Finding {
    let id = "host.user";
    let why = "The jail gives every microVM its own user, namespaces and control group, which \
               takes root to set up; it then drops every right.";
    if root {
        return Finding::new(id, Severity::Ok, "you are root", why);
    }
    if namespaces {
        let what = "you are not root: microVMs get namespaces, but all of them your user, with its \
                    groups, and limits only in a control group that is delegated to you";
        return Finding::new(id, Severity::Warning, what, why)
            .fix("For functions of others: run the daemon as root.");
    }
    Finding::new(id, Severity::Error, "you are not root, and may not make user namespaces", why)
        .fix("Run this, and the daemon, with sudo.")
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

/// `release` is as `uname -r` prints it; `scans`: it says by one call which pages of a process are private
/// (PAGEMAP_SCAN).
fn kernel(release: &str, scans: bool) -> Option<Finding> {
    let release = release.trim();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else { return None };
    let id = "host.kernel";
    let what = format!("Linux {release}");
    Some(if (major, minor) < OLDEST_KERNEL {
        let why = "Firn has never been run on one so old, and old kernels close fewer leaks.";
        Finding::new(id, Severity::Warning, what, why).fix("Run Linux 6.1 or newer.")
    } else if !scans {
        let why = "With `--isolation per-invocation`, finding what an instance wrote takes an entry \
                   for each page that it has: 1.6 of 2.3 ms for 128 MiB in the dev host VM.";
        Finding::new(id, Severity::Note, what, why).fix("Run Linux 6.7 or newer (PAGEMAP_SCAN).")
    } else {
        Finding::new(id, Severity::Ok, what, "It has all that Firn uses.")
    })
}

fn shared_huge_pages(setting: &str) -> Option<Finding> {
    let chosen = chosen(setting)?;
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

fn private_huge_pages(setting: &str) -> Option<Finding> {
    let chosen = chosen(setting)?;
    let id = "host.huge-pages-private";
    let what = format!("huge pages for private memory: {chosen}");
    let why = "What a guest is known to write is copied into huge pages before it runs, and a boot \
               copies its kernel there.";
    Some(if ["always", "madvise"].contains(&chosen) {
        Finding::new(id, Severity::Ok, what, why)
    } else {
        Finding::new(id, Severity::Note, what, why)
            .fix("`echo madvise > /sys/kernel/mm/transparent_hugepage/enabled`, as root.")
    })
}

/// The choice in use, which stands in brackets.
fn chosen(setting: &str) -> Option<&str> {
    setting.split('[').nth(1)?.split(']').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_as_the_kernel_writes_them() {
        let advise = shared_huge_pages("always within_size [advise] never deny force\n").unwrap();
        assert_eq!(advise.severity, Severity::Ok);
        let never = shared_huge_pages("always within_size advise [never] deny force\n").unwrap();
        assert_eq!(never.severity, Severity::Note);
        assert_eq!(shared_huge_pages(""), None);
        let private = |text| private_huge_pages(text).map(|finding| finding.severity);
        assert_eq!(private("always [madvise] never\n"), Some(Severity::Ok));
        assert_eq!(private("always madvise [never]\n"), Some(Severity::Note));
        assert_eq!(private(""), None);
        assert_eq!(memory("MemTotal: 9 kB\nMemAvailable:  4194304 kB\n").severity, Severity::Ok);
        assert_eq!(memory("MemAvailable: 1024 kB\n").severity, Severity::Warning);
    }

    #[test]
    fn old_kernels_are_told_from_new_ones() {
        let severity = |release| kernel(release, true).map(|finding| finding.severity);
        assert_eq!(severity("5.15.0-100-generic\n"), Some(Severity::Warning));
        assert_eq!(kernel("6.1.0-18-cloud-amd64", false).unwrap().severity, Severity::Note);
        assert_eq!(severity("6.12.3+deb"), Some(Severity::Ok));
        assert_eq!(severity("7.0-rc1"), Some(Severity::Ok));
        assert_eq!(severity("10.0"), Some(Severity::Ok));
        assert_eq!(severity(""), None);
        assert_eq!(severity("unheard of"), None);
    }
}
