//! Who calls, and what they may do: users and roles of the account, their keys and policies.
//!
//! Everything comes from one file, which is read at the start and again on SIGHUP. A file that is wrong in
//! any part is refused as a whole; the one before stays in force then.

mod condition;
mod pattern;
pub mod policy;
pub mod sigv4;

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use serde::Deserialize;
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use zeroize::Zeroizing;

use self::{
    policy::{Caller, Context, Decision, Entries, Kind, Policy, PolicyError, Request},
    sigv4::{AuthError, hex},
};
use crate::api::names::Place;

/// Longest identity file in bytes.
const MAX_FILE: u64 = 4 << 20;

/// The account's users and roles, as the file says at this moment.
#[derive(Debug)]
pub struct Identity {
    path: PathBuf,
    place: Place,
    directory: RwLock<Arc<Directory>>,
    /// What links are made with; good for as long as the daemon runs.
    links: [u8; 32],
}

#[derive(Debug, Default)]
struct Directory {
    keys: HashMap<String, Credentials>,
    /// By ARN.
    roles: BTreeMap<String, Arc<Role>>,
}

/// What a request is signed with, and who that is.
#[derive(Clone)]
pub struct Credentials {
    /// The secret access key.
    pub secret: Arc<Zeroizing<String>>,
    /// Temporary credentials: the session token that must come with them.
    pub token: Option<Arc<Zeroizing<String>>>,
    /// Temporary credentials: their end.
    pub expires: Option<OffsetDateTime>,
    /// Whose they are.
    pub principal: Arc<Principal>,
}

impl std::fmt::Debug for Credentials {
    /// Without secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Credentials({})", self.principal.arn)
    }
}

/// A user, or a session of a role.
#[derive(Debug, Clone, PartialEq)]
pub struct Principal {
    /// The user's or the session's own.
    pub arn: String,
    /// What `aws:PrincipalArn` says: the user's, or the role's.
    pub issuer: String,
    /// A user's name.
    pub user: Option<String>,
    /// A unique id, such as `AIDA…`, or `AROA…:session`.
    pub id: String,
    /// How policies may name it.
    pub caller: Caller,
    /// What it may do.
    pub policies: Vec<Policy>,
}

/// A role.
#[derive(Debug)]
pub struct Role {
    trust: Policy,
    policies: Vec<Policy>,
}

/// Why an identity file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// It can't be read.
    #[error("identity file {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Its mode, owner or length is not as it must be.
    #[error("identity file {}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// It says something that can't be understood.
    #[error("identity file {}: {whose}: {reason}", path.display())]
    Entry {
        /// The file.
        path: PathBuf,
        /// Which user or role.
        whose: String,
        /// What is wrong.
        reason: String,
    },
    /// A policy in it can't be enforced.
    #[error("identity file {}: {whose}: {source}", path.display())]
    Policy {
        /// The file.
        path: PathBuf,
        /// Whose policy, and which.
        whose: String,
        /// What is wrong.
        source: PolicyError,
    },
}

impl Identity {
    /// Reads the file at `path`.
    ///
    /// # Errors
    /// Says what is wrong with it, never what secrets it has.
    pub fn open(path: &Path, place: Place) -> Result<Self, IdentityError> {
        let directory = RwLock::new(Arc::new(read(path, &place)?));
        let mut links = [0; 32];
        for half in links.chunks_exact_mut(16) {
            half.copy_from_slice(uuid::Uuid::new_v4().as_bytes());
        }
        Ok(Self { path: path.to_owned(), place, directory, links })
    }

    /// Reads it again. What it says holds from the next request on.
    ///
    /// # Errors
    /// As [`Identity::open`]; nothing has changed then.
    pub fn reload(&self) -> Result<(), IdentityError> {
        let directory = Arc::new(read(&self.path, &self.place)?);
        *self.directory.write().unwrap_or_else(PoisonError::into_inner) = directory;
        Ok(())
    }

    /// What belongs to an access key. A session token must come with temporary credentials, and with no
    /// others.
    ///
    /// # Errors
    /// [`AuthError::Unrecognized`] or [`AuthError::Expired`].
    pub fn find(
        &self,
        key_id: &str,
        token: Option<&str>,
        now: OffsetDateTime,
    ) -> Result<Credentials, AuthError> {
        let directory = self.directory();
        let found = directory.keys.get(key_id).ok_or(AuthError::Unrecognized)?;
        let same = match (&found.token, token) {
            (None, None) => true,
            (Some(expected), Some(token)) => {
                // Hashes of what is compared tell nothing by the time that comparing them takes.
                Sha256::digest(expected.as_bytes()) == Sha256::digest(token.as_bytes())
            }
            _ => false,
        };
        match found.expires {
            _ if !same => Err(AuthError::Unrecognized),
            Some(end) if end <= now => Err(AuthError::Expired),
            _ => Ok(found.clone()),
        }
    }

    /// Whether a service may act in a role: the role is there, and its trust policy says so.
    pub fn trusts(&self, role: &str, service: &str) -> bool {
        let directory = self.directory();
        let Some(found) = directory.roles.get(role) else { return false };
        let caller = Caller { service: Some(service.into()), ..Caller::default() };
        let context = Context::default();
        let request = Request {
            caller: &caller,
            action: "sts:AssumeRole",
            resource: role,
            context: &context,
        };
        found.trust.decide(&request) == Decision::Allowed
    }

    /// Whoever acts in a role, as resource policies may name it, and what the role's own policies say.
    pub fn role_may(&self, role: &str, action: &str, resource: &str) -> (Caller, Decision) {
        let caller = Caller {
            account: Some(self.place.account.clone()),
            arns: vec![role.to_owned()],
            service: None,
        };
        let mut context = Context::default();
        context.set("aws:PrincipalArn", role);
        let directory = self.directory();
        let policies = directory.roles.get(role).map_or(&[][..], |role| &role.policies[..]);
        let request = Request { caller: &caller, action, resource, context: &context };
        let decision = policy::evaluate(policies, &request);
        (caller, decision)
    }

    /// A proof that whoever made it may do what `text` says; for links.
    pub fn seal(&self, text: &str) -> String {
        blake3::keyed_hash(&self.links, text.as_bytes()).to_hex().to_string()
    }

    /// Whether a proof is that of `text`.
    pub fn proves(&self, proof: &str, text: &str) -> bool {
        // Compared in constant time.
        let proof = blake3::Hash::from_hex(proof);
        proof.is_ok_and(|proof| proof == blake3::keyed_hash(&self.links, text.as_bytes()))
    }

    fn directory(&self) -> Arc<Directory> {
        self.directory.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Principal {
    /// What its being the caller says, for conditions and variables.
    pub fn describe(&self, context: &mut Context) {
        context.set("aws:PrincipalArn", &self.issuer);
        context.set("aws:userid", &self.id);
        context.set("aws:PrincipalType", if self.user.is_some() { "User" } else { "AssumedRole" });
        if let Some(account) = &self.caller.account {
            context.set("aws:PrincipalAccount", account);
        }
        if let Some(user) = &self.user {
            context.set("aws:username", user);
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFile {
    #[serde(default)]
    users: Entries<RawUser>,
    #[serde(default)]
    roles: Entries<RawRole>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawUser {
    #[serde(default)]
    keys: Vec<RawKey>,
    #[serde(default)]
    policies: Vec<Box<RawValue>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawKey {
    id: String,
    secret: Zeroizing<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRole {
    trust: Box<RawValue>,
    #[serde(default)]
    policies: Vec<Box<RawValue>>,
}

fn read(path: &Path, place: &Place) -> Result<Directory, IdentityError> {
    let text = read_private(path)?;
    let file = |reason: String| IdentityError::File { path: path.to_owned(), reason };
    let raw: RawFile = serde_json::from_str(&text).map_err(|error| {
        // serde's own words may quote a secret that stands in the wrong place.
        let (line, column) = (error.line(), error.column());
        let what = match error.classify() {
            serde_json::error::Category::Data => "an unknown, missing, repeated or mistyped member",
            _ => "it is not valid JSON",
        };
        file(format!("{what} (line {line}, column {column})"))
    })?;
    let entry = |whose: &str, reason: &str| IdentityError::Entry {
        path: path.to_owned(),
        whose: whose.into(),
        reason: reason.into(),
    };
    let policy = |whose: String, json: &RawValue, kind| {
        Policy::parse(json.get(), kind).map_err(|source| IdentityError::Policy {
            path: path.to_owned(),
            whose,
            source,
        })
    };
    let policies = |whose: &str, list: &[Box<RawValue>]| {
        let numbered = list.iter().enumerate();
        numbered
            .map(|(n, json)| policy(format!("{whose}, policy {}", n + 1), json, Kind::Identity))
            .collect::<Result<Vec<_>, _>>()
    };
    let account = &place.account;
    let mut directory = Directory::default();
    for (name, user) in raw.users.0 {
        let whose = format!("user {name:?}");
        if !is_name(&name) {
            return Err(entry(&whose, "a name has 1 to 64 letters, digits and +=,.@_-"));
        }
        let arn = format!("arn:aws:iam::{account}:user/{name}");
        let principal = Arc::new(Principal {
            issuer: arn.clone(),
            user: Some(name.clone()),
            id: unique("AIDA", &arn),
            caller: Caller {
                account: Some(account.clone()),
                arns: vec![arn.clone()],
                service: None,
            },
            policies: policies(&whose, &user.policies)?,
            arn,
        });
        for key in user.keys {
            let well_formed = (16..=128).contains(&key.id.len())
                && key.id.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit());
            if !well_formed {
                return Err(entry(&whose, "a key's id has 16 to 128 capital letters and digits"));
            }
            if !(16..=256).contains(&key.secret.len()) {
                return Err(entry(&whose, "a key's secret has 16 to 256 characters"));
            }
            let credentials = Credentials {
                secret: Arc::new(key.secret),
                token: None,
                expires: None,
                principal: principal.clone(),
            };
            if directory.keys.insert(key.id, credentials).is_some() {
                return Err(entry(&whose, "a key's id is there twice"));
            }
        }
    }
    for (name, role) in raw.roles.0 {
        let whose = format!("role {name:?}");
        let (_, last) = name.rsplit_once('/').unwrap_or(("", &name));
        if !is_name(last) || !name.split('/').all(is_name) || name.len() > 512 {
            return Err(entry(&whose, "a name has 1 to 64 letters, digits and +=,.@_-"));
        }
        let role = Role {
            trust: policy(format!("{whose}, trust"), &role.trust, Kind::Trust)?,
            policies: policies(&whose, &role.policies)?,
        };
        directory.roles.insert(format!("arn:aws:iam::{account}:role/{name}"), Arc::new(role));
    }
    Ok(directory)
}

/// The text of a file that nobody else can read.
fn read_private(path: &Path) -> Result<Zeroizing<String>, IdentityError> {
    let at = |source| IdentityError::Io { path: path.to_owned(), source };
    let wrong = |reason: String| IdentityError::File { path: path.to_owned(), reason };
    let file = File::open(path).map_err(at)?;
    let metadata = file.metadata().map_err(at)?;
    if !metadata.is_file() {
        return Err(wrong("is no regular file".into()));
    }
    let (mode, owner) = (metadata.mode() & 0o7777, metadata.uid());
    if mode & 0o077 != 0 {
        return Err(wrong(format!(
            "has mode {mode:04o}, so others than its owner can use it: `chmod 600` it, and replace its \
             keys if others may have read them"
        )));
    }
    let user = rustix::process::geteuid().as_raw();
    if owner != user {
        return Err(wrong(format!("belongs to user {owner}, not to user {user}")));
    }
    if metadata.len() > MAX_FILE {
        return Err(wrong(format!(
            "is {} bytes long; at most {MAX_FILE} are read",
            metadata.len()
        )));
    }
    // Room for all of it: growing would leave copies of secrets behind.
    let mut text = Zeroizing::new(String::with_capacity(MAX_FILE as usize));
    file.take(MAX_FILE).read_to_string(&mut text).map_err(at)?;
    Ok(text)
}

fn is_name(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"+=,.@_-".contains(&b))
}

/// An id that looks as IAM's do, and is the same for the same ARN.
fn unique(prefix: &str, arn: &str) -> String {
    let digest = hex(&Sha256::digest(arn)[..9]).to_uppercase();
    format!("{prefix}{}", &digest[..17])
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use serde_json::{Value, json};

    use super::*;

    fn place() -> Place {
        Place { region: "us-east-1".into(), account: "111122223333".into() }
    }

    fn write(path: &Path, document: &Value) {
        fs::write(path, document.to_string()).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    }

    fn example() -> Value {
        json!({
            "users": {"bob": {
                "keys": [{"id": "AKIDEXAMPLE000000000", "secret": "planted-secret-of-bob"}],
                "policies": [{"Version": "2012-10-17", "Statement": []}],
            }},
            "roles": {"service/r": {
                "trust": {"Version": "2012-10-17", "Statement": {"Effect": "Allow",
                    "Principal": {"Service": "lambda.amazonaws.com"}, "Action": "sts:AssumeRole"}},
            }},
        })
    }

    fn open(document: &Value) -> Result<Identity, IdentityError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("identity.json");
        write(&path, document);
        Identity::open(&path, place())
    }

    #[test]
    fn keys_lead_to_users_and_secrets_do_not_print() {
        let identity = open(&example()).unwrap();
        let now = OffsetDateTime::now_utc();
        let bob = identity.find("AKIDEXAMPLE000000000", None, now).unwrap();
        assert_eq!(bob.principal.arn, "arn:aws:iam::111122223333:user/bob");
        assert_eq!(bob.secret.as_str(), "planted-secret-of-bob");
        assert!(bob.principal.id.starts_with("AIDA") && bob.principal.id.len() == 21);
        for (key, token) in [("AKIDEXAMPLE000000001", None), ("AKIDEXAMPLE000000000", Some("x"))] {
            let error = identity.find(key, token, now).unwrap_err();
            assert_eq!(error, AuthError::Unrecognized);
        }
        assert!(!format!("{identity:?} {bob:?}").contains("planted"));
    }

    #[test]
    fn temporary_credentials_need_their_token_and_end() {
        let identity = open(&example()).unwrap();
        let now = OffsetDateTime::now_utc();
        let mut session = identity.find("AKIDEXAMPLE000000000", None, now).unwrap();
        session.token = Some(Arc::new(Zeroizing::new("token".into())));
        session.expires = Some(now + time::Duration::minutes(1));
        let mut directory = Directory::default();
        directory.keys.insert("ASIA".into(), session);
        *identity.directory.write().unwrap() = Arc::new(directory);
        assert!(identity.find("ASIA", Some("token"), now).is_ok());
        for token in [None, Some("tokem")] {
            let error = identity.find("ASIA", token, now).unwrap_err();
            assert_eq!(error, AuthError::Unrecognized);
        }
        let later = now + time::Duration::minutes(1);
        assert_eq!(identity.find("ASIA", Some("token"), later).unwrap_err(), AuthError::Expired);
    }

    #[test]
    fn roles_say_who_may_act_in_them() {
        let identity = open(&example()).unwrap();
        let role = "arn:aws:iam::111122223333:role/service/r";
        assert!(identity.trusts(role, "lambda.amazonaws.com"));
        assert!(!identity.trusts(role, "s3.amazonaws.com"));
        assert!(!identity.trusts("arn:aws:iam::111122223333:role/r", "lambda.amazonaws.com"));
    }

    #[test]
    fn proofs_are_of_one_text() {
        let identity = open(&example()).unwrap();
        let proof = identity.seal("a");
        assert!(identity.proves(&proof, "a"));
        assert!(!identity.proves(&proof, "b") && !identity.proves("00", "a"));
        assert!(!open(&example()).unwrap().proves(&proof, "a"));
    }

    #[test]
    fn what_is_wrong_is_named_and_secrets_are_not() {
        let change = |change: fn(&mut Value)| {
            let mut document = example();
            change(&mut document);
            open(&document).unwrap_err().to_string()
        };
        for (error, words) in [
            (change(|d| d["groups"] = json!({})), "unknown"),
            (change(|d| d["users"]["bob"]["keys"] = json!("planted-secret")), "mistyped"),
            (change(|d| d["users"]["b b"] = json!({})), "user \"b b\": a name"),
            (change(|d| d["users"]["bob"]["keys"][0]["id"] = json!("planted")), "a key's id has"),
            (change(|d| d["users"]["bob"]["keys"][0]["secret"] = json!("planted")), "secret has"),
            (
                change(|d| d["users"]["eve"] = d["users"]["bob"].clone()),
                "user \"eve\": a key's id is there twice",
            ),
            (
                change(|d| d["users"]["bob"]["policies"][0]["Version"] = json!("1")),
                "user \"bob\", policy 1: Version",
            ),
            (
                change(|d| d["roles"]["service/r"]["trust"]["Statement"]["Resource"] = json!("*")),
                "role \"service/r\", trust: a trust policy has no Resource",
            ),
            (change(|d| d["roles"]["a//b"] = d["roles"]["service/r"].clone()), "role \"a//b\""),
        ] {
            assert!(error.contains(words) && !error.contains("planted"), "{error}");
        }
    }

    #[test]
    fn a_file_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("identity.json");
        assert!(matches!(Identity::open(&path, place()), Err(IdentityError::Io { .. })));
        write(&path, &example());
        for mode in [0o640, 0o604, 0o620] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let error = Identity::open(&path, place()).unwrap_err().to_string();
            assert!(error.contains("chmod 600"), "{error}");
        }
        let error = Identity::open(dir.path(), place()).unwrap_err().to_string();
        assert!(error.contains("no regular file"), "{error}");
    }

    #[test]
    fn a_file_is_read_again_or_stays_in_force() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("identity.json");
        write(&path, &example());
        let identity = Identity::open(&path, place()).unwrap();
        let now = OffsetDateTime::now_utc();
        fs::write(&path, "{").unwrap();
        assert!(identity.reload().is_err());
        assert!(identity.find("AKIDEXAMPLE000000000", None, now).is_ok());
        fs::write(&path, "{}").unwrap();
        identity.reload().unwrap();
        assert!(identity.find("AKIDEXAMPLE000000000", None, now).is_err());
    }
}
