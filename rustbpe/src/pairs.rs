//! The pairs of adjacent tokens that training has met: their counts, and which is the best.
//!
//! * One open-addressing table holds the counts. Nothing is ever removed from it: a pair that is
//!   merged or gone never comes back.
//! * Counts only fall, and a new pair never has a higher count than the one whose merge made it.
//!   So a queue by magnitude does: pairs of the present magnitude lie in a small heap, all
//!   others in one list per lower magnitude, where most of them stay for good. An entry with
//!   too high a count is put right when it is met.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::ops;
use crate::prefetch::prefetch;

/// Two adjacent token ids.
pub type Pair = (u32, u32);

/// A pair as one number; the order is that of the pairs.
pub fn pack((left, right): Pair) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

fn unpack(pair: u64) -> Pair {
    ((pair >> 32) as u32, pair as u32)
}

/// No token has the highest id, so this is no pair.
const FREE: u64 = u64::MAX;
const INITIAL_SLOTS: usize = 1 << 12;
/// How far ahead of its use a slot is fetched.
const AHEAD: usize = 16;

/// Packed: 20 bytes instead of 24.
#[derive(Clone, Copy)]
#[repr(C, packed(4))]
struct Slot {
    pair: u64,
    count: u64,
    number: u32,
}

const FREE_SLOT: Slot = Slot {
    pair: FREE,
    count: 0,
    number: 0,
};

/// All pairs with their counts. Each has a number, in the order of insertion.
pub struct Pairs {
    slots: Vec<Slot>,
    used: usize,
    inserted: u32,
    heap: BinaryHeap<(u64, Reverse<u64>)>,
    /// Pairs of magnitudes below that of the heap.
    waiting: Vec<Vec<u64>>,
    /// Magnitude of the heap: it holds all pairs of this one and higher.
    magnitude: usize,
}

impl Default for Pairs {
    fn default() -> Pairs {
        Pairs {
            slots: vec![FREE_SLOT; INITIAL_SLOTS],
            used: 0,
            inserted: 0,
            heap: BinaryHeap::new(),
            waiting: vec![Vec::new(); magnitude(u64::MAX) + 1],
            magnitude: magnitude(u64::MAX),
        }
    }
}

/// Four steps per power of two: of counts with the same magnitude the highest is less than
/// 1.25 times the lowest.
fn magnitude(count: u64) -> usize {
    if count < 4 {
        return count as usize;
    }
    let exponent = count.ilog2();
    4 * (exponent as usize - 1) + ((count >> (exponent - 2)) as usize & 3)
}

impl Pairs {
    /// Says that `pair` is needed soon.
    #[inline]
    pub fn expect(&self, pair: Pair) {
        prefetch(&self.slots, self.home(pack(pair)));
    }

    /// Adds a pair that is not there, with a count that is not 0. Gives its number.
    pub fn insert(&mut self, pair: Pair, count: u64) -> u32 {
        let number = self.inserted;
        self.inserted += 1;
        let pair = pack(pair);
        let slot = Slot {
            pair,
            count,
            number,
        };
        let at = self.find(pair).unwrap_or_else(|free| free);
        debug_assert!({ self.slots[at].pair } == FREE);
        self.slots[at] = slot;
        self.used += 1;
        if self.used * 4 > self.slots.len() * 3 {
            self.grow();
        }
        self.queue(pair, count);
        number
    }

    /// Takes `weight` off the count of a pair, if there is such a pair.
    pub fn subtract(&mut self, pair: Pair, weight: u64) {
        if let Ok(at) = self.find(pack(pair)) {
            self.slots[at].count -= weight;
        }
    }

    /// Takes the pair with the highest count, of equals the smallest. With its number.
    pub fn pop(&mut self) -> Option<(Pair, u32)> {
        loop {
            let Some((count, Reverse(pair))) = self.heap.pop() else {
                self.lower_magnitude()?;
                continue;
            };
            ops::count(1);
            let at = self.find(pair).expect("queued pairs are in the table");
            let slot = &mut self.slots[at];
            if slot.count == count {
                slot.count = 0;
                return Some((unpack(pair), slot.number));
            }
            let count = slot.count;
            self.queue(pair, count);
        }
    }

    fn queue(&mut self, pair: u64, count: u64) {
        let magnitude = magnitude(count);
        if magnitude >= self.magnitude {
            self.heap.push((count, Reverse(pair)));
        } else if count > 0 {
            self.waiting[magnitude].push(pair);
        }
    }

    /// Fills the empty heap from the highest list that has pairs. None if there are none.
    fn lower_magnitude(&mut self) -> Option<()> {
        self.magnitude = self.waiting.iter().rposition(|list| !list.is_empty())?;
        let list = std::mem::take(&mut self.waiting[self.magnitude]);
        ops::count(list.len());
        for (i, &pair) in list.iter().enumerate() {
            if let Some(&later) = list.get(i + AHEAD) {
                prefetch(&self.slots, self.home(later));
            }
            let at = self.find(pair).expect("queued pairs are in the table");
            self.queue(pair, self.slots[at].count);
        }
        Some(())
    }

    #[inline]
    fn home(&self, pair: u64) -> usize {
        let product = u128::from(pair ^ 0x9e37_79b9_7f4a_7c15) * 0xd6e8_feb8_6659_fd93_u128;
        (product as u64 ^ (product >> 64) as u64) as usize & (self.slots.len() - 1)
    }

    /// The slot of a pair, or else the free one where it would go.
    #[inline]
    fn find(&self, pair: u64) -> Result<usize, usize> {
        let mut at = self.home(pair);
        loop {
            let found = self.slots[at].pair;
            if found == pair {
                return Ok(at);
            }
            if found == FREE {
                return Err(at);
            }
            at = (at + 1) & (self.slots.len() - 1);
        }
    }

    fn grow(&mut self) {
        let doubled = vec![FREE_SLOT; self.slots.len() * 2];
        let old = std::mem::replace(&mut self.slots, doubled);
        for slot in old.into_iter().filter(|slot| slot.pair != FREE) {
            let at = self.find(slot.pair).unwrap_or_else(|free| free);
            self.slots[at] = slot;
        }
    }
}
