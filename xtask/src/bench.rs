//! `cargo xtask bench`: the benches where their figures mean something. `firn bench run` measures in
//! virtual time in the dev host VM (or on this machine where its KVM is real), once for each seed;
//! `tiny_thaw` runs on this machine's `/dev/kvm` whatever kind it is.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use firn_host_vm_agent::Exec;
use serde_json::Value;

use crate::host_vm::{self, Options, Series};
use crate::lane::{Choice, Lane};
use crate::{artifacts, cargo, functions, packages, scratch, step};

/// Memory of the measured host VM in MiB.
pub const MEMORY_MIB: u32 = 2048;

/// Thaws of a tiny guest: enough for a 99th percentile.
const TINY_THAWS: &str = "200";

/// Thaws of each kind that `cargo bench … filters` makes: the difference is small.
const FILTERED_THAWS: &str = "500";

/// Longest time that the measured host VM may take.
const LIMIT: Duration = Duration::from_secs(7200);

/// Measure with the research harness, and report: summary, CSV and an HTML page.
///
/// `firn bench run --help` explains the arguments after `--`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Seeds of the measured host VM; figures move by some percent between them.
    #[arg(long, default_value = "1", value_delimiter = ',')]
    seed: Vec<u32>,

    /// Where results go; target/bench unless given.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,

    /// Memory of the measured host VM.
    #[arg(long, value_name = "MiB", default_value_t = MEMORY_MIB)]
    memory: u32,

    #[command(flatten)]
    peers: Peers,

    #[command(flatten)]
    lane: Choice,

    /// Further arguments for `firn bench run`.
    #[arg(last = true)]
    run: Vec<String>,
}

/// What else is measured, and under which conditions.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Peers {
    /// Measure this Firecracker too, side by side. It is no part of Firn: build it yourself, static.
    #[arg(long, value_name = "PROGRAM")]
    pub firecracker: Option<PathBuf>,

    /// Linux that the host VM runs.
    #[arg(long, value_enum, value_name = "SERIES", default_value_t)]
    pub kernel: Series,

    /// Mount the host VM's cgroup v2 without `favordynmods`, as most distributions do.
    #[arg(long)]
    pub plain_cgroups: bool,
}

/// Runs the task.
pub fn run(arguments: &Arguments) -> Result<i32> {
    packages::ensure(&[packages::KERNEL, packages::IMAGES, packages::RUN])?;
    let lane = arguments.lane.decide()?;
    let artifacts = artifacts::build()?;
    let out = match &arguments.out {
        Some(out) => out.clone(),
        None => cargo::target_directory()?.join("bench"),
    };
    fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    let mut results = String::new();
    let archives = functions::archives()?;
    for &seed in seeds(lane, &arguments.seed) {
        let run = Run {
            lane,
            artifacts: &artifacts,
            memory_mib: arguments.memory,
            seed,
            archives: &archives,
            peers: &arguments.peers,
            arguments: &arguments.run,
        };
        results.push_str(&run.measure()?);
    }
    let file = out.join("results.jsonl");
    write(&file, &results)?;
    print!("{}", report(&artifacts, &file, &out)?);
    write(
        &out.join("tiny_thaw.json"),
        &format!("{}\n", tiny_thaw(arguments.peers.firecracker.as_deref())?),
    )?;
    println!("{}", out.join("report.html").display());
    Ok(0)
}

/// `firn bench report`: files in `out`; returns the short table.
pub fn report(artifacts: &Path, results: &Path, out: &Path) -> Result<String> {
    let mut command = Command::new(artifacts.join("bin/firn"));
    step::output(command.args(["bench", "report", "--out"]).arg(out).arg(results))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Real hardware has no seeds: one run.
fn seeds(lane: Lane, seeds: &[u32]) -> &[u32] {
    match lane {
        Lane::HostVm => seeds,
        Lane::Native => seeds.get(..1).unwrap_or_default(),
    }
}

/// One run of `firn bench run`.
pub struct Run<'a> {
    /// Where.
    pub lane: Lane,
    /// The installation.
    pub artifacts: &'a Path,
    /// Memory of the host VM.
    pub memory_mib: u32,
    /// Its seed.
    pub seed: u32,
    /// Functions that need packages.
    pub archives: &'a [(String, PathBuf)],
    /// What else is measured.
    pub peers: &'a Peers,
    /// Further arguments.
    pub arguments: &'a [String],
}

impl Run<'_> {
    /// Runs it and returns its JSON lines.
    pub fn measure(&self) -> Result<String> {
        let mut argv = ["firn", "bench", "run"].map(String::from).to_vec();
        let echo_init = cargo::build_release(&["firn-echo-init"])?.binary("echo-init")?;
        let mut programs = vec![("--echo-init", echo_init)];
        programs.extend(self.peers.firecracker.clone().map(|path| ("--firecracker", path)));
        match self.lane {
            Lane::HostVm => {
                let seed = self.seed;
                step::say(&format!("measuring in virtual time, seed {seed}; this takes minutes …"));
                let cgroups =
                    if self.peers.plain_cgroups { "plain cgroups" } else { "favordynmods" };
                let kernel = self.peers.kernel;
                let rig =
                    format!("dev host VM, Linux {kernel}, virtual time, {cgroups}, seed {seed}");
                let more = ["--artifacts", "/firn", "--patience", "2", "--virtual-time", "--rig"];
                argv.extend(more.map(String::from));
                argv.extend([rig, "--seed".into(), seed.to_string()]);
                argv.extend_from_slice(self.arguments);
                let files = self.archives.iter();
                let files = files.map(|(name, zip)| (zip.clone(), archive_in_vm(name)));
                let mut files: Vec<_> = files.collect();
                argv.extend(["--functions".into(), VM_FUNCTIONS.into()]);
                for (option, program) in programs {
                    let there = format!("/root/{}", option.trim_start_matches('-'));
                    argv.extend([option.into(), there.clone()]);
                    files.push((program, there));
                }
                let options = Options {
                    memory_mib: self.memory_mib,
                    kernel,
                    artifacts: Some(self.artifacts.to_owned()),
                    files,
                    plain_cgroups: self.peers.plain_cgroups,
                    ..Options::default()
                };
                let exec = Exec { argv, cwd: "/root".into(), ..Exec::default() };
                let measured = host_vm::measure(&options, seed, &exec, LIMIT)?;
                let complaint = String::from_utf8_lossy(&measured.stderr);
                ensure!(measured.code == 0, "firn bench run failed: {complaint}");
                Ok(String::from_utf8(measured.stdout)?)
            }
            Lane::Native => {
                step::say("measuring …");
                let mut command = Command::new(self.artifacts.join("bin/firn"));
                command.args(&argv[1..]).arg("--artifacts").arg(self.artifacts);
                command.arg("--state").arg(scratch::directory()?.join("bench"));
                let functions = scratch::directory()?.join("functions");
                fs::create_dir_all(&functions)?;
                for (name, zip) in self.archives {
                    fs::copy(zip, functions.join(format!("{name}.zip")))?;
                }
                command.arg("--functions").arg(functions);
                for (option, program) in programs {
                    command.arg(option).arg(program);
                }
                command.args(["--rig", "this machine's own KVM"]).args(self.arguments);
                step::output(&mut command)
            }
        }
    }
}

/// Where archives of functions lie in the host VM.
const VM_FUNCTIONS: &str = "/root/functions";

fn archive_in_vm(name: &str) -> String {
    format!("{VM_FUNCTIONS}/{name}.zip")
}

/// `cargo bench … tiny_thaw` on this machine's `/dev/kvm`, in turns with a Firecracker if there is one.
pub fn tiny_thaw(firecracker: Option<&Path>) -> Result<Value> {
    step::say("measuring thaws of a tiny guest on this machine's /dev/kvm …");
    let mut arguments = vec![OsString::from(TINY_THAWS)];
    if let Some(program) = firecracker {
        // Cargo runs benches elsewhere.
        arguments.push(std::path::absolute(program)?.into());
    }
    tiny("tiny_thaw", &arguments)?.into_iter().next().context("tiny_thaw printed nothing")
}

/// `cargo bench … filters` on this machine's `/dev/kvm`: one record a kind of VMM.
pub fn filters() -> Result<Vec<Value>> {
    step::say("measuring thaws with and without seccomp filters on this machine's /dev/kvm …");
    tiny("filters", &[OsString::from(FILTERED_THAWS)])
}

/// `cargo bench … tiny_reset` on this machine's `/dev/kvm`: one record a number of pages.
pub fn tiny_reset() -> Result<Vec<Value>> {
    step::say("measuring resets of a tiny guest on this machine's /dev/kvm …");
    tiny("tiny_reset", &[])
}

fn tiny(bench: &str, arguments: &[OsString]) -> Result<Vec<Value>> {
    let mut command = cargo::cargo();
    command.args(["bench", "--quiet", "--package", "firn-vmm", "--bench", bench, "--"]);
    command.args(arguments);
    let text = step::output(&mut command)?;
    let lines = text.lines().filter(|line| line.starts_with('{'));
    let records = lines.map(serde_json::from_str).collect::<Result<Vec<Value>, _>>();
    let records = records.with_context(|| format!("{bench} printed no JSON"))?;
    ensure!(!records.is_empty(), "no figures: is there a /dev/kvm that this user may open?");
    Ok(records)
}
