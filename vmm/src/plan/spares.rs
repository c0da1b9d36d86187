//! Huge pages in reserve: made while a shell waits, moved to where guest memory is about to be written.

use std::{ops::Range, ptr::NonNull};

use firn_pages::REGION;
use firn_proto::control::MAX_SPARES;

use super::{PlanError, REGION_BYTES, kernel};
use crate::memory::Memory;

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
    pub unsafe fn move_to(&mut self, target: *mut u8, count: usize) -> Result<bool, PlanError> {
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

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

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

    #[test]
    fn too_many_are_refused() {
        assert!(matches!(Spares::make(MAX_SPARES + 1), Err(PlanError::Malformed(_))));
    }
}
