//! The cgroup (v2) that every process of the function lives in.
//!
//! It is how the guest limits them, stops them where they stand and kills them all at once,
//! whatever they forked.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::FileExt as _,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Most processes and threads of a function, as in Lambda.
const MAX_PIDS: u32 = 1024;

/// How long the kernel may take to freeze. Only a task in the middle of disk I/O makes it wait.
const FREEZE_LIMIT: Duration = Duration::from_secs(10);

/// What pressure the kernel tells of: for 0.4 s of one second all tasks waited for memory.
const PRESSURE: &str = "full 400000 1000000";

/// A function that starves has less than one part in this many of its memory for pages of files.
const FILE_SHARE: u64 = 32;

/// Why a cgroup did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A control file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The control file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A task did not stop.
    #[error("{0}: not frozen after {limit} s", limit = FREEZE_LIMIT.as_secs())]
    NotFrozen(PathBuf),
}

/// A cgroup. The control files that a thaw and an answer need are held open: after a thaw every
/// page that a path walk touches would be faulted in.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    events: File,
    freeze: File,
    procs: File,
    /// Absent without the memory controller.
    peak: Option<File>,
    /// Absent until the cgroup is watched.
    pressure: Option<File>,
}

impl Cgroup {
    /// Makes `name` under `hierarchy`, with memory, pids and cpu controllers.
    ///
    /// # Errors
    /// [`CgroupError::Io`].
    pub fn create(hierarchy: &Path, name: &str) -> Result<Self, CgroupError> {
        write(&hierarchy.join("cgroup.subtree_control"), "+memory +pids +cpu")?;
        let path = hierarchy.join(name);
        fs::create_dir(&path).map_err(|source| CgroupError::Io { path: path.clone(), source })?;
        let cgroup = Self::open(path)?;
        cgroup.set("pids.max", &MAX_PIDS.to_string())?;
        // A function that lost one of its processes to the OOM killer is not left half alive.
        cgroup.set("memory.oom.group", "1")?;
        Ok(Self { pressure: Some(cgroup.watch_pressure()?), ..cgroup })
    }

    fn open(path: PathBuf) -> Result<Self, CgroupError> {
        let open = |file: &str, writes: bool| {
            let path = path.join(file);
            let file = File::options().read(!writes).write(writes).open(&path);
            file.map_err(|source| CgroupError::Io { path, source })
        };
        let events = open("cgroup.events", false)?;
        let (freeze, procs) = (open("cgroup.freeze", true)?, open("cgroup.procs", true)?);
        let peak = open("memory.peak", false).ok();
        Ok(Self { path, events, freeze, procs, peak, pressure: None })
    }

    /// `cgroup.procs`, open for writing: a process that writes "0" to it moves in.
    pub fn procs(&self) -> &File {
        &self.procs
    }

    /// Sets `memory.max`.
    ///
    /// # Errors
    /// [`CgroupError::Io`].
    pub fn limit_memory(&self, bytes: u64) -> Result<(), CgroupError> {
        self.set("memory.max", &bytes.to_string())
    }

    /// Highest memory use so far in bytes.
    pub fn peak_memory(&self) -> u64 {
        let mut text = [0; 24];
        let read = self.peak.as_ref().and_then(|file| file.read_at(&mut text, 0).ok());
        let digits = text.get(..read.unwrap_or(0)).unwrap_or_default().trim_ascii();
        std::str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok()).unwrap_or(0)
    }

    /// Asks the kernel to tell of shortage.
    fn watch_pressure(&self) -> Result<File, CgroupError> {
        let path = self.path.join("memory.pressure");
        let watched = File::options().read(true).write(true).open(&path).and_then(|mut file| {
            file.write_all(PRESSURE.as_bytes())?;
            Ok(file)
        });
        watched.map_err(|source| CgroupError::Io { path, source })
    }

    /// What to poll for `POLLPRI`: memory is short, [`Cgroup::starves`] says whether too short.
    pub fn pressure(&self) -> Option<BorrowedFd<'_>> {
        self.pressure.as_ref().map(AsFd::as_fd)
    }

    /// Whether the tasks have taken so much memory that next to nothing is left for pages of files,
    /// among them their own programs: each page is thrown away and read again before it was of use.
    ///
    /// The kernel sees progress in each page that it throws away, and may do so without end instead of
    /// calling its OOM killer. Who works on large files may wait for memory, too, but has pages of them.
    pub fn starves(&self) -> bool {
        let read = |file: &str| fs::read_to_string(self.path.join(file)).unwrap_or_default();
        starved(&read("memory.current"), &read("memory.stat"))
    }

    /// Stops every task and returns when all have stopped.
    ///
    /// # Errors
    /// Either [`CgroupError`].
    pub fn freeze(&mut self) -> Result<(), CgroupError> {
        self.set_frozen("1")?;
        let end = Instant::now() + FREEZE_LIMIT;
        while !self.event("frozen")? {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(CgroupError::NotFrozen(self.path.clone()));
            }
            self.wait(left);
        }
        Ok(())
    }

    /// Lets every task go on.
    ///
    /// # Errors
    /// [`CgroupError::Io`].
    pub fn thaw(&self) -> Result<(), CgroupError> {
        self.set_frozen("0")
    }

    /// Kills every task.
    ///
    /// # Errors
    /// [`CgroupError::Io`].
    pub fn kill(&self) -> Result<(), CgroupError> {
        self.set("cgroup.kill", "1")
    }

    /// Whether any task is left, zombies aside.
    ///
    /// # Errors
    /// [`CgroupError::Io`].
    pub fn populated(&mut self) -> Result<bool, CgroupError> {
        self.event("populated")
    }

    /// Waits until `cgroup.events` changed or time is up.
    pub fn wait(&self, limit: Duration) {
        let limit =
            Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
        // POLLPRI is kernfs's word for "changed since it was read". An interruption is harmless:
        // the caller looks again.
        let _ = poll(&mut [PollFd::new(&self.events, PollFlags::PRI)], Some(&limit));
    }

    fn event(&mut self, name: &str) -> Result<bool, CgroupError> {
        let mut text = String::new();
        let read = self.events.rewind().and_then(|()| self.events.read_to_string(&mut text));
        read.map_err(|source| CgroupError::Io { path: self.path.join("cgroup.events"), source })?;
        Ok(flag(&text, name))
    }

    fn set_frozen(&self, value: &str) -> Result<(), CgroupError> {
        self.freeze
            .write_all_at(value.as_bytes(), 0)
            .map_err(|source| CgroupError::Io { path: self.path.join("cgroup.freeze"), source })
    }

    fn set(&self, file: &str, value: &str) -> Result<(), CgroupError> {
        write(&self.path.join(file), value)
    }
}

fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    let result =
        File::options().write(true).open(path).and_then(|mut f| f.write_all(value.as_bytes()));
    result.map_err(|source| CgroupError::Io { path: path.to_owned(), source })
}

/// A flag of `cgroup.events`: lines of a name and 0 or 1.
fn flag(text: &str, name: &str) -> bool {
    text.lines().filter_map(|line| line.split_once(' ')).any(|(n, v)| n == name && v == "1")
}

/// Whether next to nothing of the memory in use is pages of files. `memory.stat` has lines of a name
/// and a number.
fn starved(current: &str, stat: &str) -> bool {
    let of = |name: &str| {
        let mut lines = stat.lines().filter_map(|line| line.split_once(' '));
        lines.find(|(found, _)| *found == name)?.1.parse::<u64>().ok()
    };
    // What is in /dev/shm counts as `file`, but can't be thrown away: it is on neither list.
    match (current.trim().parse::<u64>(), of("active_file"), of("inactive_file")) {
        (Ok(current), Some(active), Some(inactive)) => {
            active.saturating_add(inactive) < current / FILE_SHARE
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::process::ExitStatusExt as _, process::Command};

    use super::*;

    #[test]
    fn flags() {
        let text = "populated 1\nfrozen 0\n";
        assert!(flag(text, "populated"));
        assert!(!flag(text, "frozen"));
        assert!(!flag("", "frozen"));
    }

    #[test]
    fn starving_is_to_have_no_pages_of_files() {
        let stat = |active: u64, inactive: u64| {
            format!("anon 100\nfile 9999999\ninactive_file {inactive}\nactive_file {active}\n")
        };
        assert!(starved("112984064\n", &stat(0, 126_976)), "as seen in one that stood");
        assert!(!starved("111431680\n", &stat(720_896, 18_644_992)), "as seen before that");
        assert!(!starved("3200\n", &stat(60, 40)));
        assert!(starved("3200\n", &stat(60, 39)));
        assert!(!starved("", &stat(0, 0)));
        assert!(!starved("3200\n", "anon 100\n"));
    }

    /// Needs a cgroup v2 hierarchy, with or without controllers, and the right to write there.
    #[test]
    fn freeze_thaw_kill() {
        let Some(path) = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
            .map(|root| Path::new(root).join(format!("firn-init-test-{}", std::process::id())))
            .into_iter()
            .find(|path| {
                path.parent().is_some_and(|p| p.join("cgroup.procs").exists())
                    && fs::create_dir(path).is_ok()
            })
        else {
            println!("skipped: no cgroup v2 that can be written");
            return;
        };
        let mut cgroup = Cgroup::open(path.clone()).unwrap();
        cgroup.freeze().unwrap();
        cgroup.thaw().unwrap();
        let script = "echo 0 > \"$0/cgroup.procs\" && (sleep 1000 & sleep 1000)";
        let mut child = Command::new("/bin/sh").args(["-c", script]).arg(&path).spawn().unwrap();
        while !cgroup.populated().unwrap() {
            cgroup.wait(Duration::from_millis(10));
        }
        cgroup.freeze().unwrap();
        assert!(cgroup.event("frozen").unwrap());
        cgroup.thaw().unwrap();
        while cgroup.event("frozen").unwrap() {
            cgroup.wait(Duration::from_millis(10));
        }
        cgroup.freeze().unwrap();
        // What is frozen can be killed.
        cgroup.kill().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
        while cgroup.populated().unwrap() {
            cgroup.wait(Duration::from_millis(10));
        }
        drop(cgroup);
        fs::remove_dir(path).unwrap();
    }
}
