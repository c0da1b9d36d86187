//! SIGCHLD as a descriptor, so that the loop hears of ended children between two other events and
//! never in the middle of one.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd},
};

/// Signals could not be redirected.
#[derive(Debug, thiserror::Error)]
#[error("signalfd: {0}")]
pub struct SignalError(io::Error);

/// Tells when a child has ended.
#[derive(Debug)]
pub struct Signals {
    fd: File,
    pending: bool,
}

impl Signals {
    /// Blocks SIGCHLD for this thread (and its later threads; children start with an empty mask)
    /// and ignores SIGPIPE.
    ///
    /// # Errors
    /// [`SignalError`].
    pub fn new() -> Result<Self, SignalError> {
        let failed = || SignalError(io::Error::last_os_error());
        // SAFETY: an all-zero signal set is valid memory for `sigemptyset` to initialise, and the
        // set outlives each call; SIG_IGN is a valid disposition.
        let raw = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, libc::SIGCHLD);
            if libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) < 0 {
                return Err(failed());
            }
            libc::signal(libc::SIGPIPE, libc::SIG_IGN);
            libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        if raw < 0 {
            return Err(failed());
        }
        // SAFETY: the descriptor is new and nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        Ok(Self { fd: fd.into(), pending: false })
    }

    /// What to poll.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Clears the descriptor and remembers that a child has ended.
    pub fn read(&mut self) {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        // One read clears it: pending signals of one number are one.
        let _ = self.fd.read(&mut info);
        self.pending = true;
    }

    /// Whether a child has ended since the last call.
    pub fn take(&mut self) -> bool {
        std::mem::take(&mut self.pending)
    }
}
