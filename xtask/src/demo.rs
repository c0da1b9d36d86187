//! `cargo xtask demo`: the main job, end to end, with a real client.
//!
//! Builds what is missing, starts the daemon, and lets `demo/demo.py` do with boto3 what any user
//! of Lambda would: deploy `examples/hello-python` and invoke it from boot, thawed and warm.

use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::daemon::{Daemon, Settings};
use crate::host_vm::Series;
use crate::lane::{self, Choice, Site};
use crate::{artifacts, cargo, packages, python, scratch, step};

/// The real clients, pinned.
pub const REQUIREMENTS: &str = include_str!("../clients/requirements.txt");

/// What Lambda's clients must be told; any value does.
pub const CREDENTIALS: [(&str, &str); 3] = [
    ("AWS_ACCESS_KEY_ID", "firn"),
    ("AWS_SECRET_ACCESS_KEY", "firn"),
    ("AWS_DEFAULT_REGION", "us-east-1"),
];

/// Deploy a Python function and invoke it: from boot, thawed from a snapshot, and warm.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Leave it running until Ctrl-C, and print how to call it.
    #[arg(long)]
    keep: bool,

    #[command(flatten)]
    lane: Choice,
}

/// Runs the task.
pub fn run(arguments: &Arguments) -> Result<i32> {
    let started = Instant::now();
    packages::ensure(&[packages::KERNEL, packages::IMAGES, packages::CLIENTS, packages::RUN])?;
    let lane = arguments.lane.decide()?;
    let artifacts = artifacts::build()?;
    let environment = python::environment("the clients", REQUIREMENTS)?;
    let site = Site::start(lane, Series::default(), lane::DAEMONS, &artifacts)?;
    let daemon = Daemon::start(site, &artifacts, &Settings::default())?;

    let workspace = cargo::workspace();
    let mut client = Command::new(environment.join("bin/python"));
    client.arg(workspace.join("xtask/demo/demo.py"));
    client.arg("--endpoint").arg(daemon.endpoint());
    client.arg("--function").arg(workspace.join("examples/hello-python"));
    if arguments.keep {
        client.arg("--keep");
    }
    client.envs(CREDENTIALS).env("PYTHONDONTWRITEBYTECODE", "1");
    let status = step::die_with_us(&mut client).status().context("cannot run Python")?;
    if !status.success() {
        bail!("the demo failed; the daemon's log:\n{}", daemon.log());
    }
    if arguments.keep {
        let variables = CREDENTIALS.map(|(name, value)| format!("{name}={value}")).join(" ");
        let endpoint = daemon.endpoint();
        let aws = environment.join("bin/aws");
        println!("\nFirn stays at {endpoint} until you press Ctrl-C here. From another shell:\n");
        println!(
            "  curl --data '{{\"name\": \"you\"}}' {endpoint}/2015-03-31/functions/hello/invocations\n"
        );
        println!(
            "  {variables} {} lambda invoke --endpoint-url {endpoint} --function-name hello \
             --payload '{{\"name\": \"you\"}}' /dev/stdout\n",
            aws.display()
        );
        scratch::wait_for_signal();
        println!();
    }
    daemon.stop()?;
    step::say(&format!(
        "done in {}; the daemon has stopped and left nothing behind",
        step::time(started.elapsed())
    ));
    Ok(0)
}
