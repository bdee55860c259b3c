//! Encoding many texts, or one large one, on several threads.
//!
//! * Texts are cut into segments of about [`SEGMENT_BYTES`] at places where every piece ends
//!   whatever the rest of the text is; threads take the next segments until none are left. The
//!   result is put together in order, so it is the same on any number of threads.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::control::Control;
use crate::encode::Encoder;
use crate::pattern::PatternError;

/// Bytes of text that a thread takes at a time.
const SEGMENT_BYTES: usize = 1 << 18;

/// The ids of several texts, in order.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// What the threads made: one run of ids after the other.
    pub runs: Vec<Vec<u32>>,
    /// Where each text starts in the joined runs, and at last their length.
    pub offsets: Vec<usize>,
}

impl Encoded {
    /// Number of ids.
    pub fn len(&self) -> usize {
        self.offsets.last().copied().unwrap_or(0)
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A part of a text.
struct Segment {
    text: usize,
    range: Range<usize>,
}

/// Segments that a thread takes together, and what it makes of them.
struct Made {
    task: usize,
    ids: Vec<u32>,
    /// Number of ids up to the end of each segment.
    ends: Vec<usize>,
}

impl Encoder {
    /// Encodes `texts` on `threads` threads. With `prefix`, each text's ids start with it.
    /// When stopped, what is left out is unspecified.
    pub fn encode_batch(
        &self,
        texts: &[&str],
        prefix: Option<u32>,
        threads: usize,
        control: &Control,
    ) -> Result<Encoded, PatternError> {
        let segments = self.segments(texts);
        let tasks = tasks(&segments);
        let next = AtomicUsize::new(0);
        let run = || -> Result<Vec<Made>, PatternError> {
            let mut all = Vec::new();
            while !control.is_stopped() {
                let task = next.fetch_add(1, Ordering::Relaxed);
                let Some(range) = tasks.get(task).cloned() else {
                    break;
                };
                all.push(self.encode_segments(texts, &segments[range], prefix, task)?);
            }
            Ok(all)
        };
        let mut made = if threads == 1 || tasks.len() == 1 {
            run()?
        } else {
            thread::scope(|scope| {
                let workers: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
                let mut made = Vec::new();
                for worker in workers {
                    made.extend(
                        worker
                            .join()
                            .unwrap_or_else(|e| std::panic::resume_unwind(e))?,
                    );
                }
                Ok(made)
            })?
        };
        made.sort_by_key(|made| made.task);
        let mut encoded = Encoded {
            runs: Vec::new(),
            offsets: vec![0; texts.len() + 1],
        };
        let mut before = 0;
        for Made { task, ids, ends } in made {
            for (segment, end) in segments[tasks[task].clone()].iter().zip(ends) {
                encoded.offsets[segment.text + 1] = before + end;
            }
            before += ids.len();
            encoded.runs.push(ids);
        }
        Ok(encoded)
    }

    fn encode_segments(
        &self,
        texts: &[&str],
        segments: &[Segment],
        prefix: Option<u32>,
        task: usize,
    ) -> Result<Made, PatternError> {
        let bytes: usize = segments.iter().map(|segment| segment.range.len()).sum();
        let mut ids = Vec::with_capacity(bytes / 3 + 16);
        let mut ends = Vec::with_capacity(segments.len());
        let parts = segments.iter().map(|segment| {
            let first = segment.range.start == 0;
            (
                &texts[segment.text][segment.range.clone()],
                prefix.filter(|_| first),
            )
        });
        self.encode_parts(parts, &mut ids, |ids| ends.push(ids.len()))?;
        Ok(Made { task, ids, ends })
    }

    fn segments(&self, texts: &[&str]) -> Vec<Segment> {
        let mut segments = Vec::with_capacity(texts.len());
        for (text, content) in texts.iter().enumerate() {
            let mut start = 0;
            for part in self.pattern().parts(content, SEGMENT_BYTES) {
                segments.push(Segment {
                    text,
                    range: start..start + part.len(),
                });
                start += part.len();
            }
        }
        segments
    }
}

/// Consecutive segments of together at least [`SEGMENT_BYTES`].
fn tasks(segments: &[Segment]) -> Vec<Range<usize>> {
    let mut tasks = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (i, segment) in segments.iter().enumerate() {
        bytes += segment.range.len();
        if bytes >= SEGMENT_BYTES || i + 1 == segments.len() {
            tasks.push(start..i + 1);
            (start, bytes) = (i + 1, 0);
        }
    }
    tasks
}
