//! One VMM with everything that belongs to it, and the two conversations with it at once: while
//! the host waits for the guest, the VMM may end, and the reason must come out.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use firn_pages::pagemap::Pagemap;
use firn_proto::{
    control::{Failure, FromVmm, ToVmm},
    guest::{FromGuest, ToGuest},
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

/// Time between a VMM's last message, or the first trace of its end, and its end.
const DYING: Duration = Duration::from_secs(1);

/// Time until the kernel has taken a process apart that was killed.
const KILLED: Duration = Duration::from_secs(10);

/// Why a step failed; each operation makes its own error of it. Only [`Vm::trouble`] tells an error of
/// the kernel's from what the end of a VMM looks like, so only this module makes one of such an error.
#[derive(Debug)]
pub(crate) enum Trouble {
    Died(VmmExit),
    TimedOut {
        after: Duration,
        /// Where the microVM stood then, if the VMM could tell.
        diagnosis: Option<String>,
    },
    Refused(Failure),
    Protocol(String),
    /// What was to be sent is not allowed.
    Request(String),
    Io(io::Error),
}

impl From<StreamError> for ControlError {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::Protocol(message) => Self::Protocol(message),
            StreamError::Io(error) => error.into(),
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
    /// Its page tables as the kernel tells them, once it has needed them.
    pub(crate) pagemap: Option<Arc<Pagemap>>,
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
        let answer = self.control.request(request, descriptors, within).await;
        self.step(answer).await
    }

    /// Its own page tables, for it to read.
    pub(crate) async fn pagemap(&mut self) -> Result<Arc<Pagemap>, Trouble> {
        if let Some(pagemap) = &self.pagemap {
            return Ok(pagemap.clone());
        }
        let opened = Pagemap::open(self.process.pid());
        let opened = Arc::new(self.step(opened).await?);
        Ok(self.pagemap.insert(opened).clone())
    }

    /// Every step of a VMM's life that can fail goes through here, whether it is a message, a write to its
    /// control group, or a look at its files in `/proc`: all of them fail in a way of their own when it
    /// ends. Whoever takes the step learns how it ended then.
    pub(crate) async fn step<T>(
        &mut self,
        result: Result<T, impl Into<ControlError>>,
    ) -> Result<T, Trouble> {
        match result {
            Ok(done) => Ok(done),
            Err(error) => Err(self.trouble(error.into()).await),
        }
    }

    /// Limits its CPU time to what a function of `memory_mb` has.
    pub(crate) async fn limit_cpu(&mut self, memory_mb: u32) -> Result<(), Trouble> {
        let limited = self.group.as_ref().map_or(Ok(()), |group| group.set_cpu(memory_mb));
        self.step(limited).await
    }

    /// Limits its memory.
    pub(crate) async fn limit_memory(&mut self, bytes: u64) -> Result<(), Trouble> {
        let limited = self.group.as_ref().map_or(Ok(()), |group| group.set_memory(bytes));
        self.step(limited).await
    }

    /// Sends a guest that has not run since its snapshot the moment when its clocks go on, and its
    /// renewal: both first on a new connection.
    pub(crate) async fn renew(&mut self, moment: u64, renew: &ToGuest) -> Result<(), Trouble> {
        match self.stream()?.queue_behind(&moment.to_le_bytes(), renew) {
            Err(StreamError::Protocol(message)) => Err(Trouble::Request(message)),
            other => self.step(other).await,
        }
    }

    /// Sends the guest a message: as much as the socket takes at once, the rest while its answer is
    /// waited for.
    pub(crate) async fn queue(&mut self, message: &ToGuest) -> Result<(), Trouble> {
        match self.stream()?.queue(message) {
            // It is our own message that the protocol does not allow.
            Err(StreamError::Protocol(message)) => Err(Trouble::Request(message)),
            other => self.step(other).await,
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
        let error = tokio::select! {
            biased;
            message = timeout_at(end, stream.next()) => match message {
                Ok(Ok(Some(message))) => return Ok(message),
                Ok(Ok(None)) => ControlError::Ended,
                Ok(Err(error)) => error.into(),
                Err(_) => ControlError::TimedOut(within),
            },
            error = self.control.unexpected() => {
                // Its last words, and maybe even the answer, may still be on their way.
                if let Ok(Ok(Some(message))) = timeout(DYING, stream.next()).await {
                    return Ok(message);
                }
                error
            }
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

    /// What a failed step means. Whatever failed, the first question is whether the VMM has ended, or is
    /// about to: then it is how, and no more is known of why the step failed. One that lives is killed,
    /// unless it only refused.
    async fn trouble(&mut self, error: ControlError) -> Trouble {
        let trouble = match error {
            ControlError::Ended => return Trouble::Died(self.obituary().await),
            // Whoever answers lives.
            ControlError::Refused(failure) => return Trouble::Refused(failure),
            ControlError::Protocol(message) => Trouble::Protocol(message),
            ControlError::TimedOut(_) if !self.process.is_alive() => {
                return Trouble::Died(self.obituary().await);
            }
            ControlError::TimedOut(after) => {
                Trouble::TimedOut { after, diagnosis: self.control.diagnose().await }
            }
            // Its files go before it does.
            ControlError::Io(error) => match self.ended_within(DYING).await {
                true => return Trouble::Died(self.obituary().await),
                false => Trouble::Io(error),
            },
        };
        self.process.kill();
        trouble
    }

    /// Waits for the end of a process that is ending, and helps if it does not.
    async fn obituary(&mut self) -> VmmExit {
        if !self.ended_within(DYING).await {
            self.process.kill();
            self.ended_within(KILLED).await;
        }
        let end = self.process.end();
        let (reason, detail) = match self.control.last_words() {
            Some(exit) => (Some(exit.reason), exit.detail),
            None => (None, String::new()),
        };
        let detail = if detail.is_empty() { end.stderr } else { detail };
        VmmExit { reason, code: end.code, signal: end.signal, detail }
    }

    /// Whether the process ends in this time; how is in [`Process::end`] then.
    async fn ended_within(&mut self, within: Duration) -> bool {
        timeout(within * self.patience, self.process.ended()).await.is_ok()
    }
}

/// How an error that says that time is up goes on.
pub(crate) fn diagnosed(diagnosis: &Option<String>) -> String {
    diagnosis.as_ref().map(|text| format!("; it stands at: {text}")).unwrap_or_default()
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
