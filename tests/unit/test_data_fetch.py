"""The data on disk: made from what the machine has, checked, found, named when it is missing."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import corpus, embedded, touches
from nanochat.corpus import LOCK_NAME, ensure, iter_texts, locate
from nanochat.embedded import stdlib_split
from nanochat.folders import make_folder
from nanochat.rundir import RunDir, atomic_write_json
from nanochat.sources import ParquetSource, TokenCacheSource, make_source
from nanochat.spec import Data, Model, RunSpec, SpecError
from nanochat.stages import data_fetch
from nanochat.tokencache import open_token_cache
from nanochat.touches import FINEWEB_LAST_SHARD
from tests.unit.byte_tokenizer import ByteTokenizer

MODULE = '''"""Says what the module is for, at some length, to be worth a document of its own."""

import os


def documented(x):
    """Return x, after a description that is long enough to be read on its own.
    \f
    Second paragraph.
    """
    return x


class Empty:
    """A class that has nothing but this text, which is long enough to become a document."""


def short():
    """Stay here."""
'''


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty NANOCHAT_HOME, an empty image folder, and a small standard library."""
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(touches, "IMAGE_DATA", tmp_path / "image")
    monkeypatch.setattr(embedded, "MIN_DOCSTRING_CHARS", 60)
    library = tmp_path / "lib"
    (library / "package" / "tests").mkdir(parents=True)
    (library / "package" / "tests" / "test_it.py").write_text("never = 'taken'\n")
    (library / "package" / "__init__.py").write_text(MODULE)
    (library / "broken.py").write_text("def (:\n")
    for i in range(embedded.MIN_FILES):
        (library / f"module_{i}.py").write_text(f"x_{i} = {i}\n" * 20)
    monkeypatch.setattr(embedded.sysconfig, "get_path", lambda name: str(library))
    return tmp_path / "home"


def all_texts(data: Data) -> tuple[list[str], list[str]]:
    files = locate(data)
    return list(iter_texts(files.train)), list(iter_texts(files.val))


# -- embedded


def test_docstrings_become_documents_and_no_text_occurs_twice(home: Path) -> None:
    ensure(Data())
    train, val = all_texts(Data())
    every = train + val
    [function] = [t for t in every if t.startswith("package.documented\n")]
    assert "Second paragraph." in function
    assert any(t.startswith("package.Empty\n") for t in every)
    assert any(t.startswith("package\n") for t in every)
    [code] = [t for t in every if "import os" in t]
    assert '    """Stay here."""' in code and "return x" in code
    assert "Second paragraph" not in code and "class Empty:\n    pass\n" in code
    compile(code, "package", "exec")
    assert not any("never" in t or "def (:" in t for t in every)


def test_split_is_by_file_and_the_same_everywhere(home: Path) -> None:
    train, val = stdlib_split(0.05)
    assert stdlib_split(0.05) == (train, val)
    assert not set(train) & set(val)
    assert len([t for t in val if t.startswith("x_")]) in (4, 5)
    more = stdlib_split(0.4)[1]
    assert set(val) < set(more), "a larger share only moves more files over"


def test_train_text_is_capped_prose_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "MAX_TRAIN_CHARS", 1500)
    train, _ = stdlib_split(0.01)
    assert sum(map(len, train)) <= 1500
    assert sum(t.startswith("package") for t in train) == 3


def test_this_python_has_enough_text_of_both_kinds() -> None:
    train, val = stdlib_split(0.05)
    assert 3_000_000 < sum(map(len, train)) <= embedded.MAX_TRAIN_CHARS
    assert 100_000 < sum(map(len, val)) < 1_500_000
    assert any('The "assert" statement' in t for t in train), "help topics are for training"
    assert sum("\nclass " in t for t in train) > 100


def test_missing_standard_library_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="libpython3-stdlib"):
        stdlib_split(0.05, tmp_path)


def test_ensure_makes_once_checks_and_mends(home: Path) -> None:
    with pytest.raises(SpecError, match="run the stage data_fetch first"):
        locate(Data())
    made = ensure(Data())
    assert ensure(Data()) == locate(Data()) == made
    lock = json.loads((made.train[0].path.parent / LOCK_NAME).read_text())
    assert lock["python"] and lock["files"]["train_00000.parquet"]["sha256"] == made.train[0].sha256
    assert not list(made.train[0].path.parent.parent.glob(".val*.???*/")), "nothing staged is left"

    content = bytearray(made.train[0].path.read_bytes())
    content[100] ^= 1
    made.train[0].path.write_bytes(content)
    assert locate(Data()) == made, "a reader checks sizes only"
    assert ensure(Data()) == made
    assert bytes(content) != made.train[0].path.read_bytes()
    made.val[0].path.unlink()
    with pytest.raises(SpecError, match="not whole"):
        locate(Data())
    assert ensure(Data()) == made
    (made.train[0].path.parent / LOCK_NAME).write_text("{")
    assert ensure(Data()) == made


def test_the_image_is_looked_at_first(home: Path) -> None:
    made = ensure(Data()).train[0].path
    shutil.move(home / "data", touches.IMAGE_DATA)
    found = ensure(Data())
    assert found.train[0].path == touches.IMAGE_DATA / made.relative_to(home / "data")
    assert not (home / "data").exists()


def test_unwritable_home_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_HOME", "/proc/nobody-can-write-here")
    with pytest.raises(SpecError, match="NANOCHAT_HOME"):
        ensure(Data())


# -- one text file


def text_data(path: Path, **more: object) -> Data:
    return Data(source="text", path=str(path), **more)  # type: ignore[arg-type]


def test_text_file_is_cut_at_line_ends_and_nothing_is_lost(home: Path, tmp_path: Path) -> None:
    lines = [f"line {i} " + "abcdé " * (i % 23) + "\n" for i in range(6000)]
    path = tmp_path / "combined_output.txt"
    path.write_text("".join(lines), encoding="utf-8")
    data = text_data(path, val_fraction=0.1)
    ensure(data)
    train, val = all_texts(data)
    assert sorted("".join(train + val).splitlines()) == sorted("".join(lines).splitlines())
    assert all(block.endswith("\n") for block in train + val)
    assert 0.08 < len(val) / len(train + val) < 0.12
    assert "".join(train).startswith("line 0 ")


def test_text_without_line_ends_is_cut_too(home: Path, tmp_path: Path) -> None:
    text = "".join(chr(97 + i * i % 26) for i in range(50_000))
    path = tmp_path / "one_line.txt"
    path.write_text(text)
    ensure(text_data(path))
    train, val = all_texts(text_data(path))
    assert sorted("".join(train + val)) == sorted(text) and val


def test_text_shards_serve_a_machine_that_has_no_text_file(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("some words\n" * 1000)
    made = ensure(text_data(path))
    path.unlink()
    assert ensure(text_data(path)) == locate(text_data(path)) == made
    path.write_text("other words\n" * 1000)
    assert ensure(text_data(path)).train[0].path != made.train[0].path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no file"),
        (b"too short", "9 bytes"),
        (b"valid \xe9 latin-1 " * 1000, "not UTF-8"),
        ("文".encode() * 800, "too few characters .*2,049 characters are enough"),
    ],
)
def test_bad_text_files_are_refused(
    home: Path, tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SpecError, match=message):
        ensure(text_data(path))


def test_the_least_text_that_is_said_to_be_enough_is(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "least.txt"
    path.write_text("文" * 2 * corpus.MIN_BLOCK_CHARS + "\n", encoding="utf-8")
    for val_fraction in (0.001, 0.4):
        ensure(text_data(path, val_fraction=val_fraction))
        train, val = all_texts(text_data(path, val_fraction=val_fraction))
        assert train and val


def test_data_without_a_validation_split_is_not_taken_for_whole(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("some words\n" * 1000)
    lock = ensure(text_data(path)).val[0].path.parent / LOCK_NAME
    facts = json.loads(lock.read_text())
    facts["files"] = {n: f for n, f in facts["files"].items() if f["split"] == "train"}
    atomic_write_json(lock, facts)
    with pytest.raises(SpecError, match="not whole"):
        locate(text_data(path))
    assert ensure(text_data(path)).val


# -- web shards


def put_shards(folder: Path, indices: list[int], lock: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    for i in indices:
        path = folder / f"shard_{i:05d}.parquet"
        pq.write_table(pa.table({"text": [f"web page {i}"]}), path)
        entries[path.name] = {"size": path.stat().st_size, "sha256": corpus._sha256(path)}
    if lock:
        atomic_write_json(folder / LOCK_NAME, {"files": entries})


def test_web_shards_are_found_in_order_with_the_last_one_for_validation(home: Path) -> None:
    put_shards(home / "data" / "fineweb_edu", [2, 0, 1, FINEWEB_LAST_SHARD])
    data = Data(source="fineweb_edu", num_shards=2)
    assert ensure(data) == locate(data)
    assert all_texts(data) == (
        ["web page 0", "web page 1"],
        [f"web page {FINEWEB_LAST_SHARD}"],
    )


def test_missing_web_shards_are_named_with_the_command(home: Path) -> None:
    put_shards(home / "data" / "fineweb_edu", [0])
    with pytest.raises(SpecError, match=r"2 of the 3 .*shard_00001.*nanochat fetch @CONFIG"):
        ensure(Data(source="fineweb_edu", num_shards=2))
    with pytest.raises(SpecError, match="1822 training shards"):
        locate(Data(source="fineweb_edu", num_shards=2000))


def test_damaged_web_shard_is_named(home: Path) -> None:
    folder = home / "data" / "fineweb_edu"
    put_shards(folder, [0, FINEWEB_LAST_SHARD])
    data = Data(source="fineweb_edu", num_shards=1)
    path = folder / "shard_00000.parquet"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    with pytest.raises(SpecError, match=r"shard_00000\.parquet does not have the sha256"):
        ensure(data)
    path.write_bytes(content[:-1])
    with pytest.raises(SpecError, match=r"shard_00000\.parquet has \d+ bytes, its lock says"):
        locate(data)
    (folder / LOCK_NAME).write_text("{")
    with pytest.raises(SpecError, match="is damaged"):
        locate(data)


# -- folders and the token cache


def test_one_process_fills_a_folder_and_the_others_wait(tmp_path: Path) -> None:
    program = """
import sys, time
from pathlib import Path
from typing import Any
from nanochat.folders import make_folder
folder, log = Path(sys.argv[1]), Path(sys.argv[2])
def fill(staged):
    with log.open("a") as f: f.write("filled\\n")
    (staged / "data").write_text("x" * 1000)
make_folder(folder, fill, lambda f: (f / "data").is_file())
assert (folder / "data").read_text() == "x" * 1000
"""
    command = [sys.executable, "-c", program, str(tmp_path / "a" / "made"), str(tmp_path / "log")]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [p.wait(60) for p in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "filled\n"


def test_failed_fill_leaves_nothing_behind(tmp_path: Path) -> None:
    def fill(staged: Path) -> None:
        (staged / "half").write_text("x")
        raise SpecError("the text is bad")

    with pytest.raises(SpecError, match="the text is bad"):
        make_folder(tmp_path / "made", fill, Path.is_dir)
    assert [p.name for p in tmp_path.iterdir()] == [".made.lock"]


@pytest.mark.parametrize("vocab_size", [257, 70_000])
def test_cache_holds_what_the_shards_hold(home: Path, vocab_size: int) -> None:
    class Sized(ByteTokenizer):
        pass

    Sized.vocab_size = vocab_size
    Sized.fingerprint = f"bytes {vocab_size}"
    files = ensure(Data()).train
    shares: list[float] = []
    cache = open_token_cache(files, Sized(), on_progress=shares.append)
    assert cache.tokens.dtype == (np.uint16 if vocab_size == 257 else np.uint32)
    assert shares[-1] == pytest.approx(1) and shares == sorted(shares)
    cached = TokenCacheSource(cache, 256, seed=None)
    direct = ParquetSource(files, Sized(), seed=None)
    n = direct.num_documents
    assert cached.num_documents == n
    for a, b in zip(cached.fetch(0, 0, n).tokens, direct.fetch(0, 0, n).tokens, strict=True):
        assert a.tolist() == b.tolist()
    shuffled = TokenCacheSource(cache, 256, seed=4)
    orders = [shuffled.fetch(epoch, 0, n).ids.tolist() for epoch in range(2)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == list(range(n))


def test_cache_is_made_once_and_again_when_it_is_torn(home: Path) -> None:
    files = ensure(Data()).train
    run = RunDir(home / "run")
    run.create()
    data = Data(cache=True)
    source = make_source(files, ByteTokenizer(), data, run=run, seed=0)
    assert run.progress("base_train")["phase"] == "tokenize"
    [tokens] = (home / "data" / "tokens").glob("*/tokens.bin")
    before = tokens.stat().st_mtime_ns
    assert make_source(files, ByteTokenizer(), data, run=run, seed=0).fingerprint == (
        source.fingerprint
    )
    assert tokens.stat().st_mtime_ns == before
    expected = source.fetch(0, 3, 4).tokens[0].tolist()
    del source
    with open(tokens, "r+b") as f:
        f.truncate(10)
    again = make_source(files, ByteTokenizer(), data, run=run, seed=0)
    assert again.fetch(0, 3, 4).tokens[0].tolist() == expected
    assert tokens.stat().st_size > 10


def put_bad_bytes(path: Path) -> None:
    """A shard whose text is no UTF-8."""
    pq.write_table(pa.table({"text": ["abc " * 500] * 200}), path, compression="NONE")
    damaged = bytearray(path.read_bytes())
    damaged[100:400] = b"\xff" * 300
    path.write_bytes(damaged)


def put_no_documents(path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)


@pytest.mark.parametrize(
    ("put", "said"),
    [
        (put_bad_bytes, "UTF8"),
        (put_no_documents, "no documents"),
        (lambda path: pq.write_table(pa.table({"body": ["x"]}), path), "no column text .*body"),
        (lambda path: path.write_bytes(b"PAR1 no parquet"), "cannot be read"),
    ],
)
def test_cache_of_a_damaged_shard_names_it(
    home: Path, tmp_path: Path, put: Callable[[Path], None], said: str
) -> None:
    path = tmp_path / "bad.parquet"
    put(path)
    files = [corpus.DataFile(path, path.stat().st_size, None)]
    with pytest.raises(SpecError, match=said) as caught:
        open_token_cache(files, ByteTokenizer())
    assert str(path) in str(caught.value)
    if put is not put_no_documents:
        with pytest.raises(SpecError, match=said):
            list(iter_texts(files))


@pytest.mark.parametrize("num_threads", [None, 3])
def test_cache_is_made_on_all_cores(
    home: Path, monkeypatch: pytest.MonkeyPatch, num_threads: int | None
) -> None:
    threads: set[int] = set()

    class Counting(ByteTokenizer):
        def encode_batch(self, *args: Any, num_threads: int = 1, **kw: Any) -> Any:
            threads.add(num_threads)
            return super().encode_batch(*args, **kw)

    monkeypatch.setattr("nanochat.sources.num_cores", lambda: 7)
    run = RunDir(home / "run")
    run.create()
    make_source(ensure(Data()).train, Counting(), Data(cache=True), run=run, seed=0,
                num_threads=num_threads)  # fmt: skip
    assert threads == {num_threads or 7}


# -- the stage


def test_stage_reports_what_it_checked(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(home / "runs" / "r")
    run.create()
    run.freeze_spec(RunSpec(name="r", model=Model(depth=1), data=Data()))
    facts = data_fetch.main(run)
    assert facts["train_shards"] == facts["val_shards"] == 1
    assert facts["sha256"]["val_00000.parquet"] == locate(Data()).val[0].sha256
    assert "checked" in capsys.readouterr().out
    assert data_fetch.main(run) == facts
