//! `cargo xtask test`: all tests, and a line at the end that counts them.
//!
//! | stage | what |
//! |---|---|
//! | `style` | rustfmt, clippy with warnings denied |
//! | `unit` | `cargo test` of the workspace, tiny guests against this machine's `/dev/kvm` included |
//! | `linux` | the VMM against Linux and `firn-init`, in the lane |
//! | `e2e` | `tests/e2e` with boto3, AWS's CLI and other SDKs against daemons, in the lane |
//!
//! The lane's host VMs boot once; end-to-end tests run in all of them at once. A failing test does not keep the
//! others from running.

mod choice;
mod e2e;
pub mod results;
mod rust;
mod summary;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::thread;
use std::time::Instant;

use anyhow::{Error, Result, anyhow};

use crate::clients::{self, Clients};
use crate::host_vm::Series;
use crate::lane::{self, Choice, Lane, Site};
use crate::step::Outcome;
use crate::{artifacts, cargo, packages, step};
use choice::{Only, Stage};
pub use e2e::{end_to_end, sites};
pub use rust::linux;
use summary::Summary;

/// What tests have in their environment that are to do all their rounds, not a few of them.
pub const NIGHTLY: [(&str, &str); 2] = [(firn_nightly::VARIABLE, "1"), ("PROPTEST_CASES", "4096")];

/// Run all tests.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Run only this: a stage (style, unit, linux, e2e), a file of tests, a test of tests/e2e as pytest names it,
    /// `linux::NAME`, or Rust tests with this in their names.
    #[arg(long, value_name = "WHAT")]
    only: Vec<Only>,

    /// Do all rounds of tests that ordinarily do a few: hundreds of kills, a thousand crashes. What runs in host VMs
    /// runs a second time with the other Linux.
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
            return [Stage::Style, Stage::Unit, Stage::Linux, Stage::E2e].into();
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
}

/// Runs the task; the exit code is 1 if a test failed.
pub fn run(arguments: &Arguments) -> Result<i32> {
    let started = Instant::now();
    let stages = arguments.stages();
    let mut summary = Summary::default();
    let in_lane = stages.contains(&Stage::Linux) || stages.contains(&Stage::E2e);
    packages::ensure(&[packages::RUN, if in_lane { packages::KERNEL } else { &[] }])?;
    if in_lane {
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
            if summary.rust("unit tests", "", &outcome) == 0 {
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
            if stages.contains(&Stage::Linux) {
                rust::build_linux()?;
            }
            Ok((artifacts, if end_to_end { Some(clients::prepare()?) } else { None }))
        };
        Ok::<_, Error>((lane, summary.must(what, build())))
    })?;
    let (lane, Some((artifacts, clients))) = built else { return Ok(None) };
    if stages.contains(&Stage::Linux) {
        let site =
            summary.must("booting the host VM", Site::start(lane, kernel, lane::VMMS, &artifacts));
        let Some(site) = site else { return Ok(None) };
        let names = arguments.parts(Stage::Linux, |only| match only {
            Only::Linux(name) => Some(name.as_str()),
            _ => None,
        });
        let what = &in_kernel("the VMM's tests with Linux", kernel);
        let result = summary.stage(what, |summary| {
            summary.must(what, linux(&site, &artifacts, &names, arguments.environment()))
        });
        if let Some(outcome) = result
            && summary.rust(what, choice::LINUX_PREFIX, &outcome) == 0
        {
            summary.none(&names.join(", "));
        }
    }
    Ok(clients.map(|clients| Ready { artifacts, clients, lane, kernel }))
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
        let machine = match arguments.nightly {
            true => lane::NIGHTLY_DAEMONS,
            false => lane::DAEMONS,
        };
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
