//! Directories for everything temporary of this run, and their removal however the run ends.
//!
//! A signal ends the process without dropping anything, so a thread takes SIGINT, SIGTERM and
//! SIGHUP, removes the directories, puts the terminal back and exits. Child processes are started so
//! that the kernel kills them with this one.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, mpsc};
use std::thread;

use anyhow::{Context, Result};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use tempfile::TempDir;

static DIRECTORIES: Mutex<Vec<TempDir>> = Mutex::new(Vec::new());
static OWN: OnceLock<PathBuf> = OnceLock::new();
static TERMINAL: OnceLock<Termios> = OnceLock::new();

/// The directory of this run, made on first use.
pub fn directory() -> Result<PathBuf> {
    if let Some(path) = OWN.get() {
        return Ok(path.clone());
    }
    let made = make(&std::env::temp_dir(), "firn-xtask-")?;
    Ok(OWN.get_or_init(|| made).clone())
}

/// A further directory, where there is room or from where it can be renamed.
pub fn beside(root: &Path, prefix: &str) -> Result<PathBuf> {
    make(root, &format!(".{prefix}-"))
}

/// Removes one of these directories early; or forgets it, if it was renamed.
pub fn remove_one(path: &Path) {
    let mut directories = directories();
    if let Some(at) = directories.iter().position(|directory| directory.path() == path) {
        close(directories.swap_remove(at));
    }
}

/// Removes all directories; call it before the process exits.
pub fn remove() {
    directories().drain(..).for_each(close);
}

fn make(root: &Path, prefix: &str) -> Result<PathBuf> {
    let made = tempfile::Builder::new()
        .prefix(prefix)
        .tempdir_in(root)
        .with_context(|| format!("cannot create a directory in {}", root.display()))?;
    let path = made.path().to_owned();
    directories().push(made);
    Ok(path)
}

fn close(directory: TempDir) {
    let path: PathBuf = directory.path().to_owned();
    if let Err(error) = directory.close()
        && error.kind() != io::ErrorKind::NotFound
    {
        eprintln!("xtask: cannot remove {}: {error}", path.display());
    }
}

fn directories() -> MutexGuard<'static, Vec<TempDir>> {
    DIRECTORIES.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Starts the thread that takes the signals; call it once, first.
pub fn clean_up_on_signals() -> Result<()> {
    if let Ok(terminal) = tcgetattr(io::stdin()) {
        let _ = TERMINAL.set(terminal);
    }
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    thread::spawn(move || {
        for signal in signals.forever() {
            // Somebody waits for it: the run goes on to its orderly end. A second signal ends it.
            if let Some(waiting) = waiting().take() {
                drop(waiting);
                continue;
            }
            if let Some(terminal) = TERMINAL.get() {
                let _ = tcsetattr(io::stdin(), OptionalActions::Now, terminal);
            }
            remove();
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}

/// Waits until a person presses Ctrl-C, which then does not end the process.
pub fn wait_for_signal() {
    let (sender, receiver) = mpsc::channel::<()>();
    *waiting() = Some(sender);
    let _ = receiver.recv();
}

fn waiting() -> MutexGuard<'static, Option<mpsc::Sender<()>>> {
    static WAITING: Mutex<Option<mpsc::Sender<()>>> = Mutex::new(None);
    WAITING.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
