//! Where functions run: on this machine's own KVM, or in the dev host VM.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::{cargo, step};

/// A lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Lane {
    /// This machine's own KVM.
    Native,
    /// The dev host VM: QEMU, emulated, for machines without a usable KVM.
    HostVm,
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
        let doctor = cargo::build_release(&["firn-cli"])?.binary("firn")?;
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
