//! `/init` of a Firn guest. See the library for what it does.
//!
//! Outside a guest, `firn-init --test-socket PATH --root DIR` serves a host that listens on the
//! Unix socket PATH, with the image and the code in DIR: the same loop with the same runtime
//! interface client, but no mounts, cgroup, clock or entropy to command.

// Rust's own start-up opens /dev/null where standard descriptors are missing and aborts where it
// can't; both are the case for a PID 1 without a console, before it has mounted /dev.
#![cfg_attr(not(test), no_main)]

use std::{
    ffi::OsString, fs::OpenOptions, io::Write as _, os::unix::net::UnixStream, path::PathBuf,
};

use firn_init::{
    agent::{Agent, AgentError},
    boot,
    host::Host,
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
    let stream = match boot::connect() {
        Ok(stream) => stream,
        Err(error) => return error.to_string(),
    };
    match Agent::new(Place::guest(machine), Host::new(stream)) {
        Ok(agent) => agent.run(init_tsc).to_string(),
        Err(error) => error.to_string(),
    }
}

/// Serves in a directory: why it ended, or why it could not begin.
fn directory(init_tsc: u64) -> Result<AgentError, String> {
    const USAGE: &str = "this is the init of a Firn guest; for tests: \
                         firn-init --test-socket PATH --root DIR";
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let (socket, root) = match arguments.as_slice() {
        [a, socket, b, root] if a == "--test-socket" && b == "--root" => (socket, root),
        [version] if version == "--version" => {
            println!("firn-init {}", env!("CARGO_PKG_VERSION"));
            std::process::exit(0);
        }
        _ => return Err(USAGE.to_owned()),
    };
    let stream = UnixStream::connect(socket)
        .and_then(|stream| stream.set_nonblocking(true).map(|()| stream))
        .map_err(|error| format!("{}: {error}", socket.display()))?;
    let place = Place::directory(PathBuf::from(root));
    let agent = Agent::new(place, Host::new(stream.into())).map_err(|error| error.to_string())?;
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
