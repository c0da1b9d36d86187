//! `cargo xtask fuzz`: every target of `fuzz/` for a bounded time, one after the other.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::{cache, cargo, step};

/// Fuzz every parser of hostile bytes for a while; fails if an input breaks one.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Time for each target.
    #[arg(long, default_value_t = 60)]
    seconds: u32,

    /// Only these targets.
    #[arg(long, value_name = "TARGET")]
    only: Vec<String>,
}

/// Runs the task.
pub fn run(arguments: &Arguments) -> Result<i32> {
    ensure!(
        cargo_fuzz(&["--version"]).output().is_ok_and(|output| output.status.success()),
        "cargo-fuzz is not installed: run `cargo install cargo-fuzz --locked` and, for the C++ part \
         of libFuzzer, `apt-get install g++`"
    );
    let list = step::output(&mut cargo_fuzz(&["list"]))?;
    let targets: Vec<&str> = list
        .lines()
        .filter(|name| arguments.only.is_empty() || arguments.only.iter().any(|o| o == name))
        .collect();
    ensure!(!targets.is_empty(), "no such target; there are:\n{list}");
    step::run("building the fuzz targets", &mut cargo_fuzz(&["build"]))?;
    let mut broken = Vec::new();
    let mut table = vec![Figures::HEAD.to_owned()];
    for target in targets {
        let corpus = corpus(target)?;
        let mut command = cargo_fuzz(&["run", target]);
        command.arg(corpus).arg(cargo::workspace().join("fuzz/seeds").join(target)).args([
            "--",
            &format!("-max_total_time={}", arguments.seconds),
            "-timeout=10",
            "-rss_limit_mb=2048",
            "-malloc_limit_mb=64",
            "-print_final_stats=1",
        ]);
        let outcome = step::watch(&format!("fuzzing {target}"), &mut command, |_| false, 0)?;
        table.push(Figures::parse(&outcome.lines).row(target, outcome.success));
        if !outcome.success {
            for line in outcome.lines.iter().rev().take(25).rev() {
                eprintln!("  | {line}");
            }
            broken.push(target);
        }
    }
    println!("{}", table.join("\n"));
    if !broken.is_empty() {
        bail!("inputs in fuzz/artifacts break: {}", broken.join(", "));
    }
    Ok(0)
}

/// Where a target's corpus lies: in the user's cache, so that each run begins where the last one, of
/// whichever checkout, ended.
fn corpus(target: &str) -> Result<PathBuf> {
    let dir = cache::root()?.join("fuzz").join(target);
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    Ok(dir)
}

/// What libFuzzer says of a run.
#[derive(Debug, Default, PartialEq)]
struct Figures {
    executions: u64,
    /// Edges of the control flow that were taken, and that there are: in the target with all that it
    /// links, so that the ratio is to be compared with itself only.
    covered: u64,
    edges: u64,
    /// Edges with how often they were taken, and comparisons.
    features: u64,
    /// Inputs that are kept.
    corpus: u64,
}

impl Figures {
    const HEAD: &str =
        "| target | executions | edges | features | corpus | |\n|---|---|---|---|---|---|";

    fn parse(lines: &[String]) -> Self {
        let mut figures = Self::default();
        for line in lines {
            let words: Vec<&str> = line.split_whitespace().collect();
            let after = |word: &str| {
                let at = words.iter().position(|w| *w == word)?;
                words.get(at + 1)?.split('/').next()?.parse().ok()
            };
            if let Some(counters) = line.split(" inline 8-bit counters)").next()
                && counters.len() < line.len()
            {
                let edges = counters.rsplit('(').next().and_then(|count| count.parse().ok());
                figures.edges = edges.unwrap_or(figures.edges);
            }
            figures.covered = after("cov:").unwrap_or(figures.covered);
            figures.features = after("ft:").unwrap_or(figures.features);
            figures.corpus = after("corp:").unwrap_or(figures.corpus);
            figures.executions =
                after("stat::number_of_executed_units:").unwrap_or(figures.executions);
        }
        figures
    }

    fn row(&self, target: &str, success: bool) -> String {
        let Self { executions, covered, edges, features, corpus } = self;
        let verdict = if success { "" } else { "broken" };
        format!(
            "| `{target}` | {executions} | {covered} of {edges} | {features} | {corpus} | {verdict} |"
        )
    }
}

/// cargo-fuzz of the installed toolchain: its flags are unstable ones, which a stable compiler
/// takes when told to.
fn cargo_fuzz(arguments: &[&str]) -> Command {
    let mut command = cargo::cargo();
    command.arg("fuzz").args(arguments).current_dir(cargo::workspace());
    command.env("RUSTC_BOOTSTRAP", "1").env_remove("RUSTFLAGS");
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_the_last_that_libfuzzer_said() {
        let lines = [
            "INFO: Loaded 1 modules   (5062 inline 8-bit counters): 5062 [0x1, 0x2), ",
            "#2\tINITED cov: 10 ft: 11 corp: 1/1b exec/s: 0 rss: 40Mb",
            "#512\tNEW    cov: 93 ft: 120 corp: 7/20b lim: 4 exec/s: 0 rss: 40Mb L: 3/4 MS: 1 Bit-",
            "Done 600 runs in 2 second(s)",
            "stat::number_of_executed_units: 600",
        ];
        let figures = Figures::parse(&lines.map(String::from));
        let expected =
            Figures { executions: 600, covered: 93, edges: 5062, features: 120, corpus: 7 };
        assert_eq!(figures, expected);
        assert_eq!(figures.row("t", true), "| `t` | 600 | 93 of 5062 | 120 | 7 |  |");
    }
}
