"""Task families that this project generates itself, small enough for a toy model to learn.

- `copying`: repeat a short row of letters and digits.
- `arithmetic`: sums, differences and products, worked out with the calculator.
- `kinds`: are these letters or digits, as a multiple choice.

Words and symbols keep their blanks in question and reply, so that the tokenizer cuts both the same
way and what is to be copied is a row of equal tokens.
"""

from __future__ import annotations

import random
import string
from typing import ClassVar

from nanochat.tasks.common import (
    LETTERS,
    Example,
    GeneratedTask,
    Instance,
    Kind,
    conversation,
    render_choices,
)

SYMBOLS = string.ascii_lowercase + string.digits


class Copying(GeneratedTask):
    """Repeat a row of 2 to 5 symbols: `Repeat: k 7 b` -> `k 7 b`."""

    name = "copying"

    def draw(self, rng: random.Random) -> Instance:
        row = " ".join(rng.choice(SYMBOLS) for _ in range(rng.randint(2, 5)))
        wording = rng.choice(("Repeat: {}", "Say this again: {}", "Copy: {}"))
        example = Example(conversation(wording.format(row), row), row)
        return Instance(row, example)


class Arithmetic(GeneratedTask):
    """`What is 27 + 45?`, answered through the calculator, the result then repeated."""

    name = "arithmetic"

    def draw(self, rng: random.Random) -> Instance:
        sign = rng.choice("+-*")
        high = 12 if sign == "*" else 99
        a, b = rng.randint(0, high), rng.randint(0, high)
        if sign == "-":
            a, b = max(a, b), min(a, b)
        expression = f"{a} {sign} {b}"
        result = str({"+": a + b, "-": a - b, "*": a * b}[sign])
        wording = rng.choice(("What is {}?", "Compute {}.", "{} = ?"))
        reply = [
            {"type": "python", "text": expression},
            {"type": "python_output", "text": result},
            {"type": "text", "text": result},
        ]
        # 3 + 5 and 5 + 3 are one question
        low, top = sorted((a, b))
        example = Example(conversation(wording.format(expression), reply), result)
        return Instance(f"{low} {sign} {top}", example)


class Kinds(GeneratedTask):
    """Are these letters or digits, with the letters A and B."""

    name = "kinds"
    kind: ClassVar[Kind] = "choice"
    chance = 0.5

    def draw(self, rng: random.Random) -> Instance:
        names = ["letters", "digits"]
        wanted = rng.randrange(2)
        symbols = (string.ascii_lowercase, string.digits)[wanted]
        row = " ".join(rng.choice(symbols) for _ in range(rng.randint(3, 4)))
        prompt = render_choices(f"What are {row}?", names, LETTERS[:2])
        answer = LETTERS[wanted]
        example = Example(conversation(prompt, answer), answer, tuple(LETTERS[:2]))
        return Instance(row, example)
