//! Functions' code on disk, encrypted with their keys: for each upload `code/<blob>.zip.sealed`, as it
//! was uploaded, and `code/<blob>.erofs.sealed`, as guests mount it.
//!
//! Both files are complete and durable before any record names them, and go when it does not any more.
//! Each is bound to its function, upload and kind, so none can stand in for another. They are decrypted
//! only into memory, where all instances of a function share one disk. Everything here blocks.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, BufReader, BufWriter, Read, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use firn::{
    Disk, WeakDisk,
    code::{CodeDisk, CodeError},
    keys::{SealReader, SealWriter, plain_length},
};
use sha2::{Digest, Sha256};

use crate::{
    envelope::Envelope,
    function::{Code, Function},
};

/// What follows a blob's name in those of its files.
const ZIP: &str = "zip.sealed";
const DISK: &str = "erofs.sealed";

/// The directory of code. Cheap to clone.
#[derive(Debug, Clone)]
pub struct CodeStore {
    dir: PathBuf,
    /// Disks that somebody uses, by blob.
    disks: Arc<Mutex<HashMap<String, WeakDisk>>>,
}

/// An upload whose record is not written yet: without one, its files go again.
#[derive(Debug)]
pub struct Upload {
    store: CodeStore,
    kept: bool,
    /// The code.
    pub code: Code,
}

impl Upload {
    /// A record names it now.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if !self.kept {
            self.store.remove(&self.code);
        }
    }
}

/// Why there is no code to run.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file of it can't be read, or is not what was written.
    #[error("the code of the function can't be read ({}): {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is another archive than the record says.
    #[error("the code of the function has SHA-256 {found}, not {expected}")]
    Hash {
        /// The record's.
        expected: String,
        /// The archive's.
        found: String,
    },
    /// No disk can be made of it any more.
    #[error(transparent)]
    Build(#[from] CodeError),
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
                .split_once('.')
                .is_some_and(|(blob, kind)| (kind == ZIP || kind == DISK) && used(blob));
            if !claimed {
                remove(&path);
            }
        }
        Ok(Self { dir, disks: Arc::default() })
    }

    /// Stores an archive for `function`, and the disk that `build` makes of it.
    ///
    /// # Errors
    /// Any [`CodeError`]; nothing is left behind then.
    pub fn put(
        &self,
        function: &str,
        envelope: &Envelope,
        zip: &[u8],
        build: impl FnOnce(&[u8]) -> Result<CodeDisk, CodeError>,
    ) -> Result<Upload, CodeError> {
        let blob = uuid::Uuid::new_v4().simple().to_string();
        let code = Code { sha256: sha256(zip), size: zip.len() as u64, blob };
        let built = build(zip)?;
        // From here on, what fails takes what is there along.
        let upload = Upload { store: self.clone(), kept: false, code };
        let write = |kind, content: &mut dyn Read| {
            self.write(function, envelope, &upload.code, kind, content)
                .map_err(|source| CodeError::Io { what: "can't write the code".into(), source })
        };
        let mut disk = built
            .disk
            .reader()
            .map_err(|source| CodeError::Io { what: "can't read the code".into(), source })?;
        write(DISK, &mut disk)?;
        write(ZIP, &mut &*zip)?;
        Ok(upload)
    }

    /// The disk of a function's code, from memory if somebody uses it already. If its file is gone or
    /// damaged it is built anew: the archive alone counts.
    ///
    /// # Errors
    /// Any [`LoadError`].
    pub fn disk(
        &self,
        function: &Function,
        build: impl FnOnce(&[u8]) -> Result<CodeDisk, CodeError>,
    ) -> Result<Disk, LoadError> {
        let Function { name, envelope, code, .. } = function;
        if let Some(disk) = self.disks().get(&code.blob).and_then(WeakDisk::upgrade) {
            return Ok(disk);
        }
        // At each load, also when the disk is there: what runs is what `CodeSha256` says, or nothing.
        let zip = self.zip(function)?;
        let disk = match self.read_disk(function) {
            Ok(disk) => disk,
            Err(error) => {
                tracing::warn!(function = name, %error, "building its code disk anew");
                let disk = build(&zip)?.disk;
                let path = self.path(code, DISK);
                disk.reader()
                    .and_then(|mut content| self.write(name, envelope, code, DISK, &mut content))
                    .map_err(|source| LoadError::Read { path, source })?;
                // The function may have been deleted meanwhile. Its archive goes first, so either it
                // is gone here, or this disk goes after it.
                if !self.path(code, ZIP).exists() {
                    remove(&self.path(code, DISK));
                }
                disk
            }
        };
        let mut disks = self.disks();
        disks.retain(|_, disk| disk.upgrade().is_some());
        disks.insert(code.blob.clone(), disk.downgrade());
        Ok(disk)
    }

    /// A function's code as it was uploaded.
    ///
    /// # Errors
    /// [`LoadError::Read`], [`LoadError::Hash`].
    pub fn zip(&self, function: &Function) -> Result<Vec<u8>, LoadError> {
        let mut zip = Vec::new();
        self.open_sealed(function, ZIP)
            .and_then(|(mut reader, _)| reader.read_to_end(&mut zip))
            .map_err(|source| LoadError::Read { path: self.path(&function.code, ZIP), source })?;
        let (expected, found) = (function.code.sha256.clone(), sha256(&zip));
        match expected == found {
            true => Ok(zip),
            false => Err(LoadError::Hash { expected, found }),
        }
    }

    /// Removes code that no record names any more. Running instances keep what they have.
    pub fn remove(&self, code: &Code) {
        // In this order: see `disk`.
        for kind in [ZIP, DISK] {
            remove(&self.path(code, kind));
        }
    }

    fn disks(&self) -> std::sync::MutexGuard<'_, HashMap<String, WeakDisk>> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, code: &Code, kind: &str) -> PathBuf {
        self.dir.join(format!("{}.{kind}", code.blob))
    }

    fn read_disk(&self, function: &Function) -> Result<Disk, LoadError> {
        let path = self.path(&function.code, DISK);
        let read = || {
            let (mut reader, length) = self.open_sealed(function, DISK)?;
            let disk = Disk::copy(&mut reader, length, &path).map_err(io::Error::other)?;
            reader.finish()?;
            Ok(disk)
        };
        read().map_err(|source| LoadError::Read { path: path.clone(), source })
    }

    /// A reader of one of a function's files, and the length of what comes out.
    fn open_sealed(
        &self,
        function: &Function,
        kind: &str,
    ) -> io::Result<(SealReader<BufReader<File>>, u64)> {
        let Function { name, envelope, code, .. } = function;
        let file = File::open(self.path(code, kind))?;
        let length = plain_length(file.metadata()?.len());
        let file = BufReader::with_capacity(1 << 20, file);
        let reader = SealReader::new(file, &envelope.code, &context(name, code, kind))?;
        Ok((reader, length))
    }

    /// Writes a file so that it is either whole and durable, or not there.
    fn write(
        &self,
        function: &str,
        envelope: &Envelope,
        code: &Code,
        kind: &str,
        content: &mut dyn Read,
    ) -> io::Result<()> {
        let path = self.path(code, kind);
        let temporary = path.with_extension(format!("{}.part", uuid::Uuid::new_v4()));
        let mut write = || {
            let file = BufWriter::with_capacity(1 << 20, File::create_new(&temporary)?);
            let context = context(function, code, kind);
            let mut writer = SealWriter::new(file, &envelope.code, &context)?;
            io::copy(content, &mut writer)?;
            let mut file = writer.finish()?;
            file.flush()?;
            file.get_ref().sync_all()?;
            fs::rename(&temporary, &path)?;
            File::open(&self.dir)?.sync_all()
        };
        write().inspect_err(|_| drop(fs::remove_file(&temporary)))
    }
}

/// What a file is bound to.
fn context<'a>(function: &'a str, code: &'a Code, kind: &'a str) -> [&'a [u8]; 5] {
    [
        b"firnd code",
        kind.as_bytes(),
        function.as_bytes(),
        code.blob.as_bytes(),
        code.sha256.as_bytes(),
    ]
}

fn sha256(zip: &[u8]) -> String {
    Sha256::digest(zip).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "can't remove unused code");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{envelope::tests::TestKeys, function::tests::example};

    const CONTENT: [u8; 1024] = [0x5a; 1024];

    fn build(_zip: &[u8]) -> Result<CodeDisk, CodeError> {
        let disk = Disk::copy(&mut &CONTENT[..], 1024, "of a test").unwrap();
        Ok(CodeDisk { disk, entries: 1, unzipped_bytes: 1 })
    }

    fn no_build(_zip: &[u8]) -> Result<CodeDisk, CodeError> {
        panic!("the disk is there")
    }

    fn files(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn content_of(disk: &Disk) -> Vec<u8> {
        let mut bytes = Vec::new();
        disk.reader().unwrap().read_to_end(&mut bytes).unwrap();
        bytes
    }

    /// A function of that name with `zip` as its code.
    fn deployed(store: &CodeStore, name: &str, zip: &[u8]) -> Function {
        let mut function = example(name);
        let upload = store.put(name, &function.envelope, zip, build).unwrap();
        function.code = upload.code.clone();
        upload.keep();
        function
    }

    fn store() -> (tempfile::TempDir, CodeStore) {
        let dir = tempfile::tempdir().unwrap();
        let store = CodeStore::open(dir.path().to_owned(), |_| true).unwrap();
        (dir, store)
    }

    #[test]
    fn what_no_record_names_goes() {
        let (dir, store) = store();
        let envelope = example("f").envelope;
        let upload = store.put("f", &envelope, b"zip", build).unwrap();
        assert_eq!((upload.code.sha256.len(), files(dir.path()).len()), (64, 2));
        drop(upload);
        assert!(files(dir.path()).is_empty());
        let function = deployed(&store, "f", b"zip");
        assert_eq!(files(dir.path()).len(), 2);
        store.remove(&function.code);
        assert!(files(dir.path()).is_empty());
        let error = store.put("f", &envelope, b"zip", |_| Err(CodeError::Empty)).unwrap_err();
        assert!(matches!(error, CodeError::Empty));
        assert!(files(dir.path()).is_empty());
    }

    #[test]
    fn opening_sweeps_what_nothing_claims() {
        let dir = tempfile::tempdir().unwrap();
        for name in
            ["aa.zip.sealed", "aa.erofs.sealed", "bb.zip.sealed", "aa.zip", "aa.1.part", "cc"]
        {
            fs::write(dir.path().join(name), b"x").unwrap();
        }
        CodeStore::open(dir.path().to_owned(), |blob| blob == "aa").unwrap();
        assert_eq!(files(dir.path()), ["aa.erofs.sealed", "aa.zip.sealed"]);
    }

    #[test]
    fn nothing_lies_in_the_clear_and_everything_comes_back() {
        let (dir, store) = store();
        let function = deployed(&store, "f", b"planted in an archive");
        for name in files(dir.path()) {
            let bytes = fs::read(dir.path().join(&name)).unwrap();
            let clear = |needle: &[u8]| bytes.windows(needle.len()).any(|w| w == needle);
            assert!(!clear(b"planted") && !clear(&CONTENT[..16]), "{name}");
        }
        assert_eq!(store.zip(&function).unwrap(), b"planted in an archive");
        let disk = store.disk(&function, no_build).unwrap();
        assert_eq!(content_of(&disk), CONTENT);
        // The second one is the same memory.
        fs::remove_dir_all(dir.path()).unwrap();
        store.disk(&function, no_build).unwrap();
        drop(disk);
        assert!(matches!(store.disk(&function, no_build), Err(LoadError::Read { .. })));
    }

    #[test]
    fn a_lost_or_damaged_disk_is_built_again() {
        let (_dir, store) = store();
        let function = deployed(&store, "f", b"zip");
        let path = store.path(&function.code, DISK);
        fs::remove_file(&path).unwrap();
        assert_eq!(content_of(&store.disk(&function, build).unwrap()), CONTENT);
        let mut bytes = fs::read(&path).unwrap();
        bytes[100] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert_eq!(content_of(&store.disk(&function, build).unwrap()), CONTENT);
        assert_eq!(content_of(&store.disk(&function, no_build).unwrap()), CONTENT);
    }

    #[test]
    fn a_disk_that_is_built_while_its_code_goes_goes_too() {
        let (dir, store) = store();
        let function = deployed(&store, "f", b"zip");
        fs::remove_file(store.path(&function.code, DISK)).unwrap();
        let gone = |zip: &[u8]| {
            store.remove(&function.code);
            build(zip)
        };
        store.disk(&function, gone).unwrap();
        assert_eq!(files(dir.path()), Vec::<String>::new());
    }

    #[test]
    fn code_of_others_and_altered_code_is_refused() {
        let (_dir, store) = store();
        let (one, two) = (deployed(&store, "one", b"zip 1"), deployed(&store, "two", b"zip 2"));
        let refused = |function: &Function| {
            assert!(store.zip(function).is_err());
            assert!(store.disk(function, build).is_err());
        };
        // Another function's blob, though both have the same key here.
        refused(&Function { code: one.code.clone(), ..two.clone() });
        let file = |function: &Function, kind| store.path(&function.code, kind);
        let good = fs::read(file(&one, ZIP)).unwrap();
        // Its files under the other one's names.
        fs::copy(file(&two, ZIP), file(&one, ZIP)).unwrap();
        refused(&one);
        // The disk's file as archive.
        fs::copy(file(&one, DISK), file(&one, ZIP)).unwrap();
        refused(&one);
        for at in [0, 20, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(file(&one, ZIP), bad).unwrap();
            refused(&one);
        }
        fs::write(file(&one, ZIP), &good).unwrap();
        store.zip(&one).unwrap();
        // Another key, another hash.
        let other = Envelope::generate(&TestKeys(9)).unwrap();
        refused(&Function { envelope: other, ..one.clone() });
        let code = Code { sha256: "00".repeat(32), ..one.code.clone() };
        refused(&Function { code, ..one.clone() });
        fs::copy(file(&two, DISK), file(&one, DISK)).unwrap();
        // A disk that is another's is not used, but built from the archive, which is right.
        let built = std::cell::Cell::new(false);
        store
            .disk(&one, |zip| {
                built.set(true);
                build(zip)
            })
            .unwrap();
        assert!(built.get());
    }

    #[test]
    fn an_archive_with_another_hash_is_refused() {
        let (_dir, store) = store();
        let mut function = deployed(&store, "f", b"zip");
        // Sealed by who has the key, for a record with this hash, but with other content.
        function.code.sha256 = "11".repeat(32);
        let Function { name, envelope, code, .. } = &function;
        store.write(name, envelope, code, ZIP, &mut &b"zip"[..]).unwrap();
        assert!(matches!(store.disk(&function, build), Err(LoadError::Hash { .. })));
    }

    /// What encryption adds to an upload and to a load:
    /// `cargo test --release -p firnd throughput -- --ignored --nocapture`.
    #[test]
    #[ignore = "a measurement"]
    fn throughput_of_uploads() {
        let (dir, store) = store();
        let mut seed = 1u64;
        let content: Vec<u8> = std::iter::repeat_with(|| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 56) as u8
        })
        .take(40 << 20)
        .collect();
        let path = dir.path().join("index.bin");
        fs::write(&path, &content).unwrap();
        let zipping = std::process::Command::new("python3")
            .args(["-m", "zipfile", "-c", "code.zip", "index.bin"])
            .current_dir(dir.path())
            .status();
        assert!(zipping.unwrap().success());
        let zip = fs::read(dir.path().join("code.zip")).unwrap();
        let time = |what: &str, work: &mut dyn FnMut()| {
            let start = std::time::Instant::now();
            work();
            println!("{what}: {:.0} ms", start.elapsed().as_secs_f64() * 1000.0);
        };
        let mut function = example("f");
        for _ in 0..3 {
            time("build, write and flush both files in the clear", &mut || {
                let disk = firn::code::build_disk(&zip).unwrap().disk;
                for (name, bytes) in [("zip", zip.clone()), ("erofs", content_of(&disk))] {
                    let mut file = File::create(dir.path().join(name)).unwrap();
                    file.write_all(&bytes).unwrap();
                    file.sync_all().unwrap();
                }
            });
            time("build, encrypt, write and flush", &mut || {
                let build = |zip: &[u8]| firn::code::build_disk(zip);
                let upload = store.put("f", &function.envelope, &zip, build).unwrap();
                function.code = upload.code.clone();
                upload.keep();
            });
            time("load: read both, decrypt, check SHA-256", &mut || {
                store.disk(&function, no_build).unwrap();
            });
        }
    }
}
