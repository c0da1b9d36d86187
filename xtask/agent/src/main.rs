//! PID 1 of the dev host VM.
//!
//! The first process only reaps orphans: it sets the machine up ([`setup`]), starts itself again
//! to run the machine's job ([`job`]) or, if there is none, as the server ([`serve`]), and when that
//! ends, ends the machine. So the second can wait for its own commands without meeting the exit codes
//! of strangers.
//!
//! It must never keep the host VM alive once nobody can talk to it: every failure prints a reason
//! on the console and powers off.

mod command;
mod job;
mod parallel;
mod serve;
mod setup;

use std::process::Command;

use firn_host_vm_agent::FAILED_MARK;
use rustix::process::{WaitOptions, wait};
use rustix::system::RebootCommand;

fn main() {
    if rustix::process::getpid().as_raw_nonzero().get() != 1 {
        let ended = match job::find() {
            Ok(Some(job)) => job::run(&job),
            Ok(None) => serve::run(),
            Err(error) => Err(error),
        };
        if let Err(error) = ended {
            eprintln!("{FAILED_MARK}{error}");
            std::process::exit(1);
        }
        return;
    }
    if let Err(error) = set_up_and_reap() {
        eprintln!("{FAILED_MARK}{error}");
    }
    // The kernel runs with `reboot=t` and QEMU with `-no-reboot`: this ends QEMU at once.
    let _ = rustix::system::reboot(RebootCommand::Restart);
}

fn set_up_and_reap() -> std::io::Result<()> {
    setup::run()?;
    let server = Command::new("/proc/self/exe").spawn()?.id();
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, _))) if pid.as_raw_nonzero().get() as u32 == server => return Ok(()),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
