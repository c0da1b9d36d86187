//! What the scheduler needs of the thing that runs microVMs, as a trait with two users: the
//! `firn` library in production, and a fake without KVM in this crate's tests.
//!
//! The trait adds no behaviour: every method is one call into [`firn`].

use std::{fmt::Debug, future::Future, path::Path};

use firn::{
    Disk, FunctionSpec, Host, Instance, InstanceError, Invocation, InvokeReport, LoadReport,
    Outlets, Phases, ResidentSnapshot, ShellClass, Snapshot, SnapshotError, SnapshotMeta,
    StartError,
    code::{CodeDisk, CodeError},
};

/// Starts microVMs. See [`firn::Host`].
pub trait Backend: Debug + Clone + Send + Sync + 'static {
    /// A running microVM.
    type Machine: Machine;
    /// A snapshot in memory, ready to thaw.
    type Resident: Debug + Clone + Send + Sync + 'static;

    /// Interrupts that were raised again since the start.
    fn interrupts_raised_again(&self) -> u64;
    /// Names of the runtimes that there are, sorted.
    fn runtimes(&self) -> Vec<String>;
    /// Hash of a runtime's image, if there is one of that name.
    fn image_hash(&self, runtime: &str) -> Option<String>;
    /// Boots an image until its init waits for a function.
    fn boot(
        &self,
        runtime: &str,
        class: ShellClass,
    ) -> impl Future<Output = Result<Self::Machine, StartError>> + Send;
    /// Thaws a snapshot, with the first event riding along.
    fn thaw(
        &self,
        snapshot: &Self::Resident,
        first: Option<&Invocation>,
        outlets: Outlets,
    ) -> impl Future<Output = Result<(Self::Machine, Option<InvokeReport>), StartError>> + Send;
    /// Verifies the snapshot in `dir`, which must have been made with `key` in its
    /// [`SnapshotMeta`], and brings it into memory.
    fn make_resident(
        &self,
        dir: &Path,
        key: &str,
        base: Option<&Self::Resident>,
        code: Option<&Disk>,
    ) -> impl Future<Output = Result<Self::Resident, SnapshotError>> + Send;
    /// Turns a function's zip archive and those of its layers into a code disk. Blocks.
    ///
    /// # Errors
    /// Any [`CodeError`].
    fn build_disk(&self, code: &[u8], layers: &[Vec<u8>]) -> Result<CodeDisk, CodeError>;
    /// Kills everything and waits until nothing is left.
    fn shutdown(&self) -> impl Future<Output = ()> + Send;
}

/// One running microVM. See [`firn::Instance`]. Dropping it kills it.
pub trait Machine: Debug + Send + Sync + 'static {
    /// Unique for ever; another one after a reset.
    fn id(&self) -> &str;
    /// Process id of its VMM.
    fn pid(&self) -> u32;
    /// Whether its process runs.
    fn is_alive(&self) -> bool;
    /// How its start went.
    fn start_phases(&self) -> &Phases;
    /// Attaches the code and starts the runtime.
    fn load(
        &mut self,
        spec: &FunctionSpec,
        for_snapshot: bool,
    ) -> impl Future<Output = Result<LoadReport, InstanceError>> + Send;
    /// Handles one event; a paused microVM resumes by itself.
    fn invoke(
        &mut self,
        invocation: &Invocation,
    ) -> impl Future<Output = Result<InvokeReport, InstanceError>> + Send;
    /// Stops the vCPUs until the next event.
    fn pause(&mut self) -> impl Future<Output = Result<(), InstanceError>> + Send;
    /// Has a paused microVM give back memory that it holds without need; bytes.
    fn reclaim(&mut self) -> impl Future<Output = Result<u64, InstanceError>> + Send;
    /// Takes a thawed microVM back to its snapshot; it is paused then.
    fn reset(&mut self) -> impl Future<Output = Result<(), InstanceError>> + Send;
    /// Writes the microVM to `dir` and retires it.
    fn snapshot(
        self,
        dir: &Path,
        meta: SnapshotMeta,
    ) -> impl Future<Output = Result<(), SnapshotError>> + Send;
    /// Kills the microVM.
    fn retire(self) -> impl Future<Output = ()> + Send;
}

impl Backend for Host {
    type Machine = Instance;
    type Resident = ResidentSnapshot;

    fn interrupts_raised_again(&self) -> u64 {
        Host::interrupts_raised_again(self)
    }

    fn runtimes(&self) -> Vec<String> {
        self.images()
    }

    fn image_hash(&self, runtime: &str) -> Option<String> {
        self.image(runtime).ok().map(|image| image.hash())
    }

    async fn boot(&self, runtime: &str, class: ShellClass) -> Result<Instance, StartError> {
        let image = self.image(runtime).map_err(|e| StartError::Request(e.to_string()))?;
        Host::boot(self, &image, class).await
    }

    async fn thaw(
        &self,
        snapshot: &ResidentSnapshot,
        first: Option<&Invocation>,
        outlets: Outlets,
    ) -> Result<(Instance, Option<InvokeReport>), StartError> {
        Host::thaw(self, snapshot, first, outlets).await
    }

    async fn make_resident(
        &self,
        dir: &Path,
        key: &str,
        base: Option<&ResidentSnapshot>,
        code: Option<&Disk>,
    ) -> Result<ResidentSnapshot, SnapshotError> {
        let (host, dir) = (self.clone(), dir.to_owned());
        // It asks the key service.
        let opening = tokio::task::spawn_blocking(move || Snapshot::open(&host, dir));
        let opened = opening.await.map_err(|e| SnapshotError::Io {
            what: "open the snapshot".into(),
            source: std::io::Error::other(e),
        })?;
        opened?.expect(key)?.make_resident(self, base, code).await
    }

    fn build_disk(&self, code: &[u8], layers: &[Vec<u8>]) -> Result<CodeDisk, CodeError> {
        firn::code::build_disk(code, layers)
    }

    async fn shutdown(&self) {
        Host::shutdown(self).await;
    }
}

impl Machine for Instance {
    fn id(&self) -> &str {
        Instance::id(self)
    }

    fn pid(&self) -> u32 {
        Instance::pid(self)
    }

    fn is_alive(&self) -> bool {
        Instance::is_alive(self)
    }

    fn start_phases(&self) -> &Phases {
        Instance::start_phases(self)
    }

    async fn load(
        &mut self,
        spec: &FunctionSpec,
        for_snapshot: bool,
    ) -> Result<LoadReport, InstanceError> {
        Instance::load(self, spec, for_snapshot).await
    }

    async fn invoke(&mut self, invocation: &Invocation) -> Result<InvokeReport, InstanceError> {
        Instance::invoke(self, invocation).await
    }

    async fn pause(&mut self) -> Result<(), InstanceError> {
        Instance::pause(self).await
    }

    async fn reclaim(&mut self) -> Result<u64, InstanceError> {
        Instance::reclaim(self).await
    }

    async fn reset(&mut self) -> Result<(), InstanceError> {
        let report = Instance::reset(self).await?;
        let (pages, us) = (report.pages, report.duration.as_micros() as u64);
        tracing::debug!(id = Instance::id(self), pages, us, "reset");
        Ok(())
    }

    async fn snapshot(self, dir: &Path, meta: SnapshotMeta) -> Result<(), SnapshotError> {
        Instance::snapshot(self, dir, meta).await.map(drop)
    }

    async fn retire(self) {
        Instance::retire(self).await;
    }
}
