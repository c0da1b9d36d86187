//! Code of functions and layers on disk, encrypted with their keys: each upload as `code/<blob>.zip.sealed`,
//! and what guests mount, a function's code together with its layers, as `code/<disk>.disk.sealed`.
//!
//! Files are complete and durable before any record names them, and go when it does not any more.
//! Each is bound to its owner, upload, layers and kind, so none can stand in for another. They are decrypted
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

/// What follows a blob's or disk's name in that of its file.
const ZIP: &str = "zip.sealed";
const DISK: &str = "disk.sealed";

/// The directory of code. Cheap to clone.
#[derive(Debug, Clone)]
pub struct CodeStore {
    dir: PathBuf,
    /// Disks that somebody uses, by their names.
    disks: Arc<Mutex<HashMap<String, WeakDisk>>>,
}

/// Files that no record names yet: they go again unless they are kept.
#[derive(Debug, Default)]
pub struct Pending(Vec<PathBuf>);

impl Pending {
    /// A record names them now.
    pub fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.0.iter().for_each(|path| remove(path));
    }
}

/// Why there is no code to run.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file of it can't be read, or is not what was written.
    #[error("the code can't be read ({}): {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is another archive than the record says.
    #[error("the code has SHA-256 {found}, not {expected}")]
    Hash {
        /// The record's.
        expected: String,
        /// The archive's.
        found: String,
    },
    /// There is no record of a layer.
    #[error("there is no layer {name:?} with version {version}")]
    Layer {
        /// Its name.
        name: String,
        /// Its version.
        version: u32,
    },
    /// No disk can be made of it any more.
    #[error(transparent)]
    Build(#[from] CodeError),
}

impl CodeStore {
    /// Opens the directory, making it if needed, and removes archives and disks that nobody uses.
    ///
    /// # Errors
    /// The directory can't be made or read.
    pub fn open(
        dir: PathBuf,
        uses_code: impl Fn(&str) -> bool,
        uses_disk: impl Fn(&str) -> bool,
    ) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            let used = match name.split_once('.') {
                Some((blob, ZIP)) => uses_code(blob),
                Some((disk, DISK)) => uses_disk(disk),
                _ => false,
            };
            if !used {
                remove(&path);
            }
        }
        Ok(Self { dir, disks: Arc::default() })
    }

    /// Stores an archive of `owner`, a function or a layer.
    ///
    /// # Errors
    /// It can't be written; nothing is left behind then.
    pub fn put(
        &self,
        owner: &str,
        envelope: &Envelope,
        zip: &[u8],
        pending: &mut Pending,
    ) -> io::Result<Code> {
        let blob = uuid::Uuid::new_v4().simple().to_string();
        let code = Code { sha256: sha256(zip), size: zip.len() as u64, blob };
        let context = context(owner, &code.blob, &code.sha256, ZIP);
        let path = self.path(&code.blob, ZIP);
        self.write(&path, envelope, &context, &mut &*zip)?;
        pending.0.push(path);
        Ok(code)
    }

    /// Stores what was built for `function`, whose record may not be written yet.
    ///
    /// # Errors
    /// It can't be written; nothing is left behind then.
    pub fn put_disk(
        &self,
        function: &Function,
        disk: &Disk,
        pending: &mut Pending,
    ) -> io::Result<()> {
        let path = self.path(&function.disk(), DISK);
        // A version that has the same code and layers has it: it is not ours to remove.
        if !path.exists() {
            self.write_disk(function, disk)?;
            pending.0.push(path);
        }
        Ok(())
    }

    /// The disk of a function's code and layers, from memory if somebody uses it already. If its file is
    /// gone or damaged it is built anew: archives alone count.
    ///
    /// # Errors
    /// Any [`LoadError`].
    pub fn disk(
        &self,
        function: &Function,
        build: impl FnOnce(&[u8]) -> Result<CodeDisk, LoadError>,
    ) -> Result<Disk, LoadError> {
        let name = function.disk();
        if let Some(disk) = self.disks().get(&name).and_then(WeakDisk::upgrade) {
            return Ok(disk);
        }
        // At each load, also when the disk is there: what runs is what `CodeSha256` says, or nothing.
        let zip = self.zip(function)?;
        let disk = match self.read_disk(function) {
            Ok(disk) => disk,
            Err(error) => {
                tracing::warn!(function = function.name, %error, "building its code disk anew");
                let disk = build(&zip)?.disk;
                let path = self.path(&name, DISK);
                self.write_disk(function, &disk)
                    .map_err(|source| LoadError::Read { path: path.clone(), source })?;
                // The function may have been deleted meanwhile. Its archive goes first, so either it
                // is gone here, or this disk goes after it. If its layers have changed, the next start
                // of the daemon finds the disk.
                if !self.path(&function.code.blob, ZIP).exists() {
                    remove(&path);
                }
                disk
            }
        };
        let mut disks = self.disks();
        disks.retain(|_, disk| disk.upgrade().is_some());
        disks.insert(name, disk.downgrade());
        Ok(disk)
    }

    /// A function's code as it was uploaded.
    ///
    /// # Errors
    /// [`LoadError::Read`], [`LoadError::Hash`].
    pub fn zip(&self, function: &Function) -> Result<Vec<u8>, LoadError> {
        self.archive(&function.name, &function.envelope, &function.code)
    }

    /// An archive of `owner` as it was uploaded.
    ///
    /// # Errors
    /// [`LoadError::Read`], [`LoadError::Hash`].
    pub fn archive(
        &self,
        owner: &str,
        envelope: &Envelope,
        code: &Code,
    ) -> Result<Vec<u8>, LoadError> {
        let path = self.path(&code.blob, ZIP);
        let context = context(owner, &code.blob, &code.sha256, ZIP);
        let mut zip = Vec::new();
        open_sealed(&path, envelope, &context)
            .and_then(|(mut reader, _)| reader.read_to_end(&mut zip))
            .map_err(|source| LoadError::Read { path, source })?;
        let (expected, found) = (code.sha256.clone(), sha256(&zip));
        match expected == found {
            true => Ok(zip),
            false => Err(LoadError::Hash { expected, found }),
        }
    }

    /// Removes an archive that no record names any more; before the disks that were built of it.
    pub fn remove_archive(&self, code: &Code) {
        remove(&self.path(&code.blob, ZIP));
    }

    /// Removes the disk of that name. Running instances keep what they have.
    pub fn remove_disk(&self, name: &str) {
        remove(&self.path(name, DISK));
    }

    fn disks(&self) -> std::sync::MutexGuard<'_, HashMap<String, WeakDisk>> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, name: &str, kind: &str) -> PathBuf {
        self.dir.join(format!("{name}.{kind}"))
    }

    fn read_disk(&self, function: &Function) -> Result<Disk, LoadError> {
        let Function { name, envelope, code, .. } = function;
        let disk = function.disk();
        let path = self.path(&disk, DISK);
        let read = || {
            let context = context(name, &disk, &code.sha256, DISK);
            let (mut reader, length) = open_sealed(&path, envelope, &context)?;
            let disk = Disk::copy(&mut reader, length, &path).map_err(io::Error::other)?;
            reader.finish()?;
            Ok(disk)
        };
        read().map_err(|source| LoadError::Read { path: path.clone(), source })
    }

    fn write_disk(&self, function: &Function, disk: &Disk) -> io::Result<()> {
        let Function { name, envelope, code, .. } = function;
        let disk_name = function.disk();
        let context = context(name, &disk_name, &code.sha256, DISK);
        let path = self.path(&disk_name, DISK);
        self.write(&path, envelope, &context, &mut disk.reader()?)
    }

    /// Writes a file so that it is either whole and durable, or not there.
    fn write(
        &self,
        path: &Path,
        envelope: &Envelope,
        context: &[&[u8]],
        content: &mut dyn Read,
    ) -> io::Result<()> {
        let temporary = path.with_extension(format!("{}.part", uuid::Uuid::new_v4()));
        let mut write = || {
            let file = BufWriter::with_capacity(1 << 20, File::create_new(&temporary)?);
            let mut writer = SealWriter::new(file, &envelope.code, context)?;
            io::copy(content, &mut writer)?;
            let mut file = writer.finish()?;
            file.flush()?;
            file.get_ref().sync_all()?;
            fs::rename(&temporary, path)?;
            File::open(&self.dir)?.sync_all()
        };
        write().inspect_err(|_| drop(fs::remove_file(&temporary)))
    }
}

/// A reader of a file, and the length of what comes out.
fn open_sealed(
    path: &Path,
    envelope: &Envelope,
    context: &[&[u8]],
) -> io::Result<(SealReader<BufReader<File>>, u64)> {
    let file = File::open(path)?;
    let length = plain_length(file.metadata()?.len());
    let file = BufReader::with_capacity(1 << 20, file);
    Ok((SealReader::new(file, &envelope.code, context)?, length))
}

/// What a file is bound to. The name of a disk stands for its layers, too.
fn context<'a>(owner: &'a str, name: &'a str, sha256: &'a str, kind: &'a str) -> [&'a [u8]; 5] {
    [b"firnd code", kind.as_bytes(), owner.as_bytes(), name.as_bytes(), sha256.as_bytes()]
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
    use crate::{
        envelope::tests::TestKeys,
        function::tests::{example, layer},
    };

    const CONTENT: [u8; 1024] = [0x5a; 1024];

    fn build(_zip: &[u8]) -> Result<CodeDisk, LoadError> {
        let disk = Disk::copy(&mut &CONTENT[..], 1024, "of a test").unwrap();
        Ok(CodeDisk { disk, entries: 1, unzipped_bytes: 1 })
    }

    fn no_build(_zip: &[u8]) -> Result<CodeDisk, LoadError> {
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
        put(store, &mut function, zip).keep();
        function
    }

    fn put(store: &CodeStore, function: &mut Function, zip: &[u8]) -> Pending {
        let mut pending = Pending::default();
        let Function { name, envelope, .. } = &*function;
        function.code = store.put(name, envelope, zip, &mut pending).unwrap();
        store.put_disk(function, &build(zip).unwrap().disk, &mut pending).unwrap();
        pending
    }

    fn store() -> (tempfile::TempDir, CodeStore) {
        let dir = tempfile::tempdir().unwrap();
        let store = CodeStore::open(dir.path().to_owned(), |_| true, |_| true).unwrap();
        (dir, store)
    }

    #[test]
    fn what_no_record_names_goes() {
        let (dir, store) = store();
        let mut function = example("f");
        let pending = put(&store, &mut function, b"zip");
        assert_eq!((function.code.sha256.len(), files(dir.path()).len()), (64, 2));
        drop(pending);
        assert!(files(dir.path()).is_empty());
        let function = deployed(&store, "f", b"zip");
        assert_eq!(files(dir.path()).len(), 2);
        // What was there before is not taken along.
        let mut pending = Pending::default();
        store.put_disk(&function, &build(b"").unwrap().disk, &mut pending).unwrap();
        drop(pending);
        assert_eq!(files(dir.path()).len(), 2);
        store.remove_archive(&function.code);
        store.remove_disk(&function.disk());
        assert!(files(dir.path()).is_empty());
    }

    #[test]
    fn opening_sweeps_what_nothing_claims() {
        let dir = tempfile::tempdir().unwrap();
        for name in
            ["aa.zip.sealed", "aa.disk.sealed", "aa-1.disk.sealed", "bb.zip.sealed", "aa.zip", "cc"]
        {
            fs::write(dir.path().join(name), b"x").unwrap();
        }
        CodeStore::open(dir.path().to_owned(), |blob| blob == "aa", |disk| disk == "aa-1").unwrap();
        assert_eq!(files(dir.path()), ["aa-1.disk.sealed", "aa.zip.sealed"]);
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
        let path = store.path(&function.disk(), DISK);
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
        fs::remove_file(store.path(&function.disk(), DISK)).unwrap();
        let gone = |zip: &[u8]| {
            store.remove_archive(&function.code);
            store.remove_disk(&function.disk());
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
        let file = |function: &Function, kind| store.path(&function.code.blob, kind);
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
        let context = context(name, &code.blob, &code.sha256, ZIP);
        let path = store.path(&code.blob, ZIP);
        store.write(&path, envelope, &context, &mut &b"zip"[..]).unwrap();
        assert!(matches!(store.disk(&function, build), Err(LoadError::Hash { .. })));
    }

    #[test]
    fn a_disk_is_of_its_layers_alone() {
        let (_dir, store) = store();
        let plain = deployed(&store, "f", b"zip");
        let mut layered = plain.clone();
        layered.config.layers.push(layer(1));
        let built = std::cell::Cell::new(0);
        let count = |zip: &[u8]| {
            built.set(built.get() + 1);
            build(zip)
        };
        let disk = store.disk(&plain, count).unwrap();
        drop(store.disk(&layered, count).unwrap());
        assert_eq!(built.get(), 1, "layers make another disk");
        let mut other = plain.clone();
        other.config.layers.push(layer(2));
        // The disk with one layer under the name of that with another.
        let file = |function: &Function| store.path(&function.disk(), DISK);
        fs::copy(file(&layered), file(&other)).unwrap();
        store.disk(&other, count).unwrap();
        assert_eq!(built.get(), 2);
        drop(disk);
        store.disk(&layered, no_build).unwrap();
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
                let disk = firn::code::build_disk(&zip, &[]).unwrap().disk;
                for (name, bytes) in [("zip", zip.clone()), ("erofs", content_of(&disk))] {
                    let mut file = File::create(dir.path().join(name)).unwrap();
                    file.write_all(&bytes).unwrap();
                    file.sync_all().unwrap();
                }
            });
            time("build, encrypt, write and flush", &mut || {
                let disk = firn::code::build_disk(&zip, &[]).unwrap().disk;
                let mut pending = Pending::default();
                function.code = store.put("f", &function.envelope, &zip, &mut pending).unwrap();
                store.put_disk(&function, &disk, &mut pending).unwrap();
                pending.keep();
            });
            time("load: read both, decrypt, check SHA-256", &mut || {
                store.disk(&function, no_build).unwrap();
            });
        }
    }
}
