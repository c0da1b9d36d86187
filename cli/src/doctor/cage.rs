//! What the kernel offers the jail, and to whom else it offers it.

use std::io;

use super::{Finding, Severity, read};

/// Looks at everything.
pub fn examine() -> Vec<Finding> {
    let sysctl = |name: &str| read(&format!("/proc/sys/{name}"));
    let mut findings = vec![seccomp(can_kill()), landlock(landlock_version())];
    findings.extend(user_namespaces(
        &sysctl("user/max_user_namespaces"),
        &sysctl("kernel/unprivileged_userns_clone"),
        &sysctl("kernel/apparmor_restrict_unprivileged_userns"),
    ));
    findings.extend(executable_memory(&sysctl("vm/memfd_noexec")));
    findings
}

/// `noexec` is 2 where the kernel makes no files in memory that can be executed; it is missing before Linux 6.3.
fn executable_memory(noexec: &str) -> Option<Finding> {
    let id = "host.memfd-noexec";
    let why = "Firn runs its VMM from a sealed file in memory. Where the kernel refuses one, it runs the \
               VMM from an unnamed temporary file.";
    match noexec.trim() {
        "" => None,
        "2" => {
            let what = "the kernel refuses executable files in memory (vm.memfd_noexec is 2)";
            Some(Finding::new(id, Severity::Note, what, why).fix(
                "Nothing has to be done; `sysctl vm.memfd_noexec=1`, as root, allows them to those who \
                 ask for them.",
            ))
        }
        _ => {
            let what =
                "the kernel makes executable files in memory for those who ask (vm.memfd_noexec)";
            Some(Finding::new(id, Severity::Ok, what, why))
        }
    }
}

/// Whether a filter may end a process.
fn can_kill() -> io::Result<()> {
    let action: u32 = libc::SECCOMP_RET_KILL_PROCESS;
    let query = libc::SECCOMP_GET_ACTION_AVAIL;
    // SAFETY: the call reads the one number that it is given and changes nothing.
    match unsafe { libc::syscall(libc::SYS_seccomp, query, 0, &raw const action) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn seccomp(available: io::Result<()>) -> Finding {
    let id = "host.seccomp";
    match available {
        Ok(()) => {
            let what = "system calls can be filtered (seccomp)";
            Finding::new(id, Severity::Ok, what, "Each thread of a VMM has a filter.")
        }
        Err(error) => {
            let what = format!("system calls can't be filtered (seccomp): {error}");
            let why = "Each thread of a VMM has a filter, and a VMM that can't install it ends.";
            Finding::new(id, Severity::Error, what, why)
                .fix("Run a kernel with CONFIG_SECCOMP_FILTER, 4.14 or newer.")
        }
    }
}

/// The version of Landlock's interface that the jail has rules for; older ones refuse less.
const LANDLOCK_USED: i64 = 6;

/// The newest version of Landlock's interface that this kernel has.
fn landlock_version() -> io::Result<i64> {
    const CREATE_RULESET_VERSION: u32 = 1;
    let none = std::ptr::null::<libc::c_void>();
    // SAFETY: with this flag the call takes no rules, makes no descriptor and returns a number.
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, none, 0_usize, CREATE_RULESET_VERSION)
    };
    if version < 0 { Err(io::Error::last_os_error()) } else { Ok(version) }
}

fn landlock(version: io::Result<i64>) -> Finding {
    let id = "host.landlock";
    let why = "The jail refuses a VMM files, TCP, signals and sockets of others by it: one more wall, \
               where another should fail.";
    let error = match version {
        Ok(version) if version < LANDLOCK_USED => {
            let what =
                format!("Landlock is there, version {version} of its interface: it knows less");
            return Finding::new(id, Severity::Note, what, why).fix(
                "Run Linux 6.12 or newer, whose version 6 knows signals and abstract sockets.",
            );
        }
        Ok(version) => {
            let what = format!("Landlock is there, version {version} of its interface");
            return Finding::new(id, Severity::Ok, what, why);
        }
        Err(error) => error,
    };
    let (what, fix) = match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => (
            "Landlock is switched off".to_owned(),
            "Boot with `landlock` among the names in `lsm=` (`cat /sys/kernel/security/lsm`).",
        ),
        Some(libc::ENOSYS) => (
            "this kernel has no Landlock".to_owned(),
            "Run a kernel with CONFIG_SECURITY_LANDLOCK, 5.13 or newer.",
        ),
        _ => (
            format!("Landlock does not answer: {error}"),
            "Look whether something around this process filters its system calls.",
        ),
    };
    Finding::new(id, Severity::Note, what, why).fix(fix)
}

/// Whether this user may make user namespaces, as a daemon that is not root must, by making one.
pub fn users_may_make_namespaces() -> bool {
    // In a process of its own: it can't be undone, and not be done by a process of several threads.
    let mut child = std::process::Command::new("/proc/self/exe");
    let unshare = || {
        // SAFETY: the new namespace is that of the process which is about to execute, and has one thread.
        let done = unsafe { libc::unshare(libc::CLONE_NEWUSER) };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // SAFETY: one system call, which allocates nothing.
    unsafe { std::os::unix::process::CommandExt::pre_exec(&mut child, unshare) };
    let quiet = std::process::Stdio::null;
    child.arg("--version").stdout(quiet()).stderr(quiet()).status().is_ok_and(|s| s.success())
}

/// Who may make user namespaces: `limit` is everybody's, `debian` and `apparmor` are the settings
/// of kernels that have them.
fn user_namespaces(limit: &str, debian: &str, apparmor: &str) -> Option<Finding> {
    let id = "host.user-namespaces";
    let why = "In one, a user without rights reaches much of the kernel that is root's otherwise. A \
               VMM can't make one; other services of this machine can.";
    let ok = |what| Some(Finding::new(id, Severity::Ok, what, why));
    match (limit.trim(), debian.trim(), apparmor.trim()) {
        ("", "", "") => None,
        ("0", ..) => ok("nobody makes user namespaces"),
        (_, "0", _) => ok("only root makes user namespaces"),
        (.., "1" | "2") => ok("AppArmor says who makes user namespaces"),
        (_, debian, _) => {
            let fix = if debian == "1" {
                "For hostile tenants: `sysctl kernel.unprivileged_userns_clone=0`, as root."
            } else {
                "For hostile tenants, if nothing here needs any: `sysctl \
                 user.max_user_namespaces=0`, as root."
            };
            let what = "every user may make user namespaces";
            Some(Finding::new(id, Severity::Note, what, why).fix(fix))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn executable_files_in_memory_are_refused_only_by_the_strictest_setting() {
        let severity = |text| executable_memory(text).map(|finding| finding.severity);
        assert_eq!(severity("0\n"), Some(Severity::Ok));
        assert_eq!(severity("1\n"), Some(Severity::Ok));
        assert_eq!(severity("2\n"), Some(Severity::Note));
        assert_eq!(severity(""), None);
    }

    fn error(number: i32) -> io::Error {
        io::Error::from_raw_os_error(number)
    }

    #[test]
    fn no_filters_no_functions() {
        assert_eq!(seccomp(Ok(())).severity, Severity::Ok);
        assert_eq!(seccomp(Err(error(libc::EINVAL))).severity, Severity::Error);
    }

    #[test]
    fn each_way_of_not_having_landlock_says_what_to_do() {
        let there = landlock(Ok(7));
        assert!(there.severity == Severity::Ok && there.what.contains("version 7"));
        let old = landlock(Ok(2));
        assert!(old.severity == Severity::Note && old.fix.unwrap().contains("6.12"));
        for (number, what, fix) in [
            (libc::ENOSYS, "no Landlock", "CONFIG_SECURITY_LANDLOCK"),
            (libc::EOPNOTSUPP, "switched off", "lsm="),
            (libc::EPERM, "does not answer", "filters"),
        ] {
            let finding = landlock(Err(error(number)));
            assert_eq!(finding.severity, Severity::Note);
            assert!(finding.what.contains(what) && finding.fix.unwrap().contains(fix), "{number}");
        }
    }

    #[test]
    fn the_strictest_setting_of_user_namespaces_counts() {
        let severity = |limit, debian, apparmor| {
            user_namespaces(limit, debian, apparmor).map(|finding| finding.severity)
        };
        assert_eq!(severity("96365\n", "", ""), Some(Severity::Note));
        assert_eq!(severity("96365\n", "1\n", ""), Some(Severity::Note));
        assert_eq!(severity("96365\n", "1\n", "0\n"), Some(Severity::Note));
        assert_eq!(severity("0\n", "1\n", ""), Some(Severity::Ok));
        assert_eq!(severity("96365\n", "0\n", ""), Some(Severity::Ok));
        assert_eq!(severity("96365\n", "1\n", "1\n"), Some(Severity::Ok));
        assert_eq!(severity("", "", ""), None);
        let debian = user_namespaces("9\n", "1\n", "").unwrap().fix.unwrap();
        assert!(debian.contains("unprivileged_userns_clone"), "{debian}");
    }

    #[test]
    fn this_kernel_answers() {
        assert!(can_kill().is_ok(), "{:?}", can_kill());
        if let Ok(version) = landlock_version() {
            assert!(version >= 1);
        }
    }
}
