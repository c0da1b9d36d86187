//! Makes the host VM look like a small server: mounts, modules, network, sparse files.
//!
//! cgroup v2 is mounted with `favordynmods` unless told otherwise (creating a VM costs 12 ms of RCU
//! waits without), shared-memory huge pages are given on advice.

use std::fs;
use std::io::{self, BufReader};
use std::path::Path;
use std::process::Command;

use firn_host_vm_agent::{EXTENTS_SUFFIX, MODULES_PATH, PLAIN_CGROUPS_PATH, SPARSE_PATH, expand};
use rustix::mount::{MountFlags, mount, mount_bind, mount_move};

/// Address of the host VM in QEMU's user network.
const ADDRESS: &str = "10.0.2.15/24";

/// Sets everything up; the error says at which step it failed.
pub fn run() -> io::Result<()> {
    step("root", leave_rootfs())?;
    step("mounts", mount_all())?;
    step("modules", load_modules())?;
    step("huge pages", advise_shared_huge_pages())?;
    step("network", bring_up_network())?;
    step("files", expand_sparse_files())
}

fn step(name: &str, result: io::Result<()>) -> io::Result<()> {
    result.map_err(|error| io::Error::new(error.kind(), format!("{name}: {error}")))
}

/// The initramfs is the kernel's own root, and `pivot_root` refuses to leave that one: the jailer
/// would fail here and work everywhere else. A bind mount of it, moved over it, is an ordinary root.
fn leave_rootfs() -> io::Result<()> {
    fs::create_dir_all("/root/new")?;
    mount_bind("/", "/root/new")?;
    std::env::set_current_dir("/root/new")?;
    mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    std::env::set_current_dir("/")
}

fn mount_all() -> io::Result<()> {
    let none = MountFlags::empty();
    let safe = MountFlags::NOSUID | MountFlags::NODEV;
    let cgroups = (!Path::new(PLAIN_CGROUPS_PATH).exists()).then_some(c"favordynmods");
    let table = [
        ("proc", "/proc", safe | MountFlags::NOEXEC, None),
        ("sysfs", "/sys", safe | MountFlags::NOEXEC, None),
        ("devtmpfs", "/dev", MountFlags::NOSUID, None),
        ("devpts", "/dev/pts", MountFlags::NOSUID | MountFlags::NOEXEC, Some(c"ptmxmode=0666")),
        ("tmpfs", "/dev/shm", safe, Some(c"mode=1777")),
        ("tmpfs", "/run", safe, Some(c"mode=0755")),
        ("tmpfs", "/tmp", safe, Some(c"mode=1777,size=75%")),
        ("cgroup2", "/sys/fs/cgroup", safe | MountFlags::NOEXEC, cgroups),
    ];
    for (kind, path, flags, data) in table {
        // Those inside sysfs exist already, and nothing can be created there.
        let _ = fs::create_dir_all(path);
        mount(kind, path, kind, flags | none, data)
            .map_err(|error| io::Error::other(format!("{kind} on {path}: {error}")))?;
    }
    Ok(())
}

fn load_modules() -> io::Result<()> {
    for path in lines(MODULES_PATH)? {
        let module = fs::File::open(&path)?;
        rustix::system::finit_module(&module, c"", 0)
            .map_err(|error| io::Error::other(format!("{path}: {error}")))?;
    }
    Ok(())
}

fn advise_shared_huge_pages() -> io::Result<()> {
    fs::write("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "advise")
}

fn bring_up_network() -> io::Result<()> {
    let ip = |arguments: &str| -> io::Result<()> {
        let status = Command::new("/bin/busybox").arg("ip").args(arguments.split(' ')).status()?;
        if status.success() { Ok(()) } else { Err(io::Error::other(format!("ip {arguments}"))) }
    };
    ip("link set lo up")?;
    if Path::new("/sys/class/net/eth0").exists() {
        ip(&format!("addr add {ADDRESS} dev eth0"))?;
        ip("link set eth0 up")?;
        ip("route add default via 10.0.2.2")?;
    }
    Ok(())
}

fn expand_sparse_files() -> io::Result<()> {
    for path in lines(SPARSE_PATH)? {
        let packed = format!("{path}{EXTENTS_SUFFIX}");
        let mut from = BufReader::with_capacity(1 << 20, fs::File::open(&packed)?);
        expand(&mut from, &mut fs::File::create(&path)?)?;
        fs::remove_file(&packed)?;
    }
    Ok(())
}

/// Lines of a list that may be missing.
fn lines(path: &str) -> io::Result<Vec<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(text.lines().map(str::to_owned).collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}
