//! Doors for the fuzzer (`fuzz/`) to parsers of hostile bytes that are no part of this crate's
//! interface. They exist only with the feature `fuzzing`, which nothing else may turn on.

use std::path::Path;

use crate::{SnapshotError, code::CodeError, snapshot};

/// Reads a snapshot's state file and writes it again.
///
/// # Errors
/// Any [`SnapshotError`] that its bytes can cause.
pub fn snapshot_state(bytes: &[u8]) -> Result<Vec<u8>, SnapshotError> {
    snapshot::reencode(bytes)
}

/// Checks an archive and extracts it into the empty directory `tree`; the number of entries and
/// of bytes that came out.
///
/// # Errors
/// Any [`CodeError`].
pub fn extract(zip: &[u8], tree: &Path) -> Result<(usize, u64), CodeError> {
    crate::code::extract(zip, tree)
}
