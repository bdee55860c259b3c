"""What a run has logged, as a reader of metrics.jsonl takes it."""

import json
from typing import Any

RESULTS = ("loss", "val_bpb", "value")
"""Of a training step, of a look at the validation text, of a task's score."""


def results(lines: str) -> dict[tuple[Any, ...], float]:
    """(stage, step, task, metric, what) -> number; of each the last line."""
    last: dict[tuple[Any, ...], float] = {}
    for line in lines.splitlines():
        record = json.loads(line)
        where = tuple(str(record.get(k)) for k in ("stage", "step", "task", "metric"))
        last |= {(*where, what): record[what] for what in RESULTS if what in record}
    return last


def assert_equal(found: dict[tuple[Any, ...], float], wanted: dict[tuple[Any, ...], float]) -> None:
    """The same results bit by bit, of a run long enough and with every kind."""
    assert found == wanted
    kinds = [key[-1] for key in wanted]
    assert kinds.count("loss") > 20 and kinds.count("val_bpb") > 2 and "value" in kinds, kinds
