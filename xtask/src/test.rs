//! `cargo xtask test`: all tests, and a line at the end that counts them.
//!
//! | stage | what |
//! |---|---|
//! | `style` | rustfmt, clippy with warnings denied |
//! | `unit` | `cargo test` of the workspace, tiny guests against this machine's `/dev/kvm` included |
//! | `linux` | the VMM against Linux and `firn-init`, in the lane |
//! | `e2e` | `tests/e2e` with boto3, AWS's CLI and other SDKs against a daemon, in the lane |
//!
//! The lane's host VM boots once. A failing test does not keep the others from running.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::clients::Clients;
use crate::cpio::Archive;
use crate::daemon::{self, Daemon, Settings};
use crate::lane::{Choice, Lane, Site};
use crate::step::Outcome;
use crate::{artifacts, cargo, clients, demo, packages, scratch, step};

/// Run all tests.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Run only these stages.
    #[arg(long, value_enum)]
    only: Vec<Stage>,

    #[command(flatten)]
    lane: Choice,

    /// Handed on to pytest, such as `-k timeout`.
    #[arg(last = true)]
    pytest: Vec<String>,
}

/// A part of the tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
enum Stage {
    Style,
    Unit,
    Linux,
    E2e,
}

/// What passed and what did not.
#[derive(Debug, Default)]
struct Tally {
    passed: usize,
    failed: Vec<String>,
}

impl Tally {
    fn check(&mut self, name: &str, outcome: &Outcome, hint: &str) {
        if outcome.success {
            self.passed += 1;
            return;
        }
        print_tail(name, &outcome.lines);
        self.failed.push(format!("{name} ({hint})"));
    }

    /// A stage that could not even begin counts as one failure.
    fn must<T>(&mut self, name: &str, result: Result<T>) -> Option<T> {
        result
            .map_err(|error| {
                eprintln!("xtask: {error:#}");
                self.failed.push(format!("{name} (could not run)"));
            })
            .ok()
    }
}

/// Runs the task; the exit code is 1 if a test failed.
pub fn run(arguments: &Arguments) -> Result<i32> {
    let started = Instant::now();
    let stages: BTreeSet<Stage> = match arguments.only.as_slice() {
        [] => [Stage::Style, Stage::Unit, Stage::Linux, Stage::E2e].into(),
        some => some.iter().copied().collect(),
    };
    let mut tally = Tally::default();
    let in_lane = stages.contains(&Stage::Linux) || stages.contains(&Stage::E2e);
    packages::ensure(&[packages::RUN, if in_lane { packages::KERNEL } else { &[] }])?;
    if in_lane {
        packages::ensure(&[packages::IMAGES, packages::CLIENTS])?;
    }
    if stages.contains(&Stage::Style) {
        style(&mut tally)?;
    }
    if stages.contains(&Stage::Unit) {
        unit(&mut tally)?;
    }
    if in_lane {
        let lane = arguments.lane.decide()?;
        if let Some(artifacts) = tally.must("building Firn", artifacts::build()) {
            lane_stages(&mut tally, lane, &artifacts, &stages, &arguments.pytest);
        }
    }
    for name in &tally.failed {
        println!("FAILED  {name}");
    }
    println!(
        "{} passed, {} failed in {}",
        tally.passed,
        tally.failed.len(),
        step::time(started.elapsed())
    );
    Ok(i32::from(!tally.failed.is_empty()))
}

fn style(tally: &mut Tally) -> Result<()> {
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
        tally.check(name, &outcome, hint);
    }
    Ok(())
}

fn unit(tally: &mut Tally) -> Result<()> {
    let mut command = cargo::cargo();
    command.args(["test", "--workspace", "--no-fail-fast"]);
    let outcome = step::watch("unit tests", &mut command, is_result, 0)?;
    count_rust("unit tests", tally, &outcome);
    Ok(())
}

/// What needs a KVM that boots Linux.
fn lane_stages(
    tally: &mut Tally,
    lane: Lane,
    artifacts: &Path,
    stages: &BTreeSet<Stage>,
    pytest: &[String],
) {
    let site = Site::start(lane, artifacts);
    let Some(site) = tally.must("booting the host VM", site) else { return };
    if stages.contains(&Stage::Linux) {
        let result = linux(&site, artifacts, &[]);
        if let Some(outcome) = tally.must("the VMM's tests with Linux", result) {
            count_rust("the VMM's tests with Linux", tally, &outcome);
        }
    }
    if stages.contains(&Stage::E2e) {
        let result = end_to_end(tally, site, artifacts, pytest);
        tally.must("end-to-end tests", result);
    }
}

/// The VMM's tests with Linux, in the lane. What is in `environment` wins over what would be there.
pub fn linux(site: &Site, artifacts: &Path, environment: &[(&str, String)]) -> Result<Outcome> {
    let test = test_program("firn-vmm", "linux")?;
    let mut archive = Archive::new(Vec::new());
    archive.copy("init", 0o755, &artifacts.join("bin/firn-init"))?;
    let initramfs = scratch::directory()?.join("firn-init.cpio");
    std::fs::write(&initramfs, archive.finish()?)?;
    let code = scratch::directory()?.join("busy.erofs");
    let mut mkfs = Command::new("mkfs.erofs");
    mkfs.args(["-T0", "--all-root"]).arg(&code).arg(code_tree("busy")?);
    step::output(&mut mkfs)?;
    let (root, initramfs, code) = match site {
        Site::Native => (
            artifacts.display().to_string(),
            initramfs.display().to_string(),
            code.display().to_string(),
        ),
        Site::HostVm(vm) => {
            vm.client().put(&initramfs, "/root/firn-init.cpio")?;
            vm.client().put(&code, "/root/busy.erofs")?;
            ("/firn".into(), "/root/firn-init.cpio".into(), "/root/busy.erofs".into())
        }
    };
    let mut files = vec![
        ("FIRN_TEST_KERNELS", format!("{root}/kernel/vmlinux:{root}/kernel/bzImage")),
        ("FIRN_TEST_INITRAMFS", initramfs),
        ("FIRN_TEST_ROOTFS", format!("{root}/images/python3.11/rootfs.erofs")),
        ("FIRN_TEST_TMP", format!("{root}/images/tmp.ext4")),
        ("FIRN_TEST_CODE", code),
        ("FIRN_VMM", format!("{root}/bin/firn-vmm")),
        // One emulated CPU: side by side, each would run into the others' time limits.
        ("RUST_TEST_THREADS", "1".into()),
    ];
    files.extend_from_slice(environment);
    site.watch("the VMM's tests with Linux", &test, &files, is_result)
}

/// A guest of `tests/guests` as the tree of a code disk: the function in `task`, no layers in `opt`.
fn code_tree(guest: &str) -> Result<PathBuf> {
    let tree = scratch::directory()?.join(guest);
    let task = tree.join("task");
    std::fs::create_dir_all(&task)?;
    std::fs::create_dir_all(tree.join("opt"))?;
    for entry in std::fs::read_dir(cargo::workspace().join("tests/guests").join(guest))? {
        let entry = entry?;
        std::fs::copy(entry.path(), task.join(entry.file_name()))?;
    }
    Ok(tree)
}

fn end_to_end(tally: &mut Tally, site: Site, artifacts: &Path, more: &[String]) -> Result<()> {
    let clients = clients::prepare()?;
    let runner = serde_json::to_string(&site.runner()?)?;
    let settings = Settings { restart: true, ..Settings::default() };
    let daemon = Daemon::start(site, artifacts, &settings)?;
    let mut pytest = pytest(&clients, &daemon, &runner);
    pytest.args(more);
    let counts = |line: &str| pytest_result(line).is_some();
    let outcome = step::watch("end-to-end tests", &mut pytest, counts, 0)?;
    let before = tally.failed.len();
    for (name, passed) in outcome.lines.iter().filter_map(|line| pytest_result(line)) {
        match passed {
            true => tally.passed += 1,
            false => tally.failed.push(format!("tests/e2e/{name}")),
        }
    }
    if !outcome.success {
        let from = outcome.lines.iter().position(|line| line.contains("= FAILURES ="));
        let from = from.or(outcome.lines.iter().position(|line| line.contains("= ERRORS =")));
        print_tail("end-to-end tests", &outcome.lines[from.unwrap_or(0)..]);
        eprintln!("xtask: the end of the daemon's log:\n{}", daemon.log());
        if tally.failed.len() == before {
            tally.failed.push("end-to-end tests (could not run)".into());
        }
    }
    daemon.stop()?;
    tally.passed += 1; // nothing was left behind
    Ok(())
}

/// pytest in `tests/e2e` against a daemon; it runs all tests unless names of some are added.
pub fn pytest(clients: &Clients, daemon: &Daemon, runner: &str) -> Command {
    let mut pytest = Command::new(clients.python.join("bin/python"));
    pytest.args(["-m", "pytest", "-v", "--tb=short", "--color=no", "-p", "no:cacheprovider"]);
    pytest.current_dir(cargo::workspace().join("tests/e2e"));
    pytest.envs(demo::CREDENTIALS).env("PYTHONDONTWRITEBYTECODE", "1");
    pytest.env("PYTHONUNBUFFERED", "1");
    pytest.env("FIRN_ENDPOINT", daemon.endpoint()).env("FIRN_RUNNER", runner);
    pytest.env("FIRN_SECOND_PORT", daemon::PORTS[1].to_string());
    pytest.env("FIRN_SECOND_ENDPOINT", daemon.second_endpoint());
    pytest.env("FIRN_AWS_PORT", daemon.outside().port.to_string());
    pytest.env("FIRN_AWS_ENDPOINT", format!("http://{}", daemon.outside().from_daemons));
    pytest.env("FIRN_CLIENTS", &clients.commands);
    pytest
}

/// Builds a package's test program in release mode.
fn test_program(package: &str, name: &str) -> Result<PathBuf> {
    #[derive(Deserialize)]
    struct Message {
        executable: Option<PathBuf>,
    }
    let mut command = cargo::cargo();
    command.args(["test", "--release", "--quiet", "--no-run", "--package", package]);
    command.args(["--test", name, "--message-format", "json-render-diagnostics"]);
    let text = step::output(&mut command)?;
    let mut paths = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Message>(line).ok()?.executable)
        // The package's own programs are built too.
        .filter(|path| path.parent().is_some_and(|parent| parent.ends_with("deps")));
    paths.next().with_context(|| format!("cargo built no test {name} of {package}"))
}

/// Whether a line is the result of a Rust test.
fn is_result(line: &str) -> bool {
    rust_result(line).is_some()
}

/// Name and success from `test name ... ok`; ignored tests are no result.
pub fn rust_result(line: &str) -> Option<(&str, bool)> {
    let (name, result) = line.strip_prefix("test ")?.rsplit_once(" ... ")?;
    match result.split(' ').next()? {
        "ok" => Some((name, true)),
        "FAILED" => Some((name, false)),
        _ => None,
    }
}

/// Name and success from `file.py::test PASSED [ 10%]`; skipped tests and known
/// failures are no result.
pub fn pytest_result(line: &str) -> Option<(&str, bool)> {
    // A parameter may hold spaces: the result is the last of these words.
    let (name, passed) = [" PASSED", " FAILED", " ERROR", " XPASS"]
        .iter()
        .filter_map(|word| Some((line.rfind(word)?, *word)))
        .max()
        .map(|(at, word)| (&line[..at], word == " PASSED"))?;
    (name.contains("::") && !name.starts_with(' ')).then_some((name, passed))
}

fn count_rust(what: &str, tally: &mut Tally, outcome: &Outcome) {
    let before = tally.failed.len();
    for (name, passed) in outcome.lines.iter().filter_map(|line| rust_result(line)) {
        match passed {
            true => tally.passed += 1,
            false => tally.failed.push(name.to_owned()),
        }
    }
    if outcome.success {
        return;
    }
    if tally.failed.len() == before {
        tally.failed.push(format!("{what} (could not run)"));
        print_tail(what, &outcome.lines);
        return;
    }
    // From each `failures:` to the end of its list: what the tests printed, then their names.
    let mut shown = false;
    for line in &outcome.lines {
        shown = (shown || line == "failures:") && !line.starts_with("test result:");
        if shown {
            eprintln!("  | {line}");
        }
    }
}

fn print_tail(what: &str, lines: &[String]) {
    const MOST: usize = 400;
    eprintln!("xtask: {what} failed:");
    for line in &lines[lines.len().saturating_sub(MOST)..] {
        eprintln!("  | {line}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_read_as_the_runners_print_them() {
        assert_eq!(rust_result("test a::b ... ok"), Some(("a::b", true)));
        assert_eq!(rust_result("test a::b ... FAILED"), Some(("a::b", false)));
        assert_eq!(rust_result("test src/lib.rs - f (line 3) ... ok").map(|r| r.1), Some(true));
        assert_eq!(rust_result("test a ... ignored, why"), None);
        assert_eq!(rust_result("test result: ok. 3 passed"), None);
        assert_eq!(pytest_result("t.py::test_a PASSED    [ 5%]"), Some(("t.py::test_a", true)));
        let spaced = pytest_result("t.py::test_a[x y] FAILED [ 5%]");
        assert_eq!(spaced, Some(("t.py::test_a[x y]", false)));
        assert_eq!(pytest_result("FAILED t.py::test_a - assert 1 == 2"), None);
        assert_eq!(pytest_result("t.py::test_a SKIPPED (why)"), None);
    }
}
