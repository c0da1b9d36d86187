//! What device thread and vCPU threads hand over without a lock around all of it. `vmm/tests/handover.rs`
//! compiles this file against loom, which tries the interleavings that the memory model allows.

use super::sync::{
    Condvar, Mutex, PoisonError,
    atomic::{AtomicU8, AtomicUsize, Ordering},
};

/// What the device thread wants of a vCPU thread that runs its guest, beside
/// `kvm_run.immediate_exit`, which KVM reads once when it is entered.
#[derive(Debug)]
pub struct Wish(AtomicU8);

/// What a vCPU thread was asked for since its last answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked(u8);

impl Asked {
    /// To stop.
    pub const STOP: Self = Self(1);
    /// To look whether its guest is deaf to an interrupt.
    pub const LOOK: Self = Self(2);

    /// Whether this, too, was asked for.
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}

impl Wish {
    /// Nobody wants anything.
    pub fn new() -> Self {
        Self(AtomicU8::new(0))
    }

    /// Wants this. The caller then interrupts the thread by a signal.
    pub fn ask(&self, what: Asked, immediate_exit: &AtomicU8) {
        // Not a store: if the last answer came before, it is read here, so the byte is set after that
        // answer has cleared it.
        self.0.fetch_or(what.0, Ordering::AcqRel);
        immediate_exit.store(1, Ordering::Release);
    }

    /// `KVM_RUN` was interrupted: what was asked for. What comes too late for this answer interrupts
    /// the next `KVM_RUN`.
    pub fn answer(&self, immediate_exit: &AtomicU8) -> Asked {
        // In this order: cleared after a look that found nothing, the byte could be that of a request
        // whose signal has already come and gone.
        immediate_exit.store(0, Ordering::Release);
        Asked(self.0.swap(0, Ordering::AcqRel))
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

/// That every vCPU of a microVM has its LAPIC, so that an interrupt which is raised now finds one.
///
/// KVM drops an edge that no LAPIC takes, without a word. So whoever raises a line, or makes a device
/// do what ends in that, shows one of these: a vCPU thread that runs its guest, the last one to come
/// to a [`Gate`], the device thread behind that gate. The device thread gives its own up before it
/// lets vCPUs restore what they have: until they have met nobody has one.
#[derive(Debug, Clone, Copy)]
pub struct Lapics(());

impl Lapics {
    /// Of vCPUs that have never run: KVM makes them with LAPICs, and nothing restores these.
    pub fn of_power_on() -> Self {
        Self(())
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

/// The last thread to come to a gate. Dropping it breaks the gate.
#[derive(Debug)]
pub struct Last<'a>(Option<&'a Gate>);

impl Gate {
    /// For so many threads.
    pub fn new(threads: usize) -> Self {
        Self {
            missing: AtomicUsize::new(threads),
            passage: Mutex::new(Passage::Closed),
            decided: Condvar::new(),
        }
    }

    /// The caller has done its part. If it is the last one, it sees what all have done.
    pub fn arrive(&self) -> Option<Last<'_>> {
        (self.missing.fetch_sub(1, Ordering::AcqRel) == 1).then(|| Last(Some(self)))
    }

    /// Turns all away: the caller could not do its part, and does not [arrive](Self::arrive).
    pub fn break_down(&self) {
        self.decide(Passage::Broken);
    }

    fn decide(&self, passage: Passage) {
        *self.passage.lock().unwrap_or_else(PoisonError::into_inner) = passage;
        self.decided.notify_all();
    }

    /// Waits until it is decided; `None`: it is broken.
    pub fn wait(&self) -> Option<Lapics> {
        let mut passage = self.passage.lock().unwrap_or_else(PoisonError::into_inner);
        while *passage == Passage::Closed {
            passage = self.decided.wait(passage).unwrap_or_else(PoisonError::into_inner);
        }
        (*passage == Passage::Open).then_some(Lapics(()))
    }
}

impl Last<'_> {
    /// All vCPUs are restored, and none runs yet.
    pub fn lapics(&self) -> Lapics {
        Lapics(())
    }

    /// Lets all pass.
    pub fn open(mut self) -> Lapics {
        if let Some(gate) = self.0.take() {
            gate.decide(Passage::Open);
        }
        Lapics(())
    }
}

impl Drop for Last<'_> {
    fn drop(&mut self) {
        if let Some(gate) = self.0 {
            gate.break_down();
        }
    }
}
