//! `cargo xtask test`: all tests, and a line at the end that counts them.
//!
//! | stage | what |
//! |---|---|
//! | `style` | rustfmt, clippy with warnings denied |
//! | `unit` | `cargo test` of the workspace, tiny guests against this machine's `/dev/kvm` included |
//! | `linux` | the VMM's test programs in the lane, against tiny guests, Linux and `firn-init`; the hardware gate |
//! | `e2e` | `tests/e2e` with boto3, AWS's CLI and other SDKs against daemons, in the lane |
//! | `intel` | the VMM's test programs and a round of `firn bench` in the host VM with VMX; nightly, or when asked for |
//!
//! The lane's host VMs boot once; end-to-end tests run in all of them at once. A failing test does not keep the
//! others from running.

mod choice;
mod e2e;
pub mod results;
mod rig;
mod rust;
mod summary;
mod table;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Instant;

use anyhow::{Error, Result, anyhow};

use crate::clients::{self, Clients};
use crate::host_vm::Series;
use crate::lane::{self, Choice, Lane, Machine, Site};
use crate::step::Outcome;
use crate::{artifacts, bench, cargo, packages, scratch, step};
use choice::{Only, Stage};
pub use e2e::{end_to_end, sites};
use rig::Rig;
pub use rust::{gate, linux};
use summary::Summary;

/// What tests have in their environment that are to do all their rounds, not a few of them.
pub const NIGHTLY: [(&str, &str); 2] = [(firn_nightly::VARIABLE, "1"), ("PROPTEST_CASES", "4096")];

/// Run all tests.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Run only this: a stage (style, unit, linux, e2e, intel), a file of tests, a test of tests/e2e as pytest names it,
    /// `linux::NAME`, or Rust tests with this in their names.
    #[arg(long, value_name = "WHAT")]
    only: Vec<Only>,

    /// Do all rounds of tests that ordinarily do a few: hundreds of kills, a thousand crashes. What runs in host VMs
    /// runs a second time with the other Linux, and the VMM's tests with KVM on Intel's VMX, too.
    #[arg(long)]
    nightly: bool,

    /// How many host VMs run end-to-end tests at once.
    #[arg(long, value_name = "N")]
    host_vms: Option<usize>,

    #[command(flatten)]
    lane: Choice,

    /// Handed on to pytest, such as `-k timeout`.
    #[arg(last = true)]
    pytest: Vec<String>,
}

impl Arguments {
    fn stages(&self) -> BTreeSet<Stage> {
        if self.only.is_empty() {
            let nightly = self.nightly.then_some(Stage::Intel);
            return [Stage::Style, Stage::Unit, Stage::Linux, Stage::E2e]
                .into_iter()
                .chain(nightly)
                .collect();
        }
        self.only.iter().map(Only::stage).collect()
    }

    /// What is to run of a stage: parts of it, nothing if all of it.
    fn parts<'a, T>(&'a self, stage: Stage, part: impl Fn(&'a Only) -> Option<T>) -> Vec<T> {
        if self.only.contains(&Only::Stage(stage)) {
            return Vec::new();
        }
        self.only.iter().filter_map(part).collect()
    }

    fn environment(&self) -> &'static [(&'static str, &'static str)] {
        if self.nightly { &NIGHTLY } else { &[] }
    }

    fn machine(&self) -> Machine {
        if self.nightly { lane::NIGHTLY_DAEMONS } else { lane::DAEMONS }
    }
}

/// Runs the task; the exit code is 1 if a test failed.
pub fn run(arguments: &Arguments) -> Result<i32> {
    let started = Instant::now();
    let stages = arguments.stages();
    let mut summary = Summary::default();
    let in_lane = stages.contains(&Stage::Linux) || stages.contains(&Stage::E2e);
    let firn = in_lane || stages.contains(&Stage::Intel);
    packages::ensure(&[packages::RUN, if firn { packages::KERNEL } else { &[] }])?;
    if firn {
        packages::ensure(&[packages::IMAGES, packages::CLIENTS])?;
    }
    if stages.contains(&Stage::Style) {
        summary.stage("style", style)?;
    }
    let unit = match stages.contains(&Stage::Unit) {
        true => build_unit(&mut summary, arguments),
        false => Vec::new(),
    };
    // Unit tests wait more than they compute: programs and kernel are built meanwhile, and the VMM's tests with Linux
    // keep one CPU busy. End-to-end tests need both, and look for processes that were left behind.
    thread::scope(|scope| -> Result<()> {
        let unit_tests = scope.spawn(|| run_unit(&unit, arguments));
        let ready = match in_lane {
            true => linux_stage(&mut summary, &stages, arguments, Series::default()),
            false => Ok(None),
        };
        let outcomes = unit_tests.join().map_err(|_| anyhow!("a thread panicked"))??;
        for (part, outcome) in unit.iter().zip(outcomes) {
            summary.time("unit tests", outcome.elapsed);
            if summary.rust("unit tests", &outcome, str::to_owned).all() == 0 {
                summary.none(&part.which.to_string());
            }
        }
        if let Some(lane) = ready? {
            end_to_end_stage(&mut summary, lane, arguments);
        }
        Ok(())
    })?;
    if in_lane
        && arguments.nightly
        && arguments.lane.decide()? == Lane::HostVm
        && let Some(lane) = linux_stage(&mut summary, &stages, arguments, Series::V6_1)?
    {
        end_to_end_stage(&mut summary, lane, arguments);
    }
    if stages.contains(&Stage::Intel) {
        intel_stage(&mut summary);
    }
    Ok(i32::from(!summary.print(started.elapsed())))
}

fn style(summary: &mut Summary) -> Result<()> {
    let never = |_: &str| false;
    for (name, probe, arguments, hint) in [
        ("rustfmt", "fmt", ["fmt", "--all", "--check"].as_slice(), "run `cargo fmt`"),
        (
            "clippy",
            "clippy",
            &["clippy", "--workspace", "--all-targets", "--quiet", "--", "--deny", "warnings"],
            "run `cargo clippy --all-targets`",
        ),
    ] {
        let there = cargo::cargo().args([probe, "--version"]).output()?.status.success();
        if !there {
            step::say(&format!(
                "{name} is not installed; left out (`rustup component add {name}`)"
            ));
            continue;
        }
        let outcome = step::watch(name, cargo::cargo().args(arguments), never, 0)?;
        summary.check(name, &outcome, hint);
    }
    Ok(())
}

/// Unit tests that are built.
struct Unit {
    which: choice::Rust,
    programs: PathBuf,
}

fn build_unit(summary: &mut Summary, arguments: &Arguments) -> Vec<Unit> {
    let mut parts = arguments.parts(Stage::Unit, |only| match only {
        Only::Unit(rust) => Some(rust.clone()),
        _ => None,
    });
    if parts.is_empty() {
        parts.push(choice::Rust::default());
    }
    let what = "building unit tests";
    summary.stage(what, |summary| {
        let build = |which: choice::Rust| {
            let programs = summary.must(what, rust::build_unit(&which))?;
            Some(Unit { which, programs })
        };
        parts.into_iter().filter_map(build).collect()
    })
}

fn run_unit(parts: &[Unit], arguments: &Arguments) -> Result<Vec<Outcome>> {
    let run = |unit: &Unit| rust::unit(&unit.which, &unit.programs, arguments.environment());
    parts.iter().map(run).collect()
}

/// A lane that is ready for end-to-end tests.
struct Ready {
    artifacts: PathBuf,
    clients: Clients,
    lane: Lane,
    kernel: Series,
}

/// Makes the lane and runs the VMM's tests with Linux there, if they are to run. Returns it if end-to-end tests are to
/// follow.
fn linux_stage(
    summary: &mut Summary,
    stages: &BTreeSet<Stage>,
    arguments: &Arguments,
    kernel: Series,
) -> Result<Option<Ready>> {
    let end_to_end = stages.contains(&Stage::E2e);
    let what = "building Firn and clients";
    let built = summary.stage(what, |summary| {
        let lane = arguments.lane.decide()?;
        let build = || {
            let artifacts = artifacts::build()?;
            // All that takes a compiler, now: unit tests run meanwhile.
            let tests = stages.contains(&Stage::Linux).then(rust::build_for_rigs).transpose()?;
            Ok((artifacts, tests, if end_to_end { Some(clients::prepare()?) } else { None }))
        };
        Ok::<_, Error>((lane, summary.must(what, build())))
    })?;
    let (lane, Some((artifacts, tests, clients))) = built else { return Ok(None) };
    if let Some(tests) = tests {
        let site = Site::start(lane, kernel, arguments.machine(), &artifacts);
        let Some(site) = summary.must("booting the host VM", site) else { return Ok(None) };
        let names = arguments.parts(Stage::Linux, |only| match only {
            Only::Linux(name) => Some(name.as_str()),
            _ => None,
        });
        let choice =
            rig::Choice { program: (!names.is_empty()).then_some(rig::LINUX), names: &names };
        let rig = Rig::Site(&site, kernel);
        let what = &format!("the VMM's tests, {rig}");
        let verdicts = summary.stage(what, |summary| {
            let verdicts = tests.run(rig, &artifacts, &choice, arguments.environment());
            summary.must(what, verdicts)
        });
        if let Some(verdicts) = verdicts
            && summary.programs(&rig.to_string(), &verdicts) == 0
        {
            summary.none(&names.join(", "));
        }
    }
    Ok(clients.map(|clients| Ready { artifacts, clients, lane, kernel }))
}

/// Runs what can in the host VM with VMX, and prints the figures of the bench. Ordinary rounds only: it is slow.
fn intel_stage(summary: &mut Summary) {
    for rig in [Rig::Vmx(Series::default()), Rig::VmxScaling(Series::default())] {
        intel_rig(summary, rig);
    }
}

fn intel_rig(summary: &mut Summary, rig: Rig) {
    let what = &format!("the VMM's tests, {rig}");
    summary.stage(what, |summary| {
        let built = artifacts::build().and_then(|all| Ok((all, rust::build_for_rigs()?)));
        let Some((artifacts, tests)) = summary.must(what, built) else { return };
        let choice = rig::Choice { program: None, names: &[] };
        let verdicts = tests.run(rig, &artifacts, &choice, &[]);
        let Some(verdicts) = summary.must(what, verdicts) else { return };
        summary.programs(&rig.to_string(), &verdicts);
        for (name, verdict) in &verdicts {
            if let (&rig::BENCH_NAME, rig::Verdict::Command(outcome)) = (name, verdict)
                && outcome.success
                && let Some(figures) = summary.must("figures", figures(&artifacts, outcome))
            {
                println!("{figures}");
            }
        }
    });
}

/// The short table of what `firn bench run` printed.
fn figures(artifacts: &Path, outcome: &Outcome) -> Result<String> {
    let out = scratch::directory()?.join("figures");
    std::fs::create_dir_all(&out)?;
    let records = outcome.lines.iter().filter(|line| line.starts_with('{'));
    let records: String = records.map(|line| format!("{line}\n")).collect();
    let file = out.join("results.jsonl");
    std::fs::write(&file, records)?;
    bench::report(artifacts, &file, &out)
}

/// A stage's name; with another kernel than the ordinary one its, too.
fn in_kernel(stage: &str, kernel: Series) -> String {
    match kernel == Series::default() {
        true => stage.to_owned(),
        false => format!("{stage}, Linux {kernel}"),
    }
}

fn end_to_end_stage(summary: &mut Summary, lane: Ready, arguments: &Arguments) {
    let mut pytest = arguments.parts(Stage::E2e, |only| match only {
        Only::EndToEnd(name) => Some(name.clone()),
        _ => None,
    });
    pytest.extend_from_slice(&arguments.pytest);
    let what = &in_kernel("end-to-end tests", lane.kernel);
    let result = summary.stage(what, |summary| {
        let Ready { artifacts, clients, lane, kernel } = lane;
        let machine = arguments.machine();
        let start = |_| Site::start(lane, kernel, machine, &artifacts);
        let sites =
            (0..sites(lane, machine, arguments.host_vms)).map(start).collect::<Result<Vec<_>>>();
        let sites = summary.must("booting the host VMs", sites)?;
        let environment = arguments.environment();
        summary.must(what, end_to_end(sites, &artifacts, &clients, &pytest, environment))
    });
    let Some(run) = result else { return };
    if summary.pytest(what, choice::END_TO_END, &run.outcome) == 0 {
        summary.none(&pytest.join(" "));
    }
    for left in run.left_behind {
        if summary.must("the daemon leaves nothing behind", left).is_some() {
            summary.pass();
        }
    }
}
