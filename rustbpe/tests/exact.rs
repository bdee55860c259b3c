//! Merges and ids equal those of a slow, readable twin, so that `cargo test` alone proves the
//! core. (`tests/unit/test_rustbpe.py` holds it against the published rustbpe and tiktoken.)

use std::collections::{BTreeMap, HashMap};

use rustbpe::control::Control;
use rustbpe::count::{Batch, count_words};
use rustbpe::encode::Encoder;
use rustbpe::pattern::{GPT4, Pattern, PatternError};
use rustbpe::train::{Pair, TrainError, train};
use rustbpe::vocab::Vocab;
use rustbpe::words::WordCounts;

// -- the twin: as one would explain it, slow on purpose ---------------------------------------

mod twin {
    use super::*;

    /// Pieces of a text, found by the regex engine.
    pub fn pieces(text: &str) -> Vec<&[u8]> {
        let mut pieces = Vec::new();
        let visit = |start: usize, end: usize| pieces.push(&text.as_bytes()[start..end]);
        let regex = Pattern::regex(GPT4).expect("compiles");
        regex.for_each_piece(text, visit).expect("splits");
        pieces
    }

    fn merge(ids: &[u32], pair: Pair, id: u32) -> Vec<u32> {
        let mut merged: Vec<u32> = Vec::new();
        for &next in ids {
            match merged.last_mut() {
                Some(last) if (*last, next) == pair => *last = id,
                _ => merged.push(next),
            }
        }
        merged
    }

    /// Of the most frequent pairs the one with the smallest ids is merged, again and again.
    pub fn train(counts: &HashMap<Vec<u8>, u64>, vocab_size: u32) -> Vec<Pair> {
        let ids = |word: &Vec<u8>| word.iter().map(|&byte| u32::from(byte)).collect();
        let mut words: Vec<(Vec<u32>, u64)> = counts.iter().map(|(w, &n)| (ids(w), n)).collect();
        let mut merges = Vec::new();
        while 256 + (merges.len() as u32) < vocab_size {
            let mut pairs: BTreeMap<Pair, u64> = BTreeMap::new();
            for (ids, count) in &words {
                for two in ids.windows(2) {
                    *pairs.entry((two[0], two[1])).or_default() += count;
                }
            }
            let Some((&best, _)) = pairs.iter().rev().max_by_key(|&(_, count)| count) else {
                break;
            };
            let id = 256 + merges.len() as u32;
            for (ids, _) in &mut words {
                *ids = merge(ids, best, id);
            }
            merges.push(best);
        }
        merges
    }

    /// In each piece the earliest merge first, until none applies.
    pub fn encode(text: &str, merges: &[Pair]) -> Vec<u32> {
        let ranks: HashMap<Pair, u32> = (256..).zip(merges).map(|(id, &pair)| (pair, id)).collect();
        let mut all = Vec::new();
        for piece in pieces(text) {
            let mut ids: Vec<u32> = piece.iter().map(|&byte| u32::from(byte)).collect();
            while let Some(&id) = ids
                .windows(2)
                .filter_map(|t| ranks.get(&(t[0], t[1])))
                .min()
            {
                ids = merge(&ids, merges[id as usize - 256], id);
            }
            all.extend(ids);
        }
        all
    }

    /// As tiktoken does: a piece that is a token is that token; else the neighbours whose joined
    /// bytes have the lowest rank are joined, the leftmost first, until none are a token.
    pub fn encode_by_bytes(text: &str, vocab: &Vocab) -> Vec<u32> {
        let token = |id| vocab.token(id).expect("a token");
        let ranks: HashMap<&[u8], u32> = (0..vocab.size()).map(|id| (token(id), id)).collect();
        let mut all = Vec::new();
        for piece in pieces(text) {
            if let Some(&id) = ranks.get(piece) {
                all.push(id);
                continue;
            }
            let mut starts: Vec<usize> = (0..=piece.len()).collect();
            let joined = |s: &[usize]| ranks.get(&piece[s[0]..s[2]]).copied();
            while let Some((_, at)) = (starts.windows(3).enumerate())
                .filter_map(|(i, three)| Some((joined(three)?, i + 1)))
                .min()
            {
                starts.remove(at);
            }
            all.extend(starts.windows(2).map(|two| ranks[&piece[two[0]..two[1]]]));
        }
        all
    }
}

// -- texts ------------------------------------------------------------------------------------

/// A linear congruential generator (Knuth's MMIX).
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005);
        self.0 = self.0.wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % end
    }

    /// One of `items`, the first more often.
    fn pick<'a, T: ?Sized>(&mut self, items: &[&'a T]) -> &'a T {
        let end = 1 + self.below(items.len());
        items[self.below(end)]
    }

    fn char(&mut self, first: u32, last: u32) -> char {
        let end = 1 + self.below((last - first) as usize);
        char::from_u32(first + self.below(end) as u32).expect("no surrogates in the range")
    }

    fn word(&mut self, kind: &str) -> String {
        let syllables = [
            "the", "of", "and", "to", "in", "that", "ing", "tion", "er", "un", "con",
        ];
        let many = 1 + self.below(5);
        let some: String = (0..many).map(|_| self.pick(&syllables)).collect();
        match kind {
            "english" => some + self.pick(&[" ", ", ", ".\n\n", "'s ", "'LL ", " 1984 ", "! "]),
            "code" => some + self.pick(&["(", " = ", ";\n    ", "[0]", "\n\n\t\t", " -> ", "::<"]),
            "cjk" => {
                (0..many * 3)
                    .map(|_| self.char(0x4e00, 0x9fff))
                    .collect::<String>()
                    + "。"
            }
            "emoji" => {
                let joiner = self.pick(&["", "\u{200d}", "\u{fe0f}", " "]);
                let face = self.char(0x1f300, 0x1f6ff);
                format!("{face}{joiner}{}", self.char(0x1f900, 0x1f9ff))
            }
            "combining" => {
                let base = self.char(0x61, 0x180);
                let marks: String = (0..many).map(|_| self.char(0x300, 0x36f)).collect();
                format!("{base}{marks} ")
            }
            "few" => (0..many * 2)
                .map(|_| self.pick(&["a", "b", " ", "'", "\n", "7"]))
                .collect(),
            // Longer than any piece that is merged in place.
            "runs" => self
                .pick(&["a", "ab", " ", "中", "é", "-"])
                .repeat(self.below(400)),
            _ => unreachable!("{kind} is no kind"),
        }
    }

    fn text(&mut self, kind: &str, words: usize) -> String {
        (0..words).map(|_| self.word(kind)).collect()
    }
}

const KINDS: [&str; 7] = [
    "english",
    "code",
    "cjk",
    "emoji",
    "combining",
    "few",
    "runs",
];

fn counted(texts: &[String], threads: usize) -> WordCounts {
    let pattern = Pattern::new(GPT4).expect("a known pattern");
    count_words::<PatternError>(&pattern, threads, &Control::default(), |feed| {
        for text in texts {
            let mut batch = Batch::default();
            batch.push(text);
            feed.push(batch);
        }
        Ok(())
    })
    .expect("counts")
}

fn as_map(words: &WordCounts) -> HashMap<Vec<u8>, u64> {
    let mut map = HashMap::new();
    words.for_each(|word, count| assert_eq!(map.insert(word.to_vec(), count), None));
    map
}

fn trained(words: WordCounts, vocab_size: u32) -> Vec<Pair> {
    train(words, vocab_size, &Control::default()).expect("trains")
}

fn encoder(merges: Vec<Pair>) -> Encoder {
    let pattern = Pattern::new(GPT4).expect("a known pattern");
    Encoder::new(pattern, Vocab::new(merges).expect("trained"))
}

// -- exact ------------------------------------------------------------------------------------

#[test]
fn counts_equal_the_twin_on_any_number_of_threads() {
    let mut random = Random(1);
    let texts: Vec<String> = KINDS.map(|kind| random.text(kind, 1_500)).into();
    let mut expected: HashMap<Vec<u8>, u64> = HashMap::new();
    for piece in texts.iter().flat_map(|text| twin::pieces(text)) {
        *expected.entry(piece.to_vec()).or_default() += 1;
    }
    for threads in [1, 2, 8] {
        assert_eq!(
            as_map(&counted(&texts, threads)),
            expected,
            "{threads} threads"
        );
    }
}

#[test]
fn merges_equal_the_twin() {
    for kind in KINDS {
        let texts = [Random(2).text(kind, 150), Random(3).text(kind, 150)];
        let expected = twin::train(&as_map(&counted(&texts, 1)), 600);
        for threads in [1, 2, 8] {
            assert_eq!(trained(counted(&texts, threads), 600), expected, "{kind}");
        }
    }
}

#[test]
fn merges_equal_the_twin_until_no_pair_is_left() {
    let mut random = Random(4);
    for _ in 0..300 {
        let words = 1 + random.below(12);
        let text = random.text("few", words);
        let words = counted(std::slice::from_ref(&text), 1);
        let expected = twin::train(&as_map(&words), 2_000);
        assert_eq!(trained(words, 2_000), expected, "{text:?}");
    }
}

#[test]
fn merges_equal_the_twin_for_counts_beyond_32_bits() {
    let mut random = Random(5);
    let mut words = WordCounts::default();
    for piece in twin::pieces(&random.text("english", 200)) {
        let count = [1, 1 << 20, 1 << 31, 1 << 33, u64::from(u32::MAX)][random.below(5)];
        words.add(piece, 0, piece.len(), count);
    }
    let expected = twin::train(&as_map(&words), 400);
    assert_eq!(trained(words, 400), expected);
}

#[test]
fn ids_equal_both_twins() {
    let mut random = Random(6);
    let texts: Vec<String> = KINDS.map(|kind| random.text(kind, 300)).into();
    for vocab_size in [256, 300, 1_000, 6_000] {
        let encoder = encoder(trained(counted(&texts, 2), vocab_size));
        let unseen: Vec<String> = KINDS.map(|kind| random.text(kind, 40)).into();
        for text in &unseen {
            let expected = twin::encode(text, encoder.vocab().merges());
            assert_eq!(
                twin::encode_by_bytes(text, encoder.vocab()),
                expected,
                "{text:?}"
            );
            let mut ids = Vec::new();
            encoder.encode(text, &mut ids).expect("encodes");
            assert_eq!(ids, expected, "{text:?}");
            assert_eq!(encoder.vocab().decode(&ids).expect("ids"), text.as_bytes());
        }
    }
}

#[test]
fn batches_equal_single_texts_on_any_number_of_threads() {
    let mut random = Random(7);
    let texts: Vec<String> = (0..200).map(|i| random.text(KINDS[i % 7], i)).collect();
    let long: String = texts.concat().repeat(8); // Is cut into segments.
    let encoder = encoder(trained(counted(&texts, 1), 2_000));
    let mut batch: Vec<&str> = texts.iter().map(String::as_str).collect();
    batch.extend(["", &long, ""]);
    let (mut ids, mut offsets) = (Vec::new(), vec![0]);
    for text in &batch {
        ids.push(7);
        encoder.encode(text, &mut ids).expect("encodes");
        offsets.push(ids.len());
    }
    for threads in [1, 2, 8] {
        let control = Control::default();
        let made = encoder.encode_batch(&batch, Some(7), threads, &control);
        let made = made.expect("encodes");
        assert_eq!(made.offsets, offsets, "{threads} threads");
        assert_eq!(made.runs.concat(), ids, "{threads} threads");
    }
}

/// Tokens that no text becomes, and the same bytes made twice: as in merges that were not
/// trained. The ids must be the twin's, and not depend on what was encoded before.
#[test]
fn ids_equal_the_twin_for_any_merges() {
    let mut random = Random(8);
    for _ in 0..60 {
        let mut merges: Vec<Pair> = Vec::new();
        while merges.len() < 60 {
            let mut token = || match random.below(3) {
                0 if !merges.is_empty() => 256 + random.below(merges.len()) as u32,
                _ => [b'a', b'b', b' '][random.below(3)].into(),
            };
            let pair = (token(), token());
            if !merges.contains(&pair) {
                merges.push(pair);
            }
        }
        let encoder = encoder(merges);
        for _ in 0..20 {
            let text = random.text("few", 20);
            let mut ids = Vec::new();
            encoder.encode(&text, &mut ids).expect("encodes");
            assert_eq!(
                ids,
                twin::encode(&text, encoder.vocab().merges()),
                "{text:?}"
            );
        }
    }
}

// -- limits -----------------------------------------------------------------------------------

#[test]
fn little_or_no_text() {
    for text in ["", "a", "a 1"] {
        assert_eq!(trained(counted(&[text.to_owned()], 2), 300), [], "{text:?}");
    }
    let aaaa = || counted(&["aaaa".to_owned()], 1);
    assert_eq!(trained(aaaa(), 256), []);
    assert_eq!(trained(aaaa(), u32::MAX), [(97, 97), (256, 256)]);
    let refused = train(aaaa(), 255, &Control::default());
    assert_eq!(refused, Err(TrainError::VocabTooSmall(255)));
    let control = Control::default();
    control.stop();
    assert_eq!(train(aaaa(), 300, &control), Err(TrainError::Stopped));
}
