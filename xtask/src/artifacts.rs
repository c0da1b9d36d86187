//! `cargo xtask artifacts`: everything that a running Firn consists of, in one directory.
//!
//! ```text
//! bin/{firnd,firn,firn-vmm,firn-jailer,firn-init}
//! kernel/{vmlinux,bzImage}
//! images/<runtime>/{rootfs.erofs,image.json}
//! images/tmp.ext4
//! ```
//! All are links: programs to cargo's release directory, the rest into the cache.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cargo::{self, Binaries};
use crate::{images, kernel, packages, step};

/// Packages whose programs belong to an installation, and the programs.
const PROGRAMS: [(&str, &str); 5] = [
    ("firnd", "firnd"),
    ("firn-cli", "firn"),
    ("firn-vmm", "firn-vmm"),
    ("firn-jailer", "firn-jailer"),
    ("firn-init", "firn-init"),
];

/// Build programs, guest kernel and images into one directory, as `firnd --artifacts` takes it.
#[derive(Debug, clap::Args)]
pub struct Arguments {}

/// Runs the task.
pub fn run(_: Arguments) -> Result<i32> {
    println!("{}", build()?.display());
    Ok(0)
}

/// Builds what is missing and returns the directory.
pub fn build() -> Result<PathBuf> {
    // Packages for all of it at once, so that a person is asked once.
    packages::ensure(&[packages::IMAGES, packages::KERNEL])?;
    // Quick things first: what is wrong with them shows before the kernel is built.
    let mut links: Vec<(String, PathBuf)> = vec![("images/tmp.ext4".into(), images::tmp_disk()?)];
    for runtime in images::runtimes()? {
        let image = images::build(&runtime)?;
        for name in ["rootfs.erofs", "image.json"] {
            links.push((format!("images/{runtime}/{name}"), image.join(name)));
        }
    }
    let built = programs()?;
    for (_, program) in PROGRAMS {
        links.push((format!("bin/{program}"), built.binary(program)?));
    }
    let kernel = kernel::build()?;
    for name in ["vmlinux", "bzImage"] {
        links.push((format!("kernel/{name}"), kernel.join(name)));
    }
    place(&cargo::target_directory()?.join("artifacts"), &links)
}

/// Builds the programs: always all of them, for a part would need its dependencies with other features, and they would
/// be built twice.
pub fn programs() -> Result<Binaries> {
    step::say("building the programs …");
    cargo::build_release(&PROGRAMS.map(|(package, _)| package))
}

/// Replaces the directory's content by these links.
fn place(directory: &Path, links: &[(String, PathBuf)]) -> Result<PathBuf> {
    if directory.exists() {
        fs::remove_dir_all(directory)
            .with_context(|| format!("cannot empty {}", directory.display()))?;
    }
    for (name, target) in links {
        let link = directory.join(name);
        if let Some(parent) = link.parent() {
            fs::create_dir_all(parent)
                .with_context(|| format!("cannot create {}", parent.display()))?;
        }
        symlink(target, &link).with_context(|| format!("cannot create {}", link.display()))?;
    }
    Ok(directory.to_owned())
}
