"""Where documents come from: a seeded order for every epoch, and random access to it.

* A source holds `num_documents` documents and gives any range of an epoch's order by position. That
  is all the loader needs to resume: it asks for the position where it stopped, nothing is replayed.
* Every document starts with <|bos|>, so the token after a document's last one is known without the
  next document.
* Orders come from numpy's RandomState, whose streams are frozen (NEP 19): a run continues in the
  same order under another version of numpy. `seed=None` is the order on disk (validation).
* `fetch` may be called from several threads at a time.
"""

import functools
import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike

from nanochat.corpus import DataFile
from nanochat.machine import num_cores
from nanochat.packing import Document
from nanochat.rundir import RunDir
from nanochat.spec import Data, SpecError
from nanochat.tokencache import TokenCache, open_token_cache
from nanochat.tokenizer import TokenizerLike

WINDOW_ROW_GROUPS = 8
"""Documents are permuted among this many row groups: about 40 MB of web text in memory."""
TOKENIZE_AT_ONCE = 64
"""Documents of one tokenizer call: some 50,000 tokens of web text, about 20 ms of one core."""
MAX_FETCHES_AHEAD = 256


@dataclass(frozen=True)
class Documents:
    """Consecutive documents of an epoch's order."""

    ids: np.ndarray
    """int64 [n]: number of the document in its source, the same in every epoch."""
    tokens: list[np.ndarray]
    """n integer arrays; the first token of each is <|bos|>."""
    masks: list[np.ndarray] | None = None
    """n uint8 arrays beside `tokens`, 1 where a token is a target; None: all are."""


class Source(Protocol):
    """A fixed set of documents with an order per epoch."""

    @property
    def fingerprint(self) -> str:
        """Differs when the documents, their tokens or their order would."""

    @property
    def num_documents(self) -> int: ...

    @property
    def bos_id(self) -> int: ...

    @property
    def is_slow(self) -> bool:
        """Whether `fetch` is worth a worker thread."""

    def fetch(self, epoch: int, start: int, stop: int) -> Documents:
        """Documents at positions start to stop (exclusive) of an epoch's order."""


def make_source(
    files: Sequence[DataFile],
    tokenizer: TokenizerLike,
    data: Data,
    *,
    run: RunDir,
    seed: int | None,
    num_threads: int | None = None,
) -> Source:
    """The source that a spec's data section asks for; all ranks may call it at the same time.

    Making the cache takes num_threads (unset: all cores of the machine, as the other ranks wait)
    and is noted as progress of base_train, the stage that reads text. Raises SpecError, see
    ParquetSource and open_token_cache.
    """
    if not data.cache:
        return ParquetSource(files, tokenizer, seed=seed)
    said_s = 0.0

    def say(fraction: float) -> None:
        nonlocal said_s
        if time.monotonic() - said_s > 1.0:
            said_s = time.monotonic()
            run.write_progress("base_train", "tokenize", fraction=round(fraction, 4))

    num_threads = num_threads or num_cores()
    cache = open_token_cache(files, tokenizer, num_threads=num_threads, on_progress=say)
    return TokenCacheSource(cache, tokenizer.bos_id, seed=seed)


def permutation(n: int, seed: int | None, *parts: int) -> np.ndarray:
    """int64 [n]: the numbers below n, permuted by seed and parts; in order without a seed."""
    if seed is None:
        return np.arange(n, dtype=np.int64)
    return np.random.RandomState([seed, *parts]).permutation(n)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _shard_facts(files: Sequence[DataFile]) -> list[tuple[str, int, str | None]]:
    return [(file.path.name, file.size, file.sha256) for file in files]


class ParquetSource:
    """Text in parquet shards, tokenized when it is asked for.

    Row groups are permuted over all shards, documents within windows of WINDOW_ROW_GROUPS of them.
    Raises SpecError where a shard cannot be read, has no column `text` or is not UTF-8.
    """

    is_slow = True

    def __init__(
        self, files: Sequence[DataFile], tokenizer: TokenizerLike, *, seed: int | None
    ) -> None:
        self._files = list(files)
        self._tokenizer = tokenizer
        self._seed = seed
        self._order = functools.lru_cache(maxsize=2)(self._make_order)
        groups = [
            (file, group, rows)
            for file in range(len(files))
            for group, rows in enumerate(_rows_per_group(files[file].path))
        ]
        self._groups = [(file, group) for file, group, _ in groups]
        self._group_rows = np.array([rows for _, _, rows in groups], dtype=np.int64)
        self._group_first = np.cumsum(self._group_rows) - self._group_rows
        self.num_documents = int(self._group_rows.sum())
        self.bos_id = tokenizer.bos_id
        self.fingerprint = _digest("parquet", _shard_facts(files), tokenizer.fingerprint, seed)
        self._windows: dict[tuple[int, int], tuple[np.ndarray, pa.Array]] = {}
        self._loading = threading.Lock()

    def fetch(self, epoch: int, start: int, stop: int) -> Documents:
        ids: list[np.ndarray] = []
        texts: list[str] = []
        _, firsts = self._order(epoch)
        while start < stop:
            window = int(np.searchsorted(firsts, start, side="right")) - 1
            first, end = int(firsts[window]), int(firsts[window + 1])
            window_ids, window_texts = self._window(epoch, window)
            wanted = slice(start - first, min(stop, end) - first)
            ids.append(window_ids[wanted])
            texts += window_texts[wanted].to_pylist()
            start = min(stop, end)
        flat, offsets = self._tokenizer.encode_batch(texts, prepend_bos=True)
        bounds = offsets.tolist()
        tokens = [flat[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
        return Documents(np.concatenate(ids) if ids else np.zeros(0, np.int64), tokens)

    def _make_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(permuted row groups, position of each window's first document and of the end)."""
        order = permutation(len(self._groups), self._seed, epoch)
        ends = np.cumsum(self._group_rows[order])
        firsts = np.concatenate([[0], ends[WINDOW_ROW_GROUPS - 1 : -1 : WINDOW_ROW_GROUPS]])
        return order, np.append(firsts, self.num_documents)

    def _window(self, epoch: int, window: int) -> tuple[np.ndarray, pa.Array]:
        """(ids, texts) of a window in their order; the last two windows stay in memory."""
        key = (epoch, window)
        found = self._windows.get(key)
        if found is not None:
            return found
        with self._loading:
            if key not in self._windows:
                while len(self._windows) > 1:
                    del self._windows[next(iter(self._windows))]
                self._windows[key] = self._load_window(epoch, window)
            return self._windows[key]

    def _load_window(self, epoch: int, window: int) -> tuple[np.ndarray, pa.Array]:
        first = window * WINDOW_ROW_GROUPS
        groups = self._order(epoch)[0][first : first + WINDOW_ROW_GROUPS]
        texts = pa.chunked_array(
            [chunk for group in groups for chunk in self._read_group(int(group))],
            type=pa.large_string(),
        )
        ids = np.concatenate(
            [self._group_first[g] + np.arange(self._group_rows[g]) for g in groups]
        )
        order = permutation(len(ids), self._seed, epoch, 1 + window)
        return ids[order], pa.concat_arrays(texts.chunks).take(pa.array(order))

    def _read_group(self, group: int) -> list[pa.Array]:
        file, group_in_file = self._groups[group]
        path = self._files[file].path
        try:
            with pq.ParquetFile(path) as parquet:
                column = parquet.read_row_group(group_in_file, columns=["text"]).column(0)
                column.validate(full=True)
        except (OSError, pa.ArrowException) as e:
            raise SpecError(
                f"{path} cannot be read ({e}); delete it and run the stage data_fetch again"
            ) from None
        return list(column.cast(pa.large_string()).chunks)


def _rows_per_group(path: Path) -> list[int]:
    try:
        with pq.ParquetFile(path) as parquet:
            metadata = parquet.metadata
            columns = parquet.schema_arrow.names
    except (OSError, pa.ArrowException) as e:
        raise SpecError(
            f"{path} is no parquet file that can be read ({e}); delete it and run the stage "
            "data_fetch again"
        ) from None
    if "text" not in columns:
        raise SpecError(f"{path} has no column text (columns: {', '.join(columns)})")
    return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]


class TokenCacheSource:
    """Tokens from the cache on disk; documents are permuted over the whole source."""

    is_slow = False

    def __init__(self, cache: TokenCache, bos_id: int, *, seed: int | None) -> None:
        self._tokens = cache.tokens
        self._offsets = cache.offsets
        self._seed = seed
        self._order = functools.lru_cache(maxsize=2)(self._make_order)
        self.num_documents = len(cache.offsets) - 1
        self.bos_id = bos_id
        self.fingerprint = _digest("cache", cache.key, seed)

    def fetch(self, epoch: int, start: int, stop: int) -> Documents:
        ids = self._order(epoch)[start:stop]
        firsts, ends = self._offsets[ids].tolist(), self._offsets[ids + 1].tolist()
        return Documents(ids, [self._tokens[a:b] for a, b in zip(firsts, ends, strict=True)])

    def _make_order(self, epoch: int) -> np.ndarray:
        return permutation(self.num_documents, self._seed, epoch)


class ConversationSource:
    """Rendered conversations: (ids, mask) each, mask 1 on the tokens that are targets.

    `rendered` may be any sequence, also one of mapped files (nanochat/rendered.py).
    """

    is_slow = False

    def __init__(
        self,
        rendered: Sequence[tuple[ArrayLike, ArrayLike]],
        *,
        bos_id: int,
        seed: int | None,
        fingerprint: str | None = None,
    ) -> None:
        """`fingerprint` names the conversations; unset, it is made from all of them."""
        self._rendered = rendered
        self._seed = seed
        self.order = functools.lru_cache(maxsize=2)(self._make_order)
        """epoch -> int64 [num_documents]: numbers of the conversations, in its order."""
        self.num_documents = len(rendered)
        self.bos_id = bos_id
        named = fingerprint or _digest([[np.asarray(p).tolist() for p in r] for r in rendered])
        self.fingerprint = _digest("conversations", named, len(rendered), seed)

    def fetch(self, epoch: int, start: int, stop: int) -> Documents:
        ids = self.order(epoch)[start:stop]
        rendered = [self._rendered[i] for i in ids.tolist()]
        tokens = [np.asarray(r[0], dtype=np.int32) for r in rendered]
        assert all(len(t) > 0 and t[0] == self.bos_id for t in tokens)
        return Documents(ids, tokens, [np.asarray(r[1], dtype=np.uint8) for r in rendered])

    def _make_order(self, epoch: int) -> np.ndarray:
        return permutation(self.num_documents, self._seed, epoch)


def document_stream(
    source: Source,
    *,
    start: tuple[int, int] = (0, 0),
    num_epochs: int | None = None,
    pool: ThreadPoolExecutor | None = None,
    ahead_tokens: int = 0,
) -> Generator[Document, None, None]:
    """Documents from (epoch, position) on, through `num_epochs` epochs or endlessly.

    With a pool, fetches are under way for about `ahead_tokens` tokens; the order is the same.
    """
    ranges = _ranges(source.num_documents, start, num_epochs)
    under_way: deque[tuple[int, int, Callable[[], Documents]]] = deque()
    num_ahead = 1
    while True:
        while len(under_way) < num_ahead and (found := next(ranges, None)) is not None:
            epoch, first, stop = found
            under_way.append((epoch, first, _begin(pool, source, epoch, first, stop)))
        if not under_way:
            return
        epoch, first, result = under_way.popleft()
        fetched = result()
        if pool is not None:
            tokens = sum(map(len, fetched.tokens))
            num_ahead = min(MAX_FETCHES_AHEAD, 2 + ahead_tokens // max(1, tokens))
        for i, (number, tokens_i) in enumerate(
            zip(fetched.ids.tolist(), fetched.tokens, strict=True)
        ):
            mask = None if fetched.masks is None else fetched.masks[i]
            yield Document(epoch, first + i, number, tokens_i, mask)


def _begin(
    pool: ThreadPoolExecutor | None, source: Source, epoch: int, first: int, stop: int
) -> Callable[[], Documents]:
    if pool is None:
        return functools.partial(source.fetch, epoch, first, stop)
    future: Future[Documents] = pool.submit(source.fetch, epoch, first, stop)
    return future.result


def _ranges(
    num_documents: int, start: tuple[int, int], num_epochs: int | None
) -> Iterator[tuple[int, int, int]]:
    """(epoch, first, stop) of every fetch."""
    epoch, position = start
    while num_epochs is None or epoch < num_epochs:
        while position < num_documents:
            stop = min(position + TOKENIZE_AT_ONCE, num_documents)
            yield epoch, position, stop
            position = stop
        epoch, position = epoch + 1, 0


def refetch(source: Source, epoch: int, position: int) -> Document:
    """One document again, by its place in an epoch's order."""
    found = source.fetch(epoch, position, position + 1)
    mask = None if found.masks is None else found.masks[0]
    return Document(epoch, position, int(found.ids[0]), found.tokens[0], mask)
