//! `/init` of the smallest guest that can be measured: it answers by itself, at once, and sends
//! events back as they came. No disk is mounted, no clock or entropy set, no process started: what
//! is measured with it is the monitor, the kernel's way into and out of a snapshot, and vsock.
//!
//! It speaks [`firn_proto::guest`] over the same connection as `firn-init`, so whatever drives that
//! drives this, and takes the same `--reconnect` for the same monitors. On any error it ends the
//! guest.

// See firn-init: Rust's own start-up wants standard descriptors, which a PID 1 lacks.
#![cfg_attr(not(test), no_main)]

use std::ffi::{c_char, c_int};

use firn_init::{
    boot,
    host::{Host, HostError, RECONNECT},
    tsc,
};
use firn_proto::guest::{self, Done, FromGuest, Loaded, Outcome, Ready, Renewed, ToGuest};
use rustix::{
    event::{PollFd, PollFlags, poll},
    system::{RebootCommand, reboot},
};

/// The C runtime's entry.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub extern "C" fn main(_argc: c_int, _argv: *const *const c_char) -> c_int {
    let init_tsc = tsc();
    if let Ok(stream) = boot::connect() {
        let mut host = Host::new(stream);
        if std::env::args_os().next_back().is_some_and(|last| last == RECONNECT) {
            host = host.reconnecting(Box::new(boot::connect));
        }
        // There is no console to say why on; the host sees the guest end.
        let _ = serve(host, init_tsc);
    }
    let _ = reboot(RebootCommand::Restart);
    1
}

/// Answers until told to end, or until the connection is lost for good.
fn serve(mut host: Host, init_tsc: u64) -> Result<(), HostError> {
    let ready = Ready { version: guest::VERSION, init_tsc, ready_tsc: tsc() };
    host.send(&FromGuest::Ready(ready))?;
    loop {
        host.flush()?;
        match host.receive() {
            Ok(Some(frame)) => match answer(frame) {
                Some(answer) => host.send(&answer)?,
                None => return Ok(()),
            },
            Ok(None) => {
                let mut flags = PollFlags::IN;
                flags.set(PollFlags::OUT, host.queued() > 0);
                // Interrupted or not: the next turn finds out.
                let _ = poll(&mut [PollFd::from_borrowed_fd(host.fd(), flags)], None);
            }
            Err(lost) => host.replace(lost)?,
        }
    }
}

/// The answer to a frame; `None` to the order to end.
fn answer(frame: ToGuest) -> Option<FromGuest> {
    let read_tsc = tsc();
    match frame {
        ToGuest::Load(_) => Some(FromGuest::Loaded(Loaded { init_us: 0, error: None })),
        ToGuest::Freeze => Some(FromGuest::Frozen),
        ToGuest::Renew(renew) => Some(FromGuest::Renewed(Renewed {
            instance_id: renew.instance_id,
            renew_us: 0,
            hooks_us: 0,
            error: None,
        })),
        ToGuest::Invoke(invoke) => Some(FromGuest::Done(Done {
            request_id: invoke.request_id,
            outcome: Outcome::Response {
                payload: invoke.payload,
                content_type: "application/json".to_owned(),
            },
            duration_us: 0,
            init_us: 0,
            max_memory_bytes: 0,
            tsc: (read_tsc, tsc()),
        })),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::unix::net::UnixStream,
    };

    use firn_proto::guest::Renew;

    use super::*;

    fn hear(stream: &mut UnixStream) -> FromGuest {
        let mut prefix = [0; 4];
        stream.read_exact(&mut prefix).unwrap();
        let mut message = vec![0; guest::frame_length(prefix).unwrap()];
        stream.read_exact(&mut message).unwrap();
        guest::decode_from_guest(&message).unwrap()
    }

    #[test]
    fn frozen_renewed_over_a_new_connection_and_ended() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let (mut next, theirs_next) = UnixStream::pair().unwrap();
        for stream in [&theirs, &theirs_next] {
            stream.set_nonblocking(true).unwrap();
        }
        let mut streams = vec![theirs_next];
        let guest = std::thread::spawn(move || {
            let connect = Box::new(move || Ok(streams.pop().unwrap().into()));
            serve(Host::new(theirs.into()).reconnecting(connect), 7)
        });
        assert!(matches!(hear(&mut ours), FromGuest::Ready(ready) if ready.init_tsc == 7));
        ours.write_all(&guest::encode(&ToGuest::Freeze).unwrap()).unwrap();
        assert_eq!(hear(&mut ours), FromGuest::Frozen);
        drop(ours);
        let renew = Renew {
            wall_clock_ns: 0,
            tsc: None,
            entropy: vec![0; guest::ENTROPY_BYTES],
            instance_id: "me".into(),
            hook_timeout_ms: 0,
        };
        next.write_all(&guest::encode(&ToGuest::Renew(renew)).unwrap()).unwrap();
        assert!(matches!(hear(&mut next), FromGuest::Renewed(r) if r.instance_id == "me"));
        next.write_all(&guest::encode(&ToGuest::Shutdown).unwrap()).unwrap();
        guest.join().unwrap().unwrap();
    }
}
