"""rustbpe: exact against the published trainer, tiktoken and a slow twin; limits and files."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import slow_bpe
import tiktoken
from bpe_texts import KINDS, PATTERN, VOCAB_SIZES, digest, strange_text, texts
from hypothesis import given, settings
from hypothesis import strategies as st

import rustbpe

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = json.loads((ROOT / "tests/golden/rustbpe_merges.json").read_text())
FUZZ_S = float(os.environ.get("FUZZ_S", "600"))
OTHER_PATTERN = r"\w+|[^\w\s]+|\s+"


@cache
def corpus(kind: str) -> list[str]:
    return texts(kind)


def trained(
    some_texts: list[str], vocab_size: int, pattern: str = PATTERN, threads: int | None = None
) -> rustbpe.Tokenizer:
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(
        iter(some_texts), vocab_size, pattern=pattern, num_threads=threads
    )
    return tokenizer


def reference(tokenizer: rustbpe.Tokenizer) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "reference",
        pat_str=tokenizer.get_pattern(),
        mergeable_ranks=dict(tokenizer.get_mergeable_ranks()),
        special_tokens={},
    )


@cache
def pairs() -> list[tuple[rustbpe.Tokenizer, tiktoken.Encoding]]:
    """Tokenizers of several sizes and patterns with the reference for each."""
    mixed = [text for kind in KINDS for text in corpus(kind)[:150]]
    made = [trained(mixed, size) for size in (256, 300, 2_000, 12_000)]
    made.append(trained(mixed, 1_000, rustbpe.GPT4_PATTERN))
    made.append(trained(mixed, 1_000, OTHER_PATTERN))
    return [(tokenizer, reference(tokenizer)) for tokenizer in made]


# -- exact ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_merges_equal_the_published_rustbpe(kind: str, vocab_size: int) -> None:
    size, expected = GOLDEN[f"{kind} {vocab_size}"]
    tokenizer = trained(corpus(kind), vocab_size)
    assert tokenizer.vocab_size == size
    assert digest(tokenizer.get_mergeable_ranks()) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_merges_and_ids_equal_the_slow_twin(kind: str) -> None:
    some = corpus(kind)[:8]
    tokenizer = trained(some, 400)
    assert tokenizer.get_merges() == slow_bpe.train(some, 400, PATTERN)
    unseen = "".join(corpus(kind)[8:10])
    assert tokenizer.encode(unseen) == slow_bpe.encode(unseen, tokenizer.get_merges(), PATTERN)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(alphabet="abc '\n7é", max_size=30), max_size=6), st.integers(256, 300))
def test_merges_equal_the_slow_twin_for_any_texts(some: list[str], vocab_size: int) -> None:
    expected = slow_bpe.train(some, vocab_size, PATTERN)
    assert trained(some, vocab_size, threads=2).get_merges() == expected


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=300))
def test_ids_equal_tiktoken_for_any_text(text: str) -> None:
    for tokenizer, encoding in pairs():
        expected = encoding.encode_ordinary(text)
        assert tokenizer.encode(text) == expected
        assert tokenizer.count_tokens(text) == len(expected)


@settings(max_examples=200, deadline=None)
@given(st.randoms(use_true_random=False))
def test_ids_equal_tiktoken_for_strange_texts(rng: random.Random) -> None:
    some = [strange_text(rng, corpus("english") + corpus("code")) for _ in range(3)]
    tokenizer, encoding = rng.choice(pairs())
    assert_equal(tokenizer, encoding, some)


def assert_equal(
    tokenizer: rustbpe.Tokenizer, encoding: tiktoken.Encoding, some: list[str]
) -> None:
    """All ways to encode give tiktoken's ids, and the ids give the texts back."""
    expected = [encoding.encode_ordinary(text) for text in some]
    assert [tokenizer.encode(text) for text in some] == expected, some
    assert tokenizer.batch_encode(some) == expected, some
    ids, offsets = tokenizer.encode_batch(some, num_threads=2)
    assert np.split(ids, offsets[1:-1])[0].tolist() == expected[0], some
    assert ids.tolist() == [i for one in expected for i in one], some
    assert offsets.tolist() == [sum(map(len, expected[:i])) for i in range(len(some) + 1)]
    if tokenizer.get_pattern() != OTHER_PATTERN:
        assert [tokenizer.decode(one) for one in expected] == some


@pytest.mark.long
@pytest.mark.timeout(FUZZ_S + 600)
def test_fuzz_against_tiktoken() -> None:
    """FUZZ_S seconds (600) of arbitrary texts; every 2,000 texts a newly trained vocabulary."""
    seed = int(os.environ.get("FUZZ_SEED", time.time_ns()))
    rng = random.Random(seed)
    sources = [text for kind in KINDS for text in corpus(kind)]
    sources += [path.read_text() for path in (ROOT / "nanochat").glob("*.py")]
    num_texts = num_chars = num_vocabularies = 0
    ends = time.monotonic() + FUZZ_S
    while time.monotonic() < ends:
        sample = [strange_text(rng, sources) for _ in range(rng.randint(1, 400))]
        pattern = rng.choice([PATTERN, PATTERN, rustbpe.GPT4_PATTERN])
        tokenizer = trained(sample, rng.choice([256, 260, 600, 3_000, 20_000]), pattern)
        encoding = reference(tokenizer)
        num_vocabularies += 1
        for _ in range(400):
            some = [strange_text(rng, sources) for _ in range(5)]
            try:
                assert_equal(tokenizer, encoding, some)
            except AssertionError as e:
                e.add_note(f"FUZZ_SEED={seed}, vocabulary {num_vocabularies}, text {num_texts}")
                raise
            num_texts += 5
            num_chars += sum(map(len, some))
    counts = {"vocabularies": num_vocabularies, "texts": num_texts, "characters": num_chars}
    print(json.dumps({"seed": seed, "seconds": FUZZ_S, "differences": 0, **counts}))


# -- determinism and limits ----------------------------------------------------------------


def test_the_same_on_any_number_of_threads() -> None:
    some = [text for kind in KINDS for text in corpus(kind)]
    made = [trained(some, 3_000, threads=threads) for threads in (1, 2, 8)]
    assert made[0].get_merges() == made[1].get_merges() == made[2].get_merges()
    batches = [made[0].encode_batch(some, num_threads=threads) for threads in (1, 2, 8)]
    for ids, offsets in batches[1:]:
        assert np.array_equal(ids, batches[0][0])
        assert np.array_equal(offsets, batches[0][1])
    assert batches[0][0].dtype == np.int32
    assert batches[0][1].dtype == np.int64


def test_little_or_no_text() -> None:
    for some in ([], [""], ["a"], ["a b c"]):
        assert trained(some, 300, "[a-z]").vocab_size == 256
    assert trained(["aaaa"], 1_000).get_merges() == [(97, 97), (256, 256)]
    assert trained(["aaaa"], 2**32 - 1).vocab_size == 258
    for vocab_size in (255, -1, 2**32):
        with pytest.raises(ValueError, match=f"at least 256 .* got {vocab_size}"):
            trained(["text"], vocab_size)
    empty = rustbpe.Tokenizer()
    assert (empty.vocab_size, empty.get_pattern(), empty.encode("x")) == (256, "", [])
    ids, offsets = trained(["aa"], 257).encode_batch([])
    assert (ids.size, offsets.tolist()) == (0, [0])


def test_arguments_that_are_refused() -> None:
    tokenizer = trained(["some text"], 260)
    before = tokenizer.get_merges()
    with pytest.raises(ValueError, match="Invalid regex"):
        tokenizer.train_from_iterator(iter(["x"]), 300, pattern="(")
    with pytest.raises(TypeError):
        tokenizer.train_from_iterator(iter(["x", 7]), 300)
    with pytest.raises(UnicodeEncodeError, match="position 2"):
        tokenizer.train_from_iterator(iter(["ok\ud800"]), 300)
    with pytest.raises(UnicodeEncodeError, match="position 2"):
        tokenizer.encode("ok\ud800")
    with pytest.raises(ValueError, match="buffer_size"):
        tokenizer.train_from_iterator(iter(["x"]), 300, buffer_size=0)
    with pytest.raises(ValueError, match="num_threads"):
        tokenizer.encode_batch(["x"], num_threads=0)
    with pytest.raises(ValueError, match="99999"):
        tokenizer.decode([99999])
    with pytest.raises(UnicodeDecodeError):
        tokenizer.decode([0xFF])
    with pytest.raises(ValueError, match="merge 0"):
        rustbpe.Tokenizer.from_merges([(300, 1)])
    assert tokenizer.get_merges() == before


def test_what_the_iterator_raises_passes_through() -> None:
    def broken() -> Iterator[str]:
        yield "some text"
        raise LookupError("the source ended")

    tokenizer = rustbpe.Tokenizer()
    with pytest.raises(LookupError, match="the source ended"):
        tokenizer.train_from_iterator(broken(), 300)
    assert tokenizer.vocab_size == 256


# -- watching and stopping -----------------------------------------------------------------


def test_progress_is_reported_and_may_stop_the_work() -> None:
    seen: list[tuple[str, int, int | None]] = []
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(
        iter(corpus("cjk")), 2_000, progress=lambda *told: seen.append(told)
    )
    assert {phase for phase, _, _ in seen} == {"count", "merge"}
    counted = [done for phase, done, _ in seen if phase == "count"]
    assert counted[-1] == sum(len(text.encode()) for text in corpus("cjk"))
    assert seen[-1] == ("merge", tokenizer.vocab_size - 256, 2_000 - 256)

    def refuse(phase: str, done: int, total: int | None) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        tokenizer.train_from_iterator(iter(corpus("cjk")), 300, progress=refuse)


INTERRUPTED = """
import signal, sys, rustbpe
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
path, what = sys.argv[1:]
text = open(path).read()
def endless():
    while True:
        yield text
def started(phase, done, total):
    if done:
        print("working", flush=True)
tokenizer = rustbpe.Tokenizer()
try:
    if what == "iterator":
        tokenizer.train_from_iterator(endless(), 1000, progress=started)
    elif what == "files":
        tokenizer.train_from_files([path] * 1_000_000, 1000, progress=started)
    else:
        texts = [text] * 10_000
        print("working", flush=True)
        tokenizer = tokenizer.from_merges([(97, 98)])
        while True:
            tokenizer.encode_batch(texts)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("what", ["iterator", "files", "encode"])
def test_ctrl_c_ends_the_work_within_a_second(what: str, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("the quick brown fox " * 50_000)
    command = [sys.executable, "-c", INTERRUPTED, str(path), what]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "working\n"
        child.send_signal(signal.SIGINT)
        sent_s = time.monotonic()
        rest = child.stdout.read()
        took_s = time.monotonic() - sent_s
    assert rest.endswith("interrupted\n")
    assert took_s < 1


def test_the_gil_is_free_while_encoding() -> None:
    tokenizer = trained(corpus("english"), 1_000)
    text = " ".join(corpus("english")) * 4
    done = threading.Event()

    def work() -> None:
        tokenizer.encode_batch([text] * 4, num_threads=1)
        done.set()

    worker = threading.Thread(target=work)
    worker.start()
    turns = 0
    while not done.is_set():
        turns += 1
    worker.join()
    assert turns > 100


# -- files ---------------------------------------------------------------------------------


def test_training_from_files_equals_training_from_an_iterator(tmp_path: Path) -> None:
    shard, plain = tmp_path / "a.parquet", tmp_path / "b.txt"
    rows = [*corpus("english")[:200], None, "", *corpus("cjk")[:200]]
    table = pa.table({"n": range(len(rows)), "text": rows})
    pq.write_table(table, shard, row_group_size=70, compression="zstd")
    text = "\n".join(corpus("code"))
    plain.write_text(text, newline="")
    documents = [row for row in rows if row is not None] + [text]
    tokenizer = rustbpe.Tokenizer()
    read = tokenizer.train_from_files([shard, plain], 1_500, pattern=PATTERN)
    assert tokenizer.get_merges() == trained(documents, 1_500).get_merges()
    assert read["chars"] == sum(map(len, documents))
    assert read["bytes"] == sum(len(d.encode()) for d in documents)
    assert read["documents"] == len(documents)

    read = tokenizer.train_from_files(
        [shard, plain], 800, pattern=PATTERN, max_chars=20_000, doc_cap_chars=150
    )
    taken: list[str] = []
    for document in documents:
        taken.append(document[:150][: 20_000 - sum(map(len, taken))])
    assert read["chars"] == 20_000
    assert tokenizer.get_merges() == trained(taken, 800).get_merges()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    tokenizer = rustbpe.Tokenizer()
    with pytest.raises(FileNotFoundError, match=r"missing\.txt"):
        tokenizer.train_from_files([tmp_path / "missing.txt"], 300)
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"x" * 3_000_000 + b" y\xff")
    with pytest.raises(ValueError, match=r"bad\.txt: invalid UTF-8 at byte 3000002"):
        tokenizer.train_from_files([bad], 300)
    shard = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": [b"fine", b"fi\xfene"], "n": [1, 2]}), shard)
    with pytest.raises(ValueError, match=r"no column \"text\", only body, n"):
        tokenizer.train_from_files([shard], 300)
    with pytest.raises(ValueError, match="row 1: invalid UTF-8 at byte 2"):
        tokenizer.train_from_files([shard], 300, column="body")
    with pytest.raises(ValueError, match="one text per row"):
        tokenizer.train_from_files([shard], 300, column="n")
    bad.rename(tmp_path / "no.parquet")
    with pytest.raises(ValueError, match=r"no\.parquet"):
        tokenizer.train_from_files([tmp_path / "no.parquet"], 300)


def test_save_and_load(tmp_path: Path) -> None:
    tokenizer = trained(corpus("emoji"), 700)
    tokenizer.save(tmp_path / "vocabulary")
    loaded = rustbpe.Tokenizer.load(tmp_path / "vocabulary")
    assert loaded.get_mergeable_ranks() == tokenizer.get_mergeable_ranks()
    assert loaded.get_pattern() == PATTERN


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no rustbpe vocabulary"),
        (b"something else", "no rustbpe vocabulary"),
        (b"\x7fELF\x02\xff\x00", "no rustbpe vocabulary"),
        (b"rustbpe vocabulary 2\npattern 1\na\nmerges 0\n", "no rustbpe vocabulary"),
        (b"rustbpe vocabulary 1\npattern 9\na\nmerges 0\n", "no rustbpe vocabulary"),
        (b"rustbpe vocabulary 1\npattern 1\na\nmerges 2\n104 105\n", "no rustbpe vocabulary"),
        (b"rustbpe vocabulary 1\npattern 1\na\nmerges 1\n104 x\n", "no rustbpe vocabulary"),
        (b"rustbpe vocabulary 1\npattern 1\na\nmerges 1\n104 900\n", "merge 0"),
        (b"rustbpe vocabulary 1\npattern 1\na\nmerges 2\n1 2\n1 2\n", "merge 1"),
        (b"rustbpe vocabulary 1\npattern 1\n(\nmerges 0\n", "Invalid regex"),
    ],
)
def test_a_strange_file_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "vocabulary"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as refused:
        rustbpe.Tokenizer.load(path)
    assert str(path) in str(refused.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        rustbpe.Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        rustbpe.Tokenizer().save(tmp_path / "nowhere" / "vocabulary")


def test_a_text_that_the_regex_gives_up_on_leaves_nothing_behind() -> None:
    tokenizer = rustbpe.Tokenizer.from_merges([(97, 98)], r"x|y|(a|aa)+\1z")
    with pytest.raises(ValueError, match="Regex failed"):
        tokenizer.encode("xyxy" + "a" * 60)
    assert tokenizer.encode("xx") == [120, 120]
