//! What callers of the daemon name and send.

#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;

#[derive(Debug, Arbitrary)]
enum Input<'a> {
    Name { text: &'a str, qualifier: Option<&'a str> },
    Body(&'a [u8]),
}

fuzz_target!(|input: Input| match input {
    Input::Name { text, qualifier } => firnd::fuzzing::name(text, qualifier),
    Input::Body(body) => firnd::fuzzing::body(body),
});
