//! Carrying out a [`MemoryPlan`]: memory of the guest's own where the snapshot has holes, and pages
//! that the guest is known to write are copied before it runs.
//!
//! A hole that is read or written through a mapping becomes a page of the file, which belongs to all
//! clones and stays for ever; a write takes a second page, the clone's copy. So large holes are not
//! mapped from the file.
//!
//! A page that the guest writes while it is mapped from a snapshot costs an exit, a fault in the
//! host's page tables with a copy, and, if it had been read before, one exit more. A huge page that
//! was zeroed while the shell waited costs the copying alone, and its 512 pages cost one exit. So
//! a shell keeps some huge pages in reserve, and a thaw moves them (`mremap`, which moves page
//! tables, not bytes) to the regions that are written most. KVM's memslot names addresses, not
//! mappings, so it does not notice.
//!
//! | file | job |
//! |---|---|
//! | this one | carrying a plan out |
//! | `runs.rs` | what runs of pages a plan may name |
//! | `spares.rs` | huge pages in reserve |
//! | `share.rs` | giving back, while the guest waits, what was copied for nothing |

mod runs;
mod share;
mod spares;

use std::{ops::Range, os::fd::BorrowedFd};

use firn_pages::REGION;
use firn_proto::control::{MemoryPlan, PageRun};

use self::runs::extent;
pub use self::{
    share::share_again,
    spares::{Spares, furnish},
};
use crate::memory::{Memory, MemoryError, source};

const REGION_BYTES: usize = REGION as usize;

/// A plan can't be carried out.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// Its runs are not what runs of pages of this memory can be.
    #[error("plan for guest memory: {0}")]
    Malformed(String),
    /// The kernel refused.
    #[error("plan for guest memory: {what}: {source}")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// Its answer.
        source: std::io::Error,
    },
    /// The snapshot's memory can't be mapped.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

fn kernel(what: &'static str) -> PlanError {
    PlanError::Kernel { what, source: std::io::Error::last_os_error() }
}

/// Carries out `plan`. `file` is the snapshot's memory, which is mapped over `memory`. Returns the
/// ranges of regions that were copied whole.
///
/// # Errors
/// Any [`PlanError`]. Some pages may have been copied then.
pub fn carry_out(
    plan: &MemoryPlan,
    memory: &Memory,
    file: BorrowedFd<'_>,
    spares: &mut Spares,
) -> Result<Vec<Range<u64>>, PlanError> {
    for list in [&plan.holes, &plan.copied, &plan.populated] {
        runs::check(list, memory.bytes())?;
    }
    let regions = runs::groups(&plan.copied, memory.bytes())?;
    map_holes(&plan.holes, memory)?;
    map_regions(&regions, memory, spares)?;
    copy(&plan.copied, memory, file)?;
    populate(&plan.populated, memory);
    Ok(regions)
}

/// Gives the guest memory of its own where the snapshot has holes. The runs are checked.
fn map_holes(holes: &[PageRun], memory: &Memory) -> Result<(), PlanError> {
    for run in holes {
        let (offset, bytes) = extent(run);
        // Clones wait in large numbers, and most touch a page here and there: a huge page for each
        // would be most of what they hold.
        // SAFETY: whole pages within guest memory, as was checked; no vCPU runs, and devices hold
        // addresses, not contents.
        unsafe { map_zeroes(memory.host_pointer(offset), bytes, libc::MADV_NOHUGEPAGE)? };
    }
    Ok(())
}

/// Puts huge pages where regions are to be copied: those in reserve, while there are enough. The
/// regions are of checked runs.
fn map_regions(
    regions: &[Range<u64>],
    memory: &Memory,
    spares: &mut Spares,
) -> Result<(), PlanError> {
    for group in regions {
        let target = memory.host_pointer(group.start * REGION);
        let count = (group.end - group.start) as usize;
        // SAFETY: whole regions within guest memory, as `groups` has checked, which is aligned
        // to them; no vCPU runs, and devices hold addresses, not contents.
        unsafe {
            if !spares.move_to(target, count)? {
                map_zeroes(target, count * REGION_BYTES, libc::MADV_HUGEPAGE)?;
            }
        }
    }
    Ok(())
}

/// Copies pages from the snapshot. The runs are checked.
fn copy(copied: &[PageRun], memory: &Memory, file: BorrowedFd<'_>) -> Result<(), PlanError> {
    if copied.is_empty() {
        return Ok(());
    }
    let source = source::map(file, memory.bytes())?;
    for run in copied {
        let (offset, bytes) = extent(run);
        let from = &source[offset as usize..offset as usize + bytes];
        let target = memory.host_pointer(offset);
        // SAFETY: the range has been checked against the size of guest memory, which is the
        // view's, too; they are different mappings; nobody else writes either meanwhile.
        unsafe { target.copy_from_nonoverlapping(from.as_ptr(), bytes) };
    }
    Ok(())
}

/// Has pages copied one by one now, not when they are written. The runs are checked.
fn populate(populated: &[PageRun], memory: &Memory) {
    for run in populated {
        let (offset, bytes) = extent(run);
        let target = memory.host_pointer(offset).cast();
        // SAFETY: the range lies within guest memory, and the advice changes no contents. Where
        // the kernel does not know it, pages are copied when they are written.
        unsafe { libc::madvise(target, bytes, libc::MADV_POPULATE_WRITE) };
    }
}

/// Maps fresh zeroes in place of what is mapped there, with advice on the size of their pages.
///
/// # Safety
/// The range is of whole pages that belong to the caller.
unsafe fn map_zeroes(target: *mut u8, bytes: usize, advice: i32) -> Result<(), PlanError> {
    // SAFETY: the caller's promise.
    let mapped = unsafe {
        libc::mmap(
            target.cast(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(kernel("mmap of zeroes"));
    }
    // SAFETY: advice on the mapping that was just made.
    unsafe { libc::madvise(target.cast(), bytes, advice) };
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        os::{
            fd::AsFd,
            unix::fs::{FileExt, MetadataExt},
        },
    };

    use firn_pages::PAGE;
    use firn_proto::control::MAX_RUNS;
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::{runs::REGION_PAGES, *};
    use crate::memory::source::tests::{seal, sealable};

    pub(super) fn run(first: u32, pages: u32) -> PageRun {
        PageRun { first, pages }
    }

    const HOLE: Range<u64> = 3 * REGION_PAGES..4 * REGION_PAGES;

    /// What [`snapshot`] holds.
    fn contents() -> Vec<u8> {
        let mut bytes = vec![0; 16 << 20];
        for (number, page) in (0..).zip(bytes.chunks_mut(PAGE as usize)) {
            if !HOLE.contains(&number) {
                page.fill(number as u8 | 1);
            }
        }
        bytes
    }

    /// 16 MiB in which every page holds its own number, but for region 3, which is a hole.
    pub(super) fn snapshot() -> File {
        let file = sealable();
        let contents = contents();
        for range in [0..HOLE.start * PAGE, HOLE.end * PAGE..16 << 20] {
            let bytes = &contents[range.start as usize..range.end as usize];
            file.write_all_at(bytes, range.start).unwrap();
        }
        seal(&file);
        file
    }

    fn occupied(file: &File) -> u64 {
        file.metadata().unwrap().blocks() * 512
    }

    fn thawed(plan: &MemoryPlan, spares: u16) -> Result<(Memory, File), PlanError> {
        let (memory, file) = (Memory::reserve(16).unwrap(), snapshot());
        memory.map_file(file.as_fd()).unwrap();
        let mut spares = Spares::make(spares).unwrap();
        carry_out(plan, &memory, file.as_fd(), &mut spares)?;
        spares.release();
        Ok((memory, file))
    }

    fn same(memory: &Memory) -> bool {
        // SAFETY: there is no guest and no device.
        unsafe { memory.contents() == contents() }
    }

    #[test]
    fn contents_are_the_snapshots_whatever_the_plan() {
        // Regions 1 and 2 whole, 3 as the hole that it is, 5 whole; the reserve holds all, some,
        // or none of them.
        let copied = vec![run(512, 1024), run(2560, 512)];
        for spares in [0, 1, 3, 8] {
            let populated = vec![run(10, 20), run(3000, 1)];
            let plan = MemoryPlan { copied: copied.clone(), populated, ..Default::default() };
            let (memory, file) = thawed(&plan, spares).unwrap();
            assert!(same(&memory));
            // Writes are private, copied page or not.
            for page in [0u64, 512, 2561, 4095] {
                memory.guest().write_obj(0u8, GuestAddress(page * PAGE)).unwrap();
            }
            assert!(!same(&memory));
            memory.map_file(file.as_fd()).unwrap();
            assert!(same(&memory), "the file has changed");
        }
    }

    #[test]
    fn holes_of_the_snapshot_stay_holes() {
        let plan = MemoryPlan {
            holes: vec![run(1536, 512)],
            // Data with the hole between them: all three regions are copied whole.
            copied: vec![run(1024, 512), run(2048, 512)],
            ..Default::default()
        };
        for holes in [vec![run(1536, 512)], vec![run(1536, 100), run(1700, 348)]] {
            let plan = MemoryPlan { holes, copied: vec![], ..plan.clone() };
            let (memory, file) = thawed(&plan, 0).unwrap();
            let before = occupied(&file);
            for page in (1536u64..1636).chain(1700..2048) {
                let _ = memory.guest().read_obj::<u8>(GuestAddress(page * PAGE)).unwrap();
                memory.guest().write_obj(7u8, GuestAddress(page * PAGE + 8)).unwrap();
            }
            assert_eq!(occupied(&file), before);
            assert_eq!(before, (16 << 20) - REGION);
        }
        let (memory, file) = thawed(&plan, 1).unwrap();
        assert_eq!(occupied(&file), (16 << 20) - REGION);
        assert!(same(&memory));
    }

    #[test]
    fn plans_that_do_not_fit_are_refused() {
        for copied in [
            vec![run(4096, 1)],
            vec![run(4095, 2)],
            vec![run(u32::MAX, u32::MAX)],
            vec![run(5, 0)],
            vec![run(5, 5), run(9, 1)],
            vec![run(9, 1), run(5, 1)],
            vec![run(1, 1); MAX_RUNS + 1],
        ] {
            let none = MemoryPlan::default();
            for plan in [
                MemoryPlan { copied: copied.clone(), ..none.clone() },
                MemoryPlan { populated: copied.clone(), ..none.clone() },
                MemoryPlan { holes: copied.clone(), ..none },
            ] {
                assert!(matches!(thawed(&plan, 1), Err(PlanError::Malformed(_))), "{plan:?}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_plan_is_carried_out_or_refused(
            runs in proptest::collection::vec((0u32..4200, 0u32..1200), 0..6),
            populated in any::<bool>(),
        ) {
            let runs: Vec<_> = runs.into_iter().map(|(first, pages)| run(first, pages)).collect();
            let plan = match populated {
                true => MemoryPlan { populated: runs, ..Default::default() },
                false => MemoryPlan { copied: runs, ..Default::default() },
            };
            if let Ok((memory, _file)) = thawed(&plan, 2) {
                // Pages of a copied region that no run names are zero, so compare what is named.
                let contents = contents();
                for run in plan.copied.iter().chain(&plan.populated) {
                    let (offset, bytes) = extent(run);
                    let range = offset as usize..offset as usize + bytes;
                    // SAFETY: there is no guest and no device.
                    let same = unsafe { memory.contents()[range.clone()] == contents[range] };
                    prop_assert!(same);
                }
            }
        }
    }
}
