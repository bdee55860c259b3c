//! A vocabulary and its split pattern as one text file.
//!
//! ```text
//! rustbpe vocabulary 1
//! pattern 18          (bytes of the pattern, which is the next line and may hold anything)
//! (?i:a|b)|[^a-z]\w+
//! merges 2
//! 104 105             (merge i joins two tokens into token 256 + i)
//! 256 33
//! ```

use std::fmt::Write;
use std::fs;
use std::io::{Error, ErrorKind, Write as _};
use std::path::Path;

use crate::train::Pair;

const FIRST_LINE: &str = "rustbpe vocabulary 1";

/// Writes the file so that, whatever happens, there is the old one or the whole new one.
pub fn save(path: &Path, pattern: &str, merges: &[Pair]) -> Result<(), Error> {
    let mut text = format!(
        "{FIRST_LINE}\npattern {}\n{pattern}\nmerges ",
        pattern.len()
    );
    let _ = writeln!(text, "{}", merges.len());
    for (left, right) in merges {
        let _ = writeln!(text, "{left} {right}");
    }
    let mut staged = path.as_os_str().to_owned();
    staged.push(format!(".{}.tmp", std::process::id()));
    let mut file = fs::File::create(&staged)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&staged, path)
}

/// Reads what [`save`] wrote: pattern and merges.
pub fn load(path: &Path) -> Result<(String, Vec<Pair>), Error> {
    let text = String::from_utf8(fs::read(path)?).ok();
    text.and_then(|text| parse(&text))
        .ok_or_else(|| Error::new(ErrorKind::InvalidData, "no rustbpe vocabulary"))
}

fn parse(text: &str) -> Option<(String, Vec<Pair>)> {
    let rest = text.strip_prefix(FIRST_LINE)?.strip_prefix("\npattern ")?;
    let (len, rest) = rest.split_once('\n')?;
    let (pattern, rest) = rest.split_at_checked(len.parse().ok()?)?;
    let mut lines = rest.strip_prefix("\nmerges ")?.lines();
    let count: usize = lines.next()?.parse().ok()?;
    let pair = |line: &str| {
        let (left, right) = line.split_once(' ')?;
        Some((left.parse().ok()?, right.parse().ok()?))
    };
    let merges: Vec<Pair> = lines.map(pair).collect::<Option<_>>()?;
    (merges.len() == count).then(|| (pattern.to_owned(), merges))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_is_loaded() {
        let folder = std::env::temp_dir().join(format!("rustbpe-file-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder for the test");
        let path = folder.join("vocabulary");
        for pattern in ["", "a|b", "\n\r\nmerges 7\n", "é+"] {
            let merges = vec![(104, 105), (256, 33)];
            save(&path, pattern, &merges).expect("saved");
            assert_eq!(load(&path).expect("loaded"), (pattern.to_owned(), merges));
        }
        assert_eq!(fs::read_dir(&folder).expect("listed").count(), 1);
        fs::remove_dir_all(&folder).expect("removed");
    }

    #[test]
    fn a_torn_file_is_refused() {
        let whole = "rustbpe vocabulary 1\npattern 1\na\nmerges 2\n104 105\n256 33\n";
        assert!(parse(whole).is_some());
        for end in 0..whole.len() - 4 {
            assert_eq!(parse(&whole[..end]), None, "{end}");
        }
    }
}
