//! What is known of many values: their number, sum, least and greatest, and percentiles to within one in
//! a hundred.

use serde::{Deserialize, Serialize};

/// Each bucket's upper bound over its lower one.
const GROWTH: f64 = 1.02;

/// Lower bound of the first bucket.
const LEAST: f64 = 0.001;

/// Number of the bucket of all that is greater: 0.001 × 1.02^2000 is beyond 10^14.
const LAST: u16 = 2000;

/// Many values.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Distribution {
    /// How many.
    pub count: u64,
    /// Their sum.
    pub sum: f64,
    /// The least; 0 if there are none.
    pub min: f64,
    /// The greatest; 0 if there are none.
    pub max: f64,
    /// Values by bucket, in order; bucket 0 has those that are not positive.
    buckets: Vec<(u16, u64)>,
}

fn bucket(value: f64) -> u16 {
    if value <= 0.0 {
        return 0;
    }
    let above = (value / LEAST).ln() / GROWTH.ln();
    1 + above.clamp(0.0, f64::from(LAST - 1)) as u16
}

impl Distribution {
    /// Adds a value, which must be finite.
    pub fn add(&mut self, value: f64) {
        self.merge_one(value, value, value, 1);
        self.put(bucket(value), 1);
    }

    /// Adds all values of another one.
    pub fn merge(&mut self, other: &Self) {
        self.merge_one(other.sum, other.min, other.max, other.count);
        for (bucket, count) in &other.buckets {
            self.put(*bucket, *count);
        }
    }

    fn merge_one(&mut self, sum: f64, min: f64, max: f64, count: u64) {
        if count == 0 {
            return;
        }
        let first = self.count == 0;
        self.min = if first { min } else { self.min.min(min) };
        self.max = if first { max } else { self.max.max(max) };
        self.sum += sum;
        self.count = self.count.saturating_add(count);
    }

    fn put(&mut self, bucket: u16, count: u64) {
        match self.buckets.binary_search_by_key(&bucket, |(bucket, _)| *bucket) {
            Ok(at) => self.buckets[at].1 = self.buckets[at].1.saturating_add(count),
            Err(at) => self.buckets.insert(at, (bucket, count)),
        }
    }

    /// The mean; 0 if there are no values.
    pub fn average(&self) -> f64 {
        if self.count == 0 { 0.0 } else { self.sum / self.count as f64 }
    }

    /// The value below which `percent` of all lie, which is from 0 to 100.
    pub fn percentile(&self, percent: f64) -> f64 {
        let rank = (percent / 100.0 * self.count as f64).ceil().max(1.0) as u64;
        let mut seen = 0u64;
        for (bucket, count) in &self.buckets {
            seen = seen.saturating_add(*count);
            if seen >= rank {
                let middle = match bucket {
                    0 => 0.0,
                    bucket => LEAST * GROWTH.powf(f64::from(*bucket) - 0.5),
                };
                return middle.clamp(self.min, self.max);
            }
        }
        self.max
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nothing_is_zero_and_one_value_is_itself() {
        let mut values = Distribution::default();
        assert_eq!((values.average(), values.percentile(50.0)), (0.0, 0.0));
        values.add(7.25);
        for percent in [0.0, 50.0, 100.0] {
            assert_eq!(values.percentile(percent), 7.25);
        }
        assert_eq!((values.count, values.sum, values.min, values.max), (1, 7.25, 7.25, 7.25));
    }

    proptest! {
        #[test]
        fn percentiles_are_within_one_in_a_hundred(
            values in prop::collection::vec(0.01f64..1e7, 1..300),
            percent in 0.0f64..100.0,
            cut in 0usize..300,
        ) {
            let cut = cut % values.len();
            let (mut all, mut rest) = (Distribution::default(), Distribution::default());
            values[..cut].iter().for_each(|v| all.add(*v));
            values[cut..].iter().for_each(|v| rest.add(*v));
            all.merge(&rest);
            let mut sorted = values.clone();
            sorted.sort_by(f64::total_cmp);
            let rank = (percent / 100.0 * values.len() as f64).ceil().max(1.0) as usize;
            let exact = sorted[rank - 1];
            let found = all.percentile(percent);
            prop_assert!((found / exact - 1.0).abs() <= 0.0101, "{found} for {exact}");
            prop_assert_eq!(all.count as usize, values.len());
            prop_assert_eq!((all.min, all.max), (sorted[0], sorted[values.len() - 1]));
        }

        #[test]
        fn any_value_has_a_bucket(value in any::<f64>().prop_filter("finite", |v| v.is_finite())) {
            let mut values = Distribution::default();
            values.add(value);
            prop_assert_eq!(values.percentile(99.0), value);
        }
    }
}
