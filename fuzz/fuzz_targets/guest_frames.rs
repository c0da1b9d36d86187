//! Frames of the guest protocol: the messages both ways, and the two readers of the stream that they
//! arrive on, in pieces: `firn-init`'s and the host's.

#![no_main]

use std::{io::Write, os::unix::net::UnixStream};

use arbitrary::Arbitrary;
use firn_init::host::Host;
use firn_proto::guest::{
    self, Ask, FromGuest, MAX_CALL, MAX_CALL_HEAD, MAX_LOG, MAX_SEGMENT, decode_from_guest,
    decode_to_guest, encode,
};
use libfuzzer_sys::fuzz_target;

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    /// Put right length prefixes before the pieces.
    framed: bool,
    pieces: Vec<&'a [u8]>,
}

/// Less than what a stream socket holds, so that writing never waits.
const MAX_STREAM: usize = 32 << 10;

fuzz_target!(|input: Input| {
    for piece in &input.pieces {
        if let Ok(message) = decode_to_guest(piece) {
            let frame = encode(&message).expect("what was short enough to decode is so to encode");
            assert_eq!(decode_to_guest(&frame[4..]), Ok(message));
        }
        if let Ok(message) = decode_from_guest(piece) {
            let frame = encode(&message).expect("what was short enough to decode is so to encode");
            let prefix = [frame[0], frame[1], frame[2], frame[3]];
            assert_eq!(guest::frame_length(prefix), Ok(frame.len() - 4));
            assert_eq!(decode_from_guest(&frame[4..]), Ok(message));
        }
    }
    if input.pieces.iter().map(|piece| piece.len() + 4).sum::<usize>() <= MAX_STREAM {
        read_in_guest(&input);
        read_on_host(&input);
    }
});

fn read_on_host(input: &Input) {
    let framed: Vec<Vec<u8>> = input
        .pieces
        .iter()
        .map(|piece| match input.framed {
            true => [&(piece.len() as u32).to_le_bytes()[..], piece].concat(),
            false => piece.to_vec(),
        })
        .collect();
    let pieces: Vec<&[u8]> = framed.iter().map(Vec::as_slice).collect();
    let (messages, kept_to_it) = firn::fuzzing::stream(&pieces);
    if !input.framed {
        return;
    }
    let mut expected = Vec::new();
    for piece in &input.pieces {
        match decode_from_guest(piece) {
            Ok(FromGuest::Log(log)) if log.line.len() <= MAX_LOG => {}
            // Nobody is there to answer a call, which is an answer, too: none stays open.
            Ok(FromGuest::Call(call)) if is_bounded(&call.ask) => {}
            Ok(FromGuest::Segment(segment)) if segment.document.len() <= MAX_SEGMENT => {}
            Ok(FromGuest::Abandon) => {}
            Ok(FromGuest::Log(_) | FromGuest::Call(_) | FromGuest::Segment(_)) | Err(_) => {
                assert!(!kept_to_it);
                break;
            }
            Ok(message) => expected.push(message),
        }
    }
    assert_eq!(messages, expected, "those that are for whoever waits for an answer");
}

fn is_bounded(ask: &Ask) -> bool {
    match ask {
        Ask::Request(request) => {
            request.head_bytes() <= MAX_CALL_HEAD && request.body.len() <= MAX_CALL
        }
        _ => true,
    }
}

fn read_in_guest(input: &Input) {
    let (mut peer, ours) = UnixStream::pair().expect("a socket pair");
    ours.set_nonblocking(true).expect("a socket can be non-blocking");
    let mut host = Host::new(ours.into());
    for piece in &input.pieces {
        if input.framed {
            let length = (piece.len() as u32).to_le_bytes();
            peer.write_all(&length).expect("the socket has room");
        }
        peer.write_all(piece).expect("the socket has room");
        loop {
            match host.receive() {
                Ok(Some(message)) => {
                    if input.framed {
                        assert_eq!(decode_to_guest(piece), Ok(message));
                    }
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
}
