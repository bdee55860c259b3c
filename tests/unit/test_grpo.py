"""Simplified GRPO: whose tokens are learned from, by how much, and that rewards rise."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat.data import IGNORE_INDEX
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.grpo import Rollout, batches, examples_of_step, policy_loss, roll_out
from nanochat.scaling import GPTConfig
from nanochat.tasks import Example, make_task
from nanochat.tokenizer import Tokenizer
from tests.unit.tiny_run import SPEC, learn_by_heart

TOKENIZER = Tokenizer.train(["the cat and the hat"] * 9, 300)
CONFIG = GPTConfig(n_layer=1, n_head=2, n_kv_head=2, n_embd=32, seq_len=64, vocab_size=300)


class SaysLetter:
    """Rewards a reply that begins with a small letter; whatever is asked."""

    name = "says_letter"
    kind = "generative"
    chance = 0.0
    num_examples = 50

    def example(self, index: int) -> Example:
        ask = [{"role": "user", "content": f"{index}"}, {"role": "assistant", "content": "a"}]
        return Example({"messages": ask}, "a")

    def evaluate(self, example: Example, completion: str) -> bool:
        return completion[:1].islower()


def fresh_model(seed: int = 0) -> GPT:
    model = GPT(CONFIG)
    model.init_weights(seed)
    return model


def rolled(engine: Engine, indices: list[int], step: int = 0, **options: object) -> list[Rollout]:
    wanted = {"samples_per_prompt": 8, "max_tokens": 3, "temperature": 1.0} | options
    found = roll_out(
        engine,
        SaysLetter(),  # type: ignore[arg-type]
        indices,
        seeds=lambda i, s: 1000 * step + 10 * indices[i] + s,
        go_on=lambda: True,
        **wanted,  # type: ignore[arg-type]
    )
    assert found is not None
    return found


def test_the_advantage_is_the_reward_against_the_others_of_its_prompt() -> None:
    rollouts = rolled(Engine(fresh_model(), TOKENIZER), [3, 4, 5])
    assert len(rollouts) == 24
    for group in (rollouts[:8], rollouts[8:16], rollouts[16:]):
        mean = sum(r.reward for r in group) / 8
        assert all(abs(r.advantage - (r.reward - mean)) < 1e-9 for r in group)
        assert len({r.ids[: r.is_sampled.index(True)] for r in group}) == 1
    assert {r.reward for r in rollouts} == {0.0, 1.0}


def test_the_calculators_tokens_are_not_learned_and_the_end_is() -> None:
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_kv_head=2, n_embd=64, seq_len=96, vocab_size=300))
    model.init_weights(0)
    learn_by_heart(model, TOKENIZER)

    class Sum(SaysLetter):
        def example(self, index: int) -> Example:
            ask = "What is 27 + 45?"
            messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": "72"}]
            return Example({"messages": messages}, "72")

        def evaluate(self, example: Example, completion: str) -> bool:
            return "72" in completion

    found = roll_out(
        Engine(model, TOKENIZER),
        Sum(),  # type: ignore[arg-type]
        [0],
        samples_per_prompt=2,
        max_tokens=48,
        temperature=0.01,
        seeds=lambda i, s: s,
        go_on=lambda: True,
    )
    assert found is not None and [r.reward for r in found] == [1.0, 1.0]
    special = TOKENIZER.special_id
    for r in found:
        start, end = r.ids.index(special("output_start")), r.ids.index(special("output_end"))
        assert not any(r.is_sampled[start : end + 1])
        assert r.ids[-1] == special("assistant_end") and r.is_sampled[-1]
        assert r.is_sampled[r.ids.index(special("python_end"))]
    assert SPEC.model.vocab_size == 300


def test_a_stop_ends_the_writing() -> None:
    engine = Engine(fresh_model(), TOKENIZER)
    asked: list[int] = []
    found = roll_out(
        engine,
        SaysLetter(),  # type: ignore[arg-type]
        [0],
        samples_per_prompt=2,
        max_tokens=30,
        temperature=1.0,
        seeds=lambda i, s: s,
        go_on=lambda: len(asked) < 3 and asked.append(1) is None,
    )
    assert found is None and len(asked) == 3


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20)), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(0, 2),
)
def test_every_sampled_token_is_a_target_once(
    lengths: list[tuple[int, int]], rows: int, more: int
) -> None:
    rollouts = [
        Rollout(
            ids=tuple(range(100 * i + 1, 100 * i + 1 + prompt + reply)),
            is_sampled=(*[False] * prompt, *[True] * reply),
            reward=1.0,
            advantage=0.5 + i,
        )
        for i, (prompt, reply) in enumerate(lengths)
    ]
    num_batches = -(-len(rollouts) // rows) + more
    seen = {}
    count = 0
    for inputs, targets, advantages in batches(rollouts, rows, num_batches, 0, max_len=64):
        count += 1
        assert inputs.shape == targets.shape == advantages.shape and len(inputs) == rows
        for row, place in (targets != IGNORE_INDEX).nonzero().tolist():
            target = int(targets[row, place])
            assert int(inputs[row, place]) == target - 1 and target not in seen
            seen[target] = float(advantages[row, place])
    assert count == num_batches
    expected = {t: r.advantage for r in rollouts for t, s in zip(r.ids, r.is_sampled) if s}  # noqa: B905
    assert seen == expected


def test_the_gradient_is_that_of_reinforce_with_a_baseline() -> None:
    """Of one token drawn from a softmax: advantage times (probability - what was drawn)."""
    logits = torch.zeros(1, 2, 3, requires_grad=True)
    drawn, advantage = torch.tensor([[0, 2]]), torch.tensor([[0.75, -0.25]])
    nll = -logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
    policy_loss(nll, advantage, num_sampled=4).backward()
    chosen = torch.nn.functional.one_hot(drawn, 3).float()
    by_hand = advantage[..., None] * (1 / 3 - chosen) / 4
    assert torch.allclose(logits.grad, by_hand)


def test_rewards_rise() -> None:
    model = fresh_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    rewards = []
    for step in range(30):
        model.eval()
        rollouts = rolled(Engine(model, TOKENIZER, max_batch=32), [1, 2, 3, 4], step)
        rewards.append(sum(r.reward for r in rollouts) / len(rollouts))
        learning = [r for r in rollouts if r.advantage != 0.0]
        num_sampled = sum(r.num_sampled for r in rollouts)
        for inputs, targets, advantages in batches(learning, 32, 1, TOKENIZER.bos_id, 64):
            nll = model(inputs, targets, reduction="none")
            policy_loss(nll, advantages, num_sampled).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(rewards[-3:]) / 3 > 0.5 + sum(rewards[:2]) / 2


def test_a_step_has_the_same_examples_in_every_process_and_a_pass_all_of_them() -> None:
    task = make_task("identity", "validation", 0)
    assert task.num_examples == 40
    steps = [examples_of_step(task, 7, step, 8) for step in range(10)]
    assert [examples_of_step(task, 7, step, 8) for step in range(10)] == steps
    first, second = ([i for s, _ in steps[a : a + 5] for i in s] for a in (0, 5))
    assert sorted(first) == sorted(second) == list(range(40)) and first != second
    assert [round(epoch, 3) for _, epoch in steps[:5]] == [0.2, 0.4, 0.6, 0.8, 1.0]
