//! Temporary credentials of roles. Nothing is remembered of them: the session token says whose they are and
//! until when, sealed with a key of the installation's own, and key id and secret follow from the token
//! ([decision 16](../../../docs/decisions/0016-credentials-of-functions.md)).

use std::fmt;

use base64::{Engine, engine::general_purpose::STANDARD};
use firn::keys::{Key, KeyError};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use zeroize::Zeroizing;

use super::sigv4::AuthError;

/// Longest token; none that was made is longer.
const MAX_TOKEN: usize = 4096;

/// What a token is bound to.
const CONTEXT: &[&[u8]] = &[b"firnd session"];

/// Characters of the random part of a key's id.
const ID: usize = 16;

/// Makes and reads temporary credentials.
#[derive(Clone)]
pub struct Sessions {
    sealing: Key,
    deriving: Key,
}

impl fmt::Debug for Sessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sessions")
    }
}

/// Who acts in which role until when; what a token says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assumed {
    /// ARN of the role.
    pub role: String,
    /// Name of the session.
    pub name: String,
    /// Seconds since the epoch.
    pub issued: i64,
    /// Seconds since the epoch.
    pub expires: i64,
    /// ARN of the function whose session it is.
    pub function: Option<String>,
}

/// What a client signs with.
pub struct Temporary {
    /// Access key id.
    pub key_id: String,
    /// Secret access key.
    pub secret: Zeroizing<String>,
    /// Session token.
    pub token: String,
}

impl fmt::Debug for Temporary {
    /// Without secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Temporary({})", self.key_id)
    }
}

impl Sessions {
    /// What was made with the same key before is read, too.
    pub fn new(key: &Key) -> Self {
        Self {
            sealing: key.derive("firnd 2026-11 session tokens"),
            deriving: key.derive("firnd 2026-11 access keys of sessions"),
        }
    }

    /// New credentials.
    ///
    /// # Errors
    /// [`KeyError::Random`].
    pub fn issue(&self, assumed: &Assumed) -> Result<Temporary, KeyError> {
        // It is made of text and numbers.
        let plain =
            serde_json::to_vec(assumed).map_err(|error| KeyError::Service(error.to_string()))?;
        let token = STANDARD.encode(self.sealing.seal(CONTEXT, &plain)?);
        let (key_id, secret) = self.access_key(&token);
        Ok(Temporary { key_id, secret, token })
    }

    /// What a token says, and the secret that belongs to it.
    ///
    /// # Errors
    /// [`AuthError::Unrecognized`] if it was not made here or not for that key; [`AuthError::Expired`].
    pub fn open(
        &self,
        key_id: &str,
        token: &str,
        now: OffsetDateTime,
    ) -> Result<(Assumed, Zeroizing<String>), AuthError> {
        let open = || {
            let sealed = STANDARD.decode(Some(token).filter(|t| t.len() <= MAX_TOKEN)?).ok()?;
            let plain = self.sealing.open(CONTEXT, &sealed).ok()?;
            serde_json::from_slice::<Assumed>(&plain).ok()
        };
        let assumed = open().ok_or(AuthError::Unrecognized)?;
        let (own, secret) = self.access_key(token);
        match () {
            () if own != key_id => Err(AuthError::Unrecognized),
            () if assumed.expires <= now.unix_timestamp() => Err(AuthError::Expired),
            () => Ok((assumed, secret)),
        }
    }

    /// Id and secret of the access key that goes with a token.
    fn access_key(&self, token: &str) -> (String, Zeroizing<String>) {
        const ALPHABET: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
        let mut bytes = Zeroizing::new([0; 30 + ID]);
        let mut hash = blake3::Hasher::new_keyed(self.deriving.as_bytes());
        hash.update(token.as_bytes()).finalize_xof().fill(&mut *bytes);
        let (secret, id) = bytes.split_at(30);
        let id = id.iter().map(|byte| char::from(ALPHABET[usize::from(byte % 32)]));
        (format!("ASIA{}", id.collect::<String>()), Zeroizing::new(STANDARD.encode(secret)))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sessions() -> Sessions {
        Sessions::new(&Key::from_bytes([1; 32]))
    }

    fn assumed(now: OffsetDateTime) -> Assumed {
        Assumed {
            role: "arn:aws:iam::111122223333:role/r".into(),
            name: "f".into(),
            issued: now.unix_timestamp(),
            expires: now.unix_timestamp() + 60,
            function: None,
        }
    }

    #[test]
    fn credentials_are_new_each_time_and_say_whose_they_are() {
        let now = OffsetDateTime::now_utc();
        let (a, b) =
            (sessions().issue(&assumed(now)).unwrap(), sessions().issue(&assumed(now)).unwrap());
        assert!(a.key_id != b.key_id && a.secret != b.secret && a.token != b.token);
        assert!(a.key_id.starts_with("ASIA") && a.key_id.len() == 20 && a.secret.len() == 40);
        // Whoever has the same key, after a restart for one, reads them.
        let (found, secret) = sessions().open(&a.key_id, &a.token, now).unwrap();
        assert_eq!((found, secret), (assumed(now), a.secret.clone()));
        assert!(!format!("{a:?} {:?}", sessions()).contains(a.secret.as_str()));
    }

    #[test]
    fn what_is_altered_mixed_or_over_opens_nothing() {
        let now = OffsetDateTime::now_utc();
        let (a, b) =
            (sessions().issue(&assumed(now)).unwrap(), sessions().issue(&assumed(now)).unwrap());
        let refused = |key_id: &str, token: &str, now| {
            sessions().open(key_id, token, now).map(|_| ()).unwrap_err()
        };
        let mut altered = a.token.clone().into_bytes();
        altered[40] = if altered[40] == b'A' { b'B' } else { b'A' };
        let altered = String::from_utf8(altered).unwrap();
        for (key_id, token) in [
            (&*a.key_id, &*b.token),
            (&a.key_id, &altered),
            (&a.key_id, &a.token[..80]),
            (&a.key_id, ""),
            (&a.key_id, &"A".repeat(MAX_TOKEN + 4)),
        ] {
            assert_eq!(refused(key_id, token, now), AuthError::Unrecognized);
        }
        let other = Sessions::new(&Key::from_bytes([2; 32]));
        assert!(other.open(&a.key_id, &a.token, now).is_err());
        let end = now + time::Duration::seconds(60);
        assert_eq!(refused(&a.key_id, &a.token, end), AuthError::Expired);
        assert!(sessions().open(&a.key_id, &a.token, end - time::Duration::SECOND).is_ok());
    }
}
