//! KMS keys: what is kept of one, and what it does to bytes. Symmetric keys only.
//!
//! ```text
//!  ciphertext blob:  0   1  version (1)
//!                    1  16  id of the key
//!                   17      sealed: nonce (24), what was encrypted, tag (16)
//! ```
//!
//! What is sealed is bound to the key's id and to every pair of the encryption context. The key itself is
//! derived from a data key that the installation's master key wraps (decision 8), and leaves this process
//! in no form.

use std::{collections::BTreeMap, fmt};

use firn::keys::{Key, KeyError, KeyService};
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use zeroize::Zeroizing;

/// Format of the blobs that are made.
const VERSION: u8 = 1;

/// Bytes before what is sealed.
const HEAD: usize = 17;

// Whoever changes these changes the format, and must raise VERSION.
const _: () = assert!(HEAD == 1 + size_of::<uuid::Bytes>());

/// Most keys of an installation: all of them are in memory.
pub const MAX_KEYS: usize = 10_000;

/// Most aliases of one key, as in KMS.
pub const MAX_ALIASES: usize = 50;

/// Names and values that a blob is bound to, in the order of the names.
pub type EncryptionContext = BTreeMap<String, String>;

/// One key.
#[derive(Clone)]
pub struct KmsKey {
    /// Its id.
    pub id: Uuid,
    /// What may change of it.
    pub record: Record,
    wrapped: Vec<u8>,
    sealing: Key,
    material: Key,
}

impl fmt::Debug for KmsKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KmsKey").field("id", &self.id).finish_non_exhaustive()
    }
}

/// What is kept of a key, sealed with it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// What its owner says of it.
    pub description: String,
    /// When it was made, in milliseconds since the epoch.
    pub created_ms: i64,
    /// Whether it can be used.
    pub state: State,
    /// By name, `alias/` included.
    pub aliases: BTreeMap<String, Alias>,
}

/// Whether a key can be used.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum State {
    /// It can.
    Enabled,
    /// Not now.
    Disabled,
    /// Never again, if nobody changes their mind.
    PendingDeletion {
        /// When it is gone, in milliseconds since the epoch.
        at_ms: i64,
    },
}

/// When an alias was made and led somewhere else, in milliseconds since the epoch.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Alias {
    /// Made.
    pub created_ms: i64,
    /// Changed.
    pub updated_ms: i64,
}

impl KmsKey {
    /// A new key.
    ///
    /// # Errors
    /// Any [`KeyError`].
    pub fn generate(
        keys: &dyn KeyService,
        description: String,
        now_ms: i64,
    ) -> Result<Self, KeyError> {
        let (key, wrapped) = keys.generate_data_key()?;
        let (state, aliases) = (State::Enabled, BTreeMap::new());
        let record = Record { description, created_ms: now_ms, state, aliases };
        Ok(Self::of(Uuid::new_v4(), &key, wrapped, record))
    }

    /// One that was kept as [`KmsKey::sealed`].
    ///
    /// # Errors
    /// Any [`KeyError`].
    pub fn open(
        keys: &dyn KeyService,
        id: Uuid,
        wrapped: Vec<u8>,
        document: &[u8],
    ) -> Result<Self, KeyError> {
        let altered = || KeyError::Altered { what: "the record" };
        let key = keys.unwrap(&wrapped)?;
        let plain = sealing(&key).open(&[RECORD, id.as_bytes()], document);
        let record = plain.ok().and_then(|plain| serde_json::from_slice(&plain).ok());
        Ok(Self::of(id, &key, wrapped, record.ok_or_else(altered)?))
    }

    fn of(id: Uuid, key: &Key, wrapped: Vec<u8>, record: Record) -> Self {
        let material = key.derive("firnd 2026-11 encryption with a KMS key");
        Self { id, record, wrapped, sealing: sealing(key), material }
    }

    /// The wrapped data key, and the record as it is kept.
    ///
    /// # Errors
    /// Any [`KeyError`].
    pub fn sealed(&self) -> Result<(&[u8], Vec<u8>), KeyError> {
        // It is made of text and numbers.
        let record = serde_json::to_vec(&self.record)
            .map_err(|error| KeyError::Service(error.to_string()))?;
        Ok((&self.wrapped, self.sealing.seal(&[RECORD, self.id.as_bytes()], &record)?))
    }

    /// A blob that only this key opens, with this context.
    ///
    /// # Errors
    /// Any [`KeyError`].
    pub fn encrypt(&self, context: &EncryptionContext, plain: &[u8]) -> Result<Vec<u8>, KeyError> {
        let sealed = self.material.seal(&self.bound_to(context), plain)?;
        Ok([&[VERSION], self.id.as_bytes().as_slice(), &sealed].concat())
    }

    /// What was encrypted.
    ///
    /// # Errors
    /// [`KeyError::Altered`]: not with this key, not in this context, or not at all.
    pub fn decrypt(
        &self,
        context: &EncryptionContext,
        blob: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, KeyError> {
        let sealed = blob.get(HEAD..).unwrap_or_default();
        self.material.open(&self.bound_to(context), sealed)
    }

    fn bound_to<'a>(&'a self, context: &'a EncryptionContext) -> Vec<&'a [u8]> {
        let pairs = context.iter().flat_map(|(name, value)| [name.as_bytes(), value.as_bytes()]);
        [&b"firnd KMS ciphertext"[..], self.id.as_bytes()].into_iter().chain(pairs).collect()
    }

    /// Whether its time is over.
    pub fn is_gone(&self, now_ms: i64) -> bool {
        matches!(self.record.state, State::PendingDeletion { at_ms } if at_ms <= now_ms)
    }
}

/// The key that a blob names, if it may be one.
pub fn named_in(blob: &[u8]) -> Option<Uuid> {
    match blob.split_first_chunk::<HEAD>()? {
        ([VERSION, id @ ..], _) => Some(Uuid::from_bytes(*id)),
        _ => None,
    }
}

/// What a record is bound to beside the key's id.
const RECORD: &[u8] = b"firnd KMS key";

fn sealing(key: &Key) -> Key {
    key.derive("firnd 2026-11 record of a KMS key")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::envelope::tests::TestKeys;

    fn key() -> KmsKey {
        KmsKey::generate(&TestKeys(1), "planted".into(), 1).unwrap()
    }

    fn context(pairs: &[(&str, &str)]) -> EncryptionContext {
        pairs.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect()
    }

    #[test]
    fn a_blob_opens_with_its_key_and_context_only() {
        let (key, other) = (key(), key());
        // The same material, so that what differs is what it is bound to.
        assert_eq!(key.material.as_bytes(), other.material.as_bytes());
        let bound = context(&[("a", "b"), ("c", "d")]);
        let blob = key.encrypt(&bound, b"plain").unwrap();
        assert_eq!(named_in(&blob), Some(key.id));
        assert_eq!(key.decrypt(&bound, &blob).unwrap().as_slice(), b"plain");
        for wrong in [&[][..], &[("a", "b")], &[("a", "bc"), ("", "d")], &[("a", "b"), ("c", "D")]]
        {
            assert!(key.decrypt(&context(wrong), &blob).is_err(), "{wrong:?}");
        }
        assert!(other.decrypt(&bound, &blob).is_err());
        assert_ne!(key.encrypt(&bound, b"plain").unwrap(), blob);
    }

    #[test]
    fn records_are_bound_to_their_key_and_do_not_print() {
        let key = key();
        let (wrapped, document) = key.sealed().unwrap();
        assert!(
            !document.windows(7).any(|w| w == b"planted") && !format!("{key:?}").contains("pl")
        );
        let open = |id| KmsKey::open(&TestKeys(1), id, wrapped.to_vec(), &document);
        assert_eq!(open(key.id).unwrap().record, key.record);
        assert!(open(Uuid::new_v4()).is_err());
        assert!(KmsKey::open(&TestKeys(2), key.id, wrapped.to_vec(), &document).is_err());
    }

    proptest! {
        #[test]
        fn no_other_bytes_open(at in any::<prop::sample::Index>(), bit in 0..8_u8, cut in 0..80_usize) {
            let key = key();
            let mut blob = key.encrypt(&context(&[]), b"some plain text").unwrap();
            let whole = blob.clone();
            blob.truncate(blob.len() - cut.min(blob.len()));
            if let Some(byte) = at.index(whole.len()).lt(&blob.len()).then(|| at.index(whole.len())) {
                blob[byte] ^= 1 << bit;
            }
            let same = blob == whole || named_in(&blob) != Some(key.id);
            prop_assert!(same || key.decrypt(&context(&[]), &blob).is_err());
        }
    }
}
