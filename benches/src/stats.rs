//! Statistics of samples. What each result needs to be worth anything is built in: a quantile that
//! too few samples can't show is `None`, and so is an interval.

use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use statrs::distribution::{Binomial, ContinuousCDF, DiscreteCDF, Normal, StudentsT};

/// Confidence of every interval.
pub const CONFIDENCE: f64 = 0.95;

/// Resamples of a bootstrap.
const RESAMPLES: usize = 2000;

/// An interval that holds the true value with [`CONFIDENCE`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Interval {
    /// Its lower end.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
}

/// Sorted copy.
pub fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// The `q` quantile of sorted values, interpolated linearly between the two that are nearest
/// (Hyndman and Fan's type 7). `None` without values.
pub fn quantile(sorted: &[f64], q: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let at = q.clamp(0.0, 1.0) * last as f64;
    let below = sorted[at.floor() as usize];
    let above = sorted[at.ceil() as usize];
    Some(below + (above - below) * at.fract())
}

/// The quantile, if there are samples enough on the far side of it to see it at all: 10 for p90,
/// 100 for p99, 10,000 for p99.9 (where a single one would be no figure).
pub fn tail(sorted: &[f64], q: f64) -> Option<f64> {
    let needed = if q > 0.99 { 10.0 / (1.0 - q) } else { 1.0 / (1.0 - q) };
    // The subtraction above is not exact.
    if (sorted.len() as f64) < needed - 1e-6 { None } else { quantile(sorted, q) }
}

/// The median of unsorted values.
pub fn median(values: &[f64]) -> Option<f64> {
    quantile(&sorted(values), 0.5)
}

/// The interval of the median between two order statistics, by the binomial distribution: it
/// assumes nothing but independent samples. `None` below 6, where none has the confidence.
pub fn median_interval(sorted: &[f64]) -> Option<Interval> {
    let count = sorted.len();
    let tosses = Binomial::new(0.5, count as u64).ok()?;
    let tail = (1.0 - CONFIDENCE) / 2.0;
    // The largest number of samples that may be cut from each end.
    let cut = (0..count / 2).take_while(|&cut| tosses.cdf(cut as u64) <= tail).count();
    let cut = cut.checked_sub(1)?;
    Some(Interval { low: sorted[cut], high: sorted[count - 1 - cut] })
}

/// Student's interval of the mean, for the few medians of a few seeds. It takes them to be normal;
/// `None` below 3, where it would be wider than it is informative.
pub fn mean_interval(values: &[f64]) -> Option<Interval> {
    let count = values.len();
    if count < 3 {
        return None;
    }
    let mean = values.iter().sum::<f64>() / count as f64;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (count - 1) as f64;
    let student = StudentsT::new(0.0, 1.0, (count - 1) as f64).ok()?;
    let reach = student.inverse_cdf((1.0 + CONFIDENCE) / 2.0) * (variance / count as f64).sqrt();
    Some(Interval { low: mean - reach, high: mean + reach })
}

/// Bootstrap interval (percentiles) of the median of `b` over that of `a`. The same samples give
/// the same interval. `None` without samples, or where a median of `a` is 0.
pub fn ratio_interval(a: &[f64], b: &[f64]) -> Option<Interval> {
    if a.is_empty() || b.is_empty() {
        return None;
    }
    let mut random = Xoshiro256PlusPlus::seed_from_u64(0);
    let mut resampled = |from: &[f64]| {
        let drawn: Vec<f64> =
            (0..from.len()).map(|_| from[random.random_range(0..from.len())]).collect();
        median(&drawn)
    };
    let mut ratios = Vec::with_capacity(RESAMPLES);
    for _ in 0..RESAMPLES {
        let (under, over) = (resampled(a)?, resampled(b)?);
        if under == 0.0 {
            return None;
        }
        ratios.push(over / under);
    }
    let ratios = sorted(&ratios);
    let tail = (1.0 - CONFIDENCE) / 2.0;
    Some(Interval { low: quantile(&ratios, tail)?, high: quantile(&ratios, 1.0 - tail)? })
}

/// Largest samples for which [`mann_whitney`] counts all orders instead of approximating.
const EXACT: usize = 20;

/// Two-sided p of the Mann-Whitney U test: how likely two samples of one population differ in rank
/// as much as these. Exact for up to 20 samples a side without ties; otherwise normal, corrected
/// for ties and continuity. `None` without samples.
pub fn mann_whitney(a: &[f64], b: &[f64]) -> Option<f64> {
    let (n, m) = (a.len(), b.len());
    if n == 0 || m == 0 {
        return None;
    }
    let mut all: Vec<(f64, bool)> =
        a.iter().map(|&v| (v, true)).chain(b.iter().map(|&v| (v, false))).collect();
    all.sort_by(|x, y| x.0.total_cmp(&y.0));
    let mut rank_sum = 0.0;
    let mut ties = 0.0;
    let mut at = 0;
    while at < all.len() {
        let equal = all[at..].iter().take_while(|(v, _)| *v == all[at].0).count();
        // Equal values share the mean of their ranks, which count from 1.
        let rank = at as f64 + (equal + 1) as f64 / 2.0;
        rank_sum += rank * all[at..at + equal].iter().filter(|(_, of_a)| *of_a).count() as f64;
        ties += (equal as f64).powi(3) - equal as f64;
        at += equal;
    }
    let (nf, mf) = (n as f64, m as f64);
    let u = rank_sum - nf * (nf + 1.0) / 2.0;
    if ties == 0.0 && n <= EXACT && m <= EXACT {
        return Some(exact_p(n, m, u.min(nf * mf - u) as usize));
    }
    let total = nf + mf;
    let variance = nf * mf / 12.0 * (total + 1.0 - ties / (total * (total - 1.0)));
    if variance <= 0.0 {
        return Some(1.0);
    }
    let z = ((u - nf * mf / 2.0).abs() - 0.5).max(0.0) / variance.sqrt();
    let normal = Normal::new(0.0, 1.0).ok()?;
    Some((2.0 * (1.0 - normal.cdf(z))).min(1.0))
}

/// Share of all orders of `n` and `m` values whose U is at most `u`, doubled.
fn exact_p(n: usize, m: usize, u: usize) -> f64 {
    // counts[j][u]: orders of i values of the one and j of the other with that U; adding a value
    // of the one at the end adds j to U.
    let most = n * m;
    let mut counts = vec![vec![0.0; most + 1]; m + 1];
    for row in &mut counts {
        row[0] = 1.0;
    }
    for i in 1..=n {
        let mut next = vec![vec![0.0; most + 1]; m + 1];
        next[0][0] = 1.0;
        for j in 1..=m {
            for value in 0..=i * j {
                let last_is_other = next[j - 1][value];
                let last_is_one = if value >= j { counts[j][value - j] } else { 0.0 };
                next[j][value] = last_is_other + last_is_one;
            }
        }
        counts = next;
    }
    let all: f64 = counts[m].iter().sum();
    let at_most: f64 = counts[m][..=u.min(most)].iter().sum();
    (2.0 * at_most / all).min(1.0)
}

/// Holm's correction: what the p-values are worth given that so many tests were made at once. In
/// the given order.
pub fn holm(ps: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..ps.len()).collect();
    order.sort_by(|&x, &y| ps[x].total_cmp(&ps[y]));
    let mut corrected = vec![0.0; ps.len()];
    let mut highest = 0.0f64;
    for (rank, &index) in order.iter().enumerate() {
        highest = highest.max(ps[index] * (ps.len() - rank) as f64).min(1.0);
        corrected[index] = highest;
    }
    corrected
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn near(found: f64, expected: f64, within: f64) {
        assert!((found - expected).abs() <= within, "{found} is not {expected}");
    }

    #[test]
    fn quantiles_are_those_of_type_seven() {
        // R: quantile(c(1, 2, 4, 8, 16), c(.1, .5, .9)) = 1.4, 4.0, 12.8
        let values = [1.0, 2.0, 4.0, 8.0, 16.0];
        near(quantile(&values, 0.1).unwrap(), 1.4, 1e-12);
        near(quantile(&values, 0.5).unwrap(), 4.0, 0.0);
        near(quantile(&values, 0.9).unwrap(), 12.8, 1e-12);
        assert_eq!(quantile(&[], 0.5), None);
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), Some(2.5));
    }

    #[test]
    fn tails_need_samples() {
        let values = |n: u32| (0..n).map(f64::from).collect::<Vec<_>>();
        assert!(tail(&values(9), 0.9).is_none() && tail(&values(10), 0.9).is_some());
        assert!(tail(&values(99), 0.99).is_none() && tail(&values(100), 0.99).is_some());
        assert!(tail(&values(9_999), 0.999).is_none() && tail(&values(10_000), 0.999).is_some());
    }

    #[test]
    fn intervals_of_the_median_are_the_tabled_order_statistics() {
        // Conover, Practical Nonparametric Statistics: ranks 1–6 of 6, 2–9 of 10, 6–15 of 20.
        let interval = |n: u32| median_interval(&(1..=n).map(f64::from).collect::<Vec<_>>());
        assert_eq!(interval(5), None);
        assert_eq!(interval(6), Some(Interval { low: 1.0, high: 6.0 }));
        assert_eq!(interval(10), Some(Interval { low: 2.0, high: 9.0 }));
        assert_eq!(interval(20), Some(Interval { low: 6.0, high: 15.0 }));
        assert_eq!(interval(0), None);
    }

    #[test]
    fn intervals_of_the_mean_are_students() {
        // t(0.975, 2) = 4.302653; mean 2, standard error 1/√3.
        let found = mean_interval(&[1.0, 2.0, 3.0]).unwrap();
        near(found.high, 2.0 + 4.302_653 / 3f64.sqrt(), 1e-5);
        near(found.low, 2.0 - 4.302_653 / 3f64.sqrt(), 1e-5);
        assert_eq!(mean_interval(&[1.0, 2.0]), None);
    }

    #[test]
    fn mann_whitney_is_exact_for_few() {
        // All of one side below all of the other: 2 of the C(8, 4) = 70 orders are as extreme.
        let p = mann_whitney(&[1.0, 2.0, 3.0, 4.0], &[5.0, 6.0, 7.0, 8.0]).unwrap();
        near(p, 2.0 / 70.0, 1e-12);
        // R: wilcox.test(c(1,4,6,7), c(2,3,5,8,9)): W = 8, p = 0.7302
        let p = mann_whitney(&[1.0, 4.0, 6.0, 7.0], &[2.0, 3.0, 5.0, 8.0, 9.0]).unwrap();
        near(p, 0.730_16, 1e-4);
        assert_eq!(mann_whitney(&[1.0], &[]), None);
    }

    #[test]
    fn mann_whitney_corrects_for_ties() {
        // R: wilcox.test(c(1,2,2,3,3,3), c(2,3,3,4,4,5), exact=FALSE): W = 7, p = 0.08014
        let a = [1.0, 2.0, 2.0, 3.0, 3.0, 3.0];
        let b = [2.0, 3.0, 3.0, 4.0, 4.0, 5.0];
        let p = mann_whitney(&a, &b).unwrap();
        near(p, mann_whitney(&b, &a).unwrap(), 1e-12);
        near(p, by_hand(7.0, 6.0, 6.0, &[3.0, 5.0, 2.0]), 1e-9);
        assert_eq!(mann_whitney(&[2.0; 5], &[2.0; 7]), Some(1.0), "nothing but ties");
    }

    /// The textbook formula, with the sizes of the ties written out.
    fn by_hand(u: f64, n: f64, m: f64, ties: &[f64]) -> f64 {
        let total = n + m;
        let tied: f64 = ties.iter().map(|t| t * t * t - t).sum();
        let variance = n * m * (total + 1.0) / 12.0 - n * m * tied / (12.0 * total * (total - 1.0));
        let z = ((u - n * m / 2.0).abs() - 0.5) / variance.sqrt();
        2.0 * (1.0 - Normal::new(0.0, 1.0).unwrap().cdf(z))
    }

    #[test]
    fn holm_corrects_upwards_and_in_order() {
        // Holm by hand: 0.01·3, max(0.02·2, …), 0.5·1.
        let corrected = holm(&[0.02, 0.5, 0.01]);
        near(corrected[2], 0.03, 1e-12);
        near(corrected[0], 0.04, 1e-12);
        near(corrected[1], 0.5, 1e-12);
        assert_eq!(holm(&[0.6, 0.9]), [1.0, 1.0]);
    }

    #[test]
    fn a_ratio_is_found_and_repeats() {
        let a: Vec<f64> = (0..50).map(|i| 100.0 + f64::from(i % 7)).collect();
        let b: Vec<f64> = a.iter().map(|v| v * 2.0).collect();
        let interval = ratio_interval(&a, &b).unwrap();
        assert!(interval.low <= 2.0 && 2.0 <= interval.high && interval.high < 2.1);
        assert_eq!(ratio_interval(&a, &b), Some(interval));
        assert_eq!(ratio_interval(&[0.0], &[1.0]), None);
    }

    proptest! {
        #[test]
        fn exact_and_normal_agree_roughly(
            mut values in proptest::collection::hash_set(0u32..100_000, 30..40),
        ) {
            let all: Vec<f64> = values.drain().map(f64::from).collect();
            let (a, b) = all.split_at(15);
            let exact = mann_whitney(a, &b[..15]).unwrap();
            // One tie within a side sends it to the approximation and hardly moves the ranks.
            let mut tied = a.to_vec();
            tied.push(a[0]);
            let normal = mann_whitney(&tied, &b[..15]).unwrap();
            prop_assert!((0.0..=1.0).contains(&exact) && (0.0..=1.0).contains(&normal));
            prop_assert!((exact - normal).abs() < 0.25, "{} {}", exact, normal);
        }

        #[test]
        fn intervals_hold_the_median(values in proptest::collection::vec(-1e6f64..1e6, 6..60)) {
            let values = sorted(&values);
            let interval = median_interval(&values).unwrap();
            let median = quantile(&values, 0.5).unwrap();
            prop_assert!(interval.low <= median && median <= interval.high);
        }
    }
}
