//! `firn doctor`: can functions run on this machine, and if not, what is to be done?
//!
//! It only looks, unless it is told to [`run`]: it creates and drops a microVM of a few pages and changes nothing. Each
//! [`Finding`] says what is, why it matters and how to mend it. One [`Severity::Error`] means that
//! functions can't run here natively; the rest is advice.
//!
//! | module | looks at |
//! |---|---|
//! | `kvm`, `speed` | whether KVM is there, able and real |
//! | `kvm_settings` | what its parameters offer to guests, and to whom else |
//! | `machine` | whether a hypervisor is below, and the clock |
//! | `host`, `cgroups` | what Firn needs beside it |
//! | `cage` | what the kernel offers the jail |
//! | `command_line`, `cpu`, `leaks` | what one tenant could learn of another |
//! | `daemon` | what a daemon that runs has counted |
//!
//! A check is a function of the text of the files that it is about. A file that can't be read is an
//! empty text: what nobody knows is a note or no finding at all, but never as it should be.

mod cage;
mod cgroups;
mod command_line;
mod cpu;
mod daemon;
mod host;
mod kvm;
mod kvm_settings;
mod leaks;
mod machine;
mod run;
mod speed;

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use serde::Serialize;

use crate::endpoint::Endpoint;

/// Look whether functions can run on this machine, and what to mend if not.
///
/// Exits with 0 if they can, with 1 if they can't.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Print JSON for machines.
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    endpoint: Endpoint,

    /// Run real microVMs and check what Firn promises of them, instead of looking; takes root, and up to two minutes.
    #[arg(long)]
    run: bool,

    /// The installation whose programs run.
    #[arg(long, value_name = "DIR", default_value = "/usr/lib/firn", requires = "run")]
    artifacts: PathBuf,

    /// Run only these checks: boot, thaw, reset, clocks, uniqueness, vcpus-{1,2,6}, memory-{128,512,1024,4096}.
    #[arg(long, value_name = "CHECK", value_delimiter = ',', requires = "run")]
    only: Vec<String>,

    /// Multiplies all time limits: 1 on real hardware, 20 or more under an emulator.
    #[arg(long, default_value_t = 1, requires = "run")]
    patience: u32,
}

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// As it should be.
    Ok,
    /// Worth knowing.
    Note,
    /// Works, but worse than it could.
    Warning,
    /// Functions can't run here.
    Error,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Stable name for machines.
    pub id: &'static str,
    /// How much it matters.
    pub severity: Severity,
    /// What was found.
    pub what: String,
    /// Why that matters.
    pub why: String,
    /// What to do about it; nothing if it is fine.
    pub fix: Option<String>,
}

impl Finding {
    fn new(id: &'static str, severity: Severity, what: impl Into<String>, why: &str) -> Self {
        Self { id, severity, what: what.into(), why: why.to_owned(), fix: None }
    }

    fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }
}

/// Where functions run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Lane {
    /// On this machine's own KVM.
    Native,
    /// In the dev host VM that `cargo xtask` boots.
    HostVm,
}

/// Everything that was found.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Version of this form.
    pub version: u32,
    /// Where functions can run.
    pub lane: Lane,
    /// Whether they can run here without the dev host VM.
    pub ok: bool,
    /// In the order in which things were looked at.
    pub findings: Vec<Finding>,
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> ExitCode {
    if arguments.run {
        return run_guests(arguments);
    }
    let report = examine(&arguments.endpoint.url);
    let text = if arguments.json { json(&report) } else { text(&report) };
    print!("{text}");
    if report.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run_guests(arguments: &Arguments) -> ExitCode {
    let tell = |line: &run::Line| {
        if !arguments.json {
            println!("{}", run::words(line));
        }
    };
    let report = match run::run(&arguments.artifacts, &arguments.only, arguments.patience, tell) {
        Ok(report) => report,
        Err(error) => {
            eprintln!("firn doctor: {error}");
            return ExitCode::FAILURE;
        }
    };
    let text = if arguments.json { json(&report) } else { run::summary(&report) };
    print!("{text}");
    if report.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Looks at everything, also at the daemon there if one answers.
pub fn examine(endpoint: &str) -> Report {
    let parts = [
        kvm::examine,
        kvm_settings::examine,
        machine::examine,
        host::examine,
        cgroups::examine,
        cage::examine,
        command_line::examine,
        cpu::examine,
        leaks::examine,
    ];
    let mut findings: Vec<Finding> = parts.iter().flat_map(|examine| examine()).collect();
    findings.extend(daemon::examine(endpoint));
    let ok = findings.iter().all(|finding| finding.severity < Severity::Error);
    let lane = if ok { Lane::Native } else { Lane::HostVm };
    Report { version: 1, lane, ok, findings }
}

/// The text of a file, empty if it can't be read.
fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn json(report: &impl Serialize) -> String {
    // Strings and numbers only: this can't fail, and if it did, no report is the right answer.
    serde_json::to_string_pretty(report).map_or_else(|_| String::new(), |text| text + "\n")
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    for finding in &report.findings {
        let mark = match finding.severity {
            Severity::Ok => "ok     ",
            Severity::Note => "note   ",
            Severity::Warning => "warning",
            Severity::Error => "ERROR  ",
        };
        let _ = writeln!(text, "{mark}  {}", finding.what);
        if finding.severity > Severity::Ok {
            let _ = writeln!(text, "         why: {}", finding.why);
        }
        if let Some(fix) = &finding.fix {
            let _ = writeln!(text, "         fix: {fix}");
        }
    }
    let verdict = match report.lane {
        Lane::Native => "Functions can run on this machine (lane: native).",
        Lane::HostVm => {
            "Functions can't run on this machine itself. Everything works in the dev host VM, a \
             small server\nunder QEMU that needs no KVM: `cargo xtask demo` and `cargo xtask test` \
             use it by themselves\n(lane: host-vm)."
        }
    };
    let _ = writeln!(text, "\n{verdict}");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(severity: Severity) -> Report {
        let finding = Finding::new("a.b", severity, "the what", "the why").fix("the fix");
        let ok = severity < Severity::Error;
        let lane = if ok { Lane::Native } else { Lane::HostVm };
        Report { version: 1, lane, ok, findings: vec![finding] }
    }

    #[test]
    fn text_says_what_why_and_fix() {
        let text = text(&report(Severity::Error));
        for part in ["ERROR", "the what", "why: the why", "fix: the fix", "lane: host-vm"] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn json_names_lane_and_severity() {
        let value: serde_json::Value =
            serde_json::from_str(&json(&report(Severity::Note))).unwrap();
        assert_eq!(value["lane"], "native");
        assert_eq!(value["ok"], true);
        assert_eq!(value["findings"][0]["severity"], "note");
    }

    #[test]
    fn this_machine_can_be_examined() {
        let report = examine("http://127.0.0.1:1");
        assert!(!report.findings.is_empty());
        assert_eq!(report.ok, report.lane == Lane::Native);
        let mut ids = std::collections::BTreeSet::new();
        for finding in &report.findings {
            // Machines look findings up by name; KVM's capabilities share one.
            assert!(ids.insert(finding.id) || finding.id == "kvm.capability", "{finding:?}");
            assert!(!finding.what.is_empty() && !finding.why.is_empty(), "{finding:?}");
            let optional = finding.id == "kvm.capability" && finding.severity == Severity::Note;
            let wanted = finding.severity > Severity::Ok && !optional;
            assert!(finding.fix.is_some() || !wanted, "{finding:?}");
        }
    }
}
