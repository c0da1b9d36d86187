//! Runs cargo for the parts of the workspace.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::step;

/// Executables of a build by name.
pub struct Binaries(BTreeMap<String, PathBuf>);

impl Binaries {
    /// The path of one.
    pub fn binary(&self, name: &str) -> Result<PathBuf> {
        self.0.get(name).cloned().with_context(|| format!("the build made no program {name}"))
    }
}

/// The root of the repository.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"))
}

/// Where cargo builds, which a person may have set elsewhere.
pub fn target_directory() -> Result<PathBuf> {
    #[derive(Deserialize)]
    struct Metadata {
        target_directory: PathBuf,
    }
    let text = step::output(cargo().args(["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: Metadata = serde_json::from_str(&text).context("cargo printed no JSON")?;
    Ok(metadata.target_directory)
}

/// `cargo` as the one that runs this program.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace());
    // Set for the package that runs, they would make cargo think that everything changed.
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("CARGO_PKG_") || name == "CARGO_MANIFEST_DIR" {
            command.env_remove(name);
        }
    }
    command
}

/// Builds packages in release mode.
pub fn build_release(packages: &[&str]) -> Result<Binaries> {
    build("release", packages)
}

/// Builds packages with a profile.
pub fn build(profile: &str, packages: &[&str]) -> Result<Binaries> {
    #[derive(Deserialize)]
    struct Message {
        executable: Option<PathBuf>,
    }
    let mut command = cargo();
    command.args(["build", "--profile", profile, "--quiet"]);
    command.args(["--message-format", "json-render-diagnostics"]);
    for package in packages {
        command.args(["--package", package]);
    }
    let output = command.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    if !output.status.success() {
        let packages = packages.join(" --package ");
        bail!("`cargo build --profile {profile} --package {packages}` failed");
    }
    let text = String::from_utf8(output.stdout).context("cargo printed no UTF-8")?;
    let mut binaries = BTreeMap::new();
    for line in text.lines() {
        let message: Message = serde_json::from_str(line).context("cargo printed no JSON")?;
        if let Some(path) = message.executable {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            binaries.insert(name.to_owned(), path.clone());
        }
    }
    Ok(Binaries(binaries))
}
