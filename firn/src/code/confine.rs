//! Runs a program of the system on a tree that a stranger has made, so that taking it over gains nothing.
//!
//! The jail is for programs that need no file. This one needs its libraries and its input, so it keeps the
//! root that we have, and may read next to nothing in it:
//!
//! - under Landlock, where the kernel has it: only the tree, and the system's programs and libraries, all for
//!   reading; what it writes is the descriptor that it was given;
//! - as root: a user and a group that nothing else has, in no other group, and with that no capability;
//! - no network, IPC objects or host name but new and empty ones; `no_new_privs`;
//! - limits on memory, CPU time, length of files, descriptors and processes, and on its time;
//! - no environment.
//!
//! Without root it stays the user that it is, and in that user's network unless user namespaces are allowed.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    path::Path,
    process::{Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, Scope,
};
use rustix::process::PidfdFlags;

/// Where programs and what they are linked with lie.
const SYSTEM: [&str; 6] = ["/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/ld.so.cache"];

/// First of the users that it runs as, in turns; VMMs' are below.
const FIRST_USER: u32 = 1_900_060_000;

/// How many of these there are: more than anyone runs at once.
const USERS: u32 = 1000;

/// Longest time. An emulated CPU makes the largest disk in a third of it.
const LIMIT: Duration = Duration::from_secs(300);

/// What it may use.
const LIMITS: [(libc::__rlimit_resource_t, u64); 5] = [
    (libc::RLIMIT_CORE, 0),
    (libc::RLIMIT_CPU, LIMIT.as_secs()),
    (libc::RLIMIT_AS, 2 << 30),
    // The largest tree, and as much again for names, inodes and padding.
    (libc::RLIMIT_FSIZE, 2 * super::MAX_UNZIPPED),
    (libc::RLIMIT_NOFILE, 64),
];

/// Processes and threads of a user that nothing else has.
const PROCESSES: u64 = 16;

/// Runs `program` in the directory `tree`, with `stdin` as the one file that it may write to.
///
/// # Errors
/// It can't be confined or started, or takes too long.
pub(super) fn run(
    program: &Path,
    arguments: &[&str],
    tree: &Path,
    stdin: File,
) -> io::Result<Output> {
    let domain = domain(program, tree)?;
    let user = next_user();
    let mut command = Command::new(program);
    command.args(arguments).current_dir(tree).env_clear().env("LC_ALL", "C");
    command.stdin(stdin).stdout(Stdio::null()).stderr(Stdio::piped());
    let raw = domain.as_ref().map(AsRawFd::as_raw_fd);
    // SAFETY: `enter` makes system calls only: it allocates nothing and takes no lock.
    unsafe { command.pre_exec(move || enter(raw, user)) };
    let mut child = command.spawn()?;
    let pid = rustix::process::Pid::from_child(&child);
    let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(error) => {
            child.kill()?;
            child.wait()?;
            return Err(error.into());
        }
    };
    let killer = std::thread::spawn(move || {
        let mut ended = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
        let limit = rustix::event::Timespec::try_from(LIMIT).ok();
        let in_time = rustix::event::poll(&mut ended, limit.as_ref()).is_ok_and(|count| count > 0);
        if !in_time {
            let _ = rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL);
        }
        in_time
    });
    let output = child.wait_with_output()?;
    match killer.join() {
        Ok(true) => Ok(output),
        _ => Err(io::Error::new(io::ErrorKind::TimedOut, format!("not done within {LIMIT:?}"))),
    }
}

/// Two that run at once have different users, or one could look into the other.
fn next_user() -> Option<u32> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let turn = NEXT.fetch_add(1, Ordering::Relaxed) % USERS;
    rustix::process::geteuid().is_root().then_some(FIRST_USER + turn)
}

/// What it may reach, as a ruleset; `None` where the kernel has no Landlock.
fn domain(program: &Path, tree: &Path) -> io::Result<Option<OwnedFd>> {
    const NEWEST: ABI = ABI::V6;
    let read = AccessFs::from_read(NEWEST);
    let make = || {
        let mut rules = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(NEWEST))?
            .handle_access(AccessNet::from_all(NEWEST))?
            .scope(Scope::from_all(NEWEST))?
            .create()?;
        let system = SYSTEM.into_iter().map(Path::new);
        for path in system.chain([program, tree]) {
            // What is not there needs no rule.
            let Ok(file) = PathFd::new(path) else { continue };
            let access = if path.is_dir() { read } else { read & AccessFs::from_file(NEWEST) };
            rules = rules.add_rule(PathBeneath::new(file, access))?;
        }
        Ok(rules.into())
    };
    make().map_err(|e: landlock::RulesetError| io::Error::other(e))
}

/// The child just before exec.
fn enter(domain: Option<RawFd>, user: Option<u32>) -> io::Result<()> {
    let check = |result: libc::c_long| match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    };
    let apart = libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    // SAFETY: system calls with numbers, and with pointers to values that live.
    unsafe {
        let limit = |resource, most| {
            let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
            check(libc::setrlimit(resource, &raw const limit).into())
        };
        for (resource, most) in LIMITS {
            let done = limit(resource, most);
            // Without root, what is lower already stays so.
            if user.is_some() {
                done?;
            }
        }
        match user {
            Some(id) => {
                limit(libc::RLIMIT_NPROC, PROCESSES)?;
                check(libc::unshare(apart).into())?;
                // As system calls: libc's functions speak to other threads, which are not here.
                check(libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()))?;
                check(libc::syscall(libc::SYS_setresgid, id, id, id))?;
                check(libc::syscall(libc::SYS_setresuid, id, id, id))?;
            }
            // More than nothing, where it is allowed.
            None => drop(check(libc::unshare(apart | libc::CLONE_NEWUSER).into())),
        }
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into())?;
        if let Some(domain) = domain {
            check(libc::syscall(libc::SYS_landlock_restrict_self, domain, 0))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    /// What `script` says about itself, and its exit code.
    fn confined(script: &str) -> (String, Option<i32>) {
        let tree = tempfile::tempdir().unwrap();
        fs::set_permissions(tree.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(tree.path().join("input"), "input").unwrap();
        let disk = crate::memfile::create("test").unwrap();
        let shell = Path::new("/bin/sh");
        let output = run(shell, &["-c", script], tree.path(), disk.try_clone().unwrap()).unwrap();
        let mut text = String::from_utf8_lossy(&output.stderr).into_owned();
        let mut file = File::from(crate::memfile::reopen(&disk).unwrap());
        io::Read::read_to_string(&mut file, &mut text).unwrap();
        (text, output.status.code())
    }

    #[test]
    fn it_reads_its_input_and_writes_its_output() {
        assert_eq!(confined("cat input > /proc/self/fd/0"), ("input".into(), Some(0)));
    }

    #[test]
    fn it_reads_and_writes_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let secret = dir.path().join("secret");
        fs::write(&secret, "theirs").unwrap();
        let secret = secret.display();
        let root = rustix::process::geteuid().is_root();
        let landlock = domain(Path::new("/bin/sh"), dir.path()).unwrap().is_some();
        if root || landlock {
            let (text, code) = confined(&format!("cat {secret} > /proc/self/fd/0"));
            assert!(code != Some(0) && text.contains("denied"), "{text}");
        }
        if landlock {
            // Everybody may read these.
            for file in ["/etc/passwd", "/proc/self/status"] {
                let (text, code) = confined(&format!("cat {file} > /proc/self/fd/0"));
                assert!(code != Some(0) && text.contains("denied"), "{file}: {text}");
            }
            let (text, code) = confined("echo x > /tmp/firn-confined");
            assert!(code != Some(0), "{text}");
        }
    }

    #[test]
    fn it_is_nobody_and_alone() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let (text, _) = confined("exec > /proc/self/fd/0; id -u; ulimit -f; ulimit -n; env");
        let mut lines = text.lines();
        let uid: u32 = lines.next().unwrap().parse().unwrap();
        assert!((FIRST_USER..FIRST_USER + USERS).contains(&uid), "{text}");
        let blocks = (2 * super::super::MAX_UNZIPPED / 512).to_string();
        assert_eq!([lines.next(), lines.next()], [Some(&blocks[..]), Some("64")], "{text}");
        let names: Vec<_> = lines.filter_map(|line| line.split('=').next()).collect();
        assert!(names.iter().all(|name| ["LC_ALL", "PWD", "OLDPWD", "SHLVL", "_"].contains(name)));
        let (text, code) = confined("kill -0 1 || exit 7");
        assert_eq!(code, Some(7), "{text}");
    }
}
