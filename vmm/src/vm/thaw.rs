//! Thaw: a snapshot in an empty shell that fits it.

use std::{
    fs::File,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{fs::FileExt, net::UnixStream},
    },
    sync::Arc,
};

use firn_proto::control::{DiskSource, FailureKind, MemoryPlan, Phase};

use super::{
    Origin, RequestError, Result, Vm, io_error,
    received::{all_to, count, expect_descriptors, length, next, next_to},
};
use crate::{
    arch::tsc::Frequency,
    descriptors::{DISKS, MEMORY, STREAM},
    plan,
    snapshot::{self, SavedVm},
    vcpu::Part,
};

impl Vm {
    /// Restores a snapshot. `watch` gets the invoke stream before the guest can close it.
    ///
    /// # Errors
    /// [`RequestError`]; the VM is of no further use then.
    pub fn thaw(
        &mut self,
        disks: &[DiskSource],
        resume: bool,
        plan: &MemoryPlan,
        descriptors: Vec<OwnedFd>,
        watch: impl FnOnce(BorrowedFd<'_>) -> Result<()>,
    ) -> Result<()> {
        self.expect_empty()?;
        let mut descriptors = expect_descriptors(descriptors, 3 + count(disks))?;
        let memory = next_to(&MEMORY, &mut descriptors)?;
        let state = File::from(next(&mut descriptors)?);
        let stream = UnixStream::from(next_to(&STREAM, &mut descriptors)?);
        let mut media = all_to(&DISKS, descriptors)?;
        let saved = Arc::new(self.read_state(&state)?);
        self.tsc = self.frequency(saved.tsc.khz)?;
        self.memory.map_file(memory.as_fd())?;
        self.clock.stamp(Phase::Mapped);
        self.copied = plan::carry_out(plan, &self.memory, memory.as_fd(), &mut self.spares)?;
        self.clock.stamp(Phase::Populated);
        self.machine.install(disks, &mut media)?;
        self.machine.restore(&saved.machine)?;
        watch(stream.as_fd())?;
        self.machine.set_host_stream(stream, true);
        self.set_processors(&saved, Part::Thaw, resume)?;
        self.origin = Some(Origin::new(saved, memory));
        // The guest runs. What this thaw had no use for would count as the guest's memory.
        self.spares.release();
        Ok(())
    }

    fn read_state(&self, file: &File) -> Result<SavedVm> {
        let io = io_error("VM state");
        let length = length(file).unwrap_or(u64::MAX);
        if length > snapshot::MAX_BODY as u64 + 16 {
            return Err(RequestError::refused(
                FailureKind::SnapshotCorrupt,
                format!("VM state of {length} bytes is longer than any"),
            ));
        }
        let mut bytes = vec![0; length as usize];
        file.read_exact_at(&mut bytes, 0).map_err(io)?;
        let mut saved =
            SavedVm::decode(&bytes).map_err(|error| RequestError::refused(error.kind(), error))?;
        self.check_shape(&saved)?;
        for vcpu in &mut saved.vcpus {
            vcpu.adapt(&saved.power_on_msrs, &self.shared.listed_msrs)
                .map_err(|error| RequestError::refused(FailureKind::SnapshotCpu, error))?;
        }
        Ok(saved)
    }

    fn check_shape(&self, saved: &SavedVm) -> Result<()> {
        let shape = |message: String| RequestError::refused(FailureKind::SnapshotShape, message);
        if saved.memory_mib != self.config.memory_mib {
            return Err(shape(format!(
                "snapshot has {} MiB of memory, this shell has {}",
                saved.memory_mib, self.config.memory_mib
            )));
        }
        if saved.vcpus.len() != usize::from(self.config.vcpus) {
            return Err(shape(format!(
                "snapshot has {} vCPUs, this shell has {}",
                saved.vcpus.len(),
                self.config.vcpus
            )));
        }
        if saved.disks != self.config.disks {
            return Err(shape(format!(
                "snapshot has disks {:?}, this shell has {:?}",
                saved.disks, self.config.disks
            )));
        }
        if let Some(difference) = saved.signature.difference(&self.signature) {
            return Err(RequestError::refused(FailureKind::SnapshotCpu, difference));
        }
        Ok(())
    }

    /// How the TSC of a guest ticks on here that ticked at `khz`.
    fn frequency(&self, khz: u32) -> Result<Frequency> {
        let frequency = Frequency::on_host(khz, self.host_khz);
        if !frequency.is_scaled() || self.scales_tsc {
            return Ok(frequency);
        }
        Err(RequestError::refused(
            FailureKind::SnapshotCpu,
            format!(
                "TSC frequency is {khz} kHz in the snapshot, {} kHz on this host, whose KVM or CPU can't scale \
                 it (no KVM_CAP_TSC_CONTROL)",
                self.host_khz
            ),
        ))
    }
}
