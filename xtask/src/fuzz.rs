//! `cargo xtask fuzz`: every target of `fuzz/` for a bounded time, one after the other.

use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::{cargo, step};

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
    for target in targets {
        let corpus = cargo::workspace().join("fuzz/corpus").join(target);
        std::fs::create_dir_all(&corpus)
            .with_context(|| format!("cannot create {}", corpus.display()))?;
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
        let executions = outcome.lines.iter().rev().find(|line| line.contains("executed_units"));
        let executions = executions.and_then(|line| line.split_whitespace().last()).unwrap_or("?");
        println!("{target}: {executions} executions");
        if !outcome.success {
            for line in outcome.lines.iter().rev().take(25).rev() {
                eprintln!("  | {line}");
            }
            broken.push(target);
        }
    }
    if !broken.is_empty() {
        bail!("inputs in fuzz/artifacts break: {}", broken.join(", "));
    }
    Ok(0)
}

/// cargo-fuzz of the installed toolchain: its flags are unstable ones, which a stable compiler
/// takes when told to.
fn cargo_fuzz(arguments: &[&str]) -> Command {
    let mut command = cargo::cargo();
    command.arg("fuzz").args(arguments).current_dir(cargo::workspace());
    command.env("RUSTC_BOOTSTRAP", "1").env_remove("RUSTFLAGS");
    command
}
