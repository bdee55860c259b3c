"""SmolTalk for small models (arXiv 2502.02737): 460,000 general conversations to train on.

About 1 GB of parquet, so rows are not held in memory: row groups are taken in a fixed shuffled
order, and of the present one the rows. Reading examples in the order of their index reads every
row group once.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.tasks.common import Example, Kind
from nanochat.tasks.published import check_columns, damaged
from nanochat.touches import Split, require, task_files

COLUMN = "messages"


class SmolTalk:
    """Conversations of several turns; only to train on."""

    name = "smoltalk"
    kind: Kind = "generative"
    chance = 0.0

    def __init__(self, split: Split, seed: int = 0) -> None:
        """Raises SpecError for a file that is missing or wrong. seed: without effect."""
        self.split = split
        paths = [require(path) for path in task_files(self.name, split)]
        self._groups = [group for path in paths for group in _row_groups(path)]
        random.Random(f"{self.name} {split}").shuffle(self._groups)
        self._ends = list(itertools.accumulate(num_rows for _, _, num_rows in self._groups))
        self._conversations = functools.lru_cache(maxsize=1)(self._read)

    @property
    def num_examples(self) -> int:
        return self._ends[-1]

    def example(self, index: int) -> Example:
        """The example at `index` of the fixed order. Raises IndexError."""
        if not 0 <= index < self.num_examples:
            raise IndexError(f"{self.name} {self.split} has {self.num_examples} examples: {index}")
        group = bisect.bisect_right(self._ends, index)
        start = self._ends[group - 1] if group else 0
        messages = self._conversations(group)[index - start]
        return Example({"messages": messages}, messages[-1]["content"])

    def evaluate(self, example: Example, completion: str) -> bool:
        """Whether a reply is the reference's last one, word for word."""
        return completion.strip() == example.answer.strip()

    def _read(self, group: int) -> list[list[dict[str, str]]]:
        path, index, _ = self._groups[group]
        try:
            with pq.ParquetFile(path) as parquet:
                column = parquet.read_row_group(index, columns=[COLUMN]).column(0)
        except (OSError, pa.ArrowException) as e:
            raise damaged(path, e) from None
        return [messages[: _last_reply(messages)] for messages in column.to_pylist()]


def _last_reply(messages: list[dict[str, str]]) -> int:
    """Messages up to the assistant's last: what stands behind it is not answered."""
    return max(i for i, m in enumerate(messages, 1) if m["role"] == "assistant")


def _row_groups(path: Path) -> list[tuple[Path, int, int]]:
    """(file, row group, rows) of a file."""
    try:
        with pq.ParquetFile(path) as parquet:
            check_columns(path, parquet, [COLUMN])
            metadata = parquet.metadata
    except (OSError, pa.ArrowException) as e:
        raise damaged(path, e) from None
    return [(path, i, metadata.row_group(i).num_rows) for i in range(metadata.num_row_groups)]
