//! The Runtime API's HTTP parser: whatever the pieces that bytes arrive in, the same requests come
//! out, streamed ones too; and no header value can forge a line of a reply.

#![no_main]

use arbitrary::Arbitrary;
use firn_init::http::{BadRequest, Body, Found, Parser, Request, reply_head};
use libfuzzer_sys::fuzz_target;

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    limit: u16,
    /// Where to cut, as distances.
    cuts: [u8; 8],
    status: u16,
    bytes: &'a [u8],
}

fuzz_target!(|input: Input| {
    let whole = parse(input.limit, std::iter::once(input.bytes));
    let cut = parse(input.limit, Pieces { rest: input.bytes, cuts: &input.cuts, next: 0 });
    assert_eq!(whole, cut);
    let bytes = parse(input.limit, input.bytes.chunks(1));
    assert_eq!(whole, bytes);
    for request in &whole.0 {
        if let Body::Whole(body) = &request.body
            && !request.path.ends_with('s')
        {
            assert!(body.len() <= input.limit.into());
        }
    }
    forge(input.status, &String::from_utf8_lossy(input.bytes));
});

struct Pieces<'a> {
    rest: &'a [u8],
    cuts: &'a [u8],
    next: usize,
}

impl<'a> Iterator for Pieces<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        if self.rest.is_empty() {
            return None;
        }
        let wish = usize::from(self.cuts[self.next % self.cuts.len()]) + 1;
        self.next += 1;
        let (piece, rest) = self.rest.split_at(wish.min(self.rest.len()));
        self.rest = rest;
        Some(piece)
    }
}

/// All requests, how often the client waited for `100 Continue`, and what ended the connection.
fn parse<'a>(
    limit: u16,
    pieces: impl Iterator<Item = &'a [u8]>,
) -> (Vec<Request>, usize, Option<BadRequest>) {
    let mut parser = Parser::new(limit.into(), |head| head.path.ends_with('s'));
    let (mut requests, mut waits) = (Vec::new(), 0);
    // The body of the last request is being streamed.
    let mut streams = false;
    for mut piece in pieces {
        loop {
            let before = piece.len();
            match parser.push(&mut piece) {
                Ok(Found::Nothing) => break,
                Ok(Found::ExpectsContinue) => waits += 1,
                Ok(Found::Request(request)) => {
                    assert!(!streams);
                    requests.push(*request);
                }
                Ok(Found::Head(head)) => {
                    assert!(!std::mem::replace(&mut streams, true) && head.path.ends_with('s'));
                    // Longer than the limit it may be: it is gathered here, not in the parser.
                    requests.push(Request { body: Body::Whole(Vec::new()), ..*head });
                }
                Ok(Found::Piece(piece)) => {
                    assert!(streams && !piece.is_empty());
                    match requests.last_mut().map(|request| &mut request.body) {
                        Some(Body::Whole(body)) => body.extend_from_slice(piece),
                        other => panic!("{other:?}"),
                    }
                }
                Ok(Found::End(trailers)) => {
                    assert!(std::mem::take(&mut streams));
                    requests.last_mut().expect("its head was found").trailers = trailers;
                }
                Err(error) => return (requests, waits, Some(error)),
            }
            assert!(piece.len() <= before);
        }
        assert!(piece.is_empty(), "input was left over");
    }
    (requests, waits, None)
}

/// A reply whose header values come from the runtime or the caller still has the fields that it
/// was given and no others.
fn forge(status: u16, value: &str) {
    let status = status % 900 + 100;
    let head = reply_head(status, &[("Lambda-Runtime-Client-Context", value), ("X", "y")], 7, true);
    let mut fields = [httparse::EMPTY_HEADER; 8];
    let mut reply = httparse::Response::new(&mut fields);
    let end = reply.parse(&head).expect("a reply's head is well-formed");
    assert_eq!(end, httparse::Status::Complete(head.len()));
    assert_eq!(reply.code, Some(status));
    let names: Vec<_> = reply.headers.iter().map(|field| field.name).collect();
    assert_eq!(names, ["Content-Length", "Lambda-Runtime-Client-Context", "X", "Connection"]);
}
