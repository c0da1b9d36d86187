//! The state file of a snapshot, with a wrong or a right checksum: whoever can write the file can
//! compute one.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((&mode, bytes)) = bytes.split_first() else { return };
    let mut bytes = bytes.to_vec();
    if mode != 0 {
        bytes.extend_from_slice(blake3::hash(&bytes).as_bytes());
    }
    let Ok(once) = firn::fuzzing::snapshot_state(&bytes) else { return };
    // What numbers have more than one spelling for is spelled one way from here on.
    let twice = firn::fuzzing::snapshot_state(&once).expect("what was written can be read");
    assert_eq!(once, twice);
});
