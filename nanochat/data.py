"""The training stream: one global sequence of rows, cut for the ranks.

* Step k consumes the same `rows_per_step` rows whatever the number of ranks; rank r gets the r-th
  of world_size equal contiguous blocks. Micro-batches are the trainer's affair.
* The cursor is a place in the source's order (epoch, document, offset, and the pieces that wait for
  a row), so it means the same on any number of ranks, and a resume seeks instead of replaying.
* Tokenizing runs ahead in threads (rustbpe releases the GIL) and batches are assembled one step
  ahead, so that the loop does not wait; `Loader.wait_s` says how long it did. Threads take no
  signals and end with the process.
* The batches follow from source, seq_len, rows_per_step, packing and cursor alone, not from timing.
"""

import queue
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from nanochat.machine import num_cores
from nanochat.packing import Packer, Row, make_packer, num_row_targets, write_row
from nanochat.sources import Source, document_stream, refetch
from nanochat.spec import SpecError

IGNORE_INDEX = -100
MAX_WORKERS = 4
"""Every rank tokenizes the whole stream to know where its rows begin (the cache spares it that)."""


@dataclass
class StepBatch:
    """What one rank trains on in one step, and the place after it."""

    inputs: Tensor
    """int64 [rows_per_step / world_size, seq_len]."""
    targets: Tensor
    """int64, same shape; IGNORE_INDEX where no loss is taken."""
    doc_ids: Tensor | None
    """int32, same shape: tokens of a row see only their own id; None: documents run on."""
    num_targets: int
    """Targets of the step over all ranks: what a summed loss is divided by."""
    num_tokens: int
    """Document tokens of the step over all ranks; the rest of the rows is padding."""
    padding: float
    """Share of the step's row places that is padding, over all ranks."""
    epoch: float
    """Passes over the source so far, with the fraction of the present one."""
    documents: list[tuple[int, int]]
    """(epoch, document id) of every document that starts in this step, over all ranks."""
    cursor: dict[str, Any]
    """JSON-able: a Loader made with it yields the next step."""


class Loader:
    """Endless iterator of StepBatch; passes over the source as often as it is asked.

    Batches wait in host memory, pinned on request. Close it, or use it as a context manager; a
    loader that is dropped closes itself.
    """

    def __init__(
        self,
        source: Source,
        *,
        seq_len: int,
        rows_per_step: int,
        rank: int = 0,
        world_size: int = 1,
        packing: str = "continuous",
        cursor: dict[str, Any] | None = None,
        num_workers: int | None = None,
        num_ahead: int = 2,
        pin_memory: bool = False,
    ) -> None:
        """Start at `cursor`, or at the beginning without one.

        `num_workers` threads tokenize where the source is slow (unset: what the cores allow);
        `num_ahead` finished steps wait at most (0: everything happens in the caller, for tests).
        Raises SpecError where the source is empty or the cursor belongs to other data, another
        packing or another seq_len.
        """
        assert rows_per_step % world_size == 0 and 0 <= rank < world_size
        if source.num_documents == 0:
            raise SpecError("the training data holds no documents")
        self.wait_s = 0.0
        """Seconds that the caller has waited for batches."""
        self._stop = threading.Event()
        self._pool: ThreadPoolExecutor | None = None
        if source.is_slow and num_ahead > 0:
            self._pool = ThreadPoolExecutor(num_workers or _num_workers(world_size))
        steps = _Steps(
            source=source,
            seq_len=seq_len,
            rows_per_step=rows_per_step,
            rank=rank,
            world_size=world_size,
            packing=packing,
            pin_memory=pin_memory,
            cursor=cursor,
            pool=self._pool,
        )
        self._direct = steps if num_ahead == 0 else None
        self._ready: queue.Queue[StepBatch | BaseException] = queue.Queue(max(1, num_ahead))
        self._thread = threading.Thread(
            target=_run_ahead, args=(steps, self._ready, self._stop), name="loader", daemon=True
        )
        if num_ahead > 0:
            self._thread.start()
        # also at the end of the interpreter, which must not cut off a thread inside of pyarrow
        self._finalizer = weakref.finalize(self, _shut_down, self._stop, self._pool, self._thread)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StepBatch:
        """The next step. Raises what the threads raised."""
        if self._stop.is_set():
            raise StopIteration
        start = perf_counter()
        batch = self._direct.next() if self._direct else self._ready.get()
        self.wait_s += perf_counter() - start
        if isinstance(batch, BaseException):
            self.close()
            raise batch
        return batch

    def close(self) -> None:
        """End the threads and wait for them; iterating stops."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _num_workers(world_size: int) -> int:
    """Tokenizer threads of one rank: half of its cores, at most MAX_WORKERS."""
    return max(1, min(MAX_WORKERS, num_cores() // (2 * world_size)))


def _shut_down(
    stop: threading.Event, pool: ThreadPoolExecutor | None, thread: threading.Thread
) -> None:
    stop.set()
    if pool is not None:
        pool.shutdown(wait=False, cancel_futures=True)
    if thread.is_alive() and thread is not threading.current_thread():
        thread.join()


def _run_ahead(
    steps: "_Steps", ready: "queue.Queue[StepBatch | BaseException]", stop: threading.Event
) -> None:
    """Body of the assembling thread: fill `ready` until told to stop."""
    while not stop.is_set():
        item: StepBatch | BaseException
        try:
            item = steps.next()
        except BaseException as e:
            item = e
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.2)
                break
            except queue.Full:
                continue
        if isinstance(item, BaseException):
            return


class _Steps:
    """Makes the batches of one rank, in the thread that calls `next`."""

    def __init__(
        self,
        *,
        source: Source,
        seq_len: int,
        rows_per_step: int,
        rank: int,
        world_size: int,
        packing: str,
        pin_memory: bool,
        cursor: dict[str, Any] | None,
        pool: ThreadPoolExecutor | None,
    ) -> None:
        self._source = source
        self._seq_len = seq_len
        self._rows_per_step = rows_per_step
        self._own = slice(
            rank * rows_per_step // world_size, (rank + 1) * rows_per_step // world_size
        )
        self._packing = packing
        self._pin_memory = pin_memory
        self._identity = {"source": source.fingerprint, "packing": packing, "seq_len": seq_len}
        place = None if cursor is None else self._place(cursor)
        documents = document_stream(
            source,
            start=(place["epoch"], place["document"]) if place else (0, 0),
            pool=pool,
            ahead_tokens=2 * rows_per_step * seq_len,
        )
        self._packer: Packer = make_packer(
            packing, documents, seq_len, place, partial(refetch, source)
        )

    def _place(self, cursor: dict[str, Any]) -> dict[str, Any]:
        """The packer's state in a cursor. Raises SpecError where the cursor is of other data."""
        for key, value in self._identity.items():
            if cursor[key] != value:
                raise SpecError(
                    f"the checkpoint was made with other data: its {key} is {cursor[key]!r}, now "
                    f"it is {value!r}. Restore the data and tokenizer of the run, or start a new "
                    "run"
                )
        return cursor

    def next(self) -> StepBatch:
        rows = [self._packer.row() for _ in range(self._rows_per_step)]
        inputs, targets, doc_ids = rows_to_tensors(
            rows[self._own],
            self._seq_len,
            self._source.bos_id,
            with_doc_ids=self._packing == "documents",
            pin_memory=self._pin_memory,
        )
        num_tokens = sum(segment.length for row in rows for segment in row)
        epoch, num_begun = self._packer.num_begun()
        return StepBatch(
            inputs=inputs,
            targets=targets,
            doc_ids=doc_ids,
            num_targets=sum(map(num_row_targets, rows)),
            num_tokens=num_tokens,
            padding=1 - num_tokens / (self._rows_per_step * self._seq_len),
            epoch=epoch + num_begun / self._source.num_documents,
            documents=[(s.document.epoch, s.document.id) for r in rows for s in r if s.start == 0],
            cursor={**self._identity, **self._packer.state()},
        )


def rows_to_tensors(
    rows: list[Row], seq_len: int, bos_id: int, *, with_doc_ids: bool, pin_memory: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(inputs int64, targets int64, doc_ids int32 or None), each [len(rows), seq_len]."""
    shape = (len(rows), seq_len)
    inputs = torch.empty(shape, dtype=torch.int64, pin_memory=pin_memory)
    targets = torch.empty(shape, dtype=torch.int64, pin_memory=pin_memory)
    doc_ids = None
    if with_doc_ids:
        doc_ids = torch.empty(shape, dtype=torch.int32, pin_memory=pin_memory)
    arrays = (inputs.numpy(), targets.numpy(), None if doc_ids is None else doc_ids.numpy())
    for i, row in enumerate(rows):
        own_ids = None if arrays[2] is None else arrays[2][i]
        write_row(row, bos_id, arrays[0][i], arrays[1][i], own_ids, IGNORE_INDEX)
    return inputs, targets, doc_ids


@dataclass
class ValidationSet:
    """Fixed rows to measure on; this rank's share of them, kept as int32 to halve the memory.

    The rows of all ranks together are the same for every number of ranks. Every rank has as many
    batches (collectives inside the model stay in step); rows that fill a share up have no targets.
    """

    inputs: Tensor
    targets: Tensor
    doc_ids: Tensor | None
    batch_rows: int
    num_tokens: int
    """Document tokens over all ranks."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """(inputs int64, targets int64, doc_ids int32 or None), each [<= batch_rows, seq_len]."""
        for at in range(0, len(self.inputs), self.batch_rows):
            batch = slice(at, at + self.batch_rows)
            doc_ids = None if self.doc_ids is None else self.doc_ids[batch]
            yield self.inputs[batch].long(), self.targets[batch].long(), doc_ids


def validation_set(
    source: Source,
    *,
    seq_len: int,
    max_tokens: int,
    batch_rows: int,
    rank: int = 0,
    world_size: int = 1,
    packing: str = "continuous",
    num_workers: int | None = None,
) -> ValidationSet:
    """The first `max_tokens` tokens of the source (all of it where it is smaller) as rows.

    Give a source with seed None: the order on disk. Raises SpecError where it is empty.
    """
    num_workers = num_workers or _num_workers(world_size)
    rows = _finite_rows(source, seq_len, max(1, max_tokens // seq_len), packing, num_workers)
    if not rows:
        raise SpecError("the validation data holds no documents")
    share = -(-len(rows) // world_size)
    own = rows[rank * share : (rank + 1) * share]
    inputs, targets, doc_ids = rows_to_tensors(
        own + [[]] * (share - len(own)),
        seq_len,
        source.bos_id,
        with_doc_ids=packing == "documents",
    )
    num_tokens = sum(segment.length for row in rows for segment in row)
    return ValidationSet(inputs.int(), targets.int(), doc_ids, batch_rows, num_tokens)


def _finite_rows(
    source: Source, seq_len: int, max_rows: int, packing: str, num_workers: int
) -> list[Row]:
    """Up to `max_rows` rows from the first epoch."""
    with ThreadPoolExecutor(num_workers) as threads:
        pool = threads if source.is_slow else None
        documents = document_stream(
            source, num_epochs=1, pool=pool, ahead_tokens=max_rows * seq_len
        )
        packer = make_packer(packing, documents, seq_len)
        rows: list[Row] = []
        while len(rows) < max_rows and (row := packer.row()):
            rows.append(row)
        documents.close()
        threads.shutdown(cancel_futures=True)
    return rows


def flat_tokens(source: Source, max_tokens: int) -> np.ndarray:
    """int32 [<= max_tokens]: the first tokens of the first epoch's documents, one after another."""
    taken: list[np.ndarray] = []
    room = max_tokens
    with ThreadPoolExecutor(_num_workers(world_size=1)) as threads:
        pool = threads if source.is_slow else None
        for document in document_stream(source, num_epochs=1, pool=pool, ahead_tokens=room):
            taken.append(document.tokens[:room])
            room -= len(taken[-1])
            if room == 0:
                break
        threads.shutdown(cancel_futures=True)
    return np.concatenate(taken).astype(np.int32) if taken else np.zeros(0, np.int32)
