//! The VMM against Linux with `firn-init`. Needs a KVM that runs kernels, and names of files:
//! `FIRN_TEST_KERNELS` (ELF and bzImage, separated by colons), `FIRN_TEST_INITRAMFS` (firn-init as
//! `/init`), `FIRN_TEST_ROOTFS` (the Python image), `FIRN_TEST_TMP` and `FIRN_TEST_CODE` (a disk of
//! `tests/guests/busy`). Skipped without them. `FIRN_HELD_VMM` is a `firn-vmm` that reads `FIRN_HOLD`
//! (`firn_vmm::hold`): one with debug assertions.

mod common;

use std::{
    fs::File,
    io::{Read, Write},
    os::{fd::AsFd, unix::net::UnixStream},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use common::{Vmm, from_now, kvm, memfd, sealed};
use firn_proto::{
    control::{self, CpuTemplate, DiskKind, DiskSource, FromVmm, MemoryPlan, ShellConfig, ToVmm},
    guest::{self, FromGuest, FunctionError, GuestTsc, Invoke, Load, Outcome, Renew, ToGuest},
};

/// Longer than any answer takes on a busy machine whose CPUs are emulated.
const PATIENCE: Duration = Duration::from_secs(120);

struct Files {
    kvm: File,
    kernels: Vec<String>,
    initramfs: File,
    rootfs: File,
    tmp: File,
    code: File,
}

fn files() -> Option<Files> {
    let name = |key: &str| match std::env::var(key) {
        Ok(name) => Some(name),
        Err(_) => {
            eprintln!("skipped: {key} is not set");
            None
        }
    };
    let kernels = name("FIRN_TEST_KERNELS")?.split(':').map(str::to_string).collect();
    let open = |path: String| File::open(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    Some(Files {
        kvm: kvm()?,
        kernels,
        initramfs: open(name("FIRN_TEST_INITRAMFS")?),
        rootfs: open(name("FIRN_TEST_ROOTFS")?),
        tmp: open(name("FIRN_TEST_TMP")?),
        code: open(name("FIRN_TEST_CODE")?),
    })
}

fn held_vmm() -> Option<String> {
    let name = std::env::var("FIRN_HELD_VMM").ok();
    if name.is_none() {
        eprintln!("skipped: FIRN_HELD_VMM is not set");
    }
    name
}

fn shell(vcpus: u8) -> ShellConfig {
    ShellConfig {
        version: control::VERSION,
        vcpus,
        memory_mib: 128,
        cpu_template: CpuTemplate::Host,
        disks: vec![DiskKind::ReadOnly, DiskKind::ReadOnly, DiskKind::CopyOnWrite],
        serial: std::env::var_os("FIRN_TEST_SERIAL").is_some(),
        spares: 0,
    }
}

/// A guest that runs, and its host.
struct Guest {
    vmm: Vmm,
    stream: UnixStream,
    /// Nothing has been sent on the stream of a thaw or reset.
    begins: bool,
    /// The memory that it was thawed from.
    base: Option<File>,
}

impl Guest {
    fn boot(files: &Files, kernel: &str, vcpus: u8) -> Self {
        Self::boot_in(files, kernel, Vmm::shell(&files.kvm, &shell(vcpus)))
    }

    fn boot_in(files: &Files, kernel: &str, mut vmm: Vmm) -> Self {
        drain(&mut vmm);
        let (stream, theirs) = UnixStream::pair().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let console = if shell(1).serial { "console=ttyS0" } else { "quiet 8250.nr_uarts=0" };
        let message = ToVmm::Boot {
            cmdline: format!("{console} panic=-1"),
            initramfs: true,
            disks: vec![DiskSource::ReadOnly, DiskSource::Empty, DiskSource::CopyOnWrite],
        };
        let kernel = File::open(kernel).unwrap();
        let delta = memfd(b"");
        let descriptors = [
            kernel.as_fd(),
            files.initramfs.as_fd(),
            theirs.as_fd(),
            files.rootfs.as_fd(),
            files.tmp.as_fd(),
            delta.as_fd(),
        ];
        let answer = vmm.request(&message, &descriptors);
        assert!(matches!(answer, FromVmm::Booted(_)), "{answer:?}");
        Self { vmm, stream, begins: false, base: None }
    }

    fn say(&mut self, message: &ToGuest) {
        let frame = guest::encode(message).unwrap();
        match std::mem::take(&mut self.begins) {
            true => self.stream.write_all(&from_now(&frame)).unwrap(),
            false => self.stream.write_all(&frame).unwrap(),
        }
    }

    fn hear(&mut self) -> FromGuest {
        let mut prefix = [0; 4];
        if let Err(error) = self.stream.read_exact(&mut prefix) {
            panic!("no frame: {error}; stats {:?}", self.vmm.request(&ToVmm::Stats, &[]));
        }
        let mut message = vec![0; guest::frame_length(prefix).unwrap()];
        self.stream.read_exact(&mut message).unwrap();
        guest::decode_from_guest(&message).unwrap()
    }

    /// The next message that is no output.
    fn hear_past_logs(&mut self) -> FromGuest {
        loop {
            match self.hear() {
                FromGuest::Log(log) => eprintln!("{}", String::from_utf8_lossy(&log.line)),
                other => return other,
            }
        }
    }

    /// Freeze, pause, save, and thaw into a new process.
    fn move_on(mut self, files: &Files, vcpus: u8, generation: u32) -> Self {
        self.say(&ToGuest::Freeze);
        assert_eq!(self.hear(), FromGuest::Frozen);
        let renew = renew(generation);
        let mut guest = self.carry_over(files, vcpus, DiskSource::Empty, Some(&renew));
        guest.is_renewed(generation);
        guest
    }

    fn is_renewed(&mut self, generation: u32) {
        let FromGuest::Renewed(renewed) = self.hear() else { panic!("not renewed") };
        assert_eq!(renewed.instance_id, instance(generation));
    }

    /// Stops it; how many interrupts were raised again is for people to see. A CPU that is emulated
    /// may take longer to acknowledge one than a driver that is awake should.
    fn pause(&self) -> u64 {
        let answer = self.vmm.request(&ToVmm::Pause, &[]);
        let FromVmm::Paused(again) = answer else { panic!("{answer:?}") };
        if again > 0 {
            eprintln!("interrupts raised again: {again}");
        }
        again
    }

    /// Pause and save.
    fn save(self) -> Saved {
        self.pause();
        let frozen = memfd(b"");
        let (memory, state, report) =
            self.vmm.save_and_report(self.base.as_ref(), &[frozen.as_fd()]);
        let khz = report.tsc_khz.try_into().unwrap();
        Saved { memory, state, frozen, tsc: GuestTsc { ticks: report.guest_tsc, khz } }
    }

    /// Puts the guest back to where it was thawed; returns once it is there.
    fn reset(&mut self, first: &ToGuest) {
        let pagemap = self.vmm.pagemap();
        let (stream, theirs) = UnixStream::pair().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        (self.stream, self.begins) = (stream, true);
        self.say(first);
        let answer = self.vmm.request(&ToVmm::Reset, &[theirs.as_fd(), pagemap.as_fd()]);
        assert!(matches!(answer, FromVmm::Reset(_)), "{answer:?}");
    }

    /// Pause, save, and thaw into a new process, whatever the guest is doing.
    fn carry_over(
        self,
        files: &Files,
        vcpus: u8,
        code: DiskSource,
        first: Option<&ToGuest>,
    ) -> Self {
        let saved = self.save();
        saved.thaw(files, Vmm::shell(&files.kvm, &shell(vcpus)), code, first)
    }
}

/// A guest in files.
struct Saved {
    memory: File,
    state: File,
    frozen: File,
    /// What the guest's TSC reads when its clocks go on.
    tsc: GuestTsc,
}

impl Saved {
    /// Thaws it into this shell, with `first` in its stream.
    fn thaw(
        &self,
        files: &Files,
        mut vmm: Vmm,
        code: DiskSource,
        first: Option<&ToGuest>,
    ) -> Guest {
        drain(&mut vmm);
        let (stream, theirs) = UnixStream::pair().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let base = Some(self.memory.try_clone().unwrap());
        let mut guest = Guest { vmm, stream, begins: true, base };
        if let Some(first) = first {
            guest.say(first);
        }
        let delta = memfd(b"");
        let message = ToVmm::Thaw {
            disks: vec![DiskSource::ReadOnly, code, DiskSource::CopyOnWriteThawed],
            resume: true,
            plan: MemoryPlan::default(),
        };
        let mut descriptors =
            vec![sealed(&self.memory), self.state.as_fd(), theirs.as_fd(), files.rootfs.as_fd()];
        if code == DiskSource::ReadOnly {
            descriptors.push(files.code.as_fd());
        }
        descriptors.extend([files.tmp.as_fd(), self.frozen.as_fd(), delta.as_fd()]);
        let answer = guest.vmm.request(&message, &descriptors);
        assert!(matches!(answer, FromVmm::Thawed(_)), "{answer:?}");
        guest
    }
}

fn instance(generation: u32) -> String {
    format!("generation-{generation}")
}

fn renew(generation: u32) -> ToGuest {
    ToGuest::Renew(Renew {
        wall_clock_ns: 1_800_000_000_000_000_000,
        tsc: None,
        entropy: vec![generation as u8; guest::ENTROPY_BYTES],
        instance_id: instance(generation),
        hook_timeout_ms: 10_000,
    })
}

/// Passes on what the VMM says, so that it never blocks on a full pipe.
fn drain(vmm: &mut Vmm) {
    if let Some(mut stderr) = vmm.stderr.take() {
        std::thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::stderr()));
    }
}

fn ready(guest: &mut Guest) -> guest::Ready {
    match guest.hear() {
        FromGuest::Ready(ready) => ready,
        other => panic!("{other:?}"),
    }
}

#[test]
fn both_kernel_formats_boot_to_init() {
    let Some(files) = files() else { return };
    for kernel in &files.kernels {
        let started = Instant::now();
        let mut guest = Guest::boot(&files, kernel, 1);
        let ready = ready(&mut guest);
        eprintln!("{kernel}: {:?} {ready:?}", started.elapsed());
        assert_eq!(ready.version, guest::VERSION);
    }
}

#[test]
fn two_and_eight_vcpus_boot() {
    let Some(files) = files() else { return };
    for vcpus in [2, 8] {
        let mut guest = Guest::boot(&files, &files.kernels[0], vcpus);
        ready(&mut guest);
    }
}

#[test]
fn snapshot_thaw_snapshot_thaw() {
    let Some(files) = files() else { return };
    for vcpus in [1, 2] {
        let mut guest = Guest::boot(&files, &files.kernels[0], vcpus);
        ready(&mut guest);
        for generation in 1..=3 {
            guest = guest.move_on(&files, vcpus, generation);
        }
        guest.say(&ToGuest::Shutdown);
        let answer = guest.vmm.receive();
        let FromVmm::Exited(exit) = answer else { panic!("{answer:?}") };
        assert_eq!(exit.reason, control::ExitReason::GuestShutdown);
    }
}

/// Both vCPUs are in the middle of user-space loops when they are stopped, nothing is frozen, and
/// the code disk was attached while the guest ran. Both loops must come out whole.
#[test]
fn two_busy_vcpus_survive_a_snapshot() {
    let Some(files) = files() else { return };
    let mut guest = Guest::boot(&files, &files.kernels[0], 2);
    ready(&mut guest);
    let attach = ToVmm::Attach { slot: 1, source: DiskSource::ReadOnly };
    assert_eq!(guest.vmm.request(&attach, &[files.code.as_fd()]), FromVmm::Done);
    guest.say(&ToGuest::Load(Load {
        environment: vec![("_HANDLER".into(), "lambda_function.lambda_handler".into())],
        memory_bytes: 128 << 20,
        init_timeout_ms: 600_000,
        snapshot: false,
        code: true,
        endpoints: Vec::new(),
    }));
    // The import takes three seconds of the guest's time behind the start of the interpreter; stop
    // it a few times on its way.
    for _ in 0..6 {
        std::thread::sleep(Duration::from_millis(700));
        guest = guest.carry_over(&files, 2, DiskSource::ReadOnly, None);
    }
    let FromGuest::Loaded(loaded) = guest.hear_past_logs() else { panic!("not loaded") };
    assert_eq!(loaded.error, None);
    let answer = invoke(&mut guest);
    eprintln!("{answer}");
    assert!(answer.contains("\"cpus\": 2"), "{answer}");
    // One package of two cores, on any host.
    let topology = r#""physical id": ["0"], "siblings": ["2"], "cpu cores": ["2"]"#;
    assert!(answer.contains(topology), "{answer}");
    assert_eq!(answer.matches("\"backwards\": 0").count(), 2, "{answer}");
    assert_eq!(answer.matches("\"sound\": true").count(), 2, "{answer}");

    guest.say(&ToGuest::Freeze);
    assert_eq!(guest.hear(), FromGuest::Frozen);
    the_wall_clock_is_the_hosts(&files, &guest.save());
}

/// However late the guest runs behind its renewal, it knows what time it is: a function of two vCPUs
/// that says so is thawed and reset.
fn the_wall_clock_is_the_hosts(files: &Files, saved: &Saved) {
    let Some(program) = held_vmm() else { return };
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let renew = || {
        ToGuest::Renew(Renew {
            wall_clock_ns: now(),
            tsc: Some(saved.tsc),
            entropy: vec![7; guest::ENTROPY_BYTES],
            instance_id: instance(0),
            hook_timeout_ms: 10_000,
        })
    };
    let slow = Some(("FIRN_HOLD", "vcpu0=100000"));
    let vmm = Vmm::spawn_in(&files.kvm, &program, slow, || Ok(())).build(&shell(2));
    let mut guest = saved.thaw(files, vmm, DiskSource::ReadOnly, Some(&renew()));
    // By how much the guest's clock is off, at least: an answer takes its time.
    let mut off = Vec::new();
    for _ in 0..firn_nightly::rounds(4, 100) {
        guest.is_renewed(0);
        // The first answer brings in what the function needs.
        for _ in 0..3 {
            let before = now();
            let answer = invoke(&mut guest);
            let after = now();
            let (_, rest) = answer.split_once("\"time_ns\": ").unwrap();
            let said: u64 = rest.split_once(',').unwrap().0.parse().unwrap();
            off.push((before.saturating_sub(said).max(said.saturating_sub(after)), after - before));
        }
        guest.reset(&renew());
    }
    eprintln!("wall clock off by at least, ns, within: {off:?}");
    assert!(off.iter().all(|(off, _)| *off <= 1_000_000), "{off:?}");
    // It was looked at closely enough to see what held it back.
    assert!(off.iter().any(|(_, within)| *within < 50_000_000), "{off:?}");
}

/// Has the function answer.
fn invoke(guest: &mut Guest) -> String {
    guest.say(&ToGuest::Invoke(Invoke {
        request_id: "8476a536-e9f4-11e8-9739-2dfe598c3fcd".into(),
        function_arn: "arn:aws:lambda:us-east-1:000000000000:function:busy".into(),
        trace_id: String::new(),
        client_context: String::new(),
        cognito_identity: String::new(),
        deadline_ms: 1_900_000_000_000,
        timeout_ms: 60_000,
        payload: b"{}".to_vec(),
    }));
    let FromGuest::Done(done) = guest.hear_past_logs() else { panic!("not done") };
    let Outcome::Response { payload, .. } = done.outcome else { panic!("{done:?}") };
    String::from_utf8(payload).unwrap()
}

/// Which of a VMM's threads comes first does not matter to Linux either: each is held back in turn,
/// and nothing that is lost is raised again.
#[test]
fn no_wake_up_of_linux_is_lost() {
    let Some(files) = files() else { return };
    let Some(program) = held_vmm() else { return };
    let races = [
        (1, "again=0"),
        (1, "again=0,vcpu0=3000"),
        (1, "again=0,device=3000"),
        (2, "again=0"),
        (2, "again=0,vcpu0=3000"),
        (2, "again=0,vcpu1=3000"),
        (2, "again=0,device=3000"),
    ];
    // Of thaws, resets and resumes each.
    let rounds = firn_nightly::rounds(100_u32.div_ceil(races.len() as u32), 143);
    let mut saved = None;
    for (vcpus, hold) in races {
        if saved.as_ref().is_none_or(|(of, _)| *of != vcpus) {
            let mut guest = Guest::boot(&files, &files.kernels[0], vcpus);
            ready(&mut guest);
            guest.say(&ToGuest::Freeze);
            assert_eq!(guest.hear(), FromGuest::Frozen);
            saved = Some((vcpus, guest.save()));
        }
        let (_, saved) = saved.as_ref().unwrap();
        let begun = Instant::now();
        for round in 0..rounds {
            let vmm = Vmm::spawn_in(&files.kvm, &program, Some(("FIRN_HOLD", hold)), || Ok(()));
            let vmm = vmm.build(&shell(vcpus));
            let mut guest = saved.thaw(&files, vmm, DiskSource::Empty, Some(&renew(3 * round)));
            guest.is_renewed(3 * round);
            guest.reset(&renew(3 * round + 1));
            guest.is_renewed(3 * round + 1);
            guest.say(&ToGuest::Freeze);
            assert_eq!(guest.hear(), FromGuest::Frozen);
            guest.pause();
            guest.say(&renew(3 * round + 2));
            guest.is_renewed(3 * round + 2);
        }
        let elapsed = begun.elapsed();
        eprintln!("{vcpus} vCPUs, {hold}: {rounds} thaws, resets, resumes each: {elapsed:?}");
    }
}

/// A Linux guest sleeps in HLT, its only interrupt is lost, and it hears of it all the same.
#[test]
fn linux_is_woken_though_its_interrupt_was_lost() {
    let Some(files) = files() else { return };
    let Some(program) = held_vmm() else { return };
    let mut guest = Guest::boot(&files, &files.kernels[0], 1);
    ready(&mut guest);
    guest.say(&ToGuest::Freeze);
    assert_eq!(guest.hear(), FromGuest::Frozen);
    let saved = guest.save();
    let swallow = Some(("FIRN_HOLD", "swallow=1"));
    let vmm = Vmm::spawn_in(&files.kvm, &program, swallow, || Ok(())).build(&shell(1));
    let mut guest = saved.thaw(&files, vmm, DiskSource::Empty, Some(&renew(1)));
    guest.is_renewed(1);
    assert!(guest.pause() > 0);
}

/// Whatever a guest has its disks do, and however slow these are: a pause is answered soon.
#[test]
fn a_slow_disk_does_not_keep_a_pause_waiting() {
    let Some(files) = files() else { return };
    let Some(program) = held_vmm() else { return };
    // 64 KiB in 20 ms: 3 MiB/s.
    let hold = Some(("FIRN_HOLD", "disk=20000"));
    let vmm = Vmm::spawn_in(&files.kvm, &program, hold, || Ok(())).build(&shell(1));
    let mut guest = Guest::boot_in(&files, &files.kernels[0], vmm);
    ready(&mut guest);
    let attach = ToVmm::Attach { slot: 1, source: DiskSource::ReadOnly };
    assert_eq!(guest.vmm.request(&attach, &[files.code.as_fd()]), FromVmm::Done);
    guest.say(&ToGuest::Load(Load {
        environment: vec![("_HANDLER".into(), "lambda_function.lambda_handler".into())],
        memory_bytes: 128 << 20,
        init_timeout_ms: 600_000,
        snapshot: false,
        code: true,
        endpoints: Vec::new(),
    }));
    let mut times: Vec<Duration> = Vec::new();
    for _ in 0..firn_nightly::rounds(40, 400) {
        std::thread::sleep(Duration::from_millis(25));
        let begun = Instant::now();
        guest.pause();
        times.push(begun.elapsed());
        assert_eq!(guest.vmm.request(&ToVmm::Resume, &[]), FromVmm::Done);
    }
    times.sort();
    let at = |percent: usize| times[(times.len() * percent / 100).min(times.len() - 1)];
    eprintln!("pauses: p50 {:?}, p99 {:?}, {} in all", at(50), at(99), times.len());
    // One slice of it, and what a busy machine adds.
    assert!(at(99) < Duration::from_millis(500), "{times:?}");
    let FromGuest::Loaded(loaded) = guest.hear_past_logs() else { panic!("not loaded") };
    assert_eq!(loaded.error, None);
}

/// The first snapshot is taken as soon as init is up, where KVM would still "synchronise" writes to
/// the TSC away. A clone's limit of half a second must then take half a second, by its clock and by
/// ours.
#[test]
fn timers_are_right_after_an_early_snapshot() {
    let Some(files) = files() else { return };
    let mut guest = Guest::boot(&files, &files.kernels[0], 1);
    let early = ready(&mut guest);
    for generation in 1..=2 {
        guest = guest.move_on(&files, 1, generation);
    }
    let attach = ToVmm::Attach { slot: 1, source: DiskSource::ReadOnly };
    assert_eq!(guest.vmm.request(&attach, &[files.code.as_fd()]), FromVmm::Done);
    let FromVmm::Stats(before) = guest.vmm.request(&ToVmm::Stats, &[]) else { panic!("no stats") };
    eprintln!("first snapshot after {} ms", early.ready_tsc / u64::from(before.tsc_khz));
    let started = Instant::now();
    guest.say(&ToGuest::Load(Load {
        environment: vec![("_HANDLER".into(), "lambda_function.lambda_handler".into())],
        memory_bytes: 128 << 20,
        init_timeout_ms: 500,
        snapshot: false,
        code: true,
        endpoints: Vec::new(),
    }));
    let FromGuest::Loaded(loaded) = guest.hear_past_logs() else { panic!("not loaded") };
    let elapsed = started.elapsed();
    assert_eq!(loaded.error, Some(FunctionError::TimedOut { limit_ms: 500 }));
    eprintln!("limit of 500 ms: {} µs by the guest, {elapsed:?} by the host", loaded.init_us);
    assert!((500_000..1_500_000).contains(&loaded.init_us), "{loaded:?}");
    assert!(elapsed >= Duration::from_millis(500), "{elapsed:?}");
    assert!(elapsed < Duration::from_secs(6), "{elapsed:?}");
}
