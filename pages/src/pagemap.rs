//! Which pages of a process are there, and which of these are private copies.
//!
//! The kernel tells by `/proc/PID/pagemap` (Documentation/admin-guide/mm/pagemap.rst): by one ioctl
//! from Linux 6.7 on, `PAGEMAP_SCAN`, before that by eight bytes to read for every page. Both say the
//! same; which one there is, is tried until one has answered.

use std::{
    fs::File,
    io,
    ops::Range,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::FileExt,
    },
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::{PAGE, ioctl::PAGEMAP_SCAN};

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

// Categories of `PAGEMAP_SCAN`.
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;

/// `struct pm_scan_arg` of `linux/fs.h`.
#[repr(C)]
#[derive(Default)]
pub(crate) struct ScanArgument {
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

const _: () = assert!(size_of::<ScanArgument>() == 96 && size_of::<PageRegion>() == 24);

/// What to ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// Those that are there: in memory, or in swap, where only private ones go.
    Mapped,
    /// Of these, those that are no page of a file (any more).
    Private,
}

impl Pages {
    /// Whether an entry is of such a page. Without branches: most entries are of none.
    fn has(self, entry: u64) -> bool {
        let excluded = if self == Self::Private { FILE } else { 0 };
        (entry & (PRESENT | SWAPPED) != 0) & (entry & excluded == 0)
    }
}

/// Whether this kernel has been seen to scan.
static SCANS: AtomicBool = AtomicBool::new(false);

/// An open `/proc/PID/pagemap`.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    scans: bool,
}

impl Pagemap {
    /// Opens that of a process. Needs the right to trace it. The kernel tells whoever reads it physical
    /// addresses if the opener could know them; this one is opened so that it can't.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open(pid: u32) -> io::Result<Self> {
        let path = format!("/proc/{pid}/pagemap");
        let _without = WithoutAdmin::new()?;
        Self::new(File::open(path)?)
    }

    /// Takes one that somebody has opened.
    ///
    /// # Errors
    /// The kernel's. That `file` is no pagemap is noticed when it is asked.
    pub fn new(file: File) -> io::Result<Self> {
        if SCANS.load(Ordering::Relaxed) {
            return Ok(Self { file, scans: true });
        }
        // No process has a page at address 0, or few.
        let scans = match scan(&file, 0, 1, Pages::Mapped, &mut |_| {}) {
            Ok(()) => true,
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
                false
            }
            Err(error) => return Err(error),
        };
        SCANS.store(scans, Ordering::Relaxed);
        Ok(Self { file, scans })
    }

    /// Whether the kernel has `PAGEMAP_SCAN`.
    pub fn scans(&self) -> bool {
        self.scans
    }

    /// Whether it is this process's: what another one's did not tell would go unnoticed.
    pub fn is_own(&self) -> bool {
        // This page is private and in memory, and with address space randomization no other
        // process has one at its address.
        let witness = [0u8; 8];
        let address = std::hint::black_box(&witness).as_ptr() as u64;
        // Read, not scanned: a reset asks each time, and a scan costs ten times as much.
        let mut entry = [0; 8];
        self.file.read_exact_at(&mut entry, address / PAGE * 8).is_ok()
            && Pages::Private.has(u64::from_ne_bytes(entry))
    }

    /// Calls `found` with runs of such pages among the `pages` from `address` on, which is the start
    /// of a page, as page numbers counted from there, in ascending order.
    ///
    /// # Errors
    /// The kernel's; that the process is gone is one.
    pub fn runs(
        &self,
        address: u64,
        pages: u64,
        which: Pages,
        mut found: impl FnMut(Range<u64>),
    ) -> io::Result<()> {
        if !self.scans {
            return read(&self.file, address, pages, which, &mut found);
        }
        scan(&self.file, address, pages, which, &mut found)?;
        // A scan need not fail where the process is gone; a read does.
        self.file.read_exact_at(&mut [0; 8], address / PAGE * 8)
    }
}

impl AsFd for Pagemap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn scan(
    file: &File,
    address: u64,
    pages: u64,
    which: Pages,
    found: &mut impl FnMut(Range<u64>),
) -> io::Result<()> {
    let mut regions = [PageRegion::default(); RUNS];
    let excluded = if which == Pages::Private { PAGE_IS_FILE } else { 0 };
    let end = address + pages * PAGE;
    let mut start = address;
    while start < end {
        let mut argument = ScanArgument {
            size: size_of::<ScanArgument>() as u64,
            start,
            end,
            vec: regions.as_mut_ptr() as u64,
            vec_len: RUNS as u64,
            category_inverted: excluded,
            category_mask: excluded,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            // Runs are cut where this changes: between a file's pages and others only.
            return_mask: PAGE_IS_FILE,
            ..ScanArgument::default()
        };
        let request = PAGEMAP_SCAN.into();
        // SAFETY: the kernel reads and writes `argument`, and writes at most `vec_len` regions to
        // `regions`; both are alive and borrowed by nothing else.
        let count = unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut argument) };
        if count < 0 {
            return Err(io::Error::last_os_error());
        }
        for region in regions.iter().take(count as usize) {
            found((region.start - address) / PAGE..(region.end - address) / PAGE);
        }
        if argument.walk_end <= start {
            return Err(io::Error::other("PAGEMAP_SCAN stands still"));
        }
        start = argument.walk_end;
    }
    Ok(())
}

fn read(
    file: &File,
    address: u64,
    pages: u64,
    which: Pages,
    found: &mut impl FnMut(Range<u64>),
) -> io::Result<()> {
    let mut bytes = vec![0; BATCH * 8];
    let mut runs = Runs::default();
    let mut page = 0;
    while page < pages {
        let count = BATCH.min((pages - page) as usize);
        let bytes = &mut bytes[..count * 8];
        file.read_exact_at(bytes, (address / PAGE + page) * 8)?;
        for group in bytes.chunks(GROUP * 8) {
            let entries = group.as_chunks().0;
            // Most pages are nobody's: a whole group is passed over at once.
            let any = entries
                .iter()
                .fold(false, |any, entry| any | which.has(u64::from_ne_bytes(*entry)));
            if !any && runs.start.is_none() {
                page += entries.len() as u64;
                continue;
            }
            for entry in entries {
                runs.next(page, which.has(u64::from_ne_bytes(*entry)), found);
                page += 1;
            }
        }
    }
    runs.next(page, false, found);
    Ok(())
}

/// Joins pages to runs.
#[derive(Debug, Default)]
struct Runs {
    start: Option<u64>,
}

impl Runs {
    fn next(&mut self, page: u64, asked_for: bool, found: &mut impl FnMut(Range<u64>)) {
        match (self.start, asked_for) {
            (None, true) => self.start = Some(page),
            (Some(start), false) => {
                found(start..page);
                self.start = None;
            }
            _ => {}
        }
    }
}

/// This thread lacks CAP_SYS_ADMIN until it is dropped.
struct WithoutAdmin(CapabilitySets);

impl WithoutAdmin {
    fn new() -> io::Result<Self> {
        let before = rustix::thread::capabilities(None)?;
        let effective = before.effective - CapabilitySet::SYS_ADMIN;
        rustix::thread::set_capabilities(None, CapabilitySets { effective, ..before })?;
        Ok(Self(before))
    }
}

impl Drop for WithoutAdmin {
    fn drop(&mut self) {
        // Taking back what is still permitted is always allowed.
        let _ = rustix::thread::set_capabilities(None, self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use proptest::prelude::*;
    use rustix::{
        fs::MemfdFlags,
        mm::{MapFlags, ProtFlags},
    };

    use super::*;

    fn own() -> Pagemap {
        Pagemap::open(std::process::id()).unwrap()
    }

    fn sleeper() -> Child {
        Command::new("sleep").arg("60").spawn().unwrap()
    }

    #[test]
    fn a_pagemap_tells_no_physical_addresses_and_capabilities_come_back() {
        let before = rustix::thread::capabilities(None).unwrap();
        let pagemap = own();
        let after = rustix::thread::capabilities(None).unwrap();
        assert_eq!(before.effective, after.effective);
        let witness = 1u8;
        let address = (&raw const witness) as u64;
        let mut entry = [0; 8];
        pagemap.file.read_exact_at(&mut entry, address / 4096 * 8).unwrap();
        let entry = u64::from_ne_bytes(entry);
        assert_eq!(entry >> 63, 1, "the page is in memory");
        assert_eq!(entry & ((1 << 55) - 1), 0, "its frame is not told");
    }

    #[test]
    fn another_process_is_noticed() {
        assert!(own().is_own());
        let mut child = sleeper();
        assert!(!Pagemap::open(child.id()).unwrap().is_own());
        let empty = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        assert!(!Pagemap::new(empty.into()).unwrap().is_own());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_process_that_is_gone_is_an_error() {
        let mut child = sleeper();
        let pagemap = Pagemap::open(child.id()).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        for scans in [false, pagemap.scans] {
            let pagemap = Pagemap { file: pagemap.file.try_clone().unwrap(), scans };
            assert!(pagemap.runs(1 << 30, 16, Pages::Mapped, |run| panic!("{run:?}")).is_err());
        }
    }

    /// Pages of the memory below, and of its first part, which is a file's.
    const ALL: usize = 4096;
    const OF_FILE: usize = 3000;
    const PAGE_BYTES: usize = PAGE as usize;

    fn is_written(page: u64) -> bool {
        page.is_multiple_of(5) || page % 7 < 2
    }

    /// Memory of which some pages are not there, some are a file's, some private copies of these, some
    /// the page of zeroes, and some are its own. More runs than one ioctl takes. Never unmapped.
    fn memory() -> u64 {
        let file = File::from(rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
        file.set_len((OF_FILE * PAGE_BYTES) as u64).unwrap();
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice, of which a part is replaced by
        // another; all pages that are accessed lie in it.
        unsafe {
            let any = std::ptr::null_mut();
            let start =
                rustix::mm::mmap_anonymous(any, ALL * PAGE_BYTES, access, MapFlags::PRIVATE)
                    .unwrap();
            let flags = MapFlags::PRIVATE | MapFlags::FIXED;
            rustix::mm::mmap(start, OF_FILE * PAGE_BYTES, access, flags, &file, 0).unwrap();
            let start = start.cast::<u8>();
            for page in 0..ALL {
                let byte = start.add(page * PAGE_BYTES);
                if page % 11 < 4 {
                    byte.read_volatile();
                }
                if is_written(page as u64) {
                    byte.write_volatile(1);
                }
            }
            start as u64
        }
    }

    #[test]
    fn both_ways_agree() {
        let address = memory();
        let pagemap = own();
        for which in [Pages::Private, Pages::Mapped] {
            let asked = |scans| {
                let (mut runs, mut pages) = (0, Vec::new());
                let pagemap = Pagemap { file: pagemap.file.try_clone().unwrap(), scans };
                let found = |run| {
                    runs += 1;
                    // A walk that stops for want of room may cut a run in two.
                    pages.extend::<Range<u64>>(run);
                };
                pagemap.runs(address, ALL as u64, which, found).unwrap();
                (runs, pages)
            };
            let (runs, read) = asked(false);
            assert!(runs > RUNS);
            let all = (0..ALL as u64).all(|page| !is_written(page) || read.contains(&page));
            assert!(all, "each that was written is {which:?}");
            if which == Pages::Private {
                let mut of_file = read.iter().filter(|page| **page < OF_FILE as u64);
                assert!(of_file.all(|page| is_written(*page)), "a file's is not");
            }
            match pagemap.scans {
                true => assert_eq!(asked(true).1, read, "{which:?}"),
                false => eprintln!("skipped: no PAGEMAP_SCAN"),
            }
        }
    }

    proptest! {
        #[test]
        fn runs_are_the_pages_that_were_asked_for(entries in proptest::collection::vec(
            prop_oneof![Just(0), Just(PRESENT), Just(SWAPPED | 77), Just(PRESENT | FILE),
                Just(SWAPPED | FILE), any::<u64>()], 0..600), private: bool) {
            let which = if private { Pages::Private } else { Pages::Mapped };
            let mut runs = Runs::default();
            let mut found = Vec::new();
            for (page, &entry) in entries.iter().enumerate() {
                runs.next(page as u64, which.has(entry), &mut |run| found.push(run));
            }
            runs.next(entries.len() as u64, false, &mut |run| found.push(run));
            for pair in found.windows(2) {
                prop_assert!(pair[0].end < pair[1].start, "{found:?} could be joined");
            }
            let pages: Vec<u64> = found.into_iter().flatten().collect();
            let expected: Vec<u64> = (0..entries.len() as u64)
                .filter(|&page| {
                    let entry = entries[page as usize];
                    (entry >> 63 == 1 || entry >> 62 & 1 == 1) && (!private || entry >> 61 & 1 == 0)
                })
                .collect();
            prop_assert_eq!(pages, expected);
        }
    }
}
