//! The audit trail: who has called what, as records of CloudTrail's form, in files of CloudTrail's layout.
//!
//! One thread owns it. Records are appended to one file of lines; a caller who has changed something waits
//! until its record is on the disk, and all who wait share one flush. Every few minutes, or when it is large,
//! the file becomes one compressed file under `AWSLogs/`, ready to be delivered. A daemon that is killed
//! leaves the file of lines, and the next one begins with compressing it; what was being written then, and
//! nobody was told of, may be cut off.
//!
//! With a bucket, finished files are [delivered](delivery) to it.
//!
//! While the disk takes no records, nothing is done that would have to be recorded: [`Audit::broken`]. So what
//! waits for the disk is bounded by the requests that were in flight when it failed.

pub mod delivery;

use std::{
    collections::VecDeque,
    fs::{self, File},
    io::{self, BufRead, BufReader, Seek, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use flate2::{Compression, write::GzEncoder};
use time::{OffsetDateTime, macros::format_description};
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot},
};

use self::delivery::Delivery;
use crate::api::names::Place;

/// Records that may wait for the thread; who has a further one waits.
const WAITING: usize = 1024;

/// Most records that one flush is for.
const BATCH: usize = 256;

/// Time after which a write that failed is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// What bounds the trail.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Bytes of records after which a file is compressed.
    pub file: u64,
    /// Age of its first record after which a file is compressed.
    pub age: Duration,
    /// Bytes of compressed files; the oldest are removed.
    pub space: u64,
    /// Whether invocations are recorded.
    pub data_events: bool,
}

impl Default for Bounds {
    fn default() -> Self {
        let age = Duration::from_secs(300);
        Self { file: 1 << 20, age, space: 1 << 30, data_events: false }
    }
}

/// The trail.
#[derive(Debug)]
pub struct Audit {
    sender: mpsc::Sender<Command>,
    broken: Arc<AtomicBool>,
    data_events: bool,
    delivery: Option<Delivery>,
}

enum Command {
    /// A record as one line, and who waits until it is on the disk.
    Record(Vec<u8>, Option<oneshot::Sender<bool>>),
    /// Compress what there is, and say so.
    Close(oneshot::Sender<()>),
}

/// A record that is not on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the audit trail can't be written")]
pub struct Unwritten;

impl Audit {
    /// Opens the trail in `dir`, which must be there and this user's alone, for files that are then delivered,
    /// or stay. Call it within a runtime.
    ///
    /// # Errors
    /// The directory can't be read or written.
    pub fn open(
        dir: PathBuf,
        place: Place,
        bounds: Bounds,
        delivery: Option<Delivery>,
    ) -> io::Result<Self> {
        let broken = Arc::new(AtomicBool::new(false));
        let mut writer = Writer::open(dir, place, bounds, delivery.clone())?;
        let (sender, receiver) = mpsc::channel(WAITING);
        let (flag, runtime) = (broken.clone(), Handle::current());
        thread::Builder::new()
            .name("audit".into())
            .spawn(move || writer.run(receiver, &runtime, &flag))?;
        Ok(Self { sender, broken, data_events: bounds.data_events, delivery })
    }

    /// Whether invocations are recorded.
    pub fn data_events(&self) -> bool {
        self.data_events
    }

    /// Whether the last write failed. It is tried again every second.
    pub fn broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }

    /// Adds a record, which is one line without its end. If it must be `durable`, this ends when it is on
    /// the disk.
    ///
    /// # Errors
    /// [`Unwritten`].
    pub async fn add(&self, record: Vec<u8>, durable: bool) -> Result<(), Unwritten> {
        let (done, written) = oneshot::channel();
        let command = Command::Record(record, durable.then_some(done));
        self.sender.send(command).await.map_err(|_| Unwritten)?;
        match durable {
            true if written.await == Ok(true) => Ok(()),
            true => Err(Unwritten),
            false => Ok(()),
        }
    }

    /// Compresses what there is.
    pub async fn close(&self) {
        let (done, closed) = oneshot::channel();
        if self.sender.send(Command::Close(done)).await.is_ok() {
            let _ = closed.await;
        }
    }

    /// Waits until what is to be delivered is, for at most `patience`.
    pub async fn delivered(&self, patience: Duration) {
        if let Some(delivery) = &self.delivery {
            delivery.settle(patience).await;
        }
    }
}

/// What the thread has.
struct Writer {
    dir: PathBuf,
    place: Place,
    bounds: Bounds,
    /// The file of lines, its bytes that are whole records, and when the first one came.
    lines: File,
    length: u64,
    since: Instant,
    /// Lines that could not be written yet.
    unwritten: Vec<u8>,
    /// Compressed files with their lengths, oldest first.
    files: VecDeque<(PathBuf, u64)>,
    delivery: Option<Delivery>,
}

impl Writer {
    fn open(
        dir: PathBuf,
        place: Place,
        bounds: Bounds,
        delivery: Option<Delivery>,
    ) -> io::Result<Self> {
        let mut files = Vec::new();
        find(&dir.join("AWSLogs"), &mut files)?;
        // Their names begin with their times.
        files.sort_by(|(a, _), (b, _)| a.file_name().cmp(&b.file_name()));
        let mut lines = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(dir.join("current.jsonl"))?;
        let length = lines.seek(io::SeekFrom::End(0))?;
        let (since, unwritten) = (Instant::now(), Vec::new());
        let files = files.into();
        let mut writer =
            Self { dir, place, bounds, lines, length, since, unwritten, files, delivery };
        writer.compress()?;
        Ok(writer)
    }

    fn run(
        &mut self,
        mut receiver: mpsc::Receiver<Command>,
        runtime: &Handle,
        broken: &AtomicBool,
    ) {
        loop {
            let wait = match (self.unwritten.is_empty(), self.length) {
                (false, _) => RETRY,
                (true, 0) => Duration::MAX,
                (true, _) => self.bounds.age.saturating_sub(self.since.elapsed()),
            };
            let first = runtime.block_on(async {
                tokio::time::timeout(wait.min(Duration::from_secs(3600)), receiver.recv()).await
            });
            let mut next = match first {
                Ok(None) => break,
                Ok(first) => first,
                Err(_) => None,
            };
            let (mut waiting, mut closing) = (Vec::new(), Vec::new());
            for _ in 0..BATCH {
                match next {
                    Some(Command::Record(mut record, done)) => {
                        self.unwritten.append(&mut record);
                        self.unwritten.push(b'\n');
                        waiting.extend(done);
                    }
                    Some(Command::Close(done)) => closing.push(done),
                    None => break,
                }
                next = receiver.try_recv().ok();
            }
            let durable = !waiting.is_empty() || broken.load(Ordering::Relaxed);
            let written = self.write(durable);
            if let Err(error) = &written {
                tracing::error!(%error, "the audit trail can't be written; requests are refused until it can");
            }
            broken.store(written.is_err(), Ordering::Relaxed);
            // Who waited may have gone meanwhile.
            for done in waiting {
                let _ = done.send(written.is_ok());
            }
            let due = self.length >= self.bounds.file || self.since.elapsed() >= self.bounds.age;
            if (due || !closing.is_empty())
                && written.is_ok()
                && let Err(error) = self.compress()
            {
                // The lines stay, and are tried again with the next record.
                tracing::error!(%error, "audit records can't be compressed");
            }
            for done in closing {
                let _ = done.send(());
            }
        }
    }

    /// Appends what is to be written; all of it or nothing.
    fn write(&mut self, durable: bool) -> io::Result<()> {
        if !self.unwritten.is_empty() {
            // What an earlier write has left half done goes first.
            self.lines.set_len(self.length)?;
            self.lines.seek(io::SeekFrom::Start(self.length))?;
            self.lines.write_all(&self.unwritten)?;
        }
        if durable {
            self.lines.sync_data()?;
        }
        if self.length == 0 {
            self.since = Instant::now();
        }
        self.length += self.unwritten.len() as u64;
        self.unwritten = Vec::new();
        Ok(())
    }

    /// Makes a compressed file of the lines. If it is interrupted between the two, the lines are in the
    /// next file, too: each record has an id.
    fn compress(&mut self) -> io::Result<()> {
        if self.length == 0 {
            return Ok(());
        }
        let now = OffsetDateTime::now_utc();
        let day = now.format(format_description!("[year]/[month]/[day]"));
        let stamp = now.format(format_description!("[year][month][day]T[hour][minute]Z"));
        let (day, stamp) = (day.map_err(io::Error::other)?, stamp.map_err(io::Error::other)?);
        let Place { region, account } = &self.place;
        let dir = self.dir.join(format!("AWSLogs/{account}/CloudTrail/{region}/{day}"));
        fs::create_dir_all(&dir)?;
        let unique = &uuid::Uuid::new_v4().simple().to_string()[..16];
        let name = format!("{account}_CloudTrail_{region}_{stamp}_{unique}.json.gz");
        let (temporary, path) = (dir.join(format!(".{name}")), dir.join(&name));
        let file = File::options().write(true).create_new(true).mode(0o600).open(&temporary)?;
        let mut gzip = GzEncoder::new(file, Compression::default());
        gzip.write_all(br#"{"Records":["#)?;
        self.lines.rewind()?;
        let mut lines = BufReader::new(&self.lines);
        let (mut line, mut any) = (Vec::new(), false);
        while lines.read_until(b'\n', &mut line)? > 0 {
            // What has no end was cut off with the daemon that wrote it.
            if line.pop() == Some(b'\n') {
                gzip.write_all(if any { b"," } else { b"" })?;
                gzip.write_all(&line)?;
                any = true;
            }
            line.clear();
        }
        gzip.write_all(b"]}")?;
        let file = gzip.finish()?;
        match any {
            true => {
                file.sync_all()?;
                if let Some(delivery) = &self.delivery {
                    delivery.add(&temporary, &name)?;
                }
                fs::rename(&temporary, &path)?;
                // The file and each directory that may be new.
                let top = dir.ancestors().take_while(|dir| dir.starts_with(&self.dir));
                top.map(File::open).try_for_each(|dir| dir?.sync_all())?;
                self.files.push_back((path, file.metadata()?.len()));
            }
            false => fs::remove_file(&temporary)?,
        }
        self.lines.set_len(0)?;
        self.lines.sync_data()?;
        self.length = 0;
        if let Some(delivery) = &self.delivery {
            delivery.wake();
        }
        self.make_room();
        Ok(())
    }

    fn make_room(&mut self) {
        let mut sum: u64 = self.files.iter().map(|(_, length)| length).sum();
        while sum > self.bounds.space
            && let Some((path, length)) = self.files.pop_front()
        {
            sum -= length;
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if self.delivery.as_ref().is_some_and(|delivery| delivery.forget(&name)) {
                tracing::error!(file = %path.display(), "an audit file was not delivered in time");
            }
            match fs::remove_file(&path) {
                // Whoever delivers files may remove them.
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::error!(file = %path.display(), %error, "an old audit file can't be removed");
                }
                Err(_) => {}
                Ok(()) => tracing::warn!(
                    file = %path.display(),
                    "an audit file was removed: there is no room for more (--audit-space)"
                ),
            }
        }
    }
}

/// Compressed files under `dir`. What was not finished is removed.
fn find(dir: &Path, files: &mut Vec<(PathBuf, u64)>) -> io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        let (path, metadata) = (entry.path(), entry.metadata()?);
        if metadata.is_dir() {
            find(&path, files)?;
        } else if entry.file_name().to_string_lossy().starts_with('.') {
            fs::remove_file(path)?;
        } else {
            files.push((path, metadata.len()));
        }
    }
    Ok(())
}

#[cfg(test)]
pub mod tests {
    use std::io::Read;

    use flate2::read::GzDecoder;
    use serde_json::{Value, json};

    use super::*;

    pub fn place() -> Place {
        Place { region: "us-east-1".into(), account: "000000000000".into() }
    }

    /// All records in compressed files, in order, and the files.
    pub fn records(dir: &Path) -> (Vec<Value>, Vec<PathBuf>) {
        let mut files = Vec::new();
        find(&dir.join("AWSLogs"), &mut files).unwrap();
        files.sort_by_key(|(path, _)| fs::metadata(path).unwrap().modified().unwrap());
        let mut all = Vec::new();
        for (path, _) in &files {
            let mut text = String::new();
            GzDecoder::new(File::open(path).unwrap()).read_to_string(&mut text).unwrap();
            let mut document: Value = serde_json::from_str(&text).unwrap();
            all.append(document["Records"].as_array_mut().unwrap());
        }
        (all, files.into_iter().map(|(path, _)| path).collect())
    }

    pub fn line(n: u64) -> Vec<u8> {
        json!({ "n": n }).to_string().into_bytes()
    }

    fn numbers(dir: &Path) -> Vec<u64> {
        records(dir).0.iter().map(|record| record["n"].as_u64().unwrap()).collect()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn records_become_files_of_cloudtrails_layout() {
        let dir = tempfile::tempdir().unwrap();
        let audit = Audit::open(dir.path().into(), place(), Bounds::default(), None).unwrap();
        for n in 0..100 {
            audit.add(line(n), n % 2 == 0).await.unwrap();
        }
        assert!(records(dir.path()).1.is_empty());
        audit.close().await;
        assert_eq!(numbers(dir.path()), (0..100).collect::<Vec<_>>());
        let (_, files) = records(dir.path());
        let path = files[0].strip_prefix(dir.path()).unwrap().to_str().unwrap();
        let pattern = regex::Regex::new(
            r"^AWSLogs/000000000000/CloudTrail/us-east-1/\d{4}/\d{2}/\d{2}/000000000000_CloudTrail_us-east-1_\d{8}T\d{4}Z_[0-9a-f]{16}\.json\.gz$",
        );
        assert!(pattern.unwrap().is_match(path), "{path}");
        audit.add(line(100), true).await.unwrap();
        audit.close().await;
        assert_eq!(numbers(dir.path()).len(), 101);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_a_killed_daemon_leaves_is_compressed_by_the_next() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("current.jsonl"), "{\"n\":1}\n{\"n\":2}\n{\"n\":").unwrap();
        let audit = Audit::open(dir.path().into(), place(), Bounds::default(), None).unwrap();
        assert_eq!(numbers(dir.path()), [1, 2]);
        audit.add(line(3), true).await.unwrap();
        // On the disk before anybody is told.
        assert_eq!(fs::read(dir.path().join("current.jsonl")).unwrap(), b"{\"n\":3}\n");
        drop(audit);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn files_end_by_length_and_by_age_and_leave_room() {
        let dir = tempfile::tempdir().unwrap();
        let bounds = Bounds { file: 64, age: Duration::from_millis(50), ..Bounds::default() };
        let audit = Audit::open(dir.path().into(), place(), bounds, None).unwrap();
        for n in 0..20 {
            audit.add(line(n), true).await.unwrap();
        }
        audit.add(line(20), false).await.unwrap();
        for _ in 0..400 {
            if numbers(dir.path()).len() == 21 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(numbers(dir.path()), (0..21).collect::<Vec<_>>());
        assert!(records(dir.path()).1.len() >= 2);
        drop(audit);
        let bounds = Bounds { space: 100, ..bounds };
        let audit = Audit::open(dir.path().into(), place(), bounds, None).unwrap();
        audit.add(line(21), true).await.unwrap();
        audit.close().await;
        let found = numbers(dir.path());
        assert!(found.len() < 10 && found.last() == Some(&21), "{found:?}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_disk_that_takes_nothing_is_said_and_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Writer::open(dir.path().into(), place(), Bounds::default(), None).unwrap();
        // A file that can't be written, until it can.
        let good = std::mem::replace(
            &mut writer.lines,
            File::open(dir.path().join("current.jsonl")).unwrap(),
        );
        writer.unwritten = b"{\"n\":1}\n".to_vec();
        assert!(writer.write(true).is_err());
        assert_eq!((writer.length, writer.unwritten.len()), (0, 8));
        writer.lines = good;
        writer.write(true).unwrap();
        writer.compress().unwrap();
        assert_eq!(numbers(dir.path()), [1]);
    }
}
