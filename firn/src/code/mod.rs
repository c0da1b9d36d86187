//! Code disks: a function's zip archive as a read-only file system.
//!
//! The archive is hostile. Its own numbers (sizes, counts) are only used to refuse it early; what
//! counts is what comes out. Nothing is written outside a private directory, no link is ever made,
//! and the guest gets a file system that the host has made, never one that a caller uploaded.

mod archive;

use std::{
    fs::{self, File},
    io,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Stdio},
};

use self::archive::Extracted;
use crate::open::TEMPORARY;

/// Largest archive in bytes.
pub const MAX_ZIPPED: u64 = 52_428_800;

/// Most bytes that the files of an archive may have together.
pub const MAX_UNZIPPED: u64 = 262_144_000;

/// Most files and directories of an archive: bounds inodes and time.
pub const MAX_ENTRIES: usize = 100_000;

/// What [`build_disk`] made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CodeDisk {
    /// Number of files and directories in the archive.
    pub entries: usize,
    /// Bytes of all files together.
    pub unzipped_bytes: u64,
    /// Length of the disk in bytes.
    pub disk_bytes: u64,
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

/// Checks `zip` and writes it as a read-only file system to `out`, atomically. The same archive
/// always gives the same bytes. Blocks: call it where blocking is allowed.
///
/// # Errors
/// Any [`CodeError`]; nothing is left behind then.
pub fn build_disk(zip: &[u8], out: &Path) -> Result<CodeDisk, CodeError> {
    let parent = match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // Beside the target, so that renaming does not cross file systems. Mode 0700: nobody else sees
    // a tree that is half there.
    let dir = tempfile::Builder::new()
        .prefix(TEMPORARY)
        .tempdir_in(parent)
        .map_err(io_at("make a temporary directory"))?;
    let tree = dir.path().join("tree");
    let disk = dir.path().join("disk");
    fs::create_dir(&tree).map_err(io_at("make a temporary directory"))?;
    fs::set_permissions(&tree, fs::Permissions::from_mode(0o755))
        .map_err(io_at("make a temporary directory"))?;
    let Extracted { entries, unzipped_bytes } = archive::extract(zip, &tree)?;
    make_file_system(&tree, &disk)?;
    let file = File::open(&disk).map_err(io_at("open the disk"))?;
    let disk_bytes = file.metadata().map_err(io_at("open the disk"))?.len();
    file.sync_all().map_err(io_at("flush the disk"))?;
    fs::rename(&disk, out).map_err(io_at("name the disk"))?;
    File::open(parent).and_then(|dir| dir.sync_all()).map_err(io_at("flush the directory"))?;
    Ok(CodeDisk { entries, unzipped_bytes, disk_bytes })
}

/// Identity of every code disk: the same input must give the same bytes.
const UUID: &str = "6669726e-636f-6465-8000-000000000000";

/// Makes an uncompressed EROFS: code is read once, and a decompressor in the guest would cost more
/// than the bytes.
fn make_file_system(tree: &Path, disk: &Path) -> Result<(), CodeError> {
    let mut command = Command::new("mkfs.erofs");
    // Owners, times and attributes are the same whoever builds it.
    command.args(["-T0", "--all-root", "-x-1", "--quiet"]).arg(format!("-U{UUID}"));
    command.arg(disk).arg(tree);
    let path = std::env::var("PATH").unwrap_or_default();
    let path = format!("{path}:/usr/sbin:/usr/bin:/sbin:/bin");
    command.env_clear().env("PATH", path).env("LC_ALL", "C").stdin(Stdio::null());
    let output = command.output().map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => {
            CodeError::Mkfs { reason: "not found: install the package erofs-utils".into() }
        }
        _ => CodeError::Mkfs { reason: e.to_string() },
    })?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let last = words.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    Err(CodeError::Mkfs { reason: format!("{}: {last}", output.status) })
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
