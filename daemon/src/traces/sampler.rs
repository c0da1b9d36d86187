//! Which traces are recorded where nobody has decided: as X-Ray does it, the first of each second and five of
//! a hundred of the others, for each function.

use std::{
    collections::HashSet,
    sync::{Mutex, PoisonError},
};

/// Share of invocations that are sampled beyond the first of each second.
const SHARE: f64 = 0.05;

/// Functions that have a first one each second; others have their share only.
const FUNCTIONS: usize = 1000;

/// Decides.
#[derive(Debug, Default)]
pub struct Sampler {
    /// The second that it is, and the functions that have had their first.
    first: Mutex<(i64, HashSet<String>)>,
}

impl Sampler {
    /// Whether to sample an invocation of `function` in that second; `draw` is evenly drawn from [0, 1).
    pub fn decide(&self, function: &str, second: i64, draw: f64) -> bool {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        let (now, had) = &mut *first;
        if *now != second {
            *now = second;
            had.clear();
        }
        let first = had.len() < FUNCTIONS && !had.contains(function);
        if first {
            had.insert(function.to_owned());
        }
        first || draw < SHARE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_each_second_and_its_share() {
        let sampler = Sampler::default();
        let decisions =
            [("a", 7, 0.9), ("a", 7, 0.9), ("b", 7, 0.9), ("a", 7, 0.049), ("a", 7, 0.05)];
        let decided = decisions.map(|(name, second, draw)| sampler.decide(name, second, draw));
        assert_eq!(decided, [true, false, true, true, false]);
        assert!(sampler.decide("a", 8, 0.9) && !sampler.decide("a", 8, 0.9));
        assert!(sampler.decide("a", 6, 0.9), "also where the clock was set back");
    }

    #[test]
    fn many_functions_take_no_more_memory() {
        let sampler = Sampler::default();
        let sampled = (0..2000).filter(|i| sampler.decide(&i.to_string(), 1, 0.5)).count();
        assert_eq!(sampled, FUNCTIONS);
    }
}
