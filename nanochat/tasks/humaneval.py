"""HumanEval (arXiv 2107.03374): 164 functions to write, each with tests; pass@1.

The model's program and the publisher's tests run in the sandbox (nanochat/sandbox.py); where the
sandbox cannot be had, the task cannot be made.
"""

from __future__ import annotations

import re

from nanochat import sandbox
from nanochat.spec import SpecError
from nanochat.tasks.common import Example, conversation
from nanochat.tasks.published import PublishedTask, Row
from nanochat.touches import Split

FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)
DEFINITION = re.compile(r"^def (\w+)", re.MULTILINE)


class HumanEval(PublishedTask):
    """Right is a program that passes all tests within the time limit."""

    name = "humaneval"
    columns = ("prompt", "canonical_solution", "test", "entry_point")

    def __init__(self, split: Split, seed: int = 0) -> None:
        """Raises SpecError also where programs cannot be run safely."""
        super().__init__(split, seed)
        if problem := sandbox.problem():
            raise SpecError(
                f"humaneval runs programs that a model wrote, and here they cannot be locked in: "
                f"{problem}. Take humaneval out of evaluate.tasks, or evaluate on Linux"
            )

    def from_row(self, row: Row) -> Example:
        program = row["prompt"] + row["canonical_solution"]
        tests = f"{row['test']}\n\ncheck({row['entry_point']})\n"
        return Example(conversation(row["prompt"], program), tests)

    def evaluate(self, example: Example, completion: str) -> bool:
        """Whether the program that a reply holds passes the tests."""
        prompt = example.conversation["messages"][0]["content"]
        return sandbox.passes(f"{program_of(prompt, completion)}\n\n{example.answer}")


def program_of(prompt: str, completion: str) -> str:
    """The program in a reply: its first fenced block, or all of it.

    A reply that defines the wanted function (the last one of the prompt) gets what stands before
    it in the prompt, imports and helpers; one that only goes on gets the whole prompt.
    """
    fenced = FENCED.search(completion)
    code = fenced[1] if fenced else completion
    wanted = list(DEFINITION.finditer(prompt))[-1]
    if re.search(rf"^def {wanted[1]}\b", code, re.MULTILINE):
        return prompt[: wanted.start()] + code
    return prompt + code
