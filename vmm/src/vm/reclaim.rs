//! Reclaim: an idle microVM gives memory back.
//!
//! What a thaw copied ahead of the guest's writes ([`crate::plan`]) is private memory, written or
//! not. While the guest waits for its next event there is time to look: pages that still are what
//! the snapshot has are mapped from it again, and only the others stay private. They are then
//! copied when they are written, as pages that were never copied ahead are.

use std::os::fd::AsFd;

use firn_proto::control::{Exit, ExitReason, FailureKind};

use super::{RequestError, Result, Vm};
use crate::plan;

impl Vm {
    /// Gives back what a paused VM, thawed or not, holds without need; returns how many pages of
    /// 4 KiB of guest memory that were.
    ///
    /// # Errors
    /// [`RequestError::Refused`] if the VM runs, [`RequestError::Ended`] if memory was lost.
    pub fn reclaim(&mut self) -> Result<u64> {
        if !self.state.is_paused() {
            return Err(self.misplaced("Paused"));
        }
        if self.copied.is_empty() {
            return Ok(0);
        }
        let bad = |message| RequestError::refused(FailureKind::BadRequest, message);
        let origin = self.origin.as_ref().ok_or_else(|| bad("only a thawed microVM has copies"))?;
        let source = origin.source(self.memory.bytes())?;
        let file = origin.memory().as_fd();
        let mut given = 0;
        for group in std::mem::take(&mut self.copied) {
            // SAFETY: all vCPUs have answered and wait for their next command; devices only work
            // on vCPU threads or on this one, which is here. The groups are those of the plan that
            // was carried out on this memory with this file.
            let pages = unsafe { plan::share_again(group, &self.memory, file, source) };
            given += pages.map_err(|error| {
                RequestError::Ended(Exit {
                    reason: ExitReason::VmmError,
                    detail: format!("reclaim: {error}"),
                })
            })?;
        }
        Ok(given)
    }
}
