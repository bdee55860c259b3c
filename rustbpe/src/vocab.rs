//! What training makes: the merges, and the bytes of every token.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;

use crate::train::{NUM_BYTES, Pair};

/// Merges that no training can have made.
#[derive(Debug, PartialEq, Eq)]
pub enum VocabError {
    /// Merge `index` names a token that does not exist yet.
    UnknownToken { index: usize, pair: Pair },
    /// Merge `index` is there already.
    Repeated { index: usize, pair: Pair },
}

impl fmt::Display for VocabError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VocabError::UnknownToken { index, pair } => write!(
                f,
                "merge {index} joins {pair:?}, but only the tokens below {} exist by then",
                NUM_BYTES as usize + index
            ),
            VocabError::Repeated { index, pair } => {
                write!(
                    f,
                    "merge {index} joins {pair:?}, which an earlier merge does already"
                )
            }
        }
    }
}

impl std::error::Error for VocabError {}

/// The tokens: 256 single bytes, then one per merge.
#[derive(Clone, Debug)]
pub struct Vocab {
    merges: Vec<Pair>,
    bytes: Vec<u8>,
    token: Vec<Range<usize>>,
}

impl Default for Vocab {
    fn default() -> Vocab {
        Vocab::new(Vec::new()).expect("no merges are valid merges")
    }
}

impl Vocab {
    /// Merge i joins two tokens into token 256 + i.
    pub fn new(merges: Vec<Pair>) -> Result<Vocab, VocabError> {
        let mut bytes: Vec<u8> = (0..=u8::MAX).collect();
        let mut token: Vec<Range<usize>> = (0..bytes.len()).map(|i| i..i + 1).collect();
        let mut seen = HashMap::with_capacity(merges.len());
        for (index, &pair) in merges.iter().enumerate() {
            let range = |id: u32| {
                token
                    .get(id as usize)
                    .cloned()
                    .ok_or(VocabError::UnknownToken { index, pair })
            };
            let (left, right) = (range(pair.0)?, range(pair.1)?);
            if seen.insert(pair, index).is_some() {
                return Err(VocabError::Repeated { index, pair });
            }
            let start = bytes.len();
            bytes.extend_from_within(left);
            bytes.extend_from_within(right);
            token.push(start..bytes.len());
        }
        Ok(Vocab {
            merges,
            bytes,
            token,
        })
    }

    pub fn merges(&self) -> &[Pair] {
        &self.merges
    }

    /// Number of tokens.
    pub fn size(&self) -> u32 {
        self.token.len() as u32
    }

    /// The bytes of a token, if there is such a token.
    pub fn token(&self, id: u32) -> Option<&[u8]> {
        Some(&self.bytes[self.token.get(id as usize)?.clone()])
    }

    /// The bytes of all `ids`, or the first id that is no token.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>, u32> {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            bytes.extend_from_slice(self.token(id).ok_or(id)?);
        }
        Ok(bytes)
    }
}
