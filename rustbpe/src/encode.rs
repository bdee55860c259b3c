//! Text to token ids.
//!
//! * A piece becomes tokens by merging the adjacent pair whose merge came first, the leftmost
//!   of equals, until none is left. For vocabularies that training made this gives the ids of
//!   tiktoken, which compares joined bytes instead of pairs (the argument is in the README).
//! * Pieces of up to 15 bytes go through a cache; pieces of up to [`SHORT`] bytes are merged in
//!   place, longer ones rank by rank, which takes n log n steps for n bytes.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::ops;
use crate::pattern::{Pattern, PatternError};
use crate::prefetch::prefetch;
use crate::train::{NUM_BYTES, Pair};
use crate::vocab::Vocab;
use crate::words::{Key, MAX_INLINE, WordHash};

/// The longest piece that is merged in place: above, its quadratic time is longer.
const SHORT: usize = 192;
/// Ranks that are compared side by side.
const LANES: usize = 4;
const CACHE_SETS: usize = 1 << 15;
/// Pieces that are looked up together.
const WAITING: usize = 32;
/// Tokens that fit into a cache slot.
const CACHED_TOKENS: usize = 3;
const NO_MERGE: u32 = u32::MAX;
const WALL: u32 = u32::MAX;
const HOLE: u32 = u32::MAX - 1;

/// Which token a pair merges into: open addressing, at most half full.
struct MergeTable {
    slots: Vec<(Pair, u32)>,
    /// The same for two single bytes, without a search.
    of_bytes: Vec<u32>,
}

impl MergeTable {
    fn new(merges: &[Pair]) -> MergeTable {
        let size = (merges.len() * 2).next_power_of_two().max(2);
        let mut table = MergeTable {
            slots: vec![((0, 0), NO_MERGE); size],
            of_bytes: vec![NO_MERGE; 1 << 16],
        };
        for (id, &pair) in (NUM_BYTES..).zip(merges) {
            let mut at = table.home(pair);
            while table.slots[at].1 != NO_MERGE {
                at = (at + 1) & (size - 1);
            }
            table.slots[at] = (pair, id);
            if let (left @ 0..NUM_BYTES, right @ 0..NUM_BYTES) = pair {
                table.of_bytes[(left << 8 | right) as usize] = id;
            }
        }
        table
    }

    #[inline]
    fn get_bytes(&self, left: u8, right: u8) -> u32 {
        self.of_bytes[usize::from(left) << 8 | usize::from(right)]
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

/// What a piece becomes. An unused slot has the key of no piece.
#[derive(Clone, Copy)]
struct CacheSlot {
    key: Key,
    ids: [u32; CACHED_TOKENS],
    len: u32,
}

/// Two slots on one cache line, the one used last first.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct CacheSet([CacheSlot; 2]);

/// A piece that waits for its set to arrive from memory.
#[derive(Clone, Copy)]
struct Waiting {
    key: Key,
    set: usize,
    start: usize,
    end: usize,
}

/// What one thread needs to encode.
struct Scratch {
    cache: Vec<CacheSet>,
    waiting: [Waiting; WAITING],
    num_waiting: usize,
}

impl Scratch {
    /// The cache knows these pieces from the start.
    fn new(tokens: &[(Key, u32)]) -> Scratch {
        let key = Key { low: 0, high: 0 };
        let empty = CacheSlot {
            key,
            ids: [0; CACHED_TOKENS],
            len: 0,
        };
        let nothing = Waiting {
            key,
            set: 0,
            start: 0,
            end: 0,
        };
        let mut scratch = Scratch {
            cache: vec![CacheSet([empty; 2]); CACHE_SETS],
            waiting: [nothing; WAITING],
            num_waiting: 0,
        };
        // The first tokens are the most frequent: they go in last.
        for &(key, id) in tokens.iter().rev() {
            scratch.keep(set_of(key), key, &[id]);
        }
        scratch
    }

    /// Keeps what a piece became, if it fits, instead of the one of its set not used for longest.
    fn keep(&mut self, set: usize, key: Key, made: &[u32]) {
        if made.len() > CACHED_TOKENS {
            return;
        }
        let mut ids = [0; CACHED_TOKENS];
        ids[..made.len()].copy_from_slice(made);
        let CacheSet(slots) = &mut self.cache[set];
        slots[1] = slots[0];
        slots[0] = CacheSlot {
            key,
            ids,
            len: made.len() as u32,
        };
    }
}

fn set_of(key: Key) -> usize {
    key.hash() as usize & (CACHE_SETS - 1)
}

/// The lowest of some ranks, a multiple of [`LANES`].
#[inline]
fn lowest(ranks: &[u64]) -> u64 {
    let mut lanes = [u64::MAX; LANES];
    for chunk in ranks.chunks_exact(LANES) {
        for (lane, &rank) in lanes.iter_mut().zip(chunk) {
            *lane = rank.min(*lane);
        }
    }
    lanes.into_iter().min().expect("there are lanes")
}

/// The pieces of up to [`SHORT`] bytes that become one token.
#[derive(Default)]
struct Whole {
    short: Vec<(Key, u32)>,
    /// Those too long for the cache.
    long: HashMap<Box<[u8]>, u32, WordHash>,
}

/// A vocabulary and a split pattern, ready to encode. Shared by any number of threads.
pub struct Encoder {
    pattern: Pattern,
    vocab: Vocab,
    merges: MergeTable,
    token_len: Vec<u32>,
    whole: OnceLock<Whole>,
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
            whole: OnceLock::new(),
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
        let (pattern, mut scratch) =
            idle.unwrap_or_else(|| (self.pattern.clone(), Scratch::new(&self.whole().short)));
        let result = parts.into_iter().try_for_each(|(text, prefix)| {
            out.extend(prefix);
            let bytes = text.as_bytes();
            // A pattern that gave up on the text before may have left some.
            scratch.num_waiting = 0;
            pattern.for_each_piece(text, |start, end| {
                let key = match end - start {
                    1..=MAX_INLINE => Key::inline(bytes, start, end),
                    _ => Key { low: 0, high: 0 },
                };
                let set = set_of(key);
                prefetch(&scratch.cache, set);
                scratch.waiting[scratch.num_waiting] = Waiting {
                    key,
                    set,
                    start,
                    end,
                };
                scratch.num_waiting += 1;
                if scratch.num_waiting == WAITING {
                    self.flush(bytes, &mut scratch, out);
                }
            })?;
            self.flush(bytes, &mut scratch, out);
            after(out);
            Ok(())
        });
        self.idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((pattern, scratch));
        result
    }

    /// Found by merging, since merges that no training made may never make a token.
    fn whole(&self) -> &Whole {
        self.whole.get_or_init(|| {
            let mut whole = Whole::default();
            let mut made = Vec::new();
            for id in 0..self.vocab.size() {
                let token = self.vocab.token(id).expect("ids below the size are tokens");
                if token.len() > SHORT {
                    continue;
                }
                made.clear();
                self.merge(token, &mut made);
                if made != [id] {
                    continue;
                }
                if token.len() <= MAX_INLINE {
                    let key = Key::inline(token, 0, token.len());
                    whole.short.push((key, id));
                } else {
                    whole.long.insert(token.into(), id);
                }
            }
            whole
        })
    }

    /// Appends the ids of the pieces that wait.
    fn flush(&self, text: &[u8], scratch: &mut Scratch, out: &mut Vec<u32>) {
        let whole = self.whole();
        for i in 0..scratch.num_waiting {
            let Waiting {
                key,
                set,
                start,
                end,
            } = scratch.waiting[i];
            let piece = &text[start..end];
            if piece.len() > SHORT {
                self.merge_long(piece, out);
                continue;
            }
            if piece.len() > MAX_INLINE {
                match whole.long.get(piece) {
                    Some(&id) => out.push(id),
                    None => self.merge(piece, out),
                }
                continue;
            }
            let CacheSet(slots) = &mut scratch.cache[set];
            if slots[0].key != key {
                if slots[1].key != key {
                    let before = out.len();
                    self.merge(piece, out);
                    scratch.keep(set, key, &out[before..]);
                    continue;
                }
                slots.swap(0, 1);
            }
            // Three are copied whatever the length: one branch less.
            out.extend_from_slice(&slots[0].ids);
            out.truncate(out.len() - CACHED_TOKENS + slots[0].len as usize);
        }
        scratch.num_waiting = 0;
    }

    /// Merges a piece of up to [`SHORT`] bytes.
    fn merge(&self, piece: &[u8], out: &mut Vec<u32>) {
        match piece.len() {
            ..=16 => self.merge_short::<16>(piece, out),
            17..=64 => self.merge_short::<64>(piece, out),
            _ => self.merge_short::<SHORT>(piece, out),
        }
    }

    /// Merges the lowest-ranked pair of a piece of up to N bytes until there is none.
    fn merge_short<const N: usize>(&self, piece: &[u8], out: &mut Vec<u32>) {
        let len = piece.len();
        let mut ids = [0; N];
        // Token i ends where the next one starts; the rank of its pair with that one, and i.
        let (mut next, mut before) = ([0u8; N], [0u8; N]);
        let mut ranks = [u64::MAX; N];
        let ranked = |rank: u32, at: usize| u64::from(rank) << 8 | at as u64;
        for at in 0..len {
            ids[at] = u32::from(piece[at]);
            next[at] = at as u8 + 1;
            before[at] = (at as u8).wrapping_sub(1);
        }
        for at in 0..len - 1 {
            ranks[at] = ranked(self.merges.get_bytes(piece[at], piece[at + 1]), at);
        }
        loop {
            ops::count(len);
            let best = lowest(&ranks[..len.next_multiple_of(LANES)]);
            let (id, at) = ((best >> 8) as u32, best as usize & 0xff);
            if id == NO_MERGE {
                break;
            }
            let gone = next[at] as usize;
            ids[at] = id;
            ranks[gone] = u64::MAX;
            let after = next[gone] as usize;
            next[at] = after as u8;
            ranks[at] = if after < len {
                before[after] = at as u8;
                ranked(self.merges.get((id, ids[after])), at)
            } else {
                u64::MAX
            };
            if at > 0 {
                let left = before[at] as usize;
                ranks[left] = ranked(self.merges.get((ids[left], id)), left);
            }
        }
        let mut at = 0;
        while at < len {
            out.push(ids[at]);
            at = next[at] as usize;
        }
    }

    /// The same for long pieces. A merge only makes pairs of higher rank than its own, so all
    /// places of one rank can be done together, from left to right, in ascending rank.
    fn merge_long(&self, piece: &[u8], out: &mut Vec<u32>) {
        // A token's id stands in its first and in its last cell, with a wall at either end.
        let mut cells: Vec<u32> = Vec::with_capacity(piece.len() + 2);
        cells.push(WALL);
        cells.extend(piece.iter().map(|&byte| u32::from(byte)));
        cells.push(WALL);
        ops::count(piece.len());
        let mut places: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
        let note = |places: &mut BTreeMap<u32, Vec<usize>>, pair: Pair, at: usize| {
            ops::count(1);
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
    }
}
