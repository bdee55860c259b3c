//! The merge loop of byte pair encoding.
//!
//! Each step merges the pair of adjacent tokens with the highest count (weighted by how often
//! its word occurs; of equal counts the pair with the smallest ids), left to right within each
//! word, until enough merges are made or no pair is left. This is exactly the published rustbpe.
//!
//! * All distinct words lie in one flat array of cells with walls between them. A token carries
//!   its id in its first and its last cell, so both neighbours of a merge are found by looking.
//! * A pair comes into being in one step only, the one that makes its younger token. So its
//!   positions are a list written once, ascending.
//! * Changes of a step are summed per neighbour; the table of pairs is touched once per distinct
//!   neighbour, not once per occurrence.
//! * What is slow is waiting for memory, so what is needed soon is asked for ahead.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::Ordering;

use crate::control::Control;
use crate::ops;
pub use crate::pairs::Pair;
use crate::pairs::Pairs;
use crate::prefetch::prefetch;
use crate::words::WordCounts;

/// Number of single-byte tokens; the first merge makes this id.
pub const NUM_BYTES: u32 = 256;

const WALL: u32 = u32::MAX;
const HOLE: u32 = u32::MAX - 1;
/// How many occurrences ahead of a merge its cells are fetched.
const AHEAD: usize = 24;
/// Says that there is no neighbour.
const NONE: u32 = u32::MAX;

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

/// What one step changes at the pairs with one neighbour.
#[derive(Clone, Copy)]
struct Change {
    neighbour: u32,
    weight: u64,
    occurrences: usize,
    /// Where the next position of the new pair goes in the pool.
    cursor: usize,
}

/// The changes of one step on one side of the new token.
struct Side {
    changes: Vec<Change>,
    /// Where each neighbour's change is; [`NONE`] for other tokens.
    change_of: Vec<u32>,
}

impl Side {
    fn new() -> Side {
        Side {
            changes: Vec::new(),
            change_of: vec![NONE; NUM_BYTES as usize],
        }
    }

    /// Adds an occurrence, and gives the index of its change.
    #[inline]
    fn add(&mut self, neighbour: u32, weight: u32) -> u32 {
        let index = &mut self.change_of[neighbour as usize];
        if *index == NONE {
            *index = self.changes.len() as u32;
            self.changes.push(Change {
                neighbour,
                weight: 0,
                occurrences: 0,
                cursor: 0,
            });
        }
        let change = &mut self.changes[*index as usize];
        change.weight += u64::from(weight);
        change.occurrences += 1;
        *index
    }

    fn clear(&mut self) {
        for change in self.changes.drain(..) {
            self.change_of[change.neighbour as usize] = NONE;
        }
    }
}

/// Where a new token starts, and the indices of the changes that its neighbours make.
#[derive(Clone, Copy)]
struct Merged {
    at: u32,
    left: u32,
    right: u32,
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
    let mut trainer = Trainer::new(lay_out(words)?);
    let mut merges = Vec::new();
    while merges.len() < (vocab_size - NUM_BYTES) as usize {
        if control.is_stopped() {
            return Err(TrainError::Stopped);
        }
        let Some(pair) = trainer.step(NUM_BYTES + merges.len() as u32) else {
            break;
        };
        merges.push(pair);
        control.merges.store(merges.len() as u64, Ordering::Relaxed);
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
    pairs: Pairs,
    /// Where the left tokens of each pair start: pair n has `lens[n]` from `pool[starts[n]]` on.
    pool: Vec<u32>,
    starts: Vec<usize>,
    lens: Vec<u32>,
    /// A part of the pool that is no longer needed.
    room: Range<usize>,
    left: Side,
    right: Side,
    /// This step's new tokens.
    merged: Vec<Merged>,
}

impl Trainer {
    fn new(cells: Vec<Cell>) -> Trainer {
        let mut trainer = Trainer {
            cells,
            token_len: vec![1; NUM_BYTES as usize],
            pairs: Pairs::default(),
            pool: Vec::new(),
            starts: Vec::new(),
            lens: Vec::new(),
            room: 0..0,
            left: Side::new(),
            right: Side::new(),
            merged: Vec::new(),
        };
        trainer.find_byte_pairs();
        trainer
    }

    /// All pairs of the untouched words.
    fn find_byte_pairs(&mut self) {
        ops::count(2 * self.cells.len());
        let mut weights = vec![0u64; 1 << 16];
        let mut cursors = vec![0usize; 1 << 16];
        let slot = |left: Cell, right: Cell| {
            (left.id < NUM_BYTES && right.id < NUM_BYTES)
                .then_some((left.id << 8 | right.id) as usize)
        };
        for two in self.cells.windows(2) {
            if let Some(i) = slot(two[0], two[1]) {
                weights[i] += u64::from(two[0].weight);
                cursors[i] += 1;
            }
        }
        for (i, cursor) in cursors.iter_mut().enumerate().filter(|(_, n)| **n > 0) {
            *cursor = self.insert((i as u32 >> 8, i as u32 & 0xff), weights[i], *cursor);
        }
        for (at, two) in self.cells.windows(2).enumerate() {
            if let Some(i) = slot(two[0], two[1]) {
                self.pool[cursors[i]] = at as u32;
                cursors[i] += 1;
            }
        }
    }

    /// Registers a new pair, and reserves room for its positions. Gives where that starts.
    fn insert(&mut self, pair: Pair, weight: u64, occurrences: usize) -> usize {
        let number = self.pairs.insert(pair, weight);
        debug_assert_eq!(number as usize, self.starts.len());
        let start;
        if occurrences <= self.room.len() {
            start = self.room.start;
            self.room.start += occurrences;
        } else {
            start = self.pool.len();
            self.pool.resize(start + occurrences, 0);
        }
        self.starts.push(start);
        self.lens.push(occurrences as u32);
        start
    }

    /// Takes the best pair and merges it into `new_id`. None if no pair is left.
    fn step(&mut self, new_id: u32) -> Option<Pair> {
        let (pair, number) = self.pairs.pop()?;
        let start = self.starts[number as usize];
        let positions = start..start + self.lens[number as usize] as usize;
        ops::count(positions.len());
        self.left.change_of.push(NONE);
        self.right.change_of.push(NONE);
        self.merge(pair, new_id, positions.clone());
        self.room = positions;
        self.replace_pairs(pair, new_id);
        self.place_new_pairs();
        self.left.clear();
        self.right.clear();
        Some(pair)
    }

    /// Writes `new_id` over every occurrence of `pair`, and adds up how the pairs change.
    fn merge(&mut self, (a, b): Pair, new_id: u32, positions: Range<usize>) {
        let left_len = self.token_len[a as usize] as usize;
        let len = left_len + self.token_len[b as usize] as usize;
        self.token_len.push(len as u32);
        self.merged.clear();
        let mut between = 0;
        let positions = &self.pool[positions];
        for (i, &position) in positions.iter().enumerate() {
            if let Some(&later) = positions.get(i + AHEAD) {
                prefetch(&self.cells, later as usize);
            }
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
            let weight = self.cells[at].weight;
            let mut merged = Merged {
                at: position,
                left: NONE,
                right: NONE,
            };
            let left = self.cells[at - 1].id;
            if left != WALL {
                merged.left = self.left.add(left, weight);
                if left == new_id {
                    between += u64::from(weight);
                }
            }
            let right = self.cells[at + len].id;
            // Between two new tokens there is one pair: the right one's left one.
            let merges_next = right == a && self.cells[at + len + left_len].id == b;
            if right != WALL && !merges_next {
                merged.right = self.right.add(right, weight);
            }
            self.merged.push(merged);
        }
        if a != b && between > 0 {
            self.pairs.subtract((b, a), between);
        }
    }

    /// Takes the pairs of the merged tokens with their neighbours off the counts, and adds those
    /// of the new token.
    fn replace_pairs(&mut self, (a, b): Pair, new_id: u32) {
        for &Change { neighbour, .. } in &self.left.changes {
            self.pairs.expect((neighbour, a));
            self.pairs.expect((neighbour, new_id));
        }
        for i in 0..self.left.changes.len() {
            let Change {
                neighbour,
                weight,
                occurrences,
                ..
            } = self.left.changes[i];
            // The pair of two equal tokens may be its own neighbour, and is merged already.
            if neighbour != new_id && (neighbour, a) != (a, b) {
                self.pairs.subtract((neighbour, a), weight);
            }
            self.left.changes[i].cursor = self.insert((neighbour, new_id), weight, occurrences);
        }
        for &Change { neighbour, .. } in &self.right.changes {
            self.pairs.expect((b, neighbour));
            self.pairs.expect((new_id, neighbour));
        }
        for i in 0..self.right.changes.len() {
            let Change {
                neighbour,
                weight,
                occurrences,
                ..
            } = self.right.changes[i];
            if (b, neighbour) != (a, b) {
                self.pairs.subtract((b, neighbour), weight);
            }
            self.right.changes[i].cursor = self.insert((new_id, neighbour), weight, occurrences);
        }
    }

    /// Notes where the new pairs are.
    fn place_new_pairs(&mut self) {
        for &Merged { at, left, right } in &self.merged {
            if left != NONE {
                let change = &mut self.left.changes[left as usize];
                self.pool[change.cursor] = at - self.token_len[change.neighbour as usize];
                change.cursor += 1;
            }
            if right != NONE {
                let change = &mut self.right.changes[right as usize];
                self.pool[change.cursor] = at;
                change.cursor += 1;
            }
        }
    }
}
