//! The service's own log lines, letter for letter as Lambda prints them.

use std::fmt;

use crate::function::Version;

/// `START …`
pub fn start(request_id: &str, version: Version) -> String {
    format!("START RequestId: {request_id} Version: {version}")
}

/// `END …`
pub fn end(request_id: &str) -> String {
    format!("END RequestId: {request_id}")
}

/// How an invocation ended, where the REPORT line says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Nothing to say.
    Fine,
    /// The deadline passed.
    Timeout,
    /// The runtime failed; the type of the error.
    Error(&'static str),
}

/// The `REPORT` line of one invocation.
#[derive(Debug, Clone, Copy)]
pub struct Report<'a> {
    /// Id of the request.
    pub request_id: &'a str,
    /// From handing out the event to the answer, in microseconds.
    pub duration_us: u64,
    /// Memory of the function in MB.
    pub memory_mb: u32,
    /// Highest memory use so far in bytes.
    pub max_memory_bytes: u64,
    /// Time that initialisation took in microseconds; 0: none.
    pub init_us: u64,
    /// Time from thaw to readiness in microseconds, and the part of it in which the function's own
    /// hooks ran, for the first invocation after a thaw.
    pub restore_us: Option<(u64, u64)>,
    /// How it ended.
    pub status: Status,
}

impl Report<'_> {
    /// Milliseconds to bill: each started one counts. Time that the function spends on
    /// initialisation or on restore hooks is billed, time that Firn spends on a thaw is not.
    pub fn billed_ms(&self) -> u64 {
        let hooks = self.restore_us.map_or(0, |(_, hooks)| hooks);
        (self.duration_us + self.init_us + hooks).div_ceil(1000).max(1)
    }
}

/// Microseconds as milliseconds with two digits.
struct Millis(u64);

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hundredths = (self.0 + 5) / 10;
        write!(f, "{}.{:02} ms", hundredths / 100, hundredths % 100)
    }
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let memory_mb = self.max_memory_bytes.div_ceil(1 << 20).min(self.memory_mb.into());
        write!(
            f,
            "REPORT RequestId: {}\tDuration: {}\tBilled Duration: {} ms\tMemory Size: {} MB\t\
             Max Memory Used: {memory_mb} MB\t",
            self.request_id,
            Millis(self.duration_us),
            self.billed_ms(),
            self.memory_mb,
        )?;
        if self.init_us > 0 {
            write!(f, "Init Duration: {}\t", Millis(self.init_us))?;
        }
        if let Some((restore_us, hooks_us)) = self.restore_us {
            let billed = hooks_us.div_ceil(1000);
            let restore = Millis(restore_us);
            write!(f, "Restore Duration: {restore}\tBilled Restore Duration: {billed} ms\t")?;
        }
        match self.status {
            Status::Fine => Ok(()),
            Status::Timeout => f.write_str("Status: timeout\t"),
            Status::Error(kind) => write!(f, "Status: error\tError Type: {kind}\t"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WARM: Report = Report {
        request_id: "id",
        duration_us: 1234,
        memory_mb: 128,
        max_memory_bytes: 35 << 20,
        init_us: 0,
        restore_us: None,
        status: Status::Fine,
    };

    #[test]
    fn lines_are_lambdas() {
        assert_eq!(start("id", Version::Latest), "START RequestId: id Version: $LATEST");
        assert_eq!(start("id", Version::Published(7)), "START RequestId: id Version: 7");
        assert_eq!(end("id"), "END RequestId: id");
        assert_eq!(
            WARM.to_string(),
            "REPORT RequestId: id\tDuration: 1.23 ms\tBilled Duration: 2 ms\tMemory Size: 128 MB\t\
             Max Memory Used: 35 MB\t"
        );
        let cold = Report { init_us: 101_995, ..WARM }.to_string();
        assert!(cold.ends_with("Max Memory Used: 35 MB\tInit Duration: 102.00 ms\t"), "{cold}");
        assert!(cold.contains("Billed Duration: 104 ms"), "{cold}");
        let thawed = Report { restore_us: Some((1500, 300)), ..WARM }.to_string();
        assert!(
            thawed.ends_with("\tRestore Duration: 1.50 ms\tBilled Restore Duration: 1 ms\t"),
            "{thawed}"
        );
        let late = Report { status: Status::Timeout, ..WARM }.to_string();
        assert!(late.ends_with("\tStatus: timeout\t"), "{late}");
    }

    proptest! {
        #[test]
        fn billed_time_covers_and_hardly_exceeds(us in 1u64..10_000_000, init in 0u64..10_000_000) {
            let report = Report { duration_us: us, init_us: init, ..WARM };
            let billed = report.billed_ms() * 1000;
            prop_assert!(billed >= us + init && billed < us + init + 1000);
        }

        #[test]
        fn memory_used_never_exceeds_memory_size(bytes in any::<u64>()) {
            let text = Report { max_memory_bytes: bytes, ..WARM }.to_string();
            let used = text.split("Max Memory Used: ").nth(1).unwrap();
            let used: u64 = used.split(' ').next().unwrap().parse().unwrap();
            prop_assert!(used <= 128);
        }
    }
}
