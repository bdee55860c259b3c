"""What a task is: conversations to train on and a way to mark answers.

- A generated instance is for training or held out by the hash of what it asks, never by its index
  or the seed, so the two cannot share a question, whatever the sizes and the phrasing; "validation"
  and "test" are the same held-out instances.
- Examples are made when asked for, from (seed, split, index) alone.
- A conversation is `{"messages": [{"role": "user", "content": str}, {"role": "assistant",
  "content": str | list of parts}]}`; a part is `{"type": "text" | "python" | "python_output",
  "text": str}`.
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from nanochat.touches import Split

Kind = Literal["generative", "choice"]
Conversation = dict[str, Any]

TEST_FRACTION = 0.1
LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation whose last message is the reference reply, and what marks an answer."""

    conversation: Conversation
    answer: str
    """The text that a right reply gives; for a choice task its letter; for a program its tests."""
    letters: tuple[str, ...] = ()
    """The letters to choose from; empty unless the task is a choice."""


class Task(Protocol):
    """A named set of examples in one split.

    `kind` says how it is scored: "generative" by `evaluate` on the text that the model writes,
    "choice" by which of `Example.letters` the model finds most likely. `chance` is the accuracy
    (0 to 1) of guessing.
    """

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> Kind: ...

    @property
    def chance(self) -> float: ...

    @property
    def num_examples(self) -> int: ...

    def example(self, index: int) -> Example: ...

    def evaluate(self, example: Example, completion: str) -> bool: ...


def in_test_split(task_name: str, key: str) -> bool:
    """Whether the instance that `key` identifies is held out. A tenth of all keys are."""
    digest = hashlib.blake2b(f"{task_name}\0{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < TEST_FRACTION * 2**64


@dataclass(frozen=True, slots=True)
class Instance:
    """A drawn instance: `key` identifies the question whatever its wording."""

    key: str
    example: Example


class GeneratedTask(ABC):
    """A family of instances that this project generates; a subclass only draws and marks.

    Train examples are drawn independently (a small family repeats itself); test examples are
    distinct by key, so `num_test` must leave room within the held-out tenth.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind] = "generative"
    chance: ClassVar[float] = 0.0
    num_train: ClassVar[int] = 1_000_000
    num_test: ClassVar[int] = 256

    def __init__(self, split: Split, seed: int = 0) -> None:
        self.split = split
        self.seed = seed
        self._test_examples: list[Example] = []
        self._test_keys: set[str] = set()
        self._test_rng = random.Random(f"{self.name} test {seed}")

    @property
    def num_examples(self) -> int:
        return self.num_train if self.split == "train" else self.num_test

    def example(self, index: int) -> Example:
        """The example at `index`, equal for equal (split, seed, index). Raises IndexError."""
        if not 0 <= index < self.num_examples:
            raise IndexError(f"{self.name} {self.split} has {self.num_examples} examples: {index}")
        if self.split == "train":
            rng = random.Random(f"{self.name} train {self.seed} {index}")
            return self._draw_from_split(rng).example
        while len(self._test_examples) <= index:
            instance = self._draw_from_split(self._test_rng)
            if instance.key not in self._test_keys:
                self._test_keys.add(instance.key)
                self._test_examples.append(instance.example)
        return self._test_examples[index]

    def _draw_from_split(self, rng: random.Random) -> Instance:
        while True:
            instance = self.draw(rng)
            if in_test_split(self.name, instance.key) == (self.split != "train"):
                return instance

    @abstractmethod
    def draw(self, rng: random.Random) -> Instance:
        """One instance of the family, of either split."""

    def evaluate(self, example: Example, completion: str) -> bool:
        """Right if the reply says exactly the answer, but for blanks around it."""
        return completion.strip() == example.answer


def conversation(user: str, assistant: str | list[dict[str, str]]) -> Conversation:
    """One question and its reply."""
    return {
        "messages": [
            {"role": "user", "content": user},
            {"role": "assistant", "content": assistant},
        ]
    }


def render_choices(question: str, choices: Sequence[str], letters: Sequence[str]) -> str:
    """A multiple-choice prompt. The letter stands after its choice and directly after `=`, so
    that it is the same token here as at the start of the reply."""
    lines = [f"Multiple Choice question: {question}"]
    lines += [f"- {choice}={letter}" for choice, letter in zip(choices, letters, strict=True)]
    return "\n".join([*lines, "", "Respond only with the letter of the correct answer."])
