"""Scoring: a cheat gets everything right, a model that knows nothing guesses, and neither the
number of ranks nor a restart changes anything."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat import sandbox
from nanochat.engine import Engine, Generation, Request
from nanochat.evaluation import Marked, accuracy, evaluate
from nanochat.gpt import GPT
from nanochat.scaling import GPTConfig
from nanochat.spec import GENERATED_TASKS
from nanochat.tasks import TASKS, Task, make_task
from nanochat.tasks.core import CoreTask, core_tasks
from nanochat.tokenizer import Tokenizer, render_conversation
from nanochat.touches import TASK_FILES
from tests.twin import published

TOKENIZER = Tokenizer.train(["the lamp is kept in a cellar, in a boat, on a meadow " * 9], 320)
SCORED = [n for n in TASKS if n in GENERATED_TASKS or "test" in TASK_FILES[n]]
"""Every task that can be evaluated, but for CORE's."""
CHOICES = [name for name in SCORED if getattr(TASKS[name], "kind", None) == "choice"]
SEQ_LEN = 512
MANY = 120


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    published.place(home / "data", num_rows=MANY)
    return home


@pytest.fixture(autouse=True)
def own_home(data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_HOME", str(data))
    core_tasks.cache_clear()
    return data


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """More threads than idle cores only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ignorant(seed: int) -> GPT:
    """Random weights: no token is likelier for any reason."""
    model = GPT(
        GPTConfig(
            n_layer=2,
            n_head=2,
            n_kv_head=2,
            n_embd=32,
            seq_len=SEQ_LEN,
            vocab_size=TOKENIZER.vocab_size,
        )
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(ignorant(0), TOKENIZER, max_batch=8)


class Cheat:
    """Has the answers: of what an engine is asked, it says what the reference says."""

    tokenizer = TOKENIZER
    max_seq_len = 1 << 20

    def __init__(self, task: Task | CoreTask) -> None:
        self.task = task
        self.by_prompt: dict[tuple[int, ...], list[int]] = {}
        if not isinstance(task, CoreTask):
            for i in range(task.num_examples):
                conversation = task.example(i).conversation
                ids, _ = render_conversation(TOKENIZER, conversation, max_tokens=1 << 20)
                start = TOKENIZER.special_id("assistant_start")
                cut = len(ids) - ids[::-1].index(start)
                self.by_prompt[tuple(ids[:cut])] = ids[cut:-1]

    def complete(self, requests: Sequence[Request]) -> list[Generation]:
        return [Generation(r, ids=list(self.by_prompt[r.prompt])) for r in requests]

    def next_logits(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        logits = torch.zeros(len(prompts), TOKENIZER.vocab_size)
        for row, prompt in zip(logits, prompts, strict=True):
            row[self.by_prompt[tuple(prompt)][0]] = 1.0
        return logits

    def continuations(self, rows: Any, starts: Any) -> list[tuple[Tensor, Tensor]]:
        """The right row is the likely one; it knows them by their place in the example."""
        assert isinstance(self.task, CoreTask)
        for i in range(self.task.num_examples):
            example = self.task.example(i)
            encoded = [[TOKENIZER.bos_id, *TOKENIZER.encode(text)] for text in example.texts]
            if rows in (encoded, encoded[1:]):
                gold = example.gold if len(rows) > 1 else 0
                scores = [0.0 if k == gold else -1.0 for k in range(len(rows))]
                return [
                    (torch.full((len(row) - start,), score), torch.tensor([True]))
                    for row, start, score in zip(rows, starts, scores, strict=True)
                ]
        raise AssertionError("an unknown question")


def answered(engine: Any, task: Any, num_examples: int = 10_000, **options: Any) -> list[Marked]:
    options = {"batch_size": 8, "max_tokens": 3, **options}
    batches = evaluate(engine, task, num_examples=num_examples, **options)
    return [marked for batch in batches for marked in batch]


@pytest.mark.parametrize("name", SCORED)
def test_a_cheat_is_always_right(name: str) -> None:
    if name == "humaneval" and sandbox.problem() is not None:
        pytest.skip("no sandbox here")
    task = make_task(name, "test", 3)
    marked = answered(Cheat(task), task, max_tokens=10_000)
    assert len(marked) == task.num_examples and all(m.correct for m in marked)
    assert accuracy([m.correct for m in marked]) == (1.0, 0.0)


def test_a_cheat_has_a_core_of_one() -> None:
    for task in core_tasks():
        assert all(m.correct for m in answered(Cheat(task), task)), task.label


@pytest.mark.parametrize("name", CHOICES)
def test_random_weights_guess(name: str) -> None:
    """Over several models, because one model may have a favourite letter."""
    task = make_task(name, "test", 3)
    right = total = 0
    for seed in range(3):
        marked = answered(Engine(ignorant(seed), TOKENIZER, max_batch=8), task, 40)
        right, total = right + sum(m.correct for m in marked), total + len(marked)
    stderr = math.sqrt(task.chance * (1 - task.chance) / total)
    assert abs(right / total - task.chance) < 3 * stderr


CORE_CHOICES = [row[0] for row in published.CORE_TASKS if row[2] != "language_modeling"]


@pytest.mark.parametrize("label", CORE_CHOICES)
def test_random_weights_guess_in_core_too(label: str) -> None:
    """Of as many texts as the fixture's questions have; over several models, as above."""
    (task,) = (t for t in core_tasks() if t.label == label)
    right = total = 0
    for seed in range(2):
        marked = answered(Engine(ignorant(seed), TOKENIZER, max_batch=8), task)
        right, total = right + sum(m.correct for m in marked), total + len(marked)
    chance = 1 / len(task.example(0).texts)
    assert abs(right / total - chance) < 3 * math.sqrt(chance * (1 - chance) / total)


@pytest.mark.parametrize("name", ["mmlu", "copying", "core.arc_easy", "core.winograd",
                                  "core.coqa"])  # fmt: skip
def test_ranks_and_restarts_change_nothing(engine: Engine, name: str) -> None:
    task: Any = next((t for t in core_tasks() if t.name == name), None) or make_task(name, "test")
    alone = answered(engine, task, 9, batch_size=2)
    assert [m.index for m in alone] == list(range(9))
    for world_size in (2, 4):
        shared = [
            m
            for rank in range(world_size)
            for m in answered(engine, task, 9, batch_size=2, rank=rank, world_size=world_size)
        ]
        assert sorted(shared, key=lambda m: m.index) == alone
    # killed after five examples: the whole batches are not answered again, the torn one is
    rest = answered(engine, task, 9, batch_size=2, done={m.index for m in alone[:5]})
    assert rest == alone[4:]


def test_a_prompt_that_is_too_long_loses_its_beginning(engine: Engine) -> None:
    """The few-shot prompts of a small vocabulary do not fit a short context."""
    small = Engine(ignorant(0), TOKENIZER, max_batch=4, max_seq_len=96)
    for name in ("mmlu", "gsm8k"):
        assert len(answered(small, make_task(name, "test"), 3)) == 3
    for task in core_tasks():
        if task.label in ("hellaswag", "winograd", "jeopardy", "squad"):
            assert len(answered(small, task, 2)) == 2


# -- Engine.continuations


def by_hand(model: GPT, row: list[int], start: int) -> tuple[Tensor, Tensor]:
    """The definition: one forward pass over the whole row."""
    with torch.no_grad():
        scores = model(torch.tensor([row]))[0].log_softmax(-1)
    targets = torch.tensor(row[start:])
    judged = scores[start - 1 : -1]
    return judged.gather(-1, targets[:, None])[:, 0], judged.argmax(-1) == targets


@pytest.mark.parametrize(
    ("rows", "starts"),
    [
        ([[1, 2, 3, 4, 5, 6]], [3]),
        ([[1, 2, 3, 4], [1, 2, 9, 8, 7, 6], [1, 2, 3, 8]], [2, 2, 2]),
        ([[1, 2, 3, 7, 8], [1, 4, 7, 8]], [3, 2]),
        ([[5, 6], [9, 6]], [1, 1]),
        ([[1, 2, 3], [1, 2, 3]], [2, 2]),
        ([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7]], [4, 4]),
    ],
)
def test_continuations_are_what_one_pass_over_each_row_says(
    engine: Engine, rows: list[list[int]], starts: list[int]
) -> None:
    found = engine.continuations(rows, starts)
    for row, start, (likely, is_likeliest) in zip(rows, starts, found, strict=True):
        expected, expected_best = by_hand(ignorant(0), row, start)
        assert torch.allclose(likely, expected, atol=1e-5)
        assert torch.equal(is_likeliest, expected_best)
