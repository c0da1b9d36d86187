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

/// Why a file is not mapped.
#[derive(Debug, thiserror::Error)]
pub enum SealedError {
    /// It may still change or shrink, or is no file that can be sealed.
    #[error("the file is not sealed against writing and shrinking")]
    Unsealed,
    /// The kernel refused; an empty file can't be mapped.
    #[error(transparent)]
    Io(#[from] std::io::Error),
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
        let length = rustix::fs::fstat(&file).map_err(std::io::Error::from)?.st_size;
        let bytes = usize::try_from(length).map_err(std::io::Error::other)?;
        let too_long = || std::io::Error::from(std::io::ErrorKind::FileTooLarge);
        let mapped = bytes.checked_next_multiple_of(HUGE).ok_or_else(too_long)?;
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
        let address = address.map_err(std::io::Error::from)?;
        let null = || std::io::Error::other("mmap gave null");
        Ok(Self { address: NonNull::new(address.cast()).ok_or_else(null)?, bytes, mapped })
    }
}

// SAFETY: the mapping belongs to no thread, and what is there never changes.
unsafe impl Send for Sealed {}

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
pub(crate) mod tests {
    use std::{fs::File, io::Write};

    use rustix::fs::{MemfdFlags, fcntl_add_seals, memfd_create};

    use super::*;

    /// An empty file that can be sealed.
    pub(crate) fn sealable() -> File {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        memfd_create("test", flags).unwrap().into()
    }

    pub(crate) fn seal(file: &File) {
        fcntl_add_seals(file, SealFlags::WRITE | SealFlags::SHRINK).unwrap();
    }

    #[test]
    fn only_what_can_not_change_is_mapped() {
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
        seal(&empty);
        assert!(matches!(Sealed::map(&empty), Err(SealedError::Io(_))));
    }
}
