//! What KVM is here: present, permitted, able, and real.

use std::{collections::BTreeMap, io};

use kvm_bindings as bindings;
use kvm_ioctls::Kvm;

use super::speed::{EMULATED_BELOW, Probe};
use super::{Finding, Severity};

/// The only version that KVM ever had.
const API_VERSION: i32 = 12;

const PATH: &std::ffi::CStr = c"/dev/kvm";

/// A capability that Firn uses, and what is lost without it.
struct Wanted {
    cap: u32,
    name: &'static str,
    /// What it is for.
    purpose: &'static str,
    missing: Severity,
}

/// What Firn can't do without, then what only makes it better.
const WANTED: [Wanted; 22] = [
    required(bindings::KVM_CAP_IRQCHIP, "IRQCHIP", "interrupt controllers in the kernel"),
    required(
        bindings::KVM_CAP_USER_MEMORY,
        "USER_MEMORY",
        "guest memory that is a mapping of ours",
    ),
    required(
        bindings::KVM_CAP_IMMEDIATE_EXIT,
        "IMMEDIATE_EXIT",
        "stopping a vCPU without losing a pending I/O",
    ),
    required(bindings::KVM_CAP_MP_STATE, "MP_STATE", "saving whether a vCPU halts"),
    required(
        bindings::KVM_CAP_VCPU_EVENTS,
        "VCPU_EVENTS",
        "saving pending exceptions and interrupts",
    ),
    required(bindings::KVM_CAP_DEBUGREGS, "DEBUGREGS", "saving debug registers"),
    required(bindings::KVM_CAP_XSAVE, "XSAVE", "saving vector registers"),
    required(bindings::KVM_CAP_XCRS, "XCRS", "saving which of them are on"),
    required(
        bindings::KVM_CAP_ADJUST_CLOCK,
        "ADJUST_CLOCK",
        "a guest clock that goes on from the snapshot",
    ),
    required(
        bindings::KVM_CAP_GET_TSC_KHZ,
        "GET_TSC_KHZ",
        "refusing snapshots of another clock rate",
    ),
    required(bindings::KVM_CAP_IRQFD, "IRQFD", "interrupts from threads that don't own the vCPU"),
    required(
        bindings::KVM_CAP_IOEVENTFD,
        "IOEVENTFD",
        "queue notifications that don't stop the vCPU",
    ),
    wanted(
        bindings::KVM_CAP_KVMCLOCK_CTRL,
        "KVMCLOCK_CTRL",
        "telling the guest that it was paused",
    ),
    wanted(
        bindings::KVM_CAP_TSC_DEADLINE_TIMER,
        "TSC_DEADLINE_TIMER",
        "timers without 200 ms of calibration",
    ),
    useful(
        bindings::KVM_CAP_TSC_CONTROL,
        "TSC_CONTROL",
        "thawing snapshots of hosts with another clock rate",
    ),
    useful(bindings::KVM_CAP_XSAVE2, "XSAVE2", "saving AMX registers"),
    useful(
        bindings::KVM_CAP_BINARY_STATS_FD,
        "BINARY_STATS_FD",
        "counting exits without asking the vCPU",
    ),
    useful(bindings::KVM_CAP_READONLY_MEM, "READONLY_MEM", "memory that the guest may only read"),
    useful(
        bindings::KVM_CAP_X86_USER_SPACE_MSR,
        "X86_USER_SPACE_MSR",
        "seeing each use of an unknown MSR",
    ),
    useful(bindings::KVM_CAP_X86_MSR_FILTER, "X86_MSR_FILTER", "MSRs that guests may not use"),
    useful(bindings::KVM_CAP_PMU_CAPABILITY, "PMU_CAPABILITY", "guests without counters"),
    useful(
        bindings::KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
        "ENFORCE_PV_FEATURE_CPUID",
        "paravirtual features that CPUID names, and no others",
    ),
];

const fn required(cap: u32, name: &'static str, purpose: &'static str) -> Wanted {
    Wanted { cap, name, purpose, missing: Severity::Error }
}

const fn wanted(cap: u32, name: &'static str, purpose: &'static str) -> Wanted {
    Wanted { cap, name, purpose, missing: Severity::Warning }
}

const fn useful(cap: u32, name: &'static str, purpose: &'static str) -> Wanted {
    Wanted { cap, name, purpose, missing: Severity::Note }
}

/// Looks at KVM; stops at the first thing that makes the next one pointless.
pub fn examine() -> Vec<Finding> {
    let kvm = match Kvm::new_with_path(PATH) {
        Ok(kvm) => kvm,
        Err(error) => return vec![cannot_open(&io::Error::from_raw_os_error(error.errno()))],
    };
    let version = kvm.get_api_version();
    if version != API_VERSION {
        let what = format!("/dev/kvm speaks version {version} of its interface, not {API_VERSION}");
        return vec![
            Finding::new("kvm.version", Severity::Error, what, "Firn talks to KVM in version 12.")
                .fix("Run Linux's own KVM, not a replacement of it."),
        ];
    }
    let mut findings = vec![Finding::new(
        "kvm.present",
        Severity::Ok,
        "/dev/kvm is there and may be used",
        "Every function runs in a microVM.",
    )];
    findings.extend(capabilities(&kvm));
    findings.extend(try_a_guest(&kvm));
    findings
}

/// What KVM says of each capability that Firn uses, 0 where it lacks one; `None` without KVM.
pub fn capability_values() -> Option<BTreeMap<&'static str, i32>> {
    let kvm = Kvm::new_with_path(PATH).ok()?;
    let value = |wanted: &Wanted| (wanted.name, kvm.check_extension_raw(wanted.cap.into()));
    Some(WANTED.iter().map(value).collect())
}

fn cannot_open(error: &io::Error) -> Finding {
    let why = "Every function runs in a microVM, and /dev/kvm is how Linux makes them.";
    let finding = |id, what: String| Finding::new(id, Severity::Error, what, why);
    match error.kind() {
        io::ErrorKind::NotFound => finding("kvm.present", "/dev/kvm does not exist".into()).fix(
            "Load the module (`modprobe kvm_intel` or `modprobe kvm_amd`). If that fails: switch \
             virtualization on in the firmware, or, in a virtual machine, allow it nested \
             virtualization.",
        ),
        io::ErrorKind::PermissionDenied => {
            finding("kvm.permitted", "you may not use /dev/kvm".into()).fix(
                "Join the group that owns it, `sudo usermod --append --groups kvm $USER`, and log \
                 in again.",
            )
        }
        _ => finding("kvm.present", format!("/dev/kvm can't be opened: {error}"))
            .fix("Look into the kernel's log (`dmesg | grep kvm`) for what it says."),
    }
}

fn capabilities(kvm: &Kvm) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut present = Vec::new();
    for wanted in &WANTED {
        if kvm.check_extension_raw(wanted.cap.into()) > 0 {
            present.push(wanted.name);
            continue;
        }
        let what = format!("this KVM lacks {} ({})", wanted.name, wanted.purpose);
        let why = match wanted.missing {
            Severity::Error => "Firn can't run, save or restore a microVM without it.",
            Severity::Warning => "Firn works without it, but guests may stall.",
            _ => "Firn does without it.",
        };
        let finding = Finding::new("kvm.capability", wanted.missing, what, why);
        findings.push(match wanted.missing {
            Severity::Ok | Severity::Note => finding,
            _ => finding.fix("Run a newer kernel, with KVM on Intel VMX or AMD SVM."),
        });
    }
    let what =
        format!("{} of {} capabilities: {}", present.len(), WANTED.len(), present.join(", "));
    findings.insert(0, Finding::new("kvm.capabilities", Severity::Ok, what, "Firn uses them."));
    findings
}

/// What only a microVM can tell.
fn try_a_guest(kvm: &Kvm) -> Vec<Finding> {
    let probe = Probe::new(kvm).map(|mut probe| (probe.instructions_per_second(), probe));
    match probe {
        Err(error) => vec![broken(&error.to_string())],
        Ok((Err(error), _)) => vec![broken(&error.to_string())],
        Ok((Ok(speed), probe)) => vec![speed_finding(speed), tsc_offset_finding(&probe)],
    }
}

fn broken(error: &str) -> Finding {
    let why = "If a guest of one page can't run, Linux can't.";
    Finding::new("kvm.guest", Severity::Error, format!("a tiny guest failed: {error}"), why)
        .fix("Look into the kernel's log (`dmesg | grep kvm`) for what it says.")
}

fn speed_finding(speed: f64) -> Finding {
    let millions = speed / 1e6;
    if speed >= EMULATED_BELOW {
        let what = format!("guest kernel code runs on the CPU ({millions:.0} M instructions/s)");
        return Finding::new("kvm.speed", Severity::Ok, what, "Linux boots as fast as it can.");
    }
    let what = format!(
        "this KVM emulates guest kernel code, one instruction after the other ({millions:.1} M \
         instructions/s; a CPU runs over 1,000 M)"
    );
    let why = "Linux needs 15 M instructions to start, some of which such an emulator does not \
               know: it stops or takes minutes. Tiny guests run, so tests of the VMM still can.";
    Finding::new("kvm.speed", Severity::Error, what, why).fix(
        "Use a machine with Intel VT-x or AMD-V, bare metal or with nested virtualization. While \
         developing, use the dev host VM.",
    )
}

fn tsc_offset_finding(probe: &Probe) -> Finding {
    let id = "kvm.tsc-offset";
    if probe.has_tsc_offset() {
        let what = "a vCPU's time stamp counter can be offset (VCPU_TSC_CTRL)";
        return Finding::new(id, Severity::Ok, what, "A thawed guest's clocks go on correctly.");
    }
    let what = "this KVM can't offset a vCPU's time stamp counter (VCPU_TSC_CTRL)";
    let why = "Clocks of a thawed guest would jump: it can't be set by writing the counter.";
    Finding::new(id, Severity::Error, what, why).fix("Run Linux 5.16 or newer.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_of_not_having_kvm_says_what_to_do() {
        let missing = cannot_open(&io::Error::from_raw_os_error(libc::ENOENT));
        assert!(
            missing.what.contains("does not exist") && missing.fix.unwrap().contains("modprobe")
        );
        let denied = cannot_open(&io::Error::from_raw_os_error(libc::EACCES));
        assert!(denied.what.contains("may not") && denied.fix.unwrap().contains("usermod"));
        let other = cannot_open(&io::Error::from_raw_os_error(libc::EBUSY));
        assert_eq!(other.severity, Severity::Error);
    }

    #[test]
    fn the_threshold_separates_what_was_measured() {
        // Software KVM; QEMU's emulated SVM at its slowest; hardware.
        assert_eq!(speed_finding(3.2e6).severity, Severity::Error);
        assert_eq!(speed_finding(400e6).severity, Severity::Ok);
        assert_eq!(speed_finding(2_000e6).severity, Severity::Ok);
    }
}
