//! Packages of Debian with all that they need, for programs that are unpacked and not installed.
//!
//! It takes no rights, and changes nothing of this machine's.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::{packages, scratch, step};

/// Where Debian keeps the keys to check its archives.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Downloads packages of a release and all that they need, and returns the directory. With `backports` what that
/// suite has of them is preferred.
///
/// apt works on lists and on a state of its own, where nothing is installed: so nothing is left out.
pub fn download(
    what: &str,
    release: &str,
    backports: Option<&str>,
    packages: &[&str],
) -> Result<PathBuf> {
    let root = scratch::directory()?.join(format!("apt-{what}"));
    for directory in ["lists/partial", "archives/partial"] {
        fs::create_dir_all(root.join(directory))?;
    }
    let sources = format!(
        "Types: deb\nURIs: {}\nSuites: {release} {release}-updates {}\n\
         Components: main\nArchitectures: amd64\nSigned-By: {KEYS}\n",
        mirror(what)?,
        backports.unwrap_or_default()
    );
    fs::write(root.join("debian.sources"), sources)?;
    fs::write(root.join("status"), "")?;
    let path = root.to_str().context("the path of the temporary directory is not UTF-8")?;
    let apt = || {
        let mut command = packages::apt_get();
        for option in [
            format!("Dir::Etc::SourceList={path}/debian.sources"),
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
    step::run(&format!("reading what Debian has of {what}"), apt().arg("update"))?;
    let mut install = apt();
    install.args(["install", "--yes", "--download-only", "--no-install-recommends"]);
    if let Some(suite) = backports {
        install.args(["--target-release", suite]);
    }
    step::run(&format!("downloading {what}"), install.args(packages))?;
    Ok(root.join("archives"))
}

/// Where this machine gets its Debian from: all releases lie on the same mirror.
fn mirror(what: &str) -> Result<String> {
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
    let missing =
        || format!("apt knows no mirror of Debian to get {what} from: {}", packages::UPDATE_HINT);
    if rustix::process::geteuid().is_root() {
        packages::update_lists()?;
    }
    mirror(&step::output(&mut targets)?).with_context(missing)
}
