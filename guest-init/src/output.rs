//! What the runtime prints, cut into lines.
//!
//! A pipe is read only while the host takes what was read before: a function that prints without
//! end blocks on its pipe and costs no memory here.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use firn_proto::guest::{Log, MAX_LOG, Stream};

/// Cuts bytes into lines of at most [`MAX_LOG`] bytes a piece.
#[derive(Debug, Default)]
pub struct Lines {
    line: Vec<u8>,
    /// A piece of the current line has been given away.
    continued: bool,
}

impl Lines {
    /// Takes `bytes` and calls `emit` with each piece and whether its line goes on.
    pub fn push(&mut self, mut bytes: &[u8], mut emit: impl FnMut(Vec<u8>, bool)) {
        while !bytes.is_empty() {
            let room = MAX_LOG - self.line.len();
            let window = &bytes[..bytes.len().min(room)];
            if let Some(end) = window.iter().position(|&byte| byte == b'\n') {
                self.line.extend_from_slice(&window[..end]);
                bytes = &bytes[end + 1..];
                self.continued = false;
                emit(std::mem::take(&mut self.line), false);
            } else {
                self.line.extend_from_slice(window);
                bytes = &bytes[window.len()..];
                if self.line.len() == MAX_LOG {
                    self.continued = true;
                    emit(std::mem::take(&mut self.line), true);
                }
            }
        }
    }

    /// Ends a line that has no end, so that its text belongs to the invocation that printed it.
    pub fn end(&mut self, mut emit: impl FnMut(Vec<u8>, bool)) {
        if self.continued || !self.line.is_empty() {
            self.continued = false;
            emit(std::mem::take(&mut self.line), false);
        }
    }
}

/// One of the runtime's output pipes.
#[derive(Debug)]
pub struct Output {
    stream: Stream,
    /// `None` after its end.
    pipe: Option<File>,
    lines: Lines,
}

impl Output {
    /// `pipe` must be non-blocking.
    pub fn new(stream: Stream, pipe: OwnedFd) -> Self {
        Self { stream, pipe: Some(pipe.into()), lines: Lines::default() }
    }

    /// What to poll, unless the pipe has ended.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.pipe.as_ref().map(AsFd::as_fd)
    }

    /// Reads once. False when there is nothing to read now, or ever.
    pub fn read(&mut self, scratch: &mut [u8], mut log: impl FnMut(Log)) -> bool {
        let stream = self.stream;
        let Some(pipe) = &mut self.pipe else { return false };
        match pipe.read(scratch) {
            Ok(count) if count > 0 => {
                let emit = |line, partial| log(Log { stream, line, partial });
                self.lines.push(&scratch[..count], emit);
                true
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => true,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
            // Its end, or an error that no pipe has: either way there is no more.
            Ok(_) | Err(_) => {
                self.pipe = None;
                false
            }
        }
    }

    /// Reads what is there, but no more than a pipe holds (its writers may be faster than we),
    /// and ends the last line.
    pub fn drain(&mut self, scratch: &mut [u8], mut log: impl FnMut(Log)) {
        const PIPE: usize = 64 * 1024;
        for _ in 0..PIPE.div_ceil(scratch.len().max(1)) + 1 {
            if !self.read(scratch, &mut log) {
                break;
            }
        }
        let stream = self.stream;
        self.lines.end(|line, partial| log(Log { stream, line, partial }));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cut(text: &[u8], piece: usize) -> Vec<(Vec<u8>, bool)> {
        let mut lines = Lines::default();
        let mut pieces = Vec::new();
        for bytes in text.chunks(piece) {
            lines.push(bytes, |line, partial| pieces.push((line, partial)));
        }
        lines.end(|line, partial| pieces.push((line, partial)));
        pieces
    }

    #[test]
    fn lines_and_an_unended_one() {
        let pieces = cut(b"a\n\nb", 2);
        assert_eq!(pieces, [(b"a".into(), false), (b"".into(), false), (b"b".into(), false)]);
    }

    #[test]
    fn a_long_line_comes_in_pieces_that_end() {
        let mut text = vec![b'x'; 2 * MAX_LOG];
        let pieces = cut(&text, 5000);
        assert_eq!(
            pieces.iter().map(|(l, p)| (l.len(), *p)).collect::<Vec<_>>(),
            [(MAX_LOG, true), (MAX_LOG, true), (0, false)]
        );
        text.push(b'\n');
        assert_eq!(cut(&text, 5000), pieces);
    }

    proptest! {
        #[test]
        fn pieces_join_to_the_text(
            text in proptest::collection::vec(prop_oneof![4 => Just(b'x'), 1 => Just(b'\n')], 0..300),
            repeat in 1..200_usize,
            piece in 1..70_000_usize,
        ) {
            let text = text.repeat(repeat);
            let mut joined = Vec::new();
            for (line, partial) in cut(&text, piece) {
                prop_assert!(line.len() <= MAX_LOG);
                joined.extend_from_slice(&line);
                if !partial {
                    joined.push(b'\n');
                }
            }
            let mut expected = text;
            if expected.last().is_some_and(|&last| last != b'\n') {
                expected.push(b'\n');
            }
            prop_assert_eq!(joined, expected);
        }
    }
}
