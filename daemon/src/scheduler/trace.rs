//! When what happened to a request, for the header `X-Firn-Phases`.

use std::{
    fmt::{self, Write},
    time::Instant,
};

use firn::Phases;
use serde::{Serialize, Serializer, ser::SerializeMap};

/// Named moments in microseconds since the request was received, in order.
#[derive(Debug, Clone)]
pub struct Trace {
    received: Instant,
    moments: Vec<(Name, u64)>,
}

/// A name, put together only if somebody reads it.
#[derive(Debug, Clone, Copy)]
struct Name {
    /// With a phase, the operation that it is of.
    first: &'static str,
    phase: Option<&'static str>,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.first)?;
        let Some(phase) = self.phase else { return Ok(()) };
        f.write_char('.')?;
        for (i, word) in phase.split(' ').enumerate() {
            f.write_str(if i > 0 { "_" } else { "" })?;
            f.write_str(word)?;
        }
        Ok(())
    }
}

impl Serialize for Name {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Default for Trace {
    fn default() -> Self {
        Self::new(Instant::now())
    }
}

impl Trace {
    /// A trace of a request that was received at that time.
    pub fn new(received: Instant) -> Self {
        Self { received, moments: Vec::with_capacity(24) }
    }

    /// When the request was received.
    pub fn received(&self) -> Instant {
        self.received
    }

    /// All moments in order: the operation or moment, its phase, and the time in microseconds.
    pub fn moments(&self) -> impl Iterator<Item = (&'static str, Option<&'static str>, u64)> {
        self.moments.iter().map(|(name, at)| (name.first, name.phase, *at))
    }

    /// Records that something happens now.
    pub fn mark(&mut self, name: &'static str) {
        let name = Name { first: name, phase: None };
        self.moments.push((name, self.received.elapsed().as_micros() as u64));
    }

    /// Adds the phases of an operation that began at `begun`.
    pub fn add(&mut self, operation: &'static str, begun: Instant, phases: &Phases) {
        let offset = begun.saturating_duration_since(self.received);
        for (phase, at) in &phases.0 {
            let name = Name { first: operation, phase: Some(phase) };
            self.moments.push((name, (offset + *at).as_micros() as u64));
        }
    }
}

impl Serialize for Trace {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.moments.len()))?;
        for (name, at) in &self.moments {
            map.serialize_entry(name, at)?;
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn phases_are_placed_on_the_requests_own_clock_in_order() {
        let received = Instant::now();
        let mut trace = Trace::new(received);
        trace.mark("zebra");
        let begun = received + Duration::from_micros(500);
        let phases = Phases(vec![("vcpu set", Duration::from_micros(20))]);
        trace.add("thaw", begun, &phases);
        let json = serde_json::to_string(&trace).unwrap();
        assert!(
            json.starts_with("{\"zebra\":") && json.ends_with(",\"thaw.vcpu_set\":520}"),
            "{json}"
        );
    }
}
