//! A function's data key: made with the function, kept wrapped in its record, in the clear only here.

use std::fmt;

use firn::keys::{Key, KeyError, KeyService};

/// The keys of one function, derived from its data key.
#[derive(Clone)]
pub struct Envelope {
    wrapped: Vec<u8>,
    /// Encrypts its code.
    pub code: Key,
    /// Encrypts the secrets in its record, and authenticates the rest of it.
    pub record: Key,
    /// Encrypts events that wait for it.
    pub events: Key,
    /// Goes into its fingerprint, which would otherwise tell whether a guess at its environment is
    /// right.
    pub fingerprint: Key,
}

impl fmt::Debug for Envelope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Envelope")
    }
}

impl PartialEq for Envelope {
    fn eq(&self, other: &Self) -> bool {
        self.wrapped == other.wrapped
    }
}

impl Eq for Envelope {}

impl Envelope {
    /// For a new function.
    ///
    /// # Errors
    /// Any [`KeyError`].
    pub fn generate(keys: &dyn KeyService) -> Result<Self, KeyError> {
        let (key, wrapped) = keys.generate_data_key()?;
        Ok(Self::of(&key, wrapped))
    }

    /// That of a function that was made before.
    ///
    /// # Errors
    /// Any [`KeyError`].
    pub fn open(keys: &dyn KeyService, wrapped: Vec<u8>) -> Result<Self, KeyError> {
        Ok(Self::of(&keys.unwrap(&wrapped)?, wrapped))
    }

    fn of(key: &Key, wrapped: Vec<u8>) -> Self {
        Self {
            wrapped,
            code: key.derive("firnd 2026-11 encryption of a function's code"),
            record: key.derive("firnd 2026-11 encryption of a function's record"),
            events: key.derive("firnd 2026-11 encryption of a function's events"),
            fingerprint: key.derive("firnd 2026-11 fingerprint of a function"),
        }
    }

    /// Tells this function from all others, of the same name, too. It tells nothing of the key.
    pub fn id(&self) -> String {
        blake3::hash(&self.wrapped).to_hex()[..32].to_owned()
    }

    /// The data key as the key service wrapped it.
    pub fn wrapped(&self) -> &[u8] {
        &self.wrapped
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A key service whose keys are all the same.
    #[derive(Debug)]
    pub(crate) struct TestKeys(pub(crate) u8);

    impl KeyService for TestKeys {
        fn generate_data_key(&self) -> Result<(Key, Vec<u8>), KeyError> {
            Ok((Key::from_bytes([self.0; 32]), vec![self.0; 40]))
        }

        fn unwrap(&self, wrapped: &[u8]) -> Result<Key, KeyError> {
            match wrapped == [self.0; 40] {
                true => Ok(Key::from_bytes([self.0; 32])),
                false => Err(KeyError::OtherKey { expected: "a".into(), found: "b".into() }),
            }
        }
    }

    #[test]
    fn keys_differ_and_do_not_print() {
        let envelope = Envelope::generate(&TestKeys(0xab)).unwrap();
        assert_ne!(envelope.code.as_bytes(), envelope.record.as_bytes());
        assert_ne!(envelope.code.as_bytes(), envelope.fingerprint.as_bytes());
        assert_ne!(envelope.record.as_bytes(), envelope.events.as_bytes());
        assert_eq!(format!("{envelope:?} {envelope:#?}"), "Envelope Envelope");
        assert_eq!(Envelope::open(&TestKeys(0xab), vec![0xab; 40]).unwrap(), envelope);
        assert!(Envelope::open(&TestKeys(0xab), vec![0xac; 40]).is_err());
    }
}
