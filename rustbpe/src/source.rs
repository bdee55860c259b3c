//! Reading texts from parquet and text files, without Python.
//!
//! * A row of a parquet file's column is a document; a text file is one document.
//! * Memory stays at a few batches: text files are read piece by piece and cut where the split
//!   pattern allows it, parquet files row by row of one row group.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use parquet::basic::Type;
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::ByteArrayType;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};

use crate::count::{BATCH_BYTES, Batch, Feed};
use crate::ops;
use crate::pattern::{Pattern, PatternError};

/// Rows decoded at a time.
const ROWS: usize = 1024;

/// What to read.
pub struct Files {
    /// Read in this order; `.parquet` files as parquet, others as text.
    pub paths: Vec<PathBuf>,
    /// The parquet column that holds the text.
    pub column: String,
    /// Characters to read at most, in all.
    pub max_chars: Option<u64>,
    /// Characters to read at most of one document.
    pub doc_cap_chars: Option<u64>,
}

/// How much was read.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Amount {
    pub documents: u64,
    pub chars: u64,
    pub bytes: u64,
}

/// A file that cannot be read, and why.
#[derive(Debug)]
pub enum SourceError {
    Io(PathBuf, std::io::Error),
    Parquet(PathBuf, String),
    /// `place` says where in the file, `at` is the byte in the document.
    NotUtf8 {
        path: PathBuf,
        place: String,
        at: usize,
    },
    Pattern(PatternError),
}

impl fmt::Display for SourceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SourceError::Io(path, error) => write!(f, "{}: {error}", path.display()),
            SourceError::Parquet(path, error) => write!(f, "{}: {error}", path.display()),
            SourceError::NotUtf8 { path, place, at } => {
                write!(f, "{}: {place}invalid UTF-8 at byte {at}", path.display())
            }
            SourceError::Pattern(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for SourceError {}

impl From<PatternError> for SourceError {
    fn from(error: PatternError) -> SourceError {
        SourceError::Pattern(error)
    }
}

impl Files {
    /// Hands everything over to the counting threads. Ends early when they are stopped.
    pub fn feed(&self, pattern: &Pattern, feed: &Feed) -> Result<Amount, SourceError> {
        let mut reader = Reader {
            files: self,
            pattern,
            feed,
            batch: Batch::default(),
            amount: Amount::default(),
        };
        for path in &self.paths {
            if reader.is_done() {
                break;
            }
            if path
                .extension()
                .is_some_and(|extension| extension == "parquet")
            {
                reader.read_parquet(path)?;
            } else {
                reader.read_text(path)?;
            }
        }
        feed.push(std::mem::take(&mut reader.batch));
        Ok(reader.amount)
    }
}

struct Reader<'a, 'f> {
    files: &'a Files,
    pattern: &'a Pattern,
    feed: &'a Feed<'f>,
    batch: Batch,
    amount: Amount,
}

impl Reader<'_, '_> {
    fn is_done(&self) -> bool {
        self.feed.is_stopped()
            || self
                .files
                .max_chars
                .is_some_and(|max| self.amount.chars >= max)
    }

    /// Characters that may still be read of a document of which `read` are.
    fn room(&self, read: u64) -> u64 {
        let in_all = self
            .files
            .max_chars
            .map_or(u64::MAX, |max| max - self.amount.chars);
        let in_document = self.files.doc_cap_chars.map_or(u64::MAX, |cap| cap - read);
        in_all.min(in_document)
    }

    /// Takes as much of `text` as there is room for. Gives how many characters that is.
    fn take(&mut self, text: &str, read: u64) -> u64 {
        let (text, chars) = prefix(text, self.room(read));
        self.amount.chars += chars;
        self.amount.bytes += text.len() as u64;
        for part in self.pattern.parts(text, BATCH_BYTES) {
            self.batch.push(part);
            if self.batch.is_full() {
                self.feed.push(std::mem::take(&mut self.batch));
            }
        }
        chars
    }

    fn read_text(&mut self, path: &Path) -> Result<(), SourceError> {
        let failed = |error| SourceError::Io(path.to_owned(), error);
        let mut file = File::open(path).map_err(failed)?;
        let mut bytes: Vec<u8> = Vec::new();
        let (mut before, mut read, mut wanted) = (0, 0, BATCH_BYTES);
        self.amount.documents += 1;
        while !self.is_done() && self.room(read) > 0 {
            let got = file
                .by_ref()
                .take(wanted as u64)
                .read_to_end(&mut bytes)
                .map_err(failed)?;
            ops::count(bytes.len());
            let text = valid_prefix(&bytes, got == 0)
                .map_err(|at| not_utf8(path, String::new(), before + at))?;
            let end = if got == 0 {
                Some(text.len())
            } else {
                self.pattern.last_cut(text)
            };
            let Some(end) = end else {
                // Twice as much each time, so that looking for a cut again stays linear.
                wanted = bytes.len();
                continue;
            };
            read += self.take(&text[..end], read);
            before += end;
            bytes.drain(..end);
            wanted = BATCH_BYTES;
            if got == 0 {
                break;
            }
        }
        Ok(())
    }

    fn read_parquet(&mut self, path: &Path) -> Result<(), SourceError> {
        let failed = |error: ParquetError| SourceError::Parquet(path.to_owned(), error.to_string());
        let file = File::open(path).map_err(|e| SourceError::Io(path.to_owned(), e))?;
        let reader = SerializedFileReader::new(file).map_err(failed)?;
        let column = self.column_index(path, &reader)?;
        let mut first_row = 0;
        for group in 0..reader.num_row_groups() {
            let rows = reader.get_row_group(group).map_err(failed)?;
            let ColumnReader::ByteArrayColumnReader(texts) =
                rows.get_column_reader(column).map_err(failed)?
            else {
                unreachable!("the column's type is checked");
            };
            if !self.read_column(path, texts, first_row)? {
                break;
            }
            first_row += rows.metadata().num_rows() as usize;
        }
        Ok(())
    }

    /// Reads one row group's texts. False if no more are wanted.
    fn read_column(
        &mut self,
        path: &Path,
        mut texts: ColumnReaderImpl<ByteArrayType>,
        first_row: usize,
    ) -> Result<bool, SourceError> {
        let (mut values, mut levels) = (Vec::with_capacity(ROWS), Vec::with_capacity(ROWS));
        let mut row = first_row;
        loop {
            values.clear();
            levels.clear();
            let (records, _, _) = texts
                .read_records(ROWS, Some(&mut levels), None, &mut values)
                .map_err(|e| SourceError::Parquet(path.to_owned(), e.to_string()))?;
            if records == 0 {
                return Ok(true);
            }
            // A missing text has a definition level of 0 and no value.
            let mut values = values.iter();
            for i in 0..records {
                if self.is_done() {
                    return Ok(false);
                }
                if levels.get(i) == Some(&0) {
                    continue;
                }
                let value = values.next().expect("as many values as defined records");
                let text = std::str::from_utf8(value.data())
                    .map_err(|e| not_utf8(path, format!("row {}: ", row + i), e.valid_up_to()))?;
                self.amount.documents += 1;
                self.take(text, 0);
            }
            row += records;
        }
    }

    fn column_index(
        &self,
        path: &Path,
        reader: &SerializedFileReader<File>,
    ) -> Result<usize, SourceError> {
        let columns = reader.metadata().file_metadata().schema_descr().columns();
        let name = &self.files.column;
        let failed = |reason: String| SourceError::Parquet(path.to_owned(), reason);
        let index = columns
            .iter()
            .position(|c| c.path().string() == *name)
            .ok_or_else(|| {
                let names: Vec<_> = columns.iter().map(|c| c.path().string()).collect();
                failed(format!(
                    "there is no column {name:?}, only {}",
                    names.join(", ")
                ))
            })?;
        let column = &columns[index];
        if column.physical_type() != Type::BYTE_ARRAY || column.max_rep_level() > 0 {
            return Err(failed(format!(
                "column {name:?} does not hold one text per row"
            )));
        }
        Ok(index)
    }
}

fn not_utf8(path: &Path, place: String, at: usize) -> SourceError {
    SourceError::NotUtf8 {
        path: path.to_owned(),
        place,
        at,
    }
}

/// The text in `bytes`, of which the last character may be cut off unless this is the `end`.
/// Else the position of what is no UTF-8.
fn valid_prefix(bytes: &[u8], end: bool) -> Result<&str, usize> {
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(text),
        Err(error) if error.error_len().is_some() || end => Err(error.valid_up_to()),
        Err(error) => {
            let valid = &bytes[..error.valid_up_to()];
            Ok(std::str::from_utf8(valid).expect("valid up to there"))
        }
    }
}

/// The first `most` characters of `text`, and how many these are.
fn prefix(text: &str, most: u64) -> (&str, u64) {
    let chars = text.chars().count() as u64;
    if chars <= most {
        return (text, chars);
    }
    let end = text
        .char_indices()
        .nth(most as usize)
        .map_or(text.len(), |(at, _)| at);
    (&text[..end], most)
}
