"""MMLU (arXiv 2009.03300): 14,042 questions of 57 subjects with four choices.

`mmlu` is the test split. `mmlu_aux` is what its authors give to train on: questions of other sets
in the same form, and as validation MMLU's own validation split.
"""

from __future__ import annotations

from typing import ClassVar

from nanochat.tasks.common import LETTERS, Example, Kind, conversation, render_choices
from nanochat.tasks.published import PublishedTask, Row


class Mmlu(PublishedTask):
    """Questions of all subjects; the answer is given as the index of a choice."""

    name = "mmlu"
    kind: ClassVar[Kind] = "choice"
    chance = 0.25
    columns = ("question", "choices", "answer")

    def from_row(self, row: Row) -> Example:
        letters = tuple(LETTERS[: len(row["choices"])])
        prompt = render_choices(row["question"], row["choices"], letters)
        answer = letters[row["answer"]]
        return Example(conversation(prompt, answer), answer, letters)


class MmluAux(Mmlu):
    """99,842 questions to train on."""

    name = "mmlu_aux"
