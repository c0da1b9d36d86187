use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
};

use super::{connection::BUFFER, packet::NO_RECEIVE, *};
use crate::{
    handover::Lapics,
    virtio::mock::{DATA, Mock, memory},
};

mod hostile;

/// Where the guest's packets lie, and its RX buffers of 4 KiB each.
const PACKET: u64 = DATA;
const BUFFERS: u64 = DATA + 0x20000;
const PORT: u32 = 5000;
const ROOM: u32 = 256 << 10;

struct Guest {
    mock: Mock<Vsock>,
    /// The next RX buffer to post.
    next: u64,
    fwd_cnt: u32,
    buf_alloc: u32,
}

impl Guest {
    /// A guest with `buffers` RX buffers posted, and the host's end of its stream.
    fn new(buffers: usize) -> (Self, UnixStream) {
        let memory = memory();
        let mock = Mock::up(memory.clone(), Vsock::new(memory));
        let mut guest = Self { mock, next: 0, fwd_cnt: 0, buf_alloc: ROOM };
        let host = guest.plug();
        guest.post(buffers);
        (guest, host)
    }

    /// A guest with a live connection.
    fn connected(buffers: usize) -> (Self, UnixStream) {
        let (mut guest, host) = Self::new(buffers);
        guest.send(guest.header(op::REQUEST), &[]);
        let (response, _) = guest.one();
        assert_eq!((response.op, response.buf_alloc), (op::RESPONSE, BUFFER));
        guest.post(1);
        (guest, host)
    }

    /// Gives the device a new host stream.
    fn plug(&mut self) -> UnixStream {
        let (near, far) = UnixStream::pair().unwrap();
        far.set_nonblocking(true).unwrap();
        self.mock.device.set_host_stream(near, false);
        self.mock.device.pump(Lapics::of_power_on()).unwrap();
        far
    }

    fn post(&mut self, count: usize) {
        for _ in 0..count {
            self.mock.add(RX, &[(BUFFERS + 4096 * (self.next % 128), 4096, true)]);
            self.next += 1;
        }
        self.mock.kick(RX).unwrap();
    }

    fn header(&self, op: u16) -> Header {
        Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: PORT,
            dst_port: INVOKE_PORT,
            len: 0,
            kind: STREAM,
            op,
            flags: 0,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
        }
    }

    fn try_send(&mut self, header: Header, payload: &[u8]) -> Result<(), DeviceError> {
        self.mock.write_all(PACKET, &header.to_bytes());
        self.mock.write_all(PACKET + 44, payload);
        // Header and payload in uneven pieces.
        self.mock.add(TX, &[(PACKET, 40, false), (PACKET + 40, 4 + payload.len() as u32, false)]);
        self.mock.kick(TX)
    }

    fn send(&mut self, header: Header, payload: &[u8]) {
        self.try_send(header, payload).unwrap();
        assert_eq!(self.mock.used(TX).len(), 1);
    }

    fn write(&mut self, payload: &[u8]) {
        self.send(Header { len: payload.len() as u32, ..self.header(op::RW) }, payload);
    }

    /// All packets that arrived since the last call.
    fn packets(&mut self) -> Vec<(Header, Vec<u8>)> {
        let used = self.mock.used(RX);
        used.into_iter()
            .map(|(head, len)| {
                let bytes = self.mock.read_vec(BUFFERS + 4096 * u64::from(head), len as usize);
                let (header, payload) = bytes.split_first_chunk().unwrap();
                let header = Header::from_bytes(header);
                assert_eq!(header.len as usize, payload.len());
                (header, payload.to_vec())
            })
            .collect()
    }

    /// The one packet that arrived.
    fn one(&mut self) -> (Header, Vec<u8>) {
        let mut packets = self.packets();
        assert_eq!(packets.len(), 1, "{packets:?}");
        packets.remove(0)
    }

    /// Payload that arrived, which the guest consumes at once.
    fn read(&mut self) -> Vec<u8> {
        let packets = self.packets();
        assert!(packets.iter().all(|(header, _)| header.op == op::RW));
        let bytes: Vec<u8> = packets.into_iter().flat_map(|(_, payload)| payload).collect();
        self.fwd_cnt = self.fwd_cnt.wrapping_add(bytes.len() as u32);
        bytes
    }

    fn ops(&mut self) -> Vec<u16> {
        self.packets().into_iter().map(|(header, _)| header.op).collect()
    }
}

/// What is in the stream now; `None` behind it at the end.
fn drain(host: &mut UnixStream) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    let ended = host.read_to_end(&mut bytes).is_ok();
    (bytes, ended)
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 251) as u8).collect()
}

#[test]
fn connects_and_moves_bytes_both_ways() {
    let (mut guest, mut host) = Guest::connected(8);
    assert_eq!(guest.mock.device.first_byte(), None);
    guest.write(b"from guest");
    assert_eq!(drain(&mut host), (b"from guest".to_vec(), false));
    assert!(guest.mock.device.first_byte().is_some());
    host.write_all(b"from host").unwrap();
    guest.mock.device.pump(Lapics::of_power_on()).unwrap();
    let (header, payload) = guest.one();
    assert_eq!(payload, b"from host");
    let expected =
        Header { len: 9, buf_alloc: BUFFER, fwd_cnt: 10, ..to_guest(PORT, INVOKE_PORT, op::RW) };
    assert_eq!(header, expected);
    guest.mock.device.quiescent().unwrap();
}

#[test]
fn bytes_that_wait_before_the_guest_connects_arrive() {
    let (mut guest, mut host) = Guest::new(8);
    host.write_all(b"early").unwrap();
    guest.mock.device.pump(Lapics::of_power_on()).unwrap();
    assert!(guest.ops().is_empty());
    assert!(guest.mock.device.host_has_bytes());
    guest.send(guest.header(op::REQUEST), &[]);
    assert_eq!(guest.ops(), [op::RESPONSE, op::RW]);
    assert!(!guest.mock.device.host_has_bytes());
}

#[test]
fn long_messages_fill_many_buffers_by_few_packets() {
    let (mut guest, mut host) = Guest::connected(100);
    let bytes = pattern(100_000);
    host.write_all(&bytes).unwrap();
    let raised = guest.mock.line.count();
    guest.mock.device.pump(Lapics::of_power_on()).unwrap();
    assert_eq!(guest.mock.line.count(), raised + 1);
    assert_eq!(guest.mock.device.queues.available(RX).unwrap(), 100 - 25);
    assert_eq!(guest.read(), bytes);
}

#[test]
fn bytes_wait_for_buffers() {
    let (mut guest, mut host) = Guest::connected(1);
    let bytes = pattern(20_000);
    host.write_all(&bytes).unwrap();
    let mut arrived = Vec::new();
    guest.mock.device.pump(Lapics::of_power_on()).unwrap();
    for _ in 0..5 {
        arrived.extend(guest.read());
        guest.post(1);
    }
    arrived.extend(guest.read());
    assert_eq!(arrived, bytes);
}

#[test]
fn bytes_wait_for_credit() {
    let (mut guest, mut host) = Guest::connected(100);
    guest.buf_alloc = 5000;
    guest.send(guest.header(op::CREDIT_UPDATE), &[]);
    let bytes = pattern(12_000);
    host.write_all(&bytes).unwrap();
    guest.mock.device.pump(Lapics::of_power_on()).unwrap();
    let mut arrived = guest.read();
    assert_eq!(arrived.len(), 5000);
    guest.mock.device.pump(Lapics::of_power_on()).unwrap();
    assert!(guest.read().is_empty());
    for expected in [10_000, 12_000] {
        guest.send(guest.header(op::CREDIT_UPDATE), &[]);
        arrived.extend(guest.read());
        assert_eq!(arrived.len(), expected);
    }
    assert_eq!(arrived, bytes);
}

#[test]
fn a_slow_host_gets_everything_and_the_guest_hears_of_it() {
    let (mut guest, mut host) = Guest::connected(100);
    guest.buf_alloc = BUFFER;
    let bytes = pattern(1_000_000);
    for chunk in bytes.chunks(60_000) {
        guest.write(chunk);
    }
    assert!(matches!(guest.mock.device.quiescent(), Err(NotQuiet::Buffered(_))));
    assert!(guest.ops().is_empty());
    let mut arrived = Vec::new();
    while arrived.len() < bytes.len() {
        let (chunk, ended) = drain(&mut host);
        assert!(!ended && !chunk.is_empty());
        arrived.extend(chunk);
        guest.mock.device.pump(Lapics::of_power_on()).unwrap();
    }
    assert_eq!(arrived, bytes);
    guest.mock.device.quiescent().unwrap();
    assert!(guest.mock.device.device().buffer.capacity() <= KEEP);
    let updates = guest.packets();
    let last = updates.last().unwrap().0;
    assert_eq!((last.op, last.buf_alloc), (op::CREDIT_UPDATE, BUFFER));
    assert!(last.fwd_cnt >= BUFFER / 2 && updates.len() < 3);
}

/// Linux has no more on its way than its own buffer is large, and never asks for credit.
#[test]
fn a_guest_with_a_small_buffer_hears_of_credit_before_it_must_wait() {
    const LINUX: usize = 256 << 10;
    let (mut guest, mut host) = Guest::connected(100);
    guest.buf_alloc = LINUX as u32;
    let (mut sent, mut known, mut arrived) = (0, 0, 0);
    while sent < 6 << 20 {
        let count = (LINUX - (sent - known)).min(60_000);
        assert!(count > 0, "{sent} bytes sent, {known} known to be read, {arrived} read");
        guest.write(&pattern(count));
        sent += count;
        arrived += drain(&mut host).0.len();
        guest.mock.device.pump(Lapics::of_power_on()).unwrap();
        arrived += drain(&mut host).0.len();
        guest.mock.device.pump(Lapics::of_power_on()).unwrap();
        if let Some((header, _)) = guest.packets().last() {
            known = header.fwd_cnt as usize;
        }
    }
}

#[test]
fn credit_is_told_when_asked_for() {
    let (mut guest, mut host) = Guest::connected(8);
    guest.write(b"abc");
    guest.send(guest.header(op::CREDIT_REQUEST), &[]);
    let (header, _) = guest.one();
    assert_eq!((header.op, header.fwd_cnt), (op::CREDIT_UPDATE, 3));
    drain(&mut host);
}

#[test]
fn a_guest_that_overruns_our_buffer_is_reset() {
    let (mut guest, mut host) = Guest::connected(8);
    guest.buf_alloc = BUFFER;
    let chunk = pattern(60_000);
    for _ in 0..30 {
        guest.write(&chunk);
    }
    // The first packet that broke the rules; those behind it meet no connection.
    assert!(guest.ops().iter().all(|&op| op == op::RST));
    assert!(guest.mock.device.device().connection.is_none());
    assert!(guest.mock.device.device().buffer.is_empty());
    assert!(drain(&mut host).1);
}

#[test]
fn a_guest_that_lies_about_consumption_is_reset() {
    let (mut guest, mut host) = Guest::connected(8);
    host.write_all(b"abc").unwrap();
    guest.mock.device.pump(Lapics::of_power_on()).unwrap();
    guest.packets();
    guest.fwd_cnt = 4;
    guest.send(guest.header(op::CREDIT_UPDATE), &[]);
    assert_eq!(guest.ops(), [op::RST]);
    assert!(drain(&mut host).1);
}

#[test]
fn strangers_get_rst_and_rst_gets_nothing() {
    let (mut guest, _host) = Guest::new(100);
    let request = guest.header(op::REQUEST);
    for stranger in [
        Header { dst_port: INVOKE_PORT + 1, ..request },
        Header { dst_cid: 9, ..request },
        Header { kind: 2, ..request },
        guest.header(op::RW),
        guest.header(op::SHUTDOWN),
        guest.header(op::RESPONSE),
        guest.header(999),
    ] {
        guest.send(stranger, &[]);
        let (reset, _) = guest.one();
        let expected = Header {
            src_cid: stranger.dst_cid,
            dst_cid: 3,
            src_port: stranger.dst_port,
            dst_port: PORT,
            kind: stranger.kind,
            op: op::RST,
            ..Header::default()
        };
        assert_eq!(reset, expected);
    }
    guest.send(guest.header(op::RST), &[]);
    guest.send(Header { src_cid: 4, ..request }, &[]);
    assert!(guest.ops().is_empty());
    guest.send(request, &[]);
    assert_eq!(guest.ops(), [op::RESPONSE]);
    // The stream is taken.
    guest.send(Header { src_port: PORT + 1, ..request }, &[]);
    assert_eq!(guest.one().0.dst_port, PORT + 1);
    guest.write(b"still here");
}

#[test]
fn without_a_host_stream_nobody_connects() {
    let memory = memory();
    let mock = Mock::up(memory.clone(), Vsock::new(memory));
    let mut guest = Guest { mock, next: 0, fwd_cnt: 0, buf_alloc: ROOM };
    guest.post(1);
    guest.send(guest.header(op::REQUEST), &[]);
    assert_eq!(guest.ops(), [op::RST]);
}

#[test]
fn waiting_resets_are_bounded() {
    let (mut guest, _host) = Guest::new(0);
    for _ in 0..100 {
        guest.send(guest.header(op::RW), &[]);
    }
    assert_eq!(guest.mock.device.quiescent(), Err(NotQuiet::Control));
    guest.post(100);
    assert_eq!(guest.ops(), vec![op::RST; MAX_RESETS]);
}

#[test]
fn what_no_driver_sends_on_a_live_connection_resets_it() {
    for op in [op::REQUEST, op::RESPONSE, 0, 8] {
        let (mut guest, mut host) = Guest::connected(8);
        guest.send(guest.header(op), &[]);
        assert_eq!(guest.ops(), [op::RST]);
        assert!(drain(&mut host).1);
    }
}

#[test]
fn the_hosts_end_is_passed_on_after_its_last_bytes() {
    let (mut guest, mut host) = Guest::connected(8);
    host.write_all(b"last").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    guest.mock.device.pump(Lapics::of_power_on()).unwrap();
    guest.mock.device.pump(Lapics::of_power_on()).unwrap();
    let packets = guest.packets();
    assert_eq!(packets[0].1, b"last");
    assert_eq!((packets[1].0.op, packets[1].0.flags), (op::SHUTDOWN, NO_SEND));
    assert_eq!(packets.len(), 2);
    // The other direction still works.
    guest.write(b"answer");
    assert_eq!(drain(&mut host).0, b"answer");
    // But a thaw could not give it a new host.
    assert!(matches!(guest.mock.device.quiescent(), Err(NotQuiet::HostFinished)));
}

#[test]
fn a_host_that_is_gone_resets_the_connection() {
    let (mut guest, host) = Guest::connected(8);
    drop(host);
    guest.write(b"hello?");
    assert_eq!(guest.ops(), [op::RST]);
}

#[test]
fn the_guests_shutdown_waits_for_its_bytes() {
    let (mut guest, mut host) = Guest::connected(8);
    let bytes = pattern(600_000);
    for chunk in bytes.chunks(60_000) {
        guest.write(chunk);
    }
    let flags = NO_SEND | NO_RECEIVE;
    guest.send(Header { flags, ..guest.header(op::SHUTDOWN) }, &[]);
    let mut arrived = Vec::new();
    loop {
        let (chunk, ended) = drain(&mut host);
        arrived.extend(chunk);
        if ended {
            break;
        }
        guest.mock.device.pump(Lapics::of_power_on()).unwrap();
    }
    assert_eq!(arrived, bytes);
    assert_eq!(guest.ops().last(), Some(&op::RST));
}

#[test]
fn half_a_shutdown_ends_half_a_stream() {
    let (mut guest, mut host) = Guest::connected(8);
    guest.write(b"all");
    guest.send(Header { flags: NO_SEND, ..guest.header(op::SHUTDOWN) }, &[]);
    assert_eq!(drain(&mut host), (b"all".to_vec(), true));
    host.write_all(b"answer").unwrap();
    guest.mock.device.pump(Lapics::of_power_on()).unwrap();
    assert_eq!(guest.read(), b"answer");
    // It said that it sends no more.
    guest.write(b"but");
    assert_eq!(guest.ops(), [op::RST]);
}

#[test]
fn the_guests_reset_ends_the_stream() {
    let (mut guest, mut host) = Guest::connected(8);
    guest.send(guest.header(op::RST), &[]);
    assert!(guest.ops().is_empty());
    assert!(drain(&mut host).1);
    // A new stream, a new connection.
    let mut host = guest.plug();
    guest.send(guest.header(op::REQUEST), &[]);
    assert_eq!(guest.ops(), [op::RESPONSE]);
    guest.write(b"again");
    assert_eq!(drain(&mut host).0, b"again");
}

#[test]
fn lengths_that_lie_are_violations() {
    let (mut guest, _host) = Guest::connected(8);
    let lie = Header { len: 5, ..guest.header(op::RW) };
    let error = DeviceError::Short { queue: TX, head: 2, found: 4, needed: 5 };
    assert_eq!(guest.try_send(lie, b"1234"), Err(error));

    let (mut guest, _host) = Guest::connected(8);
    guest.mock.add(TX, &[(PACKET, 43, false)]);
    assert!(matches!(guest.mock.kick(TX), Err(DeviceError::Short { found: 43, .. })));

    // One good buffer, one without room for a byte.
    let (mut guest, mut host) = Guest::connected(1);
    host.write_all(&[1; 5000]).unwrap();
    guest.mock.add(RX, &[(BUFFERS, 44, true)]);
    assert!(matches!(
        guest.mock.device.pump(Lapics::of_power_on()),
        Err(DeviceError::Short { queue: RX, .. })
    ));
}

#[test]
fn a_payload_shorter_than_its_chain_is_cut() {
    let (mut guest, mut host) = Guest::connected(8);
    guest.send(Header { len: 2, ..guest.header(op::RW) }, b"1234");
    assert_eq!(drain(&mut host).0, b"12");
}

#[test]
fn the_connection_goes_on_in_a_clone_with_a_new_stream() {
    let (mut guest, mut old) = Guest::connected(20);
    // Uneven counts both ways; the guest has consumed only a part of what it got.
    for _ in 0..11 {
        guest.write(&pattern(60_000));
        drain(&mut old);
    }
    old.write_all(&pattern(10_000)).unwrap();
    guest.mock.device.pump(Lapics::of_power_on()).unwrap();
    let packets = guest.packets();
    assert!(packets.iter().any(|(header, _)| header.op == op::CREDIT_UPDATE));
    guest.fwd_cnt = 4000;
    guest.buf_alloc = 12_000;
    guest.send(guest.header(op::CREDIT_UPDATE), &[]);
    guest.mock.device.quiescent().unwrap();

    let mock = guest.mock.thaw(Vsock::new);
    let mut clone = Guest { mock, next: guest.next, ..guest };
    let mut new = clone.plug();
    assert!(clone.ops().is_empty());
    new.write_all(&pattern(9_000)).unwrap();
    clone.mock.device.pump(Lapics::of_power_on()).unwrap();
    // 12,000 of room, 6,000 in flight since before the snapshot.
    let (packets, mut arrived) = (clone.packets(), Vec::new());
    assert_eq!(packets[0].0.fwd_cnt, 660_000);
    arrived.extend(packets.into_iter().flat_map(|(_, payload)| payload));
    assert_eq!(arrived.len(), 6000);
    clone.fwd_cnt = 16_000;
    clone.send(clone.header(op::CREDIT_UPDATE), &[]);
    arrived.extend(clone.read());
    assert_eq!(arrived, pattern(9000));
    clone.write(b"from the clone");
    assert_eq!(drain(&mut new).0, b"from the clone");
    assert_eq!(drain(&mut old).0, b"");
}

#[test]
fn a_reset_forgets_the_old_stream() {
    let (mut guest, mut old) = Guest::connected(20);
    let state = guest.mock.device.save();
    guest.write(b"first");
    old.write_all(b"never read").unwrap();
    assert_eq!(guest.mock.device.quiescent(), Err(NotQuiet::HostStream));
    guest.mock.device.restore(&state).unwrap();
    assert_eq!(guest.mock.device.first_byte(), None);
    let (bytes, ended) = (drain(&mut old).0, true);
    assert_eq!((bytes, ended), (b"first".to_vec(), true));
    // Without a stream, what the guest sends waits.
    assert!(guest.mock.device.host_stream().is_none());
}

#[test]
fn bytes_sent_before_a_stream_is_there_wait_for_it() {
    let (mut guest, _old) = Guest::connected(20);
    let mock = guest.mock.thaw(Vsock::new);
    guest.mock = mock;
    guest.write(b"early");
    assert_eq!(guest.mock.device.quiescent(), Err(NotQuiet::Buffered(5)));
    let mut new = guest.plug();
    assert_eq!(drain(&mut new).0, b"early");
}

#[test]
fn packets_that_are_not_kicked_yet_are_not_quiet() {
    let (mut guest, _host) = Guest::connected(20);
    guest.mock.add(TX, &[(PACKET, 44, false)]);
    assert_eq!(guest.mock.device.quiescent(), Err(NotQuiet::TxQueue(1)));
}

#[test]
fn connections_that_can_not_be_are_refused() {
    let (mut guest, mut host) = Guest::connected(20);
    let connection = Connection::new(&guest.header(op::REQUEST));
    let mut refused = |f: fn(&mut Connection)| {
        let mut connection = connection.clone();
        f(&mut connection);
        let state = VsockState { connection: Some(connection) };
        assert!(matches!(
            guest.mock.device.device.restore(&state),
            Err(RestoreError::Connection(_))
        ));
    };
    refused(|c| c.receive(1).unwrap());
    refused(|c| {
        c.receive(BUFFER).unwrap();
        c.forward(BUFFER as usize);
        c.receive(1).unwrap();
        c.forward(1);
    });
    guest.write(b"untouched");
    assert_eq!(drain(&mut host).0, b"untouched");
}

/// Snapshots are kept: whoever changes these bytes raises the version.
#[test]
fn the_saved_form_is_that_of_its_version() {
    let (mut guest, mut host) = Guest::connected(2);
    guest.write(b"abc");
    drain(&mut host);
    let bytes = postcard::to_allocvec(&guest.mock.device.save()).unwrap();
    let expected = [
        // Versions of the transport and of the device.
        &[1, 1][..],
        // Selected halves (1, 1), VERSION_1, queue 2, interrupt status 1, status 15, generation 0.
        &[1, 1, 0x80, 0x80, 0x80, 0x80, 0x10, 2, 1, 15, 0],
        // Three rings: size, three addresses, position.
        &[3],
        &[0x80, 1, 0x80, 0x80, 4, 0x80, 0xa0, 4, 0x80, 0xc0, 4, 1, 1],
        &[0x80, 1, 0x80, 0x80, 5, 0x80, 0xa0, 5, 0x80, 0xc0, 5, 1, 2],
        &[8, 0x80, 0x80, 6, 0x80, 0xa0, 6, 0x80, 0xc0, 6, 1, 0],
        // A connection: port 5000, received, forwarded, announced, sent, consumed, room, flags.
        &[1, 0x88, 0x27, 3, 3, 0, 0, 0, 0x80, 0x80, 0x10, 0, 0],
    ];
    assert_eq!(bytes, expected.concat());
}

#[test]
fn the_drivers_reset_ends_the_connection_but_not_a_fresh_stream() {
    let (mut guest, mut host) = Guest::connected(8);
    guest.mock.set(0x70, 0).unwrap();
    assert!(drain(&mut host).1);
    guest.plug();
    guest.mock.set(0x70, 0).unwrap();
    assert!(guest.mock.device.host_stream().is_some());
}
