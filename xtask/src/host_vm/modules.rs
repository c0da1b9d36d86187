//! Finds kernel modules and what they need, as `modules.dep` says.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The files of these modules and of all that they need, in the order to load them; `root` is
/// `/lib/modules/<release>`.
pub fn files(root: &Path, names: &[&str]) -> Result<Vec<PathBuf>> {
    let table = root.join("modules.dep");
    let text = fs::read_to_string(&table).with_context(|| format!("{}", table.display()))?;
    let builtin = fs::read_to_string(root.join("modules.builtin")).unwrap_or_default();
    let found = resolve(&text, &builtin, names)?;
    Ok(found.into_iter().map(|path| root.join(path)).collect())
}

fn resolve(dependencies: &str, builtin: &str, names: &[&str]) -> Result<Vec<String>> {
    // A line is `path: path…`, needed ones listed so that the last is to be loaded first.
    let table: BTreeMap<String, (&str, Vec<&str>)> = dependencies
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(path, needs)| (name(path), (path, needs.split_whitespace().collect())))
        .collect();
    let builtin: BTreeSet<String> = builtin.lines().map(name).collect();
    let mut order: Vec<String> = Vec::new();
    for wanted in names {
        let wanted = wanted.replace('-', "_");
        if builtin.contains(&wanted) {
            continue;
        }
        let (path, needs) =
            table.get(&wanted).with_context(|| format!("the kernel has no module {wanted}"))?;
        for path in needs.iter().rev().chain([path]) {
            if !order.iter().any(|present| present == path) {
                order.push((*path).to_owned());
            }
        }
    }
    Ok(order)
}

/// A module's name: its file's, with underscores.
fn name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEPENDENCIES: &str = "kernel/kvm/kvm-amd.ko: kernel/kvm/kvm.ko kernel/lib/irqbypass.ko
kernel/kvm/kvm.ko: kernel/lib/irqbypass.ko
kernel/lib/irqbypass.ko:
kernel/net/tun.ko:";

    #[test]
    fn modules_come_after_what_they_need_and_once() {
        let order = resolve(DEPENDENCIES, "", &["kvm", "kvm-amd", "tun"]).unwrap();
        let expected = [
            "kernel/lib/irqbypass.ko",
            "kernel/kvm/kvm.ko",
            "kernel/kvm/kvm-amd.ko",
            "kernel/net/tun.ko",
        ];
        assert_eq!(order, expected);
    }

    #[test]
    fn built_in_modules_need_no_file_and_unknown_ones_are_named() {
        assert!(resolve(DEPENDENCIES, "kernel/fs/ext4.ko\n", &["ext4"]).unwrap().is_empty());
        let error = resolve(DEPENDENCIES, "", &["nope"]).unwrap_err();
        assert!(error.to_string().contains("nope"));
    }
}
