//! Taking a thawed instance back to its snapshot, and what makes a thawed guest someone else: what
//! `isolation = per-invocation` is made of.
//!
//! ```text
//!  invoke ─▶ answer ─▶ reset:  new socketpair ─▶ Reset + descriptors ─▶ paused, clean
//!                                                                         │
//!  next invoke:  Renew, Invoke into the socketpair: these bytes resume it ◀┘
//!                ◀─ Renewed (identity repeated?)   ◀─ Done
//! ```
//!
//! The reset happens after the answer, off any request's path; while it waits, an instance holds
//! nothing of the request that it served.

use std::{io, os::fd::AsFd, time::Duration};

use firn_proto::{
    control::{FailureKind, FromVmm, ToVmm},
    guest::{self, FromGuest, GuestTsc, Renew, Renewed, ToGuest},
};

use crate::{
    Instance, InstanceError, Invocation, InvokeReport, Phases,
    channel::name as message_name,
    instance::{self, Origin, believed, invoke_message},
    moment::Moment,
    phases::Stopwatch,
    stream::Stream,
    vm::{Trouble, Vm, unexpected},
};

/// Time from a renewal until the guest has renewed itself, without its hooks.
pub(crate) const RENEW: Duration = Duration::from_secs(5);

/// The part of an invocation that makes someone else of a guest that was reset, where
/// [`InstanceError::Unresponsive`] and its like name what failed.
pub const RENEWAL: &str = "renew";

/// Time that restore hooks may take.
pub(crate) const HOOKS: Duration = Duration::from_secs(10);

/// Time that a reset takes whatever was written.
const RESET: Duration = Duration::from_secs(5);

/// Memory that can be put back within a second, on a slow machine.
const MIB_PER_SECOND: u64 = 256;

/// How a reset went.
#[derive(Debug, Clone)]
pub struct ResetReport {
    /// Pages of 4 KiB that were put back.
    pub pages: u64,
    /// From the VMM's receipt of the request to the last vCPU's restored state.
    pub duration: Duration,
    /// `sent`, `received`, `stopped`, `mapped` (pages are back), `devices set`, `vcpu set`, `done`.
    pub phases: Phases,
}

/// A new identity, and what gives it to the guest of a snapshot in which the TSC reads `tsc`: the moment at
/// which its clocks go on, and the message.
pub(crate) fn renewal(tsc: GuestTsc) -> io::Result<(String, u64, ToGuest)> {
    let id = new_identity()?;
    let mut entropy = vec![0; guest::ENTROPY_BYTES];
    fill_random(&mut entropy)?;
    let now = Moment::now();
    let renew = ToGuest::Renew(Renew {
        wall_clock_ns: now.wall_clock_ns,
        tsc: Some(tsc),
        entropy,
        instance_id: id.clone(),
        hook_timeout_ms: HOOKS.as_millis() as u64,
    });
    Ok((id, now.tsc, renew))
}

/// The answer to a renewal. Whether it repeats the identity is the caller's to check.
pub(crate) async fn await_renewed(vm: &mut Vm) -> Result<Renewed, Trouble> {
    let within = (RENEW + HOOKS) * vm.patience;
    match vm.frame(within).await? {
        FromGuest::Renewed(renewed) => Ok(Renewed {
            renew_us: believed(renewed.renew_us, within),
            hooks_us: believed(renewed.hooks_us, within),
            ..renewed
        }),
        other => Err(vm.violated("Renewed", &other)),
    }
}

/// 128 random bits: unique for ever.
pub(crate) fn new_identity() -> io::Result<String> {
    let mut bytes = [0; 16];
    fill_random(&mut bytes)?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

fn fill_random(mut bytes: &mut [u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let flags = rustix::rand::GetRandomFlags::empty();
        let count = match rustix::rand::getrandom(&mut *bytes, flags) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        bytes = &mut bytes[count..];
    }
    Ok(())
}

impl Instance {
    /// Takes a thawed instance back to its snapshot: nothing of what it did is left in it. It is
    /// paused then, holds no output back (what was not read from its stream yet is lost), and its
    /// next [`Instance::invoke`] gives it a new identity first, as after a thaw.
    ///
    /// # Errors
    /// Any [`InstanceError`]; [`InstanceError::Refused`] for an instance that was booted, or loaded
    /// since its thaw: its snapshot is not what it runs.
    pub async fn reset(&mut self) -> Result<ResetReport, InstanceError> {
        let trouble = InstanceError::from_trouble("reset");
        if !matches!(self.origin, Origin::Thawed { .. }) || self.loaded {
            return Err(InstanceError::Refused {
                operation: "reset",
                kind: FailureKind::BadRequest,
                message: "the instance does not run what a snapshot holds".into(),
            });
        }
        if self.watched.is_some() {
            // The last moment to see what it has touched.
            self.pause().await?;
        }
        let mut watch = Stopwatch::start();
        let pagemap = self.vm.pagemap().await;
        let pagemap = pagemap.map_err(InstanceError::from_trouble("open a pagemap"))?;
        let (mut stream, theirs) = Stream::pair().map_err(|source| InstanceError::Io {
            operation: "make the invoke connection",
            source,
        })?;
        let within =
            RESET + Duration::from_secs(self.vm.class.memory_bytes() >> 20) / MIB_PER_SECOND as u32;
        watch.mark("sent");
        let descriptors = [theirs.as_fd(), pagemap.as_fd()];
        let answer = self.vm.request_within(&ToVmm::Reset, &descriptors, within).await;
        let report = match answer.map_err(&trouble)? {
            FromVmm::Reset(report) => report,
            other => return Err(trouble(unexpected("Reset", message_name(&other)))),
        };
        self.inner.raised_again(&self.vm.name, report.interrupts_raised_again);
        watch.stamps(&report.stamps);
        stream.set_outlets(self.vm.stream.take().map(Stream::into_outlets).unwrap_or_default());
        self.vm.stream = Some(stream);
        self.fresh = true;
        watch.mark("done");
        Ok(ResetReport {
            pages: report.pages,
            duration: Duration::from_nanos(report.duration_ns),
            phases: watch.finish(),
        })
    }

    /// The first event after a reset, with the renewal before it.
    pub(crate) async fn invoke_fresh(
        &mut self,
        invocation: &Invocation,
    ) -> Result<InvokeReport, InstanceError> {
        let trouble = InstanceError::from_trouble("invoke");
        let mut watch = Stopwatch::start();
        let invoke = invoke_message(invocation).map_err(InstanceError::Request)?;
        let Origin::Thawed { snapshot } = &self.origin else {
            return Err(trouble(Trouble::Request("only thawed instances are renewed".into())));
        };
        let (id, moment, renew) = renewal(snapshot.tsc())
            .map_err(|source| InstanceError::Io { operation: "make an identity", source })?;
        // Whatever happens from here on, this is no longer the snapshot's guest.
        self.fresh = false;
        self.vm.renew(moment, &renew).await.map_err(&trouble)?;
        self.vm.queue(&invoke).await.map_err(&trouble)?;
        watch.mark("sent");
        let renewed = await_renewed(&mut self.vm).await;
        let renewed = renewed.map_err(InstanceError::from_trouble(RENEWAL))?;
        if let Some(ns) = self.vm.stream.as_ref().and_then(Stream::first_byte_ns) {
            watch.at("first byte", ns);
        }
        watch.mark("renewed");
        if renewed.instance_id != id {
            self.vm.process.kill();
            return Err(InstanceError::NotRenewed { expected: id, found: renewed.instance_id });
        }
        self.set_identity(id);
        let done = instance::await_done(&mut self.vm, invocation).await.map_err(&trouble)?;
        watch.mark("done");
        self.set_renewed(renewed.clone());
        Ok(instance::report(&mut self.vm, done, Some(renewed), watch.finish()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_differ() {
        let (a, b) = (new_identity().unwrap(), new_identity().unwrap());
        assert_eq!(a.len(), 32);
        assert_ne!(a, b);
    }
}
