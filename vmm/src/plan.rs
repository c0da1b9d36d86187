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

use std::{
    ops::Range,
    os::fd::{AsRawFd, BorrowedFd},
    ptr::NonNull,
};

use firn_pages::{PAGE, REGION};
use firn_proto::control::{MAX_RUNS, MAX_SPARES, MemoryPlan, PageRun};

use crate::memory::{
    Memory, MemoryError,
    source::{self, Source},
};

const REGION_BYTES: usize = REGION as usize;
const REGION_PAGES: u64 = REGION / PAGE;

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

/// Huge pages in reserve: one private range, zeroed and present as far as the kernel had memory.
#[derive(Debug)]
pub struct Spares {
    start: NonNull<u8>,
    left: usize,
}

// SAFETY: the range belongs to this value alone and to no thread.
unsafe impl Send for Spares {}

impl Spares {
    /// Makes `count` of them.
    ///
    /// # Errors
    /// [`PlanError::Malformed`] if they are too many, [`PlanError::Kernel`] if there is no address
    /// space. That memory is scarce is no error: a thaw then waits for it.
    pub fn make(count: u16) -> Result<Self, PlanError> {
        if count > MAX_SPARES {
            return Err(PlanError::Malformed(format!(
                "{count} huge pages in reserve exceed {MAX_SPARES}"
            )));
        }
        let left = usize::from(count);
        if left == 0 {
            return Ok(Self { start: NonNull::dangling(), left });
        }
        let bytes = left * REGION_BYTES;
        // SAFETY: a new private anonymous mapping at an address of the kernel's choice.
        let pointer = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes + REGION_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if pointer == libc::MAP_FAILED {
            return Err(kernel("cannot reserve huge pages"));
        }
        let start = NonNull::new(pointer.cast::<u8>()).ok_or_else(|| kernel("mmap gave null"))?;
        // SAFETY: the padding is less than the one region that was mapped beyond `bytes`.
        let start = unsafe { start.add(start.as_ptr().align_offset(REGION_BYTES)) };
        // SAFETY: advice on our own mapping. Without huge pages, or without enough memory, pages
        // come when they are first written.
        unsafe {
            libc::madvise(start.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE);
            libc::madvise(start.as_ptr().cast(), bytes, libc::MADV_POPULATE_WRITE);
        }
        Ok(Self { start, left })
    }

    /// Moves the last `count` of them to `target`, in place of what is mapped there; false if
    /// there are not that many.
    ///
    /// # Safety
    /// `target` is aligned to [`REGION`], and `count` regions from it belong to the caller.
    unsafe fn move_to(&mut self, target: *mut u8, count: usize) -> Result<bool, PlanError> {
        let Some(left) = self.left.checked_sub(count) else { return Ok(false) };
        let bytes = count * REGION_BYTES;
        // SAFETY: the source lies within our own range, whose last `count` regions nobody uses and
        // which are forgotten below; the target is the caller's.
        let moved = unsafe {
            libc::mremap(
                self.start.as_ptr().add(left * REGION_BYTES).cast(),
                bytes,
                bytes,
                libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                target,
            )
        };
        if moved == libc::MAP_FAILED {
            return Err(kernel("mremap"));
        }
        self.left = left;
        Ok(true)
    }

    /// Gives back what is left.
    pub fn release(&mut self) {
        if self.left > 0 {
            // SAFETY: the range is our own, and nothing refers to it.
            unsafe { libc::munmap(self.start.as_ptr().cast(), self.left * REGION_BYTES) };
            self.left = 0;
        }
    }
}

impl Drop for Spares {
    fn drop(&mut self) {
        self.release();
    }
}

/// Moves spares to whole regions of guest memory that nothing has been written to yet and a boot is
/// about to fill, range by range while there are enough. Ranges beyond guest memory are left out.
///
/// # Errors
/// [`PlanError::Kernel`].
pub fn furnish(
    regions: &[Range<u64>],
    memory: &Memory,
    spares: &mut Spares,
) -> Result<(), PlanError> {
    for range in regions {
        if range.is_empty() || range.end > memory.bytes() / REGION {
            continue;
        }
        let target = memory.host_pointer(range.start * REGION);
        // SAFETY: whole regions within guest memory, as just checked, which is aligned to them; no
        // vCPU runs, and devices hold addresses, not contents.
        if !unsafe { spares.move_to(target, (range.end - range.start) as usize)? } {
            break;
        }
    }
    Ok(())
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
    check(&plan.holes, memory.bytes())?;
    check(&plan.copied, memory.bytes())?;
    check(&plan.populated, memory.bytes())?;
    let copied = groups(&plan.copied, memory.bytes())?;
    for run in &plan.holes {
        let (offset, bytes) = extent(run);
        // Clones wait in large numbers, and most touch a page here and there: a huge page for each
        // would be most of what they hold.
        // SAFETY: whole pages within guest memory, as just checked; no vCPU runs, and devices hold
        // addresses, not contents.
        unsafe { map_zeroes(memory.host_pointer(offset), bytes, libc::MADV_NOHUGEPAGE)? };
    }
    for group in &copied {
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
    if !plan.copied.is_empty() {
        let source = source::map(file, memory.bytes())?;
        for run in &plan.copied {
            let (offset, bytes) = extent(run);
            let from = &source[offset as usize..offset as usize + bytes];
            let target = memory.host_pointer(offset);
            // SAFETY: the range has been checked against the size of guest memory, which is the
            // view's, too; they are different mappings; nobody else writes either meanwhile.
            unsafe { target.copy_from_nonoverlapping(from.as_ptr(), bytes) };
        }
    }
    for run in &plan.populated {
        let (offset, bytes) = extent(run);
        let target = memory.host_pointer(offset).cast();
        // SAFETY: the range lies within guest memory, and the advice changes no contents. Where
        // the kernel does not know it, pages are copied when they are written.
        unsafe { libc::madvise(target, bytes, libc::MADV_POPULATE_WRITE) };
    }
    Ok(copied)
}

/// Maps a range of regions that was copied from `file` anew, and copies only those pages that are
/// no longer what `source`, which is the same file, has. Returns how many pages are shared now.
///
/// # Errors
/// [`PlanError::Kernel`]; memory is then of no further use.
///
/// # Safety
/// No vCPU runs and no device is handling a request; [`carry_out`] has returned `group` for this
/// memory and file.
pub unsafe fn share_again(
    group: Range<u64>,
    memory: &Memory,
    file: BorrowedFd<'_>,
    source: &Source,
) -> Result<u64, PlanError> {
    const BYTES: usize = PAGE as usize;
    let mut shared = 0;
    // Region by region: what is kept meanwhile is then never more than one.
    for region in group {
        let start = memory.host_pointer(region * REGION);
        let mut kept: Vec<(usize, [u8; BYTES])> = Vec::new();
        for page in 0..REGION_PAGES as usize {
            // SAFETY: the page lies within guest memory, which nobody writes: the caller's promise.
            let now = unsafe { &*start.add(page * BYTES).cast::<[u8; BYTES]>() };
            let before = source.page(region * REGION_PAGES + page as u64);
            if !before.map_or_else(|| now.iter().all(|byte| *byte == 0), |before| before == now) {
                kept.push((page, *now));
            }
        }
        // SAFETY: the range is one whole region of guest memory, whose contents have been kept.
        let mapped = unsafe {
            libc::mmap(
                start.cast(),
                REGION_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                (region * REGION) as libc::off_t,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(kernel("mmap of the snapshot"));
        }
        shared += REGION_PAGES - kept.len() as u64;
        for (page, bytes) in kept {
            // SAFETY: as above; the mapping is writable and private.
            unsafe { start.add(page * BYTES).cast::<[u8; BYTES]>().write(bytes) };
        }
    }
    Ok(shared)
}

fn extent(run: &PageRun) -> (u64, usize) {
    (u64::from(run.first) * PAGE, (u64::from(run.pages) * PAGE) as usize)
}

/// Runs must be few, in order, disjoint, and within memory.
fn check(runs: &[PageRun], memory_bytes: u64) -> Result<(), PlanError> {
    if runs.len() > MAX_RUNS {
        return Err(PlanError::Malformed(format!("{} runs exceed {MAX_RUNS}", runs.len())));
    }
    let mut next = 0;
    for run in runs {
        let end = u64::from(run.first) + u64::from(run.pages);
        if run.pages == 0 || u64::from(run.first) < next || end * PAGE > memory_bytes {
            return Err(PlanError::Malformed(format!("{run:?} is out of place")));
        }
        next = end;
    }
    Ok(())
}

/// Maximal ranges of consecutive regions that checked runs lie in.
fn groups(runs: &[PageRun], memory_bytes: u64) -> Result<Vec<Range<u64>>, PlanError> {
    let mut groups: Vec<Range<u64>> = Vec::new();
    for run in runs {
        let start = u64::from(run.first) / REGION_PAGES;
        let end = (u64::from(run.first) + u64::from(run.pages)).div_ceil(REGION_PAGES);
        if end * REGION > memory_bytes {
            return Err(PlanError::Malformed(format!("{run:?} is in a region that is not whole")));
        }
        match groups.last_mut() {
            Some(last) if start <= last.end => last.end = last.end.max(end),
            _ => groups.push(start..end),
        }
    }
    Ok(groups)
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

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::source::tests::{seal, sealable};

    const MIB: u64 = 1 << 20;

    fn run(first: u32, pages: u32) -> PageRun {
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
    fn snapshot() -> File {
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

    #[test]
    fn spares_take_the_place_of_empty_regions_while_there_are_enough() {
        let memory = Memory::reserve(16).unwrap();
        let mut spares = Spares::make(3).unwrap();
        // Nothing, beyond memory, fits, fits, no longer fits.
        furnish(&[4..4, 7..9, 0..1, 6..8, 2..3], &memory, &mut spares).unwrap();
        assert_eq!(spares.left, 0);
        // SAFETY: there is no guest and no device.
        assert!(unsafe { memory.contents() }.iter().all(|byte| *byte == 0));
        memory.guest().write_slice(&[7; 4096], GuestAddress(6 * REGION)).unwrap();
        assert_eq!(memory.guest().read_obj::<u8>(GuestAddress(6 * REGION + 4095)).unwrap(), 7);
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
    fn what_was_not_written_is_shared_again_and_what_was_is_kept() {
        let (memory, file) = (Memory::reserve(16).unwrap(), snapshot());
        memory.map_file(file.as_fd()).unwrap();
        let copied = vec![run(512, 1024), run(1600, 1)];
        let plan = MemoryPlan { copied, ..Default::default() };
        let copied = carry_out(&plan, &memory, file.as_fd(), &mut Spares::make(1).unwrap());
        let copied = copied.unwrap();
        assert_eq!(copied, vec![1..4]);
        for page in [513u64, 1024, 1535, 1700] {
            memory.guest().write_obj(0xeeu8, GuestAddress(page * PAGE + 7)).unwrap();
        }
        // SAFETY: there is no guest and no device.
        let before = unsafe { memory.contents().to_vec() };
        let source = Source::of(file.as_fd(), memory.bytes()).unwrap();
        // SAFETY: as above; this is what the plan came to.
        let shared =
            copied.into_iter().map(|g| unsafe { share_again(g, &memory, file.as_fd(), &source) });
        assert_eq!(shared.map(Result::unwrap).sum::<u64>(), 3 * 512 - 4);
        // SAFETY: as above.
        assert!(unsafe { memory.contents() } == before);
        memory.guest().write_obj(1u8, GuestAddress(600 * PAGE)).unwrap();
        assert_eq!(source.page(600).unwrap()[0], 0x59);
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
        assert!(matches!(Spares::make(MAX_SPARES + 1), Err(PlanError::Malformed(_))));
        // 17 MiB end in half a region.
        assert!(groups(&[run(4096, 1)], 17 * MIB).is_err());
        assert_eq!(groups(&[run(4095, 1)], 17 * MIB).unwrap(), vec![7..8]);
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
