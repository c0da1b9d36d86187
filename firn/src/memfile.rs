//! Files in memory: sealed ones that are handed to many VMMs, and nameless ones on disk.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::Path,
};

use rustix::{
    fs::{MemfdFlags, Mode, OFlags, SealFlags},
    io::Errno,
    mm::{Advice, MapFlags, ProtFlags},
};

/// All seals: nobody who has a descriptor can change the content, or the seals.
const SEALS: SealFlags =
    SealFlags::WRITE.union(SealFlags::SHRINK).union(SealFlags::GROW).union(SealFlags::SEAL);

/// A new empty memory file that can be sealed.
pub(crate) fn create(name: &str) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // Kernels before 6.3 don't know NOEXEC_SEAL; what is never executable is nicer to have.
    let fd = match rustix::fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        Err(Errno::INVAL) => rustix::fs::memfd_create(name, flags)?,
        other => other?,
    };
    Ok(File::from(fd))
}

/// Seals `file` and opens it anew for reading only, so that not even the mode of the descriptor
/// allows more.
pub(crate) fn seal(file: File) -> io::Result<OwnedFd> {
    rustix::fs::fcntl_add_seals(&file, SEALS)?;
    reopen(&file)
}

/// A sealed memory file with `content`.
pub(crate) fn sealed(name: &str, content: &[u8]) -> io::Result<OwnedFd> {
    let mut file = create(name)?;
    io::Write::write_all(&mut file, content)?;
    seal(file)
}

/// A sealed memory file with the next `length` bytes of `source`, and their hash. Pages of zeroes stay
/// holes.
pub(crate) fn sealed_copy(
    name: &str,
    source: &mut impl io::Read,
    length: u64,
) -> io::Result<(File, blake3::Hash)> {
    let file = create(name)?;
    file.set_len(length)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    let mut offset = 0;
    while offset < length {
        let want = buffer.len().min(usize::try_from(length - offset).unwrap_or(usize::MAX));
        source.read_exact(&mut buffer[..want])?;
        hasher.update(&buffer[..want]);
        for (index, page) in buffer[..want].chunks(4096).enumerate() {
            if page.iter().any(|byte| *byte != 0) {
                file.write_all_at(page, offset + 4096 * index as u64)?;
            }
        }
        offset += want as u64;
    }
    Ok((seal(file)?.into(), hasher.finalize()))
}

/// A sealed memory file with the next `length` bytes of `source`, in huge pages where the system
/// gives them on advice: what every VMM reads whole is then mapped by a handful of page-table
/// entries.
pub(crate) fn sealed_huge(
    name: &str,
    source: &mut impl io::Read,
    length: u64,
) -> io::Result<OwnedFd> {
    let file = create(name)?;
    let length = usize::try_from(length).map_err(io::Error::other)?;
    if length > 0 {
        file.set_len(length as u64)?;
        let (any, flags) = (std::ptr::null_mut(), MapFlags::SHARED);
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory. The
        // file is private to this function, so nothing else changes or shrinks it while the slice
        // lives, and the mapping, which would keep the file from being sealed, ends with it.
        unsafe {
            let mapping = rustix::mm::mmap(any, length, protection, flags, &file, 0)?;
            // Only advice: without huge pages this costs time, nothing else.
            let _ = rustix::mm::madvise(mapping, length, Advice::LinuxHugepage);
            let content = std::slice::from_raw_parts_mut(mapping.cast::<u8>(), length);
            let read = source.read_exact(content);
            rustix::mm::munmap(mapping, length)?;
            read?;
        }
    }
    seal(file)
}

/// An executable copy of `source` that nobody can change, and that may be executed and not read, not even
/// by its owner: exec then leaves the process not dumpable, so that nothing of the same user can trace it.
///
/// It is a sealed memory file; where the kernel has none that are executable (`vm.memfd_noexec=2`), a file
/// without a name in the directory `scratch`, which nobody has open for writing.
pub(crate) fn executable(name: &str, source: &mut File, scratch: &Path) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = match rustix::fs::memfd_create(name, flags | MemfdFlags::EXEC) {
        // Kernels before 6.3 don't know the flag, and take any memory file to be executable.
        Err(Errno::INVAL) => rustix::fs::memfd_create(name, flags),
        other => other,
    };
    let (fd, can_be_sealed) = match fd {
        Err(Errno::ACCESS) => {
            let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
            (rustix::fs::open(scratch, flags, Mode::RWXU)?, false)
        }
        other => (other?, true),
    };
    let mut file = File::from(fd);
    io::copy(source, &mut file)?;
    rustix::fs::fchmod(&file, Mode::RWXU)?;
    let copy = if can_be_sealed { seal(file)? } else { reopen(&file)? };
    rustix::fs::fchmod(&copy, Mode::from_raw_mode(0o111))?;
    Ok(copy)
}

/// Opens the file of `fd` anew for reading: with its own offset, which two processes that got the
/// same descriptor would share.
pub(crate) fn reopen(fd: impl AsFd) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        process::Command,
    };

    use super::*;

    /// Says to the test's own process, started anew, that memory files are refused.
    const REFUSED: &str = "FIRN_TEST_MEMFD_NOEXEC";

    /// The setting is a PID namespace's: the test starts itself in one of its own.
    #[test]
    fn programs_run_where_memory_files_are_not_executable() {
        if std::env::var_os(REFUSED).is_none() {
            let test = "memfile::tests::programs_run_where_memory_files_are_not_executable";
            let script =
                "echo 2 > /proc/sys/vm/memfd_noexec || exit 99; exec \"$0\" --exact \"$1\"";
            let program = std::env::current_exe().unwrap();
            let mut inner = Command::new("unshare");
            inner.args(["--pid", "--fork", "sh", "-c", script]).arg(program).arg(test);
            let done = inner.env(REFUSED, "1").output().unwrap();
            match done.status.code() {
                Some(1 | 99) if !done.stdout.starts_with(b"\nrunning 1 test") => {
                    eprintln!("skipped: {}", String::from_utf8_lossy(&done.stderr));
                }
                code => assert_eq!(code, Some(0), "{}", String::from_utf8_lossy(&done.stdout)),
            }
            return;
        }
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::EXEC;
        let refused = rustix::fs::memfd_create("test", flags).unwrap_err();
        assert_eq!(refused, Errno::ACCESS, "the setting has no effect");
        assert!(sealed("test", b"content").is_ok());
        let scratch = tempfile::tempdir().unwrap();
        let mut source = File::open("/bin/true").unwrap();
        let copy = executable("test", &mut source, scratch.path()).unwrap();
        let path = format!("/proc/self/fd/{}", copy.as_raw_fd());
        let link = std::fs::read_link(&path).unwrap();
        assert!(link.starts_with(scratch.path()), "{}", link.display());
        assert!(Command::new(&path).status().unwrap().success());
        assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0, "it has a name");
    }

    #[test]
    fn sealed_content_can_be_read_and_not_changed() {
        let fd = sealed("test", b"content").unwrap();
        let mut file = File::from(fd);
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "content");
        assert!(file.write_all(b"x").is_err());
        assert!(file.set_len(0).is_err());
        let again = reopen(&file).unwrap();
        text.clear();
        File::from(again).read_to_string(&mut text).unwrap();
        assert_eq!(text, "content", "a reopened descriptor has its own offset");
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        if let Ok(mut writable) = File::options().write(true).open(path) {
            assert!(writable.write_all(b"x").is_err());
        }
    }

    #[test]
    fn a_huge_sealed_file_has_the_content_of_its_source() {
        let content: Vec<u8> = (0..5u32 << 20).map(|i| (i / 4096) as u8).collect();
        let length = content.len() as u64;
        let mut copy = File::from(sealed_huge("copy", &mut &content[..], length).unwrap());
        let mut found = Vec::new();
        copy.read_to_end(&mut found).unwrap();
        assert!(found == content);
        assert!(copy.write_all(b"x").is_err());
        assert!(rustix::fs::fcntl_get_seals(&copy).unwrap().contains(SEALS));
        let empty = sealed_huge("empty", &mut io::empty(), 0).unwrap();
        assert_eq!(File::from(empty).metadata().unwrap().len(), 0);
        assert!(sealed_huge("short", &mut &content[..], length + 1).is_err());
    }

    #[test]
    fn a_sealed_copy_has_content_and_hash_of_its_source_and_its_holes() {
        let mut content = vec![0; (3 << 20) + 77];
        content[5000] = 1;
        content[(3 << 20) + 76] = 2;
        let length = content.len() as u64;
        let (mut copy, hash) = sealed_copy("copy", &mut &content[..], length).unwrap();
        let mut found = Vec::new();
        copy.read_to_end(&mut found).unwrap();
        assert!(found == content);
        assert_eq!(hash, blake3::hash(&content));
        assert!(rustix::fs::fcntl_get_seals(&copy).unwrap().contains(SEALS));
        assert_eq!(rustix::fs::fstat(&copy).unwrap().st_blocks, 16, "two pages");
        assert!(sealed_copy("short", &mut &content[..], length + 1).is_err());
    }
}
