//! Writing guest memory down: what differs from the snapshot that it came from.
//!
//! Only pages that were written can differ, and the kernel knows which these are
//! ([`super::written`]). Neither a page of guest memory nor one of the snapshot's file is looked at that
//! is not there: the look would make it.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt};

use firn_pages::{
    PAGE,
    bitmap::Bitmap,
    pagemap::{Pagemap, Pages},
};

use super::{Memory, source::Source};

/// Writes guest memory as a sparse linear file: of the pages that may differ, which it is told, those
/// that do. All others are holes.
struct Writer<'a> {
    contents: &'a [u8],
    /// `None`: it is compared with zeroes.
    base: Option<&'a Source>,
    out: &'a File,
    pages: Bitmap,
}

impl<'a> Writer<'a> {
    /// Makes `out` as long as `contents`, which is guest memory.
    ///
    /// # Errors
    /// I/O.
    fn new(contents: &'a [u8], base: Option<&'a Source>, out: &'a File) -> io::Result<Self> {
        out.set_len(contents.len() as u64)?;
        let pages = Bitmap::new(contents.len() as u64 / PAGE);
        Ok(Self { contents, base, out, pages })
    }

    /// Looks at a run of pages; those beyond guest memory are none.
    ///
    /// # Errors
    /// I/O; a full disk is one.
    fn look(&mut self, run: Range<u64>) -> io::Result<()> {
        const PAGE_BYTES: usize = PAGE as usize;
        let end = run.end.min(self.contents.len() as u64 / PAGE);
        // Pages that differ and follow each other become one write.
        let mut first: Option<u64> = None;
        for page in run.start..=end {
            let at = page as usize * PAGE_BYTES;
            let differs = page < end && {
                let before = self.base.and_then(|base| base.page(page));
                &self.contents[at..at + PAGE_BYTES] != before.unwrap_or(&[0; PAGE_BYTES])
            };
            if differs {
                first.get_or_insert(page);
            } else if let Some(first) = first.take() {
                self.pages.insert(first..page);
                let start = first as usize * PAGE_BYTES;
                self.out.write_all_at(&self.contents[start..at], start as u64)?;
            }
        }
        Ok(())
    }
}

impl Memory {
    /// Writes to `out`, a sparse linear file, what differs from `base`, which is what is mapped here;
    /// without one, what is not zero. Returns which pages that were. It touches no page of guest memory
    /// or of the base that is not there.
    ///
    /// # Errors
    /// I/O; a full disk is one.
    ///
    /// # Safety
    /// All vCPUs are stopped, and no device is handling a request.
    pub unsafe fn save(
        &self,
        pagemap: &Pagemap,
        base: Option<&Source>,
        out: &File,
    ) -> io::Result<Bitmap> {
        // SAFETY: the caller's promise.
        let contents = unsafe { self.contents() };
        let mut writer = Writer::new(contents, base, out)?;
        let mut result = Ok(());
        let base = self.base.as_ptr() as u64;
        pagemap.runs(base, self.bytes / PAGE, Pages::Private, |run| {
            if result.is_ok() {
                result = writer.look(run);
            }
        })?;
        result.map(|()| writer.pages)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::memory::source::tests::{seal, sealable};

    #[test]
    fn only_pages_that_differ_are_written() {
        let page = PAGE as usize;
        let mut contents = vec![0u8; page * 20];
        contents[page * 3] = 1;
        contents[page * 4 + 7] = 2;
        contents[page * 19] = 3;
        let out = sealable();
        let mut writer = Writer::new(&contents, None, &out).unwrap();
        writer.look(0..4).unwrap();
        writer.look(4..21).unwrap();
        assert_eq!(writer.pages.to_bytes(), [0b11000, 0, 0b1000]);
        let mut back = vec![9u8; contents.len()];
        out.read_exact_at(&mut back, 0).unwrap();
        assert_eq!(back, contents);

        seal(&out);
        let base = Source::of(out.as_fd(), contents.len() as u64).unwrap();
        contents[page * 4 + 7] = 0;
        contents[page * 7] = 5;
        let differences = sealable();
        let mut writer = Writer::new(&contents, Some(&base), &differences).unwrap();
        // Whoever is not told of a page does not look at it.
        writer.look(0..5).unwrap();
        assert_eq!(writer.pages.to_bytes(), [0b10000, 0, 0]);
    }
}
