//! The process of one VMM, from its launch until nothing of it is left.
//!
//! A task per process (the reaper) waits for its pidfd, reaps it, removes its control group and
//! gives its user id back, in this order: a user id is never in use twice. [`Process`] is what the
//! rest of the crate holds; dropping it kills.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags},
    process::{PidfdFlags, Signal, WaitId, WaitIdOptions},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::watch,
};

use crate::audit;

/// Bytes of a VMM's standard error that are kept for its obituary.
const TAIL: usize = 2048;

/// How long the rest of standard error may take to arrive after the process has ended.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// How a process ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) code: Option<i32>,
    pub(crate) signal: Option<i32>,
    /// End of its standard error.
    pub(crate) stderr: String,
}

/// Reaps the child behind `pidfd`, blocking.
pub(crate) fn wait(pidfd: &OwnedFd) -> io::Result<End> {
    loop {
        match rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED) {
            Ok(Some(status)) => {
                return Ok(End {
                    code: status.exit_status(),
                    signal: status.terminating_signal(),
                    stderr: String::new(),
                });
            }
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            // Someone else in this process reaps all children: it has ended, that much is known.
            Err(rustix::io::Errno::CHILD) => return Ok(End::default()),
            Err(e) => return Err(e.into()),
        }
    }
}

/// A VMM's process. Dropping it kills the process.
#[derive(Debug)]
pub(crate) struct Process {
    pid: u32,
    pidfd: Arc<OwnedFd>,
    end: watch::Receiver<Option<End>>,
}

impl Process {
    /// Takes care of a launched child: reads `stderr`, reaps it, and then runs `clean`. Must be
    /// called within a tokio runtime.
    pub(crate) fn adopt<C, F>(
        pid: u32,
        pidfd: Arc<OwnedFd>,
        name: String,
        stderr: io::PipeReader,
        clean: C,
    ) -> Self
    where
        C: FnOnce() -> F + Send + 'static,
        F: Future<Output = ()> + Send,
    {
        let (sender, end) = watch::channel(None);
        let child = Child { pidfd: pidfd.clone(), reaped: false };
        tokio::spawn(async move {
            let tail = Arc::new(Mutex::new(Vec::new()));
            let reading = tokio::spawn(follow(name.clone(), stderr, tail.clone()));
            let mut end = child.reap().await;
            if end.signal == Some(libc::SIGSYS) {
                // A bug of ours, or a guest that has taken its VMM over: either must be looked into.
                // The log may be long, and is slow to come: nobody waits for it.
                let vm = name.clone();
                tokio::task::spawn_blocking(move || {
                    let call = audit::refused_call(pid);
                    let call = call.as_deref().unwrap_or("see audit records of type 1326");
                    tracing::error!(
                        vm,
                        pid,
                        call,
                        "a VMM was killed for a system call that its seccomp filter forbids"
                    );
                });
            }
            let _ = tokio::time::timeout(LAST_WORDS, reading).await;
            end.stderr = {
                let tail = tail.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                String::from_utf8_lossy(&tail).trim().to_owned()
            };
            sender.send_replace(Some(end));
            clean().await;
        });
        Self { pid, pidfd, end }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it runs now; the reaper learns of its end a little later.
    pub(crate) fn is_alive(&self) -> bool {
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut poll = [PollFd::new(&self.pidfd, PollFlags::IN)];
        // A poll that fails says nothing; then the reaper does.
        rustix::event::poll(&mut poll, Some(&now)).map_or(self.end.borrow().is_none(), |n| n == 0)
    }

    /// Kills it; nothing can be sent to another process by mistake, however late this comes.
    pub(crate) fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Waits until it has ended and been reaped.
    pub(crate) async fn ended(&mut self) {
        // Fails only if the runtime is shutting down and has dropped the reaper, which has killed it.
        let _ = self.end.wait_for(Option::is_some).await;
    }

    /// How it ended, if that is known by now.
    pub(crate) fn end(&self) -> End {
        self.end.borrow().clone().unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A child that must be reaped; if the runtime drops the reaper's task, it is killed and reaped in
/// place.
struct Child {
    pidfd: Arc<OwnedFd>,
    reaped: bool,
}

impl Child {
    async fn reap(mut self) -> End {
        if let Err(error) = readable(&self.pidfd).await {
            tracing::error!(%error, "can't wait for a VMM: killing it");
            let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
        }
        let end = wait(&self.pidfd);
        self.reaped = true;
        end.unwrap_or_default()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.reaped {
            let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
            let _ = wait(&self.pidfd);
        }
    }
}

async fn readable(pidfd: &OwnedFd) -> io::Result<()> {
    // SAFETY: an OwnedFd always reports the one descriptor that it owns and keeps open.
    let pidfd = unsafe { AsyncFd::register_with_interest(pidfd.try_clone()?, Interest::READABLE)? };
    pidfd.readable().await?.retain_ready();
    Ok(())
}

/// Logs a VMM's standard error line by line and keeps its end. What a VMM writes is not trusted:
/// lines are cut, and control characters escaped by the debug format.
async fn follow(name: String, pipe: io::PipeReader, tail: Arc<Mutex<Vec<u8>>>) {
    let Ok(pipe) = tokio::net::unix::pipe::Receiver::from_owned_fd(pipe.into()) else { return };
    let mut buffer = vec![0; 4096];
    let mut line = Vec::new();
    loop {
        let count = match read(&pipe, &mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(count) => count,
        };
        {
            let mut tail = tail.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            tail.extend_from_slice(&buffer[..count]);
            let surplus = tail.len().saturating_sub(TAIL);
            tail.drain(..surplus);
        }
        for &byte in &buffer[..count] {
            if byte != b'\n' && line.len() < 1024 {
                line.push(byte);
                continue;
            }
            tracing::debug!(vm = name, line = ?String::from_utf8_lossy(&line), "stderr");
            line.clear();
        }
    }
}

async fn read(pipe: &tokio::net::unix::pipe::Receiver, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        pipe.readable().await?;
        match pipe.try_read(buffer) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            other => return other,
        }
    }
}

/// Kills the process `pid` if it is the one that was started at `start_ticks`, and waits until it
/// is gone. For processes of an earlier life, which are nobody's children any more.
pub(crate) fn kill_stranger(pid: i32, start_ticks: u64, within: Duration) -> io::Result<()> {
    let Some(pid) = rustix::process::Pid::from_raw(pid) else { return Ok(()) };
    let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        other => other?,
    };
    // The pidfd is open, so from here on the pid stays this process's.
    if start_time(pid.as_raw_nonzero().get() as u32) != Some(start_ticks) {
        return Ok(());
    }
    rustix::process::pidfd_send_signal(&pidfd, Signal::KILL)?;
    let mut poll = [PollFd::new(&pidfd, PollFlags::IN)];
    let within = rustix::event::Timespec::try_from(within)
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    if rustix::event::poll(&mut poll, Some(&within))? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    Ok(())
}

/// When `pid` was started, in clock ticks since boot: with the pid it names a process for ever.
pub(crate) fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name may hold blanks and parentheses; fields count from its end.
    stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stranger_is_killed_only_if_it_is_the_one() {
        let mut sleeper = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let started = start_time(sleeper.id()).unwrap();
        let pid = sleeper.id() as i32;
        kill_stranger(pid, started + 1, Duration::from_secs(5)).unwrap();
        assert!(sleeper.try_wait().unwrap().is_none(), "not ours: must live");
        kill_stranger(pid, started, Duration::from_secs(5)).unwrap();
        assert!(!sleeper.wait().unwrap().success());
        kill_stranger(pid, started, Duration::from_secs(5)).unwrap();
    }
}
