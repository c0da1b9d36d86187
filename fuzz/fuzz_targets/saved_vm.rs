//! The VMM's saved state, as a snapshot's files hold it.

#![no_main]

use firn_vmm::snapshot::{SavedVm, VERSION};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((&mode, bytes)) = bytes.split_first() else { return };
    if mode == 0 {
        check(bytes);
        return;
    }
    // A right header, so that no luck is needed to get behind it.
    let mut whole = b"FIRN-VM\0".to_vec();
    whole.extend_from_slice(&VERSION.to_le_bytes());
    whole.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    whole.extend_from_slice(bytes);
    check(&whole);
});

fn check(bytes: &[u8]) {
    let Ok(saved) = SavedVm::decode(bytes) else { return };
    // A table that names a leaf twice may differ from itself.
    let _ = saved.signature.difference(&saved.signature);
    // What numbers have more than one spelling for is spelled one way from here on.
    let once = saved.encode().expect("what was short enough to decode is so to encode");
    let twice = SavedVm::decode(&once).and_then(|saved| saved.encode());
    assert_eq!(twice.as_ref(), Ok(&once));
}
