//! Why a test failed, in the form of libtest's: after `failures:` and each test's name what it and all
//! threads and processes that it started have said. Whoever reads the output of `cargo test` finds it.

use std::{
    collections::VecDeque,
    io::{self, Write},
    panic,
    sync::{Mutex, MutexGuard},
};

use tracing_subscriber::{EnvFilter, fmt::MakeWriter};

/// Most that is kept of one test: its end is what matters.
const MOST: usize = 64 << 10;

/// What was said since the test began.
static SAID: Mutex<VecDeque<u8>> = Mutex::new(VecDeque::new());

fn said() -> MutexGuard<'static, VecDeque<u8>> {
    SAID.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

struct Keep;

impl Write for Keep {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut said = said();
        said.extend(bytes);
        let surplus = said.len().saturating_sub(MOST);
        said.drain(..surplus);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Keep {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        Self
    }
}

/// From now on panics of all threads, and what firn logs (what its VMMs print is in it), are kept.
pub fn listen() {
    let show = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        // At once, too: not every test that panics comes to an end.
        show(panic);
        let thread = std::thread::current();
        let backtrace = std::backtrace::Backtrace::capture();
        let _ = writeln!(Keep, "thread {:?} {panic}", thread.name().unwrap_or_default());
        if backtrace.status() == std::backtrace::BacktraceStatus::Captured {
            let _ = writeln!(Keep, "{backtrace}");
        }
    }));
    let filter = EnvFilter::new("firn=debug");
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(Keep).init();
}

/// Runs a test; what it said if it failed.
pub fn run(test: fn()) -> Result<(), String> {
    said().clear();
    match panic::catch_unwind(test) {
        Ok(()) => Ok(()),
        Err(_) => Err(String::from_utf8_lossy(said().make_contiguous()).into_owned()),
    }
}

/// Prints the end of the report.
pub fn end(passed: usize, failed: &[(&str, String)]) {
    if !failed.is_empty() {
        println!("\nfailures:\n");
        for (name, said) in failed {
            println!("---- {name} ----\n{said}");
        }
        println!("\nfailures:");
        for (name, _) in failed {
            println!("    {name}");
        }
    }
    let verdict = if failed.is_empty() { "ok" } else { "FAILED" };
    println!("\ntest result: {verdict}. {passed} passed; {} failed", failed.len());
}
