//! Operation counts, for the tests that show that no time is quadratic. Nothing elsewhere.

#[cfg(test)]
thread_local! {
    static COUNT: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// Notes `operations` more on this thread.
#[inline(always)]
pub fn count(operations: usize) {
    #[cfg(test)]
    COUNT.with(|count| count.set(count.get() + operations));
    #[cfg(not(test))]
    let _ = operations;
}

/// Operations that `work` takes on this thread.
#[cfg(test)]
pub fn of(work: impl FnOnce()) -> usize {
    COUNT.with(|count| count.set(0));
    work();
    COUNT.with(std::cell::Cell::get)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::of;
    use crate::batch::Encoded;
    use crate::control::Control;
    use crate::count::count_words;
    use crate::encode::Encoder;
    use crate::pattern::{GPT4, Pattern};
    use crate::source::{Files, SourceError};
    use crate::train::train;
    use crate::vocab::Vocab;
    use crate::words::WordCounts;

    const MB: usize = 1_000_000;

    fn pattern() -> Pattern {
        Pattern::new(GPT4).expect("a known pattern")
    }

    fn words_of(text: &str) -> WordCounts {
        let mut words = WordCounts::default();
        let note = |start, end| words.note(text.as_bytes(), start, end);
        pattern().for_each_piece(text, note).expect("splits");
        words.settle();
        words
    }

    /// Operations on 8, 16 and 32 MB: at most `per_byte` each, and about twice as many for twice
    /// as much (reading works in steps, so not exactly).
    fn assert_linear(name: &str, per_byte: usize, operations: impl Fn(usize) -> usize) {
        let counts = [8, 16, 32].map(|size| operations(size * MB));
        println!("{name}: {counts:?} operations on 8, 16 and 32 MB");
        assert!(counts[0] >= 8 * MB, "{name}: {counts:?} miss something");
        assert!(counts[0] <= per_byte * 8 * MB, "{name}: {counts:?}");
        for two in counts.windows(2) {
            assert!(two[1] * 100 <= two[0] * 210, "{name}: {counts:?}");
        }
    }

    fn assert_training_and_encoding_linear(name: &str, text_of: impl Fn(usize) -> String) {
        let control = Control::default();
        assert_linear(&format!("{name}, splitting and counting"), 4, |size| {
            let text = text_of(size);
            of(|| drop(words_of(&text)))
        });
        assert_linear(&format!("{name}, training"), 8, |size| {
            let words = words_of(&text_of(size));
            of(|| drop(train(words, 300, &control)))
        });
        let merges = train(words_of(&text_of(1000)), 300, &control).expect("trains");
        let encoder = Encoder::new(pattern(), Vocab::new(merges).expect("trained"));
        assert_linear(&format!("{name}, encoding"), 8, |size| {
            let text = text_of(size);
            of(|| {
                let encode = encoder.encode_batch(&[&text], None, 1, &control);
                assert_ne!(encode.expect("encodes"), Encoded::default());
            })
        });
    }

    #[test]
    fn one_letter() {
        assert_training_and_encoding_linear("a", |size| "a".repeat(size));
    }

    #[test]
    fn spaces() {
        assert_training_and_encoding_linear("spaces", |size| " ".repeat(size));
    }

    #[test]
    fn spaces_around_line_ends_and_before_a_letter() {
        assert_training_and_encoding_linear("spaces, line end, spaces, x", |size| {
            let half = " ".repeat(size / 2 - 1);
            format!("{half}\n{half}x")
        });
    }

    #[test]
    fn reading_a_file_without_a_place_to_cut() {
        let path = std::env::temp_dir().join(format!("rustbpe-ops-{}", std::process::id()));
        let control = Control::default();
        assert_linear("reading spaces", 8, |size| {
            fs::write(&path, " ".repeat(size)).expect("written");
            let files = Files {
                paths: vec![path.clone()],
                column: String::new(),
                max_chars: None,
                doc_cap_chars: None,
            };
            of(|| {
                let words = count_words(&pattern(), 1, &control, |feed| {
                    files.feed(&pattern(), feed).map(drop)
                });
                let words: Result<_, SourceError> = words;
                assert_eq!(words.expect("reads").len(), 1);
            })
        });
        fs::remove_file(&path).expect("removed");
    }
}
