//! Holds one kind of thread back, so that tests see both orders of two threads that race.
//!
//! Builds with debug assertions, as tests are, read `FIRN_HOLD` at their start: `vcpu0=2000` holds
//! the thread of vCPU 0 back for 2,000 µs between a restore message and the restore, `device=2000`
//! the device thread behind it. `swallow=1` loses the first interrupt, and with `again=0` none is
//! raised again: what was lost stays lost, however slow the machine is. With `refuse=3` KVM refuses the
//! third restore of a vCPU; with `disk=20000` each slice of a disk's request takes 20 ms more. A comma separates several.
//! Other builds have nothing of this.

use crate::seccomp::Thread;

/// The calling thread waits here if it is one that is to be held back.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn back(_: Thread) {}

/// Whether this interrupt is to be lost.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn swallows_interrupt() -> bool {
    false
}

/// Whether interrupts that are not acknowledged are raised again.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn raises_again() -> bool {
    true
}

/// Whether this restore of a vCPU is to fail.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn refuses_restore() -> bool {
    false
}

/// Part of a disk's request begins.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn slice() {}

/// The clock was read or set, and the TSC is not read yet.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn clock() {}

#[cfg(debug_assertions)]
pub use debug::{back, clock, configure, raises_again, refuses_restore, slice, swallows_interrupt};

#[cfg(all(test, debug_assertions))]
pub use debug::stop_once;

#[cfg(debug_assertions)]
mod debug {
    use std::{
        sync::{
            Condvar, Mutex, OnceLock, PoisonError,
            atomic::{AtomicBool, AtomicU64, Ordering},
        },
        time::Duration,
    };

    use super::Thread;

    static HELD: OnceLock<(Thread, Duration)> = OnceLock::new();

    /// Interrupts that are still to be lost.
    static SWALLOWED: AtomicU64 = AtomicU64::new(0);

    static NEVER_AGAIN: AtomicBool = AtomicBool::new(false);

    static DISK: OnceLock<Duration> = OnceLock::new();

    /// Restores of vCPUs up to the one that is to fail, and with it; 0: none is.
    static RESTORES: AtomicU64 = AtomicU64::new(0);

    #[derive(Debug, PartialEq)]
    enum Hold {
        Thread(Thread, Duration),
        Interrupts(u64),
        Again(bool),
        Refuse(u64),
        Disk(Duration),
    }

    /// Reads `FIRN_HOLD`, before any thread is confined.
    pub fn configure() {
        let text = std::env::var("FIRN_HOLD").unwrap_or_default();
        for hold in text.split(',').filter_map(parse) {
            match hold {
                Hold::Thread(thread, time) => drop(HELD.set((thread, time))),
                Hold::Interrupts(count) => SWALLOWED.store(count, Ordering::Relaxed),
                Hold::Again(again) => NEVER_AGAIN.store(!again, Ordering::Relaxed),
                Hold::Disk(time) => drop(DISK.set(time)),
                Hold::Refuse(which) => RESTORES.store(which, Ordering::Relaxed),
            }
        }
    }

    fn parse(text: &str) -> Option<Hold> {
        let (what, number) = text.split_once('=')?;
        let number = number.parse().ok()?;
        let thread = match what.strip_prefix("vcpu") {
            Some(id) => Thread::Vcpu(id.parse().ok()?),
            None if what == "device" => Thread::Device,
            None if what == "swallow" => return Some(Hold::Interrupts(number)),
            None if what == "again" => return Some(Hold::Again(number != 0)),
            None if what == "disk" => return Some(Hold::Disk(Duration::from_micros(number))),
            None if what == "refuse" => return Some(Hold::Refuse(number)),
            None => return None,
        };
        Some(Hold::Thread(thread, Duration::from_micros(number)))
    }

    /// The calling thread waits here if it is one that is to be held back.
    pub fn back(thread: Thread) {
        let Some(&(held, time)) = HELD.get() else { return };
        if held == thread {
            wait(time);
        }
    }

    /// Part of a disk's request begins.
    pub fn slice() {
        if let Some(time) = DISK.get() {
            wait(*time);
        }
    }

    /// The clock was read or set, and the TSC is not read yet.
    pub fn clock() {
        #[cfg(test)]
        if let Some(time) = STOP.take() {
            wait(time);
        }
    }

    #[cfg(test)]
    thread_local! {
        static STOP: std::cell::Cell<Option<Duration>> = const { std::cell::Cell::new(None) };
    }

    /// Holds this thread back there, once.
    #[cfg(test)]
    pub fn stop_once(time: Duration) {
        STOP.set(Some(time));
    }

    fn wait(time: Duration) {
        // A futex with a time limit, which every thread's filter allows; a sleep is not.
        let nobody = Mutex::new(());
        let lock = nobody.lock().unwrap_or_else(PoisonError::into_inner);
        drop(Condvar::new().wait_timeout_while(lock, time, |()| true));
    }

    /// Whether this interrupt is to be lost.
    pub fn swallows_interrupt() -> bool {
        let less = |left: u64| left.checked_sub(1);
        SWALLOWED.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }

    /// Whether this restore of a vCPU is to fail.
    pub fn refuses_restore() -> bool {
        let less = |left: u64| left.checked_sub(1);
        RESTORES.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less) == Ok(1)
    }

    /// Whether interrupts that are not acknowledged are raised again.
    pub fn raises_again() -> bool {
        !NEVER_AGAIN.load(Ordering::Relaxed)
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn threads_are_named_as_the_module_says() {
            let held = |thread| Some(Hold::Thread(thread, Duration::from_millis(2)));
            assert_eq!(parse("vcpu3=2000"), held(Thread::Vcpu(3)));
            assert_eq!(parse("device=2000"), held(Thread::Device));
            assert_eq!(parse("swallow=2"), Some(Hold::Interrupts(2)));
            assert_eq!(parse("again=0"), Some(Hold::Again(false)));
            assert_eq!(parse("refuse=3"), Some(Hold::Refuse(3)));
            assert_eq!(parse("disk=20"), Some(Hold::Disk(Duration::from_micros(20))));
            assert_eq!((parse("vcpu=1"), parse("rng=1"), parse("device")), (None, None, None));
        }
    }
}
