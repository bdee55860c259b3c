"""Scoring a model on tasks: by the text it writes, by the likelier letter, by the likelier text.

Batches are formed by the index of the example, never by what was left over, and each is answered as
a closed group: an example meets the same batch, hence the same rounding, on any number of ranks and
after any restart.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from nanochat.engine import Engine, Request, num_common
from nanochat.tasks import Example, Task
from nanochat.tasks.core import CoreExample, CoreTask
from nanochat.text import visible_text
from nanochat.tokenizer import render_for_completion

PROMPT_CHARS = 2000


@dataclass(frozen=True, slots=True)
class Marked:
    """One answered example."""

    index: int
    correct: bool
    prompt: str
    """The end of what was asked, for people."""
    completion: str
    """What the model said (of a choice, what it found most likely)."""


def evaluate(
    engine: Engine,
    task: Task | CoreTask,
    *,
    num_examples: int,
    batch_size: int,
    max_tokens: int,
    rank: int = 0,
    world_size: int = 1,
    done: Collection[int] = (),
) -> Iterator[list[Marked]]:
    """Answer the first `num_examples` of a task greedily, this rank's share of them, by batches.

    A batch whose examples are all in `done` (of a former process) is passed over. A prompt that is
    too long for the context loses its beginning.
    """
    num_examples = min(num_examples, task.num_examples)
    starts = range(0, num_examples, batch_size)
    for start in starts[rank::world_size]:
        indices = range(start, min(start + batch_size, num_examples))
        if all(i in done for i in indices):
            continue
        if isinstance(task, CoreTask):
            yield [_compare(engine, task.kind, task.example(i), i) for i in indices]
        else:
            yield _answer(engine, task, indices, max_tokens)


def accuracy(correct: Collection[bool]) -> tuple[float, float]:
    """(share of right answers, its standard error), both 0 to 1."""
    assert correct
    value = sum(correct) / len(correct)
    return value, math.sqrt(value * (1 - value) / len(correct))


# -- tasks of the chat form


def _answer(engine: Engine, task: Task, indices: range, max_tokens: int) -> list[Marked]:
    examples = [task.example(i) for i in indices]
    if task.kind == "choice":
        completions = _choose(engine, examples)
    else:
        completions = _write(engine, examples, max_tokens)
    return [
        Marked(i, task.evaluate(example, completion), _asked(example), completion)
        for i, example, completion in zip(indices, examples, completions, strict=True)
    ]


def _asked(example: Example) -> str:
    return str(example.conversation["messages"][-2]["content"])[-PROMPT_CHARS:]


def prompt_of(engine: Engine, example: Example, room: int) -> list[int]:
    """The conversation without its last reply, and the token that begins a reply; `room` tokens of
    the context are left."""
    ids = render_for_completion(engine.tokenizer, example.conversation)
    return _cropped(ids, engine.max_seq_len - room)


def _cropped(ids: Sequence[int], most: int) -> list[int]:
    """At most so many tokens: the first, <|bos|>, and the last ones."""
    return list(ids) if len(ids) <= most else [ids[0], *ids[len(ids) - most + 1 :]]


def _write(engine: Engine, examples: list[Example], max_tokens: int) -> list[str]:
    room = min(max_tokens, engine.max_seq_len // 2)
    requests = [
        Request(prompt=tuple(prompt_of(engine, example, room)), max_tokens=max_tokens)
        for example in examples
    ]
    return [visible_text(engine.tokenizer, g.ids) for g in engine.complete(requests)]


def _choose(engine: Engine, examples: list[Example]) -> list[str]:
    """Of every example's letters the one of the largest logit. A letter is one token."""
    logits = engine.next_logits([prompt_of(engine, example, 1) for example in examples]).cpu()
    chosen = []
    for row, example in zip(logits, examples, strict=True):
        scores = {}
        for letter in example.letters:
            ids = engine.tokenizer.encode(letter)
            assert len(ids) == 1, f"{letter!r} is {len(ids)} tokens"
            scores[letter] = float(row[ids[0]])
        chosen.append(max(scores, key=scores.__getitem__))
    return chosen


# -- tasks of CORE


def _compare(engine: Engine, kind: str, example: CoreExample, index: int) -> Marked:
    """Which of the texts the model finds likelier, or whether it would have written the ending."""
    tokenizer = engine.tokenizer
    rows = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in example.texts]
    if kind == "language_modeling":
        return _compare_ending(engine, example, index, rows)
    if kind == "schema":  # the texts differ in the middle; what is judged is their common end
        num_judged = num_common([row[::-1] for row in rows])
        starts = [len(row) - num_judged for row in rows]
    else:
        starts = [num_common(rows)] * len(rows)
    likely = [scores for scores, _ in _continuations(engine, rows, starts)]
    # the mean, so that a longer text is not the unlikelier for its length
    means = [float(scores.mean()) for scores in likely]
    chosen = max(range(len(means)), key=means.__getitem__)
    asked = example.texts[chosen][-PROMPT_CHARS:]
    return Marked(index, chosen == example.gold, asked, example.ending[chosen])


def _compare_ending(
    engine: Engine, example: CoreExample, index: int, rows: list[list[int]]
) -> Marked:
    prompt, whole = rows
    start = min(len(prompt), num_common(rows))
    ((_, is_likeliest),) = _continuations(engine, [whole], [start])
    right = bool(is_likeliest.all())
    said = example.ending[0] if right else ""
    return Marked(index, right, example.texts[0][-PROMPT_CHARS:], said)


def _continuations(
    engine: Engine, rows: list[list[int]], starts: list[int]
) -> list[tuple[Tensor, Tensor]]:
    """Engine.continuations of rows that fit the context and of at least one judged token."""
    cropped = [_cropped(row, engine.max_seq_len) for row in rows]
    kept = [
        max(1, min(start, len(row) - 1) - (len(row) - len(short)))
        for start, row, short in zip(starts, rows, cropped, strict=True)
    ]
    return engine.continuations(cropped, kept)
