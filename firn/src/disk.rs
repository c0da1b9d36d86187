//! Read-only disks that guests are given: images, and functions' code.

use std::{
    fmt,
    fs::File,
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
};

use crate::memfile;

/// A read-only disk in sealed memory, so that what guests read is what was hashed, whatever becomes of
/// the file that it came from. Clones share it.
#[derive(Clone)]
pub struct Disk(Arc<Inner>);

struct Inner {
    file: File,
    bytes: u64,
    hash: blake3::Hash,
}

/// A [`Disk`] that goes when nobody else has it.
#[derive(Clone)]
pub struct WeakDisk(Weak<Inner>);

/// Why a file can't be a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It could not be read.
    #[error("can't read disk {}: {source}", path.display())]
    Read {
        /// The file, or what else it comes from.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no regular file.
    #[error("disk {} is not a regular file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// Disks consist of whole sectors.
    #[error("disk {} is {size} bytes long, which is not a multiple of 512 above 0", path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        size: u64,
    },
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { bytes, hash, .. } = &*self.0;
        f.debug_struct("Disk").field("bytes", bytes).field("hash", hash).finish_non_exhaustive()
    }
}

impl fmt::Debug for WeakDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WeakDisk")
    }
}

impl Disk {
    /// Copies the file at `path` into sealed memory. Blocks.
    ///
    /// # Errors
    /// Any [`DiskError`].
    pub fn load(path: impl AsRef<Path>) -> Result<Self, DiskError> {
        let path = path.as_ref();
        let open = || {
            // O_NONBLOCK: a pipe must not hang the open.
            let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
            let metadata = file.metadata()?;
            Ok((file, metadata))
        };
        let (mut file, metadata) =
            open().map_err(|source| DiskError::Read { path: path.to_owned(), source })?;
        if !metadata.is_file() {
            return Err(DiskError::NotAFile { path: path.to_owned() });
        }
        Self::copy(&mut file, metadata.len(), path)
    }

    /// Copies the next `length` bytes of `source` into sealed memory; `what` names it in errors.
    /// Blocks.
    ///
    /// # Errors
    /// [`DiskError::Read`], [`DiskError::Size`].
    pub fn copy(
        source: &mut impl Read,
        length: u64,
        what: impl AsRef<Path>,
    ) -> Result<Self, DiskError> {
        let path = what.as_ref();
        if length == 0 || !length.is_multiple_of(512) {
            return Err(DiskError::Size { path: path.to_owned(), size: length });
        }
        let (file, hash) = memfile::sealed_copy("firn-disk", source, length)
            .map_err(|source| DiskError::Read { path: path.to_owned(), source })?;
        Ok(Self(Arc::new(Inner { file, bytes: length, hash })))
    }

    /// Its content, from the start.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub fn reader(&self) -> io::Result<impl Read + use<>> {
        memfile::reopen(&self.0.file).map(File::from)
    }

    /// Its length in bytes.
    pub fn bytes(&self) -> u64 {
        self.0.bytes
    }

    /// A reference that does not keep it in memory.
    pub fn downgrade(&self) -> WeakDisk {
        WeakDisk(Arc::downgrade(&self.0))
    }

    pub(crate) fn file(&self) -> &File {
        &self.0.file
    }

    /// Hash of the whole content.
    pub(crate) fn hash(&self) -> blake3::Hash {
        self.0.hash
    }
}

impl WeakDisk {
    /// The disk, if somebody still has it.
    pub fn upgrade(&self) -> Option<Disk> {
        self.0.upgrade().map(Disk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_by_name_what_is_no_disk() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        assert!(matches!(Disk::load(&path), Err(DiskError::Read { .. })));
        assert!(matches!(Disk::load(dir.path()), Err(DiskError::NotAFile { .. })));
        for size in [0, 100] {
            std::fs::write(&path, vec![0; size]).unwrap();
            let error = Disk::load(&path).unwrap_err();
            assert!(matches!(error, DiskError::Size { size: s, .. } if s == size as u64));
        }
    }

    #[test]
    fn what_becomes_of_the_file_does_not_matter() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, [7; 1024]).unwrap();
        let disk = Disk::load(&path).unwrap();
        std::fs::write(&path, [8; 512]).unwrap();
        let mut content = Vec::new();
        disk.reader().unwrap().read_to_end(&mut content).unwrap();
        assert_eq!((content, disk.bytes()), (vec![7; 1024], 1024));
        assert_eq!(disk.hash(), blake3::hash(&[7; 1024]));
        let weak = disk.downgrade();
        assert_eq!(weak.upgrade().unwrap().hash(), disk.hash());
        drop(disk);
        assert!(weak.upgrade().is_none());
    }

    /// What opening a host costs an image, before and since it is copied:
    /// `cargo test --release -p firn --lib throughput -- --ignored --nocapture`.
    #[test]
    #[ignore = "a measurement"]
    fn throughput_of_images() {
        let mut image = tempfile::NamedTempFile::new().unwrap();
        let content: Vec<u8> = (0..64u32 << 18).flat_map(u32::to_le_bytes).collect();
        io::Write::write_all(&mut image, &content).unwrap();
        let best = |work: &dyn Fn()| {
            let times = (0..5).map(|_| {
                let start = std::time::Instant::now();
                work();
                start.elapsed().as_secs_f64() * 1000.0
            });
            times.fold(f64::MAX, f64::min)
        };
        let file = image.as_file();
        println!("hash 64 MiB: {:.1} ms", best(&|| _ = crate::snapshot::hash_file(file).unwrap()));
        println!("load 64 MiB: {:.1} ms", best(&|| drop(Disk::load(image.path()).unwrap())));
    }
}
