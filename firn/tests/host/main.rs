//! The library from outside: real jails, real processes, and two kinds of VMM in them.
//!
//! - The real `firn-vmm`, where `/dev/kvm` is: shells, and guests of a few instructions.
//! - A stand-in, which is this very executable under the name `firn-vmm`: it speaks both protocols
//!   and plays the guest too, so that boot, load, invoke, snapshot and thaw run in a real jail on
//!   any machine, and misbehave on request.
//!
//! As root, and by `rootless` as an ordinary user. A test's name, or part of it, as argument runs only
//! that.

mod attackers;
mod ends;
mod install;
mod jail;
mod life;
mod report;
mod resets;
mod rootless;
mod snapshots;
mod stand_in;
mod streams;

use std::{process::ExitCode, time::Instant};

type Test = (&'static str, fn());

/// Runs `$name` on a runtime of its own.
macro_rules! tests {
    ($($module:ident :: $name:ident),* $(,)?) => {
        &[$((concat!(stringify!($module), "::", stringify!($name)), || {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on($module::$name());
        })),*]
    };
}

const TESTS: &[Test] = tests![
    attackers::what_no_init_says_ends_its_guest,
    attackers::an_answer_in_advance_is_nobodys,
    attackers::figures_that_lie_stay_within_what_is_possible,
    attackers::output_without_end_ends_at_the_deadline,
    attackers::noise_from_an_init_ends_nothing_but_its_guest,
    ends::whoever_asks_a_vmm_that_is_gone_learns_how_it_ended,
    ends::a_vmm_that_dies_in_a_thaw_says_how,
    ends::a_guest_that_does_not_renew_itself_is_killed_with_a_diagnosis,
    jail::a_stand_in_lives_in_a_whole_cage,
    jail::a_real_shell_lives_in_a_whole_cage,
    jail::a_step_of_the_jailer_that_fails_is_named,
    jail::real_guests_end_with_their_reason,
    jail::a_thousand_crashes_leave_nothing,
    life::boot_load_invoke_pause,
    life::nothing_is_left_after_kill_and_shutdown,
    life::nothing_is_left_of_a_host_that_was_killed,
    life::many_at_once,
    life::a_vmm_that_dies_says_how,
    life::a_guest_that_hangs_is_killed,
    life::the_pool_is_refilled_and_skips_the_dead,
    life::a_dropped_host_takes_its_pool_along,
    life::bad_configurations_are_named,
    resets::a_reset_forgets_and_renews,
    resets::only_what_a_snapshot_holds_is_reset,
    resets::a_reset_guest_that_keeps_its_identity_never_serves,
    resets::a_vmm_that_dies_between_reset_and_invocation_says_how,
    snapshots::base_and_function_snapshots_thaw,
    snapshots::a_guest_that_keeps_its_old_identity_never_serves,
    snapshots::every_alteration_is_named,
    snapshots::encrypted_snapshots_thaw_and_hold_nothing_in_the_clear,
    snapshots::snapshots_of_other_installations_and_for_other_purposes_are_refused,
    snapshots::other_surroundings_are_named,
    snapshots::a_long_first_event_does_not_keep_the_pool_empty,
    snapshots::a_full_disk_leaves_nothing,
    streams::booted_thawed_warm_and_reset_instances_stream,
    streams::a_taker_that_stops_has_the_functions_time,
    streams::what_is_no_stream_ends_its_guest,
    rootless::an_ordinary_user_can_do_it_too,
];

fn main() -> ExitCode {
    let mut arguments = std::env::args();
    if arguments.next().as_deref() == Some("firn-vmm") {
        stand_in::run();
    }
    // What cargo and people pass to ordinary test executables is accepted and ignored.
    let filters: Vec<String> = arguments.filter(|a| !a.starts_with('-')).collect();
    if filters.first().map(String::as_str) == Some("host-to-be-killed") {
        life::host_to_be_killed(&filters[1]);
    }
    report::listen();
    let (mut passed, mut failed) = (0, Vec::new());
    for (name, test) in TESTS {
        if !filters.is_empty() && !filters.iter().any(|filter| name.contains(filter.as_str())) {
            continue;
        }
        let start = Instant::now();
        let result = report::run(*test);
        let verdict = if result.is_ok() { "ok" } else { "FAILED" };
        println!("test {name} ... {verdict} ({:.2} s)", start.elapsed().as_secs_f64());
        match result {
            Ok(()) => passed += 1,
            Err(said) => failed.push((*name, said)),
        }
    }
    report::end(passed, &failed);
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
