//! One machine's microVMs.

use std::{io, path::PathBuf, time::Duration};

use firn_proto::control;

use crate::{
    HostConfig, Image, ImageError, Instance, Invocation, InvokeReport, LogSink, ResidentSnapshot,
    ShellClass, VmmExit,
};

/// Makes and keeps microVMs. Cheap to clone; call [`Host::shutdown`] before the process ends.
#[derive(Debug, Clone)]
pub struct Host;

/// A jailed VMM with a microVM of one class that waits for what to run. Dropping it kills it.
#[derive(Debug)]
pub struct Shell;

/// Why a host can't open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A file of the installation is missing or unusable.
    #[error("the installation in {} has no usable {what} ({}): {source}", artifacts.display(), path.display())]
    Artifact {
        /// The installation.
        artifacts: PathBuf,
        /// Which part: `firn-vmm`, `kernel`, `/tmp disk`…
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is no image at all.
    #[error("no images in {}", path.display())]
    NoImages {
        /// The directory that was searched.
        path: PathBuf,
    },
    /// An image is damaged.
    #[error("image {runtime:?} can't be used: {source}")]
    Image {
        /// The runtime.
        runtime: String,
        /// Why.
        source: ImageError,
    },
    /// The machine has no KVM.
    #[error(
        "there is no /dev/kvm: load KVM's module (kvm_intel, kvm_amd), or allow nested virtualisation"
    )]
    NoKvm,
    /// This user may not use KVM.
    #[error("no permission for /dev/kvm: run as root, or join the group that owns it")]
    KvmPermission,
    /// KVM is there but can't be used.
    #[error("/dev/kvm can't be used: {0}")]
    Kvm(io::Error),
    /// Building jails needs root.
    #[error("jails can only be built by root (this is user {uid})")]
    NotRoot {
        /// Who this is.
        uid: u32,
    },
    /// No way to limit microVMs.
    #[error("control groups: {0}")]
    Cgroup(String),
    /// Another host lives in this state directory.
    #[error("{} is in use by another process", path.display())]
    InUse {
        /// The state directory.
        path: PathBuf,
    },
    /// A value of the configuration makes no sense.
    #[error("{field}: {reason}")]
    Config {
        /// Name of the field.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A file or directory of the state could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Why there is no shell.
#[derive(Debug, thiserror::Error)]
pub enum ShellError {
    /// The host is shutting down.
    #[error("the host is shutting down")]
    Closed,
    /// More microVMs at once than users to run them as.
    #[error("all {limit} user ids for microVMs are taken")]
    NoUid {
        /// How many there are.
        limit: usize,
    },
    /// The class is impossible.
    #[error("no microVM can have {vcpus} vCPUs and {memory_mib} MiB of memory")]
    Class {
        /// Asked for.
        vcpus: u8,
        /// Asked for.
        memory_mib: u32,
    },
    /// The process could not be made.
    #[error("{step}: {source}")]
    Spawn {
        /// What was being done.
        step: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The jailer or the VMM ended before the shell stood.
    #[error("the shell ended: {exit}")]
    Died {
        /// How; the detail names the jailer's step.
        exit: VmmExit,
    },
    /// The VMM refused to build the microVM.
    #[error("the VMM refused: {message}")]
    Refused {
        /// Class of the failure.
        kind: control::FailureKind,
        /// Its words.
        message: String,
    },
    /// It took too long.
    #[error("the shell was not ready within {after:?}")]
    TimedOut {
        /// How long it was given.
        after: Duration,
    },
    /// The VMM broke its protocol.
    #[error("protocol violation: {0}")]
    Protocol(String),
}

/// Why an instance did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// There was no shell to start it in.
    #[error(transparent)]
    Shell(#[from] ShellError),
    /// The VMM refused the kernel or the snapshot.
    #[error("the VMM refused: {message}")]
    Refused {
        /// Class of the failure: `BadKernel`, `SnapshotCpu`…
        kind: control::FailureKind,
        /// Its words.
        message: String,
    },
    /// It ended before it was ready.
    #[error("the microVM ended while it started: {exit}")]
    Died {
        /// How.
        exit: VmmExit,
    },
    /// It took too long.
    #[error("no {waiting_for} within {after:?}")]
    TimedOut {
        /// What it should have said.
        waiting_for: &'static str,
        /// How long it was given.
        after: Duration,
    },
    /// The guest speaks another version of the protocol.
    #[error("the guest speaks protocol version {found}, this host {supported}")]
    GuestVersion {
        /// The guest's.
        found: u16,
        /// Ours.
        supported: u16,
    },
    /// A thawed guest did not repeat its new identity: it must never serve.
    #[error("the thawed guest calls itself {found:?}, not {expected:?}")]
    NotRenewed {
        /// The identity that it was given.
        expected: String,
        /// What it said.
        found: String,
    },
    /// The guest or the VMM broke its protocol.
    #[error("protocol violation: {0}")]
    Protocol(String),
    /// The first invocation can't be sent.
    #[error("{0}")]
    Request(String),
    /// The host's own kernel refused.
    #[error("{operation}: {source}")]
    Io {
        /// What was being done.
        operation: &'static str,
        /// Why not.
        source: io::Error,
    },
}

impl Host {
    /// Checks the installation and the machine, removes what an earlier life has left, and opens.
    ///
    /// # Errors
    /// Any [`OpenError`].
    pub async fn open(_config: HostConfig) -> Result<Self, OpenError> {
        unimplemented!()
    }

    /// The image of `runtime`.
    ///
    /// # Errors
    /// [`ImageError::Unknown`].
    pub fn image(&self, _runtime: &str) -> Result<Image, ImageError> {
        unimplemented!()
    }

    /// Names of all runtimes, sorted.
    pub fn images(&self) -> Vec<String> {
        unimplemented!()
    }

    /// A shell from the pool, or a new one. The pool is refilled in the background.
    ///
    /// # Errors
    /// Any [`ShellError`].
    pub async fn shell(&self, _class: ShellClass) -> Result<Shell, ShellError> {
        unimplemented!()
    }

    /// Fills the pool of `class` and waits for it.
    ///
    /// # Errors
    /// Any [`ShellError`].
    pub async fn prepare(&self, _class: ShellClass) -> Result<(), ShellError> {
        unimplemented!()
    }

    /// Boots `image` until its init is ready for a function.
    ///
    /// # Errors
    /// Any [`StartError`].
    pub async fn boot(&self, _image: &Image, _class: ShellClass) -> Result<Instance, StartError> {
        unimplemented!()
    }

    /// Thaws a snapshot into a shell and renews its identity. With `first`, the event rides along
    /// and its result is returned too. Output of restore hooks and of the first event goes to
    /// `log`, as later output does.
    ///
    /// # Errors
    /// Any [`StartError`].
    pub async fn thaw(
        &self,
        _snapshot: &ResidentSnapshot,
        _first: Option<&Invocation>,
        _log: Option<LogSink>,
    ) -> Result<(Instance, Option<InvokeReport>), StartError> {
        unimplemented!()
    }

    /// Kills everything and waits until nothing is left. Later calls fail with
    /// [`ShellError::Closed`].
    pub async fn shutdown(&self) {
        unimplemented!()
    }
}
