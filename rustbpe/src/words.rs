//! Distinct pre-tokens ("words") and how often each occurs.
//!
//! * One open-addressing table per worker, 24 bytes per slot. A word of up to 15 bytes lives in
//!   its slot, and two such words are equal if their slots' keys are: one compare, no pointer.
//! * Longer words live in one arena; their key is a 64-bit hash and an index.
//! * Memory depends on the distinct words, not on the text.

use std::hash::{BuildHasher, BuildHasherDefault, Hasher, RandomState};
use std::sync::LazyLock;

use crate::ops;
use crate::prefetch::prefetch;

/// The longest word that fits into a key.
pub const MAX_INLINE: usize = 15;
const LONG: u64 = 0xff << 56;
const INITIAL_SLOTS: usize = 1 << 12;
/// Words that are counted together.
const NOTED: usize = 32;

/// Hash keys, random per process, so that no text can be made to collide on purpose. Nothing
/// that leaves this module depends on them.
static SEEDS: LazyLock<[u64; 2]> = LazyLock::new(|| {
    let state = RandomState::new();
    [state.hash_one(1u8) | 1, state.hash_one(2u8) | 1]
});

/// A word as two machine words: its bytes, zero-padded, and its length in the top byte.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Key {
    pub low: u64,
    pub high: u64,
}

impl Key {
    /// Key of `text[start..end]`, which has 1 to [`MAX_INLINE`] bytes.
    #[inline(always)]
    pub fn inline(text: &[u8], start: usize, end: usize) -> Key {
        let len = end - start;
        debug_assert!((1..=MAX_INLINE).contains(&len));
        let bytes = match text.get(start..start + 16) {
            Some(window) => u128::from_le_bytes(window.try_into().expect("16 bytes")),
            None => {
                let mut window = [0u8; 16];
                window[..len].copy_from_slice(&text[start..end]);
                u128::from_le_bytes(window)
            }
        };
        let kept = bytes & (u128::MAX >> (128 - 8 * len));
        Key {
            low: kept as u64,
            high: (kept >> 64) as u64 | (len as u64) << 56,
        }
    }

    #[inline(always)]
    pub fn hash(self) -> u64 {
        let [a, b] = *SEEDS;
        fold(self.low ^ a, self.high ^ b)
    }

    fn is_long(self) -> bool {
        self.high >= LONG
    }
}

/// High and low half of the 128-bit product, mixed (the step of wyhash).
#[inline(always)]
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product as u64 ^ (product >> 64) as u64
}

/// Hash of a word of any length.
pub fn hash_bytes(word: &[u8]) -> u64 {
    let [a, b] = *SEEDS;
    let mut state = word.len() as u64 ^ a;
    let blocks = word.chunks_exact(8);
    let rest = blocks.remainder();
    for block in blocks {
        let block = u64::from_le_bytes(block.try_into().expect("8 bytes"));
        state = fold(state ^ block, b);
    }
    let mut last = [0u8; 8];
    last[..rest.len()].copy_from_slice(rest);
    fold(state ^ u64::from_le_bytes(last), a ^ b)
}

/// [`hash_bytes`] for the maps of the standard library.
#[derive(Default)]
pub struct WordHasher(u64);

pub type WordHash = BuildHasherDefault<WordHasher>;

impl Hasher for WordHasher {
    fn write(&mut self, bytes: &[u8]) {
        self.0 ^= hash_bytes(bytes);
    }

    fn write_usize(&mut self, _: usize) {
        // The length of a slice, which `hash_bytes` sees.
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[derive(Clone, Copy)]
struct Slot {
    key: Key,
    /// 0 in a free slot.
    count: u64,
}

const FREE: Slot = Slot {
    key: Key { low: 0, high: 0 },
    count: 0,
};

/// Counts of distinct words.
pub struct WordCounts {
    slots: Vec<Slot>,
    used: usize,
    /// Words to be counted, whose slots are on their way from memory.
    noted: [(Key, u64); NOTED],
    num_noted: usize,
    arena: Vec<u8>,
    /// Where each long word lies in the arena.
    long: Vec<(usize, usize)>,
}

impl Default for WordCounts {
    fn default() -> WordCounts {
        WordCounts {
            slots: vec![FREE; INITIAL_SLOTS],
            used: 0,
            noted: [(FREE.key, 0); NOTED],
            num_noted: 0,
            arena: Vec::new(),
            long: Vec::new(),
        }
    }
}

impl WordCounts {
    /// Number of distinct words.
    pub fn len(&self) -> usize {
        self.used
    }

    pub fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// Counts `text[start..end]` `count` times more. The word and `count` are not empty.
    #[inline]
    pub fn add(&mut self, text: &[u8], start: usize, end: usize, count: u64) {
        if end - start <= MAX_INLINE {
            let key = Key::inline(text, start, end);
            self.add_key(key, key.hash(), count);
        } else {
            self.add_long(&text[start..end], count);
        }
    }

    /// Counts `text[start..end]` once more, at the latest with the next [`Self::settle`].
    #[inline(always)]
    pub fn note(&mut self, text: &[u8], start: usize, end: usize) {
        if end - start > MAX_INLINE {
            self.add_long(&text[start..end], 1);
            return;
        }
        let key = Key::inline(text, start, end);
        let hash = key.hash();
        prefetch(&self.slots, hash as usize & (self.slots.len() - 1));
        self.noted[self.num_noted] = (key, hash);
        self.num_noted += 1;
        if self.num_noted == NOTED {
            self.settle();
        }
    }

    /// Counts the words that are only noted.
    pub fn settle(&mut self) {
        let noted = self.noted;
        for &(key, hash) in &noted[..self.num_noted] {
            self.add_key(key, hash, 1);
        }
        self.num_noted = 0;
    }

    #[inline]
    fn add_key(&mut self, key: Key, hash: u64, count: u64) {
        let mask = self.slots.len() - 1;
        let mut at = hash as usize & mask;
        loop {
            let slot = &mut self.slots[at];
            if slot.key == key {
                slot.count += count;
                return;
            }
            if slot.count == 0 {
                *slot = Slot { key, count };
                self.used += 1;
                self.grow_if_full();
                return;
            }
            ops::count(1);
            at = (at + 1) & mask;
        }
    }

    fn add_long(&mut self, word: &[u8], count: u64) {
        ops::count(word.len());
        let hash = hash_bytes(word);
        let mask = self.slots.len() - 1;
        let mut at = hash as usize & mask;
        loop {
            let slot = self.slots[at];
            if slot.count == 0 {
                break;
            }
            if slot.key.is_long() && slot.key.low == hash && self.long_word(slot.key) == word {
                self.slots[at].count += count;
                return;
            }
            at = (at + 1) & mask;
        }
        let key = Key {
            low: hash,
            high: LONG | self.long.len() as u64,
        };
        self.long
            .push((self.arena.len(), self.arena.len() + word.len()));
        self.arena.extend_from_slice(word);
        self.slots[at] = Slot { key, count };
        self.used += 1;
        self.grow_if_full();
    }

    fn long_word(&self, key: Key) -> &[u8] {
        let (start, end) = self.long[(key.high & !LONG) as usize];
        &self.arena[start..end]
    }

    fn grow_if_full(&mut self) {
        if self.used * 4 < self.slots.len() * 3 {
            return;
        }
        let doubled = vec![FREE; self.slots.len() * 2];
        let old = std::mem::replace(&mut self.slots, doubled);
        let mask = self.slots.len() - 1;
        for slot in old.into_iter().filter(|slot| slot.count > 0) {
            let hash = if slot.key.is_long() {
                slot.key.low
            } else {
                slot.key.hash()
            };
            let mut at = hash as usize & mask;
            while self.slots[at].count > 0 {
                at = (at + 1) & mask;
            }
            self.slots[at] = slot;
        }
    }

    /// Adds all of `other`.
    pub fn absorb(&mut self, other: WordCounts) {
        for slot in other.slots.iter().filter(|slot| slot.count > 0) {
            if slot.key.is_long() {
                self.add_long(other.long_word(slot.key), slot.count);
            } else {
                self.add_key(slot.key, slot.key.hash(), slot.count);
            }
        }
    }

    /// Calls `visit(word, count)` for every distinct word, in no particular order.
    pub fn for_each(&self, mut visit: impl FnMut(&[u8], u64)) {
        for slot in self.slots.iter().filter(|slot| slot.count > 0) {
            if slot.key.is_long() {
                visit(self.long_word(slot.key), slot.count);
            } else {
                let mut bytes = [0u8; 16];
                bytes[..8].copy_from_slice(&slot.key.low.to_le_bytes());
                bytes[8..].copy_from_slice(&slot.key.high.to_le_bytes());
                visit(&bytes[..(slot.key.high >> 56) as usize], slot.count);
            }
        }
    }
}
