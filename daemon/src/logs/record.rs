//! Events on the disk, and a reader of one stream's files.
//!
//! ```text
//! file    magic 8 │ base 8 │ record …
//! record  length 4 │ check 4 │ timestamp 8 │ ingestion 8 │ message … │ length 4
//! ```
//!
//! All numbers are little-endian. Positions are *logical*: they count the bytes of all records that a
//! stream ever had, and `base` is where a file's first record lies among them, so a position outlives
//! rotation. The length stands on both sides of a message, so that a stream is read from either end.
//! `check` is a hash of all behind it. A file that breaks off, as after a crash, ends at its last whole
//! record; what is read is bounded by [`MAX_MESSAGE`] and a window, never by a file's length.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

/// Most bytes of an event's message.
pub const MAX_MESSAGE: usize = 256 * 1024;

/// First bytes of a file.
const MAGIC: &[u8; 8] = b"firnlog1";

/// Bytes before a file's first record.
pub const FILE_HEAD: u64 = 16;

/// Bytes of a record before its message, and behind it.
const HEAD: usize = 24;
const TAIL: usize = 4;

/// Bytes that are read at once.
const WINDOW: usize = 64 * 1024;

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// When it happened, in milliseconds since the epoch; never less than that of the one before.
    pub timestamp_ms: i64,
    /// When it was given to the writer.
    pub ingestion_ms: i64,
    /// What was said, without a line's end.
    pub message: Vec<u8>,
    /// Its logical position, and that of the next one.
    pub at: u64,
    /// See `at`.
    pub next: u64,
}

/// Begins a file whose first record lies at `base`.
pub fn file_head(base: u64) -> [u8; FILE_HEAD as usize] {
    let mut head = [0; FILE_HEAD as usize];
    head[..8].copy_from_slice(MAGIC);
    head[8..].copy_from_slice(&base.to_le_bytes());
    head
}

/// The `base` of a file, if it is one of these.
pub fn base(file: &File) -> Option<u64> {
    let mut head = [0; FILE_HEAD as usize];
    file.read_exact_at(&mut head, 0).ok()?;
    let base = u64::from_le_bytes(head[8..].try_into().ok()?);
    // A position plus any file's length must stay a number.
    (head[..8] == *MAGIC && base < 1 << 62).then_some(base)
}

/// Appends a record to `buffer`; [`seal`] completes it. `message` has at most [`MAX_MESSAGE`] bytes.
pub fn push(buffer: &mut Vec<u8>, timestamp_ms: i64, message: &[u8]) {
    let length = (message.len() as u32).to_le_bytes();
    buffer.extend_from_slice(&length);
    buffer.extend_from_slice(&[0; 4]);
    buffer.extend_from_slice(&timestamp_ms.to_le_bytes());
    buffer.extend_from_slice(&[0; 8]);
    buffer.extend_from_slice(message);
    buffer.extend_from_slice(&length);
}

/// Gives all records in `buffer` their time of ingestion and their check.
pub fn seal(buffer: &mut [u8], ingestion_ms: i64) {
    let mut rest = buffer;
    while rest.len() >= HEAD + TAIL {
        let length = u32::from_le_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
        let (record, after) = rest.split_at_mut(HEAD + length + TAIL);
        record[16..HEAD].copy_from_slice(&ingestion_ms.to_le_bytes());
        let check = check(&record[8..]);
        record[4..8].copy_from_slice(&check);
        rest = after;
    }
}

fn check(bytes: &[u8]) -> [u8; 4] {
    let hash = blake3::hash(bytes);
    let bytes = hash.as_bytes();
    [bytes[0], bytes[1], bytes[2], bytes[3]]
}

/// One file of a stream.
#[derive(Debug)]
struct Part {
    file: File,
    base: u64,
    end: u64,
}

/// Reads one stream, as it was when it was opened.
#[derive(Debug)]
pub struct Reader {
    /// The rotated file, if there is one, and the current one.
    parts: Vec<Part>,
    window: Window,
}

#[derive(Debug, Default)]
struct Window {
    part: usize,
    start: u64,
    bytes: Vec<u8>,
}

impl Reader {
    /// Opens the stream whose current file is at `path`.
    ///
    /// # Errors
    /// There is no such stream, or it can't be read.
    pub fn open(path: &Path) -> io::Result<Self> {
        // The current one first: if it is rotated meanwhile, the other name leads to it again.
        let current = open_part(path);
        let rotated = open_part(&path.with_extension("log.1"));
        let mut parts = match (rotated, current) {
            (Ok(rotated), Ok(current)) if rotated.base < current.base => vec![rotated, current],
            (_, Ok(current)) => vec![current],
            // Between the two steps of a rotation.
            (Ok(rotated), Err(_)) => vec![rotated],
            (Err(_), Err(error)) => return Err(error),
        };
        // What is written over, by whom ever, is read once.
        if let [first, second] = &mut parts[..] {
            first.end = first.end.min(second.base);
        }
        Ok(Self { parts, window: Window::default() })
    }

    /// Position behind the last event.
    pub fn end(&self) -> u64 {
        self.parts.last().map_or(0, |part| part.end)
    }

    /// The first event at `at` or later; `None`: there is none.
    pub fn next(&mut self, at: u64) -> Option<Event> {
        for index in 0..self.parts.len() {
            let Part { base, end, .. } = self.parts[index];
            // What does not read as a record ends its file.
            if at < end
                && let Some(event) = self.read(index, at.max(base), true)
            {
                return Some(event);
            }
        }
        None
    }

    /// The last event that ends at `end` or before.
    pub fn previous(&mut self, end: u64) -> Option<Event> {
        for index in (0..self.parts.len()).rev() {
            let part = &self.parts[index];
            let end = end.min(part.end);
            if end <= part.base {
                continue;
            }
            if let Some(event) = self.ending(index, end) {
                return Some(event);
            }
            // It broke off: its last whole record is found from its beginning.
            let (mut at, mut last) = (self.parts[index].base, None);
            while let Some(event) = self.read(index, at, true).filter(|event| event.next <= end) {
                at = event.next;
                last = Some(event);
            }
            if last.is_some() {
                return last;
            }
        }
        None
    }

    /// Position of the first event of that time or later: from the end, for who asks for what is new.
    pub fn seek(&mut self, timestamp_ms: i64) -> u64 {
        let mut at = self.end();
        while let Some(event) = self.previous(at) {
            if event.timestamp_ms < timestamp_ms {
                return event.next;
            }
            at = event.at;
        }
        at
    }

    fn ending(&mut self, index: usize, end: u64) -> Option<Event> {
        let trailer = end.checked_sub(TAIL as u64)?;
        let length = u32::from_le_bytes(self.bytes(index, trailer, TAIL, false)?.try_into().ok()?);
        let at = end.checked_sub((HEAD + TAIL) as u64 + u64::from(length))?;
        self.read(index, at, false).filter(|event| event.next == end)
    }

    fn read(&mut self, index: usize, at: u64, forward: bool) -> Option<Event> {
        let head = self.bytes(index, at, HEAD, forward)?;
        let number = |range: std::ops::Range<usize>| -> Option<i64> {
            Some(i64::from_le_bytes(head[range].try_into().ok()?))
        };
        let (timestamp_ms, ingestion_ms) = (number(8..16)?, number(16..24)?);
        let length = u32::from_le_bytes(head[..4].try_into().ok()?);
        let found: [u8; 4] = head[4..8].try_into().ok()?;
        if length as usize > MAX_MESSAGE {
            return None;
        }
        let size = HEAD + length as usize + TAIL;
        let record = self.bytes(index, at, size, forward)?;
        if check(&record[8..]) != found || record[size - TAIL..] != length.to_le_bytes() {
            return None;
        }
        let message = record[HEAD..size - TAIL].to_vec();
        Some(Event { timestamp_ms, ingestion_ms, message, at, next: at + size as u64 })
    }

    /// Bytes of a file, through the window: forward, it begins with them, otherwise it ends with them.
    fn bytes(&mut self, index: usize, at: u64, length: usize, forward: bool) -> Option<&[u8]> {
        let Part { file, base, end } = &self.parts[index];
        let stop = at.checked_add(length as u64)?;
        if at < *base || stop > *end {
            return None;
        }
        let window = &mut self.window;
        let has = window.part == index
            && at >= window.start
            && stop <= window.start + window.bytes.len() as u64;
        if !has {
            let size = (length.max(WINDOW)) as u64;
            let start = if forward { at } else { stop.saturating_sub(size).max(*base) };
            let stop = if forward { (at + size).min(*end) } else { stop };
            window.bytes.resize((stop - start) as usize, 0);
            if file.read_exact_at(&mut window.bytes, FILE_HEAD + start - base).is_err() {
                window.bytes.clear();
                return None;
            }
            (window.part, window.start) = (index, start);
        }
        let from = (at - window.start) as usize;
        window.bytes.get(from..from + length)
    }
}

fn open_part(path: &Path) -> io::Result<Part> {
    let file = File::open(path)?;
    let base = base(&file).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
    let length = file.metadata()?.len().saturating_sub(FILE_HEAD);
    Ok(Part { file, base, end: base + length })
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf};

    use proptest::prelude::*;

    use super::*;

    fn written(dir: &Path, base: u64, messages: &[Vec<u8>]) -> (PathBuf, Vec<u8>) {
        let mut bytes = file_head(base).to_vec();
        let mut records = Vec::new();
        for (i, message) in messages.iter().enumerate() {
            push(&mut records, 1000 + i as i64, message);
        }
        seal(&mut records, 5000);
        bytes.extend_from_slice(&records);
        let path = dir.join("s.log");
        fs::write(&path, &bytes).unwrap();
        (path, bytes)
    }

    fn forward(reader: &mut Reader) -> Vec<Event> {
        let mut at = 0;
        std::iter::from_fn(|| {
            let event = reader.next(at)?;
            at = event.next;
            Some(event)
        })
        .collect()
    }

    fn backward(reader: &mut Reader) -> Vec<Event> {
        let mut at = u64::MAX;
        let mut events: Vec<_> = std::iter::from_fn(|| {
            let event = reader.previous(at)?;
            at = event.at;
            Some(event)
        })
        .collect();
        events.reverse();
        events
    }

    #[test]
    fn both_ends_read_the_same_across_rotation() {
        let dir = tempfile::tempdir().unwrap();
        let messages: Vec<Vec<u8>> = (0..5000).map(|i| vec![b'x'; i % 200]).collect();
        let (path, bytes) = written(dir.path(), 0, &messages[..4000]);
        fs::rename(&path, path.with_extension("log.1")).unwrap();
        let base = bytes.len() as u64 - FILE_HEAD;
        written(dir.path(), base, &messages[4000..]);
        let mut reader = Reader::open(&path).unwrap();
        let events = forward(&mut reader);
        let read: Vec<&[u8]> = events.iter().map(|e| &e.message[..]).collect();
        assert!(read.iter().eq(messages.iter()), "{}", read.len());
        assert_eq!(events[4000].at, base);
        assert!(events.iter().all(|e| e.ingestion_ms == 5000));
        assert_eq!(backward(&mut reader), events);
    }

    #[test]
    fn a_seek_finds_the_first_event_of_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let messages = vec![vec![b'x'; 100]; 2000];
        let (path, _) = written(dir.path(), 77, &messages);
        let mut reader = Reader::open(&path).unwrap();
        for time in [0, 1000, 1001, 2500, 2999] {
            let at = reader.seek(time);
            assert_eq!(reader.next(at).unwrap().timestamp_ms, time.max(1000));
        }
        let at = reader.seek(3000);
        assert_eq!((at, reader.next(at)), (reader.end(), None));
    }

    proptest! {
        #[test]
        fn what_breaks_off_ends_at_its_last_whole_record(
            lengths in prop::collection::vec(0usize..300, 1..40),
            cut in 0usize..20_000,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let messages: Vec<Vec<u8>> = lengths.iter().map(|n| vec![b'y'; *n]).collect();
            let (path, bytes) = written(dir.path(), 0, &messages);
            let cut = FILE_HEAD as usize + cut % (bytes.len() - FILE_HEAD as usize);
            fs::write(&path, &bytes[..cut]).unwrap();
            let mut reader = Reader::open(&path).unwrap();
            let events = forward(&mut reader);
            let whole = lengths.iter().scan(FILE_HEAD as usize, |end, n| {
                *end += HEAD + n + TAIL;
                Some(*end)
            });
            prop_assert_eq!(events.len(), whole.filter(|end| *end <= cut).count());
            prop_assert_eq!(backward(&mut reader), events);
        }

        #[test]
        fn hostile_bytes_are_never_believed(
            noise in prop::collection::vec(any::<u8>(), 0..2000),
            flips in prop::collection::vec((0usize..3000, any::<u8>()), 0..4),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let (path, mut bytes) = written(dir.path(), 0, &vec![vec![b'z'; 50]; 10]);
            for (at, byte) in flips {
                let at = at % bytes.len();
                bytes[at] = byte;
            }
            bytes.extend_from_slice(&noise);
            fs::write(&path, &bytes).unwrap();
            if let Ok(mut reader) = Reader::open(&path) {
                for event in forward(&mut reader).into_iter().chain(backward(&mut reader)) {
                    prop_assert_eq!(&event.message, &vec![b'z'; 50]);
                }
                reader.seek(i64::MIN);
            }
        }
    }

    #[test]
    fn what_is_no_log_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.log");
        fs::write(&path, b"START RequestId: of an older Firn\n").unwrap();
        assert!(Reader::open(&path).is_err());
        fs::write(&path, b"short").unwrap();
        assert!(Reader::open(&path).is_err());
        assert!(Reader::open(&dir.path().join("none.log")).is_err());
    }
}
