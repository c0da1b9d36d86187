//! Firn itself, through the library that a scheduler embeds.

use std::{
    cell::Cell,
    collections::BTreeMap,
    ops::Range,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

use async_trait::async_trait;
use firn::{
    Disk, FunctionSpec, Host, HostConfig, Image, Instance, Invocation, InvokeReport, LogSink,
    Phases, ResidentSnapshot, ShellClass, SnapshotMeta,
    control::Phase,
    control::Stats,
    guest::{FunctionError, Outcome},
};
use serde_json::{Value, json};
use tokio::sync::{OnceCell, mpsc};

use crate::{
    clock::{self, Anchor, now_ns},
    error::{Error, Result, io_at, of},
    functions::{Function, Guest},
    hash,
    subject::{
        Counters, Deployed, Origin, Process, Running, Start, Subject as SubjectTrait, Trip, stamp,
    },
};

/// Name in records.
pub const NAME: &str = "firn";

/// Time that a function may take for one event, before patience.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Time that initialisation may take, before patience.
const INIT: Duration = Duration::from_secs(30);

/// Clones that have answered before any is measured: the host learns from the first few which pages
/// a clone writes.
const REHEARSALS: usize = 3;

/// Where and how Firn runs here.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Installation directory.
    pub artifacts: PathBuf,
    /// Directory for what the run keeps meanwhile.
    pub state: PathBuf,
    /// Runtime whose image is measured.
    pub runtime: String,
    /// Multiplies all time limits.
    pub patience: u32,
    /// Shells that the pool keeps by itself; 0 where each sample states what stands ready.
    pub shells: usize,
    /// The init of [`Guest::Echo`].
    pub echo_init: Option<PathBuf>,
    /// Thaw as for instances that are reset after each event.
    pub for_resets: bool,
    /// [`HostConfig::dense_pages`], if not the default.
    pub dense_pages: Option<u32>,
}

/// Users of the second host's VMMs; the first has the default range, below these.
const ECHO_UIDS: Range<u32> = 1_900_060_000..1_900_061_000;

/// Firn.
#[derive(Debug)]
pub struct Firn {
    host: Host,
    image: Image,
    settings: Settings,
    log: LogSink,
    deployments: Cell<u32>,
    /// A host whose guests run another init, once one is needed.
    echo: OnceCell<(Host, Image)>,
}

impl Firn {
    /// Opens the host.
    ///
    /// # Errors
    /// [`Error::Subject`] with what the installation or the machine lacks.
    pub async fn open(settings: Settings) -> Result<Self> {
        let config = HostConfig::new(&settings.artifacts, settings.state.join(NAME));
        let (host, image) = open_host(config, &settings).await?;
        let (log, mut lines) = mpsc::channel(64);
        tokio::spawn(async move { while lines.recv().await.is_some() {} });
        let (deployments, echo) = (Cell::new(0), OnceCell::new());
        Ok(Self { host, image, settings, log, deployments, echo })
    }

    /// The host whose guests run what `guest` says.
    async fn home(&self, guest: Guest) -> Result<(Host, Image)> {
        match guest {
            Guest::Runtime => Ok((self.host.clone(), self.image.clone())),
            Guest::Echo => Ok(self.echo.get_or_try_init(|| self.open_echo()).await?.clone()),
        }
    }

    /// A second host: the same installation but for its init.
    async fn open_echo(&self) -> Result<(Host, Image)> {
        let settings = &self.settings;
        let init = settings.echo_init.as_deref().ok_or_else(Guest::no_echo_init)?;
        let artifacts = settings.state.join("echo-artifacts");
        let from = std::path::absolute(&settings.artifacts);
        let link = |from: &Path, name: &str| symlink(from, artifacts.join(name));
        from.and_then(|from| {
            std::fs::create_dir_all(artifacts.join("bin"))?;
            for name in ["bin/firn-vmm", "bin/firn-jailer", "kernel", "images"] {
                link(&from.join(name), name)?;
            }
            link(&std::path::absolute(init)?, "bin/firn-init")
        })
        .map_err(io_at("link artifacts"))?;
        let mut config = HostConfig::new(artifacts, settings.state.join("firn-echo"));
        config.uids = ECHO_UIDS;
        open_host(config, settings).await
    }

    fn invocation(&self, event: &[u8]) -> Invocation {
        Invocation {
            request_id: uuid(now_ns()),
            function_arn: "arn:aws:lambda:us-east-1:000000000000:function:bench".into(),
            timeout: TIMEOUT * self.settings.patience.min(15),
            payload: bytes::Bytes::copy_from_slice(event),
            ..Default::default()
        }
    }

    /// Deploys, and keeps the type.
    ///
    /// # Errors
    /// [`Error::Subject`] with what failed.
    pub async fn deployed(
        &self,
        function: &Function,
    ) -> Result<(FirnFunction, Vec<(&'static str, Trip)>)> {
        let number = self.deployments.replace(self.deployments.get() + 1);
        let dir = self.settings.state.join(format!("{NAME}-function-{number}"));
        std::fs::create_dir_all(&dir).map_err(io_at("make a directory"))?;
        let made = self.deploy_in(function, &dir).await;
        // What is resident does not need its files.
        std::fs::remove_dir_all(&dir).map_err(io_at("remove a directory"))?;
        made
    }

    async fn deploy_in(
        &self,
        function: &Function,
        dir: &Path,
    ) -> Result<(FirnFunction, Vec<(&'static str, Trip)>)> {
        let (host, image) = self.home(function.guest).await?;
        let class = ShellClass::for_memory(function.memory_mb);
        let code = Disk::load(&function.disk).map_err(of(NAME, "open the code disk"))?;
        host.stock(class, 2).await.map_err(of(NAME, "make shells"))?;

        let mut base = Trip { start_ns: now_ns(), ..Trip::default() };
        let booted = host.boot(&image, class).await.map_err(of(NAME, "boot"))?;
        let ready = now_ns();
        let snapshot = booted
            .snapshot(&dir.join("base"), SnapshotMeta::default())
            .await
            .map_err(of(NAME, "snapshot the base"))?;
        let saved = now_ns();
        let resident = snapshot.make_resident(&host, None, None).await;
        let resident = resident.map_err(of(NAME, "make the base resident"))?;
        base.end_ns = now_ns();
        base.stamp(stamp::READY, Some(ready));
        base.stamp(stamp::SAVED, Some(saved));
        base.figures.insert("resident_kib", resident.resident_bytes() as f64 / 1024.0);

        let mut create = Trip { start_ns: now_ns(), ..Trip::default() };
        let log = self.log.clone().into();
        let thawed = host.thaw(&resident, None, log).await;
        let (mut instance, _) = thawed.map_err(of(NAME, "thaw the base"))?;
        let renewed = now_ns();
        let spec = self.spec(function, &code, true);
        let report = instance.load(&spec, true).await.map_err(of(NAME, "load"))?;
        if let Some(error) = &report.error {
            return Err(Error::Function { subject: NAME, answer: words(error) });
        }
        let loaded = now_ns();
        let snapshot = instance
            .snapshot(&dir.join("function"), SnapshotMeta::default())
            .await
            .map_err(of(NAME, "snapshot the function"))?;
        let saved = now_ns();
        let resident = snapshot.make_resident(&host, Some(&resident), Some(&code)).await;
        let resident = resident.map_err(of(NAME, "make the function resident"))?;
        create.end_ns = now_ns();
        create.stamp(stamp::RENEWED, Some(renewed));
        create.stamp(stamp::LOADED, Some(loaded));
        create.stamp(stamp::SAVED, Some(saved));
        create.figures.insert("resident_kib", resident.resident_bytes() as f64 / 1024.0);
        create.figures.insert("differs_from_base_kib", snapshot.memory_bytes() as f64 / 1024.0);
        create.figures.insert("init_us", report.init_us as f64);

        let save = Trip { start_ns: loaded, end_ns: saved, ..Trip::default() };
        let deployed = FirnFunction {
            host,
            image,
            class,
            resident,
            boot: self.spec(function, &code, false),
            invocation: self.invocation(&[]),
        };
        for _ in 0..REHEARSALS {
            let (_, mut clone) = deployed.thaw(function.event.as_bytes()).await?;
            clone.pause().await?;
            Box::new(clone).end().await?;
        }
        let learnt = deployed.resident.working_set();
        create.figures.insert("written_pages", learnt.written as f64);
        create.figures.insert("always_written_pages", learnt.always_written as f64);
        create.figures.insert("touched_pages", learnt.touched as f64);
        create.figures.insert("copied_regions", learnt.copied_regions as f64);
        create.figures.insert("populated_pages", learnt.populated as f64);
        Ok((deployed, vec![("create-base", base), ("create", create), ("snapshot", save)]))
    }

    fn spec(&self, function: &Function, code: &Disk, for_snapshot: bool) -> FunctionSpec {
        let mut environment = function.environment.clone();
        let initialization = if for_snapshot { "snap-start" } else { "on-demand" };
        environment.push(("AWS_LAMBDA_INITIALIZATION_TYPE".into(), initialization.into()));
        FunctionSpec {
            environment,
            memory_mb: function.memory_mb,
            init_timeout: INIT * self.settings.patience,
            code: Some(code.clone()),
            endpoints: Vec::new(),
            outlets: self.log.clone().into(),
        }
    }
}

#[async_trait(?Send)]
impl SubjectTrait for Firn {
    fn name(&self) -> &'static str {
        NAME
    }

    fn describe(&self) -> Result<Value> {
        let artifacts = &self.settings.artifacts;
        let files = ["bin/firn-vmm", "bin/firn-jailer", "bin/firn-init", "kernel/vmlinux"];
        let mut hashes = BTreeMap::new();
        for name in files {
            hashes.insert(name.to_owned(), hash(&artifacts.join(name))?);
        }
        hashes.insert(format!("images/{}", self.settings.runtime), self.image.hash());
        Ok(json!({ "version": env!("CARGO_PKG_VERSION"), "blake3": hashes }))
    }

    fn supports(&self, _: Start) -> bool {
        true
    }

    fn resets(&self) -> bool {
        true
    }

    async fn spawn(&self, memory_mb: u32) -> Result<Trip> {
        let mut trip = Trip { start_ns: now_ns(), ..Trip::default() };
        let class = ShellClass::for_memory(memory_mb);
        let shell = self.host.shell(class).await.map_err(of(NAME, "make a shell"))?;
        trip.end_ns = now_ns();
        trip.stamp("main", shell.stamps().get(Phase::ProcessStart));
        trip.stamp("built", shell.stamps().get(Phase::ShellReady));
        self.host.end_shell(shell).await;
        Ok(trip)
    }

    async fn deploy(
        &self,
        function: &Function,
    ) -> Result<(Box<dyn Deployed>, Vec<(&'static str, Trip)>)> {
        let (function, trips) = self.deployed(function).await?;
        Ok((Box::new(function), trips))
    }

    async fn shutdown(&self) {
        if let Some((echo, _)) = self.echo.get() {
            echo.shutdown().await;
        }
        self.host.shutdown().await;
    }
}

async fn open_host(mut config: HostConfig, settings: &Settings) -> Result<(Host, Image)> {
    std::fs::create_dir_all(&config.state).map_err(io_at("make the state directory"))?;
    config.patience = settings.patience;
    config.shells = settings.shells;
    // What is measured is work, not how long a quota makes it wait.
    config.cpu_limits = false;
    if settings.for_resets {
        config = config.for_resets();
    }
    config.dense_pages = settings.dense_pages.unwrap_or(config.dense_pages);
    let host = Host::open(config).await.map_err(of(NAME, "open"))?;
    let image = host.image(&settings.runtime).map_err(of(NAME, "open the image"))?;
    Ok((host, image))
}

/// A function of Firn's.
#[derive(Debug)]
pub struct FirnFunction {
    host: Host,
    image: Image,
    class: ShellClass,
    resident: ResidentSnapshot,
    boot: FunctionSpec,
    /// What all events have in common.
    invocation: Invocation,
}

impl FirnFunction {
    fn invocation(&self, event: &[u8]) -> Invocation {
        Invocation {
            request_id: uuid(now_ns()),
            payload: bytes::Bytes::copy_from_slice(event),
            ..self.invocation.clone()
        }
    }

    fn instance(&self, instance: Instance, stats: &Stats) -> FirnInstance {
        FirnInstance {
            host: self.host.clone(),
            instance,
            invocation: self.invocation.clone(),
            class: self.class,
            tsc_offset: stats.tsc_offset,
        }
    }

    async fn thaw(&self, event: &[u8]) -> Result<(Trip, FirnInstance)> {
        let invocation = self.invocation(event);
        let outlets = self.boot.outlets.clone();
        let first = Anchor::take();
        let start_ns = now_ns();
        let thawed = self.host.thaw(&self.resident, Some(&invocation), outlets).await;
        let end_ns = now_ns();
        let (mut instance, report) = thawed.map_err(of(NAME, "thaw"))?;
        let report = report.ok_or_else(|| no_answer("the first event"))?;
        check(&report)?;
        let last = Anchor::take();

        let mut trip = Trip { start_ns, end_ns, ..Trip::default() };
        let stats = instance.stats().await.map_err(of(NAME, "stats"))?;
        host_stamps(&mut trip, &report.phases, start_ns, &["done"]);
        vmm_stamps(&mut trip, &stats);
        guest_stamps(&mut trip, first.zip(last), &stats, &report);
        if let Some(renewed) = &report.renewed {
            trip.figures.insert("guest_renew_us", renewed.renew_us as f64);
            trip.figures.insert("guest_hooks_us", renewed.hooks_us as f64);
        }
        trip.figures.insert("handler_us", report.duration_us as f64);
        let (received, entered) = (trip.at(stamp::RECEIVED), trip.at(stamp::ENTERED));
        if let (Some(from), Some(to)) = (received, entered) {
            trip.figures.insert("message_to_entry_us", to.saturating_sub(from) as f64 / 1000.0);
        }
        Ok((trip, self.instance(instance, &stats)))
    }

    async fn boot(&self, event: &[u8]) -> Result<(Trip, FirnInstance)> {
        let invocation = self.invocation(event);
        let first = Anchor::take();
        let start_ns = now_ns();
        let booted = self.host.boot(&self.image, self.class).await;
        let mut instance = booted.map_err(of(NAME, "boot"))?;
        let loaded = instance.load(&self.boot, false).await.map_err(of(NAME, "load"))?;
        let loaded_ns = now_ns();
        let report = instance.invoke(&invocation).await.map_err(of(NAME, "invoke"))?;
        let end_ns = now_ns();
        check(&report)?;
        let last = Anchor::take();

        let mut trip = Trip { start_ns, end_ns, ..Trip::default() };
        let stats = instance.stats().await.map_err(of(NAME, "stats"))?;
        // Of the boot itself; the first byte of the whole trip is the answer's.
        let phases = instance.start_phases().clone();
        host_stamps(&mut trip, &phases, start_ns, &["first byte"]);
        host_stamps(&mut trip, &report.phases, loaded_ns, &["sent", "done"]);
        vmm_stamps(&mut trip, &stats);
        trip.stamp(stamp::LOADED, Some(loaded_ns));
        guest_stamps(&mut trip, first.zip(last), &stats, &report);
        if let Some(ready) = instance.booted() {
            let at = |tsc| clock::from_guest(first.zip(last)?, stats.tsc_offset, tsc);
            trip.stamp(stamp::INIT, at(ready.init_tsc));
            if let Some(init) = trip.at(stamp::INIT) {
                trip.figures.insert("request_to_init_us", (init - start_ns) as f64 / 1000.0);
            }
            // Ticks since kernel entry, where the guest's counter starts.
            let us = ready.init_tsc as f64 * 1000.0 / f64::from(stats.tsc_khz.max(1));
            trip.figures.insert("kernel_entry_to_init_us", us);
        }
        trip.figures.insert("runtime_init_us", loaded.init_us as f64);
        trip.figures.insert("handler_us", report.duration_us as f64);
        Ok((trip, self.instance(instance, &stats)))
    }

    /// Fills the pool with as many shells as it keeps by itself.
    ///
    /// # Errors
    /// [`Error::Subject`] with what failed.
    pub async fn fill(&self) -> Result<()> {
        self.host.prepare(self.class).await.map_err(of(NAME, "make shells"))
    }

    /// Starts an instance, and keeps the type.
    ///
    /// # Errors
    /// [`Error::Subject`] with what failed.
    pub async fn started(&self, origin: Origin, event: &[u8]) -> Result<(Trip, FirnInstance)> {
        match origin {
            Origin::Snapshot => self.thaw(event).await,
            Origin::Boot => self.boot(event).await,
        }
    }
}

#[async_trait(?Send)]
impl Deployed for FirnFunction {
    async fn stock(&self, count: usize) -> Result<()> {
        self.host.stock(self.class, count).await.map_err(of(NAME, "make shells"))
    }

    async fn start(&self, start: Start, event: &[u8]) -> Result<(Trip, Box<dyn Running>)> {
        // Of `process` nothing is left to do: where the pool is empty, a start makes its shell.
        let Start { origin, process: Process::Fresh | Process::Ready } = start;
        let (trip, instance) = self.started(origin, event).await?;
        Ok((trip, Box::new(instance)))
    }
}

/// An instance of Firn's.
#[derive(Debug)]
pub struct FirnInstance {
    host: Host,
    instance: Instance,
    invocation: Invocation,
    class: ShellClass,
    tsc_offset: i64,
}

#[async_trait(?Send)]
impl Running for FirnInstance {
    async fn invoke(&mut self, event: &[u8]) -> Result<Trip> {
        let invocation = Invocation {
            request_id: uuid(now_ns()),
            payload: bytes::Bytes::copy_from_slice(event),
            ..self.invocation.clone()
        };
        let first = Anchor::take();
        let start_ns = now_ns();
        let report = self.instance.invoke(&invocation).await;
        let end_ns = now_ns();
        let report = report.map_err(of(NAME, "invoke"))?;
        check(&report)?;
        let last = Anchor::take();
        let mut trip = Trip { start_ns, end_ns, ..Trip::default() };
        host_stamps(&mut trip, &report.phases, start_ns, &["done"]);
        if let Some(renewed) = &report.renewed {
            // The first after a reset, which gave the guest another TSC.
            let stats = self.instance.stats().await.map_err(of(NAME, "stats"))?;
            self.tsc_offset = stats.tsc_offset;
            trip.stamp(stamp::ENTERED, stats.stamps.get(Phase::Entered));
            trip.stamp(stamp::FIRST_EXIT, stats.stamps.get(Phase::FirstExit));
            trip.figures.insert("guest_renew_us", renewed.renew_us as f64);
            trip.figures.insert("guest_hooks_us", renewed.hooks_us as f64);
        }
        let stats = Stats { tsc_offset: self.tsc_offset, ..Stats::default() };
        guest_stamps(&mut trip, first.zip(last), &stats, &report);
        trip.figures.insert("handler_us", report.duration_us as f64);
        Ok(trip)
    }

    async fn pause(&mut self) -> Result<()> {
        self.instance.pause().await.map_err(of(NAME, "pause"))
    }

    async fn reclaim(&mut self) -> Result<bool> {
        self.instance.reclaim().await.map_err(of(NAME, "reclaim"))?;
        Ok(true)
    }

    async fn reset(&mut self) -> Result<Trip> {
        let start_ns = now_ns();
        let report = self.instance.reset().await;
        let end_ns = now_ns();
        let report = report.map_err(of(NAME, "reset"))?;
        let mut trip = Trip { start_ns, end_ns, ..Trip::default() };
        host_stamps(&mut trip, &report.phases, start_ns, &["done"]);
        trip.figures.insert("put_back_pages", report.pages as f64);
        trip.figures.insert("vmm_reset_us", report.duration.as_nanos() as f64 / 1000.0);
        Ok(trip)
    }

    async fn counters(&mut self) -> Result<Counters> {
        let stats = self.instance.stats().await.map_err(of(NAME, "stats"))?;
        let named = |counters: Vec<(String, u64)>| {
            counters.into_iter().filter(|(_, count)| *count != 0).collect()
        };
        Ok(Counters { exits: named(stats.exits), kvm: named(stats.kvm) })
    }

    fn pid(&self) -> u32 {
        self.instance.pid()
    }

    fn memory_bytes(&self) -> u64 {
        self.class.memory_bytes()
    }

    async fn end(self: Box<Self>) -> Result<Trip> {
        let start_ns = now_ns();
        let phases = self.host.end(self.instance).await;
        let mut trip = Trip { start_ns, end_ns: now_ns(), ..Trip::default() };
        host_stamps(&mut trip, &phases, start_ns, &["gone"]);
        Ok(trip)
    }
}

/// The library's own phases, which count from `since`; those in `without` are left out.
fn host_stamps(trip: &mut Trip, phases: &Phases, since: u64, without: &[&str]) {
    for &(name, at) in &phases.0 {
        if !without.contains(&name) {
            trip.stamp(name, Some(since + at.as_nanos() as u64));
        }
    }
}

/// The VMM's stamps that come too late for its answer to the start.
fn vmm_stamps(trip: &mut Trip, stats: &Stats) {
    let late = [
        (stamp::VCPU_SET, Phase::VcpuSet),
        (stamp::ENTERED, Phase::Entered),
        (stamp::FIRST_EXIT, Phase::FirstExit),
    ];
    for (name, phase) in late {
        if trip.at(name).is_none() {
            trip.stamp(name, stats.stamps.get(phase));
        }
    }
}

fn guest_stamps(
    trip: &mut Trip,
    anchors: Option<(Anchor, Anchor)>,
    stats: &Stats,
    report: &InvokeReport,
) {
    let at = |tsc| clock::from_guest(anchors?, stats.tsc_offset, tsc);
    trip.stamp(stamp::EVENT_READ, at(report.tsc.0));
    trip.stamp(stamp::ANSWERED, at(report.tsc.1));
}

/// What a function said of its failure: it is one of this program's own, and has no secrets.
fn words(error: &FunctionError) -> String {
    match error {
        FunctionError::Reported { payload, .. } => String::from_utf8_lossy(payload).into_owned(),
        other => format!("{other:?}"),
    }
}

fn check(report: &InvokeReport) -> Result<()> {
    match &report.outcome {
        Outcome::Response { .. } | Outcome::Streamed => Ok(()),
        Outcome::Error(error) => Err(Error::Function { subject: NAME, answer: words(error) }),
    }
}

fn no_answer(what: &str) -> Error {
    Error::Function { subject: NAME, answer: format!("none to {what}") }
}

/// A request id; unique within a run.
fn uuid(number: u64) -> String {
    format!("00000000-0000-4000-8000-{:012x}", number & 0xffff_ffff_ffff)
}
