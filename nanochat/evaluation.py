"""Scoring a model on tasks: generative ones by the text it writes, choices by the likelier letter.

Batches are formed by the index of the example, never by what was left over, and each is answered as
a closed group: an example meets the same batch, hence the same rounding, on any number of ranks and
after any restart.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from nanochat.engine import Engine, Request
from nanochat.tasks import Example, Task
from nanochat.text import visible_text
from nanochat.tokenizer import render_for_completion


@dataclass(frozen=True, slots=True)
class Marked:
    """One answered example."""

    index: int
    correct: bool
    completion: str
    """What the model said (for a choice task the letter that it found most likely)."""


def evaluate(
    engine: Engine,
    task: Task,
    *,
    num_examples: int,
    batch_size: int,
    max_tokens: int,
    rank: int = 0,
    world_size: int = 1,
    done: Collection[int] = (),
) -> Iterator[list[Marked]]:
    """Answer the first `num_examples` of a task greedily, this rank's share of them, by batches.

    A batch whose examples are all in `done` (of a former process) is passed over.
    """
    num_examples = min(num_examples, task.num_examples)
    starts = range(0, num_examples, batch_size)
    for start in starts[rank::world_size]:
        indices = range(start, min(start + batch_size, num_examples))
        if all(i in done for i in indices):
            continue
        examples = [task.example(i) for i in indices]
        prompts = [_prompt(engine, example) for example in examples]
        if task.kind == "choice":
            completions = _choose(engine, prompts, examples)
        else:
            completions = _write(engine, prompts, max_tokens)
        yield [
            Marked(i, task.evaluate(example, completion), completion)
            for i, example, completion in zip(indices, examples, completions, strict=True)
        ]


def accuracy(marked: Sequence[Marked]) -> tuple[float, float]:
    """(share of right answers, its standard error), both 0 to 1."""
    assert marked
    value = sum(m.correct for m in marked) / len(marked)
    return value, math.sqrt(value * (1 - value) / len(marked))


def _prompt(engine: Engine, example: Example) -> list[int]:
    """The conversation without its last reply, and the token that begins a reply."""
    return render_for_completion(engine.tokenizer, example.conversation)


def _write(engine: Engine, prompts: list[list[int]], max_tokens: int) -> list[str]:
    requests = [Request(prompt=tuple(prompt), max_tokens=max_tokens) for prompt in prompts]
    return [visible_text(engine.tokenizer, g.ids) for g in engine.complete(requests)]


def _choose(engine: Engine, prompts: list[list[int]], examples: list[Example]) -> list[str]:
    """Of every example's letters the one of the largest logit. A letter is one token."""
    logits = engine.next_logits(prompts).cpu()
    chosen = []
    for row, example in zip(logits, examples, strict=True):
        scores = {}
        for letter in example.letters:
            ids = engine.tokenizer.encode(letter)
            assert len(ids) == 1, f"{letter!r} is {len(ids)} tokens"
            scores[letter] = float(row[ids[0]])
        chosen.append(max(scores, key=scores.__getitem__))
    return chosen
