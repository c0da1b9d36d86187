//! The protocol between `cargo xtask` and the agent in the dev host VM.
//!
//! A message is a little-endian `u32` length and that many bytes of postcard. Over TCP, one
//! connection is one [`Request`]: the agent answers with [`Event`]s, and for [`Request::Exec`] the
//! client may send [`Input`]s meanwhile. Closing the connection kills the command and everything in
//! its process group. A host VM without a network finds a [`Job`] in the initramfs at [`JOB_PATH`],
//! and its events come out of a port.
//!
//! Both ends belong to one developer and run one build: the protocol has no versions, and only
//! guards against a broken length.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// TCP port of the agent inside the host VM.
pub const AGENT_PORT: u16 = 1;

/// Where a daemon listens on the machine's loopback address, and where another may, beside it. QEMU forwards
/// connections to the machine's own address, where the agent accepts them for it.
pub const DAEMON_PORTS: [u16; 2] = [9000, 9001];

/// What the agent prints on the console once it accepts connections.
pub const READY_MARK: &str = "firn-host-vm: ready";

/// What the agent prints on the console, followed by a reason, when it can't go on.
pub const FAILED_MARK: &str = "firn-host-vm: failed: ";

/// Where a [`Job`] lies in the initramfs when the host VM runs it and ends.
pub const JOB_PATH: &str = "/etc/host-vm/job";

/// If this file is there, cgroup v2 is mounted without `favordynmods`, as most distributions do.
pub const PLAIN_CGROUPS_PATH: &str = "/etc/host-vm/plain-cgroups";

/// Kernel modules to load, one path a line, in order.
pub const MODULES_PATH: &str = "/etc/host-vm/modules";

/// Files that came as a list of their extents, one path a line ([`expand`] says in which form).
pub const SPARSE_PATH: &str = "/etc/host-vm/sparse";

/// Suffix of the files that [`SPARSE_PATH`] lists.
pub const EXTENTS_SUFFIX: &str = ".extents";

/// Longest message.
pub const MAX_MESSAGE: usize = 1 << 20;

/// Bytes of file or stream content in one message.
pub const CHUNK: usize = 256 << 10;

/// A command to run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// Program and arguments; a program without a slash is looked up in the agent's `PATH`.
    pub argv: Vec<String>,
    /// Variables added to the agent's environment.
    pub env: Vec<(String, String)>,
    /// Working directory; the root when empty.
    pub cwd: String,
    /// Give the command a terminal of this many rows and columns.
    pub terminal: Option<(u16, u16)>,
}

/// What a host VM without a network runs before it ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Job {
    /// One command that is measured: nothing of the agent runs meanwhile. Its output leaves through
    /// the second serial port when it has ended, then comes [`Event::Exited`].
    Measure(Exec),
    /// Commands one after the other. Events leave through the first parallel port as they happen:
    /// [`Event::Ready`], then for each command [`Event::Output`]s and [`Event::Exited`], or
    /// [`Event::Failed`] for one that could not be started.
    Sequence(Vec<Exec>),
}

/// The first message of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Run a command. Answer: [`Event::Output`]s, then [`Event::Exited`].
    Exec(Exec),
    /// Write a file; `size` bytes follow the message. Answer: [`Event::Done`].
    Put {
        /// Where to; missing directories are made.
        path: String,
        /// Permission bits.
        mode: u32,
        /// Length in bytes.
        size: u64,
    },
    /// Read a file. Answer: [`Event::File`], then as many bytes as it says.
    Get {
        /// The file.
        path: String,
    },
    /// End the host VM. No answer.
    PowerOff,
}

/// What the client sends while a command runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Input {
    /// Bytes for standard input.
    Data(#[serde(with = "serde_bytes")] Vec<u8>),
    /// Standard input ends here.
    End,
    /// The client's terminal has a new size: rows, columns.
    Resize(u16, u16),
}

/// Which stream bytes came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stream {
    /// Standard output, and all output of a command with a terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

/// What the agent answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// The machine is set up, and the first command of a [`Job::Sequence`] starts.
    Ready,
    /// The command printed something.
    Output(Stream, #[serde(with = "serde_bytes")] Vec<u8>),
    /// The command ended: its exit code, or 128 + the number of the signal that killed it.
    Exited(i32),
    /// The file has this many bytes, which follow.
    File(u64),
    /// The request is done.
    Done,
    /// The request failed.
    Failed(String),
}

/// Sends one message.
pub fn send<T: Serialize>(to: &mut impl Write, message: &T) -> io::Result<()> {
    let mut bytes = vec![0; 4];
    bytes = postcard::to_extend(message, bytes).map_err(io::Error::other)?;
    let size = bytes.len() - 4;
    if size > MAX_MESSAGE {
        return Err(io::Error::other(format!("message of {size} bytes is over {MAX_MESSAGE}")));
    }
    bytes[..4].copy_from_slice(&(size as u32).to_le_bytes());
    to.write_all(&bytes)?;
    to.flush()
}

/// Receives one message; `None` where the stream ends between two messages.
pub fn receive<T: DeserializeOwned>(from: &mut impl Read) -> io::Result<Option<T>> {
    let mut size = [0; 4];
    loop {
        match from.read(&mut size[..1]) {
            Ok(0) => return Ok(None),
            Ok(_) => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    from.read_exact(&mut size[1..])?;
    let size = u32::from_le_bytes(size) as usize;
    if size > MAX_MESSAGE {
        return Err(io::Error::other(format!("message of {size} bytes is over {MAX_MESSAGE}")));
    }
    let mut bytes = vec![0; size];
    from.read_exact(&mut bytes)?;
    postcard::from_bytes(&bytes).map(Some).map_err(io::Error::other)
}

/// Takes the first message off bytes that arrive piece by piece; `None` while it is not all there.
pub fn take<T: DeserializeOwned>(bytes: &mut Vec<u8>) -> io::Result<Option<T>> {
    let Some(size) = bytes.first_chunk() else { return Ok(None) };
    let size = u32::from_le_bytes(*size) as usize;
    if size <= MAX_MESSAGE && bytes.len() < 4 + size {
        return Ok(None);
    }
    let mut rest = bytes.as_slice();
    let message = receive(&mut rest)?;
    let taken = bytes.len() - rest.len();
    bytes.drain(..taken);
    Ok(message)
}

/// Writes a sparse file as its length, then for each extent with content its offset, its length
/// and its bytes (all numbers `u64`, little-endian). A cpio archive knows no holes, and the
/// backing of `/tmp` is 512 MiB of them.
pub fn pack(
    from: &mut std::fs::File,
    extents: &[(u64, u64)],
    to: &mut impl Write,
) -> io::Result<()> {
    use std::io::{Seek, SeekFrom};
    to.write_all(&from.metadata()?.len().to_le_bytes())?;
    for &(offset, length) in extents {
        to.write_all(&offset.to_le_bytes())?;
        to.write_all(&length.to_le_bytes())?;
        from.seek(SeekFrom::Start(offset))?;
        let copied = io::copy(&mut from.take(length), to)?;
        if copied != length {
            return Err(io::Error::other("a sparse file changed while it was packed"));
        }
    }
    Ok(())
}

/// Turns what [`pack`] wrote into the sparse file again.
pub fn expand(from: &mut impl Read, to: &mut std::fs::File) -> io::Result<()> {
    use std::io::{Seek, SeekFrom};
    let mut number = [0; 8];
    from.read_exact(&mut number)?;
    to.set_len(u64::from_le_bytes(number))?;
    loop {
        match from.read_exact(&mut number) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        }
        to.seek(SeekFrom::Start(u64::from_le_bytes(number)))?;
        from.read_exact(&mut number)?;
        let length = u64::from_le_bytes(number);
        if io::copy(&mut from.take(length), to)? != length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_wire() {
        let mut wire = Vec::new();
        let exec = Exec {
            argv: vec!["sh".into(), "-c".into(), "exit 3".into()],
            env: vec![("A".into(), "b=c".into())],
            cwd: "/tmp".into(),
            terminal: Some((24, 80)),
        };
        send(&mut wire, &Request::Exec(exec.clone())).unwrap();
        send(&mut wire, &Event::Output(Stream::Stderr, vec![0, 255])).unwrap();
        let mut wire = wire.as_slice();
        assert_eq!(receive(&mut wire).unwrap(), Some(Request::Exec(exec)));
        assert_eq!(receive(&mut wire).unwrap(), Some(Event::Output(Stream::Stderr, vec![0, 255])));
        assert_eq!(receive::<Event>(&mut wire).unwrap(), None);
    }

    #[test]
    fn messages_are_taken_when_they_are_whole() {
        let mut wire = Vec::new();
        send(&mut wire, &Event::Exited(7)).unwrap();
        send(&mut wire, &Event::Done).unwrap();
        let mut arrived = Vec::new();
        let mut taken = Vec::new();
        for byte in wire {
            arrived.push(byte);
            taken.extend(take::<Event>(&mut arrived).unwrap());
        }
        assert_eq!(taken, [Event::Exited(7), Event::Done]);
        assert!(arrived.is_empty());
        assert!(take::<Event>(&mut vec![255; 4]).is_err());
        assert!(take::<Event>(&mut vec![1, 0, 0, 0, 255]).is_err());
    }

    #[test]
    fn broken_lengths_are_errors() {
        assert!(receive::<Event>(&mut [255, 255, 255, 255].as_slice()).is_err());
        assert!(receive::<Event>(&mut [5, 0, 0, 0, 1].as_slice()).is_err());
        assert!(receive::<Event>(&mut [5, 0].as_slice()).is_err());
    }

    #[test]
    fn sparse_files_keep_their_holes_and_bytes() {
        use std::os::unix::fs::FileExt;
        let directory = std::env::temp_dir().join(format!("firn-agent-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let open = |name| {
            let mut options = std::fs::OpenOptions::new();
            options.read(true).write(true).create(true).truncate(true);
            options.open(directory.join(name)).unwrap()
        };
        let mut original = open("original");
        original.set_len(1 << 20).unwrap();
        original.write_all_at(b"start", 0).unwrap();
        original.write_all_at(b"middle", 700_000).unwrap();
        let mut packed = Vec::new();
        pack(&mut original, &[(0, 5), (700_000, 6)], &mut packed).unwrap();
        assert!(packed.len() < 100);
        let mut copy = open("copy");
        expand(&mut packed.as_slice(), &mut copy).unwrap();
        let read = |name| std::fs::read(directory.join(name)).unwrap();
        assert!(read("original") == read("copy"));
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
