//! What the kernel was told at boot that takes protections away.

use super::{Finding, Severity, read};

/// Looks at everything.
pub fn examine() -> Vec<Finding> {
    command_line(&read("/proc/cmdline")).into_iter().collect()
}

/// Options that switch one mitigation off when they are `off`.
const MITIGATIONS: [&str; 17] = [
    "gather_data_sampling",
    "indirect_target_selection",
    "l1tf",
    "mds",
    "mmio_stale_data",
    "pti",
    "reg_file_data_sampling",
    "retbleed",
    "spec_rstack_overflow",
    "spec_store_bypass_disable",
    "spectre_bhi",
    "spectre_v2",
    "spectre_v2_user",
    "srbds",
    "tsa",
    "tsx_async_abort",
    "vmscape",
];

/// Options that switch a protection off by being there.
const WEAKENING: [&str; 8] = [
    "kvm_intel.vmentry_l1d_flush=never",
    "nokaslr",
    "nopti",
    "nosmap",
    "nosmep",
    "nospec_store_bypass_disable",
    "nospectre_v1",
    "nospectre_v2",
];

/// Whether an option of the kernel's command line switches a protection off. The kernel takes `-`
/// in names of modules and their options for `_`.
fn weakens(option: &str) -> bool {
    let option = option.replace('-', "_");
    match option.split_once('=') {
        // `auto,no_guest_host` keeps mitigations but between guest and host.
        Some(("mitigations", value)) => {
            value.split(',').any(|part| part == "off" || part.starts_with("no_"))
        }
        Some((name, "off")) if MITIGATIONS.contains(&name) => true,
        _ => WEAKENING.contains(&option.as_str()),
    }
}

fn command_line(options: &str) -> Option<Finding> {
    if options.is_empty() {
        return None;
    }
    let id = "host.command-line";
    let why = "Mitigations are what keeps a guest from reading its host's memory through the CPU.";
    // What follows `--` is for init.
    let own = options.split_whitespace().take_while(|option| *option != "--");
    let weak: Vec<&str> = own.filter(|option| weakens(option)).collect();
    if weak.is_empty() {
        let what = "the kernel's command line switches no protection off";
        return Some(Finding::new(id, Severity::Ok, what, why));
    }
    let what = format!("the kernel's command line switches protections off: {}", weak.join(" "));
    Some(Finding::new(id, Severity::Warning, what, why).fix(
        "Boot without these; where mitigations cost too much, see which of them this CPU needs.",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_switch_protections_off_are_found() {
        let named = |options| command_line(options).unwrap().what;
        assert!(named("quiet mitigations=off ro").ends_with(": mitigations=off"));
        assert!(named("mitigations=auto,no_guest_host").ends_with("no_guest_host"));
        assert!(
            named("kvm-intel.vmentry_l1d_flush=never nopti mds=off")
                .ends_with(": kvm-intel.vmentry_l1d_flush=never nopti mds=off")
        );
        for fine in
            ["\n", "quiet", "mitigations=auto,nosmt nosmt=force", "mds=full -- mds=off", "x=off"]
        {
            assert_eq!(command_line(fine).unwrap().severity, Severity::Ok, "{fine}");
        }
        assert_eq!(command_line(""), None);
    }
}
