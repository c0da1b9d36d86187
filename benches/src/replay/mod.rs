//! `firn bench replay`: an invocation trace against policies, with real microVMs.
//!
//! Each invocation of the trace arrives when the trace says, and its function sleeps or works for as
//! long as it says. A policy decides what stands ready and what stays. For each invocation there is
//! a sample (scenario `replay`, the policy in place of the function), for each policy one of the
//! whole (`replay-all`).
//!
//! All functions of the trace are clones of one snapshot: what differs between functions beyond
//! their time, memory above all, a trace does not say. So memory shared between clones is shared
//! by all functions here, and less would be in a real fleet.

pub mod generate;
mod policy;
pub mod trace;

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    path::PathBuf,
    rc::Rc,
    time::Duration,
};

use tokio::{
    sync::Notify,
    task::LocalSet,
    time::{Instant, sleep, sleep_until},
};

use self::{policy::Policy, trace::Trace};
use crate::{
    clock::now_ns,
    error::{Error, Result, io_with},
    functions, observe,
    record::{Record, Sample},
    run::{Output, Place},
    subject::{Running, Subject, Trip},
    subjects::firn::{Firn, FirnFunction, FirnInstance},
};

/// What to replay, and how.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The trace: `app,func,end_timestamp,duration` in seconds.
    trace: PathBuf,

    #[command(flatten)]
    place: Place,

    /// A policy, like `keep-warm=600,shells=2,start=thaw,max=50,isolation=instance`; several are
    /// replayed in turn. keep-warm: seconds that an idle instance stays (0: every invocation gets a
    /// new one); shells: VMM processes kept ready; start: thaw or boot; max: instances at once;
    /// isolation: `invocation` resets an instance after each.
    #[arg(long, default_value = "keep-warm=600")]
    policy: Vec<Policy>,

    /// Multiplies all times of trace and policy: 0.1 replays ten times as fast.
    #[arg(long, default_value_t = 1.0)]
    time_scale: f64,

    /// Seconds of the trace to leave out at its beginning.
    #[arg(long, default_value_t = 0.0)]
    skip: f64,

    /// Seconds of the trace to replay; all unless given.
    #[arg(long)]
    window: Option<f64>,

    /// Functions work instead of sleeping.
    #[arg(long)]
    spin: bool,
}

/// Replays.
///
/// # Errors
/// Whatever is wrong with the trace, and anything that keeps an invocation from being answered.
pub async fn run(options: Options) -> Result<()> {
    if !(options.time_scale > 0.0 && options.time_scale <= 1000.0) {
        let scale = options.time_scale;
        return Err(Error::Usage(format!("--time-scale {scale} is not within 0 to 1000")));
    }
    let text = std::fs::read_to_string(&options.trace).map_err(io_with(&options.trace))?;
    let trace = trace::parse(&options.trace.display().to_string(), &text)?;
    let trace = trace.window(options.skip, options.window);
    if trace.rows.is_empty() {
        return Err(Error::Usage("the trace has no invocations in that window".into()));
    }
    let state = &options.place.state;
    std::fs::create_dir_all(state).map_err(io_with(state))?;
    let result = replay_all(&options, &trace).await;
    let removed = std::fs::remove_dir_all(state);
    result?;
    removed.map_err(io_with(state))
}

async fn replay_all(options: &Options, trace: &Trace) -> Result<()> {
    let function = functions::find("sleep")?.build(None, &options.place.state)?;
    let output = Output::default();
    for (index, policy) in options.policy.iter().enumerate() {
        let mut settings = options.place.settings(policy.shells);
        settings.for_resets |= policy.reset;
        let firn = Firn::open(settings).await?;
        if index == 0 {
            let manifest = options.place.manifest(&[&firn], std::slice::from_ref(&function))?;
            output.record(&Record::Manifest(manifest.into()))?;
        }
        let (deployed, _) = firn.deployed(&function).await?;
        deployed.fill().await?;
        let replay = Replay {
            deployed,
            policy: policy.clone(),
            scale: options.time_scale,
            spin: options.spin,
            output: output.clone(),
            idle: RefCell::default(),
            live: Cell::new(0),
            released: Notify::new(),
            totals: RefCell::default(),
            idled: Cell::new(0),
        };
        let result = LocalSet::new().run_until(Rc::new(replay).all(trace)).await;
        firn.shutdown().await;
        result?;
    }
    Ok(())
}

/// One policy at work.
struct Replay {
    deployed: FirnFunction,
    policy: Policy,
    scale: f64,
    spin: bool,
    output: Output,
    /// Paused instances, the longest idle first.
    idle: RefCell<Vec<Idle>>,
    /// Instances that exist or are being made.
    live: Cell<usize>,
    /// An instance has become idle, or is gone.
    released: Notify,
    totals: RefCell<Totals>,
    /// How often an instance has become idle.
    idled: Cell<u64>,
}

struct Idle {
    /// Unique among all times that an instance became idle.
    number: u64,
    function: usize,
    instance: Living,
}

/// An instance, and what it costs.
struct Living {
    instance: FirnInstance,
    since_ns: u64,
    /// Memory that it alone has, in KiB, as measured after its first answer.
    private_kib: f64,
}

#[derive(Default)]
struct Totals {
    invocations: u64,
    cold: u64,
    evicted: u64,
    most_live: usize,
    allocated_gib_s: f64,
    private_gib_s: f64,
}

/// KiB in a GiB.
const GIB: f64 = 1_048_576.0;

impl Replay {
    async fn all(self: Rc<Self>, trace: &Trace) -> Result<()> {
        let begin = Instant::now();
        let start_ns = now_ns();
        let mut tasks = Vec::with_capacity(trace.rows.len());
        for row in &trace.rows {
            sleep_until(begin + self.scaled(row.start)).await;
            let (replay, row) = (self.clone(), *row);
            tasks.push(tokio::task::spawn_local(async move {
                replay.invocation(row.function, row.duration).await
            }));
        }
        for task in tasks {
            task.await.map_err(|e| Error::Io {
                what: "replay an invocation".into(),
                source: std::io::Error::other(e),
            })??;
        }
        let end_ns = now_ns();
        // Memory is counted to the last answer; what policies would keep beyond is not.
        let idle = std::mem::take(&mut *self.idle.borrow_mut());
        for idle in idle {
            self.end(idle.instance).await?;
        }
        while self.live.get() > 0 {
            self.released.notified().await;
        }
        self.whole(&Trip { start_ns, end_ns, ..Trip::default() })
    }

    fn scaled(&self, seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds * self.scale)
    }

    async fn invocation(self: Rc<Self>, function: usize, seconds: f64) -> Result<()> {
        let seconds = seconds * self.scale;
        let event = format!(r#"{{"sleep_s":{seconds:.6},"spin":{}}}"#, self.spin);
        let arrived = now_ns();
        let found = self.instance_for(function).await?;
        let began = now_ns();
        let cold = found.is_none();
        let (trip, mut living) = match found {
            Some(mut living) => (living.instance.invoke(event.as_bytes()).await?, living),
            None => {
                let started = self.deployed.started(self.policy.start, event.as_bytes()).await;
                let (trip, instance) = started.inspect_err(|_| self.gone())?;
                (trip, Living { instance, since_ns: began, private_kib: 0.0 })
            }
        };
        // As its caller sees it: waiting for room is part of it.
        let trip = Trip { start_ns: arrived, ..trip };
        let mut sample = Sample::new("firn", "replay", &self.policy.name(), 0, &trip);
        let mut put = |name: &str, value: f64| sample.figures.insert(name.to_owned(), value);
        put("cold", f64::from(u8::from(cold)));
        put("asked_us", seconds * 1e6);
        put("waited_us", (began - arrived) as f64 / 1000.0);
        put("overhead_us", trip.total_us() - seconds * 1e6);
        self.output.sample(&sample)?;
        {
            let mut totals = self.totals.borrow_mut();
            totals.invocations += 1;
            totals.cold += u64::from(cold);
        }
        if cold {
            living.private_kib = private_kib(&living.instance)?;
        }
        if self.policy.keep_warm == 0.0 {
            return self.end(living).await;
        }
        if self.policy.reset {
            living.instance.reset().await?;
        } else {
            living.instance.pause().await?;
        }
        self.keep(function, living);
        Ok(())
    }

    /// An idle instance of that function; `None`: room for a new one, which counts from now on.
    async fn instance_for(&self, function: usize) -> Result<Option<Living>> {
        loop {
            let evicted = {
                let mut idle = self.idle.borrow_mut();
                // The one that was used last: others get a chance to expire.
                if let Some(at) = idle.iter().rposition(|idle| idle.function == function) {
                    return Ok(Some(idle.remove(at).instance));
                }
                if self.live.get() < self.policy.max {
                    self.live.set(self.live.get() + 1);
                    let mut totals = self.totals.borrow_mut();
                    totals.most_live = totals.most_live.max(self.live.get());
                    return Ok(None);
                }
                (!idle.is_empty()).then(|| idle.remove(0))
            };
            match evicted {
                Some(idle) => {
                    self.totals.borrow_mut().evicted += 1;
                    self.end(idle.instance).await?;
                }
                None => self.released.notified().await,
            }
        }
    }

    fn keep(self: &Rc<Self>, function: usize, instance: Living) {
        let number = self.idled.replace(self.idled.get() + 1);
        self.idle.borrow_mut().push(Idle { number, function, instance });
        self.released.notify_one();
        let replay = self.clone();
        tokio::task::spawn_local(async move {
            sleep(replay.scaled(replay.policy.keep_warm)).await;
            let expired = {
                let mut idle = replay.idle.borrow_mut();
                let at = idle.iter().position(|idle| idle.number == number);
                at.map(|at| idle.remove(at))
            };
            if let Some(expired) = expired {
                // It can only fail to be counted, and `all` would not end before it is.
                let _ = replay.end(expired.instance).await;
            }
        });
    }

    async fn end(&self, living: Living) -> Result<()> {
        let Living { instance, since_ns, private_kib } = living;
        let allocated_kib = instance.memory_bytes() as f64 / 1024.0;
        let ended = Box::new(instance).end().await;
        let seconds = (now_ns() - since_ns) as f64 / 1e9;
        {
            let mut totals = self.totals.borrow_mut();
            totals.allocated_gib_s += allocated_kib / GIB * seconds;
            totals.private_gib_s += private_kib / GIB * seconds;
        }
        self.gone();
        ended.map(drop)
    }

    fn gone(&self) {
        self.live.set(self.live.get() - 1);
        self.released.notify_one();
    }

    fn whole(&self, trip: &Trip) -> Result<()> {
        let totals = self.totals.borrow();
        let mut sample = Sample::new("firn", "replay-all", &self.policy.name(), 0, trip);
        let invocations = totals.invocations as f64;
        sample.figures.extend(BTreeMap::from(
            [
                ("invocations", invocations),
                ("cold_starts", totals.cold as f64),
                ("cold_rate", totals.cold as f64 / invocations),
                ("evicted", totals.evicted as f64),
                ("most_instances", totals.most_live as f64),
                ("allocated_gib_s", totals.allocated_gib_s),
                ("private_gib_s", totals.private_gib_s),
            ]
            .map(|(name, value)| (name.to_owned(), value)),
        ));
        self.output.sample(&sample)
    }
}

/// Pages that are no snapshot's: whoever else maps that, these are this instance's own.
fn private_kib(instance: &FirnInstance) -> Result<f64> {
    let mut figures = BTreeMap::new();
    observe::process(instance.pid(), instance.memory_bytes(), &mut figures)?;
    let figure = |name: &str| figures.get(name).copied().unwrap_or_default();
    Ok(figure("guest_private_pages") * 4.0 + figure("vmm_anonymous_kib"))
}
