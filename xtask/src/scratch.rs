//! One directory for everything temporary of this run, and its removal however the run ends.
//!
//! A signal ends the process without dropping anything, so a thread takes SIGINT, SIGTERM and
//! SIGHUP, removes the directory, puts the terminal back and exits. Child processes are started so
//! that the kernel kills them with this one.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};
use std::thread;

use anyhow::{Context, Result};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

static DIRECTORY: Mutex<Option<tempfile::TempDir>> = Mutex::new(None);
static TERMINAL: OnceLock<Termios> = OnceLock::new();

/// The directory, made on first use.
pub fn directory() -> Result<PathBuf> {
    let mut directory = DIRECTORY.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some(directory) = &*directory {
        return Ok(directory.path().to_owned());
    }
    let made = tempfile::Builder::new()
        .prefix("firn-xtask-")
        .tempdir()
        .context("cannot create a temporary directory")?;
    Ok(directory.insert(made).path().to_owned())
}

/// Removes the directory; call it before the process exits.
pub fn remove() {
    let mut directory = DIRECTORY.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some(directory) = directory.take() {
        let path: PathBuf = Path::to_owned(directory.path());
        if let Err(error) = directory.close() {
            eprintln!("xtask: cannot remove {}: {error}", path.display());
        }
    }
}

/// Starts the thread that takes the signals; call it once, first.
pub fn clean_up_on_signals() -> Result<()> {
    if let Ok(terminal) = tcgetattr(io::stdin()) {
        let _ = TERMINAL.set(terminal);
    }
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            if let Some(terminal) = TERMINAL.get() {
                let _ = tcsetattr(io::stdin(), OptionalActions::Now, terminal);
            }
            remove();
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}
