//! The cage, seen from outside.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
};

use firn::{ShellError, StartError, control::ExitReason};

use crate::install::{CLASS, Install, eventually, proc, runs};

pub async fn a_stand_in_lives_in_a_whole_cage() {
    let install = Install::stand_in();
    check_cage(&install, &[0, 1, 2, 3, 4]).await;
}

pub async fn a_real_shell_lives_in_a_whole_cage() {
    let Some(install) = Install::real() else { return };
    // What it has beyond that it has made itself, from KVM and as events; no file.
    check_cage(&install, &[]).await;
}

/// With `exactly`, the process may have these descriptors and no other.
async fn check_cage(install: &Install, exactly: &[u32]) {
    let host = install.open().await;
    let shell = host.shell(CLASS).await.unwrap();
    let pid = shell.pid();
    let rootless = !rustix::process::geteuid().is_root();
    let user = if rootless { &["user"][..] } else { &[] };
    for namespace in ["mnt", "pid", "net", "ipc", "uts", "cgroup"].iter().chain(user) {
        let link = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(link(&pid.to_string()), link("self"), "{namespace}");
    }
    let status = proc(pid, "status");
    let field = |name: &str| {
        let line = status.lines().find(|l| l.starts_with(&format!("{name}:")));
        line.unwrap_or_else(|| panic!("no {name}")).split_whitespace().skip(1).collect::<Vec<_>>()
    };
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(set), ["0000000000000000"], "{set}");
    }
    assert_eq!(field("NoNewPrivs"), ["1"]);
    assert_eq!(field("NSpid").last(), Some(&"1"), "PID 1 of its namespace");
    let uid: u32 = field("Uid")[0].parse().unwrap();
    let map: Vec<_> = proc(pid, "uid_map").split_whitespace().map(str::to_owned).collect();
    if rootless {
        // The only user of its namespace. What of it is not dumpable belongs to the namespace's root,
        // who has no rights there any more.
        assert_eq!(map, ["0", &rustix::process::geteuid().as_raw().to_string(), "1"]);
        assert_eq!(proc(pid, "setgroups"), "deny\n");
    } else {
        assert_eq!(map, ["0", "0", "4294967295"]);
        assert!(field("Groups").is_empty());
        assert!(install.config().uids.contains(&uid));
        assert!(field("Uid").iter().chain(&field("Gid")).all(|id| *id == uid.to_string()));
        // Not dumpable: its files in /proc belong to root, not to its user.
        assert_eq!(fs::metadata(format!("/proc/{pid}/maps")).unwrap().uid(), 0);
    }
    assert_eq!(proc(pid, "environ"), "");
    assert_eq!(proc(pid, "cmdline"), "firn-vmm\0");
    let root: Vec<_> = fs::read_dir(format!("/proc/{pid}/root/")).unwrap().collect();
    assert!(root.is_empty(), "{root:?}");
    let mounts = proc(pid, "mounts");
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(mounts.starts_with("firn-jail / tmpfs ro,nosuid,nodev,noexec"), "{mounts}");
    let write = fs::write(format!("/proc/{pid}/root/x"), b"x");
    assert!(write.is_err(), "even root can't write there");

    let limits = proc(pid, "limits");
    let limit = |name: &str| limits.lines().find(|l| l.starts_with(name)).unwrap().to_owned();
    assert!(limit("Max core file size").contains(" 0 "), "{limits}");
    // The jail's limit, and what the VMM's plan of descriptors makes of it.
    let files = if exactly.is_empty() { " 86 " } else { " 128 " };
    assert!(limit("Max open files").contains(files), "{limits}");

    let fds: BTreeSet<u32> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap())
        .collect();
    let target = |fd| fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap();
    let target = |fd: u32| target(fd).to_str().unwrap().to_owned();
    if exactly.is_empty() {
        for fd in fds.iter().filter(|fd| **fd > 4) {
            assert!(target(*fd).starts_with("anon_inode:"), "{fd}: {}", target(*fd));
        }
    } else {
        assert_eq!(fds.into_iter().collect::<Vec<_>>(), exactly);
        assert_eq!(target(4), "/dev/kvm");
    }
    assert_eq!(target(0), "/dev/null");
    assert_eq!(target(1), "/dev/null");
    assert!(target(2).starts_with("pipe:"));
    assert!(target(3).starts_with("socket:"));

    // Without root there are only those that somebody has delegated.
    for controller in ["memory", "cpu", "pids"].iter().filter(|_| !rootless) {
        let groups = proc(pid, "cgroup");
        let line = groups.lines().find(|l| {
            let names = l.split(':').nth(1).unwrap();
            names.is_empty() || names.split(',').any(|name| name == *controller)
        });
        let own = groups.lines().any(|l| {
            let names = l.split(':').nth(1).unwrap();
            let ours = names.is_empty() || names.split(',').any(|name| name == *controller);
            ours && l.contains("/firn/") && l.ends_with("/vm-1")
        });
        assert!(own, "{controller}: {line:?} of {groups}");
    }

    drop(shell);
    eventually("the dropped shell is gone", || !runs(pid)).await;
    host.shutdown().await;
    install.assert_nothing_left();
}

pub async fn a_step_of_the_jailer_that_fails_is_named() {
    let install = Install::stand_in();
    let vmm = install.artifact("bin/firn-vmm");
    fs::remove_file(&vmm).unwrap();
    fs::write(&vmm, "no program").unwrap();
    fs::set_permissions(&vmm, fs::Permissions::from_mode(0o755)).unwrap();
    let host = install.open().await;
    match host.shell(CLASS).await {
        Err(ShellError::Died { exit }) => {
            assert_eq!(exit.code, Some(64));
            assert!(exit.detail.contains("can't execute the VMM"), "{exit}");
        }
        other => panic!("{other:?}"),
    }
    host.shutdown().await;
    install.assert_nothing_left();
}

pub async fn real_guests_end_with_their_reason() {
    let Some(install) = Install::real() else { return };
    let kernel = install.artifact("kernel/vmlinux");
    let boot = async || {
        let host = install.open().await;
        let image = host.image("test").unwrap();
        let error = host.boot(&image, CLASS).await.unwrap_err();
        host.shutdown().await;
        install.assert_nothing_left();
        error
    };
    // Not a kernel: refused by name.
    match boot().await {
        StartError::Refused { message, .. } => assert!(message.contains("kernel"), "{message}"),
        other => panic!("{other}"),
    }
    // mov $0xfe, %al; out %al, $0x64; hlt: the guest pulls its reset line.
    fs::write(&kernel, elf(&[0xb0, 0xfe, 0xe6, 0x64, 0xf4])).unwrap();
    match boot().await {
        StartError::Died { exit } => {
            assert_eq!(exit.reason, Some(ExitReason::GuestShutdown), "{exit}");
            assert_eq!(exit.code, Some(0));
        }
        other => panic!("{other}"),
    }
    // xor %eax, %eax; mov %rax, %cr3: no page tables any more.
    fs::write(&kernel, elf(&[0x31, 0xc0, 0x0f, 0x22, 0xd8, 0xf4])).unwrap();
    match boot().await {
        StartError::Died { exit } => {
            assert_eq!(exit.reason, Some(ExitReason::TripleFault), "{exit}");
            assert_eq!(exit.code, Some(ExitReason::TripleFault.code()));
        }
        other => panic!("{other}"),
    }
}

/// What a machine keeps of microVMs if nobody cleans up.
#[derive(Debug, PartialEq, Eq)]
struct Leftovers {
    /// Of this process.
    descriptors: usize,
    children: usize,
    /// Of the machine.
    mounts: usize,
    /// Of the host's book: what is not there any more has been cleaned up after.
    entries: usize,
}

impl Leftovers {
    fn count(install: &Install) -> Self {
        let entries = |path: &str| fs::read_dir(path).map_or(0, Iterator::count);
        let pid = std::process::id();
        let child = |stat: &String| {
            let after_name = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
            after_name.split(' ').nth(1) == Some(&pid.to_string())
        };
        let stats = fs::read_dir("/proc").unwrap().filter_map(|entry| {
            // Most of them are no processes, and some end meanwhile.
            fs::read_to_string(entry.ok()?.path().join("stat")).ok()
        });
        let children = stats.filter(child).count();
        let run = install.path("state/run/pids");
        Self {
            descriptors: entries("/proc/self/fd"),
            children,
            mounts: proc(pid, "mountinfo").lines().count(),
            entries: fs::read_dir(run).map_or(0, Iterator::count),
        }
    }
}

pub async fn a_thousand_crashes_leave_nothing() {
    let Some(install) = Install::real() else { return };
    let kernel = install.artifact("kernel/vmlinux");
    // Half of them by a triple fault in the guest, the others by a signal.
    fs::write(&kernel, elf(&[0x31, 0xc0, 0x0f, 0x22, 0xd8, 0xf4])).unwrap();
    let host = install.open().await;
    let image = host.image("test").unwrap();
    let one = async |number: u32| {
        if number.is_multiple_of(2) {
            let error = host.boot(&image, CLASS).await.unwrap_err();
            assert!(matches!(error, StartError::Died { .. }), "{error}");
        } else {
            let shell = host.shell(CLASS).await.unwrap();
            let pid = rustix::process::Pid::from_raw(shell.pid() as i32).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
            eventually("the crashed shell is gone", || !runs(shell.pid())).await;
        }
    };
    // The first one opens what the host keeps open, and has the pool filled.
    one(0).await;
    let pool = install.config().shells;
    let settled = |found: Leftovers| found.children == pool && found.entries == pool;
    eventually("the pool is full", || settled(Leftovers::count(&install))).await;
    let before = Leftovers::count(&install);
    for number in 0..firn_nightly::rounds(40, 1000) {
        one(number).await;
    }
    eventually("all is as before", || Leftovers::count(&install) == before).await;
    host.shutdown().await;
    install.assert_nothing_left();
}

/// A kernel of a few instructions: an ELF64 with one segment at 1 MiB.
fn elf(code: &[u8]) -> Vec<u8> {
    const ENTRY: u64 = 0x10_0000;
    const OFFSET: u64 = 0x1000;
    let mut bytes = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0];
    bytes.resize(16, 0);
    for half in [2u16, 62] {
        bytes.extend(half.to_le_bytes());
    }
    bytes.extend(1u32.to_le_bytes());
    // Entry, program headers right behind this header, no sections.
    for word in [ENTRY, 64, 0] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 64, 0, 0] {
        bytes.extend(half.to_le_bytes());
    }
    // PT_LOAD, read and execute.
    bytes.extend(1u32.to_le_bytes());
    bytes.extend(5u32.to_le_bytes());
    let length = code.len() as u64;
    for word in [OFFSET, ENTRY, ENTRY, length, length, 0x1000] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.resize(OFFSET as usize, 0);
    bytes.extend(code);
    bytes
}
