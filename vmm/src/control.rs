//! The device thread: one event loop over the control socket, the invoke stream and the vCPUs'
//! bell. It is the process's main thread and, after the shell stands, does nothing but this.

use std::{
    io::IoSliceMut,
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd},
    sync::Arc,
};

use firn_proto::control::{
    self, CONTROL_FD, Exit, ExitReason, FailureKind, FromVmm, KVM_FD, MAX_DESCRIPTORS, MAX_MESSAGE,
    Phase, ToVmm,
};
use rustix::{
    event::{
        Timespec,
        epoll::{self, EventData, EventFlags},
    },
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags},
};

use crate::{
    console::say,
    descriptors::{EPOLL, place},
    seccomp,
    stats::Clock,
    vm::{RequestError, Vm, kvm_at},
};

const TOKEN_CONTROL: u64 = 0;
const TOKEN_BELL: u64 = 1;
const TOKEN_STREAM: u64 = 2;

/// What the control socket brought.
enum Incoming {
    Message(ToVmm, Vec<OwnedFd>),
    Closed,
}

/// The control socket can't be used any more.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// A system call failed.
    #[error("control socket: {0}")]
    Socket(#[from] std::io::Error),
    /// The host sent what is no message of this protocol.
    #[error("control message: {0}")]
    Codec(#[from] firn_proto::CodecError),
    /// A message or its descriptors did not fit.
    #[error("control message was truncated")]
    Truncated,
}

struct Socket(OwnedFd);

impl Socket {
    fn receive(&self, buffer: &mut [u8]) -> Result<Incoming, ControlError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::net::recvmsg(
            &self.0,
            &mut [IoSliceMut::new(buffer)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )
        .map_err(std::io::Error::from)?;
        let descriptors: Vec<OwnedFd> = ancillary
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
                _ => None,
            })
            .flatten()
            .collect();
        if received.bytes == 0 {
            return Ok(Incoming::Closed);
        }
        if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(ControlError::Truncated);
        }
        Ok(Incoming::Message(control::decode_to_vmm(&buffer[..received.bytes])?, descriptors))
    }

    fn send(&self, message: &FromVmm) -> Result<(), ControlError> {
        let bytes = control::encode(message)?;
        rustix::net::send(&self.0, &bytes, SendFlags::NOSIGNAL).map_err(std::io::Error::from)?;
        Ok(())
    }
}

struct Server {
    socket: Socket,
    epoll: OwnedFd,
    clock: Arc<Clock>,
    vm: Option<Vm>,
}

/// Serves the control socket until the guest or the host ends it; returns the exit code.
///
/// # Safety
/// [`CONTROL_FD`] and [`KVM_FD`] are open, and nobody else in this process uses them.
pub unsafe fn serve(clock: Arc<Clock>) -> i32 {
    // SAFETY: the caller's promise.
    let socket = Socket(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) });
    let exit = match Server::new(socket, clock) {
        Ok(mut server) => {
            let exit = server.run();
            // Nobody may be left to hear it.
            let _ = server.socket.send(&FromVmm::Exited(exit.clone()));
            // The process ends now: to close and unmap everything first would only take time, and
            // system calls.
            std::mem::forget(server);
            exit
        }
        Err(error) => vmm_error(error),
    };
    if exit.reason.code() != 0 {
        say(format_args!("{:?}: {}", exit.reason, exit.detail));
    }
    exit.reason.code()
}

impl Server {
    fn new(socket: Socket, clock: Arc<Clock>) -> Result<Self, ControlError> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(std::io::Error::from)?;
        let epoll = place(epoll, &EPOLL)?;
        let data = EventData::new_u64(TOKEN_CONTROL);
        epoll::add(&epoll, &socket.0, data, EventFlags::IN).map_err(std::io::Error::from)?;
        Ok(Self { socket, epoll, clock, vm: None })
    }

    fn run(&mut self) -> Exit {
        let mut message = vec![0; MAX_MESSAGE];
        let mut events = Vec::with_capacity(4);
        loop {
            events.clear();
            let limit = self.vm.as_mut().and_then(Vm::look_within);
            let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
            let spare = rustix::buffer::spare_capacity(&mut events);
            match epoll::wait(&self.epoll, spare, limit.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return vmm_error(error),
            }
            if let (Some(_), Some(vm)) = (limit, &mut self.vm) {
                vm.look();
            }
            for event in &events {
                let result = match event.data.u64() {
                    TOKEN_CONTROL => self.control(&mut message),
                    TOKEN_STREAM => self.vm.as_mut().map_or(Ok(()), Vm::stream_ready),
                    _ => match self.vm.as_ref().and_then(Vm::ended) {
                        Some(exit) => Err(RequestError::Ended(exit)),
                        None => Ok(()),
                    },
                };
                match result {
                    Ok(()) => {}
                    Err(RequestError::Ended(exit)) => return exit,
                    Err(RequestError::Refused(failure)) => return vmm_error(failure.message),
                }
            }
        }
    }

    /// Takes one message and answers it. An error ends the process.
    fn control(&mut self, buffer: &mut [u8]) -> Result<(), RequestError> {
        let fatal = |error: ControlError| RequestError::Ended(vmm_error(error));
        let (message, descriptors) = match self.socket.receive(buffer).map_err(fatal)? {
            Incoming::Message(message, descriptors) => (message, descriptors),
            Incoming::Closed => {
                return Err(RequestError::Ended(Exit {
                    reason: ExitReason::Stopped,
                    detail: "the host closed the control socket".into(),
                }));
            }
        };
        // The first request of a life; later ones find their stamps taken.
        if matches!(message, ToVmm::Boot { .. } | ToVmm::Thaw { .. }) {
            self.clock.stamp(Phase::Received);
        }
        // After these there is no way back to an untouched shell.
        let once = matches!(message, ToVmm::Build(_) | ToVmm::Boot { .. } | ToVmm::Thaw { .. });
        let answer = match self.handle(message, descriptors) {
            Ok(answer) => answer,
            Err(RequestError::Refused(failure)) => {
                self.socket.send(&FromVmm::Failed(failure.clone())).map_err(fatal)?;
                if once {
                    return Err(RequestError::Refused(failure));
                }
                return Ok(());
            }
            Err(ended) => return Err(ended),
        };
        self.socket.send(&answer).map_err(fatal)
    }

    fn handle(
        &mut self,
        message: ToVmm,
        descriptors: Vec<OwnedFd>,
    ) -> Result<FromVmm, RequestError> {
        if let ToVmm::Build(config) = message {
            return self.build(config);
        }
        let Some(vm) = &mut self.vm else {
            return Err(RequestError::refused(
                FailureKind::BadRequest,
                "the first request is Build",
            ));
        };
        // Edge triggered, both ways: whoever is told pumps until nothing moves. When the device
        // closes the stream, epoll forgets it by itself.
        let epoll = &self.epoll;
        let watch_stream = |stream: BorrowedFd<'_>| {
            let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
            watch(epoll, stream, TOKEN_STREAM, flags)
        };
        match message {
            ToVmm::Boot { cmdline, initramfs, disks } => {
                vm.boot(&cmdline, initramfs, &disks, descriptors, watch_stream)?;
                Ok(FromVmm::Booted(self.clock.stamps()))
            }
            ToVmm::Thaw { disks, resume, plan } => {
                vm.thaw(&disks, resume, &plan, descriptors, watch_stream)?;
                Ok(FromVmm::Thawed(self.clock.stamps()))
            }
            ToVmm::Attach { slot, source } => {
                vm.attach(slot, source, descriptors).map(|()| FromVmm::Done)
            }
            ToVmm::Pause => {
                vm.pause()?;
                Ok(FromVmm::Paused(vm.raised_again_since()))
            }
            ToVmm::Reclaim => vm.reclaim().map(FromVmm::Reclaimed),
            ToVmm::Resume => vm.resume().map(|()| FromVmm::Done),
            ToVmm::Save => vm.save(descriptors).map(FromVmm::Saved),
            ToVmm::Reset => vm.reset(descriptors, watch_stream).map(FromVmm::Reset),
            ToVmm::Stats => Ok(FromVmm::Stats(vm.stats())),
            ToVmm::Diagnose => vm.diagnose().map(FromVmm::Diagnosis),
            ToVmm::Stop => Err(RequestError::Ended(Exit {
                reason: ExitReason::Stopped,
                detail: "the host asked".into(),
            })),
            other => Err(RequestError::refused(
                FailureKind::BadRequest,
                format!("this build does not know {other:?}"),
            )),
        }
    }

    fn build(&mut self, config: control::ShellConfig) -> Result<FromVmm, RequestError> {
        if self.vm.is_some() {
            return Err(RequestError::refused(FailureKind::BadRequest, "the shell stands already"));
        }
        // SAFETY: the descriptor is open and ours alone (`serve`'s contract), and this line runs
        // once: a second Build is refused above, a failed one ends the process.
        let kvm = unsafe { kvm_at(KVM_FD) };
        let vm = Vm::build(config, &kvm, self.clock.clone())?;
        // SAFETY: the bell lives in `vm`, which lives as long as the epoll descriptor.
        let bell = unsafe { BorrowedFd::borrow_raw(vm.bell()) };
        watch(&self.epoll, bell, TOKEN_BELL, EventFlags::IN)?;
        self.vm = Some(vm);
        // All threads stand and everything that needs a wider kernel has been done.
        drop(kvm);
        seccomp::confine(seccomp::Thread::Device)
            .map_err(|error| RequestError::refused(FailureKind::Io, error))?;
        self.clock.stamp(Phase::ShellReady);
        Ok(FromVmm::Ready(self.clock.stamps()))
    }
}

fn watch(
    epoll: &OwnedFd,
    fd: impl AsFd,
    token: u64,
    flags: EventFlags,
) -> Result<(), RequestError> {
    epoll::add(epoll, fd, EventData::new_u64(token), flags)
        .map_err(|error| RequestError::refused(FailureKind::Io, format!("epoll: {error}")))
}

fn vmm_error(error: impl ToString) -> Exit {
    Exit { reason: ExitReason::VmmError, detail: error.to_string() }
}
