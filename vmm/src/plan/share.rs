//! Sharing again what was copied ahead and never written.

use std::{
    ops::Range,
    os::fd::{AsRawFd, BorrowedFd},
};

use firn_pages::{PAGE, REGION};

use super::{PlanError, REGION_BYTES, kernel, runs::REGION_PAGES};
use crate::memory::{Memory, source::Source};

/// Maps a range of regions that was copied from `file` anew, and copies only those pages that are
/// no longer what `source`, which is the same file, has. Returns how many pages are shared now.
///
/// # Errors
/// [`PlanError::Kernel`]; memory is then of no further use.
///
/// # Safety
/// No vCPU runs and no device is handling a request; [`carry_out`](super::carry_out) has returned `group` for this
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

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use firn_proto::control::MemoryPlan;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::plan::{
        Spares, carry_out,
        tests::{run, snapshot},
    };

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
}
