//! `firn doctor --run`: the gate that a machine passes before functions are trusted to it. It boots, thaws,
//! resets and fills real guests, and makes a report that a person can send: facts of the host, verdicts,
//! figures; no names of hosts, users or files.

mod checks;
mod guests;

use std::{
    fmt::Write as _,
    path::Path,
    pin::Pin,
    time::{Duration, Instant},
};

use serde::Serialize;
use serde_json::{Map, Value, json};

use self::{
    checks::Verdict,
    guests::{Failure, Guests},
};

/// Time for one check, before patience.
const CHECK: Duration = Duration::from_secs(20);

/// Time for all of them, before patience: what has not begun by then is not run.
const ALL: Duration = Duration::from_secs(100);

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
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("cannot start: {error}"))?;
    let checks = runtime.block_on(all(artifacts, &chosen, patience, tell));
    let failed = checks.iter().any(|line| matches!(line.outcome, Outcome::Failed(_)));
    let passed = checks.iter().any(|line| line.outcome == Outcome::Passed);
    Ok(Report {
        version: 1,
        firn: env!("CARGO_PKG_VERSION"),
        host: host(),
        ok: passed && !failed,
        checks,
    })
}

async fn all(artifacts: &Path, chosen: &[&str], patience: u32, tell: impl Fn(&Line)) -> Vec<Line> {
    let begun = Instant::now();
    let guests = match Guests::open(artifacts, patience).await {
        Ok(guests) => guests,
        Err(failure) => {
            let not_run = |check: &&str| line(check, Outcome::NotRun(failure.clone()), begun);
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
        let begun_check = Instant::now();
        if begun.elapsed() > ALL * patience {
            let reason = format!("all checks together took over {:?}", ALL * patience);
            keep(line(check, Outcome::NotRun(reason), begun_check));
            continue;
        }
        // What clones are made of is made once, for whoever comes first.
        if ["thaw", "reset", "clocks", "uniqueness"].contains(&check) && frozen.is_none() {
            let class = firn::ShellClass { vcpus: 1, memory_mib: 128 };
            match limited(patience, guests.freeze("small", class)).await {
                Ok(made) => frozen = Some(made),
                Err(failure) => {
                    keep(line(check, Outcome::Failed(failure), begun_check));
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
        let (outcome, figures) = match limited(patience, work).await {
            Ok(Verdict::Passed(figures)) => (Outcome::Passed, figures),
            Ok(Verdict::NotRun(reason)) => (Outcome::NotRun(reason), Vec::new()),
            Err(failure) => (Outcome::Failed(failure), Vec::new()),
        };
        let figures = figures.into_iter().map(|(name, value)| (name.to_owned(), json!(value)));
        keep(Line { figures: figures.collect(), ..line(check, outcome, begun_check) });
    }
    drop(frozen);
    guests.close().await;
    lines
}

async fn limited<T>(
    patience: u32,
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let limit = CHECK * patience;
    tokio::time::timeout(limit, work)
        .await
        .unwrap_or_else(|_| Err(format!("not done in {limit:?}")))
}

fn line(check: &str, outcome: Outcome, begun: Instant) -> Line {
    let took_ms = begun.elapsed().as_millis() as u64;
    Line { check: check.to_owned(), outcome, figures: Map::new(), took_ms }
}

/// Facts of the machine that nobody needs to keep to themselves.
fn host() -> Value {
    let mut host = firn_bench::host::describe();
    if let Some(facts) = host.as_object_mut() {
        // Names of disks and hosts, and of who built the kernel.
        facts.remove("command_line");
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        facts.insert("kernel".into(), json!(release.trim()));
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
        match report.ok {
            true => "What ran passed. `--json` has the report to send.",
            false =>
                "This machine does not keep what Firn promises. Please send the report of `--json`.",
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
        let report =
            run(Path::new("/nonexistent"), &["boot".into(), "thaw".into()], 1, |_| {}).unwrap();
        assert!(!report.ok);
        assert_eq!(report.checks.len(), 2);
        let text = words(&report.checks[0]) + &summary(&report);
        assert!(text.contains("not run  boot") && text.contains("open the installation"), "{text}");
        assert!(text.contains("does not keep"), "{text}");
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["checks"][0]["verdict"], "not-run");
        assert!(json["checks"][0]["why"].as_str().unwrap().contains("open the installation"));
        assert!(json["host"]["command_line"].is_null());
    }
}
