//! Split patterns: which texts become pieces, and which engine finds them.

use std::fmt;

use fancy_regex::Regex;

use crate::scan::Scanner;

/// The pattern that the published rustbpe uses when none is given.
pub const GPT4: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

/// The longest digit group for which a pattern of the GPT-4 family is recognised.
const MAX_DIGITS: usize = 9;

/// A split pattern that does not compile, or whose regex gave up on a text (the backtracking
/// limit of patterns with look-around).
#[derive(Clone, Debug)]
pub struct PatternError(String);

impl fmt::Display for PatternError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for PatternError {}

#[derive(Clone)]
enum Engine {
    /// Matches nothing: the state before training.
    Empty,
    Scanner(Scanner),
    Regex(Regex),
}

/// A split pattern with the engine that runs it. A clone has its own regex caches: give every
/// thread its own, because threads that share one contend for them.
#[derive(Clone)]
pub struct Pattern {
    source: String,
    engine: Engine,
}

impl Default for Pattern {
    fn default() -> Pattern {
        Pattern {
            source: String::new(),
            engine: Engine::Empty,
        }
    }
}

impl Pattern {
    /// Compiles `source`; the GPT-4 family (digit groups of 1 to N) gets the scanner.
    pub fn new(source: &str) -> Result<Pattern, PatternError> {
        let engine = match gpt4_digits(source) {
            _ if source.is_empty() => Engine::Empty,
            Some(max_digits) => Engine::Scanner(Scanner::new(max_digits)),
            None => Engine::Regex(compile(source)?),
        };
        Ok(Pattern {
            source: source.to_owned(),
            engine,
        })
    }

    /// Like [`Pattern::new`], but always with the regex engine. For tests of the scanner.
    pub fn regex(source: &str) -> Result<Pattern, PatternError> {
        Ok(Pattern {
            source: source.to_owned(),
            engine: Engine::Regex(compile(source)?),
        })
    }

    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether the hand-written scanner runs this pattern.
    pub fn is_scanned(&self) -> bool {
        matches!(self.engine, Engine::Scanner(_))
    }

    /// The first place at or after `from` where `text` can be cut so that its two parts have
    /// the pieces of the whole. None if there is none before the end, or if the pattern is not
    /// known well enough to tell.
    pub fn cut(&self, text: &str, from: usize) -> Option<usize> {
        match &self.engine {
            Engine::Scanner(scanner) => scanner.cut(text.as_bytes(), from),
            Engine::Empty | Engine::Regex(_) => None,
        }
    }

    /// The last such place.
    pub fn last_cut(&self, text: &str) -> Option<usize> {
        match &self.engine {
            Engine::Scanner(scanner) => scanner.last_cut(text.as_bytes()),
            Engine::Empty | Engine::Regex(_) => None,
        }
    }

    /// `text` in parts of about `size` bytes, cut as [`Pattern::cut`] does. At least one part.
    pub fn parts<'a>(&'a self, text: &'a str, size: usize) -> impl Iterator<Item = &'a str> {
        let mut rest = Some(text);
        std::iter::from_fn(move || {
            let text = rest?;
            let Some(end) = self.cut(text, size) else {
                return rest.take();
            };
            let (part, after) = text.split_at(end);
            rest = Some(after);
            Some(part)
        })
    }

    /// Calls `visit(start, end)` for every non-empty piece of `text`, in order.
    #[inline]
    pub fn for_each_piece(
        &self,
        text: &str,
        mut visit: impl FnMut(usize, usize),
    ) -> Result<(), PatternError> {
        match &self.engine {
            Engine::Empty => {}
            Engine::Scanner(scanner) => {
                let bytes = text.as_bytes();
                let mut start = 0;
                while start < bytes.len() {
                    let end = scanner.piece_end(bytes, start);
                    visit(start, end);
                    start = end;
                }
            }
            Engine::Regex(regex) => {
                for found in regex.find_iter(text) {
                    let found =
                        found.map_err(|e| PatternError(format!("Regex failed on a text: {e}")))?;
                    if !found.as_str().is_empty() {
                        visit(found.start(), found.end());
                    }
                }
            }
        }
        Ok(())
    }
}

fn compile(source: &str) -> Result<Regex, PatternError> {
    Regex::new(source).map_err(|e| PatternError(format!("Invalid regex pattern: {e}")))
}

/// N, when `source` is the GPT-4 pattern with groups of 1 to N digits.
fn gpt4_digits(source: &str) -> Option<usize> {
    (1..=MAX_DIGITS).find(|n| GPT4.replace("{1,3}", &format!("{{1,{n}}}")) == source)
}
