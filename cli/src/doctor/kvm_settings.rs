//! How KVM is set up: what its parameters offer to guests, and who else may use it.

use std::{fs, os::unix::fs::PermissionsExt};

use super::{Finding, Severity, read};

/// Longest time for which KVM spins by default.
const USUAL_POLLING_NS: u64 = 200_000;

/// Looks at everything.
pub fn examine() -> Vec<Finding> {
    let parameter =
        |module: &str, name: &str| read(&format!("/sys/module/{module}/parameters/{name}"));
    let mode = fs::metadata("/dev/kvm").map(|metadata| metadata.permissions().mode());
    let multihit = read("/sys/devices/system/cpu/vulnerabilities/itlb_multihit");
    let mut findings = Vec::new();
    findings.extend(mode.ok().map(users));
    findings.extend(nested(&[
        ("kvm_intel", &parameter("kvm_intel", "nested")),
        ("kvm_amd", &parameter("kvm_amd", "nested")),
    ]));
    for (module, paging, apic) in [("kvm_intel", "ept", "enable_apicv"), ("kvm_amd", "npt", "avic")]
    {
        findings.extend(nested_paging(module, paging, &parameter(module, paging)));
        findings.extend(virtual_apic(module, apic, &parameter(module, apic)));
    }
    findings.extend(nx_huge_pages(&parameter("kvm", "nx_huge_pages"), &multihit));
    findings.extend(polling(&parameter("kvm", "halt_poll_ns")));
    findings
}

/// `mode` is that of `/dev/kvm`.
fn users(mode: u32) -> Finding {
    let id = "kvm.users";
    let why = "KVM is part of the kernel: whoever may make a VM may attack it. Firn needs it as root \
               only.";
    if mode & 0o006 == 0 {
        let what = format!("only root and a group may use /dev/kvm (mode {:o})", mode & 0o777);
        return Finding::new(id, Severity::Ok, what, why);
    }
    let what = format!("every user may use /dev/kvm (mode {:o})", mode & 0o777);
    Finding::new(id, Severity::Note, what, why)
        .fix("For hostile tenants: `chmod 660 /dev/kvm`, and a udev rule that keeps it so.")
}

/// Whether a parameter of a module is on; `None` where the module is not loaded.
fn is_on(value: &str) -> Option<bool> {
    let value = value.trim();
    (!value.is_empty()).then(|| ["Y", "1"].contains(&value))
}

/// Modules and what they say of nested virtualization; empty where one is not loaded.
fn nested(modules: &[(&str, &str)]) -> Option<Finding> {
    let id = "kvm.nested";
    let why = "Emulating VMX and SVM is a large part of KVM, in which guests have found ways out before. \
               Firn's guests are given neither; off, nobody's are.";
    let mut loaded = modules.iter().filter(|(_, value)| !value.is_empty()).peekable();
    loaded.peek()?;
    let Some((module, _)) = loaded.find(|(_, value)| is_on(value) == Some(true)) else {
        let what = "KVM lets no guest run guests of its own";
        return Some(Finding::new(id, Severity::Ok, what, why));
    };
    let what = "KVM would let guests run guests of their own (nested virtualization)";
    let fix = format!(
        "`echo options {module} nested=0 > /etc/modprobe.d/firn.conf`, as root, and load {module} \
         anew."
    );
    Some(Finding::new(id, Severity::Warning, what, why).fix(fix))
}

/// `parameter` switches on that the CPU walks the page tables of guest and host itself.
fn nested_paging(module: &str, parameter: &str, value: &str) -> Option<Finding> {
    let id = "kvm.nested-paging";
    let why = "Without it KVM keeps a shadow of each guest's page tables: page faults and changes of \
               the guest's tables are exits, and functions are several times as slow.";
    Some(if is_on(value)? {
        let what = format!("the CPU translates guests' memory itself ({parameter})");
        Finding::new(id, Severity::Ok, what, why)
    } else {
        let what = format!("KVM keeps shadow page tables: {parameter} of {module} is off");
        Finding::new(id, Severity::Warning, what, why).fix(format!(
            "Load {module} with {parameter}=1. If it stays off, the CPU or the hypervisor below does \
             not have it: use another machine."
        ))
    })
}

/// `parameter` switches on that the CPU has a part of the guest's APIC.
fn virtual_apic(module: &str, parameter: &str, value: &str) -> Option<Finding> {
    let id = "kvm.virtual-apic";
    let why = "With it many interrupts reach a guest, and are acknowledged, without an exit.";
    Some(if is_on(value)? {
        let what = format!("the CPU delivers guests' interrupts ({parameter})");
        Finding::new(id, Severity::Ok, what, why)
    } else {
        let what = format!("KVM delivers guests' interrupts: {parameter} of {module} is off");
        Finding::new(id, Severity::Note, what, why).fix(format!(
            "Functions run without it. Where the CPU has it: load {module} with {parameter}=1."
        ))
    })
}

/// `multihit` says whether this CPU can be stopped by a guest that changes the size of a page from
/// which it executes.
fn nx_huge_pages(setting: &str, multihit: &str) -> Option<Finding> {
    let id = "kvm.nx-huge-pages";
    let setting = setting.trim();
    let on = match setting {
        "" => return None,
        "Y" | "1" | "auto" | "force" => true,
        _ => false,
    };
    let absent = multihit.trim() == "Not affected";
    let why_on = "A guest can stop this CPU, and the host with it, by changing the size of a page from \
                  which it executes (iTLB multihit).";
    Some(match (on, absent) {
        (true, false) => {
            let what = "guests execute from small pages only, as this CPU needs (nx_huge_pages)";
            Finding::new(id, Severity::Ok, what, why_on)
        }
        (false, true) => {
            let what = "guests execute from large pages (nx_huge_pages), which this CPU allows";
            Finding::new(id, Severity::Ok, what, "Fewer page faults.")
        }
        (true, true) => {
            let what = "guests execute from small pages only (nx_huge_pages), which this CPU does \
                        not need";
            let why = "Each page of code costs a fault that a large page would save.";
            Finding::new(id, Severity::Note, what, why).fix(
                "Load KVM with `nx_huge_pages=never`: `options kvm nx_huge_pages=never` in \
                      /etc/modprobe.d/firn.conf.",
            )
        }
        (false, false) if multihit.trim().is_empty() => {
            let what = "guests execute from large pages (nx_huge_pages), and the kernel does not say \
                        whether this CPU allows that";
            Finding::new(id, Severity::Note, what, why_on)
                .fix("Run a newer kernel, with sysfs mounted on /sys.")
        }
        (false, false) => {
            let what =
                "guests execute from large pages (nx_huge_pages), which this CPU does not bear";
            Finding::new(id, Severity::Warning, what, why_on).fix(
                "`echo auto > /sys/module/kvm/parameters/nx_huge_pages`, as root; if it says \
                      `never`, load KVM with `nx_huge_pages=auto`.",
            )
        }
    })
}

/// How long KVM spins when a vCPU halts.
fn polling(nanoseconds: &str) -> Option<Finding> {
    let id = "kvm.halt-polling";
    let limit: u64 = nanoseconds.trim().parse().ok()?;
    let what = format!("a vCPU that halts spins for up to {} µs", limit / 1000);
    let why = "The time counts against its function's share of the CPU.";
    if limit <= USUAL_POLLING_NS {
        return Some(Finding::new(id, Severity::Ok, what, why));
    }
    let fix =
        format!("`echo {USUAL_POLLING_NS} > /sys/module/kvm/parameters/halt_poll_ns`, as root.");
    Some(Finding::new(id, Severity::Note, what, why).fix(fix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everybodys_kvm_is_a_note() {
        assert_eq!(users(0o020_660).severity, Severity::Ok);
        assert_eq!(users(0o020_600).severity, Severity::Ok);
        let open = users(0o020_666);
        assert!(open.severity == Severity::Note && open.what.contains("666"));
    }

    #[test]
    fn nested_virtualization_names_its_module() {
        let found = nested(&[("kvm_intel", ""), ("kvm_amd", "1\n")]).unwrap();
        assert_eq!(found.severity, Severity::Warning);
        assert!(found.fix.unwrap().contains("options kvm_amd nested=0"));
        assert_eq!(
            nested(&[("kvm_intel", "Y\n"), ("kvm_amd", "")]).unwrap().severity,
            Severity::Warning
        );
        assert_eq!(
            nested(&[("kvm_intel", "N\n"), ("kvm_amd", "")]).unwrap().severity,
            Severity::Ok
        );
        assert_eq!(nested(&[("kvm_intel", ""), ("kvm_amd", "")]), None);
    }

    #[test]
    fn shadow_page_tables_are_a_warning_and_an_emulated_apic_is_a_note() {
        for (value, paging, apic) in [
            ("Y\n", Severity::Ok, Severity::Ok),
            ("1\n", Severity::Ok, Severity::Ok),
            ("N\n", Severity::Warning, Severity::Note),
            ("0\n", Severity::Warning, Severity::Note),
        ] {
            let found = nested_paging("kvm_amd", "npt", value).unwrap();
            assert_eq!(found.severity, paging, "{value}");
            assert!(found.what.contains("npt"), "{found:?}");
            assert_eq!(virtual_apic("kvm_intel", "enable_apicv", value).unwrap().severity, apic);
        }
        assert!(nested_paging("kvm_intel", "ept", "N").unwrap().fix.unwrap().contains("kvm_intel"));
        assert_eq!(nested_paging("kvm_intel", "ept", ""), None);
        assert_eq!(virtual_apic("kvm_amd", "avic", ""), None);
    }

    #[test]
    fn large_pages_of_code_are_right_where_the_cpu_bears_them() {
        let severity = |setting, multihit| nx_huge_pages(setting, multihit).map(|f| f.severity);
        let (absent, there) = ("Not affected\n", "KVM: Vulnerable\n");
        assert_eq!(severity("N\n", absent), Some(Severity::Ok));
        assert_eq!(severity("never\n", absent), Some(Severity::Ok));
        assert_eq!(severity("Y\n", absent), Some(Severity::Note));
        assert_eq!(severity("Y\n", "KVM: Mitigation: Split huge pages\n"), Some(Severity::Ok));
        assert_eq!(severity("N\n", there), Some(Severity::Warning));
        assert_eq!(severity("never\n", there), Some(Severity::Warning));
        assert_eq!(severity("N\n", ""), Some(Severity::Note));
        assert_eq!(severity("", there), None);
    }

    #[test]
    fn long_polling_is_noted() {
        let severity = |text| polling(text).map(|finding| finding.severity);
        assert_eq!(severity("200000\n"), Some(Severity::Ok));
        assert_eq!(severity("0\n"), Some(Severity::Ok));
        assert_eq!(severity("10000000\n"), Some(Severity::Note));
        assert_eq!(severity(""), None);
    }
}
