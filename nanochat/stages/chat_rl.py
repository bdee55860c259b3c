"""Reinforcement learning on a task whose answers can be marked (simplified GRPO, nanochat/grpo.py).

A step samples several replies to each of its prompts with the present weights, marks them, and
changes the weights once, so that replies better than their prompt's mean become likelier. Prompts
and random numbers follow from the seed and the step alone: a resume, also on another number of
ranks, goes on with the same ones. Learning rates fall linearly to zero.
"""

import math
import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from nanochat.distributed import Dist, seed_rank
from nanochat.engine import Engine
from nanochat.evaluation import accuracy, evaluate
from nanochat.gpt import GPT
from nanochat.grpo import Rollout, batches, examples_of_step, policy_loss, roll_out
from nanochat.metrics import Metrics
from nanochat.optim import muon_momentum
from nanochat.prepare import Prepared, compute_dtype, note_out_of_memory, prepare
from nanochat.rundir import Outcome, RunDir
from nanochat.scaling import checkpoint_bytes
from nanochat.spec import TRAIN_STAGES, ChatRl, SpecError
from nanochat.stage import StageFailed, run_stage
from nanochat.tasks import Task, make_task
from nanochat.trainer import after_failed_save, can_save_in_time, peak_memory_gib

STAGE = "chat_rl"
ROLLOUTS_AT_ONCE = 8
"""Replies being written per row of a training pass: those keep activations, these a KV cache."""
MOST_AT_ONCE = 64
SIGN_OF_LIFE_S = 1.0
MAX_BAD_STEPS = 3
"""Steps in a row without a finite gradient after which the training counts as failed."""


@dataclass(frozen=True)
class Position:
    """Where the loop stands; saved with every checkpoint."""

    step: int = 0
    num_tokens: int = 0
    """Tokens sampled so far."""
    trained_s: float = 0.0
    bad_steps: int = 0
    looked_step: int | None = None
    """Step of the last look at the held-out reward."""
    first_reward: float | None = None
    last_reward: float | None = None
    best_reward: float | None = None


def main(run: RunDir) -> Outcome:
    """Continue from the weights of the training stage before; see the module text."""
    spec = run.spec()
    before = [stage for stage in TRAIN_STAGES if getattr(spec, stage) is not None]
    if not before:
        raise SpecError("chat_rl needs a training stage before it; add [chat_sft] to the spec")
    p = prepare(run, STAGE, weights_from=before[-1])
    p.model.eval()  # no dropout: the replies and their gradients are of one policy
    try:
        outcome = _fit(p)
    except RuntimeError as e:
        outcome = note_out_of_memory(p, e)
    p.close(outcome)
    return outcome


def _fit(p: Prepared) -> Outcome:
    run, spec, settings, dist = p.run, p.spec, p.settings, p.dist
    assert isinstance(settings, ChatRl)
    task = make_task(settings.task, "train", spec.seed)
    held_out = make_task(settings.task, "validation", spec.seed)
    rows, num_steps = p.numbers.device_batch_size, settings.num_steps
    at = Position()
    saved_step: int | None = None
    saved_s, stalls_s = time.monotonic(), 0.0
    step_times_s: list[float] = []
    facts: dict[str, Any] = {}

    def say(phase: str) -> None:
        if dist.is_main:
            run.write_progress(STAGE, phase, step=at.step, num_steps=num_steps,
                               save_s=p.checkpointer.expected_save_s, **facts)  # fmt: skip

    def save(wait: bool = False) -> None:
        nonlocal saved_s, saved_step, stalls_s
        say("save")
        note_failed_save()
        p.checkpointer.save(at.step, state(), {"position": asdict(at), "cursor": None}, wait=wait)
        saved_s, saved_step = time.monotonic(), at.step
        stalls_s += p.checkpointer.last_stall_s or 0.0

    def note_failed_save() -> None:
        """Wait for the save under way; if it failed, say so, and let another be due soon."""
        nonlocal saved_s, saved_step
        since_s = after_failed_save(p.checkpointer, metrics, spec.budget.checkpoint_every_s)
        if since_s is not None:
            saved_step, saved_s = None, since_s

    def state() -> dict[str, Any]:
        return {"model": p.model.state_dict(), "optimizer": p.optimizer.state_dict()}

    def stopped() -> Outcome:
        """Stop, with a checkpoint of the last whole step where the time is enough for one."""
        note_failed_save()
        if saved_step != at.step and dist.broadcast_flag(
            int(can_save_in_time(run, p.checkpointer))
        ):
            save(wait=True)
        message = f"stopped at step {at.step}"
        return Outcome(STAGE, "stopped", message, step=at.step, num_steps=num_steps)

    say("load")
    p.checkpointer.probe_write(sum(checkpoint_bytes(p.model.config)))
    target = state()
    loaded = p.checkpointer.load_latest(target)
    if loaded is not None:
        p.optimizer.load_state_dict(target["optimizer"])
        at, saved_step = Position(**loaded.extra["position"]), loaded.step
    metrics = p.open_metrics(loaded.step if loaded else None)
    for skipped in loaded.skipped if loaded else ():
        metrics.log_event("corrupt_checkpoint", skipped)
    p.checkpointer.prepare(state())

    while True:
        if dist.broadcast_flag(int(p.checkpointer.has_failed)):
            note_failed_save()

        # once in a while: a checkpoint, then the held-out reward
        is_last = at.step >= num_steps
        if at.looked_step != at.step and (is_last or at.step % settings.eval_every_steps == 0):
            if at.step > 0 and saved_step != at.step:
                save(wait=is_last)
            say("evaluate")
            engine = _engine(p, MOST_AT_ONCE)
            looked = _look(engine, held_out, settings, run, dist)
            if looked is None:
                return stopped()
            at = _after_look(at, looked, metrics)
        if is_last:
            break
        is_due = time.monotonic() - saved_s > spec.budget.checkpoint_every_s
        if dist.broadcast_flag(int(is_due and at.step > 0)):
            save()

        # sample and mark
        say("rollout")
        started_s = time.monotonic()
        rollouts = _sample(p, task, at.step)
        if _any_rank(dist, rollouts is None):
            return stopped()
        assert rollouts is not None
        rollout_s = time.monotonic() - started_s

        # one step on all of it; replies of a prompt that all got the same reward teach nothing
        learning = [r for r in rollouts if r.advantage != 0.0]
        num_sampled = sum(r.num_sampled for r in rollouts)
        sums = torch.tensor(
            [sum(r.reward for r in rollouts), num_sampled, len(learning), len(rollouts)],
            dtype=torch.float64,
        )
        reward_sum, num_tokens, num_learning, num_rollouts = dist.all_reduce_sum(sums).tolist()
        num_passes = math.ceil(_most_of_any_rank(dist, len(learning)) / rows)
        loss, grad_norm = 0.0, 0.0
        scale = 1.0 - at.step / num_steps
        seed_rank(spec.seed, dist.rank, at.step)
        if num_passes > 0:
            say("train")
            loss, grad_norm = _forward_backward(p, learning, num_passes, int(num_tokens))
        if math.isfinite(loss + grad_norm):
            if num_passes > 0:
                p.optimizer.set_lr_scale(scale)
                p.optimizer.set_momentum(muon_momentum(at.step))
                p.optimizer.update()
            at = replace(at, bad_steps=0)
        else:
            at = replace(at, bad_steps=at.bad_steps + 1)
            message = f"loss {loss:.4g}, gradient norm {grad_norm:.4g} at step {at.step}"
            if at.bad_steps == MAX_BAD_STEPS:
                raise StageFailed(
                    f"{message}: no finite gradient in {MAX_BAD_STEPS} steps; try lower learning "
                    f"rates ({STAGE}.matrix_lr = {settings.matrix_lr})"
                )
            metrics.log_event("warning", f"{message}; the step is left out")

        # what there is to know about it
        step_s = time.monotonic() - started_s
        step_times_s.append(step_s)
        at = replace(
            at,
            step=at.step + 1,
            num_tokens=at.num_tokens + int(num_tokens),
            trained_s=at.trained_s + step_s,
        )
        _, epoch = examples_of_step(task, spec.seed, at.step - 1, settings.prompts_per_step)
        metrics.log_step(
            at.step,
            loss=loss,
            reward=reward_sum / num_rollouts,
            lr=scale * settings.matrix_lr,
            lr_scale=scale,
            grad_norm=grad_norm,
            tokens_per_s=num_tokens / step_s,
            step_s=step_s,
            rollout_s=rollout_s,
            reply_tokens=num_tokens / num_rollouts,
            learned_from=num_learning / num_rollouts,
            num_tokens=at.num_tokens,
            epoch=epoch,
            checkpoint_stall_s=stalls_s,
        )
        median_s = statistics.median(step_times_s[-50:])
        facts = {
            "loss": round(loss, 4),
            "reward": round(reward_sum / num_rollouts, 4),
            "tokens_per_s": round(num_tokens / step_s),
            "median_step_s": median_s,
            "eta_s": (num_steps - at.step) * median_s,
        }

    note_failed_save()
    if saved_step != at.step:
        save(wait=True)
    return Outcome(
        stage=STAGE,
        outcome="done",
        step=at.step,
        num_steps=num_steps,
        facts={
            "num_steps": at.step,
            "num_tokens": at.num_tokens,
            "epochs": at.step * settings.prompts_per_step / task.num_examples,
            "reward_first": at.first_reward,
            "reward_last": at.last_reward,
            "reward_best": at.best_reward,
            "train_s": at.trained_s,
            "tokens_per_s": at.num_tokens / max(at.trained_s, 1e-9),
            "device_batch_size": rows,
            "world_size": dist.world_size,
            "peak_memory_gib": peak_memory_gib(dist.device),
            "checkpoint_stall_s": stalls_s,
            "checkpoint_s": p.checkpointer.last_save_s,
            "checkpoint_bytes": p.checkpointer.last_bytes,
        },
    )


# -- the parts of a step


def _engine(p: Prepared, max_batch: int) -> Engine:
    """An engine with the present weights; of a sharded model every rank gets all of them."""
    model, dtype = p.model, compute_dtype(p.spec.runtime.dtype, p.dist.device)
    if p.is_sharded:
        model = GPT(p.model.config).to(p.dist.device, dtype)
        model.load_state_dict({k: v.full_tensor() for k, v in p.model.state_dict().items()})
        model.cos, model.sin = p.model.cos, p.model.sin  # RoPE's tables stay in float32
    return Engine(model, p.tokenizer, max_batch=max_batch, dtype=dtype)


def _sample(p: Prepared, task: Task, step: int) -> list[Rollout] | None:
    """This rank's replies of a step; None when asked to stop meanwhile."""
    settings, dist, run = p.settings, p.dist, p.run
    assert isinstance(settings, ChatRl)
    indices, _ = examples_of_step(task, p.spec.seed, step, settings.prompts_per_step)
    own = range(dist.rank, len(indices), dist.world_size)
    at_once = min(MOST_AT_ONCE, ROLLOUTS_AT_ONCE * p.numbers.device_batch_size)
    said_s = time.monotonic()

    def go_on() -> bool:
        nonlocal said_s
        if dist.is_main and time.monotonic() - said_s > SIGN_OF_LIFE_S:
            said_s = time.monotonic()
            run.give_sign_of_life(STAGE)
        return not run.stop_file.exists()

    def seed_of(i: int, sample: int) -> int:
        """The same for a reply whichever rank writes it."""
        reply = (step * len(indices) + own[i]) * settings.samples_per_prompt + sample
        return p.spec.seed * 1_000_003 + reply

    return roll_out(
        _engine(p, at_once),
        task,
        [indices[i] for i in own],
        samples_per_prompt=settings.samples_per_prompt,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        seeds=seed_of,
        go_on=go_on,
    )


def _forward_backward(
    p: Prepared, rollouts: list[Rollout], num_passes: int, num_tokens: int
) -> tuple[float, float]:
    """Gradients of the step, reduced over ranks: (loss, gradient norm)."""
    dist = p.dist
    losses = []
    device_batches = batches(
        rollouts,
        p.numbers.device_batch_size,
        num_passes,
        p.tokenizer.bos_id,
        p.model.config.seq_len,
    )
    for batch in device_batches:
        inputs, targets, advantages = (t.to(dist.device) for t in batch)
        with p.autocast():
            nll = p.model(inputs, targets, reduction="none")
        # the optimizer averages over ranks
        loss = policy_loss(nll, advantages, num_tokens) * dist.world_size
        loss.backward()
        losses.append(loss.detach())
    grad_norm = p.optimizer.reduce(p.settings.grad_clip)
    return float(dist.all_reduce_mean(torch.stack(losses).sum().cpu().double())), float(grad_norm)


def _look(
    engine: Engine, task: Task, settings: ChatRl, run: RunDir, dist: Dist
) -> tuple[float, float, int] | None:
    """(held-out reward, its standard error, examples); None when asked to stop meanwhile."""
    found: list[bool] = []
    is_stopping = False
    for marked in evaluate(
        engine,
        task,
        num_examples=settings.eval_examples,
        batch_size=engine.max_batch,
        max_tokens=settings.max_tokens,
        rank=dist.rank,
        world_size=dist.world_size,
    ):
        found += [m.correct for m in marked]
        if dist.is_main:
            run.give_sign_of_life(STAGE)
        if is_stopping := run.stop_file.exists():
            break
    counts = torch.tensor([sum(found), len(found), is_stopping], dtype=torch.float64)
    num_right, num_examples, num_stopping = (int(n) for n in dist.all_reduce_sum(counts))
    if num_stopping:
        return None
    every = [True] * num_right + [False] * (num_examples - num_right)
    return *accuracy(every), num_examples


def _after_look(at: Position, looked: tuple[float, float, int], metrics: Metrics) -> Position:
    reward, stderr, num_examples = looked
    metrics.log_reward(at.step, reward, stderr=stderr, n=num_examples)
    return replace(
        at,
        looked_step=at.step,
        first_reward=reward if at.first_reward is None else at.first_reward,
        last_reward=reward,
        best_reward=reward if at.best_reward is None else max(reward, at.best_reward),
    )


def _any_rank(dist: Dist, flag: bool) -> bool:
    """Whether a flag is set on any rank: a stop may be seen by one and not by another."""
    return bool(dist.all_reduce_sum(torch.tensor(int(flag))))


def _most_of_any_rank(dist: Dist, count: int) -> int:
    counts = torch.zeros(dist.world_size, dtype=torch.int64)
    counts[dist.rank] = count
    return int(dist.all_reduce_sum(counts).max())


if __name__ == "__main__":
    run_stage(STAGE, main)
