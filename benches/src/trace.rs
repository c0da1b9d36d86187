//! Exits from the guest that the kernel handles by itself, by reason: `kvm:kvm_exit` through
//! tracefs. Each event costs time within the sample, so traced runs are for counting only; their
//! manifest says so.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use crate::error::{Error, Result, io_with};

/// Where tracefs is mounted, or may be.
const TRACEFS: &str = "/sys/kernel/tracing";

/// An instance of our own, so that other users of tracing are not disturbed.
const INSTANCE: &str = "instances/firn-bench";

/// Size of the buffer of each CPU.
const BUFFER_KIB: &str = "16384";

/// Counts exits. Dropping it removes its trace instance.
#[derive(Debug)]
pub struct Tracer {
    instance: PathBuf,
}

impl Tracer {
    /// Prepares tracing.
    ///
    /// # Errors
    /// [`Error::Usage`] where the kernel has no tracefs, or KVM no such event, or this user no right.
    pub fn open() -> Result<Self> {
        let root = Path::new(TRACEFS);
        let refuse = |what: String| Error::Usage(format!("--trace is not possible here: {what}"));
        if !root.join("events").exists() {
            // Nothing to undo if this fails or was not needed.
            let flags = rustix::mount::MountFlags::empty();
            rustix::mount::mount("tracefs", root, "tracefs", flags, None)
                .map_err(|e| refuse(format!("there is no tracefs at {TRACEFS}: {e}")))?;
        }
        let instance = root.join(INSTANCE);
        if let Err(e) = fs::create_dir(&instance)
            && e.kind() != std::io::ErrorKind::AlreadyExists
        {
            return Err(refuse(format!("cannot make {}: {e}", instance.display())));
        }
        let tracer = Self { instance };
        if !tracer.instance.join("events/kvm/kvm_exit").exists() {
            return Err(refuse("the kernel has no event kvm:kvm_exit".into()));
        }
        tracer.write("buffer_size_kb", BUFFER_KIB)?;
        tracer.write("tracing_on", "0")?;
        tracer.write("events/kvm/kvm_exit/enable", "1")?;
        Ok(tracer)
    }

    /// Forgets what was traced, and traces.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn begin(&self) -> Result<()> {
        self.write("trace", "")?;
        self.write("tracing_on", "1")
    }

    /// Stops, and returns exits by reason since [`Tracer::begin`], of all microVMs of the machine.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Usage`] if the buffer was too small.
    pub fn end(&self) -> Result<BTreeMap<String, u64>> {
        self.write("tracing_on", "0")?;
        let path = self.instance.join("trace");
        let text = fs::read_to_string(&path).map_err(io_with(&path))?;
        count(&text).ok_or_else(|| {
            Error::Usage(
                "the trace buffer was too small for one sample; its counts are lost".into(),
            )
        })
    }

    fn write(&self, name: &str, value: &str) -> Result<()> {
        let path = self.instance.join(name);
        fs::write(&path, value).map_err(io_with(&path))
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        let _ = self.write("events/kvm/kvm_exit/enable", "0");
        let _ = fs::remove_dir(&self.instance);
    }
}

/// Counts the reasons in a trace; `None` if events were lost.
fn count(trace: &str) -> Option<BTreeMap<String, u64>> {
    let mut counts = BTreeMap::new();
    for line in trace.lines() {
        if line.starts_with("CPU:") && line.contains("LOST") {
            return None;
        }
        let Some((_, event)) = line.split_once(" kvm_exit: ") else { continue };
        let mut words = event.split_whitespace().skip_while(|word| *word != "reason");
        if let Some(reason) = words.nth(1) {
            *counts.entry(reason.to_owned()).or_default() += 1;
        }
    }
    Some(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_counted_and_losses_noticed() {
        let trace = "# tracer: nop\n\
            firn-vmm-12 [000] ..... 1.0: kvm_exit: vcpu 0 reason npf rip 0x1 info1 0x0\n\
            firn-vmm-12 [000] ..... 1.1: kvm_exit: vcpu 0 reason msr rip 0x1 info1 0x0\n\
            firn-vmm-12 [000] ..... 1.2: kvm_entry: vcpu 0\n\
            firn-vmm-12 [000] ..... 1.3: kvm_exit: reason npf rip 0x1\n";
        let counts = count(trace).unwrap();
        assert_eq!(counts, BTreeMap::from([("npf".to_owned(), 2), ("msr".to_owned(), 1)]));
        assert_eq!(count("CPU:0 [LOST 12 EVENTS]\n"), None);
    }
}
