"""The training loop, one visible function, for every stage that trains on tokens.

* A step is the same set of rows whatever the number of ranks and the device batch: gradients are
  sums over targets, divided by the step's global number of targets.
* The loop knows no money and no cloud: it looks at RUN/stop.json every step, and where the horizon
  is the budget it reads how much of it is used.
* A loss that is not finite, or that stays far above its running mean, rolls back to the last good
  checkpoint and leaves its batches out; what is left out is on disk before the next step.
* The random numbers of a step follow from seed, rank and batch alone, so that neither a resume nor
  an evaluation nor a batch that is left out changes them.
"""

import math
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from nanochat.checkpoint import Checkpointer, LoadedCheckpoint, rng_state, set_rng_state
from nanochat.data import Loader, StepBatch
from nanochat.distributed import Dist, seed_rank
from nanochat.gpt import GPT
from nanochat.metrics import Metrics
from nanochat.optim import Optimizer, muon_momentum
from nanochat.rundir import Outcome, RunDir, StopReason, read_json
from nanochat.scaling import StageNumbers, checkpoint_bytes, lr_scale
from nanochat.spec import SpecError, TrainStage
from nanochat.stage import StageFailed

SPIKE_AFTER_STEPS = 20
"""Losses that the running mean needs before a spike is called one."""
SPIKE_STEPS = 3
"""High losses in a row that are a spike; fewer are odd text, which clipping takes care of."""
ROLLBACK_WINDOW_STEPS = 200
"""Roll-backs further apart than this do not add up to a divergence."""
SAVE_AGAIN_S = 30.0
"""From a save that failed to the next try: a network volume may come back meanwhile."""
LOSS_DECAY = 0.95
PROGRESS_EVERY_S = 0.5
HORIZON_STALE_S = 300.0
"""Age of a horizon file that no supervisor renews any more."""
GIB = 2**30


@dataclass(frozen=True)
class Position:
    """Where the loop stands; saved with every checkpoint."""

    step: int = 0
    batch: int = 0
    """Batches drawn from the stream: steps and left-out batches."""
    epoch: float = 0.0
    """Passes over the data so far."""
    mean_loss: float | None = None
    """Exponential running mean of the training loss, spikes and batches without targets aside."""
    high: tuple[int, ...] = ()
    """The last batches, as long as their losses were far above the mean."""
    best_bpb: float | None = None
    best_step: int | None = None
    looks_since_best: int = 0
    validated_step: int | None = None
    last_bpb: float | None = None
    """Of the look at validated_step; None where it was not finite."""
    first_bpb: float | None = None
    trained_s: float = 0.0


class Horizon:
    """How much of the stage is done, from 0 to 1: by steps, or by the budget.

    Raises SpecError where the budget is the horizon and nobody says how much of it is used.
    """

    def __init__(self, run: RunDir, stage: str, num_steps: int | None) -> None:
        self._file = run.path / "stages" / f"{stage}.horizon.json"
        self.num_steps = num_steps
        self._last = 0.0
        told = read_json(self._file)
        if num_steps is None and (told is None or time.time() - told["time"] > HORIZON_STALE_S):
            raise SpecError(
                f'{stage}.horizon = "budget" is told by the supervisor, and none does: use '
                f"`nanochat run`, or give {stage}.num_steps"
            )

    def fraction(self, step: int) -> float:
        """Share of the horizon before this step; never falls."""
        if self.num_steps is not None:
            return step / self.num_steps
        told = read_json(self._file)
        if isinstance(told, dict):
            elapsed_s = max(0.0, time.time() - told["time"])
            self._last = max(self._last, told["fraction"] + elapsed_s * told["fraction_per_s"])
        return min(1.0, self._last)

    def after(self, fraction: float, step_s: float) -> float:
        """Share of the horizon after the step that begins at `fraction`."""
        if self.num_steps is not None:
            return fraction + 1.0 / self.num_steps
        told = read_json(self._file)
        return fraction + step_s * told["fraction_per_s"] if isinstance(told, dict) else fraction


def fit(
    *,
    run: RunDir,
    stage: str,
    seed: int,
    settings: TrainStage,
    numbers: StageNumbers,
    model: GPT,
    train_model: Callable[..., torch.Tensor],
    optimizer: Optimizer,
    make_loader: Callable[[dict[str, Any] | None], Loader],
    validate: Callable[[], float | None],
    sample: Callable[[int], None] | None,
    sample_every_steps: int,
    checkpointer: Checkpointer,
    checkpoint_every_s: float,
    open_metrics: Callable[[int | None], Metrics],
    dist: Dist,
    autocast: Callable[[], AbstractContextManager[Any]],
    flops_per_token: int,
    peak_flops: float | None,
) -> Outcome:
    """Train to the horizon, to a stop or to failure; returns the outcome of the stage.

    train_model is `model`, perhaps compiled. validate returns bits per byte, or on all ranks None
    where a stop has cut it short. peak_flops: of one rank, for the MFU; None where it is not known.
    Raises StageFailed when the training diverges.
    """
    horizon = Horizon(run, stage, numbers.num_steps)
    rollbacks = [r for r in run.resolved("rollback") if r["stage"] == stage]
    left_out = {batch for r in rollbacks for batch in r["batches"]}
    at = Position()
    saved_step: int | None = None
    cursor: dict[str, Any] | None = None
    saved_s = time.monotonic()
    said_s = stalls_s = 0.0
    eval_s: float | None = None
    sample_s: float | None = None

    def state() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def save(wait: bool = False) -> None:
        nonlocal saved_s, saved_step, stalls_s
        say("save")
        note_failed_save()
        checkpointer.save(
            at.step,
            state(),
            {"position": asdict(at), "cursor": cursor},
            rank_extra={"rng": rng_state()},
            val_bpb=at.last_bpb if at.validated_step == at.step else None,
            prune=not at.high,
            wait=wait,
        )
        saved_s, saved_step = time.monotonic(), at.step
        stalls_s += checkpointer.last_stall_s or 0.0

    def note_failed_save() -> None:
        """Wait for the save under way; if it failed, say so, and let another be due soon."""
        nonlocal saved_s, saved_step
        since_s = after_failed_save(checkpointer, metrics, checkpoint_every_s)
        if since_s is not None:
            saved_step, saved_s = None, since_s

    def load() -> LoadedCheckpoint | None:
        """Back to the newest good checkpoint; the stream continues behind its last batch."""
        nonlocal at, cursor, saved_step
        target = state()
        loaded = checkpointer.load_latest(target)
        # a look or a stop may have saved weights of a spike before it was known to be one
        while loaded and held_by(loaded):
            if not _from_rank_0(dist, (_has_older(checkpointer, loaded.step),))[0]:
                break
            skipped = loaded.skipped
            checkpointer.discard_after(loaded.step - 1)
            loaded = checkpointer.load_latest(target)
            loaded = loaded and replace(loaded, skipped=[*skipped, *loaded.skipped])
        if loaded is not None:
            optimizer.load_state_dict(target["optimizer"])
            at, cursor = Position(**loaded.extra["position"]), loaded.extra["cursor"]
            at = replace(at, high=tuple(b for b in at.high if b not in left_out))
            saved_step = at.step
            if loaded.rank_extra is not None:
                set_rng_state(loaded.rank_extra["rng"])
        return loaded

    def held_by(loaded: LoadedCheckpoint) -> list[int]:
        """Batches that are left out and yet in the weights of a checkpoint."""
        return sorted(left_out.intersection(loaded.extra["position"]["high"]))

    def note_loaded(loaded: LoadedCheckpoint) -> None:
        """Log what is wrong with the checkpoint taken, and with those that were not."""
        for skipped in loaded.skipped:
            metrics.log_event("corrupt_checkpoint", skipped)
        if held := held_by(loaded):
            reason = f"the only checkpoint, of step {loaded.step}, was saved within a spike"
            if dist.is_main:
                bad = {"step": loaded.step, "batches": held, "reason": reason}
                run.append_resolved("rollback_incomplete", stage=stage, **bad)
            metrics.log_event("warning", f"{reason}: its weights hold batches {held}")

    def say(phase: str, at_once: bool = True, **facts: Any) -> None:
        nonlocal said_s
        if dist.is_main and (at_once or time.monotonic() - said_s > PROGRESS_EVERY_S):
            said_s = time.monotonic()
            run.write_progress(
                stage,
                phase,
                step=at.step,
                num_steps=numbers.num_steps,
                val_bpb=at.last_bpb,
                save_s=checkpointer.expected_save_s,
                eval_s=eval_s,
                sample_s=sample_s,
                **facts,
            )

    say("load")
    checkpointer.probe_write(sum(checkpoint_bytes(model.config)))
    loaded = load()
    metrics = open_metrics(loaded.step if loaded else None)
    if loaded is not None:
        note_loaded(loaded)
    checkpointer.prepare(state())
    loader = make_loader(cursor)
    step_times_s: deque[float] = deque(maxlen=50)
    facts: dict[str, Any] = {}
    first_step = True

    while True:
        # rank 0 looks at clock, budget, disk and stop file; all ranks then do the same
        since_save_s = time.monotonic() - saved_s
        used = horizon.fraction(at.step)
        seen = (
            used,
            horizon.after(used, _median(step_times_s)),
            since_save_s > checkpoint_every_s,
            run.stop_file.exists(),
            is_stop_urgent(run),
            checkpointer.has_failed,
        )
        fraction, next_fraction, is_due, is_stopping, is_urgent, has_failed = _from_rank_0(
            dist, seen
        )
        if has_failed:
            note_failed_save()
        is_last = fraction >= 1.0
        is_unseen = at.validated_step != at.step

        # once in a while: a checkpoint, then the validation loss
        is_look_due = is_unseen and (is_last or at.step % settings.eval_every_steps == 0)
        if is_look_due and not is_urgent:
            if at.step > 0 and saved_step != at.step:
                save(wait=is_last)
            say("evaluate")
            started_s = time.monotonic()
            bpb = validate()
            if bpb is None:  # a stop came; it is looked at when the run goes on
                continue
            eval_s = time.monotonic() - started_s
            metrics.log_val(at.step, val_bpb=bpb)
            at = _after_look(at, bpb)
            if at.step > 0:
                checkpointer.note_val_bpb(at.step, bpb)
            patience = settings.early_stop_patience
            if patience is not None and at.looks_since_best >= patience:
                metrics.log_event(
                    "early_stop",
                    f"no better val_bpb than {at.best_bpb:.4f} (step {at.best_step}) in "
                    f"{patience} looks",
                    step=at.step,
                )
                break
        if is_last and not (is_look_due and is_urgent):
            break

        # once in a while: samples
        if sample is not None and at.step % sample_every_steps == 0 and not is_stopping:
            say("sample")
            started_s = time.monotonic()
            sample(at.step)
            sample_s = time.monotonic() - started_s

        # by the clock: a checkpoint, of weights that no spike has touched
        if is_due and not is_stopping and not at.high:
            save()

        # when asked: stop, with a checkpoint where the time is enough for one
        if is_stopping:
            note_failed_save()
            is_new = saved_step != at.step
            if is_new and _from_rank_0(dist, (can_save_in_time(run, checkpointer),))[0]:
                save(wait=True)
            loader.close()
            return Outcome(
                stage=stage,
                outcome="stopped",
                step=at.step,
                num_steps=numbers.num_steps,
                message=f"stopped at step {at.step}",
            )

        # one step
        say("compile" if first_step else "train", at_once=first_step, **facts)
        started_s = time.monotonic()
        waited_s = loader.wait_s
        batch = next(loader)
        at = replace(at, batch=at.batch + 1)
        while at.batch in left_out:
            batch = next(loader)
            at = replace(at, batch=at.batch + 1)
        cursor = batch.cursor
        seed_rank(seed, dist.rank, at.batch)
        scale = lr_scale(fraction, next_fraction, settings)
        loss, grad_norm = _forward_backward(
            train_model, optimizer, batch, numbers, settings.grad_clip, dist, autocast
        )
        is_high = _is_high(loss, at, settings.spike_nats)
        high = (*at.high, at.batch)
        if not math.isfinite(loss + grad_norm) or (is_high and len(high) == SPIKE_STEPS):
            message = f"loss {loss:.4g}, gradient norm {grad_norm:.4g} at step {at.step}"
            say("load")
            note_failed_save()
            near = [r for r in rollbacks if abs(at.step - r["step"]) < ROLLBACK_WINDOW_STEPS]
            if len(near) >= settings.max_rollbacks:
                raise StageFailed(
                    f"{message}: diverged again after {settings.max_rollbacks} roll-backs; try "
                    f"lower learning rates ({stage}.matrix_lr = {settings.matrix_lr})"
                )
            # step whose weights met the first of the batches
            begun = at.step - sum(b not in left_out for b in range(high[0], at.batch))
            bad: dict[str, Any] = {
                "step": at.step,
                "begun": begun,
                "batches": list(high),
                "reason": message,
            }
            if dist.is_main:
                run.append_resolved("rollback", stage=stage, **bad)
            # twice bad right behind one checkpoint: it is not a good one
            is_suspect = bool(near) and near[-1].get("begun") == begun in _resumable(checkpointer)
            is_suspect = is_suspect and _has_older(checkpointer, begun)
            if _from_rank_0(dist, (is_suspect,))[0]:
                checkpointer.discard_after(begun - 1)
            rollbacks.append(bad)
            left_out.update(bad["batches"])
            loader.close()
            loaded = load()
            held = held_by(loaded) if loaded else []
            out = [b for b in bad["batches"] if b not in held]
            metrics.log_event(
                "rollback",
                f"{message}; left out: batches {out}",
                resume_step=loaded.step if loaded else 0,
            )
            if loaded is None:
                return Outcome(stage=stage, outcome="again", message=f"{message}; from the start")
            note_loaded(loaded)
            loader = make_loader(cursor)
            continue
        optimizer.set_lr_scale(scale)
        optimizer.set_momentum(muon_momentum(at.step))
        optimizer.update()

        # what there is to know about it
        step_s = time.monotonic() - started_s
        if not first_step:
            step_times_s.append(step_s)
        tokens_per_s = numbers.total_batch_size / step_s
        if is_high:
            at = replace(at, high=high)
        elif batch.num_targets > 0:  # else its loss of 0 says nothing
            at = replace(at, high=(), mean_loss=_running_mean(at.mean_loss, loss))
        at = replace(
            at,
            step=at.step + 1,
            epoch=batch.epoch,
            trained_s=at.trained_s + step_s,
        )
        mfu = None
        if peak_flops:
            mfu = tokens_per_s * flops_per_token / (peak_flops * dist.world_size)
        if at.step % settings.log_every_steps == 0 or first_step:
            metrics.log_step(
                at.step,
                loss=loss,
                lr=scale * settings.matrix_lr,
                lr_scale=scale,
                grad_norm=grad_norm,
                tokens_per_s=tokens_per_s,
                step_s=step_s,
                mfu=mfu,
                epoch=batch.epoch,
                num_tokens=at.step * numbers.total_batch_size,
                padding=batch.padding,
                loader_wait_s=loader.wait_s - waited_s,
                checkpoint_stall_s=stalls_s,
            )
        facts = {
            "loss": round(at.mean_loss or loss, 4),
            "tokens_per_s": round(numbers.total_batch_size / _median(step_times_s, step_s)),
            "median_step_s": _median(step_times_s, step_s),
            "num_timed": len(step_times_s),
            "eta_s": _eta_s(horizon, at.step, _median(step_times_s, step_s)),
        }
        first_step = False

    note_failed_save()
    if saved_step != at.step:
        save(wait=True)
    loader.close()
    return Outcome(
        stage=stage,
        outcome="done",
        step=at.step,
        num_steps=numbers.num_steps,
        facts={
            "num_steps": at.step,
            "num_tokens": at.step * numbers.total_batch_size,
            "epochs": at.epoch,
            "val_bpb_first": at.first_bpb,
            "val_bpb_last": at.last_bpb,
            "val_bpb_best": at.best_bpb,
            "best_step": at.best_step,
            "train_s": at.trained_s,
            "tokens_per_s": at.step * numbers.total_batch_size / max(at.trained_s, 1e-9),
            "device_batch_size": numbers.device_batch_size,
            "grad_accum_steps": numbers.grad_accum_steps,
            "world_size": dist.world_size,
            "peak_memory_gib": peak_memory_gib(dist.device),
            "checkpoint_stall_s": stalls_s,
            "checkpoint_s": checkpointer.last_save_s,
            "checkpoint_bytes": checkpointer.last_bytes,
            "loader_wait_s": loader.wait_s,
            "rollbacks": len(rollbacks),
        },
    )


def _forward_backward(
    train_model: Callable[..., torch.Tensor],
    optimizer: Optimizer,
    batch: StepBatch,
    numbers: StageNumbers,
    grad_clip: float,
    dist: Dist,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> tuple[float, float]:
    """Gradients of the mean loss over the step's targets of all ranks: (loss, gradient norm)."""
    rows = numbers.device_batch_size
    losses = []
    for start in range(0, len(batch.inputs), rows):
        inputs, targets, doc_ids = (
            None if t is None else t[start : start + rows].to(dist.device, non_blocking=True)
            for t in (batch.inputs, batch.targets, batch.doc_ids)
        )
        with autocast():
            loss = train_model(inputs, targets, doc_ids=doc_ids, reduction="sum")
        # the optimizer averages over ranks, and each rank holds its share of the targets
        loss = loss * (dist.world_size / max(1, batch.num_targets))
        loss.backward()
        losses.append(loss.detach())
    grad_norm = optimizer.reduce(grad_clip)
    mean = dist.all_reduce_mean(torch.stack(losses).sum().cpu().double())
    return float(mean), float(grad_norm)


def _from_rank_0(dist: Dist, values: tuple[float | bool, ...]) -> list[float]:
    """Rank 0's values, on every rank."""
    carrier = torch.tensor([float(v) for v in values], dtype=torch.float64)
    return dist.all_reduce_sum(carrier if dist.is_main else torch.zeros_like(carrier)).tolist()


def _resumable(checkpointer: Checkpointer) -> list[int]:
    """Steps of the checkpoints that a run can go on from, oldest first."""
    return [m.step for m in checkpointer.list_complete() if m.kind == "full"]


def _has_older(checkpointer: Checkpointer, step: int) -> bool:
    return any(older < step for older in _resumable(checkpointer))


def _after_look(at: Position, bpb: float) -> Position:
    """The position after a look at the validation loss; one that is not finite is never a best.

    Patience is for looks since a best, so it waits for the first one.
    """
    known = bpb if math.isfinite(bpb) else None
    if known is not None and (at.best_bpb is None or known < at.best_bpb):
        at = replace(at, best_bpb=known, best_step=at.step, looks_since_best=0)
    elif at.best_bpb is not None:
        at = replace(at, looks_since_best=at.looks_since_best + 1)
    first = known if at.first_bpb is None else at.first_bpb
    return replace(at, validated_step=at.step, last_bpb=known, first_bpb=first)


def _is_high(loss: float, at: Position, spike_nats: float) -> bool:
    """Whether a loss is far above the running mean; one such batch may just be odd text."""
    if at.mean_loss is None or at.step < SPIKE_AFTER_STEPS:
        return False
    return loss > at.mean_loss + spike_nats


def _running_mean(mean: float | None, loss: float) -> float:
    return loss if mean is None else LOSS_DECAY * mean + (1 - LOSS_DECAY) * loss


def is_stop_urgent(run: RunDir) -> bool:
    """Whether a stop is asked that cannot wait for an evaluation; the budget's has reserved it."""
    request = run.stop_request()
    return request is not None and request.reason is not StopReason.BUDGET


def after_failed_save(checkpointer: Checkpointer, metrics: Metrics, every_s: float) -> float | None:
    """Wait for the save under way; None where it did not fail. Else the event is logged.

    every_s: from a save to the next. Returns when the last save would have had to be, on
    time.monotonic(), for the next one to be due in SAVE_AGAIN_S.
    """
    failure = checkpointer.take_failure()
    if failure is None:
        return None
    again_s = min(SAVE_AGAIN_S, every_s)
    metrics.log_event(
        "save_failed",
        f"a save has failed; the training goes on, saves again in {again_s:.0f} s, and ends if "
        f"that fails too: {failure}",
    )
    return time.monotonic() - every_s + again_s


def can_save_in_time(run: RunDir, checkpointer: Checkpointer) -> bool:
    """Whether a save of the measured length ends before the deadline of the stop."""
    request = run.stop_request()
    if request is None or checkpointer.last_save_s is None:
        return True
    return time.time() + 1.5 * checkpointer.last_save_s < request.deadline_s


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this process has held: of the GPU, or resident in the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): KiB on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def _median(times_s: deque[float], otherwise: float = 0.0) -> float:
    return statistics.median(times_s) if times_s else otherwise


def _eta_s(horizon: Horizon, step: int, step_s: float) -> float | None:
    """Seconds to the end of the stage, evaluations aside."""
    if horizon.num_steps is None:
        fraction = horizon.fraction(step)
        per_s = horizon.after(0.0, 1.0)
        return (1.0 - fraction) / per_s if per_s > 0 else None
    return (horizon.num_steps - step) * step_s
