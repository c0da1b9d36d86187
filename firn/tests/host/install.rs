//! An installation in a temporary directory, and how to look at what a host does to the machine.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    sync::Mutex,
    time::{Duration, Instant},
};

use firn::{Host, HostConfig, ShellClass};
use tempfile::TempDir;

/// The class of all tests.
pub const CLASS: ShellClass = ShellClass { vcpus: 1, memory_mib: 128 };

/// An installation with a state directory beside it.
pub struct Install {
    dir: TempDir,
}

impl Install {
    /// With the stand-in as VMM.
    pub fn stand_in() -> Self {
        Self::with(&std::env::current_exe().unwrap())
    }

    /// With the real VMM, if it has been built and there is a KVM.
    pub fn real() -> Option<Self> {
        if fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
            println!("skipped: no /dev/kvm");
            return None;
        }
        Some(Self::with(&program("firn-vmm")))
    }

    fn with(vmm: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("artifacts");
        for part in ["bin", "kernel", "images/test"] {
            fs::create_dir_all(path.join(part)).unwrap();
        }
        symlink(vmm, path.join("bin/firn-vmm")).unwrap();
        symlink(program("firn-jailer"), path.join("bin/firn-jailer")).unwrap();
        let init = path.join("bin/firn-init");
        fs::write(&init, b"init").unwrap();
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(path.join("kernel/vmlinux"), b"stand-in kernel").unwrap();
        fs::write(path.join("images/test/rootfs.erofs"), [1; 4096]).unwrap();
        fs::write(path.join("images/test/image.json"), r#"{"runtime":"test"}"#).unwrap();
        let tmp = fs::File::create(path.join("images/tmp.ext4")).unwrap();
        tmp.set_len(1 << 20).unwrap();
        Self { dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn artifact(&self, name: &str) -> PathBuf {
        self.path("artifacts").join(name)
    }

    pub fn config(&self) -> HostConfig {
        let mut config = HostConfig::new(self.path("artifacts"), self.path("state"));
        // What production refuses is not what is tested here.
        config.allow_no_cgroups = true;
        config
    }

    pub async fn open(&self) -> Host {
        Host::open(self.config()).await.unwrap()
    }

    /// Nothing of a host remains: no record, no control group.
    pub fn assert_nothing_left(&self) {
        let run = left(&self.path("state/run"));
        assert!(run.is_empty(), "the run directory is left: {run:?}");
        let groups: Vec<_> = groups(self).iter().flat_map(|group| left(group)).collect();
        assert!(groups.is_empty(), "control groups are left: {groups:?}");
    }
}

/// Where programs lie that need not be built.
pub const PROGRAMS: &str = "FIRN_PROGRAMS";

/// A program of this workspace as it is now.
pub fn program(name: &str) -> PathBuf {
    if let Some(dir) = std::env::var_os(PROGRAMS) {
        return Path::new(&dir).join(name);
    }
    static BUILT: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let deps = std::env::current_exe().unwrap();
    // What cargo builds for these tests does not include it: one of before may lie there.
    let mut built = BUILT.lock().unwrap();
    if built.insert(name.to_owned()) {
        let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
        let profile = if cfg!(debug_assertions) { "dev" } else { "release" };
        let mut build = std::process::Command::new(cargo);
        build.args(["build", "--quiet", "--package", name, "--profile", profile]);
        assert!(build.status().is_ok_and(|s| s.success()), "can't build {name}");
    }
    deps.parent().and_then(Path::parent).unwrap().join(name)
}

/// The directory `path`, if it is there, and those in it, each with what it holds: for a control group that
/// is its processes.
fn left(path: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(path) else { return Vec::new() };
    let paths: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    let own = match fs::read_to_string(path.join("cgroup.procs")) {
        Ok(processes) => format!("{} with processes {processes:?}", path.display()),
        Err(_) => format!("{} with {paths:?}", path.display()),
    };
    let below = paths.iter().filter(|path| path.is_dir()).flat_map(|path| left(path));
    std::iter::once(own).chain(below).collect()
}

/// Control groups of this installation's host.
fn groups(install: &Install) -> Vec<PathBuf> {
    let Ok(state) = fs::canonicalize(install.path("state")) else { return Vec::new() };
    let id = blake3::hash(state.as_os_str().as_encoded_bytes()).to_hex();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    mounts
        .lines()
        .filter(|line| line.contains(" - cgroup"))
        .map(|line| Path::new(line.split(' ').nth(4).unwrap()).join("firn").join(&id[..16]))
        .filter(|path| path.exists())
        .collect()
}

/// The file of `/proc` as text.
pub fn proc(pid: u32, name: &str) -> String {
    fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default()
}

/// Whether the process runs; zombies don't.
pub fn runs(pid: u32) -> bool {
    let stat = proc(pid, "stat");
    !stat.is_empty() && !stat.contains(") Z ")
}

/// Waits for something to become true.
pub async fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !is() {
        assert!(Instant::now() < end, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
