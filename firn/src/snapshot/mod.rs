//! Snapshots on disk and in memory.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use firn_proto::control;
use serde::{Deserialize, Serialize};

use crate::{Disk, Host, InstanceError};

/// What the maker of a snapshot wants to find in it again; this crate does not look at it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotMeta {
    /// What it is, for people and logs.
    pub label: String,
    /// Whatever identifies its inputs (a hash of code and configuration, for one).
    pub key: String,
}

/// A snapshot in a directory.
#[derive(Debug, Clone)]
pub struct Snapshot;

/// A verified snapshot in sealed memory, ready to thaw. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ResidentSnapshot;

/// Why a snapshot could not be made, opened or made resident.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// There already is something at that path.
    #[error("{} already exists", path.display())]
    Exists {
        /// The path.
        path: PathBuf,
    },
    /// The file is no snapshot at all.
    #[error("{} is not a snapshot", path.display())]
    NotASnapshot {
        /// The file.
        path: PathBuf,
    },
    /// A file ends too early.
    #[error("{what} is truncated: {found} bytes instead of {expected}")]
    Truncated {
        /// Which file or section.
        what: &'static str,
        /// Bytes that it should have.
        expected: u64,
        /// Bytes that it has.
        found: u64,
    },
    /// The content is not what was written.
    #[error("{what} was altered: its hash is {found}, not {expected}")]
    Altered {
        /// `state`, `memory` or `tmp.delta`.
        what: &'static str,
        /// Hash that it should have.
        expected: String,
        /// Hash that it has.
        found: String,
    },
    /// Another format version.
    #[error("snapshot format version {found}; this host supports {supported}")]
    Version {
        /// The file's.
        found: u32,
        /// Ours.
        supported: u32,
    },
    /// A section makes no sense although the checksum is right.
    #[error("snapshot section {section}: {reason}")]
    Malformed {
        /// Which.
        section: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// Made with another kernel than this host's.
    #[error("the snapshot was made with kernel {expected}; this host has {found}")]
    Kernel {
        /// Hash in the snapshot.
        expected: String,
        /// Hash of the host's kernel.
        found: String,
    },
    /// Made with another image than this host's.
    #[error("the snapshot needs image {runtime:?} with hash {expected}; this host has {found}")]
    Image {
        /// The runtime.
        runtime: String,
        /// Hash in the snapshot.
        expected: String,
        /// Hash of the host's image, or `none`.
        found: String,
    },
    /// The code disk is not the one that the snapshot was made with.
    #[error("the snapshot needs the code disk {expected}, not {found}")]
    Code {
        /// Hash in the snapshot, or `none`.
        expected: String,
        /// Hash of the disk that was given, or `none`.
        found: String,
    },
    /// The `/tmp` disk is not the one that the snapshot was made with.
    #[error("the snapshot needs the /tmp disk {expected}; this host has {found}")]
    TmpDisk {
        /// Hash in the snapshot.
        expected: String,
        /// Hash of the host's.
        found: String,
    },
    /// Its memory size is not what it should be.
    #[error("the snapshot has {found} bytes of memory, not {expected}")]
    Memory {
        /// Bytes that its class has.
        expected: u64,
        /// Bytes that were found.
        found: u64,
    },
    /// The base is missing or another one.
    #[error("the snapshot needs base {expected}, not {found}")]
    Base {
        /// Id in the snapshot, or `none`.
        expected: String,
        /// Id of the base that was given, or `none`.
        found: String,
    },
    /// Made on a CPU that this one can't stand in for.
    #[error("the snapshot does not fit this CPU: {difference}")]
    Cpu {
        /// What differs.
        difference: String,
    },
    /// The disk is full.
    #[error("no space left for {what}")]
    NoSpace {
        /// What was being written.
        what: String,
    },
    /// The VMM could not write it.
    #[error("the VMM could not save: {message}")]
    Save {
        /// Class of the failure.
        kind: control::FailureKind,
        /// Its words.
        message: String,
    },
    /// The instance failed before it was written.
    #[error(transparent)]
    Instance(#[from] InstanceError),
    /// A file could not be read or written.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// Why not.
        source: io::Error,
    },
}

impl Snapshot {
    /// Opens the snapshot in `dir`: reads and checks its description, but not yet its memory.
    ///
    /// # Errors
    /// Any [`SnapshotError`].
    pub fn open(_dir: impl AsRef<Path>) -> Result<Self, SnapshotError> {
        unimplemented!()
    }

    /// Its identity: a hash over everything in it.
    pub fn id(&self) -> String {
        unimplemented!()
    }

    /// Id of the snapshot whose memory this one only holds the differences to.
    pub fn base(&self) -> Option<String> {
        unimplemented!()
    }

    /// What its maker noted.
    pub fn meta(&self) -> &SnapshotMeta {
        unimplemented!()
    }

    /// Verifies everything and lays it out in sealed memory. `base` must be given if
    /// [`Snapshot::base`] names one; `code` must be the disk that was loaded, if one was.
    ///
    /// # Errors
    /// Any [`SnapshotError`].
    pub async fn make_resident(
        &self,
        _host: &Host,
        _base: Option<&ResidentSnapshot>,
        _code: Option<&Disk>,
    ) -> Result<ResidentSnapshot, SnapshotError> {
        unimplemented!()
    }
}

impl ResidentSnapshot {
    /// [`Snapshot::id`].
    pub fn id(&self) -> String {
        unimplemented!()
    }

    /// What its maker noted.
    pub fn meta(&self) -> &SnapshotMeta {
        unimplemented!()
    }
}

/// Hash of all of `file`, without moving its offset.
pub(crate) fn hash_file(file: &File) -> io::Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    let mut offset = 0;
    loop {
        match file.read_at(&mut buffer, offset) {
            Ok(0) => return Ok(hasher.finalize()),
            Ok(n) => {
                hasher.update(&buffer[..n]);
                offset += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}
