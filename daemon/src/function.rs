//! What a function is: the record that the store keeps and everything that follows from it alone
//! (its ARN, its environment, the fingerprint that decides which instances may serve it).

use std::{collections::BTreeMap, fmt, str::FromStr, sync::OnceLock, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use time::{OffsetDateTime, macros::format_description};

use crate::{api::names::Place, envelope::Envelope};

/// Which version of a function: the one that its owner changes, or one that was published and stays
/// as it was. In this order they are listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// `$LATEST`
    Latest,
    /// A number, from 1 on.
    Published(u32),
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latest => f.write_str("$LATEST"),
            Self::Published(number) => write!(f, "{number}"),
        }
    }
}

impl FromStr for Version {
    type Err = ();

    /// Takes each version in one spelling only: no sign, no leading zero.
    fn from_str(text: &str) -> Result<Self, ()> {
        if text == "$LATEST" {
            return Ok(Self::Latest);
        }
        let number = text.parse().map_err(drop)?;
        match number > 0 && text.starts_with(|c: char| matches!(c, '1'..='9')) {
            true => Ok(Self::Published(number)),
            false => Err(()),
        }
    }
}

impl Serialize for Version {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Version {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(|()| de::Error::custom("no version"))
    }
}

/// Code of a function or layer as it was uploaded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Code {
    /// SHA-256 of the zip file in lower-case hexadecimal.
    pub sha256: String,
    /// Length of the zip file in bytes.
    pub size: u64,
    /// Names its files; another one for each upload.
    pub blob: String,
}

impl Code {
    /// `CodeSha256` as Lambda spells it.
    pub fn sha256_base64(&self) -> String {
        let bytes: Vec<u8> = (0..self.sha256.len() / 2)
            .filter_map(|i| u8::from_str_radix(self.sha256.get(2 * i..2 * i + 2)?, 16).ok())
            .collect();
        STANDARD.encode(bytes)
    }
}

/// A version of a layer, as the functions know it that have it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Name of the layer.
    pub name: String,
    /// Its version.
    pub version: u32,
    /// As of its [`Code`].
    pub sha256: String,
    /// As of its [`Code`].
    pub size: u64,
}

/// What the owner of a function sets.
#[derive(Clone, PartialEq, Eq)]
pub struct Config {
    /// Runtime, one of the images that are installed.
    pub runtime: String,
    /// ARN of the execution role; kept and shown, without effect so far.
    pub role: String,
    /// Entry point.
    pub handler: String,
    /// Description.
    pub description: String,
    /// Longest time that one invocation may take in seconds.
    pub timeout_s: u32,
    /// Memory in MB.
    pub memory_mb: u32,
    /// The owner's environment variables. Secrets may lie here: never logged.
    pub environment: BTreeMap<String, String>,
    /// `TracingConfig.Mode`: `Active` or `PassThrough`.
    pub tracing: String,
    /// What lies in `/opt`; later ones over earlier ones.
    pub layers: Vec<Layer>,
    /// ARN of the queue or topic that gets asynchronous events that failed.
    pub dead_letter: Option<String>,
}

impl fmt::Debug for Config {
    /// Without the values of the environment.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { runtime, handler, timeout_s, memory_mb, environment, .. } = self;
        f.debug_struct("Config")
            .field("runtime", runtime)
            .field("handler", handler)
            .field("timeout_s", timeout_s)
            .field("memory_mb", memory_mb)
            .field("variables", &environment.len())
            .finish_non_exhaustive()
    }
}

/// One version of a function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    /// Bare name.
    pub name: String,
    /// Which version it is.
    pub version: Version,
    /// What the owner sets.
    pub config: Config,
    /// Its code; versions that were published without a new upload between them share it.
    pub code: Code,
    /// Tags of the whole function; with `$LATEST` alone.
    pub tags: BTreeMap<String, String>,
    /// Milliseconds since the epoch.
    pub last_modified_ms: i64,
    /// Changes with every update.
    pub revision: String,
    /// Its keys, those of all its versions.
    pub envelope: Envelope,
    /// What [`Function::fingerprint`] has found.
    pub memo: Memo,
}

/// A fingerprint, once it is known. Clones are there to be changed: they know nothing.
#[derive(Default)]
pub struct Memo(OnceLock<String>);

impl Clone for Memo {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl fmt::Debug for Memo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Memo")
    }
}

impl PartialEq for Memo {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Memo {}

impl Function {
    /// What tells versions of all functions apart: `name`, or `name:7` for a published one.
    pub fn qualified_name(&self) -> String {
        match self.version {
            Version::Latest => self.name.clone(),
            Version::Published(number) => format!("{}:{number}", self.name),
        }
    }

    /// The version `number` of the function, as `$LATEST` is now.
    pub fn published(&self, number: u32, description: Option<String>) -> Self {
        let mut version = self.clone();
        version.version = Version::Published(number);
        version.revision = uuid::Uuid::new_v4().to_string();
        version.tags.clear();
        version.config.description = description.unwrap_or(version.config.description);
        version
    }

    /// Whether publishing `self` would repeat `other`. A description alone makes no difference:
    /// whoever publishes may give the version one of its own.
    pub fn publishes_as(&self, other: &Self) -> bool {
        let description = self.config.description.clone();
        self.code.sha256 == other.code.sha256
            && self.config == Config { description, ..other.config.clone() }
    }

    /// `LastModified` as Lambda spells it.
    pub fn last_modified(&self) -> String {
        iso8601(self.last_modified_ms)
    }

    /// Names the disk of its code and layers; the same for versions that share these.
    pub fn disk(&self) -> String {
        let Self { code, config, .. } = self;
        if config.layers.is_empty() {
            return code.blob.clone();
        }
        let mut hasher = blake3::Hasher::new();
        for layer in &config.layers {
            hasher.update(layer.sha256.as_bytes());
        }
        format!("{}-{}", code.blob, &hasher.finalize().to_hex()[..32])
    }

    /// Longest time that one invocation may take.
    pub fn timeout(&self) -> Duration {
        Duration::from_secs(self.config.timeout_s.into())
    }

    /// Hash of everything that a running instance has taken in: instances and snapshots with
    /// another fingerprint must not serve this function. Timeout, description, role, tags and targets are
    /// not part of it, for they take effect without a new instance. It is keyed: it names files, and
    /// must not tell whether a guess at the environment is right.
    pub fn fingerprint(&self, place: &Place) -> &str {
        self.memo.0.get_or_init(|| self.hash(place))
    }

    fn hash(&self, place: &Place) -> String {
        let mut hasher = blake3::Hasher::new_keyed(self.envelope.fingerprint.as_bytes());
        // Each field with its length, so that no two records run together.
        let mut field = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
        };
        // 2: disks with layers beside the code.
        field(b"firn function 2");
        field(self.code.sha256.as_bytes());
        field(&(self.config.layers.len() as u64).to_le_bytes());
        for layer in &self.config.layers {
            field(layer.sha256.as_bytes());
        }
        field(&self.config.memory_mb.to_le_bytes());
        for (key, value) in self.environment(place, "", "") {
            field(key.as_bytes());
            field(value.as_bytes());
        }
        field(self.config.runtime.as_bytes());
        hasher.finalize().to_hex()[..32].to_owned()
    }

    /// The runtime's environment but for what the guest alone knows, such as where the role's credentials
    /// are to be had.
    pub fn environment(
        &self,
        place: &Place,
        initialization: &str,
        log_stream: &str,
    ) -> Vec<(String, String)> {
        let config = &self.config;
        let reserved = [
            ("_HANDLER", config.handler.clone()),
            ("AWS_REGION", place.region.clone()),
            ("AWS_DEFAULT_REGION", place.region.clone()),
            ("AWS_EXECUTION_ENV", format!("AWS_Lambda_{}", config.runtime)),
            ("AWS_LAMBDA_FUNCTION_NAME", self.name.clone()),
            ("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", config.memory_mb.to_string()),
            ("AWS_LAMBDA_FUNCTION_VERSION", self.version.to_string()),
            ("AWS_LAMBDA_INITIALIZATION_TYPE", initialization.to_owned()),
            ("AWS_LAMBDA_LOG_GROUP_NAME", format!("/aws/lambda/{}", self.name)),
            ("AWS_LAMBDA_LOG_STREAM_NAME", log_stream.to_owned()),
            ("LAMBDA_TASK_ROOT", "/var/task".to_owned()),
            ("LAMBDA_RUNTIME_DIR", "/var/runtime".to_owned()),
        ];
        let defaults = [
            ("LANG", "en_US.UTF-8"),
            ("TZ", ":UTC"),
            ("PATH", "/var/lang/bin:/usr/local/bin:/usr/bin/:/bin:/opt/bin"),
            (
                "LD_LIBRARY_PATH",
                "/var/lang/lib:/lib64:/usr/lib64:/var/runtime:/var/runtime/lib:\
                                 /var/task:/var/task/lib:/opt/lib",
            ),
        ];
        // The owner may replace a default, never a reserved name (validation refuses those).
        let own = &config.environment;
        let defaults = defaults.into_iter().filter(|(key, _)| !own.contains_key(*key));
        defaults
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .chain(own.iter().map(|(key, value)| (key.clone(), value.clone())))
            .chain(reserved.into_iter().map(|(key, value)| (key.to_owned(), value)))
            .collect()
    }
}

/// Milliseconds since the epoch as Lambda spells times.
pub fn iso8601(ms: i64) -> String {
    let format = format_description!(
        "[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]+0000"
    );
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000)
        .ok()
        .and_then(|at| at.format(format).ok())
        .unwrap_or_default()
}

/// Milliseconds since the epoch.
pub fn now_ms() -> i64 {
    (OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000) as i64
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    use crate::envelope::tests::TestKeys;

    /// A function that is like any other.
    pub(crate) fn example(name: &str) -> Function {
        Function {
            memo: Memo::default(),
            envelope: Envelope::generate(&TestKeys(1)).unwrap(),
            name: name.into(),
            version: Version::Latest,
            config: Config {
                runtime: "python3.11".into(),
                role: "arn:aws:iam::000000000000:role/r".into(),
                handler: "lambda_function.lambda_handler".into(),
                description: String::new(),
                timeout_s: 3,
                memory_mb: 128,
                environment: BTreeMap::from([("STAGE".into(), "test".into())]),
                tracing: "PassThrough".into(),
                layers: Vec::new(),
                dead_letter: None,
            },
            code: Code { sha256: "00".repeat(32), size: 300, blob: format!("blob-{name}") },
            tags: BTreeMap::new(),
            last_modified_ms: 1_767_225_600_000,
            revision: "r1".into(),
        }
    }

    pub(crate) fn layer(version: u32) -> Layer {
        Layer { name: "l".into(), version, sha256: format!("{version:064}"), size: 100 }
    }

    fn place() -> Place {
        Place { region: "us-east-1".into(), account: "000000000000".into() }
    }

    #[test]
    fn times_and_hashes_are_spelled_as_lambda_does() {
        let function = example("f");
        assert_eq!(function.last_modified(), "2026-01-01T00:00:00.000+0000");
        let code = Code {
            sha256: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855".into(),
            size: 0,
            blob: String::new(),
        };
        assert_eq!(code.sha256_base64(), "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=");
    }

    #[test]
    fn the_fingerprint_covers_what_an_instance_takes_in() {
        let function = example("f");
        let base = function.fingerprint(&place());
        let changed = |change: fn(&mut Function)| {
            let mut other = function.clone();
            change(&mut other);
            other.fingerprint(&place()) != base
        };
        assert!(changed(|f| f.config.handler = "a.b".into()));
        assert!(changed(|f| f.config.memory_mb = 129));
        assert!(changed(|f| f.code.sha256 = "11".repeat(32)));
        assert!(changed(|f| drop(f.config.environment.insert("A1".into(), "1".into()))));
        assert!(changed(|f| f.config.layers.push(layer(1))));
        let layers = |order: [u32; 2]| {
            let mut other = function.clone();
            other.config.layers = order.map(layer).into();
            (other.fingerprint(&place()).to_owned(), other.disk())
        };
        let (one, two) = (layers([1, 2]), layers([2, 1]));
        assert!(one.0 != two.0 && one.1 != two.1, "their order counts");
        assert!(changed(|f| f.name = "g".into()));
        assert!(changed(|f| f.version = Version::Published(1)));
        assert!(!changed(|f| f.config.description = "else".into()));
        assert!(!changed(|f| f.config.timeout_s = 900));
        assert!(!changed(|f| f.config.dead_letter = Some("arn".into())));
        assert!(!changed(|f| f.revision = "r2".into()));
        assert!(!changed(|f| f.code.blob = "another upload of the same".into()));
        assert!(changed(|f| f.envelope = Envelope::generate(&TestKeys(2)).unwrap()));
    }

    #[test]
    fn versions_have_one_spelling() {
        for (text, version) in [
            ("$LATEST", Some(Version::Latest)),
            ("1", Some(Version::Published(1))),
            ("4294967295", Some(Version::Published(u32::MAX))),
            ("4294967296", None),
            ("0", None),
            ("01", None),
            ("+1", None),
            ("-1", None),
            ("", None),
            ("$latest", None),
        ] {
            assert_eq!(text.parse().ok(), version, "{text:?}");
            assert!(version.is_none_or(|v| v.to_string() == text));
        }
        assert!(Version::Latest < Version::Published(1));
    }

    #[test]
    fn what_is_published_stays_apart_from_what_changes() {
        let mut latest = example("f");
        latest.tags.insert("team".into(), "x".into());
        let version = latest.published(7, Some("the seventh".into()));
        assert_eq!((version.qualified_name().as_str(), version.tags.len()), ("f:7", 0));
        assert_ne!(version.revision, latest.revision);
        assert!(latest.publishes_as(&version), "only the description differs");
        latest.config.timeout_s += 1;
        assert!(!latest.publishes_as(&version));
        assert_eq!(latest.published(8, None).config.description, latest.config.description);
    }

    #[test]
    fn environments_do_not_print() {
        let mut function = example("f");
        function.config.environment.insert("TOKEN".into(), "planted-secret".into());
        let text = format!("{function:?} {function:#?}");
        assert!(!text.contains("planted-secret"), "{text}");
        assert!(text.contains("lambda_handler"));
    }

    #[test]
    fn reserved_names_win_and_defaults_yield() {
        let mut function = example("f");
        function.config.environment.insert("PATH".into(), "/mine".into());
        let environment = function.environment(&place(), "on-demand", "stream");
        let all = |key: &str| -> Vec<&str> {
            environment.iter().filter(|(k, _)| k == key).map(|(_, v)| v.as_str()).collect()
        };
        assert_eq!(all("PATH"), ["/mine"]);
        assert_eq!(all("AWS_LAMBDA_INITIALIZATION_TYPE"), ["on-demand"]);
        assert_eq!(all("AWS_LAMBDA_FUNCTION_MEMORY_SIZE"), ["128"]);
        assert_eq!(all("AWS_ACCESS_KEY_ID"), Vec::<&str>::new());
    }
}
