//! Code disks: a function's zip archive as a read-only file system.

use std::{io, path::Path};

/// Largest archive in bytes.
pub const MAX_ZIPPED: u64 = 52_428_800;

/// Most bytes that the files of an archive may have together.
pub const MAX_UNZIPPED: u64 = 262_144_000;

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
pub fn build_disk(_zip: &[u8], _out: &Path) -> Result<CodeDisk, CodeError> {
    unimplemented!()
}
