//! One descriptor chain as an I/O vector over guest memory.
//!
//! This is the only place where devices meet raw guest addresses. The guest may change the bytes
//! behind them at any time, so nothing here ever makes a reference to them: they are copied, or
//! handed to the kernel.

use std::{
    fs::File,
    io,
    marker::PhantomData,
    os::fd::{AsRawFd, BorrowedFd},
    sync::Arc,
};

use libc::iovec;
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

use crate::memory::GuestMemory;

/// Most descriptors of one chain: the size of the largest queue.
pub const MAX_SEGMENTS: usize = 128;

/// A chain: first what the device may read, then what it may write.
///
/// It is a place to pop chains into, made once and used again, so that no request allocates.
pub struct Chain {
    /// Keeps alive what `segments` points to.
    memory: Arc<GuestMemory>,
    head: u16,
    segments: Vec<iovec>,
    /// How many of `segments` are readable; the others are writable.
    readable: usize,
}

// SAFETY: the pointers in `segments` are addresses of guest memory, which is shared between
// threads by nature and is kept alive by `memory`; they are used only through `&mut self`.
unsafe impl Send for Chain {}

impl Chain {
    /// An empty chain over `memory`.
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        Self { memory, head: 0, segments: Vec::with_capacity(4), readable: 0 }
    }

    /// Index of the first descriptor: what goes into the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the device may read and has not read yet.
    pub fn readable(&mut self) -> Buffers<'_> {
        self.split().0
    }

    /// What the device may write and has not written yet.
    pub fn writable(&mut self) -> Buffers<'_> {
        self.split().1
    }

    /// Both parts.
    pub fn split(&mut self) -> (Buffers<'_>, Buffers<'_>) {
        let (readable, writable) = self.segments.split_at_mut(self.readable);
        (Buffers::new(readable), Buffers::new(writable))
    }

    /// Empties it for the chain that starts at `head`.
    pub(crate) fn begin(&mut self, head: u16) {
        self.head = head;
        self.segments.clear();
        self.readable = 0;
    }

    /// Whether a writable buffer was added.
    pub(super) fn has_writable(&self) -> bool {
        self.segments.len() > self.readable
    }

    /// Adds a buffer; `None` if it is not wholly in memory. Readable ones must come first.
    pub(crate) fn push(&mut self, address: GuestAddress, len: u32, writable: bool) -> Option<()> {
        if len == 0 {
            return Some(());
        }
        let slice = self.memory.get_slice(address, len as usize).ok()?;
        let base = slice.ptr_guard_mut().as_ptr().cast();
        self.segments.push(iovec { iov_base: base, iov_len: len as usize });
        if !writable {
            self.readable += 1;
        }
        Some(())
    }
}

/// Buffers of a chain that are still to be read or written. What was passed over or cut off is
/// gone from the chain too.
pub struct Buffers<'a> {
    /// The first one, if there is one, is not empty.
    segments: &'a mut [iovec],
    memory: PhantomData<&'a GuestMemory>,
}

impl<'a> Buffers<'a> {
    fn new(segments: &'a mut [iovec]) -> Self {
        let mut buffers = Self { segments, memory: PhantomData };
        buffers.advance(0);
        buffers
    }

    /// Bytes that are left.
    pub fn len(&self) -> usize {
        self.segments.iter().map(|s| s.iov_len).sum()
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// Passes over `count` bytes, or over all that are left.
    pub fn advance(&mut self, mut count: usize) {
        while let Some(first) = self.segments.first_mut() {
            let passed = count.min(first.iov_len);
            first.iov_base = first.iov_base.cast::<u8>().wrapping_add(passed).cast();
            first.iov_len -= passed;
            count -= passed;
            if first.iov_len > 0 {
                return;
            }
            self.segments = &mut std::mem::take(&mut self.segments)[1..];
        }
    }

    /// Cuts off all but the first `count` bytes.
    pub fn truncate(&mut self, count: usize) {
        let mut left = count;
        for segment in self.segments.iter_mut() {
            segment.iov_len = segment.iov_len.min(left);
            left -= segment.iov_len;
        }
        self.advance(0);
    }

    /// Takes the last byte off.
    pub fn take_last(&mut self) -> Option<LastByte<'a>> {
        let last = self.segments.iter_mut().rfind(|segment| segment.iov_len > 0)?;
        last.iov_len -= 1;
        let address = last.iov_base.cast::<u8>().wrapping_add(last.iov_len);
        self.advance(0);
        Some(LastByte { address, memory: PhantomData })
    }

    /// Copies guest memory to `target`; the number of bytes that there were.
    pub fn copy_to(&mut self, target: &mut [u8]) -> usize {
        let mut done = 0;
        while done < target.len()
            && let Some(slice) = self.first()
        {
            let n = slice.copy_to(&mut target[done..]);
            self.advance(n);
            done += n;
        }
        done
    }

    /// Copies `source` to guest memory; the number of bytes that there was room for.
    pub fn copy_from(&mut self, source: &[u8]) -> usize {
        let mut done = 0;
        while done < source.len()
            && let Some(slice) = self.first()
        {
            let n = slice.len().min(source.len() - done);
            slice.copy_from(&source[done..done + n]);
            self.advance(n);
            done += n;
        }
        done
    }

    /// Fills the next `len` bytes from `file` at `offset`.
    ///
    /// # Errors
    /// Any error of the read; [`io::ErrorKind::UnexpectedEof`] if the file or the buffers end.
    pub fn read_exact_at(&mut self, file: &File, len: usize, offset: u64) -> io::Result<()> {
        self.transfer(len, offset, |window, at| {
            // SAFETY: the vector's buffers are guest memory that outlives the call (see `Chain`);
            // the kernel may write it, as may the guest itself.
            unsafe { libc::preadv(file.as_raw_fd(), window.as_ptr(), window.len() as i32, at) }
        })
    }

    /// Writes the next `len` bytes to `file` at `offset`.
    ///
    /// # Errors
    /// Any error of the write; [`io::ErrorKind::UnexpectedEof`] if the buffers end.
    pub fn write_all_at(&mut self, file: &File, len: usize, offset: u64) -> io::Result<()> {
        self.transfer(len, offset, |window, at| {
            // SAFETY: the vector's buffers are guest memory that outlives the call.
            unsafe { libc::pwritev(file.as_raw_fd(), window.as_ptr(), window.len() as i32, at) }
        })
    }

    /// Sends what the socket takes without waiting, and advances over it.
    ///
    /// # Errors
    /// Any error of `sendmsg`; [`io::ErrorKind::WouldBlock`] if the socket is full.
    pub fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let sent = send_segments(socket, self.segments)?;
        self.advance(sent);
        Ok(sent)
    }

    fn first(&self) -> Option<VolatileSlice<'_>> {
        let first = self.segments.first()?;
        // SAFETY: address and length come from a slice of guest memory and were only narrowed
        // since; guest memory outlives `self`; all other access to it is volatile too.
        Some(unsafe { VolatileSlice::new(first.iov_base.cast(), first.iov_len) })
    }

    /// Repeats `operation` until `len` bytes are through.
    fn transfer(
        &mut self,
        mut len: usize,
        mut offset: u64,
        operation: impl Fn(&[iovec], i64) -> isize,
    ) -> io::Result<()> {
        while len > 0 {
            let at = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
            let moved = retry(|| self.with_window(len, |window| operation(window, at)))?;
            if moved == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.advance(moved);
            len -= moved;
            offset += moved as u64;
        }
        Ok(())
    }

    /// Calls `f` with exactly the first `len` bytes (or all, if there are fewer).
    fn with_window<R>(&mut self, len: usize, f: impl FnOnce(&[iovec]) -> R) -> R {
        let mut left = len;
        for index in 0..self.segments.len() {
            let whole = self.segments[index].iov_len;
            if whole >= left {
                self.segments[index].iov_len = left;
                let result = f(&self.segments[..=index]);
                self.segments[index].iov_len = whole;
                return result;
            }
            left -= whole;
        }
        f(self.segments)
    }
}

/// The last byte of a chain.
pub struct LastByte<'a> {
    address: *mut u8,
    memory: PhantomData<&'a GuestMemory>,
}

impl LastByte<'_> {
    /// Writes it.
    pub fn store(self, value: u8) {
        // SAFETY: the address is the last byte of a non-empty slice of guest memory that outlives
        // `self`; one volatile byte can't tear.
        unsafe { self.address.write_volatile(value) };
    }
}

/// Buffers of several chains, to be filled from a socket by one system call. It grows once and is
/// used again.
#[derive(Default)]
pub struct Gather {
    segments: Vec<iovec>,
}

// SAFETY: the vector is empty outside `receive`, so no pointer crosses threads in it.
unsafe impl Send for Gather {}

impl Gather {
    /// Receives up to `limit` bytes into the writable parts of `chains`, each past its first
    /// `skip` bytes; never waits. 0 is the end of the stream.
    ///
    /// # Errors
    /// Any error of `recvmsg`; [`io::ErrorKind::WouldBlock`] if the socket has nothing.
    pub fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        chains: &mut [Chain],
        skip: usize,
        limit: usize,
    ) -> io::Result<usize> {
        self.segments.clear();
        let mut left = limit;
        'chains: for chain in chains {
            let mut pass = skip;
            for segment in &chain.segments[chain.readable..] {
                let passed = pass.min(segment.iov_len);
                pass -= passed;
                let len = (segment.iov_len - passed).min(left);
                left -= len;
                if len > 0 {
                    self.segments.push(iovec {
                        iov_base: segment.iov_base.cast::<u8>().wrapping_add(passed).cast(),
                        iov_len: len,
                    });
                }
                // One call takes no longer vector (UIO_MAXIOV).
                if left == 0 || self.segments.len() == 1024 {
                    break 'chains;
                }
            }
        }
        let mut header = message_header(&mut self.segments);
        let received = retry(|| {
            // SAFETY: `header` points to `segments`, whose buffers are guest memory that the
            // chains, borrowed for the whole call, keep alive.
            unsafe { libc::recvmsg(socket.as_raw_fd(), &mut header, libc::MSG_DONTWAIT) }
        });
        self.segments.clear();
        received
    }
}

/// Sends host memory without waiting.
///
/// # Errors
/// As [`Buffers::send`].
pub fn send_slices(socket: BorrowedFd<'_>, parts: (&[u8], &[u8])) -> io::Result<usize> {
    let part =
        |bytes: &[u8]| iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    send_segments(socket, &mut [part(parts.0), part(parts.1)])
}

/// `sendmsg` of buffers that the caller keeps alive. Never SIGPIPE, never waits.
fn send_segments(socket: BorrowedFd<'_>, segments: &mut [iovec]) -> io::Result<usize> {
    let header = message_header(segments);
    retry(|| {
        // SAFETY: `header` points to `segments`, whose buffers live as long as the borrow of the
        // caller that made them; `sendmsg` only reads them.
        unsafe {
            libc::sendmsg(socket.as_raw_fd(), &header, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
        }
    })
}

fn message_header(segments: &mut [iovec]) -> libc::msghdr {
    // SAFETY: `msghdr` is plain data for which all zeroes (no name, no control data) is valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = segments.as_mut_ptr();
    header.msg_iovlen = segments.len();
    header
}

/// Calls again after EINTR.
fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(count) = usize::try_from(call()) {
            return Ok(count);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::fd::AsFd, os::unix::net::UnixStream};

    use vm_memory::Bytes;

    use super::*;
    use crate::virtio::mock;

    /// Three readable segments of 3 bytes ("abc", "def", "ghi") and two writable of 4.
    fn chain() -> (Arc<GuestMemory>, Chain) {
        let memory = mock::memory();
        memory.write_slice(b"abcdefghi", GuestAddress(0x100)).unwrap();
        let mut chain = Chain::new(memory.clone());
        chain.begin(5);
        for i in 0..3 {
            chain.push(GuestAddress(0x100 + 3 * i), 3, false).unwrap();
        }
        chain.push(GuestAddress(0x200), 4, true).unwrap();
        chain.push(GuestAddress(0x300), 4, true).unwrap();
        (memory, chain)
    }

    #[test]
    fn copies_cross_segments_and_advance() {
        let (memory, mut chain) = chain();
        let mut readable = chain.readable();
        let mut bytes = [0; 4];
        assert_eq!(readable.copy_to(&mut bytes), 4);
        assert_eq!(&bytes, b"abcd");
        readable.advance(1);
        assert_eq!(readable.len(), 4);
        let mut readable = chain.readable();
        assert_eq!(readable.copy_to(&mut bytes[..]), 4);
        assert_eq!(&bytes, b"fghi");
        assert!(readable.is_empty());
        assert_eq!(chain.writable().copy_from(b"0123456789"), 8);
        assert_eq!(memory.read_obj::<[u8; 4]>(GuestAddress(0x300)).unwrap(), *b"4567");
    }

    #[test]
    fn truncate_and_last_byte() {
        let (memory, mut chain) = chain();
        let mut writable = chain.writable();
        writable.take_last().unwrap().store(9);
        assert_eq!(writable.len(), 7);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x303)).unwrap(), 9);
        writable.truncate(5);
        assert_eq!(writable.len(), 5);
        writable.take_last().unwrap();
        assert_eq!(writable.len(), 4);
        assert_eq!(chain.writable().len(), 4);
        chain.writable().truncate(0);
        assert!(chain.writable().is_empty());
        assert!(chain.writable().take_last().is_none());
    }

    #[test]
    fn a_window_ends_inside_a_segment() {
        let (memory, mut chain) = chain();
        let file = mock::file(b"0123456789");
        let mut writable = chain.writable();
        writable.read_exact_at(&file, 5, 2).unwrap();
        assert_eq!(writable.len(), 3);
        writable.read_exact_at(&file, 3, 0).unwrap();
        assert_eq!(memory.read_obj::<[u8; 4]>(GuestAddress(0x200)).unwrap(), *b"2345");
        assert_eq!(memory.read_obj::<[u8; 4]>(GuestAddress(0x300)).unwrap(), *b"6012");
    }

    #[test]
    fn ends_of_file_and_of_buffers_are_errors() {
        let (_memory, mut chain) = chain();
        let file = mock::file(b"012");
        let end = io::ErrorKind::UnexpectedEof;
        assert_eq!(chain.writable().read_exact_at(&file, 4, 0).unwrap_err().kind(), end);
        assert_eq!(chain.readable().write_all_at(&file, 10, 0).unwrap_err().kind(), end);
    }

    #[test]
    fn gather_skips_headers_and_keeps_to_its_limit() {
        let (memory, mut first) = chain();
        first.begin(0);
        first.push(GuestAddress(0x400), 2, true).unwrap();
        first.push(GuestAddress(0x500), 3, true).unwrap();
        let mut second = Chain::new(memory.clone());
        second.begin(1);
        second.push(GuestAddress(0x600), 9, true).unwrap();
        let (near, mut far) = UnixStream::pair().unwrap();
        far.write_all(b"abcdefgh").unwrap();
        let mut chains = [first, second];
        let received = Gather::default().receive(near.as_fd(), &mut chains, 3, 5).unwrap();
        assert_eq!(received, 5);
        assert_eq!(memory.read_obj::<[u8; 3]>(GuestAddress(0x500)).unwrap(), *b"\0ab");
        assert_eq!(memory.read_obj::<[u8; 6]>(GuestAddress(0x603)).unwrap(), *b"cde\0\0\0");
    }

    #[test]
    fn buffers_outside_memory_are_refused() {
        let (_memory, mut chain) = chain();
        assert!(chain.push(GuestAddress(mock::MEMORY as u64 - 1), 2, true).is_none());
        assert!(chain.push(GuestAddress(u64::MAX), u32::MAX, true).is_none());
    }
}
