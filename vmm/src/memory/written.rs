//! Which pages of guest memory were written since a snapshot was mapped, and putting them back.
//!
//! A page that anybody in this process has written, guest, device or KVM itself, is a private copy:
//! the mapping is private, so the first write replaced the file's page by an anonymous one. No
//! write can escape that, and nobody has to keep count while the guest runs. The kernel tells
//! which pages are such copies ([`firn_pages::pagemap`]).
//!
//! ```text
//!  snapshot  ░░░░░░░░░░░░   file pages: present or not, never different
//!  guest     ░░██░░░█░░░░   anonymous, in memory or in swap: copied back where they lie
//! ```
//!
//! Copying costs less than dropping: the page stays mapped here and in KVM's tables, so that the
//! next guest's write to it, which is likely, costs no fault.

use std::{fs::File, io};

use firn_pages::{
    PAGE,
    pagemap::{Pagemap, Pages},
};

use super::{Memory, MemoryError, source::Source};

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

/// Takes a `/proc/PID/pagemap` that somebody else has opened for this process, if it is its own: what
/// a wrong one did not tell would stay in memory unnoticed.
///
/// # Errors
/// [`WrittenError::Stranger`], [`WrittenError::Pagemap`].
pub fn own_pagemap(file: File) -> Result<Pagemap, WrittenError> {
    let pagemap = Pagemap::new(file)?;
    if pagemap.is_own() { Ok(pagemap) } else { Err(WrittenError::Stranger) }
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
        pagemap.runs(base as u64, self.bytes / PAGE, Pages::Private, |run| {
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
    use std::{
        io::Write,
        os::{fd::AsFd, unix::fs::FileExt},
    };

    use firn_pages::mapping::SealedError;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::source::tests::{seal, sealable};

    fn own() -> Pagemap {
        own_pagemap(File::open("/proc/self/pagemap").unwrap()).unwrap()
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
    fn another_process_is_noticed() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let other = File::open(format!("/proc/{}/pagemap", child.id())).unwrap();
        assert!(matches!(own_pagemap(other), Err(WrittenError::Stranger)));
        let empty = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        assert!(matches!(own_pagemap(empty.into()), Err(WrittenError::Stranger)));
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
}
