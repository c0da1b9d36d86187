//! Where the function runs: in a guest of its own, or (in tests) in a directory of a machine that
//! belongs to someone else.
//!
//! This is the only seam between the two. In a guest there is a [`Machine`] to command: a cgroup, a
//! code disk, a clock, an entropy pool, an unprivileged user. Elsewhere there is none, and the
//! function's processes are told apart by their session.

use std::{
    fs::{self, File},
    io,
    net::{Ipv4Addr, SocketAddr},
    os::fd::BorrowedFd,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use firn_proto::guest::Renew;
use rustix::{
    fs::sync,
    process::{Pid, Signal, WaitOptions, WaitStatus, kill_process_group, wait},
};

use crate::{
    boot::{BootError, CODE_DISK, mount_code},
    cgroup::{Cgroup, CgroupError},
    renew::{RenewError, renew},
};

/// Port of the Runtime API in a guest.
const API_PORT: u16 = 9001;

/// Port that takes segments in a guest, as X-Ray's daemon does.
const TRACER_PORT: u16 = 2000;

/// How long a killed function may take to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// How long the code disk may take to show the capacity that the host gave it.
const CODE_LIMIT: Duration = Duration::from_secs(10);

/// Why the place did not do what it should. The guest is of no use after any of these but
/// [`PlaceError::NoCode`] and [`PlaceError::Mount`].
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// The cgroup refused.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Clock or entropy could not be renewed.
    #[error(transparent)]
    Renew(#[from] RenewError),
    /// The code could not be mounted.
    #[error(transparent)]
    Mount(#[from] BootError),
    /// The host announced code, but the disk stayed empty.
    #[error("{CODE_DISK} has no capacity after {limit} s", limit = CODE_LIMIT.as_secs())]
    NoCode,
    /// A killed process is still there.
    #[error("the function's processes are still there {limit} s after being killed", limit = KILL_LIMIT.as_secs())]
    Unkillable,
    /// A signal could not be sent.
    #[error("signal to the runtime: {0}")]
    Signal(io::Error),
}

/// What only a guest has.
#[derive(Debug)]
pub struct Machine {
    /// Of the function.
    pub cgroup: Cgroup,
    /// `/dev/urandom`, open because a thaw is no time to walk paths.
    pub urandom: File,
}

/// Where the function runs.
#[derive(Debug)]
pub struct Place {
    root: PathBuf,
    machine: Option<Machine>,
}

impl Place {
    /// A guest of its own.
    pub fn guest(machine: Machine) -> Self {
        Self { root: PathBuf::from("/"), machine: Some(machine) }
    }

    /// A directory: `var/runtime` and `var/task` lie in it.
    pub fn directory(root: PathBuf) -> Self {
        Self { root, machine: None }
    }

    /// Where the Runtime API listens. Outside a guest the kernel chooses the port.
    pub fn api(&self) -> SocketAddr {
        let port = if self.machine.is_some() { API_PORT } else { 0 };
        (Ipv4Addr::LOCALHOST, port).into()
    }

    /// Where segments are taken. Outside a guest the kernel chooses the port.
    pub fn tracer(&self) -> SocketAddr {
        let port = if self.machine.is_some() { TRACER_PORT } else { 0 };
        (Ipv4Addr::LOCALHOST, port).into()
    }

    /// A path of the image.
    pub fn path(&self, absolute: &str) -> PathBuf {
        self.root.join(absolute.trim_start_matches('/'))
    }

    /// What only a guest has.
    pub fn machine(&self) -> Option<&Machine> {
        self.machine.as_ref()
    }

    /// Mounts the function's code and layers, and limits its memory.
    ///
    /// # Errors
    /// Any [`PlaceError`].
    pub fn prepare(&self, code: bool, memory_bytes: u64) -> Result<(), PlaceError> {
        let Some(machine) = &self.machine else { return Ok(()) };
        machine.cgroup.limit_memory(memory_bytes)?;
        if code {
            wait_for_code()?;
            mount_code()?;
        }
        Ok(())
    }

    /// Stops the runtime `pid` and everything that it started, and makes `/tmp` durable.
    ///
    /// The page cache stays: what is in it was read during init and would be read again, and pages
    /// that are merely free would still hold their bytes and be saved with the rest.
    ///
    /// # Errors
    /// Any [`PlaceError`].
    pub fn freeze(&mut self, pid: Option<Pid>) -> Result<(), PlaceError> {
        match &mut self.machine {
            Some(machine) => {
                machine.cgroup.freeze()?;
                sync();
            }
            None => signal(pid, Signal::STOP)?,
        }
        Ok(())
    }

    /// Renews clock and entropy of a frozen guest.
    ///
    /// # Errors
    /// [`PlaceError::Renew`].
    pub fn renew(&self, message: &Renew) -> Result<(), PlaceError> {
        match &self.machine {
            Some(machine) => Ok(renew(message, &machine.urandom)?),
            None => Ok(()),
        }
    }

    /// Lets what was frozen go on.
    ///
    /// # Errors
    /// Any [`PlaceError`].
    pub fn thaw(&self, pid: Option<Pid>) -> Result<(), PlaceError> {
        match &self.machine {
            Some(machine) => Ok(machine.cgroup.thaw()?),
            None => signal(pid, Signal::CONT),
        }
    }

    /// Kills the runtime `pid` and everything that it started; all of it is gone and reaped on
    /// return. The status that the runtime ended with, unless it had been reaped before.
    ///
    /// # Errors
    /// [`PlaceError::Unkillable`], or what the cgroup refused.
    pub fn kill(&mut self, pid: Pid) -> Result<Option<WaitStatus>, PlaceError> {
        let mut status = None;
        let end = Instant::now() + KILL_LIMIT;
        loop {
            match &self.machine {
                Some(machine) => machine.cgroup.kill()?,
                None => signal(Some(pid), Signal::KILL)?,
            }
            let childless = reap(|ended, how| {
                if ended == pid {
                    status = Some(how);
                }
            });
            let empty = match &mut self.machine {
                Some(machine) => !machine.cgroup.populated()?,
                None => true,
            };
            if childless && empty {
                return Ok(status);
            }
            if Instant::now() > end {
                return Err(PlaceError::Unkillable);
            }
            match &self.machine {
                Some(machine) if !empty => machine.cgroup.wait(Duration::from_millis(10)),
                _ => thread::sleep(Duration::from_micros(200)),
            }
        }
    }

    /// What to poll for `POLLPRI`: the function waits for memory, and may starve.
    pub fn pressure(&self) -> Option<BorrowedFd<'_>> {
        self.machine.as_ref()?.cgroup.pressure()
    }

    /// Does the OOM killer's work where the kernel does not: kills the function if it has too little memory
    /// to get on.
    ///
    /// # Errors
    /// [`PlaceError::Cgroup`].
    pub fn kill_if_starved(&self) -> Result<(), PlaceError> {
        match &self.machine {
            Some(machine) if machine.cgroup.starves() => Ok(machine.cgroup.kill()?),
            _ => Ok(()),
        }
    }

    /// Highest memory use of the function so far in bytes.
    pub fn peak_memory(&self) -> u64 {
        match &self.machine {
            Some(machine) => machine.cgroup.peak_memory(),
            None => 0,
        }
    }
}

/// Reaps whatever has ended: the runtime, and orphans that fell to PID 1. True if no child is left.
pub fn reap(mut ended: impl FnMut(Pid, WaitStatus)) -> bool {
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) => ended(pid, status),
            Ok(None) => return false,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return true, // ECHILD
        }
    }
}

/// Signals the session of `pid`, if there is one left.
fn signal(pid: Option<Pid>, signal: Signal) -> Result<(), PlaceError> {
    match pid.map(|pid| kill_process_group(pid, signal)) {
        None | Some(Ok(()) | Err(rustix::io::Errno::SRCH)) => Ok(()),
        Some(Err(error)) => Err(PlaceError::Signal(error.into())),
    }
}

/// The capacity change of a hot-plugged medium arrives by an interrupt and a work queue: look until
/// it has.
fn wait_for_code() -> Result<(), PlaceError> {
    let end = Instant::now() + CODE_LIMIT;
    loop {
        let size = fs::read_to_string("/sys/block/vdb/size").unwrap_or_default();
        if size.trim().parse::<u64>().is_ok_and(|sectors| sectors > 0) {
            return Ok(());
        }
        if Instant::now() > end {
            return Err(PlaceError::NoCode);
        }
        thread::sleep(Duration::from_micros(500));
    }
}
