//! Runs functions in microVMs, each in its own jail: what a function scheduler embeds.
//!
//! ```text
//!  Host ──shell()──▶ Shell      a jailed VMM that waits (pooled by class)
//!   │ ───boot()───▶ Instance    image booted, guest says Ready
//!   │ ───thaw()───▶ Instance    resident snapshot mapped into a shell, renewed, first event handled
//!  Instance ──load()/invoke()/pause()──▶ …  ──snapshot()──▶ Snapshot ──make_resident()──▶ thaw()
//! ```
//!
//! This crate talks to `firn-vmm` ([`control`]) and to `firn-init` in the guest ([`guest`]), and
//! trusts neither: every length, identity and hash that they report is checked here. Only this
//! crate starts VMMs, always through `firn-jailer`. It knows nothing of HTTP, ARNs or accounts; it
//! never reads guest memory except to copy, hash and encrypt a snapshot's pages.
//!
//! All of it needs a tokio runtime with time and I/O enabled. Nothing outlives a [`Host`]:
//! [`Host::shutdown`] waits until every process, control group and file of this life is gone, and
//! [`Host::open`] removes what an earlier life that was killed has left.

mod artifacts;
mod audit;
mod cgroup;
mod channel;
pub mod code;
mod config;
mod descriptors;
mod dir;
mod disk;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod host;
mod image;
pub mod initramfs;
mod instance;
pub mod keys;
mod launch;
mod memfile;
mod moment;
mod open;
mod outlets;
mod phases;
mod process;
mod reset;
mod response;
mod shell;
mod snapshot;
mod start;
mod stream;
mod vm;

pub use firn_proto::{control, guest};

pub use config::{HostConfig, Numa, ShellClass};
pub use descriptors::raise_descriptor_limit;
pub use disk::{Disk, DiskError, WeakDisk};
pub use host::Host;
pub use image::{Image, ImageError};
pub use instance::{
    FunctionSpec, Instance, InstanceError, Invocation, InvokeReport, LoadReport, VmmExit,
};
pub use open::OpenError;
pub use outlets::{LogLine, LogSink, Outlets, Services};
pub use phases::Phases;
pub use reset::{RENEWAL, ResetReport};
pub use response::{ResponsePart, ResponseSink};
pub use shell::{Shell, ShellError};
pub use snapshot::{ResidentSnapshot, Snapshot, SnapshotError, SnapshotMeta, WorkingSetReport};
pub use start::StartError;
