"""ARC (arXiv 1803.05457): questions of school science with three to five choices.

The publisher's labels are letters, in some questions digits; they are kept.
"""

from __future__ import annotations

from typing import ClassVar

from nanochat.tasks.common import Example, Kind, conversation, render_choices
from nanochat.tasks.published import PublishedTask, Row


class _Arc(PublishedTask):
    kind: ClassVar[Kind] = "choice"
    chance = 0.25
    columns = ("question", "choices", "answerKey")

    def from_row(self, row: Row) -> Example:
        labels = tuple(row["choices"]["label"])
        prompt = render_choices(row["question"], row["choices"]["text"], labels)
        answer = row["answerKey"]
        return Example(conversation(prompt, answer), answer, labels)


class ArcEasy(_Arc):
    """ARC-Easy: 2,251 to train on, 2,376 to test."""

    name = "arc_easy"


class ArcChallenge(_Arc):
    """ARC-Challenge: 1,119 to train on, 1,172 to test; what simple methods got wrong."""

    name = "arc_challenge"
