//! The memory of a snapshot, for reading.

use std::{ops::Range, os::fd::BorrowedFd};

use firn_pages::{PAGE, mapping::Sealed};
use rustix::fs::SeekFrom;

use super::MemoryError;

/// The memory of a snapshot, as what written pages are put back from.
pub struct Source {
    bytes: Sealed,
    /// Where it has bytes, in ascending order; everything else is zeroes.
    data: Vec<Range<u64>>,
}

impl Source {
    /// Maps `file`, which must be sealed against writing and shrinking and have at least `bytes` bytes.
    ///
    /// Holes are noted now: to read one through the mapping would allocate a page of the file, for
    /// all clones and for ever. Those that other clones fill in the same way later stay zeroes.
    ///
    /// # Errors
    /// [`MemoryError::FileSize`], [`MemoryError::Source`], [`MemoryError::Map`].
    pub fn of(file: BorrowedFd<'_>, bytes: u64) -> Result<Self, MemoryError> {
        let view = map(file, bytes)?;
        let mut data = Vec::new();
        let mut at = 0;
        while at < bytes {
            let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
                Ok(start) => start,
                // No more data.
                Err(rustix::io::Errno::NXIO) => break,
                Err(error) => return Err(MemoryError::Map(error.into())),
            };
            let end = rustix::fs::seek(file, SeekFrom::Hole(start))
                .map_err(|error| MemoryError::Map(error.into()))?;
            data.push(start / PAGE * PAGE..end.next_multiple_of(PAGE).min(bytes));
            at = end.max(start + 1);
        }
        Ok(Self { bytes: view, data })
    }

    /// Size of the memory in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// A page by its number, which must be of this memory; none if it is zeroes.
    pub fn page(&self, number: u64) -> Option<&[u8]> {
        let start = number * PAGE;
        let next = self.data.partition_point(|data| data.end <= start);
        let data = self.data.get(next).filter(|data| data.start <= start)?;
        debug_assert!(start + PAGE <= data.end, "extents are of whole pages");
        self.bytes.get(start as usize..(start + PAGE) as usize)
    }

    /// Calls `piece` with each part of `range`, in order: a range of offsets, and its bytes, or
    /// none where they are zeroes.
    pub(super) fn pieces(
        &self,
        range: Range<u64>,
        mut piece: impl FnMut(Range<usize>, Option<&[u8]>),
    ) {
        let mut at = range.start;
        let first = self.data.partition_point(|data| data.end <= at);
        for data in &self.data[first..] {
            if data.start >= range.end {
                break;
            }
            if at < data.start {
                piece(at as usize..data.start as usize, None);
                at = data.start;
            }
            let part = at as usize..data.end.min(range.end) as usize;
            at = part.end as u64;
            piece(part.clone(), Some(&self.bytes[part]));
        }
        if at < range.end {
            piece(at as usize..range.end as usize, None);
        }
    }
}

/// Maps the memory of a snapshot for reading, at least `bytes` bytes.
///
/// # Errors
/// [`MemoryError::FileSize`], [`MemoryError::Source`].
pub(crate) fn map(file: BorrowedFd<'_>, bytes: u64) -> Result<Sealed, MemoryError> {
    let mapped = Sealed::map(file).map_err(MemoryError::Source)?;
    let found = mapped.len() as u64;
    if found < bytes {
        return Err(MemoryError::FileSize { found, expected: bytes });
    }
    Ok(mapped)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{fs::File, os::fd::AsFd, sync::LazyLock};

    use proptest::prelude::*;
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

    use super::*;
    use crate::memory::written::tests::snapshot;

    /// An empty file that can be sealed.
    pub(crate) fn sealable() -> File {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        memfd_create("test", flags).unwrap().into()
    }

    /// Makes it one that can be mapped for reading.
    pub(crate) fn seal(file: &File) {
        fcntl_add_seals(file, SealFlags::WRITE | SealFlags::SHRINK).unwrap();
    }

    proptest! {
        #[test]
        fn pieces_cover_a_range_with_its_bytes(start in 0u64..4096, pages in 0u64..4096) {
            static SNAPSHOT: LazyLock<(File, Vec<u8>)> = LazyLock::new(|| snapshot(16));
            let (file, contents) = &*SNAPSHOT;
            let source = Source::of(file.as_fd(), 16 << 20).unwrap();
            let range = start * PAGE..(start + pages).min(4096) * PAGE;
            let mut at = range.start as usize;
            source.pieces(range.clone(), |part, bytes| {
                assert_eq!(part.start, at);
                at = part.end;
                let expected = &contents[part.clone()];
                match bytes {
                    Some(bytes) => assert_eq!(bytes, expected),
                    None => assert_eq!(expected, vec![0; part.len()]),
                }
            });
            prop_assert_eq!(at as u64, range.end.max(range.start));
        }
    }
}
