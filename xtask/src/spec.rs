//! `cargo xtask spec`: measures every promise of `SPECIFICATION.md`.
//!
//! The file is the list: each table row of four columns whose third starts with `≤`, `≥` or `=` is
//! a promise. Its last column says where the figure comes from; see the file's own head.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::host_vm::Series;
use crate::lane::{self, Choice, Lane, Site};
use crate::test::results::{self, Test};
use crate::{artifacts, bench, cargo, clients, packages, scratch, step, test};

/// Scenarios of `firn bench run` that rows name.
const SCENARIOS: &str = "boot,thaw,warm,density";

/// The same for instances that are reset.
const RESET_SCENARIOS: &str = "warm,reset";

/// Those of rows with Firecracker, and their functions: Python that does nothing, and the smallest
/// guest.
const PEER_SCENARIOS: &str = "thaw,thaw-fresh,churn,clones,clones-fresh";
const PEER_FUNCTIONS: &str = "nothing,echo";

/// The source that is `firn doctor --run`, and its name among what ran in the lane.
const GATE: &str = "gate";

/// Memory of their host VM: clones need room.
const PEER_MEMORY_MIB: u32 = 4096;

/// Measure every promise of SPECIFICATION.md; fails if one is broken.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,

    /// Only these promises.
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,

    /// Rounds of the benches.
    #[arg(long, default_value_t = 5)]
    iterations: u32,

    #[command(flatten)]
    peers: bench::Peers,

    #[command(flatten)]
    lane: Choice,
}

/// A row of the specification.
#[derive(Debug, Clone, PartialEq)]
struct Promise {
    name: String,
    text: String,
    bound: Bound,
    source: Source,
}

#[derive(Debug, Clone, PartialEq)]
struct Bound {
    relation: char,
    value: f64,
    unit: String,
}

#[derive(Debug, Clone, PartialEq)]
enum Source {
    /// A figure of `firn bench run`, or one over another.
    Starts(String),
    /// As that, in a run side by side with Firecracker.
    Peer(String),
    /// As that, in a run side by side with `firnd`.
    Daemon(String),
    /// A figure of `tiny_thaw`, or one over another.
    Native(String),
    /// A figure of `firn bench run --for-resets`, or one over another.
    Resets(String),
    /// A figure of `tiny_reset`, for a number of pages.
    NativeReset(u64, String),
    /// A figure of `filters`: with filters over without.
    NativeFilters(String),
    /// Length of an artifact.
    File(String),
    /// pytest's names of tests.
    EndToEnd(Vec<String>),
    /// A package, and a part of its tests' names.
    Rust(String, String),
    /// A test of the VMM with Linux.
    Linux(String),
    /// `firn doctor --run`.
    Gate,
}

impl Source {
    fn needs_firecracker(&self) -> bool {
        match self {
            Self::Peer(_) => true,
            Self::Native(key) => key.contains("firecracker_"),
            _ => false,
        }
    }
}

impl Promise {
    /// Whether it is kept; `None` where there was nothing to measure it with. A figure that could
    /// not be had for any other reason is a broken promise.
    fn verdict(&self, figure: Option<f64>, has_firecracker: bool) -> Option<bool> {
        match self.source {
            _ if self.source.needs_firecracker() && !has_firecracker => None,
            _ => Some(figure.is_some_and(|figure| self.bound.holds(figure))),
        }
    }
}

impl Bound {
    fn holds(&self, figure: f64) -> bool {
        match self.relation {
            '≤' => figure <= self.value,
            '≥' => figure >= self.value,
            _ => figure == self.value,
        }
    }
}

/// Runs the task.
pub fn run(arguments: &Arguments) -> Result<i32> {
    let text = std::fs::read_to_string(cargo::workspace().join("SPECIFICATION.md"))
        .context("cannot read SPECIFICATION.md")?;
    let mut promises = parse(&text)?;
    for name in &arguments.only {
        ensure!(
            promises.iter().any(|promise| promise.name == *name),
            "SPECIFICATION.md has no promise {name}"
        );
    }
    promises.retain(|p| arguments.only.is_empty() || arguments.only.contains(&p.name));

    packages::ensure(&[packages::KERNEL, packages::IMAGES, packages::CLIENTS, packages::RUN])?;
    let lane = arguments.lane.decide()?;
    let mut rig = Rig {
        lane,
        artifacts: artifacts::build()?,
        iterations: arguments.iterations,
        peers: arguments.peers.clone(),
        starts: None,
        beside_peer: None,
        through_firnd: None,
        resets: None,
        tiny: None,
        tiny_reset: None,
        in_lane: BTreeMap::new(),
    };
    rig.run_in_lane(&promises)?;
    let (mut broken, mut unmeasured) = (0, 0);
    let mut rows = Vec::new();
    for promise in &promises {
        let (figure, rig_name) = match rig.measure(&promise.source) {
            Ok((figure, rig)) => (Some(figure), rig),
            Err(error) => (None, format!("could not be measured: {error:#}")),
        };
        let holds = promise.verdict(figure, rig.peers.firecracker.is_some());
        match holds {
            Some(holds) => broken += i32::from(!holds),
            None => unmeasured += 1,
        }
        if !arguments.json {
            print_row(promise, figure, &rig_name, holds);
        }
        rows.push(json!({
            "name": promise.name, "promise": promise.text,
            "bound": format!("{} {} {}", promise.bound.relation, promise.bound.value, promise.bound.unit),
            "figure": figure, "unit": promise.bound.unit, "rig": rig_name, "holds": holds,
        }));
    }
    if arguments.json {
        println!("{:#}", Value::Array(rows));
    } else {
        let measured = promises.len() as i32 - unmeasured;
        println!("{} of {measured} promises hold", measured - broken);
        if unmeasured > 0 {
            println!("{unmeasured} more were not measured: they need --firecracker PROGRAM");
        }
    }
    Ok(i32::from(broken > 0))
}

fn print_row(promise: &Promise, figure: Option<f64>, rig: &str, holds: Option<bool>) {
    let Bound { relation, value, unit } = &promise.bound;
    let shown = figure.map_or("-".to_owned(), number);
    let verdict = match holds {
        Some(true) => "pass",
        Some(false) => "FAIL",
        None => "none",
    };
    println!(
        "{verdict}  {:<20} {shown:>10} {relation} {} {unit}   [{rig}]",
        promise.name,
        number(*value)
    );
    println!("      {}", promise.text);
}

fn number(value: f64) -> String {
    if value.fract() == 0.0 || value >= 1000.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.1}")
    }
}

/// What has been measured already: each bench runs once, however many rows it feeds.
struct Rig {
    lane: Lane,
    artifacts: PathBuf,
    iterations: u32,
    peers: bench::Peers,
    starts: Option<Starts>,
    beside_peer: Option<Starts>,
    through_firnd: Option<Starts>,
    resets: Option<Starts>,
    tiny: Option<Value>,
    tiny_reset: Option<Vec<Value>>,
    /// Tests that ran in the lane, and whether they passed.
    in_lane: BTreeMap<String, bool>,
}

impl Rig {
    fn measure(&mut self, source: &Source) -> Result<(f64, String)> {
        match source {
            Source::Starts(key) => {
                if self.starts.is_none() {
                    let none = bench::Peers { firecracker: None, ..self.peers.clone() };
                    let memory_mib = bench::MEMORY_MIB;
                    let starts = self.measure_starts(&none, memory_mib, &["--scenario", SCENARIOS]);
                    self.starts = Some(starts?);
                }
                let starts = self.starts.as_ref().context("no figures")?;
                Ok((starts.figure(key)?, starts.rig.clone()))
            }
            Source::Peer(key) => {
                ensure!(self.peers.firecracker.is_some(), "it needs --firecracker PROGRAM");
                if self.beside_peer.is_none() {
                    let scenarios = ["--scenario", PEER_SCENARIOS, "--function", PEER_FUNCTIONS];
                    let clones = ["--clones", "10"];
                    let arguments = [&scenarios[..], &clones].concat();
                    let starts = self.measure_starts(&self.peers, PEER_MEMORY_MIB, &arguments);
                    self.beside_peer = Some(starts?);
                }
                let starts = self.beside_peer.as_ref().context("no figures")?;
                Ok((starts.figure(key)?, starts.rig.clone()))
            }
            Source::Daemon(key) => {
                if self.through_firnd.is_none() {
                    let none = bench::Peers { firecracker: None, ..self.peers.clone() };
                    let arguments = ["--firnd", "--scenario", "paused", "--warm", "10"];
                    let starts = self.measure_starts(&none, bench::MEMORY_MIB, &arguments);
                    self.through_firnd = Some(starts?);
                }
                let starts = self.through_firnd.as_ref().context("no figures")?;
                Ok((starts.figure(key)?, starts.rig.clone()))
            }
            Source::Native(key) => {
                if self.tiny.is_none() {
                    self.tiny = Some(bench::tiny_thaw(self.peers.firecracker.as_deref())?);
                }
                let tiny = self.tiny.as_ref().context("no figures")?;
                let median =
                    |key: &str| tiny[key]["p50"].as_f64().with_context(|| format!("no {key}"));
                let figure = match key.split_once('/') {
                    Some((over, under)) => median(over)? / median(under)?,
                    None => median(key)?,
                };
                Ok((figure, "this machine's /dev/kvm".into()))
            }
            Source::Resets(key) => {
                if self.resets.is_none() {
                    let none = bench::Peers { firecracker: None, ..self.peers.clone() };
                    let arguments = ["--for-resets", "--scenario", RESET_SCENARIOS];
                    let starts = self.measure_starts(&none, bench::MEMORY_MIB, &arguments);
                    self.resets = Some(starts?);
                }
                let starts = self.resets.as_ref().context("no figures")?;
                Ok((starts.figure(key)?, starts.rig.clone()))
            }
            Source::NativeFilters(key) => {
                let records = bench::filters()?;
                let median = |vmm: &str| {
                    let record = records.iter().find(|record| record["vmm"] == vmm);
                    let figure = record.and_then(|record| record[key]["p50"].as_f64());
                    figure.with_context(|| format!("no {key} of a VMM that is {vmm}"))
                };
                Ok((median("filtered")? / median("unfiltered")?, "this machine's /dev/kvm".into()))
            }
            Source::NativeReset(pages, key) => {
                if self.tiny_reset.is_none() {
                    self.tiny_reset = Some(bench::tiny_reset()?);
                }
                let mut records = self.tiny_reset.iter().flatten();
                let record = records.find(|record| record["pages"] == *pages);
                let figure = record.and_then(|record| record[key]["p50"].as_f64());
                let figure = figure.with_context(|| format!("no {key} for {pages} pages"))?;
                Ok((figure, "this machine's /dev/kvm".into()))
            }
            Source::File(name) => {
                let path = self.artifacts.join(name);
                let length = std::fs::metadata(&path)
                    .with_context(|| format!("cannot read {}", path.display()))?
                    .len();
                Ok((length as f64 / 1024.0, "built here".into()))
            }
            Source::EndToEnd(names) => {
                let failures =
                    names.iter().map(|name| self.failures_of(name)).sum::<Result<f64>>()?;
                Ok((failures, self.place().into()))
            }
            Source::Linux(name) => Ok((self.failures_of(name)?, self.place().into())),
            Source::Gate => Ok((self.failures_of(GATE)?, self.place().into())),
            Source::Rust(package, word) => {
                Ok((rust_failures(package, word)?, "this machine".into()))
            }
        }
    }

    fn measure_starts(
        &self,
        peers: &bench::Peers,
        memory_mib: u32,
        arguments: &[&str],
    ) -> Result<Starts> {
        let iterations = self.iterations.to_string();
        let arguments = [arguments, &["--iterations", &iterations]].concat();
        let arguments: Vec<String> = arguments.into_iter().map(String::from).collect();
        let run = bench::Run {
            lane: self.lane,
            artifacts: &self.artifacts,
            memory_mib,
            seed: 1,
            archives: &[],
            peers,
            arguments: &arguments,
        };
        let results = run.measure()?;
        let out = scratch::directory()?.join("spec");
        fs::create_dir_all(&out)?;
        let file = out.join("results.jsonl");
        fs::write(&file, &results)?;
        bench::report(&self.artifacts, &file, &out)?;
        Starts::parse(&results, &fs::read_to_string(out.join("summary.json"))?)
    }

    fn place(&self) -> &'static str {
        match self.lane {
            Lane::HostVm => "dev host VM",
            Lane::Native => "this machine's own KVM",
        }
    }

    /// Failures among the tests of that name, or in the file of that name.
    fn failures_of(&self, name: &str) -> Result<f64> {
        let mut results = self.in_lane.iter().filter(|(test, _)| {
            let rest = test.strip_prefix(name);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with([':', '[']))
        });
        let failures = results.clone().filter(|(_, passed)| !**passed).count();
        results.next().with_context(|| format!("there is no test {name}"))?;
        Ok(failures as f64)
    }

    /// Runs all the tests that rows name: the lane is made once, and the daemon starts once.
    fn run_in_lane(&mut self, promises: &[Promise]) -> Result<()> {
        let mut end_to_end = Vec::new();
        let (mut linux, mut gate) = (false, false);
        for promise in promises {
            match &promise.source {
                Source::EndToEnd(names) => end_to_end.extend(names.iter().cloned()),
                Source::Linux(_) => linux = true,
                Source::Gate => gate = true,
                _ => {}
            }
        }
        if end_to_end.is_empty() && !linux && !gate {
            return Ok(());
        }
        // Nightly counts take nightly memory.
        let machine = lane::NIGHTLY_DAEMONS;
        let count = if end_to_end.is_empty() { 1 } else { test::sites(self.lane, machine, None) };
        let start = |_| Site::start(self.lane, Series::default(), machine, &self.artifacts);
        let sites = (0..count).map(start).collect::<Result<Vec<_>>>()?;
        if linux {
            let outcome = test::linux(&sites[0], &self.artifacts, &[], &test::NIGHTLY)?;
            self.keep(outcome.lines.iter().filter_map(|line| results::rust(line)));
        }
        if gate {
            let passed = test::gate(&sites[0], &self.artifacts)?.success;
            self.in_lane.insert(GATE.into(), passed);
        }
        if end_to_end.is_empty() {
            return Ok(());
        }
        let clients = clients::prepare()?;
        let run = test::end_to_end(sites, &self.artifacts, &clients, &end_to_end, &test::NIGHTLY)?;
        self.keep(run.outcome.lines.iter().filter_map(|line| results::pytest(line)));
        run.left_behind.into_iter().collect()
    }

    fn keep(&mut self, tests: impl Iterator<Item = Test>) {
        self.in_lane.extend(tests.map(|test| (test.name, test.passed)));
    }
}

/// Medians that `firn bench report` found.
#[derive(Debug, Default)]
struct Starts {
    rig: String,
    /// By `<scenario>.<figure>`; with the subject and a colon before it where that is not Firn,
    /// with `@` and the function behind the scenario where that does something.
    medians: BTreeMap<String, f64>,
}

impl Starts {
    /// From the first line of the results, and the rows of `summary.json`.
    fn parse(results: &str, summary: &str) -> Result<Self> {
        let manifest: Value = serde_json::from_str(results.lines().next().unwrap_or_default())
            .context("the results have no manifest")?;
        let rig = manifest["rig"].as_str().unwrap_or_default().to_owned();
        let rows: Vec<Value> = serde_json::from_str(summary).context("no summary")?;
        let mut medians = BTreeMap::new();
        for row in &rows {
            let text = |name: &str| row[name].as_str().unwrap_or_default();
            let subject = match text("subject") {
                "firn" => String::new(),
                other => format!("{other}:"),
            };
            let function = match text("function") {
                "" | "nothing" => String::new(),
                other => format!("@{other}"),
            };
            let key = format!("{subject}{}{function}.{}", text("scenario"), text("figure"));
            medians.insert(key, row["p50"].as_f64().context("a row without a median")?);
        }
        Ok(Self { rig, medians })
    }

    /// The median of a figure, or of one over another's: `thaw.total_us`, `boot.total_us/thaw.total_us`.
    fn figure(&self, key: &str) -> Result<f64> {
        if let Some((over, under)) = key.split_once('/') {
            return Ok(self.figure(over)? / self.figure(under)?);
        }
        self.medians.get(key).copied().with_context(|| format!("firn bench has no {key}"))
    }
}

/// Runs the tests of a package whose names contain a word; there must be one.
fn rust_failures(package: &str, word: &str) -> Result<f64> {
    let mut command = cargo::cargo();
    command.args(["test", "--quiet", "--no-fail-fast", "--package", package, "--", word]);
    command.args(["--format", "pretty"]).envs(test::NIGHTLY);
    let outcome = step::watch(&format!("tests {word} of {package}"), &mut command, |_| false, 0)?;
    let results: Vec<bool> =
        outcome.lines.iter().filter_map(|line| Some(results::rust(line)?.passed)).collect();
    if results.is_empty() {
        bail!("{package} has no test {word}");
    }
    Ok(results.iter().filter(|passed| !**passed).count() as f64)
}

/// Reads the promises out of the specification.
fn parse(text: &str) -> Result<Vec<Promise>> {
    let mut promises = Vec::new();
    for line in text.lines().filter(|line| line.starts_with("| ")) {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let [name, text, bound, source] = cells[..] else { continue };
        if !bound.starts_with(['≤', '≥', '=']) {
            continue;
        }
        let in_row = || format!("SPECIFICATION.md, row {name}");
        promises.push(Promise {
            name: name.to_owned(),
            text: text.to_owned(),
            bound: parse_bound(bound).with_context(in_row)?,
            source: parse_source(source).with_context(in_row)?,
        });
    }
    ensure!(!promises.is_empty(), "SPECIFICATION.md promises nothing");
    for (at, promise) in promises.iter().enumerate() {
        ensure!(
            promises[..at].iter().all(|other| other.name != promise.name),
            "SPECIFICATION.md has two rows {}",
            promise.name
        );
    }
    Ok(promises)
}

fn parse_bound(text: &str) -> Result<Bound> {
    let mut words = text.splitn(3, ' ');
    let (Some(relation), Some(value)) = (words.next(), words.next()) else {
        bail!("`{text}` is no bound");
    };
    Ok(Bound {
        relation: relation.chars().next().context("no relation")?,
        value: value.parse().with_context(|| format!("`{value}` is no number"))?,
        unit: words.next().unwrap_or_default().to_owned(),
    })
}

fn parse_source(text: &str) -> Result<Source> {
    let words: Vec<&str> = text.split_whitespace().collect();
    Ok(match words[..] {
        ["icount", key] => Source::Starts(key.into()),
        ["through-firnd", key] => Source::Daemon(key.into()),
        ["beside-firecracker", key] => Source::Peer(key.into()),
        ["native", key] => Source::Native(key.into()),
        ["resets", key] => Source::Resets(key.into()),
        ["native-reset", pages, key] => Source::NativeReset(
            pages.parse().with_context(|| format!("`{pages}` is no number of pages"))?,
            key.into(),
        ),
        ["native-filters", key] => Source::NativeFilters(key.into()),
        ["files", name] => Source::File(name.into()),
        ["e2e", ref names @ ..] if !names.is_empty() => {
            Source::EndToEnd(names.iter().map(ToString::to_string).collect())
        }
        ["linux", name] => Source::Linux(name.into()),
        [GATE] => Source::Gate,
        ["rust", package, word] => Source::Rust(package.into(), word.into()),
        _ => bail!("`{text}` is no source"),
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn specification() -> Vec<Promise> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../SPECIFICATION.md");
        parse(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    #[test]
    fn the_specification_parses_and_names_tests_that_exist() {
        let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/e2e");
        for promise in specification() {
            let Source::EndToEnd(names) = promise.source else { continue };
            for name in names {
                let (file, test) = name.split_once("::").unwrap_or((&name, ""));
                let text = std::fs::read_to_string(tests.join(file)).unwrap();
                assert!(text.contains(&format!("def {test}")), "{name}");
            }
        }
    }

    #[test]
    fn only_a_row_that_needs_firecracker_may_be_left_unmeasured() {
        let rows = "| a | Peer | ≥ 2 × | beside-firecracker firecracker:thaw.total_us/thaw.total_us |\n\
                    | b | Own | ≤ 2 µs | icount thaw.total_us |";
        let promises = parse(rows).unwrap();
        let [peer, own] = &promises[..] else { panic!("{promises:?}") };
        assert_eq!(peer.verdict(None, false), None);
        assert_eq!(peer.verdict(None, true), Some(false));
        assert_eq!(peer.verdict(Some(2.0), true), Some(true));
        assert_eq!(peer.verdict(Some(1.9), true), Some(false));
        assert_eq!(own.verdict(None, false), Some(false));
        assert_eq!(own.verdict(Some(1.0), false), Some(true));
    }

    #[test]
    fn a_row_is_a_bound_and_a_source() {
        let row = "| fast | Is fast | ≤ 1.5 ms | icount warm |";
        let promises = parse(row).unwrap();
        assert_eq!(promises[0].bound, Bound { relation: '≤', value: 1.5, unit: "ms".into() });
        assert_eq!(promises[0].source, Source::Starts("warm".into()));
        let gate = parse("| sound | Is sound | = 0 failures | gate |").unwrap();
        assert_eq!(gate[0].source, Source::Gate);
        assert!(parse("| sound | Is sound | = 0 failures | gate boot |").is_err());
        assert!(parse(&format!("{row}\n{row}")).is_err());
        assert!(parse("| fast | Is fast | ≤ x ms | icount warm |").is_err());
        assert!(parse("| fast | Is fast | ≤ 1 ms | hearsay |").is_err());
    }

    #[test]
    fn figures_are_medians_and_ratios_of_them() {
        let row = |subject: &str, scenario: &str, function: &str, p50: f64| {
            json!({"subject": subject, "scenario": scenario, "function": function,
                   "figure": "total_us", "p50": p50})
        };
        let rows = json!([
            row("firn", "boot", "nothing", 60.0),
            row("firn", "thaw", "nothing", 10.0),
            row("firn", "thaw", "cpu", 20.0),
            row("firn", "vmm-start", "", 3.0),
            row("peer", "thaw-fresh", "nothing", 70.0),
        ]);
        let results = json!({"record": "manifest", "rig": "a rig"}).to_string();
        let starts = Starts::parse(&results, &rows.to_string()).unwrap();
        assert_eq!(starts.rig, "a rig");
        let figure = |key: &str| starts.figure(key).unwrap();
        assert_eq!(figure("thaw.total_us"), 10.0);
        assert_eq!(figure("thaw@cpu.total_us"), 20.0);
        assert_eq!(figure("vmm-start.total_us"), 3.0);
        assert_eq!(figure("boot.total_us/thaw.total_us"), 6.0);
        assert_eq!(figure("peer:thaw-fresh.total_us/thaw.total_us"), 7.0);
        assert!(starts.figure("warm.total_us").is_err());
    }

    #[test]
    fn rows_name_scenarios_that_are_run() {
        for promise in specification() {
            let (key, run) = match promise.source {
                Source::Starts(key) => (key, SCENARIOS),
                Source::Resets(key) => (key, RESET_SCENARIOS),
                _ => continue,
            };
            for figure in key.split('/') {
                let (scenario, _) = figure.split_once('.').unwrap();
                let scenario = scenario.rsplit(':').next().unwrap();
                // Parts of a scenario have its name and one of their own.
                let runs =
                    |name: &str| scenario == name || scenario.starts_with(&format!("{name}-"));
                assert!(run.split(',').any(runs), "{}", promise.name);
            }
        }
    }

    #[test]
    fn bounds_hold_or_not() {
        let bound = |relation| Bound { relation, value: 5.0, unit: String::new() };
        assert!(bound('≤').holds(5.0) && !bound('≤').holds(5.1));
        assert!(bound('≥').holds(5.0) && !bound('≥').holds(4.9));
        assert!(bound('=').holds(5.0) && !bound('=').holds(4.9));
    }
}
