//! What is measured, seen from outside: the boundary that Firn and its peers share.
//!
//! A [`Subject`] is a way to run functions in microVMs. Every operation takes a request and returns
//! a [`Trip`]: when the request came in, when the whole answer was out, and what lay between, all
//! on one clock, `CLOCK_MONOTONIC` of the host, in nanoseconds ([`crate::clock::now_ns`]). What an
//! operation needs beforehand (a pool, a snapshot) is made outside of it.
//!
//! ```text
//! Subject ──deploy──▶ Deployed ──start──▶ Running ──invoke──▶ … ──end──▶
//!        the function's            one microVM
//!        snapshot exists
//! ```
//!
//! Another peer is one file that implements these three traits, and one line in
//! [`crate::run`](mod@crate::run). Stamps carry the [names](stamp) of the same moment in all
//! subjects, where it exists in them, so that their bars compare.

use std::collections::BTreeMap;

use async_trait::async_trait;
use serde_json::Value;

use crate::{
    error::{Error, Result},
    functions::Function,
    scenario::Scenario,
};

/// Names of the moments that lie within a [`Trip`]; each is the end of what it names.
pub mod stamp {
    /// A process stands ready for a guest: taken from the pool, or spawned.
    pub const SHELL: &str = "shell";
    /// The host has sent what to run.
    pub const SENT: &str = "sent";
    /// The VMM has received it.
    pub const RECEIVED: &str = "received";
    /// Guest memory is mapped (thaw), or the kernel is loaded (boot).
    pub const MAPPED: &str = "mapped";
    /// Pages that the guest will touch are in place before it runs.
    pub const POPULATED: &str = "populated";
    /// Devices, interrupt controllers and clock are set.
    pub const DEVICES_SET: &str = "devices set";
    /// The first vCPU has its registers.
    pub const VCPU_SET: &str = "vcpu set";
    /// Just before the first entry into the guest.
    pub const ENTERED: &str = "entered";
    /// The guest's first exit to user space: some instruction of it has run.
    pub const FIRST_EXIT: &str = "first exit";
    /// First instruction of the guest's init, on the guest's clock.
    pub const INIT: &str = "guest init";
    /// The guest is ready for a function.
    pub const READY: &str = "ready";
    /// The function's runtime waits for an event.
    pub const LOADED: &str = "loaded";
    /// The guest has its new identity; restore hooks have run.
    pub const RENEWED: &str = "renewed";
    /// The guest's init has read the whole event, on the guest's clock.
    pub const EVENT_READ: &str = "event read";
    /// The guest's init has the answer, on the guest's clock.
    pub const ANSWERED: &str = "answered";
    /// The first byte from the guest is at the host.
    pub const FIRST_BYTE: &str = "first byte";
    /// The vCPUs stand still (reset).
    pub const STOPPED: &str = "stopped";
    /// The instance is its snapshot again.
    pub const RESET: &str = "reset";
    /// The vCPUs stand still and everything is written down.
    pub const SAVED: &str = "saved";
    /// The process has ended and is reaped.
    pub const REAPED: &str = "reaped";
}

/// What a guest comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Origin {
    /// Kernel, init, runtime and function start.
    Boot,
    /// All of them are in a snapshot.
    Snapshot,
}

/// What stands when the request comes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Process {
    /// No VMM: its process is made within the trip, jail and all.
    Fresh,
    /// A VMM process that has done whatever it can without knowing the function.
    Ready,
}

/// A way to start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Start {
    /// What the guest comes from.
    pub origin: Origin,
    /// What stands before.
    pub process: Process,
}

/// One operation, measured.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Trip {
    /// When the request came in, in nanoseconds of `CLOCK_MONOTONIC`.
    pub start_ns: u64,
    /// When the whole answer was there.
    pub end_ns: u64,
    /// Moments between, by name (see [`stamp`]), in any order.
    pub stamps: Vec<(&'static str, u64)>,
    /// What else was measured; names end in the unit (`_us`, `_kib`, `_pages`, `_bytes`).
    pub figures: BTreeMap<&'static str, f64>,
}

impl Trip {
    /// Adds a moment, if it was taken and lies within the trip.
    pub fn stamp(&mut self, name: &'static str, ns: Option<u64>) {
        if let Some(ns) = ns.filter(|ns| (self.start_ns..=self.end_ns).contains(ns)) {
            self.stamps.push((name, ns));
        }
    }

    /// The moment of that name.
    pub fn at(&self, name: &str) -> Option<u64> {
        self.stamps.iter().find(|(n, _)| *n == name).map(|&(_, ns)| ns)
    }

    /// Request in to whole answer out, in microseconds.
    pub fn total_us(&self) -> f64 {
        self.end_ns.saturating_sub(self.start_ns) as f64 / 1000.0
    }
}

/// Counters of one microVM since its process began.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Counters {
    /// Exits from the guest to user space, by reason.
    pub exits: BTreeMap<String, u64>,
    /// KVM's own (`KVM_GET_STATS_FD`); empty where the kernel or the subject has none.
    pub kvm: BTreeMap<String, u64>,
}

/// Something that runs functions in microVMs.
#[async_trait(?Send)]
pub trait Subject {
    /// Short name; `firn` or the peer's.
    fn name(&self) -> &'static str;

    /// For the manifest: versions, and blake3 hashes of everything that is executed or booted.
    fn describe(&self) -> Result<Value>;

    /// Whether it can start in that way.
    fn supports(&self, start: Start) -> bool;

    /// Whether its instances can go back to their snapshot in place.
    fn resets(&self) -> bool {
        false
    }

    /// Whether its samples of a scenario compare with others'.
    fn measures(&self, _: Scenario) -> bool {
        true
    }

    /// Makes one process as ready as it gets without a function, for a guest of `memory_mb` MB,
    /// and ends it after the trip's end.
    async fn spawn(&self, memory_mb: u32) -> Result<Trip>;

    /// Deploys a function: afterwards its snapshot is there and made ready for any number of
    /// starts. Returns the trips of the parts by scenario name (`create-base`, `create`,
    /// `snapshot`), as far as the subject has them.
    async fn deploy(
        &self,
        function: &Function,
    ) -> Result<(Box<dyn Deployed>, Vec<(&'static str, Trip)>)>;

    /// Ends everything that is left and waits for it.
    async fn shutdown(&self);
}

/// A function that can be started.
#[async_trait(?Send)]
pub trait Deployed {
    /// Makes sure that exactly `count` processes stand for [`Process::Ready`], and that nothing
    /// goes on in the background.
    async fn stock(&self, count: usize) -> Result<()>;

    /// Starts an instance with its first event: request in to whole response out. Several may be
    /// under way at once.
    async fn start(&self, start: Start, event: &[u8]) -> Result<(Trip, Box<dyn Running>)>;
}

/// One microVM that has answered its first event. Dropping it kills it.
#[async_trait(?Send)]
pub trait Running {
    /// One more event.
    async fn invoke(&mut self, event: &[u8]) -> Result<Trip>;

    /// Stops the vCPUs; the next event resumes them.
    async fn pause(&mut self) -> Result<()>;

    /// Has a paused one give back memory that it holds only to be fast; false if it has no such
    /// thing.
    async fn reclaim(&mut self) -> Result<bool> {
        Ok(false)
    }

    /// Takes it back to its snapshot in place: asked for → done. Only for subjects that
    /// [can](Subject::resets).
    async fn reset(&mut self) -> Result<Trip> {
        Err(Error::Usage("this subject has no reset".into()))
    }

    /// What has been counted so far.
    async fn counters(&mut self) -> Result<Counters>;

    /// Process id of its VMM, which must be a child of this process: its CPU time is counted when
    /// it is reaped.
    fn pid(&self) -> u32;

    /// Size of guest memory in bytes.
    fn memory_bytes(&self) -> u64;

    /// Kills it; the trip ends when nothing of it is left: process reaped, control group, files and
    /// sockets gone.
    async fn end(self: Box<Self>) -> Result<Trip>;
}
