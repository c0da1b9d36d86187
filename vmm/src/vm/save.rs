//! Save: a paused microVM is written down.

use std::{
    fs::File,
    io::{Seek, Write},
    os::fd::OwnedFd,
};

use firn_proto::control::{FailureKind, SaveReport};

use super::{
    RequestError, Result, Vm, io_error, kvm_error,
    received::{expect_descriptors, next},
    unexpected,
};
use crate::{
    arch::vm_state::VmState,
    machine::Machine,
    memory::written::own_pagemap,
    snapshot::SavedVm,
    stats::monotonic_ns,
    vcpu::{Command, Reply},
};

impl Vm {
    /// Writes the paused VM down.
    ///
    /// # Errors
    /// [`RequestError::Refused`]; the VM stays as it was.
    pub fn save(&mut self, descriptors: Vec<OwnedFd>) -> Result<SaveReport> {
        if !self.state.is_paused() {
            return Err(self.misplaced("Paused"));
        }
        let started = monotonic_ns();
        let writable: Vec<usize> = Machine::writable_slots(&self.config.disks).collect();
        let mut descriptors = expect_descriptors(descriptors, 3 + writable.len())?;
        let memory_out = File::from(next(&mut descriptors)?);
        let mut state_out = File::from(next(&mut descriptors)?);
        let pagemap = own_pagemap(File::from(next(&mut descriptors)?))?;
        let origin = self.origin.as_ref();
        let base = origin.map(|origin| origin.source(self.memory.bytes())).transpose()?;
        self.machine
            .quiescent()
            .map_err(|error| RequestError::refused(FailureKind::BadRequest, error))?;

        for vcpu in &self.vcpus {
            vcpu.tell(Command::Save);
        }
        let vcpus = self
            .vcpus
            .iter()
            .map(|vcpu| match vcpu.reply() {
                Reply::Saved(state) => Ok(*state),
                reply => Err(unexpected(reply)),
            })
            .collect::<Result<Vec<_>>>()?;
        let (vm, host_tsc) =
            VmState::save(&self.vm).map_err(kvm_error("GET_IRQCHIP or GET_CLOCK"))?;
        for slot in writable {
            let delta = File::from(next(&mut descriptors)?);
            self.machine.save_delta(slot, &delta).map_err(io_error("disk delta"))?;
        }
        let saved = SavedVm {
            memory_mib: self.config.memory_mib,
            signature: self.signature.clone(),
            tsc: self.tsc,
            host_tsc,
            power_on_msrs: self.shared.listed_msrs.clone(),
            disks: self.config.disks.clone(),
            vm,
            vcpus,
            machine: self.machine.save(),
        };
        let guest_tsc = saved.guest_tsc(0);
        // SAFETY: every vCPU has answered `Saved` and waits for its next command, and devices
        // only work on vCPU threads or on this one, which is here.
        let written = unsafe { self.memory.save(&pagemap, base, &memory_out) };
        let pages = written.map_err(io_error("snapshot memory"))?;
        let bitmap = pages.to_bytes();
        let state =
            saved.encode().map_err(|error| RequestError::refused(FailureKind::Io, error))?;
        let written = state_out.rewind().and_then(|()| {
            state_out.write_all(&state)?;
            state_out.write_all(&bitmap)
        });
        written.map_err(io_error("snapshot state"))?;
        Ok(SaveReport {
            memory_bytes: self.memory.bytes(),
            pages_written: pages.count(),
            state_bytes: state.len() as u64,
            bitmap_bytes: bitmap.len() as u64,
            duration_ns: monotonic_ns() - started,
            guest_tsc,
            tsc_khz: self.tsc.khz,
        })
    }
}
