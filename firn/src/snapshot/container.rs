//! The `state` file of a snapshot.
//!
//! ```text
//!  0   8  "FIRNSNAP"
//!  8   4  format version, u32 little-endian
//!  12  4  protection: 1 authenticated, 2 encrypted, too
//!  16  4  length of the wrapped data key
//!  20  8  length of the body
//!  28     data key, as the host's key service wrapped it
//!         body; encrypted, if the snapshot is, as a sealed file (keys/seal.rs)
//!  -32    keyed BLAKE3 of everything before: the snapshot's id
//!
//!  body:  0  4  number of sections
//!         4     sections: tag u32, length u64, content; in the order of their tags
//!               1 manifest   what it is and what it needs (postcard)
//!               2 vm state   the VMM's own, opaque here
//!               3 pages      bitmap of the pages that `memory` holds
//! ```
//!
//! The tag is verified before anything of the body is looked at, lengths before any content. Its key
//! comes from the data key, so only a host with the same master key can have made it. The file names the
//! hashes of its companions: the tag authenticates the whole snapshot, and identifies it.

use std::{
    fmt,
    io::{Read, Write},
};

use firn_pages::{PAGE, bitmap::Bitmap};
use firn_proto::guest::GuestTsc;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{SnapshotError, SnapshotMeta, at};
use crate::keys::{Key, KeyService, MAX_WRAPPED, SealReader, SealWriter, sealed_length};

const MAGIC: &[u8; 8] = b"FIRNSNAP";

/// Version of this format.
pub(crate) const VERSION: u32 = 3;

/// Most bytes of a VMM's state: a few KiB a vCPU, queues, and block bitmaps.
pub(crate) const MAX_VM_STATE: u64 = 16 << 20;

/// Most bytes of a manifest.
const MAX_MANIFEST: u64 = 64 << 10;

/// Most bytes of a page bitmap: 64 GiB of guest memory.
const MAX_PAGES: u64 = 2 << 20;

/// Most bytes of a whole file.
pub(crate) const MAX_FILE: u64 =
    MAX_VM_STATE + MAX_MANIFEST + MAX_PAGES + MAX_WRAPPED as u64 + 64 * 1024;

const HEAD: usize = 28;
const BODY_HEAD: usize = 4;
const SECTION_HEAD: usize = 12;
const TAG: usize = blake3::OUT_LEN;

/// Values of the field `protection`.
const AUTHENTICATED: u32 = 1;
const ENCRYPTED: u32 = 2;

/// Name, tag and longest content of each section, in order.
const SECTIONS: [(&str, u32, u64); 3] =
    [("manifest", 1, MAX_MANIFEST), ("vm state", 2, MAX_VM_STATE), ("pages", 3, MAX_PAGES)];

// Tripwires: whoever changes one of these changes the format and must raise VERSION.
const _: () = assert!(HEAD == MAGIC.len() + 4 + 4 + 4 + 8);
const _: () = assert!(SECTION_HEAD == 4 + 8);
const _: () = assert!(TAG == 32);
const _: () = assert!(PAGE == 4096);

/// What a snapshot is and what it needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) vcpus: u8,
    pub(crate) memory_mib: u32,
    /// Memory of the function in MB.
    pub(crate) function_memory_mb: u32,
    pub(crate) runtime: String,
    /// Hash of the image's root file system.
    pub(crate) image: [u8; 32],
    pub(crate) kernel: [u8; 32],
    /// Hash of the backing of `/tmp`.
    pub(crate) tmp_disk: [u8; 32],
    /// Hash of the code disk, if there is one.
    pub(crate) code: Option<[u8; 32]>,
    /// Checksum of the base's state file, if `memory` holds only what differs from a base.
    pub(crate) base: Option<[u8; 32]>,
    /// Hash of the pages in `memory`, one after the other.
    pub(crate) memory: [u8; 32],
    /// Hash of `tmp.delta`, as of a sparse file.
    pub(crate) delta: [u8; 32],
    pub(crate) delta_bytes: u64,
    /// What the guest's TSC reads when its clocks go on.
    pub(crate) tsc: GuestTsc,
    pub(crate) meta: SnapshotMeta,
}

impl Manifest {
    pub(crate) fn memory_bytes(&self) -> u64 {
        u64::from(self.memory_mib) << 20
    }
}

/// The content of a state file.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) manifest: Manifest,
    pub(crate) vm_state: Vec<u8>,
    pub(crate) pages: Bitmap,
}

impl fmt::Debug for State {
    /// Without the VM's state: a function's secrets may lie in registers.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State").field("manifest", &self.manifest).finish_non_exhaustive()
    }
}

/// Tag of a state file: the identity of a snapshot.
pub(crate) type Id = [u8; 32];

/// An id in hexadecimal.
pub(crate) fn hex(hash: &Id) -> String {
    blake3::Hash::from_bytes(*hash).to_hex().to_string()
}

/// What protects one snapshot: a data key of its own.
#[derive(Debug)]
pub(crate) struct Protection {
    wrapped: Vec<u8>,
    authentication: Key,
    /// Encrypts what is written, if anything is to be encrypted.
    pub(crate) encryption: Option<Key>,
    /// Authenticates the working set.
    pub(crate) working_set: Key,
}

impl Protection {
    /// For a new snapshot.
    pub(crate) fn generate(keys: &dyn KeyService, encrypted: bool) -> Result<Self, SnapshotError> {
        let (key, wrapped) = keys.generate_data_key()?;
        if wrapped.len() > MAX_WRAPPED {
            let reason = format!("{} bytes exceed the limit of {MAX_WRAPPED}", wrapped.len());
            return Err(SnapshotError::Malformed { section: "wrapped key", reason });
        }
        Ok(Self::of(&key, wrapped, encrypted))
    }

    /// The tag of what has been written.
    pub(crate) fn tag(&self, bytes: &[u8]) -> Id {
        *self.authentication.tag(bytes).as_bytes()
    }

    fn of(key: &Key, wrapped: Vec<u8>, encrypted: bool) -> Self {
        Self {
            wrapped,
            authentication: key.derive("firn 2026-11 authentication of a snapshot"),
            encryption: encrypted.then(|| key.derive("firn 2026-11 encryption of a snapshot")),
            working_set: key.derive("firn 2026-11 authentication of a working set"),
        }
    }
}

/// Writes a state file's content, and says its id.
pub(crate) fn encode(
    state: &State,
    protection: &Protection,
) -> Result<(Vec<u8>, Id), SnapshotError> {
    let manifest = postcard::to_stdvec(&state.manifest)
        .map_err(|e| SnapshotError::Malformed { section: "manifest", reason: e.to_string() })?;
    let contents: [&[u8]; 3] = [&manifest, &state.vm_state, &state.pages.to_bytes()];
    let mut body = Vec::with_capacity(
        BODY_HEAD + contents.iter().map(|c| c.len() + SECTION_HEAD).sum::<usize>(),
    );
    body.extend_from_slice(&(SECTIONS.len() as u32).to_le_bytes());
    for ((section, tag, limit), content) in SECTIONS.into_iter().zip(contents) {
        if content.len() as u64 > limit {
            let reason = format!("{} bytes exceed the limit of {limit}", content.len());
            return Err(SnapshotError::Malformed { section, reason });
        }
        body.extend_from_slice(&tag.to_le_bytes());
        body.extend_from_slice(&(content.len() as u64).to_le_bytes());
        body.extend_from_slice(content);
    }
    let kind = match &protection.encryption {
        Some(key) => {
            let sealed = Vec::with_capacity(sealed_length(body.len() as u64) as usize);
            let mut writer = SealWriter::new(sealed, key, BODY).map_err(at("encrypt the state"))?;
            writer.write_all(&body).map_err(at("encrypt the state"))?;
            body = writer.finish().map_err(at("encrypt the state"))?;
            ENCRYPTED
        }
        None => AUTHENTICATED,
    };
    let mut bytes = Vec::with_capacity(HEAD + protection.wrapped.len() + body.len() + TAG);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&kind.to_le_bytes());
    bytes.extend_from_slice(&(protection.wrapped.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&(body.len() as u64).to_le_bytes());
    bytes.extend_from_slice(&protection.wrapped);
    bytes.extend_from_slice(&body);
    let id = protection.tag(&bytes);
    bytes.extend_from_slice(&id);
    Ok((bytes, id))
}

/// What the encrypted body is, among all that is encrypted with a snapshot's key.
const BODY: &[&[u8]] = &[b"state"];

/// A state file whose parts are where its head says, and of which nothing is verified yet.
struct Parts<'a> {
    encrypted: bool,
    wrapped: &'a [u8],
    body: &'a [u8],
    /// All that the tag authenticates.
    signed: &'a [u8],
    tag: Id,
}

fn split<'a>(bytes: &'a [u8], path: &std::path::Path) -> Result<Parts<'a>, SnapshotError> {
    let truncated = |expected: u64| SnapshotError::Truncated {
        what: "state",
        expected,
        found: bytes.len() as u64,
    };
    // A file that is cut within its magic is still ours, cut.
    if bytes.is_empty() || !bytes.iter().zip(MAGIC).all(|(a, b)| a == b) {
        return Err(SnapshotError::NotASnapshot { path: path.to_owned() });
    }
    if bytes.len() < HEAD + TAG {
        return Err(truncated((HEAD + TAG) as u64));
    }
    // First: another version may look different from here on.
    let found = u32_at(bytes, 8);
    if found != VERSION {
        return Err(SnapshotError::Version { found, supported: VERSION });
    }
    let malformed = |reason| SnapshotError::Malformed { section: "head", reason };
    let encrypted = match u32_at(bytes, 12) {
        AUTHENTICATED => false,
        ENCRYPTED => true,
        other => return Err(malformed(format!("protection {other} is unknown"))),
    };
    let (wrapped, body) = (u64::from(u32_at(bytes, 16)), u64_at(bytes, 20));
    if wrapped > MAX_WRAPPED as u64 || body > MAX_FILE {
        return Err(malformed(format!("claims a key of {wrapped} and a body of {body} bytes")));
    }
    let expected = (HEAD + TAG) as u64 + wrapped + body;
    if (bytes.len() as u64) < expected {
        return Err(truncated(expected));
    }
    if bytes.len() as u64 > expected {
        return Err(malformed(format!("{} bytes follow", bytes.len() as u64 - expected)));
    }
    let (signed, last) = bytes.split_at(bytes.len() - TAG);
    let mut tag = Id::default();
    tag.copy_from_slice(last);
    let (wrapped, body) = signed[HEAD..].split_at(wrapped as usize);
    Ok(Parts { encrypted, wrapped, body, signed, tag })
}

/// Reads a state file's content, if `keys` protects it.
pub(crate) fn decode(
    bytes: &[u8],
    path: &std::path::Path,
    keys: &dyn KeyService,
) -> Result<(State, Id, Protection), SnapshotError> {
    let Parts { encrypted, wrapped, body, signed, tag } = split(bytes, path)?;
    let protection = Protection::of(&keys.unwrap(wrapped)?, wrapped.to_vec(), encrypted);
    let computed = protection.authentication.tag(signed);
    // Compared in constant time, which `Id` would not be.
    if computed != blake3::Hash::from_bytes(tag) {
        return Err(SnapshotError::Forged);
    }
    let state = match &protection.encryption {
        None => sections(body)?,
        Some(key) => {
            let mut opened = Zeroizing::new(Vec::with_capacity(body.len()));
            let mut reader = SealReader::new(body, key, BODY).map_err(at("decrypt the state"))?;
            reader.read_to_end(&mut opened).map_err(at("decrypt the state"))?;
            sections(&opened)?
        }
    };
    Ok((state, tag, protection))
}

/// Reads an authentic body: its tag is right, and still every length is checked.
fn sections(body: &[u8]) -> Result<State, SnapshotError> {
    let malformed = |reason| SnapshotError::Malformed { section: "body", reason };
    let Some((head, mut rest)) = body.split_at_checked(BODY_HEAD) else {
        return Err(malformed(format!("{} bytes", body.len())));
    };
    if u32_at(head, 0) as usize != SECTIONS.len() {
        return Err(malformed(format!("{} sections, not {}", u32_at(head, 0), SECTIONS.len())));
    }
    let mut contents = Vec::with_capacity(SECTIONS.len());
    for (section, tag, limit) in SECTIONS {
        let malformed = |reason| SnapshotError::Malformed { section, reason };
        let Some((head, after)) = rest.split_at_checked(SECTION_HEAD) else {
            return Err(malformed("is missing".into()));
        };
        if u32_at(head, 0) != tag {
            return Err(malformed(format!("has tag {} instead of {tag}", u32_at(head, 0))));
        }
        let length = u64_at(head, 4);
        if length > limit {
            return Err(malformed(format!("{length} bytes exceed the limit of {limit}")));
        }
        let Some((content, after)) = after.split_at_checked(length as usize) else {
            return Err(malformed(format!("claims {length} bytes, has {}", after.len())));
        };
        contents.push(content);
        rest = after;
    }
    if !rest.is_empty() {
        return Err(malformed(format!("{} bytes follow", rest.len())));
    }
    let [manifest, vm_state, pages] = contents[..] else {
        return Err(malformed("sections".into()));
    };
    parse(manifest, vm_state, pages)
}

fn parse(manifest: &[u8], vm_state: &[u8], pages: &[u8]) -> Result<State, SnapshotError> {
    let malformed = |section, reason| SnapshotError::Malformed { section, reason };
    let (manifest, rest) = postcard::take_from_bytes::<Manifest>(manifest)
        .map_err(|e| malformed("manifest", e.to_string()))?;
    if !rest.is_empty() {
        return Err(malformed("manifest", format!("{} bytes follow", rest.len())));
    }
    let (count, bytes) = (manifest.memory_bytes() / PAGE, pages.len() as u64);
    let pages = Bitmap::from_bytes(pages, count)
        .filter(|_| bytes == Bitmap::byte_count(count))
        .ok_or_else(|| malformed("pages", format!("{bytes} bytes are no bitmap of {count}")))?;
    Ok(State { manifest, vm_state: vm_state.to_vec(), pages })
}

/// Reads what the caller has made sure is there.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

/// Reads what the caller has made sure is there.
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;
    use crate::keys::KeyError;

    fn state() -> State {
        let mut bits = vec![0; 32];
        bits[3] = 0x55;
        State {
            manifest: Manifest {
                vcpus: 1,
                memory_mib: 1,
                function_memory_mb: 128,
                runtime: "python3.11".into(),
                image: [1; 32],
                kernel: [2; 32],
                tmp_disk: [3; 32],
                code: None,
                base: Some([4; 32]),
                memory: [5; 32],
                delta: [6; 32],
                delta_bytes: 0,
                tsc: GuestTsc { ticks: 7, khz: std::num::NonZeroU32::MIN },
                meta: SnapshotMeta { label: "golden".into(), key: "key".into() },
            },
            vm_state: b"opaque".to_vec(),
            pages: Bitmap::from_bytes(&bits, 256).unwrap(),
        }
    }

    /// A key service whose keys all are the same, so that what it protects is, too.
    #[derive(Debug)]
    struct Same(u8);

    impl KeyService for Same {
        fn generate_data_key(&self) -> Result<(Key, Vec<u8>), KeyError> {
            Ok((Key::from_bytes([self.0; 32]), b"wrapped".to_vec()))
        }

        fn unwrap(&self, wrapped: &[u8]) -> Result<Key, KeyError> {
            match wrapped {
                b"wrapped" => Ok(Key::from_bytes([self.0; 32])),
                _ => Err(KeyError::Altered { what: "a wrapped key" }),
            }
        }
    }

    fn read(bytes: &[u8]) -> Result<(State, Id), SnapshotError> {
        decode(bytes, Path::new("state"), &Same(1)).map(|(state, id, _)| (state, id))
    }

    fn write(encrypted: bool) -> (Vec<u8>, Id) {
        encode(&state(), &Protection::generate(&Same(1), encrypted).unwrap()).unwrap()
    }

    /// If this fails, the format has changed: raise VERSION, then write the new tag here.
    #[test]
    fn golden() {
        let (bytes, id) = write(false);
        assert_eq!((VERSION, bytes.len(), hex(&id).as_str()), (3, GOLDEN.0, GOLDEN.1));
    }

    const GOLDEN: (usize, &str) =
        (368, "6aeb0acb0ee16d790f56c863a1ffa2c410fdd5e61deafe3b9ba7916de0f3933b");

    #[test]
    fn what_is_written_is_read() {
        for encrypted in [false, true] {
            let (bytes, id) = write(encrypted);
            assert_eq!(read(&bytes).unwrap(), (state(), id));
            let clear = |needle: &[u8]| bytes.windows(needle.len()).any(|w| w == needle);
            assert_eq!((clear(b"opaque"), clear(b"golden")), (!encrypted, !encrypted));
        }
    }

    #[test]
    fn other_versions_and_other_files_are_named() {
        let (mut bytes, _) = write(false);
        bytes[8] = 9;
        assert!(matches!(read(&bytes), Err(SnapshotError::Version { found: 9, supported: 3 })));
        bytes[8] = 1;
        assert!(matches!(read(&bytes), Err(SnapshotError::Version { found: 1, supported: 3 })));
        bytes[8] = 2;
        assert!(matches!(read(&bytes), Err(SnapshotError::Version { found: 2, supported: 3 })));
        assert!(matches!(read(b"PK\x03\x04"), Err(SnapshotError::NotASnapshot { .. })));
        assert!(matches!(read(b""), Err(SnapshotError::NotASnapshot { .. })));
    }

    #[test]
    fn what_another_key_protects_is_refused() {
        for encrypted in [false, true] {
            let (mut bytes, _) = write(encrypted);
            let other = decode(&bytes, Path::new("state"), &Same(2));
            assert!(matches!(other, Err(SnapshotError::Forged)), "{other:?}");
            // Whoever has no key can still compute every hash that needs none.
            let at = bytes.len() - TAG;
            let (body, tag) = bytes.split_at_mut(at);
            tag.copy_from_slice(blake3::hash(body).as_bytes());
            assert!(matches!(read(&bytes), Err(SnapshotError::Forged)));
        }
    }

    #[test]
    fn the_vms_state_does_not_print() {
        let secret = State { vm_state: vec![0xab; 9], ..state() };
        assert!(!format!("{secret:?}").contains("171"));
    }

    /// An authentic file whose inside is wrong: made by a Firn with a mistake.
    fn wrong(change: impl FnOnce(&mut Vec<u8>)) -> Result<(State, Id), SnapshotError> {
        let (mut bytes, _) = write(false);
        bytes.truncate(bytes.len() - TAG);
        change(&mut bytes);
        let body = (bytes.len() - HEAD - 7) as u64;
        bytes[20..28].copy_from_slice(&body.to_le_bytes());
        let protection = Protection::generate(&Same(1), false).unwrap();
        let tag = protection.tag(&bytes);
        bytes.extend_from_slice(&tag);
        read(&bytes)
    }

    #[test]
    fn mistakes_are_refused() {
        const BODY: usize = HEAD + 7;
        let refused = |result: Result<_, _>| matches!(result, Err(SnapshotError::Malformed { .. }));
        assert!(wrong(|_| ()).is_ok());
        assert!(refused(wrong(|bytes| bytes[BODY] = 2)));
        assert!(refused(wrong(|bytes| bytes[BODY + 4] = 7)));
        assert!(refused(wrong(|bytes| bytes[BODY + 8..BODY + 16].fill(0xff))));
        let length = 60_000u64.to_le_bytes();
        assert!(refused(wrong(|bytes| bytes[BODY + 8..BODY + 16].copy_from_slice(&length))));
        assert!(refused(wrong(|bytes| bytes.push(0))));
        assert!(refused(wrong(|bytes| bytes.truncate(BODY + 2))));
        assert!(refused(wrong(|bytes| bytes.truncate(BODY))));
        // memory_mib, the second field: the bitmap no longer fits.
        assert!(refused(wrong(|bytes| bytes[BODY + 17] = 2)));
    }

    proptest! {
        #[test]
        fn every_altered_byte_is_noticed(
            at in any::<prop::sample::Index>(), bit in 0u8..8, encrypted in any::<bool>()
        ) {
            let (mut bytes, _) = write(encrypted);
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(read(&bytes).is_err());
            // Behind the lengths there is only one thing to say.
            if at >= HEAD + 7 {
                prop_assert!(matches!(read(&bytes), Err(SnapshotError::Forged)));
            }
        }

        #[test]
        fn every_truncation_is_named(
            at in any::<prop::sample::Index>(), encrypted in any::<bool>()
        ) {
            let (bytes, _) = write(encrypted);
            let at = at.index(bytes.len() - 1) + 1;
            let result = read(&bytes[..at]);
            let named = matches!(result, Err(SnapshotError::Truncated { what: "state", .. }));
            prop_assert!(named, "{} of {}: {:?}", at, bytes.len(), result);
        }

        #[test]
        fn any_bytes_are_read_or_refused(
            tail in proptest::collection::vec(any::<u8>(), 0..300), right in any::<bool>()
        ) {
            let mut bytes = MAGIC.to_vec();
            bytes.extend_from_slice(&VERSION.to_le_bytes());
            bytes.extend_from_slice(&AUTHENTICATED.to_le_bytes());
            bytes.extend_from_slice(&7u32.to_le_bytes());
            bytes.extend_from_slice(&(tail.len() as u64).to_le_bytes());
            bytes.extend_from_slice(b"wrapped");
            bytes.extend_from_slice(&tail);
            if right {
                let protection = Protection::generate(&Same(1), false).unwrap();
                let tag = protection.tag(&bytes);
                bytes.extend_from_slice(&tag);
            }
            let _ = read(&bytes);
        }
    }
}
