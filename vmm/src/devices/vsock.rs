//! The socket device (virtio 1.2 §5.10), wholly in user space: every clone of a snapshot has the
//! same CID, which the kernel's vhost-vsock could not share.
//!
//! Exactly one connection exists: the guest connects to [`INVOKE_PORT`] of the host, and the other
//! end is a stream socket that the VMM was given. Everything else is answered with RST. The
//! connection is part of saved state and goes on after a thaw with a *new* host stream; bytes of
//! an earlier generation stay unread in the old one.
//!
//! ```text
//!  TX queue ──▶ sendmsg straight from guest memory ──▶ host stream
//!                 └─▶ buffer (only if the host is slow; bounded by the credit we grant)
//!  RX queue ◀── recvmsg straight into guest memory, many chains a call ◀── host stream
//! ```
//!
//! What waits in the host stream stays there until the guest has posted buffers and granted
//! credit, so nothing is ever held here on its way to the guest. Every call moves what can be
//! moved and returns: a later kick or a later edge of the stream's readiness moves the rest.

mod connection;
mod host;
mod packet;

use std::{collections::VecDeque, io, mem, net::Shutdown, os::fd::AsFd, sync::Arc};

use firn_proto::control::INVOKE_PORT;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

pub use self::host::NotQuiet;
use self::{
    connection::{Broken, Connection},
    host::Host,
    packet::{HEADER, Header, NO_SEND, STREAM, op},
};
use crate::{
    memory::GuestMemory,
    virtio::{
        Device, DeviceError, RestoreError,
        chain::{Chain, Gather, send_slices},
        queue::Queues,
        read_config_bytes,
    },
};

/// The guest's address.
pub const GUEST_CID: u64 = 3;
/// The host's address.
pub const HOST_CID: u64 = 2;

const RX: usize = 0;
const TX: usize = 1;

/// Chains that one `recvmsg` fills at most: with Linux's 4 KiB buffers 128 KiB.
const BATCH: usize = 32;

/// Bytes of the buffer that an idle device keeps allocated.
const KEEP: usize = 16 << 10;

/// RSTs that wait for RX buffers; more are dropped, and the guest's connect times out.
const MAX_RESETS: usize = 32;

/// The device.
pub struct Vsock {
    connection: Option<Connection>,
    host: Option<Host>,
    /// Bytes from the guest that the host stream did not take.
    buffer: VecDeque<u8>,
    /// Packets of the connection that are due.
    due: Due,
    /// RSTs that are due.
    resets: VecDeque<Header>,
    first_byte: Option<u64>,
    transmitted: Chain,
    batch: Vec<Chain>,
    gather: Gather,
}

/// Control packets of the connection that wait for an RX buffer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Due {
    response: bool,
    shutdown: bool,
    credit_update: bool,
}

/// What a snapshot keeps of the device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    connection: Option<Connection>,
}

impl Vsock {
    /// A device without a host stream.
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        Self {
            connection: None,
            host: None,
            buffer: VecDeque::new(),
            due: Due::default(),
            resets: VecDeque::with_capacity(MAX_RESETS),
            first_byte: None,
            transmitted: Chain::new(memory.clone()),
            batch: (0..BATCH).map(|_| Chain::new(memory.clone())).collect(),
            gather: Gather::default(),
        }
    }

    /// Ends the connection and everything on its way. The host sees the end of its stream.
    fn drop_connection(&mut self) {
        self.connection = None;
        self.host = None;
        self.buffer.clear();
        self.due = Due::default();
    }

    /// Ends the connection and tells the guest.
    fn reset_connection(&mut self) {
        if let Some(connection) = &self.connection {
            let header = to_guest(connection.guest_port(), INVOKE_PORT, op::RST);
            self.queue_reset(header);
        }
        self.drop_connection();
    }

    fn queue_reset(&mut self, header: Header) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(header);
        }
    }

    /// Takes all packets that the guest has posted.
    fn transmit(&mut self, queues: &mut Queues) -> Result<(), DeviceError> {
        for _ in 0..queues.available(TX)? {
            queues.pop(TX, &mut self.transmitted)?;
            let head = self.transmitted.head();
            let mut readable = self.transmitted.readable();
            let mut bytes = [0; HEADER];
            let found = readable.copy_to(&mut bytes);
            let header = Header::from_bytes(&bytes);
            let (found, needed) = match header.op {
                _ if found < HEADER => (found, HEADER),
                op::RW => (readable.len(), header.len as usize),
                _ => (0, 0),
            };
            if found < needed {
                return Err(DeviceError::Short { queue: TX, head, found, needed });
            }
            self.take_packet(&header);
            queues.push(TX, head, 0)?;
        }
        Ok(())
    }

    /// Acts on a packet, whose payload, if it has one, is still in `self.transmitted`.
    fn take_packet(&mut self, header: &Header) {
        if header.src_cid != GUEST_CID {
            return;
        }
        let ours =
            header.kind == STREAM && header.dst_cid == HOST_CID && header.dst_port == INVOKE_PORT;
        let live = match &mut self.connection {
            Some(connection) if ours && connection.guest_port() == header.src_port => connection,
            None if ours && header.op == op::REQUEST && self.host.is_some() => {
                self.connection = Some(Connection::new(header));
                self.due.response = true;
                return;
            }
            _ if header.op == op::RST => return,
            _ => {
                return self.queue_reset(Header {
                    src_cid: header.dst_cid,
                    kind: header.kind,
                    ..to_guest(header.src_port, header.dst_port, op::RST)
                });
            }
        };
        let result = live.learn(header).and_then(|()| {
            match header.op {
                op::RW => live.receive(header.len)?,
                op::CREDIT_UPDATE => {}
                op::CREDIT_REQUEST => self.due.credit_update = true,
                op::SHUTDOWN => live.shut_down(header.flags),
                // RST, and what no driver sends on a live connection.
                _ => return Err(Broken),
            }
            Ok(())
        });
        match result {
            Ok(()) if header.op == op::RW => self.forward_packet(header.len as usize),
            Ok(()) => {}
            Err(Broken) if header.op == op::RST => self.drop_connection(),
            Err(Broken) => self.reset_connection(),
        }
    }

    /// Sends `len` bytes behind the header in `self.transmitted` to the host, or keeps them.
    fn forward_packet(&mut self, len: usize) {
        let mut payload = self.transmitted.readable();
        payload.truncate(len);
        if self.buffer.is_empty()
            && let (Some(host), Some(connection)) = (&mut self.host, &mut self.connection)
        {
            while host.writable && !payload.is_empty() {
                match payload.send(host.stream.as_fd()) {
                    Ok(sent) => {
                        connection.forward(sent);
                        self.first_byte.get_or_insert_with(monotonic_ns);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        host.writable = false;
                    }
                    Err(_) => return self.reset_connection(),
                }
            }
        }
        // `Connection::receive` has made sure that what is left fits.
        let mut bytes = [0; 4096];
        while !payload.is_empty() {
            let n = payload.copy_to(&mut bytes);
            self.buffer.extend(&bytes[..n]);
        }
    }

    /// Sends buffered bytes to the host, then passes on what the guest shut down.
    fn flush(&mut self) {
        let (Some(host), Some(connection)) = (&mut self.host, &mut self.connection) else { return };
        while host.writable && !self.buffer.is_empty() {
            match send_slices(host.stream.as_fd(), self.buffer.as_slices()) {
                Ok(sent) => {
                    self.buffer.drain(..sent);
                    connection.forward(sent);
                    self.first_byte.get_or_insert_with(monotonic_ns);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => host.writable = false,
                Err(_) => return self.reset_connection(),
            }
        }
        if !self.buffer.is_empty() {
            return;
        }
        if self.buffer.capacity() > KEEP {
            // Not to be found in freed memory either.
            self.buffer.resize(self.buffer.capacity(), 0);
            self.buffer = VecDeque::new();
        }
        if !connection.guest_sends_no_more() {
            return;
        }
        if connection.guest_receives_no_more() {
            // RST ends the guest's wait for us (§5.10.6.5).
            self.reset_connection();
        } else if !host.finished {
            host.finished = true;
            // Fails only if the host is gone, which the next read finds.
            let _ = host.stream.shutdown(Shutdown::Write);
        }
    }

    /// Fills the guest's RX buffers with what is due, control packets first.
    fn receive(&mut self, queues: &mut Queues) -> Result<(), DeviceError> {
        if !self.control_is_due() && self.host_window() == 0 {
            return Ok(());
        }
        let mut room = queues.available(RX)?;
        // Most messages fit one buffer: look at many only if the first was filled.
        let mut batch = 1;
        loop {
            while room > 0
                && let Some(header) = self.next_control()
            {
                // `transmitted` is at rest here: it holds a packet only inside `transmit`.
                let chain = &mut self.transmitted;
                pop_for_packet(queues, chain)?;
                chain.writable().copy_from(&header.to_bytes());
                queues.push(RX, chain.head(), HEADER as u32)?;
                room -= 1;
            }
            if !self.receive_data(queues, &mut room, batch)? {
                return Ok(());
            }
            batch = BATCH;
        }
    }

    fn control_is_due(&self) -> bool {
        let news = self.connection.as_ref().is_some_and(Connection::credit_is_news);
        !self.resets.is_empty() || self.due != Due::default() || news
    }

    /// The next control packet that is due.
    fn next_control(&mut self) -> Option<Header> {
        if let Some(header) = self.resets.pop_front() {
            return Some(header);
        }
        let connection = self.connection.as_mut()?;
        let due = &mut self.due;
        let op = if mem::take(&mut due.response) {
            op::RESPONSE
        } else if mem::take(&mut due.shutdown) {
            op::SHUTDOWN
        } else if mem::take(&mut due.credit_update) || connection.credit_is_news() {
            op::CREDIT_UPDATE
        } else {
            return None;
        };
        let mut header = to_guest(connection.guest_port(), INVOKE_PORT, op);
        // The host may still read what the guest sends, though it sends no more.
        header.flags = if op == op::SHUTDOWN { NO_SEND } else { 0 };
        connection.announce(&mut header);
        Some(header)
    }

    /// Moves bytes from the host into RX buffers by one system call. Whether there may be more to
    /// do at once: more bytes, or the end of the stream to pass on.
    fn receive_data(
        &mut self,
        queues: &mut Queues,
        room: &mut u16,
        batch: usize,
    ) -> Result<bool, DeviceError> {
        let window = self.host_window();
        let (Some(host), Some(connection)) = (&mut self.host, &mut self.connection) else {
            return Ok(false);
        };
        let mut capacity = 0;
        let mut popped = 0;
        while popped < batch.min((*room).into()) && capacity < window {
            let chain = &mut self.batch[popped];
            capacity += pop_for_packet(queues, chain)?;
            popped += 1;
        }
        if popped == 0 {
            return Ok(false);
        }
        let limit = window.min(capacity);
        let chains = &mut self.batch[..popped];
        let received = match self.gather.receive(host.stream.as_fd(), chains, HEADER, limit) {
            Ok(received) => received,
            Err(error) => {
                queues.unpop(RX, popped as u16);
                if error.kind() == io::ErrorKind::WouldBlock {
                    host.readable = false;
                    return Ok(false);
                }
                self.reset_connection();
                return Ok(true);
            }
        };
        connection.send(received as u32);
        let mut left = received;
        let mut filled = 0;
        while left > 0
            && let Some(chain) = self.batch.get_mut(filled)
        {
            let mut writable = chain.writable();
            let len = left.min(writable.len() - HEADER);
            let mut header = to_guest(connection.guest_port(), INVOKE_PORT, op::RW);
            header.len = len as u32;
            connection.announce(&mut header);
            writable.copy_from(&header.to_bytes());
            queues.push(RX, chain.head(), (HEADER + len) as u32)?;
            left -= len;
            filled += 1;
        }
        queues.unpop(RX, (popped - filled) as u16);
        *room -= filled as u16;
        if received == 0 {
            host.readable = false;
            connection.finish_host();
            self.due.shutdown = true;
        }
        // A short read has emptied the stream. `readable` stays: should the stream's end have
        // come with the same edge, the guest's next kick finds it, off the path of these bytes.
        Ok(received == limit || received == 0)
    }

    /// How many bytes may go to the guest now; 0 if none can.
    fn host_window(&self) -> usize {
        match (&self.host, &self.connection) {
            (Some(host), Some(connection))
                if host.readable
                    && !host.moment_due
                    && !self.due.response
                    && !connection.host_finished()
                    && !connection.guest_receives_no_more() =>
            {
                connection.credit() as usize
            }
            _ => 0,
        }
    }
}

/// Takes an RX chain that has room for a header and something behind it, and returns for how much.
fn pop_for_packet(queues: &mut Queues, chain: &mut Chain) -> Result<usize, DeviceError> {
    queues.pop(RX, chain)?;
    let found = chain.writable().len();
    match found.checked_sub(HEADER) {
        None | Some(0) => {
            Err(DeviceError::Short { queue: RX, head: chain.head(), found, needed: HEADER + 1 })
        }
        Some(room) => Ok(room),
    }
}

/// A header from `host_port` to `guest_port`, without payload and counters.
fn to_guest(guest_port: u32, host_port: u32, op: u16) -> Header {
    Header {
        src_cid: HOST_CID,
        dst_cid: GUEST_CID,
        src_port: host_port,
        dst_port: guest_port,
        kind: STREAM,
        op,
        ..Header::default()
    }
}

fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid place for the answer; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

impl Device for Vsock {
    const ID: u32 = VIRTIO_ID_VSOCK;
    // RX, TX, events. Linux fills RX with 4 KiB buffers: half a MiB of guest memory. It posts
    // eight event buffers; no event is ever sent, least of all TRANSPORT_RESET after a thaw.
    const QUEUES: &'static [u16] = &[128, 128, 8];
    const VERSION: u16 = 1;
    type State = VsockState;

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_config_bytes(&GUEST_CID.to_le_bytes(), offset, data);
    }

    fn notify(&mut self, queue: usize, queues: &mut Queues) -> Result<(), DeviceError> {
        match queue {
            TX => {
                self.transmit(queues)?;
                self.flush();
                self.receive(queues)
            }
            RX => self.receive(queues),
            _ => Ok(()),
        }
    }

    /// Keeps a host stream that no connection has used yet: drivers reset before they begin.
    fn reset(&mut self) {
        if self.connection.is_some() {
            self.drop_connection();
        }
        self.resets.clear();
    }

    fn save(&self) -> VsockState {
        VsockState { connection: self.connection.clone() }
    }

    fn restore(&mut self, state: &VsockState) -> Result<(), RestoreError> {
        if let Some(connection) = &state.connection {
            connection.check()?;
        }
        self.drop_connection();
        // What was in the buffer, or had passed through it, belongs to another generation.
        self.buffer.resize(self.buffer.capacity(), 0);
        self.buffer.clear();
        self.resets.clear();
        self.first_byte = None;
        self.connection = state.connection.clone();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
