"""The tokenizers of nanochat/tokenizer.py: training, special tokens, files, characters."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.spec import SpecError
from nanochat.tokenizer import (
    SPECIAL_TOKENS,
    CharTokenizer,
    Tokenizer,
    TokenizerLike,
    load_tokenizer,
)

TEXTS = ["the cat sat on the mat, the cat's 1234 mats", "Où est le chat ? 猫 😀\n\n"] * 20
CHESS = "e4 e5 d4 d5"


def tokenizers() -> list[TokenizerLike]:
    return [Tokenizer.train(TEXTS, 400), CharTokenizer.train([CHESS])]


@pytest.mark.parametrize("which", [0, 1])
def test_the_interface_and_the_file(which: int, tmp_path: Path) -> None:
    tokenizer = tokenizers()[which]
    text = [TEXTS[0], CHESS][which]
    assert tokenizer.vocab_size == [400, 32][which]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()
    assert tokenizer.count_tokens(text) == len(tokenizer.encode(text))
    assert tokenizer.special_id("bos") == tokenizer.bos_id == tokenizer.vocab_size - 9
    assert tokenizer.decode([tokenizer.bos_id]) == "<|bos|>"
    ids, offsets = tokenizer.encode_batch([text, "", text], prepend_bos=True)
    one = [tokenizer.bos_id, *tokenizer.encode(text)]
    assert ids.tolist() == [*one, tokenizer.bos_id, *one]
    assert offsets.tolist() == [0, len(one), len(one) + 1, 2 * len(one) + 1]
    assert ids.dtype == np.int32
    assert tokenizer.token_bytes()[tokenizer.encode(text)].sum() == len(text.encode())
    assert tokenizer.token_bytes()[-len(SPECIAL_TOKENS) :].sum() == 0
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode(text) == tokenizer.encode(text)
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match="no token id"):
            tokenizer.decode([bad])
    with pytest.raises(ValueError, match="no special token"):
        tokenizer.special_id("eos")


def test_special_tokens_written_in_a_text_are_text() -> None:
    tokenizer = Tokenizer.train(TEXTS, 400)
    ids = tokenizer.encode("<|bos|><|user_end|>")
    assert max(ids) < tokenizer.bos_id
    assert tokenizer.decode(ids) == "<|bos|><|user_end|>"


def test_ids_are_those_of_tiktoken() -> None:
    tokenizer = Tokenizer.train(TEXTS, 400)
    for text in [*TEXTS[:2], "unseen: ſ'ſ \u0301 77777"]:
        assert tokenizer.encode(text) == tokenizer.tiktoken.encode_ordinary(text)


def test_more_vocabulary_than_merges_keeps_the_size() -> None:
    tokenizer = Tokenizer.train(["ab"], 300)
    assert tokenizer.vocab_size == 300
    assert tokenizer.decode([280]) == "\ufffd"
    with pytest.raises(SpecError, match="264 is too small"):
        Tokenizer.train(["ab"], 264)


def test_training_from_parquet_equals_training_from_texts(tmp_path: Path) -> None:
    shard = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS}), shard)
    from_files = Tokenizer.train_parquet([shard], 400, max_chars=600, doc_cap_chars=30)
    capped = [text[:30] for text in TEXTS]
    expected = "".join(capped)[:600]
    taken = []
    for text in capped:
        taken.append(text[: len(expected) - sum(map(len, taken))])
    assert from_files.fingerprint == Tokenizer.train(taken, 400).fingerprint


def test_unknown_characters_are_counted_and_shown() -> None:
    tokenizer = CharTokenizer.train([CHESS])
    with pytest.raises(SpecError, match=r"3 characters .*'x' \(U\+0078\) 2 times, 'é'"):
        tokenizer.encode("exxé4")
    with pytest.raises(SpecError, match="16 different characters, 15 are allowed.*'p'"):
        CharTokenizer.train(["abcdefghijklmno" * 2 + "p"])
    mapped = CharTokenizer.train([CHESS + "?"], unknown="?")
    assert mapped.decode(mapped.encode("exxé4")) == "e???4"
    crowded = CharTokenizer.train(["abcdefghijklmno" * 2 + "p"], unknown="?")
    assert crowded.decode(crowded.encode("apn")) == "a?n"
    with pytest.raises(SpecError, match="empty"):
        CharTokenizer.train([])


def test_a_strange_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for text, said in [
        ('{"format_version": 2}', "format 2"),
        ('{"format_version": 1, "kind": "x"}', "kind"),
        ('{"format_version": 1, "kind": "bpe", "special_tokens": []}', "special tokens"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            load_tokenizer(tmp_path)
