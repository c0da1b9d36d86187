//! What kind of machine this is: a virtual one, of whom, and whether its clock can be relied on.

use super::{Finding, Severity, read};

/// Looks at everything.
pub fn examine() -> Vec<Finding> {
    let clock = |name: &str| read(&format!("/sys/devices/system/clocksource/clocksource0/{name}"));
    let dmi = |name: &str| read(&format!("/sys/class/dmi/id/{name}"));
    let mut findings = Vec::new();
    findings.extend(hypervisor(
        &read("/proc/cpuinfo"),
        hypervisor_leaf,
        &dmi("sys_vendor"),
        &dmi("product_name"),
    ));
    findings.extend(clock_source(&clock("current_clocksource"), &clock("available_clocksource")));
    findings
}

/// The vendor in the first CPUID leaf of hypervisors.
fn hypervisor_leaf() -> String {
    let leaf = core::arch::x86_64::__cpuid(0x4000_0000);
    let bytes = [leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes).concat();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// `leaf` is asked only where there is a hypervisor; the last two are as DMI has them.
fn hypervisor(
    cpuinfo: &str,
    leaf: impl Fn() -> String,
    vendor: &str,
    product: &str,
) -> Option<Finding> {
    let id = "host.hypervisor";
    let why = "Under a hypervisor each exit of a guest is several exits to that one, and costs several \
               times as much.";
    let mut flags = cpuinfo.lines().filter_map(|line| line.strip_prefix("flags"));
    let flags = flags.next()?;
    if !flags.split_whitespace().any(|flag| flag == "hypervisor") {
        return Some(Finding::new(id, Severity::Ok, "this machine is not a virtual one", why));
    }
    let leaf = leaf();
    let name = match leaf.trim_matches(|c: char| c == '\0' || c == ' ') {
        "KVMKVMKVM" => "KVM",
        "Microsoft Hv" => "Hyper-V",
        "VMwareVMware" => "VMware",
        "XenVMMXenVMM" => "Xen",
        "TCGTCGTCGTCG" => "QEMU's emulation",
        "" => "a hypervisor that does not say its name",
        other => other,
    };
    let what = format!("this machine is a virtual one, under {name}");
    let dmi = [vendor.trim(), product.trim()].join(" ");
    let what = match dmi.trim() {
        "" => what,
        dmi => format!("{what} ({dmi})"),
    };
    let fix = "Where starts have to be fast: ask for a bare-metal instance.";
    Some(Finding::new(id, Severity::Note, what, why).fix(fix))
}

/// The clock source that Linux uses, and those that it could use.
fn clock_source(current: &str, available: &str) -> Option<Finding> {
    let id = "host.clock-source";
    let why = "A guest's clocks are made of the TSC. Where the host does not trust it, clocks of guests \
               may jump or drift, and KVM can't share one clock between vCPUs; reading the time is a \
               system call, or an exit, for the host's programs.";
    let current = current.trim();
    if current.is_empty() {
        return None;
    }
    if current == "tsc" {
        return Some(Finding::new(id, Severity::Ok, "the host's clock is the TSC", why));
    }
    if available.split_whitespace().any(|name| name == "tsc") {
        let what = format!("the host's clock is {current}, though the TSC is stable");
        return Some(Finding::new(id, Severity::Warning, what, why).fix(
            "`echo tsc > /sys/devices/system/clocksource/clocksource0/current_clocksource`, as root; \
             `clocksource=tsc` on the kernel's command line keeps it so.",
        ));
    }
    let what = format!("the host's clock is {current}: Linux has no stable TSC");
    Some(Finding::new(id, Severity::Warning, what, why).fix(
        "`dmesg | grep -i tsc` says why. On hardware: install newer firmware. In a virtual machine: \
         have its hypervisor offer an invariant TSC.",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hypervisor_is_named_with_its_cloud() {
        let flags = "processor\t: 0\nflags\t\t: fpu svm hypervisor\n";
        let named = |leaf: &str, vendor, product| {
            hypervisor(flags, || leaf.to_owned(), vendor, product).unwrap()
        };
        let found = named("KVMKVMKVM\0\0\0", "Amazon EC2\n", "m8i.large\n");
        assert_eq!(found.severity, Severity::Note);
        assert!(found.what.ends_with("under KVM (Amazon EC2 m8i.large)"), "{}", found.what);
        for (leaf, name) in [
            ("Microsoft Hv", "Hyper-V"),
            ("VMwareVMware", "VMware"),
            ("XenVMMXenVMM", "Xen"),
            ("TCGTCGTCGTCG", "QEMU's emulation"),
            ("bhyve bhyve ", "bhyve bhyve"),
            ("\0\0\0\0\0\0\0\0\0\0\0\0", "a hypervisor that does not say its name"),
        ] {
            let what = named(leaf, "", "").what;
            assert!(what.ends_with(&format!("under {name}")), "{what}");
        }
    }

    #[test]
    fn real_machines_have_no_hypervisor() {
        let never = || unreachable!();
        let found = hypervisor("flags : fpu vmx\nvmx flags : x\n", never, "Google", "").unwrap();
        assert_eq!(found.severity, Severity::Ok);
        assert_eq!(hypervisor("", || unreachable!(), "", ""), None);
    }

    #[test]
    fn another_clock_than_the_tsc_is_a_warning() {
        assert_eq!(clock_source("tsc\n", "tsc hpet \n").unwrap().severity, Severity::Ok);
        let chosen = clock_source("kvm-clock\n", "kvm-clock tsc acpi_pm \n").unwrap();
        assert_eq!(chosen.severity, Severity::Warning);
        assert!(chosen.fix.unwrap().contains("echo tsc"));
        let unstable = clock_source("hpet\n", "hpet acpi_pm tsc-early\n").unwrap();
        assert_eq!(unstable.severity, Severity::Warning);
        assert!(unstable.what.contains("hpet") && unstable.fix.unwrap().contains("dmesg"));
        assert_eq!(clock_source("", ""), None);
    }
}
