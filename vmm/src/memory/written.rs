//! Which pages of guest memory were written since a snapshot was mapped, and putting them back.
//!
//! A page that anybody in this process has written, guest, device or KVM itself, is a private copy:
//! the mapping is private, so the first write replaced the file's page by an anonymous one. No
//! write can escape that, and nobody has to keep count while the guest runs. The kernel tells
//! which pages are such copies through `/proc/PID/pagemap`
//! (Documentation/admin-guide/mm/pagemap.rst): by one ioctl from Linux 6.7 on, before that by
//! reading eight bytes for every page.
//!
//! ```text
//!  snapshot  ░░░░░░░░░░░░   file pages: present or not, never different
//!  guest     ░░██░░░█░░░░   anonymous, in memory or in swap: copied back where they lie
//! ```
//!
//! Copying costs less than dropping: the page stays mapped here and in KVM's tables, so that the
//! next guest's write to it, which is likely, costs no fault.

use std::{
    fs::File,
    io,
    ops::Range,
    os::{fd::AsRawFd, unix::fs::FileExt},
};

use super::{Memory, MemoryError, PAGE, source::Source};

/// Pages that one read asks about: 32 KiB of answers.
const BATCH: usize = 4096;

/// Pages that are looked at together.
const GROUP: usize = 32;

/// Runs that one ioctl may find.
const RUNS: usize = 256;

// Bits of an entry.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE: u64 = 1 << 61;

// `PAGEMAP_SCAN` of `linux/fs.h`: `_IOWR('f', 16, struct pm_scan_arg)`, and its categories.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

const _: () = assert!(size_of::<ScanArg>() == 96 && size_of::<PageRegion>() == 24);

/// Written pages could not be put back.
#[derive(Debug, thiserror::Error)]
pub enum WrittenError {
    /// The kernel does not tell.
    #[error("pagemap: {0}")]
    Pagemap(#[from] io::Error),
    /// The file describes another process, or is no pagemap at all.
    #[error("the pagemap is not this process's")]
    Stranger,
    /// The snapshot's memory can't be used.
    #[error(transparent)]
    Snapshot(#[from] MemoryError),
}

/// This process's `/proc/PID/pagemap`, which somebody else has opened for it.
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    /// Takes a descriptor for a pagemap, if it is this process's: what a wrong one did not tell
    /// would stay in memory unnoticed.
    ///
    /// # Errors
    /// [`WrittenError::Stranger`], [`WrittenError::Pagemap`].
    pub fn new(file: File) -> Result<Self, WrittenError> {
        // This page is private and in memory, and with address space randomization no other
        // process has one at its address.
        let witness = [0u8; 8];
        let address = std::hint::black_box(&witness).as_ptr() as u64;
        let mut entry = [0; 8];
        file.read_exact_at(&mut entry, address / PAGE * 8).map_err(|_| WrittenError::Stranger)?;
        if !is_private(u64::from_ne_bytes(entry)) {
            return Err(WrittenError::Stranger);
        }
        Ok(Self(file))
    }

    /// Calls `found` with each run of private pages among the `pages` from `address` on, as page
    /// numbers counted from there, in ascending order.
    pub(super) fn private_runs(
        &self,
        address: u64,
        pages: u64,
        mut found: impl FnMut(Range<u64>),
    ) -> io::Result<()> {
        match self.scan(address, pages, &mut found) {
            // Before Linux 6.7. Nothing has been found then.
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
                self.read(address, pages, &mut found)
            }
            other => other,
        }
    }

    fn scan(&self, address: u64, pages: u64, found: &mut impl FnMut(Range<u64>)) -> io::Result<()> {
        let mut regions = [PageRegion::default(); RUNS];
        let end = address + pages * PAGE;
        let mut start = address;
        while start < end {
            let mut argument = ScanArg {
                size: size_of::<ScanArg>() as u64,
                start,
                end,
                vec: regions.as_mut_ptr() as u64,
                vec_len: RUNS as u64,
                // Not a file's, and present or swapped out.
                category_inverted: PAGE_IS_FILE,
                category_mask: PAGE_IS_FILE,
                category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                // What is told apart would not be merged.
                return_mask: PAGE_IS_FILE,
                ..ScanArg::default()
            };
            // SAFETY: the kernel reads and writes `argument`, and writes at most `vec_len` regions
            // to `regions`; both are alive and borrowed by nothing else.
            let count = unsafe { libc::ioctl(self.0.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
            let count = crate::stats::ioctl_error(count)? as usize;
            for region in regions.iter().take(count) {
                found((region.start - address) / PAGE..(region.end - address) / PAGE);
            }
            if argument.walk_end <= start {
                return Err(io::Error::other("PAGEMAP_SCAN stands still"));
            }
            start = argument.walk_end;
        }
        Ok(())
    }

    fn read(&self, address: u64, pages: u64, found: &mut impl FnMut(Range<u64>)) -> io::Result<()> {
        let mut bytes = vec![0; BATCH * 8];
        let mut runs = Runs::default();
        let mut page = 0;
        while page < pages {
            let count = BATCH.min((pages - page) as usize);
            let bytes = &mut bytes[..count * 8];
            self.0.read_exact_at(bytes, (address / PAGE + page) * 8)?;
            for group in bytes.chunks(GROUP * 8) {
                let entries = group.as_chunks().0;
                // Most pages are nobody's: a whole group is passed over at once.
                let any = entries
                    .iter()
                    .fold(false, |any, entry| any | is_private(u64::from_ne_bytes(*entry)));
                if !any && runs.start.is_none() {
                    page += entries.len() as u64;
                    continue;
                }
                for entry in entries {
                    runs.next(page, is_private(u64::from_ne_bytes(*entry)), found);
                    page += 1;
                }
            }
        }
        runs.next(page, false, found);
        Ok(())
    }
}

/// Whether an entry is of an anonymous page, in memory or in swap.
fn is_private(entry: u64) -> bool {
    (entry & (PRESENT | SWAPPED) != 0) & (entry & FILE == 0)
}

/// Joins pages to runs.
#[derive(Debug, Default)]
struct Runs {
    start: Option<u64>,
}

impl Runs {
    fn next(&mut self, page: u64, private: bool, found: &mut impl FnMut(Range<u64>)) {
        match (self.start, private) {
            (None, true) => self.start = Some(page),
            (Some(start), false) => {
                found(start..page);
                self.start = None;
            }
            _ => {}
        }
    }
}

impl Memory {
    /// Puts every page that was written since `source` was mapped back; returns how many they were.
    /// A page that was written once stays private for ever, so it counts each time.
    ///
    /// # Errors
    /// Any [`WrittenError`]; memory is then of no further use.
    ///
    /// # Safety
    /// All vCPUs are stopped, and no device is handling a request.
    pub unsafe fn put_back(&self, pagemap: &Pagemap, source: &Source) -> Result<u64, WrittenError> {
        let found = source.bytes();
        if found < self.bytes {
            return Err(MemoryError::FileSize { found, expected: self.bytes }.into());
        }
        let base = self.base.as_ptr();
        let mut pages = 0;
        pagemap.private_runs(base as u64, self.bytes / PAGE, |run| {
            // The kernel stays within what it was asked about; this holds even if it did not.
            let end = run.end.min(self.bytes / PAGE);
            let start = run.start.min(end);
            source.pieces(start * PAGE..end * PAGE, |part, bytes| {
                // SAFETY: `part` lies within `start..end` and so within guest memory, which is
                // mapped writable and which nobody else accesses: the caller's promise. The view
                // is another mapping, and `bytes` is as long as `part`.
                unsafe {
                    let target = base.add(part.start);
                    match bytes {
                        Some(bytes) => target.copy_from_nonoverlapping(bytes.as_ptr(), part.len()),
                        None => write_zeroes(target, part.len()),
                    }
                }
            });
            pages += end - start;
        })?;
        Ok(pages)
    }
}

/// Makes a page-aligned range of zeroes. Pages that are, stay: those may be the one that all of the
/// system share, which a write would replace.
///
/// # Safety
/// The range is of whole pages and nobody else accesses it.
unsafe fn write_zeroes(start: *mut u8, bytes: usize) {
    for offset in (0..bytes).step_by(PAGE as usize) {
        // SAFETY: within the caller's range.
        unsafe {
            let page = start.add(offset).cast::<[u8; PAGE as usize]>();
            if *page != [0; PAGE as usize] {
                page.write_bytes(0, 1);
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::{io::Write, os::fd::AsFd};

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::sealed::{
        SealedError,
        tests::{seal, sealable},
    };

    fn own() -> Pagemap {
        Pagemap::new(File::open("/proc/self/pagemap").unwrap()).unwrap()
    }

    pub fn snapshot(mib: usize) -> (File, Vec<u8>) {
        let mut file = sealable();
        let mut contents = vec![0; mib << 20];
        for (number, page) in contents.chunks_mut(PAGE as usize).enumerate() {
            // Every third page is zeroes: a hole.
            page.fill(if number % 3 == 0 { 0 } else { number as u8 });
        }
        for (number, page) in contents.chunks(PAGE as usize).enumerate() {
            if number % 3 != 0 {
                file.write_all_at(page, number as u64 * PAGE).unwrap();
            }
        }
        file.set_len((mib << 20) as u64).unwrap();
        file.flush().unwrap();
        seal(&file);
        (file, contents)
    }

    fn all(memory: &Memory) -> Vec<u8> {
        let mut bytes = vec![0; memory.bytes() as usize];
        memory.guest().read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }

    #[test]
    fn what_was_written_goes_back_and_nothing_else_is_touched() {
        let memory = Memory::reserve(16).unwrap();
        let (file, contents) = snapshot(16);
        memory.map_file(file.as_fd()).unwrap();
        let (pagemap, source) = (own(), Source::of(file.as_fd(), 16 << 20).unwrap());
        // SAFETY: nothing else uses this memory.
        let put_back = || unsafe { memory.put_back(&pagemap, &source) }.unwrap();
        assert_eq!(all(&memory), contents);
        assert_eq!(put_back(), 0, "pages that were only read are the file's");
        let written = [0, 3, 4, 5, 100, 4095];
        for page in written {
            memory.guest().write_obj(0x5ec2e7u32, GuestAddress(page * PAGE + 8)).unwrap();
        }
        assert_ne!(all(&memory), contents);
        assert_eq!(put_back(), written.len() as u64);
        assert_eq!(all(&memory), contents);
        // Those are private from now on, and found again whoever writes them.
        memory.guest().write_obj(1u8, GuestAddress(7 * PAGE)).unwrap();
        assert_eq!(put_back(), written.len() as u64 + 1);
        assert_eq!(all(&memory), contents);
    }

    #[test]
    fn both_ways_to_ask_agree() {
        let memory = Memory::reserve(16).unwrap();
        let (file, _) = snapshot(16);
        memory.map_file(file.as_fd()).unwrap();
        // More runs than one ioctl takes.
        for page in (0..4096).filter(|page| page % 5 == 0 || page % 7 < 2) {
            memory.guest().write_obj(1u8, GuestAddress(page * PAGE)).unwrap();
        }
        let base = memory.base.as_ptr() as u64;
        let (mut read, mut scanned) = (Vec::new(), Vec::new());
        own().read(base, 4096, &mut |run| read.push(run)).unwrap();
        assert!(read.len() > RUNS);
        match own().scan(base, 4096, &mut |run| scanned.push(run)) {
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
                eprintln!("skipped: no PAGEMAP_SCAN");
            }
            result => {
                result.unwrap();
                // A walk that stops for want of room may cut a run in two.
                let pages = |runs: Vec<Range<u64>>| runs.into_iter().flatten().collect::<Vec<_>>();
                assert_eq!(pages(scanned), pages(read));
            }
        }
    }

    #[test]
    fn another_process_is_noticed() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let other = File::open(format!("/proc/{}/pagemap", child.id())).unwrap();
        assert!(matches!(Pagemap::new(other), Err(WrittenError::Stranger)));
        let empty = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        assert!(matches!(Pagemap::new(empty.into()), Err(WrittenError::Stranger)));
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_short_snapshot_is_refused() {
        let (file, _) = snapshot(16);
        let error = Source::of(file.as_fd(), 17 << 20).err();
        assert!(matches!(error, Some(MemoryError::FileSize { .. })));
        let memory = Memory::reserve(17).unwrap();
        let source = Source::of(file.as_fd(), 16 << 20).unwrap();
        // SAFETY: nothing else uses this memory.
        let result = unsafe { memory.put_back(&own(), &source) };
        assert!(matches!(result, Err(WrittenError::Snapshot(MemoryError::FileSize { .. }))));
    }

    #[test]
    fn a_snapshot_that_may_change_is_refused() {
        let file = sealable();
        file.set_len(16 << 20).unwrap();
        let error = Source::of(file.as_fd(), 16 << 20).err();
        assert!(matches!(error, Some(MemoryError::Source(SealedError::Unsealed))), "{error:?}");
    }

    /// Bytes of memory that the file occupies.
    fn occupied(file: &File) -> u64 {
        std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) * 512
    }

    #[test]
    fn holes_stay_holes() {
        let memory = Memory::reserve(16).unwrap();
        let (file, contents) = snapshot(16);
        memory.map_file(file.as_fd()).unwrap();
        let source = Source::of(file.as_fd(), 16 << 20).unwrap();
        // A region of memory of its own, as a plan makes them: all private, holes and all.
        // SAFETY: the range lies within guest memory, which nothing else uses.
        let mapped = unsafe {
            libc::mmap(
                memory.base.as_ptr().add(2 << 20).cast(),
                2 << 20,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
                -1,
                0,
            )
        };
        assert_ne!(mapped, libc::MAP_FAILED);
        memory.guest().write_slice(&vec![7; 2 << 20], GuestAddress(2 << 20)).unwrap();
        let before = occupied(&file);
        // SAFETY: nothing else uses this memory.
        assert_eq!(unsafe { memory.put_back(&own(), &source) }.unwrap(), 512);
        assert_eq!(occupied(&file), before);
        assert_eq!(all(&memory), contents);
    }

    proptest! {
        #[test]
        fn runs_are_the_private_pages(entries in proptest::collection::vec(
            prop_oneof![Just(0), Just(PRESENT), Just(SWAPPED | 77), Just(PRESENT | FILE),
                Just(SWAPPED | FILE), any::<u64>()], 0..600)) {
            let mut runs = Runs::default();
            let mut found = Vec::new();
            for (page, &entry) in entries.iter().enumerate() {
                runs.next(page as u64, is_private(entry), &mut |run| found.push(run));
            }
            runs.next(entries.len() as u64, false, &mut |run| found.push(run));
            for pair in found.windows(2) {
                prop_assert!(pair[0].end < pair[1].start, "{found:?} could be joined");
            }
            let pages: Vec<u64> = found.into_iter().flatten().collect();
            let expected: Vec<u64> = (0..entries.len() as u64)
                .filter(|&page| {
                    let entry = entries[page as usize];
                    (entry >> 63 == 1 || entry >> 62 & 1 == 1) && entry >> 61 & 1 == 0
                })
                .collect();
            prop_assert_eq!(pages, expected);
        }
    }
}
