"""Simplified GRPO: from sampled replies and their rewards to the gradient of a step.

* On-policy: every step samples with the weights that it then changes, once. The probability ratio
  is therefore 1, and there is neither clipping nor a reference model.
* The advantage of a reply is its reward minus the mean of its prompt's replies (GRPO,
  arXiv 2402.03300, without the division by their deviation: arXiv 2503.20783).
* Every sampled token of a step weighs the same, whatever reply it stands in (arXiv 2503.14476).
  What the calculator has put into a reply was not sampled and is not learned.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.data import IGNORE_INDEX
from nanochat.engine import Engine, Generation, Request
from nanochat.evaluation import prompt_of
from nanochat.sampling import Sampling
from nanochat.sources import permutation
from nanochat.tasks import Task
from nanochat.text import visible_text

PAD_TO = 16
"""Rows are padded to a multiple of this, so that few different shapes occur."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled reply."""

    ids: tuple[int, ...]
    """Prompt and reply, with the token that ended it."""
    is_sampled: tuple[bool, ...]
    """Per token of `ids`: whether the model chose it."""
    reward: float
    advantage: float

    @property
    def num_sampled(self) -> int:
        return sum(self.is_sampled)


def examples_of_step(task: Task, seed: int, step: int, num_prompts: int) -> tuple[list[int], float]:
    """(examples of a step, passes over the task after it): a seeded order for every epoch."""
    first = step * num_prompts
    places = [divmod(place, task.num_examples) for place in range(first, first + num_prompts)]
    orders = {epoch: permutation(task.num_examples, seed, epoch) for epoch, _ in places}
    return [int(orders[e][i]) for e, i in places], (first + num_prompts) / task.num_examples


def roll_out(
    engine: Engine,
    task: Task,
    indices: Sequence[int],
    *,
    samples_per_prompt: int,
    max_tokens: int,
    temperature: float,
    seeds: Callable[[int, int], int],
    go_on: Callable[[], bool],
) -> list[Rollout] | None:
    """Sample replies to some examples; None when `go_on`, asked at every token, says no.

    seeds: (place in `indices`, sample) -> seed. A prompt too long for the context loses its
    beginning.
    """
    examples = [task.example(index) for index in indices]
    room = min(max_tokens, engine.max_seq_len // 2)
    waiting: list[Generation] = []
    for i, example in enumerate(examples):
        prompt = tuple(prompt_of(engine, example, room))
        for sample in range(samples_per_prompt):
            sampling = Sampling(temperature=temperature, seed=seeds(i, sample))
            request = Request(prompt=prompt, max_tokens=max_tokens, sampling=sampling)
            waiting.append(engine.submit(request))
    while any(g.finish_reason is None for g in waiting):
        if not go_on():
            return None
        engine.step()
    rollouts = []
    for i, example in enumerate(examples):
        group = waiting[i * samples_per_prompt : (i + 1) * samples_per_prompt]
        rewards = [
            float(task.evaluate(example, visible_text(engine.tokenizer, g.ids))) for g in group
        ]
        mean = sum(rewards) / len(rewards)
        rollouts += [_rollout(g, r, r - mean) for g, r in zip(group, rewards, strict=True)]
    return rollouts


def _rollout(generation: Generation, reward: float, advantage: float) -> Rollout:
    prompt, end = generation.request.prompt, generation.end_id
    ids = (*prompt, *generation.ids, *(() if end is None else (end,)))
    is_sampled = [False] * len(prompt) + [not forced for forced in generation.forced]
    is_sampled += [True] * (len(ids) - len(is_sampled))
    return Rollout(ids, tuple(is_sampled), reward, advantage)


def batches(
    rollouts: Sequence[Rollout], rows: int, num_batches: int, pad_id: int, max_len: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(inputs int64, targets int64, advantages float32), each [rows, T], num_batches times.

    Replies of like length share a batch. Where they do not suffice, rows without targets fill up:
    every rank makes as many passes as the others, as collectives inside the model need.
    """
    ordered = sorted(rollouts, key=lambda r: len(r.ids))
    assert len(ordered) <= rows * num_batches
    for start in range(0, rows * num_batches, rows):
        batch = ordered[start : start + rows]
        longest = max((len(r.ids) - 1 for r in batch), default=1)
        width = min(-(-longest // PAD_TO) * PAD_TO, max_len)
        inputs = torch.full((rows, width), pad_id, dtype=torch.int64)
        targets = torch.full((rows, width), IGNORE_INDEX, dtype=torch.int64)
        advantages = torch.zeros(rows, width)
        for row, rollout in enumerate(batch):
            ids = torch.tensor(rollout.ids)
            n = len(ids) - 1
            inputs[row, :n] = ids[:-1]
            wanted = torch.tensor(rollout.is_sampled[1:])
            targets[row, :n] = torch.where(wanted, ids[1:], IGNORE_INDEX)
            advantages[row, :n] = rollout.advantage
        yield inputs, targets, advantages


def policy_loss(nll: Tensor, advantages: Tensor, num_sampled: int) -> Tensor:
    """Loss whose gradient is that of the expected reward, negative.

    nll: [B, T] negative log-probability of every sampled token, 0 elsewhere. num_sampled: sampled
    tokens of the whole step.
    """
    return (nll * advantages).sum() / max(1, num_sampled)
