//! Counting the words of a stream of texts on several threads.
//!
//! * One thread feeds batches through a bounded queue, workers count into tables of their own,
//!   the tables are added up at the end. Sums do not depend on who counted what, so the result
//!   is the same on any number of threads.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::control::Control;
use crate::pattern::{Pattern, PatternError};
use crate::words::WordCounts;

/// Bytes of text after which a batch is handed over.
pub const BATCH_BYTES: usize = 1 << 20;

/// Several texts, end to end.
#[derive(Default)]
pub struct Batch {
    text: String,
    ends: Vec<usize>,
}

impl Batch {
    /// Appends one whole text.
    pub fn push(&mut self, text: &str) {
        self.text.push_str(text);
        self.ends.push(self.text.len());
    }

    /// Number of bytes.
    pub fn size(&self) -> usize {
        self.text.len()
    }

    /// Number of texts.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Whether it is time to hand the batch over.
    pub fn is_full(&self) -> bool {
        self.size() >= BATCH_BYTES
    }

    fn texts(&self) -> impl Iterator<Item = &str> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts
            .zip(&self.ends)
            .map(|(start, &end)| &self.text[start..end])
    }
}

#[derive(Default)]
struct Queue {
    batches: VecDeque<Batch>,
    closed: bool,
    working: usize,
}

/// The feeder's end of the queue.
pub struct Feed<'a> {
    queue: Mutex<Queue>,
    changed: Condvar,
    capacity: usize,
    control: &'a Control,
}

impl Feed<'_> {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues `batch` if there is room within `patience`; else gives it back. Once the work is
    /// stopped, batches vanish.
    pub fn offer(&self, batch: Batch, patience: Duration) -> Result<(), Batch> {
        let full = |queue: &mut Queue| queue.batches.len() >= self.capacity && queue.working > 0;
        let guard = self.lock();
        let (mut queue, timeout) = self
            .changed
            .wait_timeout_while(guard, patience, full)
            .unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() && full(&mut queue) {
            return Err(batch);
        }
        queue.batches.push_back(batch);
        self.changed.notify_all();
        Ok(())
    }

    /// Queues `batch`, waiting for room.
    pub fn push(&self, batch: Batch) {
        let mut waiting = Some(batch);
        while let Some(batch) = waiting {
            waiting = self.offer(batch, Duration::from_secs(1)).err();
        }
    }

    /// Says that no more batches come, and waits up to `patience` for the workers. True when
    /// they are done.
    pub fn finish(&self, patience: Duration) -> bool {
        let mut guard = self.lock();
        guard.closed = true;
        self.changed.notify_all();
        let (queue, _) = self
            .changed
            .wait_timeout_while(guard, patience, |queue| queue.working > 0)
            .unwrap_or_else(PoisonError::into_inner);
        queue.working == 0
    }

    /// Whether the work is stopped, also by a worker that failed: nothing more need be pushed.
    pub fn is_stopped(&self) -> bool {
        self.control.is_stopped()
    }

    fn pop(&self) -> Option<Batch> {
        let waiting = |queue: &mut Queue| queue.batches.is_empty() && !queue.closed;
        let guard = self.lock();
        let mut queue = self
            .changed
            .wait_while(guard, waiting)
            .unwrap_or_else(PoisonError::into_inner);
        let batch = queue.batches.pop_front();
        self.changed.notify_all();
        batch
    }

    fn leave(&self) {
        self.lock().working -= 1;
        self.changed.notify_all();
    }
}

/// Leaves the queue also when the worker panics.
struct Worker<'a, 'b>(&'a Feed<'b>);

impl Drop for Worker<'_, '_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// Counts the words of every batch that `feeder` pushes, on `threads` workers. `feeder` runs on
/// the calling thread; when it fails the count is abandoned.
pub fn count_words<E: From<PatternError>>(
    pattern: &Pattern,
    threads: usize,
    control: &Control,
    feeder: impl FnOnce(&Feed) -> Result<(), E>,
) -> Result<WordCounts, E> {
    let feed = Feed {
        queue: Mutex::new(Queue {
            working: threads,
            ..Queue::default()
        }),
        changed: Condvar::new(),
        capacity: 2 * threads,
        control,
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                let (feed, pattern) = (&feed, pattern.clone());
                scope.spawn(move || work(feed, &pattern))
            })
            .collect();
        let fed = feeder(&feed);
        if fed.is_err() {
            control.stop();
        }
        feed.finish(Duration::ZERO);
        let mut total: Option<WordCounts> = None;
        for worker in workers {
            let counts = worker
                .join()
                .unwrap_or_else(|e| std::panic::resume_unwind(e))?;
            match &mut total {
                None => total = Some(counts),
                Some(total) => total.absorb(counts),
            }
        }
        fed.map(|()| total.unwrap_or_default())
    })
}

fn work(feed: &Feed, pattern: &Pattern) -> Result<WordCounts, PatternError> {
    let _worker = Worker(feed);
    let mut counts = WordCounts::default();
    while let Some(batch) = feed.pop() {
        for text in batch.texts() {
            if feed.control.is_stopped() {
                return Ok(counts);
            }
            let bytes = text.as_bytes();
            pattern
                .for_each_piece(text, |start, end| counts.note(bytes, start, end))
                .inspect_err(|_| feed.control.stop())?;
        }
        feed.control
            .bytes
            .fetch_add(batch.size() as u64, Ordering::Relaxed);
    }
    counts.settle();
    Ok(counts)
}
