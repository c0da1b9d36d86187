//! The one connection: its counters and nothing else.
//!
//! Both directions count bytes modulo 2³² since the connection began (§5.10.6.3):
//!
//! ```text
//!  guest ── received ──▶ [buffer, at most BUFFER] ── forwarded ──▶ host
//!                         guest knows of `announced` ≤ forwarded
//!  guest ◀── sent ─────────────────────────────────────────────── host
//!  guest has consumed `guest_forwarded` of them and has room for `guest_buffer`
//! ```
//!
//! All of the guest's counters are checked before they are used: each may only lie between what it
//! said before and what is possible.

use serde::{Deserialize, Serialize};

use super::packet::{Header, NO_RECEIVE, NO_SEND};
use crate::virtio::RestoreError;

/// Bytes from the guest that we keep at most when the host does not read: our `buf_alloc`. It is
/// allocated only when that happens.
pub(super) const BUFFER: u32 = 1 << 20;

/// The guest broke the rules of its connection, which is reset.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Broken;

/// The connection, as it is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Connection {
    guest_port: u32,
    received: u32,
    forwarded: u32,
    announced: u32,
    sent: u32,
    guest_forwarded: u32,
    guest_buffer: u32,
    /// What the guest shut down: `NO_RECEIVE`, `NO_SEND`.
    guest_shutdown: u32,
    /// The host's end of stream was passed on.
    host_finished: bool,
}

impl Connection {
    /// A connection that the guest asked for with `request`.
    pub(super) fn new(request: &Header) -> Self {
        Self {
            guest_port: request.src_port,
            received: 0,
            forwarded: 0,
            announced: 0,
            sent: 0,
            guest_forwarded: 0,
            guest_buffer: request.buf_alloc,
            guest_shutdown: 0,
            host_finished: false,
        }
    }

    pub(super) fn guest_port(&self) -> u32 {
        self.guest_port
    }

    /// Takes the guest's counters out of any of its packets.
    pub(super) fn learn(&mut self, header: &Header) -> Result<(), Broken> {
        let in_flight = self.sent.wrapping_sub(self.guest_forwarded);
        let newly = header.fwd_cnt.wrapping_sub(self.guest_forwarded);
        if newly > in_flight {
            return Err(Broken);
        }
        self.guest_forwarded = header.fwd_cnt;
        self.guest_buffer = header.buf_alloc;
        Ok(())
    }

    /// The guest sent `count` bytes.
    pub(super) fn receive(&mut self, count: u32) -> Result<(), Broken> {
        let buffered = self.received.wrapping_sub(self.forwarded);
        if self.guest_shutdown & NO_SEND != 0 || count > BUFFER - buffered {
            return Err(Broken);
        }
        self.received = self.received.wrapping_add(count);
        Ok(())
    }

    /// `count` of the received bytes went to the host.
    pub(super) fn forward(&mut self, count: usize) {
        self.forwarded = self.forwarded.wrapping_add(count as u32);
    }

    /// Whether the guest should hear how far we are: half of what it may have on its way is news
    /// to it. Linux has no more on its way than its own buffer is large, whatever ours is: waiting
    /// for half of ours would wait for ever.
    pub(super) fn credit_is_news(&self) -> bool {
        let news = self.forwarded.wrapping_sub(self.announced);
        news > 0 && news >= BUFFER.min(self.guest_buffer) / 2
    }

    /// The counters that go into any packet to the guest.
    pub(super) fn announce(&mut self, header: &mut Header) {
        self.announced = self.forwarded;
        header.buf_alloc = BUFFER;
        header.fwd_cnt = self.forwarded;
    }

    /// Bytes that the guest has room for.
    pub(super) fn credit(&self) -> u32 {
        self.guest_buffer.saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    /// `count` bytes, no more than [`Self::credit`], went to the guest.
    pub(super) fn send(&mut self, count: u32) {
        self.sent = self.sent.wrapping_add(count);
    }

    /// The guest shut down one direction or both.
    pub(super) fn shut_down(&mut self, flags: u32) {
        self.guest_shutdown |= flags & (NO_RECEIVE | NO_SEND);
    }

    pub(super) fn guest_sends_no_more(&self) -> bool {
        self.guest_shutdown & NO_SEND != 0
    }

    pub(super) fn guest_receives_no_more(&self) -> bool {
        self.guest_shutdown & NO_RECEIVE != 0
    }

    pub(super) fn host_finished(&self) -> bool {
        self.host_finished
    }

    pub(super) fn finish_host(&mut self) {
        self.host_finished = true;
    }

    /// Checks a connection out of a snapshot.
    pub(super) fn check(&self) -> Result<(), RestoreError> {
        if self.received != self.forwarded {
            return Err(RestoreError::Connection("bytes from the guest are missing"));
        }
        if self.forwarded.wrapping_sub(self.announced) > BUFFER {
            return Err(RestoreError::Connection("announced more than was forwarded"));
        }
        if self.guest_shutdown & !(NO_RECEIVE | NO_SEND) != 0 {
            return Err(RestoreError::Connection("unknown shutdown flags"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn connection() -> Connection {
        Connection::new(&Header { src_port: 7, buf_alloc: 100, ..Header::default() })
    }

    fn connection_with_room(buf_alloc: u32) -> Connection {
        Connection::new(&Header { src_port: 7, buf_alloc, ..Header::default() })
    }

    fn news(fwd_cnt: u32, buf_alloc: u32) -> Header {
        Header { fwd_cnt, buf_alloc, ..Header::default() }
    }

    #[test]
    fn credit_shrinks_with_sending_and_grows_with_consumption() {
        let mut c = connection();
        c.send(60);
        assert_eq!(c.credit(), 40);
        c.learn(&news(50, 100)).unwrap();
        assert_eq!(c.credit(), 90);
        c.learn(&news(50, 5)).unwrap();
        assert_eq!(c.credit(), 0);
    }

    #[test]
    fn counters_wrap() {
        let mut c = connection();
        c.sent = u32::MAX - 4;
        c.guest_forwarded = u32::MAX - 9;
        c.send(10);
        c.learn(&news(3, 100)).unwrap();
        assert_eq!(c.credit(), 98);
    }

    #[test]
    fn a_guest_that_consumed_what_was_never_sent_is_broken() {
        let mut c = connection();
        c.send(10);
        assert_eq!(c.learn(&news(11, 100)), Err(Broken));
        c.learn(&news(10, 100)).unwrap();
        assert_eq!(c.learn(&news(9, 100)), Err(Broken));
    }

    #[test]
    fn a_guest_that_overruns_the_buffer_is_broken() {
        let mut c = connection();
        c.receive(BUFFER).unwrap();
        assert_eq!(c.receive(1), Err(Broken));
        c.forward(1);
        c.receive(1).unwrap();
    }

    #[test]
    fn credit_is_news_at_half_the_buffer() {
        let mut c = connection_with_room(u32::MAX);
        c.receive(BUFFER / 2).unwrap();
        c.forward(BUFFER as usize / 2 - 1);
        assert!(!c.credit_is_news());
        c.forward(1);
        assert!(c.credit_is_news());
        let mut header = Header::default();
        c.announce(&mut header);
        assert_eq!((header.fwd_cnt, header.buf_alloc), (BUFFER / 2, BUFFER));
        assert!(!c.credit_is_news());
    }

    #[test]
    fn credit_is_news_at_half_of_the_guests_buffer_if_that_is_smaller() {
        // Linux's default, and the most that it then has on its way.
        let mut c = connection_with_room(256 << 10);
        c.receive(256 << 10).unwrap();
        c.forward((128 << 10) - 1);
        assert!(!c.credit_is_news());
        c.forward(1);
        assert!(c.credit_is_news());
        for room in [0, 1] {
            let mut c = connection_with_room(room);
            assert!(!c.credit_is_news());
            c.receive(1).unwrap();
            c.forward(1);
            assert!(c.credit_is_news());
        }
    }

    proptest! {
        #[test]
        fn never_sends_over_the_guests_room(
            steps in proptest::collection::vec((any::<u32>(), any::<u32>(), 0u32..5000), 0..50),
        ) {
            let mut c = connection();
            for (fwd_cnt, buf_alloc, wish) in steps {
                let before = c.clone();
                if c.learn(&news(fwd_cnt, buf_alloc)).is_err() {
                    prop_assert_eq!(&c, &before);
                }
                let count = wish.min(c.credit());
                c.send(count);
                prop_assert!(count == 0 || c.sent.wrapping_sub(c.guest_forwarded) <= c.guest_buffer);
            }
        }
    }
}
