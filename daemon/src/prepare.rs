//! Makes snapshots in the background, so that requests find something to thaw.
//!
//! ```text
//! boot ──▶ base-<runtime>-<class>-<image>  ──thaw, load code, init──▶  fn-<fingerprint>
//! ```
//!
//! Bases are made once for each runtime and size class, function snapshots once for each
//! fingerprint; both stay on disk and are reused after a restart if [`firn`] finds them to be its own, to
//! be what their names say, and to fit this kernel, image and CPU. One preparation runs at a time. A preparation that fails is logged and
//! leaves the function as it was: it starts by booting. Requests never wait here.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use firn::{ShellClass, SnapshotError, SnapshotMeta};
use tokio::sync::Semaphore;

use crate::{
    backend::{Backend, Machine},
    function::Function,
    outcome::Answer,
    workshop::Workshop,
};

/// Where a function's snapshot stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// There is none, and none is being made.
    None,
    /// It is being made.
    Preparing,
    /// It is in memory.
    Ready,
    /// It could not be made.
    Failed(String),
}

impl Status {
    /// One word.
    pub fn word(&self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Preparing => "preparing",
            Self::Ready => "ready",
            Self::Failed(_) => "failed",
        }
    }
}

#[derive(Debug)]
struct Entry<R> {
    /// Tells this preparation from later ones of the same function.
    generation: u64,
    fingerprint: String,
    status: Status,
    resident: Option<R>,
}

/// Why there is no snapshot of a function.
#[derive(Debug, thiserror::Error)]
enum PrepareError {
    #[error("the base could not be booted or thawed: {0}")]
    Start(#[from] firn::StartError),
    #[error("the function could not be loaded: {0}")]
    Load(#[from] firn::InstanceError),
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error("the function fails to initialise: {0}")]
    Init(String),
    #[error("{0}")]
    Other(String),
}

/// Makes and keeps snapshots.
#[derive(Debug)]
pub struct Preparer<B: Backend> {
    workshop: Workshop<B>,
    dir: PathBuf,
    /// By qualified name.
    functions: Mutex<HashMap<String, Entry<B::Resident>>>,
    bases: Mutex<HashMap<PathBuf, B::Resident>>,
    generations: AtomicU64,
    gate: Semaphore,
}

impl<B: Backend> Preparer<B> {
    /// A preparer for the directory `dir`; snapshots of functions other than `known` are removed.
    ///
    /// # Errors
    /// The directory can't be made or read.
    pub fn open(
        workshop: Workshop<B>,
        dir: PathBuf,
        known: &[Arc<Function>],
    ) -> io::Result<Arc<Self>> {
        fs::create_dir_all(&dir)?;
        let mut claimed: Vec<String> =
            known.iter().map(|f| format!("fn-{}", f.fingerprint(&workshop.place))).collect();
        claimed.sort();
        let images: Vec<String> = workshop
            .backend
            .runtimes()
            .iter()
            .filter_map(|runtime| base_suffix(&workshop.backend.image_hash(runtime)?))
            .collect();
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let base = name.starts_with("base-") && images.iter().any(|i| name.ends_with(i));
            if !base && claimed.binary_search(&name).is_err() {
                remove(&entry.path());
            }
        }
        Ok(Arc::new(Self {
            workshop,
            dir,
            functions: Mutex::default(),
            bases: Mutex::default(),
            generations: AtomicU64::new(0),
            gate: Semaphore::new(1),
        }))
    }

    /// Makes a snapshot of `function` in the background, unless there is one already or one is on
    /// its way. One that failed is tried again: the reason may have gone.
    pub fn ensure(self: &Arc<Self>, function: Arc<Function>) {
        let fingerprint = function.fingerprint(&self.workshop.place).to_owned();
        let generation = self.generations.fetch_add(1, Ordering::Relaxed);
        let fresh = Entry {
            generation,
            fingerprint: fingerprint.clone(),
            status: Status::Preparing,
            resident: None,
        };
        let key = function.qualified_name();
        {
            let mut functions = self.lock();
            let current = functions.get(&key).filter(|e| e.fingerprint == fingerprint);
            if current.is_some_and(|e| !matches!(e.status, Status::Failed(_))) {
                return;
            }
            functions.insert(key.clone(), fresh);
        }
        let preparer = self.clone();
        tokio::spawn(async move {
            let Ok(_turn) = preparer.gate.acquire().await else { return };
            if !preparer.is_current(&key, generation) {
                return;
            }
            let dir = preparer.dir.join(format!("fn-{fingerprint}"));
            let result = preparer.prepare(&function, &dir).await;
            preparer.conclude(&key, generation, &dir, result);
        });
    }

    /// Forgets the snapshot of a function that is gone or has changed.
    pub fn forget(&self, name: &str, fingerprint: &str) {
        let known = {
            let mut functions = self.lock();
            match functions.get(name) {
                Some(entry) if entry.fingerprint == fingerprint => functions.remove(name),
                _ => None,
            }
        };
        drop(known);
        remove(&self.dir.join(format!("fn-{fingerprint}")));
    }

    /// The snapshot to thaw for a function of this fingerprint.
    pub fn resident(&self, name: &str, fingerprint: &str) -> Option<B::Resident> {
        let functions = self.lock();
        functions.get(name).filter(|e| e.fingerprint == fingerprint)?.resident.clone()
    }

    /// Starts no more preparations; what goes on is about to be cut off, quietly.
    pub fn close(&self) {
        self.gate.close();
    }

    /// Where the snapshot stands.
    pub fn status(&self, name: &str, fingerprint: &str) -> Status {
        let functions = self.lock();
        functions
            .get(name)
            .filter(|e| e.fingerprint == fingerprint)
            .map_or(Status::None, |e| e.status.clone())
    }

    /// Stops offering a snapshot that could not be thawed.
    pub fn discredit(&self, name: &str, fingerprint: &str, reason: String) {
        if let Some(entry) = self.lock().get_mut(name).filter(|e| e.fingerprint == fingerprint) {
            entry.resident = None;
            entry.status = Status::Failed(reason);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Entry<B::Resident>>> {
        self.functions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_current(&self, name: &str, generation: u64) -> bool {
        self.lock().get(name).is_some_and(|e| e.generation == generation)
    }

    fn conclude(
        &self,
        name: &str,
        generation: u64,
        dir: &Path,
        result: Result<B::Resident, PrepareError>,
    ) {
        let mut functions = self.lock();
        let Some(entry) = functions.get_mut(name).filter(|e| e.generation == generation) else {
            drop(functions);
            // The function changed meanwhile; whoever changed it looked before this was here.
            remove(dir);
            return;
        };
        match result {
            Ok(resident) => {
                tracing::info!(function = name, "snapshot ready");
                entry.resident = Some(resident);
                entry.status = Status::Ready;
            }
            Err(_) if self.gate.is_closed() => {}
            Err(error) => {
                // What the function itself says is in its own log, and may be a secret.
                let shown = match &error {
                    PrepareError::Init(_) => "the function fails to initialise".to_owned(),
                    other => other.to_string(),
                };
                tracing::warn!(
                    function = name,
                    error = shown,
                    "no snapshot: the function will be booted"
                );
                entry.status = Status::Failed(error.to_string());
            }
        }
    }

    async fn prepare(
        &self,
        function: &Arc<Function>,
        dir: &Path,
    ) -> Result<B::Resident, PrepareError> {
        let Workshop { backend, place, .. } = &self.workshop;
        let key = function.fingerprint(place).to_owned();
        let class = ShellClass::for_memory(function.config.memory_mb);
        let base = self.base(&function.config.runtime, class).await?;
        let code = self.workshop.disk(function).await.map_err(PrepareError::Other)?;
        if dir.exists() {
            match backend.make_resident(dir, &key, Some(&base), Some(&code)).await {
                Ok(resident) => return Ok(resident),
                Err(error) => {
                    tracing::warn!(function = function.qualified_name(), %error, "making a new snapshot");
                    remove(dir);
                }
            }
        }
        let (mut output, outlets) = self.workshop.output(function);
        let thaw = backend.thaw(&base, None, outlets.clone());
        let (mut machine, _) = output.during(thaw).await?;
        let spec = self.workshop.spec(function, code.clone(), "snap-start", &output, outlets);
        let loaded = output.during(machine.load(&spec, true)).await;
        output.stream.flush().await;
        let failure = match loaded {
            Ok(report) => report.error.map(|error| PrepareError::Init(describe(error))),
            Err(error) => Some(error.into()),
        };
        if let Some(failure) = failure {
            machine.retire().await;
            return Err(failure);
        }
        let meta = SnapshotMeta { label: function.qualified_name(), key: key.clone() };
        output.during(machine.snapshot(dir, meta)).await?;
        output.stream.flush().await;
        Ok(backend.make_resident(dir, &key, Some(&base), Some(&code)).await?)
    }

    /// The base for a runtime and class: from memory, from disk, or made. Only called with the
    /// gate held, so never twice at once.
    async fn base(&self, runtime: &str, class: ShellClass) -> Result<B::Resident, PrepareError> {
        let backend = &self.workshop.backend;
        let hash = backend.image_hash(runtime);
        let Some(suffix) = hash.as_deref().and_then(base_suffix) else {
            return Err(PrepareError::Other(format!("there is no image for runtime {runtime:?}")));
        };
        let ShellClass { vcpus, memory_mib } = class;
        let key = format!("base {runtime} {vcpus}x{memory_mib}{suffix}");
        let dir = self.dir.join(format!("base-{runtime}-{vcpus}x{memory_mib}{suffix}"));
        let known = {
            let bases = self.bases.lock().unwrap_or_else(PoisonError::into_inner);
            bases.get(&dir).cloned()
        };
        if let Some(base) = known {
            return Ok(base);
        }
        let mut reused = None;
        if dir.exists() {
            match backend.make_resident(&dir, &key, None, None).await {
                Ok(base) => reused = Some(base),
                Err(error) => {
                    tracing::warn!(runtime, memory_mib, %error, "making a new base snapshot");
                    remove(&dir);
                }
            }
        }
        let base = match reused {
            Some(base) => base,
            None => {
                let machine = backend.boot(runtime, class).await?;
                let label = format!("{runtime} {vcpus}x{memory_mib}");
                let meta = SnapshotMeta { label, key: key.clone() };
                machine.snapshot(&dir, meta).await?;
                let base = backend.make_resident(&dir, &key, None, None).await?;
                tracing::info!(runtime, vcpus, memory_mib, "base snapshot ready");
                base
            }
        };
        let mut bases = self.bases.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(bases.entry(dir).or_insert(base).clone())
    }
}

fn base_suffix(hash: &str) -> Option<String> {
    hash.get(..16).map(|hash| format!("-{hash}"))
}

fn describe(error: firn::guest::FunctionError) -> String {
    let answer = Answer::of(firn::guest::Outcome::Error(error), "INIT");
    String::from_utf8_lossy(&answer.payload).chars().take(1000).collect()
}

/// Removes a snapshot's directory. Renamed at once, so that a new one may be made in its place and
/// nothing half removed looks whole; the rest happens in the background.
fn remove(dir: &Path) {
    let doomed = dir.with_file_name(format!("gone-{}", uuid::Uuid::new_v4()));
    let warn = |error: io::Error, dir: &Path| {
        tracing::warn!(dir = %dir.display(), %error, "can't remove a snapshot");
    };
    match fs::rename(dir, &doomed) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => warn(error, dir),
        Ok(()) => {
            let delete = move || {
                if let Err(error) = fs::remove_dir_all(&doomed) {
                    warn(error, &doomed);
                }
            };
            match tokio::runtime::Handle::try_current() {
                Ok(runtime) => drop(runtime.spawn_blocking(delete)),
                Err(_) => delete(),
            }
        }
    }
}
