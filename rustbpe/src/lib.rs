//! Byte pair encoding for GPT-style tokenizers: training and encoding.
//!
//! * [`pattern`] and [`scan`] cut text into pieces, [`count`] and [`words`] count the distinct
//!   ones on several threads, [`train`] learns merges from the counts, [`encode`] and
//!   [`batch`] apply them.
//! * Everything here is Rust; the Python module is the thin layer in `py`, behind the feature
//!   `python`.

pub mod batch;
pub mod classes;
pub mod control;
pub mod count;
pub mod encode;
pub mod file;
mod ops;
mod pairs;
pub mod pattern;
mod prefetch;
pub mod scan;
pub mod source;
pub mod train;
pub mod vocab;
pub mod words;

#[cfg(feature = "python")]
mod py;
