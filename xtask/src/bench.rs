//! `cargo xtask bench`: the benches where their figures mean something. `firn bench` runs in virtual
//! time in the dev host VM (or on this machine where its KVM is real), `tiny_thaw` on this
//! machine's `/dev/kvm` whatever kind it is.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use firn_host_vm_agent::Exec;
use serde_json::{Value, json};

use crate::host_vm::{self, Options};
use crate::lane::{Choice, Lane};
use crate::{artifacts, cargo, packages, scratch, step};

/// Memory of the measured host VM in MiB.
const MEMORY_MIB: u32 = 2048;

/// Longest time that the measured host VM may take.
const LIMIT: Duration = Duration::from_secs(1800);

/// Measure starts, and print what was measured as JSON.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Rounds of boot, thaw and warm, interleaved.
    #[arg(long, default_value_t = 5)]
    iterations: u32,

    /// Seeds of the measured host VM; figures move by some percent between them.
    #[arg(long, default_value = "1", value_delimiter = ',')]
    seed: Vec<u32>,

    #[command(flatten)]
    lane: Choice,
}

/// Runs the task.
pub fn run(arguments: &Arguments) -> Result<i32> {
    packages::ensure(&[packages::KERNEL, packages::IMAGES, packages::RUN])?;
    let lane = arguments.lane.decide()?;
    let artifacts = artifacts::build()?;
    let runs = arguments
        .seed
        .iter()
        .map(|&seed| starts(lane, &artifacts, arguments.iterations, seed))
        .collect::<Result<Vec<_>>>()?;
    println!("{:#}", json!({ "starts": runs, "tiny_thaw": tiny_thaw()? }));
    Ok(0)
}

/// `firn bench`: boot, thaw and warm of a Python function.
pub fn starts(lane: Lane, artifacts: &Path, iterations: u32, seed: u32) -> Result<Value> {
    let iterations = iterations.to_string();
    let mut argv: Vec<String> =
        ["firn", "bench", "--iterations", &iterations].map(String::from).to_vec();
    let text = match lane {
        Lane::HostVm => {
            step::say("measuring starts in virtual time; this takes a minute …");
            let more = ["--artifacts", "/firn", "--patience", "20"];
            argv.extend(more.map(String::from));
            let options = Options {
                memory_mib: MEMORY_MIB,
                artifacts: Some(artifacts.to_owned()),
                ..Options::default()
            };
            let exec = Exec { argv, cwd: "/root".into(), ..Exec::default() };
            let measured = host_vm::measure(&options, seed, &exec, LIMIT)?;
            let complaint = String::from_utf8_lossy(&measured.stderr);
            ensure!(measured.code == 0, "firn bench failed: {complaint}");
            String::from_utf8(measured.stdout)?
        }
        Lane::Native => {
            step::say("measuring starts …");
            let mut command = Command::new(artifacts.join("bin/firn"));
            command.args(&argv[1..]).arg("--artifacts").arg(artifacts);
            command.arg("--state").arg(scratch::directory()?.join("bench"));
            step::output(&mut command)?
        }
    };
    let mut value: Value = serde_json::from_str(&text).context("firn bench printed no JSON")?;
    value["rig"] = match lane {
        Lane::HostVm => json!(format!("dev host VM, virtual time, favordynmods, seed {seed}")),
        Lane::Native => json!("this machine's own KVM"),
    };
    Ok(value)
}

/// `cargo bench … tiny_thaw` on this machine's `/dev/kvm`.
pub fn tiny_thaw() -> Result<Value> {
    step::say("measuring thaws of a tiny guest on this machine's /dev/kvm …");
    let mut command = cargo::cargo();
    command.args(["bench", "--quiet", "--package", "firn-vmm", "--bench", "tiny_thaw"]);
    let text = step::output(&mut command)?;
    let line = text
        .lines()
        .find(|line| line.starts_with('{'))
        .context("no figures: is there a /dev/kvm that this user may open?")?;
    serde_json::from_str(line).context("tiny_thaw printed no JSON")
}
