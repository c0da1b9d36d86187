//! Finds kernel modules and what they need, as `modules.dep` says.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cache::{self, Key};
use crate::{packages, scratch, step};

/// The package that names the newest of these kernels.
const PACKAGE: &str = "linux-image-cloud-amd64";
const SUFFIX: &str = "-cloud-amd64";

/// The kernel that the host VM boots: Debian's cloud kernel.
pub struct Kernel {
    /// `uname -r`.
    release: String,
    /// The compressed kernel.
    pub image: PathBuf,
    /// `/`, or where the package is unpacked.
    root: PathBuf,
}

impl Kernel {
    /// The newest that is installed, else the newest that Debian has, downloaded and unpacked into
    /// the cache. It is never installed: a developer's own machine would boot it the next time.
    pub fn find() -> Result<Self> {
        if let Some(installed) = Self::newest_in(Path::new("/"))? {
            return Ok(installed);
        }
        let package = newest_package()?;
        let mut key = Key::new("host kernel 1");
        key.add(&package);
        let root = cache::entry("host-kernel", &key, |to| unpack(&package, to))?;
        Self::newest_in(&root)?
            .with_context(|| format!("{package} has no kernel; remove {}", root.display()))
    }

    fn newest_in(root: &Path) -> Result<Option<Self>> {
        let Ok(entries) = fs::read_dir(root.join("boot")) else { return Ok(None) };
        let mut releases: Vec<String> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter_map(|name| name.strip_prefix("vmlinuz-").map(str::to_owned))
            .filter(|release| release.ends_with(SUFFIX))
            .filter(|release| modules(root, release).join("modules.dep").exists())
            .collect();
        releases.sort_by_key(|release| version(release));
        Ok(releases.pop().map(|release| Self {
            image: root.join(format!("boot/vmlinuz-{release}")),
            root: root.to_owned(),
            release,
        }))
    }

    /// The files of these modules and of all that they need, in the order to load them.
    pub fn modules(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let root = modules(&self.root, &self.release);
        let text = fs::read_to_string(root.join("modules.dep"))?;
        let builtin = fs::read_to_string(root.join("modules.builtin")).unwrap_or_default();
        let found = resolve(&text, &builtin, names)?;
        Ok(found.into_iter().map(|path| root.join(path)).collect())
    }
}

fn modules(root: &Path, release: &str) -> PathBuf {
    root.join("lib/modules").join(release)
}

/// Package and version, as `apt-get download` takes them.
fn newest_package() -> Result<String> {
    let known = || step::output(Command::new("apt-cache").args(["depends", PACKAGE]));
    let text = match known() {
        Ok(text) if text.contains("Depends:") => text,
        _ if rustix::process::geteuid().is_root() => {
            packages::update_lists()?;
            known()?
        }
        _ => bail!(
            "the package lists are empty. Run this, then try again:\n\n  sudo apt-get update\n"
        ),
    };
    let name = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.ends_with(SUFFIX))
        .with_context(|| format!("{PACKAGE} depends on no kernel"))?;
    let versions =
        step::output(Command::new("apt-cache").args(["show", "--no-all-versions", name]))?;
    let version = versions.lines().find_map(|line| line.strip_prefix("Version: "));
    Ok(format!("{name}={}", version.with_context(|| format!("{name} has no version"))?))
}

fn unpack(package: &str, to: &Path) -> Result<()> {
    let work = scratch::directory()?.join("host-kernel");
    fs::create_dir_all(&work)?;
    let mut download = packages::apt_get();
    download.args(["download", package]).current_dir(&work);
    step::run("downloading the host VM's kernel", &mut download)?;
    for entry in fs::read_dir(&work)? {
        step::output(Command::new("dpkg-deb").arg("--extract").arg(entry?.path()).arg(to))?;
    }
    fs::remove_dir_all(&work)?;
    for entry in fs::read_dir(to.join("lib/modules"))? {
        let release = entry?.file_name();
        step::output(Command::new("/sbin/depmod").arg("--basedir").arg(to).arg(release))?;
    }
    Ok(())
}

fn version(release: &str) -> Vec<u64> {
    release.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
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

    #[test]
    fn releases_compare_as_numbers() {
        assert!(version("6.1.0-56-cloud-amd64") > version("6.1.0-9-cloud-amd64"));
    }
}
