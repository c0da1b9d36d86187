//! Who runs when: pause, resume, restored vCPUs, and a guest that does not hear.
//!
//! ```text
//!  Empty ──boot──▶ Running ◀──bytes, Resume──▶ Paused
//!    └──thaw──▶ Running, or Fresh ──bytes, Resume──▶ Running        Running, Paused ──reset──▶ Fresh
//! ```
//!
//! A state has [`Lapics`] where an interrupt that is raised finds them. Fresh has none: its vCPUs'
//! clocks, LAPICs among them, are set when it runs. So nothing is raised for it; what it has to hear
//! of, the last vCPU tells it at the gate.

use std::{sync::Arc, sync::atomic::Ordering, time::Duration};

use firn_proto::control::{Exit, ExitReason, FailureKind, Phase};

use super::{RequestError, Result, Vm, io_error, kvm_error};
use crate::{
    arch::{self, describe::Redirection, tsc},
    handover::Lapics,
    hold,
    machine::Unacknowledged,
    seccomp::Thread,
    snapshot::SavedVm,
    vcpu::{Command, Part, Reply, ThawPlan, TscPlan},
};

/// What the vCPUs of a microVM do.
#[derive(Debug, Clone, Copy)]
pub(super) enum State {
    /// Nothing yet.
    Empty,
    /// They are as the snapshot left them, and its clocks stand until they run.
    Fresh,
    /// They have stopped.
    Paused(Lapics),
    /// They run.
    Running(Lapics),
}

impl State {
    pub(super) fn is_paused(self) -> bool {
        matches!(self, Self::Fresh | Self::Paused(_))
    }

    /// What an interrupt finds that is raised now.
    pub(super) fn lapics(self) -> Option<Lapics> {
        match self {
            Self::Empty | Self::Fresh => None,
            Self::Paused(lapics) | Self::Running(lapics) => Some(lapics),
        }
    }
}

/// A driver that has not acknowledged its interrupt. Paused time does not count: it begins anew.
#[derive(Debug, Default)]
pub(super) struct Deaf {
    interrupts: Unacknowledged,
    /// How often it was raised again, as far as the last look saw.
    raised: u32,
    /// Of all interrupts: how often any was when the last look saw it.
    all_raised: u64,
    /// How often was looked.
    looks: u32,
    /// When to look, in nanoseconds of `CLOCK_MONOTONIC`.
    due: u64,
    /// CPU time of each vCPU thread when it was raised last; empty: not known yet.
    cpu_time: Vec<Duration>,
}

impl Deaf {
    /// Until the first look; each further one takes twice as long, up to the [`Self::MOST`]th.
    const FIRST: Duration = Duration::from_millis(10);
    /// How often one interrupt is raised again.
    const MOST: u32 = 8;
    /// CPU time within which a vCPU that runs takes an interrupt; twice as much each time that it was
    /// raised again. On a busy machine, or throttled, it is longer in coming.
    const RAN: Duration = Duration::from_millis(5);
}

impl Vm {
    /// Restores interrupt controllers, clock and vCPUs, or a part of them, in the order that KVM
    /// demands; then runs, or stays paused and fresh. Either way all vCPUs are restored when this
    /// returns.
    pub(super) fn set_processors(
        &mut self,
        saved: &Arc<SavedVm>,
        part: Part,
        resume: bool,
    ) -> Result<()> {
        // Until the vCPUs have met again nothing may be raised.
        self.state = State::Fresh;
        // Of a guest that stays paused, the clocks are set anew when it runs.
        let at = if resume { self.moment()? } else { tsc::now() };
        match part {
            Part::Thaw | Part::Reset => saved.vm.restore(&self.vm, at, self.host_khz),
            Part::Clocks => saved.vm.restore_clock(&self.vm, at, self.host_khz),
        }
        .map_err(kvm_error("SET_IRQCHIP or SET_CLOCK"))?;
        self.clock.stamp(Phase::DevicesSet);
        let clock = TscPlan { frequency: self.tsc, at };
        self.tsc_offset = clock.offset(saved, 0);
        let thaw = Arc::new(ThawPlan::new(saved.clone(), clock, part, resume));
        self.machine.halt(false);
        for vcpu in &self.vcpus {
            vcpu.tell(Command::Thaw(thaw.clone()));
        }
        hold::back(Thread::Device);
        if !resume {
            return self.all_stopped();
        }
        match thaw.restored() {
            Some(lapics) => {
                self.state = State::Running(lapics);
                Ok(())
            }
            None => self.all_stopped(),
        }
    }

    /// The host's TSC when the guest's clocks go on: as the host says, else now.
    fn moment(&self) -> Result<u64> {
        let now = tsc::now();
        let Some(at) = self.machine.take_moment().map_err(io_error("the invoke connection"))?
        else {
            return Ok(now);
        };
        // Two CPUs may differ by little, and it may be a message's way ago. A guest whose clocks
        // leap would believe that it stood still.
        let second = i64::from(self.host_khz) * 1000;
        let ago = now.wrapping_sub(at) as i64;
        if !(-second..60 * second).contains(&ago) {
            let message = format!("the clocks are to go on {ago} ticks ago");
            return Err(RequestError::refused(FailureKind::BadRequest, message));
        }
        Ok(at)
    }

    /// Stops all vCPUs; without effect on a paused VM.
    ///
    /// # Errors
    /// [`RequestError`].
    pub fn pause(&mut self) -> Result<()> {
        if self.state.is_paused() {
            return Ok(());
        }
        let State::Running(lapics) = self.state else { return Err(self.misplaced("Running")) };
        self.machine.halt(true);
        for vcpu in &self.vcpus {
            vcpu.stop();
        }
        self.all_stopped()?;
        self.state = State::Paused(lapics);
        Ok(())
    }

    /// Lets the vCPUs run; without effect on a running VM.
    ///
    /// # Errors
    /// [`RequestError`].
    pub fn resume(&mut self) -> Result<()> {
        match self.state {
            State::Running(_) => Ok(()),
            _ => self.run(),
        }
    }

    /// The invoke stream has become readable or writable. Bytes for a paused guest resume it.
    ///
    /// # Errors
    /// [`RequestError::Ended`].
    pub fn stream_ready(&mut self) -> Result<()> {
        match self.state {
            State::Running(lapics) => self.pump(lapics),
            _ if self.machine.host_has_bytes() => self.run(),
            _ => Ok(()),
        }
    }

    /// Lets the paused vCPUs run. From a fresh pause as at a thaw: by the snapshot's clocks. Either
    /// way with what the host has sent in the receive queue before the first instruction.
    pub(super) fn run(&mut self) -> Result<()> {
        match (self.state, &self.origin) {
            (State::Fresh, Some(origin)) => {
                let saved = origin.saved.clone();
                self.set_processors(&saved, Part::Clocks, true).map_err(|error| match error {
                    RequestError::Refused(failure) => RequestError::Ended(Exit {
                        reason: ExitReason::NotRestored,
                        detail: failure.message,
                    }),
                    ended => ended,
                })
            }
            (State::Paused(lapics), _) => {
                // Readiness that came while it was paused has not been looked at.
                self.pump(lapics)?;
                self.machine.halt(false);
                for vcpu in &self.vcpus {
                    vcpu.tell(Command::Run(lapics));
                }
                self.state = State::Running(lapics);
                Ok(())
            }
            _ => Err(self.misplaced("Paused")),
        }
    }

    fn pump(&self, lapics: Lapics) -> Result<()> {
        self.machine.pump(lapics).map_err(|error| {
            RequestError::Ended(Exit {
                reason: ExitReason::DeviceViolation,
                detail: error.to_string(),
            })
        })
    }

    /// The request is for a VM in another state.
    pub(super) fn misplaced(&self, wanted: &str) -> RequestError {
        let found = match self.state {
            State::Empty => "Empty",
            State::Fresh | State::Paused(_) => "Paused",
            State::Running(_) => "Running",
        };
        let message = format!("the microVM is {found}, the request needs it {wanted}");
        RequestError::refused(FailureKind::BadRequest, message)
    }

    /// Takes the answers of all vCPUs to an order after which they stand.
    pub(super) fn all_stopped(&self) -> Result<()> {
        let mut result = Ok(());
        for (id, vcpu) in self.vcpus.iter().enumerate() {
            match vcpu.reply() {
                Reply::Stopped => {}
                Reply::Failed(error) => {
                    let message = format!("vCPU {id}: {error}");
                    result = Err(RequestError::refused(FailureKind::Kvm, message));
                }
                // The others may run on, and have nothing to say then.
                reply => return Err(super::unexpected(reply)),
            }
        }
        result
    }

    /// When [`Self::look`] is due, from now on; `None` while no driver of a running guest owes an
    /// acknowledgement.
    pub fn look_within(&mut self) -> Option<Duration> {
        let State::Running(_) = self.state else {
            self.deaf = Deaf::default();
            return None;
        };
        let interrupts = self.machine.unacknowledged();
        if interrupts != self.deaf.interrupts {
            let all_raised = self.shared.raised_again.load(Ordering::Relaxed);
            self.deaf = Deaf { interrupts, all_raised, ..Deaf::default() };
        }
        if interrupts.lines == 0 || self.deaf.raised == Deaf::MOST || !hold::raises_again() {
            return None;
        }
        let now = crate::stats::monotonic_ns();
        if self.deaf.due == 0 {
            let distance = Deaf::FIRST * (1 << self.deaf.looks.min(Deaf::MOST - 1));
            self.deaf.due = now + distance.as_nanos() as u64;
        }
        if self.deaf.cpu_time.is_empty() {
            self.deaf.cpu_time = self.vcpus.iter().map(|vcpu| vcpu.cpu_time()).collect();
        }
        Some(Duration::from_nanos(self.deaf.due.saturating_sub(now)))
    }

    /// Looks whether a driver is deaf, if that is due: its vCPU has run for long enough since it was
    /// raised last, or waits in HLT, and the interrupt is not acknowledged. It is then raised again. A
    /// vCPU that had no time, because it is throttled, is left alone.
    pub fn look(&mut self) {
        let State::Running(lapics) = self.state else { return };
        if self.deaf.due == 0 || crate::stats::monotonic_ns() < self.deaf.due {
            return;
        }
        self.deaf.due = 0;
        self.deaf.looks += 1;
        if self.machine.unacknowledged() != self.deaf.interrupts {
            return;
        }
        // A halted vCPU that was asked at the last look has done it by itself.
        let all_raised = self.shared.raised_again.load(Ordering::Relaxed);
        if all_raised != std::mem::replace(&mut self.deaf.all_raised, all_raised) {
            self.deaf.raised += 1;
            self.deaf.cpu_time.clear();
            return;
        }
        let lines = self.deaf.interrupts.lines;
        let entries = (0..u32::BITS).filter(|line| lines >> line & 1 != 0);
        let entries: Vec<_> = entries.filter_map(|l| Redirection::of(&self.vm, l).ok()).collect();
        let mut ran = false;
        for (id, (vcpu, before)) in self.vcpus.iter().zip(&self.deaf.cpu_time).enumerate() {
            if entries.iter().any(|entry| entry.reaches(id as u8)) {
                let enough = Deaf::RAN * (1 << self.deaf.raised);
                match vcpu.cpu_time().saturating_sub(*before) >= enough {
                    true => ran = true,
                    false => vcpu.look(),
                }
            }
        }
        if ran {
            let again = self.machine.raise_unacknowledged(lapics);
            self.shared.raised_again.fetch_add(again, Ordering::Relaxed);
            self.deaf.all_raised += again;
            self.deaf.raised += 1;
            self.deaf.cpu_time.clear();
        }
    }

    /// Interrupts that were raised again since the last call.
    pub fn raised_again_since(&mut self) -> u64 {
        let all = self.shared.raised_again.load(Ordering::Relaxed);
        all - std::mem::replace(&mut self.deaf_told, all)
    }

    /// Where the guest stands, in one line for people. A running one is stopped for a moment.
    ///
    /// # Errors
    /// [`RequestError`].
    pub fn diagnose(&mut self) -> Result<String> {
        let running = matches!(self.state, State::Running(_));
        if running {
            self.pause()?;
        }
        let mut parts = Vec::new();
        for vcpu in &self.vcpus {
            vcpu.tell(Command::Describe);
            match vcpu.reply() {
                Reply::Described(text) => parts.push(text),
                reply => return Err(super::unexpected(reply)),
            }
        }
        let entry = match Redirection::of(&self.vm, arch::FIRST_IRQ) {
            Ok(entry) => entry.to_string(),
            Err(error) => error.to_string(),
        };
        parts.push(format!("IOAPIC pin {}: {entry}", arch::FIRST_IRQ));
        parts.push(format!("vsock: {}", self.machine.describe()));
        let again = self.shared.raised_again.load(Ordering::Relaxed);
        parts.push(format!("interrupts raised again: {again}"));
        if running {
            self.run()?;
        }
        Ok(parts.join("; "))
    }
}
