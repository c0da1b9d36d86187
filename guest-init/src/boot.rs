//! From the kernel's first user instruction to a guest that can take a function: mounts, loopback,
//! the runtime's cgroup, the invoke connection.
//!
//! ```text
//! initramfs (/init)      image (EROFS, read-only)
//!   /dev  devtmpfs  ──▶    /dev  /proc  /sys  /sys/fs/cgroup
//!   /root ◀─ /dev/vda      /tmp       /dev/vdc, ext4: the only place that can be written
//!                          /var/task  /dev/vdb, EROFS: the code, when it comes
//!                          /opt       the same: its layers
//! ```

use std::{
    ffi::CStr,
    fs, io,
    os::{fd::OwnedFd, unix::fs::PermissionsExt},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use firn_proto::control::INVOKE_PORT;
use rustix::{
    fs::{Mode, OFlags, open},
    io::Errno,
    mount::{MountFlags, mount, mount_bind, mount_move},
    process::{chdir, chroot},
};

use crate::{
    cgroup::{Cgroup, CgroupError},
    place::Machine,
};

/// The disk of the function's code.
pub const CODE_DISK: &str = "/dev/vdb";

/// How long a disk's node may take to appear.
const DISK_LIMIT: Duration = Duration::from_secs(5);

/// Why a guest can't start.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A mount failed.
    #[error("mount {source_name} ({kind}) on {target}: {source}")]
    Mount {
        /// Device or pseudo file system.
        source_name: String,
        /// File system.
        kind: &'static str,
        /// Where to.
        target: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Another step failed.
    #[error("{step}: {source}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The cgroup could not be made.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

fn step<T, E: Into<io::Error>>(step: &'static str, result: Result<T, E>) -> Result<T, BootError> {
    result.map_err(|error| BootError::Step { step, source: error.into() })
}

/// Mounts everything and enters the image.
///
/// # Errors
/// Any [`BootError`]; there is no way on from there.
pub fn boot() -> Result<Machine, BootError> {
    let pseudo = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    for directory in ["/dev", "/root"] {
        match fs::create_dir(directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return step("create a mount point in the initramfs", Err(error));
            }
            _ => {}
        }
    }
    mount_at("devtmpfs", "/dev", "devtmpfs", MountFlags::NOSUID, None)?;
    open_standard_descriptors()?;
    let image = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
    mount_disk("/dev/vda", "/root", "erofs", image, None)?;
    step("move /dev into the image", mount_move("/dev", "/root/dev"))?;
    switch_root()?;

    mount_at("proc", "/proc", "proc", pseudo, None)?;
    mount_at("sysfs", "/sys", "sysfs", pseudo, None)?;
    mount_at("cgroup2", "/sys/fs/cgroup", "cgroup2", pseudo, None)?;
    // POSIX shared memory and semaphores: Python's multiprocessing and others refuse to work
    // without. The function's memory limit covers what lies there.
    step("create /dev/shm", fs::create_dir("/dev/shm"))?;
    let shared = MountFlags::NOSUID | MountFlags::NODEV;
    mount_at("tmpfs", "/dev/shm", "tmpfs", shared, Some(c"mode=1777"))?;
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        step("link a standard name in /dev", std::os::unix::fs::symlink(target, link))?;
    }
    // No lazy initialisation of inode tables: it would write to the disk for as long as the guest
    // runs. noatime: reading must not write.
    let writable = shared | MountFlags::NOATIME;
    mount_disk("/dev/vdc", "/tmp", "ext4", writable, Some(c"noinit_itable"))?;
    let mode = step("stat /tmp", fs::metadata("/tmp"))?.permissions().mode() & 0o7777;
    if mode != 0o1777 {
        step("chmod /tmp", fs::set_permissions("/tmp", fs::Permissions::from_mode(0o1777)))?;
    }

    step("bring up loopback", bring_up_loopback())?;
    let cgroup = Cgroup::create(Path::new("/sys/fs/cgroup"), "runtime")?;
    let urandom = step("open /dev/urandom", fs::File::open("/dev/urandom"))?;
    Ok(Machine { cgroup, urandom })
}

/// Mounts the function's code and its layers: `task` and `opt` of one disk, on `/var/task` and `/opt`.
///
/// # Errors
/// [`BootError::Mount`] or [`BootError::Step`].
pub fn mount_code() -> Result<(), BootError> {
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
    mount_disk(CODE_DISK, "/var/task", "erofs", flags, None)?;
    // Binds have the flags of what they show. The second one covers the disk's root.
    step("mount the layers", mount_bind("/var/task/opt", "/opt"))?;
    step("mount the code", mount_bind("/var/task/task", "/var/task"))
}

/// Connects to the host: the invoke connection, non-blocking.
///
/// # Errors
/// Whatever the kernel says.
pub fn connect() -> io::Result<OwnedFd> {
    connect_vsock(libc::VMADDR_CID_HOST, INVOKE_PORT)
        .map_err(|error| io::Error::new(error.kind(), format!("connect by vsock: {error}")))
}

fn mount_at(
    source_name: &str,
    target: &str,
    kind: &'static str,
    flags: MountFlags,
    data: Option<&CStr>,
) -> Result<(), BootError> {
    mount(source_name, target, kind, flags, data).map_err(|error| BootError::Mount {
        source_name: source_name.to_owned(),
        kind,
        target: target.to_owned(),
        source: error.into(),
    })
}

/// Mounts a disk, whose node may be a moment late.
fn mount_disk(
    source_name: &str,
    target: &str,
    kind: &'static str,
    flags: MountFlags,
    data: Option<&CStr>,
) -> Result<(), BootError> {
    let end = Instant::now() + DISK_LIMIT;
    loop {
        match mount_at(source_name, target, kind, flags, data) {
            Err(BootError::Mount { ref source, .. })
                if Instant::now() < end
                    && matches!(Errno::from_io_error(source), Some(Errno::NOENT | Errno::NXIO)) =>
            {
                thread::sleep(Duration::from_millis(1));
            }
            result => return result,
        }
    }
}

/// The kernel had no console to give: make sure that no file of ours becomes standard error.
fn open_standard_descriptors() -> Result<(), BootError> {
    loop {
        let null = step(
            "open /dev/null",
            open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()),
        )?;
        if std::os::fd::AsRawFd::as_raw_fd(&null) > 2 {
            return Ok(());
        }
        // Kept open for good: this is one of 0, 1 and 2.
        let _ = std::os::fd::IntoRawFd::into_raw_fd(null);
    }
}

/// Makes `/root` the root. The initramfs can't be unmounted, only emptied and covered.
fn switch_root() -> Result<(), BootError> {
    step("remove /init", fs::remove_file("/init"))?;
    step("chdir /root", chdir("/root"))?;
    step("move the image to /", mount_move(".", "/"))?;
    step("chroot", chroot("."))?;
    step("chdir /", chdir("/"))
}

fn bring_up_loopback() -> io::Result<()> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    use std::os::fd::AsRawFd;

    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    // SAFETY: all-zero is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads an `ifreq` with a name and flags, which `request` is.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn connect_vsock(cid: u32, port: u32) -> io::Result<OwnedFd> {
    use std::os::fd::{AsRawFd, FromRawFd};

    // SAFETY: plain system call without pointers.
    let raw = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(raw) };
    // SAFETY: all-zero is a valid `sockaddr_vm`.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    let length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: `address` is a `sockaddr_vm` of that length and outlives the call.
    let result = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    rustix::io::ioctl_fionbio(&socket, true)?;
    Ok(socket)
}
