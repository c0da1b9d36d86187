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
//! copied into sealed memory and hashed there. `state` is authenticated with a key of the host's
//! [`KeyService`](crate::keys::KeyService) and names the hashes of the others, so nothing is thawed
//! either that this installation did not save. With
//! [`encrypt_snapshots`](crate::HostConfig::encrypt_snapshots) they are encrypted, too.

mod container;
mod pages;
mod resident;
mod save;
mod working_set;

use std::{
    fs::File,
    io::{self, BufReader, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use firn_pages::PAGE;
use firn_proto::control;
use serde::{Deserialize, Serialize};

use self::container::{Id, Manifest, Protection};
use crate::{
    Host, InstanceError, ShellClass,
    keys::{KeyError, SealReader},
};

pub(crate) use self::pages::{copy_sparse, hash_file};
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
    protection: Protection,
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
        /// `memory` or `tmp.delta`.
        what: &'static str,
        /// Hash that it should have.
        expected: String,
        /// Hash that it has.
        found: String,
    },
    /// Its tag is wrong: it was altered, or never made by this installation.
    #[error("state was altered or forged: its tag is not this host's")]
    Forged,
    /// Its key can't be had, or does not open it: of another installation, altered, or the key service
    /// fails.
    #[error("the snapshot's key or data: {0}")]
    Key(#[from] KeyError),
    /// It is not encrypted, and this host wants snapshots to be.
    #[error("the snapshot is not encrypted; this host takes only such that are")]
    NotEncrypted,
    /// It is authentic, but not what it is taken for.
    #[error("the snapshot was made for {found:?}, not for {expected:?}")]
    Purpose {
        /// [`SnapshotMeta::key`] that was expected.
        expected: String,
        /// The snapshot's.
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
    /// A section makes no sense although it is authentic.
    #[error("snapshot section {section}: {reason}")]
    Malformed {
        /// Which.
        section: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// Made with another kernel, or another `firn-init`, than this host's.
    #[error("the snapshot was made with kernel and init {expected}; this host has {found}")]
    Kernel {
        /// Hash in the snapshot.
        expected: String,
        /// Hash of the host's.
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

/// Adds what was being done to an I/O error, and tells a full disk and altered encrypted files apart.
pub(crate) fn at(what: &'static str) -> impl Fn(io::Error) -> SnapshotError {
    move |source| match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            SnapshotError::NoSpace { what: what.to_owned() }
        }
        _ => match source.downcast::<KeyError>() {
            Ok(error) => SnapshotError::Key(error),
            Err(source) => SnapshotError::Io { what: what.to_owned(), source },
        },
    }
}

/// See [`crate::fuzzing::snapshot_state`].
#[cfg(feature = "fuzzing")]
pub(crate) fn reencode(
    bytes: &[u8],
    keys: &dyn crate::keys::KeyService,
) -> Result<Vec<u8>, SnapshotError> {
    let (state, ..) = container::decode(bytes, Path::new("state"), keys)?;
    // Not encrypted, whatever it was: no two encryptions are alike.
    Ok(container::encode(&state, &Protection::generate(keys, false)?)?.0)
}

/// See [`crate::fuzzing::sign`].
#[cfg(feature = "fuzzing")]
pub(crate) fn sign(bytes: &[u8], keys: &dyn crate::keys::KeyService) -> Result<Id, SnapshotError> {
    Ok(Protection::generate(keys, false)?.tag(bytes))
}

impl Snapshot {
    /// Opens the snapshot in `dir`: reads its description and authenticates it with the key service of
    /// `host`, but does not read its memory yet. Blocks.
    ///
    /// An authentic snapshot may still be another one than the path promises: who can write the
    /// directory can move snapshots about. See [`Snapshot::expect`].
    ///
    /// # Errors
    /// Any [`SnapshotError`].
    pub fn open(host: &Host, dir: impl AsRef<Path>) -> Result<Self, SnapshotError> {
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
        let inner = host.inner();
        let (state, id, protection) = container::decode(&bytes, &path, &*inner.keys)?;
        if inner.config.encrypt_snapshots && protection.encryption.is_none() {
            return Err(SnapshotError::NotEncrypted);
        }
        Ok(Self(Arc::new(Opened { dir, id, state, protection })))
    }

    /// Takes the snapshot only if its [`SnapshotMeta::key`] is `key`.
    ///
    /// # Errors
    /// [`SnapshotError::Purpose`].
    pub fn expect(self, key: &str) -> Result<Self, SnapshotError> {
        let found = &self.meta().key;
        if found != key {
            let (expected, found) = (key.to_owned(), found.clone());
            return Err(SnapshotError::Purpose { expected, found });
        }
        Ok(self)
    }

    /// Whether it is encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.0.protection.encryption.is_some()
    }

    /// Its identity: an authentication tag over everything in it.
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

    /// What decrypts the file `name`; `None`: it is not encrypted.
    fn open_sealed(
        &self,
        name: &'static str,
    ) -> Result<Option<SealReader<BufReader<File>>>, SnapshotError> {
        let Some(key) = &self.0.protection.encryption else { return Ok(None) };
        let file = BufReader::with_capacity(1 << 20, self.open_file(name)?);
        SealReader::new(file, key, &[name.as_bytes()]).map(Some).map_err(at(name))
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
