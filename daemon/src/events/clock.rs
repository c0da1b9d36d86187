//! The time by which events are accepted, retried and dropped: the wall clock, for it goes on while
//! the daemon is down. Tests move it.

use std::time::Duration;

use tokio::sync::watch;

use crate::function::now_ms;

/// Longest sleep, so that steps of the wall clock are noticed.
const STRIDE_MS: i64 = 60_000;

/// The wall clock, plus what tests have added.
#[derive(Debug, Clone)]
pub struct Clock(watch::Sender<i64>);

impl Default for Clock {
    fn default() -> Self {
        Self(watch::Sender::new(0))
    }
}

impl Clock {
    /// Milliseconds since the epoch.
    pub fn now(&self) -> i64 {
        now_ms() + *self.0.borrow()
    }

    /// Sleeps until the clock shows `due` milliseconds since the epoch.
    pub async fn until(&self, due: i64) {
        let mut moved = self.0.subscribe();
        loop {
            let left = due.saturating_sub(self.now());
            if left <= 0 {
                return;
            }
            let sleep = Duration::from_millis(left.min(STRIDE_MS).unsigned_abs());
            tokio::select! {
                () = tokio::time::sleep(sleep) => {}
                _ = moved.changed() => {}
            }
        }
    }

    /// Moves the clock forward.
    #[cfg(test)]
    pub fn advance(&self, by: Duration) {
        self.0.send_modify(|skew| *skew += by.as_millis() as i64);
    }
}
