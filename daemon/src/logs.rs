//! Functions' logs: `logs/<function>/<stream>.log`, one stream an instance.
//!
//! Everything is bounded: a stream's file (rotated once), the streams of a function (the oldest
//! go), the bytes that wait to be written (a function that prints faster than the disk takes is
//! slowed down), and the tail that `LogType=Tail` returns. One thread writes all files, so that no
//! request waits for a disk. Logs are no promise: what can't be written is dropped with a warning.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    thread,
};

use firn::LogLine;
use time::OffsetDateTime;
use tokio::sync::mpsc;

use crate::function::Version;

/// Bytes of log that an invocation returns at most.
pub const TAIL: usize = 4096;

/// Bytes that a stream collects before it hands them to the writer.
const CHUNK: usize = 64 * 1024;

/// Chunks that may wait for the writer.
const QUEUE: usize = 64;

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
}

enum Order {
    Append { function: String, file: String, bytes: Vec<u8> },
    Remove { function: String },
    Flush(tokio::sync::oneshot::Sender<()>),
}

impl Logs {
    /// Starts the writer.
    ///
    /// # Errors
    /// The directory can't be made, or there is no thread.
    pub fn open(dir: PathBuf, bounds: Bounds) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        let (queue, orders) = mpsc::channel(QUEUE);
        thread::Builder::new()
            .name("logs".into())
            .spawn(move || Writer { dir, bounds }.run(orders))?;
        Ok(Self { queue })
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
            file: format!("{}.log", name.replace('/', "-")),
            name,
            pending: Vec::new(),
            tail: Vec::new(),
            queue: self.queue.clone(),
        }
    }

    /// Removes the logs of a function.
    pub async fn remove(&self, function: &str) {
        let _ = self.queue.send(Order::Remove { function: function.to_owned() }).await;
    }

    /// Waits until everything that was written before is in its file.
    pub async fn flush(&self) {
        let (done, wait) = tokio::sync::oneshot::channel();
        if self.queue.send(Order::Flush(done)).await.is_ok() {
            let _ = wait.await;
        }
    }
}

/// The log of one instance.
pub struct Stream {
    function: String,
    name: String,
    file: String,
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
        self.push(line.as_bytes(), true).await;
    }

    /// Adds a piece of the function's output.
    pub async fn output(&mut self, piece: &LogLine) {
        self.push(&piece.line, !piece.partial).await;
    }

    /// Forgets the tail: a new invocation begins.
    pub fn begin_tail(&mut self) {
        self.tail.clear();
    }

    /// The last bytes since [`Self::begin_tail`], at most [`TAIL`].
    pub fn tail(&self) -> &[u8] {
        &self.tail[self.tail.len().saturating_sub(TAIL)..]
    }

    /// Hands what is pending to the writer.
    pub async fn flush(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        let order = Order::Append {
            function: self.function.clone(),
            file: self.file.clone(),
            bytes: std::mem::take(&mut self.pending),
        };
        let _ = self.queue.send(order).await;
    }

    async fn push(&mut self, bytes: &[u8], ends_line: bool) {
        for buffer in [&mut self.pending, &mut self.tail] {
            buffer.extend_from_slice(bytes);
            if ends_line {
                buffer.push(b'\n');
            }
        }
        // In steps of several tails, so that a flood moves each byte once.
        if self.tail.len() > 8 * TAIL {
            self.tail.drain(..self.tail.len() - TAIL);
        }
        if self.pending.len() >= CHUNK {
            self.flush().await;
        }
    }
}

struct Writer {
    dir: PathBuf,
    bounds: Bounds,
}

impl Writer {
    fn run(self, mut orders: mpsc::Receiver<Order>) {
        while let Some(order) = orders.blocking_recv() {
            let result = match &order {
                Order::Append { function, file, bytes } => self.append(function, file, bytes),
                Order::Remove { function } => match fs::remove_dir_all(self.dir.join(function)) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                    other => other,
                },
                Order::Flush(_) => Ok(()),
            };
            if let Err(error) = result {
                tracing::warn!(%error, dir = %self.dir.display(), "can't keep a function's log");
            }
            if let Order::Flush(done) = order {
                let _ = done.send(());
            }
        }
    }

    fn append(&self, function: &str, file: &str, bytes: &[u8]) -> io::Result<()> {
        let dir = self.dir.join(function);
        let path = dir.join(file);
        let mut open = match File::options().append(true).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(&dir)?;
                self.drop_oldest(&dir)?;
                File::options().append(true).create(true).open(&path)?
            }
            other => other?,
        };
        if open.metadata()?.len() + bytes.len() as u64 > self.bounds.stream_bytes {
            fs::rename(&path, path.with_extension("log.1"))?;
            open = File::options().append(true).create(true).open(&path)?;
        }
        open.write_all(bytes)
    }

    /// Makes room for one more stream.
    fn drop_oldest(&self, dir: &Path) -> io::Result<()> {
        let mut streams = Vec::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            if entry.path().extension().is_some_and(|e| e == "log") {
                streams.push((entry.metadata()?.modified()?, entry.path()));
            }
        }
        streams.sort();
        let excess = (streams.len() + 1).saturating_sub(self.bounds.streams);
        for (_, path) in streams.into_iter().take(excess) {
            let _ = fs::remove_file(path.with_extension("log.1"));
            fs::remove_file(path)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str, partial: bool) -> LogLine {
        LogLine { stream: firn::guest::Stream::Stdout, line: text.into(), partial }
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
        stream.service("END").await;
        stream.flush().await;
        logs.flush().await;
        assert_eq!(stream.tail(), b"ab\nEND\n");
        let file = fs::read(dir.path().join("f").join(&stream.file)).unwrap();
        assert_eq!(file, b"before\nab\nEND\n");
        logs.remove("f").await;
        logs.flush().await;
        assert!(!dir.path().join("f").exists());
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
        let path = dir.path().join("f").join(&stream.file);
        assert!(size(&path) <= 200_000 && size(&path.with_extension("log.1")) <= 200_000);
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
}
