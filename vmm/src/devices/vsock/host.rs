//! The host's side: its stream, and what the event loop asks of the device.

use std::{
    io::{self, IoSliceMut},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
};

use firn_proto::control::MOMENT;
use rustix::{
    io::Errno,
    net::{RecvAncillaryBuffer, RecvFlags, recv, recvmsg},
};

use super::{Due, TX, Vsock, connection::Connection};
use crate::{
    handover::Lapics,
    virtio::{DeviceError, mmio::VirtioMmio},
};

/// The host's stream, and what is known of its readiness.
pub(super) struct Host {
    pub(super) stream: UnixStream,
    /// No read has said "would block" since the last edge.
    pub(super) readable: bool,
    /// No write has said "would block" since the last edge.
    pub(super) writable: bool,
    /// The guest's end was passed on.
    pub(super) finished: bool,
    /// The [`MOMENT`] is still to come, and what follows it is not for the guest yet.
    pub(super) moment_due: bool,
}

impl Host {
    fn take_moment(&mut self) -> io::Result<Option<u64>> {
        let mut moment = [0; MOMENT];
        // As all that is taken from the stream: vCPU threads may do nothing else.
        let mut ancillary = RecvAncillaryBuffer::new(&mut []);
        let buffer = &mut [IoSliceMut::new(&mut moment)];
        let received = recvmsg(&self.stream, buffer, &mut ancillary, RecvFlags::DONTWAIT);
        match received.map(|received| received.bytes) {
            Ok(MOMENT) => {
                self.moment_due = false;
                Ok(Some(u64::from_le_bytes(moment)))
            }
            // The end is the guest's to see.
            Ok(0) => {
                self.moment_due = false;
                Ok(None)
            }
            Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(Errno::AGAIN) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// Why the device can't be saved now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotQuiet {
    /// Bytes from the guest wait for the host to read.
    #[error("{0} bytes from the guest wait for the host")]
    Buffered(usize),
    /// Packets for the guest wait for RX buffers.
    #[error("packets for the guest wait for its buffers")]
    Control,
    /// The guest has posted packets that it has not kicked yet.
    #[error("{0} packets in the guest's transmit queue")]
    TxQueue(u16),
    /// The guest broke its transmit queue.
    #[error("the guest's transmit queue is broken")]
    Broken,
    /// The host stream has bytes (or an end) that the guest has not got.
    #[error("bytes from the host, or its end, wait for the guest")]
    HostStream,
    /// The host has ended the connection.
    #[error("the host has ended the connection")]
    HostFinished,
}

impl VirtioMmio<Vsock> {
    /// Gives the connection (the live one after a thaw, or the next that the guest opens) its
    /// host end, which begins with a [`MOMENT`] or not. [`Self::pump`] should follow.
    pub fn set_host_stream(&mut self, stream: UnixStream, moment_due: bool) {
        let (readable, writable, finished) = (true, true, false);
        self.device.host = Some(Host { stream, readable, writable, finished, moment_due });
        self.device.first_byte = None;
    }

    /// The host stream, while there is one, for the event loop.
    pub fn host_stream(&self) -> Option<BorrowedFd<'_>> {
        self.device.host.as_ref().map(|host| host.stream.as_fd())
    }

    /// Moves bytes both ways until nothing can move. To be called on each edge of the host
    /// stream's readiness, and once after a host stream was set; more calls do no harm.
    ///
    /// # Errors
    /// [`DeviceError`] if the guest broke its rings.
    pub fn pump(&mut self, lapics: Lapics) -> Result<(), DeviceError> {
        if let Some(host) = &mut self.device.host {
            host.readable = true;
            host.writable = true;
            // Of a guest that runs already it is of no use any more.
            if host.moment_due && host.take_moment().is_err() {
                self.device.reset_connection();
            }
        }
        self.drive(lapics, |device, queues| {
            device.flush();
            device.receive(queues)
        })
    }

    /// Whether the host has sent bytes that the guest has not got.
    pub fn host_has_bytes(&self) -> bool {
        matches!(self.peek(), Some(Ok(count)) if count > 0)
    }

    /// Takes the [`MOMENT`] that the host stream begins with; `None` if it has been taken, or has not
    /// come.
    ///
    /// # Errors
    /// The stream's; [`io::ErrorKind::UnexpectedEof`] if it is shorter.
    pub fn take_moment(&mut self) -> io::Result<Option<u64>> {
        match &mut self.device.host {
            Some(host) if host.moment_due => host.take_moment(),
            _ => Ok(None),
        }
    }

    /// Whether nothing is on its way, so that a snapshot loses nothing.
    ///
    /// # Errors
    /// [`NotQuiet`] with what is.
    pub fn quiescent(&self) -> Result<(), NotQuiet> {
        let device = &self.device;
        if !device.buffer.is_empty() {
            return Err(NotQuiet::Buffered(device.buffer.len()));
        }
        if !device.resets.is_empty() || device.due != Due::default() {
            return Err(NotQuiet::Control);
        }
        match self.queues.available(TX) {
            Ok(0) => {}
            Ok(count) => return Err(NotQuiet::TxQueue(count)),
            Err(_) => return Err(NotQuiet::Broken),
        }
        // A connection whose host has ended it could not go on with a new one after a thaw.
        if device.connection.as_ref().is_some_and(Connection::host_finished) {
            return Err(NotQuiet::HostFinished);
        }
        match self.peek() {
            Some(Ok(_)) => Err(NotQuiet::HostStream),
            _ => Ok(()),
        }
    }

    /// When the first byte from the guest reached the present host stream, in nanoseconds of
    /// `CLOCK_MONOTONIC`.
    pub fn first_byte(&self) -> Option<u64> {
        self.device.first_byte
    }

    /// How many bytes (at most one; 0 at the end of the stream) a read would get now.
    fn peek(&self) -> Option<io::Result<usize>> {
        let host = self.device.host.as_ref()?;
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let result = recv(&host.stream, &mut [0; 1], flags);
        Some(result.map(|(count, _)| count).map_err(io::Error::from))
    }
}
