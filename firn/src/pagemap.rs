//! A VMM's page tables, as the kernel tells them to it.

use std::{fs::File, io, os::fd::OwnedFd};

use rustix::thread::{CapabilitySet, CapabilitySets};

/// Opens a VMM's pagemap for it to read. The kernel tells whoever reads it physical addresses if
/// the opener could know them; a VMM must not.
pub(crate) fn open(pid: u32) -> io::Result<OwnedFd> {
    let path = format!("/proc/{pid}/pagemap");
    let _without = WithoutAdmin::new()?;
    Ok(File::open(path)?.into())
}

/// This thread lacks CAP_SYS_ADMIN until it is dropped.
struct WithoutAdmin(CapabilitySets);

impl WithoutAdmin {
    fn new() -> io::Result<Self> {
        let before = rustix::thread::capabilities(None)?;
        let effective = before.effective - CapabilitySet::SYS_ADMIN;
        rustix::thread::set_capabilities(None, CapabilitySets { effective, ..before })?;
        Ok(Self(before))
    }
}

impl Drop for WithoutAdmin {
    fn drop(&mut self) {
        // Taking back what is still permitted is always allowed.
        let _ = rustix::thread::set_capabilities(None, self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_pagemap_tells_no_physical_addresses_and_capabilities_come_back() {
        let before = rustix::thread::capabilities(None).unwrap();
        let pagemap = File::from(open(std::process::id()).unwrap());
        let after = rustix::thread::capabilities(None).unwrap();
        assert_eq!(before.effective, after.effective);
        let witness = 1u8;
        let address = (&raw const witness) as u64;
        let mut entry = [0; 8];
        pagemap.read_exact_at(&mut entry, address / 4096 * 8).unwrap();
        let entry = u64::from_ne_bytes(entry);
        assert_eq!(entry >> 63, 1, "the page is in memory");
        assert_eq!(entry & ((1 << 55) - 1), 0, "its frame is not told");
    }
}
