//! Boot: a kernel in an empty shell.

use std::{
    fs::File,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use firn_proto::control::{DiskSource, FailureKind, Phase};

use super::{
    RequestError, Result, State, Vm, io_error,
    received::{all_to, count, expect_descriptors, length, next, next_to},
};
use crate::{
    arch::{boot, tsc},
    descriptors::{DISKS, STREAM},
    handover::Lapics,
    machine::Machine,
    plan,
    vcpu::Command,
};

impl Vm {
    /// Loads a kernel and starts. `watch` gets the invoke stream before the guest can close it.
    ///
    /// # Errors
    /// [`RequestError`]; the VM is of no further use then.
    pub fn boot(
        &mut self,
        cmdline: &str,
        initramfs: bool,
        disks: &[DiskSource],
        descriptors: Vec<OwnedFd>,
        watch: impl FnOnce(BorrowedFd<'_>) -> Result<()>,
    ) -> Result<()> {
        self.expect_empty()?;
        let expected = 2 + usize::from(initramfs) + count(disks);
        let mut descriptors = expect_descriptors(descriptors, expected)?;
        let mut kernel = File::from(next(&mut descriptors)?);
        let mut initramfs = match initramfs {
            true => Some(File::from(next(&mut descriptors)?)),
            false => None,
        };
        let stream = UnixStream::from(next_to(&STREAM, &mut descriptors)?);
        self.machine
            .install(disks, &mut all_to(&DISKS, descriptors)?)
            .map_err(|error| RequestError::refused(FailureKind::BadRequest, error))?;
        watch(stream.as_fd())?;
        self.machine.set_host_stream(stream, false);
        self.memory.advise_huge();
        let kernel_bytes = length(&kernel).map_err(io_error("kernel"))?;
        let regions = boot::written_first(self.memory.regions()[0].bytes, kernel_bytes);
        plan::furnish(&regions, &self.memory, &mut self.spares)?;
        let bad_kernel = |error: boot::BootError| {
            let kind = match error {
                boot::BootError::Cmdline(_) => FailureKind::BadRequest,
                boot::BootError::Read { .. } => FailureKind::Io,
                _ => FailureKind::BadKernel,
            };
            RequestError::refused(kind, error)
        };
        let devices = Machine::devices(&self.config.disks);
        let cmdline = boot::cmdline(cmdline, devices).map_err(bad_kernel)?;
        let vcpus = self.config.vcpus;
        let entry =
            boot::load(&self.memory, &mut kernel, initramfs.as_mut(), &cmdline, vcpus, devices)
                .map_err(bad_kernel)?;
        self.clock.stamp(Phase::Mapped);
        // The guest's TSC starts at 0 now, on all vCPUs.
        self.tsc_offset = (tsc::now() as i64).wrapping_neg();
        for (id, vcpu) in self.vcpus.iter().enumerate() {
            let entry = (id == 0).then_some(entry);
            vcpu.tell(Command::Boot { entry, tsc_offset: self.tsc_offset });
        }
        self.all_stopped()?;
        self.clock.stamp(Phase::VcpuSet);
        self.state = State::Paused(Lapics::of_power_on());
        self.run()?;
        self.spares.release();
        Ok(())
    }
}
