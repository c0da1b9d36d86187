//! Random guests: hostile ones, and honest ones beside a slow host.

use std::sync::LazyLock;

use proptest::prelude::*;

use super::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn hostile_packets_never_panic(
        packets in proptest::collection::vec(
            (0u16..10, 0u32..4, prop_oneof![Just(0u32), 0..70_000u32, any::<u32>()],
             prop_oneof![Just(0u32), any::<u32>()], prop_oneof![Just(ROOM), any::<u32>()],
             prop_oneof![4 => Just(INVOKE_PORT), 1 => any::<u32>()], 0u32..5000, 0usize..3),
            1..60,
        ),
    ) {
        let (mut guest, mut host) = Guest::connected(20);
        for (op, flags, len, fwd_cnt, buf_alloc, dst_port, bytes, posted) in packets {
            let header = Header { flags, len, fwd_cnt, buf_alloc, dst_port, ..guest.header(op) };
            if guest.try_send(header, &vec![0; bytes as usize]).is_err() {
                break;
            }
            let _ = host.write(&[7; 3000]);
            let _ = guest.mock.device.pump(Lapics::of_power_on());
            guest.post(posted);
            guest.packets();
            guest.mock.used(TX);
            if guest.mock.device.host_stream().is_none() {
                host = guest.plug();
            }
        }
    }

    #[test]
    fn both_directions_keep_every_byte(
        steps in proptest::collection::vec((0usize..4, 1usize..50_000), 1..60),
    ) {
        let (mut guest, mut host) = Guest::connected(30);
        let (mut down, mut up) = (Vec::new(), Vec::new());
        let (mut written_down, mut written_up) = (0, 0);
        static STREAM: LazyLock<Vec<u8>> = LazyLock::new(|| pattern(3_000_000));
        let stream = &*STREAM;
        for (action, len) in steps.into_iter().chain([(3, 0); 40]) {
            match action {
                0 => written_down += host.write(&stream[written_down..][..len]).unwrap_or(0),
                1 if written_up - up.len() + len < BUFFER as usize => {
                    guest.write(&stream[written_up..][..len]);
                    written_up += len;
                }
                2 => up.extend(drain(&mut host).0),
                _ => {
                    up.extend(drain(&mut host).0);
                    guest.mock.device.pump(Lapics::of_power_on()).unwrap();
                    let packets = guest.packets();
                    let count = packets.len();
                    let payload: Vec<u8> = packets.into_iter().flat_map(|(_, p)| p).collect();
                    guest.fwd_cnt += payload.len() as u32;
                    down.extend(payload);
                    guest.post(count);
                    guest.send(guest.header(op::CREDIT_UPDATE), &[]);
                }
            }
        }
        up.extend(drain(&mut host).0);
        prop_assert!(down == stream[..written_down], "{} of {}", down.len(), written_down);
        prop_assert!(up == stream[..written_up], "{} of {}", up.len(), written_up);
    }
}
