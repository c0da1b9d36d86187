//! The initial file system of every guest: `firn-init` as `/init`, and a console to have its
//! standard streams on. Nothing is compressed: the guest reads it once, from memory.
//!
//! Format: cpio "newc", as in the kernel's `Documentation/driver-api/early-userspace/
//! buffer-format.rst`: a header of ASCII hexadecimal fields, the name, the content, each padded to
//! four bytes.

use std::io;

const DIRECTORY: u32 = 0o040_755;
const CHARACTER_DEVICE: u32 = 0o020_600;
const EXECUTABLE: u32 = 0o100_755;

/// Makes the archive. `init` is the content of `firn-init`.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`] for an init of 4 GiB or more.
pub fn build(init: &[u8]) -> io::Result<Vec<u8>> {
    let size = u32::try_from(init.len())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "firn-init is over 4 GiB"))?;
    let mut archive = Vec::with_capacity(init.len() + 1024);
    entry(&mut archive, 1, "dev", DIRECTORY, (0, 0), 0, &[]);
    entry(&mut archive, 2, "dev/console", CHARACTER_DEVICE, (5, 1), 0, &[]);
    entry(&mut archive, 3, "init", EXECUTABLE, (0, 0), size, init);
    entry(&mut archive, 0, "TRAILER!!!", 0, (0, 0), 0, &[]);
    // The kernel wants whole words, and block tools whole sectors.
    archive.resize(archive.len().next_multiple_of(512), 0);
    Ok(archive)
}

fn entry(
    archive: &mut Vec<u8>,
    inode: u32,
    name: &str,
    mode: u32,
    device: (u32, u32),
    size: u32,
    content: &[u8],
) {
    let links = if mode == DIRECTORY { 2 } else { 1 };
    let name_size = name.len() as u32 + 1;
    let fields = [inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0];
    archive.extend_from_slice(b"070701");
    for field in fields {
        archive.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend_from_slice(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Name, mode, device, content.
    type Entry = (String, u32, (u32, u32), Vec<u8>);

    /// Reads an archive back.
    fn read(mut archive: &[u8]) -> Vec<Entry> {
        let mut entries = Vec::new();
        loop {
            let field = |n: usize| {
                let digits = &archive[6 + 8 * n..14 + 8 * n];
                u32::from_str_radix(std::str::from_utf8(digits).unwrap(), 16).unwrap()
            };
            assert_eq!(&archive[..6], b"070701");
            let name_end = 110 + field(11) as usize;
            let name = String::from_utf8(archive[110..name_end - 1].to_vec()).unwrap();
            assert_eq!(archive[name_end - 1], 0);
            if name == "TRAILER!!!" {
                return entries;
            }
            let start = name_end.next_multiple_of(4);
            let end = start + field(6) as usize;
            entries.push((name, field(1), (field(9), field(10)), archive[start..end].to_vec()));
            archive = &archive[end.next_multiple_of(4)..];
        }
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out(init in proptest::collection::vec(any::<u8>(), 0..3000)) {
            let archive = build(&init).unwrap();
            prop_assert_eq!(archive.len() % 512, 0);
            let entries = read(&archive);
            let names: Vec<_> = entries.iter().map(|e| e.0.as_str()).collect();
            prop_assert_eq!(names, ["dev", "dev/console", "init"]);
            prop_assert_eq!(entries[1].2, (5, 1));
            prop_assert_eq!(&entries[2].3, &init);
            prop_assert_eq!(entries[2].1, EXECUTABLE);
        }
    }
}
