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
use crate::ops;

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
        if text[start] == b' ' {
            // By far the most frequent case.
            if let Some(&second) = text.get(start + 1) {
                if ASCII[second as usize] == LETTER {
                    return self.letters(text, start + 2);
                }
            }
        }
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
        let before = from.max(1) - 1;
        let mut windows = text.get(before..)?.windows(2);
        let cut = windows.position(is_cut);
        ops::count(cut.unwrap_or(text.len() - before));
        Some(before + cut? + 1)
    }

    /// The last such place.
    pub fn last_cut(&self, text: &[u8]) -> Option<usize> {
        let cut = text.windows(2).rposition(is_cut);
        ops::count(text.len() - cut.unwrap_or(0));
        Some(cut? + 1)
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
    #[inline(always)]
    fn letters(&self, text: &[u8], mut at: usize) -> usize {
        let start = at;
        // Eight bytes at a time: one jump for words of any common length, where a loop over
        // characters has one that cannot be foretold at each word's end.
        while let Some(window) = text.get(at..at + 8) {
            let letters = leading_letters(u64::from_le_bytes(window.try_into().expect("8 bytes")));
            at += letters;
            if letters < 8 {
                if text[at] < 0x80 {
                    ops::count(at - start);
                    return at;
                }
                break;
            }
        }
        let end = self.any_letters(text, at);
        ops::count(end - start);
        end
    }

    /// `\p{L}*`, character by character.
    fn any_letters(&self, text: &[u8], mut at: usize) -> usize {
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
        if text[start] == b'\'' {
            if let Some(end) = contraction(text, after) {
                return end;
            }
        }
        match self.class_at(text, after) {
            (LETTER, second) => self.letters(text, second),
            _ => self.punctuation(text, after),
        }
    }

    /// `[^\s\p{L}\p{N}]*[\r\n]*`
    fn punctuation(&self, text: &[u8], start: usize) -> usize {
        let mut at = start;
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
        ops::count(at - start);
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
        ops::count(at - start);
        match after_newline {
            Some(end) => end,
            None if at == text.len() || last == start => at,
            None => last,
        }
    }
}

/// How many of eight bytes are ASCII letters before the first that is none. The first byte is
/// the lowest.
#[inline(always)]
fn leading_letters(window: u64) -> usize {
    const EACH: u64 = 0x0101_0101_0101_0101;
    let lower = (window | (EACH * 0x20)) & (EACH * 0x7f);
    // The highest bit of each byte tells: no carry leaves a byte, since all are below 0x80.
    let from_a = lower + EACH * (0x80 - b'a' as u64);
    let above_z = lower + EACH * (0x7f - b'z' as u64);
    let others = !(from_a & !above_z & !window) & (EACH * 0x80);
    others.trailing_zeros() as usize / 8
}

/// Whether a text can be cut between these two bytes of it.
fn is_cut(two: &[u8]) -> bool {
    let next = ASCII[two[1] as usize];
    ASCII[two[0] as usize] == LETTER && next != LETTER && next != MULTIBYTE
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

#[cfg(test)]
mod tests {
    use crate::pattern::{GPT4, Pattern};

    /// One of each kind of character that the pattern tells apart, in ASCII and beyond.
    const KINDS: [char; 21] = [
        'a', 'S', 'l', 'v', 'E', '7', ' ', '\t', '\n', '\r', '\'', '!', 'é', '\u{17f}', '中', '½',
        '\u{301}', '\u{3000}', '\u{85}', '😀', '\u{200b}',
    ];

    fn pieces(pattern: &Pattern, text: &str) -> Vec<(usize, usize)> {
        let mut pieces = Vec::new();
        pattern
            .for_each_piece(text, |start, end| pieces.push((start, end)))
            .expect("splits");
        pieces
    }

    fn both(max_digits: usize) -> (Pattern, Pattern) {
        let source = GPT4.replace("{1,3}", &format!("{{1,{max_digits}}}"));
        let scanner = Pattern::new(&source).expect("a known pattern");
        assert!(scanner.is_scanned());
        (scanner, Pattern::regex(&source).expect("compiles"))
    }

    /// Steps of a linear congruential generator (Knuth's MMIX).
    fn random(state: &mut u64, below: usize) -> usize {
        *state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (*state >> 33) as usize % below
    }

    #[test]
    fn equal_to_the_regex_on_every_short_text() {
        let (scanner, regex) = both(2);
        let mut texts = vec![String::new()];
        for _ in 0..3 {
            let longer = |text: &String| KINDS.map(|c| format!("{text}{c}"));
            texts = texts.iter().flat_map(longer).collect();
            for text in &texts {
                assert_eq!(pieces(&scanner, text), pieces(&regex, text), "{text:?}");
            }
        }
    }

    #[test]
    fn equal_to_the_regex_on_random_texts() {
        let mut state = 1;
        for max_digits in 1..=3 {
            let (scanner, regex) = both(max_digits);
            for _ in 0..10_000 {
                let len = 1 + random(&mut state, 40);
                let kinds = 1 + random(&mut state, KINDS.len());
                let text: String = (0..len).map(|_| KINDS[random(&mut state, kinds)]).collect();
                assert_eq!(pieces(&scanner, &text), pieces(&regex, &text), "{text:?}");
            }
        }
    }

    #[test]
    fn equal_to_the_regex_after_an_apostrophe_for_every_character() {
        let (scanner, regex) = both(3);
        for c in (0..=u32::from(char::MAX)).filter_map(char::from_u32) {
            let text = format!("x'{c}y");
            if c.is_alphabetic() || (c as u32) % 64 == 0 {
                assert_eq!(pieces(&scanner, &text), pieces(&regex, &text), "{text:?}");
            }
        }
    }

    #[test]
    fn parts_have_the_pieces_of_the_whole() {
        let (scanner, _) = both(2);
        let mut state = 7;
        for _ in 0..2_000 {
            let text: String = (0..60)
                .map(|_| KINDS[random(&mut state, KINDS.len())])
                .collect();
            let size = 1 + random(&mut state, 20);
            let mut joined = Vec::new();
            let mut before = 0;
            for part in scanner.parts(&text, size) {
                let shifted = pieces(&scanner, part).into_iter();
                joined.extend(shifted.map(|(start, end)| (before + start, before + end)));
                before += part.len();
            }
            assert_eq!(
                joined,
                pieces(&scanner, &text),
                "{text:?} in parts of {size}"
            );
        }
    }

    #[test]
    fn other_patterns_are_left_to_the_regex() {
        for source in [
            r"\w+",
            r"\p{N}{1,3}",
            &GPT4.replace("{1,3}", "{1,12}"),
            &GPT4[1..],
        ] {
            assert!(
                !Pattern::new(source).expect("compiles").is_scanned(),
                "{source}"
            );
        }
    }
}
