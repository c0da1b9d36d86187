//! A VMM that is gone: whatever is asked next, the answer is how it ended, and not what the asker came
//! across (a control group, a file of `/proc`, a pipe or a socket that is no more).

use firn::{
    Host, Instance, InstanceError, Invocation, Outlets, SnapshotError, SnapshotMeta, StartError,
    VmmExit, control::ExitReason,
};

use crate::{
    install::{Install, eventually},
    life::{answer, event, spec},
    resets::resident,
};

/// Everything that an instance can be asked, and whether it has been reset before: it then has a pagemap,
/// and needs a new identity if it dies without another event.
const ASKED: [(&str, bool); 11] = [
    ("load", false),
    ("invoke", false),
    ("invoke", true),
    ("pause", false),
    ("reclaim", false),
    ("stats", false),
    ("reset", false),
    ("reset", true),
    ("snapshot", false),
    ("snapshot", true),
    ("long event", false),
];

/// Asks; what can't go on without its instance takes it.
async fn ask(install: &Install, instance: &mut Option<Instance>, what: &str) -> InstanceError {
    if what == "snapshot" {
        let meta = SnapshotMeta::default();
        let instance = instance.take().unwrap();
        return match instance.snapshot(&install.path("never"), meta).await {
            Err(SnapshotError::Instance(error)) => error,
            other => panic!("{other:?}"),
        };
    }
    let instance = instance.as_mut().unwrap();
    let refused = match what {
        "load" => instance.load(&spec(3, "x", None).0, false).await.map(drop),
        "invoke" => instance.invoke(&event(b"{}")).await.map(drop),
        // More than a socket's buffer takes.
        "long event" => {
            let payload = vec![b'x'; firn::guest::MAX_PAYLOAD].into();
            instance.invoke(&Invocation { payload, ..event(b"") }).await.map(drop)
        }
        "pause" => instance.pause().await,
        "reclaim" => instance.reclaim().await.map(drop),
        "stats" => instance.stats().await.map(drop),
        "reset" => instance.reset().await.map(drop),
        other => panic!("{other}"),
    };
    refused.unwrap_err()
}

/// From outside, without a word, or of its own with one.
async fn die(instance: &mut Instance, killed: bool) {
    if killed {
        let pid = rustix::process::Pid::from_raw(instance.pid() as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    } else {
        assert_eq!(answer(instance, b"die later").await, "die later");
    }
}

fn is_right(exit: &VmmExit, killed: bool) -> bool {
    let VmmExit { reason, code, signal, detail } = exit;
    match killed {
        true => {
            (*reason, *code, *signal) == (None, None, Some(9)) && detail == "the stand-in lives"
        }
        false => {
            let expected = (Some(ExitReason::GuestPanic), Some(10), None);
            (*reason, *code, *signal) == expected && detail == "as asked"
        }
    }
}

/// No process, no control group, no record of it.
async fn until_gone(install: &Install, pid: u32) {
    let record = install.path("state/run/pids").join(pid.to_string());
    eventually("nothing is left of the VMM", || !record.exists()).await;
}

async fn deaths(host: &Host, install: &Install, killed: bool, gone: bool) -> Vec<String> {
    let mut wrong = Vec::new();
    let snapshot = resident(host, install).await;
    for (what, reset) in ASKED {
        let (mut instance, _) = host.thaw(&snapshot, None, Outlets::default()).await.unwrap();
        if reset {
            instance.reset().await.unwrap();
        }
        die(&mut instance, killed).await;
        if gone {
            until_gone(install, instance.pid()).await;
        }
        let mut instance = Some(instance);
        match ask(install, &mut instance, what).await {
            InstanceError::Died { exit } if is_right(&exit, killed) => {}
            other => wrong.push(format!("{what} (reset: {reset}): {other}")),
        }
        if let Some(mut instance) = instance {
            match instance.stats().await {
                Err(InstanceError::Died { exit }) if is_right(&exit, killed) => {}
                other => wrong.push(format!("the next after {what}: {other:?}")),
            }
        }
    }
    wrong
}

pub async fn whoever_asks_a_vmm_that_is_gone_learns_how_it_ended() {
    let mut wrong = Vec::new();
    // One that ends of its own may still answer, until it is gone.
    for (killed, gone) in [(true, true), (false, true), (true, false)] {
        let install = Install::stand_in();
        let host = install.open().await;
        for how in deaths(&host, &install, killed, gone).await {
            wrong.push(format!("killed {killed}, gone {gone}: {how}"));
        }
        host.shutdown().await;
        install.assert_nothing_left();
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

pub async fn a_vmm_that_dies_in_a_thaw_says_how() {
    let install = Install::stand_in();
    let host = install.open().await;
    let snapshot = resident(&host, &install).await;
    for _ in 0..10 {
        match host.thaw(&snapshot, Some(&event(b"die")), Outlets::default()).await {
            Err(StartError::Died { exit }) if is_right(&exit, false) => {}
            other => panic!("{other:?}"),
        }
    }
    host.shutdown().await;
    install.assert_nothing_left();
}
