//! Makes the host VM's root file system: one uncompressed initramfs.
//!
//! busybox, the agent as `/init`, the modules, `mkfs.erofs` (the daemon makes code disks with it),
//! Firn's artifacts under `/firn`. Everything is written anew for each boot: that is a copy of some
//! 60 MB, cheaper than keeping an archive up to date.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::BufWriter;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use firn_host_vm_agent::{
    EXTENTS_SUFFIX, JOB_PATH, Job, MODULES_PATH, PLAIN_CGROUPS_PATH, SPARSE_PATH, pack, send,
};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::kernel::Kernel;
use super::{Cpu, Options};
use crate::cargo;
use crate::cpio::Archive;
use crate::{packages, scratch};

/// The network, which the host VM can't be without in interactive mode.
const NETWORK_MODULES: [&str; 2] = ["virtio_mmio", "virtio_net"];

const PAGE: u64 = 4096;

/// Programs of this machine that Firn runs, with their libraries.
const PROGRAMS: [&str; 1] = ["/usr/bin/mkfs.erofs"];

/// The initramfs and the kernel for it; dropping it removes the file.
pub struct Initrd {
    pub path: PathBuf,
    pub kernel: Kernel,
}

impl Drop for Initrd {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Writes the initramfs of a machine with that CPU; with a job for one without a network.
pub fn build(options: &Options, cpu: Cpu, job: Option<&Job>) -> Result<Initrd> {
    let emulator = match cpu {
        Cpu::Amd => packages::EMULATOR,
        Cpu::Intel => &[],
    };
    packages::ensure(&[packages::HOST_VM, emulator])?;
    let agent = cargo::build_release(&["firn-host-vm-agent"])?.binary("firn-host-vm-agent")?;
    let kernel = Kernel::find(options.kernel)?;
    let path = scratch::directory()?.join("initrd");
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    let initrd = Initrd { path, kernel };
    let mut archive = Archive::new(BufWriter::with_capacity(1 << 20, file));
    let mut sparse = Vec::new();

    for directory in ["dev", "proc", "sys", "tmp", "run", "root", "var/lib", "etc"] {
        archive.directory(directory)?;
    }
    archive.copy("init", 0o755, &agent)?;
    add_busybox(&mut archive)?;
    archive.file(
        "etc/passwd",
        0o644,
        b"root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n",
    )?;
    archive.file("etc/group", 0o644, b"root:x:0:\nuser:x:1000:\n")?;
    archive.file("etc/hosts", 0o644, b"127.0.0.1 localhost\n")?;
    let mut present = BTreeSet::new();
    for program in PROGRAMS {
        add_program(&mut archive, Path::new(program), &mut present)?;
    }
    add_modules(&mut archive, &initrd.kernel, options, cpu, job.is_none())?;
    if let Some(artifacts) = &options.artifacts {
        add_tree(&mut archive, artifacts, "firn", &mut sparse)?;
    }
    for (from, to) in &options.files {
        add_file(&mut archive, from, to, &mut sparse)?;
    }
    archive.file(SPARSE_PATH, 0o644, sparse.join("\n").as_bytes())?;
    if options.plain_cgroups {
        archive.file(PLAIN_CGROUPS_PATH, 0o644, b"")?;
    }
    if let Some(job) = job {
        let mut bytes = Vec::new();
        send(&mut bytes, job)?;
        archive.file(JOB_PATH, 0o644, &bytes)?;
    }
    let file = archive.finish()?.into_inner().context("cannot write the initramfs")?;
    fill_last_page(&file)?;
    Ok(initrd)
}

/// Makes the file's length a multiple of a page, with zeros, which the kernel skips.
///
/// QEMU puts the initramfs as high in memory as whole pages allow, and the firmware has the ACPI
/// tables in the highest page. An end anywhere within a page would lie in theirs, and could overwrite
/// them: Linux then adds up a checksum over a gigabyte, for minutes, or does without ACPI.
fn fill_last_page(file: &File) -> Result<()> {
    let size = file.metadata()?.len();
    file.set_len(size.next_multiple_of(PAGE)).context("cannot write the initramfs")
}

type Root = Archive<BufWriter<File>>;

fn add_busybox(archive: &mut Root) -> Result<()> {
    let busybox = Path::new("/bin/busybox");
    archive.copy("bin/busybox", 0o755, busybox)?;
    let list = Command::new(busybox).arg("--list").output().context("cannot run busybox")?;
    for applet in String::from_utf8(list.stdout)?.lines().filter(|name| *name != "busybox") {
        archive.symlink(&format!("bin/{applet}"), "busybox")?;
    }
    Ok(())
}

/// Adds a program under its own path, and the libraries that its loader finds.
fn add_program(archive: &mut Root, path: &Path, present: &mut BTreeSet<String>) -> Result<()> {
    let listed = Command::new("ldd").arg(path).output().context("cannot run ldd")?;
    let text = String::from_utf8(listed.stdout)?;
    // `name => /path (address)`, or `/path (address)` for the loader.
    let libraries = text.lines().filter_map(|line| {
        line.split_whitespace().find(|word| word.starts_with('/')).map(str::to_owned)
    });
    for file in libraries.chain([path.display().to_string()]) {
        if present.insert(file.clone()) {
            let real = fs::canonicalize(&file).with_context(|| format!("cannot find {file}"))?;
            archive.copy(&file, 0o755, &real)?;
        }
    }
    Ok(())
}

fn add_modules(
    archive: &mut Root,
    kernel: &Kernel,
    options: &Options,
    cpu: Cpu,
    network: bool,
) -> Result<()> {
    let mut names = vec![match cpu {
        Cpu::Amd => "kvm-amd",
        Cpu::Intel => "kvm-intel",
    }];
    names.extend(NETWORK_MODULES.iter().filter(|_| network));
    names.extend(options.modules.iter().map(String::as_str));
    let mut list = String::new();
    for module in kernel.modules(&names)? {
        let Some(name) = module.file_name().and_then(|name| name.to_str()) else {
            bail!("{} has no name", module.display());
        };
        let to = format!("/lib/modules/{name}");
        archive.copy(&to, 0o644, &module)?;
        list.push_str(&to);
        list.push('\n');
    }
    archive.file(MODULES_PATH, 0o644, list.as_bytes())
}

fn add_tree(archive: &mut Root, from: &Path, to: &str, sparse: &mut Vec<String>) -> Result<()> {
    let context = || format!("cannot read {}", from.display());
    archive.directory(to)?;
    let mut entries: Vec<_> = fs::read_dir(from)
        .with_context(context)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()
        .with_context(context)?;
    entries.sort();
    for entry in entries {
        let name = entry.file_name().and_then(|name| name.to_str());
        let to = format!("{to}/{}", name.with_context(|| format!("{}", entry.display()))?);
        // Artifacts are links into the cache: follow them.
        if fs::metadata(&entry).with_context(|| format!("{}", entry.display()))?.is_dir() {
            add_tree(archive, &entry, &to, sparse)?;
        } else {
            add_file(archive, &entry, &to, sparse)?;
        }
    }
    Ok(())
}

fn add_file(archive: &mut Root, from: &Path, to: &str, sparse: &mut Vec<String>) -> Result<()> {
    let mut file = File::open(from).with_context(|| format!("cannot read {}", from.display()))?;
    let metadata = file.metadata()?;
    let mode = metadata.permissions().mode();
    let to = format!("/{}", to.trim_start_matches('/'));
    if metadata.blocks() * 512 * 2 > metadata.len() {
        return archive.copy(&to, mode, from);
    }
    let mut packed = Vec::new();
    let extents = extents(&file, metadata.len())?;
    pack(&mut file, &extents, &mut packed)
        .with_context(|| format!("cannot read {}", from.display()))?;
    sparse.push(to.clone());
    archive.file(&format!("{to}{EXTENTS_SUFFIX}"), 0o644, &packed)
}

/// Where a file has content: offsets and lengths.
fn extents(file: &File, size: u64) -> Result<Vec<(u64, u64)>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        at = seek(file, SeekFrom::Hole(start))?;
        found.push((start, at - start));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn an_initramfs_ends_with_a_page() {
        for (written, expected) in [(1, PAGE), (PAGE - 1, PAGE), (PAGE, PAGE), (PAGE + 1, 2 * PAGE)]
        {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&vec![1; written as usize]).unwrap();
            fill_last_page(&file).unwrap();
            assert_eq!(file.metadata().unwrap().len(), expected);
        }
    }
}
