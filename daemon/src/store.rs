//! The durable record of functions: one SQLite file, with everything that it says also in memory.
//!
//! Reads never touch SQLite; writes commit there first (WAL, `synchronous=FULL`) and reach memory
//! under the same lock, so memory never says what a restart would not. Writing blocks: call it
//! through [`tokio::task::spawn_blocking`].
//!
//! Each version of a function has a record, sealed with the function's key: the environment is encrypted,
//! and bound to all other columns, so that none can be altered or moved to another function or version. A
//! whole record of earlier can be put back; that takes write access to this directory. What is attached to
//! a function as a whole is one more sealed document, bound to its name. [Layers](layers) and [KMS keys](kms)
//! have records of their own.

mod kms;
mod layers;

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    fs::File,
    io,
    ops::Bound::{Excluded, Included, Unbounded},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use firn::keys::{KeyError, KeyService};
use rusqlite::{Connection, OpenFlags, Row, params};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

pub use self::kms::KmsKeys;
use crate::{
    attachments::{Alias, Attachments},
    envelope::Envelope,
    function::{Code, Config, Function, Layer, Memo, Version},
};

/// The oldest schema that can be read. The one before kept code and environments in the clear; bringing
/// it up to date would leave copies of them in free pages and blocks.
const OLDEST: usize = 2;

/// The schema, one step a version from [`OLDEST`] on. Released steps never change; add new ones at the
/// end.
const MIGRATIONS: [&str; 5] = [
    "CREATE TABLE functions (
        name             TEXT    NOT NULL PRIMARY KEY,
        runtime          TEXT    NOT NULL,
        role             TEXT    NOT NULL,
        handler          TEXT    NOT NULL,
        description      TEXT    NOT NULL,
        timeout_s        INTEGER NOT NULL CHECK (timeout_s BETWEEN 1 AND 900),
        memory_mb        INTEGER NOT NULL CHECK (memory_mb BETWEEN 128 AND 10240),
        wrapped_key      BLOB    NOT NULL,
        environment      BLOB    NOT NULL,
        tracing          TEXT    NOT NULL,
        tags             TEXT    NOT NULL CHECK (json_valid(tags)),
        code_sha256      TEXT    NOT NULL CHECK (length(code_sha256) = 64),
        code_size        INTEGER NOT NULL,
        code_blob        TEXT    NOT NULL UNIQUE,
        last_modified_ms INTEGER NOT NULL,
        revision         TEXT    NOT NULL
    ) STRICT, WITHOUT ROWID;",
    // Version 0 is $LATEST. `numbers` outlives functions: no number is ever given twice.
    "CREATE TABLE versions (
        name             TEXT    NOT NULL,
        version          INTEGER NOT NULL CHECK (version BETWEEN 0 AND 4294967295),
        runtime          TEXT    NOT NULL,
        role             TEXT    NOT NULL,
        handler          TEXT    NOT NULL,
        description      TEXT    NOT NULL,
        timeout_s        INTEGER NOT NULL CHECK (timeout_s BETWEEN 1 AND 900),
        memory_mb        INTEGER NOT NULL CHECK (memory_mb BETWEEN 128 AND 10240),
        wrapped_key      BLOB    NOT NULL,
        environment      BLOB    NOT NULL,
        tracing          TEXT    NOT NULL,
        tags             TEXT    NOT NULL CHECK (json_valid(tags)),
        code_sha256      TEXT    NOT NULL CHECK (length(code_sha256) = 64),
        code_size        INTEGER NOT NULL,
        code_blob        TEXT    NOT NULL,
        last_modified_ms INTEGER NOT NULL,
        revision         TEXT    NOT NULL,
        PRIMARY KEY (name, version)
    ) STRICT, WITHOUT ROWID;
    INSERT INTO versions SELECT name, 0, runtime, role, handler, description, timeout_s, memory_mb,
        wrapped_key, environment, tracing, tags, code_sha256, code_size, code_blob, last_modified_ms,
        revision FROM functions;
    DROP TABLE functions;
    CREATE TABLE numbers (
        name TEXT    NOT NULL PRIMARY KEY,
        last INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;",
    "CREATE TABLE attachments (
        name     TEXT NOT NULL PRIMARY KEY,
        document BLOB NOT NULL
    ) STRICT, WITHOUT ROWID;",
    "CREATE TABLE layers (
        name        TEXT    NOT NULL,
        version     INTEGER NOT NULL CHECK (version BETWEEN 1 AND 4294967295),
        wrapped_key BLOB    NOT NULL,
        document    BLOB    NOT NULL,
        PRIMARY KEY (name, version)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE layer_numbers (
        name TEXT    NOT NULL PRIMARY KEY,
        last INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;",
    "CREATE TABLE kms_keys (
        id          TEXT NOT NULL PRIMARY KEY,
        wrapped_key BLOB NOT NULL,
        document    BLOB NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE own_keys (
        purpose     TEXT NOT NULL PRIMARY KEY,
        wrapped_key BLOB NOT NULL
    ) STRICT, WITHOUT ROWID;",
];

/// The versions of one function.
pub type Versions = BTreeMap<Version, Arc<Function>>;

/// One function.
#[derive(Debug, Default)]
struct Entry {
    versions: Versions,
    attachments: Arc<Attachments>,
}

impl Entry {
    fn latest(&self) -> Option<&Arc<Function>> {
        self.versions.get(&Version::Latest)
    }
}

/// A version that was asked for, and whether that made it.
#[derive(Debug)]
pub struct Published {
    /// The version.
    pub version: Arc<Function>,
    /// False: `$LATEST` has not changed since this one was published.
    pub new: bool,
}

/// What a change has made.
#[derive(Debug)]
pub struct Updated {
    /// `$LATEST` before.
    pub old: Arc<Function>,
    /// `$LATEST` now.
    pub new: Arc<Function>,
    /// Its version, if one was to be published.
    pub published: Option<Published>,
}

/// All functions and layers.
#[derive(Debug)]
pub struct Store {
    connection: Mutex<Connection>,
    keys: Arc<dyn KeyService>,
    functions: RwLock<BTreeMap<String, Entry>>,
    /// What URLs invoke, by their ids: names of functions and qualifiers.
    urls: RwLock<HashMap<String, (String, String)>>,
    /// Locked after `functions`, where both are.
    layers: RwLock<layers::Layers>,
    kms: RwLock<KmsKeys>,
}

/// Why the store could not be opened or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// SQLite says no.
    #[error("store {}: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: rusqlite::Error,
    },
    /// The file can't be made or written.
    #[error("store {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A newer Firn wrote it.
    #[error(
        "store {} has schema version {found}; this firnd knows up to {supported}: use a newer firnd",
        path.display()
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: usize,
        /// Ours.
        supported: usize,
    },
    /// A Firn of before encryption wrote it.
    #[error(
        "store {} has schema version {found}, which keeps functions unencrypted: start with a new \
         state directory and deploy them again",
        path.display()
    )]
    Unencrypted {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: usize,
    },
    /// A record can't be decrypted, or was altered.
    #[error(
        "store {}: the record of function {name:?} can't be used: {source}; put back the key file or \
         the store that belong together, or delete the store to start anew",
        path.display()
    )]
    Record {
        /// The file.
        path: PathBuf,
        /// Whose record.
        name: String,
        /// Why.
        source: KeyError,
    },
    /// The record of a layer can't be decrypted, or was altered.
    #[error(
        "store {}: the record of layer {name:?}, version {version}, can't be used: {source}",
        path.display()
    )]
    LayerRecord {
        /// The file.
        path: PathBuf,
        /// Whose record.
        name: String,
        /// Which version.
        version: u32,
        /// Why.
        source: KeyError,
    },
    /// The record of a KMS key can't be decrypted, or was altered.
    #[error("store {}: the record of KMS key {id:?} can't be used: {source}", path.display())]
    KmsRecord {
        /// The file.
        path: PathBuf,
        /// Which key.
        id: String,
        /// Why.
        source: KeyError,
    },
    /// There is no such version of a layer.
    #[error("there is no layer {name:?} with version {version}")]
    UnknownLayer {
        /// The layer.
        name: String,
        /// The version.
        version: u32,
    },
    /// There is no key for what is new.
    #[error("no key for what is to be kept: {0}")]
    Key(#[from] KeyError),
    /// A write failed (disk full, for one). Nothing has changed.
    #[error("the store could not be written: {0}")]
    Write(#[from] rusqlite::Error),
    /// Aliases lead to the version.
    #[error(
        "Version {version} of {name} is used by the alias(es) {aliases}: change or delete them first"
    )]
    Aliased {
        /// The function.
        name: String,
        /// Its version.
        version: Version,
        /// Who uses it.
        aliases: String,
    },
    /// The numbers for versions have run out.
    #[error("{0} has no numbers left for versions")]
    Numbers(String),
    /// A record could not be turned into JSON.
    #[error("the store could not encode a record: {0}")]
    Encode(#[from] serde_json::Error),
    /// A function of that name exists.
    #[error("Function already exist: {0}")]
    Exists(String),
    /// There is no function of that name.
    #[error("no function {0:?}")]
    Unknown(String),
    /// The function's revision is another one.
    #[error("revision is {found}, not {expected}")]
    Revision {
        /// What the caller believed.
        expected: String,
        /// What it is.
        found: String,
    },
}

impl Store {
    /// Opens the store at `path`, makes it if it does not exist, and brings its schema up to date.
    /// Functions' keys are wrapped by `keys`.
    ///
    /// # Errors
    /// [`StoreError::Open`], [`StoreError::File`], [`StoreError::Version`],
    /// [`StoreError::Unencrypted`], or a record that can't be used: [`StoreError::Record`],
    /// [`StoreError::LayerRecord`], [`StoreError::KmsRecord`].
    pub fn open(path: &Path, keys: Arc<dyn KeyService>) -> Result<Self, StoreError> {
        // SQLite gives its other files the same mode.
        let file = File::options().write(true).create(true).truncate(false).mode(0o600).open(path);
        file.map_err(|source| StoreError::File { path: path.to_owned(), source })?;
        let failed = |source| StoreError::Open { path: path.to_owned(), source };
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_CREATE
            | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut connection = Connection::open_with_flags(path, flags).map_err(failed)?;
        connection.pragma_update(None, "journal_mode", "WAL").map_err(failed)?;
        connection.pragma_update(None, "synchronous", "FULL").map_err(failed)?;
        let found: usize = connection
            .pragma_query_value(None, "user_version", |row| row.get::<_, i64>(0))
            .map_err(failed)?
            .try_into()
            .unwrap_or(usize::MAX);
        let supported = OLDEST + MIGRATIONS.len() - 1;
        if found > supported {
            return Err(StoreError::Version { path: path.to_owned(), found, supported });
        }
        if (1..OLDEST).contains(&found) {
            return Err(StoreError::Unencrypted { path: path.to_owned(), found });
        }
        for (version, sql) in (OLDEST..).zip(MIGRATIONS).filter(|(version, _)| *version > found) {
            let transaction = connection.transaction().map_err(failed)?;
            transaction.execute_batch(sql).map_err(failed)?;
            transaction.pragma_update(None, "user_version", version as i64).map_err(failed)?;
            transaction.commit().map_err(failed)?;
        }
        let mut functions = BTreeMap::<String, Entry>::new();
        for row in rows(&connection).map_err(failed)? {
            let name = row.name.clone();
            let function = row.open(&*keys).map_err(|source| StoreError::Record {
                path: path.to_owned(),
                name: name.clone(),
                source,
            })?;
            let versions = &mut functions.entry(name).or_default().versions;
            versions.insert(function.version, Arc::new(function));
        }
        for (name, document) in documents(&connection).map_err(failed)? {
            // Without its function it means nothing.
            let Some(entry) = functions.get_mut(&name) else { continue };
            let Some(latest) = entry.latest() else { continue };
            let opened = latest.envelope.record.open(&attached(&name), &document).ok();
            let source = KeyError::Altered { what: "what is attached to the function" };
            let attachments = opened
                .and_then(|json| serde_json::from_slice(&json).ok())
                .ok_or(StoreError::Record { path: path.to_owned(), name, source })?;
            entry.attachments = Arc::new(attachments);
        }
        let urls = functions.iter().flat_map(|(name, entry)| called(name, &entry.attachments));
        let urls = RwLock::new(urls.collect());
        let layers = layers::read(&connection, &*keys, path)?;
        let kms = kms::read(&connection, &*keys, path)?;
        let (connection, functions) = (Mutex::new(connection), RwLock::new(functions));
        let layers = RwLock::new(layers);
        let kms = RwLock::new(kms);
        Ok(Self { connection, keys, functions, urls, layers, kms })
    }

    /// Keys for a new function or version of a layer.
    ///
    /// # Errors
    /// [`StoreError::Key`].
    pub fn envelope(&self) -> Result<Envelope, StoreError> {
        Ok(Envelope::generate(&*self.keys)?)
    }

    /// A version of a function.
    pub fn get(&self, name: &str, version: Version) -> Option<Arc<Function>> {
        self.read().get(name)?.versions.get(&version).cloned()
    }

    /// At most `limit` functions in the order of their names, from after `after` on, and whether
    /// there are more.
    pub fn list(&self, after: Option<&str>, limit: usize) -> (Vec<Arc<Function>>, bool) {
        let functions = self.read();
        let rest = functions.range::<str, _>((after.map_or(Unbounded, Excluded), Unbounded));
        page(rest.filter_map(|(_, entry)| entry.latest()), limit)
    }

    /// The same for all versions of all functions.
    pub fn list_all(
        &self,
        after: Option<(&str, Version)>,
        limit: usize,
    ) -> (Vec<Arc<Function>>, bool) {
        let functions = self.read();
        let from = after.map_or(Unbounded, |(name, _)| Included(name));
        let all =
            functions.range::<str, _>((from, Unbounded)).flat_map(|(_, f)| f.versions.values());
        page(all.skip_while(|f| after.is_some_and(|a| (f.name.as_str(), f.version) <= a)), limit)
    }

    /// The same for the versions of one function.
    pub fn versions(
        &self,
        name: &str,
        after: Option<Version>,
        limit: usize,
    ) -> (Vec<Arc<Function>>, bool) {
        let functions = self.read();
        let Some(entry) = functions.get(name) else { return (Vec::new(), false) };
        let rest = entry.versions.range((after.map_or(Unbounded, Excluded), Unbounded));
        page(rest.map(|(_, version)| version), limit)
    }

    /// All versions of all functions.
    pub fn all(&self) -> Vec<Arc<Function>> {
        self.list_all(None, usize::MAX).0
    }

    /// Whether any version uses the code in that blob. Once none does, none ever will.
    pub fn uses_code(&self, blob: &str) -> bool {
        self.read().values().flat_map(|f| f.versions.values()).any(|f| f.code.blob == blob)
    }

    /// Whether any version has the code and the layers that this disk is made of.
    pub fn uses_disk(&self, disk: &str) -> bool {
        self.read()
            .values()
            .flat_map(|f| f.versions.values())
            .any(|f| disk.starts_with(&f.code.blob) && f.disk() == disk)
    }

    /// Adds a function, and publishes its first version if that is wanted.
    ///
    /// # Errors
    /// [`StoreError::Exists`], [`StoreError::UnknownLayer`], or that it could not be written.
    pub fn create(
        &self,
        function: Function,
        publish: bool,
    ) -> Result<(Arc<Function>, Option<Arc<Function>>), StoreError> {
        let mut connection = self.lock();
        if self.read().contains_key(&function.name) {
            return Err(StoreError::Exists(function.name));
        }
        self.check_layers(&function)?;
        let transaction = connection.transaction()?;
        insert(&transaction, &function)?;
        let version = match publish {
            true => Some(Arc::new(number(&transaction, &function, None)?)),
            false => None,
        };
        transaction.commit()?;
        let function = Arc::new(function);
        self.remember([Some(&function), version.as_ref()]);
        Ok((function, version))
    }

    /// Replaces `$LATEST` by what `change` makes of it, if it still has the revision that the
    /// caller believes in, and publishes it if that is wanted.
    ///
    /// # Errors
    /// [`StoreError::Unknown`], [`StoreError::UnknownLayer`], [`StoreError::Revision`], what `change` says,
    /// or that it could not be written.
    pub fn update<E: From<StoreError>>(
        &self,
        name: &str,
        revision: Option<&str>,
        publish: bool,
        change: impl FnOnce(&Function) -> Result<Function, E>,
    ) -> Result<Updated, E> {
        let mut connection = self.lock();
        let (old, last) = self.ends(name)?;
        check_revision(&old, revision)?;
        let new = Arc::new(change(&old)?);
        self.check_layers(&new)?;
        let write = || {
            let transaction = connection.transaction()?;
            delete(&transaction, &old)?;
            insert(&transaction, &new)?;
            let published = match publish {
                true => Some(publication(&transaction, &new, last, None)?),
                false => None,
            };
            transaction.commit()?;
            Ok::<_, StoreError>(published)
        };
        let published = write()?;
        self.remember([Some(&new), published.as_ref().map(|p| &p.version)]);
        Ok(Updated { old, new, published })
    }

    /// Publishes `$LATEST` under the next number, if it still has the revision that the caller
    /// believes in and `check` has nothing against it; where nothing has changed since the last
    /// version, that one stands.
    ///
    /// # Errors
    /// [`StoreError::Unknown`], [`StoreError::Revision`], what `check` says, or that it could not
    /// be written.
    pub fn publish<E: From<StoreError>>(
        &self,
        name: &str,
        revision: Option<&str>,
        description: Option<String>,
        check: impl FnOnce(&Function) -> Result<(), E>,
    ) -> Result<Published, E> {
        let mut connection = self.lock();
        let (latest, last) = self.ends(name)?;
        check_revision(&latest, revision)?;
        check(&latest)?;
        let write = || {
            let transaction = connection.transaction()?;
            let published = publication(&transaction, &latest, last, description)?;
            transaction.commit()?;
            Ok::<_, StoreError>(published)
        };
        let published = write()?;
        self.remember([Some(&published.version), None]);
        Ok(published)
    }

    /// Removes a function with all its versions, and gives them.
    ///
    /// # Errors
    /// [`StoreError::Unknown`], or that it could not be written.
    pub fn delete(&self, name: &str) -> Result<Vec<Arc<Function>>, StoreError> {
        let mut connection = self.lock();
        self.ends(name)?;
        let transaction = connection.transaction()?;
        transaction.execute("DELETE FROM versions WHERE name = ?1", [name])?;
        transaction.execute("DELETE FROM attachments WHERE name = ?1", [name])?;
        transaction.commit()?;
        let entry = self.remembered().remove(name).unwrap_or_default();
        self.reindex(name, &entry.attachments, &Attachments::default());
        Ok(entry.versions.into_values().collect())
    }

    /// Removes a version of a function, and gives it.
    ///
    /// # Errors
    /// [`StoreError::Unknown`], [`StoreError::Aliased`], or that it could not be written.
    pub fn delete_version(&self, name: &str, number: u32) -> Result<Arc<Function>, StoreError> {
        let mut connection = self.lock();
        let version = Version::Published(number);
        let unknown = || StoreError::Unknown(format!("{name}:{number}"));
        let old = self.get(name, version).ok_or_else(unknown)?;
        let attachments = self.attachments(name).unwrap_or_default();
        let users = attachments.aliases.iter().filter(|(_, alias)| alias.uses(version));
        let users: Vec<&str> = users.map(|(alias, _)| alias.as_str()).collect();
        if !users.is_empty() {
            let (name, aliases) = (name.to_owned(), users.join(", "));
            return Err(StoreError::Aliased { name, version, aliases });
        }
        let mut new = Attachments::clone(&attachments);
        new.forget(&version.to_string());
        let transaction = connection.transaction()?;
        delete(&transaction, &old)?;
        if new != *attachments {
            let (latest, _) = self.ends(name)?;
            insert_attachments(&transaction, &latest, &new)?;
        }
        transaction.commit()?;
        if let Some(entry) = self.remembered().get_mut(name) {
            entry.versions.remove(&version);
            entry.attachments = Arc::new(new);
        }
        Ok(old)
    }

    /// The version of a function that a qualifier means: `$LATEST`, a number, or what `choose` takes of
    /// an alias.
    pub fn resolve(
        &self,
        name: &str,
        qualifier: &str,
        choose: impl FnOnce(&Alias) -> Version,
    ) -> Option<Arc<Function>> {
        let version = match qualifier.parse() {
            Ok(version) => version,
            Err(()) => choose(self.attachments(name)?.aliases.get(qualifier)?),
        };
        self.get(name, version)
    }

    /// What is attached to a function.
    pub fn attachments(&self, name: &str) -> Option<Arc<Attachments>> {
        self.read().get(name).map(|entry| entry.attachments.clone())
    }

    /// What is kept of the account's concurrency for functions other than `name`. Within
    /// [`Store::attach`], no change comes in between.
    pub fn kept_for_others(&self, name: &str) -> u32 {
        let functions = self.read();
        let others = functions.iter().filter(|(other, _)| *other != name);
        others.fold(0, |sum, (_, entry)| sum.saturating_add(entry.attachments.kept()))
    }

    /// Has `change` change what is attached to a function. It sees the function's versions, which stay
    /// as they are meanwhile.
    ///
    /// # Errors
    /// [`StoreError::Unknown`], what `change` says, or that it could not be written.
    pub fn attach<T, E: From<StoreError>>(
        &self,
        name: &str,
        change: impl FnOnce(&Versions, &mut Attachments) -> Result<T, E>,
    ) -> Result<T, E> {
        let connection = self.lock();
        let unknown = || StoreError::Unknown(name.to_owned());
        let (versions, old) = {
            let functions = self.read();
            let entry = functions.get(name).ok_or_else(unknown)?;
            (entry.versions.clone(), entry.attachments.clone())
        };
        let latest = versions.get(&Version::Latest).ok_or_else(unknown)?;
        let mut new = Attachments::clone(&old);
        let result = change(&versions, &mut new)?;
        insert_attachments(&connection, latest, &new)?;
        self.reindex(name, &old, &new);
        if let Some(entry) = self.remembered().get_mut(name) {
            entry.attachments = Arc::new(new);
        }
        Ok(result)
    }

    /// The function and the qualifier that the URL with this id invokes.
    pub fn url(&self, id: &str) -> Option<(String, String)> {
        self.urls.read().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    fn reindex(&self, name: &str, old: &Attachments, new: &Attachments) {
        if old.urls != new.urls {
            let mut urls = self.urls.write().unwrap_or_else(PoisonError::into_inner);
            old.urls.values().for_each(|url| drop(urls.remove(&url.id)));
            urls.extend(called(name, new));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // A panic elsewhere can't have left a transaction open: dropping one rolls it back.
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<String, Entry>> {
        self.functions.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is in memory, for changes; only with the connection held.
    fn remembered(&self) -> RwLockWriteGuard<'_, BTreeMap<String, Entry>> {
        self.functions.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn remember(&self, written: [Option<&Arc<Function>>; 2]) {
        let mut functions = self.remembered();
        for function in written.into_iter().flatten() {
            let entry = functions.entry(function.name.clone()).or_default();
            entry.versions.insert(function.version, function.clone());
        }
    }

    /// `$LATEST` and the version that was published last, if there is one.
    fn ends(&self, name: &str) -> Result<(Arc<Function>, Option<Arc<Function>>), StoreError> {
        let unknown = || StoreError::Unknown(name.to_owned());
        let functions = self.read();
        let entry = functions.get(name).ok_or_else(unknown)?;
        let latest = entry.latest().ok_or_else(unknown)?;
        let last =
            entry.versions.values().next_back().filter(|last| last.version != Version::Latest);
        Ok((latest.clone(), last.cloned()))
    }
}

/// What the URLs of a function invoke.
fn called<'a>(
    name: &'a str,
    attachments: &'a Attachments,
) -> impl Iterator<Item = (String, (String, String))> + 'a {
    let urls = attachments.urls.iter();
    urls.map(move |(qualifier, url)| (url.id.clone(), (name.to_owned(), qualifier.clone())))
}

fn page<'a>(
    mut rest: impl Iterator<Item = &'a Arc<Function>>,
    limit: usize,
) -> (Vec<Arc<Function>>, bool) {
    let page = rest.by_ref().take(limit).cloned().collect();
    (page, rest.next().is_some())
}

/// The version that publishing `latest` gives.
fn publication(
    connection: &Connection,
    latest: &Function,
    last: Option<Arc<Function>>,
    description: Option<String>,
) -> Result<Published, StoreError> {
    match last.filter(|last| latest.publishes_as(last)) {
        Some(version) => Ok(Published { version, new: false }),
        None => {
            let version = Arc::new(number(connection, latest, description)?);
            Ok(Published { version, new: true })
        }
    }
}

/// Writes `latest` under the next number.
fn number(
    connection: &Connection,
    latest: &Function,
    description: Option<String>,
) -> Result<Function, StoreError> {
    let number: i64 = connection.query_row(
        "INSERT INTO numbers VALUES (?1, 1) ON CONFLICT DO UPDATE SET last = last + 1 RETURNING last",
        [&latest.name],
        |row| row.get(0),
    )?;
    let number = u32::try_from(number).map_err(|_| StoreError::Numbers(latest.name.clone()))?;
    let version = latest.published(number, description);
    insert(connection, &version)?;
    Ok(version)
}

fn insert_attachments(
    connection: &Connection,
    latest: &Function,
    attachments: &Attachments,
) -> Result<(), StoreError> {
    let document = serde_json::to_vec(attachments)?;
    let document = latest.envelope.record.seal(&attached(&latest.name), &document)?;
    connection.execute(
        "INSERT OR REPLACE INTO attachments VALUES (?1, ?2)",
        params![latest.name, document],
    )?;
    Ok(())
}

fn insert(connection: &Connection, function: &Function) -> Result<(), StoreError> {
    let Function {
        name, version, config, code, tags, last_modified_ms, revision, envelope, ..
    } = function;
    let Config { environment, layers, dead_letter, .. } = config;
    let members = Members {
        environment: Cow::Borrowed(environment),
        layers: Cow::Borrowed(layers),
        dead_letter: dead_letter.as_deref().map(Cow::Borrowed),
    };
    let sealed = Sealed::Members([members]);
    let sealed = Zeroizing::new(serde_json::to_vec(&sealed)?);
    let environment = envelope.record.seal(&context(&bound(function)?), &sealed)?;
    // Never in place of another record.
    connection.execute(
        "INSERT INTO versions (name, runtime, role, handler, description, timeout_s, memory_mb,
            environment, tracing, tags, code_sha256, code_size, last_modified_ms, revision,
            code_blob, wrapped_key, version)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17)",
        params![
            name,
            config.runtime,
            config.role,
            config.handler,
            config.description,
            config.timeout_s,
            config.memory_mb,
            environment,
            config.tracing,
            serde_json::to_string(tags)?,
            code.sha256,
            code.size as i64,
            last_modified_ms,
            revision,
            code.blob,
            envelope.wrapped(),
            column(*version),
        ],
    )?;
    Ok(())
}

fn delete(connection: &Connection, function: &Function) -> rusqlite::Result<usize> {
    let key = params![function.name, column(function.version)];
    connection.execute("DELETE FROM versions WHERE name = ?1 AND version = ?2", key)
}

/// A version as it is stored.
fn column(version: Version) -> u32 {
    match version {
        Version::Latest => 0,
        Version::Published(number) => number,
    }
}

/// Whether `function` has the revision that the caller believes in, if it believes in one.
///
/// # Errors
/// [`StoreError::Revision`].
pub fn check_revision(function: &Function, revision: Option<&str>) -> Result<(), StoreError> {
    match revision {
        Some(expected) if expected != function.revision => Err(StoreError::Revision {
            expected: expected.to_owned(),
            found: function.revision.clone(),
        }),
        _ => Ok(()),
    }
}

/// All of a record that lies in the clear, in a form that no other record has: that of `$LATEST` begins
/// with a list of texts, as it did before there were versions, and that of any other with a list of lists.
fn bound(function: &Function) -> serde_json::Result<Vec<u8>> {
    let Function { name, version, config, code, tags, last_modified_ms, revision, .. } = function;
    let Config { runtime, role, handler, description, timeout_s, memory_mb, tracing, .. } = config;
    let record = (
        (name, runtime, role, handler, description, timeout_s, memory_mb, tracing, tags),
        (&code.sha256, code.size, &code.blob, last_modified_ms, revision),
    );
    match version {
        Version::Latest => serde_json::to_vec(&record),
        Version::Published(number) => serde_json::to_vec(&(record, number)),
    }
}

fn context(bound: &[u8]) -> [&[u8]; 2] {
    [b"firnd record", bound]
}

/// What the document of what is attached to a function is bound to.
fn attached(name: &str) -> [&[u8]; 2] {
    [b"firnd attachments", name.as_bytes()]
}

fn documents(connection: &Connection) -> rusqlite::Result<Vec<(String, Vec<u8>)>> {
    let mut statement = connection.prepare("SELECT name, document FROM attachments")?;
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    rows.collect()
}

/// What is encrypted of a record. It holds whatever has come since the columns were made.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Sealed<'a> {
    /// In a list, which no environment is.
    Members([Members<'a>; 1]),
    /// As it was before there were layers.
    Environment(BTreeMap<String, String>),
}

/// Members may be added, with defaults, never renamed.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct Members<'a> {
    environment: Cow<'a, BTreeMap<String, String>>,
    layers: Cow<'a, [Layer]>,
    dead_letter: Option<Cow<'a, str>>,
}

/// A record as it is stored.
struct Stored {
    name: String,
    version: Version,
    /// Without what is sealed.
    config: Config,
    environment: Vec<u8>,
    wrapped_key: Vec<u8>,
    code: Code,
    tags: BTreeMap<String, String>,
    last_modified_ms: i64,
    revision: String,
}

impl Stored {
    /// Authenticates and decrypts it.
    fn open(self, keys: &dyn KeyService) -> Result<Function, KeyError> {
        let altered = |_| KeyError::Altered { what: "the record" };
        let mut function = Function {
            name: self.name,
            version: self.version,
            config: self.config,
            code: self.code,
            tags: self.tags,
            last_modified_ms: self.last_modified_ms,
            revision: self.revision,
            envelope: Envelope::open(keys, self.wrapped_key)?,
            memo: Memo::default(),
        };
        let bound = bound(&function).map_err(altered)?;
        let opened = function.envelope.record.open(&context(&bound), &self.environment);
        let sealed = opened.map_err(|_| KeyError::Altered { what: "the record" })?;
        let members = match serde_json::from_slice(&sealed).map_err(altered)? {
            Sealed::Members([members]) => members,
            Sealed::Environment(environment) => {
                Members { environment: Cow::Owned(environment), ..Members::default() }
            }
        };
        function.config.environment = members.environment.into_owned();
        function.config.layers = members.layers.into_owned();
        function.config.dead_letter = members.dead_letter.map(Cow::into_owned);
        Ok(function)
    }
}

fn rows(connection: &Connection) -> rusqlite::Result<Vec<Stored>> {
    let mut statement = connection.prepare(
        "SELECT name, runtime, role, handler, description, timeout_s, memory_mb, environment,
                tracing, tags, code_sha256, code_size, last_modified_ms, revision, code_blob,
                wrapped_key, version
         FROM versions",
    )?;
    let rows = statement.query_map([], |row| {
        let (sha256, size) = (row.get(10)?, row.get::<_, i64>(11)?.unsigned_abs());
        Ok(Stored {
            name: row.get(0)?,
            version: match row.get(16)? {
                0 => Version::Latest,
                number => Version::Published(number),
            },
            config: Config {
                runtime: row.get(1)?,
                role: row.get(2)?,
                handler: row.get(3)?,
                description: row.get(4)?,
                timeout_s: row.get(5)?,
                memory_mb: row.get(6)?,
                environment: BTreeMap::new(),
                tracing: row.get(8)?,
                layers: Vec::new(),
                dead_letter: None,
            },
            environment: row.get(7)?,
            tags: json(row, 9)?,
            code: Code { sha256, size, blob: row.get(14)? },
            last_modified_ms: row.get(12)?,
            revision: row.get(13)?,
            wrapped_key: row.get(15)?,
        })
    })?;
    rows.collect()
}

fn json(row: &Row<'_>, column: usize) -> rusqlite::Result<BTreeMap<String, String>> {
    let text: String = row.get(column)?;
    serde_json::from_str(&text).map_err(|e| {
        rusqlite::Error::FromSqlConversionFailure(column, rusqlite::types::Type::Text, e.into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{envelope::tests::TestKeys, function::tests::example};

    fn open(dir: &tempfile::TempDir) -> Result<Store, StoreError> {
        Store::open(&dir.path().join("store.sqlite"), Arc::new(TestKeys(1)))
    }

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = open(&dir).unwrap();
        (dir, store)
    }

    #[test]
    fn what_is_written_is_there_after_a_restart() {
        let (dir, store) = store();
        let mut function = example("a");
        function.tags.insert("k".into(), "v \"quoted\"".into());
        function.config.dead_letter = Some("arn".into());
        store.create(function.clone(), false).unwrap();
        store.create(example("b"), false).unwrap();
        store.delete("b").unwrap();
        drop(store);
        let store = open(&dir).unwrap();
        assert_eq!(store.all(), [Arc::new(function)]);
    }

    #[test]
    fn names_are_unique_and_revisions_guard() {
        let (_dir, store) = store();
        store.create(example("a"), false).unwrap();
        assert!(matches!(store.create(example("a"), false), Err(StoreError::Exists(_))));
        let change = |f: &Function| -> Result<Function, StoreError> {
            Ok(Function { revision: "r2".into(), ..f.clone() })
        };
        let refused = store.update("a", Some("r0"), false, change);
        assert!(matches!(refused, Err(StoreError::Revision { .. })));
        let Updated { old, new, .. } = store.update("a", Some("r1"), false, change).unwrap();
        assert_eq!((old.revision.as_str(), new.revision.as_str()), ("r1", "r2"));
        assert!(matches!(store.update("x", None, false, change), Err(StoreError::Unknown(_))));
        assert!(matches!(store.delete("x"), Err(StoreError::Unknown(_))));
    }

    #[test]
    fn pages_are_in_order_and_complete() {
        let (_dir, store) = store();
        for name in ["c", "a", "e", "b", "d"] {
            store.create(example(name), false).unwrap();
        }
        let names =
            |page: &[Arc<Function>]| -> String { page.iter().map(|f| f.name.as_str()).collect() };
        let (page, more) = store.list(None, 2);
        assert_eq!((names(&page).as_str(), more), ("ab", true));
        let (page, more) = store.list(Some("b"), 2);
        assert_eq!((names(&page).as_str(), more), ("cd", true));
        let (page, more) = store.list(Some("d"), 2);
        assert_eq!((names(&page).as_str(), more), ("e", false));
    }

    #[test]
    fn a_newer_schema_is_refused_by_name() {
        let (dir, store) = store();
        store.lock().pragma_update(None, "user_version", 99).unwrap();
        drop(store);
        let error = open(&dir).unwrap_err();
        assert!(error.to_string().contains("schema version 99"), "{error}");
    }

    #[test]
    fn a_store_of_before_encryption_is_refused_by_name() {
        let (dir, store) = store();
        store.lock().pragma_update(None, "user_version", 1).unwrap();
        drop(store);
        let error = open(&dir).unwrap_err();
        assert!(matches!(error, StoreError::Unencrypted { found: 1, .. }), "{error}");
    }

    #[test]
    fn environments_lie_encrypted() {
        let (dir, store) = store();
        let mut function = example("a");
        function.config.environment.insert("TOKEN".into(), "planted-secret".into());
        store.create(function, false).unwrap();
        for entry in std::fs::read_dir(dir.path()).unwrap() {
            let path = entry.unwrap().path();
            let bytes = std::fs::read(&path).unwrap();
            for needle in [b"planted-secret".as_slice(), b"TOKEN"] {
                assert!(!bytes.windows(needle.len()).any(|w| w == needle), "{}", path.display());
            }
        }
    }

    #[test]
    fn altered_and_swapped_records_and_other_keys_are_refused() {
        let (dir, store) = store();
        store.create(example("a"), false).unwrap();
        let mut other = example("b");
        other.config.environment.insert("TOKEN".into(), "b".into());
        store.create(other, false).unwrap();
        // The versions of a function have the same key, and these even the same environment.
        store.publish("b", None, None, no_objection).unwrap();
        let change = |f: &Function| -> Result<Function, StoreError> {
            Ok(Function { config: Config { timeout_s: 9, ..f.config.clone() }, ..f.clone() })
        };
        store.update("b", None, true, change).unwrap();
        for name in ["a", "b"] {
            alias(&store, name, 1).unwrap();
        }
        drop(store);
        let path = dir.path().join("store.sqlite");
        let swap = "UPDATE versions SET environment =
            (SELECT environment FROM versions WHERE name = 'b' AND version = 0) WHERE name = 'a'";
        let among_versions = "UPDATE versions SET environment =
            (SELECT environment FROM versions WHERE name = 'b' AND version = 1)
            WHERE name = 'b' AND version = 2";
        for sql in [
            swap,
            among_versions,
            "UPDATE attachments SET document = x'00' WHERE name = 'b'",
            "UPDATE attachments SET document =
                (SELECT document FROM attachments WHERE name = 'a') WHERE name = 'b'",
            "UPDATE versions SET version = 3 WHERE name = 'b' AND version = 1",
            "UPDATE OR REPLACE versions SET version = 0 WHERE name = 'b' AND version = 1",
            "UPDATE OR REPLACE versions SET version = 1 WHERE name = 'b' AND version = 0",
            "UPDATE versions SET timeout_s = 10 WHERE name = 'b' AND version = 2",
            "UPDATE versions SET handler = 'evil.handler' WHERE name = 'a'",
            "UPDATE versions SET code_sha256 = replace(code_sha256, '0', '1') WHERE name = 'a'",
            "UPDATE versions SET code_blob = 'x' WHERE name = 'a'",
            "UPDATE versions SET name = 'c' WHERE name = 'a'",
            "UPDATE versions SET environment = x'00' WHERE name = 'a'",
            "UPDATE versions SET wrapped_key = x'00' WHERE name = 'a'",
        ] {
            let saved = std::fs::read(&path).unwrap();
            let connection = Connection::open(&path).unwrap();
            assert_eq!(connection.execute(sql, []).unwrap(), 1, "{sql}");
            connection.pragma_update(None, "journal_mode", "DELETE").unwrap();
            drop(connection);
            let error = open(&dir).expect_err(sql);
            assert!(matches!(error, StoreError::Record { .. }), "{sql}: {error}");
            std::fs::write(&path, saved).unwrap();
        }
        assert_eq!(open(&dir).unwrap().all().len(), 4);
        let error = Store::open(&path, Arc::new(TestKeys(2))).unwrap_err();
        assert!(error.to_string().contains("put back the key file"), "{error}");
    }

    #[test]
    fn code_in_use_is_known() {
        let (_dir, store) = store();
        store.create(example("a"), false).unwrap();
        assert!(store.uses_code("blob-a"));
        store.publish("a", None, None, no_objection).unwrap();
        let change = |f: &Function| -> Result<Function, StoreError> {
            let code = Code { sha256: "11".repeat(32), blob: "new".into(), ..f.code.clone() };
            Ok(Function { code, ..f.clone() })
        };
        store.update("a", None, false, change).unwrap();
        assert!(store.uses_code("blob-a") && store.uses_code("new"));
        store.delete_version("a", 1).unwrap();
        assert!(!store.uses_code("blob-a") && store.uses_code("new"));
        store.delete("a").unwrap();
        assert!(!store.uses_code("new"));
    }

    fn no_objection(_: &Function) -> Result<(), StoreError> {
        Ok(())
    }

    /// Has `prod` lead to a version.
    fn alias(store: &Store, name: &str, number: u32) -> Result<(), StoreError> {
        store.attach(name, |_, attachments| {
            let alias = Alias {
                version: Version::Published(number),
                additional: None,
                description: String::new(),
                revision: "r".into(),
            };
            attachments.aliases.insert("prod".into(), alias);
            Ok(())
        })
    }

    #[test]
    fn what_is_attached_lasts_as_long_as_its_function() {
        let (dir, store) = store();
        store.create(example("a"), true).unwrap();
        alias(&store, "a", 1).unwrap();
        assert!(matches!(alias(&store, "x", 1), Err(StoreError::Unknown(_))));
        let refused = store.attach("a", |_, attachments| {
            attachments.aliases.clear();
            Err::<(), _>(StoreError::Unknown("objection".into()))
        });
        assert!(refused.is_err());
        let error = store.delete_version("a", 1).unwrap_err();
        assert!(error.to_string().contains("alias(es) prod"), "{error}");
        let before = store.attachments("a").unwrap();
        assert_eq!(before.aliases.len(), 1);
        drop(store);
        let store = open(&dir).unwrap();
        assert_eq!(store.attachments("a"), Some(before));
        store.delete("a").unwrap();
        store.create(example("a"), false).unwrap();
        assert_eq!(store.attachments("a"), Some(Arc::default()));
        drop(store);
        assert_eq!(open(&dir).unwrap().attachments("a"), Some(Arc::default()));
    }

    #[test]
    fn versions_are_numbered_once_and_stay_as_they_are() {
        let (dir, store) = store();
        let (_, first) = store.create(example("a"), true).unwrap();
        let first = first.unwrap();
        assert_eq!(first.version, Version::Published(1));
        let again = store.publish("a", None, Some("same".into()), no_objection).unwrap();
        assert!(!again.new && again.version == first, "nothing has changed");
        let change = |f: &Function| -> Result<Function, StoreError> {
            Ok(Function { config: Config { memory_mb: 256, ..f.config.clone() }, ..f.clone() })
        };
        let updated = store.update("a", None, true, change).unwrap();
        let second = updated.published.unwrap();
        assert!(second.new && second.version.version == Version::Published(2));
        assert_eq!(store.get("a", Version::Published(1)), Some(first));
        store.delete_version("a", 2).unwrap();
        assert!(matches!(store.delete_version("a", 2), Err(StoreError::Unknown(_))));
        let stale = store.publish("a", Some("r0"), None, no_objection);
        assert!(matches!(stale, Err(StoreError::Revision { .. })));
        let refused =
            store.publish("a", None, None, |_| Err(StoreError::Unknown("objection".into())));
        assert!(refused.is_err());
        drop(store);
        let store = open(&dir).unwrap();
        let third = store.publish("a", None, None, no_objection).unwrap();
        assert_eq!(third.version.version, Version::Published(3), "2 was given away");
        assert_eq!(store.delete("a").unwrap().len(), 3);
        assert!(store.all().is_empty());
        let (_, next) = store.create(example("a"), true).unwrap();
        assert_eq!(next.unwrap().version, Version::Published(4), "numbers outlive functions");
    }

    #[test]
    fn pages_of_versions_are_in_order_and_complete() {
        let (_dir, store) = store();
        for name in ["a", "b", "c"] {
            store.create(example(name), name != "c").unwrap();
        }
        let (all, mut listed, mut after) = (store.all(), Vec::new(), None);
        loop {
            let after_ref = after.as_ref().map(|(name, version): &(String, _)| (&**name, *version));
            let (page, more) = store.list_all(after_ref, 2);
            listed.extend(page);
            let last = listed.last().unwrap();
            after = Some((last.name.clone(), last.version));
            if !more {
                break;
            }
        }
        assert_eq!(listed, all);
        let names: Vec<String> = all.iter().map(|f| f.qualified_name()).collect();
        assert_eq!(names, ["a", "a:1", "b", "b:1", "c"]);
        let (page, more) = store.versions("a", None, 1);
        assert_eq!((page[0].version, more), (Version::Latest, true));
        let (page, more) = store.versions("a", Some(Version::Latest), 1);
        assert_eq!((page[0].version, more), (Version::Published(1), false));
    }

    #[test]
    fn a_store_of_before_versions_is_brought_up_to_date() {
        let (dir, store) = store();
        let function = example("a");
        // What records were bound to then; it must be the same for ever.
        let then = r#"[["a","python3.11","arn:aws:iam::000000000000:role/r",
            "lambda_function.lambda_handler","",3,128,"PassThrough",{}],
            ["0000000000000000000000000000000000000000000000000000000000000000",300,"blob-a",
            1767225600000,"r1"]]"#;
        let then: String = then.split_whitespace().collect();
        assert_eq!(String::from_utf8(bound(&function).unwrap()).unwrap(), then);
        let environment = br#"{"STAGE":"test"}"#;
        let context: [&[u8]; 2] = [b"firnd record", then.as_bytes()];
        let environment = function.envelope.record.seal(&context, environment).unwrap();
        let old = store.lock();
        old.execute_batch(
            "DROP TABLE versions; DROP TABLE numbers; DROP TABLE attachments; DROP TABLE layers;
             DROP TABLE layer_numbers; DROP TABLE kms_keys; DROP TABLE own_keys;",
        )
        .unwrap();
        old.execute_batch(MIGRATIONS[0]).unwrap();
        old.pragma_update(None, "user_version", 2).unwrap();
        old.execute(
            "INSERT INTO functions VALUES ('a', 'python3.11', 'arn:aws:iam::000000000000:role/r',
                'lambda_function.lambda_handler', '', 3, 128, ?1, ?2, 'PassThrough', '{}', ?3, 300,
                'blob-a', 1767225600000, 'r1')",
            params![function.envelope.wrapped(), environment, function.code.sha256],
        )
        .unwrap();
        drop(old);
        drop(store);
        let store = open(&dir).unwrap();
        assert_eq!(store.all(), [Arc::new(function)]);
        assert!(store.publish("a", None, None, no_objection).unwrap().new);
        drop(store);
        assert_eq!(open(&dir).unwrap().all().len(), 2);
    }
}
