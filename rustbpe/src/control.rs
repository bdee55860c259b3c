//! How a caller watches and stops long work from another thread.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Shared between the work and whoever watches it.
#[derive(Default)]
pub struct Control {
    stop: AtomicBool,
    /// Bytes of text counted or encoded so far.
    pub bytes: AtomicU64,
    /// Merges made so far.
    pub merges: AtomicU64,
}

impl Control {
    /// Asks the work to end soon: counting and encoding after the present text, training after
    /// the present merge.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}
