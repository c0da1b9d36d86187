//! The installation: what must be in it, checked and opened once, each lack with its own error.
//! See [`HostConfig::artifacts`](crate::HostConfig::artifacts) for where it is; later changes of
//! its files are not seen until the next open.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use firn_pages::ioctl::KVM_GET_API_VERSION;

use crate::{
    Disk, Image, ImageError, OpenError,
    image::ImageInner,
    initramfs, memfile,
    open::at,
    snapshot::{copy_sparse, hash_file},
};

/// The version of KVM's interface that every kernel since 2007 has.
const KVM_API_VERSION: i32 = 12;

/// Everything of the installation, opened once.
#[derive(Debug)]
pub(crate) struct Artifacts {
    /// `firn-jailer` in sealed memory.
    pub(crate) jailer: OwnedFd,
    /// `firn-vmm` in sealed memory.
    pub(crate) vmm: OwnedFd,
    /// `vmlinux` in sealed memory.
    pub(crate) kernel: OwnedFd,
    /// Of what boots: the kernel, and the initramfs with `firn-init`.
    pub(crate) kernel_hash: blake3::Hash,
    pub(crate) initramfs: OwnedFd,
    /// Backing of every `/tmp`, in sealed memory.
    pub(crate) tmp: OwnedFd,
    pub(crate) tmp_bytes: u64,
    pub(crate) tmp_hash: blake3::Hash,
    pub(crate) images: BTreeMap<String, Image>,
    pub(crate) kvm: OwnedFd,
    pub(crate) null: File,
}

impl Artifacts {
    /// Checks and opens all parts, in the order in which a person would set them up. `scratch`: see
    /// [`memfile::executable`].
    pub(crate) fn open(dir: &Path, scratch: &Path) -> Result<Self, OpenError> {
        let dir = fs::canonicalize(dir).map_err(|source| OpenError::Artifact {
            what: "directory",
            path: dir.to_owned(),
            source,
        })?;
        let mut vmm = executable(&dir, "firn-vmm")?;
        let mut jailer = executable(&dir, "firn-jailer")?;
        let mut init = executable(&dir, "firn-init")?;
        let mut kernel = part(&dir, "kernel", "kernel/vmlinux")?;
        let tmp_path = dir.join("images/tmp.ext4");
        let tmp = part(&dir, "/tmp disk", "images/tmp.ext4")?;
        let images = images(&dir.join("images"))?;
        let kvm = open_kvm()?;

        let artifact =
            |what, path: PathBuf| move |source| OpenError::Artifact { what, path, source };
        let seal = |what, file: &mut File| {
            memfile::executable(what, file, scratch)
                .map_err(artifact(what, dir.join("bin").join(what)))
        };
        let jailer = seal("firn-jailer", &mut jailer)?;
        let vmm = seal("firn-vmm", &mut vmm)?;
        let init_path = dir.join("bin/firn-init");
        let mut content = Vec::new();
        let mut initramfs_hash = blake3::Hasher::new();
        let initramfs = init
            .read_to_end(&mut content)
            .and_then(|_| initramfs::build(&content))
            .and_then(|archive| {
                initramfs_hash.update(&archive);
                memfile::sealed_huge("firn-initramfs", &mut &archive[..], archive.len() as u64)
            })
            .map_err(artifact("firn-init", init_path))?;
        // Hashes are of what boots, whatever becomes of the files.
        let (kernel, kernel_hash) = kernel
            .metadata()
            .and_then(|m| memfile::sealed_huge("firn-kernel", &mut kernel, m.len()))
            .map(File::from)
            .and_then(|sealed| hash_file(&sealed).map(|hash| (OwnedFd::from(sealed), hash)))
            .map_err(artifact("kernel", dir.join("kernel/vmlinux")))?;
        let both = [*kernel_hash.as_bytes(), *initramfs_hash.finalize().as_bytes()].concat();
        let kernel_hash = blake3::hash(&both);
        let seal_tmp = || {
            let length = tmp.metadata()?.len();
            let copy = memfile::create("firn-tmp")?;
            let hash = copy_sparse(&tmp, &copy, length)?;
            Ok((memfile::seal(copy)?, length, hash))
        };
        let (tmp, tmp_bytes, tmp_hash) = seal_tmp().map_err(artifact("/tmp disk", tmp_path))?;
        let null = Path::new("/dev/null");
        Ok(Self {
            jailer,
            vmm,
            kernel,
            kernel_hash,
            initramfs,
            tmp,
            tmp_bytes,
            tmp_hash,
            images,
            kvm,
            null: File::options().read(true).write(true).open(null).map_err(at(null))?,
        })
    }
}

fn part(dir: &Path, what: &'static str, name: &str) -> Result<File, OpenError> {
    let path = dir.join(name);
    let open = || {
        let file = File::open(&path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() || metadata.len() == 0 {
            return Err(io::Error::other("not a regular file with content"));
        }
        Ok(file)
    };
    open().map_err(|source| OpenError::Artifact { what, path, source })
}

fn executable(dir: &Path, what: &'static str) -> Result<File, OpenError> {
    let name = format!("bin/{what}");
    let file = part(dir, what, &name)?;
    match file.metadata() {
        Ok(metadata) if metadata.permissions().mode() & 0o111 != 0 => Ok(file),
        other => Err(OpenError::Artifact {
            what,
            path: dir.join(name),
            source: other.err().unwrap_or_else(|| io::Error::other("not executable")),
        }),
    }
}

/// What `image.json` may say.
#[derive(serde::Deserialize)]
struct Description {
    runtime: String,
    #[serde(default)]
    description: String,
}

fn images(dir: &Path) -> Result<BTreeMap<String, Image>, OpenError> {
    let mut images = BTreeMap::new();
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(OpenError::NoImages { path: dir.to_owned() });
        }
        Err(e) => return Err(at(dir)(e)),
    };
    for entry in entries {
        let path = entry.map_err(at(dir))?.path();
        if !path.join("image.json").exists() {
            continue;
        }
        let runtime = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let image = image(&path, &runtime)
            .map_err(|source| OpenError::Image { runtime: runtime.clone(), source })?;
        images.insert(runtime, image);
    }
    if images.is_empty() {
        return Err(OpenError::NoImages { path: dir.to_owned() });
    }
    Ok(images)
}

fn image(dir: &Path, runtime: &str) -> Result<Image, ImageError> {
    let path = dir.join("image.json");
    let wrong = |reason: String| ImageError::Description { path: path.clone(), reason };
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| ImageError::Io { path, source }
    };
    let text = fs::read(&path).map_err(io(&path))?;
    let description: Description =
        serde_json::from_slice(&text).map_err(|e| wrong(e.to_string()))?;
    if description.runtime != runtime {
        let named = description.runtime;
        return Err(wrong(format!("names runtime {named:?}, but its directory is {runtime:?}")));
    }
    let rootfs_path = dir.join("rootfs.erofs");
    let rootfs = Disk::load(&rootfs_path)?;
    Ok(Image(Arc::new(ImageInner {
        runtime: description.runtime,
        description: description.description,
        hash: rootfs.hash(),
        rootfs,
    })))
}

fn open_kvm() -> Result<OwnedFd, OpenError> {
    let kvm = File::options().read(true).write(true).open("/dev/kvm").map_err(|e| {
        match e.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => OpenError::NoKvm,
            Some(libc::EACCES | libc::EPERM) => OpenError::KvmPermission,
            _ => OpenError::Kvm(e),
        }
    })?;
    // SAFETY: the request takes no argument and changes nothing.
    let version = unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_GET_API_VERSION.into(), 0) };
    match version {
        KVM_API_VERSION => Ok(kvm.into()),
        -1 => Err(OpenError::Kvm(io::Error::last_os_error())),
        other => Err(OpenError::Kvm(io::Error::other(format!("interface version {other}")))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn install(dir: &Path, name: &str, mode: u32) {
        let path = dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, [1; 1024]).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn each_missing_part_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let missing = || match Artifacts::open(dir, dir) {
            Err(OpenError::Artifact { what, .. }) => what.to_owned(),
            Err(other) => other.to_string(),
            Ok(_) => "nothing".into(),
        };
        for name in ["firn-vmm", "firn-jailer", "firn-init"] {
            assert_eq!(missing(), name);
            install(dir, &format!("bin/{name}"), 0o644);
            assert_eq!(missing(), name, "not executable");
            install(dir, &format!("bin/{name}"), 0o755);
        }
        assert_eq!(missing(), "kernel");
        install(dir, "kernel/vmlinux", 0o644);
        assert_eq!(missing(), "/tmp disk");
        install(dir, "images/tmp.ext4", 0o644);
        assert!(missing().starts_with("no images in "));
        install(dir, "images/x1/image.json", 0o644);
        assert!(missing().contains("image.json"), "{}", missing());
        fs::write(dir.join("images/x1/image.json"), r#"{"runtime":"y"}"#).unwrap();
        assert!(missing().contains("names runtime"), "{}", missing());
        fs::write(dir.join("images/x1/image.json"), r#"{"runtime":"x1"}"#).unwrap();
        assert!(missing().contains("can't read disk"), "{}", missing());
        install(dir, "images/x1/rootfs.erofs", 0o644);
        let rest = missing();
        assert!(rest == "nothing" || rest.contains("/dev/kvm"), "{rest}");
    }
}
