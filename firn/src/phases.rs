//! Moments of one operation, as time since it began.

use std::time::Duration;

use firn_proto::control;
use rustix::time::{ClockId, clock_gettime};

/// Named moments in the order in which they were recorded, each as the time since the operation
/// began. Recording costs one clock reading; VMM and host read the same clock.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Phases(pub Vec<(&'static str, Duration)>);

impl Phases {
    /// The moment called `name`, if it was recorded.
    pub fn get(&self, name: &str) -> Option<Duration> {
        self.0.iter().find(|(n, _)| *n == name).map(|&(_, at)| at)
    }
}

/// Nanoseconds of `CLOCK_MONOTONIC`.
pub(crate) fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Records [`Phases`].
#[derive(Debug)]
pub(crate) struct Stopwatch {
    start_ns: u64,
    phases: Phases,
}

impl Stopwatch {
    pub(crate) fn start() -> Self {
        Self { start_ns: now_ns(), phases: Phases(Vec::with_capacity(12)) }
    }

    pub(crate) fn mark(&mut self, name: &'static str) {
        self.at(name, now_ns());
    }

    /// Takes over the stamps of the VMM that fall into this operation.
    pub(crate) fn stamps(&mut self, stamps: &control::Stamps) {
        for &(phase, ns) in &stamps.0 {
            let name = match phase {
                control::Phase::Received => "received",
                control::Phase::Stopped => "stopped",
                control::Phase::Mapped => "mapped",
                control::Phase::Populated => "populated",
                control::Phase::DevicesSet => "devices set",
                control::Phase::VcpuSet => "vcpu set",
                control::Phase::Entered => "entered",
                control::Phase::FirstExit => "first exit",
                _ => continue,
            };
            if ns >= self.start_ns {
                self.at(name, ns);
            }
        }
    }

    pub(crate) fn phases(&self) -> Phases {
        self.phases.clone()
    }

    pub(crate) fn finish(self) -> Phases {
        self.phases
    }

    pub(crate) fn at(&mut self, name: &'static str, ns: u64) {
        self.phases.0.push((name, Duration::from_nanos(ns.saturating_sub(self.start_ns))));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vmm_stamps_fall_between_the_hosts_own() {
        let mut watch = Stopwatch::start();
        let early = watch.start_ns - 1;
        let stamp = now_ns();
        watch.stamps(&control::Stamps(vec![
            (control::Phase::ProcessStart, early),
            (control::Phase::Received, stamp),
            (control::Phase::Mapped, early),
        ]));
        watch.mark("done");
        let phases = watch.finish();
        let names: Vec<_> = phases.0.iter().map(|p| p.0).collect();
        assert_eq!(names, ["received", "done"]);
        assert!(phases.get("received") <= phases.get("done"));
    }
}
