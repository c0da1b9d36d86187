//! One VMM with everything that belongs to it, and the two conversations with it at once: while
//! the host waits for the guest, the VMM may end, and the reason must come out.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use firn_proto::{
    control::{Exit, Failure, FromVmm, ToVmm},
    guest::FromGuest,
};
use tokio::time::{Instant, timeout, timeout_at};

use crate::{
    Phases, ShellClass, VmmExit,
    cgroup::Group,
    channel::{self, Control, ControlError},
    host::Inner,
    phases::Stopwatch,
    process::Process,
    stream::{Stream, StreamError},
};

/// Time for one request to the VMM that only takes ioctls.
const REQUEST: Duration = Duration::from_secs(5);

/// Time between a VMM's last message and its end.
const DYING: Duration = Duration::from_secs(1);

/// Why a conversation failed; each operation makes its own error of it.
#[derive(Debug)]
pub(crate) enum Trouble {
    Died(VmmExit),
    TimedOut(Duration),
    Refused(Failure),
    Protocol(String),
    Io(io::Error),
}

impl From<StreamError> for Trouble {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::Protocol(message) => Self::Protocol(message),
            StreamError::Io(error) => Self::Io(error),
        }
    }
}

/// A VMM. Dropping it kills it.
#[derive(Debug)]
pub(crate) struct Vm {
    pub(crate) name: String,
    pub(crate) class: ShellClass,
    pub(crate) process: Process,
    pub(crate) control: Control,
    pub(crate) group: Option<Arc<Group>>,
    /// The empty private delta of `/tmp`, until the guest is given it.
    pub(crate) delta: Option<OwnedFd>,
    /// Its page tables as the kernel tells them, once it has been reset.
    pub(crate) pagemap: Option<OwnedFd>,
    /// The invoke connection, once there is a guest.
    pub(crate) stream: Option<Stream>,
    pub(crate) patience: u32,
}

impl Vm {
    /// A request to the VMM that takes no longer than ioctls do.
    pub(crate) async fn request(
        &mut self,
        request: &ToVmm,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<FromVmm, Trouble> {
        self.request_within(request, descriptors, REQUEST).await
    }

    /// A request to the VMM.
    pub(crate) async fn request_within(
        &mut self,
        request: &ToVmm,
        descriptors: &[BorrowedFd<'_>],
        within: Duration,
    ) -> Result<FromVmm, Trouble> {
        let within = within * self.patience;
        match self.control.request(request, descriptors, within).await {
            Ok(answer) => Ok(answer),
            Err(error) => Err(self.trouble(error).await),
        }
    }

    /// Kills it and waits until nothing is left.
    pub(crate) async fn end(mut self, inner: &Inner) -> Phases {
        let mut watch = Stopwatch::start();
        self.process.kill();
        self.process.ended().await;
        watch.mark("reaped");
        inner.live.wait_until_gone(self.process.pid()).await;
        watch.mark("gone");
        watch.finish()
    }

    /// A request whose answer is [`FromVmm::Done`].
    pub(crate) async fn order(
        &mut self,
        request: &ToVmm,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), Trouble> {
        match self.request(request, descriptors).await? {
            FromVmm::Done => Ok(()),
            other => Err(unexpected("Done", channel::name(&other))),
        }
    }

    /// The invoke connection; absent only by a mistake of ours.
    pub(crate) fn stream(&mut self) -> Result<&mut Stream, Trouble> {
        self.stream.as_mut().ok_or_else(|| Trouble::Protocol("there is no guest yet".into()))
    }

    /// The guest's next message. Time limits are the caller's, without patience; what was asked is
    /// killed when it passes them.
    pub(crate) async fn frame(&mut self, within: Duration) -> Result<FromGuest, Trouble> {
        self.frame_until(Instant::now() + within, within).await
    }

    /// The same where several messages may come until `end`, which was `within` when it was set.
    pub(crate) async fn frame_until(
        &mut self,
        end: Instant,
        within: Duration,
    ) -> Result<FromGuest, Trouble> {
        let Some(stream) = self.stream.as_mut() else {
            return Err(Trouble::Protocol("there is no guest yet".into()));
        };
        let ended = tokio::select! {
            biased;
            message = timeout_at(end, stream.next()) => match message {
                Ok(Ok(Some(message))) => return Ok(message),
                Ok(Ok(None)) => None,
                Ok(Err(error)) => {
                    self.process.kill();
                    return Err(error.into());
                }
                Err(_) => {
                    self.process.kill();
                    return Err(Trouble::TimedOut(within));
                }
            },
            error = self.control.unexpected() => Some(error),
        };
        let error = match ended {
            Some(error) => {
                // Its last words, and maybe even the answer, may still be on their way.
                if let Ok(Ok(Some(message))) = timeout(DYING, stream.next()).await {
                    return Ok(message);
                }
                error
            }
            None => timeout(DYING * self.patience, self.control.unexpected())
                .await
                .unwrap_or(ControlError::Closed),
        };
        Err(self.trouble(error).await)
    }

    /// The guest said something else than it should: it will not be asked again.
    pub(crate) fn violated(&self, expected: &str, found: &FromGuest) -> Trouble {
        self.kill_for(format!("{} instead of {expected}", frame_name(found)))
    }

    /// The guest broke the protocol in this way.
    pub(crate) fn kill_for(&self, violation: String) -> Trouble {
        self.process.kill();
        Trouble::Protocol(violation)
    }

    /// What a failed conversation means; for a VMM that ended, waits for how.
    pub(crate) async fn trouble(&mut self, error: ControlError) -> Trouble {
        match error {
            ControlError::Exited(exit) => Trouble::Died(self.obituary(Some(exit)).await),
            ControlError::Closed => Trouble::Died(self.obituary(None).await),
            ControlError::Refused(failure) => Trouble::Refused(failure),
            ControlError::Protocol(message) => {
                self.process.kill();
                Trouble::Protocol(message)
            }
            ControlError::TimedOut(after) => {
                self.process.kill();
                Trouble::TimedOut(after)
            }
            ControlError::Io(error) => Trouble::Io(error),
        }
    }

    /// Waits for the end of a process that is ending, and helps if it does not.
    async fn obituary(&mut self, exit: Option<Exit>) -> VmmExit {
        let end = match timeout(DYING * self.patience, self.process.ended()).await {
            Ok(end) => end,
            Err(_) => {
                self.process.kill();
                self.process.ended().await
            }
        };
        let (reason, detail) = match exit {
            Some(exit) => (Some(exit.reason), exit.detail),
            None => (None, String::new()),
        };
        let detail = if detail.is_empty() { end.stderr } else { detail };
        VmmExit { reason, code: end.code, signal: end.signal, detail }
    }
}

/// An answer to something else.
pub(crate) fn unexpected(expected: &str, found: &str) -> Trouble {
    Trouble::Protocol(format!("{found} instead of {expected}"))
}

/// A guest message's name, for errors.
fn frame_name(message: &FromGuest) -> &'static str {
    match message {
        FromGuest::Ready(_) => "Ready",
        FromGuest::Loaded(_) => "Loaded",
        FromGuest::Frozen => "Frozen",
        FromGuest::Renewed(_) => "Renewed",
        FromGuest::Log(_) => "Log",
        FromGuest::Done(_) => "Done",
        FromGuest::Begin(_) => "Begin",
        FromGuest::Chunk(_) => "Chunk",
        FromGuest::Call(_) => "Call",
        FromGuest::Abandon => "Abandon",
        FromGuest::Segment(_) => "Segment",
        _ => "an unknown message",
    }
}
