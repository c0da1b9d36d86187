//! Runtime images: read-only root file systems, found once when the host opens.

use std::{path::PathBuf, sync::Arc};

use crate::Disk;

/// A runtime's root file system. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Image(pub(crate) Arc<ImageInner>);

#[derive(Debug)]
pub(crate) struct ImageInner {
    pub(crate) runtime: String,
    pub(crate) description: String,
    pub(crate) rootfs: Disk,
    pub(crate) hash: blake3::Hash,
}

impl Image {
    /// The runtime's name, e.g. `python3.11`.
    pub fn runtime(&self) -> &str {
        &self.0.runtime
    }

    /// What its maker says about it.
    pub fn description(&self) -> &str {
        &self.0.description
    }

    /// Hash of the root file system in hexadecimal.
    pub fn hash(&self) -> String {
        self.0.hash.to_hex().to_string()
    }
}

/// Why there is no such image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The installation has none of that name.
    #[error("no image for runtime {runtime:?}; installed: {}", installed.join(", "))]
    Unknown {
        /// What was asked for.
        runtime: String,
        /// What there is.
        installed: Vec<String>,
    },
    /// Its `image.json` is not what it should be.
    #[error("{}: {reason}", path.display())]
    Description {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Its root file system can't be used.
    #[error(transparent)]
    Disk(#[from] crate::DiskError),
    /// It could not be read.
    #[error("can't read {}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}
