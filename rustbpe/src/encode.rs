//! Text to token ids.
//!
//! * A piece becomes tokens by merging the adjacent pair whose merge came first, the leftmost
//!   of equals, until none is left. For vocabularies that training made this gives the ids of
//!   tiktoken, which compares joined bytes instead of pairs (the argument is in the README).
//! * Pieces of up to 15 bytes go through a cache in the size of a CPU's second-level cache;
//!   pieces up to [`SHORT`] bytes are merged in place, longer ones rank by rank, which takes
//!   n log n steps for n bytes.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use crate::pattern::{Pattern, PatternError};
use crate::train::{NUM_BYTES, Pair};
use crate::vocab::Vocab;
use crate::words::{Key, MAX_INLINE};

/// Longest piece for which the quadratic merge is the fast one.
const SHORT: usize = 64;
const CACHE_SLOTS: usize = 1 << 15;
/// Tokens that fit into a cache slot.
const CACHED_TOKENS: usize = 3;
const NO_MERGE: u32 = u32::MAX;
const WALL: u32 = u32::MAX;
const HOLE: u32 = u32::MAX - 1;

/// Which token a pair merges into: open addressing, at most half full.
struct MergeTable {
    slots: Vec<(Pair, u32)>,
}

impl MergeTable {
    fn new(merges: &[Pair]) -> MergeTable {
        let size = (merges.len() * 2).next_power_of_two().max(2);
        let mut table = MergeTable {
            slots: vec![((0, 0), NO_MERGE); size],
        };
        for (id, &pair) in (NUM_BYTES..).zip(merges) {
            let mut at = table.home(pair);
            while table.slots[at].1 != NO_MERGE {
                at = (at + 1) & (size - 1);
            }
            table.slots[at] = (pair, id);
        }
        table
    }

    fn home(&self, (left, right): Pair) -> usize {
        let mixed = (u64::from(left) << 32 | u64::from(right)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed >> 32) as usize & (self.slots.len() - 1)
    }

    /// The token that `pair` merges into, or [`NO_MERGE`].
    #[inline]
    fn get(&self, pair: Pair) -> u32 {
        let mut at = self.home(pair);
        loop {
            let (found, id) = self.slots[at];
            if found == pair || id == NO_MERGE {
                return id;
            }
            at = (at + 1) & (self.slots.len() - 1);
        }
    }
}

#[derive(Clone, Copy)]
struct CacheSlot {
    key: Key,
    ids: [u32; CACHED_TOKENS],
    len: u32,
}

/// What one thread needs to encode.
struct Scratch {
    cache: Vec<CacheSlot>,
    ids: Vec<u32>,
    ranks: Vec<u32>,
}

impl Scratch {
    fn new() -> Scratch {
        let empty = CacheSlot {
            key: Key { low: 0, high: 0 },
            ids: [0; CACHED_TOKENS],
            len: 0,
        };
        Scratch {
            cache: vec![empty; CACHE_SLOTS],
            ids: Vec::new(),
            ranks: Vec::new(),
        }
    }
}

/// A vocabulary and a split pattern, ready to encode. Shared by any number of threads.
pub struct Encoder {
    pattern: Pattern,
    vocab: Vocab,
    merges: MergeTable,
    token_len: Vec<u32>,
    /// Scratch space of threads that are not encoding, to be taken by the next.
    idle: Mutex<Vec<(Pattern, Scratch)>>,
}

impl Encoder {
    pub fn new(pattern: Pattern, vocab: Vocab) -> Encoder {
        let merges = MergeTable::new(vocab.merges());
        let len = |id| vocab.token(id).map_or(0, |bytes| bytes.len() as u32);
        let token_len = (0..vocab.size()).map(len).collect();
        Encoder {
            pattern,
            vocab,
            merges,
            token_len,
            idle: Mutex::default(),
        }
    }

    pub fn pattern(&self) -> &Pattern {
        &self.pattern
    }

    pub fn vocab(&self) -> &Vocab {
        &self.vocab
    }

    /// Appends the ids of `text` to `out`.
    pub fn encode(&self, text: &str, out: &mut Vec<u32>) -> Result<(), PatternError> {
        self.encode_parts([(text, None)], out, |_| {})
    }

    /// Appends, for each part, its prefix and the ids of its text; then calls `after(out)`.
    pub(crate) fn encode_parts<'t>(
        &self,
        parts: impl IntoIterator<Item = (&'t str, Option<u32>)>,
        out: &mut Vec<u32>,
        mut after: impl FnMut(&mut Vec<u32>),
    ) -> Result<(), PatternError> {
        let idle = self
            .idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        let (pattern, mut scratch) = idle.unwrap_or_else(|| (self.pattern.clone(), Scratch::new()));
        let result = parts.into_iter().try_for_each(|(text, prefix)| {
            out.extend(prefix);
            let bytes = text.as_bytes();
            pattern.for_each_piece(text, |start, end| {
                self.encode_piece(bytes, start, end, &mut scratch, out);
            })?;
            after(out);
            Ok(())
        });
        self.idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((pattern, scratch));
        result
    }

    #[inline]
    fn encode_piece(
        &self,
        text: &[u8],
        start: usize,
        end: usize,
        scratch: &mut Scratch,
        out: &mut Vec<u32>,
    ) {
        let len = end - start;
        if len == 1 {
            out.push(u32::from(text[start]));
        } else if len <= MAX_INLINE {
            let key = Key::inline(text, start, end);
            let slot = key.hash() as usize & (CACHE_SLOTS - 1);
            let cached = &scratch.cache[slot];
            if cached.key == key {
                // Three are copied whatever the length: one branch less.
                out.extend_from_slice(&cached.ids);
                out.truncate(out.len() - CACHED_TOKENS + cached.len as usize);
                return;
            }
            let before = out.len();
            self.merge_short(&text[start..end], scratch, out);
            let made = &out[before..];
            if made.len() <= CACHED_TOKENS {
                let mut ids = [0; CACHED_TOKENS];
                ids[..made.len()].copy_from_slice(made);
                scratch.cache[slot] = CacheSlot {
                    key,
                    ids,
                    len: made.len() as u32,
                };
            }
        } else if len <= SHORT {
            self.merge_short(&text[start..end], scratch, out);
        } else {
            self.merge_long(&text[start..end], out);
        }
    }

    /// Merges the lowest-ranked pair until there is none.
    fn merge_short(&self, piece: &[u8], scratch: &mut Scratch, out: &mut Vec<u32>) {
        let Scratch { ids, ranks, .. } = scratch;
        ids.clear();
        ids.extend(piece.iter().map(|&byte| u32::from(byte)));
        ranks.clear();
        ranks.extend(ids.windows(2).map(|two| self.merges.get((two[0], two[1]))));
        while let Some((at, &rank)) = ranks.iter().enumerate().min_by_key(|&(_, rank)| rank) {
            if rank == NO_MERGE {
                break;
            }
            ids[at] = rank;
            ids.remove(at + 1);
            ranks.remove(at);
            if at > 0 {
                ranks[at - 1] = self.merges.get((ids[at - 1], rank));
            }
            if at < ranks.len() {
                ranks[at] = self.merges.get((rank, ids[at + 1]));
            }
        }
        out.extend_from_slice(ids);
    }

    /// The same for long pieces. A merge only makes pairs of higher rank than its own, so all
    /// places of one rank can be done together, from left to right, in ascending rank.
    /// Returns how many places were looked at.
    fn merge_long(&self, piece: &[u8], out: &mut Vec<u32>) -> usize {
        // A token's id stands in its first and in its last cell, with a wall at either end.
        let mut cells: Vec<u32> = Vec::with_capacity(piece.len() + 2);
        cells.push(WALL);
        cells.extend(piece.iter().map(|&byte| u32::from(byte)));
        cells.push(WALL);
        let mut places: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
        let mut looked_at = 0;
        let mut note = |places: &mut BTreeMap<u32, Vec<usize>>, pair: Pair, at: usize| {
            looked_at += 1;
            let rank = self.merges.get(pair);
            if rank != NO_MERGE {
                places.entry(rank).or_default().push(at);
            }
        };
        for at in 1..piece.len() {
            note(&mut places, (cells[at], cells[at + 1]), at);
        }
        while let Some((id, mut starts)) = places.pop_first() {
            let (a, b) = self.vocab.merges()[(id - NUM_BYTES) as usize];
            let left_len = self.token_len[a as usize] as usize;
            let len = self.token_len[id as usize] as usize;
            starts.retain(|&at| {
                let fresh = cells[at] == a && cells[at + left_len] == b;
                if fresh {
                    cells[at + left_len] = HOLE;
                    cells[at] = id;
                    cells[at + len - 1] = id;
                }
                fresh
            });
            for at in starts {
                let (left, right) = (cells[at - 1], cells[at + len]);
                if left != WALL {
                    note(
                        &mut places,
                        (left, id),
                        at - self.token_len[left as usize] as usize,
                    );
                }
                if right != WALL && right != id {
                    note(&mut places, (id, right), at);
                }
            }
        }
        let mut at = 1;
        while cells[at] != WALL {
            out.push(cells[at]);
            at += self.token_len[cells[at] as usize] as usize;
        }
        looked_at
    }
}
