//! The state file of a snapshot, with a wrong or a right tag: what is behind the tag must be safe even
//! if somebody had the key.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((&mode, bytes)) = bytes.split_first() else { return };
    let mut bytes = bytes.to_vec();
    if mode != 0 {
        bytes.extend_from_slice(&firn::fuzzing::sign(&bytes).expect("the key is there"));
    }
    let Ok(once) = firn::fuzzing::snapshot_state(&bytes) else { return };
    // What numbers have more than one spelling for is spelled one way from here on.
    let twice = firn::fuzzing::snapshot_state(&once).expect("what was written can be read");
    assert_eq!(once, twice);
});
