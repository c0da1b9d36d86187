//! What device thread and vCPU threads hand over, checked by loom: it runs each model in the
//! interleavings, and with the stale values, that the memory model allows.

mod sync {
    pub use std::sync::PoisonError;

    pub use loom::sync::{Condvar, Mutex, atomic};
}

#[path = "../src/vcpu/handover.rs"]
mod handover;

use handover::{Gate, Slot, Stop};
use loom::{
    cell::UnsafeCell,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU8, Ordering},
    },
    thread,
};

/// Checks all executions in which threads are preempted at most three times, of which there are
/// thousands; without a bound it takes hours.
fn check(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

/// A vCPU thread as the kernel sees it.
#[derive(Default)]
struct Thread {
    in_kvm_run: bool,
    /// A signal was sent, and has neither been handled in user space nor interrupted `KVM_RUN`.
    pending: bool,
}

struct Model {
    stop: Stop,
    immediate_exit: AtomicU8,
    thread: Mutex<Thread>,
    signalled: Condvar,
    /// Stops that the vCPU has answered.
    answered: Mutex<u32>,
    answer: Condvar,
}

impl Model {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            stop: Stop::new(),
            immediate_exit: AtomicU8::new(0),
            thread: Mutex::new(Thread::default()),
            signalled: Condvar::new(),
            answered: Mutex::new(0),
            answer: Condvar::new(),
        })
    }

    /// `KVM_RUN` of a guest that never exits by itself: returns `EINTR` or not at all.
    fn kvm_run(&self) {
        let mut thread = self.thread.lock().unwrap();
        thread.in_kvm_run = true;
        if self.immediate_exit.load(Ordering::Relaxed) == 0 {
            while !thread.pending {
                thread = self.signalled.wait(thread).unwrap();
            }
            // The handler runs on the way out.
            thread.pending = false;
        }
        thread.in_kvm_run = false;
    }

    /// `Worker::run`.
    fn run_until_stopped(&self) {
        loop {
            self.kvm_run();
            if self.stop.answer(&self.immediate_exit) {
                break;
            }
        }
        *self.answered.lock().unwrap() += 1;
        self.answer.notify_all();
    }

    /// `Vcpu::stop`.
    fn stop(&self) {
        self.stop.ask(&self.immediate_exit);
        self.thread.lock().unwrap().pending = true;
        self.signalled.notify_all();
    }

    /// The handler, which does nothing, runs in user space: sooner or later where a signal is pending.
    fn signal_arrives_in_user_space(&self) {
        let mut thread = self.thread.lock().unwrap();
        if !thread.in_kvm_run {
            thread.pending = false;
        }
    }
}

#[test]
fn handover_loses_no_stop() {
    // The first one's signal may come as late as on the way into the second `KVM_RUN`.
    check(|| {
        let model = Model::new();
        let vcpu = thread::spawn({
            let model = model.clone();
            move || {
                model.run_until_stopped();
                // `Command::Run` is there already.
                model.run_until_stopped();
            }
        });
        let kernel = thread::spawn({
            let model = model.clone();
            move || model.signal_arrives_in_user_space()
        });
        for stops in 1..=2 {
            model.stop();
            // A stop that is lost leaves all waiting, which loom reports.
            let mut answered = model.answered.lock().unwrap();
            while *answered < stops {
                answered = model.answer.wait(answered).unwrap();
            }
        }
        vcpu.join().unwrap();
        kernel.join().unwrap();
    });
}

/// State of a vCPU, or the receive queue: only what happens before is seen.
struct Cell(UnsafeCell<u32>);

// SAFETY: loom checks each access against all others, which is what the models are for.
unsafe impl Sync for Cell {}

impl Cell {
    fn set(&self) {
        // SAFETY: loom fails the model if another access is concurrent.
        self.0.with_mut(|value| unsafe { *value = 1 });
    }

    fn get(&self) -> u32 {
        // SAFETY: as above.
        self.0.with(|value| unsafe { *value })
    }
}

/// A thaw by so many vCPU threads, of which `broken` can't restore its state; how many entered.
fn thaw(threads: usize, broken: Option<usize>) -> u32 {
    let gate = Arc::new(Gate::new(threads));
    let cells = || Cell(UnsafeCell::new(0));
    let states: Arc<Vec<Cell>> = Arc::new((0..threads).map(|_| cells()).collect());
    let queue = Arc::new(cells());
    let threads: Vec<_> = (0..threads)
        .map(|id| {
            let (gate, states, queue) = (gate.clone(), states.clone(), queue.clone());
            thread::spawn(move || {
                if broken == Some(id) {
                    gate.break_down();
                    return 0;
                }
                states[id].set();
                if gate.arrive() {
                    // The message's interrupt needs every vCPU's state.
                    assert!(states.iter().all(|state| state.get() == 1));
                    queue.set();
                    gate.open();
                } else if !gate.wait() {
                    return 0;
                }
                // Nobody enters before the message is there.
                assert_eq!(queue.get(), 1);
                1
            })
        })
        .collect();
    threads.into_iter().map(|thread| thread.join().unwrap()).sum()
}

#[test]
fn handover_lets_all_enter_or_nobody() {
    check(|| assert_eq!(thaw(3, None), 3));
    check(|| assert_eq!(thaw(3, Some(1)), 0));
}

#[test]
fn handover_passes_each_command_and_each_answer_once() {
    check(|| {
        let (command, reply) = (Arc::new(Slot::new()), Arc::new(Slot::new()));
        let vcpu = thread::spawn({
            let (command, reply) = (command.clone(), reply.clone());
            move || (0..2).for_each(|_| reply.put(command.wait() + 10))
        });
        for number in [1, 2] {
            command.put(number);
            // As the device thread looks in passing whether a guest has ended.
            assert_eq!(reply.take().unwrap_or_else(|| reply.wait()), number + 10);
        }
        vcpu.join().unwrap();
        assert_eq!((command.take(), reply.take()), (None, None));
    });
}
