//! Opening a host: the configuration is checked, the state directory taken, and what an earlier
//! life has left is removed: processes first, then control groups and files.
//!
//! ```text
//!  <state>/lock         held as long as the host lives
//!  <state>/master.key   unless the configuration brings a key service of its own
//!  <state>/run/         of one life only
//!  <state>/run/pids/    a file a VMM: its name the pid, its content when it was started
//! ```
//!
//! Nobody but root and this user may be able to exchange the state directory or what is in it; it is
//! opened once, and what is in it through it.

use std::{
    fs::{self, File},
    io,
    os::{fd::AsFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
    sync::Mutex,
    time::Duration,
};

use rustix::fs::FlockOperation;

use crate::{
    HostConfig, ImageError, artifacts::Artifacts, cgroup::Cgroups, dir::Dir, launch,
    process::kill_stranger,
};

/// Prefix of temporary files and directories that this crate makes beside their targets.
pub(crate) const TEMPORARY: &str = ".firn-tmp-";

/// Why a host can't open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A file of the installation is missing or unusable.
    #[error("the installation has no usable {what} ({}): {source}", path.display())]
    Artifact {
        /// Which part: `firn-vmm`, `kernel`, `/tmp disk`…
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is no image at all.
    #[error("no images in {}", path.display())]
    NoImages {
        /// The directory that was searched.
        path: PathBuf,
    },
    /// An image is damaged.
    #[error("image {runtime:?} can't be used: {source}")]
    Image {
        /// The runtime.
        runtime: String,
        /// Why.
        source: ImageError,
    },
    /// The machine has no KVM.
    #[error(
        "there is no /dev/kvm: load KVM's module (kvm_intel, kvm_amd), or allow nested \
         virtualisation"
    )]
    NoKvm,
    /// This user may not use KVM.
    #[error("no permission for /dev/kvm: run as root, or join the group that owns it")]
    KvmPermission,
    /// KVM is there but can't be used.
    #[error("/dev/kvm can't be used: {0}")]
    Kvm(io::Error),
    /// This user may not make user namespaces, without which only root can build jails.
    #[error(
        "jails can only be built by root, or by users who may make user namespaces, which user {uid} \
         may not: {source}"
    )]
    NotRoot {
        /// Who this is.
        uid: u32,
        /// Why not.
        source: io::Error,
    },
    /// No way to limit microVMs.
    #[error("control groups: {0}")]
    Cgroup(String),
    /// Another host lives in this state directory.
    #[error("{} is in use by another process", path.display())]
    InUse {
        /// The state directory.
        path: PathBuf,
    },
    /// There is no usable master key.
    #[error(transparent)]
    Key(#[from] crate::keys::KeyError),
    /// A value of the configuration makes no sense.
    #[error("{field}: {reason}")]
    Config {
        /// Name of the field.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A file or directory of the state could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

pub(crate) fn at(path: &Path) -> impl FnOnce(io::Error) -> OpenError {
    let path = path.to_owned();
    move |source| OpenError::Io { path, source }
}

/// The state directory, locked, swept and ready.
#[derive(Debug)]
pub(crate) struct State {
    dir: Dir,
    pub(crate) run: Dir,
    pids: Dir,
    /// Names this state directory in control groups, in this life and the next.
    pub(crate) host_id: String,
    /// Files in `run` live in memory, so that a guest's `/tmp` counts as its memory.
    pub(crate) in_memory: bool,
    /// Locked until it is closed.
    lock: Mutex<Option<File>>,
}

/// Name of the directory of one life.
const RUN: &str = "run";

impl State {
    /// Locks `dir`, making it if need be, and ends the processes of an earlier life.
    pub(crate) fn open(path: &Path) -> Result<Self, OpenError> {
        fs::create_dir_all(path).map_err(at(path))?;
        let dir = Dir::open_safe(path).map_err(at(path))?;
        let path = dir.path().to_owned();
        let lock = dir.create("lock", 0o600).map_err(at(&path))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(OpenError::InUse { path }),
            Err(e) => return Err(at(&path)(e.into())),
        }
        match dir.dir(RUN).and_then(|run| run.dir("pids")) {
            Ok(pids) => end_processes(&pids)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(at(&path)(e)),
        }
        dir.remove_all(RUN).map_err(at(&path))?;
        remove_temporary(&dir).map_err(at(&path))?;
        for part in ["snapshots", "code"] {
            match dir.dir(part).and_then(|part| remove_temporary(&part)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(at(&path)(e)),
                _ => {}
            }
        }
        let run = dir.make(RUN, 0o700).map_err(at(&path))?;
        let pids = run.make("pids", 0o700).map_err(at(&path))?;
        let kind = rustix::fs::fstatfs(&run).map_err(|e| at(run.path())(e.into()))?.f_type;
        let id = blake3::hash(path.as_os_str().as_bytes()).to_hex();
        Ok(Self {
            dir,
            run,
            pids,
            host_id: id[..16].to_owned(),
            in_memory: matches!(kind, libc::TMPFS_MAGIC | RAMFS_MAGIC),
            lock: Mutex::new(Some(lock)),
        })
    }

    /// Removes what belongs to this life and gives the directory free.
    pub(crate) fn close(&self) {
        let lock = self.lock.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        if lock.is_some() {
            let _ = self.dir.remove_all(RUN);
        }
    }

    /// Records a VMM, for a life that comes after this one was killed.
    pub(crate) fn record(&self, pid: u32) -> io::Result<()> {
        let started = crate::process::start_time(pid).unwrap_or_default();
        let mut file = self.pids.create(pid.to_string(), 0o600)?;
        io::Write::write_all(&mut file, started.to_string().as_bytes())
    }

    /// A VMM is gone.
    pub(crate) fn forget(&self, pid: u32) {
        let _ = self.pids.remove_file(pid.to_string());
    }
}

/// `RAMFS_MAGIC` of linux/magic.h.
const RAMFS_MAGIC: i64 = 0x8584_58f6;

fn end_processes(pids: &Dir) -> Result<(), OpenError> {
    for name in pids.files().map_err(at(pids.path()))? {
        let pid = name.to_str().and_then(|n| n.parse().ok());
        let started = pids.read(&name).ok().and_then(|text| text.parse().ok());
        if let (Some(pid), Some(started)) = (pid, started) {
            tracing::debug!(pid, "ending a VMM of an earlier life, if it still runs");
            kill_stranger(pid, started, Duration::from_secs(10))
                .map_err(at(&pids.path().join(name)))?;
        }
    }
    Ok(())
}

fn remove_temporary(dir: &Dir) -> io::Result<()> {
    let temporary = |name: &PathBuf| name.as_os_str().as_bytes().starts_with(TEMPORARY.as_bytes());
    dir.dirs()?.into_iter().filter(temporary).try_for_each(|name| dir.remove_all(name))?;
    dir.files()?.into_iter().filter(temporary).try_for_each(|name| dir.remove_file(name))
}

/// Checks the values that have limits.
pub(crate) fn check_config(config: &HostConfig) -> Result<(), OpenError> {
    let wrong = |field, reason: &str| Err(OpenError::Config { field, reason: reason.into() });
    if !(1..=1000).contains(&config.patience) {
        return wrong("patience", "must be from 1 to 1000");
    }
    if config.io_bytes_per_second.is_some_and(|most| most < 1 << 16) {
        return wrong("io_bytes_per_second", "must be at least 65536");
    }
    if config.shells > 1000 {
        return wrong("shells", "must be at most 1000");
    }
    // The jailer refuses lower ones too.
    if config.uids.start < 65_537 || config.uids.is_empty() || config.uids.end == u32::MAX {
        return wrong("uids", "must be a range above 65536 with at least one id");
    }
    Ok(())
}

/// Whether jails can be built: by root always, by others if they may make user namespaces. Tried, since
/// each distribution has its own ways to forbid it.
pub(crate) fn check_user(artifacts: &Artifacts) -> Result<(), OpenError> {
    if !launch::is_rootless() {
        return Ok(());
    }
    let null = artifacts.null.as_fd();
    let arguments = [c"firn-jailer".to_owned(), c"--version".to_owned()];
    launch::launch(artifacts.jailer.as_fd(), &arguments, &[null; 3], None)
        .and_then(|launched| crate::process::wait(&launched.pidfd))
        .map_err(|source| OpenError::NotRoot {
            uid: rustix::process::geteuid().as_raw(),
            source,
        })?;
    tracing::warn!(
        "not root: all microVMs run as this user, each in a user namespace of its own, and without a \
         user that no other process has"
    );
    Ok(())
}

/// Control groups, unless there are none and that is allowed.
pub(crate) fn open_cgroups(
    config: &HostConfig,
    state: &State,
) -> Result<Option<Cgroups>, OpenError> {
    let mut cgroups = match Cgroups::open(&state.host_id) {
        Ok(cgroups) => cgroups,
        Err(error)
            if (config.allow_no_cgroups || launch::is_rootless())
                && config.io_bytes_per_second.is_none() =>
        {
            tracing::warn!(%error, "no control groups: microVMs run without limits");
            return Ok(None);
        }
        Err(error) => return Err(OpenError::Cgroup(error.to_string())),
    };
    let count = cgroups.remove_leftovers().map_err(|e| OpenError::Cgroup(e.to_string()))?;
    if count > 0 {
        tracing::info!(count, "removed control groups of an earlier life");
    }
    if let Some(most) = config.io_bytes_per_second {
        let field = "io_bytes_per_second";
        cgroups
            .throttle(&state.run, most)
            .map_err(|error| OpenError::Config { field, reason: error.to_string() })?;
    }
    Ok(Some(cgroups))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_directory_belongs_to_one_and_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        let stray = dir.path().join("snapshots").join(format!("{TEMPORARY}x"));
        fs::create_dir_all(&stray).unwrap();
        fs::create_dir_all(dir.path().join("run/old")).unwrap();
        fs::create_dir_all(dir.path().join("snapshots/kept")).unwrap();
        let state = State::open(dir.path()).unwrap();
        assert!(!stray.exists() && !dir.path().join("run/old").exists());
        assert!(dir.path().join("snapshots/kept").exists());
        assert!(matches!(State::open(dir.path()), Err(OpenError::InUse { .. })));
        let mut sleeper = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        state.record(sleeper.id()).unwrap();
        let id = state.host_id.clone();
        drop(state);
        let reaper = std::thread::spawn(move || sleeper.wait().unwrap());
        assert_eq!(State::open(dir.path()).unwrap().host_id, id);
        assert!(!reaper.join().unwrap().success(), "the process of the earlier life is ended");
    }

    #[test]
    fn a_link_in_the_state_directory_is_refused_and_what_it_leads_to_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (state, theirs) = (dir.path().join("state"), dir.path().join("theirs"));
        for dir in [&state, &theirs, &theirs.join("pids")] {
            fs::create_dir(dir).unwrap();
        }
        for (link, to) in [("lock", "../theirs/lock"), ("run", "../theirs")] {
            std::os::unix::fs::symlink(to, state.join(link)).unwrap();
            let error = State::open(&state).unwrap_err();
            assert!(matches!(error, OpenError::Io { .. }), "{error}");
            fs::remove_file(state.join(link)).unwrap();
        }
        assert!(theirs.join("pids").exists() && !theirs.join("lock").exists());
        State::open(&state).unwrap();
    }
}
