//! Hashes and copies of sparse files.

use std::{
    fs::File,
    io::{self, Read, Write},
    ops::Range,
    os::{fd::AsFd, unix::fs::FileExt},
};

use firn_pages::{PAGE, bitmap::Bitmap};
use rustix::{fs::SeekFrom, io::Errno};

/// Hash of all of `file`, without moving its offset.
pub(crate) fn hash_file(file: &File) -> io::Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    let mut offset = 0;
    loop {
        match file.read_at(&mut buffer, offset) {
            Ok(0) => return Ok(hasher.finalize()),
            Ok(n) => {
                hasher.update(&buffer[..n]);
                offset += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Hash of the pages of `set` in `file`, one after the other.
pub(crate) fn hash_pages(file: &File, set: &Bitmap) -> io::Result<blake3::Hash> {
    write_pages(file, set, &mut io::sink())
}

/// Writes the pages of `set` in `file`, one after the other, and hashes them.
pub(crate) fn write_pages(
    file: &File,
    set: &Bitmap,
    target: &mut impl Write,
) -> io::Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    for run in set.runs() {
        let (mut offset, end) = (run.start * PAGE, run.end * PAGE);
        while offset < end {
            let want = buffer.len().min((end - offset) as usize);
            file.read_exact_at(&mut buffer[..want], offset)?;
            hasher.update(&buffer[..want]);
            target.write_all(&buffer[..want])?;
            offset += want as u64;
        }
    }
    Ok(hasher.finalize())
}

/// Hash of a sparse file of `length` bytes: of its length, and of each page that is not all zeros
/// with its position. Holes and written zeros are the same, so copying can't change it.
pub(crate) fn hash_sparse(file: &File, length: u64) -> io::Result<blake3::Hash> {
    walk_sparse(file, length, |_, _| Ok(()))
}

/// Copies what is not zero from `source` to the empty `target`, gives it the same length, and
/// hashes what was copied as [`hash_sparse`] does.
pub(crate) fn copy_sparse(source: &File, target: &File, length: u64) -> io::Result<blake3::Hash> {
    target.set_len(length)?;
    walk_sparse(source, length, |page, offset| target.write_all_at(page, offset))
}

/// Writes what is not zero of a sparse file of `length` bytes as a list, each page behind its position
/// (u64 little-endian), and hashes as [`hash_sparse`] does.
pub(crate) fn write_sparse(
    file: &File,
    length: u64,
    target: &mut impl Write,
) -> io::Result<blake3::Hash> {
    walk_sparse(file, length, |page, offset| {
        target.write_all(&offset.to_le_bytes())?;
        target.write_all(page)
    })
}

/// Makes the empty `target` what [`write_sparse`] has listed in `source`, and hashes as it does.
pub(crate) fn read_sparse(
    source: &mut impl Read,
    target: &File,
    length: u64,
) -> io::Result<blake3::Hash> {
    let invalid = || io::Error::new(io::ErrorKind::InvalidData, "no list of pages in order");
    target.set_len(length)?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(&length.to_le_bytes());
    let mut page = vec![0; PAGE as usize];
    let mut next = 0;
    loop {
        let mut head = Vec::with_capacity(8);
        source.by_ref().take(8).read_to_end(&mut head)?;
        if head.is_empty() {
            return Ok(hasher.finalize());
        }
        let offset = u64::from_le_bytes(head.try_into().map_err(|_| invalid())?);
        if offset < next || offset >= length || offset % PAGE != 0 {
            return Err(invalid());
        }
        let page = &mut page[..PAGE.min(length - offset) as usize];
        source.read_exact(page)?;
        hasher.update(&offset.to_le_bytes());
        hasher.update(page);
        target.write_all_at(page, offset)?;
        next = offset + PAGE;
    }
}

fn walk_sparse(
    file: &File,
    length: u64,
    mut each: impl FnMut(&[u8], u64) -> io::Result<()>,
) -> io::Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&length.to_le_bytes());
    let mut buffer = vec![0; 1 << 20];
    let mut position = 0;
    while let Some(data) = next_data(file, position, length)? {
        // Extents may begin anywhere; pages are counted from the start of the file.
        let mut offset = data.start - data.start % PAGE;
        let end = data.end.next_multiple_of(PAGE).min(length);
        while offset < end {
            let want = buffer.len().min((end - offset) as usize);
            file.read_exact_at(&mut buffer[..want], offset)?;
            for (index, page) in buffer[..want].chunks(PAGE as usize).enumerate() {
                if page.iter().any(|byte| *byte != 0) {
                    let at = offset + index as u64 * PAGE;
                    hasher.update(&at.to_le_bytes());
                    hasher.update(page);
                    each(page, at)?;
                }
            }
            offset += want as u64;
        }
        position = end;
    }
    Ok(hasher.finalize())
}

/// The next range at or after `position` that may hold data.
fn next_data(file: &File, position: u64, length: u64) -> io::Result<Option<Range<u64>>> {
    if position >= length {
        return Ok(None);
    }
    let start = match rustix::fs::seek(file.as_fd(), SeekFrom::Data(position)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        // The file system does not know of holes.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(position..length)),
        Err(e) => return Err(e.into()),
    };
    let end = rustix::fs::seek(file.as_fd(), SeekFrom::Hole(start))?.min(length);
    Ok((start < end).then_some(start..end))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn sparse_copies_hash_alike(writes in proptest::collection::vec((0u64..40_000, any::<u8>()), 0..20)) {
            let dir = tempfile::tempdir().unwrap();
            let (a, b) = (
                File::options().create_new(true).read(true).write(true).open(dir.path().join("a")).unwrap(),
                File::options().create_new(true).read(true).write(true).open(dir.path().join("b")).unwrap(),
            );
            let length = 50_000;
            a.set_len(length).unwrap();
            for (at, byte) in writes {
                a.write_all_at(&[byte; 10], at * 1249 % (length - 10)).unwrap();
            }
            let hash = hash_sparse(&a, length).unwrap();
            prop_assert_eq!(copy_sparse(&a, &b, length).unwrap(), hash);
            prop_assert_eq!(hash_sparse(&b, length).unwrap(), hash);
            let c = tempfile::tempfile().unwrap();
            let mut list = Vec::new();
            prop_assert_eq!(write_sparse(&a, length, &mut list).unwrap(), hash);
            prop_assert_eq!(read_sparse(&mut &list[..], &c, length).unwrap(), hash);
            let read = |f: &File| { let mut v = vec![0; length as usize]; f.read_exact_at(&mut v, 0).unwrap(); v };
            prop_assert_eq!(read(&a), read(&b));
            prop_assert_eq!(read(&a), read(&c));
        }
    }

    #[test]
    fn lists_of_pages_that_are_none_are_refused() {
        let read = |list: &[u8], length| {
            read_sparse(&mut &list[..], &tempfile::tempfile().unwrap(), length).map(drop)
        };
        let at = |offset: u64| [offset.to_le_bytes().as_slice(), &[1; 4096]].concat();
        read(&[at(0), at(8192)].concat(), 12_288).unwrap();
        for list in [&at(1)[..], &at(12_288), &at(u64::MAX - 4095), &at(0)[..9], &at(0)[..3]] {
            read(list, 12_288).unwrap_err();
        }
        for list in [[at(4096), at(0)], [at(0), at(0)]] {
            read(&list.concat(), 12_288).unwrap_err();
        }
    }
}
