//! A limit of what each VM reads from and writes to one disk.

use std::{fs, io};

use crate::dir::Dir;

/// Most bytes a second that each VM may read from a disk, and as many that it may write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Throttle {
    /// Major and minor number.
    pub(super) device: (u32, u32),
    pub(super) bytes_per_second: u64,
}

impl Throttle {
    pub(super) fn apply(&self, dir: &Dir, unified: bool) -> io::Result<()> {
        let Self { device: (major, minor), bytes_per_second: most } = self;
        if unified {
            return dir.write("io.max", &format!("{major}:{minor} rbps={most} wbps={most}"));
        }
        ["blkio.throttle.read_bps_device", "blkio.throttle.write_bps_device"]
            .iter()
            .try_for_each(|name| dir.write(name, &format!("{major}:{minor} {most}")))
    }
}

/// The disk that the file system of `dir` lies on; a partition's disk, because only whole disks have
/// limits.
pub(super) fn disk_of(dir: &Dir) -> io::Result<(u32, u32)> {
    let device = rustix::fs::fstat(dir)?.st_dev;
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let entry = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}"))?;
    let disk = match entry.join("partition").exists() {
        true => entry.parent().unwrap_or(&entry),
        false => &entry,
    };
    let numbers = fs::read_to_string(disk.join("dev"))?;
    let numbers = numbers
        .trim()
        .split_once(':')
        .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    numbers.ok_or_else(|| io::Error::other("no device number"))
}
