//! Tests in Rust: those of the workspace here, and builds of those that run in rigs.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::choice::Rust;
use super::results;
use super::rig::{self, Built, Choice, Rig, TIMES, UNSTABLE, Verdict};
use crate::cargo::Binaries;
use crate::host_vm::Series;
use crate::lane::Site;
use crate::step::Outcome;
use crate::{cargo, step};

/// The package of the client that uses AWS's SDK for Rust.
const CLIENT: &str = "firn-client";

/// Where `firn`'s tests find programs that they would have cargo build otherwise.
const PROGRAMS: &str = "FIRN_PROGRAMS";

impl Rust {
    /// Arguments of `cargo test` that choose programs.
    fn targets(&self) -> Vec<String> {
        let Some(package) = &self.package else {
            // The client has no tests, and is built for the end-to-end tests: with its dependencies' features as it
            // needs them, not as the workspace does.
            let targets = ["--workspace", "--exclude", CLIENT, "--lib", "--bins", "--tests"];
            return targets.map(String::from).to_vec();
        };
        let manifest = cargo::workspace().join(package).join("Cargo.toml");
        let mut all = vec!["--manifest-path".to_owned(), manifest.display().to_string()];
        match &self.program {
            Some(program) => all.extend(["--test".to_owned(), program.clone()]),
            None => {
                let has_library = cargo::workspace().join(package).join("src/lib.rs").exists();
                all.extend(has_library.then(|| "--lib".to_owned()));
                all.push("--bins".to_owned());
            }
        }
        all
    }
}

impl fmt::Display for Rust {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let package = self.package.as_ref().map(|package| package.display().to_string());
        let parts = [package, self.program.clone(), self.name.clone()];
        f.write_str(&parts.into_iter().flatten().collect::<Vec<_>>().join(" "))
    }
}

/// Builds tests, and the programs that some of them run; returns where those are.
pub fn build_unit(which: &Rust) -> Result<PathBuf> {
    let mut command = cargo::cargo();
    command.args(["test", "--no-run"]).args(which.targets());
    step::run("building unit tests", &mut command)?;
    let jailer = held_programs()?.binary("firn-jailer")?;
    jailer.parent().map(Path::to_owned).context("a program lies nowhere")
}

/// The programs of a jail with debug assertions: threads of such a VMM can be held back.
fn held_programs() -> Result<Binaries> {
    // Always both, for one alone would need its dependencies with other features, and they would be built twice.
    cargo::build("dev", &["firn-vmm", "firn-jailer"])
}

/// Runs them.
pub fn unit(which: &Rust, programs: &Path, environment: &[(&str, &str)]) -> Result<Outcome> {
    let mut command = cargo::cargo();
    command.args(["test", "--no-fail-fast"]).args(which.targets());
    let (name, value) = UNSTABLE;
    let runner = format!("target.'cfg(all())'.runner = ['env', '{name}={value}']");
    command.args(["--config", &runner, "--"]).args(TIMES).args(&which.name);
    command.env(PROGRAMS, programs).envs(environment.iter().copied());
    step::watch("unit tests", &mut command, results::is_rust, 0)
}

/// Builds the VMM's test programs for rigs.
pub fn build_for_rigs() -> Result<Built> {
    Built::build(held_programs()?.binary("firn-vmm")?)
}

/// The VMM's tests with Linux, in the lane; all, or those with one of these in their names. What is in `environment`
/// wins over what would be there.
pub fn linux(
    site: &Site,
    artifacts: &Path,
    names: &[&str],
    environment: &[(&str, &str)],
) -> Result<Outcome> {
    program(site, artifacts, rig::LINUX, names, environment)
}

/// The hardware gate with all its checks, in the lane.
pub fn gate(site: &Site, artifacts: &Path) -> Result<Outcome> {
    program(site, artifacts, rig::GATE, &[], &super::NIGHTLY)
}

fn program(
    site: &Site,
    artifacts: &Path,
    name: &str,
    names: &[&str],
    environment: &[(&str, &str)],
) -> Result<Outcome> {
    let choice = Choice { program: Some(name), names };
    let rig = Rig::Site(site, Series::default());
    let verdicts = build_for_rigs()?.run(rig, artifacts, &choice, environment)?;
    let outcome = verdicts.into_iter().find_map(|(_, verdict)| match verdict {
        Verdict::Ran(outcome) | Verdict::Command(outcome) => Some(outcome),
        _ => None,
    });
    outcome.with_context(|| format!("{name} did not run"))
}
