//! Keys: a service that holds the master key, and the data keys that it wraps.
//!
//! ```text
//!  master key   in the service, never outside it ([`LocalKeyFile`]: 32 bytes in a file)
//!    └─ wraps ─▶ data key       one a snapshot or function, kept wrapped beside what it protects
//!                  └─ derives ─▶ one key a purpose: authentication, encryption…
//! ```
//!
//! The service has the shape of a cloud's KMS, so that one can stand in for the file: it makes a data
//! key, in the clear and wrapped, and unwraps it again. Whoever has only the files has only wrapped
//! keys. What data keys do to bytes is in [`seal`].

mod seal;

use std::{
    fmt::{self, Debug},
    fs::File,
    io::{self, Read, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use zeroize::Zeroizing;

pub use self::seal::{SealReader, SealWriter, plain_length, sealed_length};

/// Bytes of a key.
const BYTES: usize = 32;

/// Bytes by which a wrapped key names its master key.
const ID: usize = 8;

/// What a wrapped data key is bound to.
const WRAPPED: &[&[u8]] = &[b"firn data key"];

/// Why there is no key, or why bytes can't be opened with it.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The key file could not be read or made.
    #[error("key file {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The key file is not fit to be one.
    #[error("key file {} {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// Wrapped by another master key: of another installation, or of before the key was lost.
    #[error("made with master key {expected}; this host has {found}")]
    OtherKey {
        /// Name of the key that it takes, in hexadecimal.
        expected: String,
        /// Name of the key that there is.
        found: String,
    },
    /// Not what was sealed with this key, or not for this place.
    #[error("{what} was altered, or is not what it is taken for")]
    Altered {
        /// What.
        what: &'static str,
    },
    /// More bytes than one key may seal at once.
    #[error("too long to be encrypted")]
    TooLong,
    /// The system has no random bytes.
    #[error("no random bytes: {0}")]
    Random(io::Error),
    /// A key service of one's own could not do it.
    #[error("key service: {0}")]
    Service(String),
}

/// A key of 32 bytes. Its memory is wiped when it goes, and it never prints.
#[derive(Clone)]
pub struct Key(Zeroizing<[u8; BYTES]>);

impl Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(…)")
    }
}

impl Key {
    /// A new key from the kernel's random generator.
    ///
    /// # Errors
    /// [`KeyError::Random`].
    pub fn random() -> Result<Self, KeyError> {
        let mut bytes = Zeroizing::new([0; BYTES]);
        fill_random(&mut *bytes)?;
        Ok(Self(bytes))
    }

    /// A key of these bytes; what a key service of one's own has unwrapped.
    pub fn from_bytes(bytes: [u8; BYTES]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8; BYTES] {
        &self.0
    }

    /// The key for one purpose. Keys of different purposes tell nothing of each other or of this one.
    #[must_use]
    pub fn derive(&self, purpose: &'static str) -> Self {
        Self(Zeroizing::new(blake3::derive_key(purpose, &*self.0)))
    }

    /// The authentication tag of `bytes`. Compared as [`blake3::Hash`], it takes the same time
    /// wherever the first difference is.
    pub(crate) fn tag(&self, bytes: &[u8]) -> blake3::Hash {
        blake3::keyed_hash(&self.0, bytes)
    }
}

/// Fills `bytes` from the kernel's random generator.
fn fill_random(bytes: &mut [u8]) -> Result<(), KeyError> {
    let mut filled = 0;
    while filled < bytes.len() {
        match rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(n) => filled += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(KeyError::Random(error.into())),
        }
    }
    Ok(())
}

/// What holds the master key. Calls block, and may take as long as a network does: they happen when
/// a snapshot or function is made or loaded, never when one is thawed or invoked.
pub trait KeyService: Debug + Send + Sync {
    /// A new data key, and the same wrapped by the master key: at most [`MAX_WRAPPED`] bytes, safe to
    /// keep beside what the data key protects.
    ///
    /// # Errors
    /// Any [`KeyError`].
    fn generate_data_key(&self) -> Result<(Key, Vec<u8>), KeyError>;

    /// The data key that was wrapped.
    ///
    /// # Errors
    /// [`KeyError::OtherKey`] and [`KeyError::Altered`] if this service did not wrap it; others if it
    /// can't tell.
    fn unwrap(&self, wrapped: &[u8]) -> Result<Key, KeyError>;
}

/// Most bytes of a wrapped data key.
pub const MAX_WRAPPED: usize = 8192;

/// The key service that every installation has: the master key lies in a file of 32 random bytes that
/// only its owner can read. Who can read that file can read everything else, so it protects copies of
/// the state directory (backups, disks that are sent in) as far as they don't hold it, and everything
/// against being altered by who can't read it.
#[derive(Debug)]
pub struct LocalKeyFile {
    /// Derived from the master key, which is needed no more.
    wrapping: Key,
    id: [u8; ID],
}

impl LocalKeyFile {
    /// Reads the key file at `path`, and makes it first if there is none. Its directory must be there.
    ///
    /// # Errors
    /// [`KeyError::File`] if others can read it, it belongs to somebody else or has another length;
    /// [`KeyError::Io`].
    pub fn open_or_create(path: &Path) -> Result<Self, KeyError> {
        let at = |source| KeyError::Io { path: path.to_owned(), source };
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                create(path)?;
                File::open(path).map_err(at)?
            }
            other => other.map_err(at)?,
        };
        let metadata = file.metadata().map_err(at)?;
        let wrong = |reason: String| KeyError::File { path: path.to_owned(), reason };
        if !metadata.is_file() {
            return Err(wrong("is no regular file".into()));
        }
        let (mode, owner) = (metadata.mode() & 0o7777, metadata.uid());
        if mode & 0o077 != 0 {
            return Err(wrong(format!(
                "has mode {mode:04o}, so others than its owner can use it: if nobody has, \
                 `chmod 600` it"
            )));
        }
        let user = rustix::process::geteuid().as_raw();
        if owner != user {
            return Err(wrong(format!("belongs to user {owner}, not to user {user}")));
        }
        let mut bytes = Zeroizing::new(Vec::with_capacity(BYTES + 1));
        file.take(BYTES as u64 + 1).read_to_end(&mut bytes).map_err(at)?;
        let master: [u8; BYTES] = bytes.as_slice().try_into().map_err(|_| {
            let found = metadata.len();
            wrong(format!("is {found} bytes long, not {BYTES}: it is no key, or damaged"))
        })?;
        let master = Key::from_bytes(master);
        let mut id = [0; ID];
        id.copy_from_slice(&master.derive("firn 2026-11 name of a master key").as_bytes()[..ID]);
        Ok(Self { wrapping: master.derive("firn 2026-11 wrapping of data keys"), id })
    }
}

/// Writes a new key to `path`: whole and durable, or not at all. If somebody else was faster, theirs
/// stays.
fn create(path: &Path) -> Result<(), KeyError> {
    let at = |source| KeyError::Io { path: path.to_owned(), source };
    let dir = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let key = Key::random()?;
    // Mode 0600 from its first moment.
    let mut file =
        tempfile::Builder::new().prefix(crate::open::TEMPORARY).tempfile_in(dir).map_err(at)?;
    file.write_all(key.as_bytes()).map_err(at)?;
    file.as_file().sync_all().map_err(at)?;
    match file.persist_noclobber(path) {
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        other => other.map_err(|e| at(e.error))?,
    };
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(at)
}

impl KeyService for LocalKeyFile {
    fn generate_data_key(&self) -> Result<(Key, Vec<u8>), KeyError> {
        let key = Key::random()?;
        let mut wrapped = self.id.to_vec();
        wrapped.extend(self.wrapping.seal(WRAPPED, key.as_bytes())?);
        Ok((key, wrapped))
    }

    fn unwrap(&self, wrapped: &[u8]) -> Result<Key, KeyError> {
        let altered = || KeyError::Altered { what: "a wrapped key" };
        let (id, sealed) = wrapped.split_at_checked(ID).ok_or_else(altered)?;
        if *id != self.id {
            let name = |id: &[u8]| id.iter().map(|byte| format!("{byte:02x}")).collect();
            return Err(KeyError::OtherKey { expected: name(id), found: name(&self.id) });
        }
        let bytes = self.wrapping.open(WRAPPED, sealed).map_err(|_| altered())?;
        let bytes: [u8; BYTES] = bytes.as_slice().try_into().map_err(|_| altered())?;
        Ok(Key::from_bytes(bytes))
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    fn temporary() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("master.key");
        (dir, path)
    }

    #[test]
    fn a_key_file_is_made_once_and_is_its_owners() {
        let (_dir, path) = temporary();
        let first = LocalKeyFile::open_or_create(&path).unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!((metadata.len(), metadata.mode() & 0o7777), (32, 0o600));
        let (key, wrapped) = first.generate_data_key().unwrap();
        let again = LocalKeyFile::open_or_create(&path).unwrap();
        assert_eq!(again.unwrap(&wrapped).unwrap().as_bytes(), key.as_bytes());
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        let (other, _) = first.generate_data_key().unwrap();
        assert_ne!(other.as_bytes(), key.as_bytes());
    }

    #[test]
    fn unfit_key_files_are_refused_by_name() {
        let (_dir, path) = temporary();
        LocalKeyFile::open_or_create(&path).unwrap();
        let refused = || LocalKeyFile::open_or_create(&path).unwrap_err().to_string();
        for mode in [0o640, 0o604, 0o660] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert!(refused().contains("chmod 600"), "{}", refused());
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).unwrap();
        LocalKeyFile::open_or_create(&path).unwrap();
        for length in [0, 31, 33, 1 << 20] {
            fs::remove_file(&path).unwrap();
            fs::write(&path, vec![7; length]).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            assert!(refused().contains(&format!("{length} bytes")), "{}", refused());
        }
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(matches!(LocalKeyFile::open_or_create(&path), Err(KeyError::File { .. })));
        // A directory that is not mounted, for one: no new key in its place.
        let error = LocalKeyFile::open_or_create(&path.with_file_name("missing/key")).unwrap_err();
        assert!(matches!(error, KeyError::Io { .. }), "{error}");
    }

    #[test]
    fn wrapped_keys_of_others_and_altered_ones_are_told_apart() {
        let ((_a, ours), (_b, theirs)) = (temporary(), temporary());
        let ours = LocalKeyFile::open_or_create(&ours).unwrap();
        let theirs = LocalKeyFile::open_or_create(&theirs).unwrap();
        let (_, wrapped) = ours.generate_data_key().unwrap();
        assert!(wrapped.len() < MAX_WRAPPED);
        let error = theirs.unwrap(&wrapped).unwrap_err();
        assert!(matches!(error, KeyError::OtherKey { .. }), "{error}");
        for at in ID..wrapped.len() {
            let mut altered = wrapped.clone();
            altered[at] ^= 1;
            assert!(matches!(ours.unwrap(&altered), Err(KeyError::Altered { .. })), "byte {at}");
        }
        for length in 0..wrapped.len() {
            assert!(ours.unwrap(&wrapped[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn purposes_have_keys_of_their_own_and_keys_do_not_print() {
        let key = Key::from_bytes([0xab; 32]);
        assert_ne!(key.derive("one").as_bytes(), key.derive("two").as_bytes());
        let (_dir, path) = temporary();
        let service = LocalKeyFile::open_or_create(&path).unwrap();
        assert_eq!(format!("{key:?}"), "Key(…)");
        assert_eq!(format!("{key:#?}"), "Key(…)");
        // The key's id is random and may hold any number: what may not stand here is the key.
        let bytes = service.wrapping.as_bytes().map(|byte| byte.to_string()).join(", ");
        let text = format!("{service:?}");
        assert!(text.contains("Key(…)") && !text.contains(&bytes), "{text}");
    }
}
