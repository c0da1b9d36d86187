//! The runs of pages that a plan names: whether they can be, and where they lie.

use std::ops::Range;

use firn_pages::{PAGE, REGION};
use firn_proto::control::{MAX_RUNS, PageRun};

use super::PlanError;

/// Pages of a region.
pub const REGION_PAGES: u64 = REGION / PAGE;

/// Offset and length of a run in bytes.
pub fn extent(run: &PageRun) -> (u64, usize) {
    (u64::from(run.first) * PAGE, (u64::from(run.pages) * PAGE) as usize)
}

/// Runs must be few, in order, disjoint, and within memory.
pub fn check(runs: &[PageRun], memory_bytes: u64) -> Result<(), PlanError> {
    if runs.len() > MAX_RUNS {
        return Err(PlanError::Malformed(format!("{} runs exceed {MAX_RUNS}", runs.len())));
    }
    let mut next = 0;
    for run in runs {
        let end = u64::from(run.first) + u64::from(run.pages);
        if run.pages == 0 || u64::from(run.first) < next || end * PAGE > memory_bytes {
            return Err(PlanError::Malformed(format!("{run:?} is out of place")));
        }
        next = end;
    }
    Ok(())
}

/// Maximal ranges of consecutive regions that checked runs lie in.
pub fn groups(runs: &[PageRun], memory_bytes: u64) -> Result<Vec<Range<u64>>, PlanError> {
    let mut groups: Vec<Range<u64>> = Vec::new();
    for run in runs {
        let start = u64::from(run.first) / REGION_PAGES;
        let end = (u64::from(run.first) + u64::from(run.pages)).div_ceil(REGION_PAGES);
        if end * REGION > memory_bytes {
            return Err(PlanError::Malformed(format!("{run:?} is in a region that is not whole")));
        }
        match groups.last_mut() {
            Some(last) if start <= last.end => last.end = last.end.max(end),
            _ => groups.push(start..end),
        }
    }
    Ok(groups)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_that_is_not_whole_is_not_copied() {
        // 17 MiB end in half a region.
        let run = |first| [PageRun { first, pages: 1 }];
        assert!(groups(&run(4096), 17 << 20).is_err());
        assert_eq!(groups(&run(4095), 17 << 20).unwrap(), vec![7..8]);
    }
}
