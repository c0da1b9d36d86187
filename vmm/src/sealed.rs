//! Sealed files as plain memory. A file that can neither change nor shrink may be looked at as a
//! slice: what is there once is there for ever. Files without seals must be read instead.

use std::{ops::Deref, os::fd::AsFd, ptr::NonNull};

use rustix::{
    fs::SealFlags,
    mm::{MapFlags, ProtFlags},
};

/// A file's last huge page is mapped as one only if the mapping holds all of it.
const HUGE: usize = 2 << 20;

/// A sealed file, mapped for reading.
#[derive(Debug)]
pub struct Sealed {
    address: NonNull<u8>,
    /// Length of the file.
    bytes: usize,
    /// Length of the mapping, whose end lies behind the file's.
    mapped: usize,
}

impl Sealed {
    /// Maps all of `file`; `None` if it is empty, is not sealed against writing and shrinking, or
    /// can't be mapped.
    pub fn map(file: impl AsFd) -> Option<Self> {
        let needed = SealFlags::WRITE | SealFlags::SHRINK;
        if !rustix::fs::fcntl_get_seals(&file).ok()?.contains(needed) {
            return None;
        }
        let bytes = usize::try_from(rustix::fs::fstat(&file).ok()?.st_size).ok()?;
        let mapped = bytes.checked_next_multiple_of(HUGE)?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let address = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                mapped,
                ProtFlags::READ,
                MapFlags::SHARED,
                &file,
                0,
            )
        };
        Some(Self { address: NonNull::new(address.ok()?.cast())?, bytes, mapped })
    }
}

impl Deref for Sealed {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `bytes` bytes from `address` are mapped readable until drop, and within the file.
        // The seals, which can't be taken off, keep it from changing and from ending earlier.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr(), self.bytes) }
    }
}

impl Drop for Sealed {
    fn drop(&mut self) {
        // SAFETY: the range is this value's own mapping, and no slice of it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.address.as_ptr().cast(), self.mapped) };
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write};

    use rustix::fs::{MemfdFlags, fcntl_add_seals, memfd_create};

    use super::*;

    #[test]
    fn only_what_can_not_change_is_mapped() {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let mut file = File::from(memfd_create("test", flags).unwrap());
        file.write_all(b"content").unwrap();
        assert!(Sealed::map(&file).is_none());
        fcntl_add_seals(&file, SealFlags::WRITE).unwrap();
        assert!(Sealed::map(&file).is_none(), "it could still shrink");
        fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        assert_eq!(&*Sealed::map(&file).unwrap(), b"content");
    }

    #[test]
    fn ordinary_and_empty_files_are_not_mapped() {
        assert!(Sealed::map(File::open("/proc/self/exe").unwrap()).is_none());
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let empty = memfd_create("test", flags).unwrap();
        fcntl_add_seals(&empty, SealFlags::WRITE | SealFlags::SHRINK).unwrap();
        assert!(Sealed::map(&empty).is_none());
    }
}
