use std::os::fd::OwnedFd;

use proptest::prelude::*;
use vm_memory::GuestAddress;

use super::*;
use crate::virtio::{
    chain::Chain,
    mock::{DATA, Mock, file, memory},
};

#[test]
fn sources_take_their_descriptors_in_order() {
    let files = || [b"b", b"f", b"d"].map(|name| OwnedFd::from(file(name))).into_iter();
    let content = |file: &File| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, 0).unwrap();
        byte[0]
    };
    let mut rest = files();
    assert!(matches!(Medium::from_source(DiskSource::Empty, &mut rest), Ok(Medium::Empty)));
    match Medium::from_source(DiskSource::CopyOnWriteThawed, &mut rest).unwrap() {
        Medium::CopyOnWrite { backing, frozen: Some(frozen), delta } => {
            assert_eq!([&backing, &frozen, &delta].map(content), *b"bfd");
        }
        other => panic!("{other:?}"),
    }
    assert!(rest.next().is_none());
    let error = Medium::from_source(DiskSource::CopyOnWrite, &mut files().take(1)).unwrap_err();
    assert_eq!(error.to_string(), "CopyOnWrite needs 2 descriptors, 1 came");
}

#[test]
fn a_medium_must_suit_its_device_and_the_limit() {
    let medium = || Medium::ReadOnly { file: file(b"") };
    assert!(matches!(
        Disk::new(DiskKind::CopyOnWrite, medium()),
        Err(MediumError::Kind { found: "read-only", .. })
    ));
    let huge = file(b"");
    huge.set_len(MAX_BYTES + 1).unwrap();
    assert!(matches!(
        Disk::new(DiskKind::ReadOnly, Medium::ReadOnly { file: huge }),
        Err(MediumError::TooLarge { .. })
    ));
}

/// A copy-on-write disk whose sectors are numbered, with a short last block.
const SECTORS: u64 = 8 * 5 + 3;

fn backing() -> Vec<u8> {
    // A few bytes past the last whole sector, which nobody can reach.
    (0..SECTORS).flat_map(|sector| [sector as u8; SECTOR as usize]).chain([0xee; 100]).collect()
}

fn disk(frozen: Option<File>) -> Disk {
    let medium = Medium::CopyOnWrite { backing: file(&backing()), frozen, delta: file(b"") };
    Disk::new(DiskKind::CopyOnWrite, medium).unwrap()
}

/// Guest memory and a chain over `sectors` sectors of it.
struct Guest {
    mock: Mock<crate::devices::rng::Rng>,
}

impl Guest {
    fn new() -> Self {
        let memory = memory();
        Self { mock: Mock::cold(memory.clone(), crate::devices::rng::Rng::new(memory)) }
    }

    fn chain(&self, sectors: u64, writable: bool) -> Chain {
        let mut chain = Chain::new(self.mock.memory.clone());
        chain.begin(0);
        // Uneven pieces, so that no block lies in one.
        let (mut at, end) = (DATA, DATA + sectors * SECTOR);
        while at < end {
            let len = 1000.min(end - at);
            chain.push(GuestAddress(at), len as u32, writable).unwrap();
            at += len;
        }
        chain
    }

    fn read(&self, disk: &Disk, sector: u64, sectors: u64) -> io::Result<Vec<u8>> {
        let mut chain = self.chain(sectors, true);
        assert_eq!(disk.read(sector, &mut chain.writable(), &Halt::default())?, Progress::Done);
        Ok(self.mock.read_vec(DATA, (sectors * SECTOR) as usize))
    }

    fn write(&self, disk: &mut Disk, sector: u64, sectors: u64, byte: u8) -> io::Result<()> {
        self.mock.write_all(DATA, &vec![byte; (sectors * SECTOR) as usize]);
        let mut chain = self.chain(sectors, false);
        let progress = disk.write(sector, &mut chain.readable(), &Halt::default())?;
        assert_eq!(progress, Progress::Done);
        Ok(())
    }
}

#[test]
fn a_part_of_a_block_is_filled_from_below() {
    let guest = Guest::new();
    let mut disk = disk(None);
    guest.write(&mut disk, 9, 2, 0xaa).unwrap();
    let mut expected = backing()[..(SECTORS * SECTOR) as usize].to_vec();
    expected[9 * 512..11 * 512].fill(0xaa);
    assert_eq!(guest.read(&disk, 0, SECTORS).unwrap(), expected);
    // The backing's short last block.
    guest.write(&mut disk, SECTORS - 1, 1, 0xbb).unwrap();
    expected[(SECTORS as usize - 1) * 512..].fill(0xbb);
    assert_eq!(guest.read(&disk, 0, SECTORS).unwrap(), expected);
    assert_eq!(disk.written(), [0b10_0010]);
}

#[test]
fn the_end_is_the_end() {
    let guest = Guest::new();
    let mut disk = disk(None);
    assert_eq!(disk.sectors(), SECTORS);
    for (sector, sectors) in [(SECTORS, 1), (SECTORS - 1, 2), (u64::MAX, 1), (u64::MAX / 512, 4)] {
        assert!(guest.read(&disk, sector, sectors).is_err());
        assert!(guest.write(&mut disk, sector, sectors, 1).is_err());
    }
    assert!(guest.read(&disk, SECTORS, 0).is_ok());
    assert_eq!(disk.written(), []);
}

#[test]
fn a_failed_write_changes_nothing() {
    let guest = Guest::new();
    let read_only = std::fs::File::open("/proc/self/fd").unwrap();
    let medium = Medium::CopyOnWrite { backing: file(&backing()), frozen: None, delta: read_only };
    let mut disk = Disk::new(DiskKind::CopyOnWrite, medium).unwrap();
    for sectors in [1, 8, 20] {
        assert!(guest.write(&mut disk, 0, sectors, 1).is_err());
    }
    assert_eq!(guest.read(&disk, 0, 1).unwrap(), [0; 512]);
}

#[test]
fn restore_empties_the_delta_and_believes_in_the_frozen_layer() {
    let guest = Guest::new();
    let mut first = disk(None);
    guest.write(&mut first, 3, 10, 0xaa).unwrap();
    guest.write(&mut first, 24, 8, 0).unwrap();
    let frozen = file(b"");
    assert_eq!(first.save_delta(&frozen).unwrap(), 3);
    // Zeroes are a hole in the file, not in the bitmap.
    assert_eq!(first.written(), [0b1011]);

    let mut second = disk(Some(frozen.try_clone().unwrap()));
    second.restore(SECTORS, &first.written()).unwrap();
    let whole = |disk: &Disk| guest.read(disk, 0, SECTORS).unwrap();
    let snapshot = whole(&first);
    assert_eq!(whole(&second), snapshot);
    guest.write(&mut second, 0, SECTORS, 0x77).unwrap();
    guest.write(&mut second, 5, 1, 0x78).unwrap();
    assert_ne!(whole(&second), snapshot);
    second.restore(SECTORS, &first.written()).unwrap();
    assert_eq!(whole(&second), snapshot);
    let Layers::CopyOnWrite(layers) = &second.layers else { panic!() };
    assert_eq!(layers.delta.metadata().unwrap().len(), 0);
}

#[test]
fn states_that_do_not_fit_the_medium_are_refused() {
    let mut plain = disk(None);
    let missing = RestoreError::Written("the snapshot's delta is missing");
    assert_eq!(plain.restore(SECTORS, &[1]), Err(missing));
    assert!(matches!(plain.restore(SECTORS + 1, &[]), Err(RestoreError::Capacity { .. })));
    assert!(matches!(plain.restore(SECTORS, &[0, 1]), Err(RestoreError::Written(_))));
    assert!(matches!(plain.restore(SECTORS, &[0; 9]), Err(RestoreError::Written(_))));
    plain.restore(SECTORS, &[]).unwrap();
    let mut short = disk(Some(file(&[0; BLOCK as usize])));
    short.restore(SECTORS, &[1]).unwrap();
    let error = RestoreError::Written("the snapshot's delta is too short");
    assert_eq!(short.restore(SECTORS, &[2]), Err(error));
    assert!(matches!(Disk::empty().restore(0, &[1]), Err(RestoreError::Written(_))));
    Disk::empty().restore(0, &[]).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn behaves_as_an_array_through_freezes(
        steps in proptest::collection::vec((0u64..SECTORS, 1u64..30, any::<u8>(), 0u8..8), 1..30),
    ) {
        let guest = Guest::new();
        let mut disk = disk(None);
        let mut model = backing()[..(SECTORS * SECTOR) as usize].to_vec();
        for (sector, sectors, byte, freeze) in steps {
            let sectors = sectors.min(SECTORS - sector);
            guest.write(&mut disk, sector, sectors, byte).unwrap();
            model[(sector * SECTOR) as usize..][..(sectors * SECTOR) as usize].fill(byte);
            if freeze == 0 {
                let out = file(b"");
                disk.save_delta(&out).unwrap();
                let written = disk.written();
                disk = super::tests::disk(Some(out));
                disk.restore(SECTORS, &written).unwrap();
            }
            prop_assert_eq!(&guest.read(&disk, 0, SECTORS).unwrap(), &model);
        }
    }
}
