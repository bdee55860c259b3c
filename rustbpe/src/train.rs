//! The merge loop of byte pair encoding.
//!
//! Each step merges the pair of adjacent tokens with the highest count (weighted by how often
//! its word occurs; of equal counts the pair with the smallest ids), left to right within each
//! word, until enough merges are made or no pair is left. This is exactly the published rustbpe.
//!
//! * All distinct words lie in one flat array of cells with walls between them. A token carries
//!   its id in its first and its last cell, so both neighbours of a merge are found by looking.
//! * A pair comes into being in one step only, the one that makes its younger token; later its
//!   count only falls. So its positions are a list written once, ascending, and a heap entry
//!   with too high a count is corrected when it reaches the top.
//! * Changes of a step are summed per neighbour in arrays indexed by token id; the table of
//!   pairs is touched once per distinct neighbour, not once per occurrence.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Range;

use crate::control::Control;
use crate::words::WordCounts;

/// Two adjacent token ids.
pub type Pair = (u32, u32);

/// Number of single-byte tokens; the first merge makes this id.
pub const NUM_BYTES: u32 = 256;

const WALL: u32 = u32::MAX;
const HOLE: u32 = u32::MAX - 1;

/// Why there are no merges.
#[derive(Debug, PartialEq, Eq)]
pub enum TrainError {
    VocabTooSmall(u32),
    /// The distinct words have more bytes than positions can address.
    TooManyWords(usize),
    Stopped,
}

impl fmt::Display for TrainError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TrainError::VocabTooSmall(size) => {
                write!(
                    f,
                    "vocab_size must be at least {NUM_BYTES} (one token per byte), got {size}"
                )
            }
            TrainError::TooManyWords(bytes) => write!(
                f,
                "the distinct words of the corpus have {bytes} bytes, more than the 4 GiB that \
                 training can hold: train on less text or split it into smaller pieces"
            ),
            TrainError::Stopped => f.write_str("stopped"),
        }
    }
}

impl std::error::Error for TrainError {}

#[derive(Clone, Copy)]
struct Cell {
    id: u32,
    /// How often the word occurs.
    weight: u32,
}

struct PairInfo {
    pair: Pair,
    count: u64,
    /// Where the left tokens start, as a range of the pool.
    positions: Range<usize>,
}

/// What one step changes at the pairs with one neighbour.
#[derive(Clone, Copy, Default)]
struct Change {
    weight: u64,
    occurrences: usize,
    /// Where the next position of the new pair goes in the pool.
    cursor: usize,
}

/// The changes of one step on one side of the new token, by neighbour.
struct Side {
    changes: Vec<Change>,
    touched: Vec<u32>,
}

impl Side {
    fn new(vocab_size: usize) -> Side {
        Side {
            changes: vec![Change::default(); vocab_size],
            touched: Vec::new(),
        }
    }

    fn add(&mut self, neighbour: u32, weight: u32) {
        let change = &mut self.changes[neighbour as usize];
        if change.occurrences == 0 {
            self.touched.push(neighbour);
        }
        change.weight += u64::from(weight);
        change.occurrences += 1;
    }

    fn clear(&mut self) {
        for neighbour in self.touched.drain(..) {
            self.changes[neighbour as usize] = Change::default();
        }
    }
}

#[derive(Default)]
struct PairHasher(u64);

impl Hasher for PairHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _: &[u8]) {
        unreachable!("pairs are hashed as one u64");
    }
    fn write_u64(&mut self, pair: u64) {
        let product = u128::from(pair ^ 0x9e37_79b9_7f4a_7c15) * 0xd6e8_feb8_6659_fd93_u128;
        self.0 = product as u64 ^ (product >> 64) as u64;
    }
}

type PairIndex = HashMap<u64, u32, BuildHasherDefault<PairHasher>>;

fn pack((left, right): Pair) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

/// Learns up to `vocab_size - 256` merges; merge i makes token 256 + i. Fewer when no pair is
/// left.
pub fn train(
    words: WordCounts,
    vocab_size: u32,
    control: &Control,
) -> Result<Vec<Pair>, TrainError> {
    if vocab_size < NUM_BYTES {
        return Err(TrainError::VocabTooSmall(vocab_size));
    }
    let mut trainer = Trainer::new(lay_out(words)?, vocab_size as usize);
    let mut merges = Vec::new();
    while merges.len() < (vocab_size - NUM_BYTES) as usize {
        if control.is_stopped() {
            return Err(TrainError::Stopped);
        }
        let Some(pair) = trainer.step(NUM_BYTES + merges.len() as u32) else {
            break;
        };
        merges.push(pair);
        control
            .merges
            .store(merges.len() as u64, std::sync::atomic::Ordering::Relaxed);
    }
    Ok(merges)
}

/// The words as cells, with a wall before, between and after them. A count beyond 32 bits is
/// split over several copies of its word. Words of one byte have no pair and are left out.
fn lay_out(words: WordCounts) -> Result<Vec<Cell>, TrainError> {
    let wall = Cell {
        id: WALL,
        weight: 0,
    };
    let mut size = 1;
    words.for_each(|word, _| size += if word.len() > 1 { word.len() + 1 } else { 0 });
    if size >= HOLE as usize {
        return Err(TrainError::TooManyWords(size));
    }
    let mut cells = Vec::with_capacity(size);
    cells.push(wall);
    words.for_each(|word, mut count| {
        if word.len() < 2 {
            return;
        }
        while count > 0 {
            let weight = u32::try_from(count).unwrap_or(u32::MAX);
            count -= u64::from(weight);
            cells.extend(word.iter().map(|&byte| Cell {
                id: u32::from(byte),
                weight,
            }));
            cells.push(wall);
        }
    });
    Ok(cells)
}

struct Trainer {
    cells: Vec<Cell>,
    /// Length in bytes of every token so far.
    token_len: Vec<u32>,
    pairs: Vec<PairInfo>,
    index: PairIndex,
    heap: BinaryHeap<(u64, Reverse<Pair>, u32)>,
    pool: Vec<u32>,
    left: Side,
    right: Side,
    /// Where this step's new tokens start.
    merged: Vec<u32>,
}

impl Trainer {
    fn new(cells: Vec<Cell>, vocab_size: usize) -> Trainer {
        let mut trainer = Trainer {
            cells,
            token_len: vec![1; NUM_BYTES as usize],
            pairs: Vec::new(),
            index: PairIndex::default(),
            heap: BinaryHeap::new(),
            pool: Vec::new(),
            left: Side::new(vocab_size),
            right: Side::new(vocab_size),
            merged: Vec::new(),
        };
        trainer.find_byte_pairs();
        trainer
    }

    /// All pairs of the untouched words.
    fn find_byte_pairs(&mut self) {
        let mut table = vec![Change::default(); 1 << 16];
        let slot = |left: Cell, right: Cell| {
            (left.id < NUM_BYTES && right.id < NUM_BYTES)
                .then_some((left.id << 8 | right.id) as usize)
        };
        for two in self.cells.windows(2) {
            if let Some(i) = slot(two[0], two[1]) {
                table[i].weight += u64::from(two[0].weight);
                table[i].occurrences += 1;
            }
        }
        for (i, change) in table
            .iter_mut()
            .enumerate()
            .filter(|(_, c)| c.occurrences > 0)
        {
            change.cursor = self.insert((i as u32 >> 8, i as u32 & 0xff), *change);
        }
        for at in 0..self.cells.len() - 1 {
            if let Some(i) = slot(self.cells[at], self.cells[at + 1]) {
                self.pool[table[i].cursor] = at as u32;
                table[i].cursor += 1;
            }
        }
    }

    /// Registers a new pair, and reserves room for its positions. Gives where that starts.
    fn insert(&mut self, pair: Pair, change: Change) -> usize {
        let start = self.pool.len();
        let end = start + change.occurrences;
        self.pool.resize(end, 0);
        let number = self.pairs.len() as u32;
        self.pairs.push(PairInfo {
            pair,
            count: change.weight,
            positions: start..end,
        });
        self.index.insert(pack(pair), number);
        self.heap.push((change.weight, Reverse(pair), number));
        start
    }

    /// Takes the best pair and merges it into `new_id`. None if no pair is left.
    fn step(&mut self, new_id: u32) -> Option<Pair> {
        let number = self.best()?;
        let PairInfo {
            pair,
            ref positions,
            ..
        } = self.pairs[number as usize];
        let positions = positions.clone();
        self.index.remove(&pack(pair));
        self.merge(pair, new_id, positions);
        self.sum_changes(pair, new_id);
        self.add_new_pairs(pair, new_id);
        self.left.clear();
        self.right.clear();
        Some(pair)
    }

    fn best(&mut self) -> Option<u32> {
        loop {
            let (count, pair, number) = self.heap.pop()?;
            let current = self.pairs[number as usize].count;
            if current == count {
                return Some(number);
            }
            if current > 0 {
                self.heap.push((current, pair, number));
            }
        }
    }

    /// Writes `new_id` over every occurrence of `pair`; where it did goes to `merged`.
    fn merge(&mut self, (a, b): Pair, new_id: u32, positions: Range<usize>) {
        let left_len = self.token_len[a as usize] as usize;
        let len = left_len + self.token_len[b as usize] as usize;
        self.token_len.push(len as u32);
        self.merged.clear();
        for &position in &self.pool[positions] {
            let at = position as usize;
            // A position is out of date when its token has become part of a longer one. Tokens
            // only grow, and one that starts at `at` with `a`'s length cannot end there, so
            // the id alone tells.
            if self.cells[at].id != a || self.cells[at + left_len].id != b {
                continue;
            }
            self.cells[at + left_len].id = HOLE;
            self.cells[at].id = new_id;
            self.cells[at + len - 1].id = new_id;
            self.merged.push(position);
        }
    }

    /// Adds up, per neighbour of the tokens just made, how the pairs with it change.
    fn sum_changes(&mut self, (a, b): Pair, new_id: u32) {
        let len = self.token_len[new_id as usize] as usize;
        let mut between = 0;
        for &position in &self.merged {
            let at = position as usize;
            let weight = self.cells[at].weight;
            let left = self.cells[at - 1].id;
            if left != WALL {
                self.left.add(left, weight);
            }
            if left == new_id {
                between += u64::from(weight);
            }
            // Between two new tokens there is one pair: the right one's left one.
            let right = self.cells[at + len].id;
            if right != WALL && right != new_id {
                self.right.add(right, weight);
            }
        }
        self.subtract((b, a), between);
    }

    fn subtract(&mut self, pair: Pair, weight: u64) {
        if let Some(&number) = self.index.get(&pack(pair)) {
            self.pairs[number as usize].count -= weight;
        }
    }

    /// Replaces the pairs of the merged tokens' neighbours by those of the new token.
    fn add_new_pairs(&mut self, (a, b): Pair, new_id: u32) {
        for i in 0..self.left.touched.len() {
            let neighbour = self.left.touched[i];
            let change = self.left.changes[neighbour as usize];
            if neighbour != new_id {
                self.subtract((neighbour, a), change.weight);
            }
            let start = self.insert((neighbour, new_id), change);
            self.left.changes[neighbour as usize].cursor = start;
        }
        for i in 0..self.right.touched.len() {
            let neighbour = self.right.touched[i];
            let change = self.right.changes[neighbour as usize];
            self.subtract((b, neighbour), change.weight);
            let start = self.insert((new_id, neighbour), change);
            self.right.changes[neighbour as usize].cursor = start;
        }
        let len = self.token_len[new_id as usize];
        for &at in &self.merged {
            let left = self.cells[at as usize - 1].id;
            if left != WALL {
                let cursor = &mut self.left.changes[left as usize].cursor;
                self.pool[*cursor] = at - self.token_len[left as usize];
                *cursor += 1;
            }
            let right = self.cells[(at + len) as usize].id;
            if right != WALL && right != new_id {
                let cursor = &mut self.right.changes[right as usize].cursor;
                self.pool[*cursor] = at;
                *cursor += 1;
            }
        }
    }
}
