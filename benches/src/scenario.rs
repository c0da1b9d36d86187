//! What is measured, and from where to where. Another scenario is a variant here and a function
//! below; `docs/benchmarks.md` has the list for readers.

use std::{collections::BTreeMap, time::Duration};

use clap::ValueEnum;
use futures_util::future::try_join_all;

use crate::{
    clock::now_ns,
    error::{Error, Result},
    functions::Function,
    observe::{self, CpuTime},
    record::Sample,
    run::{Options, Output},
    subject::{Counters, Deployed, Origin, Process, Running, Start, Subject, Trip, stamp},
    trace::Tracer,
};

/// A scenario; its text says where its samples start and end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum)]
pub enum Scenario {
    /// Asked for a VMM process → it stands ready for any function
    VmmStart,
    /// Asked to deploy → snapshot ready to thaw (`create`); parts: `create-base`, `snapshot`
    Create,
    /// Request → response from boot, in a process that stands ready
    Boot,
    /// Request → response from boot, VMM process and all
    BootFresh,
    /// Request → response from a snapshot, in a process that stands ready
    Thaw,
    /// Request → response from a snapshot, VMM process and all
    ThawFresh,
    /// Request → response of an instance that has answered before
    Warm,
    /// The same, with its vCPUs stopped in between
    Paused,
    /// Asked to go back to the snapshot → next response; parts: `reset-alone`, `reset-response`
    Reset,
    /// N requests at once → each response (`clones-N`), and the last (`clones-N-all`)
    Clones,
    /// The same without ready processes (`clones-fresh-N`, `clones-fresh-N-all`)
    ClonesFresh,
    /// Memory of clones that have answered once and are paused, and when they have given back what
    /// they can (`density-reclaimed`)
    Density,
    /// First request → last response of several instances that each answer in a loop
    Throughput,
    /// Cold starts one after the other: process, thaw, response, teardown; with CPU time of all
    Churn,
    /// Asked to end → process reaped, control group and files gone
    Teardown,
}

/// Calls before the measured ones of a warm instance: the first few fault pages in.
const SETTLING_CALLS: usize = 1;

/// How long everything is left alone before a start.
const SETTLING: Duration = Duration::from_millis(50);

/// How long frees that the kernel has deferred may take.
const FREEING: Duration = Duration::from_secs(1);

/// What a scenario works with.
pub struct Context<'a> {
    /// Who.
    pub subject: &'a dyn Subject,
    /// Its deployment of the function.
    pub deployed: &'a dyn Deployed,
    /// The function.
    pub function: &'a Function,
    /// Round, counted from 0.
    pub round: u32,
    /// The run's options.
    pub options: &'a Options,
    /// Where samples go.
    pub output: &'a Output,
    /// Kernel tracing, with `--trace`.
    pub tracer: Option<&'a Tracer>,
}

const fn start(origin: Origin, process: Process) -> Start {
    Start { origin, process }
}

/// From a snapshot, as Firn starts.
const THAW: Start = start(Origin::Snapshot, Process::Ready);

/// From a snapshot, everything within the request.
const THAW_FRESH: Start = start(Origin::Snapshot, Process::Fresh);

impl Scenario {
    /// Name in records and on the command line.
    pub fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// Where it starts and ends.
    pub fn about(self) -> String {
        let value = self.to_possible_value();
        value.and_then(|value| Some(value.get_help()?.to_string())).unwrap_or_default()
    }

    /// Whether the function makes a difference.
    pub fn has_function(self) -> bool {
        self != Self::VmmStart
    }

    /// The way to start that it needs.
    fn needs(self) -> Option<Start> {
        match self {
            Self::VmmStart | Self::Create => None,
            Self::Boot => Some(start(Origin::Boot, Process::Ready)),
            Self::BootFresh => Some(start(Origin::Boot, Process::Fresh)),
            Self::ThawFresh | Self::ClonesFresh | Self::Churn => Some(THAW_FRESH),
            _ => Some(THAW),
        }
    }

    /// Whether the subject can do it at all.
    pub fn is_for(self, subject: &dyn Subject) -> bool {
        self.needs().is_none_or(|start| subject.supports(start))
            && subject.measures(self)
            && (self != Self::Reset || subject.resets())
    }

    /// Takes one round's samples.
    ///
    /// # Errors
    /// Whatever keeps a sample from being taken.
    pub async fn run(self, context: &Context<'_>) -> Result<()> {
        match (self, self.needs()) {
            (Self::VmmStart, _) => context.vmm_start().await,
            (Self::Create, _) => context.create().await,
            (Self::Warm | Self::Paused, _) => context.again(self).await,
            (Self::Reset, _) => context.reset().await,
            (Self::Clones, _) => context.all_clones("clones", THAW).await,
            (Self::ClonesFresh, _) => context.all_clones("clones-fresh", THAW_FRESH).await,
            (Self::Density, _) => context.density().await,
            (Self::Throughput, _) => context.throughput().await,
            (Self::Churn, _) => context.churn().await,
            (Self::Teardown, _) => context.teardown().await,
            (_, Some(start)) => context.one_start(self, start).await,
            (_, None) => Err(Error::Usage(format!("scenario {} has no samples", self.name()))),
        }
    }
}

type Instance = Box<dyn Running>;

impl Context<'_> {
    fn sample(&self, scenario: &str, trip: &Trip) -> Sample {
        Sample::new(self.subject.name(), scenario, self.function.name, self.round, trip)
    }

    /// Readies the pool for `count` starts of that kind.
    async fn stock(&self, start: Start, count: usize) -> Result<()> {
        let count = if start.process == Process::Ready { count } else { 0 };
        self.deployed.stock(count).await?;
        // A process says that it is ready a little before all of its threads rest.
        tokio::time::sleep(SETTLING).await;
        Ok(())
    }

    async fn first(&self, start: Start) -> Result<(Trip, Instance)> {
        self.deployed.start(start, self.function.event.as_bytes()).await
    }

    /// An instance by thaw, unmeasured.
    async fn instance(&self) -> Result<Instance> {
        self.stock(THAW, 1).await?;
        Ok(self.first(THAW).await?.1)
    }

    async fn vmm_start(&self) -> Result<()> {
        self.deployed.stock(0).await?;
        let trip = self.subject.spawn(self.function.memory_mb).await?;
        let mut sample = self.sample("vmm-start", &trip);
        sample.function = String::new();
        self.output.sample(&sample)
    }

    async fn create(&self) -> Result<()> {
        let (deployed, trips) = self.subject.deploy(self.function).await?;
        drop(deployed);
        for (name, trip) in trips {
            self.output.sample(&self.sample(name, &trip))?;
        }
        Ok(())
    }

    async fn one_start(&self, scenario: Scenario, start: Start) -> Result<()> {
        self.stock(start, 1).await?;
        if let Some(tracer) = self.tracer {
            tracer.begin()?;
        }
        let (trip, mut instance) = self.first(start).await?;
        let kernel_exits = self.tracer.map(Tracer::end).transpose()?.unwrap_or_default();
        let mut sample = self.sample(&scenario.name(), &trip);
        sample.kernel_exits = kernel_exits;
        observe::process(instance.pid(), instance.memory_bytes(), &mut sample.figures)?;
        let Counters { exits, kvm } = instance.counters().await?;
        (sample.exits, sample.kvm) = (exits, kvm);
        self.output.sample(&sample)?;
        instance.end().await?;
        Ok(())
    }

    /// Warm and paused calls.
    async fn again(&self, scenario: Scenario) -> Result<()> {
        let mut instance = self.instance().await?;
        let event = self.function.event.as_bytes();
        for _ in 0..SETTLING_CALLS {
            instance.invoke(event).await?;
        }
        for _ in 0..self.options.warm {
            if scenario == Scenario::Paused {
                instance.pause().await?;
            }
            let before = (instance.counters().await?, observe::faults_of(instance.pid())?);
            if let Some(tracer) = self.tracer {
                tracer.begin()?;
            }
            let trip = instance.invoke(event).await?;
            let kernel_exits = self.tracer.map(Tracer::end).transpose()?.unwrap_or_default();
            let after = (instance.counters().await?, observe::faults_of(instance.pid())?);
            let mut sample = self.sample(&scenario.name(), &trip);
            sample.kernel_exits = kernel_exits;
            sample.exits = difference(&after.0.exits, &before.0.exits);
            sample.kvm = difference(&after.0.kvm, &before.0.kvm);
            let faults = |now: u64, then: u64| now.saturating_sub(then) as f64;
            sample.figures.insert("minor_faults".into(), faults(after.1.0, before.1.0));
            sample.figures.insert("major_faults".into(), faults(after.1.1, before.1.1));
            self.output.sample(&sample)?;
        }
        instance.end().await?;
        Ok(())
    }

    /// Each reset follows a call, as after a response.
    async fn reset(&self) -> Result<()> {
        let mut instance = self.instance().await?;
        let event = self.function.event.as_bytes();
        for _ in 0..SETTLING_CALLS {
            instance.reset().await?;
            instance.invoke(event).await?;
        }
        for _ in 0..self.options.warm {
            let back = instance.reset().await?;
            let next = instance.invoke(event).await?;
            let mut both = Trip { start_ns: back.start_ns, end_ns: next.end_ns, ..Trip::default() };
            both.stamp(stamp::RESET, Some(back.end_ns));
            both.figures.extend(back.figures.iter().chain(&next.figures));
            self.output.sample(&self.sample("reset-alone", &back))?;
            self.output.sample(&self.sample("reset-response", &next))?;
            self.output.sample(&self.sample("reset", &both))?;
        }
        instance.end().await?;
        Ok(())
    }

    async fn teardown(&self) -> Result<()> {
        let trip = self.instance().await?.end().await?;
        self.output.sample(&self.sample("teardown", &trip))
    }

    async fn all_clones(&self, name: &str, start: Start) -> Result<()> {
        for &count in &self.options.clones {
            self.clones(&format!("{name}-{count}"), start, count).await?;
        }
        Ok(())
    }

    async fn clones(&self, name: &str, start: Start, count: usize) -> Result<()> {
        self.stock(start, count).await?;
        let start_ns = now_ns();
        let started = try_join_all((0..count).map(|_| self.first(start))).await?;
        let mut all = Trip { start_ns, end_ns: start_ns, ..Trip::default() };
        for (trip, _) in &started {
            // All were asked for at once, whenever their turn came.
            let trip = Trip { start_ns, ..trip.clone() };
            all.end_ns = all.end_ns.max(trip.end_ns);
            self.output.sample(&self.sample(name, &trip))?;
        }
        self.output.sample(&self.sample(&format!("{name}-all"), &all))?;
        end_all(started.into_iter().map(|(_, instance)| instance)).await
    }

    async fn density(&self) -> Result<()> {
        let count = self.options.density;
        self.deployed.stock(0).await?;
        let start_ns = now_ns();
        let before = settled_available().await?;
        let mut clones = Vec::with_capacity(count);
        for _ in 0..count {
            let mut clone = self.instance().await?;
            clone.pause().await?;
            clones.push(clone);
        }
        self.weigh("density", start_ns, before, &clones).await?;
        let mut given = false;
        for clone in &mut clones {
            given |= clone.reclaim().await?;
        }
        if given {
            self.weigh("density-reclaimed", start_ns, before, &clones).await?;
        }
        end_all(clones.into_iter()).await
    }

    /// What each of `clones` weighs; the machine had `before` KiB available without them.
    async fn weigh(
        &self,
        name: &str,
        start_ns: u64,
        before: u64,
        clones: &[Instance],
    ) -> Result<()> {
        let count = clones.len() as f64;
        let after = settled_available().await?;
        let trip = Trip { start_ns, end_ns: now_ns(), ..Trip::default() };
        let mut sample = self.sample(name, &trip);
        // How long it took says nothing.
        sample.figures.clear();
        for clone in clones {
            let mut figures = BTreeMap::new();
            observe::process(clone.pid(), clone.memory_bytes(), &mut figures)?;
            for (name, value) in figures {
                *sample.figures.entry(name).or_default() += value / count;
            }
        }
        let each = (before as f64 - after as f64) / count;
        sample.figures.insert("clones".into(), count);
        sample.figures.insert("machine_kib".into(), each);
        if each > 0.0 {
            sample.figures.insert("clones_per_gib".into(), f64::from(1 << 20) / each);
        }
        self.output.sample(&sample)
    }

    async fn throughput(&self) -> Result<()> {
        let Options { concurrency, calls, .. } = *self.options;
        let event = self.function.event.as_bytes();
        let mut instances = Vec::with_capacity(concurrency);
        for _ in 0..concurrency {
            let mut instance = self.instance().await?;
            instance.invoke(event).await?;
            instances.push(instance);
        }
        let cpu = CpuTime::now();
        let start_ns = now_ns();
        try_join_all(instances.iter_mut().map(async |instance| {
            for _ in 0..calls {
                instance.invoke(event).await?;
            }
            Ok::<(), Error>(())
        }))
        .await?;
        let trip = Trip { start_ns, end_ns: now_ns(), ..Trip::default() };
        let done = (concurrency * calls) as f64;
        let mut sample = self.sample("throughput", &trip);
        CpuTime::now().since(cpu, done, &mut sample.figures);
        // VMMs that live are not among the reaped.
        sample.figures.remove("cpu_vmm_us");
        sample.figures.insert("concurrency".into(), concurrency as f64);
        sample.figures.insert("calls_per_s".into(), done * 1e6 / trip.total_us());
        self.output.sample(&sample)?;
        end_all(instances.into_iter()).await
    }

    async fn churn(&self) -> Result<()> {
        let count = self.options.churn;
        self.deployed.stock(0).await?;
        let cpu = CpuTime::now();
        let start_ns = now_ns();
        for _ in 0..count {
            let (_, instance) = self.first(THAW_FRESH).await?;
            instance.end().await?;
        }
        let trip = Trip { start_ns, end_ns: now_ns(), ..Trip::default() };
        let mut sample = self.sample("churn", &trip);
        CpuTime::now().since(cpu, count as f64, &mut sample.figures);
        let cpu = |name| sample.figures.get(name).copied().unwrap_or_default();
        let each = cpu("cpu_host_us") + cpu("cpu_vmm_us");
        sample.figures.insert("cpu_us".into(), each);
        if each > 0.0 {
            sample.figures.insert("starts_per_cpu_s".into(), 1e6 / each);
        }
        sample.figures.insert("starts_per_s".into(), count as f64 * 1e6 / trip.total_us());
        self.output.sample(&sample)
    }
}

async fn end_all(instances: impl Iterator<Item = Instance>) -> Result<()> {
    for instance in instances {
        instance.end().await?;
    }
    Ok(())
}

/// `MemAvailable` once deferred frees have had time to happen.
async fn settled_available() -> Result<u64> {
    tokio::time::sleep(FREEING).await;
    let none = || Error::Usage("density needs MemAvailable in /proc/meminfo".into());
    observe::available_kib().ok_or_else(none)
}

fn difference(
    after: &BTreeMap<String, u64>,
    before: &BTreeMap<String, u64>,
) -> BTreeMap<String, u64> {
    after
        .iter()
        .map(|(name, now)| {
            (name.clone(), now.saturating_sub(before.get(name).copied().unwrap_or_default()))
        })
        .filter(|(_, count)| *count > 0)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_scenario_says_where_it_starts_and_ends() {
        for scenario in Scenario::value_variants() {
            assert!(!scenario.about().is_empty(), "{}", scenario.name());
            let docs = include_str!("../../docs/benchmarks.md");
            assert!(docs.contains(&format!("`{}`", scenario.name())), "{}", scenario.name());
        }
    }

    #[test]
    fn differences_leave_out_what_did_not_change() {
        let map = |entries: &[(&str, u64)]| {
            entries.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
        };
        let found = difference(&map(&[("a", 5), ("b", 2), ("c", 1)]), &map(&[("a", 3), ("b", 2)]));
        assert_eq!(found, map(&[("a", 2), ("c", 1)]));
    }
}
