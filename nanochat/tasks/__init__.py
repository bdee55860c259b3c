"""The tasks by name, and mixtures of them to train on."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nanochat.spec import SpecError
from nanochat.tasks.arc import ArcChallenge, ArcEasy
from nanochat.tasks.common import Conversation, Example, Task
from nanochat.tasks.gsm8k import Gsm8k
from nanochat.tasks.humaneval import HumanEval
from nanochat.tasks.identity import Identity
from nanochat.tasks.mmlu import Mmlu, MmluAux
from nanochat.tasks.smoltalk import SmolTalk
from nanochat.tasks.spelling import Spelling
from nanochat.tasks.synthetic import Arithmetic, Copying, Kinds
from nanochat.touches import Split, fetched_entry, task_files

__all__ = ["TASKS", "Conversation", "Example", "Mixture", "Split", "Task", "make_task"]

TASKS: dict[str, Callable[[Split, int], Task]] = {
    "arithmetic": Arithmetic,
    "kinds": Kinds,
    "copying": Copying,
    "identity": Identity,
    "spelling": Spelling,
    "arc_challenge": ArcChallenge,
    "arc_easy": ArcEasy,
    "gsm8k": Gsm8k,
    "humaneval": HumanEval,
    "mmlu": Mmlu,
    "mmlu_aux": MmluAux,
    "smoltalk": SmolTalk,
}
"""All but `core`, which is 22 tasks of another kind: nanochat/tasks/core.py."""


def make_task(name: str, split: Split, seed: int = 0) -> Task:
    """The task of that name. Raises SpecError, listing the known ones, where there is none."""
    if name not in TASKS:
        raise SpecError(f"unknown task {name!r}; known tasks: {', '.join(sorted(TASKS))}")
    return TASKS[name](split, seed)


class Mixture(Sequence[Conversation]):
    """The first n conversations of each task (`sizes` maps name to n), task by task.

    A conversation is made when asked for. A task with fewer than n examples is passed through as
    often as n asks for. Whoever trains on it shuffles: read in order, every file is read once.
    """

    def __init__(self, sizes: Mapping[str, int], split: Split, seed: int = 0) -> None:
        """Raises SpecError where a task or its files are not there."""
        names = sorted(sizes)
        self._tasks = [make_task(name, split, seed) for name in names]
        self._ends = list(itertools.accumulate(sizes[name] for name in names))
        files = {path: fetched_entry(path) for name in names for path in task_files(name, split)}
        self.key: list[Any] = [
            [(task.name, sizes[task.name], task.num_examples) for task in self._tasks],
            split,
            seed,
            [(path, (entry or {}).get("sha256")) for path, entry in files.items()],
        ]
        """What the conversations follow from, as JSON has it."""

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"the mixture has {len(self)} conversations: {index}")
        number = bisect.bisect_right(self._ends, index)
        start = self._ends[number - 1] if number else 0
        task = self._tasks[number]
        return task.example((index - start) % task.num_examples).conversation
