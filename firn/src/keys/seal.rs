//! Encryption of bytes with a data key: short ones at once, files in chunks.
//!
//! Both are XChaCha20-Poly1305 with a random nonce (24 bytes; of a file's, 19, and the chunk's number
//! and whether it is the last for the rest: Rogaway's STREAM). So nonces never repeat, and a file whose
//! chunks were altered, swapped, repeated, left out or cut off can't be opened. All is bound to a
//! *context*, which is not stored: what it is and whose. Bytes that were sealed for one place can't be
//! opened in another.
//!
//! ```text
//! file:  0   8  "FIRNSEAL"
//!        8   4  version (1), u32 little-endian
//!       12  19  nonce
//!       31      chunks: 64 KiB encrypted (the last one: less), each followed by its tag, 16 bytes
//! ```

use std::io::{self, Read, Write};

use aead_stream::{NewStream, StreamBE32, StreamPrimitive};
use chacha20poly1305::{
    KeyInit, XChaCha20Poly1305, XNonce,
    aead::{Aead, Payload, array::Array},
};
use zeroize::Zeroizing;

use super::{Key, KeyError, fill_random};

const MAGIC: &[u8; 8] = b"FIRNSEAL";
const VERSION: u32 = 1;

/// Bytes of a nonce of short bytes.
const NONCE: usize = 24;

/// Random bytes of a file's nonces.
const PREFIX: usize = 19;

const HEAD: usize = 12 + PREFIX;

/// Bytes of a chunk before encryption.
const CHUNK: usize = 64 << 10;

const TAG: usize = 16;

// Tripwires: whoever changes one of these changes the format and must raise VERSION.
const _: () = assert!(HEAD == 31 && PREFIX + 5 == NONCE);
const _: () = assert!(CHUNK == 65_536 && TAG == 16);

/// Parts with their lengths, so that no two lists run together.
fn joined(context: &[&[u8]]) -> Vec<u8> {
    let mut joined = Vec::with_capacity(context.iter().map(|part| part.len() + 8).sum());
    for part in context {
        joined.extend((part.len() as u64).to_le_bytes());
        joined.extend(*part);
    }
    joined
}

fn altered() -> KeyError {
    KeyError::Altered { what: "encrypted data" }
}

impl Key {
    fn cipher(&self) -> XChaCha20Poly1305 {
        XChaCha20Poly1305::new(&Array::from(*self.as_bytes()))
    }

    /// Encrypts `plain`, 40 bytes longer then, for `context`.
    ///
    /// # Errors
    /// [`KeyError::Random`], [`KeyError::TooLong`].
    pub fn seal(&self, context: &[&[u8]], plain: &[u8]) -> Result<Vec<u8>, KeyError> {
        let mut nonce = [0; NONCE];
        fill_random(&mut nonce)?;
        let payload = Payload { msg: plain, aad: &joined(context) };
        let sealed = self.cipher().encrypt(&XNonce::from(nonce), payload);
        Ok([nonce.as_slice(), &sealed.map_err(|_| KeyError::TooLong)?].concat())
    }

    /// What [`Key::seal`] was given, with the same key and context. Wiped when it goes.
    ///
    /// # Errors
    /// [`KeyError::Altered`].
    pub fn open(&self, context: &[&[u8]], sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, KeyError> {
        let (nonce, sealed) = sealed.split_first_chunk::<NONCE>().ok_or_else(altered)?;
        let payload = Payload { msg: sealed, aad: &joined(context) };
        let opened = self.cipher().decrypt(&XNonce::from(*nonce), payload);
        opened.map(Zeroizing::new).map_err(|_| altered())
    }
}

/// Length of a sealed file of `plain` bytes.
pub fn sealed_length(plain: u64) -> u64 {
    HEAD as u64 + plain + plain.div_ceil(CHUNK as u64).max(1) * TAG as u64
}

/// Length of what comes out of a sealed file of `sealed` bytes, if it is whole.
pub fn plain_length(sealed: u64) -> u64 {
    let body = sealed.saturating_sub(HEAD as u64);
    body.saturating_sub(body.div_ceil((CHUNK + TAG) as u64) * TAG as u64)
}

/// The chunks of one file: their cipher, and where they are.
struct Chunks {
    stream: StreamBE32<XChaCha20Poly1305>,
    context: Vec<u8>,
    next: u32,
}

impl Chunks {
    fn new(key: &Key, context: &[&[u8]], prefix: [u8; PREFIX]) -> Self {
        let stream = StreamBE32::from_aead(key.cipher(), &Array::from(prefix));
        Self { stream, context: joined(context), next: 0 }
    }

    /// Number of the next chunk; a file has at most 2^32 - 1, 256 TiB.
    fn advance(&mut self) -> Result<u32, KeyError> {
        let position = self.next;
        self.next = position.checked_add(1).ok_or(KeyError::TooLong)?;
        Ok(position)
    }

    fn encrypt(&mut self, chunk: &mut Vec<u8>, last: bool) -> Result<(), KeyError> {
        let position = self.advance()?;
        let sealed = self.stream.encrypt_in_place(position, last, &self.context, chunk);
        sealed.map_err(|_| KeyError::TooLong)
    }

    fn decrypt(&mut self, chunk: &mut Vec<u8>, last: bool) -> Result<(), KeyError> {
        let position = self.advance()?;
        let opened = self.stream.decrypt_in_place(position, last, &self.context, chunk);
        opened.map_err(|_| altered())
    }
}

/// Encrypts what is written into it. Whole only after [`SealWriter::finish`].
pub struct SealWriter<W> {
    target: W,
    chunks: Chunks,
    chunk: Vec<u8>,
}

impl<W: Write> SealWriter<W> {
    /// Writes a new sealed file for `context` into `target`.
    ///
    /// # Errors
    /// Whatever `target` says, or that there are no random bytes.
    pub fn new(mut target: W, key: &Key, context: &[&[u8]]) -> io::Result<Self> {
        let mut prefix = [0; PREFIX];
        fill_random(&mut prefix).map_err(io::Error::other)?;
        target.write_all(MAGIC)?;
        target.write_all(&VERSION.to_le_bytes())?;
        target.write_all(&prefix)?;
        let chunks = Chunks::new(key, context, prefix);
        Ok(Self { target, chunks, chunk: Vec::with_capacity(CHUNK + TAG) })
    }

    fn end_chunk(&mut self, last: bool) -> io::Result<()> {
        self.chunks.encrypt(&mut self.chunk, last).map_err(io::Error::other)?;
        self.target.write_all(&self.chunk)?;
        self.chunk.clear();
        Ok(())
    }

    /// Writes the last chunk, and gives the target back.
    ///
    /// # Errors
    /// Whatever the target says.
    pub fn finish(mut self) -> io::Result<W> {
        self.end_chunk(true)?;
        Ok(self.target)
    }
}

impl<W: Write> Write for SealWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A full chunk is the last one until there is more.
        if self.chunk.len() == CHUNK && !bytes.is_empty() {
            self.end_chunk(false)?;
        }
        let taken = bytes.len().min(CHUNK - self.chunk.len());
        self.chunk.extend_from_slice(&bytes[..taken]);
        Ok(taken)
    }

    /// Does nothing: an unfinished chunk can't be written.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Decrypts a sealed file. Each byte that it gives has been authenticated, and so has the end.
/// Alterations are errors of kind [`io::ErrorKind::InvalidData`] with a [`KeyError`] in them.
pub struct SealReader<R> {
    source: R,
    chunks: Chunks,
    /// Sealed, not opened yet; empty at the end.
    ahead: Vec<u8>,
    /// Opened.
    chunk: Zeroizing<Vec<u8>>,
    given: usize,
}

impl<R: Read> SealReader<R> {
    /// Reads the head of a file that was sealed for `context`.
    ///
    /// # Errors
    /// Whatever `source` says, or that it is no sealed file.
    pub fn new(mut source: R, key: &Key, context: &[&[u8]]) -> io::Result<Self> {
        let invalid = || io::Error::new(io::ErrorKind::InvalidData, altered());
        let mut head = Vec::with_capacity(HEAD);
        (&mut source).take(HEAD as u64).read_to_end(&mut head)?;
        let prefix = head
            .strip_prefix(MAGIC)
            .and_then(|rest| rest.strip_prefix(&VERSION.to_le_bytes()))
            .and_then(|prefix| <[u8; PREFIX]>::try_from(prefix).ok())
            .ok_or_else(invalid)?;
        let ahead = Vec::with_capacity(CHUNK + TAG);
        let chunk = Zeroizing::new(Vec::with_capacity(CHUNK + TAG));
        let chunks = Chunks::new(key, context, prefix);
        let mut reader = Self { source, chunks, ahead, chunk, given: 0 };
        reader.read_ahead()?;
        if reader.ahead.is_empty() {
            return Err(invalid());
        }
        Ok(reader)
    }

    fn read_ahead(&mut self) -> io::Result<()> {
        self.ahead.clear();
        (&mut self.source).take((CHUNK + TAG) as u64).read_to_end(&mut self.ahead)?;
        Ok(())
    }

    /// Opens the next chunk; false at the end.
    fn open_chunk(&mut self) -> io::Result<bool> {
        if self.ahead.is_empty() {
            return Ok(false);
        }
        std::mem::swap(&mut *self.chunk, &mut self.ahead);
        self.given = 0;
        self.read_ahead()?;
        let opened = self.chunks.decrypt(&mut self.chunk, self.ahead.is_empty());
        opened.map_err(|error| {
            // Nothing more comes out of it.
            self.chunk.clear();
            self.ahead.clear();
            io::Error::new(io::ErrorKind::InvalidData, error)
        })?;
        Ok(true)
    }

    /// Checks that everything has been read.
    ///
    /// # Errors
    /// Something is left, or it was altered.
    pub fn finish(mut self) -> io::Result<()> {
        match self.read(&mut [0])? {
            0 => Ok(()),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, altered())),
        }
    }
}

impl<R: Read> Read for SealReader<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        while self.given == self.chunk.len() {
            if bytes.is_empty() || !self.open_chunk()? {
                return Ok(0);
            }
        }
        let taken = bytes.len().min(self.chunk.len() - self.given);
        bytes[..taken].copy_from_slice(&self.chunk[self.given..self.given + taken]);
        self.given += taken;
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CONTEXT: &[&[u8]] = &[b"test", b"file"];

    fn key() -> Key {
        Key::from_bytes([7; 32])
    }

    fn sealed(plain: &[u8]) -> Vec<u8> {
        let mut writer = SealWriter::new(Vec::new(), &key(), CONTEXT).unwrap();
        writer.write_all(plain).unwrap();
        writer.finish().unwrap()
    }

    fn opened(sealed: &[u8], key: &Key, context: &[&[u8]]) -> io::Result<Vec<u8>> {
        let mut reader = SealReader::new(sealed, key, context)?;
        let mut plain = Vec::new();
        reader.read_to_end(&mut plain)?;
        reader.finish()?;
        Ok(plain)
    }

    fn refused(bytes: &[u8]) -> bool {
        let error = match opened(bytes, &key(), CONTEXT) {
            Ok(_) => return false,
            Err(error) => error,
        };
        error.kind() == io::ErrorKind::InvalidData
            && error.get_ref().is_some_and(|e| e.is::<KeyError>())
    }

    fn plain(length: usize) -> Vec<u8> {
        (0..length).map(|at| (at / 251) as u8 ^ at as u8).collect()
    }

    #[test]
    fn every_length_comes_back() {
        for length in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 5] {
            let sealed = sealed(&plain(length));
            assert_eq!(sealed.len() as u64, sealed_length(length as u64));
            assert_eq!(plain_length(sealed.len() as u64), length as u64);
            assert!(opened(&sealed, &key(), CONTEXT).unwrap() == plain(length), "{length}");
            let short = key().seal(CONTEXT, &plain(length)).unwrap();
            assert!(**key().open(CONTEXT, &short).unwrap() == plain(length), "{length}");
        }
    }

    #[test]
    fn nothing_of_the_plain_bytes_is_in_it_and_no_two_are_alike() {
        let sealed_one = sealed(&[0x55; 4096]);
        assert!(!sealed_one.windows(8).any(|window| window == [0x55; 8]));
        assert_ne!(sealed_one, sealed(&[0x55; 4096]));
        assert_ne!(key().seal(CONTEXT, b"x").unwrap(), key().seal(CONTEXT, b"x").unwrap());
    }

    #[test]
    fn other_keys_and_other_contexts_do_not_open_it() {
        let (file, short) = (sealed(b"secret"), key().seal(CONTEXT, b"secret").unwrap());
        let other = Key::from_bytes([8; 32]);
        // The same bytes, cut into other parts, are another context.
        let contexts: [&[&[u8]]; 4] =
            [&[b"testfile"], &[b"test", b"fil"], &[b"tes", b"tfile"], &[]];
        assert!(opened(&file, &other, CONTEXT).is_err() && other.open(CONTEXT, &short).is_err());
        for context in contexts {
            assert!(opened(&file, &key(), context).is_err());
            assert!(key().open(context, &short).is_err());
        }
    }

    #[test]
    fn swapped_repeated_and_missing_chunks_are_refused() {
        let file = sealed(&plain(3 * CHUNK));
        let (head, body) = file.split_at(HEAD);
        let chunks: Vec<&[u8]> = body.chunks(CHUNK + TAG).collect();
        let made = |order: &[usize]| {
            let body: Vec<&[u8]> = order.iter().map(|&at| chunks[at]).collect();
            [head, &body.concat()].concat()
        };
        assert!(!refused(&made(&[0, 1, 2])));
        for order in
            [&[1, 0, 2][..], &[0, 2, 1], &[0, 0, 2], &[0, 1], &[0, 2], &[2], &[], &[0, 1, 2, 2]]
        {
            assert!(refused(&made(order)), "{order:?}");
        }
        // A chunk of another file that is like it.
        let other = sealed(&plain(3 * CHUNK));
        let mut mixed = file.clone();
        mixed[HEAD..HEAD + CHUNK + TAG].copy_from_slice(&other[HEAD..HEAD + CHUNK + TAG]);
        assert!(refused(&mixed));
        // One of another file, and its nonce with it.
        mixed[..HEAD].copy_from_slice(&other[..HEAD]);
        assert!(refused(&mixed));
    }

    #[test]
    fn nothing_comes_out_after_an_altered_chunk() {
        let mut file = sealed(&plain(3 * CHUNK));
        file[HEAD + CHUNK + TAG + 9] ^= 1;
        let mut reader = SealReader::new(&file[..], &key(), CONTEXT).unwrap();
        let mut found = Vec::new();
        assert!(reader.read_to_end(&mut found).is_err());
        assert!(found == plain(CHUNK), "only what was authentic");
        assert_eq!(reader.read(&mut [0; 9]).unwrap(), 0);
    }

    /// What making resident costs a MiB of memory, without and with encryption:
    /// `cargo test --release -p firn --lib throughput -- --ignored --nocapture`.
    #[test]
    #[ignore = "a measurement"]
    fn throughput_of_snapshots() {
        const BYTES: usize = 256 << 20;
        let plain = plain(BYTES);
        let file = sealed(&plain);
        let mut target = vec![1; BYTES];
        let mut measure = |what: &str, work: &mut dyn FnMut(&mut [u8])| {
            let best = (0..5).map(|_| {
                let start = std::time::Instant::now();
                work(&mut target);
                start.elapsed().as_secs_f64()
            });
            let mib = (BYTES >> 20) as f64;
            println!("{what}: {:.0} MiB/s", mib / best.fold(f64::MAX, f64::min));
        };
        measure("hash", &mut |_| _ = blake3::hash(&plain));
        measure("hash with a key", &mut |_| _ = key().tag(&plain));
        measure("encrypt", &mut |_| {
            let mut writer = SealWriter::new(io::sink(), &key(), CONTEXT).unwrap();
            writer.write_all(&plain).unwrap();
            writer.finish().unwrap();
        });
        measure("copy and hash, as for a snapshot in the clear", &mut |target| {
            let mut source = &plain[..];
            for part in target.chunks_mut(1 << 20) {
                source.read_exact(part).unwrap();
            }
            blake3::hash(target);
        });
        measure("decrypt and hash, as for an encrypted one", &mut |target| {
            let mut reader = SealReader::new(&file[..], &key(), CONTEXT).unwrap();
            reader.read_exact(target).unwrap();
            blake3::hash(target);
        });
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_flipped_bit_and_every_truncation_is_an_error(
            length in prop_oneof![0usize..300, CHUNK - 20..CHUNK + 20, 2 * CHUNK - 9..2 * CHUNK + 9],
            at in any::<prop::sample::Index>(),
            bit in 0u8..8,
        ) {
            let good = sealed(&plain(length));
            let mut bad = good.clone();
            bad[at.index(good.len())] ^= 1 << bit;
            prop_assert!(refused(&bad));
            prop_assert!(refused(&good[..at.index(good.len())]));
            let mut longer = good;
            longer.push(bit);
            prop_assert!(refused(&longer));
            let mut short = key().seal(CONTEXT, &plain(length)).unwrap();
            prop_assert!(key().open(CONTEXT, &short[..at.index(short.len())]).is_err());
            let at = at.index(short.len());
            short[at] ^= 1 << bit;
            prop_assert!(key().open(CONTEXT, &short).is_err());
        }

        #[test]
        fn any_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut file = [MAGIC.as_slice(), &VERSION.to_le_bytes()].concat();
            file.extend(&bytes);
            prop_assert!(refused(&file) && refused(&bytes));
            prop_assert!(key().open(CONTEXT, &bytes).is_err());
        }
    }
}
