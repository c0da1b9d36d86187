//! Where functions run: on this machine's own KVM, or in the dev host VM.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::host_vm::{HostVm, Options, Series};
use crate::step::Outcome;
use crate::{artifacts, daemon, step};

/// CPUs and memory of a host VM.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    /// CPUs.
    pub cpus: u8,
    /// Memory in MiB.
    pub memory_mib: u32,
}

/// For a daemon and a handful of small functions. Two CPUs show races that one hides.
pub const DAEMONS: Machine = Machine { cpus: 2, memory_mib: 3072 };

/// The same for nightly tests: two functions of 3,008 MB, or one guest of 4,096 MiB, fill their memory.
pub const NIGHTLY_DAEMONS: Machine = Machine { memory_mib: 8192, ..DAEMONS };

/// More would wait for each other.
const MOST_HOST_VMS: usize = 4;

/// A lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Lane {
    /// This machine's own KVM.
    Native,
    /// The dev host VM: QEMU, emulated, for machines without a usable KVM.
    HostVm,
}

/// How many such host VMs this machine has CPUs and memory for.
pub fn host_vms(machine: Machine) -> usize {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = meminfo.lines().find_map(|line| {
        line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB")?.parse::<usize>().ok()
    });
    let fit = available.map_or(1, |kib| (kib >> 10) / machine.memory_mib as usize);
    cpus.min(fit).clamp(1, MOST_HOST_VMS)
}

/// Where programs of Firn run in a lane.
pub enum Site {
    /// Here.
    Native,
    /// In a host VM, with the artifacts as `/firn`.
    HostVm(HostVm),
}

impl Site {
    /// Prepares it: boots such a host VM with this Linux, forwarding the ports of daemons, with a way to
    /// one port of this machine.
    pub fn start(lane: Lane, kernel: Series, machine: Machine, artifacts: &Path) -> Result<Self> {
        match lane {
            Lane::Native => {
                ensure!(
                    rustix::process::geteuid().is_root(),
                    "the jail of a microVM takes root to set up: run this with sudo, or with \
                     `--lane host-vm`, which needs no rights"
                );
                Ok(Self::Native)
            }
            Lane::HostVm => {
                step::say(&format!("booting the dev host VM with Linux {kernel} …"));
                let options = Options {
                    memory_mib: machine.memory_mib,
                    kernel,
                    cpus: machine.cpus,
                    artifacts: Some(artifacts.to_owned()),
                    forward: daemon::PORTS.to_vec(),
                    outside: true,
                    ..Options::default()
                };
                HostVm::start(&options).map(Self::HostVm)
            }
        }
    }

    /// Runs a program of this machine there, with these variables in its environment and for so long at most, and
    /// shows progress by counting lines.
    pub fn watch(
        &self,
        what: &str,
        program: &Path,
        arguments: &[&str],
        environment: &[(&str, String)],
        counts: impl Fn(&str) -> bool + Send + 'static,
        limit: Duration,
    ) -> Result<Outcome> {
        let Self::HostVm(vm) = self else {
            let environment = environment.iter().map(|(name, value)| (*name, value.as_str()));
            let mut command = Command::new(program);
            command.args(arguments).envs(environment);
            return step::watch_for(what, &mut command, counts, 0, limit);
        };
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["host-vm", "--at", &vm.client().address().to_string(), "--here"]);
        for (name, value) in environment {
            command.arg("--env").arg(format!("{name}={value}"));
        }
        command.arg("--").arg(program).args(arguments);
        step::watch_for(what, &mut command, counts, 0, limit)
    }

    /// A command that runs another command there, for the tests.
    pub fn runner(&self) -> Result<Vec<String>> {
        let Self::HostVm(vm) = self else { return Ok(vec!["env".into()]) };
        let program = std::env::current_exe()?;
        let program = program.to_str().context("the path of xtask is not UTF-8")?;
        let agent = vm.client().address().to_string();
        Ok([program, "host-vm", "--at", &agent, "--"].map(String::from).to_vec())
    }
}

/// Lets a person choose; also as the variable FIRN_LANE.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Choice {
    /// Where functions run; `firn doctor` decides otherwise.
    #[arg(long, value_enum)]
    lane: Option<Lane>,
}

#[derive(Deserialize)]
struct Report {
    lane: String,
    findings: Vec<Finding>,
}

#[derive(Deserialize)]
struct Finding {
    severity: String,
    what: String,
}

impl Choice {
    /// The lane that was chosen, or the one that `firn doctor` names.
    pub fn decide(&self) -> Result<Lane> {
        if let Some(lane) = self.lane {
            return Ok(lane);
        }
        if let Some(name) = std::env::var_os("FIRN_LANE") {
            return match name.to_str() {
                Some("native") => Ok(Lane::Native),
                Some("host-vm") => Ok(Lane::HostVm),
                _ => bail!("FIRN_LANE is {name:?}; it must be native or host-vm"),
            };
        }
        let doctor = artifacts::programs()?.binary("firn")?;
        // Its exit code says the same as its report.
        let output = Command::new(&doctor)
            .args(["doctor", "--json"])
            .stderr(Stdio::inherit())
            .output()
            .context("cannot run firn doctor")?;
        let report: Report = serde_json::from_slice(&output.stdout)
            .context("firn doctor did not print what it should")?;
        if report.lane == "native" {
            step::say("functions run on this machine's own KVM (lane: native)");
            return Ok(Lane::Native);
        }
        let reason = report.findings.iter().find(|finding| finding.severity == "error");
        let reason = reason.map_or("firn doctor says why", |finding| finding.what.as_str());
        step::say(&format!("functions run in the dev host VM: {reason} (lane: host-vm)"));
        Ok(Lane::HostVm)
    }
}
