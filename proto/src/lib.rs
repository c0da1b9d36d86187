//! Firn's two wire protocols, and nothing else: this crate is all that the host, the VMM and the
//! guest init share. What host and VMM need alike of pages and of the kernel is in `firn-pages`.
//!
//! - [`control`]: host ↔ `firn-vmm`, one datagram a message on a `SOCK_SEQPACKET` socket, with
//!   descriptors.
//! - [`guest`]: host ↔ `firn-init`, length-prefixed frames on one vsock stream that survives a
//!   snapshot.
//!
//! Every message is [postcard](https://postcard.jamesmunns.com/wire-format) behind a length that
//! is checked before anything is allocated. Neither side trusts the other: decoding returns typed
//! errors, never panics, and never reads past the bytes that it was given.

pub mod control;
pub mod guest;

use serde::{Serialize, de::DeserializeOwned};

/// A message that could not be encoded or decoded.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CodecError {
    /// The message is longer than its protocol allows.
    #[error("message of {size} bytes exceeds the limit of {limit}")]
    TooLong {
        /// Bytes that were claimed or needed.
        size: usize,
        /// The protocol's limit in bytes.
        limit: usize,
    },
    /// The bytes are no message of this protocol version.
    #[error("malformed message: {0}")]
    Malformed(String),
    /// Bytes follow the message.
    #[error("{0} bytes follow the message")]
    Trailing(usize),
}

fn encode<T: Serialize>(message: &T, buffer: Vec<u8>, limit: usize) -> Result<Vec<u8>, CodecError> {
    let start = buffer.len();
    let bytes =
        postcard::to_extend(message, buffer).map_err(|e| CodecError::Malformed(e.to_string()))?;
    let size = bytes.len() - start;
    if size > limit {
        return Err(CodecError::TooLong { size, limit });
    }
    Ok(bytes)
}

fn decode<T: DeserializeOwned>(bytes: &[u8], limit: usize) -> Result<T, CodecError> {
    if bytes.len() > limit {
        return Err(CodecError::TooLong { size: bytes.len(), limit });
    }
    let (message, rest) =
        postcard::take_from_bytes(bytes).map_err(|e| CodecError::Malformed(e.to_string()))?;
    if !rest.is_empty() {
        return Err(CodecError::Trailing(rest.len()));
    }
    Ok(message)
}
