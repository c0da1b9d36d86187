//! The machine that a run was measured on, for its manifest.

use std::{fs, path::Path};

use serde_json::{Map, Value, json};

/// Everything about the host that may move a figure.
pub fn describe() -> Value {
    let cpuinfo = text("/proc/cpuinfo");
    let field = |name: &str| cpu_field(&cpuinfo, name);
    let flags = field("flags").unwrap_or_default();
    let clock = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    json!({
        "cpu": {
            "model": field("model name"),
            "family": field("cpu family"),
            "microcode": field("microcode"),
            "count": cpuinfo.lines().filter(|line| line.starts_with("processor")).count(),
            "hypervisor_flag": flags.split(' ').any(|flag| flag == "hypervisor"),
            "virtualisation_flag":
                flags.split(' ').find(|flag| ["vmx", "svm"].contains(flag)),
            "smt": first_line("/sys/devices/system/cpu/smt/active"),
            "governor": first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        },
        "machine": first_line("/sys/class/dmi/id/sys_vendor"),
        "product": first_line("/sys/class/dmi/id/product_name"),
        "kernel": first_line("/proc/version"),
        "command_line": first_line("/proc/cmdline"),
        "mitigations": directory("/sys/devices/system/cpu/vulnerabilities"),
        "kvm": {
            "module": kvm_module(),
            "nested_paging": first_of(&[
                "/sys/module/kvm_amd/parameters/npt",
                "/sys/module/kvm_intel/parameters/ept",
            ]),
            "virtual_apic": first_of(&[
                "/sys/module/kvm_amd/parameters/avic",
                "/sys/module/kvm_intel/parameters/enable_apicv",
            ]),
            "nx_huge_pages": first_line("/sys/module/kvm/parameters/nx_huge_pages"),
            "halt_poll_ns": first_line("/sys/module/kvm/parameters/halt_poll_ns"),
        },
        "cgroups": cgroups(&text("/proc/self/mounts")),
        "transparent_huge_pages": {
            "anonymous": first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
            "shared": first_line("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
            "defrag": first_line("/sys/kernel/mm/transparent_hugepage/defrag"),
        },
        "ksm": first_line("/sys/kernel/mm/ksm/run"),
        "swaps": text("/proc/swaps").lines().count().saturating_sub(1),
        "memory": text("/proc/meminfo").lines().next(),
        "clock_source": first_line(clock),
    })
}

fn text(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn first_line(path: impl AsRef<Path>) -> Option<String> {
    fs::read_to_string(path).ok()?.lines().next().map(|line| line.trim().to_owned())
}

fn first_of(paths: &[&str]) -> Option<String> {
    paths.iter().find_map(first_line)
}

fn cpu_field(cpuinfo: &str, name: &str) -> Option<String> {
    cpuinfo.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim().to_owned())
    })
}

/// The files of a directory with their first lines.
fn directory(path: &str) -> Value {
    let mut entries = Map::new();
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        entries.insert(name, json!(first_line(entry.path())));
    }
    Value::Object(entries)
}

/// The module that makes `/dev/kvm` what it is.
fn kvm_module() -> Option<&'static str> {
    ["kvm_amd", "kvm_intel", "kvm_pvm"]
        .into_iter()
        .find(|name| Path::new("/sys/module").join(name).exists())
}

/// Control group hierarchies: version 1 or 2, where, and whether version 2 favours moves between
/// groups (`favordynmods`), which makes creating a VM much cheaper.
fn cgroups(mounts: &str) -> Value {
    let mut found = Vec::new();
    for line in mounts.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let [_, point, kind @ ("cgroup" | "cgroup2"), options, ..] = words[..] else { continue };
        let version = if kind == "cgroup" { 1 } else { 2 };
        let favoured = options.split(',').any(|option| option == "favordynmods");
        found.push(json!({ "version": version, "at": point, "favordynmods": favoured }));
    }
    Value::Array(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup_mounts_are_told_apart() {
        let mounts = "proc /proc proc rw 0 0\n\
                      cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid,favordynmods 0 0\n\
                      cgroup /cg/cpu cgroup rw,cpu 0 0\n";
        let found = cgroups(mounts);
        assert_eq!(found[0], json!({"version": 2, "at": "/sys/fs/cgroup", "favordynmods": true}));
        assert_eq!(found[1]["version"], 1);
        assert_eq!(found.as_array().unwrap().len(), 2);
    }

    #[test]
    fn fields_of_a_cpu() {
        let text = "processor\t: 0\nmodel name\t: Some CPU: fast\nflags\t\t: svm hypervisor\n";
        assert_eq!(cpu_field(text, "model name").as_deref(), Some("Some CPU: fast"));
        assert_eq!(cpu_field(text, "model"), None);
    }

    #[test]
    fn this_host_has_a_kernel() {
        let host = describe();
        assert!(host["kernel"].as_str().unwrap().starts_with("Linux version"));
        assert!(host["cpu"]["count"].as_u64().unwrap() > 0);
    }
}
