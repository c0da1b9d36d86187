//! Read-only disks that a guest may be given: a function's code.

use std::{
    fs::File,
    io,
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

/// A read-only disk. Clones share one open file; its content must not change while it is in use.
#[derive(Debug, Clone)]
pub struct Disk(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    file: File,
    path: PathBuf,
    hash: OnceLock<blake3::Hash>,
}

/// Why a file can't be a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It could not be opened.
    #[error("can't open disk {}: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is neither a regular file nor a block device.
    #[error("disk {} is neither a file nor a block device", path.display())]
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

impl Disk {
    /// Opens the file at `path`.
    ///
    /// # Errors
    /// Any [`DiskError`].
    pub fn open_read_only(path: impl AsRef<Path>) -> Result<Self, DiskError> {
        let path = path.as_ref().to_owned();
        let open = |path: &Path| {
            // O_NONBLOCK: a pipe must not hang the open.
            let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
            let metadata = file.metadata()?;
            Ok((file, metadata))
        };
        let (file, metadata) =
            open(&path).map_err(|source| DiskError::Open { path: path.clone(), source })?;
        if !metadata.is_file() && !metadata.file_type().is_block_device() {
            return Err(DiskError::NotAFile { path });
        }
        let size = metadata.size();
        if metadata.is_file() && (size == 0 || size % 512 != 0) {
            return Err(DiskError::Size { path, size });
        }
        Ok(Self(Arc::new(Inner { file, path, hash: OnceLock::new() })))
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    pub(crate) fn file(&self) -> &File {
        &self.0.file
    }

    /// Hash of the whole content; the first call reads it all.
    pub(crate) fn hash(&self) -> io::Result<blake3::Hash> {
        if let Some(hash) = self.0.hash.get() {
            return Ok(*hash);
        }
        let hash = crate::snapshot::hash_file(&self.0.file)?;
        Ok(*self.0.hash.get_or_init(|| hash))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_by_name_what_is_no_disk() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        assert!(matches!(Disk::open_read_only(&path), Err(DiskError::Open { .. })));
        assert!(matches!(Disk::open_read_only(dir.path()), Err(DiskError::NotAFile { .. })));
        std::fs::write(&path, [0; 100]).unwrap();
        assert!(matches!(Disk::open_read_only(&path), Err(DiskError::Size { size: 100, .. })));
        std::fs::write(&path, [7; 1024]).unwrap();
        let disk = Disk::open_read_only(&path).unwrap();
        assert_eq!(disk.hash().unwrap(), blake3::hash(&[7; 1024]));
    }
}
