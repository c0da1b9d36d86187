//! Code disks: a function's zip archive as a read-only file system.
//!
//! The archive is hostile. Its own numbers (sizes, counts) are only used to refuse it early; what
//! counts is what comes out. Nothing is written outside a private tree, no link is ever made,
//! and the guest gets a file system that the host has made, never one that a caller uploaded.
//!
//! Nothing of it gets to a disk on the way: the tree lies in a file system in memory that only the thread
//! sees that works on it, and what comes out in sealed memory. Whoever keeps that decides how.

mod archive;
mod confine;

use std::{
    ffi::OsString,
    fs::{self, File},
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    thread,
};

use rustix::{
    io::Errno,
    mount::{MountFlags, MountPropagationFlags},
    thread::UnshareFlags,
};

use self::archive::Extracted;
use crate::{Disk, memfile, open::TEMPORARY};

/// Largest archive in bytes.
pub const MAX_ZIPPED: u64 = 52_428_800;

/// Most bytes that the files of an archive may have together.
pub const MAX_UNZIPPED: u64 = 262_144_000;

/// Most files and directories of an archive: bounds inodes and time.
pub const MAX_ENTRIES: usize = 100_000;

/// What [`build_disk`] made.
#[derive(Debug, Clone)]
pub struct CodeDisk {
    /// The file system.
    pub disk: Disk,
    /// Number of files and directories in the archive.
    pub entries: usize,
    /// Bytes of all files together.
    pub unzipped_bytes: u64,
}

/// Why an archive can't become a code disk.
#[derive(Debug, thiserror::Error)]
pub enum CodeError {
    /// The archive is too large.
    #[error("zipped size must be at most {limit} bytes; it is {size}")]
    ZippedTooLarge {
        /// Its length in bytes.
        size: u64,
        /// [`MAX_ZIPPED`].
        limit: u64,
    },
    /// The files are too large.
    #[error("unzipped size must be at most {limit} bytes")]
    UnzippedTooLarge {
        /// [`MAX_UNZIPPED`].
        limit: u64,
    },
    /// More entries than any function needs.
    #[error("the archive has {entries} entries; at most {limit} are allowed")]
    TooManyEntries {
        /// How many it has.
        entries: usize,
        /// How many it may have.
        limit: usize,
    },
    /// The bytes are no zip archive.
    #[error("not a zip archive: {reason}")]
    NotAZip {
        /// Why.
        reason: String,
    },
    /// The archive has no entries.
    #[error("the archive is empty")]
    Empty,
    /// An entry may not be there.
    #[error("entry {name:?}: {reason}")]
    Entry {
        /// Its name, as far as it is readable.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// An entry's data is damaged.
    #[error("entry {name:?} is damaged: {reason}")]
    Damaged {
        /// Its name.
        name: String,
        /// Why.
        reason: String,
    },
    /// The tool that makes file systems is missing or failed: the host's fault.
    #[error("mkfs.erofs: {reason}")]
    Mkfs {
        /// What it said.
        reason: String,
    },
    /// A file could not be written: the host's fault.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// Why not.
        source: io::Error,
    },
}

/// Checks `zip` and makes a read-only file system of it. The same archive always gives the same bytes.
/// Takes about twice the unzipped size in memory meanwhile. Where mounting is not permitted, as without
/// root, the tree lies in a temporary directory until it is done.
/// Blocks: call it where blocking is allowed.
///
/// # Errors
/// Any [`CodeError`]; nothing is left behind then.
pub fn build_disk(zip: &[u8]) -> Result<CodeDisk, CodeError> {
    // Mode 0700: nobody else sees a tree that is half there.
    let dir = tempfile::Builder::new().prefix(TEMPORARY).tempdir();
    let dir = dir.map_err(io_at("make a temporary directory"))?;
    let tree = dir.path().join("tree");
    fs::create_dir(&tree)
        .and_then(|()| fs::set_permissions(&tree, fs::Permissions::from_mode(0o755)))
        .map_err(io_at("make a temporary directory"))?;
    // In a thread of its own, because only that one and its children see the tree.
    let built = thread::scope(|scope| scope.spawn(|| build(zip, &tree)).join());
    built.unwrap_or_else(|_| {
        Err(io_at("build a code disk")(io::Error::other("a bug: its thread panicked")))
    })
}

fn build(zip: &[u8], tree: &Path) -> Result<CodeDisk, CodeError> {
    match mount_memory(tree) {
        Err(Errno::PERM) => tracing::warn!("not permitted to mount: code is extracted to a disk"),
        other => other.map_err(|e| io_at("mount a file system in memory")(e.into()))?,
    }
    let Extracted { entries, unzipped_bytes } = archive::extract(zip, tree)?;
    let file = memfile::create("firn-code").map_err(io_at("make a memory file"))?;
    make_file_system(tree, &file)?;
    let disk_bytes = file.metadata().map_err(io_at("read the disk"))?.len();
    let mut made = File::from(memfile::reopen(&file).map_err(io_at("read the disk"))?);
    let disk = Disk::copy(&mut made, disk_bytes, "of code")
        .map_err(|e| CodeError::Mkfs { reason: e.to_string() })?;
    Ok(CodeDisk { disk, entries, unzipped_bytes })
}

/// Mounts a file system in memory on the directory `tree`, for this thread and its children alone; it
/// goes with the last of them.
fn mount_memory(tree: &Path) -> Result<(), Errno> {
    // SAFETY: the new namespace is this thread's; no descriptor table is unshared, so no other thread
    // loses what it has open.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS)? };
    let quiet = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", quiet)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    // As many files as an archive may have, and the directories that it does not name.
    rustix::mount::mount(c"none", tree, c"tmpfs", flags, c"mode=0755,nr_inodes=0")
}

/// Identity of every code disk: the same input must give the same bytes.
const UUID: &str = "6669726e-636f-6465-8000-000000000000";

/// Makes an uncompressed EROFS: code is read once, and a decompressor in the guest would cost more
/// than the bytes. The program that makes it is not ours and reads names and sizes of the archive's choice,
/// so it is [confined](confine).
fn make_file_system(tree: &Path, disk: &File) -> Result<(), CodeError> {
    let program = mkfs().ok_or_else(|| CodeError::Mkfs {
        reason: "not found: install the package erofs-utils".into(),
    })?;
    let uuid = format!("-U{UUID}");
    // Owners, times and attributes are the same whoever builds it. The disk has no name but its
    // descriptor's, and the tree none at all: it is where the program starts.
    let arguments = ["-T0", "--all-root", "-x-1", "--quiet", &uuid, "/proc/self/fd/0", "."];
    let stdin = disk.try_clone().map_err(io_at("make the disk"))?;
    let output = confine::run(&program, &arguments, tree, stdin)
        .map_err(|e| CodeError::Mkfs { reason: e.to_string() })?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let last = words.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    Err(CodeError::Mkfs { reason: format!("{}: {last}", output.status) })
}

/// Where `mkfs.erofs` is.
fn mkfs() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = OsString::from("/usr/sbin:/usr/bin:/sbin:/bin");
    let mut dirs = std::env::split_paths(&path).chain(std::env::split_paths(&system));
    dirs.find_map(|dir| Some(dir.join("mkfs.erofs")).filter(|program| program.is_file()))
}

/// See [`crate::fuzzing::extract`].
#[cfg(feature = "fuzzing")]
pub(crate) fn extract(zip: &[u8], tree: &Path) -> Result<(usize, u64), CodeError> {
    let Extracted { entries, unzipped_bytes } = archive::extract(zip, tree)?;
    Ok((entries, unzipped_bytes))
}

pub(super) fn io_at(what: &'static str) -> impl Fn(io::Error) -> CodeError {
    move |source| CodeError::Io { what: what.to_owned(), source }
}
