//! Making a snapshot resident: everything that is thawed is copied into sealed memory (and decrypted on
//! the way), and what is verified is the copy. From then on no file can change it, and a thaw verifies
//! nothing.

use std::{
    fs::File,
    io::{self, BufReader, Read},
    ops::Range,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::PathBuf,
    sync::Arc,
};

use firn_pages::{PAGE, REGION, bitmap::Bitmap, mapping::Writable};
use firn_proto::guest::GuestTsc;

use super::{
    Snapshot, SnapshotError, SnapshotMeta, at,
    container::{Manifest, hex},
    pages::{copy_sparse, read_sparse},
    working_set::{self, Sample, Use, WorkingSet, WorkingSetReport},
};
use crate::{
    Disk, Host, Image, Numa, ShellClass,
    host::Inner,
    keys::{Key, SealReader, sealed_length},
    memfile,
};

/// A verified snapshot in sealed memory, ready to thaw. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ResidentSnapshot(Arc<Resident>);

#[derive(Debug)]
struct Resident {
    id: [u8; 32],
    manifest: Manifest,
    memory: OwnedFd,
    /// Pages that `memory` holds.
    pages: Bitmap,
    state: OwnedFd,
    delta: OwnedFd,
    image: Image,
    code: Option<Disk>,
    dir: PathBuf,
    working_set: WorkingSet,
    /// Authenticates the working set's file.
    working_set_key: Key,
    /// [`HostConfig::dense_pages`](crate::HostConfig::dense_pages).
    dense: u32,
}

impl ResidentSnapshot {
    /// Identity of the snapshot: [`Snapshot::id`].
    pub fn id(&self) -> String {
        hex(&self.0.id)
    }

    /// What its maker noted.
    pub fn meta(&self) -> &SnapshotMeta {
        &self.0.manifest.meta
    }

    /// The class of shell that it thaws into.
    pub fn class(&self) -> ShellClass {
        let Manifest { vcpus, memory_mib, .. } = self.0.manifest;
        ShellClass { vcpus, memory_mib }
    }

    /// Bytes of memory that it occupies, at most.
    pub fn resident_bytes(&self) -> u64 {
        self.0.pages.count() * PAGE
    }

    /// What is known of the pages that its clones touch.
    pub fn working_set(&self) -> WorkingSetReport {
        self.0.working_set.report()
    }

    /// How to thaw the next clone, for an `event` or not. After [`Use::Watch`],
    /// [`ResidentSnapshot::watched`] must follow.
    pub(crate) fn next_use(&self, event: bool) -> Use {
        self.0.working_set.next(event)
    }

    /// A watched clone has been looked at, or is gone.
    pub(crate) fn watched(&self, sample: Option<Sample>) {
        let Resident { working_set, working_set_key: key, pages, dense, dir, id, .. } = &*self.0;
        // A snapshot that has been deleted meanwhile needs no advice.
        if let Some(sets) = working_set.watched(sample, pages, *dense)
            && let Err(error) = working_set::keep(dir, id, key, &sets)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, dir = %dir.display(), "can't keep a snapshot's working set");
        }
    }

    /// The image that it was made from.
    pub fn image(&self) -> &Image {
        &self.0.image
    }

    /// What its guest's TSC reads when its clocks go on.
    pub(crate) fn tsc(&self) -> GuestTsc {
        self.0.manifest.tsc
    }

    pub(crate) fn raw_id(&self) -> [u8; 32] {
        self.0.id
    }

    pub(crate) fn memory(&self) -> BorrowedFd<'_> {
        self.0.memory.as_fd()
    }

    pub(crate) fn state(&self) -> BorrowedFd<'_> {
        self.0.state.as_fd()
    }

    pub(crate) fn delta(&self) -> BorrowedFd<'_> {
        self.0.delta.as_fd()
    }

    pub(crate) fn code(&self) -> Option<&Disk> {
        self.0.code.as_ref()
    }

    pub(crate) fn function_memory_mb(&self) -> u32 {
        self.0.manifest.function_memory_mb
    }
}

impl Snapshot {
    /// Verifies everything and lays it out in sealed memory. `base` must be given if
    /// [`Snapshot::base`] names one; `code` must be the disk that was loaded, if one was.
    ///
    /// # Errors
    /// Any [`SnapshotError`].
    pub async fn make_resident(
        &self,
        host: &Host,
        base: Option<&ResidentSnapshot>,
        code: Option<&Disk>,
    ) -> Result<ResidentSnapshot, SnapshotError> {
        let (snapshot, inner) = (self.clone(), host.inner().clone());
        let (base, code) = (base.cloned(), code.cloned());
        let making = tokio::task::spawn_blocking(move || make(&snapshot, &inner, base, code));
        making.await.unwrap_or_else(|e| Err(at("make the snapshot resident")(io::Error::other(e))))
    }
}

fn make(
    snapshot: &Snapshot,
    inner: &Inner,
    base: Option<ResidentSnapshot>,
    code: Option<Disk>,
) -> Result<ResidentSnapshot, SnapshotError> {
    let super::container::State { manifest, vm_state, pages } = &snapshot.0.state;
    let image = check_environment(manifest, inner, code.as_ref())?;
    let found = base.as_ref().map(ResidentSnapshot::raw_id);
    if found != manifest.base {
        let name = |id: Option<[u8; 32]>| id.map_or_else(|| "none".into(), |id| hex(&id));
        return Err(SnapshotError::Base { expected: name(manifest.base), found: name(found) });
    }
    if let Some(base) = &base {
        let (expected, found) = (base.0.manifest.memory_bytes(), manifest.memory_bytes());
        if expected != found {
            return Err(SnapshotError::Memory { expected, found });
        }
    }
    let (memory, pages) = flatten(snapshot, pages, base.as_ref(), inner.config.numa)?;
    let dense = inner.config.dense_pages;
    let working_set_key = snapshot.0.protection.working_set.clone();
    let working_set =
        WorkingSet::load(&snapshot.0.dir, &snapshot.0.id, &working_set_key, &pages, dense);
    let class = ShellClass { vcpus: manifest.vcpus, memory_mib: manifest.memory_mib };
    inner.copies(class, working_set.report().copied_regions);
    let state = memfile::sealed("firn-vm-state", vm_state).map_err(at("keep the VM's state"))?;
    let delta = read_delta(snapshot)?;
    Ok(ResidentSnapshot(Arc::new(Resident {
        id: snapshot.0.id,
        manifest: manifest.clone(),
        memory,
        pages,
        state,
        delta,
        image,
        code,
        dir: snapshot.0.dir.clone(),
        working_set,
        working_set_key,
        dense,
    })))
}

/// Everything that a snapshot needs of its host must be what it was made with.
fn check_environment(
    manifest: &Manifest,
    inner: &Inner,
    code: Option<&Disk>,
) -> Result<Image, SnapshotError> {
    let artifacts = &inner.artifacts;
    let kernel = artifacts.kernel_hash.as_bytes();
    if manifest.kernel != *kernel {
        return Err(SnapshotError::Kernel { expected: hex(&manifest.kernel), found: hex(kernel) });
    }
    let image = artifacts.images.get(&manifest.runtime);
    let image = match image {
        Some(image) if image.0.hash.as_bytes() == &manifest.image => image.clone(),
        other => {
            return Err(SnapshotError::Image {
                runtime: manifest.runtime.clone(),
                expected: hex(&manifest.image),
                found: other.map_or_else(|| "none".into(), Image::hash),
            });
        }
    };
    let tmp = artifacts.tmp_hash.as_bytes();
    if manifest.tmp_disk != *tmp {
        return Err(SnapshotError::TmpDisk { expected: hex(&manifest.tmp_disk), found: hex(tmp) });
    }
    let found = code.map(|disk| *disk.hash().as_bytes());
    if found != manifest.code {
        let name = |hash: Option<[u8; 32]>| hash.map_or_else(|| "none".into(), |h| hex(&h));
        return Err(SnapshotError::Code { expected: name(manifest.code), found: name(found) });
    }
    Ok(image)
}

/// Lays base and differences out as one linear image. The hash is taken of what arrived, not of
/// what the file says.
fn flatten(
    snapshot: &Snapshot,
    pages: &Bitmap,
    base: Option<&ResidentSnapshot>,
    numa: Numa,
) -> Result<(OwnedFd, Bitmap), SnapshotError> {
    let manifest = &snapshot.0.state.manifest;
    let length = manifest.memory_bytes();
    let mut source = Source::open(snapshot, length, pages)?;

    let target = memfile::create("firn-memory").map_err(at("make a memory file"))?;
    target.set_len(length).map_err(at("make a memory file"))?;
    let all = match base {
        Some(base) => base.0.pages.union(pages),
        None => pages.clone(),
    };
    {
        // SAFETY: this function has made the file, which is as long as that, and gives it to nobody
        // before the mapping is gone.
        let map = unsafe { Writable::map(&target, length as usize) };
        let mut map = map.map_err(at("map a memory file"))?;
        if numa == Numa::Interleave {
            map.interleave(&nodes_with_memory()).map_err(at("interleave a memory file"))?;
        }
        advise_dense(&mut map, &all);
        if let Some(base) = base {
            let from = File::from(memfile::reopen(base.memory()).map_err(at("read the base"))?);
            for run in base.0.pages.minus(pages).runs() {
                let offset = run.start * PAGE;
                from.read_exact_at(&mut map[bytes(run)], offset).map_err(at("copy the base"))?;
            }
        }
        let mut hasher = blake3::Hasher::new();
        for run in pages.runs() {
            let offset = run.start * PAGE;
            let target = &mut map[bytes(run)];
            source.read(target, offset).map_err(at("copy memory"))?;
            hasher.update(target);
        }
        source.finish().map_err(at("copy memory"))?;
        let found = *hasher.finalize().as_bytes();
        if found != manifest.memory {
            let (expected, found) = (hex(&manifest.memory), hex(&found));
            return Err(SnapshotError::Altered { what: "memory", expected, found });
        }
    }
    let memory = memfile::seal(target).map_err(at("seal a memory file"))?;
    Ok((memory, all))
}

/// NUMA nodes that have memory; the first one alone where the kernel does not tell.
fn nodes_with_memory() -> Vec<usize> {
    let list = std::fs::read_to_string("/sys/devices/system/node/has_memory").unwrap_or_default();
    let nodes = listed(list.trim());
    if nodes.is_empty() { vec![0] } else { nodes }
}

/// The numbers of a list such as `0-1,4`; what is no number is left out.
fn listed(list: &str) -> Vec<usize> {
    let ranges = list.split(',').filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(first.parse().ok()?..=last.parse().ok()?)
    });
    ranges.flatten().collect()
}

/// Where pages come from, in their order.
enum Source {
    /// A file as large as the memory, each page where it belongs.
    Clear(File),
    /// The pages alone, one after the other, encrypted.
    Sealed(SealReader<BufReader<File>>),
}

impl Source {
    fn open(snapshot: &Snapshot, length: u64, pages: &Bitmap) -> Result<Self, SnapshotError> {
        let sealed = snapshot.open_sealed("memory")?;
        let expected = match sealed {
            Some(_) => sealed_length(pages.count() * PAGE),
            None => length,
        };
        let file = snapshot.open_file("memory")?;
        let found = file.metadata().map_err(at("read memory"))?.len();
        if found < expected {
            return Err(SnapshotError::Truncated { what: "memory", expected, found });
        }
        if found > expected {
            return Err(SnapshotError::Memory { expected, found });
        }
        Ok(sealed.map_or(Self::Clear(file), Self::Sealed))
    }

    fn read(&mut self, target: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            Self::Clear(file) => file.read_exact_at(target, offset),
            Self::Sealed(reader) => reader.read_exact(target),
        }
    }

    fn finish(self) -> io::Result<()> {
        match self {
            Self::Clear(_) => Ok(()),
            Self::Sealed(reader) => reader.finish(),
        }
    }
}

fn read_delta(snapshot: &Snapshot) -> Result<OwnedFd, SnapshotError> {
    let manifest = &snapshot.0.state.manifest;
    let length = manifest.delta_bytes;
    let target = memfile::create("firn-tmp-delta").map_err(at("make a memory file"))?;
    let found = match snapshot.open_sealed("tmp.delta")? {
        Some(mut reader) => read_sparse(&mut reader, &target, length),
        None => {
            let source = snapshot.open_file("tmp.delta")?;
            let found = source.metadata().map_err(at("read tmp.delta"))?.len();
            if found < length {
                let (what, expected) = ("tmp.delta", length);
                return Err(SnapshotError::Truncated { what, expected, found });
            }
            copy_sparse(&source, &target, length)
        }
    };
    let found = *found.map_err(at("copy tmp.delta"))?.as_bytes();
    if found != manifest.delta {
        let (expected, found) = (hex(&manifest.delta), hex(&found));
        return Err(SnapshotError::Altered { what: "tmp.delta", expected, found });
    }
    memfile::seal(target).map_err(at("seal a memory file"))
}

/// Asks for huge pages where at least half of one would be used; elsewhere the saving of faults is not
/// worth the memory. Before the first write.
fn advise_dense(memory: &mut Writable, pages: &Bitmap) {
    const PAGES: u64 = REGION / PAGE;
    for start in (0..pages.size()).step_by(PAGES as usize) {
        let end = start + PAGES;
        if end <= pages.size() && pages.count_in(start..end) >= PAGES / 2 {
            memory.advise_huge(bytes(start..end));
        }
    }
}

/// Where a run of pages lies in memory.
fn bytes(run: Range<u64>) -> Range<usize> {
    (run.start * PAGE) as usize..(run.end * PAGE) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_nodes_are_read() {
        assert_eq!(listed("0"), [0]);
        assert_eq!(listed("0-2,5"), [0, 1, 2, 5]);
        assert!(listed("").is_empty());
        assert_eq!(listed("x,3-2,7"), [7]);
        assert!(!nodes_with_memory().is_empty());
    }
}
