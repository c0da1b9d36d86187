//! Builds the guest kernel: Debian's `linux-source-6.12` with the patches of
//! `kernel-config/patches/` and `kernel-config/firn.config` on top of `tinyconfig`.
//!
//! The build is reproducible (fixed time stamp, user and host), so the same fragment, source and
//! compiler give the same `vmlinux`, and a snapshot taken on one machine names the same kernel on
//! another.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::cache::{self, Key};
use crate::{cargo, packages, scratch, step};

const PACKAGE: &str = "linux-source-6.12";
const TARBALL: &str = "/usr/src/linux-source-6.12.tar.xz";

/// Raise it when this file changes what is built.
const RECIPE: &str = "kernel 1";

/// Lines that `make` prints for a build, measured; for the progress only.
const LINES: usize = 1_520;

/// Written beside the kernel as `build.json`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Build {
    /// `uname -r`.
    pub release: String,
    /// Version of Debian's source package.
    pub source: String,
    /// First line of `gcc --version`.
    pub compiler: String,
    /// Symbols that are on.
    pub symbols: usize,
    /// Size of the stripped `vmlinux` in bytes.
    pub vmlinux_bytes: u64,
    /// Size of the `bzImage` in bytes.
    pub bzimage_bytes: u64,
    /// Time the whole build took, unpacking included.
    pub seconds: f64,
    /// CPUs of the machine that built it.
    pub cpus: usize,
}

/// Build the guest kernel, or say where it is cached and what it weighs.
#[derive(Debug, clap::Args)]
pub struct Arguments {}

/// Runs the task.
pub fn run(_: Arguments) -> Result<i32> {
    let kernel = build()?;
    println!("{}\n{}", kernel.display(), summary(&record(&kernel)?));
    Ok(0)
}

/// Builds the kernel unless it is cached; the directory holds `vmlinux`, `bzImage`, `config` and
/// `build.json`.
pub fn build() -> Result<PathBuf> {
    packages::ensure(&[packages::KERNEL])?;
    let path = cargo::workspace().join("kernel-config/firn.config");
    let text = fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
    let fragment = parse(&text).with_context(|| format!("{}", path.display()))?;
    let source = packages::version(PACKAGE)?;
    let compiler = step::output(Command::new("gcc").arg("--version"))?;
    let compiler = compiler.lines().next().unwrap_or_default().to_owned();
    let patches = patches()?;
    let mut key = Key::new(RECIPE);
    key.add(&source).add(&compiler);
    for patch in &patches {
        key.add_file(patch)?;
    }
    for (symbol, value) in &fragment {
        key.add(symbol).add(value);
    }
    cache::entry("kernel", &key, |to| build_into(to, &text, &fragment, &patches, source, compiler))
}

/// The patches, in the order of their names, which is the order in which they are applied.
fn patches() -> Result<Vec<PathBuf>> {
    let directory = cargo::workspace().join("kernel-config/patches");
    let entries = fs::read_dir(&directory).with_context(|| format!("{}", directory.display()))?;
    let mut patches = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    patches.retain(|path| path.extension().is_some_and(|extension| extension == "patch"));
    patches.sort();
    Ok(patches)
}

/// Reads what the last build recorded.
fn record(kernel: &Path) -> Result<Build> {
    let path = kernel.join("build.json");
    let text = fs::read(&path).with_context(|| format!("{}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{}", path.display()))
}

fn build_into(
    to: &Path,
    text: &str,
    fragment: &BTreeMap<String, String>,
    patches: &[PathBuf],
    source: String,
    compiler: String,
) -> Result<()> {
    let started = Instant::now();
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    step::say(&format!(
        "the guest kernel is built once and kept; this is the longest step ({} on this machine's \
         {cpus} CPUs)",
        if cpus <= 2 { "4 to 10 minutes" } else { "a few minutes" }
    ));
    let work = scratch::beside(&cache::root()?, "kernel-build")?;
    step::run(
        "unpacking the kernel source",
        Command::new("tar").args(["-x", "--strip-components=1", "-f", TARBALL, "-C"]).arg(&work),
    )?;
    for patch in patches {
        let mut command = Command::new("patch");
        // No fuzz: a patch that only almost fits may have landed in the wrong place.
        command.args(["--strip=1", "--fuzz=0", "--batch", "--input"]).arg(patch);
        step::output(command.current_dir(&work))
            .with_context(|| format!("{} does not fit this kernel source", patch.display()))?;
    }
    fs::write(work.join("firn.config"), text)?;
    step::output(make(&work).arg("tinyconfig"))?;
    step::output(
        Command::new("scripts/kconfig/merge_config.sh")
            .args(["-m", ".config", "firn.config"])
            .current_dir(&work),
    )?;
    step::output(make(&work).arg("olddefconfig"))?;
    let config = fs::read_to_string(work.join(".config"))?;
    check(fragment, &config)?;
    let jobs = format!("-j{cpus}");
    step::run_counting(
        "compiling the guest kernel",
        make(&work).args([&jobs, "vmlinux", "bzImage"]),
        |line| line.starts_with("  "),
        LINES,
    )?;
    let vmlinux = to.join("vmlinux");
    step::output(Command::new("strip").arg("-o").arg(&vmlinux).arg(work.join("vmlinux")))?;
    fs::copy(work.join("arch/x86/boot/bzImage"), to.join("bzImage"))?;
    fs::write(to.join("config"), &config)?;
    let build = Build {
        release: step::output(make(&work).args(["-s", "kernelrelease"]))?.trim().to_owned(),
        source,
        compiler,
        symbols: config
            .lines()
            .filter(|line| line.starts_with("CONFIG_") && line.ends_with("=y"))
            .count(),
        vmlinux_bytes: fs::metadata(&vmlinux)?.len(),
        bzimage_bytes: fs::metadata(to.join("bzImage"))?.len(),
        seconds: started.elapsed().as_secs_f64(),
        cpus,
    };
    fs::write(to.join("build.json"), serde_json::to_vec_pretty(&build)?)?;
    scratch::remove_one(&work);
    step::say(&format!("guest kernel {}", summary(&build)));
    Ok(())
}

/// One line about a build.
fn summary(build: &Build) -> String {
    format!(
        "{}: {} symbols, vmlinux {:.1} MB, bzImage {:.1} MB, built in {} on {} CPUs",
        build.release,
        build.symbols,
        build.vmlinux_bytes as f64 / 1e6,
        build.bzimage_bytes as f64 / 1e6,
        step::time(std::time::Duration::from_secs_f64(build.seconds)),
        build.cpus
    )
}

fn make(work: &Path) -> Command {
    let mut make = Command::new("make");
    make.current_dir(work)
        .env("KBUILD_BUILD_TIMESTAMP", "2026-01-01")
        .env("KBUILD_BUILD_USER", "firn")
        .env("KBUILD_BUILD_HOST", "firn")
        .env("KBUILD_BUILD_VERSION", "1")
        .env("LC_ALL", "C")
        // Flags of a `make` around us are not for this one.
        .env_remove("MAKEFLAGS")
        .env_remove("MAKELEVEL");
    make
}

/// The symbols of a fragment and their values; `n` for those that it switches off.
fn parse(text: &str) -> Result<BTreeMap<String, String>> {
    let mut symbols = BTreeMap::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let Some((symbol, value)) = line.split_once('=') else {
            bail!("line {}: `{line}` is no CONFIG_X=value", number + 1);
        };
        if !symbol.starts_with("CONFIG_") {
            bail!("line {}: `{symbol}` is no symbol", number + 1);
        }
        if symbols.insert(symbol.to_owned(), value.to_owned()).is_some() {
            bail!("line {}: {symbol} is there twice", number + 1);
        }
    }
    Ok(symbols)
}

/// Kconfig drops in silence what it can't satisfy: every symbol must have got its value.
fn check(fragment: &BTreeMap<String, String>, config: &str) -> Result<()> {
    let actual: BTreeMap<&str, &str> =
        config.lines().filter_map(|line| line.split_once('=')).collect();
    let wrong: Vec<String> = fragment
        .iter()
        .filter_map(|(symbol, wanted)| {
            let got = actual.get(symbol.as_str()).copied().unwrap_or("n");
            (got != wanted).then(|| format!("{symbol}: asked for {wanted}, got {got}"))
        })
        .collect();
    if wrong.is_empty() {
        return Ok(());
    }
    bail!(
        "Kconfig did not take these symbols of kernel-config/firn.config (another symbol that they \
         need is off, or one that selects them is on):\n  {}",
        wrong.join("\n  ")
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn symbols_that_were_not_taken_are_named() {
        let fragment = parse("# why\nCONFIG_A=y\n\nCONFIG_B=n\nCONFIG_C=8\n").unwrap();
        check(&fragment, "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=8\n").unwrap();
        let error = check(&fragment, "CONFIG_B=y\nCONFIG_C=4\n").unwrap_err().to_string();
        for text in [
            "CONFIG_A: asked for y, got n",
            "CONFIG_B: asked for n, got y",
            "CONFIG_C: asked for 8, got 4",
        ] {
            assert!(error.contains(text), "{error}");
        }
    }

    #[test]
    fn the_fragment_has_no_line_of_another_kind_and_none_twice() {
        assert!(parse("CONFIG_A=y\nCONFIG_A=n\n").is_err());
        assert!(parse("A=y\n").is_err());
        assert!(parse("CONFIG_A\n").is_err());
        let path = cargo::workspace().join("kernel-config/firn.config");
        parse(&fs::read_to_string(path).unwrap()).unwrap();
    }

    #[test]
    fn every_patch_says_why() {
        let patches = patches().unwrap();
        assert!(!patches.is_empty());
        for path in patches {
            let text = fs::read_to_string(&path).unwrap();
            let why = text.split("--- a/").next().unwrap();
            assert!(why.trim().len() > 100, "{} does not say why", path.display());
        }
    }

    #[test]
    fn every_symbol_of_the_fragment_has_its_reason() {
        let path = cargo::workspace().join("kernel-config/firn.config");
        let text = fs::read_to_string(path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        for pair in lines.windows(2) {
            if pair[1].starts_with("CONFIG_") {
                assert!(pair[0].starts_with("# "), "{} has no comment above it", pair[1]);
            }
        }
    }
}
