//! The one thread that writes, rotates and removes the files of all logs.

use std::{
    fs::{self, File},
    io::{self, ErrorKind, Write},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use tokio::sync::{mpsc, oneshot};

use super::{Bounds, archive::Archive, record};
use crate::function::now_ms;

/// Most groups; the next CreateLogGroup is refused. Functions have theirs in any case.
const GROUPS: usize = 10_000;

/// What the writer is told to do.
pub enum Order {
    /// Records as [`record::push`] leaves them, for the end of a stream.
    Append {
        function: String,
        file: String,
        records: Vec<u8>,
    },
    Change {
        function: String,
        change: Change,
        done: oneshot::Sender<io::Result<()>>,
    },
    /// Removes what is too old.
    Sweep,
    Flush(oneshot::Sender<()>),
}

/// A change to the group of a function.
#[derive(Debug)]
pub enum Change {
    /// Makes it. `AlreadyExists`: there is one; `QuotaExceeded`: there are too many.
    CreateGroup,
    /// Removes it. `NotFound`: there is none.
    RemoveGroup,
    /// Removes one stream, by name. `NotFound`: there is none.
    RemoveStream(String),
    /// Days after which events go; `None`: never. `NotFound`: there is no group.
    Retention(Option<u32>),
}

pub struct Writer {
    pub dir: PathBuf,
    pub bounds: Bounds,
}

impl Writer {
    pub fn run(self, mut orders: mpsc::Receiver<Order>) {
        while let Some(order) = orders.blocking_recv() {
            let result = match order {
                Order::Append { function, file, records } => self.append(&function, &file, records),
                Order::Change { function, change, done } => {
                    let _ = done.send(self.change(&function, change));
                    Ok(())
                }
                Order::Sweep => self.sweep(),
                Order::Flush(done) => {
                    let _ = done.send(());
                    Ok(())
                }
            };
            if let Err(error) = result {
                tracing::warn!(%error, dir = %self.dir.display(), "can't keep a function's log");
            }
        }
    }

    fn append(&self, function: &str, file: &str, mut records: Vec<u8>) -> io::Result<()> {
        record::seal(&mut records, now_ms());
        let dir = self.dir.join(function);
        let path = dir.join(file);
        let mut open = match File::options().read(true).append(true).open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                fs::create_dir_all(&dir)?;
                self.drop_oldest(&dir)?;
                begin(&path, 0)?
            }
            other => other?,
        };
        let mut length = open.metadata()?.len();
        if length + records.len() as u64 > self.bounds.stream_bytes {
            let base = record::base(&open).ok_or(ErrorKind::InvalidData)?;
            fs::rename(&path, path.with_extension("log.1"))?;
            open = begin(&path, base + length.saturating_sub(record::FILE_HEAD))?;
            length = record::FILE_HEAD;
        }
        open.write_all(&records).inspect_err(|_| {
            // What comes later must not follow half a record.
            let _ = open.set_len(length);
        })
    }

    fn change(&self, function: &str, change: Change) -> io::Result<()> {
        let dir = self.dir.join(function);
        match change {
            Change::CreateGroup => {
                if fs::read_dir(&self.dir)?.count() >= GROUPS {
                    return Err(ErrorKind::QuotaExceeded.into());
                }
                fs::create_dir(&dir)
            }
            Change::RemoveGroup => fs::remove_dir_all(&dir),
            Change::RemoveStream(stream) => {
                let path = dir.join(super::archive::file_of(&stream));
                fs::remove_file(&path)?;
                remove_if_there(&path.with_extension("log.1"))
            }
            Change::Retention(days) => {
                let path = dir.join("retention");
                match days {
                    Some(days) => {
                        // Renamed, so that who reads finds the old or the new.
                        let new = dir.join("retention.new");
                        fs::write(&new, days.to_string())?;
                        fs::rename(new, path)?;
                        self.expire(function)
                    }
                    None if dir.is_dir() => remove_if_there(&path),
                    None => Err(ErrorKind::NotFound.into()),
                }
            }
        }
    }

    fn sweep(&self) -> io::Result<()> {
        for group in Archive::new(self.dir.as_path().into()).groups()? {
            self.expire(&group)?;
        }
        Ok(())
    }

    /// Removes the streams that have nothing new enough.
    fn expire(&self, function: &str) -> io::Result<()> {
        let archive = Archive::new(self.dir.as_path().into());
        let Some(days) = archive.retention(function) else { return Ok(()) };
        let age = Duration::from_secs(u64::from(days) * 86_400);
        let Some(limit) = SystemTime::now().checked_sub(age) else { return Ok(()) };
        for (modified, path) in streams(&self.dir.join(function))? {
            if modified < limit {
                remove_if_there(&path.with_extension("log.1"))?;
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }

    /// Makes room for one more stream.
    fn drop_oldest(&self, dir: &Path) -> io::Result<()> {
        let mut streams = streams(dir)?;
        streams.sort();
        let excess = (streams.len() + 1).saturating_sub(self.bounds.streams);
        for (_, path) in streams.into_iter().take(excess) {
            remove_if_there(&path.with_extension("log.1"))?;
            fs::remove_file(path)?;
        }
        Ok(())
    }
}

/// A new file whose first record will lie at `base`.
fn begin(path: &Path, base: u64) -> io::Result<File> {
    let mut file = File::options().read(true).append(true).create_new(true).open(path)?;
    file.write_all(&record::file_head(base))?;
    Ok(file)
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The current files of the streams in `dir`, and when they were last written.
fn streams(dir: &Path) -> io::Result<Vec<(SystemTime, PathBuf)>> {
    let mut streams = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.path().extension().is_some_and(|e| e == "log") {
            streams.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    Ok(streams)
}
