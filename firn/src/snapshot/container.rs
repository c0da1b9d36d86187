//! The `state` file of a snapshot.
//!
//! ```text
//!  0   8  "FIRNSNAP"
//!  8   4  format version, u32 little-endian
//!  12  4  number of sections
//!  16     sections: tag u32, length u64, content; in the order of their tags
//!         1 manifest   what it is and what it needs (postcard)
//!         2 vm state   the VMM's own, opaque here
//!         3 pages      bitmap of the pages that `memory` holds
//!  -32    blake3 of everything before
//! ```
//!
//! The checksum is verified before any section is looked at, and lengths before any content; the
//! file names the hashes of its companions, so its own checksum identifies the whole snapshot.

use serde::{Deserialize, Serialize};

use super::{
    SnapshotError, SnapshotMeta,
    pages::{PAGE, PageSet},
};

const MAGIC: &[u8; 8] = b"FIRNSNAP";

/// Version of this format.
pub(crate) const VERSION: u32 = 1;

/// Most bytes of a VMM's state: a few KiB a vCPU, queues, and block bitmaps.
pub(crate) const MAX_VM_STATE: u64 = 16 << 20;

/// Most bytes of a manifest.
const MAX_MANIFEST: u64 = 64 << 10;

/// Most bytes of a page bitmap: 64 GiB of guest memory.
const MAX_PAGES: u64 = 2 << 20;

/// Most bytes of a whole file.
pub(crate) const MAX_FILE: u64 = MAX_VM_STATE + MAX_MANIFEST + MAX_PAGES + 4096;

const HEAD: usize = 16;
const SECTION_HEAD: usize = 12;
const CHECKSUM: usize = blake3::OUT_LEN;

/// Name, tag and longest content of each section, in order.
const SECTIONS: [(&str, u32, u64); 3] =
    [("manifest", 1, MAX_MANIFEST), ("vm state", 2, MAX_VM_STATE), ("pages", 3, MAX_PAGES)];

// Tripwires: whoever changes one of these changes the format and must raise VERSION.
const _: () = assert!(HEAD == MAGIC.len() + 4 + 4);
const _: () = assert!(SECTION_HEAD == 4 + 8);
const _: () = assert!(CHECKSUM == 32);
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
    pub(crate) meta: SnapshotMeta,
}

impl Manifest {
    pub(crate) fn memory_bytes(&self) -> u64 {
        u64::from(self.memory_mib) << 20
    }
}

/// The content of a state file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) manifest: Manifest,
    pub(crate) vm_state: Vec<u8>,
    pub(crate) pages: PageSet,
}

/// Checksum of a state file: the identity of a snapshot.
pub(crate) type Id = [u8; 32];

/// An id in hexadecimal.
pub(crate) fn hex(hash: &Id) -> String {
    blake3::Hash::from_bytes(*hash).to_hex().to_string()
}

/// Writes a state file's content, and says its id.
pub(crate) fn encode(state: &State) -> Result<(Vec<u8>, Id), SnapshotError> {
    let manifest = postcard::to_stdvec(&state.manifest)
        .map_err(|e| SnapshotError::Malformed { section: "manifest", reason: e.to_string() })?;
    let contents: [&[u8]; 3] = [&manifest, &state.vm_state, state.pages.bits()];
    let mut bytes = Vec::with_capacity(
        HEAD + CHECKSUM + contents.iter().map(|c| c.len() + SECTION_HEAD).sum::<usize>(),
    );
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&(SECTIONS.len() as u32).to_le_bytes());
    for ((section, tag, limit), content) in SECTIONS.into_iter().zip(contents) {
        if content.len() as u64 > limit {
            let reason = format!("{} bytes exceed the limit of {limit}", content.len());
            return Err(SnapshotError::Malformed { section, reason });
        }
        bytes.extend_from_slice(&tag.to_le_bytes());
        bytes.extend_from_slice(&(content.len() as u64).to_le_bytes());
        bytes.extend_from_slice(content);
    }
    let id = *blake3::hash(&bytes).as_bytes();
    bytes.extend_from_slice(&id);
    Ok((bytes, id))
}

/// Reads a state file's content.
pub(crate) fn decode(bytes: &[u8], path: &std::path::Path) -> Result<(State, Id), SnapshotError> {
    let truncated = |expected: usize| SnapshotError::Truncated {
        what: "state",
        expected: expected as u64,
        found: bytes.len() as u64,
    };
    // A file that is cut within its magic is still ours, cut.
    if bytes.is_empty() || !bytes.iter().zip(MAGIC).all(|(a, b)| a == b) {
        return Err(SnapshotError::NotASnapshot { path: path.to_owned() });
    }
    if bytes.len() < HEAD + CHECKSUM {
        return Err(truncated(HEAD + CHECKSUM));
    }
    // Before the checksum: another version may have another one.
    let found = u32_at(bytes, 8);
    if found != VERSION {
        return Err(SnapshotError::Version { found, supported: VERSION });
    }
    let (body, checksum) = bytes.split_at(bytes.len() - CHECKSUM);
    let computed = *blake3::hash(body).as_bytes();
    if computed != *checksum {
        // The lengths tell whether the end is missing; they are not trusted beyond that.
        return Err(match whole_length(bytes) {
            Some(expected) if expected > bytes.len() => truncated(expected),
            _ => {
                let mut expected = Id::default();
                expected.copy_from_slice(checksum);
                let (expected, found) = (hex(&expected), hex(&computed));
                SnapshotError::Altered { what: "state", expected, found }
            }
        });
    }
    let mut rest = &body[HEAD..];
    let mut contents = Vec::with_capacity(SECTIONS.len());
    if u32_at(bytes, 12) as usize != SECTIONS.len() {
        let reason = format!("{} sections instead of {}", u32_at(bytes, 12), SECTIONS.len());
        return Err(SnapshotError::Malformed { section: "head", reason });
    }
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
        let reason = format!("{} bytes follow", rest.len());
        return Err(SnapshotError::Malformed { section: "pages", reason });
    }
    let [manifest, vm_state, pages] = contents[..] else {
        return Err(SnapshotError::Malformed { section: "head", reason: "sections".into() });
    };
    let state = parse(manifest, vm_state, pages)?;
    Ok((state, computed))
}

fn parse(manifest: &[u8], vm_state: &[u8], pages: &[u8]) -> Result<State, SnapshotError> {
    let malformed = |section, reason| SnapshotError::Malformed { section, reason };
    let (manifest, rest) = postcard::take_from_bytes::<Manifest>(manifest)
        .map_err(|e| malformed("manifest", e.to_string()))?;
    if !rest.is_empty() {
        return Err(malformed("manifest", format!("{} bytes follow", rest.len())));
    }
    let pages = PageSet::from_bits(pages.to_vec(), manifest.memory_bytes() / PAGE)
        .map_err(|reason| malformed("pages", reason))?;
    Ok(State { manifest, vm_state: vm_state.to_vec(), pages })
}

/// How long the file says that it is, as far as its section heads are there.
fn whole_length(bytes: &[u8]) -> Option<usize> {
    let mut at = HEAD;
    for _ in SECTIONS {
        let Some(head) = bytes.get(at..at.checked_add(SECTION_HEAD)?) else {
            return at.checked_add(SECTION_HEAD + CHECKSUM);
        };
        let length = usize::try_from(u64_at(head, 4)).ok()?;
        at = at.checked_add(SECTION_HEAD)?.checked_add(length)?;
    }
    at.checked_add(CHECKSUM)
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
                meta: SnapshotMeta { label: "golden".into(), key: "key".into() },
            },
            vm_state: b"opaque".to_vec(),
            pages: PageSet::from_bits(bits, 256).unwrap(),
        }
    }

    fn read(bytes: &[u8]) -> Result<(State, Id), SnapshotError> {
        decode(bytes, Path::new("state"))
    }

    /// If this fails, the format has changed: raise VERSION, then write the new hash here.
    #[test]
    fn golden() {
        let (bytes, id) = encode(&state()).unwrap();
        assert_eq!((VERSION, bytes.len(), hex(&id).as_str()), (1, GOLDEN.0, GOLDEN.1));
    }

    const GOLDEN: (usize, &str) =
        (343, "5737a3cfa32cda29124a5d69da8b42fa950aefebd5d61f34acefa3be85c2f2c8");

    #[test]
    fn what_is_written_is_read() {
        let (bytes, id) = encode(&state()).unwrap();
        assert_eq!(read(&bytes).unwrap(), (state(), id));
    }

    #[test]
    fn other_versions_and_other_files_are_named() {
        let (mut bytes, _) = encode(&state()).unwrap();
        bytes[8] = 9;
        assert!(matches!(read(&bytes), Err(SnapshotError::Version { found: 9, supported: 1 })));
        assert!(matches!(read(b"PK\x03\x04"), Err(SnapshotError::NotASnapshot { .. })));
        assert!(matches!(read(b""), Err(SnapshotError::NotASnapshot { .. })));
    }

    /// A file with a right checksum whose inside is wrong: made by someone who knows the format.
    fn forged(change: impl FnOnce(&mut Vec<u8>)) -> Result<(State, Id), SnapshotError> {
        let (mut bytes, _) = encode(&state()).unwrap();
        bytes.truncate(bytes.len() - CHECKSUM);
        change(&mut bytes);
        let id = *blake3::hash(&bytes).as_bytes();
        bytes.extend_from_slice(&id);
        read(&bytes)
    }

    #[test]
    fn forgeries_are_refused() {
        let refused = |result: Result<_, _>| matches!(result, Err(SnapshotError::Malformed { .. }));
        assert!(refused(forged(|bytes| bytes[12] = 2)));
        assert!(refused(forged(|bytes| bytes[16] = 7)));
        assert!(refused(forged(|bytes| bytes[20..28].fill(0xff))));
        assert!(refused(forged(|bytes| bytes[20..28].copy_from_slice(&60_000u64.to_le_bytes()))));
        assert!(refused(forged(|bytes| bytes.push(0))));
        assert!(refused(forged(|bytes| bytes.truncate(HEAD))));
        // memory_mib, the second field: the bitmap no longer fits.
        assert!(refused(forged(|bytes| bytes[29] = 2)));
    }

    proptest! {
        #[test]
        fn every_altered_byte_is_noticed(at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let (mut bytes, _) = encode(&state()).unwrap();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            let noticed = matches!(
                read(&bytes),
                Err(SnapshotError::Altered { .. } | SnapshotError::Version { .. }
                    | SnapshotError::NotASnapshot { .. } | SnapshotError::Truncated { .. })
            );
            prop_assert!(noticed);
        }

        #[test]
        fn every_truncation_is_named(at in any::<prop::sample::Index>()) {
            let (bytes, _) = encode(&state()).unwrap();
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
            bytes.extend_from_slice(&tail);
            if right {
                let id = *blake3::hash(&bytes).as_bytes();
                bytes.extend_from_slice(&id);
            }
            let _ = read(&bytes);
        }
    }
}
