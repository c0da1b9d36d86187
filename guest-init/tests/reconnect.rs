//! `--reconnect`: what a guest does whose connection is lost.

mod guest;

use firn_proto::guest::{FromGuest, ToGuest};
use guest::{Guest, renew};

const BOOTSTRAP: &str = "#!/bin/sh\nexec sleep 1000\n";

fn frozen(options: &[&str]) -> Guest {
    let mut guest = Guest::with_options(BOOTSTRAP, options);
    guest.send(&ToGuest::Freeze);
    assert_eq!(guest.answer(), FromGuest::Frozen);
    guest
}

#[test]
fn a_frozen_guest_goes_on_over_a_new_connection() {
    let mut guest = frozen(&["--reconnect"]);
    for _ in 0..2 {
        guest.lose_connection();
        guest.accept_again();
        guest.send(&renew());
        assert_eq!(guest.renewed().instance_id, "instance-1");
        guest.send(&ToGuest::Freeze);
        assert_eq!(guest.answer(), FromGuest::Frozen);
    }
    // It is still frozen behind the new connection, and still refuses what came before Renew.
    guest.lose_connection();
    guest.accept_again();
    guest.send(&guest::invocation("r", 5000, "{}"));
    assert_eq!(guest.ended(), Some(1));
}

#[test]
fn a_guest_that_is_not_frozen_ends_with_its_connection() {
    let mut guest = Guest::with_options(BOOTSTRAP, &["--reconnect"]);
    guest.lose_connection();
    assert_eq!(guest.ended(), Some(1));
}

#[test]
fn without_the_option_a_frozen_guest_ends_too() {
    let mut guest = frozen(&[]);
    guest.lose_connection();
    assert_eq!(guest.ended(), Some(1));
}
