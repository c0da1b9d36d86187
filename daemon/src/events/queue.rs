//! The durable queue of events: one SQLite file that one thread owns.
//!
//! Whoever writes waits until the write is on the disk (WAL, `synchronous=FULL`). The thread commits
//! all writes that wait together, so the disk bounds commits a second and not events a second.
//!
//! Events are sealed with their function's key before they come here; what lies in the clear is which
//! function an event is for, its request id, and when it is due. Only as much of the queue is in memory
//! as is asked for.

use std::{
    collections::HashMap, fs::File, os::unix::fs::OpenOptionsExt, path::Path, sync::Arc, thread,
};

use firn::keys::KeyError;
use rusqlite::{Connection, OptionalExtension, params};
use tokio::sync::{mpsc, oneshot};

use super::outward;

/// The schema, one step a version from 1 on. Released steps never change; add new ones at the end.
const MIGRATIONS: [&str; 2] = [
    "CREATE TABLE events (
        id          INTEGER PRIMARY KEY AUTOINCREMENT,
        function    TEXT    NOT NULL,
        owner       TEXT    NOT NULL,
        request_id  TEXT    NOT NULL,
        accepted_ms INTEGER NOT NULL,
        due_ms      INTEGER NOT NULL,
        attempts    INTEGER NOT NULL,
        sealed      BLOB    NOT NULL
    ) STRICT;
    CREATE INDEX due ON events (function, due_ms, id);",
    "CREATE TABLE settings (
        function  TEXT NOT NULL,
        qualifier TEXT NOT NULL,
        owner     TEXT NOT NULL,
        sealed    BLOB NOT NULL,
        PRIMARY KEY (function, qualifier)
    ) STRICT, WITHOUT ROWID;",
];

/// Commands that may wait for the thread; further ones wait to be sent.
const WAITING: usize = 1024;

/// Most writes in one commit.
const BATCH: usize = 256;

/// Bytes of events after which a commit takes no further write.
const BATCH_BYTES: usize = 8 << 20;

/// What an event is counted as beyond its bytes: its row, its place in the index.
const ROW_BYTES: u64 = 512;

/// An event to be queued.
#[derive(Debug, Clone)]
pub struct New {
    /// Name of the function that it is for, or [lane](outward::lane) of what is sent elsewhere.
    pub function: String,
    /// Tells that function from others of the same name: [`crate::envelope::Envelope::id`].
    pub owner: String,
    /// Id that all attempts have.
    pub request_id: String,
    /// Milliseconds since the epoch.
    pub accepted_ms: i64,
    /// The event.
    pub sealed: Vec<u8>,
}

/// What is set for the events of a function.
#[derive(Debug, Clone)]
pub struct Setting {
    /// Name of the function.
    pub function: String,
    /// As of [`New`].
    pub owner: String,
    /// Version or alias.
    pub qualifier: String,
    /// What is set; `None`: no longer anything.
    pub sealed: Option<Vec<u8>>,
}

/// What is there when the queue is opened.
#[derive(Debug)]
pub struct Found {
    /// Functions that have events, and lanes that have messages.
    pub lanes: Vec<String>,
    /// All settings.
    pub settings: Vec<Setting>,
}

/// An event in the queue.
#[derive(Debug)]
pub struct Entry {
    /// What it is.
    pub event: New,
    /// Attempts that ended with an error of the function.
    pub attempts: u32,
}

/// What becomes of an event after an attempt.
#[derive(Debug, Clone)]
pub enum Fate {
    /// It leaves the queue; what it leads to enters it in the same commit.
    Done(Vec<New>),
    /// It waits.
    Again {
        /// Milliseconds since the epoch.
        due_ms: i64,
        /// Attempts so far that ended with an error of the function.
        attempts: u32,
    },
}

/// How much is queued.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Usage {
    /// Events.
    pub events: u64,
    /// Their bytes, bookkeeping included.
    pub bytes: u64,
}

/// Why the queue did not do what it was asked for. Nothing has changed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum QueueError {
    /// It has no room for this event.
    #[error("the queue of events is full: function {function:?} has {bytes} bytes in it")]
    Full {
        /// Whose event it is.
        function: String,
        /// What this function has queued.
        bytes: u64,
    },
    /// SQLite says no (disk full, for one).
    #[error("the queue of events can't be used: {0}")]
    Sqlite(Arc<rusqlite::Error>),
    /// The file can't be made or used.
    #[error("the queue of events can't be opened: {0}")]
    File(Arc<std::io::Error>),
    /// A newer Firn wrote it.
    #[error(
        "the queue of events has schema version {0}, which this firnd does not know: use a newer firnd"
    )]
    Version(i64),
    /// The event can't be sealed.
    #[error("the event can't be encrypted: {0}")]
    Seal(Arc<KeyError>),
    /// Its thread has ended.
    #[error("the queue of events is closed")]
    Closed,
}

impl From<rusqlite::Error> for QueueError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(Arc::new(error))
    }
}

impl From<KeyError> for QueueError {
    fn from(error: KeyError) -> Self {
        Self::Seal(Arc::new(error))
    }
}

type Reply<T> = oneshot::Sender<Result<T, QueueError>>;

enum Command {
    Write(Write, Reply<()>),
    Load(i64, Reply<Option<Entry>>),
    Page { function: String, limit: usize, reply: Reply<Vec<(i64, i64)>> },
    Usage(Reply<Usage>),
}

enum Write {
    Add(New),
    Settle(i64, Fate),
    Set(Setting),
    Forget { function: String, owner: String },
}

/// The queue.
#[derive(Debug, Clone)]
pub struct Queue {
    commands: mpsc::Sender<Command>,
}

impl Queue {
    /// Opens the queue in the file at `path`, made if need be, for at most `limit` bytes of events. Also
    /// gives what is in it.
    ///
    /// # Errors
    /// Any [`QueueError`].
    pub fn open(path: &Path, limit: u64) -> Result<(Self, Found), QueueError> {
        Self::open_with(path, limit, BATCH)
    }

    fn open_with(path: &Path, limit: u64, batch: usize) -> Result<(Self, Found), QueueError> {
        let io = |error| QueueError::File(Arc::new(error));
        // SQLite gives its other files the same mode.
        let mut file = File::options();
        file.write(true).create(true).truncate(false).mode(0o600).open(path).map_err(io)?;
        let mut connection = Connection::open(path)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        let found: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
        if !(0..=MIGRATIONS.len() as i64).contains(&found) {
            return Err(QueueError::Version(found));
        }
        for (version, sql) in (1..).zip(MIGRATIONS).filter(|(version, _)| *version > found) {
            let transaction = connection.transaction()?;
            transaction.execute_batch(sql)?;
            transaction.pragma_update(None, "user_version", version)?;
            transaction.commit()?;
        }
        let (room, lanes) = Room::of(&connection, limit)?;
        let settings = settings(&connection)?;
        let (commands, receiver) = mpsc::channel(WAITING);
        let owner = Owner { connection, room, batch };
        thread::Builder::new()
            .name("events".into())
            .spawn(move || owner.run(receiver))
            .map_err(io)?;
        Ok((Self { commands }, Found { lanes, settings }))
    }

    /// Queues an event; when this returns, it is on the disk.
    ///
    /// # Errors
    /// Any [`QueueError`].
    pub async fn add(&self, event: New) -> Result<(), QueueError> {
        self.ask(|reply| Command::Write(Write::Add(event), reply)).await
    }

    /// Writes down what becomes of an event.
    ///
    /// # Errors
    /// Any [`QueueError`] but [`QueueError::Full`]: what an event leads to takes its place.
    pub async fn settle(&self, id: i64, fate: Fate) -> Result<(), QueueError> {
        self.ask(|reply| Command::Write(Write::Settle(id, fate), reply)).await
    }

    /// Writes down what is set, or that it no longer is.
    ///
    /// # Errors
    /// Any [`QueueError`] but [`QueueError::Full`].
    pub async fn set(&self, setting: Setting) -> Result<(), QueueError> {
        self.ask(|reply| Command::Write(Write::Set(setting), reply)).await
    }

    /// Drops all events and settings of a function.
    ///
    /// # Errors
    /// Any [`QueueError`].
    pub async fn forget(&self, function: &str, owner: &str) -> Result<(), QueueError> {
        let (function, owner) = (function.to_owned(), owner.to_owned());
        self.ask(|reply| Command::Write(Write::Forget { function, owner }, reply)).await
    }

    /// The event with that id, unless it has gone.
    ///
    /// # Errors
    /// Any [`QueueError`].
    pub async fn load(&self, id: i64) -> Result<Option<Entry>, QueueError> {
        self.ask(|reply| Command::Load(id, reply)).await
    }

    /// Ids and times of the events of a function that are due first, in that order.
    ///
    /// # Errors
    /// Any [`QueueError`].
    pub async fn page(&self, function: &str, limit: usize) -> Result<Vec<(i64, i64)>, QueueError> {
        let function = function.to_owned();
        self.ask(|reply| Command::Page { function, limit, reply }).await
    }

    /// How much is queued.
    ///
    /// # Errors
    /// [`QueueError::Closed`].
    pub async fn usage(&self) -> Result<Usage, QueueError> {
        self.ask(Command::Usage).await
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, QueueError> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| QueueError::Closed)?;
        answer.await.unwrap_or(Err(QueueError::Closed))
    }
}

/// Who may queue how much.
struct Room {
    limit: u64,
    usage: Usage,
    /// By function: what it sends elsewhere is its own, too.
    used: HashMap<String, u64>,
}

impl Room {
    /// Counts what is there, and says in which lanes it is.
    fn of(connection: &Connection, limit: u64) -> rusqlite::Result<(Self, Vec<String>)> {
        let mut lanes = Vec::new();
        let mut room = Self { limit, usage: Usage::default(), used: HashMap::new() };
        let mut statement = connection
            .prepare("SELECT function, count(*), sum(length(sealed)) FROM events GROUP BY 1")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let (events, bytes): (i64, i64) = (row.get(1)?, row.get(2)?);
            let bytes = bytes.unsigned_abs() + events.unsigned_abs() * ROW_BYTES;
            room.usage.events += events.unsigned_abs();
            room.usage.bytes += bytes;
            let lane: String = row.get(0)?;
            *room.used.entry(outward::function(&lane).to_owned()).or_default() += bytes;
            lanes.push(lane);
        }
        Ok((room, lanes))
    }

    /// A function may have as much in the queue as it leaves free: alone half of it, and however many
    /// fill it, there is room left for one that has nothing in it.
    fn admits(&self, event: &New) -> Result<(), QueueError> {
        let used = self.used.get(outward::function(&event.function));
        let used = used.copied().unwrap_or_default();
        let size = event.sealed.len() as u64 + ROW_BYTES;
        let free = self.limit.saturating_sub(self.usage.bytes);
        match used + size <= free.saturating_sub(size) {
            true => Ok(()),
            false => Err(QueueError::Full { function: event.function.clone(), bytes: used }),
        }
    }

    fn add(&mut self, event: &New) {
        let size = event.sealed.len() as u64 + ROW_BYTES;
        self.usage.events += 1;
        self.usage.bytes += size;
        *self.used.entry(outward::function(&event.function).to_owned()).or_default() += size;
    }

    fn remove(&mut self, lane: &str, sealed: i64) {
        let function = outward::function(lane);
        let size = sealed.unsigned_abs() + ROW_BYTES;
        self.usage.events = self.usage.events.saturating_sub(1);
        self.usage.bytes = self.usage.bytes.saturating_sub(size);
        if let Some(used) = self.used.get_mut(function) {
            *used = used.saturating_sub(size);
            if *used == 0 {
                self.used.remove(function);
            }
        }
    }
}

/// What the thread owns.
struct Owner {
    connection: Connection,
    room: Room,
    batch: usize,
}

impl Owner {
    fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        while let Some(first) = commands.blocking_recv() {
            let mut writes = Vec::new();
            let mut reads = Vec::new();
            let mut bytes = 0;
            let mut next = Some(first);
            while let Some(command) = next {
                match command {
                    Command::Write(write, reply) => {
                        bytes += write.bytes();
                        writes.push((write, reply));
                    }
                    read => reads.push(read),
                }
                let full = writes.len() + reads.len() >= self.batch || bytes >= BATCH_BYTES;
                next = if full { None } else { commands.try_recv().ok() };
            }
            self.write(writes);
            // After the commit: nobody is to see what a crash would undo.
            for read in reads {
                self.read(read);
            }
        }
    }

    /// Commits all writes at once, or none.
    fn write(&mut self, writes: Vec<(Write, Reply<()>)>) {
        if writes.is_empty() {
            return;
        }
        let (mut replies, mut refused) = (Vec::new(), Vec::new());
        let committed = self.commit(writes, &mut replies, &mut refused);
        if committed.is_err() {
            match Room::of(&self.connection, self.room.limit) {
                Ok((room, _)) => self.room = room,
                Err(error) => tracing::error!(%error, "the queue of events can't be counted"),
            }
        }
        for reply in replies {
            // Whoever asked may have gone.
            let _ = reply.send(committed.clone());
        }
        for (reply, error) in refused {
            let _ = reply.send(Err(error));
        }
    }

    fn commit(
        &mut self,
        writes: Vec<(Write, Reply<()>)>,
        replies: &mut Vec<Reply<()>>,
        refused: &mut Vec<(Reply<()>, QueueError)>,
    ) -> Result<(), QueueError> {
        let room = &mut self.room;
        let mut result = Ok(());
        // Dropped without a commit, it rolls back.
        let transaction = self.connection.transaction().map_err(QueueError::from);
        for (write, reply) in writes {
            if let Write::Add(event) = &write
                && let Err(full) = room.admits(event)
            {
                refused.push((reply, full));
                continue;
            }
            replies.push(reply);
            match &transaction {
                Ok(transaction) if result.is_ok() => {
                    result = write.perform(transaction, room).map_err(QueueError::from);
                }
                _ => {}
            }
        }
        result?;
        Ok(transaction?.commit()?)
    }

    fn read(&self, command: Command) {
        match command {
            Command::Write(..) => {}
            Command::Load(id, reply) => drop(reply.send(self.load(id).map_err(Into::into))),
            Command::Page { function, limit, reply } => {
                drop(reply.send(self.page(&function, limit).map_err(Into::into)));
            }
            Command::Usage(reply) => drop(reply.send(Ok(self.room.usage))),
        }
    }

    fn load(&self, id: i64) -> rusqlite::Result<Option<Entry>> {
        let mut statement = self.connection.prepare_cached(
            "SELECT function, owner, request_id, accepted_ms, sealed, attempts
             FROM events WHERE id = ?1",
        )?;
        let entry = statement.query_row([id], |row| {
            Ok(Entry {
                event: New {
                    function: row.get(0)?,
                    owner: row.get(1)?,
                    request_id: row.get(2)?,
                    accepted_ms: row.get(3)?,
                    sealed: row.get(4)?,
                },
                attempts: row.get(5)?,
            })
        });
        entry.optional()
    }

    fn page(&self, function: &str, limit: usize) -> rusqlite::Result<Vec<(i64, i64)>> {
        let mut statement = self.connection.prepare_cached(
            "SELECT id, due_ms FROM events WHERE function = ?1 ORDER BY due_ms, id LIMIT ?2",
        )?;
        let rows = statement
            .query_map(params![function, limit as i64], |row| Ok((row.get(0)?, row.get(1)?)))?;
        rows.collect()
    }
}

impl Write {
    fn bytes(&self) -> usize {
        match self {
            Self::Add(event) => event.sealed.len(),
            Self::Settle(_, Fate::Done(next)) => next.iter().map(|event| event.sealed.len()).sum(),
            _ => 0,
        }
    }

    fn perform(&self, connection: &Connection, room: &mut Room) -> rusqlite::Result<()> {
        match self {
            Self::Add(event) => insert(connection, room, event),
            Self::Settle(id, Fate::Done(next)) => {
                let sql = "DELETE FROM events WHERE id = ?1 RETURNING function, length(sealed)";
                let mut statement = connection.prepare_cached(sql)?;
                let gone =
                    |row: &rusqlite::Row<'_>| Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?));
                // Gone already: its function was deleted meanwhile, and nothing follows from it.
                let Some((function, sealed)) = statement.query_row([id], gone).optional()? else {
                    return Ok(());
                };
                room.remove(&function, sealed);
                next.iter().try_for_each(|next| insert(connection, room, next))
            }
            Self::Settle(id, Fate::Again { due_ms, attempts }) => {
                let sql = "UPDATE events SET due_ms = ?2, attempts = ?3 WHERE id = ?1";
                connection.prepare_cached(sql)?.execute(params![id, due_ms, attempts])?;
                Ok(())
            }
            Self::Set(Setting { function, qualifier, owner, sealed: Some(sealed) }) => {
                let sql = "INSERT OR REPLACE INTO settings (function, qualifier, owner, sealed)
                           VALUES (?1, ?2, ?3, ?4)";
                let mut statement = connection.prepare_cached(sql)?;
                statement.execute(params![function, qualifier, owner, sealed])?;
                Ok(())
            }
            Self::Set(Setting { function, qualifier, owner, sealed: None }) => {
                let sql = "DELETE FROM settings
                           WHERE function = ?1 AND qualifier = ?2 AND owner = ?3";
                connection.prepare_cached(sql)?.execute(params![function, qualifier, owner])?;
                Ok(())
            }
            Self::Forget { function, owner } => {
                let sql = "DELETE FROM settings WHERE function = ?1 AND owner = ?2";
                connection.prepare_cached(sql)?.execute(params![function, owner])?;
                // And what it has to send elsewhere: nobody could open it any more.
                let sql = "DELETE FROM events
                           WHERE (function = ?1 OR (function >= ?3 AND function < ?4)) AND owner = ?2
                           RETURNING function, length(sealed)";
                let mut statement = connection.prepare_cached(sql)?;
                let (first, end) = outward::lanes(function);
                let mut rows = statement.query(params![function, owner, first, end])?;
                let mut events = 0;
                while let Some(row) = rows.next()? {
                    room.remove(&row.get::<_, String>(0)?, row.get(1)?);
                    events += 1;
                }
                if events > 0 {
                    tracing::warn!(function, events, "dropped the events of a deleted function");
                }
                Ok(())
            }
        }
    }
}

fn settings(connection: &Connection) -> rusqlite::Result<Vec<Setting>> {
    let mut statement =
        connection.prepare("SELECT function, owner, qualifier, sealed FROM settings")?;
    let rows = statement.query_map([], |row| {
        Ok(Setting {
            function: row.get(0)?,
            owner: row.get(1)?,
            qualifier: row.get(2)?,
            sealed: row.get(3)?,
        })
    })?;
    rows.collect()
}

fn insert(connection: &Connection, room: &mut Room, event: &New) -> rusqlite::Result<()> {
    let New { function, owner, request_id, accepted_ms, sealed } = event;
    connection
        .prepare_cached(
            "INSERT INTO events (function, owner, request_id, accepted_ms, due_ms, attempts, sealed)
             VALUES (?1, ?2, ?3, ?4, ?4, 0, ?5)",
        )?
        .execute(params![function, owner, request_id, accepted_ms, sealed])?;
    room.add(event);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn event(function: &str, bytes: usize) -> New {
        New {
            function: function.into(),
            owner: "o".into(),
            request_id: "r".into(),
            accepted_ms: 7,
            sealed: vec![1; bytes],
        }
    }

    fn open(dir: &tempfile::TempDir, limit: u64) -> (Queue, Vec<String>) {
        let (queue, found) = Queue::open(&dir.path().join("events.sqlite"), limit).unwrap();
        (queue, found.lanes)
    }

    #[tokio::test]
    async fn events_are_there_after_a_restart_in_the_order_in_which_they_are_due() {
        let dir = tempfile::tempdir().unwrap();
        let (queue, _) = open(&dir, 1 << 20);
        for _ in 0..3 {
            queue.add(event("f", 100)).await.unwrap();
        }
        queue.settle(1, Fate::Again { due_ms: 99, attempts: 2 }).await.unwrap();
        queue.settle(2, Fate::Done(vec![event("g", 50)])).await.unwrap();
        drop(queue);
        let (queue, mut functions) = open(&dir, 1 << 20);
        functions.sort();
        assert_eq!(functions, ["f", "g"]);
        assert_eq!(queue.page("f", 9).await.unwrap(), [(3, 7), (1, 99)]);
        assert_eq!(queue.page("f", 1).await.unwrap().len(), 1);
        assert_eq!(queue.load(1).await.unwrap().unwrap().attempts, 2);
        assert_eq!(queue.load(4).await.unwrap().unwrap().event.function, "g");
        assert!(queue.load(2).await.unwrap().is_none());
        let usage = Usage { events: 3, bytes: 250 + 3 * ROW_BYTES };
        assert_eq!(queue.usage().await.unwrap(), usage);
        queue.forget("f", "another of that name").await.unwrap();
        assert_eq!(queue.usage().await.unwrap(), usage);
        queue.forget("f", "o").await.unwrap();
        assert_eq!(queue.usage().await.unwrap().events, 1);
        // What was forgotten during its last attempt leads to nothing.
        queue.settle(3, Fate::Done(vec![event("g", 50)])).await.unwrap();
        assert_eq!(queue.usage().await.unwrap().events, 1);
    }

    #[tokio::test]
    async fn one_function_leaves_room_for_others() {
        let dir = tempfile::tempdir().unwrap();
        let (queue, _) = open(&dir, 1 << 20);
        let mut accepted = 0;
        let error = loop {
            match queue.add(event("f", 1000)).await {
                Ok(()) => accepted += 1,
                Err(error) => break error,
            }
        };
        assert!(matches!(&error, QueueError::Full { function, .. } if function == "f"), "{error}");
        let bytes = queue.usage().await.unwrap().bytes;
        assert!((400 << 10..513 << 10).contains(&bytes), "{bytes} of {accepted} events");
        for _ in 0..20 {
            queue.add(event("g", 1000)).await.unwrap();
        }
        queue.settle(1, Fate::Done(Vec::new())).await.unwrap();
        drop(queue);
        let (queue, _) = open(&dir, 1 << 20);
        assert_eq!(queue.usage().await.unwrap().events, accepted + 20 - 1, "counted anew");
    }

    #[tokio::test]
    async fn what_a_function_sends_is_counted_as_its_own_and_goes_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let (mut queue, _) = open(&dir, 1 << 20);
        while queue.add(event("f", 1000)).await.is_ok() {}
        let before = queue.usage().await.unwrap();
        // Events of f become messages of f: there is no more room for it than before.
        for id in 1..=100 {
            queue.settle(id, Fate::Done(vec![event("f>q", 1000)])).await.unwrap();
        }
        for round in 0..2 {
            assert!(matches!(queue.add(event("f", 1000)).await, Err(QueueError::Full { .. })));
            assert_eq!(queue.usage().await.unwrap(), before, "round {round}");
            if round == 0 {
                drop(queue);
                let (reopened, mut lanes) = open(&dir, 1 << 20);
                lanes.sort();
                assert_eq!(lanes, ["f", "f>q"]);
                queue = reopened;
            }
        }
        queue.add(event("f-2", 1000)).await.unwrap();
        queue.forget("f", "o").await.unwrap();
        assert_eq!(queue.usage().await.unwrap().events, 1);
    }

    #[tokio::test]
    async fn a_write_that_fails_changes_nothing_and_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let (queue, _) = open(&dir, 1 << 20);
        queue.add(event("f", 10)).await.unwrap();
        let other = Connection::open(dir.path().join("events.sqlite")).unwrap();
        other.execute_batch("ALTER TABLE events RENAME TO elsewhere").unwrap();
        assert!(matches!(queue.add(event("f", 10)).await, Err(QueueError::Sqlite(_))));
        other.execute_batch("ALTER TABLE elsewhere RENAME TO events").unwrap();
        queue.add(event("f", 10)).await.unwrap();
        assert_eq!(queue.usage().await.unwrap().events, 2);
    }

    #[test]
    fn a_newer_schema_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.sqlite");
        Connection::open(&path).unwrap().pragma_update(None, "user_version", 99).unwrap();
        let error = Queue::open(&path, 1).unwrap_err();
        assert!(error.to_string().contains("schema version 99"), "{error}");
    }

    /// `cargo test --release -p firnd events_a_second -- --ignored --nocapture`
    #[tokio::test(flavor = "multi_thread")]
    #[ignore = "a measurement"]
    async fn events_a_second() {
        const EVENTS: usize = 2000;
        for bytes in [300, 65_536] {
            for (callers, batch) in
                [(1, 1), (1, BATCH), (16, 1), (16, BATCH), (128, 1), (128, BATCH)]
            {
                let dir = tempfile::tempdir().unwrap();
                let path = dir.path().join("events.sqlite");
                let (queue, _) = Queue::open_with(&path, 1 << 40, batch).unwrap();
                let begun = Instant::now();
                let tasks: Vec<_> = (0..callers)
                    .map(|_| {
                        let queue = queue.clone();
                        tokio::spawn(async move {
                            for _ in 0..EVENTS / callers {
                                queue.add(event("f", bytes)).await.unwrap();
                            }
                        })
                    })
                    .collect();
                for task in tasks {
                    task.await.unwrap();
                }
                let a_second = (EVENTS / callers * callers) as f64 / begun.elapsed().as_secs_f64();
                println!("{bytes} bytes, {callers} callers, {batch} a commit: {a_second:.0}/s");
            }
        }
    }
}
