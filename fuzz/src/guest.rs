//! Guest memory of a fuzzed device.
//!
//! ```text
//!  0          ┌───────────────┐          host: each region between pages that nobody may touch
//!  0x1000     │ rings         │
//!  DATA       │ buffers       │
//!  LOW_BYTES  ├───────────────┤
//!             │ nothing       │
//!  HIGH       ├───────────────┤
//!             │ more buffers  │
//!             └───────────────┘
//! ```
//!
//! An access of this process past the end of a region ends it; one of the kernel's fails.

use std::sync::{Arc, LazyLock};

use arbitrary::{Arbitrary, Unstructured};
use firn_vmm::memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MmapRegion};

/// Bytes of each region.
pub const REGION: u64 = 64 << 10;

/// Start of the second region.
pub const HIGH: u64 = 1 << 20;

/// Where the rings of queue 0 lie; those of the others follow.
pub const RINGS: u64 = 0x1000;

/// Bytes of address space of one queue's rings.
pub const RING: u64 = 0x3000;

/// Where buffers begin in the first region.
pub const DATA: u64 = 0xa000;

const GUARD: usize = 64 << 10;

struct Mapped {
    guest: Arc<GuestMemory>,
    /// Host addresses of the regions.
    regions: [usize; 2],
}

static MEMORY: LazyLock<Mapped> = LazyLock::new(|| {
    let bytes = REGION as usize;
    let total = 3 * GUARD + 2 * bytes;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), total, libc::PROT_NONE, flags, -1, 0) };
    assert_ne!(base, libc::MAP_FAILED, "guest memory");
    let offsets = [GUARD, 2 * GUARD + bytes];
    let regions = offsets.map(|offset| {
        let at = base.cast::<u8>().wrapping_add(offset);
        // SAFETY: the range lies in the mapping that was just made and that nobody uses yet.
        assert_eq!(unsafe { libc::mprotect(at.cast(), bytes, access) }, 0);
        at
    });
    let map = |at: *mut u8, start| {
        // SAFETY: the range is readable and writable from here on, and is never unmapped.
        let region = unsafe { MmapRegion::build_raw(at, bytes, access, flags) };
        let region = region.expect("a page-aligned region");
        GuestRegionMmap::new(region, GuestAddress(start)).expect("a region that does not wrap")
    };
    let guest = GuestMemory::from_regions(vec![map(regions[0], 0), map(regions[1], HIGH)]);
    Mapped {
        guest: Arc::new(guest.expect("regions that do not overlap")),
        regions: regions.map(|at| at as usize),
    }
});

/// Guest memory, all zeroes. There is one of it: whoever has had it before must have let go.
pub fn memory() -> Arc<GuestMemory> {
    for at in MEMORY.regions {
        // SAFETY: the range is private anonymous memory of the static mapping; nothing holds a
        // reference into it, only addresses.
        let done =
            unsafe { libc::madvise(at as *mut libc::c_void, REGION as usize, libc::MADV_DONTNEED) };
        assert_eq!(done, 0);
    }
    MEMORY.guest.clone()
}

/// Writes what of `bytes` fits at `at`.
pub fn poke(memory: &GuestMemory, at: u64, bytes: &[u8]) {
    // Where nothing is, nothing is written.
    let _ = memory.write(bytes, GuestAddress(at));
}

/// A guest physical address, most often near one where something begins or ends.
#[derive(Debug, Clone, Copy)]
pub struct Address(pub u64);

impl Arbitrary<'_> for Address {
    fn arbitrary(u: &mut Unstructured<'_>) -> arbitrary::Result<Self> {
        let near =
            [DATA, DATA, RINGS, RINGS + RING, HIGH, HIGH, HIGH + REGION, REGION, 0, u64::MAX];
        let choice = u.int_in_range(0..=near.len())?;
        Ok(Self(match near.get(choice) {
            Some(near) => near.wrapping_add(i64::from(u.arbitrary::<i16>()?) as u64),
            None => u.arbitrary()?,
        }))
    }
}

/// A length, most often a short one.
#[derive(Debug, Clone, Copy)]
pub struct Length(pub u32);

impl Arbitrary<'_> for Length {
    fn arbitrary(u: &mut Unstructured<'_>) -> arbitrary::Result<Self> {
        Ok(Self(match u.int_in_range(0..=7)? {
            0 => u.arbitrary()?,
            1 => 512 * u32::from(u.arbitrary::<u8>()? % 64),
            2 | 3 => u.arbitrary::<u16>()?.into(),
            _ => u.arbitrary::<u8>()?.into(),
        }))
    }
}
