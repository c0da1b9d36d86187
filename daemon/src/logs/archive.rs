//! What has been written, for who reads it: groups, streams, and events of several streams in the order
//! of their times.
//!
//! Reading takes no lock and holds no file in memory: of each stream one window and one event.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
    fs, io,
    path::Path,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

pub use super::record::Event;
use super::record::Reader;

/// The directory of all logs.
#[derive(Debug, Clone)]
pub struct Archive {
    dir: Arc<Path>,
}

/// One group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// The function.
    pub function: String,
    /// When it was made, in milliseconds since the epoch.
    pub created_ms: i64,
    /// Days that events are kept; `None`: as long as there is room.
    pub retention: Option<u32>,
    /// Bytes of its files.
    pub bytes: u64,
}

/// One stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamFacts {
    /// Its name.
    pub name: String,
    /// Times of its first and its last event, and when the last was written; `None`: it has no events.
    pub times: Option<(i64, i64, i64)>,
    /// Bytes of its files.
    pub bytes: u64,
}

/// The name of a stream's file.
pub fn file_of(stream: &str) -> String {
    format!("{}.log", stream.replace('/', "-"))
}

/// The stream of a file. Its date is the only part with slashes.
fn stream_of(file: &str) -> Option<String> {
    let name = file.strip_suffix(".log")?;
    let (date, rest) = (name.get(..10)?, name.get(10..)?.strip_prefix('-')?);
    Some(format!("{}/{rest}", date.replace('-', "/")))
}

impl Archive {
    /// Reads in `dir`.
    pub fn new(dir: Arc<Path>) -> Self {
        Self { dir }
    }

    /// Functions that have a group, sorted.
    ///
    /// # Errors
    /// The directory can't be read.
    pub fn groups(&self) -> io::Result<Vec<String>> {
        let mut groups = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                groups.extend(entry.file_name().into_string().ok());
            }
        }
        groups.sort_unstable();
        Ok(groups)
    }

    /// The group of a function, if there is one.
    pub fn group(&self, function: &str) -> Option<Group> {
        let dir = self.dir.join(function);
        let made = fs::metadata(&dir).ok().filter(fs::Metadata::is_dir)?;
        let mut group = Group {
            function: function.to_owned(),
            // Where the file system does not tell, the oldest file does.
            created_ms: made.created().map_or(i64::MAX, millis),
            retention: self.retention(function),
            bytes: 0,
        };
        for entry in fs::read_dir(&dir).ok()?.flatten() {
            let Ok(facts) = entry.metadata() else { continue };
            group.bytes += facts.len();
            group.created_ms = group.created_ms.min(facts.modified().map_or(i64::MAX, millis));
        }
        let made = made.modified().map_or(0, millis);
        group.created_ms = group.created_ms.min(made);
        Some(group)
    }

    /// Days that events of a function are kept, if that is set.
    pub fn retention(&self, function: &str) -> Option<u32> {
        let path = self.dir.join(function).join("retention");
        let small = fs::metadata(&path).ok()?.len() < 16;
        small.then(|| fs::read_to_string(path).ok())??.parse().ok()
    }

    /// Names of a function's streams, sorted, and when each was last written, in milliseconds since the
    /// epoch; `None`: there is no such group.
    pub fn streams(&self, function: &str) -> Option<Vec<(String, i64)>> {
        let mut streams = Vec::new();
        for entry in fs::read_dir(self.dir.join(function)).ok()?.flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str().and_then(stream_of) else { continue };
            let Ok(modified) = entry.metadata().and_then(|facts| facts.modified()) else {
                continue;
            };
            streams.push((name, millis(modified)));
        }
        streams.sort_unstable();
        Some(streams)
    }

    /// What there is to know of a stream; `None`: there is no such stream.
    pub fn facts(&self, function: &str, stream: &str) -> Option<StreamFacts> {
        let path = self.dir.join(function).join(file_of(stream));
        let mut reader = self.open(function, stream)?;
        let first = reader.next(0).map(|event| event.timestamp_ms);
        let last = reader.previous(u64::MAX).map(|event| (event.timestamp_ms, event.ingestion_ms));
        let size = |path: &Path| fs::metadata(path).map_or(0, |facts| facts.len());
        Some(StreamFacts {
            name: stream.to_owned(),
            times: first.zip(last).map(|(first, (last, ingested))| (first, last, ingested)),
            bytes: size(&path) + size(&path.with_extension("log.1")),
        })
    }

    /// Opens a stream; `None`: there is no such stream, or nothing of it can be read.
    pub fn open(&self, function: &str, stream: &str) -> Option<Reader> {
        // A name with dots or slashes elsewhere than a stream's has them leads out of the group.
        let file = file_of(stream);
        (stream_of(&file)? == stream).then_some(())?;
        Reader::open(&self.dir.join(function).join(file)).ok()
    }
}

fn millis(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// Where a merge stands in each stream, by name: events before it have been given.
pub type Positions = HashMap<String, u64>;

/// Events of several streams in the order of their times.
#[derive(Debug)]
pub struct Merge {
    streams: Vec<(String, Reader)>,
    /// The next event of each stream, the earliest on top; ties go by the stream's name.
    heads: BinaryHeap<Reverse<Head>>,
    positions: Positions,
}

#[derive(Debug, PartialEq, Eq)]
struct Head {
    index: usize,
    event: Event,
}

impl Ord for Head {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        let key = |head: &Self| (head.event.timestamp_ms, head.index, head.event.at);
        key(self).cmp(&key(other))
    }
}

impl PartialOrd for Head {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Merge {
    /// Events of `streams`, which are sorted, from `start_ms` on, or where `positions` says.
    pub fn new(
        archive: &Archive,
        function: &str,
        streams: &[String],
        start_ms: i64,
        positions: Positions,
    ) -> Self {
        let mut merge = Self { streams: Vec::new(), heads: BinaryHeap::new(), positions };
        for name in streams {
            let Some(mut reader) = archive.open(function, name) else { continue };
            let at = match merge.positions.get(name) {
                Some(at) => *at,
                None => reader.seek(start_ms),
            };
            merge.positions.insert(name.clone(), at);
            merge.streams.push((name.clone(), reader));
            merge.advance(merge.streams.len() - 1, at);
        }
        merge
    }

    /// Where it stands.
    pub fn positions(&self) -> &Positions {
        &self.positions
    }

    /// The next event and the name of its stream, without taking it.
    pub fn peek(&self) -> Option<(&str, &Event)> {
        let Reverse(head) = self.heads.peek()?;
        Some((self.streams[head.index].0.as_str(), &head.event))
    }

    /// Takes the next event.
    pub fn take(&mut self) -> Option<(String, Event)> {
        let Reverse(Head { index, event }) = self.heads.pop()?;
        let name = self.streams[index].0.clone();
        self.positions.insert(name.clone(), event.next);
        self.advance(index, event.next);
        Some((name, event))
    }

    fn advance(&mut self, index: usize, at: u64) {
        if let Some(event) = self.streams[index].1.next(at) {
            self.heads.push(Reverse(Head { index, event }));
        }
    }
}
