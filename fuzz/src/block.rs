//! The block device: requests, changes of the medium, and what a snapshot's delta must keep.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    sync::{Arc, LazyLock},
};

use arbitrary::Arbitrary;
use firn_proto::control::DiskKind;
use firn_vmm::{
    Lapics,
    devices::block::{Block, Medium},
    memory::GuestMemory,
    virtio::DeviceError,
};

use crate::{
    guest::{self, HIGH, REGION},
    script::{Buffer, Driver, Subject},
};

/// Length of every medium: the last block is a short one.
const MEDIUM: usize = (64 << 10) + 512;

/// Headers and status bytes of requests lie at the end of memory.
const HEADERS: u64 = HIGH + REGION - 0x1000;
const STATUSES: u64 = HIGH + REGION - 0x100;

static BACKING: LazyLock<File> = LazyLock::new(|| {
    let file = empty();
    file.write_all_at(&pattern(), 0).expect("a file in memory");
    file
});

fn pattern() -> Vec<u8> {
    (0..MEDIUM).map(|i| (i / 512 + i) as u8 | 1).collect()
}

fn empty() -> File {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    rustix::fs::memfd_create("fuzz", flags).expect("a file in memory").into()
}

fn clone(file: &File) -> File {
    file.try_clone().expect("a descriptor")
}

fn contents(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().expect("a file in memory").len() as usize];
    file.read_exact_at(&mut bytes, 0).expect("a file in memory");
    bytes
}

/// What a driver, or the host, does with a disk.
#[derive(Debug, Arbitrary)]
pub enum Extra {
    /// A request by the rules of requests.
    Request { kind: Kind, sector: Sector, buffers: Vec<Buffer>, kick: bool },
    /// The host changes the medium while the guest runs.
    Replace(Choice),
}

/// A request's type.
#[derive(Debug, Arbitrary)]
pub enum Kind {
    /// Read.
    In,
    /// Write.
    Out,
    /// Flush.
    Flush,
    /// Serial number.
    Id,
    /// Any.
    Other(u32),
}

/// A request's sector.
#[derive(Debug, Arbitrary)]
pub enum Sector {
    /// One that there may be.
    Small(u8),
    /// Any.
    Any(u64),
}

/// A medium.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Arbitrary)]
pub enum Choice {
    /// None.
    Empty,
    /// Read-only.
    ReadOnly,
    /// Copy-on-write.
    CopyOnWrite,
}

/// The host's side.
pub struct Host {
    medium: Choice,
    requests: u64,
}

/// A driver of a disk with its medium in.
pub fn driver(read_only: bool, memory: Arc<GuestMemory>) -> (Driver<Block>, Host) {
    let (kind, choice) = match read_only {
        true => (DiskKind::ReadOnly, Choice::ReadOnly),
        false => (DiskKind::CopyOnWrite, Choice::CopyOnWrite),
    };
    let mut driver = Driver::new(Block::new(memory.clone(), kind, "fuzz", firn_vmm::virtio::Halt::default()), memory);
    driver.device.install(medium(choice)).expect("a medium that fits");
    (driver, Host { medium: choice, requests: 0 })
}

/// Fails if anything was ever written to the backing.
pub fn check_backing() {
    assert!(contents(&BACKING) == pattern(), "the backing was written");
}

fn medium(choice: Choice) -> Medium {
    match choice {
        Choice::Empty => Medium::Empty,
        Choice::ReadOnly => Medium::ReadOnly { file: clone(&BACKING) },
        Choice::CopyOnWrite => {
            Medium::CopyOnWrite { backing: clone(&BACKING), frozen: None, delta: empty() }
        }
    }
}

impl Subject for Block {
    type Extra = Extra;
    type Host = Host;

    fn extra(driver: &mut Driver<Self>, host: &mut Host, step: Extra) -> Result<(), DeviceError> {
        match step {
            Extra::Replace(choice) => {
                if driver.device.replace(medium(choice), Some(Lapics::of_power_on())).is_ok() {
                    host.medium = choice;
                }
                Ok(())
            }
            Extra::Request { kind, sector, mut buffers, kick } => {
                let kind = match kind {
                    Kind::In => 0,
                    Kind::Out => 1,
                    Kind::Flush => 4,
                    Kind::Id => 8,
                    Kind::Other(kind) => kind,
                };
                let sector = match sector {
                    Sector::Small(sector) => sector.into(),
                    Sector::Any(sector) => sector,
                };
                let header = HEADERS + 16 * (host.requests % 128);
                let status = STATUSES + host.requests % 256;
                host.requests += 1;
                let mut bytes = [0; 16];
                bytes[..4].copy_from_slice(&u32::to_le_bytes(kind));
                bytes[8..].copy_from_slice(&sector.to_le_bytes());
                guest::poke(&driver.memory, header, &bytes);
                // Reads and writes that go the right way are the ones that get far.
                for buffer in &mut buffers {
                    match kind {
                        0 => buffer.writable = true,
                        1 => buffer.writable = false,
                        _ => {}
                    }
                }
                buffers.insert(0, Buffer::new(header, 16, false));
                buffers.push(Buffer::new(status, 1, true));
                driver.offer(0, &buffers);
                if kick { driver.kick(0) } else { Ok(()) }
            }
        }
    }

    fn thaw(driver: &mut Driver<Self>, host: &mut Host) {
        let state = driver.save();
        if host.medium != Choice::CopyOnWrite {
            assert!(driver.restore(&state));
            assert_eq!(driver.save(), state);
            return;
        }
        let saved = empty();
        let blocks = driver.device.save_delta(&saved).expect("files in memory");
        let frozen = Some(clone(&saved));
        let thawed = Medium::CopyOnWrite { backing: clone(&BACKING), frozen, delta: empty() };
        driver.device.install(thawed).expect("a medium that fits");
        assert!(driver.restore(&state));
        assert_eq!(driver.save(), state);
        let again = empty();
        assert_eq!(driver.device.save_delta(&again).expect("files in memory"), blocks);
        assert!(contents(&again) == contents(&saved), "a snapshot of a snapshot differs");
    }
}
