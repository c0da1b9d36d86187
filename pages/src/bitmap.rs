//! A set of pages, or blocks, as a bitmap.

use std::ops::Range;

/// A set of numbers below a size. As bytes it is one bit each, least significant bit first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    words: Vec<u64>,
    size: u64,
}

impl Bitmap {
    /// None of the numbers below `size`. Lazily zeroed memory: a large one costs nothing until used.
    pub fn new(size: u64) -> Self {
        Self { words: vec![0; size.div_ceil(64) as usize], size }
    }

    /// The bitmap that `bytes` are; those that are missing at the end are zeroes. `None` if there
    /// are more than [`Self::byte_count`] of `size`, or if a bit is past the end.
    pub fn from_bytes(bytes: &[u8], size: u64) -> Option<Self> {
        if bytes.len() as u64 > Self::byte_count(size) {
            return None;
        }
        let mut bitmap = Self::new(size);
        // On the path of each thaw: word by word, not byte by byte.
        let (whole, rest) = bytes.as_chunks();
        for (word, chunk) in bitmap.words.iter_mut().zip(whole) {
            *word = u64::from_le_bytes(*chunk);
        }
        if !rest.is_empty() {
            let mut padded = [0; 8];
            padded[..rest.len()].copy_from_slice(rest);
            bitmap.words[whole.len()] = u64::from_le_bytes(padded);
        }
        (bitmap.end() <= size).then_some(bitmap)
    }

    /// The bytes, [`Self::byte_count`] of them.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.truncate(Self::byte_count(self.size) as usize);
        bytes
    }

    /// Bytes of a bitmap of `size`.
    pub fn byte_count(size: u64) -> u64 {
        size.div_ceil(8)
    }

    /// What all numbers are below.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Adds `numbers`; what lies past the end is ignored.
    pub fn insert(&mut self, numbers: Range<u64>) {
        for number in numbers.start..numbers.end.min(self.size) {
            self.words[(number / 64) as usize] |= 1 << (number % 64);
        }
    }

    /// Takes all out.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Whether `number` is in the set; one past the end is not.
    pub fn contains(&self, number: u64) -> bool {
        self.words.get((number / 64) as usize).is_some_and(|word| word >> (number % 64) & 1 == 1)
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// How many there are within `range`.
    pub fn count_in(&self, range: Range<u64>) -> u64 {
        self.runs_in(range).map(|run| run.end - run.start).sum()
    }

    /// One past the last; 0 if there is none.
    pub fn end(&self) -> u64 {
        self.words
            .iter()
            .rposition(|&word| word != 0)
            .map_or(0, |i| 64 * i as u64 + 64 - u64::from(self.words[i].leading_zeros()))
    }

    /// What is in either. Both are of one size, here and below.
    pub fn union(&self, other: &Self) -> Self {
        self.with(other, |a, b| a | b)
    }

    /// What is in both.
    pub fn intersection(&self, other: &Self) -> Self {
        self.with(other, |a, b| a & b)
    }

    /// What is in this one and not in the other.
    pub fn minus(&self, other: &Self) -> Self {
        self.with(other, |a, b| a & !b)
    }

    fn with(&self, other: &Self, word: impl Fn(u64, u64) -> u64) -> Self {
        let words = self.words.iter().zip(&other.words).map(|(a, b)| word(*a, *b)).collect();
        Self { words, size: self.size }
    }

    /// What is not in it.
    pub fn complement(&self) -> Self {
        let mut words: Vec<u64> = self.words.iter().map(|word| !word).collect();
        if let (Some(last), used @ 1..) = (words.last_mut(), self.size % 64) {
            *last &= (1 << used) - 1;
        }
        Self { words, size: self.size }
    }

    /// Maximal runs, in order.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> {
        self.runs_in(0..self.size)
    }

    /// Maximal runs within `range`, in order.
    pub fn runs_in(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let (mut next, end) = (range.start, range.end.min(self.size));
        std::iter::from_fn(move || {
            let start = self.find(true, next, end);
            next = self.find(false, start, end);
            (start < next).then_some(start..next)
        })
    }

    /// The first number of `at..end` that is in the set, or is not; `end` if there is none.
    fn find(&self, contained: bool, mut at: u64, end: u64) -> u64 {
        while at < end {
            let word = self.words[(at / 64) as usize];
            let found = (if contained { word } else { !word }) >> (at % 64);
            if found != 0 {
                return end.min(at + u64::from(found.trailing_zeros()));
            }
            at = (at / 64 + 1) * 64;
        }
        end
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn bits_past_the_end_are_refused() {
        assert!(Bitmap::from_bytes(&[0, 1], 9).is_some());
        assert!(Bitmap::from_bytes(&[0, 2], 9).is_none());
        assert!(Bitmap::from_bytes(&[0; 3], 9).is_none());
        assert!(Bitmap::from_bytes(&[], 0).is_some());
        assert!(Bitmap::from_bytes(&[0], 0).is_none());
    }

    #[test]
    fn bytes_begin_with_the_least_significant_bit() {
        let mut bitmap = Bitmap::new(75);
        bitmap.insert(3..5);
        bitmap.insert(74..99);
        assert_eq!(bitmap.to_bytes(), [0b11000, 0, 0, 0, 0, 0, 0, 0, 0, 0b100]);
        let few = Bitmap::from_bytes(&[0b11000], 75).unwrap();
        assert_eq!((few.count(), few.end()), (2, 5));
    }

    type Numbers = BTreeSet<u64>;

    fn sets() -> impl Strategy<Value = (Bitmap, Numbers)> {
        let ranges = proptest::collection::vec((0u64..320, 0u64..80), 0..8);
        (Just(203), ranges).prop_map(|(size, ranges)| {
            let (mut bitmap, mut set) = (Bitmap::new(size), Numbers::new());
            for (start, count) in ranges {
                bitmap.insert(start..start + count);
                set.extend((start..start + count).filter(|number| *number < size));
            }
            (bitmap, set)
        })
    }

    fn numbers(bitmap: &Bitmap) -> Numbers {
        bitmap.runs().flatten().collect()
    }

    proptest! {
        #[test]
        fn behaves_as_a_set(
            (a, set) in sets(), (b, other) in sets(), start in 0u64..300, count in 0u64..300,
        ) {
            for number in 0..400 {
                prop_assert_eq!(a.contains(number), set.contains(&number));
            }
            prop_assert_eq!(&numbers(&a), &set);
            prop_assert_eq!(a.count(), set.len() as u64);
            prop_assert_eq!(a.count_in(start..start + count), set.range(start..start + count).count() as u64);
            prop_assert_eq!(a.end(), set.last().map_or(0, |b| b + 1));
            let runs: Vec<_> = a.runs().collect();
            prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start), "{runs:?}");
            prop_assert_eq!(numbers(&a.union(&b)), &set | &other);
            prop_assert_eq!(numbers(&a.intersection(&b)), &set & &other);
            prop_assert_eq!(numbers(&a.minus(&b)), &set - &other);
            let all: Numbers = (0..a.size()).collect();
            prop_assert_eq!(numbers(&a.complement()), &all - &set);
            prop_assert_eq!(a.complement().end(), (&all - &set).last().map_or(0, |b| b + 1));
            prop_assert_eq!(Bitmap::from_bytes(&a.to_bytes(), a.size()), Some(a));
        }

        #[test]
        fn any_bytes_are_a_bitmap_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..12), size in 0u64..96) {
            let set = |bit: &u64| bytes[*bit as usize / 8] >> (bit % 8) & 1 == 1;
            let fits = bytes.len() as u64 <= size.div_ceil(8)
                && !(size..bytes.len() as u64 * 8).any(|bit| set(&bit));
            match Bitmap::from_bytes(&bytes, size) {
                None => prop_assert!(!fits),
                Some(bitmap) => {
                    prop_assert!(fits);
                    let bits = (0..bytes.len() as u64 * 8).filter(set);
                    prop_assert_eq!(numbers(&bitmap), bits.collect::<Numbers>());
                    prop_assert_eq!(&bitmap.to_bytes()[..bytes.len()], &bytes);
                }
            }
        }
    }
}
