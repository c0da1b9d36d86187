//! The kernel that the host VM boots: Debian's cloud kernel of the series that was asked for,
//! downloaded and unpacked into the cache.
//!
//! It is never installed: a developer's own machine would boot it the next time. And what happens to
//! be installed is not used: figures of two machines would be of two kernels.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use super::modules;
use crate::cache::{self, Key};
use crate::{packages, scratch, step};

/// Raise it when this file changes what is unpacked.
const RECIPE: &str = "host kernel 2";

const PREFIX: &str = "linux-image-";
const SUFFIX: &str = "-cloud-amd64";

/// Series of Linux that the host VM can run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Series {
    /// Linux 6.12, of Debian 13 and of Debian 12's security archive.
    #[default]
    #[value(name = "6.12")]
    V6_12,
    /// Linux 6.1, of Debian 12.
    #[value(name = "6.1")]
    V6_1,
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::V6_12 => "6.12",
            Self::V6_1 => "6.1",
        })
    }
}

/// An unpacked kernel.
pub struct Kernel {
    /// The compressed kernel.
    pub image: PathBuf,
    /// Its `/lib/modules/<release>`.
    modules: PathBuf,
}

impl Kernel {
    /// The newest of the series that Debian has.
    pub fn find(series: Series) -> Result<Self> {
        match newest(series).and_then(|package| Self::unpacked(&package)) {
            // The lists may be older than the archive, which drops what it has superseded.
            Err(_) if rustix::process::geteuid().is_root() => {
                packages::update_lists()?;
                Self::unpacked(&newest(series)?)
            }
            Err(error) => Err(error.context(packages::UPDATE_HINT)),
            found => found,
        }
    }

    fn unpacked(package: &Package) -> Result<Self> {
        let mut key = Key::new(RECIPE);
        key.add(package.to_string());
        let root = cache::entry("host-kernel", &key, |to| unpack(package, to))?;
        let release = package.release();
        Ok(Self {
            image: root.join(format!("boot/vmlinuz-{release}")),
            modules: root.join("lib/modules").join(release),
        })
    }

    /// The files of these modules and of all that they need, in the order to load them.
    pub fn modules(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        modules::files(&self.modules, names)
    }
}

/// A package of a kernel, and its version.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Package {
    name: String,
    version: String,
}

impl Package {
    /// `uname -r`.
    fn release(&self) -> &str {
        self.name.strip_prefix(PREFIX).unwrap_or(&self.name)
    }
}

/// As `apt-get download` takes it.
impl fmt::Display for Package {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}={}", self.name, self.version)
    }
}

fn newest(series: Series) -> Result<Package> {
    let pattern = format!("^{PREFIX}{}\\..*{SUFFIX}$", series.to_string().replace('.', "\\."));
    let mut search = Command::new("apt-cache");
    search.args(["search", "--names-only", "--full", &pattern]);
    newest_of(&step::output(&mut search)?)
        .with_context(|| format!("the package lists have no {PREFIX}{series}.*{SUFFIX}"))
}

/// The newest of the packages that `apt-cache` describes.
fn newest_of(records: &str) -> Option<Package> {
    let field = |record: &str, name: &str| {
        record.lines().find_map(|line| Some(line.strip_prefix(name)?.trim().to_owned()))
    };
    records
        .split("\n\n")
        .filter_map(|record| {
            Some(Package { name: field(record, "Package:")?, version: field(record, "Version:")? })
        })
        .max_by_key(|package| numbers(package.release()))
}

/// The numbers of a release, to compare it with another of its series.
fn numbers(release: &str) -> Vec<u64> {
    release.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

fn unpack(package: &Package, to: &Path) -> Result<()> {
    let work = scratch::directory()?.join("host-kernel");
    fs::create_dir_all(&work)?;
    let mut download = packages::apt_get();
    download.args(["download", &package.to_string()]).current_dir(&work);
    step::run(&format!("downloading {}", package.name), &mut download)?;
    packages::extract(&work, to)?;
    fs::remove_dir_all(&work)?;
    let modules = to.join("lib/modules").join(package.release());
    if !modules.is_dir() {
        bail!("{package} has no {}", modules.display());
    }
    // The emulated CPU would take long to decompress them, at every boot.
    let mut decompress = Command::new("find");
    decompress.arg(&modules).args(["-name", "*.ko.xz", "-exec", "xz", "--decompress", "{}", "+"]);
    step::output(&mut decompress)?;
    let mut depmod = Command::new("/sbin/depmod");
    step::output(depmod.arg("--basedir").arg(to).arg(package.release())).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_package_is_that_with_the_greatest_numbers() {
        let records = "Package: linux-image-6.12.99+deb12-cloud-amd64\nVersion: 6.12.99-1~deb12u1\n\
                       Depends: kmod, linux-base\n\n\
                       Package: linux-image-6.12.117+deb12-cloud-amd64\nSource: linux-signed\n\
                       Version: 6.12.117-1~deb12u1\n\n\
                       Package: linux-image-6.12.9+deb12-cloud-amd64\nVersion: 6.12.9-1\n\n";
        let newest = newest_of(records).unwrap();
        assert_eq!(newest.to_string(), "linux-image-6.12.117+deb12-cloud-amd64=6.12.117-1~deb12u1");
        assert_eq!(newest.release(), "6.12.117+deb12-cloud-amd64");
        assert_eq!(newest_of(""), None);
    }

    #[test]
    fn names_of_series_are_what_a_person_types() {
        for series in Series::value_variants() {
            assert_eq!(Series::from_str(&series.to_string(), false), Ok(*series));
        }
        assert_eq!(Series::default().to_string(), "6.12");
    }
}
