//! Control messages, both ways: what a VMM that was taken over may send to the host, and the
//! other way round. What decodes must survive a round trip.

#![no_main]

use firn_proto::control::{decode_from_vmm, decode_to_vmm, encode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(message) = decode_to_vmm(bytes) {
        let again = encode(&message).expect("what was short enough to decode is so to encode");
        assert_eq!(decode_to_vmm(&again), Ok(message));
    }
    if let Ok(message) = decode_from_vmm(bytes) {
        let again = encode(&message).expect("what was short enough to decode is so to encode");
        assert_eq!(decode_from_vmm(&again), Ok(message));
    }
});
