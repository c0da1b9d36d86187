//! The same as an ordinary user.

use std::{
    fs,
    os::unix::{fs::MetadataExt, process::CommandExt},
    process::{Command, Stdio},
};

use crate::install::{PROGRAMS, program};

/// Nobody in particular.
const USER: u32 = 54_321;

/// What needs no control groups.
const TESTS: [&str; 7] = [
    "jail::a_stand",
    "jail::a_real",
    "jail::a_step",
    "jail::real",
    "life::",
    "resets::",
    "::base_",
];

pub async fn an_ordinary_user_can_do_it_too() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: this is an ordinary user already");
        return;
    }
    let limit = fs::read_to_string("/proc/sys/user/max_user_namespaces").unwrap_or_default();
    let debian = fs::read_to_string("/proc/sys/kernel/unprivileged_userns_clone");
    if limit.trim() == "0" || debian.is_ok_and(|setting| setting.trim() == "0") {
        println!("skipped: users may not make user namespaces here");
        return;
    }
    if let Ok(kvm) = fs::metadata("/dev/kvm")
        && kvm.mode() & 0o060 != 0o060
    {
        println!("skipped: the group that owns /dev/kvm may not use it here");
        return;
    }
    // This executable and the programs that it looks for, where that user can read them.
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    let this = dir.path().join("host");
    fs::copy(std::env::current_exe().unwrap(), &this).unwrap();
    for name in ["firn-vmm", "firn-jailer"] {
        fs::copy(program(name), dir.path().join(name)).unwrap();
    }
    std::os::unix::fs::chown(dir.path(), Some(USER), Some(USER)).unwrap();
    let group = fs::metadata("/dev/kvm").map_or(USER, |kvm| kvm.gid());
    let output = Command::new(this)
        .args(TESTS)
        .env("TMPDIR", dir.path())
        .env(PROGRAMS, dir.path())
        .stdin(Stdio::null())
        .uid(USER)
        .gid(group)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    let passed = text.lines().filter(|line| line.contains("... ok")).count();
    assert!(passed > 15, "{text}");
}
