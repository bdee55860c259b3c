//! Hand-written scanner for the GPT-4 family of split patterns.
//!
//! The pattern is, with N the longest group of digits (3 in GPT-4, 2 in nanochat):
//!
//! ```text
//! '(?i:[sdmt]|ll|ve|re)            a contraction
//! [^\r\n\p{L}\p{N}]?+\p{L}+        letters, with one leading other character
//! \p{N}{1,N}                       digits
//!  ?[^\s\p{L}\p{N}]++[\r\n]*       punctuation, with a leading space and trailing line ends
//! \s*[\r\n]                        white space up to its last line end
//! \s+(?!\S)                        white space but for the character before a word
//! \s+
//! ```
//!
//! * Every character is a letter, a number, white space or other, and each starts at least one
//!   alternative: the pieces partition the text.
//! * The class of the first character picks the alternative, no piece is looked at twice but
//!   for white space, and that at most twice: linear time.

use crate::classes::{ASCII, Classes, LETTER, MULTIBYTE, NEWLINE, NUMBER, OTHER, SPACE};

/// Finds the pieces of a text one after the other.
#[derive(Clone, Copy)]
pub struct Scanner {
    max_digits: usize,
    classes: &'static Classes,
}

impl Scanner {
    /// A scanner for groups of 1 to `max_digits` digits.
    pub fn new(max_digits: usize) -> Scanner {
        assert!(max_digits >= 1, "a group of digits has at least one");
        Scanner {
            max_digits,
            classes: Classes::get(),
        }
    }

    /// End of the piece that starts at `start`. `text` is valid UTF-8 and `start < text.len()`
    /// is the end of the piece before (or 0).
    #[inline]
    pub fn piece_end(&self, text: &[u8], start: usize) -> usize {
        let (class, after) = self.class_at(text, start);
        match class {
            LETTER => self.letters(text, after),
            NUMBER => self.digits(text, after),
            SPACE => self.after_space(text, start, after),
            NEWLINE => self.white_space(text, start),
            _ => self.after_other(text, start, after),
        }
    }

    /// The first place at or after `from` between an ASCII letter and an ASCII character that
    /// is no letter. Every piece with a letter ends there at the latest, and no piece looks
    /// further back than its start: the text can be cut there.
    pub fn cut(&self, text: &[u8], from: usize) -> Option<usize> {
        let rest = text.get(from.max(1) - 1..)?;
        let cut = rest.windows(2).position(|two| {
            let next = ASCII[two[1] as usize];
            ASCII[two[0] as usize] == LETTER && next != LETTER && next != MULTIBYTE
        })?;
        Some(from.max(1) + cut)
    }

    /// Class of the character at `at`, and where the next one starts.
    #[inline(always)]
    fn class_at(&self, text: &[u8], at: usize) -> (u8, usize) {
        let class = ASCII[text[at] as usize];
        if class == MULTIBYTE {
            self.class_of_multibyte(text, at)
        } else {
            (class, at + 1)
        }
    }

    fn class_of_multibyte(&self, text: &[u8], at: usize) -> (u8, usize) {
        let (code_point, after) = decode(text, at);
        (self.classes.of(code_point), after)
    }

    /// `\p{L}*`
    #[inline]
    fn letters(&self, text: &[u8], mut at: usize) -> usize {
        while at < text.len() {
            let (class, after) = self.class_at(text, at);
            if class != LETTER {
                break;
            }
            at = after;
        }
        at
    }

    /// The rest of `\p{N}{1,N}` after its first digit.
    #[inline]
    fn digits(&self, text: &[u8], mut at: usize) -> usize {
        for _ in 1..self.max_digits {
            if at == text.len() {
                break;
            }
            let (class, after) = self.class_at(text, at);
            if class != NUMBER {
                break;
            }
            at = after;
        }
        at
    }

    /// A piece that starts with white space other than CR and LF.
    #[inline]
    fn after_space(&self, text: &[u8], start: usize, after: usize) -> usize {
        if after == text.len() {
            return after;
        }
        let (class, second) = self.class_at(text, after);
        match class {
            LETTER => self.letters(text, second),
            OTHER if text[start] == b' ' => self.punctuation(text, second),
            NUMBER | OTHER => after,
            _ => self.white_space(text, start),
        }
    }

    /// A piece that starts with neither letter, number nor white space.
    #[inline]
    fn after_other(&self, text: &[u8], start: usize, after: usize) -> usize {
        if after == text.len() {
            return after;
        }
        if text[start] == b'\''
            && let Some(end) = contraction(text, after)
        {
            return end;
        }
        match self.class_at(text, after) {
            (LETTER, second) => self.letters(text, second),
            _ => self.punctuation(text, after),
        }
    }

    /// `[^\s\p{L}\p{N}]*[\r\n]*`
    fn punctuation(&self, text: &[u8], mut at: usize) -> usize {
        while at < text.len() {
            let (class, after) = self.class_at(text, at);
            if class != OTHER {
                break;
            }
            at = after;
        }
        while at < text.len() && ASCII[text[at] as usize] == NEWLINE {
            at += 1;
        }
        at
    }

    /// `\s*[\r\n]|\s+(?!\S)|\s+`, with white space at `start`.
    fn white_space(&self, text: &[u8], start: usize) -> usize {
        let mut after_newline = None;
        let mut last = start;
        let mut at = start;
        while at < text.len() {
            let (class, after) = self.class_at(text, at);
            match class {
                NEWLINE => after_newline = Some(after),
                SPACE => {}
                _ => break,
            }
            last = at;
            at = after;
        }
        match after_newline {
            Some(end) => end,
            None if at == text.len() || last == start => at,
            None => last,
        }
    }
}

/// End of `(?i:[sdmt]|ll|ve|re)` at `at`, which is not the end of the text.
/// U+017F (long s) folds to s.
fn contraction(text: &[u8], at: usize) -> Option<usize> {
    let lower = |i: usize| text.get(i).map(|b| b | 0x20);
    match (lower(at)?, lower(at + 1)) {
        (b's' | b'd' | b'm' | b't', _) => Some(at + 1),
        (b'l', Some(b'l')) | (b'v', Some(b'e')) | (b'r', Some(b'e')) => Some(at + 2),
        _ if text[at..].starts_with("\u{17f}".as_bytes()) => Some(at + 2),
        _ => None,
    }
}

/// Code point at `at` of valid UTF-8, where the byte is at least 0x80, and where the next starts.
#[inline]
fn decode(text: &[u8], at: usize) -> (u32, usize) {
    let low = |i: usize| u32::from(text[at + i] & 0x3f);
    match text[at] {
        lead @ ..0xe0 => (u32::from(lead & 0x1f) << 6 | low(1), at + 2),
        lead @ ..0xf0 => (u32::from(lead & 0x0f) << 12 | low(1) << 6 | low(2), at + 3),
        lead => (
            u32::from(lead & 0x07) << 18 | low(1) << 12 | low(2) << 6 | low(3),
            at + 4,
        ),
    }
}
