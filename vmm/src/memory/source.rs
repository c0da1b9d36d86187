//! The memory of a snapshot, for reading.

use std::{
    ops::Range,
    os::fd::{AsRawFd, BorrowedFd},
};

use rustix::fs::SeekFrom;

use super::{MemoryError, PAGE};

/// The memory of a snapshot, as what written pages are put back from.
pub struct Source {
    view: View,
    /// Where it has bytes, in ascending order; everything else is zeroes.
    data: Vec<Range<u64>>,
}

impl Source {
    /// Maps the first `bytes` bytes of `file`, which must be sealed against writing and shrinking.
    ///
    /// Holes are noted now: to read one through the mapping would allocate a page of the file, for
    /// all clones and for ever. Those that other clones fill in the same way later stay zeroes.
    ///
    /// # Errors
    /// [`MemoryError::FileSize`], [`MemoryError::Map`].
    pub fn of(file: BorrowedFd<'_>, bytes: u64) -> Result<Self, MemoryError> {
        let view = View::of(file, bytes)?;
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
        Ok(Self { view, data })
    }

    /// Size of the memory in bytes.
    pub fn bytes(&self) -> u64 {
        self.view.bytes as u64
    }

    /// A page by its number, which must be of this memory; none if it is zeroes.
    pub fn page(&self, number: u64) -> Option<&[u8]> {
        let start = number * PAGE;
        let next = self.data.partition_point(|data| data.end <= start);
        let data = self.data.get(next).filter(|data| data.start <= start)?;
        debug_assert!(start + PAGE <= data.end, "extents are of whole pages");
        self.view.bytes().get(start as usize..(start + PAGE) as usize)
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
            piece(part.clone(), Some(&self.view.bytes()[part]));
        }
        if at < range.end {
            piece(at as usize..range.end as usize, None);
        }
    }
}

/// A snapshot's memory, mapped for reading.
pub(crate) struct View {
    start: *const u8,
    bytes: usize,
}

impl View {
    /// Maps the first `bytes` bytes of `file`, which must be sealed against writing and shrinking.
    ///
    /// # Errors
    /// [`MemoryError::FileSize`], [`MemoryError::Map`].
    pub(crate) fn of(file: BorrowedFd<'_>, bytes: u64) -> Result<Self, MemoryError> {
        let found = rustix::fs::fstat(file).map_err(|e| MemoryError::Map(e.into()))?.st_size;
        if (found as u64) < bytes {
            return Err(MemoryError::FileSize { found: found as u64, expected: bytes });
        }
        // SAFETY: a new mapping at an address of the kernel's choice; that the file does not
        // shrink under it is what the sealed memfd of a resident snapshot is for.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes as usize,
                libc::PROT_READ,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(MemoryError::Map(std::io::Error::last_os_error()));
        }
        Ok(Self { start: start.cast(), bytes: bytes as usize })
    }

    /// The bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: mapped readable for `self.bytes` bytes until drop; the file behind it is sealed
        // against writing, as the protocol demands.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: the range is this value's own mapping, and no slice of it outlives `self`.
        unsafe { libc::munmap(self.start.cast_mut().cast(), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsFd, sync::LazyLock};

    use proptest::prelude::*;

    use super::*;
    use crate::memory::written::tests::snapshot;

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
