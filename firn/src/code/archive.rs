//! Checks and extracts a zip archive.

use std::{
    collections::HashSet,
    fs::{self, File, Permissions},
    io::{self, Cursor, Read, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use zip::{ZipArchive, result::ZipError};

use super::{CodeError, MAX_ENTRIES, MAX_UNZIPPED, io_at};

/// Longest name of an entry in bytes.
const MAX_NAME: usize = 1024;

/// Longest part of a name in bytes, as file systems have it.
const MAX_PART: usize = 255;

/// Signature of a record of the central directory.
const CENTRAL_RECORD: [u8; 4] = *b"PK\x01\x02";

/// Length of such a record before its name.
const CENTRAL_HEAD: usize = 46;

/// What came out.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Extracted {
    pub(super) entries: usize,
    pub(super) unzipped_bytes: u64,
}

/// An archive in memory.
type Archive<'a> = ZipArchive<Cursor<&'a [u8]>>;

/// What an archive says that it holds.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Summary {
    pub(super) entries: usize,
    pub(super) bytes: u64,
}

/// Checks all of `zip` that can be checked without inflating. Its files may have `limit` bytes.
pub(super) fn check(zip: &[u8], limit: u64) -> Result<Summary, CodeError> {
    open(zip, limit).map(|(_, summary)| summary)
}

/// Checks `zip` as [`check`] does, then extracts it into the empty directory `tree`.
pub(super) fn extract(zip: &[u8], tree: &Path, limit: u64) -> Result<Extracted, CodeError> {
    let (mut archive, Summary { entries, .. }) = open(zip, limit)?;
    let mut unzipped_bytes = 0;
    for index in 0..entries {
        let room = limit - unzipped_bytes;
        unzipped_bytes += extract_entry(&mut archive, index, tree, room)?
            .ok_or(CodeError::UnzippedTooLarge { limit })?;
    }
    Ok(Extracted { entries, unzipped_bytes })
}

fn open(zip: &[u8], limit: u64) -> Result<(Archive<'_>, Summary), CodeError> {
    // Packing makes nothing larger.
    if zip.len() as u64 > MAX_UNZIPPED {
        return Err(CodeError::UnzippedTooLarge { limit: MAX_UNZIPPED });
    }
    let mut archive = ZipArchive::new(Cursor::new(zip))
        .map_err(|e| CodeError::NotAZip { reason: e.to_string() })?;
    check_names(zip, archive.central_directory_start())?;
    if archive.is_empty() {
        return Err(CodeError::Empty);
    }
    let entries = archive.len();
    let mut bytes = 0u64;
    for index in 0..entries {
        bytes = bytes.saturating_add(check_entry(&mut archive, index)?);
    }
    if bytes > limit {
        return Err(CodeError::UnzippedTooLarge { limit });
    }
    Ok((archive, Summary { entries, bytes }))
}

/// Walks the central directory itself: the archive reader keeps one entry a name, so that it can't
/// tell that there were two.
fn check_names(zip: &[u8], start: u64) -> Result<(), CodeError> {
    let mut rest = usize::try_from(start).ok().and_then(|start| zip.get(start..)).unwrap_or(&[]);
    let mut names = HashSet::new();
    while rest.starts_with(&CENTRAL_RECORD) && rest.len() >= CENTRAL_HEAD {
        let length = |at: usize| usize::from(u16::from_le_bytes([rest[at], rest[at + 1]]));
        let name_end = CENTRAL_HEAD + length(28);
        let end = name_end + length(30) + length(32);
        let (Some(raw), Some(after)) = (rest.get(CENTRAL_HEAD..name_end), rest.get(end..)) else {
            return Err(CodeError::NotAZip { reason: "its directory is cut off".into() });
        };
        let path = plain_path(raw)?;
        if !names.insert(path) {
            return Err(refuse(raw, "appears twice"));
        }
        if names.len() > MAX_ENTRIES {
            return Err(CodeError::TooManyEntries { entries: names.len(), limit: MAX_ENTRIES });
        }
        rest = after;
    }
    Ok(())
}

fn refuse(raw_name: &[u8], reason: &'static str) -> CodeError {
    let mut name = String::from_utf8_lossy(raw_name).into_owned();
    if name.len() > 200 {
        name = name.chars().take(200).chain(['…']).collect();
    }
    CodeError::Entry { name, reason }
}

/// The path within the tree that a name means, if it is one that stays in it.
fn plain_path(raw: &[u8]) -> Result<PathBuf, CodeError> {
    let refuse = |reason| Err(refuse(raw, reason));
    let Ok(name) = std::str::from_utf8(raw) else { return refuse("its name is not UTF-8") };
    if name.is_empty() {
        return refuse("it has no name");
    }
    if name.starts_with('/') {
        return refuse("its path is absolute");
    }
    if name.len() > MAX_NAME {
        return refuse("its name is longer than 1024 bytes");
    }
    if name.contains('\0') {
        return refuse("its name holds a null byte");
    }
    let mut path = PathBuf::new();
    for part in name.strip_suffix('/').unwrap_or(name).split('/') {
        match part {
            ".." => return refuse("its path holds \"..\""),
            "" | "." => return refuse("its path holds an empty part or \".\""),
            _ if part.len() > MAX_PART => return refuse("a part of its path is over 255 bytes"),
            _ => path.push(part),
        }
    }
    Ok(path)
}

/// Checks what can be known before inflating; returns the size that the entry claims.
fn check_entry(archive: &mut Archive<'_>, index: usize) -> Result<u64, CodeError> {
    let entry =
        archive.by_index_raw(index).map_err(|e| CodeError::NotAZip { reason: e.to_string() })?;
    let raw = entry.name_raw();
    if entry.encrypted() {
        return Err(refuse(raw, "is encrypted"));
    }
    match entry.unix_mode().map(|mode| mode & libc::S_IFMT) {
        // Many writers leave the type out.
        None | Some(0 | libc::S_IFREG | libc::S_IFDIR) => {}
        Some(libc::S_IFLNK) => return Err(refuse(raw, "is a link")),
        Some(_) => return Err(refuse(raw, "is neither a file nor a directory")),
    }
    Ok(entry.size())
}

/// Writes one entry; returns its size, or `None` where it is over `room`.
fn extract_entry(
    archive: &mut Archive<'_>,
    index: usize,
    tree: &Path,
    room: u64,
) -> Result<Option<u64>, CodeError> {
    let name = archive.name_for_index(index).unwrap_or_default().to_owned();
    let damaged = |reason: String| CodeError::Damaged { name: name.clone(), reason };
    let entry = archive.by_index(index).map_err(|e| match e {
        ZipError::UnsupportedArchive(what) => damaged(format!("can't be read: {what}")),
        other => damaged(other.to_string()),
    })?;
    let raw = entry.name_raw().to_vec();
    let path = tree.join(plain_path(&raw)?);
    let in_the_way = |e: io::Error| match e.kind() {
        io::ErrorKind::NotADirectory
        | io::ErrorKind::AlreadyExists
        | io::ErrorKind::IsADirectory => refuse(&raw, "is both a file and a directory"),
        _ => io_at("extract the archive")(e),
    };
    if raw.ends_with(b"/") {
        make_dirs(tree, &path).map_err(in_the_way)?;
        return Ok(Some(0));
    }
    make_dirs(tree, path.parent().unwrap_or(tree)).map_err(in_the_way)?;
    // One bit of the mode is taken over; everything must be readable by the function's user, and
    // nothing may be set-user-id.
    let executable = entry.unix_mode().is_some_and(|mode| mode & 0o111 != 0);
    let mode = if executable { 0o755 } else { 0o644 };
    let mut file = File::options().write(true).create_new(true).open(&path).map_err(in_the_way)?;
    let writing = io_at("extract the archive");
    file.set_permissions(Permissions::from_mode(mode)).map_err(&writing)?;

    let mut source = entry.take(room + 1);
    let mut buffer = vec![0; 64 << 10];
    let mut size = 0;
    loop {
        let count = source.read(&mut buffer).map_err(|e| damaged(e.to_string()))?;
        if count == 0 {
            return Ok(Some(size));
        }
        size += count as u64;
        if size > room {
            return Ok(None);
        }
        file.write_all(&buffer[..count]).map_err(&writing)?;
    }
}

/// Makes the directories from `tree` to `dir`, all readable.
fn make_dirs(tree: &Path, dir: &Path) -> io::Result<()> {
    let mut path = tree.to_owned();
    for part in dir.strip_prefix(tree).unwrap_or(Path::new("")) {
        path.push(part);
        match fs::create_dir(&path) {
            Ok(()) => fs::set_permissions(&path, Permissions::from_mode(0o755))?,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;
    use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

    use super::{super::build_disk, *};

    pub(crate) fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
        let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
        for (name, content) in entries {
            let options = SimpleFileOptions::default().unix_permissions(0o600);
            match name.strip_suffix('/') {
                Some(dir) => writer.add_directory(dir, options).unwrap(),
                None => {
                    writer.start_file(*name, options).unwrap();
                    writer.write_all(content).unwrap();
                }
            }
        }
        writer.finish().unwrap().into_inner()
    }

    /// An archive with the name of its entries changed to another one of the same length.
    fn renamed(from: &str, to: &[u8], rest: &[(&str, &[u8])]) -> Vec<u8> {
        assert_eq!(from.len(), to.len());
        let mut entries = vec![(from, &b"x"[..])];
        entries.extend(rest);
        let mut bytes = archive(&entries);
        for at in 0..bytes.len() - from.len() {
            if bytes[at..].starts_with(from.as_bytes()) {
                bytes[at..at + to.len()].copy_from_slice(to);
            }
        }
        bytes
    }

    fn error(zip: &[u8]) -> CodeError {
        build_disk(zip, &[]).unwrap_err()
    }

    fn reason(zip: &[u8]) -> String {
        match error(zip) {
            CodeError::Entry { name, reason } => format!("{name}: {reason}"),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn bad_names_are_refused_by_name() {
        assert_eq!(reason(&renamed("aa/b.py", b"../b.py", &[])), "../b.py: its path holds \"..\"");
        assert_eq!(reason(&renamed("a/bb/c", b"a/../c", &[])), "a/../c: its path holds \"..\"");
        assert_eq!(reason(&renamed("abs", b"/bs", &[])), "/bs: its path is absolute");
        assert!(reason(&renamed("bytes", b"b\xfftes", &[])).ends_with("not UTF-8"));
        assert!(reason(&renamed("nul", b"n\0l", &[])).ends_with("null byte"));
        assert!(reason(&renamed("a.b.c", b"a/./c", &[])).contains("empty part"));
        let twice = renamed("one.py", b"two.py", &[("two.py", b"y")]);
        assert_eq!(reason(&twice), "two.py: appears twice");
        let both = archive(&[("a", b"x"), ("a/b", b"y")]);
        assert!(reason(&both).ends_with("both a file and a directory"));
    }

    #[test]
    fn links_are_refused() {
        let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
        writer.add_symlink("link", "/etc/passwd", SimpleFileOptions::default()).unwrap();
        let zip = writer.finish().unwrap().into_inner();
        assert_eq!(reason(&zip), "link: is a link");
    }

    #[test]
    fn what_is_no_archive_is_refused() {
        assert!(matches!(error(b""), CodeError::NotAZip { .. }));
        assert!(matches!(error(b"def handler(): pass"), CodeError::NotAZip { .. }));
        assert!(matches!(error(&archive(&[])), CodeError::Empty));
        let mut cut = archive(&[("a", b"content")]);
        cut.truncate(cut.len() - 10);
        assert!(matches!(error(&cut), CodeError::NotAZip { .. }));
        let mut damaged = Vec::new();
        {
            let mut writer = ZipWriter::new(Cursor::new(&mut damaged));
            let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
            writer.start_file("a", stored).unwrap();
            writer.write_all(b"content").unwrap();
            writer.finish().unwrap();
        }
        let at = damaged.windows(7).position(|w| w == b"content").unwrap();
        damaged[at] ^= 1;
        assert!(matches!(error(&damaged), CodeError::Damaged { .. }));
    }

    #[test]
    fn sizes_are_limited_whatever_the_headers_say() {
        let large = vec![0; MAX_UNZIPPED as usize + 1];
        assert!(matches!(error(&large), CodeError::UnzippedTooLarge { limit: 262_144_000 }));
        // A claim is enough to be refused.
        let mut claims = archive(&[("bomb", &[0; 1000])]);
        assert_eq!(replace(&mut claims, 1000, MAX_UNZIPPED as u32 + 1), 2);
        assert!(matches!(error(&claims), CodeError::UnzippedTooLarge { limit: 262_144_000 }));

        // And an understatement does not help: what comes out counts.
        let mut bomb = archive(&[("bomb", &[0; 100_000])]);
        let refused = |zip: &[u8]| {
            let tree = tempfile::tempdir().unwrap();
            let error = extract(zip, tree.path(), 99_999).unwrap_err();
            assert!(fs::metadata(tree.path().join("bomb")).map_or(0, |m| m.len()) <= 99_999);
            error
        };
        assert!(matches!(refused(&bomb), CodeError::UnzippedTooLarge { limit: 99_999 }));
        assert_eq!(replace(&mut bomb, 100_000, 1), 2);
        assert!(matches!(
            refused(&bomb),
            CodeError::UnzippedTooLarge { .. } | CodeError::Damaged { .. }
        ));
        let tree = tempfile::tempdir().unwrap();
        let exact = archive(&[("a", &[0; 60_000]), ("b", &[0; 40_000])]);
        assert_eq!(extract(&exact, tree.path(), 100_000).unwrap().unzipped_bytes, 100_000);
    }

    /// Replaces a number wherever an archive has it, and says how often.
    pub(crate) fn replace(zip: &mut [u8], from: u32, to: u32) -> usize {
        let places: Vec<_> =
            (0..zip.len() - 3).filter(|at| zip[*at..at + 4] == from.to_le_bytes()).collect();
        for at in &places {
            zip[*at..at + 4].copy_from_slice(&to.to_le_bytes());
        }
        places.len()
    }

    #[test]
    fn extraction_gives_safe_modes() {
        let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
        for (name, mode) in [("plain", 0o600), ("bootstrap", 0o4700), ("d/deep/x", 0o644)] {
            let options = SimpleFileOptions::default().unix_permissions(mode);
            writer.start_file(name, options).unwrap();
            writer.write_all(name.as_bytes()).unwrap();
        }
        let zip = writer.finish().unwrap().into_inner();
        let tree = tempfile::tempdir().unwrap();
        let extracted = extract(&zip, tree.path(), MAX_UNZIPPED).unwrap();
        assert_eq!(extracted, Extracted { entries: 3, unzipped_bytes: 22 });
        let mode = |name: &str| {
            fs::metadata(tree.path().join(name)).unwrap().permissions().mode() & 0o7777
        };
        assert_eq!(mode("plain"), 0o644);
        assert_eq!(mode("bootstrap"), 0o755);
        assert_eq!(mode("d/deep"), 0o755);
        assert_eq!(fs::read(tree.path().join("d/deep/x")).unwrap(), b"d/deep/x");
    }

    #[test]
    fn the_same_archive_gives_the_same_disk() {
        let zip = archive(&[
            ("lambda_function.py", b"def lambda_handler(event, context): return event\n"),
            ("empty/", b""),
            ("pkg/data.bin", &[7; 10_000]),
        ]);
        let report = match build_disk(&zip, &[]) {
            Err(CodeError::Mkfs { reason }) if reason.contains("not found") => {
                eprintln!("skipped: {reason}");
                return;
            }
            other => other.unwrap(),
        };
        assert_eq!((report.entries, report.unzipped_bytes), (3, 10_049));
        let read = |disk: crate::Disk| {
            let mut bytes = Vec::new();
            disk.reader().unwrap().read_to_end(&mut bytes).unwrap();
            bytes
        };
        let (one, two) = (read(report.disk), read(build_disk(&zip, &[]).unwrap().disk));
        assert!(one == two, "disks differ");
        assert_eq!(one[1024..1028], 0xe0f5_e1e2_u32.to_le_bytes(), "EROFS magic");
        assert_eq!(one.len() % 512, 0);
    }

    proptest! {
        #[test]
        fn no_archive_escapes_or_panics(
            name in "(\\.\\.|a|b|/|\\.|\\\\){1,6}",
            flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        ) {
            let mut zip = archive(&[("placeholder", b"content"), (&name, b"x")]);
            for (at, byte) in flips {
                let at = at.index(zip.len());
                zip[at] = byte;
            }
            let outer = tempfile::tempdir().unwrap();
            let tree = outer.path().join("tree");
            fs::create_dir(&tree).unwrap();
            let _ = extract(&zip, &tree, MAX_UNZIPPED);
            prop_assert_eq!(fs::read_dir(outer.path()).unwrap().count(), 1);
        }
    }
}
