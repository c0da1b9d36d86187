//! Writing an instance down.
//!
//! The VMM writes memory, its state and the `/tmp` delta into files that it is given; firn reads
//! them back, hashes them, writes the state file, and gives the directory its name last:
//! a snapshot is there whole or not at all. If it is to be encrypted, the VMM's files lie in memory, and
//! only their encryption gets to the disk.

use std::{
    fs::{self, File},
    io,
    num::NonZeroU32,
    os::{fd::AsFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    time::Duration,
};

use firn_pages::{PAGE, bitmap::Bitmap};
use firn_proto::{
    control::{FailureKind, FromVmm, SaveReport, ToVmm},
    guest::{FromGuest, GuestTsc, ToGuest},
};
use tempfile::TempDir;

use super::{
    Opened, Snapshot, SnapshotError, SnapshotMeta, at,
    container::{self, Manifest, Protection},
    pages::{hash_pages, hash_sparse, write_pages, write_sparse},
};
use crate::{
    Instance, InstanceError,
    channel::name as message_name,
    dir::Dir,
    instance::Origin,
    keys::SealWriter,
    memfile,
    open::TEMPORARY,
    shell,
    vm::{Trouble, unexpected},
};

/// Time that the guest may take to stop its runtime.
const FREEZE: Duration = Duration::from_secs(10);

/// Time that the VMM may take to write, per GiB of memory, and at least.
const SAVE: Duration = Duration::from_secs(60);

/// How often a VMM that has something on its way is let go on, 1, 2, 4… ms.
const QUIET_ATTEMPTS: u32 = 8;

/// How the text of an I/O error says that the disk is full.
const NO_SPACE: &str = "(os error 28)";

/// The files of a snapshot that is being written.
struct Files {
    dir: TempDir,
    memory: File,
    vm_state: File,
    delta: File,
}

impl Files {
    /// Makes them beside `target`, so that renaming does not cross file systems.
    fn create(target: &Path, encrypted: bool) -> Result<Self, SnapshotError> {
        if target.exists() {
            return Err(SnapshotError::Exists { path: target.to_owned() });
        }
        let parent = parent(target);
        fs::create_dir_all(&parent).map_err(at("make the snapshot's parent directory"))?;
        let dir = tempfile::Builder::new()
            .prefix(TEMPORARY)
            .tempdir_in(&parent)
            .map_err(at("make a directory for the snapshot"))?;
        let create = |name: &str| match encrypted {
            true => memfile::create("firn-save").map_err(at("make a memory file")),
            false => create(&dir, name),
        };
        let (memory, delta) = (create("memory")?, create("tmp.delta")?);
        let vm_state = match encrypted {
            true => memfile::create("firn-save"),
            false => Dir::open(dir.path()).and_then(|dir| dir.nameless()).map(File::from),
        };
        let vm_state = vm_state.map_err(at("make a file for the state"))?;
        Ok(Self { memory, delta, vm_state, dir })
    }
}

fn create(dir: &TempDir, name: &str) -> Result<File, SnapshotError> {
    let mut options = File::options();
    let file = options.create_new(true).read(true).write(true).open(dir.path().join(name));
    file.map_err(at("make a file of the snapshot"))
}

fn parent(target: &Path) -> PathBuf {
    match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

impl Instance {
    /// Freezes the runtime, writes the microVM to the new directory `dir`, and retires it. On any
    /// failure nothing is left at or beside `dir`.
    ///
    /// # Errors
    /// Any [`SnapshotError`].
    pub async fn snapshot(
        mut self,
        dir: &Path,
        meta: SnapshotMeta,
    ) -> Result<Snapshot, SnapshotError> {
        let target = dir.to_owned();
        let encrypted = self.inner.config.encrypt_snapshots;
        let files = blocking(move || Files::create(&target, encrypted)).await?;
        self.freeze().await?;
        let report = self.save(&files).await?;

        let target = dir.to_owned();
        let manifest = self.manifest(&report, meta)?;
        let inner = self.inner.clone();
        // Its work is done; cleaning up goes on beside the writing.
        self.retire().await;
        blocking(move || {
            let protection = Protection::generate(&*inner.keys, encrypted)?;
            finish(files, &report, manifest, protection, &target)
        })
        .await
    }

    /// Brings guest and VMM to a stop between two frames.
    async fn freeze(&mut self) -> Result<(), InstanceError> {
        let trouble = InstanceError::from_trouble("freeze");
        self.vm.queue(&ToGuest::Freeze).await.map_err(&trouble)?;
        match self.vm.frame(FREEZE * self.vm.patience).await.map_err(&trouble)? {
            FromGuest::Frozen => {}
            other => return Err(trouble(self.vm.violated("Frozen", &other))),
        }
        self.pause().await?;
        if !self.vm.stream().map_err(&trouble)?.is_quiet() {
            return Err(trouble(Trouble::Protocol("bytes follow Frozen".into())));
        }
        Ok(())
    }

    async fn resume(&mut self) -> Result<(), InstanceError> {
        let trouble = InstanceError::from_trouble("resume");
        self.vm.order(&ToVmm::Resume, &[]).await.map_err(trouble)
    }

    async fn save(&mut self, files: &Files) -> Result<SaveReport, SnapshotError> {
        // What the VMM writes counts as its memory until it is on disk, and for ever where the
        // files lie in memory.
        let limit = shell::memory_limit(&self.inner, self.vm.class)
            + self.vm.class.memory_bytes()
            + self.inner.artifacts.tmp_bytes;
        let limited = self.vm.limit_memory(limit).await;
        limited.map_err(InstanceError::from_trouble("raise the memory limit"))?;
        let pagemap = self.vm.pagemap().await;
        let pagemap = pagemap.map_err(InstanceError::from_trouble("open a pagemap"))?;
        let descriptors =
            [files.memory.as_fd(), files.vm_state.as_fd(), pagemap.as_fd(), files.delta.as_fd()];
        let request = ToVmm::Save;
        let within = SAVE * (1 + self.vm.class.memory_mib / 1024);
        let mut answer = self.vm.request_within(&request, &descriptors, within).await;
        for attempt in 0..QUIET_ATTEMPTS {
            match &answer {
                Err(Trouble::Refused(failure)) if failure.kind == FailureKind::BadRequest => {}
                _ => break,
            }
            // The guest was stopped with something on its way: let it finish.
            self.resume().await?;
            tokio::time::sleep(Duration::from_millis(1 << attempt)).await;
            self.pause().await?;
            answer = self.vm.request_within(&request, &descriptors, within).await;
        }
        match answer {
            Ok(FromVmm::Saved(report)) => Ok(report),
            Ok(other) => {
                let trouble = unexpected("Saved", message_name(&other));
                Err(InstanceError::from_trouble("save")(trouble).into())
            }
            Err(Trouble::Refused(failure)) => {
                Err(match failure.kind == FailureKind::Io && failure.message.contains(NO_SPACE) {
                    true => SnapshotError::NoSpace { what: failure.message },
                    false => SnapshotError::Save { kind: failure.kind, message: failure.message },
                })
            }
            Err(trouble) => Err(InstanceError::from_trouble("save")(trouble).into()),
        }
    }

    /// All that is known before the files are hashed.
    fn manifest(&self, report: &SaveReport, meta: SnapshotMeta) -> Result<Manifest, SnapshotError> {
        let khz = NonZeroU32::new(report.tsc_khz).ok_or_else(|| SnapshotError::Malformed {
            section: "vm state",
            reason: "a TSC of 0 kHz".into(),
        })?;
        let artifacts = &self.inner.artifacts;
        let image = self.origin.image();
        Ok(Manifest {
            vcpus: self.vm.class.vcpus,
            memory_mib: self.vm.class.memory_mib,
            function_memory_mb: self.function_memory_mb,
            runtime: image.runtime().to_owned(),
            image: *image.0.hash.as_bytes(),
            kernel: *artifacts.kernel_hash.as_bytes(),
            tmp_disk: *artifacts.tmp_hash.as_bytes(),
            code: self.code.as_ref().map(|disk| *disk.hash().as_bytes()),
            base: match &self.origin {
                Origin::Thawed { snapshot } => Some(snapshot.raw_id()),
                Origin::Booted { .. } => None,
            },
            memory: [0; 32],
            delta: [0; 32],
            delta_bytes: 0,
            tsc: GuestTsc { ticks: report.guest_tsc, khz },
            meta,
        })
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SnapshotError> + Send + 'static,
) -> Result<T, SnapshotError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|e| Err(at("write the snapshot")(io::Error::other(e))))
}

/// Checks what the VMM wrote, describes it, and makes it last.
fn finish(
    files: Files,
    report: &SaveReport,
    mut manifest: Manifest,
    protection: Protection,
    target: &Path,
) -> Result<Snapshot, SnapshotError> {
    let memory_bytes = manifest.memory_bytes();
    let found = files.memory.metadata().map_err(at("read memory"))?.len();
    if report.memory_bytes != memory_bytes || found != memory_bytes {
        let found = if found == memory_bytes { report.memory_bytes } else { found };
        return Err(SnapshotError::Memory { expected: memory_bytes, found });
    }
    let (vm_state, pages) = read_state(&files.vm_state, report, memory_bytes / PAGE)?;
    manifest.delta_bytes = files.delta.metadata().map_err(at("read tmp.delta"))?.len();
    let delta_bytes = manifest.delta_bytes;
    let (memory, delta, written) = match &protection.encryption {
        None => {
            let memory = hash_pages(&files.memory, &pages).map_err(at("hash memory"))?;
            let delta = hash_sparse(&files.delta, delta_bytes).map_err(at("hash tmp.delta"))?;
            (memory, delta, [files.memory, files.delta])
        }
        Some(key) => {
            let create = |name: &'static str| {
                SealWriter::new(create(&files.dir, name)?, key, &[name.as_bytes()])
                    .map_err(at(name))
            };
            let (mut memory, mut delta) = (create("memory")?, create("tmp.delta")?);
            let hashes = (
                write_pages(&files.memory, &pages, &mut memory).map_err(at("memory"))?,
                write_sparse(&files.delta, delta_bytes, &mut delta).map_err(at("tmp.delta"))?,
            );
            let written =
                [memory.finish().map_err(at("memory"))?, delta.finish().map_err(at("tmp.delta"))?];
            (hashes.0, hashes.1, written)
        }
    };
    (manifest.memory, manifest.delta) = (*memory.as_bytes(), *delta.as_bytes());

    let state = container::State { manifest, vm_state, pages };
    let (bytes, id) = container::encode(&state, &protection)?;
    let file = create(&files.dir, "state")?;
    file.write_all_at(&bytes, 0).map_err(at("write the state file"))?;
    for file in written.iter().chain([&file]) {
        file.sync_all().map_err(at("flush the snapshot"))?;
    }
    sync_dir(files.dir.path())?;
    // Fails if there is something by now, unless it is an empty directory.
    fs::rename(files.dir.path(), target).map_err(|e| match e.kind() {
        io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotADirectory => {
            SnapshotError::Exists { path: target.to_owned() }
        }
        _ => at("name the snapshot")(e),
    })?;
    // Nothing to remove any more.
    let _ = files.dir.keep();
    sync_dir(&parent(target))?;
    Ok(Snapshot(std::sync::Arc::new(Opened { dir: target.to_owned(), id, state, protection })))
}

/// The two parts of the VMM's state file, whose lengths are its own claims.
fn read_state(
    file: &File,
    report: &SaveReport,
    pages: u64,
) -> Result<(Vec<u8>, Bitmap), SnapshotError> {
    let malformed = |section, reason| SnapshotError::Malformed { section, reason };
    let SaveReport { state_bytes, bitmap_bytes, .. } = *report;
    if state_bytes == 0 || state_bytes > container::MAX_VM_STATE {
        let limit = container::MAX_VM_STATE;
        return Err(malformed("vm state", format!("{state_bytes} bytes; the limit is {limit}")));
    }
    if bitmap_bytes != Bitmap::byte_count(pages) {
        return Err(malformed("pages", format!("{bitmap_bytes} bytes for {pages} pages")));
    }
    let expected = state_bytes + bitmap_bytes;
    let found = file.metadata().map_err(at("read the VM's state"))?.len();
    if found < expected {
        return Err(SnapshotError::Truncated { what: "vm state", expected, found });
    }
    let mut vm_state = vec![0; state_bytes as usize];
    file.read_exact_at(&mut vm_state, 0).map_err(at("read the VM's state"))?;
    let mut bits = vec![0; bitmap_bytes as usize];
    file.read_exact_at(&mut bits, state_bytes).map_err(at("read the VM's state"))?;
    let past = || malformed("pages", format!("bits beyond the last of {pages} pages are set"));
    Ok((vm_state, Bitmap::from_bytes(&bits, pages).ok_or_else(past)?))
}

fn sync_dir(dir: &Path) -> Result<(), SnapshotError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(at("flush the snapshot's directory"))
}
