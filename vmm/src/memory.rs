//! Guest memory: one reservation of host address space, made once and never moved.
//!
//! ```text
//!  guest physical                      host virtual          file (snapshot)
//!  0          ┌────────────┐           base ┌──────┐         0 ┌──────┐
//!             │ low RAM    │  ───────────▶  │      │  ◀─────── │      │
//!  ≤ 3 GiB    ├────────────┤                ├──────┤           ├──────┤
//!             │ devices    │                │ high │  ◀─────── │ high │
//!  4 GiB      ├────────────┤  ───────────▶  └──────┘           └──────┘
//!             │ high RAM   │
//!             └────────────┘
//! ```
//!
//! The range is registered with KVM while it is still empty; a thaw maps the snapshot's file over
//! it (`MAP_PRIVATE|MAP_FIXED`), which changes contents but no address, so neither KVM's memslots
//! nor any device's view of memory has to change.

pub mod save;
pub mod source;
pub mod written;

use std::{
    os::fd::{AsRawFd, BorrowedFd},
    ptr::NonNull,
    sync::Arc,
};

use firn_pages::{PAGE, REGION, mapping::SealedError};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

/// Guest memory as devices see it.
pub type GuestMemory = GuestMemoryMmap<()>;

/// End of low RAM at most: what lies from here to 4 GiB belongs to devices.
pub const LOW_RAM_END: u64 = 3 << 30;

/// Start of high RAM.
pub const HIGH_RAM_START: u64 = 4 << 30;

/// Smallest and largest guest memory in MiB.
pub const MEMORY_MIB: std::ops::RangeInclusive<u32> = 16..=10_240;

/// Huge pages can back the range only if it starts where one does.
const ALIGNMENT: usize = REGION as usize;

/// Guest memory can't be had or mapped.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Size out of range.
    #[error("guest memory of {0} MiB is not within 16 to 10240 MiB")]
    Size(u32),
    /// The address space can't be reserved.
    #[error("cannot reserve {bytes} bytes for guest memory: {source}")]
    Reserve {
        /// Bytes wanted.
        bytes: usize,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// The file to map is shorter than guest memory.
    #[error("memory file has {found} bytes, guest memory has {expected}")]
    FileSize {
        /// Length of the file in bytes.
        found: u64,
        /// Size of guest memory in bytes.
        expected: u64,
    },
    /// The file can't be mapped.
    #[error("cannot map the memory file: {0}")]
    Map(std::io::Error),
    /// The file can't be mapped for reading.
    #[error("cannot read the memory file: {0}")]
    Source(SealedError),
    /// The ranges don't make a guest memory (never on a layout made here).
    #[error("guest memory layout: {0}")]
    Layout(String),
}

/// One contiguous piece of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Guest physical start.
    pub start: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// Where it starts in a linear memory file.
    pub file_offset: u64,
}

/// The pieces of guest memory of `bytes` bytes in all.
pub fn layout(bytes: u64) -> Vec<Region> {
    let low = bytes.min(LOW_RAM_END);
    let mut regions = vec![Region { start: 0, bytes: low, file_offset: 0 }];
    if bytes > low {
        regions.push(Region { start: HIGH_RAM_START, bytes: bytes - low, file_offset: low });
    }
    regions
}

/// Guest memory over its reservation. There is one a process, and it is never unmapped: devices
/// share it with no word about how long.
#[derive(Debug)]
pub struct Memory {
    guest: Arc<GuestMemory>,
    regions: Vec<Region>,
    base: NonNull<u8>,
    bytes: u64,
}

// SAFETY: `base` points to a mapping that is never undone and belongs to no thread.
unsafe impl Send for Memory {}
// SAFETY: shared access hands out raw addresses and `GuestMemory`, which is Sync itself.
unsafe impl Sync for Memory {}

impl Memory {
    /// Reserves and maps `mib` MiB of zeroes, lazily.
    ///
    /// # Errors
    /// [`MemoryError::Size`], [`MemoryError::Reserve`].
    pub fn reserve(mib: u32) -> Result<Self, MemoryError> {
        if !MEMORY_MIB.contains(&mib) {
            return Err(MemoryError::Size(mib));
        }
        let bytes = u64::from(mib) << 20;
        let reserved = bytes as usize + 2 * ALIGNMENT;
        // SAFETY: a new private anonymous mapping at an address of the kernel's choice overlaps
        // nothing. NORESERVE: the cgroup, not overcommit, limits what the guest can use.
        let pointer = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                reserved,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        let reserve_error =
            || MemoryError::Reserve { bytes: reserved, source: std::io::Error::last_os_error() };
        if pointer == libc::MAP_FAILED {
            return Err(reserve_error());
        }
        let start = NonNull::new(pointer.cast::<u8>()).ok_or_else(reserve_error)?;
        // What is left over stays inaccessible, at least a page on either side: who runs off the
        // guest's memory finds nothing of ours.
        let padding =
            PAGE as usize + start.as_ptr().wrapping_add(PAGE as usize).align_offset(ALIGNMENT);
        // SAFETY: `padding <= ALIGNMENT`, so the result and `bytes` behind it lie in the mapping,
        // which does not end there.
        let base = unsafe { start.add(padding) };
        // SAFETY: the range is our own new mapping, to which nothing refers yet.
        let opened = unsafe {
            libc::mprotect(base.as_ptr().cast(), bytes as usize, libc::PROT_READ | libc::PROT_WRITE)
        };
        if opened != 0 {
            return Err(reserve_error());
        }
        let regions = layout(bytes);
        let mapped = regions
            .iter()
            .map(|region| {
                // SAFETY: the sub-range lies in the reservation, which is never unmapped and stays
                // readable and writable.
                let raw = unsafe {
                    MmapRegion::build_raw(
                        base.as_ptr().add(region.file_offset as usize),
                        region.bytes as usize,
                        libc::PROT_READ | libc::PROT_WRITE,
                        libc::MAP_PRIVATE | libc::MAP_NORESERVE,
                    )
                }
                .map_err(|e| MemoryError::Layout(e.to_string()))?;
                GuestRegionMmap::new(raw, GuestAddress(region.start))
                    .ok_or_else(|| MemoryError::Layout(format!("{region:?} wraps around")))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let guest =
            GuestMemory::from_regions(mapped).map_err(|e| MemoryError::Layout(e.to_string()))?;
        Ok(Self { guest: Arc::new(guest), regions, base, bytes })
    }

    /// Guest memory for devices and loaders.
    pub fn guest(&self) -> &Arc<GuestMemory> {
        &self.guest
    }

    /// The pieces, for memslots and memory maps.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Host address of a region's first byte.
    pub fn host_address(&self, region: &Region) -> u64 {
        self.base.as_ptr() as u64 + region.file_offset
    }

    /// Host address of the byte at `file_offset` of a linear memory file, which must lie within
    /// guest memory.
    pub fn host_pointer(&self, file_offset: u64) -> *mut u8 {
        debug_assert!(file_offset < self.bytes);
        self.base.as_ptr().wrapping_add(file_offset as usize)
    }

    /// Asks for huge pages: a booting guest then faults on 2 MiB regions, not on 4 KiB pages.
    pub fn advise_huge(&self) {
        // SAFETY: advice on a range that we own changes no contents. Failure only costs time.
        unsafe {
            libc::madvise(self.base.as_ptr().cast(), self.bytes as usize, libc::MADV_HUGEPAGE)
        };
    }

    /// Maps a linear memory file privately over guest memory. What was there is gone.
    ///
    /// # Errors
    /// [`MemoryError::FileSize`] if the file is too short, [`MemoryError::Map`].
    pub fn map_file(&self, file: BorrowedFd<'_>) -> Result<(), MemoryError> {
        let found = rustix::fs::fstat(file).map_err(|e| MemoryError::Map(e.into()))?.st_size as u64;
        if found < self.bytes {
            return Err(MemoryError::FileSize { found, expected: self.bytes });
        }
        // Low and high RAM follow each other both here and in the file: one mapping serves both.
        // SAFETY: the fixed range lies wholly inside our own reservation, so no other mapping is
        // replaced; the guest memory over it holds addresses, not contents, and accesses them
        // only volatilely, so replacing contents under it is sound.
        let pointer = unsafe {
            libc::mmap(
                self.base.as_ptr().cast(),
                self.bytes as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
        if pointer == libc::MAP_FAILED {
            return Err(MemoryError::Map(std::io::Error::last_os_error()));
        }
        Ok(())
    }

    /// All of guest memory in file order, while no vCPU runs.
    ///
    /// # Safety
    /// Nothing may write guest memory while the slice lives: all vCPUs are stopped and no device
    /// is handling a request.
    pub unsafe fn contents(&self) -> &[u8] {
        // SAFETY: the range is mapped and readable for ever; that nobody writes it
        // is the caller's promise.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.bytes as usize) }
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::fd::AsFd};

    use vm_memory::{Bytes, GuestMemoryBackend};

    use super::{source::tests::sealable, *};

    #[test]
    fn small_memory_is_one_region_and_large_memory_leaves_the_gap() {
        assert_eq!(layout(128 << 20).len(), 1);
        let large = layout(4 << 30);
        assert_eq!(large[1], Region { start: 4 << 30, bytes: 1 << 30, file_offset: 3 << 30 });
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        assert!(matches!(Memory::reserve(15), Err(MemoryError::Size(15))));
        assert!(matches!(Memory::reserve(10_241), Err(MemoryError::Size(10_241))));
    }

    #[test]
    fn base_is_aligned_for_huge_pages() {
        let memory = Memory::reserve(16).unwrap();
        assert_eq!(memory.host_address(&memory.regions()[0]) % (2 << 20), 0);
        assert_eq!(memory.guest().num_regions(), 1);
    }

    #[test]
    fn nothing_accessible_borders_on_it() {
        let memory = Memory::reserve(16).unwrap();
        let start = memory.host_address(&memory.regions()[0]);
        let (mut before, mut after) = (false, false);
        for line in std::fs::read_to_string("/proc/self/maps").unwrap().lines() {
            let (range, rest) = line.split_once(' ').unwrap();
            let (from, to) = range.split_once('-').unwrap();
            let address = |text| u64::from_str_radix(text, 16).unwrap();
            let closed = rest.starts_with("---");
            before |= closed && address(to) == start;
            after |= closed && address(from) == start + memory.bytes();
        }
        assert!(before && after);
    }

    #[test]
    fn a_mapped_file_shows_and_writes_stay_private() {
        let memory = Memory::reserve(16).unwrap();
        let mut file = sealable();
        file.write_all(&vec![7u8; 16 << 20]).unwrap();
        memory.map_file(file.as_fd()).unwrap();
        let at = GuestAddress(0x1234);
        assert_eq!(memory.guest().read_obj::<u8>(at).unwrap(), 7);
        memory.guest().write_obj(9u8, at).unwrap();
        memory.map_file(file.as_fd()).unwrap();
        assert_eq!(memory.guest().read_obj::<u8>(at).unwrap(), 7);
    }

    #[test]
    fn a_short_file_is_refused() {
        let memory = Memory::reserve(16).unwrap();
        let file = sealable();
        file.set_len((16 << 20) - 1).unwrap();
        assert!(matches!(memory.map_file(file.as_fd()), Err(MemoryError::FileSize { .. })));
    }
}
