//! Files as plain memory.

use std::{
    io,
    ops::{Deref, DerefMut, Range},
    os::fd::AsFd,
    ptr::NonNull,
    slice,
};

use rustix::{
    fs::SealFlags,
    mm::{Advice, MapFlags, ProtFlags},
};

use crate::REGION;

/// A shared mapping of a file from its start.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping belongs to this value alone and to no thread.
unsafe impl Send for Mapping {}

impl Mapping {
    fn new(file: impl AsFd, bytes: usize, access: ProtFlags) -> io::Result<Self> {
        let any = std::ptr::null_mut();
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let start = unsafe { rustix::mm::mmap(any, bytes, access, MapFlags::SHARED, file, 0)? };
        let null = || io::Error::other("mmap gave null");
        Ok(Self { start: NonNull::new(start.cast()).ok_or_else(null)?, bytes })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this is all that `new` has mapped, and no slice of it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

/// A sealed file, mapped for reading. A file that can neither change nor shrink may be looked at as
/// a slice: what is there once is there for ever. Files without seals must be read instead.
#[derive(Debug)]
pub struct Sealed {
    /// A file's last huge page is mapped as one only if the mapping holds all of it: this one goes on
    /// to the end of a region.
    mapping: Mapping,
    /// Length of the file.
    bytes: usize,
}

/// Why a file is not mapped.
#[derive(Debug, thiserror::Error)]
pub enum SealedError {
    /// It may still change or shrink, or is no file that can be sealed.
    #[error("the file is not sealed against writing and shrinking")]
    Unsealed,
    /// The kernel refused; an empty file can't be mapped.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Sealed {
    /// Maps all of `file`.
    ///
    /// # Errors
    /// Any [`SealedError`].
    pub fn map(file: impl AsFd) -> Result<Self, SealedError> {
        let needed = SealFlags::WRITE | SealFlags::SHRINK;
        if !rustix::fs::fcntl_get_seals(&file).is_ok_and(|seals| seals.contains(needed)) {
            return Err(SealedError::Unsealed);
        }
        let length = rustix::fs::fstat(&file).map_err(io::Error::from)?.st_size;
        let bytes = usize::try_from(length).map_err(io::Error::other)?;
        let too_long = || io::Error::from(io::ErrorKind::FileTooLarge);
        let mapped = bytes.checked_next_multiple_of(REGION as usize).ok_or_else(too_long)?;
        Ok(Self { mapping: Mapping::new(file, mapped, ProtFlags::READ)?, bytes })
    }
}

impl Deref for Sealed {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `bytes` bytes are mapped readable until drop, and within the file. The seals, which
        // can't be taken off, keep it from changing and from ending earlier.
        unsafe { slice::from_raw_parts(self.mapping.start.as_ptr(), self.bytes) }
    }
}

/// A file that nobody else has, mapped for writing.
#[derive(Debug)]
pub struct Writable(Mapping);

impl Writable {
    /// Maps the first `bytes` bytes of `file`.
    ///
    /// # Errors
    /// The kernel's; an empty file can't be mapped.
    ///
    /// # Safety
    /// The file is at least so long and does not become shorter while this value lives, and nobody
    /// reads, writes or maps it otherwise while a slice of it does.
    pub unsafe fn map(file: impl AsFd, bytes: usize) -> io::Result<Self> {
        Ok(Self(Mapping::new(file, bytes, ProtFlags::READ | ProtFlags::WRITE)?))
    }

    /// Asks for huge pages in a range of bytes, of whole pages, before its first write. It is only
    /// advice: the kernel may not have them.
    ///
    /// # Panics
    /// The range does not lie in the mapping.
    pub fn advise_huge(&mut self, range: Range<usize>) {
        let part = &mut self[range];
        // SAFETY: the range is a slice of this mapping, and the advice changes no content.
        let _ = unsafe {
            rustix::mm::madvise(part.as_mut_ptr().cast(), part.len(), Advice::LinuxHugepage)
        };
    }
}

/// Nodes of a mask.
const NODES: usize = 1024;

impl Writable {
    /// Has the pages of the file that are not there yet come from these NUMA nodes in turns, whoever
    /// writes them first. Of a memory file that is kept, for as long as it lives.
    ///
    /// # Errors
    /// `InvalidInput` for nodes from 1,024 on; the kernel's, which for one is that none of them has
    /// memory that this process may use.
    pub fn interleave(&mut self, nodes: &[usize]) -> io::Result<()> {
        let mut mask = [0_u64; NODES / 64];
        for &node in nodes {
            let word = mask.get_mut(node / 64).ok_or(io::ErrorKind::InvalidInput)?;
            *word |= 1 << (node % 64);
        }
        // No longer than needed: a kernel made for fewer nodes refuses bits that it does not know.
        let bits = nodes.iter().max().map_or(0, |last| last + 1);
        // SAFETY: the range is this mapping, whose content the policy does not change; the mask has
        // `bits` bits, and the kernel reads one fewer than it is told.
        let done = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                self.0.start.as_ptr(),
                self.0.bytes,
                libc::MPOL_INTERLEAVE,
                mask.as_ptr(),
                bits + 1,
                0,
            )
        };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl Deref for Writable {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the bytes are mapped readable until drop, and within the file, which nobody changes
        // meanwhile: the promise of `map`'s caller.
        unsafe { slice::from_raw_parts(self.0.start.as_ptr(), self.0.bytes) }
    }
}

impl DerefMut for Writable {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; the mapping is writable, and the borrow of this value is unique.
        unsafe { slice::from_raw_parts_mut(self.0.start.as_ptr(), self.0.bytes) }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write, os::unix::fs::FileExt};

    use rustix::fs::{MemfdFlags, fcntl_add_seals, memfd_create};

    use super::*;

    fn sealable() -> File {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        memfd_create("test", flags).unwrap().into()
    }

    #[test]
    fn only_what_can_not_change_is_mapped_for_reading() {
        let mut file = sealable();
        file.write_all(b"content").unwrap();
        assert!(matches!(Sealed::map(&file), Err(SealedError::Unsealed)));
        fcntl_add_seals(&file, SealFlags::WRITE).unwrap();
        let error = Sealed::map(&file).unwrap_err();
        assert!(matches!(error, SealedError::Unsealed), "it could still shrink");
        fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        assert_eq!(&*Sealed::map(&file).unwrap(), b"content");
    }

    #[test]
    fn ordinary_and_empty_files_are_not_mapped() {
        let error = Sealed::map(File::open("/proc/self/exe").unwrap()).unwrap_err();
        assert!(matches!(error, SealedError::Unsealed));
        let empty = sealable();
        fcntl_add_seals(&empty, SealFlags::WRITE | SealFlags::SHRINK).unwrap();
        assert!(matches!(Sealed::map(&empty), Err(SealedError::Io(_))));
    }

    #[test]
    fn what_is_written_to_a_mapping_is_in_the_file() {
        let file = sealable();
        file.set_len(2 * REGION).unwrap();
        {
            // SAFETY: the file is this test's alone, and nothing else uses it meanwhile.
            let mut mapping = unsafe { Writable::map(&file, 2 * REGION as usize) }.unwrap();
            mapping.advise_huge(0..REGION as usize);
            mapping[REGION as usize..][..4].copy_from_slice(b"text");
            assert_eq!(mapping[REGION as usize + 1], b'e');
        }
        let mut bytes = [0; 5];
        file.read_exact_at(&mut bytes, REGION).unwrap();
        assert_eq!(&bytes, b"text\0");
        // Nothing maps it for writing any more.
        fcntl_add_seals(&file, SealFlags::WRITE).unwrap();
    }

    /// The policy is the file's: another mapping of it has it, too.
    #[test]
    fn pages_come_from_all_nodes_in_turns() {
        let file = sealable();
        file.set_len(1 << 20).unwrap();
        let map = || {
            // SAFETY: the file is so long, and nobody looks at its content.
            unsafe { Writable::map(&file, 1 << 20) }.unwrap()
        };
        let policy = |map: &Writable| {
            const OF_ADDRESS: libc::c_ulong = 2;
            let mut policy: libc::c_int = -1;
            let (none, address) = (std::ptr::null_mut::<u64>(), map.0.start.as_ptr());
            // SAFETY: the call writes the policy to the place that it is given, and no mask.
            let done = unsafe {
                libc::syscall(
                    libc::SYS_get_mempolicy,
                    &raw mut policy,
                    none,
                    0,
                    address,
                    OF_ADDRESS,
                )
            };
            assert_eq!(done, 0);
            policy
        };
        let (mut one, other) = (map(), map());
        assert_eq!(policy(&one), libc::MPOL_DEFAULT);
        if let Err(error) = one.interleave(&[0]) {
            assert_eq!(error.raw_os_error(), Some(libc::ENOSYS), "{error}");
            eprintln!("skipped: this kernel knows no NUMA");
            return;
        }
        assert_eq!((policy(&one), policy(&other)), (libc::MPOL_INTERLEAVE, libc::MPOL_INTERLEAVE));
        assert!(one.interleave(&[NODES]).is_err());
        assert!(one.interleave(&[]).is_err(), "no node");
    }
}
