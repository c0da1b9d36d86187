use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::{
    devices::{
        block::Block,
        rng::{Rng, RngState},
        vsock::Vsock,
    },
    virtio::mock::{DATA, MEMORY, Mock, NEXT, WRITE, file, memory},
};

fn up() -> Mock<Rng> {
    let memory = memory();
    Mock::up(memory.clone(), Rng::new(memory))
}

fn cold() -> Mock<Rng> {
    let memory = memory();
    Mock::cold(memory.clone(), Rng::new(memory))
}

#[test]
fn identity_registers() {
    let mut mock = cold();
    assert_eq!([mock.get(0), mock.get(4), mock.get(8)], [0x7472_6976, 2, 4]);
    assert_eq!([mock.get(0xb0), mock.get(0xbc)], [u32::MAX; 2]);
    mock.set(0x14, 1).unwrap();
    assert_eq!(mock.get(0x10), 1);
    mock.set(0x14, 2).unwrap();
    assert_eq!(mock.get(0x10), 0);
    assert_eq!(mock.get(0x34), 8);
    mock.set(0x30, 1).unwrap();
    assert_eq!(mock.get(0x34), 0);
}

#[test]
fn odd_accesses_do_nothing() {
    let mut mock = up();
    for (offset, len) in [(0x70, 1), (0x70, 2), (0x70, 8), (0x71, 4), (0x70, 0), (u64::MAX, 4)] {
        mock.device.write(offset, &vec![0; len], Lapics::of_power_on()).unwrap();
        let mut data = vec![0xff; len];
        mock.device.read(offset, &mut data);
        assert_eq!(data, vec![0; len]);
    }
    mock.device.write(0x100, &[1; 8], Lapics::of_power_on()).unwrap();
    assert_eq!(mock.get(0x70), 15);
}

#[test]
fn configuration_reads_of_any_width() {
    let memory = memory();
    let mut mock = Mock::up(memory.clone(), Vsock::new(memory));
    for (offset, len, expected) in [
        (0, 1, vec![3]),
        (0, 8, vec![3, 0, 0, 0, 0, 0, 0, 0]),
        (6, 4, vec![0; 4]),
        (9, 2, vec![0; 2]),
    ] {
        let mut data = vec![0xff; len];
        mock.device.read(0x100 + offset, &mut data);
        assert_eq!(data, expected);
    }
}

#[test]
fn features_that_are_not_offered_do_not_stick() {
    for (low, high) in [(1, 1), (0, 0), (0, 3)] {
        let mut mock = cold();
        mock.set(0x70, 3).unwrap();
        for (half, value) in [(0, low), (1, high), (2, 0xffff)] {
            mock.set(0x24, half).unwrap();
            mock.set(0x20, value).unwrap();
        }
        mock.set(0x70, 11).unwrap();
        assert_eq!(mock.get(0x70), 3);
        mock.set(0x70, 15).unwrap();
        assert_eq!(mock.get(0x70), 3);
    }
}

#[test]
fn features_are_fixed_once_agreed() {
    let mut mock = up();
    mock.set(0x24, 0).unwrap();
    mock.set(0x20, u32::MAX).unwrap();
    mock.set(0x70, 15).unwrap();
    assert_eq!(mock.get(0x70), 15);
}

#[test]
fn queues_are_set_up_in_their_time_only() {
    let mut mock = cold();
    mock.set_up(0).unwrap();
    assert_eq!(mock.get(0x44), 0);
    mock.negotiate();
    mock.set_up(0).unwrap();
    assert_eq!(mock.get(0x44), 1);
    // Neither while ready…
    mock.set(0x38, 7).unwrap();
    mock.set(0x44, 1).unwrap();
    mock.set(0x70, 15).unwrap();
    // …nor after DRIVER_OK.
    mock.set(0x44, 0).unwrap();
    assert_eq!(mock.get(0x44), 0);
    mock.set(0x44, 1).unwrap();
    assert_eq!(mock.get(0x44), 0);
    // A queue that does not exist takes anything.
    mock.set(0x30, 77).unwrap();
    mock.set(0x38, 0).unwrap();
    mock.set(0x44, 1).unwrap();
}

#[test]
fn bad_queue_sizes_are_violations() {
    for size in [0, 3, 16, 0x1_0008, u32::MAX] {
        let mut mock = cold();
        mock.negotiate();
        mock.set_up(0).unwrap();
        mock.set(0x44, 0).unwrap();
        mock.set(0x38, size).unwrap();
        let error = mock.set(0x44, 1).unwrap_err();
        assert_eq!(error, DeviceError::QueueSize { queue: 0, size, max: 8 });
        assert_eq!(mock.get(0x44), 0);
        assert_eq!(mock.get(0x70) & NEEDS_RESET, NEEDS_RESET);
    }
}

#[test]
fn rings_outside_memory_or_misaligned_are_violations() {
    let end = MEMORY as u64;
    for part in 0..3 {
        for address in [end, end - 4, u64::MAX - 15, u64::MAX, 0x10001, 1 << 40] {
            let mut mock = cold();
            mock.negotiate();
            let queue = &mut mock.queues[0];
            *[&mut queue.descriptors, &mut queue.available, &mut queue.used][part] = address;
            assert!(matches!(mock.set_up(0), Err(DeviceError::QueueAddress { .. })));
            assert_eq!(mock.get(0x44), 0);
        }
    }
}

#[test]
fn kicks_of_unready_queues_are_ignored() {
    let mut mock = cold();
    mock.add(0, &[(DATA, 8, true)]);
    mock.kick(0).unwrap();
    mock.negotiate();
    mock.set_up(0).unwrap();
    mock.kick(0).unwrap();
    assert_eq!(mock.used(0), []);
    mock.set(0x70, 15).unwrap();
    mock.kick(5).unwrap();
    mock.kick(usize::MAX).unwrap();
    assert_eq!(mock.used(0), []);
    mock.kick(0).unwrap();
    assert_eq!(mock.used(0), [(0, 8)]);
}

/// Kicks queue 0 after `break_it` and expects `error`, a dead device, and a reset that helps.
fn violation(break_it: impl FnOnce(&mut Mock<Rng>), error: DeviceError) {
    let mut mock = up();
    break_it(&mut mock);
    assert_eq!(mock.kick(0).unwrap_err(), error);
    assert_eq!(mock.get(0x70) & NEEDS_RESET, NEEDS_RESET);
    mock.kick(0).unwrap();
    assert_eq!(mock.line.count(), 0);
    mock.memory.write_slice(&[0; 0x4000], GuestAddress(0x10000)).unwrap();
    let mut mock = Mock { queues: up().queues, ..mock };
    mock.negotiate();
    mock.set_up(0).unwrap();
    mock.set(0x70, 15).unwrap();
    mock.add(0, &[(DATA, 8, true)]);
    mock.kick(0).unwrap();
    assert_eq!(mock.used(0), [(0, 8)]);
}

#[test]
fn a_loop_is_a_violation() {
    violation(
        |mock| {
            mock.descriptor(0, 0, (DATA, 8, NEXT | WRITE, 1));
            mock.descriptor(0, 1, (DATA, 8, NEXT | WRITE, 0));
            mock.offer(0, 0);
        },
        DeviceError::Loop { queue: 0, head: 0 },
    );
}

#[test]
fn buffers_outside_memory_are_violations() {
    for (address, len) in
        [(MEMORY as u64, 1), (MEMORY as u64 - 1, 2), (u64::MAX, 2), (0, MEMORY as u32 + 1)]
    {
        violation(
            |mock| {
                mock.add(0, &[(address, len, true)]);
            },
            DeviceError::Buffer { queue: 0, address, len },
        );
    }
}

#[test]
fn a_chain_of_over_4_gib_is_a_violation() {
    violation(
        |mock| {
            mock.add(0, &[(DATA, 8, true), (DATA, u32::MAX, true)]);
        },
        DeviceError::ChainLength { queue: 0, head: 0 },
    );
}

#[test]
fn descriptor_indices_outside_the_table_are_violations() {
    for index in [8, u16::MAX] {
        let error = DeviceError::DescriptorIndex { queue: 0, index, size: 8 };
        violation(|mock| mock.offer(0, index), error.clone());
        violation(
            |mock| {
                mock.descriptor(0, 0, (DATA, 8, NEXT | WRITE, index));
                mock.offer(0, 0);
            },
            error,
        );
    }
}

#[test]
fn an_index_jump_is_a_violation() {
    for index in [9, 0x8000, u16::MAX] {
        violation(
            |mock| {
                let at = GuestAddress(mock.queues[0].available + 2);
                mock.memory.write_obj(index, at).unwrap();
            },
            DeviceError::AvailableIndex { queue: 0, index, next: 0, size: 8 },
        );
    }
}

#[test]
fn indirect_and_disordered_descriptors_are_violations() {
    violation(
        |mock| {
            mock.descriptor(0, 3, (DATA, 16, 4, 0));
            mock.offer(0, 3);
        },
        DeviceError::Indirect { queue: 0, index: 3 },
    );
    violation(
        |mock| {
            mock.add(0, &[(DATA, 8, true), (DATA, 8, false)]);
        },
        DeviceError::Order { queue: 0, index: 1 },
    );
}

#[test]
fn zero_length_descriptors_are_passed_over() {
    let mut mock = up();
    mock.add(0, &[(u64::MAX, 0, true), (DATA, 8, true), (DATA, 0, true)]);
    mock.add(0, &[(DATA, 0, true)]);
    mock.kick(0).unwrap();
    assert_eq!(mock.used(0), [(0, 8), (3, 0)]);
}

#[test]
fn one_kick_serves_all_and_the_ring_wraps() {
    let mut mock = up();
    for round in 0..70_000 / 8 {
        for _ in 0..8 {
            mock.add(0, &[(DATA, 1, true)]);
        }
        mock.kick(0).unwrap();
        assert_eq!(mock.used(0).len(), 8, "round {round}");
    }
}

#[test]
fn interrupts_are_acknowledged_and_suppressed() {
    let mut mock = up();
    mock.add(0, &[(DATA, 1, true)]);
    mock.kick(0).unwrap();
    assert_eq!((mock.line.count(), mock.get(0x60)), (1, 1));
    mock.set(0x64, 1).unwrap();
    assert_eq!(mock.get(0x60), 0);
    mock.memory.write_obj(1u16, GuestAddress(mock.queues[0].available)).unwrap();
    mock.add(0, &[(DATA, 1, true)]);
    mock.kick(0).unwrap();
    assert_eq!((mock.line.count(), mock.get(0x60)), (1, 0));
    // Nothing given back, nothing to tell.
    mock.memory.write_obj(0u16, GuestAddress(mock.queues[0].available)).unwrap();
    mock.kick(0).unwrap();
    assert_eq!(mock.line.count(), 1);
}

#[test]
fn configuration_changes_are_told_to_a_driver_that_is_up() {
    let mut mock = cold();
    mock.device.config_changed(Some(Lapics::of_power_on()));
    assert_eq!((mock.line.count(), mock.get(0x60), mock.get(0xfc)), (0, 0, 1));
    let mut mock = up();
    mock.device.config_changed(Some(Lapics::of_power_on()));
    assert_eq!((mock.line.count(), mock.get(0x60), mock.get(0xfc)), (1, 2, 1));
}

#[test]
fn reset_is_power_on() {
    let mut mock = up();
    mock.add(0, &[(DATA, 1, true)]);
    mock.kick(0).unwrap();
    mock.set(0x70, 0).unwrap();
    assert_eq!(mock.device.save(), cold().device.save());
    assert_eq!(mock.get(0x60), 0);
}

#[test]
fn a_clone_goes_on_where_the_snapshot_was() {
    let mut mock = up();
    for _ in 0..3 {
        mock.add(0, &[(DATA, 1, true)]);
        mock.kick(0).unwrap();
    }
    let mut clone = mock.thaw(Rng::new);
    assert_eq!(clone.line.count(), 0);
    assert_eq!(clone.used(0).len(), 3);
    clone.add(0, &[(DATA, 5, true)]);
    clone.kick(0).unwrap();
    assert_eq!(clone.used(0), [(3, 5)]);
    assert_eq!(mock.device.save().rings, mock.thaw(Rng::new).device.save().rings);
}

#[test]
fn restore_works_on_a_used_device() {
    let mut mock = up();
    let state = mock.device.save();
    let (bytes, queues) = (mock.read_vec(0, MEMORY), mock.queues.clone());
    mock.add(0, &[(DATA, 1, true)]);
    mock.kick(0).unwrap();
    mock.set(0x70, 0).unwrap();
    mock.write_all(0, &bytes);
    mock.queues = queues;
    mock.device.restore(&state).unwrap();
    assert_eq!(mock.device.save(), state);
    mock.add(0, &[(DATA, 1, true)]);
    mock.kick(0).unwrap();
    assert_eq!(mock.used(0), [(0, 1)]);
}

/// Found by fuzzing: what a driver writes before `FEATURES_OK` is a wish, and no reason to lose a
/// snapshot. It still does not stick.
#[test]
fn a_wish_for_features_that_are_not_offered_is_saved_and_restored() {
    let mut mock = cold();
    mock.set(0x70, 3).unwrap();
    mock.set(0x20, 0xff00_0000).unwrap();
    let state = mock.device.save();
    mock.device.restore(&state).unwrap();
    assert_eq!(mock.device.save(), state);
    mock.set(0x70, 11).unwrap();
    assert_eq!(mock.get(0x70), 3);
}

#[test]
fn saved_states_that_can_not_be_are_refused_and_change_nothing() {
    let good = up().device.save();
    let edit = |f: fn(&mut VirtioMmioState<RngState>)| {
        let mut state = good.clone();
        f(&mut state);
        let mut mock = up();
        let error = mock.device.restore(&state).unwrap_err();
        assert_eq!(mock.device.save(), good);
        error
    };
    assert!(matches!(edit(|s| s.version = 2), RestoreError::Version { .. }));
    assert!(matches!(edit(|s| s.device_version = 0), RestoreError::Version { .. }));
    assert!(matches!(edit(|s| s.registers.features |= 1), RestoreError::Features { .. }));
    let wrong = |name| move |e: RestoreError| matches!(e, RestoreError::Register { register, .. } if register == name);
    assert!(wrong("Status")(edit(|s| s.registers.status |= 0x100)));
    assert!(wrong("Status")(edit(|s| s.registers.status = 3)));
    assert!(wrong("Status")(edit(|s| s.registers.status = 7)));
    assert!(wrong("Status")(edit(|s| s.registers.features = 0)));
    assert!(wrong("InterruptStatus")(edit(|s| s.registers.interrupt_status = 4)));
    assert!(matches!(edit(|s| s.rings.clear()), RestoreError::QueueCount { found: 0, .. }));
}

#[test]
fn saved_rings_that_can_not_be_are_refused() {
    let good = up().device.save();
    for field in 0..4 {
        for value in [1, 3, u64::from(u32::MAX), MEMORY as u64, u64::MAX] {
            let mut state = good.clone();
            let ring = &mut state.rings[0];
            match field {
                0 => ring.set_size(value as u32 | 0x10000),
                1 => ring.set_addresses(Some(value), None, None),
                2 => ring.set_addresses(None, Some(value), None),
                _ => ring.set_addresses(None, None, Some(value)),
            }
            let error = up().device.restore(&state).unwrap_err();
            assert!(matches!(error, RestoreError::Queue { .. }), "{error}");
        }
    }
}

/// A random thing that a hostile driver does.
#[derive(Debug, Clone)]
enum Step {
    Register(u64, u32),
    Write(u64, Vec<u8>),
    Read(u64, usize),
    Descriptor(usize, u16, (u64, u32, u16, u16)),
    Offer(usize, u16),
    Poke(u64, u16),
    Kick(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let address = prop_oneof![0..MEMORY as u64, Just(DATA), any::<u64>()];
    let length = prop_oneof![0u32..70, 0u32..5000, any::<u32>()];
    let next = prop_oneof![0u16..8, any::<u16>()];
    let register = (0u64..0x28).prop_map(|r| 4 * r);
    let value = prop_oneof![0u32..16, 0u32..MEMORY as u32, any::<u32>()];
    prop_oneof![
        1 => (register, value).prop_map(|(o, v)| Step::Register(o, v)),
        1 => (0u64..0x140, proptest::collection::vec(any::<u8>(), 0..9))
            .prop_map(|(o, b)| Step::Write(o, b)),
        1 => (0u64..0x140, 0usize..9).prop_map(|(o, n)| Step::Read(o, n)),
        6 => (0usize..3, 0u16..8, (address, length, 0u16..4, next.clone()))
            .prop_map(|(q, i, d)| Step::Descriptor(q, i, d)),
        4 => (0usize..3, next).prop_map(|(q, h)| Step::Offer(q, h)),
        1 => (0x10000u64..0x1c000, any::<u16>()).prop_map(|(a, v)| Step::Poke(a, v)),
        4 => (0usize..3).prop_map(Step::Kick),
    ]
}

fn survive<D: Device>(mut mock: Mock<D>, steps: &[Step]) {
    let count = mock.queues.len();
    for step in steps {
        match step.clone() {
            Step::Register(offset, value) => drop(mock.set(offset, value)),
            Step::Write(offset, bytes) => {
                drop(mock.device.write(offset, &bytes, Lapics::of_power_on()))
            }
            Step::Read(offset, len) => mock.device.read(offset, &mut vec![0; len]),
            Step::Descriptor(queue, index, raw) => mock.descriptor(queue % count, index, raw),
            Step::Offer(queue, head) => mock.offer(queue % count, head),
            Step::Poke(address, value) => mock.write_all(address & !1, &value.to_le_bytes()),
            Step::Kick(queue) => drop(mock.kick(queue % count)),
        }
        let state = mock.device.save();
        let _ = mock.device.restore(&state);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn no_driver_can_make_a_device_panic(steps in proptest::collection::vec(step(), 1..80)) {
        let memory = memory();
        survive(Mock::up(memory.clone(), Rng::new(memory.clone())), &steps);
        let mut block = Mock::up(
            memory.clone(),
            Block::new(
                memory.clone(),
                firn_proto::control::DiskKind::CopyOnWrite,
                "x",
                crate::virtio::Halt::default(),
            ),
        );
        block.device.install(crate::devices::block::Medium::CopyOnWrite {
            backing: file(&[7; 20_000]),
            frozen: None,
            delta: file(&[]),
        }).unwrap();
        survive(block, &steps);
        let mut vsock = Mock::up(memory.clone(), Vsock::new(memory));
        let (near, _far) = std::os::unix::net::UnixStream::pair().unwrap();
        vsock.device.set_host_stream(near, false);
        survive(vsock, &steps);
    }

    #[test]
    fn any_saved_bytes_restore_or_fail(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(state) = postcard::from_bytes(&bytes) {
            let _ = up().device.restore(&state);
        }
        let memory = memory();
        if let Ok(state) = postcard::from_bytes(&bytes) {
            let _ = Mock::up(memory.clone(), Vsock::new(memory)).device.restore(&state);
        }
    }
}
