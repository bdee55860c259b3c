"""The text on disk: where it lies, how it is made from what a machine has, how it is checked.

* Every source is parquet shards with one column `text`, one row per document, so that one reader
  does for all of them, and a `data.lock.json` with size and sha256 of each shard.
* A folder gets its final name only when all of it is written and on disk.
* `ensure` makes or checks the data (the data_fetch stage); `locate` finds it (every reader).
  Both look in the image's /opt/nanochat/data first, then in NANOCHAT_HOME/data (`roots`).
* embedded: the standard library's own text, split by file (nanochat/embedded.py).
* text: one UTF-8 file is cut at line ends into blocks of up to 64 Ki characters. A block is a
  document: order within a block stays as written, blocks are permuted, and evenly spread blocks are
  held out. CRLF becomes LF; nothing else of the file is changed or dropped.
* fineweb_edu: web shards that `fetch` has brought; nothing here opens a connection.
"""

import hashlib
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.embedded import stdlib_split
from nanochat.folders import make_folder
from nanochat.rundir import atomic_write_json, read_json
from nanochat.spec import Data, SpecError
from nanochat.touches import (
    LOCK_FORMAT,
    LOCK_NAME,
    data_roots,
    fetched_entry,
    find,
    fineweb_files,
    folder_lock,
    roots_text,
)

ROWS_PER_GROUP = 128
SHARD_CHARS = 64 << 20
BLOCK_CHARS = 65_536
MIN_BLOCK_CHARS = 1_024

Roots = tuple[Path, ...]


@dataclass(frozen=True)
class DataFile:
    """One parquet shard."""

    path: Path
    size: int
    """Bytes."""
    sha256: str | None
    """None where no lock file knows the shard."""


@dataclass(frozen=True)
class DataFiles:
    """The shards of a source, in the order in which their documents are numbered."""

    train: tuple[DataFile, ...]
    val: tuple[DataFile, ...]


def ensure(data: Data, roots: Roots | None = None) -> DataFiles:
    """Make the data of a spec present and check every byte against its lock.

    May be called again and by several processes at a time. Damaged embedded or text data is made
    again, in the last of the roots. Raises SpecError where data is missing that only a network can
    bring, or is not what its lock says.
    """
    roots = roots or data_roots()
    if data.source == "fineweb_edu":
        return verify(data, roots)
    name = _folder_name(data, roots)
    for root in roots:
        if _is_whole(root / name):
            return _locked_files(root / name)
    return _make(data, roots[-1] / name)


def verify(data: Data, roots: Roots | None = None) -> DataFiles:
    """`locate`, and every byte checked against its lock. Raises SpecError."""
    files = locate(data, roots)
    remedy = "Delete it and fetch it again: nanochat fetch @CONFIG"
    for file in files.train + files.val:
        if damage := _damage(file, deep=True):
            raise SpecError(f"{damage}. {remedy}")
    return files


def locate(data: Data, roots: Roots | None = None) -> DataFiles:
    """Find the data of a spec; sizes are checked. Raises SpecError that says how to bring it."""
    roots = roots or data_roots()
    if data.source == "fineweb_edu":
        return _locate_fineweb(data.num_shards, roots)
    name = _folder_name(data, roots)
    for root in roots:
        if _is_whole(root / name, deep=False):
            return _locked_files(root / name)
    raise SpecError(
        f'the data of source = "{data.source}" is not there, or not whole (looked for {name} in '
        f"{roots_text(roots)}); run the stage data_fetch first"
    )


def iter_texts(files: Sequence[DataFile]) -> Iterator[str]:
    """The documents of some shards in the order in which they stand there. Raises SpecError, see
    `iter_row_groups`."""
    for file in files:
        for texts, _ in iter_row_groups(file.path):
            yield from texts


def iter_row_groups(path: Path) -> Iterator[tuple[list[str], float]]:
    """(documents of a row group, share of the shard done with it).

    Raises SpecError for a shard that cannot be read, has no column `text` or is not UTF-8.
    """
    try:
        with pq.ParquetFile(path) as parquet:
            columns = parquet.schema_arrow.names
            if "text" not in columns:
                raise SpecError(f"{path} has no column text (columns: {', '.join(columns)})")
            num_groups = parquet.metadata.num_row_groups
            for group in range(num_groups):
                column = parquet.read_row_group(group, columns=["text"]).column(0)
                column.validate(full=True)
                yield column.to_pylist(), (group + 1) / num_groups
    except (OSError, pa.ArrowException) as e:
        raise SpecError(
            f"{path} cannot be read ({e}); delete it and run the stage data_fetch again"
        ) from None


# -- places


def _folder_name(data: Data, roots: Roots) -> str:
    """Folder of a source below a root: the contents follow from the name."""
    held_out = f"val{data.val_fraction:g}"
    if data.source == "embedded":
        return f"embedded/{held_out}"
    assert data.path is not None
    path = Path(data.path)
    if not path.is_file():
        return _folder_of_vanished_text(data.path, held_out, roots)
    try:
        return f"text/{path.stem}-{_sha256(path)[:12]}-{held_out}"
    except OSError as e:
        raise SpecError(f"data.path = {data.path!r} cannot be read ({e.strerror})") from None


def _folder_of_vanished_text(path: str, held_out: str, roots: Roots) -> str:
    """The folder that was made from a text file that is not on this machine (any more)."""
    for root in roots:
        for lock in sorted(root.glob(f"text/*-{held_out}/{LOCK_NAME}")):
            found = read_json(lock)
            if isinstance(found, dict) and found.get("origin") == path:
                return str(lock.parent.relative_to(root))
    raise SpecError(
        f"data.path = {path!r} is no file, and no shards made from it lie in "
        f"{roots_text(roots)}; "
        "give the path of the text file (relative paths start where the command is run)"
    )


def _locate_fineweb(num_shards: int, roots: Roots) -> DataFiles:
    train, val = fineweb_files(num_shards)
    wanted = (*train, val)
    places = {path: find(path, roots) for path in wanted}
    if missing := [Path(path).name for path, place in places.items() if place is None]:
        shown = ", ".join(missing[:4]) + (", …" if len(missing) > 4 else "")
        raise SpecError(
            f"{len(missing)} of the {len(wanted)} shards of fineweb_edu are missing ({shown}; "
            f"looked in {roots_text(roots)}, folder fineweb_edu). Bring them on a machine with "
            "network: nanochat fetch @CONFIG"
        )
    files = {}
    for path, place in places.items():
        assert place is not None
        if (place.parent / LOCK_NAME).exists() and not folder_lock(place.parent):
            raise SpecError(f"{place.parent / LOCK_NAME} is damaged; delete it and fetch again")
        entry = fetched_entry(path, roots) or {}
        size = entry.get("size", place.stat().st_size)
        files[path] = DataFile(place, size, entry.get("sha256"))
        if damage := _damage(files[path], deep=False):
            raise SpecError(f"{damage}. Delete it and fetch it again: nanochat fetch @CONFIG")
    return DataFiles(tuple(files[path] for path in train), (files[val],))


# -- locks


def _locked_files(folder: Path) -> DataFiles:
    """The files of a folder as its lock says."""
    entries = folder_lock(folder)
    files = {
        split: tuple(
            DataFile(folder / name, entry["size"], entry["sha256"])
            for name, entry in sorted(entries.items())
            if entry["split"] == split
        )
        for split in ("train", "val")
    }
    return DataFiles(files["train"], files["val"])


def _is_whole(folder: Path, deep: bool = True) -> bool:
    """Whether a folder has a lock and what it says; `deep` reads every byte."""
    files = _locked_files(folder)
    if not files.train or not files.val:
        return False
    return not any(_damage(file, deep) for file in files.train + files.val)


def _damage(file: DataFile, deep: bool) -> str | None:
    """What is wrong with a shard, or None; `deep` reads all of it."""
    try:
        size = file.path.stat().st_size
    except FileNotFoundError:
        return f"{file.path} is missing"
    if size != file.size:
        return f"{file.path} has {size} bytes, its lock says {file.size}"
    if deep and file.sha256 is not None and _sha256(file.path) != file.sha256:
        return f"{file.path} does not have the sha256 of its lock"
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# -- making


def _make(data: Data, folder: Path) -> DataFiles:
    """Write shards and lock; a damaged folder is replaced."""
    facts: dict[str, Any]
    if data.source == "embedded":
        train, val = stdlib_split(data.val_fraction)
        facts = {"python": platform.python_version()}
        documents: dict[str, Iterator[str]] = {"train": iter(train), "val": iter(val)}
    else:
        assert data.path is not None
        cut = _BlockCut(Path(data.path), data.val_fraction)
        facts = {"origin": data.path, "block_chars": cut.block_chars}
        documents = {"train": cut.blocks(val=False), "val": cut.blocks(val=True)}

    def fill(staged: Path) -> None:
        entries: dict[str, Any] = {}
        for split, texts in documents.items():
            shards = _write_shards(staged, split, texts)
            if not shards:
                raise SpecError(_too_little_text(data, split))
            entries.update(shards)
        lock = {"format": LOCK_FORMAT, "source": data.source, "val_fraction": data.val_fraction}
        atomic_write_json(staged / LOCK_NAME, {**lock, **facts, "files": entries})

    make_folder(folder, fill, _is_whole)
    return _locked_files(folder)


def _too_little_text(data: Data, split: str) -> str:
    """What to say of data of which nothing is left for a split."""
    if data.source == "embedded":
        return f"data.val_fraction = {data.val_fraction:g} leaves no files for the {split} split"
    # the first block has MIN_BLOCK_CHARS, and at most as many up to its line end
    return (
        f"data.path = {data.path!r} has too few characters for a training and a validation split; "
        f"{2 * MIN_BLOCK_CHARS + 1:,} characters are enough"
    )


def _write_shards(folder: Path, split: str, texts: Iterator[str]) -> dict[str, Any]:
    """Write documents as SPLIT_00000.parquet, …; the lock entries of the shards."""
    entries: dict[str, Any] = {}
    for index, shard in enumerate(_shards(texts)):
        name = f"{split}_{index:05d}.parquet"
        path = folder / name
        table = pa.table({"text": pa.array(shard, pa.string())})
        pq.write_table(table, path, row_group_size=ROWS_PER_GROUP, compression="zstd")
        with open(path, "rb") as f:
            os.fsync(f.fileno())
        entries[name] = {
            "split": split,
            "size": path.stat().st_size,
            "sha256": _sha256(path),
            "num_documents": len(shard),
            "num_chars": sum(map(len, shard)),
        }
    return entries


def _shards(texts: Iterator[str]) -> Iterator[list[str]]:
    """Group documents into lists of about SHARD_CHARS characters."""
    shard: list[str] = []
    chars = 0
    for text in texts:
        shard.append(text)
        chars += len(text)
        if chars >= SHARD_CHARS:
            yield shard
            shard, chars = [], 0
    if shard:
        yield shard


class _BlockCut:
    """Cuts one text file into blocks and holds out every k-th of them."""

    def __init__(self, path: Path, val_fraction: float) -> None:
        self._path = path
        size = path.stat().st_size
        if size < 2 * MIN_BLOCK_CHARS:
            raise SpecError(
                f"data.path = {str(path)!r} has {size} bytes; at least {2 * MIN_BLOCK_CHARS} are "
                "needed for a training and a validation split"
            )
        # a hundred blocks or more, so that a small file still has a validation split
        self.block_chars = min(BLOCK_CHARS, max(MIN_BLOCK_CHARS, size // 128))
        self._every = max(2, round(1 / val_fraction))

    def blocks(self, val: bool) -> Iterator[str]:
        """Blocks of one split. Raises SpecError where the file is not UTF-8."""
        with open(self._path, encoding="utf-8-sig") as f:
            index = 0
            try:
                while block := f.read(self.block_chars):
                    block += f.readline(self.block_chars)
                    if (index % self._every == 1) == val:
                        yield block
                    index += 1
            except UnicodeDecodeError as e:
                raise SpecError(
                    f"{self._path} is not UTF-8 after about {index * self.block_chars} characters "
                    f"({e.reason}); convert it first, for example with iconv"
                ) from None
