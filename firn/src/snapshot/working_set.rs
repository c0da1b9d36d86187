//! What clones of a snapshot touch first, and what a thaw makes of it.
//!
//! The first clones are thawed with all their pages mapped from the snapshot. When one of them is
//! paused after its first invocations, the host reads from its page tables which pages it has
//! written: those are private copies by then. Later clones get these pages copied before they run
//! ([`MemoryPlan`]). The sets are kept beside the snapshot, in `working-set`; they are advice, and
//! no content depends on them. Still they are
//! authenticated like the snapshot: forged ones could make every thaw slow and large.
//!
//! ```text
//! 0    "FIRN-WS\0"           magic
//! 8    u32 little-endian     version
//! 12   32 bytes              id of the snapshot
//! 44   u32, u64              samples, pages of guest memory
//! 56   three bitmaps         written in any sample, in every sample, touched in any
//! …    32 bytes              keyed BLAKE3 of all before
//! ```

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use firn_pages::{
    PAGE, REGION,
    bitmap::Bitmap,
    pagemap::{Pagemap, Pages},
};
use firn_proto::control::{MAX_RUNS, MAX_SPARES, MemoryPlan, PageRun};

use super::container::Id;
use crate::keys::Key;

const MAGIC: [u8; 8] = *b"FIRN-WS\0";
const VERSION: u32 = 2;
const HEADER: usize = 56;
const TAG: usize = 32;

/// File beside the snapshot.
const FILE: &str = "working-set";

/// Clones that are watched. A second one tells what the first wrote by chance.
const SAMPLES: u32 = 2;

const REGION_PAGES: u64 = REGION / PAGE;

/// Pages that Linux maps around one that is read, at most: so many that were touched and not written
/// count as one fault.
const AROUND: u64 = 16;

/// Making and moving a huge page costs about as much as copying so many pages.
const MOVING: u64 = 256;

/// Smallest hole of a snapshot in which clones get memory of their own, in pages. Smaller ones are as
/// many as they are small: to map each would cost a thaw more than they can hold.
const HOLE: u64 = REGION_PAGES;

/// Runs of one list that a plan has at most: full lists fit a message.
const RUNS: usize = MAX_RUNS / 2;

/// How much a snapshot's clones touch, in pages of 4 KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WorkingSetReport {
    /// Clones that were watched.
    pub samples: u32,
    /// Pages that at least one of them wrote.
    pub written: u64,
    /// Pages that each of them wrote.
    pub always_written: u64,
    /// Pages that were in the page tables of at least one. Linux maps up to 16 pages around one
    /// that is read, so these are more than were used.
    pub touched: u64,
    /// Regions of 2 MiB that a thaw copies whole.
    pub copied_regions: u16,
    /// Pages that a thaw copies one by one.
    pub populated: u64,
}

/// The sets of one snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Sets {
    samples: u32,
    written: Bitmap,
    always: Bitmap,
    touched: Bitmap,
}

/// The sets of one resident snapshot, as they become known.
#[derive(Debug)]
pub(super) struct WorkingSet {
    pages: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    sets: Option<Sets>,
    /// Clones that are being watched.
    watching: u32,
    /// For a clone that is watched: it copies nothing.
    unknown: Arc<MemoryPlan>,
    plan: Arc<MemoryPlan>,
    /// Regions that the plan copies.
    regions: u16,
}

/// One clone that is watched.
#[derive(Debug)]
pub(crate) struct Sample {
    pub(crate) written: Bitmap,
    pub(crate) touched: Bitmap,
}

/// What to do with a clone.
#[derive(Debug)]
pub(crate) struct Use {
    /// What to copy.
    pub(crate) plan: Arc<MemoryPlan>,
    /// Watch what it touches; the plan copies nothing.
    pub(crate) watch: bool,
    /// Regions that the plan copies whole.
    pub(crate) regions: u16,
}

impl WorkingSet {
    /// What is known of the snapshot in `dir`; nothing, if there is nothing or it is damaged.
    pub(super) fn load(dir: &Path, id: &Id, key: &Key, content: &Bitmap, dense: u32) -> Self {
        let sets = match read(dir, id, key, content.size()) {
            Ok(sets) => sets,
            Err(error) => {
                tracing::warn!(%error, dir = %dir.display(), "ignoring what is known of a snapshot's working set");
                None
            }
        };
        let unknown = Arc::new(plan(None, content, dense).0);
        let (plan, regions) = match &sets {
            Some(_) => {
                let (plan, regions) = plan(sets.as_ref(), content, dense);
                (Arc::new(plan), regions)
            }
            None => (unknown.clone(), 0),
        };
        let state = State { sets, watching: 0, unknown, plan, regions };
        Self { pages: content.size(), state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing is left half done under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How to thaw the next clone. Only one that is thawed for an `event` is worth watching: what is
    /// thawed to be loaded with a function writes what no later clone does.
    pub(super) fn next(&self, event: bool) -> Use {
        let mut state = self.state();
        let known = state.sets.as_ref().map_or(0, |sets| sets.samples);
        if event && known + state.watching < SAMPLES {
            state.watching += 1;
            return Use { plan: state.unknown.clone(), watch: true, regions: 0 };
        }
        Use { plan: state.plan.clone(), watch: false, regions: state.regions }
    }

    /// A watched clone is gone; with a sample if it got that far. The sets to keep on disk, if
    /// they have changed.
    pub(super) fn watched(
        &self,
        sample: Option<Sample>,
        content: &Bitmap,
        dense: u32,
    ) -> Option<Vec<u8>> {
        let mut state = self.state();
        state.watching = state.watching.saturating_sub(1);
        let Sample { written, touched } = sample?;
        if written.size() != self.pages || touched.size() != self.pages {
            return None;
        }
        let sets = match state.sets.take() {
            None => Sets { samples: 1, always: written.clone(), written, touched },
            Some(sets) => Sets {
                samples: sets.samples + 1,
                always: sets.always.intersection(&written),
                written: sets.written.union(&written),
                touched: sets.touched.union(&touched),
            },
        };
        let (plan, regions) = plan(Some(&sets), content, dense);
        (state.plan, state.regions) = (Arc::new(plan), regions);
        let bytes = encode(&sets);
        state.sets = Some(sets);
        Some(bytes)
    }

    pub(super) fn report(&self) -> WorkingSetReport {
        let state = self.state();
        let populated = state.plan.populated.iter().map(|run| u64::from(run.pages)).sum();
        let copied_regions = state.regions;
        match &state.sets {
            None => WorkingSetReport::default(),
            Some(sets) => WorkingSetReport {
                samples: sets.samples,
                written: sets.written.count(),
                always_written: sets.always.count(),
                touched: sets.touched.count(),
                copied_regions,
                populated,
            },
        }
    }
}

/// Writes the sets of the snapshot `id` beside it: whole or not at all.
pub(super) fn keep(dir: &Path, id: &Id, key: &Key, sets: &[u8]) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(HEADER + sets.len() + TAG);
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(id);
    bytes.extend(sets);
    bytes.extend(key.tag(&bytes).as_bytes());
    let mut file = tempfile::Builder::new().prefix(crate::open::TEMPORARY).tempfile_in(dir)?;
    io::Write::write_all(&mut file, &bytes)?;
    file.persist(dir.join(FILE))?;
    Ok(())
}

/// What follows the id.
fn encode(sets: &Sets) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(sets.samples.to_le_bytes());
    bytes.extend(sets.written.size().to_le_bytes());
    for set in [&sets.written, &sets.always, &sets.touched] {
        bytes.extend(set.to_bytes());
    }
    bytes
}

fn read(dir: &Path, id: &Id, key: &Key, pages: u64) -> Result<Option<Sets>, String> {
    let file = match File::open(dir.join(FILE)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    let bitmap = Bitmap::byte_count(pages) as usize;
    let expected = HEADER + 3 * bitmap + TAG;
    let found = file.metadata().map_err(|e| e.to_string())?.len();
    if found != expected as u64 {
        return Err(format!("{found} bytes instead of {expected}"));
    }
    let mut bytes = vec![0; expected];
    file.read_exact_at(&mut bytes, 0).map_err(|e| e.to_string())?;
    decode(&bytes, id, key, pages).map(Some)
}

/// `bytes` are as long as they must be for `pages`.
fn decode(bytes: &[u8], id: &Id, key: &Key, pages: u64) -> Result<Sets, String> {
    let (content, tag) = bytes.split_at(bytes.len() - TAG);
    let (header, bitmaps) = content.split_at(HEADER);
    if header[..8] != MAGIC || header[8..12] != VERSION.to_le_bytes() {
        return Err("it is of another version".into());
    }
    // As hashes, which are compared in constant time.
    if !blake3::Hash::from_slice(tag).is_ok_and(|tag| tag == key.tag(content)) {
        return Err("it was altered or forged".into());
    }
    if header[12..44] != id[..] || header[48..56] != pages.to_le_bytes() {
        return Err("it belongs to another snapshot".into());
    }
    let samples = u32::from_le_bytes([header[44], header[45], header[46], header[47]]);
    let mut sets = bitmaps
        .chunks_exact(Bitmap::byte_count(pages) as usize)
        .map(|bits| Bitmap::from_bytes(bits, pages));
    let mut next = || sets.next().flatten().ok_or("a bitmap is missing, or has bits past its end");
    Ok(Sets { samples, written: next()?, always: next()?, touched: next()? })
}

/// A plan for clones of a snapshot that holds `content`. Large holes are memory of their own. A
/// region in which pages are written is copied whole if this saves at least `dense` faults for each
/// 512 pages that it takes; elsewhere written pages are copied one by one. With it comes how many
/// regions are copied.
fn plan(sets: Option<&Sets>, content: &Bitmap, dense: u32) -> (MemoryPlan, u16) {
    let large = |run: &std::ops::Range<u64>| run.end - run.start >= HOLE;
    let holes = content.complement().runs().filter(large).map(page_run).take(RUNS).collect();
    let mut plan = MemoryPlan { holes, ..MemoryPlan::default() };
    let mut regions = 0;
    let Some(sets) = sets else { return (plan, regions) };
    for start in (0..content.size()).step_by(REGION_PAGES as usize) {
        let region = start..start + REGION_PAGES;
        let written = sets.written.count_in(region.clone());
        let whole = region.end <= content.size();
        // One page that is copied alone keeps the region from being mapped by a huge page, so that
        // those that are only read fault, too.
        let read = sets.touched.count_in(region.clone()).saturating_sub(written);
        let faults = written + read / AROUND;
        let cost = (content.count_in(region.clone()) + MOVING) * u64::from(dense.max(1));
        let pays = whole && written > 0 && faults * REGION_PAGES >= cost && regions < MAX_SPARES;
        // To copy holes would fill them.
        let runs =
            if pays { content.runs_in(region.clone()).map(page_run).collect() } else { Vec::new() };
        // What is too ragged to say in one message is copied page by page.
        if pays && plan.copied.len() + runs.len() <= RUNS {
            regions += 1;
            plan.copied.extend(runs);
        } else if written > 0 {
            let end = region.end.min(content.size());
            plan.populated.extend(sets.written.runs_in(start..end).map(page_run));
        }
    }
    plan.populated.truncate(RUNS);
    (plan, regions)
}

fn page_run(run: std::ops::Range<u64>) -> PageRun {
    PageRun { first: run.start as u32, pages: (run.end - run.start) as u32 }
}

/// Reads from the page tables of process `pid` which pages of its `pages` from `address` are there
/// (touched), and which of these are private copies (written). Needs the right to trace it.
pub(crate) fn observe(pid: u32, address: u64, pages: u64) -> io::Result<Sample> {
    let pagemap = Pagemap::open(pid)?;
    let set = |which| {
        let mut set = Bitmap::new(pages);
        pagemap.runs(address, pages, which, |run| set.insert(run))?;
        io::Result::Ok(set)
    };
    Ok(Sample { written: set(Pages::Private)?, touched: set(Pages::Mapped)? })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 4 * REGION_PAGES;

    fn set(pages: impl IntoIterator<Item = u64>) -> Bitmap {
        let mut set = Bitmap::new(PAGES);
        pages.into_iter().for_each(|page| set.insert(page..page + 1));
        set
    }

    fn key() -> Key {
        Key::from_bytes([1; 32])
    }

    fn sample(written: &Bitmap) -> Sample {
        Sample { written: written.clone(), touched: written.clone() }
    }

    fn fresh(content: &Bitmap) -> WorkingSet {
        let dir = tempfile::tempdir().unwrap();
        WorkingSet::load(dir.path(), &[7; 32], &key(), content, 8)
    }

    #[test]
    fn the_first_clones_are_watched_and_later_ones_go_by_the_plan() {
        let content = set(0..PAGES);
        let sets = fresh(&content);
        let loaded = sets.next(false);
        assert_eq!((loaded.watch, loaded.regions), (false, 0), "not for an event");
        assert!(sets.next(true).watch && sets.next(true).watch);
        let third = sets.next(true);
        assert!(!third.watch);
        assert_eq!(*third.plan, MemoryPlan::default());
        // One of them dies: the next takes its place.
        assert_eq!(sets.watched(None, &content, 8), None);
        assert!(sets.next(true).watch);
        let first = set((0..20).chain([600]));
        let second = set((0..18).chain([1100]));
        assert!(sets.watched(Some(sample(&first)), &content, 8).is_some());
        assert!(sets.watched(Some(sample(&second)), &content, 8).is_some());
        let Use { plan, watch: false, .. } = sets.next(true) else { panic!("a fourth is watched") };
        assert_eq!(plan.copied, [PageRun { first: 0, pages: 512 }]);
        let alone = |first| PageRun { first, pages: 1 };
        assert_eq!(plan.populated, [alone(600), alone(1100)]);
        let report = sets.report();
        assert_eq!((report.samples, report.written, report.always_written), (2, 22, 18));
        assert_eq!((report.copied_regions, report.populated), (1, 2));
    }

    #[test]
    fn sets_are_kept_beside_their_snapshot_and_damage_is_ignored() {
        let (dir, content, id) = (tempfile::tempdir().unwrap(), set(0..PAGES), [7; 32]);
        let sets = fresh(&content);
        assert!(sets.next(true).watch);
        let bytes = sets.watched(Some(sample(&set(3..90))), &content, 8).unwrap();
        keep(dir.path(), &id, &key(), &bytes).unwrap();
        let load = |id: &Id, content: &Bitmap| {
            WorkingSet::load(dir.path(), id, &key(), content, 8).report()
        };
        let other = Key::from_bytes([2; 32]);
        assert_eq!(WorkingSet::load(dir.path(), &id, &other, &content, 8).report().samples, 0);
        assert_eq!(load(&id, &content), sets.report());
        assert_eq!(load(&[8; 32], &content).samples, 0);
        assert_eq!(load(&id, &Bitmap::new(PAGES + 8)).samples, 0);
        let path = dir.path().join(FILE);
        let good = std::fs::read(&path).unwrap();
        for at in [0, 9, 20, 45, 50, 60, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            std::fs::write(&path, bad).unwrap();
            assert_eq!(load(&id, &content).samples, 0, "byte {at}");
        }
        std::fs::write(&path, &good[1..]).unwrap();
        assert_eq!(load(&id, &content).samples, 0);
    }

    #[test]
    fn pages_that_are_only_read_count_for_copying_where_one_is_written() {
        let (content, written) = (set(0..PAGES), set([3, 600]));
        let touched = written.union(&set(0..REGION_PAGES)).union(&set(1100..1400));
        let sets = Sets { samples: 1, always: written.clone(), touched, written };
        // One written and 31 times 16 others: 32 faults.
        let (made, regions) = plan(Some(&sets), &content, 21);
        assert_eq!((made.copied, regions), (vec![PageRun { first: 0, pages: 512 }], 1));
        assert_eq!(made.populated, [PageRun { first: 600, pages: 1 }]);
        assert_eq!(plan(Some(&sets), &content, 22).1, 0);
    }

    #[test]
    fn holes_are_not_copied() {
        let content = set((0..100).chain(110..120).chain(300..301));
        let written = set(0..50);
        let sets = Sets { samples: 1, always: written.clone(), touched: written.clone(), written };
        let (plan, _) = plan(Some(&sets), &content, 16);
        let run = |first, pages| PageRun { first, pages };
        assert_eq!(plan.copied, [run(0, 100), run(110, 10), run(300, 1)]);
    }

    #[test]
    fn every_clone_has_memory_of_its_own_in_large_holes() {
        let content = set((0..100).chain([700, 1212]));
        let run = |first, pages| PageRun { first, pages };
        let holes = [run(101, 599), run(1213, PAGES as u32 - 1213)];
        let content = content.union(&set([100]));
        let sets = fresh(&content);
        assert_eq!(sets.next(false).plan.holes, holes);
        let watched = sets.next(true);
        assert!(watched.watch);
        assert_eq!(watched.plan.holes, holes);
        assert!(sets.watched(Some(sample(&set(0..20))), &content, 8).is_some());
        let later = sets.next(false).plan;
        assert_eq!((&later.holes[..], &later.copied[..]), (&holes[..], &[run(0, 101)][..]));
    }

    #[test]
    fn this_process_is_observed() {
        let bytes = 16 * PAGE as usize;
        // SAFETY: a new private mapping.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                bytes,
                rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
                rustix::mm::MapFlags::PRIVATE,
            )
            .unwrap()
        };
        for page in [3usize, 4, 9] {
            // SAFETY: within the mapping.
            unsafe { start.cast::<u8>().add(page * PAGE as usize).write_volatile(1) };
        }
        let seen = observe(std::process::id(), start as u64, 16).unwrap();
        assert_eq!(seen.written.runs().collect::<Vec<_>>(), [3..5, 9..10]);
        assert_eq!(seen.written, seen.touched);
        // SAFETY: our own mapping, of which nothing is used any more.
        unsafe { rustix::mm::munmap(start, bytes).unwrap() };
    }

    proptest! {
        #[test]
        fn plans_are_what_a_vmm_takes(
            written in proptest::collection::vec(0..PAGES, 0..600),
            content in proptest::collection::vec((0..PAGES, 1u64..100), 0..60),
            dense in 0u32..64,
        ) {
            let mut content =
                set(content.iter().flat_map(|&(at, n)| at..(at + n).min(PAGES)));
            for &page in &written {
                content.insert(page..page + 1);
            }
            let written = set(written);
            let sets =
                Sets { samples: 1, always: written.clone(), touched: written.clone(), written };
            let (plan, regions) = plan(Some(&sets), &content, dense);
            let mut next = 0;
            for run in &plan.copied {
                prop_assert!(u64::from(run.first) >= next && run.pages > 0);
                next = u64::from(run.first) + u64::from(run.pages);
                prop_assert!(next <= PAGES);
            }
            // Each written page is taken care of once, and a copied region has all its content.
            let copied = set(plan.copied.iter().flat_map(|r| u64::from(r.first)..u64::from(r.first + r.pages)));
            let alone = set(plan.populated.iter().flat_map(|r| u64::from(r.first)..u64::from(r.first + r.pages)));
            prop_assert_eq!(copied.intersection(&alone).count(), 0);
            prop_assert_eq!(sets.written.minus(&copied).minus(&alone).count(), 0);
            let mut copies = 0;
            for region in 0..4 {
                let pages = region * REGION_PAGES..(region + 1) * REGION_PAGES;
                if copied.count_in(pages.clone()) > 0 {
                    prop_assert!(content.runs_in(pages).flatten().all(|page| copied.contains(page)));
                    copies += 1;
                }
            }
            prop_assert_eq!(regions, copies);
        }
    }
}
