//! Python on this machine: virtual environments with pinned packages, for building images and for
//! the real clients of the demo and the tests.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::cache::{self, Key};
use crate::{packages, step};

/// Debian's own, whatever else comes first in `PATH`.
const PYTHON: &str = "/usr/bin/python3";

/// A virtual environment; its path is that of the environment, `bin/python` is in it.
pub fn environment(name: &str, requirements: &str) -> Result<PathBuf> {
    packages::ensure(&[packages::CLIENTS])?;
    let mut key = Key::new("venv 1");
    key.add(requirements).add(step::output(Command::new(PYTHON).arg("--version"))?);
    cache::entry_knowing("venv", &key, |to, later| {
        step::run(
            &format!("making the Python environment for {name}"),
            Command::new(PYTHON).args(["-m", "venv"]).arg(to),
        )?;
        if !requirements.trim().is_empty() {
            let list = to.join("requirements.txt");
            fs::write(&list, requirements)?;
            let mut pip = pip(&to.join("bin/python"));
            pip.args(["install", "--requirement"]).arg(&list);
            step::run(&format!("installing the Python packages for {name}"), &mut pip)?;
        }
        move_scripts(&to.join("bin"), to, later)
    })
}

/// `pip` of an environment, quiet and without a cache of its own.
pub fn pip(python: &Path) -> Command {
    let mut command = Command::new(python);
    command.args(["-m", "pip", "--disable-pip-version-check", "--no-cache-dir", "--no-input"]);
    command
}

/// Installs packages for another machine into a directory: wheels only, nothing is compiled.
///
/// `version` is the target's, like `3.11`; its C library is Debian 12's.
pub fn install_into(to: &Path, requirements: &Path, version: &str) -> Result<()> {
    let environment = environment("building images", "")?;
    let mut pip = pip(&environment.join("bin/python"));
    pip.args(["install", "--no-compile", "--only-binary", ":all:", "--implementation", "cp"]);
    pip.args(["--python-version", version]);
    for platform in ["manylinux2014", "manylinux_2_17", "manylinux_2_28", "manylinux_2_34"] {
        pip.args(["--platform", &format!("{platform}_x86_64")]);
    }
    pip.arg("--target").arg(to).arg("--requirement").arg(requirements);
    step::run("installing the image's Python packages", &mut pip)
}

/// Scripts name the interpreter by its full path.
fn move_scripts(bin: &Path, from: &Path, to: &Path) -> Result<()> {
    let (Some(from), Some(to)) = (from.to_str(), to.to_str()) else {
        anyhow::bail!("the path of the cache is not UTF-8");
    };
    for entry in fs::read_dir(bin).with_context(|| format!("{}", bin.display()))? {
        let path = entry?.path();
        if path.is_symlink() {
            continue;
        }
        if let Ok(text) = fs::read_to_string(&path) {
            fs::write(&path, text.replace(from, to))?;
        }
    }
    Ok(())
}
