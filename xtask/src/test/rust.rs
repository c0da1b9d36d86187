//! Tests in Rust: those of the workspace here, those of the VMM with Linux in the lane.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Error, Result};
use serde::Deserialize;

use super::choice::Rust;
use super::results;
use crate::cargo::Binaries;
use crate::cpio::Archive;
use crate::lane::Site;
use crate::step::Outcome;
use crate::{cargo, scratch, step};

/// Makes libtest say how long each test took. The flag is unstable, so it needs [`UNSTABLE`] in its environment.
const TIMES: [&str; 2] = ["-Zunstable-options", "--report-time"];

/// Lets the standard library's test harness take unstable flags. Programs of tests alone have it: for cargo it would
/// make everything that is built with it different.
const UNSTABLE: (&str, &str) = ("RUSTC_BOOTSTRAP", "1");

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
    step::watch("unit tests", &mut command, is_result, 0)
}

/// The VMM's tests with Linux, in the lane; all, or those with one of these in their names. What is in `environment`
/// wins over what would be there.
pub fn linux(
    site: &Site,
    artifacts: &Path,
    names: &[&str],
    environment: &[(&str, &str)],
) -> Result<Outcome> {
    let Linux { test, held_vmm } = build_linux()?;
    let mut archive = Archive::new(Vec::new());
    archive.copy("init", 0o755, &artifacts.join("bin/firn-init"))?;
    let initramfs = scratch::directory()?.join("firn-init.cpio");
    std::fs::write(&initramfs, archive.finish()?)?;
    let code = scratch::directory()?.join("busy.erofs");
    let mut mkfs = Command::new("mkfs.erofs");
    mkfs.args(["-T0", "--all-root"]).arg(&code).arg(code_tree("busy")?);
    step::output(&mut mkfs)?;
    // Where the tests find a file of this machine's.
    let place = |file: &Path, name: &str| match site {
        Site::Native => Ok(file.display().to_string()),
        Site::HostVm(vm) => {
            let there = format!("/root/{name}");
            vm.client().put(file, &there)?;
            Ok::<_, Error>(there)
        }
    };
    let initramfs = place(&initramfs, "firn-init.cpio")?;
    let code = place(&code, "busy.erofs")?;
    let held_vmm = place(&held_vmm, "firn-vmm-held")?;
    let root = match site {
        Site::Native => artifacts.display().to_string(),
        Site::HostVm(_) => "/firn".into(),
    };
    let mut variables = vec![
        ("FIRN_TEST_KERNELS", format!("{root}/kernel/vmlinux:{root}/kernel/bzImage")),
        ("FIRN_TEST_INITRAMFS", initramfs),
        ("FIRN_TEST_ROOTFS", format!("{root}/images/python3.11/rootfs.erofs")),
        ("FIRN_TEST_TMP", format!("{root}/images/tmp.ext4")),
        ("FIRN_TEST_CODE", code),
        ("FIRN_VMM", format!("{root}/bin/firn-vmm")),
        ("FIRN_HELD_VMM", held_vmm),
        // Emulated CPUs: side by side, each would run into the others' time limits.
        ("RUST_TEST_THREADS", "1".into()),
        (UNSTABLE.0, UNSTABLE.1.into()),
    ];
    variables.extend(environment.iter().map(|(name, value)| (*name, (*value).to_owned())));
    let arguments = [&TIMES[..], names].concat();
    site.watch("the VMM's tests with Linux", &test, &arguments, &variables, is_result)
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

/// The VMM's tests with Linux, built.
pub struct Linux {
    /// The program of the tests, in release mode.
    test: PathBuf,
    /// A `firn-vmm` with debug assertions, whose threads can be held back.
    held_vmm: PathBuf,
}

/// Builds them.
pub fn build_linux() -> Result<Linux> {
    let (package, name) = ("firn-vmm", "linux");
    #[derive(Deserialize)]
    struct Message {
        executable: Option<PathBuf>,
    }
    let held_vmm = held_programs()?.binary(package)?;
    let mut command = cargo::cargo();
    command.args(["test", "--release", "--quiet", "--no-run", "--package", package]);
    command.args(["--test", name, "--message-format", "json-render-diagnostics"]);
    let text = step::output(&mut command)?;
    let mut paths = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Message>(line).ok()?.executable)
        // The package's own programs are built too.
        .filter(|path| path.parent().is_some_and(|parent| parent.ends_with("deps")));
    let test = paths.next().with_context(|| format!("cargo built no test {name} of {package}"))?;
    Ok(Linux { test, held_vmm })
}

/// Whether a line is the result of a Rust test.
fn is_result(line: &str) -> bool {
    results::rust(line).is_some()
}
