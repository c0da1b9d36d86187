//! Who calls, and what they may do: users and roles of the account, their keys and policies.
//!
//! Everything comes from one file, which is read at the start and again on SIGHUP. A file that is wrong in
//! any part is refused as a whole; the one before stays in force then.

mod condition;
mod pattern;
pub mod policy;
pub mod sessions;
pub mod sigv4;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::File,
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use serde::Deserialize;
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use zeroize::Zeroizing;

use self::{
    policy::{Caller, Context, Decision, Entries, Kind, Policy, PolicyError, Request},
    sessions::{Assumed, Sessions},
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
    pub policies: Arc<[Policy]>,
    /// Of a session: what its token says.
    pub session: Option<Assumed>,
}

/// A role.
#[derive(Debug)]
struct Role {
    trust: Policy,
    policies: Arc<[Policy]>,
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
    /// others; these end with their time or their role.
    ///
    /// # Errors
    /// [`AuthError::Unrecognized`] or [`AuthError::Expired`].
    pub fn find(
        &self,
        sessions: &Sessions,
        key_id: &str,
        token: Option<&str>,
        now: OffsetDateTime,
    ) -> Result<Credentials, AuthError> {
        let Some(token) = token else {
            let found = self.directory().keys.get(key_id).cloned();
            return found.ok_or(AuthError::Unrecognized);
        };
        let (assumed, secret) = sessions.open(key_id, token, now)?;
        let principal = self.assumed(assumed).ok_or(AuthError::Unrecognized)?;
        Ok(Credentials { secret: Arc::new(secret), principal: Arc::new(principal) })
    }

    /// Whoever acts in a role, if there is one.
    fn assumed(&self, assumed: Assumed) -> Option<Principal> {
        let account = &self.place.account;
        let role = self.directory().roles.get(&assumed.role)?.clone();
        let arn = session_arn(account, &assumed);
        Some(Principal {
            issuer: assumed.role.clone(),
            user: None,
            id: session_id(&assumed),
            caller: Caller {
                account: Some(account.clone()),
                arns: vec![arn.clone(), assumed.role.clone()],
                service: None,
            },
            policies: role.policies.clone(),
            session: Some(assumed),
            arn,
        })
    }

    /// Whether the role's trust policy lets somebody assume it whose own policies say `own` of that.
    pub fn may_assume(
        &self,
        role: &str,
        caller: &Caller,
        context: &Context,
        own: Decision,
    ) -> bool {
        let directory = self.directory();
        let Some(found) = directory.roles.get(role) else { return false };
        let request = Request { caller, action: "sts:AssumeRole", resource: role, context };
        match found.trust.decide(&request) {
            Decision::Denied => false,
            Decision::Allowed => own != Decision::Denied,
            // A trust policy that names the account leaves it to the policies of its users.
            Decision::Unmentioned => own == Decision::Allowed && found.trust.delegates(&request),
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
        let policies = directory.roles.get(role).map_or(&[][..], |role| &*role.policies);
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
        if let Some(session) = &self.session {
            let issued = OffsetDateTime::from_unix_timestamp(session.issued).ok();
            let issued = issued.and_then(|issued| issued.format(&Rfc3339).ok());
            context.set("aws:TokenIssueTime", issued.unwrap_or_default());
            if let Some(function) = &session.function {
                context.set("lambda:SourceFunctionArn", function);
            }
        }
    }
}

/// What a session is called.
pub fn session_arn(account: &str, assumed: &Assumed) -> String {
    let Assumed { role, name, .. } = assumed;
    // Without the role's path.
    let (_, role) = role.rsplit_once('/').unwrap_or_default();
    format!("arn:aws:sts::{account}:assumed-role/{role}/{name}")
}

/// Its unique id.
pub fn session_id(assumed: &Assumed) -> String {
    format!("{}:{}", role_id(&assumed.role), assumed.name)
}

/// The unique id of a role.
pub fn role_id(arn: &str) -> String {
    unique("AROA", arn)
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
            .collect::<Result<Arc<[_]>, _>>()
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
            session: None,
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
            let credentials =
                Credentials { secret: Arc::new(key.secret), principal: principal.clone() };
            if directory.keys.insert(key.id, credentials).is_some() {
                return Err(entry(&whose, "a key's id is there twice"));
            }
        }
    }
    let mut names = BTreeSet::new();
    for (name, role) in raw.roles.0 {
        let whose = format!("role {name:?}");
        let (_, last) = name.rsplit_once('/').unwrap_or(("", &name));
        if !is_name(last) || !name.split('/').all(is_name) || name.len() > 512 {
            return Err(entry(&whose, "a name has 1 to 64 letters, digits and +=,.@_-"));
        }
        // ARNs of sessions don't have the path.
        if !names.insert(last.to_owned()) {
            return Err(entry(&whose, "its name is there twice, if on another path"));
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

    use super::{sessions::tests::sessions, *};

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
        let bob = identity.find(&sessions(), "AKIDEXAMPLE000000000", None, now).unwrap();
        assert_eq!(bob.principal.arn, "arn:aws:iam::111122223333:user/bob");
        assert_eq!(bob.secret.as_str(), "planted-secret-of-bob");
        assert!(bob.principal.id.starts_with("AIDA") && bob.principal.id.len() == 21);
        for (key, token) in [("AKIDEXAMPLE000000001", None), ("AKIDEXAMPLE000000000", Some("x"))] {
            let error = identity.find(&sessions(), key, token, now).unwrap_err();
            assert_eq!(error, AuthError::Unrecognized);
        }
        assert!(!format!("{identity:?} {bob:?}").contains("planted"));
    }

    #[test]
    fn sessions_act_in_their_role_while_it_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("identity.json");
        write(&path, &example());
        let identity = Identity::open(&path, place()).unwrap();
        let now = OffsetDateTime::now_utc();
        let role = "arn:aws:iam::111122223333:role/service/r";
        let assumed = Assumed {
            role: role.into(),
            name: "f".into(),
            issued: 0,
            expires: now.unix_timestamp() + 60,
            function: Some("arn:f".into()),
        };
        let key = sessions().issue(&assumed).unwrap();
        let find = |token| identity.find(&sessions(), &key.key_id, token, now);
        let found = find(Some(&*key.token)).unwrap();
        let principal = &found.principal;
        assert_eq!(principal.arn, "arn:aws:sts::111122223333:assumed-role/r/f");
        assert_eq!(principal.caller.arns, [principal.arn.as_str(), role]);
        assert_eq!(*found.secret, key.secret);
        assert!(principal.id.starts_with("AROA") && principal.id.ends_with(":f"));
        let mut context = Context::default();
        principal.describe(&mut context);
        assert_eq!(context.get("aws:tokenissuetime"), ["1970-01-01T00:00:00Z"]);
        assert_eq!(context.get("lambda:sourcefunctionarn"), ["arn:f"]);
        assert_eq!(context.get("aws:principalarn"), [role]);
        assert_eq!(find(None).unwrap_err(), AuthError::Unrecognized);
        fs::write(&path, "{}").unwrap();
        identity.reload().unwrap();
        assert_eq!(find(Some(&key.token)).unwrap_err(), AuthError::Unrecognized);
    }

    #[test]
    fn a_role_is_assumed_by_whom_it_trusts() {
        let allow = |principal: &str| {
            json!({"Effect": "Allow", "Action": "sts:AssumeRole",
            "Principal": {"AWS": principal}})
        };
        let bob = "arn:aws:iam::111122223333:user/bob";
        let may = |statements: Value, own| {
            let mut document = example();
            document["roles"]["service/r"]["trust"]["Statement"] = statements;
            let (identity, role) =
                (open(&document).unwrap(), "arn:aws:iam::111122223333:role/service/r");
            let account = Some("111122223333".to_owned());
            let caller = Caller { account, arns: vec![bob.into()], service: None };
            identity.may_assume(role, &caller, &Context::default(), own)
        };
        use Decision::{Allowed, Denied, Unmentioned};
        for (statements, own, expected) in [
            (json!([]), Allowed, false),
            (allow(bob), Unmentioned, true),
            (allow(bob), Denied, false),
            (allow("111122223333"), Unmentioned, false),
            (allow("111122223333"), Allowed, true),
            (allow("arn:aws:iam::111122223333:root"), Allowed, true),
            (allow("444455556666"), Allowed, false),
            (allow("arn:aws:iam::111122223333:user/eve"), Allowed, false),
            (
                json!([allow("111122223333"), {"Effect": "Deny", "Action": "sts:AssumeRole",
                "Principal": {"AWS": bob}}]),
                Allowed,
                false,
            ),
        ] {
            assert_eq!(may(statements.clone(), own), expected, "{statements} {own:?}");
        }
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
            (change(|d| d["roles"]["x/r"] = d["roles"]["service/r"].clone()), "there twice, if"),
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
        assert!(identity.find(&sessions(), "AKIDEXAMPLE000000000", None, now).is_ok());
        fs::write(&path, "{}").unwrap();
        identity.reload().unwrap();
        assert!(identity.find(&sessions(), "AKIDEXAMPLE000000000", None, now).is_err());
    }
}
