//! What callers of the daemon sign, and policies.

#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;

#[derive(Debug, Arbitrary)]
enum Input<'a> {
    Policy(&'a str),
    Signature { authorization: Option<&'a str>, target: &'a str, date: &'a str },
}

fuzz_target!(|input: Input| match input {
    Input::Policy(text) => firnd::fuzzing::policy(text),
    Input::Signature { authorization, target, date } => {
        firnd::fuzzing::signature(authorization, target, date)
    }
});
