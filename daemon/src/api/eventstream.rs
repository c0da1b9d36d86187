//! `application/vnd.amazon.eventstream`: the messages that a streamed response is made of.
//!
//! ```text
//!  length of all │ length of headers │ CRC of both │ headers │ payload │ CRC of all before it
//!       u32              u32              u32                                u32
//! ```
//!
//! Numbers are big-endian, CRCs are CRC-32 (IEEE 802.3). A header is the length of its name (u8), its
//! name, its type (7: text), the length of its value (u16) and its value.

use bytes::Bytes;

/// `Content-Type` of a response of such messages.
pub const CONTENT_TYPE: &str = "application/vnd.amazon.eventstream";

/// Type of a header whose value is text.
const TEXT: u8 = 7;

/// One event of the type `event_type`, whose payload is of the type `content_type`. Both are short.
pub fn event(event_type: &str, content_type: &str, payload: &[u8]) -> Bytes {
    let fields =
        [(":event-type", event_type), (":content-type", content_type), (":message-type", "event")];
    let head: usize = fields.iter().map(|(name, value)| name.len() + value.len() + 4).sum();
    let all = head + payload.len() + 16;
    let mut message = Vec::with_capacity(all);
    message.extend_from_slice(&(all as u32).to_be_bytes());
    message.extend_from_slice(&(head as u32).to_be_bytes());
    message.extend_from_slice(&crc32fast::hash(&message).to_be_bytes());
    for (name, value) in fields {
        message.push(name.len() as u8);
        message.extend_from_slice(name.as_bytes());
        message.push(TEXT);
        message.extend_from_slice(&(value.len() as u16).to_be_bytes());
        message.extend_from_slice(value.as_bytes());
    }
    message.extend_from_slice(payload);
    message.extend_from_slice(&crc32fast::hash(&message).to_be_bytes());
    message.into()
}

/// What a reader makes of messages: event types, content types, payloads.
#[cfg(test)]
pub fn read(mut bytes: &[u8]) -> Vec<(String, String, Vec<u8>)> {
    let mut events = Vec::new();
    while !bytes.is_empty() {
        let number = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
        let (all, head) = (number(0) as usize, number(4) as usize);
        assert_eq!(number(8), crc32fast::hash(&bytes[..8]));
        assert_eq!(number(all - 4), crc32fast::hash(&bytes[..all - 4]));
        let (mut fields, mut values) = (&bytes[12..12 + head], Vec::new());
        while let [length, rest @ ..] = fields {
            let (name, rest) = rest.split_at((*length).into());
            assert_eq!(rest[0], TEXT);
            let (value, rest) = rest[3..].split_at(u16::from_be_bytes([rest[1], rest[2]]).into());
            values.push((name, String::from_utf8(value.to_vec()).unwrap()));
            fields = rest;
        }
        let value = |name: &str| {
            values.iter().find(|(n, _)| *n == name.as_bytes()).map(|(_, v)| v.clone()).unwrap()
        };
        assert_eq!(value(":message-type"), "event");
        let payload = bytes[12 + head..all - 4].to_vec();
        events.push((value(":event-type"), value(":content-type"), payload));
        bytes = &bytes[all..];
    }
    events
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_as_botocore_reads_it() {
        // Read by botocore's EventStreamBuffer, which checks both CRCs.
        let message = event("PayloadChunk", "application/octet-stream", b"hi");
        let hex: String = message.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            hex,
            "0000006c0000005ab25efdcf0b3a6576656e742d7479706507000c5061796c6f61644368756e6b0d\
             3a636f6e74656e742d747970650700186170706c69636174696f6e2f6f637465742d73747265616d\
             0d3a6d6573736167652d747970650700056576656e7468691162e469"
        );
        let read = read(&[&message[..], &event("A", "b/c", b"")[..]].concat());
        let first = ("PayloadChunk".into(), "application/octet-stream".into(), b"hi".to_vec());
        assert_eq!(read, [first, ("A".into(), "b/c".into(), Vec::new())]);
    }
}
