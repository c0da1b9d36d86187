//! QEMU, for Linux 6.12 not older than [`OLDEST`]: this machine's own, else that of Debian's backports,
//! unpacked into the cache with the libraries and the firmware that it needs.
//!
//! It takes no rights, and leaves the system's QEMU alone. Whatever version the backports have when
//! the cache is filled stays: figures of this machine are of one QEMU.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::Series;
use crate::cache::{self, Key};
use crate::{packages, scratch, step};

/// QEMU 7.2 leaves garbage in the flags after `cmpxchg16b`, of which Linux 6.12 dies as its guest.
const OLDEST: u32 = 10;

const PROGRAM: &str = "qemu-system-x86_64";
const PACKAGE: &str = "qemu-system-x86";

/// The release whose backports are taken, and where Debian keeps the keys to check them.
const SUITE: &str = "trixie";
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Raise it when this file changes what is unpacked.
const RECIPE: &str = "qemu 2";

/// What is kept of the unpacked packages.
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
const FIRMWARE: [&str; 2] = ["usr/share/qemu", "usr/share/seabios"];

/// A command that runs it for this Linux; its arguments follow.
pub fn command(kernel: Series) -> Result<Command> {
    let oldest = if kernel == Series::V6_1 { 7 } else { OLDEST };
    if major_version(&mut Command::new(PROGRAM)).is_some_and(|version| version >= oldest) {
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
    let archives = download()?;
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

/// Downloads the package and all that it needs, and returns the directory.
///
/// apt works on lists and on a state of its own, where nothing is installed: so it needs no rights,
/// changes nothing of this machine's, and leaves nothing out.
fn download() -> Result<PathBuf> {
    let root = scratch::directory()?.join("apt");
    for directory in ["lists/partial", "archives/partial"] {
        fs::create_dir_all(root.join(directory))?;
    }
    let sources = format!(
        "Types: deb\nURIs: {}\nSuites: {SUITE} {SUITE}-updates {SUITE}-backports\n\
         Components: main\nArchitectures: amd64\nSigned-By: {KEYS}\n",
        mirror()?
    );
    fs::write(root.join("qemu.sources"), sources)?;
    fs::write(root.join("status"), "")?;
    let path = root.to_str().context("the path of the temporary directory is not UTF-8")?;
    let apt = || {
        let mut command = packages::apt_get();
        for option in [
            format!("Dir::Etc::SourceList={path}/qemu.sources"),
            "Dir::Etc::SourceParts=/dev/null".into(),
            "Dir::Etc::Preferences=/dev/null".into(),
            "Dir::Etc::PreferencesParts=/dev/null".into(),
            format!("Dir::State={path}"),
            format!("Dir::State::Lists={path}/lists"),
            format!("Dir::State::Status={path}/status"),
            format!("Dir::Cache={path}"),
            format!("Dir::Cache::Archives={path}/archives"),
            // The system's hooks and locks are for the system's state.
            "APT::Update::Post-Invoke=".into(),
            "APT::Update::Post-Invoke-Success=".into(),
            "APT::Sandbox::User=".into(),
            "Debug::NoLocking=true".into(),
            "Acquire::Languages=none".into(),
        ] {
            command.args(["-o", &option]);
        }
        command
    };
    step::run("reading what Debian's backports have", apt().arg("update"))?;
    let mut install = apt();
    install.args(["install", "--yes", "--download-only", "--no-install-recommends"]);
    install.args(["--target-release", &format!("{SUITE}-backports"), PACKAGE]);
    step::run("downloading QEMU", &mut install)?;
    Ok(root.join("archives"))
}

/// Where this machine gets its Debian from: the backports lie on the same mirror.
fn mirror() -> Result<String> {
    let mut targets = Command::new("apt-get");
    targets.args(["indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)"]);
    targets.arg("Created-By: Packages");
    let mirror = |text: &str| {
        // The security archive has another label.
        text.lines().find_map(|line| line.strip_prefix("Debian|Debian|").map(str::to_owned))
    };
    if let Some(found) = mirror(&step::output(&mut targets)?) {
        return Ok(found);
    }
    let missing = || {
        format!(
            "apt knows no mirror of Debian to get QEMU {OLDEST} from; install {PROGRAM} of version \
             {OLDEST} or newer, or: {}",
            packages::UPDATE_HINT
        )
    };
    if rustix::process::geteuid().is_root() {
        packages::update_lists()?;
    }
    mirror(&step::output(&mut targets)?).with_context(missing)
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
