//! A bitmap of blocks: one bit each, least significant bit first.

use std::ops::Range;

/// Which of a fixed number of blocks are marked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bitmap {
    words: Vec<u64>,
    blocks: u64,
}

impl Bitmap {
    /// None of `blocks` is marked. Lazily zeroed memory: a large disk costs nothing until used.
    pub(super) fn new(blocks: u64) -> Self {
        Self { words: vec![0; blocks.div_ceil(64) as usize], blocks }
    }

    /// Whether `block` is marked; blocks past the end are not.
    pub(super) fn get(&self, block: u64) -> bool {
        self.words.get((block / 64) as usize).is_some_and(|word| word >> (block % 64) & 1 == 1)
    }

    /// Marks `blocks`; what lies past the end is ignored.
    pub(super) fn set(&mut self, blocks: Range<u64>) {
        for block in blocks.start..blocks.end.min(self.blocks) {
            self.words[(block / 64) as usize] |= 1 << (block % 64);
        }
    }

    /// Marks none.
    pub(super) fn clear(&mut self) {
        self.words.fill(0);
    }

    /// One past the last marked block; 0 if none is.
    pub(super) fn end(&self) -> u64 {
        self.words
            .iter()
            .rposition(|&word| word != 0)
            .map_or(0, |i| 64 * i as u64 + 64 - u64::from(self.words[i].leading_zeros()))
    }

    /// What either marks. Both have the same number of blocks.
    pub(super) fn union(&self, other: &Self) -> Self {
        let words = self.words.iter().zip(&other.words).map(|(a, b)| a | b).collect();
        Self { words, blocks: self.blocks }
    }

    /// The bits without the zeroes at the end.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.truncate(self.end().div_ceil(8) as usize);
        bytes
    }

    /// What [`Self::to_bytes`] made of a bitmap of `blocks`; `None` if a bit is past them.
    pub(super) fn from_bytes(blocks: u64, bytes: &[u8]) -> Option<Self> {
        let mut bitmap = Self::new(blocks);
        if bytes.len() > bitmap.words.len() * 8 {
            return None;
        }
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
        (bitmap.end() <= blocks).then_some(bitmap)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn bits_past_the_end_are_refused() {
        assert!(Bitmap::from_bytes(9, &[0, 1]).is_some());
        assert!(Bitmap::from_bytes(9, &[0, 2]).is_none());
        assert!(Bitmap::from_bytes(9, &[0; 8]).is_some());
        assert!(Bitmap::from_bytes(9, &[0; 9]).is_none());
        assert!(Bitmap::from_bytes(0, &[]).is_some());
        assert!(Bitmap::from_bytes(0, &[0]).is_none());
    }

    proptest! {
        #[test]
        fn behaves_as_a_set(
            blocks in 0u64..300,
            ranges in proptest::collection::vec((0u64..320, 0u64..80), 0..8),
        ) {
            let mut bitmap = Bitmap::new(blocks);
            let mut set = std::collections::BTreeSet::new();
            for (start, len) in ranges {
                bitmap.set(start..start + len);
                set.extend((start..start + len).filter(|b| *b < blocks));
            }
            for block in 0..400 {
                prop_assert_eq!(bitmap.get(block), set.contains(&block));
            }
            prop_assert_eq!(bitmap.end(), set.last().map_or(0, |b| b + 1));
            prop_assert_eq!(Bitmap::from_bytes(blocks, &bitmap.to_bytes()), Some(bitmap));
        }
    }
}
