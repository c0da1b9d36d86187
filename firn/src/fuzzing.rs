//! Doors for the fuzzer (`fuzz/`) to parsers of hostile bytes that are no part of this crate's
//! interface. They exist only with the feature `fuzzing`, which nothing else may turn on.

use std::path::Path;

use crate::{
    SnapshotError,
    code::CodeError,
    keys::{Key, KeyError, KeyService},
    snapshot,
};

/// Every key is the same, and what it is wrapped into does not matter.
#[derive(Debug)]
struct FuzzKeys;

impl KeyService for FuzzKeys {
    fn generate_data_key(&self) -> Result<(Key, Vec<u8>), KeyError> {
        Ok((Key::from_bytes([0x5a; 32]), b"fuzz".to_vec()))
    }

    fn unwrap(&self, _wrapped: &[u8]) -> Result<Key, KeyError> {
        Ok(Key::from_bytes([0x5a; 32]))
    }
}

/// Reads a snapshot's state file and writes it again, unencrypted.
///
/// # Errors
/// Any [`SnapshotError`] that its bytes can cause.
pub fn snapshot_state(bytes: &[u8]) -> Result<Vec<u8>, SnapshotError> {
    snapshot::reencode(bytes, &FuzzKeys)
}

/// The tag that makes `bytes` an authentic state file to [`snapshot_state`].
///
/// # Errors
/// None that depends on the bytes.
pub fn sign(bytes: &[u8]) -> Result<[u8; 32], SnapshotError> {
    snapshot::sign(bytes, &FuzzKeys)
}

/// Checks an archive and extracts it into the empty directory `tree`; the number of entries and
/// of bytes that came out.
///
/// # Errors
/// Any [`CodeError`].
pub fn extract(zip: &[u8], tree: &Path) -> Result<(usize, u64), CodeError> {
    crate::code::extract(zip, tree)
}
