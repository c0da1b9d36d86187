//! The real clients that the end-to-end tests drive the daemon with, each pinned: boto3, the AWS CLI,
//! and AWS's SDKs for JavaScript and Rust.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use serde_json::json;

use crate::{
    cache::{self, Key},
    cargo, demo, packages, python, scratch, step,
};

/// What only the tests need besides the demo's clients.
const REQUIREMENTS: &str = include_str!("../clients/tests.txt");

/// All of them, ready to run.
#[derive(Debug)]
pub struct Clients {
    /// The virtual environment with boto3.
    pub python: PathBuf,
    /// How to run the others, by name: JSON for the tests.
    pub commands: String,
}

/// Makes what is missing.
pub fn prepare() -> Result<Clients> {
    packages::ensure(&[packages::AWS_CLI])?;
    let requirements = format!("{}{REQUIREMENTS}", demo::REQUIREMENTS);
    let python = python::environment("the clients", &requirements)?;
    let script = node(&python)?;
    let program = cargo::build("dev", &["firn-client"])?.binary("firn-client")?;
    let commands = json!({
        "aws": ["/usr/bin/aws", "--cli-binary-format", "raw-in-base64-out"],
        "node": [python.join("bin/node"), script],
        "rust": [program],
    });
    Ok(Clients { python, commands: commands.to_string() })
}

/// The script for the SDK for JavaScript, where it finds its packages.
fn node(python: &Path) -> Result<PathBuf> {
    let source = cargo::workspace().join("tests/clients/node");
    let mut key = Key::new("node 1");
    key.add_file(&source.join("package.json"))?.add_file(&source.join("package-lock.json"))?;
    key.add(step::output(Command::new(python.join("bin/node")).arg("--version"))?);
    let packages = cache::entry("node", &key, |to| {
        for name in ["package.json", "package-lock.json"] {
            fs::copy(source.join(name), to.join(name))?;
        }
        let mut npm = Command::new(python.join("bin/npm"));
        npm.args(["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]);
        npm.current_dir(to);
        step::run("installing the packages for Node.js", &mut npm)
    })?;
    // Node.js looks for packages beside the script.
    let place = scratch::directory()?.join("node");
    fs::create_dir_all(&place).with_context(|| format!("{}", place.display()))?;
    for name in ["life.js", "package.json"] {
        fs::copy(source.join(name), place.join(name))?;
    }
    symlink(packages.join("node_modules"), place.join("node_modules"))?;
    Ok(place.join("life.js"))
}
