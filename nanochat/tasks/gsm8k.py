"""GSM8K (arXiv 2110.14168): grade-school mathematics in words, 7,473 to train on, 1,319 to test.

The publisher's solutions call a calculator in place, `<<12/60=0.2>>`, and end in `#### 10`. The
calls become calls of the kit's own calculator, so a model learns when to ask it.
"""

from __future__ import annotations

import hashlib
import re

import pyarrow as pa

from nanochat.tasks.common import Example, conversation
from nanochat.tasks.published import PublishedTask, Row

CALL = re.compile(r"<<([^<>]*)>>")
ANSWER = re.compile(r"#### *(-?[0-9.,]+)")
ONE_HELD_OUT_OF = 32
"""The set has no validation split; one question in so many, by its hash, is not trained on."""


class Gsm8k(PublishedTask):
    """Right is a reply whose first `#### N` gives the reference's number."""

    name = "gsm8k"
    columns = ("question", "answer")

    def rows_of_split(self, table: pa.Table) -> list[int]:
        wanted = (self.split == "validation",) if self.split != "test" else (False, True)
        questions = table["question"].to_pylist()
        return [i for i, question in enumerate(questions) if _is_held_out(question) in wanted]

    def from_row(self, row: Row) -> Example:
        answer = final_number(row["answer"])
        assert answer is not None, row["answer"]
        return Example(conversation(row["question"], solution_parts(row["answer"])), answer)

    def evaluate(self, example: Example, completion: str) -> bool:
        """Whether the first number after #### is the answer."""
        return final_number(completion) == example.answer


def _is_held_out(question: str) -> bool:
    digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % ONE_HELD_OUT_OF == 0


def final_number(text: str) -> str | None:
    """The number after the first `####`, without thousands separators or a full stop; or None."""
    match = ANSWER.search(text)
    return match[1].replace(",", "").rstrip(".") if match else None


def solution_parts(solution: str) -> list[dict[str, str]]:
    """A solution as text, calls of the calculator and their results."""
    parts = []
    # split gives text, call, text, …: the calls have the odd places
    for i, piece in enumerate(CALL.split(solution)):
        if i % 2 == 0:
            parts.append({"type": "text", "text": piece})
            continue
        expression, _, value = piece.rpartition("=")
        parts.append({"type": "python", "text": expression})
        parts.append({"type": "python_output", "text": value})
    return [part for part in parts if part["text"]]
