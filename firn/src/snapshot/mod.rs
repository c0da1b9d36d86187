//! Snapshots: a microVM written down in a directory, and made resident in sealed memory.
//!
//! ```text
//!  <dir>/state      what it is, the VMM's state, which pages it holds; names the hashes of:
//!  <dir>/memory     guest memory, linear and sparse; over a base: only what differs
//!  <dir>/tmp.delta  what was written to /tmp, sparse
//!  <dir>/working-set  which pages its first clones touched; advice, added later
//! ```
//!
//! Neither these files nor the VMM that wrote them are trusted: nothing is thawed that was not
//! copied into sealed memory and hashed there.

mod container;
mod pages;
mod resident;
mod save;
mod working_set;

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use firn_proto::control;
use serde::{Deserialize, Serialize};

use self::container::{Id, Manifest};
use crate::{InstanceError, ShellClass};

pub(crate) use self::pages::{PAGE, hash_file, hash_sparse};
pub use self::resident::ResidentSnapshot;
pub use self::working_set::WorkingSetReport;
pub(crate) use self::working_set::{Sample, Use, observe};

/// What the maker of a snapshot wants to find in it again; this crate does not look at it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotMeta {
    /// What it is, for people and logs.
    pub label: String,
    /// Whatever identifies its inputs (a hash of code and configuration, for one).
    pub key: String,
}

/// A snapshot in a directory. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Snapshot(Arc<Opened>);

#[derive(Debug)]
struct Opened {
    dir: PathBuf,
    id: Id,
    state: container::State,
}

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

/// Adds what was being done to an I/O error, and tells a full disk apart.
pub(crate) fn at(what: &'static str) -> impl Fn(io::Error) -> SnapshotError {
    move |source| match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            SnapshotError::NoSpace { what: what.to_owned() }
        }
        _ => SnapshotError::Io { what: what.to_owned(), source },
    }
}

/// See [`crate::fuzzing::snapshot_state`].
#[cfg(feature = "fuzzing")]
pub(crate) fn reencode(bytes: &[u8]) -> Result<Vec<u8>, SnapshotError> {
    let (state, _) = container::decode(bytes, Path::new("state"))?;
    Ok(container::encode(&state)?.0)
}

impl Snapshot {
    /// Opens the snapshot in `dir`: reads and checks its description, but not yet its memory.
    ///
    /// # Errors
    /// Any [`SnapshotError`].
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, SnapshotError> {
        let dir = dir.as_ref().to_owned();
        let path = dir.join("state");
        let reading = |source| SnapshotError::Io { what: path.display().to_string(), source };
        let file = File::open(&path).map_err(reading)?;
        let mut bytes = Vec::new();
        // One more than allowed, so that a longer file shows.
        file.take(container::MAX_FILE + 1).read_to_end(&mut bytes).map_err(reading)?;
        if bytes.len() as u64 > container::MAX_FILE {
            let reason = format!("over {} bytes", container::MAX_FILE);
            return Err(SnapshotError::Malformed { section: "head", reason });
        }
        let (state, id) = container::decode(&bytes, &path)?;
        Ok(Self(Arc::new(Opened { dir, id, state })))
    }

    /// Its identity: a hash over everything in it.
    pub fn id(&self) -> String {
        container::hex(&self.0.id)
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    /// Id of the snapshot whose memory this one only holds the differences to.
    pub fn base(&self) -> Option<String> {
        self.0.state.manifest.base.as_ref().map(container::hex)
    }

    /// Name of the runtime image that it was made from.
    pub fn runtime(&self) -> &str {
        &self.0.state.manifest.runtime
    }

    /// The class of shell that it thaws into.
    pub fn class(&self) -> ShellClass {
        let Manifest { vcpus, memory_mib, .. } = self.0.state.manifest;
        ShellClass { vcpus, memory_mib }
    }

    /// Bytes of memory that it holds itself.
    pub fn memory_bytes(&self) -> u64 {
        self.0.state.pages.count() * PAGE
    }

    /// What its maker noted.
    pub fn meta(&self) -> &SnapshotMeta {
        &self.0.state.manifest.meta
    }

    fn open_file(&self, name: &'static str) -> Result<File, SnapshotError> {
        File::open(self.0.dir.join(name)).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => {
                SnapshotError::Truncated { what: name, expected: 1, found: 0 }
            }
            _ => at(name)(source),
        })
    }
}
