//! Doors for the fuzzer (`fuzz/`) to parsers of hostile bytes that are no part of this crate's
//! interface. They exist only with the feature `fuzzing`, which nothing else may turn on.

use std::{io::Write, os::unix::net::UnixStream, path::Path};

use firn_proto::guest::FromGuest;

use crate::{
    SnapshotError,
    code::CodeError,
    keys::{Key, KeyError, KeyService},
    snapshot,
    stream::Stream,
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

/// What the host makes of what a guest says, piece by piece, before it closes the connection: the messages
/// that are not output, and whether the guest kept to the protocol. All pieces together must fit into a
/// socket's buffer.
pub fn stream(pieces: &[&[u8]]) -> (Vec<FromGuest>, bool) {
    thread_local! {
        static RUNTIME: tokio::runtime::Runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .expect("a runtime without threads");
    }
    RUNTIME.with(|runtime| {
        runtime.block_on(async {
            let (mut stream, theirs) = Stream::pair().expect("a socket pair");
            let mut guest = UnixStream::from(theirs);
            for piece in pieces {
                guest.write_all(piece).expect("the socket has room");
            }
            drop(guest);
            let mut messages = Vec::new();
            loop {
                match stream.next().await {
                    Ok(Some(message)) => messages.push(message),
                    Ok(None) => return (messages, true),
                    Err(_) => return (messages, false),
                }
            }
        })
    })
}
