"""Byte pair encoding for GPT-style tokenizers: training and encoding."""

from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from typing import TypedDict, final

import numpy as np
from numpy.typing import NDArray

GPT4_PATTERN: str
"""The split pattern that is used when none is given: GPT-4's, digits in groups of up to 3."""

Progress = Callable[[str, int, int | None], object]
"""Called about ten times a second with the phase ("count": bytes of text, "merge": merges), how
much is done, and the total if it is known. An exception from it ends the work."""

class Amount(TypedDict):
    """How much `train_from_files` read."""

    documents: int
    chars: int
    bytes: int

@final
class Tokenizer:
    """A byte pair encoding tokenizer: 256 single-byte tokens, then one token per merge.

    All work runs with the GIL released and can be interrupted (Ctrl-C). A tokenizer changes only
    when training succeeds; other threads may use it meanwhile.
    """

    def __init__(self) -> None:
        """No merges and an empty pattern: encodes every text to nothing until trained."""

    @staticmethod
    def from_merges(merges: Sequence[tuple[int, int]], pattern: str = ...) -> Tokenizer:
        """Merge i joins two tokens into token 256 + i. ValueError for merges that name a token
        before it exists or that repeat, and for a pattern that does not compile."""

    def train_from_iterator(
        self,
        iterator: Iterable[str],
        vocab_size: int,
        buffer_size: int = 8192,
        pattern: str | None = None,
        *,
        num_threads: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Learn up to `vocab_size - 256` merges; fewer when no pair is left.

        `buffer_size` is the number of texts taken from Python at a time, `num_threads` None is
        one per processor (at most 256 start); neither changes the result. ValueError: vocab_size
        below 256, a pattern that does not compile. TypeError: an item that is no str.
        UnicodeEncodeError: a lone surrogate, with its position. What the iterator raises passes
        through.
        """

    def train_from_files(
        self,
        paths: Sequence[str | PathLike[str]],
        vocab_size: int,
        *,
        pattern: str | None = None,
        column: str = "text",
        max_chars: int | None = None,
        doc_cap_chars: int | None = None,
        num_threads: int | None = None,
        progress: Progress | None = None,
    ) -> Amount:
        """The same from files, read in this order without Python: the rows of a parquet column are
        documents (missing ones are left out), any other file is one document of text.

        At most `doc_cap_chars` characters of a document and `max_chars` in all are read. Memory is
        bounded by the distinct words and one parquet page, not by the files. FileNotFoundError and
        its like name the file; ValueError: invalid UTF-8, with file, row and byte; no such column.
        """

    def save(self, path: str | PathLike[str]) -> None:
        """Write pattern and merges as one file, atomically."""

    @staticmethod
    def load(path: str | PathLike[str]) -> Tokenizer:
        """The tokenizer that `save` wrote. ValueError if the file is not such a one."""

    def get_pattern(self) -> str:
        """The split pattern; empty before training."""

    @property
    def vocab_size(self) -> int:
        """256 + the number of merges."""

    def get_merges(self) -> list[tuple[int, int]]:
        """The merges in order; merge i makes token 256 + i."""

    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]:
        """Every token's bytes and id, by id: what `tiktoken.Encoding` takes, as a dict."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""

    def batch_encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on all processors."""

    def encode_batch(
        self, texts: Sequence[str], num_threads: int | None = None, prefix: int | None = None
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The ids of all texts end to end, and where each text starts (one entry more than texts).
        With `prefix`, each text's ids start with it."""

    def count_tokens(self, text: str) -> int:
        """Number of ids of a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """ValueError: no such id. UnicodeDecodeError: the bytes are not whole characters."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of the ids. ValueError: no such id."""
