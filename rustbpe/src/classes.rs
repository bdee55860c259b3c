//! Character classes of the split pattern: letter `\p{L}`, number `\p{N}`, white space `\s`.
//!
//! * ASCII comes from a constant table, everything else from a table with one byte per code
//!   point in blocks of 256, equal blocks stored once (about 30 KiB).
//! * The sets are those of the `regex-syntax` crate, which is also inside the regex engine of
//!   tiktoken, so that a scanner built on them cannot disagree with the regex.

use std::sync::LazyLock;

use regex_syntax::hir::{Class, HirKind};

/// Neither letter, number nor white space: punctuation, symbols, combining marks, controls.
pub const OTHER: u8 = 0;
pub const LETTER: u8 = 1;
pub const NUMBER: u8 = 2;
/// White space other than CR and LF.
pub const SPACE: u8 = 3;
/// CR or LF.
pub const NEWLINE: u8 = 4;
/// Only in [`ASCII`]: the byte starts a character that needs [`Classes::of`].
pub const MULTIBYTE: u8 = 5;

/// Class of each ASCII byte; [`MULTIBYTE`] for bytes from 0x80 on.
pub static ASCII: [u8; 256] = ascii_table();

const fn ascii_table() -> [u8; 256] {
    let mut table = [OTHER; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = match byte as u8 {
            b'a'..=b'z' | b'A'..=b'Z' => LETTER,
            b'0'..=b'9' => NUMBER,
            b'\r' | b'\n' => NEWLINE,
            b'\t' | 0x0b | 0x0c | b' ' => SPACE,
            0x80.. => MULTIBYTE,
            _ => OTHER,
        };
        byte += 1;
    }
    table
}

const BLOCK: usize = 256;
const CODE_POINTS: usize = 0x11_0000;

/// Class of every code point.
pub struct Classes {
    block_of: Vec<u16>,
    blocks: Vec<[u8; BLOCK]>,
}

static CLASSES: LazyLock<Classes> = LazyLock::new(Classes::build);

impl Classes {
    /// The one table of the process, built on first use in about 2 ms.
    pub fn get() -> &'static Classes {
        &CLASSES
    }

    /// Class of a code point.
    #[inline]
    pub fn of(&self, code_point: u32) -> u8 {
        let block = self.block_of[code_point as usize / BLOCK];
        self.blocks[block as usize][code_point as usize % BLOCK]
    }

    fn build() -> Classes {
        let mut flat = vec![OTHER; CODE_POINTS];
        for (pattern, class) in [(r"\p{L}", LETTER), (r"\p{N}", NUMBER), (r"\s", SPACE)] {
            for (start, end) in ranges(pattern) {
                flat[start as usize..=end as usize].fill(class);
            }
        }
        flat[b'\r' as usize] = NEWLINE;
        flat[b'\n' as usize] = NEWLINE;
        let mut classes = Classes {
            block_of: Vec::new(),
            blocks: Vec::new(),
        };
        for chunk in flat.chunks_exact(BLOCK) {
            let known = classes.blocks.iter().position(|block| block == chunk);
            let index = known.unwrap_or_else(|| {
                classes
                    .blocks
                    .push(chunk.try_into().expect("chunks are blocks"));
                classes.blocks.len() - 1
            });
            classes.block_of.push(index as u16);
        }
        classes
    }
}

fn ranges(pattern: &str) -> Vec<(u32, u32)> {
    let hir = regex_syntax::parse(pattern).expect("a constant class parses");
    match hir.kind() {
        HirKind::Class(Class::Unicode(class)) => class
            .iter()
            .map(|r| (r.start() as u32, r.end() as u32))
            .collect(),
        kind => unreachable!("{pattern} is a Unicode class, not {kind:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ascii_agrees_with_the_full_table() {
        for byte in 0..128u8 {
            assert_eq!(
                ASCII[byte as usize],
                Classes::get().of(u32::from(byte)),
                "{byte}"
            );
        }
    }

    #[test]
    fn sizes_are_those_of_the_unicode_version_in_tiktoken() {
        let mut counts = [0u32; 6];
        for code_point in 0..CODE_POINTS as u32 {
            counts[Classes::get().of(code_point) as usize] += 1;
        }
        assert_eq!(
            (counts[LETTER as usize], counts[NUMBER as usize]),
            (141_028, 1_911)
        );
        assert_eq!((counts[SPACE as usize], counts[NEWLINE as usize]), (23, 2));
    }
}
