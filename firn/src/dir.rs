//! Directories that are opened once. What lies in one is reached through its descriptor, by a name
//! that may lead neither out of it nor over a symbolic link (`openat2`), so whoever exchanges a
//! directory or plants a link after the first look changes nothing.

use std::{
    ffi::CStr,
    fs::{self, File},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, Mode, OFlags, ResolveFlags},
    io::Errno,
};

/// An open directory.
#[derive(Debug)]
pub(crate) struct Dir {
    fd: OwnedFd,
    /// What it was opened as: for messages.
    path: PathBuf,
}

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY);

/// Nobody but the owner may write.
const OTHERS_WRITE: u32 = 0o022;

impl Dir {
    /// Opens the directory `path`, wherever links lead.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let fd = rustix::fs::open(path, DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { fd, path: path.to_owned() })
    }

    /// Opens the directory `path`, which nobody but root and this user may be able to exchange: each
    /// directory on the way belongs to one of them, and others may write there only under a sticky
    /// bit. What is checked is what is opened.
    ///
    /// # Errors
    /// `PermissionDenied`, naming the directory that is not safe; any other of opening.
    pub(crate) fn open_safe(path: &Path) -> io::Result<Self> {
        let path = fs::canonicalize(path)?;
        let mut dir = Self::open(Path::new("/"))?;
        dir.check()?;
        for part in path.components() {
            if let Component::Normal(name) = part {
                dir = dir.dir(Path::new(name))?;
                dir.check()?;
            }
        }
        Ok(dir)
    }

    fn check(&self) -> io::Result<()> {
        let stat = rustix::fs::fstat(&self.fd)?;
        let ours = [0, rustix::process::geteuid().as_raw()].contains(&stat.st_uid);
        let sticky = stat.st_mode & libc::S_ISVTX != 0;
        if ours && (sticky || stat.st_mode & OTHERS_WRITE == 0) {
            return Ok(());
        }
        let path = self.path.display();
        let reason = format!(
            "others could exchange what is in {path} (owner {}, mode {:o}): it must belong to root or \
             this user, and only its owner may write there",
            stat.st_uid,
            stat.st_mode & 0o7777
        );
        Err(io::Error::new(io::ErrorKind::PermissionDenied, reason))
    }

    /// Where it was when it was opened.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Opens what is in it.
    fn beneath(&self, name: &Path, flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
        let resolve =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        // Waiting for the other end of a planted pipe would be a trap, too.
        let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        rustix::fs::openat2(&self.fd, name, flags, mode, resolve).map_err(|e| self.error(name, e))
    }

    fn error(&self, name: &Path, error: Errno) -> io::Error {
        let error = io::Error::from(error);
        io::Error::new(error.kind(), format!("{}: {error}", self.path.join(name).display()))
    }

    /// The directory `name` in it.
    pub(crate) fn dir(&self, name: impl AsRef<Path>) -> io::Result<Self> {
        let name = name.as_ref();
        let fd = self.beneath(name, DIRECTORY, Mode::empty())?;
        Ok(Self { fd, path: self.path.join(name) })
    }

    /// Makes the directory `name` in it, which may not be there yet.
    pub(crate) fn make(&self, name: impl AsRef<Path>, mode: u32) -> io::Result<Self> {
        let name = name.as_ref();
        rustix::fs::mkdirat(&self.fd, name, Mode::from_raw_mode(mode))
            .map_err(|e| self.error(name, e))?;
        self.dir(name)
    }

    /// The directory `name` in it, made if it is not there.
    pub(crate) fn ensure(&self, name: impl AsRef<Path>, mode: u32) -> io::Result<Self> {
        match self.make(name.as_ref(), mode) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => self.dir(name),
            other => other,
        }
    }

    /// The file `name` in it, for reading.
    pub(crate) fn file(&self, name: impl AsRef<Path>) -> io::Result<File> {
        Ok(self.beneath(name.as_ref(), OFlags::RDONLY, Mode::empty())?.into())
    }

    /// The file `name` in it, for writing.
    pub(crate) fn writable(&self, name: impl AsRef<Path>) -> io::Result<File> {
        Ok(self.beneath(name.as_ref(), OFlags::WRONLY, Mode::empty())?.into())
    }

    /// The file `name` in it for writing, made if it is not there, and emptied if it is.
    pub(crate) fn create(&self, name: impl AsRef<Path>, mode: u32) -> io::Result<File> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC;
        Ok(self.beneath(name.as_ref(), flags, Mode::from_raw_mode(mode))?.into())
    }

    /// A file in it that has no name and is gone with its last descriptor, whoever dies when.
    pub(crate) fn nameless(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDWR | OFlags::TMPFILE;
        match self.beneath(Path::new("."), flags, Mode::RUSR | Mode::WUSR) {
            // Some file systems can't; the name then lives for a moment.
            Err(e) if is_unsupported(&e) => Ok(tempfile::tempfile_in(self.by_descriptor())?.into()),
            other => other,
        }
    }

    /// A path that leads through the descriptor, for functions that want one.
    pub(crate) fn by_descriptor(&self) -> PathBuf {
        use std::os::fd::AsRawFd;
        PathBuf::from(format!("/proc/self/fd/{}", self.fd.as_raw_fd()))
    }

    /// The content of the file `name`, if it is text.
    pub(crate) fn read(&self, name: impl AsRef<Path>) -> io::Result<String> {
        let mut text = String::new();
        io::Read::read_to_string(&mut self.file(name)?, &mut text)?;
        Ok(text)
    }

    /// Writes to the file `name`, which is there.
    pub(crate) fn write(&self, name: impl AsRef<Path>, text: &str) -> io::Result<()> {
        io::Write::write_all(&mut self.writable(name)?, text.as_bytes())
    }

    /// Names of the directories in it.
    pub(crate) fn dirs(&self) -> io::Result<Vec<PathBuf>> {
        self.names(|kind| kind == rustix::fs::FileType::Directory)
    }

    /// Names of the files in it.
    pub(crate) fn files(&self) -> io::Result<Vec<PathBuf>> {
        self.names(|kind| kind == rustix::fs::FileType::RegularFile)
    }

    fn names(&self, wanted: impl Fn(rustix::fs::FileType) -> bool) -> io::Result<Vec<PathBuf>> {
        use std::os::unix::ffi::OsStrExt;
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.fd)? {
            let entry = entry?;
            let name = entry.file_name();
            if ![c".", c".."].contains(&name) && wanted(entry.file_type()) {
                names.push(PathBuf::from(std::ffi::OsStr::from_bytes(CStr::to_bytes(name))));
            }
        }
        Ok(names)
    }

    /// Removes the empty directory `name`.
    pub(crate) fn remove_dir(&self, name: impl AsRef<Path>) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.fd, name.as_ref(), AtFlags::REMOVEDIR)?)
    }

    /// Removes the file `name`.
    pub(crate) fn remove_file(&self, name: impl AsRef<Path>) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.fd, name.as_ref(), AtFlags::empty())?)
    }

    /// Removes `name` and, if it is a directory, all that is in it. Links are not followed.
    pub(crate) fn remove_all(&self, name: impl AsRef<Path>) -> io::Result<()> {
        match fs::remove_dir_all(self.by_descriptor().join(name)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Unsupported | io::ErrorKind::IsADirectory | io::ErrorKind::InvalidInput
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn links_lead_nowhere() {
        let temporary = tempfile::tempdir().unwrap();
        let (inside, outside) = (temporary.path().join("in"), temporary.path().join("out"));
        for dir in [&inside, &outside] {
            fs::create_dir(dir).unwrap();
        }
        fs::write(outside.join("file"), "theirs").unwrap();
        let dir = Dir::open(&inside).unwrap();
        for (link, to) in [("file", "../out/file"), ("dir", "../out"), ("fd", "/proc/self/fd")] {
            symlink(to, inside.join(link)).unwrap();
        }
        assert!(dir.file("file").is_err());
        assert!(dir.writable("file").is_err());
        assert!(dir.create("file", 0o600).is_err());
        assert!(dir.dir("dir").is_err() && dir.ensure("dir", 0o700).is_err());
        assert!(dir.file("dir/file").is_err());
        assert!(dir.file("../out/file").is_err());
        assert!(dir.file(outside.join("file")).is_err());
        assert!(dir.dir("fd").is_err());
        // What is removed is the link.
        dir.remove_all("dir").unwrap();
        assert_eq!(fs::read_to_string(outside.join("file")).unwrap(), "theirs");
    }

    #[test]
    fn an_open_directory_stays_the_one_that_it_was() {
        let temporary = tempfile::tempdir().unwrap();
        let path = temporary.path().join("dir");
        fs::create_dir(&path).unwrap();
        let dir = Dir::open_safe(&path).unwrap();
        fs::rename(&path, temporary.path().join("elsewhere")).unwrap();
        fs::create_dir(&path).unwrap();
        dir.create("file", 0o600).unwrap();
        drop(dir.nameless().unwrap());
        assert!(!path.join("file").exists());
        assert!(temporary.path().join("elsewhere/file").exists());
        assert_eq!(dir.files().unwrap(), [Path::new("file")]);
    }

    #[test]
    fn what_others_can_exchange_is_not_safe() {
        let temporary = tempfile::tempdir().unwrap();
        let (upper, lower) = (temporary.path().join("a"), temporary.path().join("a/b"));
        fs::create_dir_all(&lower).unwrap();
        let mode = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        Dir::open_safe(&lower).unwrap();
        for (path, unsafe_mode) in [(&lower, 0o777), (&lower, 0o770), (&upper, 0o757)] {
            mode(path, unsafe_mode);
            let error = Dir::open_safe(&lower).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
            mode(path, 0o755);
        }
        mode(&upper, 0o1777);
        Dir::open_safe(&lower).unwrap();
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&upper, Some(12_345), None).unwrap();
            let error = Dir::open_safe(&lower).unwrap_err();
            assert!(error.to_string().contains("owner 12345"), "{error}");
        }
    }
}
