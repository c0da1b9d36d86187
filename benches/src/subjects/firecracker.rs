//! Firecracker, as its users drive it, with Firn's guest: the same kernel, init, image, code disk
//! and `/tmp`, and the same frames over vsock. `docs/benchmarks.md`, "Peers", says what is fair
//! about that and what is not.
//!
//! Its vsock device resets connections when it restores a snapshot; the guest runs `firn-init
//! --reconnect`, so a restored guest connects to the host anew, and the first frames go there.

mod instance;
mod process;

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    rc::Rc,
    time::Duration,
};

use async_trait::async_trait;
use firn::{
    ShellClass,
    guest::{FromGuest, Ready},
};
use serde_json::{Value, json};

use self::{
    instance::FirecrackerInstance,
    process::{Api, Machine, Place, Process as Monitor, copy_sparse, too_slow},
};
use crate::{
    clock::{self, Anchor, now_ns},
    error::{Error, Result, io_at, io_with},
    frames::{self, Frames},
    functions::{Function, Guest},
    hash,
    subject::{Deployed, Origin, Process, Running, Start, Subject as SubjectTrait, Trip, stamp},
};

/// Name in records.
pub const NAME: &str = "firecracker";

/// Kernel command line: Firn's, with the end through the keyboard controller that both monitors
/// take for one, and with `firn-init`'s word for monitors like this one.
const CMDLINE: &str = "quiet panic=-1 8250.nr_uarts=0 noreplace-smp reboot=k -- --reconnect";

/// Time that any one step may take, before patience.
const LIMIT: Duration = Duration::from_secs(30);

/// Directories that stand ready for fresh processes: as many as are ever started at once. One more
/// would be made on the clock.
const PLACES: usize = 100;

/// Where and how Firecracker runs here.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The program.
    pub binary: PathBuf,
    /// Installation directory of Firn: kernel, init and images come from there.
    pub artifacts: PathBuf,
    /// The init of [`Guest::Echo`].
    pub echo_init: Option<PathBuf>,
    /// Directory for what the run keeps meanwhile.
    pub state: PathBuf,
    /// Runtime whose image is measured.
    pub runtime: String,
    /// Multiplies all time limits.
    pub patience: u32,
}

/// Firecracker.
#[derive(Debug)]
pub struct Firecracker {
    shared: Rc<Shared>,
    deployments: Cell<u32>,
}

#[derive(Debug)]
struct Shared {
    settings: Settings,
    numbers: Cell<u64>,
}

impl Shared {
    fn limit(&self) -> Duration {
        LIMIT * self.settings.patience
    }

    fn number(&self) -> u64 {
        self.numbers.replace(self.numbers.get() + 1)
    }

    fn place(&self, machine: &Machine, tmp: &Path) -> Result<Place> {
        let path = self.settings.state.join(format!("{NAME}-{}", self.number()));
        Place::make(path, machine, tmp)
    }

    /// Waits for a step.
    async fn within<T>(
        &self,
        what: &'static str,
        step: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        tokio::time::timeout(self.limit(), step).await.unwrap_or_else(|_| Err(too_slow(what)))
    }

    async fn api(&self, monitor: &Monitor) -> Result<Api> {
        self.within("start", monitor.api()).await
    }

    async fn frames(&self, monitor: &Monitor) -> Result<Frames> {
        let stream = self.within("wait for the guest", monitor.accept()).await?;
        Ok(Frames::new(NAME, stream, self.limit()))
    }
}

impl Firecracker {
    /// Checks that the program runs.
    ///
    /// # Errors
    /// [`Error::Io`] if it does not.
    pub fn open(settings: Settings) -> Result<Self> {
        version(&settings.binary)?;
        let shared = Rc::new(Shared { settings, numbers: Cell::new(0) });
        Ok(Self { shared, deployments: Cell::new(0) })
    }

    fn machine(&self, function: &Function, directory: &Path) -> Result<Machine> {
        let Settings { artifacts, echo_init, runtime, .. } = &self.shared.settings;
        let init = match function.guest {
            Guest::Runtime => artifacts.join("bin/firn-init"),
            Guest::Echo => echo_init.clone().ok_or_else(Guest::no_echo_init)?,
        };
        let initramfs = directory.join("initramfs");
        let content = fs::read(&init).map_err(io_with(&init))?;
        firn::initramfs::build(&content)
            .and_then(|archive| fs::write(&initramfs, archive))
            .map_err(io_with(&initramfs))?;
        let class = ShellClass::for_memory(function.memory_mb);
        Ok(Machine {
            kernel: artifacts.join("kernel/vmlinux"),
            initramfs,
            cmdline: CMDLINE.to_owned(),
            vcpus: class.vcpus,
            memory_mib: class.memory_mib,
            disks: vec![
                artifacts.join("images").join(runtime).join("rootfs.erofs"),
                function.disk.clone(),
            ],
            tmp: artifacts.join("images/tmp.ext4"),
        })
    }
}

/// What the program calls itself.
fn version(binary: &Path) -> Result<String> {
    let output = Command::new(binary).arg("--version").output().map_err(io_with(binary))?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.lines().next() {
        Some(line) if output.status.success() => Ok(line.to_owned()),
        _ => Err(Error::Usage(format!("{} --version: {}", binary.display(), output.status))),
    }
}

#[async_trait(?Send)]
impl SubjectTrait for Firecracker {
    fn name(&self) -> &'static str {
        NAME
    }

    fn describe(&self) -> Result<Value> {
        let Settings { binary, artifacts, .. } = &self.shared.settings;
        let files = [
            ("firecracker", binary.clone()),
            ("bin/firn-init", artifacts.join("bin/firn-init")),
            ("kernel/vmlinux", artifacts.join("kernel/vmlinux")),
        ];
        let mut hashes = BTreeMap::new();
        for (name, path) in files {
            hashes.insert(name, hash(&path)?);
        }
        Ok(json!({ "version": version(binary)?, "jail": "none", "blake3": hashes }))
    }

    fn supports(&self, _: Start) -> bool {
        true
    }

    async fn spawn(&self, memory_mb: u32) -> Result<Trip> {
        let class = ShellClass::for_memory(memory_mb);
        let settings = &self.shared.settings;
        // All that it could be told before it knows the function is nothing: what it takes at this
        // point is a configuration or a snapshot.
        let machine = Machine {
            kernel: PathBuf::new(),
            initramfs: PathBuf::new(),
            cmdline: String::new(),
            vcpus: class.vcpus,
            memory_mib: class.memory_mib,
            disks: Vec::new(),
            tmp: settings.artifacts.join("images/tmp.ext4"),
        };
        let place = self.shared.place(&machine, &machine.tmp)?;
        let start_ns = now_ns();
        let mut monitor = Monitor::spawn(&settings.binary, place, false)?;
        let spawned = now_ns();
        self.shared.api(&monitor).await?;
        let mut trip = Trip { start_ns, end_ns: now_ns(), ..Trip::default() };
        trip.stamp("spawned", Some(spawned));
        monitor.kill()?;
        Ok(trip)
    }

    async fn deploy(
        &self,
        function: &Function,
    ) -> Result<(Box<dyn Deployed>, Vec<(&'static str, Trip)>)> {
        let shared = self.shared.clone();
        let number = self.deployments.replace(self.deployments.get() + 1);
        let directory = shared.settings.state.join(format!("{NAME}-function-{number}"));
        fs::create_dir_all(&directory).map_err(io_with(&directory))?;
        let machine = self.machine(function, &directory)?;
        let deployed = FirecrackerFunction {
            shared,
            function: function.clone(),
            machine,
            directory,
            ready: RefCell::default(),
            places: RefCell::default(),
        };
        let trips = deployed.create().await?;
        Ok((Box::new(deployed), trips))
    }

    async fn shutdown(&self) {}
}

/// A function and its snapshot. Dropping it removes the snapshot.
#[derive(Debug)]
struct FirecrackerFunction {
    shared: Rc<Shared>,
    function: Function,
    machine: Machine,
    directory: PathBuf,
    /// Processes whose API waits.
    ready: RefCell<Vec<(Monitor, Api)>>,
    /// For fresh processes.
    places: RefCell<Vec<Place>>,
}

impl Drop for FirecrackerFunction {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

impl FirecrackerFunction {
    /// Boots, loads, freezes, saves.
    async fn create(&self) -> Result<Vec<(&'static str, Trip)>> {
        let place = self.shared.place(&self.machine, &self.machine.tmp)?;
        let mut create = Trip { start_ns: now_ns(), ..Trip::default() };
        let mut monitor = Monitor::spawn(&self.shared.settings.binary, place, true)?;
        let mut guest = self.shared.frames(&monitor).await?;
        self.expect_ready(&mut guest).await?;
        let ready = now_ns();
        self.load(&mut guest, true).await?;
        let loaded = now_ns();
        guest.send(&[firn::guest::ToGuest::Freeze]).await?;
        match guest.receive().await? {
            FromGuest::Frozen => {}
            other => return guest.wrong(&other),
        }
        let mut api = self.shared.api(&monitor).await?;
        api.call("PATCH", "/vm", &json!({ "state": "Paused" })).await?;
        let to = json!({
            "snapshot_path": self.directory.join("state"),
            "mem_file_path": self.directory.join("memory"),
        });
        api.call("PUT", "/snapshot/create", &to).await?;
        monitor.kill()?;
        // What the guest wrote there belongs to the snapshot.
        fs::rename(monitor.place().tmp(), self.tmp()).map_err(io_at("keep /tmp"))?;
        create.end_ns = now_ns();
        create.stamp(stamp::READY, Some(ready));
        create.stamp(stamp::LOADED, Some(loaded));
        let save = Trip { start_ns: loaded, end_ns: create.end_ns, ..Trip::default() };
        Ok(vec![("create", create), ("snapshot", save)])
    }

    /// `/tmp` as it was saved.
    fn tmp(&self) -> PathBuf {
        self.directory.join("tmp.ext4")
    }

    async fn expect_ready(&self, guest: &mut Frames) -> Result<Ready> {
        match guest.receive().await? {
            FromGuest::Ready(ready) => Ok(ready),
            other => guest.wrong(&other),
        }
    }

    async fn load(&self, guest: &mut Frames, for_snapshot: bool) -> Result<()> {
        guest.send(&[frames::load(&self.function, for_snapshot, self.shared.limit())]).await?;
        match guest.receive().await? {
            FromGuest::Loaded(loaded) if loaded.error.is_none() => Ok(()),
            other => guest.wrong(&other),
        }
    }

    /// A directory for a fresh process: as booting or restoring wants its /tmp.
    fn fresh_place(&self, origin: Origin) -> Result<Place> {
        match origin {
            Origin::Boot => self.shared.place(&self.machine, &self.machine.tmp),
            Origin::Snapshot => match self.places.borrow_mut().pop() {
                Some(place) => Ok(place),
                None => self.shared.place(&self.machine, &self.tmp()),
            },
        }
    }

    /// A process that stands ready, or a new one. With `boot` a new one boots by itself.
    async fn monitor(
        &self,
        process: Process,
        place: Option<Place>,
        boot: bool,
    ) -> Result<(Monitor, Option<Api>)> {
        match (process, place) {
            (Process::Ready, _) => {
                let none = || Error::Usage(format!("{NAME}: no process stands ready"));
                let (monitor, api) = self.ready.borrow_mut().pop().ok_or_else(none)?;
                Ok((monitor, Some(api)))
            }
            (Process::Fresh, Some(place)) => {
                let monitor = Monitor::spawn(&self.shared.settings.binary, place, boot)?;
                let api = if boot { None } else { Some(self.shared.api(&monitor).await?) };
                Ok((monitor, api))
            }
            (Process::Fresh, None) => Err(Error::Usage(format!("{NAME}: no directory"))),
        }
    }

    async fn thaw(
        &self,
        process: Process,
        place: Option<Place>,
        event: &[u8],
        number: u64,
    ) -> Result<(Trip, FirecrackerInstance)> {
        let mut trip = Trip { start_ns: now_ns(), ..Trip::default() };
        let (monitor, api) = self.monitor(process, place, false).await?;
        let mut api = api.ok_or_else(|| too_slow("start"))?;
        let shell = now_ns();
        let from = json!({
            "snapshot_path": self.directory.join("state"),
            "mem_backend":
                { "backend_type": "File", "backend_path": self.directory.join("memory") },
            "resume_vm": true,
        });
        let id = format!("{number:032x}");
        let request_id = request_id(number);
        let first = [
            frames::renew(id.clone())?,
            frames::invoke(request_id.clone(), event, self.shared.limit()),
        ];
        // The guest may connect before the API has answered.
        let load = async {
            api.call("PUT", "/snapshot/load", &from).await?;
            Ok::<_, Error>(now_ns())
        };
        let exchange = async {
            let mut guest = self.shared.frames(&monitor).await?;
            let connected = now_ns();
            guest.send(&first).await?;
            match guest.receive().await? {
                FromGuest::Renewed(renewed)
                    if renewed.instance_id == id && renewed.error.is_none() => {}
                other => return guest.wrong(&other),
            }
            let renewed = now_ns();
            let done = guest.done(&request_id).await?;
            Ok((guest, done, connected, renewed, now_ns()))
        };
        let load = self.shared.within("load the snapshot", load);
        let (restored, exchange) = tokio::try_join!(load, exchange)?;
        let (guest, done, connected, renewed, end_ns) = exchange;
        trip.end_ns = end_ns;
        trip.stamp(stamp::SHELL, Some(shell));
        trip.stamp("restored", Some(restored));
        trip.stamp("connected", Some(connected));
        trip.stamp(stamp::RENEWED, Some(renewed));
        trip.figures.insert("handler_us", done.duration_us as f64);
        Ok((trip, self.instance(monitor, Some(api), guest)))
    }

    async fn boot(
        &self,
        process: Process,
        place: Option<Place>,
        event: &[u8],
        number: u64,
    ) -> Result<(Trip, FirecrackerInstance)> {
        let first = Anchor::take();
        let mut trip = Trip { start_ns: now_ns(), ..Trip::default() };
        let (monitor, mut api) = self.monitor(process, place, true).await?;
        if let Some(api) = &mut api {
            for (path, part) in self.machine.parts() {
                api.call("PUT", &path, &part).await?;
            }
            let start = json!({ "action_type": "InstanceStart" });
            api.call("PUT", "/actions", &start).await?;
        }
        let started = now_ns();
        let mut guest = self.shared.frames(&monitor).await?;
        let said = self.expect_ready(&mut guest).await?;
        let ready = now_ns();
        let heard = Anchor::take();
        self.load(&mut guest, false).await?;
        let loaded = now_ns();
        let request_id = request_id(number);
        let invoke = frames::invoke(request_id.clone(), event, self.shared.limit());
        guest.send(&[invoke]).await?;
        let done = guest.done(&request_id).await?;
        trip.end_ns = now_ns();
        trip.stamp("started", Some(started));
        // It does not tell the offset of the guest's TSC: `Ready` does, late by its way.
        let init = first.zip(heard).and_then(|anchors| {
            clock::from_guest(anchors, anchors.1.offset_of(said.ready_tsc), said.init_tsc)
        });
        trip.stamp(stamp::INIT, init);
        if let Some(init) = trip.at(stamp::INIT) {
            trip.figures.insert("request_to_init_us", (init - trip.start_ns) as f64 / 1000.0);
        }
        trip.stamp(stamp::READY, Some(ready));
        trip.stamp(stamp::LOADED, Some(loaded));
        trip.figures.insert("handler_us", done.duration_us as f64);
        Ok((trip, self.instance(monitor, api, guest)))
    }

    fn instance(&self, monitor: Monitor, api: Option<Api>, guest: Frames) -> FirecrackerInstance {
        FirecrackerInstance {
            shared: self.shared.clone(),
            monitor,
            api,
            guest,
            paused: false,
            memory_bytes: u64::from(self.machine.memory_mib) << 20,
        }
    }
}

#[async_trait(?Send)]
impl Deployed for FirecrackerFunction {
    async fn stock(&self, count: usize) -> Result<()> {
        self.ready.borrow_mut().clear();
        for _ in 0..count {
            let place = self.shared.place(&self.machine, &self.tmp())?;
            let monitor = Monitor::spawn(&self.shared.settings.binary, place, false)?;
            let api = self.shared.api(&monitor).await?;
            self.ready.borrow_mut().push((monitor, api));
        }
        while self.places.borrow().len() < PLACES {
            let place = self.shared.place(&self.machine, &self.tmp())?;
            self.places.borrow_mut().push(place);
        }
        Ok(())
    }

    async fn start(&self, start: Start, event: &[u8]) -> Result<(Trip, Box<dyn Running>)> {
        let place = match start.process {
            Process::Fresh => Some(self.fresh_place(start.origin)?),
            Process::Ready => {
                // It was made for a restore; a boot wants an empty /tmp.
                if let (Origin::Boot, Some((monitor, _))) =
                    (start.origin, self.ready.borrow().last())
                {
                    copy_sparse(&self.machine.tmp, &monitor.place().tmp())
                        .map_err(io_at("empty /tmp"))?;
                }
                None
            }
        };
        let number = self.shared.number();
        let (trip, instance) = match start.origin {
            Origin::Boot => self.boot(start.process, place, event, number).await?,
            Origin::Snapshot => self.thaw(start.process, place, event, number).await?,
        };
        Ok((trip, Box::new(instance)))
    }
}

fn request_id(number: u64) -> String {
    format!("00000000-0000-4000-8000-{:012x}", number & 0xffff_ffff_ffff)
}
