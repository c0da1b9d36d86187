//! Where an invocation stands in its trace: `X-Amzn-Trace-Id` as X-Ray has it, and W3C's `traceparent`.
//!
//! An id of X-Ray, `1-58406520-a006649127e371903a2de979`, is the same number as OpenTelemetry's
//! `58406520a006649127e371903a2de979`. Headers are bounded and taken whole or not at all: what is no trace
//! header begins a new trace.

use std::fmt;

use axum::http::{HeaderMap, HeaderName};

/// X-Ray's header.
pub const HEADER: HeaderName = HeaderName::from_static("x-amzn-trace-id");

/// W3C Trace Context's header.
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// Longest trace header in bytes.
pub const LONGEST: usize = 1024;

/// Id of a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceId(pub [u8; 16]);

impl TraceId {
    /// As X-Ray writes it: `1-`, eight hexadecimal digits, `-`, and twenty-four.
    pub fn parse(text: &str) -> Option<Self> {
        let (time, rest) = text.strip_prefix("1-")?.split_once('-')?;
        if (time.len(), rest.len()) != (8, 24) {
            return None;
        }
        hex::<16>([time, rest].concat().as_bytes()).map(Self)
    }

    /// A new one; its first half is the time in seconds since the epoch, as X-Ray wants it.
    fn new() -> Self {
        let mut bytes = *uuid::Uuid::new_v4().as_bytes();
        let seconds = (crate::function::now_ms() / 1000) as u32;
        bytes[..4].copy_from_slice(&seconds.to_be_bytes());
        Self(bytes)
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = u128::from_be_bytes(self.0);
        write!(f, "1-{:08x}-{:024x}", number >> 96, number & ((1 << 96) - 1))
    }
}

/// Id of a span.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SpanId(pub [u8; 8]);

impl SpanId {
    /// Sixteen hexadecimal digits.
    pub fn parse(text: &str) -> Option<Self> {
        hex::<8>(text.as_bytes()).map(Self)
    }

    /// A new one.
    pub fn new() -> Self {
        Self::of(&uuid::Uuid::new_v4())
    }

    /// The span of the request with that id: all attempts at an event have it, also after a restart.
    pub fn of_request(id: &str) -> Self {
        uuid::Uuid::try_parse(id).map_or_else(|_| Self::new(), |id| Self::of(&id))
    }

    fn of(id: &uuid::Uuid) -> Self {
        // The bytes between hold the version, which is not random.
        let [a, b, c, d, e, f, .., y, z] = *id.as_bytes();
        Self([a, b, c, d, e, f, y, z])
    }
}

impl fmt::Display for SpanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", u64::from_be_bytes(self.0))
    }
}

/// What a caller says of the trace that its request belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Context {
    /// The trace.
    pub trace: TraceId,
    /// The caller's span.
    pub parent: Option<SpanId>,
    /// What was decided about recording it; `None`: nothing yet.
    pub sampled: Option<bool>,
    /// Fields that mean nothing here, such as `Lineage`, each behind a semicolon.
    rest: String,
}

impl Context {
    /// What headers say, or a new trace.
    pub fn of(headers: &HeaderMap) -> Self {
        let text = |name| headers.get(name)?.to_str().ok();
        let given = match text(HEADER) {
            Some(header) => Self::parse(header),
            None => text(TRACEPARENT).and_then(Self::parse_traceparent),
        };
        given.unwrap_or_else(Self::begin)
    }

    /// A new trace, about which nothing is decided.
    pub fn begin() -> Self {
        Self { trace: TraceId::new(), parent: None, sampled: None, rest: String::new() }
    }

    /// Reads `Root=1-…;Parent=…;Sampled=1`, in any order.
    pub fn parse(header: &str) -> Option<Self> {
        if header.len() > LONGEST {
            return None;
        }
        let (mut trace, mut parent, mut sampled) = (None, None, None);
        let mut rest = String::new();
        for field in header.split(';').map(str::trim).filter(|field| !field.is_empty()) {
            let (name, value) = field.split_once('=')?;
            let twice = match name {
                "Root" => trace.replace(TraceId::parse(value)?).is_some(),
                "Parent" => parent.replace(SpanId::parse(value)?).is_some(),
                "Sampled" => sampled
                    .replace(match value {
                        "0" => Some(false),
                        "1" => Some(true),
                        // The caller leaves it to us.
                        "?" => None,
                        _ => return None,
                    })
                    .is_some(),
                _ => {
                    rest.push(';');
                    rest.push_str(field);
                    false
                }
            };
            if twice {
                return None;
            }
        }
        Some(Self { trace: trace?, parent, sampled: sampled.flatten(), rest })
    }

    /// Reads `00-<trace>-<span>-<flags>` (W3C Trace Context, 3.2).
    fn parse_traceparent(header: &str) -> Option<Self> {
        if header.len() > LONGEST {
            return None;
        }
        let mut parts = header.split('-');
        let mut part = |length| parts.next().filter(|part| part.len() == length);
        let (version, trace, parent, flags) = (part(2)?, part(32)?, part(16)?, part(2)?);
        let [version] = hex_or_zero::<1>(version.as_bytes())?;
        let [flags] = hex_or_zero::<1>(flags.as_bytes())?;
        // Later versions may have more parts.
        if version == 0xff || (version == 0 && parts.next().is_some()) {
            return None;
        }
        Some(Self {
            trace: TraceId(hex(trace.as_bytes())?),
            parent: Some(SpanId(hex(parent.as_bytes())?)),
            sampled: Some(flags & 1 == 1),
            rest: String::new(),
        })
    }

    /// The header for who comes next, whose parent is `parent`.
    pub fn header(&self, parent: Option<SpanId>) -> String {
        let Self { trace, sampled, rest, .. } = self;
        let sampled = u8::from(*sampled == Some(true));
        match parent {
            Some(parent) => format!("Root={trace};Parent={parent};Sampled={sampled}{rest}"),
            None => format!("Root={trace};Sampled={sampled}{rest}"),
        }
    }
}

/// Bytes from hexadecimal digits; an id of zeros is none.
fn hex<const N: usize>(digits: &[u8]) -> Option<[u8; N]> {
    hex_or_zero(digits).filter(|bytes| *bytes != [0; N])
}

fn hex_or_zero<const N: usize>(digits: &[u8]) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    if digits.len() != 2 * N {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |digit: u8| char::from(digit).to_digit(16);
        *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    const ROOT: &str = "1-58406520-a006649127e371903a2de979";

    fn of(headers: &[(HeaderName, &str)]) -> Context {
        let headers = headers.iter();
        Context::of(
            &headers
                .map(|(name, value)| (name.clone(), HeaderValue::from_str(value).unwrap()))
                .collect(),
        )
    }

    #[test]
    fn the_same_number_for_both() {
        let id = TraceId::parse(ROOT).unwrap();
        assert_eq!(u128::from_be_bytes(id.0), 0x5840_6520_a006_6491_27e3_7190_3a2d_e979);
        assert_eq!(id.to_string(), ROOT);
        assert_eq!(SpanId::parse("0000000000000a0b").unwrap().to_string(), "0000000000000a0b");
    }

    #[test]
    fn headers_are_read_and_written() {
        let header =
            format!("Sampled=1; Parent=53995c3f42cd8ad8;Root={ROOT};Lineage=25:a87bd80c:0");
        let context = Context::parse(&header).unwrap();
        assert_eq!((context.sampled, context.trace.to_string()), (Some(true), ROOT.into()));
        assert_eq!(
            context.header(SpanId::parse("1111111111111111")),
            format!("Root={ROOT};Parent=1111111111111111;Sampled=1;Lineage=25:a87bd80c:0")
        );
        for (undecided, sampled) in [("", None), (";Sampled=?", None), (";Sampled=0", Some(false))]
        {
            let context = Context::parse(&format!("Root={ROOT}{undecided}")).unwrap();
            assert_eq!((context.parent, context.sampled), (None, sampled));
            assert_eq!(context.header(None), format!("Root={ROOT};Sampled=0"));
        }
    }

    #[test]
    fn what_is_no_trace_header_is_none() {
        let long = format!("Root={ROOT};x={}", "y".repeat(1024));
        for bad in [
            "",
            "Sampled=1",
            "Root=1-2-3",
            "Root=1-00000000-000000000000000000000000",
            "Root=2-58406520-a006649127e371903a2de979",
            "Root=1-58406520a-006649127e371903a2de979",
            "Root=1-58406520-a006649127e371903a2de97g",
            "Root=1-58406520-a006649127e371903a2de979;Root=1-58406520-a006649127e371903a2de979",
            "Root=1-58406520-a006649127e371903a2de979;Parent=1",
            "Root=1-58406520-a006649127e371903a2de979;Parent=0000000000000000",
            "Root=1-58406520-a006649127e371903a2de979;Sampled=2",
            "Root=1-58406520-a006649127e371903a2de979;what",
            &long,
        ] {
            assert_eq!(Context::parse(bad), None, "{bad}");
            let begun = of(&[(HEADER, bad)]);
            assert_eq!((begun.parent, begun.sampled), (None, None));
        }
    }

    #[test]
    fn the_other_header_counts_where_ours_is_absent() {
        let parent = "00-58406520a006649127e371903a2de979-53995c3f42cd8ad8-01";
        let context = of(&[(TRACEPARENT, parent)]);
        assert_eq!((context.trace.to_string(), context.sampled), (ROOT.into(), Some(true)));
        assert_eq!(context.parent, SpanId::parse("53995c3f42cd8ad8"));
        let other = "Root=1-11111111-222222222222222222222222";
        assert_eq!(
            of(&[(TRACEPARENT, parent), (HEADER, other)]).header(None),
            format!("{other};Sampled=0")
        );
        assert_eq!(
            Context::parse_traceparent(&parent.replace("-01", "-02")).unwrap().sampled,
            Some(false)
        );
        assert!(
            Context::parse_traceparent(&parent.replacen("00-", "cc-", 1).replace("-01", "-01-x"))
                .is_some()
        );
        for bad in [
            parent.replacen("00-", "ff-", 1),
            parent.replacen("00-", "0-", 1),
            parent.replace("-01", ""),
            parent.replace("-01", "-01-x"),
            parent.replace("-01", "-0x"),
            parent.replace("53995c3f42cd8ad8", "0000000000000000"),
            parent.replace("58406520a006649127e371903a2de979", "00000000000000000000000000000000"),
        ] {
            assert_eq!(Context::parse_traceparent(&bad), None, "{bad}");
        }
    }

    #[test]
    fn an_event_has_one_span_and_requests_have_different_ones() {
        let (one, other) = (uuid::Uuid::new_v4().to_string(), uuid::Uuid::new_v4().to_string());
        assert_eq!(SpanId::of_request(&one), SpanId::of_request(&one));
        assert_ne!(SpanId::of_request(&one), SpanId::of_request(&other));
        assert_ne!(SpanId::of_request("x"), SpanId::of_request("x"));
    }

    proptest! {
        #[test]
        fn any_header_is_read_or_not(header in "(Root=1-[0-9a-f]{8}-[0-9a-f]{24}|Parent=[0-9a-f]{16}|Sampled=[01?]|[ -~]{0,20}|;){0,8}") {
            if let Some(context) = Context::parse(&header) {
                let again = Context::parse(&context.header(context.parent)).unwrap();
                prop_assert_eq!((again.trace, again.parent, again.rest), (context.trace, context.parent, context.rest));
            }
            let _ = Context::parse_traceparent(&header);
        }
    }
}
