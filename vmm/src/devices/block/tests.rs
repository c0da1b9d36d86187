use std::fs::File;

use proptest::prelude::*;

use super::*;
use crate::virtio::mock::{DATA, Mock, file, memory};

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

const STATUS: u64 = DATA + 0x100;
const BUFFER: u64 = DATA + 0x1000;

/// 4 blocks and 3 sectors, each sector full of its number.
fn content() -> Vec<u8> {
    (0..35u8).flat_map(|sector| [sector; 512]).collect()
}

fn empty(kind: DiskKind) -> Mock<Block> {
    let memory = memory();
    Mock::up(memory.clone(), Block::new(memory, kind, "firn-disk-0", Halt::default()))
}

fn read_only() -> Mock<Block> {
    let mut mock = empty(DiskKind::ReadOnly);
    mock.device.install(Medium::ReadOnly { file: file(&content()) }).unwrap();
    mock
}

fn medium(frozen: Option<File>) -> Medium {
    Medium::CopyOnWrite { backing: file(&content()), frozen, delta: file(b"") }
}

fn copy_on_write() -> Mock<Block> {
    let mut mock = empty(DiskKind::CopyOnWrite);
    mock.device.install(medium(None)).unwrap();
    mock
}

/// Sends a request with one data buffer and returns its status.
fn request(mock: &mut Mock<Block>, kind: u32, sector: u64, len: u32, writable: bool) -> u8 {
    let mut header = kind.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    mock.write_all(DATA, &header);
    mock.write_all(STATUS, &[0xff]);
    let head = mock.add(0, &[(DATA, 16, false), (BUFFER, len, writable), (STATUS, 1, true)]);
    mock.kick(0).unwrap();
    let written = if writable { len + 1 } else { 1 };
    assert_eq!(mock.used(0), [(head.into(), written)]);
    mock.read_vec(STATUS, 1)[0]
}

fn capacity(mock: &mut Mock<Block>) -> u64 {
    let mut bytes = [0; 8];
    mock.device.read(0x100, &mut bytes);
    u64::from_le_bytes(bytes)
}

#[test]
fn configuration_and_features() {
    let mut mock = read_only();
    assert_eq!(capacity(&mut mock), 35);
    assert_eq!(mock.get(0x10c), 126);
    let mut byte = [0];
    mock.device.read(0x118, &mut byte);
    assert_eq!(byte, [3]);
    assert_eq!(mock.get(0x118) >> 16, 8);
    mock.set(0x14, 0).unwrap();
    assert_eq!(mock.get(0x10), 1 << 2 | 1 << 5 | 1 << 10);
    let mut mock = copy_on_write();
    mock.set(0x14, 0).unwrap();
    assert_eq!(mock.get(0x10), 1 << 2 | 1 << 10);
}

#[test]
fn reads_and_refuses_writes() {
    let mut mock = read_only();
    assert_eq!(request(&mut mock, VIRTIO_BLK_T_IN, 7, 1024, true), OK);
    assert_eq!(mock.read_vec(BUFFER, 1024), [[7; 512], [8; 512]].concat());
    assert_eq!(request(&mut mock, VIRTIO_BLK_T_OUT, 7, 512, false), IOERR);
    assert_eq!(mock.line.count(), 2);
}

#[test]
fn writes_are_read_back() {
    let mut mock = copy_on_write();
    mock.write_all(BUFFER, &[0xaa; 1024]);
    assert_eq!(request(&mut mock, VIRTIO_BLK_T_OUT, 7, 1024, false), OK);
    assert_eq!(request(&mut mock, VIRTIO_BLK_T_IN, 6, 2048, true), OK);
    let expected = [[6; 512], [0xaa; 512], [0xaa; 512], [9; 512]].concat();
    assert_eq!(mock.read_vec(BUFFER, 2048), expected);
}

#[test]
fn requests_that_ask_for_nonsense_get_ioerr() {
    let mut mock = copy_on_write();
    for (kind, sector, len, writable) in [
        (VIRTIO_BLK_T_IN, 35, 512, true),
        (VIRTIO_BLK_T_IN, 34, 1024, true),
        (VIRTIO_BLK_T_IN, u64::MAX, 512, true),
        (VIRTIO_BLK_T_IN, 0, 100, true),
        (VIRTIO_BLK_T_IN, 0, 512, false),
        (VIRTIO_BLK_T_OUT, 0, 512, true),
        (VIRTIO_BLK_T_OUT, 0, 513, false),
        (VIRTIO_BLK_T_OUT, 35, 512, false),
        (VIRTIO_BLK_T_GET_ID, 0, 20, false),
        (VIRTIO_BLK_T_FLUSH, 0, 512, true),
    ] {
        let status = request(&mut mock, kind, sector, len, writable);
        assert_eq!(status, IOERR, "{kind} {sector} {len} {writable}");
    }
    for kind in [2, 3, 11, 13, u32::MAX] {
        assert_eq!(request(&mut mock, kind, 0, 512, false), UNSUPP);
    }
    assert_eq!(mock.get(0x70), 15);
}

/// Whenever a vCPU thread is wanted back, what it has not answered is answered later, whole.
#[test]
fn what_is_halted_waits_in_the_queue_and_is_done_later() {
    const LEN: u32 = 300 << 10;
    const FIRST: u64 = 3;
    let whole: Vec<u8> = (0..1200u32).flat_map(|sector| [sector as u8; 512]).collect();
    let (mut halted_at, mut done) = (Vec::new(), false);
    for looks in 1..100 {
        let (memory, halt) = (memory(), Halt::default());
        let block = Block::new(memory.clone(), DiskKind::CopyOnWrite, "", halt.clone());
        let mut mock = Mock::up(memory, block);
        let medium = Medium::CopyOnWrite { backing: file(&whole), frozen: None, delta: file(b"") };
        mock.device.install(medium).unwrap();
        // A write behind a read.
        let new = vec![0xbb; LEN as usize];
        let mut heads = Vec::new();
        for (kind, at, data, writable) in [
            (VIRTIO_BLK_T_IN, DATA, BUFFER, true),
            (VIRTIO_BLK_T_OUT, DATA + 16, BUFFER + u64::from(LEN), false),
        ] {
            let mut header = kind.to_le_bytes().to_vec();
            header.extend([0; 4]);
            header.extend(FIRST.to_le_bytes());
            mock.write_all(at, &header);
            let status = STATUS + u64::from(!writable);
            heads.push(mock.add(0, &[(at, 16, false), (data, LEN, writable), (status, 1, true)]));
        }
        mock.write_all(BUFFER + u64::from(LEN), &new);
        halt.set_at(looks);
        mock.kick(0).unwrap();
        let mut used = mock.used(0);
        done = used.len() == 2;
        halted_at.push(used.len());
        mock.device.go_on(Lapics::of_power_on()).unwrap();
        assert_eq!(mock.used(0), [], "{looks}: it is halted");
        halt.set(false);
        mock.device.go_on(Lapics::of_power_on()).unwrap();
        used.extend(mock.used(0));
        let expected = [(heads[0].into(), LEN + 1), (heads[1].into(), 1)];
        assert_eq!(used, expected, "{looks}");
        let from = FIRST as usize * 512;
        assert_eq!(mock.read_vec(BUFFER, LEN as usize), whole[from..from + LEN as usize]);
        assert_eq!(mock.read_vec(STATUS, 2), [OK, OK]);
        if done {
            break;
        }
    }
    // Before the first, in the middle of each, and between them.
    assert!(done && halted_at.len() > 10, "{halted_at:?}");
    assert!(halted_at.contains(&0) && halted_at.contains(&1), "{halted_at:?}");
}

#[test]
fn flush_and_identity() {
    let mut mock = copy_on_write();
    assert_eq!(request(&mut mock, VIRTIO_BLK_T_FLUSH, 0, 0, false), OK);
    assert_eq!(request(&mut mock, VIRTIO_BLK_T_GET_ID, 0, 20, true), OK);
    assert_eq!(mock.read_vec(BUFFER, 20), b"firn-disk-0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn header_and_status_may_lie_anywhere() {
    let mut mock = read_only();
    mock.write_all(DATA, &[[0; 8], 2u64.to_le_bytes()].concat());
    // A header in three pieces, and a status at the end of the data's buffer.
    let pieces = [(DATA, 3, false), (DATA + 3, 9, false), (DATA + 12, 4, false)];
    let head =
        mock.add(0, &[&pieces[..], &[(BUFFER, 200, true), (BUFFER + 200, 313, true)]].concat());
    mock.write_all(BUFFER + 512, &[0xff]);
    mock.kick(0).unwrap();
    assert_eq!(mock.used(0), [(head.into(), 513)]);
    assert_eq!(mock.read_vec(BUFFER, 513), [&[2; 512][..], &[OK]].concat());
}

#[test]
fn a_request_without_header_or_status_is_a_violation() {
    for buffers in [&[(DATA, 16, false)][..], &[(DATA, 15, false), (STATUS, 1, true)]] {
        let mut mock = read_only();
        mock.add(0, buffers);
        assert!(matches!(mock.kick(0), Err(DeviceError::Short { queue: 0, head: 0, .. })));
        assert_eq!(mock.get(0x70), 15 | 64);
    }
}

#[test]
fn large_requests_are_refused() {
    let mut mock = read_only();
    let whole = (DATA, 0x80000, true);
    mock.write_all(DATA - 16, &[0; 16]);
    let mut buffers = vec![(DATA - 16, 16, false)];
    buffers.extend([whole; MAX_REQUEST / 0x80000 + 1]);
    buffers.push((STATUS, 1, true));
    mock.add(0, &buffers);
    mock.kick(0).unwrap();
    assert_eq!(mock.read_vec(STATUS, 1), [IOERR]);
}

#[test]
fn a_medium_comes_and_goes_while_the_guest_runs() {
    let mut mock = empty(DiskKind::ReadOnly);
    assert_eq!(capacity(&mut mock), 0);
    assert_eq!(request(&mut mock, VIRTIO_BLK_T_IN, 0, 512, true), IOERR);
    assert_eq!(request(&mut mock, VIRTIO_BLK_T_IN, 0, 0, true), IOERR);
    mock.set(0x64, 3).unwrap();
    let raised = mock.line.count();
    let lapics = Some(Lapics::of_power_on());
    mock.device.replace(Medium::ReadOnly { file: file(&content()) }, lapics).unwrap();
    assert_eq!((mock.line.count(), mock.get(0x60), mock.get(0xfc)), (raised + 1, 2, 1));
    assert_eq!(capacity(&mut mock), 35);
    assert_eq!(request(&mut mock, VIRTIO_BLK_T_IN, 1, 512, true), OK);
    assert!(mock.device.replace(medium(None), lapics).is_err());
    assert_eq!(capacity(&mut mock), 35);
    mock.device.replace(Medium::Empty, lapics).unwrap();
    assert_eq!(capacity(&mut mock), 0);
}

#[test]
fn a_medium_that_came_when_there_was_no_lapic_is_told_of_later() {
    let mut mock = empty(DiskKind::ReadOnly);
    mock.set(0x64, 3).unwrap();
    let raised = mock.line.count();
    mock.device.replace(Medium::Empty, None).unwrap();
    assert_eq!((mock.line.count(), mock.device.is_unacknowledged()), (raised, true));
    assert!(mock.device.raise_unacknowledged(Lapics::of_power_on()));
    assert_eq!((mock.line.count(), mock.get(0x60)), (raised + 1, 2));
    let before = mock.device.acknowledged();
    mock.set(0x64, 2).unwrap();
    assert!(!mock.device.raise_unacknowledged(Lapics::of_power_on()));
    assert_eq!((mock.line.count(), mock.device.acknowledged()), (raised + 1, before + 1));
}

#[test]
fn a_thawed_clone_has_the_snapshots_disk_and_its_own_delta() {
    let mut mock = copy_on_write();
    mock.write_all(BUFFER, &[0xaa; 512]);
    assert_eq!(request(&mut mock, VIRTIO_BLK_T_OUT, 3, 512, false), OK);
    let frozen = file(b"");
    assert_eq!(mock.device.save_delta(&frozen).unwrap(), 1);
    let state = mock.device.save();

    let mut first = mock.thaw(|memory| {
        let mut block = Block::new(memory, DiskKind::CopyOnWrite, "", Halt::default());
        block.disk = Disk::new(DiskKind::CopyOnWrite, medium(Some(frozen))).unwrap();
        block
    });
    assert_eq!(first.device.save(), state);
    first.write_all(BUFFER, &[0xbb; 512]);
    assert_eq!(request(&mut first, VIRTIO_BLK_T_OUT, 4, 512, false), OK);
    assert_eq!(request(&mut first, VIRTIO_BLK_T_IN, 2, 2048, true), OK);
    let expected = [[2; 512], [0xaa; 512], [0xbb; 512], [5; 512]].concat();
    assert_eq!(first.read_vec(BUFFER, 2048), expected);
    // Both layers go into the next snapshot.
    let next = file(b"");
    assert_eq!(first.device.save_delta(&next).unwrap(), 1);
    // A reset goes back.
    first.device.restore(&state).unwrap();
    assert_eq!(first.device.save(), state);
}

#[test]
fn another_medium_than_the_snapshots_is_refused() {
    let state = copy_on_write().device.save();
    let mut other = empty(DiskKind::CopyOnWrite);
    assert_eq!(
        other.device.restore(&state),
        Err(RestoreError::Capacity { found: 35, expected: 0 })
    );
}

/// Snapshots are kept: whoever changes these bytes raises the version.
#[test]
fn the_saved_form_is_that_of_its_version() {
    let mut mock = copy_on_write();
    assert_eq!(request(&mut mock, VIRTIO_BLK_T_OUT, 8, 512, false), OK);
    assert_eq!((Block::VERSION, mock.device.device().save().sectors), (1, 35));
    let bytes = postcard::to_allocvec(&mock.device.device().save()).unwrap();
    assert_eq!(bytes, [35, 1, 2]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn hostile_requests_get_an_answer_or_end_the_device(
        requests in proptest::collection::vec(
            (
                prop_oneof![0u32..14, any::<u32>()],
                prop_oneof![0u64..40, any::<u64>()],
                proptest::collection::vec((DATA..DATA + 0x8000, 0u32..5000, any::<bool>()), 0..6),
                any::<bool>(),
            ),
            1..20,
        ),
    ) {
        let mut mock = copy_on_write();
        for (kind, sector, mut buffers, ordered) in requests {
            if ordered {
                buffers.sort_by_key(|buffer| buffer.2);
            }
            let mut header = kind.to_le_bytes().to_vec();
            header.extend([0; 4]);
            header.extend(sector.to_le_bytes());
            mock.write_all(DATA, &header);
            buffers.insert(0, (DATA, 16, false));
            let room: u32 = buffers.iter().filter(|b| b.2).map(|b| b.1).sum();
            let head = mock.add(0, &buffers);
            if mock.kick(0).is_err() {
                break;
            }
            prop_assert_eq!(mock.used(0), [(head.into(), room)]);
        }
        // What it did stayed within its medium.
        prop_assert!(mock.device.device().save().written.len() <= 1);
    }
}
