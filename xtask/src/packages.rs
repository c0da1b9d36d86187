//! Debian packages that a task needs: installed as root, named otherwise.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::step;

/// Builds the guest kernel.
pub const KERNEL: &[&str] = &[
    "bc",
    "bison",
    "flex",
    "gcc",
    "libc6-dev",
    "libelf-dev",
    "linux-source-6.12",
    "lz4",
    "make",
    "patch",
    "perl",
    "xz-utils",
];

/// Builds the images.
pub const IMAGES: &[&str] = &[
    "e2fsprogs",
    "erofs-utils",
    "mmdebstrap",
    "python3-venv",
    "tar",
    "ca-certificates",
    "util-linux",
];

/// Makes the host VM. Its kernel, QEMU where a newer one is needed, and Bochs are downloaded and unpacked, not installed.
pub const HOST_VM: &[&str] = &["busybox-static", "erofs-utils", "kmod", "xz-utils"];

/// Runs it where its KVM is on SVM.
pub const EMULATOR: &[&str] = &["qemu-system-x86"];

/// What the daemon runs.
pub const RUN: &[&str] = &["erofs-utils"];

/// What the demo's and the tests' clients need.
pub const CLIENTS: &[&str] = &["python3-venv"];

/// Version 2 of the AWS CLI, which is on no other registry, for the tests.
pub const AWS_CLI: &[&str] = &["awscli"];

/// What to do when a package is not found or can't be downloaded, for who is not root.
pub const UPDATE_HINT: &str =
    "the package lists may be missing or old. Run `sudo apt-get update`, then try again";

/// Makes sure that the packages are installed.
pub fn ensure(lists: &[&[&str]]) -> Result<()> {
    let wanted: BTreeSet<&str> = lists.iter().flat_map(|list| list.iter().copied()).collect();
    if !Path::new("/usr/bin/dpkg-query").exists() {
        bail!(
            "this is no Debian system; install what these packages of Debian 12 contain and run \
             the task there: {}",
            join(&wanted)
        );
    }
    let missing = missing(&wanted)?;
    if missing.is_empty() {
        return Ok(());
    }
    let names = join(&missing);
    if !rustix::process::geteuid().is_root() {
        bail!(
            "packages are missing. Install them, then run this again:\n\n  \
             sudo apt-get update && sudo apt-get install --yes --no-install-recommends {names}\n"
        );
    }
    update_lists()?;
    let mut install = apt_get();
    install.args(["install", "--yes", "--no-install-recommends"]).args(&missing);
    step::run(&format!("installing {names}"), &mut install)
}

/// `apt-get`, never asking.
pub fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").args(["-o", "Dpkg::Use-Pty=0"]);
    command
}

/// Brings the package lists up to date.
pub fn update_lists() -> Result<()> {
    step::run("updating the package lists", apt_get().arg("update"))
}

/// Unpacks all packages that lie in a directory.
pub fn extract(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from).with_context(|| format!("{}", from.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            step::output(Command::new("dpkg-deb").arg("--extract").arg(path).arg(to))?;
        }
    }
    Ok(())
}

/// Version of an installed package.
pub fn version(package: &str) -> Result<String> {
    step::output(Command::new("dpkg-query").args(["--show", "--showformat", "${Version}", package]))
}

fn missing<'a>(wanted: &BTreeSet<&'a str>) -> Result<BTreeSet<&'a str>> {
    // It fails when it does not know one of them, and lists the others.
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat", "${Package} ${db:Status-Status}\n"])
        .args(wanted)
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let installed: BTreeSet<&str> =
        text.lines().filter_map(|line| line.strip_suffix(" installed")).collect();
    Ok(wanted.iter().copied().filter(|name| !installed.contains(name)).collect())
}

fn join(names: &BTreeSet<&str>) -> String {
    names.iter().copied().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_packages_are_missing_and_installed_ones_are_not() {
        if !Path::new("/usr/bin/dpkg-query").exists() {
            return;
        }
        let wanted = BTreeSet::from(["dpkg", "no-such-package-of-firn"]);
        assert_eq!(missing(&wanted).unwrap(), BTreeSet::from(["no-such-package-of-firn"]));
    }
}
