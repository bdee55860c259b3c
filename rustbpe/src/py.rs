//! The Python module `rustbpe`: argument conversion, errors, signals; no work of its own.
//!
//! * The GIL is released around all work. The calling thread wakes [`WAKE`] times apart to let
//!   Python handle signals (Ctrl-C) and to report progress.
//! * A tokenizer changes only when training succeeds, in one step; other threads may encode
//!   with it meanwhile.

use std::fmt::Display;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread;
use std::time::Duration;

use pyo3::exceptions::{PyUnicodeDecodeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyByteArray, PyBytes, PyDict, PyInt, PyIterator, PyList, PyString};

use crate::batch::Encoded;
use crate::control::Control;
use crate::count::{BATCH_BYTES, Batch, Feed, count_words};
use crate::encode::Encoder;
use crate::file;
use crate::pattern::{GPT4, Pattern, PatternError};
use crate::source::{Amount, Files, SourceError};
use crate::train::{NUM_BYTES, Pair, TrainError, train};
use crate::vocab::{Vocab, VocabError};
use crate::words::WordCounts;

const WAKE: Duration = Duration::from_millis(100);
/// More are not started, whatever is asked: the result does not depend on it.
const MAX_THREADS: usize = 256;

macro_rules! value_error {
    ($($error:ty),*) => {
        $(impl From<$error> for PyErr {
            fn from(error: $error) -> PyErr {
                PyValueError::new_err(error.to_string())
            }
        })*
    };
}

value_error!(PatternError, TrainError, VocabError);

impl From<SourceError> for PyErr {
    fn from(error: SourceError) -> PyErr {
        match &error {
            // Of the kind's own class: FileNotFoundError, PermissionError, …
            SourceError::Io(_, io) => io::Error::new(io.kind(), error.to_string()).into(),
            _ => PyValueError::new_err(error.to_string()),
        }
    }
}

/// Who is told how far the work is: `callback(phase, done, total)`.
struct Watch<'a, 'py> {
    py: Python<'py>,
    control: &'a Control,
    callback: Option<&'a Bound<'py, PyAny>>,
}

impl Watch<'_, '_> {
    /// Lets Python handle its signals and reports progress. An error ends the work.
    fn look(&self, phase: &str, total: Option<u64>) -> PyResult<()> {
        self.py.check_signals()?;
        if let Some(callback) = self.callback {
            let done = match phase {
                "merge" => &self.control.merges,
                _ => &self.control.bytes,
            };
            callback.call1((phase, done.load(Ordering::Relaxed), total))?;
        }
        Ok(())
    }

    /// Runs `work` on another thread with the GIL released, looking up every [`WAKE`].
    fn run<T: Send>(
        &self,
        phase: &str,
        total: Option<u64>,
        work: impl FnOnce() -> T + Send,
    ) -> PyResult<T> {
        thread::scope(|scope| {
            let (running, mut done) = channel::<()>();
            let worker = scope.spawn(move || {
                let result = work();
                drop(running);
                result
            });
            let looked = loop {
                let done = &mut done;
                let waited = self.py.detach(move || done.recv_timeout(WAKE));
                let ended = waited == Err(RecvTimeoutError::Disconnected);
                if let Err(error) = self.look(phase, total) {
                    self.control.stop();
                    break Err(error);
                }
                if ended {
                    break Ok(());
                }
            };
            let result = self.py.detach(move || worker.join());
            looked?;
            Ok(result.unwrap_or_else(|e| std::panic::resume_unwind(e)))
        })
    }
}

/// What training makes.
struct Trained {
    encoder: Encoder,
    /// The ids as Python objects, made on first use: lists of ids share them.
    ids: PyOnceLock<Vec<Py<PyInt>>>,
}

impl Trained {
    fn new(encoder: Encoder) -> Trained {
        Trained {
            encoder,
            ids: PyOnceLock::new(),
        }
    }

    fn list<'py>(&self, py: Python<'py>, ids: &[u32]) -> PyResult<Bound<'py, PyList>> {
        let size = self.encoder.vocab().size();
        let objects = self.ids.get_or_init(py, || {
            (0..size).map(|id| PyInt::new(py, id).unbind()).collect()
        });
        PyList::new(py, ids.iter().map(|&id| &objects[id as usize]))
    }
}

/// A byte pair encoding tokenizer.
#[pyclass(frozen, module = "rustbpe")]
pub struct Tokenizer {
    trained: RwLock<Arc<Trained>>,
}

impl Tokenizer {
    fn trained(&self) -> Arc<Trained> {
        self.trained
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn learn(
        &self,
        watch: &Watch,
        pattern: Pattern,
        words: WordCounts,
        vocab_size: u32,
    ) -> PyResult<()> {
        let total = u64::from(vocab_size - NUM_BYTES);
        let merges = watch.run("merge", Some(total), || {
            train(words, vocab_size, watch.control)
        })??;
        let encoder = Encoder::new(pattern, Vocab::new(merges)?);
        let trained = Arc::new(Trained::new(encoder));
        *self.trained.write().unwrap_or_else(PoisonError::into_inner) = trained;
        Ok(())
    }
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> Tokenizer {
        let encoder = Encoder::new(Pattern::default(), Vocab::default());
        Tokenizer {
            trained: RwLock::new(Arc::new(Trained::new(encoder))),
        }
    }

    /// A tokenizer with these merges; merge i makes token 256 + i.
    #[staticmethod]
    #[pyo3(signature = (merges, pattern=GPT4))]
    fn from_merges(merges: Vec<Pair>, pattern: &str) -> PyResult<Tokenizer> {
        let encoder = Encoder::new(Pattern::new(pattern)?, Vocab::new(merges)?);
        Ok(Tokenizer {
            trained: RwLock::new(Arc::new(Trained::new(encoder))),
        })
    }

    /// Learns a vocabulary from an iterator of texts.
    #[pyo3(signature = (
        iterator, vocab_size, buffer_size=8192, pattern=None, *, num_threads=None, progress=None
    ))]
    #[allow(clippy::too_many_arguments)] // The signature that Python sees.
    fn train_from_iterator(
        &self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: i64,
        buffer_size: usize,
        pattern: Option<&str>,
        num_threads: Option<usize>,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        if buffer_size == 0 {
            return Err(PyValueError::new_err("buffer_size must be at least 1"));
        }
        let vocab_size = check_vocab_size(vocab_size)?;
        let threads = check_threads(num_threads)?;
        let pattern = Pattern::new(pattern.unwrap_or(GPT4))?;
        let texts = iterator.try_iter()?;
        let control = Control::default();
        let watch = Watch {
            py,
            control: &control,
            callback: progress,
        };
        let words = count_words(&pattern, threads, &control, |feed| {
            feed_from_iterator(&watch, feed, &pattern, texts, buffer_size)
        })?;
        self.learn(&watch, pattern, words, vocab_size)
    }

    /// Learns a vocabulary from parquet and text files. Gives how much was read.
    #[pyo3(signature = (
        paths, vocab_size, *, pattern=None, column="text", max_chars=None, doc_cap_chars=None,
        num_threads=None, progress=None
    ))]
    #[allow(clippy::too_many_arguments)] // The signature that Python sees.
    fn train_from_files<'py>(
        &self,
        py: Python<'py>,
        paths: Vec<PathBuf>,
        vocab_size: i64,
        pattern: Option<&str>,
        column: &str,
        max_chars: Option<u64>,
        doc_cap_chars: Option<u64>,
        num_threads: Option<usize>,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let vocab_size = check_vocab_size(vocab_size)?;
        let threads = check_threads(num_threads)?;
        let pattern = Pattern::new(pattern.unwrap_or(GPT4))?;
        let files = Files {
            paths,
            column: column.to_owned(),
            max_chars,
            doc_cap_chars,
        };
        let control = Control::default();
        let watch = Watch {
            py,
            control: &control,
            callback: progress,
        };
        let mut amount = Amount::default();
        let words = watch.run("count", None, || {
            count_words(&pattern, threads, &control, |feed| {
                amount = files.feed(&pattern, feed)?;
                Ok::<(), SourceError>(())
            })
        })??;
        self.learn(&watch, pattern, words, vocab_size)?;
        let read = PyDict::new(py);
        read.set_item("documents", amount.documents)?;
        read.set_item("chars", amount.chars)?;
        read.set_item("bytes", amount.bytes)?;
        Ok(read)
    }

    /// Writes pattern and merges as one file, atomically.
    fn save(&self, path: PathBuf) -> PyResult<()> {
        let Trained { encoder, .. } = &*self.trained();
        let (pattern, vocab) = (encoder.pattern(), encoder.vocab());
        file::save(&path, pattern.source(), vocab.merges()).map_err(|e| in_file(&path, &e))
    }

    /// The tokenizer that `save` wrote.
    #[staticmethod]
    fn load(path: PathBuf) -> PyResult<Tokenizer> {
        let strange =
            |reason: &dyn Display| PyValueError::new_err(format!("{}: {reason}", path.display()));
        let (pattern, merges) = file::load(&path).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => strange(&error),
            _ => in_file(&path, &error),
        })?;
        let pattern = Pattern::new(&pattern).map_err(|error| strange(&error))?;
        let vocab = Vocab::new(merges).map_err(|error| strange(&error))?;
        Ok(Tokenizer {
            trained: RwLock::new(Arc::new(Trained::new(Encoder::new(pattern, vocab)))),
        })
    }

    /// The split pattern; empty before training.
    fn get_pattern(&self) -> String {
        self.trained().encoder.pattern().source().to_owned()
    }

    /// 256 + the number of merges.
    #[getter]
    fn vocab_size(&self) -> u32 {
        self.trained().encoder.vocab().size()
    }

    /// The merges in order, as pairs of token ids.
    fn get_merges(&self) -> Vec<Pair> {
        self.trained().encoder.vocab().merges().to_vec()
    }

    /// Every token's bytes and id, by id.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, u32)> {
        let trained = self.trained();
        let vocab = trained.encoder.vocab();
        let token = |id| vocab.token(id).expect("ids below the size are tokens");
        (0..vocab.size())
            .map(|id| (PyBytes::new(py, token(id)), id))
            .collect()
    }

    /// The ids of a text.
    fn encode<'py>(&self, py: Python<'py>, text: PyBackedStr) -> PyResult<Bound<'py, PyList>> {
        let trained = self.trained();
        let encoder = &trained.encoder;
        let ids = if text.len() <= BATCH_BYTES {
            py.detach(|| {
                let mut ids = Vec::with_capacity(text.len() / 3 + 8);
                encoder.encode(&text, &mut ids).map(|()| ids)
            })?
        } else {
            encode_watched(py, encoder, &[text], None, 1)?.runs.concat()
        };
        trained.list(py, &ids)
    }

    /// The ids of each text, on all processors.
    fn batch_encode<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<PyBackedStr>,
    ) -> PyResult<Vec<Bound<'py, PyList>>> {
        let trained = self.trained();
        let encoded = encode_watched(py, &trained.encoder, &texts, None, check_threads(None)?)?;
        let ids = encoded.runs.concat();
        let one = |two: &[usize]| trained.list(py, &ids[two[0]..two[1]]);
        encoded.offsets.windows(2).map(one).collect()
    }

    /// The ids of all texts as one int32 array, and an int64 array of where each text starts.
    #[pyo3(signature = (texts, num_threads=None, prefix=None))]
    fn encode_batch<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<PyBackedStr>,
        num_threads: Option<usize>,
        prefix: Option<u32>,
    ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let threads = check_threads(num_threads)?;
        let encoded = encode_watched(py, &self.trained().encoder, &texts, prefix, threads)?;
        Ok((ids_array(py, &encoded)?, offsets_array(py, &encoded)?))
    }

    /// Number of ids of a text.
    fn count_tokens(&self, py: Python<'_>, text: PyBackedStr) -> PyResult<usize> {
        Ok(encode_watched(py, &self.trained().encoder, &[text], None, 1)?.len())
    }

    /// The text of some ids.
    fn decode<'py>(&self, py: Python<'py>, ids: Vec<u32>) -> PyResult<Bound<'py, PyString>> {
        let bytes = self.bytes_of(&ids)?;
        match std::str::from_utf8(&bytes) {
            Ok(text) => Ok(PyString::new(py, text)),
            Err(error) => {
                let error = PyUnicodeDecodeError::new_utf8(py, &bytes, error)?;
                Err(PyErr::from_value(error.into_any()))
            }
        }
    }

    /// The bytes of some ids, which need not be whole characters.
    fn decode_bytes<'py>(&self, py: Python<'py>, ids: Vec<u32>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.bytes_of(&ids)?))
    }
}

impl Tokenizer {
    fn bytes_of(&self, ids: &[u32]) -> PyResult<Vec<u8>> {
        let unknown = |id| PyValueError::new_err(format!("Unknown token id: {id}"));
        self.trained().encoder.vocab().decode(ids).map_err(unknown)
    }
}

/// Of the kind's own class: FileNotFoundError, PermissionError, …
fn in_file(path: &Path, error: &io::Error) -> PyErr {
    io::Error::new(error.kind(), format!("{}: {error}", path.display())).into()
}

fn check_vocab_size(vocab_size: i64) -> PyResult<u32> {
    let fitting = u32::try_from(vocab_size).ok().filter(|&v| v >= NUM_BYTES);
    fitting.ok_or_else(|| {
        PyValueError::new_err(format!(
            "vocab_size must be at least {NUM_BYTES} (one token per byte) and below 2**32, got \
             {vocab_size}"
        ))
    })
}

/// Number of threads to use: as asked, or one per processor that this process may use.
fn check_threads(asked: Option<usize>) -> PyResult<usize> {
    match asked {
        Some(0) => Err(PyValueError::new_err("num_threads must be at least 1")),
        Some(threads) => Ok(threads.min(MAX_THREADS)),
        None => Ok(thread::available_parallelism().map_or(1, usize::from)),
    }
}

/// Takes texts from Python with the GIL held and hands them over in batches.
fn feed_from_iterator(
    watch: &Watch,
    feed: &Feed,
    pattern: &Pattern,
    texts: Bound<'_, PyIterator>,
    buffer_size: usize,
) -> PyResult<()> {
    let mut batch = Batch::default();
    for text in texts {
        let text = text?.cast_into::<PyString>()?;
        // ASCII is its own UTF-8. Of other text a fresh object is made: asking the str for its
        // UTF-8 would leave a copy inside it for good.
        let encoded;
        let utf8 = if text
            .call_method0(intern!(watch.py, "isascii"))?
            .is_truthy()?
        {
            text.to_str()?
        } else {
            encoded = text.encode_utf8()?;
            std::str::from_utf8(encoded.as_bytes()).expect("UTF-8 was asked for")
        };
        for part in pattern.parts(utf8, BATCH_BYTES) {
            batch.push(part);
            let full = batch.is_full() || batch.len() >= buffer_size;
            if full && hand_over(watch, feed, std::mem::take(&mut batch))?.is_break() {
                return Ok(());
            }
        }
    }
    if hand_over(watch, feed, batch)?.is_continue() {
        while !watch.py.detach(|| feed.finish(WAKE)) {
            watch.look("count", None)?;
        }
    }
    watch.look("count", None)
}

fn hand_over(watch: &Watch, feed: &Feed, mut batch: Batch) -> PyResult<ControlFlow<()>> {
    loop {
        let pushed = watch.py.detach(|| feed.offer(batch, WAKE));
        watch.look("count", None)?;
        if feed.is_stopped() {
            return Ok(ControlFlow::Break(()));
        }
        match pushed {
            Ok(()) => return Ok(ControlFlow::Continue(())),
            Err(returned) => batch = returned,
        }
    }
}

fn encode_watched(
    py: Python<'_>,
    encoder: &Encoder,
    texts: &[PyBackedStr],
    prefix: Option<u32>,
    threads: usize,
) -> PyResult<Encoded> {
    let texts: Vec<&str> = texts.iter().map(|text| &**text).collect();
    let control = Control::default();
    let watch = Watch {
        py,
        control: &control,
        callback: None,
    };
    Ok(watch.run("encode", None, || {
        encoder.encode_batch(&texts, prefix, threads, &control)
    })??)
}

fn ids_array<'py>(py: Python<'py>, encoded: &Encoded) -> PyResult<Bound<'py, PyAny>> {
    let bytes = PyByteArray::new_with(py, encoded.len() * 4, |buffer| {
        let ids = encoded.runs.iter().flatten();
        for (cell, id) in buffer.chunks_exact_mut(4).zip(ids) {
            cell.copy_from_slice(&id.to_ne_bytes());
        }
        Ok(())
    })?;
    numpy_array(py, &bytes, "int32")
}

fn offsets_array<'py>(py: Python<'py>, encoded: &Encoded) -> PyResult<Bound<'py, PyAny>> {
    let bytes = PyByteArray::new_with(py, encoded.offsets.len() * 8, |buffer| {
        for (cell, offset) in buffer.chunks_exact_mut(8).zip(&encoded.offsets) {
            cell.copy_from_slice(&(*offset as i64).to_ne_bytes());
        }
        Ok(())
    })?;
    numpy_array(py, &bytes, "int64")
}

/// A writable array on the memory of `bytes`.
fn numpy_array<'py>(
    py: Python<'py>,
    bytes: &Bound<'py, PyByteArray>,
    dtype: &str,
) -> PyResult<Bound<'py, PyAny>> {
    py.import("numpy")?
        .call_method1("frombuffer", (bytes, dtype))
}

#[pymodule]
fn rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("GPT4_PATTERN", GPT4)?;
    module.add_class::<Tokenizer>()
}
