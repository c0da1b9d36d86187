//! A VMM that is gone: whatever is asked next, the answer is how it ended, and not what the asker came
//! across (a control group, a file of `/proc`, a pipe or a socket that is no more).

use std::time::Duration;

use firn::{
    Host, Instance, InstanceError, Invocation, LogLine, Outlets, SnapshotError, SnapshotMeta,
    StartError, VmmExit, control::ExitReason,
};
use tokio::sync::mpsc;

use crate::{
    install::{Install, eventually},
    life::{answer, boot, event, spec},
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

/// Runs `wait` on a clock that stands until the guest prints that it is asleep, and then jumps over all
/// that is given to a renewal.
async fn sleeping<T>(wait: impl Future<Output = T>, mut lines: mpsc::Receiver<LogLine>) -> T {
    // While something blocks, the clock does not go on by itself.
    let (release, blocked) = std::sync::mpsc::channel::<()>();
    let blocking = tokio::task::spawn_blocking(move || blocked.recv());
    tokio::time::pause();
    let jump = async {
        assert_eq!(lines.recv().await.unwrap().line, b"asleep");
        tokio::time::advance(Duration::from_secs(16)).await;
    };
    let (result, ()) = tokio::join!(wait, jump);
    tokio::time::resume();
    drop(release);
    assert!(blocking.await.unwrap().is_err());
    result
}

pub async fn a_guest_that_does_not_renew_itself_is_killed_with_a_diagnosis() {
    // Time that jumps needs a runtime with one thread.
    let test = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(never_renewed());
    };
    tokio::task::spawn_blocking(test).await.unwrap();
}

async fn never_renewed() {
    let install = Install::stand_in();
    let mut config = install.config();
    // None is made beside what is waited for.
    config.shells = 0;
    let host = Host::open(config).await.unwrap();
    let snapshot = resident(&host, &install).await;
    let (log, lines) = mpsc::channel(4);
    let (mut instance, _) = host.thaw(&snapshot, None, log.into()).await.unwrap();
    assert_eq!(answer(&mut instance, b"sleep").await, "sleep");
    instance.reset().await.unwrap();
    let error = sleeping(instance.invoke(&event(b"{}")), lines).await.unwrap_err();
    let expected = "no answer to renew within 15s; it stands at: in the stand-in";
    assert_eq!(error.to_string(), expected);
    eventually("it is killed", || !instance.is_alive()).await;

    let mut booted = boot(&host).await;
    let (mut spec, _lines) = spec(3, "x", None);
    spec.environment.push(("SLEEPS".into(), "1".into()));
    booted.load(&spec, true).await.unwrap();
    let snapshot = booted.snapshot(&install.path("asleep"), SnapshotMeta::default()).await.unwrap();
    let snapshot = snapshot.make_resident(&host, None, None).await.unwrap();
    let (log, lines) = mpsc::channel(4);
    let thaw = host.thaw(&snapshot, None, log.into());
    let error = sleeping(thaw, lines).await.map(drop).unwrap_err();
    assert_eq!(error.to_string(), "no Renewed within 15s; it stands at: in the stand-in");
    host.shutdown().await;
    install.assert_nothing_left();
}
