//! Reset: a thawed microVM goes back to its snapshot, in place, so that nothing of what it did can
//! be observed by what it does next.
//!
//! | what | how it goes back |
//! |---|---|
//! | vCPUs | stopped and drained; pending INIT, SIPI and NMI accepted, then overwritten |
//! | guest memory | every page that is a private copy, whoever wrote it ([`crate::memory::written`]) |
//! | devices, disks | their saved state; deltas emptied; what was on its way to the host is dropped |
//! | invoke connection | a new host stream under the guest's old end |
//! | interrupt controllers, registers, MSRs | by the code of a thaw, in its order; MSRs beyond the snapshot's get their power-on values |
//! | clocks | as at a thaw, when the guest next runs: while it waits they stand |
//!
//! A reset that has begun and fails ends the process: half a reset must never run.

use std::{
    cell::OnceCell,
    fs::File,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::Arc,
};

use firn_pages::pagemap::Pagemap;
use firn_proto::control::{Exit, ExitReason, FailureKind, Phase, ResetReport};

use super::{
    RequestError, Result, Vm,
    received::{expect_descriptors, next, next_to},
};
use crate::{
    descriptors::STREAM,
    memory::{
        source::Source,
        written::{WrittenError, own_pagemap},
    },
    snapshot::SavedVm,
    stats::monotonic_ns,
    vcpu::Part,
};

/// What a thawed microVM keeps of its snapshot.
pub(super) struct Origin {
    pub(super) saved: Arc<SavedVm>,
    memory: OwnedFd,
    /// The memory, ready for reading at the first reset: what is never reset never pays for it.
    source: OnceCell<Source>,
    /// A medium was replaced: the disks are no longer those of the snapshot.
    pub(super) attached: bool,
}

impl Origin {
    pub(super) fn new(saved: Arc<SavedVm>, memory: OwnedFd) -> Self {
        Self { saved, memory, source: OnceCell::new(), attached: false }
    }

    pub(super) fn memory(&self) -> &OwnedFd {
        &self.memory
    }

    pub(super) fn source(&self, bytes: u64) -> Result<&Source> {
        if let Some(source) = self.source.get() {
            return Ok(source);
        }
        let source = Source::of(self.memory.as_fd(), bytes)?;
        Ok(self.source.get_or_init(|| source))
    }
}

impl From<WrittenError> for RequestError {
    fn from(error: WrittenError) -> Self {
        let kind = match error {
            WrittenError::Stranger => FailureKind::BadRequest,
            _ => FailureKind::Io,
        };
        Self::refused(kind, error)
    }
}

impl Vm {
    /// Puts a thawed VM back to its snapshot; it is paused then. `watch` gets the new invoke
    /// stream.
    ///
    /// # Errors
    /// [`RequestError::Refused`] if nothing was changed, [`RequestError::Ended`] otherwise.
    pub fn reset(
        &mut self,
        descriptors: Vec<OwnedFd>,
        watch: impl FnOnce(BorrowedFd<'_>) -> Result<()>,
    ) -> Result<ResetReport> {
        let received = monotonic_ns();
        let bad = |message| RequestError::refused(FailureKind::BadRequest, message);
        if self.origin.as_ref().is_some_and(|origin| origin.attached) {
            return Err(bad("a disk was attached since the thaw"));
        }
        let mut descriptors = expect_descriptors(descriptors, 2)?;
        let stream = UnixStream::from(next_to(&STREAM, &mut descriptors)?);
        let pagemap = own_pagemap(File::from(next(&mut descriptors)?))?;
        let origin = self.origin.take().ok_or_else(|| bad("only a thawed microVM can be reset"))?;
        self.clock.restart();
        self.clock.stamp_at(Phase::Received, received);
        let result = self.go_back(&origin, &pagemap, stream, watch);
        self.origin = Some(origin);
        result.map_err(|error| match error {
            RequestError::Refused(failure) => RequestError::Ended(Exit {
                reason: ExitReason::VmmError,
                detail: format!("reset: {}", failure.message),
            }),
            ended @ RequestError::Ended(_) => ended,
        })
    }

    fn go_back(
        &mut self,
        origin: &Origin,
        pagemap: &Pagemap,
        stream: UnixStream,
        watch: impl FnOnce(BorrowedFd<'_>) -> Result<()>,
    ) -> Result<ResetReport> {
        self.pause()?;
        self.clock.stamp(Phase::Stopped);
        let saved = origin.saved.clone();
        let source = origin.source(self.memory.bytes())?;
        // SAFETY: all vCPUs have answered and wait for their next command; devices only work on
        // vCPU threads or on this one, which is here.
        let pages = unsafe { self.memory.put_back(pagemap, source) }?;
        self.clock.stamp(Phase::Mapped);
        self.machine.reset(&saved.machine)?;
        watch(stream.as_fd())?;
        self.machine.set_host_stream(stream, true);
        self.set_processors(&saved, Part::Reset, false)?;
        let stamps = self.clock.stamps();
        let moment = |phase| stamps.get(phase).unwrap_or_default();
        let duration_ns = moment(Phase::VcpuSet).saturating_sub(moment(Phase::Received));
        let interrupts_raised_again = self.raised_again_since();
        Ok(ResetReport { stamps, pages, duration_ns, interrupts_raised_again })
    }
}
