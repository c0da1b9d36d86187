//! The durable record of functions: one SQLite file, with everything that it says also in memory.
//!
//! Reads never touch SQLite; writes commit there first (WAL, `synchronous=FULL`) and reach memory
//! under the same lock, so memory never says what a restart would not. Writing blocks: call it
//! through [`tokio::task::spawn_blocking`].
//!
//! Each record is sealed with its function's key: the environment is encrypted, and bound to all other
//! columns, so that none can be altered or moved to another function. A whole record of earlier can be
//! put back; that takes write access to this directory.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
};

use firn::keys::{KeyError, KeyService};
use rusqlite::{Connection, OpenFlags, Row, params};
use zeroize::Zeroizing;

use crate::{
    envelope::Envelope,
    function::{Code, Config, Function},
};

/// The oldest schema that can be read. The one before kept code and environments in the clear; bringing
/// it up to date would leave copies of them in free pages and blocks.
const OLDEST: usize = 2;

/// The schema, one step a version from [`OLDEST`] on. Released steps never change; add new ones at the
/// end.
const MIGRATIONS: [&str; 1] = ["CREATE TABLE functions (
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
    ) STRICT, WITHOUT ROWID;"];

/// All functions.
#[derive(Debug)]
pub struct Store {
    connection: Mutex<Connection>,
    keys: Arc<dyn KeyService>,
    functions: RwLock<BTreeMap<String, Arc<Function>>>,
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
    /// There is no key for a new function.
    #[error("no key for the function: {0}")]
    Key(#[from] KeyError),
    /// A write failed (disk full, for one). Nothing has changed.
    #[error("the store could not be written: {0}")]
    Write(#[from] rusqlite::Error),
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
    /// [`StoreError::Unencrypted`] or [`StoreError::Record`].
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
        let mut functions = BTreeMap::new();
        for row in rows(&connection).map_err(failed)? {
            let name = row.name.clone();
            let function = row.open(&*keys).map_err(|source| StoreError::Record {
                path: path.to_owned(),
                name: name.clone(),
                source,
            })?;
            functions.insert(name, Arc::new(function));
        }
        let (connection, functions) = (Mutex::new(connection), RwLock::new(functions));
        Ok(Self { connection, keys, functions })
    }

    /// Keys for a new function.
    ///
    /// # Errors
    /// [`StoreError::Key`].
    pub fn envelope(&self) -> Result<Envelope, StoreError> {
        Ok(Envelope::generate(&*self.keys)?)
    }

    /// The function of that name.
    pub fn get(&self, name: &str) -> Option<Arc<Function>> {
        self.functions.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// At most `limit` functions in the order of their names, from after `after` on, and whether
    /// there are more.
    pub fn list(&self, after: Option<&str>, limit: usize) -> (Vec<Arc<Function>>, bool) {
        use std::ops::Bound::{Excluded, Unbounded};
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        let mut rest = functions.range::<str, _>((after.map_or(Unbounded, Excluded), Unbounded));
        let page = rest.by_ref().take(limit).map(|(_, f)| f.clone()).collect();
        (page, rest.next().is_some())
    }

    /// All functions.
    pub fn all(&self) -> Vec<Arc<Function>> {
        self.list(None, usize::MAX).0
    }

    /// Whether any function uses the code in that blob.
    pub fn uses_code(&self, blob: &str) -> bool {
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        functions.values().any(|f| f.code.blob == blob)
    }

    /// Adds a function.
    ///
    /// # Errors
    /// [`StoreError::Exists`], or that it could not be written.
    pub fn create(&self, function: Function) -> Result<Arc<Function>, StoreError> {
        let connection = self.lock();
        if self.get(&function.name).is_some() {
            return Err(StoreError::Exists(function.name));
        }
        self.write(&connection, function)
    }

    /// Replaces a function by what `change` makes of it, if it still has the revision that the
    /// caller believes in. Returns the old and the new one.
    ///
    /// # Errors
    /// [`StoreError::Unknown`], [`StoreError::Revision`], what `change` says, or that it could not
    /// be written.
    pub fn update<E: From<StoreError>>(
        &self,
        name: &str,
        revision: Option<&str>,
        change: impl FnOnce(&Function) -> Result<Function, E>,
    ) -> Result<(Arc<Function>, Arc<Function>), E> {
        let connection = self.lock();
        let old = self.get(name).ok_or_else(|| StoreError::Unknown(name.to_owned()))?;
        check_revision(&old, revision)?;
        let new = self.write(&connection, change(&old)?)?;
        Ok((old, new))
    }

    /// Removes a function.
    ///
    /// # Errors
    /// [`StoreError::Unknown`], or that it could not be written.
    pub fn delete(&self, name: &str) -> Result<Arc<Function>, StoreError> {
        let connection = self.lock();
        let old = self.get(name).ok_or_else(|| StoreError::Unknown(name.to_owned()))?;
        connection.execute("DELETE FROM functions WHERE name = ?1", [name])?;
        self.functions.write().unwrap_or_else(PoisonError::into_inner).remove(name);
        Ok(old)
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // A panic elsewhere can't have left a transaction open: each write is one statement.
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(
        &self,
        connection: &Connection,
        function: Function,
    ) -> Result<Arc<Function>, StoreError> {
        let Function { name, config, code, tags, last_modified_ms, revision, envelope } = &function;
        let environment = Zeroizing::new(serde_json::to_vec(&config.environment)?);
        let environment = envelope.record.seal(&context(&bound(&function)?), &environment)?;
        connection.execute(
            "INSERT OR REPLACE INTO functions (name, runtime, role, handler, description,
                timeout_s, memory_mb, environment, tracing, tags, code_sha256, code_size,
                last_modified_ms, revision, code_blob, wrapped_key)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16)",
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
            ],
        )?;
        let function = Arc::new(function);
        let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        functions.insert(function.name.clone(), function.clone());
        Ok(function)
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

/// All of a record that lies in the clear, in a form that no other record has.
fn bound(function: &Function) -> serde_json::Result<Vec<u8>> {
    let Function { name, config, code, tags, last_modified_ms, revision, .. } = function;
    let Config { runtime, role, handler, description, timeout_s, memory_mb, tracing, .. } = config;
    serde_json::to_vec(&(
        (name, runtime, role, handler, description, timeout_s, memory_mb, tracing, tags),
        (&code.sha256, code.size, &code.blob, last_modified_ms, revision),
    ))
}

fn context(bound: &[u8]) -> [&[u8]; 2] {
    [b"firnd record", bound]
}

/// A record as it is stored.
struct Stored {
    name: String,
    /// Without its environment.
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
            config: self.config,
            code: self.code,
            tags: self.tags,
            last_modified_ms: self.last_modified_ms,
            revision: self.revision,
            envelope: Envelope::open(keys, self.wrapped_key)?,
        };
        let bound = bound(&function).map_err(altered)?;
        let opened = function.envelope.record.open(&context(&bound), &self.environment);
        let environment = opened.map_err(|_| KeyError::Altered { what: "the record" })?;
        function.config.environment = serde_json::from_slice(&environment).map_err(altered)?;
        Ok(function)
    }
}

fn rows(connection: &Connection) -> rusqlite::Result<Vec<Stored>> {
    let mut statement = connection.prepare(
        "SELECT name, runtime, role, handler, description, timeout_s, memory_mb, environment,
                tracing, tags, code_sha256, code_size, last_modified_ms, revision, code_blob,
                wrapped_key
         FROM functions",
    )?;
    let rows = statement.query_map([], |row| {
        let (sha256, size) = (row.get(10)?, row.get::<_, i64>(11)?.unsigned_abs());
        Ok(Stored {
            name: row.get(0)?,
            config: Config {
                runtime: row.get(1)?,
                role: row.get(2)?,
                handler: row.get(3)?,
                description: row.get(4)?,
                timeout_s: row.get(5)?,
                memory_mb: row.get(6)?,
                environment: BTreeMap::new(),
                tracing: row.get(8)?,
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
        store.create(function.clone()).unwrap();
        store.create(example("b")).unwrap();
        store.delete("b").unwrap();
        drop(store);
        let store = open(&dir).unwrap();
        assert_eq!(store.all(), [Arc::new(function)]);
    }

    #[test]
    fn names_are_unique_and_revisions_guard() {
        let (_dir, store) = store();
        store.create(example("a")).unwrap();
        assert!(matches!(store.create(example("a")), Err(StoreError::Exists(_))));
        let change = |f: &Function| -> Result<Function, StoreError> {
            Ok(Function { revision: "r2".into(), ..f.clone() })
        };
        let refused = store.update("a", Some("r0"), change);
        assert!(matches!(refused, Err(StoreError::Revision { .. })));
        let (old, new) = store.update("a", Some("r1"), change).unwrap();
        assert_eq!((old.revision.as_str(), new.revision.as_str()), ("r1", "r2"));
        assert!(matches!(store.update("x", None, change), Err(StoreError::Unknown(_))));
        assert!(matches!(store.delete("x"), Err(StoreError::Unknown(_))));
    }

    #[test]
    fn pages_are_in_order_and_complete() {
        let (_dir, store) = store();
        for name in ["c", "a", "e", "b", "d"] {
            store.create(example(name)).unwrap();
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
        store.create(function).unwrap();
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
        store.create(example("a")).unwrap();
        let mut other = example("b");
        other.config.environment.insert("TOKEN".into(), "b".into());
        store.create(other).unwrap();
        drop(store);
        let path = dir.path().join("store.sqlite");
        let swap = "UPDATE functions SET environment =
            (SELECT environment FROM functions WHERE name = 'b') WHERE name = 'a'";
        for sql in [
            swap,
            "UPDATE functions SET handler = 'evil.handler' WHERE name = 'a'",
            "UPDATE functions SET code_sha256 = replace(code_sha256, '0', '1') WHERE name = 'a'",
            "UPDATE functions SET code_blob = 'x' WHERE name = 'a'",
            "UPDATE functions SET name = 'c' WHERE name = 'a'",
            "UPDATE functions SET environment = x'00' WHERE name = 'a'",
            "UPDATE functions SET wrapped_key = x'00' WHERE name = 'a'",
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
        assert_eq!(open(&dir).unwrap().all().len(), 2);
        let error = Store::open(&path, Arc::new(TestKeys(2))).unwrap_err();
        assert!(error.to_string().contains("put back the key file"), "{error}");
    }

    #[test]
    fn code_in_use_is_known() {
        let (_dir, store) = store();
        store.create(example("a")).unwrap();
        assert!(store.uses_code("blob-a"));
        store.delete("a").unwrap();
        assert!(!store.uses_code("blob-a"));
    }
}
