//! `/init` of a Firn guest. See the library for what it does.
//!
//! Outside a guest, `firn-init --test-socket PATH --root DIR` serves a host that listens on the
//! Unix socket PATH, with the image and the code in DIR: the same loop with the same runtime
//! interface client, but no mounts, cgroup, clock or entropy to command.
//!
//! `--reconnect`, last (in a guest: `-- --reconnect` at the end of the kernel's command line), is
//! for other monitors than `firn-vmm`, under which connections don't survive a snapshot: a frozen
//! guest whose connection is lost connects anew and waits for `Renew` there. Without it, the end of
//! the connection is the end of the guest at any time.

// Rust's own start-up opens /dev/null where standard descriptors are missing and aborts where it
// can't; both are the case for a PID 1 without a console, before it has mounted /dev.
#![cfg_attr(not(test), no_main)]

use std::{
    ffi::OsString,
    fs::OpenOptions,
    io::{self, Write as _},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::PathBuf,
};

use firn_init::{
    agent::{Agent, AgentError},
    boot,
    host::{Host, RECONNECT},
    place::Place,
    tsc,
};
use rustix::{
    fs::sync,
    process::getpid,
    system::{RebootCommand, reboot},
};

/// The C runtime's entry.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub extern "C" fn main(_argc: libc::c_int, _argv: *const *const libc::c_char) -> libc::c_int {
    let init_tsc = tsc();
    give_memory_back();
    if getpid().is_init() {
        std::panic::set_hook(Box::new(|panic| power_off(&panic.to_string())));
        power_off(&guest(init_tsc));
    }
    match directory(init_tsc) {
        Ok(end) => {
            eprintln!("firn-init: {end}");
            i32::from(!matches!(end, AgentError::Shutdown))
        }
        Err(usage) => {
            eprintln!("firn-init: {usage}");
            2
        }
    }
}

/// Serves as PID 1: why it ended.
fn guest(init_tsc: u64) -> String {
    let machine = match boot::boot() {
        Ok(machine) => machine,
        Err(error) => return error.to_string(),
    };
    let mut host = match boot::connect() {
        Ok(stream) => Host::new(stream),
        Err(error) => return error.to_string(),
    };
    // The kernel hands over what follows `--`; other words of its command line could come before.
    if std::env::args_os().next_back().is_some_and(|last| last == RECONNECT) {
        host = host.reconnecting(Box::new(boot::connect));
    }
    match Agent::new(Place::guest(machine), host) {
        Ok(agent) => agent.run(init_tsc).to_string(),
        Err(error) => error.to_string(),
    }
}

/// Serves in a directory: why it ended, or why it could not begin.
fn directory(init_tsc: u64) -> Result<AgentError, String> {
    const USAGE: &str = "this is the init of a Firn guest; for tests: \
                         firn-init --test-socket PATH --root DIR [--reconnect]";
    let mut arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let reconnect = arguments.pop_if(|last| last == RECONNECT).is_some();
    let (socket, root) = match arguments.as_slice() {
        [a, socket, b, root] if a == "--test-socket" && b == "--root" => (socket, root),
        [version] if version == "--version" => {
            println!("firn-init {}", env!("CARGO_PKG_VERSION"));
            std::process::exit(0);
        }
        _ => return Err(USAGE.to_owned()),
    };
    let socket = PathBuf::from(socket);
    let connect = move || -> io::Result<OwnedFd> {
        let stream = UnixStream::connect(&socket)
            .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", socket.display())))?;
        stream.set_nonblocking(true)?;
        Ok(stream.into())
    };
    let mut host = Host::new(connect().map_err(|error| error.to_string())?);
    if reconnect {
        host = host.reconnecting(Box::new(connect));
    }
    let place = Place::directory(PathBuf::from(root));
    let agent = Agent::new(place, host).map_err(|error| error.to_string())?;
    Ok(agent.run(init_tsc))
}

/// Says why on the kernel's console and ends the guest.
fn power_off(why: &str) -> ! {
    if let Ok(mut console) = OpenOptions::new().write(true).open("/dev/kmsg") {
        // One write is one record; level 3 (error) passes `quiet`.
        let _ = console.write_all(format!("<3>firn-init: {why}\n").as_bytes());
    }
    sync();
    // Without a console there is nobody to tell about an error either.
    let _ = reboot(RebootCommand::Restart);
    // Ends the guest too: the kernel panics when PID 1 ends.
    std::process::exit(1)
}

/// Large buffers (events and answers of up to 6 MB) go back to the kernel when they are freed.
/// By default glibc raises the limit above which it maps blocks of their own each time such a
/// block is freed, and keeps the next ones on the heap.
fn give_memory_back() {
    // SAFETY: sets a parameter of the allocator before there are other threads.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, 128 * 1024) };
}
