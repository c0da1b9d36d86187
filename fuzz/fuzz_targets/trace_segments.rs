//! What functions' X-Ray SDKs send to the X-Ray daemon.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|document: &[u8]| firnd::fuzzing::segments(document));
