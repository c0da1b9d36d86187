//! Functions' code on disk, by content: `code/<sha256>.zip` as uploaded and `code/<sha256>.erofs`
//! as guests mount it.
//!
//! Both files are complete and durable before any record names them, and go when no record and no
//! upload in progress does. Everything here blocks.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use firn::{
    Disk, DiskError,
    code::{CodeDisk, CodeError},
};
use sha2::{Digest, Sha256};

use crate::function::Code;

/// The directory of code. Cheap to clone.
#[derive(Debug, Clone)]
pub struct CodeStore {
    dir: PathBuf,
    /// Uploads in progress by hash: their files stay although no record names them yet.
    pins: Arc<Mutex<HashMap<String, usize>>>,
}

/// Keeps one upload's files until its record is written.
#[derive(Debug)]
pub struct Pin {
    store: CodeStore,
    /// The code that is kept.
    pub code: Code,
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut pins = self.store.pins.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = pins.get_mut(&self.code.sha256) {
            *count -= 1;
            if *count == 0 {
                pins.remove(&self.code.sha256);
            }
        }
    }
}

impl CodeStore {
    /// Opens the directory, making it if needed, and removes what `used` does not claim.
    ///
    /// # Errors
    /// The directory can't be made or read.
    pub fn open(dir: PathBuf, used: impl Fn(&str) -> bool) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            let claimed = name
                .strip_suffix(".zip")
                .or_else(|| name.strip_suffix(".erofs"))
                .is_some_and(&used);
            if !claimed && let Err(error) = fs::remove_file(&path) {
                tracing::warn!(path = %path.display(), %error, "can't remove unused code");
            }
        }
        Ok(Self { dir, pins: Arc::default() })
    }

    /// Stores an archive and builds its disk with `build`.
    ///
    /// # Errors
    /// Any [`CodeError`]; nothing is left behind then.
    pub fn put(
        &self,
        zip: &[u8],
        build: impl FnOnce(&[u8], &Path) -> Result<CodeDisk, CodeError>,
    ) -> Result<Pin, CodeError> {
        let hash = Sha256::digest(zip);
        let sha256: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
        let code = Code { sha256, size: zip.len() as u64 };
        let pin = {
            let mut pins = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
            *pins.entry(code.sha256.clone()).or_default() += 1;
            Pin { store: self.clone(), code }
        };
        let (archive, disk) = (self.zip(&pin.code.sha256), self.erofs(&pin.code.sha256));
        if archive.exists() && disk.exists() {
            return Ok(pin);
        }
        build(zip, &disk)?;
        write_durably(&archive, zip).map_err(|source| {
            let _ = fs::remove_file(&disk);
            CodeError::Io { what: "can't write the archive".into(), source }
        })?;
        Ok(pin)
    }

    /// Opens the disk of `sha256`, and builds it anew from the archive if it is gone.
    ///
    /// # Errors
    /// In plain words.
    pub fn disk(
        &self,
        sha256: &str,
        build: impl FnOnce(&[u8], &Path) -> Result<CodeDisk, CodeError>,
    ) -> Result<Disk, String> {
        let path = self.erofs(sha256);
        match Disk::open_read_only(&path) {
            Err(DiskError::Open { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            other => return other.map_err(|e| e.to_string()),
        }
        let archive = self.zip(sha256);
        let zip = fs::read(&archive).map_err(|e| {
            format!("the code of the function is gone ({}): {e}", archive.display())
        })?;
        build(&zip, &path).map_err(|e| e.to_string())?;
        Disk::open_read_only(&path).map_err(|e| e.to_string())
    }

    /// Path of the archive.
    pub fn zip(&self, sha256: &str) -> PathBuf {
        self.dir.join(format!("{sha256}.zip"))
    }

    fn erofs(&self, sha256: &str) -> PathBuf {
        self.dir.join(format!("{sha256}.erofs"))
    }

    /// Removes the code if no upload in progress and, by `used`, no record needs it. Running
    /// instances keep what they have open.
    pub fn collect(&self, sha256: &str, used: impl FnOnce() -> bool) {
        // Under the lock: an upload of the same bytes either has its pin already, or finds the
        // files gone and writes them again.
        let pins = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        if pins.contains_key(sha256) || used() {
            return;
        }
        for path in [self.zip(sha256), self.erofs(sha256)] {
            if let Err(error) = fs::remove_file(&path)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(path = %path.display(), %error, "can't remove unused code");
            }
        }
    }
}

/// Writes a file so that it is either whole and durable, or not there.
fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension(format!("{}.part", uuid::Uuid::new_v4()));
    let write = || {
        let mut file = File::create_new(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
    };
    write().inspect_err(|_| drop(fs::remove_file(&temporary)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn build(_zip: &[u8], out: &Path) -> Result<CodeDisk, CodeError> {
        fs::write(out, [0; 512]).unwrap();
        Ok(CodeDisk { entries: 1, unzipped_bytes: 1, disk_bytes: 512 })
    }

    fn files(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn unused_code_goes_and_used_code_stays() {
        let dir = tempfile::tempdir().unwrap();
        let store = CodeStore::open(dir.path().to_owned(), |_| true).unwrap();
        let pin = store.put(b"zip", build).unwrap();
        let sha = pin.code.sha256.clone();
        assert_eq!(sha.len(), 64);
        store.collect(&sha, || false);
        assert_eq!(files(dir.path()).len(), 2, "a pin keeps the files");
        drop(pin);
        store.collect(&sha, || true);
        assert_eq!(files(dir.path()).len(), 2, "a record keeps the files");
        store.collect(&sha, || false);
        assert!(files(dir.path()).is_empty());
    }

    #[test]
    fn a_failed_build_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = CodeStore::open(dir.path().to_owned(), |_| true).unwrap();
        let error = store.put(b"zip", |_, _| Err(CodeError::Empty)).unwrap_err();
        assert!(matches!(error, CodeError::Empty));
        assert!(files(dir.path()).is_empty() && store.pins.lock().unwrap().is_empty());
    }

    #[test]
    fn opening_sweeps_what_nothing_claims() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["aa.zip", "aa.erofs", "bb.zip", "bb.erofs", "cc.1.part"] {
            fs::write(dir.path().join(name), b"x").unwrap();
        }
        CodeStore::open(dir.path().to_owned(), |sha| sha == "aa").unwrap();
        assert_eq!(files(dir.path()), ["aa.erofs", "aa.zip"]);
    }

    #[test]
    fn a_lost_disk_is_built_again() {
        let dir = tempfile::tempdir().unwrap();
        let store = CodeStore::open(dir.path().to_owned(), |_| true).unwrap();
        let pin = store.put(b"zip", build).unwrap();
        fs::remove_file(store.erofs(&pin.code.sha256)).unwrap();
        store.disk(&pin.code.sha256, build).unwrap();
        let gone = store.disk("ee", build).unwrap_err();
        assert!(gone.contains("ee.zip"), "{gone}");
    }
}
