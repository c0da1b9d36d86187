//! What device thread and vCPU threads hand over without a lock around all of it. `vmm/tests/handover.rs`
//! compiles this file against loom, which tries the interleavings that the memory model allows.

use super::sync::{
    Condvar, Mutex, PoisonError,
    atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering},
};

/// The wish that a vCPU stop, beside `kvm_run.immediate_exit`, which KVM reads once when it is entered.
#[derive(Debug)]
pub struct Stop(AtomicBool);

impl Stop {
    /// Nobody wants it to stop.
    pub fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    /// Wants it to stop. The caller then interrupts the thread by a signal.
    pub fn ask(&self, immediate_exit: &AtomicU8) {
        // A swap and not a store: if the last answer came before, it is read here, so the byte is set
        // after that answer has cleared it.
        self.0.swap(true, Ordering::AcqRel);
        immediate_exit.store(1, Ordering::Release);
    }

    /// `KVM_RUN` was interrupted: whether the vCPU shall stop. A request that comes too late for this
    /// answer interrupts the next `KVM_RUN`.
    pub fn answer(&self, immediate_exit: &AtomicU8) -> bool {
        // In this order: cleared after a look that found nothing, the byte could be that of a request
        // whose signal has already come and gone.
        immediate_exit.store(0, Ordering::Release);
        self.0.swap(false, Ordering::AcqRel)
    }
}

/// Room for one thing, from one thread to another. Unlike a channel of std's it never yields the
/// processor, which would be another system call for filters to allow, and allocates nothing.
#[derive(Debug)]
pub struct Slot<T> {
    content: Mutex<Option<T>>,
    filled: Condvar,
}

impl<T> Slot<T> {
    /// Nothing is in it.
    pub fn new() -> Self {
        Self { content: Mutex::new(None), filled: Condvar::new() }
    }

    /// Puts something in. What was there must have been taken.
    pub fn put(&self, content: T) {
        *self.content.lock().unwrap_or_else(PoisonError::into_inner) = Some(content);
        self.filled.notify_one();
    }

    /// Takes what is there.
    pub fn take(&self) -> Option<T> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Takes what is there, or will be.
    pub fn wait(&self) -> T {
        let mut content = self.content.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match content.take() {
                Some(content) => return content,
                None => {
                    content = self.filled.wait(content).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }
}

/// Where vCPU threads meet before any of them enters its guest.
#[derive(Debug)]
pub struct Gate {
    missing: AtomicUsize,
    passage: Mutex<Passage>,
    decided: Condvar,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Passage {
    Closed,
    Open,
    Broken,
}

impl Gate {
    /// For so many threads.
    pub fn new(threads: usize) -> Self {
        Self {
            missing: AtomicUsize::new(threads),
            passage: Mutex::new(Passage::Closed),
            decided: Condvar::new(),
        }
    }

    /// The caller has done its part. Whether it is the last one, who sees what all have done, and has
    /// to [open](Self::open) or to [break](Self::break_down) the gate.
    pub fn arrive(&self) -> bool {
        self.missing.fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// Lets all pass.
    pub fn open(&self) {
        self.decide(Passage::Open);
    }

    /// Turns all away: the caller could not do its part and did not [arrive](Self::arrive), or came
    /// last and had to give up.
    pub fn break_down(&self) {
        self.decide(Passage::Broken);
    }

    fn decide(&self, passage: Passage) {
        *self.passage.lock().unwrap_or_else(PoisonError::into_inner) = passage;
        self.decided.notify_all();
    }

    /// Waits until it is decided; whether the caller may pass.
    pub fn wait(&self) -> bool {
        let mut passage = self.passage.lock().unwrap_or_else(PoisonError::into_inner);
        while *passage == Passage::Closed {
            passage = self.decided.wait(passage).unwrap_or_else(PoisonError::into_inner);
        }
        *passage == Passage::Open
    }
}
