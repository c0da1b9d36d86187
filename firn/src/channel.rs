//! The host's end of the control socket of one VMM: one request at a time, each with its answer.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use firn_proto::control::{self, Exit, Failure, FromVmm, MAX_DESCRIPTORS, MAX_MESSAGE, ToVmm};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
    SocketType,
};
use tokio::io::unix::AsyncFd;

/// Time for a diagnosis. It is asked for when time is up already, so it is short.
const DIAGNOSIS: Duration = Duration::from_millis(500);

/// Most characters of a diagnosis that are passed on.
const MOST_OF_A_DIAGNOSIS: usize = 4096;

/// Messages that a closed socket may still hold: more than its buffer has room for.
const MOST_UNREAD: usize = 4096;

/// Why there is no answer.
#[derive(Debug)]
pub(crate) enum ControlError {
    /// The VMM said that it ends, or its end of a connection is closed. What it said is in
    /// [`Control::last_words`].
    Ended,
    /// The VMM refused the request.
    Refused(Failure),
    /// The VMM broke the protocol.
    Protocol(String),
    /// It took longer than this.
    TimedOut(Duration),
    /// The host's kernel refused.
    Io(io::Error),
}

impl From<io::Error> for ControlError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Self::Ended,
            _ => Self::Io(error),
        }
    }
}

/// The host's end.
#[derive(Debug)]
pub(crate) struct Control {
    socket: AsyncFd<OwnedFd>,
    buffer: Vec<u8>,
    /// What the VMM said of its end.
    exited: Option<Exit>,
}

impl Control {
    /// Both ends: ours, and the one that becomes [`control::CONTROL_FD`] of the VMM. Must be
    /// called within a tokio runtime.
    pub(crate) fn pair() -> io::Result<(Self, OwnedFd)> {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        rustix::io::ioctl_fionbio(&ours, true)?;
        // SAFETY: an OwnedFd always reports the one descriptor that it owns and keeps open.
        let socket = unsafe { AsyncFd::register(ours)? };
        // One more than allowed, so that a longer message shows.
        Ok((Self { socket, buffer: vec![0; MAX_MESSAGE + 1], exited: None }, theirs))
    }

    /// Sends a request with its descriptors and waits for its answer, which is none of
    /// [`FromVmm::Failed`] and [`FromVmm::Exited`].
    pub(crate) async fn request(
        &mut self,
        request: &ToVmm,
        descriptors: &[BorrowedFd<'_>],
        within: Duration,
    ) -> Result<FromVmm, ControlError> {
        let exchange = async {
            self.send(request, descriptors).await?;
            self.answer().await
        };
        tokio::time::timeout(within, exchange).await.unwrap_or(Err(ControlError::TimedOut(within)))
    }

    /// Sends a request.
    pub(crate) async fn send(
        &self,
        request: &ToVmm,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ControlError> {
        let message =
            control::encode(request).map_err(|e| ControlError::Protocol(e.to_string()))?;
        let message = [io::IoSlice::new(&message)];
        self.socket
            .async_io(tokio::io::Interest::WRITABLE, |socket| {
                let mut space =
                    [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
                let mut ancillary = SendAncillaryBuffer::new(&mut space);
                if !descriptors.is_empty()
                    && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors))
                {
                    return Err(io::Error::other("too many descriptors for one message"));
                }
                let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
                Ok(rustix::net::sendmsg(socket.as_fd(), &message, &mut ancillary, flags)?)
            })
            .await?;
        Ok(())
    }

    /// Waits for the answer to a request.
    pub(crate) async fn answer(&mut self) -> Result<FromVmm, ControlError> {
        match self.receive().await? {
            FromVmm::Failed(failure) => Err(ControlError::Refused(failure)),
            answer => Ok(answer),
        }
    }

    /// Waits for a message that nobody asked for: only [`FromVmm::Exited`] is one.
    pub(crate) async fn unexpected(&mut self) -> ControlError {
        match self.receive().await {
            Ok(other) => ControlError::Protocol(format!("unasked for: {}", name(&other))),
            Err(error) => error,
        }
    }

    /// Where the microVM stands, in the VMM's words; `None`: it does not say, or not in time. Answers to what
    /// was asked before are dropped.
    pub(crate) async fn diagnose(&mut self) -> Option<String> {
        let exchange = async {
            self.send(&ToVmm::Diagnose, &[]).await?;
            loop {
                if let FromVmm::Diagnosis(text) = self.receive().await? {
                    return Ok::<_, ControlError>(text);
                }
            }
        };
        let text = tokio::time::timeout(DIAGNOSIS, exchange).await.ok()?.ok()?;
        // Nothing that a VMM writes is trusted, and this goes to logs and terminals.
        Some(text.chars().filter(|c| !c.is_control()).take(MOST_OF_A_DIAGNOSIS).collect())
    }

    /// What the VMM has said of its end, if it has said anything. To be asked when its process has ended:
    /// nothing is on its way then, and answers that nobody waits for any more are dropped.
    pub(crate) fn last_words(&mut self) -> Option<Exit> {
        for _ in 0..MOST_UNREAD {
            if self.exited.is_some() {
                break;
            }
            match take(self.socket.get_ref(), &mut self.buffer) {
                Ok(0) => break,
                Ok(count) => drop(self.decode(count)),
                // Told once, because the VMM has not read all that it was sent; what it has sent comes after.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
                Err(_) => break,
            }
        }
        self.exited.clone()
    }

    /// Cancel-safe: a datagram is taken whole or not at all.
    async fn receive(&mut self) -> Result<FromVmm, ControlError> {
        let buffer = &mut self.buffer;
        let reading = tokio::io::Interest::READABLE;
        let count = self.socket.async_io(reading, |socket| take(socket, buffer)).await?;
        self.decode(count)
    }

    fn decode(&mut self, count: usize) -> Result<FromVmm, ControlError> {
        if count > MAX_MESSAGE {
            let message = format!("control message over {MAX_MESSAGE} bytes");
            return Err(ControlError::Protocol(message));
        }
        if count == 0 {
            return Err(ControlError::Ended);
        }
        match control::decode_from_vmm(&self.buffer[..count]) {
            Ok(FromVmm::Exited(exit)) => {
                self.exited = Some(exit);
                Err(ControlError::Ended)
            }
            Ok(message) => Ok(message),
            Err(e) => Err(ControlError::Protocol(format!("control message: {e}"))),
        }
    }
}

/// Reads one message, if there is one. There is no room for descriptors: the VMM has none to give, and
/// the kernel drops what it sends all the same.
fn take(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    Ok(rustix::net::recv(socket.as_fd(), buffer, RecvFlags::DONTWAIT)?.1)
}

/// A message's name, for errors.
pub(crate) fn name(message: &FromVmm) -> &'static str {
    match message {
        FromVmm::Ready(_) => "Ready",
        FromVmm::Booted(_) => "Booted",
        FromVmm::Thawed(_) => "Thawed",
        FromVmm::Done => "Done",
        FromVmm::Reclaimed(_) => "Reclaimed",
        FromVmm::Saved(_) => "Saved",
        FromVmm::Reset(_) => "Reset",
        FromVmm::Stats(_) => "Stats",
        FromVmm::Failed(_) => "Failed",
        FromVmm::Exited(_) => "Exited",
        FromVmm::Diagnosis(_) => "Diagnosis",
        FromVmm::Paused(_) => "Paused",
        _ => "an unknown message",
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read};

    use firn_proto::control::{ExitReason, FailureKind};
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage};

    use super::*;

    fn say(socket: &OwnedFd, message: &FromVmm) {
        let bytes = control::encode(message).unwrap();
        rustix::net::send(socket, &bytes, SendFlags::empty()).unwrap();
    }

    #[tokio::test]
    async fn descriptors_arrive_in_their_order() {
        let (control, theirs) = Control::pair().unwrap();
        let files =
            ["a", "b", "c"].map(|text| crate::memfile::sealed("x", text.as_bytes()).unwrap());
        let borrowed: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let request = ToVmm::Save;
        control.send(&request, &borrowed).await.unwrap();
        let mut bytes = [0; 512];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::net::recvmsg(
            &theirs,
            &mut [io::IoSliceMut::new(&mut bytes)],
            &mut ancillary,
            RecvFlags::empty(),
        )
        .unwrap();
        assert_eq!(control::decode_to_vmm(&bytes[..received.bytes]), Ok(request));
        let mut text = String::new();
        for message in ancillary.drain() {
            let RecvAncillaryMessage::ScmRights(fds) = message else { continue };
            for fd in fds {
                File::from(fd).read_to_string(&mut text).unwrap();
            }
        }
        assert_eq!(text, "abc");
    }

    #[tokio::test]
    async fn every_way_to_fail_has_its_name() {
        let second = Duration::from_secs(1);
        let (mut control, theirs) = Control::pair().unwrap();
        say(&theirs, &FromVmm::Done);
        assert_eq!(control.request(&ToVmm::Pause, &[], second).await.unwrap(), FromVmm::Done);
        let failure = Failure { kind: FailureKind::Kvm, message: "no".into() };
        say(&theirs, &FromVmm::Failed(failure));
        let error = control.request(&ToVmm::Pause, &[], second).await.unwrap_err();
        assert!(matches!(error, ControlError::Refused(_)), "{error:?}");
        rustix::net::send(&theirs, &[0xff; 9], SendFlags::empty()).unwrap();
        let error = control.request(&ToVmm::Pause, &[], second).await.unwrap_err();
        assert!(matches!(error, ControlError::Protocol(_)), "{error:?}");
        say(&theirs, &FromVmm::Done);
        assert!(matches!(control.unexpected().await, ControlError::Protocol(_)));
        let exit = Exit { reason: ExitReason::TripleFault, detail: String::new() };
        say(&theirs, &FromVmm::Exited(exit.clone()));
        assert!(matches!(control.unexpected().await, ControlError::Ended));
        assert_eq!(control.last_words(), Some(exit.clone()));
        let short = Duration::from_millis(10);
        let error = control.request(&ToVmm::Pause, &[], short).await.unwrap_err();
        assert!(matches!(error, ControlError::TimedOut(_)), "{error:?}");
        drop(theirs);
        assert!(matches!(control.unexpected().await, ControlError::Ended));
        let error = control.request(&ToVmm::Pause, &[], second).await.unwrap_err();
        assert!(matches!(error, ControlError::Ended), "{error:?}");
        assert_eq!(control.last_words(), Some(exit), "whoever asks, and as often as they ask");
    }

    #[tokio::test]
    async fn a_diagnosis_comes_behind_late_answers_or_not_at_all() {
        let (mut control, theirs) = Control::pair().unwrap();
        say(&theirs, &FromVmm::Done);
        say(&theirs, &FromVmm::Diagnosis("RIP 1\n\x1b[2J".to_owned() + &"x".repeat(5000)));
        let text = control.diagnose().await.unwrap();
        assert!(text.starts_with("RIP 1[2Jxxx") && text.len() == MOST_OF_A_DIAGNOSIS, "{text}");
        let begun = std::time::Instant::now();
        assert_eq!(control.diagnose().await, None);
        assert!(begun.elapsed() >= DIAGNOSIS);
        let exit = Exit { reason: ExitReason::GuestPanic, detail: String::new() };
        say(&theirs, &FromVmm::Exited(exit.clone()));
        assert_eq!(control.diagnose().await, None);
        assert_eq!(control.last_words(), Some(exit));
        drop(theirs);
        assert_eq!(control.diagnose().await, None);
    }

    #[tokio::test]
    async fn last_words_are_found_behind_a_closed_socket() {
        let exit = Exit { reason: ExitReason::GuestPanic, detail: "why".into() };
        for unread in [false, true] {
            let (mut control, theirs) = Control::pair().unwrap();
            if unread {
                control.send(&ToVmm::Stats, &[]).await.unwrap();
            }
            say(&theirs, &FromVmm::Done);
            rustix::net::send(&theirs, &[0xff; 9], SendFlags::empty()).unwrap();
            say(&theirs, &FromVmm::Exited(exit.clone()));
            drop(theirs);
            // A request fails at once, before anything is read.
            let second = Duration::from_secs(1);
            let error = control.request(&ToVmm::Pause, &[], second).await.unwrap_err();
            assert!(matches!(error, ControlError::Ended), "{error:?}");
            assert_eq!(control.last_words(), Some(exit.clone()));
        }
        let (mut control, theirs) = Control::pair().unwrap();
        assert_eq!(control.last_words(), None);
        drop(theirs);
        assert_eq!(control.last_words(), None);
    }
}
