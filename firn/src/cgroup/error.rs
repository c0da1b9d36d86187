//! Why control groups can't be used.

use std::{
    io,
    path::{Path, PathBuf},
};

/// Why there are no usable control groups.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CgroupError {
    #[error("no hierarchy has the controller {0} (is a cgroup file system mounted?)")]
    Missing(&'static str),
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// Adds the file to an error.
pub(super) fn at(path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::Io { path, source }
}
