//! Snapshots through their whole life, and every way in which they are refused.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
};

use firn::{
    Disk, Host, Outlets, Snapshot, SnapshotError, SnapshotMeta, StartError, keys::KeyError,
};

use crate::{
    install::{CLASS, Install, eventually},
    life::{answer, boot, event, spec, text},
};

fn meta(label: &str) -> SnapshotMeta {
    SnapshotMeta { label: label.into(), key: "k".into() }
}

/// A base snapshot of a guest whose page 3 holds `base`.
pub async fn base(host: &Host, dir: &Path) -> Snapshot {
    let mut instance = boot(host).await;
    let (spec, _lines) = spec(3, "base", None);
    instance.load(&spec, true).await.unwrap();
    instance.snapshot(dir, meta("base")).await.unwrap()
}

pub async fn base_and_function_snapshots_thaw() {
    let install = Install::stand_in();
    let host = install.open().await;
    let snapshots = install.path("state/snapshots");
    fs::create_dir_all(&snapshots).unwrap();
    let base_snapshot = base(&host, &snapshots.join("base")).await;
    assert_eq!((base_snapshot.base(), base_snapshot.memory_bytes()), (None, 4096));
    assert_eq!(base_snapshot.class(), CLASS);
    let base = base_snapshot.make_resident(&host, None, None).await.unwrap();

    // A function on top of it, with code, and another page.
    let code_path = install.path("code");
    fs::write(&code_path, [9; 8192]).unwrap();
    let code = Disk::load(&code_path).unwrap();
    let (mut instance, report) = host.thaw(&base, None, Outlets::default()).await.unwrap();
    assert!(report.is_none());
    assert_eq!(answer(&mut instance, b"page").await, "base");
    let (function, _lines) = spec(1, "function", Some(code.clone()));
    instance.load(&function, true).await.unwrap();
    let dir = snapshots.join("function");
    let written = instance.snapshot(&dir, meta("function")).await.unwrap();
    assert_eq!(written.memory_bytes(), 4096, "only what differs");
    assert_eq!(written.base(), Some(base.id()));

    let opened = Snapshot::open(&host, &dir).unwrap();
    assert_eq!((opened.id(), opened.meta()), (written.id(), &meta("function")));
    let resident = opened.make_resident(&host, Some(&base), Some(&code)).await.unwrap();
    assert_eq!(resident.resident_bytes(), 8192);
    // Files may go: what is thawed is in memory.
    fs::remove_dir_all(&dir).unwrap();
    let first = event(b"page");
    let (mut one, report) = host.thaw(&resident, Some(&first), Outlets::default()).await.unwrap();
    let report = report.unwrap();
    assert_eq!(text(&report.outcome), "function");
    assert_eq!(report.renewed.as_ref().unwrap().instance_id, one.id());
    let names: Vec<_> = report.phases.0.iter().map(|p| p.0).collect();
    let expected =
        ["shell", "sent", "received", "mapped", "entered", "first byte", "renewed", "done"];
    assert_eq!(names, expected);
    // Clones don't see each other, and a thawed one can be written down again.
    let (two, _) = host.thaw(&resident, None, Outlets::default()).await.unwrap();
    assert_ne!(one.id(), two.id());
    let (changed, _lines) = spec(0, "again", Some(code.clone()));
    one.load(&changed, true).await.unwrap();
    assert_eq!(answer(&mut one, b"page").await, "again");
    let third = one.snapshot(&snapshots.join("third"), meta("third")).await.unwrap();
    let third = third.make_resident(&host, Some(&resident), Some(&code)).await.unwrap();
    assert_eq!(third.resident_bytes(), 3 * 4096);
    let (_, report) = host.thaw(&third, Some(&first), Outlets::default()).await.unwrap();
    assert_eq!(text(&report.unwrap().outcome), "again");
    drop(two);
    host.shutdown().await;
    install.assert_nothing_left();
    let left: Vec<_> = fs::read_dir(&snapshots).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

pub async fn a_guest_that_keeps_its_old_identity_never_serves() {
    let install = Install::stand_in();
    let host = install.open().await;
    let mut instance = boot(&host).await;
    let (mut spec, _lines) = spec(3, "x", None);
    spec.environment.push(("KEEPS_IDENTITY".into(), "1".into()));
    instance.load(&spec, true).await.unwrap();
    let snapshot = instance.snapshot(&install.path("s"), meta("x")).await.unwrap();
    let resident = snapshot.make_resident(&host, None, None).await.unwrap();
    match host.thaw(&resident, Some(&event(b"{}")), Outlets::default()).await {
        Err(StartError::NotRenewed { found, .. }) => assert_eq!(found, "old"),
        other => panic!("{other:?}"),
    }
    host.shutdown().await;
    install.assert_nothing_left();
}

pub async fn every_alteration_is_named() {
    for encrypted in [false, true] {
        alterations(encrypted).await;
    }
}

/// Alters a byte, whatever it is: most are random.
fn flip<const OFFSET: u64>(file: &File) {
    let mut byte = [0];
    file.read_exact_at(&mut byte, OFFSET).unwrap();
    file.write_all_at(&[!byte[0]], OFFSET).unwrap();
}

async fn alterations(encrypted: bool) {
    let install = Install::stand_in();
    let mut config = install.config();
    config.encrypt_snapshots = encrypted;
    let host = Host::open(config).await.unwrap();
    let dir = install.path("s");
    base(&host, &dir).await;
    assert!(matches!(
        boot(&host).await.snapshot(&dir, meta("again")).await,
        Err(SnapshotError::Exists { .. })
    ));
    // Each file is changed in turn, tried, and put back.
    let attempt = async |name: &str, change: fn(&File)| {
        let path = dir.join(name);
        let saved = fs::read(&path).unwrap();
        change(&File::options().read(true).write(true).open(&path).unwrap());
        let result = match Snapshot::open(&host, &dir) {
            Ok(snapshot) => snapshot.make_resident(&host, None, None).await.map(|_| ()),
            Err(error) => Err(error),
        };
        fs::write(&path, saved).unwrap();
        result
    };
    let truncated = |result, name: &str| match result {
        Err(SnapshotError::Truncated { what, .. }) => assert_eq!(what, name),
        other => panic!("{name}: {other:?}"),
    };
    let half = |file: &File| file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    let forged = attempt("state", flip::<130>).await;
    assert!(matches!(forged, Err(SnapshotError::Forged)), "{forged:?}");
    let key = attempt("state", flip::<60>).await;
    assert!(matches!(key, Err(SnapshotError::Key(KeyError::Altered { .. }))), "{key:?}");
    let altered = |result, name: &str| match (encrypted, result) {
        (false, Err(SnapshotError::Altered { what, .. })) => assert_eq!(what, name),
        (true, Err(SnapshotError::Key(KeyError::Altered { .. }))) => {}
        (_, other) => panic!("{name}: {other:?}"),
    };
    // An encrypted file holds the pages alone.
    let memory: fn(&File) = match encrypted {
        false => flip::<{ 3 * 4096 + 9 }>,
        true => flip::<99>,
    };
    altered(attempt("memory", memory).await, "memory");
    altered(attempt("tmp.delta", flip::<0>).await, "tmp.delta");
    truncated(attempt("state", half).await, "state");
    truncated(attempt("memory", half).await, "memory");
    if !encrypted {
        truncated(attempt("tmp.delta", half).await, "tmp.delta");
    } else {
        altered(attempt("tmp.delta", half).await, "tmp.delta");
    }
    let longer = attempt("memory", |f| f.set_len((128 << 20) + 4096).unwrap()).await;
    assert!(matches!(longer, Err(SnapshotError::Memory { .. })), "{longer:?}");
    let version = attempt("state", |f| f.write_all_at(&[7], 8).unwrap()).await;
    assert!(matches!(version, Err(SnapshotError::Version { found: 7, .. })), "{version:?}");
    let other = attempt("state", |f| f.write_all_at(b"ELF", 0).unwrap()).await;
    assert!(matches!(other, Err(SnapshotError::NotASnapshot { .. })), "{other:?}");
    attempt("state", |_| ()).await.unwrap();
    if !encrypted {
        // Where the snapshot has no page, bytes of the file are not looked at and not thawed.
        attempt("memory", |f| f.write_all_at(b"!", 50 * 4096).unwrap()).await.unwrap();
    }
    host.shutdown().await;
}

pub async fn encrypted_snapshots_thaw_and_hold_nothing_in_the_clear() {
    let install = Install::stand_in();
    let mut config = install.config();
    config.encrypt_snapshots = true;
    let host = Host::open(config).await.unwrap();
    let dir = install.path("s");
    let holds = |needle: &[u8]| {
        ["state", "memory", "tmp.delta"].map(|name| {
            let bytes = fs::read(dir.join(name)).unwrap();
            bytes.windows(needle.len()).any(|window| window == needle)
        })
    };
    let mut instance = boot(&host).await;
    let (spec, _lines) = spec(3, "planted in memory", None);
    instance.load(&spec, true).await.unwrap();
    let snapshot = instance.snapshot(&dir, meta("planted in meta")).await.unwrap();
    assert!(snapshot.is_encrypted());
    assert_eq!((holds(b"planted"), holds(b"test")), ([false; 3], [false; 3]));
    assert!(fs::metadata(dir.join("memory")).unwrap().len() < 8192, "the pages that it has, alone");
    let resident = Snapshot::open(&host, &dir).unwrap().make_resident(&host, None, None).await;
    let (_, report) =
        host.thaw(&resident.unwrap(), Some(&event(b"page")), Outlets::default()).await.unwrap();
    assert_eq!(text(&report.unwrap().outcome), "planted in memory");
    host.shutdown().await;
    install.assert_nothing_left();

    // It says itself that it is encrypted; one that is not is refused where that is asked for.
    let host = install.open().await;
    Snapshot::open(&host, &dir).unwrap().make_resident(&host, None, None).await.unwrap();
    let clear = install.path("clear");
    base(&host, &clear).await;
    host.shutdown().await;
    let mut config = install.config();
    config.encrypt_snapshots = true;
    let host = Host::open(config).await.unwrap();
    let refused = Snapshot::open(&host, &clear);
    assert!(matches!(refused, Err(SnapshotError::NotEncrypted)), "{refused:?}");
    host.shutdown().await;
}

pub async fn snapshots_of_other_installations_and_for_other_purposes_are_refused() {
    let (ours, theirs) = (Install::stand_in(), Install::stand_in());
    let host = theirs.open().await;
    base(&host, &theirs.path("s")).await;
    host.shutdown().await;
    let host = ours.open().await;
    let refused = Snapshot::open(&host, theirs.path("s"));
    assert!(matches!(refused, Err(SnapshotError::Key(KeyError::OtherKey { .. }))), "{refused:?}");
    base(&host, &ours.path("s")).await;
    // A companion of another snapshot, whose own hash is right.
    let dir = ours.path("s");
    let mut instance = boot(&host).await;
    let (spec, _lines) = spec(3, "other", None);
    instance.load(&spec, true).await.unwrap();
    instance.snapshot(&ours.path("other"), meta("other")).await.unwrap();
    fs::copy(ours.path("other/memory"), dir.join("memory")).unwrap();
    let snapshot = Snapshot::open(&host, &dir).unwrap();
    let refused = snapshot.make_resident(&host, None, None).await;
    assert!(matches!(refused, Err(SnapshotError::Altered { what: "memory", .. })), "{refused:?}");
    // A whole other one.
    let refused = Snapshot::open(&host, ours.path("other")).unwrap().expect("another purpose");
    assert!(matches!(refused, Err(SnapshotError::Purpose { .. })), "{refused:?}");
    Snapshot::open(&host, ours.path("other")).unwrap().expect("k").unwrap();
    // Another life finds its key, and without it nothing is its own.
    host.shutdown().await;
    let host = ours.open().await;
    Snapshot::open(&host, ours.path("other")).unwrap();
    host.shutdown().await;
    fs::remove_file(ours.path("state/master.key")).unwrap();
    let host = ours.open().await;
    let refused = Snapshot::open(&host, ours.path("other"));
    assert!(matches!(refused, Err(SnapshotError::Key(KeyError::OtherKey { .. }))), "{refused:?}");
    host.shutdown().await;
}

pub async fn other_surroundings_are_named() {
    let install = Install::stand_in();
    let host = install.open().await;
    let snapshot = base(&host, &install.path("s")).await;
    let resident = snapshot.make_resident(&host, None, None).await.unwrap();
    let code_path = install.path("code");
    fs::write(&code_path, [1; 512]).unwrap();
    let code = Disk::load(&code_path).unwrap();
    let error = snapshot.make_resident(&host, None, Some(&code)).await.unwrap_err();
    assert!(matches!(error, SnapshotError::Code { .. }), "{error}");
    let error = snapshot.make_resident(&host, Some(&resident), None).await.unwrap_err();
    assert!(matches!(error, SnapshotError::Base { .. }), "{error}");
    host.shutdown().await;

    // Another life with another part each; what was written is put back.
    let with = async |name: &str, content: &[u8]| {
        let path = install.artifact(name);
        let saved = fs::read(&path).unwrap();
        fs::write(&path, content).unwrap();
        let host = install.open().await;
        let error = snapshot.make_resident(&host, None, None).await.unwrap_err();
        host.shutdown().await;
        fs::write(&path, saved).unwrap();
        error
    };
    let error = with("kernel/vmlinux", b"stand-in kernel 2").await;
    assert!(matches!(error, SnapshotError::Kernel { .. }), "{error}");
    let error = with("bin/firn-init", b"stand-in init 2").await;
    assert!(matches!(error, SnapshotError::Kernel { .. }), "{error}");
    let error = with("images/test/rootfs.erofs", &[2; 4096]).await;
    assert!(matches!(error, SnapshotError::Image { .. }), "{error}");
    let error = with("images/tmp.ext4", &[2; 4096]).await;
    assert!(matches!(error, SnapshotError::TmpDisk { .. }), "{error}");
}

pub async fn a_full_disk_leaves_nothing() {
    let install = Install::stand_in();
    let small = install.path("small");
    fs::create_dir(&small).unwrap();
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount(c"none", &small, c"tmpfs", flags, c"size=64k").unwrap();
    let host = install.open().await;
    let mut instance = boot(&host).await;
    let (mut spec, _lines) = spec(3, "x", None);
    spec.environment = (0..64).map(|page| (page.to_string(), "x".into())).collect();
    instance.load(&spec, true).await.unwrap();
    let error = instance.snapshot(&small.join("s"), meta("x")).await.unwrap_err();
    let left = fs::read_dir(&small).unwrap().count();
    host.shutdown().await;
    rustix::mount::unmount(&small, rustix::mount::UnmountFlags::DETACH).unwrap();
    assert!(matches!(error, SnapshotError::NoSpace { .. }), "{error}");
    assert_eq!(left, 0);
    install.assert_nothing_left();
}

pub async fn a_long_first_event_does_not_keep_the_pool_empty() {
    let install = Install::stand_in();
    // In a life of its own, since making it would fill the pool beside `prepare`.
    let host = install.open().await;
    base(&host, &install.path("base")).await;
    host.shutdown().await;

    let mut config = install.config();
    config.shells = 1;
    let host = Host::open(config).await.unwrap();
    let snapshot = Snapshot::open(&host, install.path("base")).unwrap();
    let resident = snapshot.make_resident(&host, None, None).await.unwrap();
    host.prepare(CLASS).await.unwrap();
    let running = || fs::read_dir(install.path("state/run/pids")).unwrap().count();
    assert_eq!(running(), 1);
    let thaw = {
        let (host, first) = (host.clone(), event(b"hang"));
        tokio::spawn(async move { host.thaw(&resident, Some(&first), Outlets::default()).await })
    };
    eventually("a shell takes the place of the one that works", || running() == 2).await;
    assert!(!thaw.is_finished());
    thaw.abort();
    host.shutdown().await;
    install.assert_nothing_left();
}
