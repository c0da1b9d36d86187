//! The 44-byte header of a vsock packet (virtio 1.2 §5.10.6), all fields little endian.

/// Bytes of a header.
pub(super) const HEADER: usize = 44;

/// The only socket type that this device has (`VIRTIO_VSOCK_TYPE_STREAM`).
pub(super) const STREAM: u16 = 1;

/// `VIRTIO_VSOCK_OP_*`.
pub(super) mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of `SHUTDOWN`: the sender will receive no more, send no more.
pub(super) const NO_RECEIVE: u32 = 1;
pub(super) const NO_SEND: u32 = 2;

/// A header.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Header {
    pub fn from_bytes(bytes: &[u8; HEADER]) -> Self {
        let mut rest = &bytes[..];
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    pub fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let mut rest = &mut bytes[..];
        put(&mut rest, &self.src_cid.to_le_bytes());
        put(&mut rest, &self.dst_cid.to_le_bytes());
        put(&mut rest, &self.src_port.to_le_bytes());
        put(&mut rest, &self.dst_port.to_le_bytes());
        put(&mut rest, &self.len.to_le_bytes());
        put(&mut rest, &self.kind.to_le_bytes());
        put(&mut rest, &self.op.to_le_bytes());
        put(&mut rest, &self.flags.to_le_bytes());
        put(&mut rest, &self.buf_alloc.to_le_bytes());
        put(&mut rest, &self.fwd_cnt.to_le_bytes());
        bytes
    }
}

/// The fields add up to [`HEADER`] bytes, so nothing is ever missing.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let (field, tail) = rest.split_first_chunk().unwrap_or((&[0; N], &[]));
    *rest = tail;
    *field
}

fn put(rest: &mut &mut [u8], field: &[u8]) {
    let (head, tail) = std::mem::take(rest).split_at_mut(field.len());
    head.copy_from_slice(field);
    *rest = tail;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_is_the_specifications() {
        let mut bytes = [0; HEADER];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = i as u8;
        }
        let header = Header::from_bytes(&bytes);
        assert_eq!(header.src_cid, 0x0706_0504_0302_0100);
        assert_eq!(header.len, 0x1b1a_1918);
        assert_eq!(header.op, 0x1f1e);
        assert_eq!(header.fwd_cnt, 0x2b2a_2928);
        assert_eq!(header.to_bytes(), bytes);
    }
}
