//! QEMU, not older than [`OLDEST`]: this machine's own, else that of Debian's backports,
//! unpacked into the cache with the libraries and the firmware that it needs.
//!
//! It takes no rights, and leaves the system's QEMU alone. Whatever version the backports have when
//! the cache is filled stays: figures of this machine are of one QEMU.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::debian;
use crate::cache::{self, Key};
use crate::{packages, scratch, step};

/// QEMU 7.2 leaves garbage in the flags after `cmpxchg16b`, of which Linux 6.12 dies as its guest; and with two CPUs and
/// Linux 6.1 a test of tiny guests did not end in minutes that takes 7 s under 10. Under 10.0.2 with two CPUs a daemon or
/// the kernel died of a memory access that nobody had made in two of five runs of the end-to-end tests; under 11.1 in
/// none.
const OLDEST: u32 = 11;

const PROGRAM: &str = "qemu-system-x86_64";
const PACKAGE: &str = "qemu-system-x86";

/// The release whose backports are taken.
const SUITE: &str = "trixie";

/// Raise it when this file changes what is unpacked.
const RECIPE: &str = "qemu 2";

/// What is kept of the unpacked packages.
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
const FIRMWARE: [&str; 2] = ["usr/share/qemu", "usr/share/seabios"];

/// A command that runs it; its arguments follow.
pub fn command() -> Result<Command> {
    if major_version(&mut Command::new(PROGRAM)).is_some_and(|version| version >= OLDEST) {
        return Ok(Command::new(PROGRAM));
    }
    let mut key = Key::new(RECIPE);
    key.add(SUITE);
    let root = cache::entry("qemu", &key, unpack)?;
    let mut command = unpacked(&root);
    for directory in FIRMWARE {
        command.arg("-L").arg(root.join(directory));
    }
    Ok(command)
}

/// The program under its own loader and libraries: this machine's may be older, or missing.
fn unpacked(root: &Path) -> Command {
    let libraries = root.join(LIBRARIES);
    let mut command = Command::new(libraries.join("ld-linux-x86-64.so.2"));
    command.arg("--library-path").arg(libraries);
    command.arg(root.join("usr/bin").join(PROGRAM));
    command
}

/// The first number of its version; `None` if it does not run.
fn major_version(command: &mut Command) -> Option<u32> {
    let text = step::output(command.arg("--version")).ok()?;
    parse_major_version(&text)
}

fn parse_major_version(text: &str) -> Option<u32> {
    let (_, version) = text.split_once("version ")?;
    version.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

fn unpack(to: &Path) -> Result<()> {
    let tree = scratch::beside(&cache::root()?, "qemu-unpacked")?;
    let backports = format!("{SUITE}-backports");
    let archives = debian::download("QEMU", SUITE, Some(&backports), &[PACKAGE])
        .with_context(|| format!("without {PROGRAM} {OLDEST} or newer there is no host VM"))?;
    packages::extract(&archives, &tree)?;
    let program = format!("usr/bin/{PROGRAM}");
    for path in [LIBRARIES, &program].iter().chain(&FIRMWARE) {
        let place = to.join(path);
        fs::create_dir_all(place.parent().unwrap_or(to))?;
        fs::rename(tree.join(path), place)
            .with_context(|| format!("the packages of {PACKAGE} have no {path}"))?;
    }
    scratch::remove_one(&tree);
    match major_version(&mut unpacked(to)) {
        Some(version) if version >= OLDEST => Ok(()),
        Some(version) => bail!("{SUITE}-backports has QEMU {version}; {OLDEST} or newer is needed"),
        None => bail!("QEMU of {SUITE}-backports does not run"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_qemu_prints_them() {
        let debian = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright (c) 2003-2025";
        assert_eq!(parse_major_version(debian), Some(10));
        assert_eq!(parse_major_version("QEMU emulator version 7.2.22 (Debian)"), Some(7));
        assert_eq!(parse_major_version("qemu: not found"), None);
        assert_eq!(major_version(&mut Command::new("/does/not/exist")), None);
    }
}
