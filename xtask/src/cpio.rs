//! Writes `newc` cpio archives, the format of an initramfs
//! (Linux `Documentation/driver-api/early-userspace/buffer-format.rst`).
//!
//! The kernel unpacks archives that follow each other as if they were one; later entries replace
//! earlier ones. Entries carry owner root and time 0, so the same input gives the same bytes.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;

/// One archive in the making.
pub struct Archive<W: Write> {
    to: W,
    inode: u32,
    directories: BTreeSet<String>,
}

impl<W: Write> Archive<W> {
    /// Starts an archive.
    pub fn new(to: W) -> Self {
        Self { to, inode: 0, directories: BTreeSet::new() }
    }

    /// Adds a directory and those above it, once each.
    pub fn directory(&mut self, path: &str) -> Result<()> {
        let path = path.trim_matches('/');
        if path.is_empty() || self.directories.contains(path) {
            return Ok(());
        }
        self.parents(path)?;
        self.header(path, DIRECTORY | 0o755, 0)?;
        self.directories.insert(path.to_owned());
        Ok(())
    }

    /// Adds a file with these bytes.
    pub fn file(&mut self, path: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        self.parents(path)?;
        self.header(path, REGULAR | (mode & 0o7777), bytes.len() as u64)?;
        self.to.write_all(bytes)?;
        self.pad(bytes.len() as u64)
    }

    /// Adds a copy of a file of this machine.
    pub fn copy(&mut self, path: &str, mode: u32, from: &Path) -> Result<()> {
        let context = || format!("cannot read {}", from.display());
        let mut file = File::open(from).with_context(context)?;
        let size = file.metadata().with_context(context)?.len();
        self.parents(path)?;
        self.header(path, REGULAR | (mode & 0o7777), size)?;
        let copied = io::copy(&mut file, &mut self.to).with_context(context)?;
        ensure!(copied == size, "{} changed while it was read", from.display());
        self.pad(size)
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<()> {
        self.parents(path)?;
        self.header(path, SYMLINK | 0o777, target.len() as u64)?;
        self.to.write_all(target.as_bytes())?;
        self.pad(target.len() as u64)
    }

    /// Ends the archive.
    pub fn finish(mut self) -> Result<W> {
        self.inode = 0;
        self.header("TRAILER!!!", 0, 0)?;
        Ok(self.to)
    }

    fn parents(&mut self, path: &str) -> Result<()> {
        match path.trim_matches('/').rsplit_once('/') {
            Some((parent, _)) => self.directory(parent),
            None => Ok(()),
        }
    }

    fn header(&mut self, path: &str, mode: u32, size: u64) -> Result<()> {
        let path = path.trim_matches('/');
        let size = u32::try_from(size).with_context(|| format!("{path} is over 4 GiB"))?;
        self.inode += 1;
        let inode = self.inode;
        let name = path.len() + 1;
        // inode, mode, uid, gid, links, time, size, device ×4, name length, checksum
        let fields = [inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name as u32, 0];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        self.to.write_all(header.as_bytes())?;
        self.to.write_all(path.as_bytes())?;
        self.to.write_all(&[0])?;
        self.pad((header.len() + name) as u64)
    }

    /// Headers and contents each start at a multiple of four.
    fn pad(&mut self, written: u64) -> Result<()> {
        let rest = (4 - written % 4) % 4;
        Ok(self.to.write_all(&[0; 4][..rest as usize])?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archives_are_aligned_and_list_parents_first() {
        let mut archive = Archive::new(Vec::new());
        archive.file("/a/b/c", 0o755, b"12345").unwrap();
        archive.symlink("/a/b/d", "c").unwrap();
        archive.directory("a/b").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(text.matches("070701").count(), 5);
        let place = |name: &str| text.find(name).unwrap();
        assert!(place("a\0") < place("a/b\0") && place("a/b\0") < place("a/b/c\0"));
        assert!(place("a/b/d\0") < place("TRAILER!!!"));
    }

    #[test]
    fn equal_input_gives_equal_bytes() {
        let make = || {
            let mut archive = Archive::new(Vec::new());
            archive.file("x", 0o644, b"y").unwrap();
            archive.finish().unwrap()
        };
        assert_eq!(make(), make());
    }
}
