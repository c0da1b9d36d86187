//! What the control messages do: build a shell, boot or thaw it, pause, resume, attach, save.
//!
//! A [`Vm`] is built once and never rebuilt. It is *empty* until boot or thaw, then *running* or
//! *paused*; a request that does not fit its state is refused and changes nothing.

mod boot;
mod build;
mod error;
mod received;
mod reclaim;
mod reset;
mod running;
mod save;
mod thaw;

use std::{
    os::fd::{AsRawFd, OwnedFd, RawFd},
    sync::{Arc, atomic::Ordering},
};

use firn_proto::control::{DiskSource, Exit, FailureKind, Phase, ShellConfig, Stats};
use kvm_ioctls::VmFd;

pub use self::{build::kvm_at, error::RequestError};
use self::{
    error::{Result, io_error, kvm_error},
    received::{all_to, expect_descriptors},
    reset::Origin,
    running::{Deaf, State},
};
use crate::{
    arch::{cpuid::Signature, tsc::Frequency},
    descriptors::DISKS,
    machine::Machine,
    memory::Memory,
    plan::Spares,
    stats::{Clock, KvmStats},
    vcpu::{Reply, Shared, Vcpu},
};

/// One microVM.
pub struct Vm {
    config: ShellConfig,
    vm: Arc<VmFd>,
    memory: Arc<Memory>,
    spares: Spares,
    /// Ranges of regions that the thaw copied whole.
    copied: Vec<std::ops::Range<u64>>,
    machine: Arc<Machine>,
    signature: Signature,
    /// The host's TSC frequency.
    host_khz: u32,
    /// Whether KVM can give guests another one.
    scales_tsc: bool,
    /// The guest's.
    tsc: Frequency,
    vcpus: Vec<Vcpu>,
    shared: Arc<Shared>,
    statistics: Vec<KvmStats>,
    clock: Arc<Clock>,
    tsc_offset: i64,
    state: State,
    /// What this VM was thawed from.
    origin: Option<Origin>,
    deaf: Deaf,
    /// Interrupts raised again that the host knows of.
    deaf_told: u64,
}

impl Vm {
    /// The descriptor that is readable when a vCPU has ended by itself.
    pub fn bell(&self) -> RawFd {
        self.shared.bell.as_raw_fd()
    }

    /// What ended the guest, if something did.
    pub fn ended(&self) -> Option<Exit> {
        self.vcpus.iter().find_map(|vcpu| match vcpu.poll() {
            Some(Reply::Ended(exit)) => Some(exit),
            _ => None,
        })
    }

    /// Replaces a disk's medium.
    ///
    /// # Errors
    /// [`RequestError::Refused`].
    pub fn attach(
        &mut self,
        slot: u8,
        source: DiskSource,
        descriptors: Vec<OwnedFd>,
    ) -> Result<()> {
        let bad = |message: String| RequestError::refused(FailureKind::BadRequest, message);
        if matches!(self.state, State::Empty) {
            return Err(bad("nothing runs here yet".into()));
        }
        let lapics = self.state.lapics();
        let descriptors = expect_descriptors(descriptors, source.descriptors())?;
        self.machine
            .replace(usize::from(slot), source, &mut all_to(&DISKS, descriptors)?, lapics)
            .ok_or_else(|| bad(format!("there is no disk slot {slot}")))?
            .map_err(|error| bad(error.to_string()))?;
        if let Some(origin) = &mut self.origin {
            origin.attached = true;
        }
        Ok(())
    }

    /// Counters since the process started.
    pub fn stats(&self) -> Stats {
        if let Some(ns) = self.machine.first_byte() {
            self.clock.stamp_at(Phase::FirstByte, ns);
        }
        let mut kvm = Vec::new();
        for file in &self.statistics {
            file.read(&mut kvm);
        }
        Stats {
            stamps: self.clock.stamps(),
            exits: self.shared.exits.read(),
            kvm,
            tsc_offset: self.tsc_offset,
            tsc_khz: self.tsc.khz,
            paused: self.state.is_paused(),
            memory_address: self.memory.host_pointer(0) as u64,
            interrupts_raised_again: self.shared.raised_again.load(Ordering::Relaxed),
        }
    }

    fn expect_empty(&self) -> Result<()> {
        match self.state {
            State::Empty => Ok(()),
            _ => Err(self.misplaced("Empty")),
        }
    }
}

fn unexpected(reply: Reply) -> RequestError {
    match reply {
        Reply::Ended(exit) => RequestError::Ended(exit),
        Reply::Failed(error) => RequestError::refused(FailureKind::Kvm, error),
        Reply::Stopped | Reply::Saved(_) | Reply::Described(_) => {
            RequestError::refused(FailureKind::Kvm, "a vCPU answered another question")
        }
    }
}
