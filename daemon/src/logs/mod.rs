//! Functions' logs, as CloudWatch Logs has them: a group for each function, a stream for each instance,
//! an event for each line that it prints.
//!
//! A stream's file is `logs/<function>/<stream>.log` ([`record`] has its format). Everything is bounded:
//! a stream's file (rotated once), the streams of a function (the oldest go), the bytes that wait to be
//! written (a function that prints faster than the disk takes is slowed down), and the tail that
//! `LogType=Tail` returns. One thread writes all files ([`writer`]), so that no request waits for a disk;
//! who reads ([`archive`]) never holds it up. Logs are no promise: what can't be written is dropped with
//! a warning.

pub mod archive;
pub mod pattern;
mod record;
mod writer;

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use firn::LogLine;
use time::OffsetDateTime;
use tokio::sync::{Semaphore, mpsc, oneshot};

pub use self::writer::Change;
use self::{
    archive::Archive,
    writer::{Order, Writer},
};
use crate::function::{Version, now_ms};

/// Bytes of log that an invocation returns at most.
pub const TAIL: usize = 4096;

/// Bytes that a stream collects before it hands them to the writer.
const CHUNK: usize = 64 * 1024;

/// Chunks that may wait for the writer.
const QUEUE: usize = 64;

/// Callers that read at once.
const READERS: usize = 4;

/// Time between looks at what is older than its group keeps it.
const SWEEP: Duration = Duration::from_secs(3600);

/// How much is kept.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Bytes after which a stream's file is rotated; one older file is kept.
    pub stream_bytes: u64,
    /// Streams of one function.
    pub streams: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { stream_bytes: 4 << 20, streams: 64 }
    }
}

/// Keeps the logs of all functions. Cheap to clone; the writer ends with the last clone.
#[derive(Debug, Clone)]
pub struct Logs {
    queue: mpsc::Sender<Order>,
    dir: Arc<Path>,
    readers: Arc<Semaphore>,
}

impl Logs {
    /// Starts the writer.
    ///
    /// # Errors
    /// The directory can't be made, or there is no thread.
    pub fn open(dir: PathBuf, bounds: Bounds) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        let (queue, orders) = mpsc::channel(QUEUE);
        let writer = Writer { dir: dir.clone(), bounds };
        thread::Builder::new().name("logs".into()).spawn(move || writer.run(orders))?;
        let weak = queue.downgrade();
        tokio::spawn(async move {
            loop {
                let Some(queue) = weak.upgrade() else { return };
                let _ = queue.send(Order::Sweep).await;
                drop(queue);
                tokio::time::sleep(SWEEP).await;
            }
        });
        Ok(Self { queue, dir: dir.into(), readers: Arc::new(Semaphore::new(READERS)) })
    }

    /// A new stream of a version of `function`.
    pub fn stream(&self, function: &str, version: Version) -> Stream {
        let now = OffsetDateTime::now_utc();
        let name = format!(
            "{:04}/{:02}/{:02}/[{version}]{}",
            now.year(),
            u8::from(now.month()),
            now.day(),
            uuid::Uuid::new_v4().simple()
        );
        Stream {
            function: function.to_owned(),
            name,
            line: Vec::new(),
            line_ms: 0,
            last_ms: 0,
            pending: Vec::new(),
            tail: Vec::new(),
            queue: self.queue.clone(),
        }
    }

    /// Removes the logs of a function.
    pub async fn remove(&self, function: &str) {
        if let Err(error) = self.change(function, Change::RemoveGroup).await
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(function, %error, "logs of a deleted function remain");
        }
    }

    /// Changes what is kept of a function, behind everything that was written before.
    ///
    /// # Errors
    /// As the file system says; `NotFound`, `AlreadyExists` and `QuotaExceeded` as [`Change`] does.
    pub async fn change(&self, function: &str, change: Change) -> io::Result<()> {
        let (done, wait) = oneshot::channel();
        let order = Order::Change { function: function.to_owned(), change, done };
        let gone = || io::Error::other("the writer of logs has ended");
        self.queue.send(order).await.map_err(|_| gone())?;
        wait.await.map_err(|_| gone())?
    }

    /// Reads what has been written, a few callers at once. Whoever has the answer to an invocation finds
    /// what it said.
    ///
    /// # Errors
    /// There is no thread to read in.
    pub async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(Archive) -> T + Send + 'static,
    ) -> io::Result<T> {
        let _turn = self.readers.clone().acquire_owned().await.map_err(io::Error::other)?;
        self.flush().await;
        let archive = Archive::new(self.dir.clone());
        tokio::task::spawn_blocking(move || work(archive)).await.map_err(io::Error::other)
    }

    /// Waits until everything that was written before is in its file.
    pub async fn flush(&self) {
        let (done, wait) = oneshot::channel();
        if self.queue.send(Order::Flush(done)).await.is_ok() {
            let _ = wait.await;
        }
    }
}

/// The log of one instance.
pub struct Stream {
    function: String,
    name: String,
    /// The beginning of a line, and when it came.
    line: Vec<u8>,
    line_ms: i64,
    /// Time of the last event: none is older than the one before it.
    last_ms: i64,
    /// Records for the writer.
    pending: Vec<u8>,
    tail: Vec<u8>,
    queue: mpsc::Sender<Order>,
}

impl fmt::Debug for Stream {
    /// Without what the function has printed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { function, name, .. } = self;
        f.debug_struct("Stream")
            .field("function", function)
            .field("name", name)
            .finish_non_exhaustive()
    }
}

impl Stream {
    /// `AWS_LAMBDA_LOG_STREAM_NAME`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Adds a line of the service's own.
    pub async fn service(&mut self, line: &str) {
        // A line that the function did not end ends here.
        if !self.line.is_empty() {
            self.end_line();
        }
        self.push_tail(line.as_bytes(), true);
        self.event(now_ms(), line.trim_end().as_bytes());
        self.relieve().await;
    }

    /// Adds a piece of the function's output.
    pub async fn output(&mut self, piece: &LogLine) {
        self.push_tail(&piece.line, !piece.partial);
        let mut rest = &piece.line[..];
        if self.line.is_empty() {
            self.line_ms = now_ms();
        }
        while self.line.len() + rest.len() > record::MAX_MESSAGE {
            let (now, later) = rest.split_at(record::MAX_MESSAGE - self.line.len());
            self.line.extend_from_slice(now);
            self.end_line();
            rest = later;
        }
        self.line.extend_from_slice(rest);
        if !piece.partial {
            self.end_line();
        }
        self.relieve().await;
    }

    /// Forgets the tail: a new invocation begins.
    pub fn begin_tail(&mut self) {
        self.tail.clear();
    }

    /// The last bytes since [`Self::begin_tail`], at most [`TAIL`].
    pub fn tail(&self) -> &[u8] {
        &self.tail[self.tail.len().saturating_sub(TAIL)..]
    }

    /// Whether something waits for [`Self::flush`].
    pub fn is_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Hands what is pending to the writer.
    pub async fn flush(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        let order = Order::Append {
            function: self.function.clone(),
            file: archive::file_of(&self.name),
            records: std::mem::take(&mut self.pending),
        };
        let _ = self.queue.send(order).await;
    }

    fn end_line(&mut self) {
        let line = std::mem::take(&mut self.line);
        self.event(self.line_ms, &line);
        // A long line's memory does not stay.
        if line.capacity() <= CHUNK {
            self.line = line;
            self.line.clear();
        }
    }

    fn event(&mut self, timestamp_ms: i64, message: &[u8]) {
        self.last_ms = self.last_ms.max(timestamp_ms);
        record::push(&mut self.pending, self.last_ms, message);
    }

    fn push_tail(&mut self, bytes: &[u8], ends_line: bool) {
        self.tail.extend_from_slice(bytes);
        if ends_line {
            self.tail.push(b'\n');
        }
        // In steps of several tails, so that a flood moves each byte once.
        if self.tail.len() > 8 * TAIL {
            self.tail.drain(..self.tail.len() - TAIL);
        }
    }

    async fn relieve(&mut self) {
        if self.pending.len() >= CHUNK {
            self.flush().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn line(text: &str, partial: bool) -> LogLine {
        LogLine { stream: firn::guest::Stream::Stdout, line: text.into(), partial }
    }

    fn messages(dir: &Path, stream: &Stream) -> Vec<String> {
        let path = dir.join(&stream.function).join(archive::file_of(&stream.name));
        let mut reader = record::Reader::open(&path).unwrap();
        let mut at = 0;
        std::iter::from_fn(|| {
            let event = reader.next(at)?;
            at = event.next;
            Some(String::from_utf8(event.message).unwrap())
        })
        .collect()
    }

    #[tokio::test]
    async fn lines_reach_the_file_and_the_tail() {
        let dir = tempfile::tempdir().unwrap();
        let logs = Logs::open(dir.path().to_owned(), Bounds::default()).unwrap();
        let mut stream = logs.stream("f", Version::Latest);
        assert!(stream.name().contains("/[$LATEST]"));
        stream.service("before").await;
        stream.begin_tail();
        stream.output(&line("a", true)).await;
        stream.output(&line("b", false)).await;
        stream.output(&line("unfinished", true)).await;
        stream.service("END").await;
        stream.flush().await;
        logs.flush().await;
        assert_eq!(stream.tail(), b"ab\nunfinishedEND\n");
        assert_eq!(messages(dir.path(), &stream), ["before", "ab", "unfinished", "END"]);
        logs.remove("f").await;
        assert!(!dir.path().join("f").exists());
    }

    #[tokio::test]
    async fn a_line_without_end_becomes_events_of_a_bounded_length() {
        let dir = tempfile::tempdir().unwrap();
        let logs = Logs::open(dir.path().to_owned(), Bounds::default()).unwrap();
        let mut stream = logs.stream("f", Version::Latest);
        let piece = "x".repeat(16 * 1024);
        for _ in 0..33 {
            stream.output(&line(&piece, true)).await;
            assert!(stream.line.len() <= record::MAX_MESSAGE);
        }
        stream.output(&line("", false)).await;
        stream.flush().await;
        logs.flush().await;
        let lengths: Vec<usize> = messages(dir.path(), &stream).iter().map(String::len).collect();
        assert_eq!(lengths, [262_144, 262_144, 16_384]);
    }

    #[tokio::test]
    async fn a_flood_is_bounded_everywhere() {
        let dir = tempfile::tempdir().unwrap();
        let bounds = Bounds { stream_bytes: 200_000, streams: 2 };
        let logs = Logs::open(dir.path().to_owned(), bounds).unwrap();
        let mut stream = logs.stream("f", Version::Latest);
        for i in 0..20_000 {
            stream.output(&line(&format!("line {i} {}", "x".repeat(100)), false)).await;
            assert!(stream.pending.len() < 2 * CHUNK && stream.tail.len() < 16 * TAIL);
        }
        stream.flush().await;
        logs.flush().await;
        assert_eq!(stream.tail().len(), TAIL);
        assert!(stream.tail().ends_with(b"x\n"));
        let size = |path: &Path| fs::metadata(path).unwrap().len();
        let path = dir.path().join("f").join(archive::file_of(&stream.name));
        assert!(size(&path) <= 200_000 && size(&path.with_extension("log.1")) <= 200_000);
        let kept = messages(dir.path(), &stream);
        let first: usize = kept[0].split(' ').nth(1).unwrap().parse().unwrap();
        // What is left is the end, without a hole where the file was rotated.
        for (i, message) in (first..20_000).zip(&kept) {
            assert!(message.starts_with(&format!("line {i} ")), "{message}");
        }
        assert_eq!(first + kept.len(), 20_000);
    }

    #[tokio::test]
    async fn old_streams_make_room() {
        let dir = tempfile::tempdir().unwrap();
        let logs =
            Logs::open(dir.path().to_owned(), Bounds { stream_bytes: 1000, streams: 3 }).unwrap();
        for _ in 0..7 {
            let mut stream = logs.stream("f", Version::Latest);
            stream.service("x").await;
            stream.flush().await;
        }
        logs.flush().await;
        assert_eq!(fs::read_dir(dir.path().join("f")).unwrap().count(), 3);
    }

    #[tokio::test]
    async fn retention_removes_what_is_older() {
        let dir = tempfile::tempdir().unwrap();
        let logs = Logs::open(dir.path().to_owned(), Bounds::default()).unwrap();
        let mut streams = Vec::new();
        for _ in 0..2 {
            let mut stream = logs.stream("f", Version::Latest);
            stream.service("x").await;
            stream.flush().await;
            streams.push(dir.path().join("f").join(archive::file_of(&stream.name)));
        }
        logs.flush().await;
        let old = std::time::SystemTime::now() - Duration::from_secs(2 * 86_400);
        fs::File::options().write(true).open(&streams[0]).unwrap().set_modified(old).unwrap();
        logs.change("f", Change::Retention(Some(3))).await.unwrap();
        assert!(streams[0].exists());
        logs.change("f", Change::Retention(Some(1))).await.unwrap();
        assert!(!streams[0].exists() && streams[1].exists());
        let error = logs.change("g", Change::Retention(Some(1))).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
