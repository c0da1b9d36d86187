//! A VMM without KVM that plays its guest itself. What it does is told by the function's
//! environment and by its events:
//!
//! | event | it |
//! |---|---|
//! | `log N` | prints N lines, then answers |
//! | `page` | answers with the first bytes of the page that `load` wrote, as they are in memory now |
//! | `write TEXT` | writes that page, then answers |
//! | `keep identity` | answers, and never takes another identity, not even after a reset |
//! | `sleep` | answers, and never renews itself again, not even after a reset |
//! | `die` | ends with `GuestPanic` |
//! | `die later` | answers, and then does |
//! | `hang` | never answers |
//! | `wrong id`, `garbage` | breaks the protocol |
//! | anything else | answers with it |

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{FromRawFd, OwnedFd},
        unix::{fs::FileExt, net::UnixStream},
    },
    sync::{Arc, Mutex},
};

use firn::{
    control::{
        self, CONTROL_FD, Exit, ExitReason, Failure, FailureKind, FromVmm, Phase, SaveReport,
        ShellConfig, Stamps, ToVmm,
    },
    guest::{self, Done, FromGuest, Log, Outcome, Ready, Renewed, ToGuest},
};
use firn_pages::bitmap::Bitmap;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags};

const PAGE: usize = 4096;

/// Memory of the guest: the pages that are not zeros. Its first is what `page` answers with.
#[derive(Clone, Default)]
struct Memory {
    pages: BTreeMap<u64, Vec<u8>>,
    keeps_identity: bool,
    /// Says so when it is to renew itself, and no more.
    sleeps: bool,
}

struct Vmm {
    control: Arc<OwnedFd>,
    config: Option<ShellConfig>,
    memory: Arc<Mutex<Memory>>,
    /// Memory as it was thawed.
    origin: Option<Memory>,
}

/// Serves until the host closes the control socket.
pub fn run() -> ! {
    // SAFETY: the jailer has checked that this descriptor is the control socket, and nothing else
    // in this process uses it.
    let control = Arc::new(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) });
    eprintln!("the stand-in lives");
    let mut vmm =
        Vmm { control: control.clone(), config: None, memory: Arc::default(), origin: None };
    while let Some((message, descriptors)) = receive(&control) {
        let answer = vmm.handle(message, descriptors).unwrap_or_else(|error| {
            FromVmm::Failed(Failure { kind: FailureKind::Io, message: error.to_string() })
        });
        send(&control, &answer);
    }
    std::process::exit(0);
}

fn receive(control: &OwnedFd) -> Option<(ToVmm, Vec<OwnedFd>)> {
    let mut bytes = vec![0; control::MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let received =
        rustix::net::recvmsg(control, &mut slices, &mut ancillary, RecvFlags::empty()).ok()?;
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            descriptors.extend(fds);
        }
    }
    (received.bytes > 0)
        .then(|| (control::decode_to_vmm(&bytes[..received.bytes]).unwrap(), descriptors))
}

fn send(control: &OwnedFd, message: &FromVmm) {
    let bytes = control::encode(message).unwrap();
    let _ = rustix::net::send(control, &bytes, SendFlags::NOSIGNAL);
}

fn stamps() -> Stamps {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let now = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
    Stamps(vec![(Phase::Received, now), (Phase::Mapped, now), (Phase::Entered, now)])
}

impl Vmm {
    fn handle(&mut self, message: ToVmm, fds: Vec<OwnedFd>) -> io::Result<FromVmm> {
        let mut fds = fds.into_iter().map(File::from);
        let mut next = || fds.next().ok_or_else(|| io::Error::other("a descriptor is missing"));
        Ok(match message {
            ToVmm::Build(config) => {
                self.config = Some(config);
                FromVmm::Ready(stamps())
            }
            ToVmm::Boot { .. } => {
                let mut kernel = String::new();
                next()?.read_to_string(&mut kernel)?;
                if !kernel.starts_with("stand-in") {
                    return Ok(FromVmm::Failed(Failure {
                        kind: FailureKind::BadKernel,
                        message: "not a kernel".into(),
                    }));
                }
                let mut initramfs = [0; 6];
                next()?.read_exact(&mut initramfs)?;
                assert_eq!(&initramfs, b"070701");
                self.start(next()?, true);
                FromVmm::Booted(stamps())
            }
            ToVmm::Thaw { .. } => {
                let (memory, state, stream) = (next()?, next()?, next()?);
                self.thaw(&memory, &state)?;
                self.start(stream, false);
                FromVmm::Thawed(stamps())
            }
            ToVmm::Reclaim => FromVmm::Reclaimed(7),
            ToVmm::Save => {
                let (memory, state, _pagemap, delta) = (next()?, next()?, next()?, next()?);
                delta.set_len(1 << 20)?;
                delta.write_all_at(b"written to /tmp", 8192)?;
                FromVmm::Saved(self.save(&memory, &state)?)
            }
            ToVmm::Attach { .. } => {
                let mut first = [0; 1];
                next()?.read_exact_at(&mut first, 0)?;
                FromVmm::Done
            }
            ToVmm::Reset => {
                let (stream, pagemap) = (next()?, next()?);
                // Of this very process, and without physical addresses.
                let witness = 1u8;
                let mut entry = [0; 8];
                let page = (&raw const witness) as u64 / PAGE as u64;
                pagemap.read_exact_at(&mut entry, page * 8)?;
                let entry = u64::from_ne_bytes(entry);
                assert_eq!((entry >> 63, entry & ((1 << 55) - 1)), (1, 0));
                // A guest of its own: what the last one still does, it does to another memory.
                let mut memory = self.origin.clone().unwrap();
                {
                    let before = self.memory.lock().unwrap();
                    memory.keeps_identity |= before.keeps_identity;
                    memory.sleeps |= before.sleeps;
                }
                self.memory = Arc::new(Mutex::new(memory));
                self.start(stream, false);
                FromVmm::Reset(control::ResetReport {
                    stamps: stamps(),
                    pages: 1,
                    duration_ns: 2,
                    interrupts_raised_again: 0,
                })
            }
            ToVmm::Pause => FromVmm::Paused(1),
            ToVmm::Diagnose => FromVmm::Diagnosis("in the stand-in".into()),
            ToVmm::Stats => FromVmm::Stats(control::Stats::default()),
            _ => FromVmm::Done,
        })
    }

    fn bytes(&self) -> u64 {
        u64::from(self.config.as_ref().unwrap().memory_mib) << 20
    }

    fn thaw(&mut self, memory: &File, state: &File) -> io::Result<()> {
        let mut pages = BTreeMap::new();
        let mut offset = 0;
        while let Ok(data) = rustix::fs::seek(memory, rustix::fs::SeekFrom::Data(offset)) {
            let mut page = vec![0; PAGE];
            memory.read_exact_at(&mut page, data)?;
            pages.insert(data / PAGE as u64, page);
            offset = data + PAGE as u64;
        }
        let mut head = [0; 1];
        state.read_exact_at(&mut head, 0)?;
        let memory = Memory { pages, keeps_identity: head[0] == b'k', sleeps: head[0] == b'a' };
        *self.memory.lock().unwrap() = memory.clone();
        self.origin = Some(memory);
        Ok(())
    }

    fn save(&self, memory: &File, state: &File) -> io::Result<SaveReport> {
        let own = self.memory.lock().unwrap();
        memory.set_len(self.bytes())?;
        let mut pages = Bitmap::new(self.bytes() / PAGE as u64);
        for (number, page) in &own.pages {
            let before = self.origin.as_ref().and_then(|origin| origin.pages.get(number));
            if before.map_or(&[0; PAGE][..], Vec::as_slice) != page {
                memory.write_all_at(page, number * PAGE as u64)?;
                pages.insert(*number..number + 1);
            }
        }
        let head: &[u8] = match (own.keeps_identity, own.sleeps) {
            (true, _) => b"keeps",
            (_, true) => b"asleep",
            _ => b"state",
        };
        state.write_all_at(head, 0)?;
        let bitmap = pages.to_bytes();
        state.write_all_at(&bitmap, head.len() as u64)?;
        Ok(SaveReport {
            memory_bytes: self.bytes(),
            pages_written: pages.count(),
            state_bytes: head.len() as u64,
            bitmap_bytes: bitmap.len() as u64,
            duration_ns: 1,
            guest_tsc: 1,
            tsc_khz: 1,
        })
    }

    fn start(&self, stream: File, booted: bool) {
        let stream = UnixStream::from(OwnedFd::from(stream));
        let guest = Guest { control: self.control.clone(), memory: self.memory.clone(), stream };
        std::thread::spawn(move || guest.run(booted));
    }
}

fn log(line: String) -> FromGuest {
    let line = line.into_bytes();
    FromGuest::Log(Log { stream: guest::Stream::Stdout, line, partial: false })
}

struct Guest {
    control: Arc<OwnedFd>,
    memory: Arc<Mutex<Memory>>,
    stream: UnixStream,
}

impl Guest {
    fn say(&mut self, message: &FromGuest) {
        let _ = self.stream.write_all(&guest::encode(message).unwrap());
    }

    fn run(mut self, booted: bool) {
        if booted {
            self.say(&FromGuest::Ready(Ready {
                version: guest::VERSION,
                init_tsc: 1,
                ready_tsc: 2,
            }));
        }
        let mut moment = [0; control::MOMENT];
        if !booted && self.stream.read_exact(&mut moment).is_err() {
            return;
        }
        loop {
            let mut prefix = [0; 4];
            if self.stream.read_exact(&mut prefix).is_err() {
                return;
            }
            let mut message = vec![0; guest::frame_length(prefix).unwrap()];
            self.stream.read_exact(&mut message).unwrap();
            match guest::decode_to_guest(&message).unwrap() {
                ToGuest::Load(load) => {
                    let mut init_us = 7;
                    let mut memory = self.memory.lock().unwrap();
                    for (key, value) in &load.environment {
                        let mut page = value.clone().into_bytes();
                        page.resize(PAGE, 0);
                        match key.as_str() {
                            "KEEPS_IDENTITY" => memory.keeps_identity = true,
                            "SLEEPS" => memory.sleeps = true,
                            "LIES" => init_us = u64::MAX,
                            key => drop(memory.pages.insert(key.parse().unwrap(), page)),
                        }
                    }
                    drop(memory);
                    self.say(&FromGuest::Loaded(guest::Loaded { init_us, error: None }));
                }
                ToGuest::Freeze => self.say(&FromGuest::Frozen),
                ToGuest::Renew(renew) => {
                    assert!(renew.entropy.iter().any(|b| *b != 0));
                    let (keeps, sleeps) = {
                        let memory = self.memory.lock().unwrap();
                        (memory.keeps_identity, memory.sleeps)
                    };
                    if sleeps {
                        self.say(&log("asleep".into()));
                        loop {
                            std::thread::park();
                        }
                    }
                    let instance_id = if keeps { "old".into() } else { renew.instance_id };
                    self.say(&FromGuest::Renewed(Renewed {
                        instance_id,
                        renew_us: 1,
                        hooks_us: 2,
                        error: None,
                    }));
                }
                ToGuest::Invoke(invoke) => self.invoke(invoke),
                _ => return,
            }
        }
    }

    fn invoke(&mut self, invoke: guest::Invoke) {
        let mut payload = invoke.payload;
        match &payload[..] {
            b"die" => self.die(),
            b"hang" => return,
            b"flood" => {
                let line = vec![b'x'; guest::MAX_LOG];
                let log = Log { stream: guest::Stream::Stdout, line, partial: false };
                let frame = guest::encode(&FromGuest::Log(log)).unwrap();
                while self.stream.write_all(&frame).is_ok() {}
                return;
            }
            b"stream" => {
                self.say(&FromGuest::Begin(guest::Begin { content_type: String::new() }));
                let payload = vec![b'x'; guest::MAX_CHUNK];
                let frame = guest::encode(&FromGuest::Chunk(guest::Chunk { payload })).unwrap();
                while self.stream.write_all(&frame).is_ok() {}
                return;
            }
            b"too long" => payload = vec![b'y'; guest::MAX_PAYLOAD + 1],
            b"page" => {
                let memory = self.memory.lock().unwrap();
                let (_, page) = memory.pages.first_key_value().unwrap();
                payload = page.iter().copied().take_while(|b| *b != 0).collect();
            }
            b"keep identity" => self.memory.lock().unwrap().keeps_identity = true,
            b"sleep" => self.memory.lock().unwrap().sleeps = true,
            other => {
                if let Some(bytes) = other.strip_prefix(b"say ") {
                    let _ = self.stream.write_all(bytes);
                    return;
                }
                if let Some(text) = other.strip_prefix(b"write ") {
                    let mut memory = self.memory.lock().unwrap();
                    let mut page = text.to_vec();
                    page.resize(PAGE, 0);
                    *memory.pages.first_entry().unwrap().get_mut() = page;
                }
                if let Some(count) = other.strip_prefix(b"log ") {
                    let count = std::str::from_utf8(count).unwrap().parse().unwrap();
                    for line in 0..count {
                        self.say(&log(format!("line {line}")));
                    }
                }
            }
        }
        let dies = payload == b"die later";
        self.say(&FromGuest::Done(Done {
            request_id: invoke.request_id,
            outcome: Outcome::Response { payload, content_type: "application/json".into() },
            duration_us: 5,
            init_us: 0,
            max_memory_bytes: 6,
            tsc: (1, 2),
        }));
        if dies {
            self.die();
        }
    }

    fn die(&self) -> ! {
        let exit = Exit { reason: ExitReason::GuestPanic, detail: "as asked".into() };
        send(&self.control, &FromVmm::Exited(exit));
        std::process::exit(ExitReason::GuestPanic.code());
    }
}
