//! From boot to the end, in all its ways.

use std::{
    fs,
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    time::Duration,
};

use firn::{
    Disk, FunctionSpec, Host, HostConfig, Instance, InstanceError, Invocation, LogLine, OpenError,
    ShellError, StartError, control::ExitReason, guest::Outcome,
};
use tokio::sync::mpsc;

use crate::install::{CLASS, Install, eventually, proc, runs};

pub fn event(payload: &'static [u8]) -> Invocation {
    Invocation {
        request_id: "r-1".into(),
        timeout: Duration::from_secs(3),
        payload: payload.into(),
        ..Invocation::default()
    }
}

/// A function whose page `number` holds `text`, and its output.
pub fn spec(
    number: u64,
    text: &str,
    code: Option<Disk>,
) -> (FunctionSpec, mpsc::Receiver<LogLine>) {
    let (log, lines) = mpsc::channel(4);
    let spec = FunctionSpec {
        environment: vec![(number.to_string(), text.into())],
        memory_mb: 128,
        init_timeout: Duration::from_secs(10),
        code,
        endpoints: Vec::new(),
        outlets: log.into(),
    };
    (spec, lines)
}

pub async fn boot(host: &Host) -> Instance {
    host.boot(&host.image("test").unwrap(), CLASS).await.unwrap()
}

/// What `page` answers.
pub async fn answer(instance: &mut Instance, payload: &'static [u8]) -> String {
    text(&instance.invoke(&event(payload)).await.unwrap().outcome)
}

pub fn text(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Response { payload, .. } => String::from_utf8(payload.clone()).unwrap(),
        other => panic!("{other:?}"),
    }
}

pub async fn boot_load_invoke_pause() {
    let install = Install::stand_in();
    let host = install.open().await;
    assert_eq!(host.images(), ["test"]);
    assert!(host.image("cobol").unwrap_err().to_string().contains("installed: test"));
    let mut instance = boot(&host).await;
    assert_eq!(instance.id().len(), 32);
    let names: Vec<_> = instance.start_phases().0.iter().map(|p| p.0).collect();
    assert_eq!(names, ["shell", "sent", "received", "mapped", "entered", "first byte", "ready"]);

    let code = install.path("code");
    fs::write(&code, [1; 4096]).unwrap();
    let (spec, mut lines) = spec(3, "hello", Some(Disk::load(&code).unwrap()));
    let report = instance.load(&spec, false).await.unwrap();
    assert_eq!((report.init_us, report.error), (7, None));
    assert_eq!(answer(&mut instance, b"page").await, "hello");
    let report = instance.invoke(&event(b"{}")).await.unwrap();
    assert_eq!((report.duration_us, report.max_memory_bytes), (5, 6));
    assert!(report.phases.get("sent") <= report.phases.get("done"));

    instance.pause().await.unwrap();
    instance.stats().await.unwrap();
    let drain = tokio::spawn(async move {
        let mut texts = Vec::new();
        while texts.len() < 100 {
            texts.push(String::from_utf8(lines.recv().await.unwrap().line).unwrap());
        }
        texts
    });
    assert_eq!(answer(&mut instance, b"log 100").await, "log 100");
    let texts = drain.await.unwrap();
    assert_eq!((texts[0].as_str(), texts[99].as_str()), ("line 0", "line 99"));

    let large = vec![b'x'; firn::guest::MAX_PAYLOAD];
    let mut invocation = Invocation { payload: large.clone().into(), ..event(b"") };
    let report = instance.invoke(&invocation).await.unwrap();
    assert!(matches!(report.outcome, Outcome::Response { payload, .. } if payload == large));
    invocation.payload = vec![b'x'; firn::guest::MAX_PAYLOAD + 1].into();
    let error = instance.invoke(&invocation).await.unwrap_err();
    assert!(error.to_string().contains("exceeds the limit of 6291556"), "{error}");
    instance.retire().await;
    host.shutdown().await;
    install.assert_nothing_left();
}

pub async fn nothing_is_left_after_kill_and_shutdown() {
    let install = Install::stand_in();
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
    let before = descriptors();
    let host = install.open().await;
    let one = boot(&host).await;
    let two = boot(&host).await;
    let pids = [one.pid(), two.pid()];
    assert!(pids.iter().all(|pid| runs(*pid)));
    one.retire().await;
    // The second is still held while the host shuts down.
    host.shutdown().await;
    assert!(pids.iter().all(|pid| proc(*pid, "stat").is_empty()), "reaped, not only dead");
    assert!(!two.is_alive());
    install.assert_nothing_left();
    assert!(matches!(host.shell(CLASS).await, Err(ShellError::Closed)));
    assert!(matches!(
        host.boot(&host.image("test").unwrap(), CLASS).await,
        Err(StartError::Shell(ShellError::Closed))
    ));
    drop((two, host));
    eventually("no descriptor is left", || descriptors() == before).await;
}

pub async fn many_at_once() {
    let install = Install::stand_in();
    let mut config = install.config();
    config.shells = 3;
    let host = Host::open(config).await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..24 {
        let host = host.clone();
        tasks.spawn(async move {
            let mut instance = boot(&host).await;
            assert_eq!(answer(&mut instance, b"log 0").await, "log 0");
            // Some are retired, some dropped, some killed by their own hand.
            match number % 3 {
                0 => instance.retire().await,
                1 => drop(instance),
                _ => drop(instance.invoke(&event(b"die")).await.unwrap_err()),
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    host.shutdown().await;
    install.assert_nothing_left();
}

/// What the next test runs as a process of its own.
pub fn host_to_be_killed(dir: &str) -> ! {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let mut config = HostConfig::new(format!("{dir}/artifacts"), format!("{dir}/state"));
        config.allow_no_cgroups = true;
        let host = Host::open(config).await.unwrap();
        let instance = boot(&host).await;
        println!("{}", instance.pid());
        // Held by now: instance, shell and half a snapshot's directory.
        let _shell = host.shell(CLASS).await.unwrap();
        fs::create_dir_all(format!("{dir}/state/snapshots/.firn-tmp-half")).unwrap();
        println!("{}", _shell.pid());
        std::future::pending::<()>().await;
    });
    unreachable!();
}

pub async fn nothing_is_left_of_a_host_that_was_killed() {
    let install = Install::stand_in();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .arg("host-to-be-killed")
        .arg(install.path(""))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut pid = || lines.next().unwrap().unwrap().parse::<u32>().unwrap();
    let pids = [pid(), pid()];
    assert!(pids.iter().all(|pid| runs(*pid)));
    // One that does not even notice that its host is gone.
    let stopped = rustix::process::Pid::from_raw(pids[1] as i32).unwrap();
    rustix::process::kill_process(stopped, rustix::process::Signal::STOP).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    eventually("the VMM sees its control socket close", || !runs(pids[0])).await;
    assert!(runs(pids[1]));
    let host = install.open().await;
    assert!(!runs(pids[1]), "an orphan is killed when the next life opens");
    assert!(!install.path("state/snapshots/.firn-tmp-half").exists());
    boot(&host).await.retire().await;
    host.shutdown().await;
    install.assert_nothing_left();
}

pub async fn a_vmm_that_dies_says_how() {
    let install = Install::stand_in();
    let host = install.open().await;
    let mut instance = boot(&host).await;
    match instance.invoke(&event(b"die")).await {
        Err(InstanceError::Died { exit }) => {
            assert_eq!(exit.reason, Some(ExitReason::GuestPanic));
            assert_eq!((exit.code, exit.detail.as_str()), (Some(10), "as asked"));
        }
        other => panic!("{other:?}"),
    }
    // Killed from outside in the middle of an event.
    let mut instance = boot(&host).await;
    let pid = rustix::process::Pid::from_raw(instance.pid() as i32).unwrap();
    let killer = tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(50)).await;
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    });
    match instance.invoke(&event(b"hang")).await {
        Err(InstanceError::Died { exit }) => {
            assert_eq!((exit.reason, exit.signal), (None, Some(9)));
            assert_eq!(exit.detail, "the stand-in lives");
        }
        other => panic!("{other:?}"),
    }
    killer.await.unwrap();
    assert!(!instance.is_alive());
    assert!(matches!(instance.pause().await, Err(InstanceError::Died { .. })));
    host.shutdown().await;
    install.assert_nothing_left();
}

pub async fn a_guest_that_hangs_is_killed() {
    // Time that jumps needs a runtime with one thread.
    let test = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let install = Install::stand_in();
            let host = install.open().await;
            let mut instance = boot(&host).await;
            let invocation = event(b"hang");
            tokio::time::pause();
            match instance.invoke(&invocation).await {
                Err(InstanceError::Unresponsive { operation: "invoke", after, .. }) => {
                    assert_eq!(after, Duration::from_secs(15), "3 + 2 of grace + 10 to restart");
                }
                other => panic!("{other:?}"),
            }
            tokio::time::resume();
            eventually("it is killed", || !instance.is_alive()).await;
            host.shutdown().await;
            install.assert_nothing_left();
        });
    };
    tokio::task::spawn_blocking(test).await.unwrap();
}

pub async fn the_pool_is_refilled_and_skips_the_dead() {
    let install = Install::stand_in();
    let mut config = install.config();
    config.shells = 2;
    let host = Host::open(config).await.unwrap();
    host.prepare(CLASS).await.unwrap();
    let shell = host.shell(CLASS).await.unwrap();
    let before = shell.pid();
    assert_eq!(shell.class(), CLASS);
    let running = || fs::read_dir(install.path("state/run/pids")).unwrap().count();
    eventually("a shell takes its place", || running() == 3).await;
    drop(shell);
    eventually("the dropped one is gone", || running() == 2).await;
    // The ones that wait now die, and nobody has asked for them yet.
    for entry in fs::read_dir(install.path("state/run/pids")).unwrap() {
        let pid: i32 = entry.unwrap().file_name().to_str().unwrap().parse().unwrap();
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }
    eventually("they are gone", || running() == 0).await;
    let instance = boot(&host).await;
    assert_ne!(instance.pid(), before);
    assert!(instance.is_alive());
    host.shutdown().await;
    install.assert_nothing_left();
}

pub async fn a_dropped_host_takes_its_pool_along() {
    let install = Install::stand_in();
    let mut config = install.config();
    config.shells = 2;
    let host = Host::open(config).await.unwrap();
    host.prepare(CLASS).await.unwrap();
    let running = || fs::read_dir(install.path("state/run/pids")).unwrap().count();
    assert_eq!(running(), 2);
    drop(host);
    eventually("its shells end", || running() == 0).await;
    let mut next = Host::open(install.config()).await;
    for _ in 0..100 {
        // The last of its work holds the state directory for a moment.
        if !matches!(next, Err(OpenError::InUse { .. })) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
        next = Host::open(install.config()).await;
    }
    let host = next.unwrap();
    host.shutdown().await;
    install.assert_nothing_left();
}

pub async fn bad_configurations_are_named() {
    let install = Install::stand_in();
    let open = async |change: fn(&mut HostConfig)| {
        let mut config = install.config();
        change(&mut config);
        Host::open(config).await.unwrap_err()
    };
    let error = open(|c| c.patience = 0).await;
    assert!(matches!(error, OpenError::Config { field: "patience", .. }), "{error}");
    let error = open(|c| c.uids = 0..1000).await;
    assert!(matches!(error, OpenError::Config { field: "uids", .. }), "{error}");
    let error = open(|c| c.artifacts = "/nonexistent".into()).await;
    assert!(matches!(error, OpenError::Artifact { what: "directory", .. }), "{error}");
    let mut config = install.config();
    config.uids = 1_000_000..1_000_001;
    let host = Host::open(config).await.unwrap();
    assert!(matches!(Host::open(install.config()).await, Err(OpenError::InUse { .. })));
    let _only = host.shell(CLASS).await.unwrap();
    // Without root all have the same user.
    if rustix::process::geteuid().is_root() {
        assert!(matches!(host.shell(CLASS).await, Err(ShellError::NoUid { limit: 1 })));
    }
    let impossible = firn::ShellClass { vcpus: 9, memory_mib: 128 };
    assert!(matches!(host.shell(impossible).await, Err(ShellError::Class { vcpus: 9, .. })));
    host.shutdown().await;
    // A kernel that is none is the VMM's to refuse.
    fs::write(install.artifact("kernel/vmlinux"), b"#!/bin/sh").unwrap();
    let host = install.open().await;
    match host.boot(&host.image("test").unwrap(), CLASS).await {
        Err(StartError::Refused { kind, .. }) => {
            assert_eq!(kind, firn::control::FailureKind::BadKernel);
        }
        other => panic!("{other:?}"),
    }
    host.shutdown().await;
}
