//! `firn doctor --run`: the gate that a machine passes before functions are trusted to it. It boots, thaws,
//! resets and fills real guests, and makes a report that a person can send: facts of the host, verdicts,
//! figures; no names of hosts, users or files.

mod checks;
mod guests;
mod scrub;

use std::{
    fmt::Write as _,
    path::{self, Path},
    pin::Pin,
    time::{Duration, Instant},
};

use serde::Serialize;
use serde_json::{Map, Value, json};

use self::{
    checks::Verdict,
    guests::{Failure, Guests},
    scrub::Scrub,
};

/// Time for one step, before patience: opening the installation, making a snapshot, a check.
const STEP: Duration = Duration::from_secs(20);

/// Time for all of them, before patience.
const ALL: Duration = Duration::from_secs(100);

/// Time for ending what ran, before patience.
const CLOSE: Duration = Duration::from_secs(10);

/// What came of a check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "verdict", content = "why")]
pub enum Outcome {
    /// What Firn promises holds.
    Passed,
    /// It does not.
    Failed(String),
    /// It was not tried.
    NotRun(String),
}

/// A check, done.
#[derive(Debug, Clone, Serialize)]
pub struct Line {
    /// Its name, for `--only`.
    pub check: String,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// Figures, by names with units.
    pub figures: Map<String, Value>,
    /// How long it took in milliseconds.
    pub took_ms: u64,
}

/// The report.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Version of this form.
    pub version: u32,
    /// Version of Firn.
    pub firn: &'static str,
    /// The machine.
    pub host: Value,
    /// Whether nothing failed, and something passed.
    pub ok: bool,
    /// All checks, in order.
    pub checks: Vec<Line>,
}

/// Names of all checks, in their order.
const NAMES: [&str; 12] = [
    "boot",
    "thaw",
    "reset",
    "clocks",
    "uniqueness",
    "vcpus-1",
    "vcpus-2",
    "vcpus-6",
    "memory-128",
    "memory-512",
    "memory-1024",
    "memory-4096",
];

/// Runs the checks of these names, or all, and tells each as it is done.
///
/// # Errors
/// A name that there is not, or the runtime's.
pub fn run(
    artifacts: &Path,
    only: &[String],
    patience: u32,
    tell: impl Fn(&Line),
) -> Result<Report, String> {
    if let Some(unknown) = only.iter().find(|name| !NAMES.contains(&name.as_str())) {
        return Err(format!("there is no check {unknown:?}; there are {}", NAMES.join(", ")));
    }
    let chosen: Vec<&str> = NAMES
        .into_iter()
        .filter(|name| only.is_empty() || only.iter().any(|o| o == name))
        .collect();
    // An error names it as a whole, so that the report can leave it out.
    let artifacts = path::absolute(artifacts).map_err(|error| error.to_string())?;
    let scrub = Scrub::new([artifacts.clone(), std::env::temp_dir()]);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("cannot start: {error}"))?;
    let mut checks = runtime.block_on(all(&artifacts, &chosen, patience, tell));
    // What still blocks a thread is not waited for.
    runtime.shutdown_background();
    let ok = passed(&checks) && !failed(&checks);
    for line in &mut checks {
        if let Outcome::Failed(why) | Outcome::NotRun(why) = &mut line.outcome {
            *why = scrub.text(why);
        }
    }
    let host = host(&scrub);
    Ok(Report { version: 1, firn: env!("CARGO_PKG_VERSION"), host, ok, checks })
}

fn failed(checks: &[Line]) -> bool {
    checks.iter().any(|line| matches!(line.outcome, Outcome::Failed(_)))
}

fn passed(checks: &[Line]) -> bool {
    checks.iter().any(|line| line.outcome == Outcome::Passed)
}

async fn all(artifacts: &Path, chosen: &[&str], patience: u32, tell: impl Fn(&Line)) -> Vec<Line> {
    let begun = Instant::now();
    let limits = Limits { step: STEP * patience, end: begun + ALL * patience };
    let guests = match limits.step(Guests::open(artifacts, patience)).await {
        Ok(guests) => guests,
        Err(outcome) => {
            let not_run = match outcome {
                Outcome::Failed(why) => Outcome::NotRun(why),
                other => other,
            };
            let not_run = |check: &&str| line(check, not_run.clone(), begun);
            return chosen.iter().map(not_run).inspect(tell).collect();
        }
    };
    let mut frozen = None;
    let mut lines: Vec<Line> = Vec::new();
    let mut keep = |line: Line| {
        tell(&line);
        lines.push(line);
    };
    for &check in chosen {
        let begun = Instant::now();
        // What clones are made of is made once, for whoever comes first.
        if ["thaw", "reset", "clocks", "uniqueness"].contains(&check) && frozen.is_none() {
            let class = firn::ShellClass { vcpus: 1, memory_mib: 128 };
            match limits.step(guests.freeze("small", class)).await {
                Ok(made) => frozen = Some(made),
                Err(outcome) => {
                    keep(line(check, outcome, begun));
                    continue;
                }
            }
        }
        let work: Pin<Box<dyn Future<Output = Result<Verdict, Failure>>>> =
            match (check, frozen.as_ref()) {
                ("boot", _) => Box::pin(checks::boot(&guests)),
                ("thaw", Some(frozen)) => Box::pin(checks::thaw(&guests, frozen)),
                ("reset", Some(frozen)) => Box::pin(checks::reset(&guests, frozen)),
                ("clocks", Some(frozen)) => Box::pin(checks::clocks(&guests, frozen)),
                ("uniqueness", Some(frozen)) => Box::pin(checks::uniqueness(&guests, frozen)),
                _ => match check.split_once('-').map(|(what, size)| (what, size.parse())) {
                    Some(("vcpus", Ok(vcpus))) => Box::pin(checks::vcpus(&guests, vcpus as u8)),
                    Some(("memory", Ok(mib))) => Box::pin(checks::memory(&guests, mib)),
                    _ => continue,
                },
            };
        let (outcome, figures) = match limits.step(work).await {
            Ok(Verdict::Passed(figures)) => (Outcome::Passed, figures),
            Ok(Verdict::NotRun(reason)) => (Outcome::NotRun(reason), Vec::new()),
            Err(outcome) => (outcome, Vec::new()),
        };
        let figures = figures.into_iter().map(|(name, value)| (name.to_owned(), json!(value)));
        keep(Line { figures: figures.collect(), ..line(check, outcome, begun) });
    }
    drop(frozen);
    let limit = CLOSE * patience;
    if tokio::time::timeout(limit, guests.close()).await.is_err() {
        eprintln!("firn doctor: not all that ran has ended in {limit:?}");
    }
    lines
}

/// How long the next step may take: so long, and not beyond the end of all.
struct Limits {
    step: Duration,
    end: Instant,
}

impl Limits {
    /// Takes a step. One that has its full time must be done in it; one that has only what is left of all is
    /// not run if that is too little.
    async fn step<T>(&self, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Outcome> {
        let left = self.end.saturating_duration_since(Instant::now());
        match tokio::time::timeout(left.min(self.step), work).await {
            Ok(result) => result.map_err(Outcome::Failed),
            Err(_) if left < self.step => Err(Outcome::NotRun(format!(
                "only {left:.1?} were left of the time for all checks"
            ))),
            Err(_) => Err(Outcome::Failed(format!("not done in {:?}", self.step))),
        }
    }
}

fn line(check: &str, outcome: Outcome, begun: Instant) -> Line {
    let took_ms = begun.elapsed().as_millis() as u64;
    Line { check: check.to_owned(), outcome, figures: Map::new(), took_ms }
}

/// Facts of the machine that nobody needs to keep to themselves.
fn host(scrub: &Scrub) -> Value {
    let mut host = firn_bench::host::describe();
    if let Some(facts) = host.as_object_mut() {
        // Names of disks and hosts, and of who built the kernel.
        facts.remove("command_line");
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        facts.insert("kernel".into(), json!(release.trim()));
    }
    host["kvm"]["capabilities"] = json!(super::kvm::capability_values());
    for mount in host["cgroups"].as_array_mut().into_iter().flatten() {
        mount["at"] = json!(scrub.text(mount["at"].as_str().unwrap_or_default()));
    }
    host
}

/// A check for people.
pub fn words(line: &Line) -> String {
    let Line { check, outcome, figures, took_ms } = line;
    let (mark, why) = match outcome {
        Outcome::Passed => ("passed ", ""),
        Outcome::Failed(why) => ("FAILED ", why.as_str()),
        Outcome::NotRun(why) => ("not run", why.as_str()),
    };
    let figures: Vec<String> =
        figures.iter().map(|(name, value)| format!("{name} {value}")).collect();
    format!("{mark}  {check:12} {took_ms:>7} ms  {why}{}", figures.join(", "))
}

/// What comes behind the checks, for people.
pub fn summary(report: &Report) -> String {
    let mut text = String::new();
    let cpu = &report.host["cpu"];
    let word = |value: &Value| value.as_str().unwrap_or("unknown").to_owned();
    let _ = writeln!(
        text,
        "\n{} (microcode {}), {} CPUs, Linux {}, {}; Firn {}",
        word(&cpu["model"]),
        word(&cpu["microcode"]),
        cpu["count"],
        word(&report.host["kernel"]),
        word(&report.host["kvm"]["module"]),
        report.firn
    );
    let _ = writeln!(
        text,
        "{}",
        if failed(&report.checks) {
            "This machine does not keep what Firn promises. Please send the report of `--json`."
        } else if passed(&report.checks) {
            "What ran passed. `--json` has the report to send."
        } else {
            "Nothing ran: the lines above say why."
        }
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_that_there_is_not_is_named() {
        let error = run(Path::new("/nonexistent"), &["bot".into()], 1, |_| {}).unwrap_err();
        assert!(error.contains("\"bot\"") && error.contains("boot, thaw"), "{error}");
    }

    #[test]
    fn without_an_installation_nothing_ran_and_the_report_says_why() {
        let told = std::cell::RefCell::new(String::new());
        let tell = |line: &Line| told.borrow_mut().push_str(&words(line));
        let report =
            run(Path::new("/nonexistent"), &["boot".into(), "thaw".into()], 1, tell).unwrap();
        assert!(!report.ok);
        assert_eq!(report.checks.len(), 2);
        let text = told.take() + &summary(&report);
        assert!(text.contains("not run  boot") && text.contains("open the installation"), "{text}");
        assert!(text.contains("/nonexistent"), "{text}");
        assert!(text.contains("\nNothing ran: the lines above say why.\n"), "{text}");
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["checks"][0]["verdict"], "not-run");
        let why = json["checks"][0]["why"].as_str().unwrap();
        assert!(why.contains("open the installation") && why.contains("<path>"), "{why}");
        assert!(!why.contains("nonexistent"), "{why}");
        assert!(json["host"]["command_line"].is_null());
    }

    #[test]
    fn the_summary_has_three_cases() {
        let report = |outcomes: &[Outcome]| {
            let line = |outcome: &Outcome| line("boot", outcome.clone(), Instant::now());
            let checks = outcomes.iter().map(line).collect();
            summary(&Report { version: 1, firn: "0", host: json!({}), ok: false, checks })
        };
        let [failed, not_run] =
            [Outcome::Failed, Outcome::NotRun].map(|outcome| outcome("".into()));
        let text = report(&[Outcome::Passed, not_run.clone(), failed]);
        assert!(text.contains("does not keep"), "{text}");
        let text = report(&[Outcome::Passed, not_run.clone()]);
        assert!(text.contains("What ran passed"), "{text}");
        let text = report(&[not_run]);
        assert!(text.contains("Nothing ran"), "{text}");
    }

    #[test]
    fn a_step_ends_with_its_own_time_or_with_that_of_all() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let limits = |step_ms, all_ms| Limits {
            step: Duration::from_millis(step_ms),
            end: Instant::now() + Duration::from_millis(all_ms),
        };
        let step = |limits: Limits| {
            runtime.block_on(limits.step(std::future::pending::<Result<(), Failure>>()))
        };
        assert_eq!(step(limits(10, 100_000)), Err(Outcome::Failed("not done in 10ms".into())));
        let over = step(limits(100_000, 10));
        assert!(
            matches!(&over, Err(Outcome::NotRun(why)) if why.contains("were left")),
            "{over:?}"
        );
        let limits = limits(100_000, 100_000);
        assert_eq!(runtime.block_on(limits.step(async { Ok(1) })), Ok(1));
        let failure = runtime.block_on(limits.step(async { Err::<(), _>("it".into()) }));
        assert_eq!(failure, Err(Outcome::Failed("it".into())));
    }
}
