//! What one function could learn of another, or of the host, through the CPU that they share.

use std::{fs, io};

use rustix::thread::{CoreSchedulingScope, core_scheduling_cookie};

use super::{Finding, Severity, read};

const VULNERABILITIES: &str = "/sys/devices/system/cpu/vulnerabilities";

/// Looks at everything.
pub fn examine() -> Vec<Finding> {
    let mut findings = vulnerabilities(&read_vulnerabilities());
    findings.extend(threads(&read("/sys/devices/system/cpu/smt/active")));
    findings.push(core_scheduling(core_cookie()));
    findings
}

/// Names and what the kernel says of each, by name; none if there is no such directory.
fn read_vulnerabilities() -> Vec<(String, String)> {
    let mut found: Vec<_> = fs::read_dir(VULNERABILITIES)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            Some((name, fs::read_to_string(entry.path()).ok()?))
        })
        .collect();
    found.sort();
    found
}

/// What the kernel says of a vulnerability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// This CPU does not have it, or it is mitigated.
    Closed,
    /// Mitigated but for hardware threads that share a core.
    OpenBetweenThreads,
    /// Not, or not fully, mitigated.
    Open,
    /// The kernel can't tell; in a virtual machine often only the host can.
    Unknown,
}

/// A state is a list of clauses, such as `Mitigation: Clear CPU buffers; SMT vulnerable` or
/// `Vulnerable: Safe RET, no microcode`. The worst one counts.
fn verdict(state: &str) -> Verdict {
    let state = state.to_lowercase();
    let mut worst = Verdict::Closed;
    for clause in state.split([';', ',']).map(str::trim) {
        let smt = clause.starts_with("smt ");
        worst = match worst {
            _ if clause.contains("vulnerable") && !smt => return Verdict::Open,
            Verdict::Closed | Verdict::Unknown if clause.contains("vulnerable") => {
                Verdict::OpenBetweenThreads
            }
            Verdict::Closed if clause.contains("unknown") => Verdict::Unknown,
            worst => worst,
        };
    }
    worst
}

fn vulnerabilities(states: &[(String, String)]) -> Vec<Finding> {
    let why = "Where a CPU leaks, a function may read what its neighbours, or the kernel, work on.";
    if states.is_empty() {
        let what = "the kernel does not say in which ways this CPU leaks";
        return vec![
            Finding::new("host.vulnerabilities", Severity::Note, what, why)
                .fix("Run Linux 4.15 or newer, with sysfs mounted on /sys."),
        ];
    }
    // `kvm.nx-huge-pages` speaks of this one: what helps against it is a setting of KVM's.
    let those = |wanted: Verdict| -> Vec<&str> {
        let rest = states.iter().filter(|(name, _)| name != "itlb_multihit");
        rest.filter(|(_, state)| verdict(state) == wanted).map(|(name, _)| name.as_str()).collect()
    };
    let mut findings = Vec::new();
    let mut report = |id, severity, verdict, what: &str, fix: &str| {
        let names = those(verdict);
        if !names.is_empty() {
            let what = format!("{what}: {}", names.join(", "));
            findings.push(Finding::new(id, severity, what, why).fix(fix));
        }
    };
    report(
        "host.vulnerabilities",
        Severity::Warning,
        Verdict::Open,
        "this CPU leaks, and nothing mitigates it",
        "Install the newest kernel and microcode, and boot without options that switch mitigations \
         off. `grep . /sys/devices/system/cpu/vulnerabilities/*` says more.",
    );
    report(
        "host.vulnerabilities-smt",
        Severity::Warning,
        Verdict::OpenBetweenThreads,
        "this CPU leaks between the hardware threads of a core",
        "Switch SMT off: `echo off > /sys/devices/system/cpu/smt/control`, as root.",
    );
    report(
        "host.vulnerabilities-unknown",
        Severity::Note,
        Verdict::Unknown,
        "the kernel can't tell whether this CPU leaks",
        "In a virtual machine only its host knows: ask who runs it.",
    );
    if findings.is_empty() {
        let what = format!("all {} known leaks of CPUs are absent here or mitigated", states.len());
        findings.push(Finding::new("host.vulnerabilities", Severity::Ok, what, why));
    }
    findings
}

/// `active` is 1 where two hardware threads share a core, 0 where none do; kernels that don't know
/// of such CPUs have no such file.
fn threads(active: &str) -> Option<Finding> {
    let id = "host.smt";
    let why = "What runs on one can spy on the other through caches. Core scheduling keeps other \
               functions off it, not the host's kernel.";
    match active.trim() {
        "1" => {
            Some(Finding::new(id, Severity::Note, "two hardware threads share a core", why).fix(
                "For hostile tenants: `echo off > /sys/devices/system/cpu/smt/control`, as root.",
            ))
        }
        "0" => Some(Finding::new(id, Severity::Ok, "no hardware threads share a core", why)),
        _ => None,
    }
}

/// Asks for this thread's core-scheduling cookie.
fn core_cookie() -> io::Result<u64> {
    let thread = rustix::thread::gettid();
    Ok(core_scheduling_cookie(thread, CoreSchedulingScope::Thread)?)
}

fn core_scheduling(cookie: io::Result<u64>) -> Finding {
    let id = "host.core-scheduling";
    let why = "Each VMM has a cookie by which it keeps others off its core's other threads.";
    let ok = |what| Finding::new(id, Severity::Ok, what, why);
    match cookie {
        Ok(_) => ok("the kernel can keep strangers off one core (core scheduling)"),
        // What a kernel that could do it says where there is nothing to do.
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {
            ok("core scheduling is not needed: no hardware threads share a core")
        }
        Err(_) => {
            let what = "this kernel has no core scheduling";
            Finding::new(id, Severity::Note, what, why).fix(
                "Where hardware threads share cores: run a kernel with CONFIG_SCHED_CORE, 5.14 or \
                 newer, or switch SMT off.",
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_judged_by_their_worst_clause() {
        use Verdict::{Closed, Open, OpenBetweenThreads, Unknown};
        for (state, expected) in [
            ("Not affected\n", Closed),
            ("Mitigation: PTI\n", Closed),
            ("Mitigation: Clear CPU buffers; SMT mitigated\n", Closed),
            ("Mitigation: Clear CPU buffers; SMT vulnerable\n", OpenBetweenThreads),
            ("Mitigation: PTE Inversion; VMX: cache flushes, SMT vulnerable\n", OpenBetweenThreads),
            ("Mitigation: PTE Inversion; VMX: vulnerable\n", Open),
            ("Mitigation: Clear CPU buffers; SMT Host state unknown\n", Unknown),
            ("Vulnerable: Clear CPU buffers attempted, no microcode; SMT vulnerable\n", Open),
            ("Vulnerable\n", Open),
            ("Mitigation: Retpolines; STIBP: disabled; PBRSB-eIBRS: Not affected\n", Closed),
            ("Mitigation: Enhanced / Automatic IBRS; BHI: Vulnerable\n", Open),
            ("Unknown: Dependent on hypervisor status\n", Unknown),
        ] {
            assert_eq!(verdict(state), expected, "{state}");
        }
    }

    #[test]
    fn vulnerabilities_are_named_by_what_helps_against_them() {
        let states = |list: &[(&str, &str)]| -> Vec<_> {
            list.iter().map(|&(name, state)| (name.to_owned(), state.to_owned())).collect()
        };
        let found = vulnerabilities(&states(&[
            ("itlb_multihit", "KVM: Vulnerable"),
            ("mds", "Mitigation: Clear CPU buffers; SMT vulnerable"),
            ("retbleed", "Vulnerable"),
            ("srbds", "Unknown: Dependent on hypervisor status"),
            ("tsa", "Vulnerable: No microcode"),
        ]));
        let ids: Vec<_> = found.iter().map(|finding| finding.id).collect();
        assert_eq!(
            ids,
            ["host.vulnerabilities", "host.vulnerabilities-smt", "host.vulnerabilities-unknown"]
        );
        assert!(found[0].what.ends_with(": retbleed, tsa"), "{}", found[0].what);
        assert!(found[1].what.ends_with(": mds"));
        let good = vulnerabilities(&states(&[("mds", "Not affected")]));
        assert_eq!(good[0].severity, Severity::Ok);
        let silent = vulnerabilities(&[]);
        assert_eq!(silent[0].severity, Severity::Note);
    }

    #[test]
    fn threads_that_share_a_core_are_found() {
        assert_eq!(threads("1\n").unwrap().severity, Severity::Note);
        assert_eq!(threads("0\n").unwrap().severity, Severity::Ok);
        assert_eq!(threads(""), None);
    }

    #[test]
    fn the_absence_of_core_scheduling_is_a_note() {
        let severity = |number| core_scheduling(Err(io::Error::from_raw_os_error(number))).severity;
        assert_eq!(core_scheduling(Ok(0)).severity, Severity::Ok);
        assert_eq!(severity(libc::ENODEV), Severity::Ok);
        assert_eq!(severity(libc::EINVAL), Severity::Note);
    }
}
