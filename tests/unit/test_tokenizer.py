"""The tokenizers of nanochat/tokenizer.py: training, special tokens, files, characters."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.corpus import ensure, locate
from nanochat.rundir import RunDir
from nanochat.spec import RunSpec, SpecError
from nanochat.stages import tok_train
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
    said = r"3 characters .*'x' \(U\+0078\) 2 times, 'é'.*data\.unknown_char=\"\?\""
    with pytest.raises(SpecError, match=said):
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


# -- the stage


def char_run(folder: Path, text: str, unknown_char: str | None = None, **stages: Any) -> RunDir:
    """A run on a text file whose data is there."""
    path = folder / "text.txt"
    path.write_text(text, encoding="utf-8")
    data = {"source": "text", "path": str(path), "tokenizer": "char", "unknown_char": unknown_char}
    model = {"depth": 1, "vocab_size": 128}
    spec = RunSpec.model_validate(
        {"name": "c", "model": model, "data": data, "tok_train": {}, **stages}
    )
    ensure(spec.data)
    run = RunDir(folder / "run")
    run.create()
    run.freeze_spec(spec)
    return run


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path / "home"))
    return tmp_path


def test_a_letter_that_only_the_held_out_text_has_is_in_the_alphabet(home: Path) -> None:
    text = "abcd efg\n" * 3000
    run = char_run(home, text[:1100] + "Ω" + text[1101:])  # in the second block of 1,024
    files = locate(run.spec().data)
    train, val = ("".join(tok_train.iter_texts(split)) for split in (files.train, files.val))
    assert "Ω" in val and "Ω" not in train
    tok_train.main(run)
    tokenizer = load_tokenizer(run.tokenizer_dir)
    assert tokenizer.decode(tokenizer.encode(val)) == val


LETTERS = "abcdefghijklmnopqrstuvwxyz 0123456789 CRS:\n"
STAGES: list[tuple[str, dict[str, Any]]] = [
    ("mid_train", {"num_epochs": 1, "mixture": {"copying": 9, "kinds": 9}}),
    ("chat_sft", {"num_epochs": 1, "mixture": {"kinds": 9}}),
    ("chat_rl", {"num_steps": 1, "task": "arithmetic"}),
    ("evaluate", {"tasks": ["spelling"]}),
]


@pytest.mark.parametrize(("stage", "settings"), STAGES)
def test_characters_that_a_later_stage_reads_are_missed_before_any_training(
    home: Path, stage: str, settings: dict[str, Any]
) -> None:
    lacking = {
        "chat_rl": r"arithmetic .*'\*' '\+' '-'",
        "evaluate": r"spelling .*',' '\.' '\?' 'H'",
    }
    said = lacking.get(stage, r"kinds .*'-' '\.' '=' '\?' 'A' 'B' 'M'")
    run = char_run(home, LETTERS * 200, **{stage: settings})
    with pytest.raises(SpecError, match=said + r'.*data\.unknown_char="\?"') as caught:
        tok_train.main(run)
    assert f"(read by {stage})" in str(caught.value)
    assert "copying" not in str(caught.value), "the text has all characters of this one"
    assert not run.tokenizer_dir.exists()


def test_an_unknown_char_serves_the_later_stages(home: Path) -> None:
    run = char_run(home, LETTERS * 200, unknown_char="?", **dict(STAGES))
    tok_train.main(run)
    tokenizer = load_tokenizer(run.tokenizer_dir)
    assert tokenizer.decode(tokenizer.encode("A+a")) == "??a"


def test_a_text_with_the_characters_of_its_tasks_is_taken_and_torch_is_not(home: Path) -> None:
    ascii_text = "".join(map(chr, range(32, 127))) + "\n"
    run = char_run(home, ascii_text * 100, **dict(STAGES))
    code = (
        "import sys; from pathlib import Path; from nanochat.rundir import RunDir; "
        "from nanochat.stages.tok_train import main; "
        f"main(RunDir(Path({str(run.path)!r}))); assert 'torch' not in sys.modules"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert load_tokenizer(run.tokenizer_dir).encode("A+a")


def test_a_damaged_shard_is_named(home: Path) -> None:
    path = home / "text.txt"
    path.write_text("some words\n" * 1000)
    data = {"source": "text", "path": str(path)}
    model = {"depth": 1, "vocab_size": 300}
    spec = RunSpec.model_validate({"name": "b", "model": model, "data": data, "tok_train": {}})
    [shard] = ensure(spec.data).train
    run = RunDir(home / "run")
    run.create()
    run.freeze_spec(spec)
    shard.path.write_bytes(b"PAR1" * (shard.size // 4) + b"x" * (shard.size % 4))
    with pytest.raises(SpecError, match=r"train_00000\.parquet"):
        tok_train.main(run)
