"""The tokens of parquet shards in one memory-mapped file, made once per tokenizer and data.

* Folder `$NANOCHAT_HOME/data/tokens/KEY`: tokens.bin (uint16 where the vocabulary allows, else
  uint32), offsets.bin (int64, one more than documents), meta.json. KEY is a hash of the tokenizer's
  fingerprint and of name, size and sha256 of every shard, so another tokenizer or other data get
  another folder and nothing is ever out of date.
* Every document starts with <|bos|>; documents stand in the order of the shards.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from nanochat.corpus import DataFile, iter_row_groups
from nanochat.folders import make_folder
from nanochat.rundir import atomic_write_json, nanochat_home, read_json
from nanochat.spec import SpecError
from nanochat.tokenizer import TokenizerLike

FORMAT = 1


@dataclass(frozen=True)
class TokenCache:
    """The opened cache; both arrays are mapped, not read."""

    key: str
    tokens: np.ndarray
    """[number of tokens] uint16 or uint32."""
    offsets: np.ndarray
    """int64 [number of documents + 1]."""


def open_token_cache(
    files: Sequence[DataFile],
    tokenizer: TokenizerLike,
    *,
    num_threads: int = 1,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> TokenCache:
    """Open the cache of these shards; tokenize them first where there is none.

    Several processes may call this at a time: one of a machine tokenizes, the others wait.
    `on_progress` is told the share of the shards' bytes that is done. Raises SpecError where the
    cache cannot be written, or a shard cannot be read.
    """
    key = _key(files, tokenizer)
    folder = nanochat_home() / "data" / "tokens" / key
    if not _is_whole(folder):
        fill = partial(_fill, files, tokenizer, num_threads, on_progress)
        make_folder(folder, fill, _is_whole)
    meta = _meta(folder)
    return TokenCache(
        key,
        _mapped(folder / "tokens.bin", np.dtype(meta["dtype"])),
        _mapped(folder / "offsets.bin", np.dtype(np.int64)),
    )


def _key(files: Sequence[DataFile], tokenizer: TokenizerLike) -> str:
    shards = [(file.path.name, file.size, file.sha256) for file in files]
    facts = json.dumps([FORMAT, tokenizer.fingerprint, shards])
    return hashlib.sha256(facts.encode()).hexdigest()[:24]


def _meta(folder: Path) -> dict[str, Any]:
    meta = read_json(folder / "meta.json")
    return meta if isinstance(meta, dict) else {}


def _is_whole(folder: Path) -> bool:
    sizes = _meta(folder).get("sizes", {})
    try:
        return bool(sizes) and all((folder / n).stat().st_size == s for n, s in sizes.items())
    except FileNotFoundError:
        return False


def _mapped(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    # a plain array over the map: slices of np.memmap itself cost several times as much
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def _fill(
    files: Sequence[DataFile],
    tokenizer: TokenizerLike,
    num_threads: int,
    on_progress: Callable[[float], None],
    folder: Path,
) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    num_tokens = 0
    with open(folder / "tokens.bin", "wb") as tokens, open(folder / "offsets.bin", "wb") as offsets:
        offsets.write(np.zeros(1, np.int64).tobytes())
        for texts, fraction in _texts(files):
            flat, ends = tokenizer.encode_batch(texts, num_threads=num_threads, prepend_bos=True)
            tokens.write(flat.astype(dtype).data)
            offsets.write((ends[1:].astype(np.int64) + num_tokens).data)
            num_tokens += len(flat)
            on_progress(fraction)
        if num_tokens == 0:
            raise SpecError(f"no documents in {', '.join(str(f.path) for f in files)}")
        sizes = {Path(f.name).name: _sync(f) for f in (tokens, offsets)}
    atomic_write_json(
        folder / "meta.json",
        {"format": FORMAT, "dtype": dtype.name, "num_tokens": num_tokens, "sizes": sizes},
    )


def _texts(files: Sequence[DataFile]) -> Iterator[tuple[list[str], float]]:
    """(documents of a row group, share of all bytes done with it)."""
    total = sum(file.size for file in files)
    done = 0
    for file in files:
        for texts, fraction in iter_row_groups(file.path):
            yield texts, (done + file.size * fraction) / total
        done += file.size


def _sync(f: IO[bytes]) -> int:
    """Bytes of a file, after they are on disk."""
    f.flush()
    os.fsync(f.fileno())
    return os.fstat(f.fileno()).st_size
