//! Opening a host: the configuration is checked, the state directory taken, and what an earlier
//! life has left is removed: processes first, then control groups and files.
//!
//! ```text
//!  <state>/lock         held as long as the host lives
//!  <state>/master.key   unless the configuration brings a key service of its own
//!  <state>/run/         of one life only
//!  <state>/run/root/    mount point of every jail's root; always empty from outside
//!  <state>/run/pids/    a file a VMM: its name the pid, its content when it was started
//! ```

use std::{
    fs::{self, File},
    io,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    path::{Path, PathBuf},
    sync::Mutex,
    time::Duration,
};

use rustix::fs::FlockOperation;

use crate::{HostConfig, ImageError, cgroup::Cgroups, process::kill_stranger};

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
    /// Building jails needs root.
    #[error("jails can only be built by root (this is user {uid})")]
    NotRoot {
        /// Who this is.
        uid: u32,
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
    pub(crate) run: PathBuf,
    /// Names this state directory in control groups, in this life and the next.
    pub(crate) host_id: String,
    /// Files in `run` live in memory, so that a guest's `/tmp` counts as its memory.
    pub(crate) in_memory: bool,
    /// Locked until it is closed.
    lock: Mutex<Option<File>>,
}

impl State {
    /// Locks `dir`, making it if need be, and ends the processes of an earlier life.
    pub(crate) fn open(dir: &Path) -> Result<Self, OpenError> {
        fs::create_dir_all(dir).map_err(at(dir))?;
        let dir = fs::canonicalize(dir).map_err(at(dir))?;
        let path = dir.join("lock");
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(at(&path))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(OpenError::InUse { path: dir }),
            Err(e) => return Err(at(&path)(e.into())),
        }
        let run = dir.join("run");
        end_processes(&run.join("pids"))?;
        match fs::remove_dir_all(&run) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(at(&run)(e)),
            _ => {}
        }
        for part in [dir.clone(), dir.join("snapshots"), dir.join("code")] {
            remove_temporary(&part).map_err(at(&part))?;
        }
        for part in ["root", "pids"] {
            let part = run.join(part);
            fs::create_dir_all(&part).map_err(at(&part))?;
        }
        let mode = fs::Permissions::from_mode(0o700);
        fs::set_permissions(&run, mode).map_err(at(&run))?;
        let kind = rustix::fs::statfs(&run).map_err(|e| at(&run)(e.into()))?.f_type;
        let id = blake3::hash(dir.as_os_str().as_bytes()).to_hex();
        Ok(Self {
            run,
            host_id: id[..16].to_owned(),
            in_memory: matches!(kind, libc::TMPFS_MAGIC | RAMFS_MAGIC),
            lock: Mutex::new(Some(lock)),
        })
    }

    /// Removes what belongs to this life and gives the directory free.
    pub(crate) fn close(&self) {
        let lock = self.lock.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        if lock.is_some() {
            let _ = fs::remove_dir_all(&self.run);
        }
    }

    /// Records a VMM, for a life that comes after this one was killed.
    pub(crate) fn record(&self, pid: u32) -> io::Result<()> {
        let started = crate::process::start_time(pid).unwrap_or_default();
        fs::write(self.run.join("pids").join(pid.to_string()), started.to_string())
    }

    /// A VMM is gone.
    pub(crate) fn forget(&self, pid: u32) {
        let _ = fs::remove_file(self.run.join("pids").join(pid.to_string()));
    }
}

/// `RAMFS_MAGIC` of linux/magic.h.
const RAMFS_MAGIC: i64 = 0x8584_58f6;

fn end_processes(pids: &Path) -> Result<(), OpenError> {
    let entries = match fs::read_dir(pids) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(at(pids)(e)),
    };
    for entry in entries {
        let path = entry.map_err(at(pids))?.path();
        let pid = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.parse().ok());
        let started = fs::read_to_string(&path).ok().and_then(|text| text.parse().ok());
        if let (Some(pid), Some(started)) = (pid, started) {
            tracing::debug!(pid, "ending a VMM of an earlier life, if it still runs");
            kill_stranger(pid, started, Duration::from_secs(10)).map_err(at(&path))?;
        }
    }
    Ok(())
}

fn remove_temporary(dir: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        if !entry.file_name().as_bytes().starts_with(TEMPORARY.as_bytes()) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Checks the values that have limits.
pub(crate) fn check_config(config: &HostConfig) -> Result<(), OpenError> {
    let wrong = |field, reason: &str| Err(OpenError::Config { field, reason: reason.into() });
    if !(1..=1000).contains(&config.patience) {
        return wrong("patience", "must be from 1 to 1000");
    }
    if config.shells > 1000 {
        return wrong("shells", "must be at most 1000");
    }
    // The jailer refuses lower ones too.
    if config.uids.start < 65_537 || config.uids.is_empty() || config.uids.end == u32::MAX {
        return wrong("uids", "must be a range above 65536 with at least one id");
    }
    let uid = rustix::process::geteuid();
    if !uid.is_root() {
        return Err(OpenError::NotRoot { uid: uid.as_raw() });
    }
    Ok(())
}

/// Control groups, unless there are none and that is allowed.
pub(crate) fn open_cgroups(
    config: &HostConfig,
    host_id: &str,
) -> Result<Option<Cgroups>, OpenError> {
    let cgroups = match Cgroups::open(host_id) {
        Ok(cgroups) => cgroups,
        Err(error) if config.allow_no_cgroups => {
            tracing::warn!(%error, "microVMs run without limits");
            return Ok(None);
        }
        Err(error) => return Err(OpenError::Cgroup(error.to_string())),
    };
    let count = cgroups.remove_leftovers().map_err(|e| OpenError::Cgroup(e.to_string()))?;
    if count > 0 {
        tracing::info!(count, "removed control groups of an earlier life");
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
}
