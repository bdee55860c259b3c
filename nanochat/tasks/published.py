"""Reading the files of published sets: rows of parquet in a fixed, shuffled order.

The order is the same in every run and under every seed, so that the first n examples of a test
split are the same n for every model that is compared; publishers' own orders go by subject.
"""

from __future__ import annotations

import functools
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.spec import SpecError
from nanochat.tasks.common import Example, Kind
from nanochat.touches import Split, require, task_files

Row = dict[str, Any]


class PublishedTask(ABC):
    """A set small enough to be held in memory; a subclass turns rows into examples."""

    name: ClassVar[str]
    kind: ClassVar[Kind] = "generative"
    chance: ClassVar[float] = 0.0
    columns: ClassVar[tuple[str, ...]]

    def __init__(self, split: Split, seed: int = 0) -> None:
        """Raises SpecError for a split that the set has not, or a file that is missing or wrong.

        seed: without effect; every task takes one.
        """
        self.split = split
        self._paths = [require(path) for path in task_files(self.name, split)]

    @property
    def num_examples(self) -> int:
        return len(self._order)

    def example(self, index: int) -> Example:
        """The example at `index` of the fixed order. Raises IndexError."""
        if not 0 <= index < self.num_examples:
            raise IndexError(f"{self.name} {self.split} has {self.num_examples} examples: {index}")
        return self.from_row(self._row(self._order[index]))

    @functools.cached_property
    def _table(self) -> pa.Table:
        tables = [read_table(path, self.columns) for path in self._paths]
        return pa.concat_tables(tables).combine_chunks()

    def _row(self, number: int) -> Row:
        return {name: self._table[name][number].as_py() for name in self.columns}

    @functools.cached_property
    def _order(self) -> list[int]:
        """Rows of the split in their fixed order."""
        order = list(self.rows_of_split(self._table))
        random.Random(f"{self.name} {self.split}").shuffle(order)
        return order

    def rows_of_split(self, table: pa.Table) -> Sequence[int]:
        """Which rows of the split's files belong to it."""
        return range(len(table))

    @abstractmethod
    def from_row(self, row: Row) -> Example:
        """The example that a row is."""

    def evaluate(self, example: Example, completion: str) -> bool:
        """Whether a letter, or a text, is the answer."""
        return completion.strip() == example.answer


def read_table(path: Path, columns: Sequence[str]) -> pa.Table:
    """Columns of a parquet file, in one piece each. Raises SpecError that names it where it is not
    what it should."""
    try:
        with pq.ParquetFile(path) as parquet:
            check_columns(path, parquet, columns)
            return parquet.read(columns=list(columns)).combine_chunks()
    except (OSError, pa.ArrowException) as e:
        raise damaged(path, e) from None


def check_columns(path: Path, parquet: pq.ParquetFile, columns: Sequence[str]) -> None:
    """Raises SpecError where a column is missing."""
    there = parquet.schema_arrow.names
    if missing := [name for name in columns if name not in there]:
        raise SpecError(
            f"{path} has no column {', '.join(missing)} (it has {', '.join(there)}): this is "
            "another set, or another version of it, than the kit knows"
        )


def damaged(path: Path, error: Exception) -> SpecError:
    """What to say of a file that cannot be read."""
    return SpecError(
        f"{path} is no parquet file that can be read ({error}); delete it and fetch it again: "
        "nanochat fetch @CONFIG"
    )
