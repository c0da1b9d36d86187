//! What device thread and vCPU threads hand over, checked by loom: it runs each model in the
//! interleavings, and with the stale values, that the memory model allows.

mod sync {
    pub use std::sync::PoisonError;

    pub use loom::sync::{Condvar, Mutex, atomic};
}

#[path = "../src/handover.rs"]
mod handover;

use handover::{Asked, Gate, Lapics, Slot, Wish};
use loom::{
    cell::UnsafeCell,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU8, Ordering},
    },
    thread,
};

/// Checks all executions in which threads are preempted at most three times, of which there are
/// thousands, or ordinarily twice; without a bound it takes hours.
fn check(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(firn_nightly::rounds(2, 3));
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
    wish: Wish,
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
            wish: Wish::new(),
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
            if self.wish.answer(&self.immediate_exit).has(Asked::STOP) {
                break;
            }
        }
        *self.answered.lock().unwrap() += 1;
        self.answer.notify_all();
    }

    /// `Vcpu::stop`.
    fn stop(&self) {
        self.wish.ask(Asked::STOP, &self.immediate_exit);
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

#[test]
fn handover_tells_wishes_apart_and_keeps_both() {
    check(|| {
        let (wish, byte) = (Arc::new(Wish::new()), Arc::new(AtomicU8::new(0)));
        let looking = thread::spawn({
            let (wish, byte) = (wish.clone(), byte.clone());
            move || wish.ask(Asked::LOOK, &byte)
        });
        wish.ask(Asked::STOP, &byte);
        looking.join().unwrap();
        let asked = wish.answer(&byte);
        assert!(asked.has(Asked::LOOK) && asked.has(Asked::STOP));
        assert_eq!(byte.load(Ordering::Relaxed), 0);
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
                if let Some(last) = gate.arrive() {
                    // The message's interrupt needs every vCPU's state.
                    assert!(states.iter().all(|state| state.get() == 1));
                    queue.set();
                    last.open();
                } else if gate.wait().is_none() {
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

/// Host, stream, epoll, receive queue and KVM's interrupt controllers, as far as a byte meets them on
/// its way from the host to a guest that sleeps.
#[derive(Default)]
struct Way {
    /// In the stream, not read by the device.
    stream: u32,
    /// The host will write no more.
    host_done: bool,
    /// The stream's readiness has changed since epoll told it.
    edge: bool,
    /// In the receive queue.
    queue: u32,
    /// The LAPIC is restored.
    restored: bool,
    /// An interrupt waits in it.
    requested: bool,
}

struct Road {
    way: Mutex<Way>,
    news: Condvar,
}

/// How a model's device thread comes to its event loop.
#[derive(Clone, Copy, PartialEq)]
enum Order {
    /// Behind the gate.
    Gate,
    /// As soon as it has told the vCPU threads.
    AtOnce,
}

impl Road {
    fn change<T>(&self, change: impl FnOnce(&mut Way) -> T) -> T {
        let result = change(&mut self.way.lock().unwrap());
        self.news.notify_all();
        result
    }

    fn write(&self) {
        self.change(|way| {
            way.stream += 1;
            way.edge = true;
        });
    }

    /// `KVM_SET_LAPIC` of a snapshot that has no interrupt in it.
    fn restore(&self) {
        self.change(|way| (way.restored, way.requested) = (true, false));
    }

    /// `Machine::pump`: bytes to the queue, then the line. An edge that finds no LAPIC is gone.
    fn pump(&self, lapics: Lapics) {
        if self
            .change(|way| {
                std::mem::take(&mut way.stream).checked_sub(1).map(|more| way.queue += 1 + more)
            })
            .is_some()
        {
            self.raise(lapics);
        }
    }

    fn raise(&self, _: Lapics) {
        self.change(|way| way.requested |= way.restored);
    }

    /// The device thread's event loop, until nothing can come any more.
    fn serve(&self, lapics: Lapics) {
        loop {
            let mut way = self.way.lock().unwrap();
            while !way.edge {
                if way.host_done && way.stream == 0 {
                    return;
                }
                way = self.news.wait(way).unwrap();
            }
            way.edge = false;
            drop(way);
            self.pump(lapics);
        }
    }
}

/// A thaw by so many vCPU threads, of which the first has the guest's only interrupt, with one byte in
/// the stream before and `later` ones that come at any time.
fn thaw_with_bytes(threads: usize, later: u32, order: Order) {
    let road = Arc::new(Road { way: Mutex::default(), news: Condvar::new() });
    road.write();
    let gate = Arc::new(Gate::new(threads));
    let commands: Vec<_> = (0..threads).map(|_| Arc::new(Slot::new())).collect();
    let vcpus = commands.iter().enumerate().map(|(id, command)| {
        let (road, gate, command) = (road.clone(), gate.clone(), command.clone());
        thread::spawn(move || {
            command.wait();
            if id == 0 {
                road.restore();
            }
            match gate.arrive() {
                Some(last) => {
                    road.pump(last.lapics());
                    last.open();
                }
                None => drop(gate.wait()),
            }
        })
    });
    let vcpus: Vec<_> = vcpus.collect();
    let host = thread::spawn({
        let road = road.clone();
        move || {
            (0..later).for_each(|_| road.write());
            road.change(|way| way.host_done = true);
        }
    });
    commands.iter().for_each(|command| command.put(()));
    let lapics = match order {
        Order::Gate => gate.wait().unwrap(),
        // A lie: nobody has restored anything yet.
        Order::AtOnce => Lapics::of_power_on(),
    };
    road.serve(lapics);
    host.join().unwrap();
    vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
    let way = road.way.lock().unwrap();
    assert_eq!(way.queue, 1 + later);
    assert!(way.requested, "nobody wakes the guest");
}

#[test]
fn handover_loses_no_byte_of_a_thaw() {
    check(|| thaw_with_bytes(1, 1, Order::Gate));
    check(|| thaw_with_bytes(2, 0, Order::Gate));
}

/// What was so once: the model must see it.
#[test]
#[should_panic(expected = "nobody wakes the guest")]
fn handover_would_lose_bytes_of_a_device_thread_that_does_not_wait() {
    check(|| thaw_with_bytes(1, 0, Order::AtOnce));
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
