//! `cargo xtask system-calls`: which entries of the VMM's filters the tests use.
//!
//! Builds with debug assertions can keep a record (`vmm/src/seccomp/trap.rs`): the filter itself says
//! which entry allowed a call. Tiny guests make one on this machine, Linux another in the lane;
//! `vmm/examples/system_calls.rs` reads both.

use std::path::Path;

use anyhow::{Result, ensure};

use crate::host_vm::Series;
use crate::lane::{self, Choice, Site};
use crate::{artifacts, cargo, packages, scratch, step, test};

/// List which system calls that the VMM's filters allow are used by which tests; fails if one is
/// neither used nor says why.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    lane: Choice,
}

/// Names the record to the VMM.
const RECORD: &str = "FIRN_SYSTEM_CALLS";

/// Length of a record.
const RECORD_BYTES: usize = 4096;

/// Runs the task.
pub fn run(arguments: &Arguments) -> Result<i32> {
    packages::ensure(&[packages::RUN, packages::KERNEL, packages::IMAGES])?;
    let record = |name: &str| -> Result<_> {
        let path = scratch::directory()?.join(name);
        std::fs::write(&path, [0; RECORD_BYTES])?;
        Ok(path)
    };
    let (tiny, linux) = (record("tiny")?, record("linux")?);

    let mut command = cargo::cargo();
    command.args(["test", "--package", "firn-vmm"]).env(RECORD, &tiny);
    command.args(["attackers", "msrs", "reset", "tiny_guest"].map(|name| format!("--test={name}")));
    step::run("tiny guests", &mut command)?;

    let lane = arguments.lane.decide()?;
    let artifacts = artifacts::build()?;
    let vmm = cargo::build("dev", &["firn-vmm"])?.binary("firn-vmm")?;
    with_linux(
        &Site::start(lane, Series::default(), lane::DAEMONS, &artifacts)?,
        &artifacts,
        &vmm,
        &linux,
    )?;

    let mut list = cargo::cargo();
    list.args(["run", "--quiet", "--package", "firn-vmm", "--example", "system_calls", "--"]);
    list.arg(format!("tiny={}", tiny.display())).arg(format!("linux={}", linux.display()));
    Ok(list.status()?.code().unwrap_or(1))
}

/// The VMM's tests with Linux, by a VMM that keeps a record.
fn with_linux(site: &Site, artifacts: &Path, vmm: &Path, record: &Path) -> Result<()> {
    let (mut there_vmm, mut there_record) =
        (vmm.display().to_string(), record.display().to_string());
    if let Site::HostVm(vm) = site {
        (there_vmm, there_record) = ("/root/firn-vmm".into(), "/root/system-calls".into());
        vm.client().put(vmm, &there_vmm)?;
        vm.client().put(record, &there_record)?;
    }
    let environment = [("FIRN_VMM", there_vmm.as_str()), (RECORD, &there_record)];
    let outcome = test::linux(site, artifacts, &[], &environment)?;
    ensure!(outcome.success, "the VMM's tests with Linux failed:\n{}", outcome.lines.join("\n"));
    if let Site::HostVm(vm) = site {
        vm.client().get(&there_record, record)?;
    }
    Ok(())
}
