"""Documents into rows: every token once, whatever the row length.

* A row is a list of segments, `seq_len` tokens in all. The stream of rows does not depend on ranks
  or micro-batches; those only cut it.
* continuous: documents run on from row to row. No padding; attention crosses documents.
* documents: a row begins with the piece that has waited longest and is filled with the largest
  waiting pieces that fit (best fit), so whole documents stay in one row and attention can stay
  within them. A document longer than a row is cut into rows and a rest, none of it is dropped;
  what is left of a row when no waiting piece fits is padding. The pieces of an epoch are all in
  rows before those of the next begin.
* The state is small integers: positions in the source's order, no tokens.
"""

import functools
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

BUFFER_PIECES = 256
"""Pieces that wait for a row. More pad less and shuffle more, and cost more to resume."""


class Document(NamedTuple):
    """One document at its place in the stream."""

    epoch: int
    position: int
    """Place in the epoch's order."""
    id: int
    """Number in the source, the same in every epoch."""
    tokens: np.ndarray
    mask: np.ndarray | None


class Segment(NamedTuple):
    """`length` tokens of a document from `start` on."""

    document: Document
    start: int
    length: int


Row = list[Segment]
State = dict[str, Any]


class ContinuousPacker:
    """Rows that documents run on across.

    `documents` begins with the document at the state's place; `state` is None at the beginning.
    """

    def __init__(
        self, documents: Iterator[Document], seq_len: int, state: State | None = None
    ) -> None:
        self._documents = documents
        self._seq_len = seq_len
        self._current: Document | None = None
        self._offset: int = state["offset"] if state else 0
        self._next = (state["epoch"], state["document"]) if state else (0, 0)

    def row(self) -> Row:
        """The next row; shorter than seq_len, or empty, only where the documents have ended."""
        row: Row = []
        room = self._seq_len
        while room > 0:
            if self._current is None:
                self._current = next(self._documents, None)
                if self._current is None:
                    break
            document = self._current
            length = min(room, len(document.tokens) - self._offset)
            row.append(Segment(document, self._offset, length))
            room -= length
            self._offset += length
            if self._offset == len(document.tokens):
                self._current, self._offset = None, 0
                self._next = (document.epoch, document.position + 1)
            else:
                self._next = (document.epoch, document.position)
        return row

    def state(self) -> State:
        """JSON-able place of the next row's first token."""
        epoch, document = self._next
        return {"epoch": epoch, "document": document, "offset": self._offset}

    def num_begun(self) -> tuple[int, int]:
        """(epoch, documents of it that rows have begun with)."""
        epoch, document = self._next
        return epoch, document + (self._offset > 0)


class DocumentPacker:
    """Rows of whole documents, best fit.

    `documents` begins with the document at the state's place; `refetch(epoch, position)` brings
    back one that waits in the state's buffer, and is called once for each.
    """

    def __init__(
        self,
        documents: Iterator[Document],
        seq_len: int,
        state: State | None = None,
        refetch: Callable[[int, int], Document] | None = None,
    ) -> None:
        self._documents = documents
        self._seq_len = seq_len
        self._waiting: dict[int, Segment] = {}  # in order of arrival
        self._by_length: list[tuple[int, int]] = []  # (length, arrival), sorted
        self._num_arrived = 0
        self._read_ahead: Document | None = None  # of the next epoch
        self._next = (state["epoch"], state["document"]) if state else (0, 0)
        if state and state["buffer"]:
            assert refetch is not None
            # the pieces of a document wait one behind the other
            fetch = functools.lru_cache(maxsize=1)(refetch)
            for epoch, position, start in state["buffer"]:
                self._arrive(fetch(epoch, position), start)

    def row(self) -> Row:
        """The next row; what its segments do not fill is padding. Empty: documents have ended."""
        self._refill()
        if not self._waiting:
            return []
        row = [self._take(next(iter(self._waiting)))]
        room = self._seq_len - row[0].length
        while (at := bisect_right(self._by_length, (room, self._num_arrived))) > 0:
            longest = self._by_length[at - 1][0]
            arrival = self._by_length[bisect_left(self._by_length, (longest, 0))][1]
            row.append(self._take(arrival))
            room -= longest
        return row

    def state(self) -> State:
        """JSON-able: the next document to read, and the pieces that wait."""
        epoch, document = self._next
        buffer = [[s.document.epoch, s.document.position, s.start] for s in self._waiting.values()]
        return {"epoch": epoch, "document": document, "buffer": buffer}

    def num_begun(self) -> tuple[int, int]:
        """(epoch, documents of it that rows have begun with)."""
        epoch, document = self._next
        return epoch, document - sum(s.start == 0 for s in self._waiting.values())

    def _refill(self) -> None:
        while len(self._waiting) < BUFFER_PIECES:
            document = self._read_ahead or next(self._documents, None)
            if document is None:
                return
            if self._waiting and document.epoch != self._next[0]:
                self._read_ahead = document
                return
            self._read_ahead = None
            for start in range(0, len(document.tokens), self._seq_len):
                self._arrive(document, start)
            self._next = (document.epoch, document.position + 1)

    def _arrive(self, document: Document, start: int) -> None:
        length = min(self._seq_len, len(document.tokens) - start)
        self._waiting[self._num_arrived] = Segment(document, start, length)
        insort(self._by_length, (length, self._num_arrived))
        self._num_arrived += 1

    def _take(self, arrival: int) -> Segment:
        segment = self._waiting.pop(arrival)
        del self._by_length[bisect_left(self._by_length, (segment.length, arrival))]
        return segment


Packer = ContinuousPacker | DocumentPacker


def make_packer(
    packing: str,
    documents: Iterator[Document],
    seq_len: int,
    state: State | None = None,
    refetch: Callable[[int, int], Document] | None = None,
) -> Packer:
    """The packer of a spec's `data.packing`, continued from a state."""
    if packing == "continuous":
        return ContinuousPacker(documents, seq_len, state)
    assert packing == "documents"
    return DocumentPacker(documents, seq_len, state, refetch)


def num_rows(lengths: Iterable[np.ndarray], seq_len: int) -> int:
    """Rows of whole epochs in `documents` packing.

    lengths: int64 [n] for each epoch, the tokens of its documents in its order.
    """
    packer = DocumentPacker(_blank_documents(lengths), seq_len)
    return sum(1 for _ in iter(packer.row, []))


def _blank_documents(lengths: Iterable[np.ndarray]) -> Iterator[Document]:
    for epoch, of_epoch in enumerate(lengths):
        blank = np.zeros(of_epoch.max(initial=0), np.uint8)
        for position, length in enumerate(of_epoch.tolist()):
            yield Document(epoch, position, position, blank[:length], None)


def num_row_targets(row: Row) -> int:
    """Targets of a row: one per token without masks, else the masked-in tokens that come next."""
    total = 0
    for document, start, length in row:
        if document.mask is None:
            total += length
        else:
            total += int(np.count_nonzero(document.mask[start + 1 : start + length + 1]))
    return total


def write_row(
    row: Row,
    bos_id: int,
    inputs: np.ndarray,
    targets: np.ndarray,
    doc_ids: np.ndarray | None,
    ignore_index: int,
) -> None:
    """Write one row's tokens into int64 [T] arrays.

    The target after a document's last token is <|bos|>, with which the next one starts; in a
    conversation it is ignored. Padding has an id of its own, <|bos|> as input and no targets.
    """
    at = 0
    for number, (document, start, length) in enumerate(row):
        tokens, mask = document.tokens, document.mask
        end, stop = at + length, start + length
        inputs[at:end] = tokens[start:stop]
        following = tokens[start + 1 : stop + 1]
        wanted = targets[at:end]
        wanted[: len(following)] = following
        if len(following) < length:
            wanted[-1] = bos_id if mask is None else ignore_index
        if mask is not None:
            wanted[: len(following)][mask[start + 1 : stop + 1] == 0] = ignore_index
        if doc_ids is not None:
            doc_ids[at:end] = number
        at = end
    inputs[at:] = bos_id
    targets[at:] = ignore_index
    if doc_ids is not None:
        doc_ids[at:] = len(row)
