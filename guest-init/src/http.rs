//! HTTP/1.1 requests and replies (RFC 9112), as much as runtime interface clients use.
//!
//! [`Parser`] is fed whatever bytes arrived, in any pieces, and yields whole requests, or the bodies
//! of those that are streamed as they come. It never holds more than one head ([`MAX_HEAD`]), one body (up to the limit it was made with) and one
//! line; longer bodies are counted and thrown away, so that the sender gets its answer. It never
//! guesses: a request that two parsers could read differently is refused.

/// Longest request head, or trailer section, in bytes. awslambdaric puts an X-Ray cause of up to
/// 1 MiB into a header of its error reports, so the usual 8 or 64 KiB would lose errors.
pub const MAX_HEAD: usize = 1024 * 1024 + 64 * 1024;

/// Most header fields in one head.
const MAX_FIELDS: usize = 100;

/// Longest chunk-size line in bytes, extensions and all.
const MAX_CHUNK_LINE: usize = 1024;

/// A request that can't be answered but with its status and the end of the connection.
#[derive(Debug, Clone, Copy, thiserror::Error, PartialEq, Eq)]
pub enum BadRequest {
    /// The head or the trailers exceed [`MAX_HEAD`] bytes.
    #[error("request head is longer than {MAX_HEAD} bytes")]
    HeadTooLong,
    /// More fields than a client needs.
    #[error("request has more than {MAX_FIELDS} header fields")]
    TooManyFields,
    /// Not HTTP/1.x.
    #[error("malformed request head: {0}")]
    Head(httparse::Error),
    /// A length that is no number, or several that differ.
    #[error("malformed Content-Length")]
    ContentLength,
    /// Both a length and a transfer coding: ambiguous, and the classic way to smuggle a request.
    #[error("both Content-Length and Transfer-Encoding")]
    AmbiguousLength,
    /// A coding other than `chunked`.
    #[error("unsupported Transfer-Encoding")]
    TransferEncoding,
    /// A chunk that is not one.
    #[error("malformed chunk")]
    Chunk,
}

impl BadRequest {
    /// The status to answer with.
    pub fn status(self) -> u16 {
        match self {
            Self::HeadTooLong | Self::TooManyFields => 431,
            Self::TransferEncoding => 501,
            _ => 400,
        }
    }
}

/// Header or trailer fields.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fields(Vec<(String, String)>);

impl Fields {
    /// The first field of this name (any case).
    pub fn get(&self, name: &str) -> Option<&str> {
        self.all(name).next()
    }

    /// All fields, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    fn all<'a, 'n>(&'a self, name: &'n str) -> impl Iterator<Item = &'a str> + use<'a, 'n> {
        self.0.iter().filter(move |(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str())
    }

    fn from_parsed(fields: &[httparse::Header<'_>]) -> Self {
        let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
        Self(fields.iter().map(|f| (f.name.to_owned(), text(f.value))).collect())
    }
}

/// A request's body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// All of it.
    Whole(Vec<u8>),
    /// It was longer than the limit and is gone.
    TooLarge {
        /// Its length in bytes.
        size: u64,
    },
}

/// One request, whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// `GET`, `POST`…
    pub method: String,
    /// The target without its query.
    pub path: String,
    /// What follows the question mark behind it.
    pub query: Option<String>,
    /// Header fields.
    pub headers: Fields,
    /// The body.
    pub body: Body,
    /// Fields after a chunked body.
    pub trailers: Fields,
    /// The client wants the connection closed after the answer.
    pub close: bool,
}

/// What [`Parser::push`] found.
#[derive(Debug, PartialEq, Eq)]
pub enum Found<'a> {
    /// All input was used and more is needed.
    Nothing,
    /// The client waits for `100 Continue` before it sends the body.
    ExpectsContinue,
    /// A request.
    Request(Box<Request>),
    /// Head of a request whose body is streamed: pieces follow, then its end.
    Head(Box<Request>),
    /// The next bytes of a streamed body.
    Piece(&'a [u8]),
    /// The end of a streamed body, and the fields behind it.
    End(Fields),
}

#[derive(Debug)]
enum State {
    Head,
    /// `left` bytes of a body with a length.
    Sized {
        left: u64,
    },
    ChunkSize,
    Chunk {
        left: u64,
    },
    ChunkEnd,
    Trailers,
}

/// An incremental parser of one connection's requests.
#[derive(Debug)]
pub struct Parser {
    limit: usize,
    streams: fn(&Request) -> bool,
    state: State,
    /// The head, trailers or line that is being collected.
    text: Vec<u8>,
    /// Where the last line of `text` starts.
    line: usize,
    /// Head of the request whose body is being read, unless it is streamed and was given away.
    request: Option<Box<Request>>,
    /// That head is to be given away before its body.
    announce: bool,
    body: Vec<u8>,
    size: u64,
}

impl Parser {
    /// Bodies over `limit` bytes become [`Body::TooLarge`], but those of requests for whose heads
    /// `streams` says so are given away as they come, whatever their length.
    pub fn new(limit: usize, streams: fn(&Request) -> bool) -> Self {
        Self {
            limit,
            streams,
            state: State::Head,
            text: Vec::new(),
            line: 0,
            request: None,
            announce: false,
            body: Vec::new(),
            size: 0,
        }
    }

    /// Takes bytes from the front of `input` until something is found or none are left.
    ///
    /// # Errors
    /// A [`BadRequest`]; the connection can't be read any further.
    pub fn push<'a>(&mut self, input: &mut &'a [u8]) -> Result<Found<'a>, BadRequest> {
        if std::mem::take(&mut self.announce)
            && let Some(head) = self.request.take()
        {
            return Ok(Found::Head(head));
        }
        loop {
            match self.state {
                State::Head => {
                    if !self.take_line(input, MAX_HEAD, BadRequest::HeadTooLong)? {
                        return Ok(Found::Nothing);
                    }
                    if !self.line_is_blank() {
                        self.line = self.text.len();
                    } else if self.line == 0 {
                        self.text.clear(); // RFC 9112 §2.2: blank lines before a request.
                    } else {
                        let expects = self.begin_body()?;
                        if expects && !self.body_is_over() {
                            return Ok(Found::ExpectsContinue);
                        }
                        if self.announce {
                            return self.push(input);
                        }
                    }
                }
                State::Sized { left: 0 } => return Ok(self.finish(Fields::default())),
                State::Sized { left } => {
                    let piece = take(input, left);
                    if piece.is_empty() {
                        return Ok(Found::Nothing);
                    }
                    self.state = State::Sized { left: left - piece.len() as u64 };
                    if self.request.is_none() {
                        return Ok(Found::Piece(piece));
                    }
                    self.collect(piece);
                }
                State::ChunkSize => {
                    if !self.take_line(input, MAX_CHUNK_LINE, BadRequest::Chunk)? {
                        return Ok(Found::Nothing);
                    }
                    let size = chunk_size(&self.text).ok_or(BadRequest::Chunk)?;
                    self.text.clear();
                    self.state =
                        if size == 0 { State::Trailers } else { State::Chunk { left: size } };
                }
                State::Chunk { left: 0 } => self.state = State::ChunkEnd,
                State::Chunk { left } => {
                    let piece = take(input, left);
                    if piece.is_empty() {
                        return Ok(Found::Nothing);
                    }
                    self.state = State::Chunk { left: left - piece.len() as u64 };
                    if self.request.is_none() {
                        return Ok(Found::Piece(piece));
                    }
                    self.collect(piece);
                }
                State::ChunkEnd => {
                    if !self.take_line(input, 2, BadRequest::Chunk)? {
                        return Ok(Found::Nothing);
                    }
                    if !self.line_is_blank() {
                        return Err(BadRequest::Chunk);
                    }
                    self.text.clear();
                    self.state = State::ChunkSize;
                }
                State::Trailers => {
                    if !self.take_line(input, MAX_HEAD, BadRequest::HeadTooLong)? {
                        return Ok(Found::Nothing);
                    }
                    if !self.line_is_blank() {
                        self.line = self.text.len();
                        continue;
                    }
                    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
                    let trailers = match httparse::parse_headers(&self.text, &mut fields) {
                        Ok(httparse::Status::Complete((_, fields))) => Fields::from_parsed(fields),
                        Ok(httparse::Status::Partial) => return Err(BadRequest::Chunk),
                        Err(error) => return Err(head_error(error)),
                    };
                    return Ok(self.finish(trailers));
                }
            }
        }
    }

    /// Moves one line, or what there is of it, into `text`. True when the line is complete.
    fn take_line(
        &mut self,
        input: &mut &[u8],
        limit: usize,
        error: BadRequest,
    ) -> Result<bool, BadRequest> {
        let end = input.iter().position(|&byte| byte == b'\n');
        let (line, rest) = input.split_at(end.map_or(input.len(), |end| end + 1));
        if self.text.len() + line.len() > limit {
            return Err(error);
        }
        self.text.extend_from_slice(line);
        *input = rest;
        Ok(end.is_some())
    }

    fn line_is_blank(&self) -> bool {
        matches!(self.text.get(self.line..), Some(b"\n" | b"\r\n"))
    }

    fn body_is_over(&self) -> bool {
        matches!(self.state, State::Sized { left: 0 })
    }

    /// Parses the head in `text`. True if the client waits for `100 Continue`.
    fn begin_body(&mut self) -> Result<bool, BadRequest> {
        let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
        let mut head = httparse::Request::new(&mut fields);
        match head.parse(&self.text) {
            Ok(httparse::Status::Complete(length)) if length == self.text.len() => {}
            Ok(_) => return Err(BadRequest::Head(httparse::Error::Token)),
            Err(error) => return Err(head_error(error)),
        }
        let headers = Fields::from_parsed(head.headers);
        let modern = head.version == Some(1);
        let connection = headers.get("connection").unwrap_or_default();
        let has = |token: &str| connection.split(',').any(|t| t.trim().eq_ignore_ascii_case(token));
        let close = has("close") || !(modern || has("keep-alive"));
        let expects = modern
            && headers.get("expect").is_some_and(|e| e.trim().eq_ignore_ascii_case("100-continue"));

        self.state = framing(&headers)?;
        let target = head.path.unwrap_or_default();
        let (path, query) = match target.split_once('?') {
            Some((path, query)) => (path, Some(query.to_owned())),
            None => (target, None),
        };
        let request = self.request.insert(Box::new(Request {
            method: head.method.unwrap_or_default().to_owned(),
            path: path.to_owned(),
            query,
            headers,
            body: Body::Whole(Vec::new()),
            trailers: Fields::default(),
            close,
        }));
        match self.state {
            // Nothing follows.
            State::Sized { left: 0 } => {}
            _ if (self.streams)(request) => self.announce = true,
            State::Sized { left } if left <= self.limit as u64 => {
                self.body.reserve_exact(left as usize);
            }
            _ => {}
        }
        self.text = Vec::new();
        self.line = 0;
        Ok(expects)
    }

    fn collect(&mut self, piece: &[u8]) {
        self.size = self.size.saturating_add(piece.len() as u64);
        if self.size <= self.limit as u64 {
            self.body.extend_from_slice(piece);
        } else {
            self.body = Vec::new();
        }
    }

    fn finish(&mut self, trailers: Fields) -> Found<'static> {
        let body = std::mem::take(&mut self.body);
        let size = std::mem::take(&mut self.size);
        self.text = Vec::new();
        self.line = 0;
        self.state = State::Head;
        let Some(mut request) = self.request.take() else { return Found::End(trailers) };
        request.trailers = trailers;
        request.body =
            if size > self.limit as u64 { Body::TooLarge { size } } else { Body::Whole(body) };
        Found::Request(request)
    }
}

/// How the body of a request with these fields is delimited (RFC 9112 §6.3).
fn framing(headers: &Fields) -> Result<State, BadRequest> {
    let mut codings = headers.all("transfer-encoding");
    let mut lengths = headers.all("content-length");
    match (codings.next(), lengths.next()) {
        (Some(_), Some(_)) => Err(BadRequest::AmbiguousLength),
        (Some(coding), None) => {
            if !coding.trim().eq_ignore_ascii_case("chunked") || codings.next().is_some() {
                return Err(BadRequest::TransferEncoding);
            }
            Ok(State::ChunkSize)
        }
        (None, Some(length)) => {
            if lengths.any(|other| other != length) {
                return Err(BadRequest::ContentLength);
            }
            Ok(State::Sized { left: decimal(length).ok_or(BadRequest::ContentLength)? })
        }
        (None, None) => Ok(State::Sized { left: 0 }),
    }
}

fn head_error(error: httparse::Error) -> BadRequest {
    match error {
        httparse::Error::TooManyHeaders => BadRequest::TooManyFields,
        error => BadRequest::Head(error),
    }
}

/// Splits at most `left` bytes off the front of `input`.
fn take<'a>(input: &mut &'a [u8], left: u64) -> &'a [u8] {
    let count = usize::try_from(left).unwrap_or(usize::MAX).min(input.len());
    let (piece, rest) = input.split_at(count);
    *input = rest;
    piece
}

/// Digits only: `u64::from_str` would also take a sign.
fn decimal(text: &str) -> Option<u64> {
    if text.bytes().all(|b| b.is_ascii_digit()) { text.parse().ok() } else { None }
}

fn chunk_size(line: &[u8]) -> Option<u64> {
    let line = std::str::from_utf8(line).ok()?;
    let digits = line.split_once(';').map_or(line, |(size, _)| size).trim_ascii();
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u64::from_str_radix(digits, 16).ok()
}

/// What a client is told to go on with an announced body.
pub const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// Head of a reply with a body of `length` bytes. Control characters in header values (a client
/// context may be pretty-printed JSON) become spaces, so that no value can forge a header.
pub fn reply_head(status: u16, fields: &[(&str, &str)], length: usize, close: bool) -> Vec<u8> {
    use std::io::Write as _;

    let reason = match status {
        200 => "OK",
        202 => "Accepted",
        400 => "Bad Request",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        413 => "Content Too Large",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        _ => "Error",
    };
    let mut head = Vec::with_capacity(512);
    // Writing to a vector can't fail.
    let _ = write!(head, "HTTP/1.1 {status} {reason}\r\nContent-Length: {length}\r\n");
    for (name, value) in fields {
        head.extend_from_slice(name.as_bytes());
        head.extend_from_slice(b": ");
        head.extend(value.bytes().map(|b| if b < b' ' || b == 0x7f { b' ' } else { b }));
        head.extend_from_slice(b"\r\n");
    }
    if close {
        head.extend_from_slice(b"Connection: close\r\n");
    }
    head.extend_from_slice(b"\r\n");
    head
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(limit: usize, mut input: &[u8]) -> Result<Vec<Request>, BadRequest> {
        let mut parser = Parser::new(limit, |_| false);
        let mut requests = Vec::new();
        loop {
            match parser.push(&mut input)? {
                Found::Nothing => return Ok(requests),
                Found::ExpectsContinue => {}
                Found::Request(request) => requests.push(*request),
                streamed => panic!("{streamed:?}"),
            }
        }
    }

    fn one(input: &[u8]) -> Request {
        let mut requests = parse(100, input).unwrap();
        assert_eq!(requests.len(), 1);
        requests.remove(0)
    }

    #[test]
    fn plain_get() {
        let request = one(b"\r\nGET /a/next?x=1 HTTP/1.1\r\nHost: h\r\n\r\n");
        assert_eq!((request.method.as_str(), request.path.as_str()), ("GET", "/a/next"));
        assert_eq!(request.headers.get("hOST"), Some("h"));
        assert!(!request.close);
    }

    #[test]
    fn bare_line_feeds_and_http_1_0() {
        assert!(one(b"GET / HTTP/1.0\nHost: h\n\n").close);
        assert!(!one(b"GET / HTTP/1.0\nConnection: keep-alive\n\n").close);
        assert!(one(b"GET / HTTP/1.1\r\nConnection: foo, Close\r\n\r\n").close);
    }

    #[test]
    fn chunked_with_extension_and_trailers() {
        let request = one(
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\nA\r\n0123456789\r\n0\r\nError: yes\r\n\r\n",
        );
        assert_eq!(request.body, Body::Whole(b"abc0123456789".to_vec()));
        assert_eq!(request.trailers.get("error"), Some("yes"));
    }

    #[test]
    fn long_bodies_are_counted_not_kept() {
        let mut text = b"POST / HTTP/1.1\r\nContent-Length: 101\r\n\r\n".to_vec();
        text.extend_from_slice(&[b'x'; 101]);
        assert_eq!(one(&text).body, Body::TooLarge { size: 101 });
        let mut text = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
        for _ in 0..3 {
            text.extend_from_slice(b"32\r\n");
            text.extend_from_slice(&[b'x'; 0x32]);
            text.extend_from_slice(b"\r\n");
        }
        text.extend_from_slice(b"0\r\n\r\n");
        assert_eq!(one(&text).body, Body::TooLarge { size: 150 });
    }

    #[test]
    fn expect_continue_is_found_before_the_body() {
        let mut parser = Parser::new(100, |_| false);
        let mut head: &[u8] =
            b"POST / HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n";
        assert_eq!(parser.push(&mut head), Ok(Found::ExpectsContinue));
        assert!(matches!(parser.push(&mut &b"hi"[..]), Ok(Found::Request(_))));
    }

    #[test]
    fn a_streamed_body_comes_in_pieces_behind_its_head() {
        let mut parser = Parser::new(4, |head| head.headers.get("stream").is_some());
        let mut text: &[u8] = b"POST /p HTTP/1.1\r\nStream: 1\r\nExpect: 100-continue\r\n\
            Transfer-Encoding: chunked\r\n\r\n6\r\n012345\r\n1\r\n6\r\n0\r\nT: u\r\n\r\n\
            POST /q HTTP/1.1\r\nContent-Length: 2\r\n\r\nhi\
            POST /r HTTP/1.1\r\nStream: 1\r\nContent-Length: 5\r\n\r\nabcde\
            POST /s HTTP/1.1\r\nStream: 1\r\nContent-Length: 0\r\n\r\n";
        let mut found = Vec::new();
        loop {
            found.push(match parser.push(&mut text).unwrap() {
                Found::Nothing => break,
                Found::ExpectsContinue => "100".to_owned(),
                Found::Request(request) => format!("{} {:?}", request.path, request.body),
                Found::Head(request) => request.path,
                Found::Piece(bytes) => String::from_utf8(bytes.to_vec()).unwrap(),
                Found::End(trailers) => format!("end {:?}", trailers.get("t")),
            });
        }
        let whole = ["/q Whole([104, 105])", "/s Whole([])"];
        assert_eq!(
            found,
            [
                "100",
                "/p",
                "012345",
                "6",
                "end Some(\"u\")",
                whole[0],
                "/r",
                "abcde",
                "end None",
                whole[1]
            ]
        );
    }

    #[test]
    fn what_two_parsers_could_read_differently_is_refused() {
        for (text, error) in [
            ("Content-Length: 1\r\nContent-Length: 2", BadRequest::ContentLength),
            ("Content-Length: +1", BadRequest::ContentLength),
            ("Content-Length: ", BadRequest::ContentLength),
            ("Content-Length: 99999999999999999999", BadRequest::ContentLength),
            ("Content-Length: 1\r\nTransfer-Encoding: chunked", BadRequest::AmbiguousLength),
            ("Transfer-Encoding: gzip, chunked", BadRequest::TransferEncoding),
            (
                "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
                BadRequest::TransferEncoding,
            ),
        ] {
            let text = format!("POST / HTTP/1.1\r\n{text}\r\n\r\n");
            assert_eq!(parse(100, text.as_bytes()), Err(error), "{text}");
        }
        for chunks in ["x\r\n", "-1\r\n", "\r\n", "1\r\nab\r\n", "11111111111111111\r\n"] {
            let text = format!("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}");
            assert_eq!(parse(100, text.as_bytes()), Err(BadRequest::Chunk), "{chunks}");
        }
    }

    #[test]
    fn heads_are_bounded() {
        let mut parser = Parser::new(100, |_| false);
        let mut start: &[u8] = b"GET / HTTP/1.1\r\nX: ";
        assert_eq!(parser.push(&mut start), Ok(Found::Nothing));
        let filler = vec![b'x'; 64 * 1024];
        let result = (0..20).find_map(|_| parser.push(&mut &filler[..]).err());
        assert_eq!(result, Some(BadRequest::HeadTooLong));
        let fields = "A: b\r\n".repeat(MAX_FIELDS + 1);
        let text = format!("GET / HTTP/1.1\r\n{fields}\r\n");
        assert_eq!(parse(100, text.as_bytes()), Err(BadRequest::TooManyFields));
    }

    #[test]
    fn reply_values_cannot_forge_headers() {
        let head = reply_head(200, &[("A", "1\r\nB: 2")], 0, false);
        assert!(!String::from_utf8(head).unwrap().contains("\nB:"));
    }

    fn any_request() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
        let body = proptest::collection::vec(any::<u8>(), 0..150);
        (body, any::<bool>(), 1..20_usize).prop_map(|(body, chunked, size)| {
            let mut text = b"POST /p HTTP/1.1\r\nHost: h\r\n".to_vec();
            if chunked {
                text.extend_from_slice(b"Transfer-Encoding: chunked\r\n\r\n");
                for chunk in body.chunks(size) {
                    text.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
                    text.extend_from_slice(chunk);
                    text.extend_from_slice(b"\r\n");
                }
                text.extend_from_slice(b"0\r\n\r\n");
            } else {
                text.extend_from_slice(
                    format!("Content-Length: {}\r\n\r\n", body.len()).as_bytes(),
                );
                text.extend_from_slice(&body);
            }
            (text, body)
        })
    }

    proptest! {
        #[test]
        fn pipelined_requests_in_any_pieces(
            requests in proptest::collection::vec(any_request(), 1..6),
            piece in 1..64_usize,
        ) {
            let text: Vec<u8> = requests.iter().flat_map(|(text, _)| text.clone()).collect();
            let mut parser = Parser::new(100, |_| false);
            let mut bodies = Vec::new();
            for mut piece in text.chunks(piece) {
                while let Found::Request(request) = parser.push(&mut piece).unwrap() {
                    bodies.push(request.body);
                }
                prop_assert!(piece.is_empty());
            }
            let expected: Vec<Body> = requests
                .into_iter()
                .map(|(_, body)| match body.len() {
                    size @ 101.. => Body::TooLarge { size: size as u64 },
                    _ => Body::Whole(body),
                })
                .collect();
            prop_assert_eq!(bodies, expected);
        }

        #[test]
        fn any_bytes_parse_or_fail(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = parse(16, &bytes);
        }

        #[test]
        fn nearly_requests_parse_or_fail(
            tail in "[ -~\r\n]{0,200}",
            head in prop_oneof![
                Just("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"),
                Just("POST / HTTP/1.1\r\nContent-Length: 7\r\n"),
                Just("GET "),
            ],
        ) {
            let _ = parse(16, format!("{head}{tail}").as_bytes());
        }
    }
}
