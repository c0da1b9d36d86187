//! Code disks: a function's zip archive, and those of its layers, as one read-only file system.
//!
//! It holds the function's code in `task` and its layers, one over the other, in `opt`: what the guest has as
//! `/var/task` and `/opt`.
//!
//! Archives are hostile. Their own numbers (sizes, counts) are only used to refuse them early; what
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

use self::archive::{Extracted, Summary};
use crate::{Disk, memfile, open::TEMPORARY};

/// Most bytes that the files of a function and its layers may have together, and most of one archive.
pub const MAX_UNZIPPED: u64 = 262_144_000;

/// Most files and directories of a function and its layers: bounds inodes and time.
pub const MAX_ENTRIES: usize = 100_000;

/// What [`build_disk`] made.
#[derive(Debug, Clone)]
pub struct CodeDisk {
    /// The file system.
    pub disk: Disk,
    /// Number of files and directories in the archives.
    pub entries: usize,
    /// Bytes of all files together.
    pub unzipped_bytes: u64,
}

/// Why an archive can't become a code disk.
#[derive(Debug, thiserror::Error)]
pub enum CodeError {
    /// The files are too large.
    #[error("unzipped size must be at most {limit} bytes")]
    UnzippedTooLarge {
        /// [`MAX_UNZIPPED`].
        limit: u64,
    },
    /// The files of a function and its layers are too large together.
    #[error("unzipped, code and layers must be at most {limit} bytes; they are {size}")]
    CombinedTooLarge {
        /// Bytes that the archives say they have.
        size: u64,
        /// [`MAX_UNZIPPED`].
        limit: u64,
    },
    /// More entries than any function needs.
    #[error("code and layers have {entries} entries; at most {limit} are allowed")]
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

/// Checks the archive of a function and those of its layers, and makes one read-only file system of them. The
/// same archives always give the same bytes. Where layers have the same file, the later one's counts.
/// Takes about twice the unzipped size in memory meanwhile. Where mounting is not permitted, as without
/// root, the trees lie in a temporary directory until it is done.
/// Blocks: call it where blocking is allowed.
///
/// # Errors
/// Any [`CodeError`]; nothing is left behind then.
pub fn build_disk(code: &[u8], layers: &[Vec<u8>]) -> Result<CodeDisk, CodeError> {
    // Mode 0700: nobody else sees a tree that is half there.
    let dir = tempfile::Builder::new().prefix(TEMPORARY).tempdir();
    let dir = dir.map_err(io_at("make a temporary directory"))?;
    let work = make_dir(dir.path(), "work")?;
    // In a thread of its own, because only that one and its children see what is mounted.
    let built = thread::scope(|scope| scope.spawn(|| build(code, layers, &work)).join());
    built.unwrap_or_else(|_| {
        Err(io_at("build a code disk")(io::Error::other("a bug: its thread panicked")))
    })
}

fn build(code: &[u8], layers: &[Vec<u8>], work: &Path) -> Result<CodeDisk, CodeError> {
    match mount_memory(work) {
        Err(Errno::PERM) => tracing::warn!("not permitted to mount: code is extracted to a disk"),
        other => other.map_err(|e| io_at("mount a file system in memory")(e.into()))?,
    }
    let tree = make_dir(work, "tree")?;
    let Extracted { entries, unzipped_bytes } =
        extract_all(code, layers, work, &tree, MAX_UNZIPPED)?;
    let file = memfile::create("firn-code").map_err(io_at("make a memory file"))?;
    make_file_system(&tree, &file)?;
    let disk_bytes = file.metadata().map_err(io_at("read the disk"))?.len();
    let mut made = File::from(memfile::reopen(&file).map_err(io_at("read the disk"))?);
    let disk = Disk::copy(&mut made, disk_bytes, "of code")
        .map_err(|e| CodeError::Mkfs { reason: e.to_string() })?;
    Ok(CodeDisk { disk, entries, unzipped_bytes })
}

/// Extracts the archives into `task` and `opt` of `tree`; their files may have `limit` bytes together. Layers
/// are put together in `work`.
fn extract_all(
    code: &[u8],
    layers: &[Vec<u8>],
    work: &Path,
    tree: &Path,
    limit: u64,
) -> Result<Extracted, CodeError> {
    let (task, opt) = (make_dir(tree, "task")?, make_dir(tree, "opt")?);
    // What they say of themselves is enough to be refused, before anything is unpacked.
    let Summary { mut entries, bytes: mut size } = archive::check(code, limit)?;
    for layer in layers {
        let claimed = archive::check(layer, limit)?;
        entries += claimed.entries;
        size += claimed.bytes;
    }
    if size > limit {
        return Err(CodeError::CombinedTooLarge { size, limit });
    }
    if entries > MAX_ENTRIES {
        return Err(CodeError::TooManyEntries { entries, limit: MAX_ENTRIES });
    }
    let mut unzipped_bytes = archive::extract(code, &task, limit)?.unzipped_bytes;
    // The last one first: what is there stays.
    for (index, layer) in layers.iter().enumerate().rev() {
        let apart = make_dir(work, &format!("layer-{index}"))?;
        let extracted = archive::extract(layer, &apart, limit - unzipped_bytes);
        let extracted = extracted.map_err(|error| match error {
            CodeError::UnzippedTooLarge { .. } => CodeError::UnzippedTooLarge { limit },
            other => other,
        })?;
        unzipped_bytes += extracted.unzipped_bytes;
        lay_under(&apart, &opt).map_err(io_at("put layers together"))?;
    }
    Ok(Extracted { entries, unzipped_bytes })
}

/// Moves what the directory `from` holds to `to`, but for what is there already; directories become one.
/// There are no links in either. It goes as deep as the names of archives may.
fn lay_under(from: &Path, to: &Path) -> io::Result<()> {
    let entries: Vec<_> = fs::read_dir(from)?.collect::<Result<_, _>>()?;
    for entry in entries {
        let place = to.join(entry.file_name());
        match fs::symlink_metadata(&place) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::rename(entry.path(), &place)?;
            }
            Err(error) => return Err(error),
            Ok(there) if there.is_dir() && entry.file_type()?.is_dir() => {
                lay_under(&entry.path(), &place)?;
            }
            Ok(_) => {}
        }
    }
    Ok(())
}

/// A new directory that everybody may read, whatever the umask.
fn make_dir(parent: &Path, name: &str) -> Result<PathBuf, CodeError> {
    let path = parent.join(name);
    fs::create_dir(&path)
        .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o755)))
        .map_err(io_at("make a temporary directory"))?;
    Ok(path)
}

/// Mounts a file system in memory on the directory `work`, for this thread and its children alone; it
/// goes with the last of them.
fn mount_memory(work: &Path) -> Result<(), Errno> {
    // SAFETY: the new namespace is this thread's; no descriptor table is unshared, so no other thread
    // loses what it has open.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS)? };
    let quiet = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", quiet)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    // As many files as archives may have, and the directories that they do not name.
    rustix::mount::mount(c"none", work, c"tmpfs", flags, c"mode=0755,nr_inodes=0")
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
    let Extracted { entries, unzipped_bytes } = archive::extract(zip, tree, MAX_UNZIPPED)?;
    Ok((entries, unzipped_bytes))
}

pub(super) fn io_at(what: &'static str) -> impl Fn(io::Error) -> CodeError {
    move |source| CodeError::Io { what: what.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::{
        archive::tests::{archive, replace},
        *,
    };

    /// Paths in what comes out, with the content of files.
    fn files(tree: &Path) -> BTreeMap<String, Option<String>> {
        let mut found = BTreeMap::new();
        let mut rest = vec![tree.to_owned()];
        while let Some(dir) = rest.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                let name = path.strip_prefix(tree).unwrap().to_str().unwrap().to_owned();
                match path.is_dir() {
                    true => rest.push(path),
                    false => drop(found.insert(name, fs::read_to_string(path).ok())),
                }
            }
        }
        found
    }

    fn extracted(
        code: &[u8],
        layers: &[Vec<u8>],
    ) -> Result<BTreeMap<String, Option<String>>, CodeError> {
        let work = tempfile::tempdir().unwrap();
        let tree = make_dir(work.path(), "tree").unwrap();
        extract_all(code, layers, work.path(), &tree, MAX_UNZIPPED)?;
        Ok(files(&tree))
    }

    #[test]
    fn later_layers_win_and_code_stays_apart() {
        let code = archive(&[("lib/a", b"code")]);
        let layers = [
            archive(&[("lib/a", b"1"), ("lib/only", b"1"), ("file", b"1"), ("dir/x", b"1")]),
            archive(&[("lib/a", b"2"), ("file/now/a/dir", b"2"), ("dir", b"2")]),
            archive(&[("lib/b", b"3"), ("empty/", b"")]),
        ];
        let expected = [
            ("opt/dir", "2"),
            ("opt/file/now/a/dir", "2"),
            ("opt/lib/a", "2"),
            ("opt/lib/b", "3"),
            ("opt/lib/only", "1"),
            ("task/lib/a", "code"),
        ];
        let expected = expected.map(|(name, text)| (name.to_owned(), Some(text.to_owned())));
        assert_eq!(extracted(&code, &layers).unwrap(), BTreeMap::from(expected));
    }

    #[test]
    fn layers_are_checked_like_code() {
        let code = archive(&[("a", b"1")]);
        let name = "xxevil";
        let mut escaping = archive(&[(name, b"x")]);
        for at in 0..escaping.len() - name.len() {
            if escaping[at..].starts_with(name.as_bytes()) {
                escaping[at..at + name.len()].copy_from_slice(b"../vil");
            }
        }
        let error = extracted(&code, &[code.clone(), escaping]).unwrap_err();
        assert!(matches!(error, CodeError::Entry { .. }), "{error}");
        let error = extracted(&code, &[b"no zip".to_vec()]).unwrap_err();
        assert!(matches!(error, CodeError::NotAZip { .. }), "{error}");
        // A layer's deepest names lie under one another.
        let deep = ["d/"; 500].concat() + "file";
        let layers = [archive(&[(&deep, b"1")]), archive(&[(&deep, b"2")])];
        let found = extracted(&code, &layers).unwrap();
        assert_eq!(found[&format!("opt/{deep}")].as_deref(), Some("2"));
    }

    #[test]
    fn all_archives_share_one_limit() {
        let code = archive(&[("large", &[0; 60_000])]);
        let layer = archive(&[("large", &[0; 40_000])]);
        let within = |layer: &Vec<u8>, limit| {
            let work = tempfile::tempdir().unwrap();
            let tree = make_dir(work.path(), "tree").unwrap();
            extract_all(&code, std::slice::from_ref(layer), work.path(), &tree, limit)
        };
        assert_eq!(within(&layer, 100_000).unwrap().unzipped_bytes, 100_000);
        let error = within(&layer, 99_999).unwrap_err();
        assert!(
            matches!(error, CodeError::CombinedTooLarge { size: 100_000, limit: 99_999 }),
            "{error}"
        );
        // What it claims fits: then what comes out counts.
        let mut understated = layer;
        assert_eq!(replace(&mut understated, 40_000, 39_999), 2);
        let error = within(&understated, 99_999).unwrap_err();
        assert!(
            matches!(
                error,
                CodeError::UnzippedTooLarge { limit: 99_999 } | CodeError::Damaged { .. }
            ),
            "{error}"
        );
    }

    #[test]
    fn the_same_layers_give_the_same_disk() {
        let code = archive(&[("a", b"code")]);
        let layers = [archive(&[("a", b"1"), ("d/b", b"1")]), archive(&[("d/b", b"2")])];
        let one = match build_disk(&code, &layers) {
            Err(CodeError::Mkfs { reason }) if reason.contains("not found") => {
                eprintln!("skipped: {reason}");
                return;
            }
            other => other.unwrap(),
        };
        assert_eq!((one.entries, one.unzipped_bytes), (4, 7));
        let read = |disk: &Disk| {
            let mut bytes = Vec::new();
            io::Read::read_to_end(&mut disk.reader().unwrap(), &mut bytes).unwrap();
            bytes
        };
        let two = build_disk(&code, &layers).unwrap();
        assert!(read(&one.disk) == read(&two.disk), "disks differ");
        let [first, second] = layers;
        let other = build_disk(&code, &[second, first]).unwrap();
        assert!(read(&one.disk) != read(&other.disk), "the order of layers made no difference");
    }
}
