"""The tasks by name, and mixtures of them to train on."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

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
from nanochat.touches import Split

__all__ = ["TASKS", "Conversation", "Example", "Split", "Task", "make_task", "mixture"]

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


def mixture(tasks: Mapping[str, int], split: Split, seed: int = 0) -> list[Conversation]:
    """The first n conversations of each task (`tasks` maps name to n), shuffled by `seed`.

    A task with fewer than n examples is passed through as often as n asks for.
    """
    conversations: list[Conversation] = []
    for name in sorted(tasks):
        task = make_task(name, split, seed)
        indices = (i % task.num_examples for i in range(tasks[name]))
        conversations += [task.example(i).conversation for i in indices]
    random.Random(seed).shuffle(conversations)
    return conversations
