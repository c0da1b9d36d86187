//! The socket device: packets, and a host at the other end of the stream.

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
};

use arbitrary::Arbitrary;
use firn_proto::control::INVOKE_PORT;
use firn_vmm::{
    Lapics,
    devices::vsock::{GUEST_CID, HOST_CID, Vsock},
    virtio::DeviceError,
};
use rustix::net::sockopt;

use crate::{
    guest::{self, Address, DATA, HIGH},
    script::{Buffer, Driver, Subject},
};

const RX: usize = 0;
const TX: usize = 1;

const REQUEST: u8 = 1;
const RW: u8 = 5;

/// A guest that keeps to its credit never sends more than this before it hears from the device.
const CREDIT: u64 = 1 << 20;

/// What a driver, or the host, does with a socket.
#[derive(Debug, Arbitrary)]
pub enum Extra {
    /// The guest sends a packet.
    Packet {
        op: u8,
        flags: u8,
        port: u8,
        foreign: Foreign,
        room: Room,
        read: Progress,
        payload: Payload,
    },
    /// The guest posts buffers for packets.
    Post { count: u8, len: u16 },
    /// The host writes.
    HostWrite(u16),
    /// The host reads.
    HostRead(u16),
    /// The host sends no more.
    HostShutdown,
    /// The host goes away.
    HostGone,
    /// The host gives the device a new stream.
    Plug,
    /// The stream became ready.
    Pump,
}

/// Whom a packet is from and to.
#[derive(Debug, Arbitrary)]
pub enum Foreign {
    /// As it should be.
    No,
    /// Another guest.
    Source(u64),
    /// Another host.
    Target(u64),
    /// Another port.
    Port(u32),
    /// Another kind of socket.
    Kind(u16),
}

/// Room that the guest says it has.
#[derive(Debug, Arbitrary)]
pub enum Room {
    /// Enough.
    Much,
    /// Any.
    Any(u32),
}

/// How much the guest says it has read.
#[derive(Debug, Arbitrary)]
pub enum Progress {
    /// No more than before.
    Same,
    /// Some more.
    More(u16),
    /// Any.
    Any(u32),
}

/// A packet's payload.
#[derive(Debug, Arbitrary)]
pub enum Payload {
    /// As long as it says.
    Honest(u16),
    /// It says any length.
    Liar { claimed: u32, len: u16 },
    /// Anywhere in memory.
    Elsewhere { claimed: u16, buffers: Vec<Buffer> },
}

/// The host's side.
#[derive(Default)]
pub struct Host {
    stream: Option<UnixStream>,
    posted: u64,
    read: u32,
    sent: u64,
}

impl Host {
    /// A host with a stream to `driver`'s device.
    pub fn new(driver: &mut Driver<Vsock>) -> Self {
        let mut host = Self::default();
        host.plug(driver);
        host
    }

    fn plug(&mut self, driver: &mut Driver<Vsock>) {
        let (near, far) = UnixStream::pair().expect("a socket pair");
        far.set_nonblocking(true).expect("a socket can be non-blocking");
        // The least that the kernel allows: a host that does not read is soon a slow one.
        sockopt::set_socket_send_buffer_size(&near, 1).expect("a socket has a size");
        driver.device.set_host_stream(near, false);
        self.stream = Some(far);
    }
}

impl Subject for Vsock {
    type Extra = Extra;
    type Host = Host;

    fn extra(driver: &mut Driver<Self>, host: &mut Host, step: Extra) -> Result<(), DeviceError> {
        match step {
            Extra::Packet { op, flags, port, foreign, room, read, payload } => {
                let op = op % 9;
                if op == REQUEST {
                    host.read = 0;
                }
                host.read = match read {
                    Progress::Same => host.read,
                    Progress::More(count) => host.read.wrapping_add(count.into()),
                    Progress::Any(count) => count,
                };
                let (claimed, buffers) = match payload {
                    Payload::Honest(len) => {
                        (len.into(), vec![Buffer::new(HIGH, len.into(), false)])
                    }
                    Payload::Liar { claimed, len } => {
                        (claimed, vec![Buffer::new(HIGH, len.into(), false)])
                    }
                    Payload::Elsewhere { claimed, buffers } => (claimed.into(), buffers),
                };
                if op == RW {
                    host.sent += u64::from(claimed);
                }
                let mut header = Header {
                    source: GUEST_CID,
                    target: HOST_CID,
                    source_port: 5000 + u32::from(port % 3),
                    target_port: INVOKE_PORT,
                    len: if op == RW { claimed } else { 0 },
                    kind: 1,
                };
                match foreign {
                    Foreign::No => {}
                    Foreign::Source(cid) => header.source = cid,
                    Foreign::Target(cid) => header.target = cid,
                    Foreign::Port(port) => header.target_port = port,
                    Foreign::Kind(kind) => header.kind = kind,
                }
                let room = match room {
                    Room::Much => 256 << 10,
                    Room::Any(room) => room,
                };
                guest::poke(&driver.memory, DATA, &header.bytes(op, flags, room, host.read));
                // Header and payload in uneven pieces.
                let mut chain =
                    vec![Buffer::new(DATA, 40, false), Buffer::new(DATA + 40, 4, false)];
                chain.extend(buffers);
                driver.offer(TX, &chain);
                driver.kick(TX)
            }
            Extra::Post { count, len } => {
                for _ in 0..count % 64 {
                    let at = Address(HIGH + 0x1000 * (host.posted % 16));
                    let len = crate::guest::Length(len.into());
                    driver.offer(RX, &[Buffer { at, len, writable: true }]);
                    host.posted += 1;
                }
                driver.kick(RX)
            }
            Extra::HostWrite(len) => {
                if let Some(stream) = &mut host.stream {
                    let _ = stream.write(&vec![7; len.into()]);
                }
                driver.device.pump(Lapics::of_power_on())
            }
            Extra::HostRead(len) => {
                if let Some(stream) = &mut host.stream {
                    let _ = stream.read(&mut vec![0; len.into()]);
                }
                driver.device.pump(Lapics::of_power_on())
            }
            Extra::HostShutdown => {
                if let Some(stream) = &mut host.stream {
                    let _ = stream.shutdown(Shutdown::Write);
                }
                driver.device.pump(Lapics::of_power_on())
            }
            Extra::HostGone => {
                host.stream = None;
                driver.device.pump(Lapics::of_power_on())
            }
            Extra::Plug => {
                host.plug(driver);
                driver.device.pump(Lapics::of_power_on())
            }
            Extra::Pump => {
                // Bytes behind a host's end of stream may wait in a quiet device: for ever.
                let _ = (driver.device.host_has_bytes(), driver.device.quiescent());
                driver.device.pump(Lapics::of_power_on())
            }
        }
    }

    /// A save that the device allows is one that it can come back from, unless the guest has sent
    /// more than anybody allowed it.
    fn thaw(driver: &mut Driver<Self>, host: &mut Host) {
        if driver.device.quiescent().is_err() || host.sent > CREDIT {
            return;
        }
        let state = driver.save();
        assert!(driver.restore(&state));
        assert_eq!(driver.save(), state);
        host.plug(driver);
    }
}

struct Header {
    source: u64,
    target: u64,
    source_port: u32,
    target_port: u32,
    len: u32,
    kind: u16,
}

impl Header {
    fn bytes(&self, op: u8, flags: u8, room: u32, read: u32) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(44);
        bytes.extend_from_slice(&self.source.to_le_bytes());
        bytes.extend_from_slice(&self.target.to_le_bytes());
        bytes.extend_from_slice(&self.source_port.to_le_bytes());
        bytes.extend_from_slice(&self.target_port.to_le_bytes());
        bytes.extend_from_slice(&self.len.to_le_bytes());
        bytes.extend_from_slice(&self.kind.to_le_bytes());
        bytes.extend_from_slice(&u16::from(op).to_le_bytes());
        bytes.extend_from_slice(&u32::from(flags).to_le_bytes());
        bytes.extend_from_slice(&room.to_le_bytes());
        bytes.extend_from_slice(&read.to_le_bytes());
        bytes
    }
}
