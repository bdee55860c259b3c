"""The training loop: what it does when a batch, a checkpoint, the clock or a person interferes."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import on_ranks
from toy_training import (
    STAGE,
    Poison,
    Trainee,
    batch_inputs,
    latest,
    make_source,
    make_spec,
    new_run,
    steps_logged,
)

from nanochat.data import IGNORE_INDEX, StepBatch
from nanochat.distributed import Dist
from nanochat.rundir import RunDir, StopReason, append_jsonl, read_jsonl
from nanochat.spec import CheckpointPolicy, SpecError
from nanochat.stage import StageFailed
from nanochat.trainer import Horizon

pytestmark = pytest.mark.usefixtures("one_thread")


def on_batches(effect: Callable[[torch.Tensor], torch.Tensor], *numbers: int) -> Poison:
    """An effect on the loss of the batches of these numbers, whenever they are drawn."""
    rows = [row for number in numbers for row in batch_inputs(number)]

    def poison(inputs: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        is_hit = any(torch.equal(inputs[0], row) for row in rows)
        return effect(loss) if is_hit else loss

    return poison


def not_a_number(loss: torch.Tensor) -> torch.Tensor:
    return loss * math.nan


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(got[name], weight), name


def weights_without(path: Path, spec: Any, *batches: int, **more: Any) -> dict[str, torch.Tensor]:
    """Weights of a run that knew from the start which batches to leave out."""
    run = new_run(path, spec)
    run.append_resolved("rollback", stage=STAGE, step=0, batches=list(batches), reason="known")
    trainee = Trainee(run, spec, **more)
    assert trainee.fit().outcome == "done"
    return trainee.weights()


# -----------------------------------------------------------------------------
# bad batches


def test_a_nan_rolls_back_and_leaves_the_batch_out(tmp_path: Path) -> None:
    spec = make_spec()
    run = new_run(tmp_path / "run", spec)
    trainee = Trainee(run, spec, poison=on_batches(not_a_number, 7), dropout=0.2)
    outcome = trainee.fit()
    assert (outcome.outcome, outcome.step, outcome.facts["rollbacks"]) == ("done", 12, 1)
    [record] = run.resolved("rollback")
    assert (record["step"], record["batches"]) == (6, [7])
    start, rollback = [m for m in run.metrics() if "event" in m]
    assert (start["event"], rollback["event"]) == ("start", "rollback")
    assert (rollback["step"], rollback["resume_step"]) == (6, 4)
    # batches 5 to 7, then again from the checkpoint of step 4, 7 drawn and not trained on
    cursors = [json.dumps(batch.cursor) for batch in trainee.batches]
    assert cursors[4:7] == cursors[7:10]
    assert len(cursors) == 7 + 9
    assert_equal(trainee.weights(), weights_without(tmp_path / "known", spec, 7, dropout=0.2))


def test_a_nan_before_the_first_checkpoint_starts_again(tmp_path: Path) -> None:
    spec = make_spec(eval_every_steps=100)
    run = new_run(tmp_path / "run", spec)
    poison = on_batches(not_a_number, 3)
    assert Trainee(run, spec, poison=poison, dropout=0.2).fit().outcome == "again"
    second = Trainee(run, spec, poison=poison, dropout=0.2)
    assert second.fit().outcome == "done"
    assert_equal(second.weights(), weights_without(tmp_path / "known", spec, 3, dropout=0.2))


def test_a_roll_back_survives_a_kill(tmp_path: Path) -> None:
    """What is left out is known to the next process, which ends with the same weights."""
    spec = make_spec()
    whole = Trainee(new_run(tmp_path / "whole", spec), spec, poison=on_batches(not_a_number, 7))
    whole.fit()
    run = new_run(tmp_path / "run", spec)

    class Killed(BaseException):
        pass

    nan = on_batches(not_a_number, 7)

    ninth = batch_inputs(9)[0]

    def killed_at_9(inputs: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        if torch.equal(inputs[0], ninth):
            raise Killed
        return nan(inputs, loss)

    killed = Trainee(run, spec, poison=killed_at_9)
    with pytest.raises(Killed):
        killed.fit()
    killed.checkpointer.wait()
    resumed = Trainee(run, spec, poison=nan)
    resumed.fit()
    assert len(run.resolved("rollback")) == 1
    assert_equal(resumed.weights(), whole.weights())


def test_a_spike_is_three_high_losses_in_a_row(tmp_path: Path) -> None:
    spec = make_spec(num_steps=36, eval_every_steps=8)
    run = new_run(tmp_path / "run", spec)
    poison = on_batches(lambda loss: loss + 16 * 9.0, 24, 27, 28, 29)  # sum over the 16 targets
    trainee = Trainee(run, spec, poison=poison)
    assert trainee.fit().outcome == "done"
    [record] = run.resolved("rollback")
    assert (record["step"], record["batches"]) == (28, [27, 28, 29])
    known = weights_without(tmp_path / "known", spec, 27, 28, 29, poison=poison)
    assert_equal(trainee.weights(), known)


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_look_between_high_losses_saves_nothing_to_go_back_to(
    tmp_path: Path, is_killed: bool
) -> None:
    """Step 27 is saved before its look, with batch 27 in the weights: 18 is taken."""
    spec = make_spec(num_steps=36, eval_every_steps=9)
    policy = CheckpointPolicy(keep_last=1, keep_best=False, free_floor_gib=0.0)
    spec = spec.model_copy(update={"checkpoint": policy})
    run = new_run(tmp_path / "run", spec)
    poison = on_batches(lambda loss: loss + 16 * 9.0, 27, 28, 29)  # sum over the 16 targets
    trainee = Trainee(run, spec, poison=poison)
    if is_killed:
        kill_in_second_load(trainee)
        with pytest.raises(Killed):
            trainee.fit()
        trainee = Trainee(run, spec, poison=poison)
    assert trainee.fit().outcome == "done"
    [record] = run.resolved("rollback")
    assert (record["step"], record["batches"]) == (28, [27, 28, 29])
    known = weights_without(tmp_path / "known", spec, 27, 28, 29, poison=poison)
    assert_equal(trainee.weights(), known)
    assert [m.step for m in trainee.checkpointer.list_complete()] == [36]


class Killed(BaseException):
    """Stands for the end of the process."""


def kill_in_second_load(trainee: Trainee) -> None:
    load = trainee.checkpointer.load_latest
    loads: list[None] = []

    def killed(state: Any) -> Any:
        loads.append(None)
        if len(loads) == 2:
            raise Killed
        return load(state)

    trainee.checkpointer.load_latest = killed  # type: ignore[method-assign,assignment]


def test_the_only_checkpoint_is_better_than_none(tmp_path: Path) -> None:
    spec = make_spec(num_steps=36, eval_every_steps=27)
    run = new_run(tmp_path / "run", spec)
    poison = on_batches(lambda loss: loss + 16 * 9.0, 27, 28, 29)
    assert Trainee(run, spec, poison=poison).fit().outcome == "done"
    assert len(run.resolved("rollback")) == 1
    # and its weights hold batch 27, which is said
    [held] = run.resolved("rollback_incomplete")
    assert (held["step"], held["batches"]) == (27, [27])
    rollback, warning = [m["message"] for m in run.metrics() if "event" in m][1:]
    assert rollback.endswith("left out: batches [28, 29]")
    assert warning.endswith("its weights hold batches [27]")


def test_a_checkpoint_found_damaged_in_a_roll_back_is_told(tmp_path: Path) -> None:
    """Step 28 is damaged, 27 holds a batch of the spike, 26 is taken."""
    spec = make_spec(num_steps=32, eval_every_steps=1)
    run = new_run(tmp_path / "run", spec)
    spike = on_batches(lambda loss: loss + 16 * 9.0, 27, 28, 29)
    last = batch_inputs(29)[0]

    def damage(inputs: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        if torch.equal(inputs[0], last):
            trainee.checkpointer.wait()
            next(run.checkpoints_dir(STAGE).glob("step_000028/model*")).write_bytes(b"")
        return spike(inputs, loss)

    trainee = Trainee(run, spec, poison=damage)
    assert trainee.fit().outcome == "done"
    rollback, corrupt = [m for m in run.metrics() if "event" in m][1:]
    assert (rollback["event"], rollback["resume_step"]) == ("rollback", 26)
    assert corrupt["event"] == "corrupt_checkpoint" and "step_000028" in corrupt["message"]


def test_it_gives_up_after_max_rollbacks_and_keeps_the_last_good_checkpoint(
    tmp_path: Path,
) -> None:
    spec = make_spec(max_rollbacks=2)
    run = new_run(tmp_path / "run", spec)
    poison = on_batches(not_a_number, *range(6, 20))
    with pytest.raises(StageFailed, match=r"diverged again after 2 roll-backs.*matrix_lr = 0.02"):
        Trainee(run, spec, poison=poison).fit()
    assert [r["batches"] for r in run.resolved("rollback")] == [[6], [7]]
    assert latest(run) == 4
    with pytest.raises(StageFailed):  # a restart is no new chance
        Trainee(run, spec, poison=poison).fit()
    assert len(run.resolved("rollback")) == 2


def test_a_checkpoint_of_bad_weights_is_given_up(tmp_path: Path) -> None:
    """Twice bad right behind the newest checkpoint: the one before is taken."""
    spec = make_spec()
    run = new_run(tmp_path / "run", spec)
    trainee = Trainee(run, spec)
    update = trainee.optimizer.update
    num_updates = 0

    def update_and_break() -> None:
        nonlocal num_updates
        update()
        num_updates += 1
        if num_updates == 8:
            trainee.model.lm_head.weight.data[0, 0] = math.nan

    trainee.optimizer.update = update_and_break  # type: ignore[method-assign]
    assert trainee.fit().outcome == "done"
    assert [r["batches"] for r in run.resolved("rollback")] == [[9], [10]]
    assert_equal(trainee.weights(), weights_without(tmp_path / "known", spec, 9, 10))


def test_a_checkpoint_that_meets_one_spike_after_another_is_given_up(tmp_path: Path) -> None:
    """Its weights are finite and bad: two spikes begin right behind it, the one before is taken."""
    spec = make_spec(num_steps=36, eval_every_steps=8)
    run = new_run(tmp_path / "run", spec)

    def high(inputs: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return loss + 16 * 9.0 if trainee.model.wte.weight[0, 0] > 900 else loss

    trainee = Trainee(run, spec, poison=high)
    update = trainee.optimizer.update
    num_updates = 0

    def update_and_break() -> None:
        nonlocal num_updates
        update()
        num_updates += 1
        if num_updates == 24:
            trainee.model.wte.weight.data[0, 0] = 1000.0

    trainee.optimizer.update = update_and_break  # type: ignore[method-assign]
    assert trainee.fit().outcome == "done"
    assert [r["batches"] for r in run.resolved("rollback")] == [[25, 26, 27], [28, 29, 30]]
    assert_equal(trainee.weights(), weights_without(tmp_path / "known", spec, *range(25, 31)))


def test_a_roll_back_has_the_time_that_loading_takes(tmp_path: Path) -> None:
    spec = make_spec()
    run = new_run(tmp_path / "run", spec)
    trainee = Trainee(run, spec, poison=on_batches(not_a_number, 7))
    load, phases = trainee.checkpointer.load_latest, []

    def noting(state: Any) -> Any:
        phases.append(run.progress(STAGE)["phase"])
        return load(state)

    trainee.checkpointer.load_latest = noting  # type: ignore[method-assign,assignment]
    trainee.fit()
    assert phases == ["load", "load"]


def test_a_step_without_targets_divides_by_nothing(tmp_path: Path) -> None:
    spec = make_spec(num_steps=3)
    run = new_run(tmp_path / "run", spec)
    trainee = Trainee(run, spec)
    trainee.source = make_source(all_masked=True)
    assert trainee.fit().outcome == "done"
    assert [m["loss"] for m in steps_logged(run)] == [0.0, 0.0, 0.0]
    assert all(w.isfinite().all() for w in trainee.weights().values())


def blank_batches(trainee: Trainee, *numbers: int) -> None:
    """Let the batches of these numbers hold no targets."""
    blank = [batch_inputs(number) for number in numbers]
    make_loader = trainee._loader

    class Blanking:
        def __init__(self, loader: Any) -> None:
            self._loader = loader

        def __next__(self) -> StepBatch:
            batch = next(self._loader)
            if any(torch.equal(batch.inputs, inputs) for inputs in blank):
                batch.targets.fill_(IGNORE_INDEX)
                batch.num_targets = 0
            return batch

        def __getattr__(self, name: str) -> Any:
            return getattr(self._loader, name)

    trainee._loader = lambda cursor: Blanking(make_loader(cursor))  # type: ignore


def test_steps_without_targets_do_not_make_the_next_ones_a_spike(tmp_path: Path) -> None:
    rates = dict.fromkeys(("matrix_lr", "embedding_lr", "unembedding_lr"), 1e-6)
    spec = make_spec(num_steps=36, eval_every_steps=12, **rates)
    run = new_run(tmp_path / "run", spec)
    trainee = Trainee(run, spec)
    blank_batches(trainee, *range(10, 30))
    outcome = trainee.fit()
    assert (outcome.outcome, outcome.facts["rollbacks"]) == ("done", 0)
    losses = [m["loss"] for m in steps_logged(run)]
    assert losses[9:29] == [0.0] * 20 and min(losses[29:]) > 2.0
    state = json.loads((run.checkpoints_dir(STAGE) / "step_000024" / "state.json").read_text())
    assert state["extra"]["position"]["mean_loss"] > 2.0


def test_a_step_without_targets_does_not_hide_a_spike(tmp_path: Path) -> None:
    """The loss is high on batches 27, 29 and 30; 28 says nothing and is kept."""
    spec = make_spec(num_steps=36, eval_every_steps=8)
    run = new_run(tmp_path / "run", spec)
    poison = on_batches(lambda loss: loss + 16 * 9.0, 27, 29, 30)
    trainee = Trainee(run, spec, poison=poison)
    blank_batches(trainee, 28)
    assert trainee.fit().outcome == "done"
    [record] = run.resolved("rollback")
    assert (record["step"], record["begun"], record["batches"]) == (29, 26, [27, 29, 30])


# -----------------------------------------------------------------------------
# looks at the validation loss


def test_early_stopping_keeps_the_best(tmp_path: Path) -> None:
    spec = make_spec(num_steps=100, early_stop_patience=3)
    spec = spec.model_copy(update={"checkpoint": CheckpointPolicy(keep_last=1, free_floor_gib=0)})
    run = new_run(tmp_path / "run", spec)
    trainee = Trainee(run, spec)
    looks = iter([3.0, 2.0, 1.5, 1.6, 1.55, 1.7])
    trainee.bpb = lambda: next(looks)
    outcome = trainee.fit()
    assert (outcome.outcome, outcome.step, outcome.facts["best_step"]) == ("done", 20, 8)
    folder = run.checkpoints_dir(STAGE)
    assert (folder / "best").read_text() == "step_000008\n"
    assert (folder / "step_000008").is_dir()
    [event] = [m for m in run.metrics() if m.get("event") == "early_stop"]
    assert "no better val_bpb than 1.5000 (step 8) in 3 looks" in event["message"]


def test_a_look_that_is_not_finite_is_no_best_and_a_warning(tmp_path: Path) -> None:
    spec = make_spec(num_steps=100, early_stop_patience=2)
    run = new_run(tmp_path / "run", spec)
    trainee = Trainee(run, spec)
    looks = iter([math.nan, math.nan, math.nan, 2.0, math.inf, math.nan])
    trainee.bpb = lambda: next(looks)
    outcome = trainee.fit()
    assert (outcome.outcome, outcome.step) == ("done", 20)
    facts = outcome.facts
    assert (facts["val_bpb_first"], facts["val_bpb_best"], facts["best_step"]) == (2.0, 2.0, 12)
    assert facts["val_bpb_last"] is None
    warnings = [m for m in run.metrics() if m.get("event") == "warning"]
    assert [m["step"] for m in warnings] == [0, 16]  # told once until it is over
    assert all("val_bpb is not a finite number" in m["message"] for m in warnings)


def test_looks_and_samples_do_not_change_the_training(tmp_path: Path) -> None:
    def rand() -> float:
        return float(torch.rand(()))

    quiet_spec, busy_spec = make_spec(eval_every_steps=100), make_spec(eval_every_steps=1)
    quiet = Trainee(new_run(tmp_path / "quiet", quiet_spec), quiet_spec, dropout=0.2)
    busy = Trainee(new_run(tmp_path / "busy", busy_spec), busy_spec, dropout=0.2)
    busy.bpb = rand
    quiet.fit()
    busy.fit(sample=lambda step: torch.manual_seed(step), sample_every_steps=2)
    assert_equal(busy.weights(), quiet.weights())
    plain = Trainee(new_run(tmp_path / "plain", quiet_spec), quiet_spec)
    plain.fit()
    assert any(not torch.equal(w, quiet.weights()[n]) for n, w in plain.weights().items())


def test_what_a_log_line_says(tmp_path: Path) -> None:
    spec = make_spec()
    run = new_run(tmp_path / "run", spec)
    trainee = Trainee(run, spec)
    trainee.fit(peak_flops=1e12)
    lines = steps_logged(run)
    assert [m["step"] for m in lines] == list(range(1, 13))
    named = {"stage", "step", "time_s", "loss", "lr", "grad_norm", "tokens_per_s", "mfu"}
    more = {"epoch", "num_tokens", "padding", "loader_wait_s", "checkpoint_stall_s", "step_s"}
    for line in lines:
        assert named | more <= line.keys()
        assert line["stage"] == STAGE and line["loss"] > 0 and line["grad_norm"] > 0
        assert line["tokens_per_s"] == pytest.approx(64 / line["step_s"])
        assert line["mfu"] == pytest.approx(line["tokens_per_s"] * 1000 / 1e12)
        assert line["num_tokens"] == 64 * line["step"]
    assert lines[0]["lr"] == 0.02 and 0 < lines[-1]["lr"] < 0.02
    vals = [m["step"] for m in run.metrics() if "val_bpb" in m]
    assert vals == [0, 4, 8, 12]
    assert lines[-1]["loss"] < lines[0]["loss"]


# -----------------------------------------------------------------------------
# the clock, the budget, a person


def test_no_more_than_an_interval_is_at_risk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(num_steps=20, eval_every_steps=100)
    spec = spec.model_copy(update={"checkpoint": CheckpointPolicy(keep_last=99, free_floor_gib=0)})
    run = new_run(tmp_path / "run", spec)
    now_s = 0.0
    clock = SimpleNamespace(monotonic=lambda: now_s, time=time.time)
    monkeypatch.setattr("nanochat.trainer.time", clock)

    def ten_seconds(inputs: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        nonlocal now_s
        now_s += 2.5  # four forward passes per step
        return loss

    trainee = Trainee(run, spec, poison=ten_seconds)
    trainee.fit(checkpoint_every_s=35.0)
    steps = [m.step for m in trainee.checkpointer.list_complete()]
    assert steps == [4, 8, 12, 16, 20]


def tell_horizon(run: RunDir, seconds: float, age_s: float = 0.0) -> None:
    told = {"time": time.time() - age_s, "fraction": 0.0, "fraction_per_s": 1 / seconds}
    (run.path / "stages" / f"{STAGE}.horizon.json").write_text(json.dumps(told))


def test_a_budget_horizon_ends_with_the_learning_rate_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(num_steps=None, horizon="budget", eval_every_steps=10_000)
    run = new_run(tmp_path / "run", spec)
    started_s, now_s = time.time(), 0.0
    clock = SimpleNamespace(monotonic=lambda: now_s, time=lambda: started_s + now_s)

    def ten_seconds(inputs: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        nonlocal now_s
        now_s += 2.5  # four forward passes per step
        return loss

    trainee = Trainee(run, spec, poison=ten_seconds)
    trainee.bpb = lambda: 1.25
    tell_horizon(run, seconds=200.0)
    monkeypatch.setattr("nanochat.trainer.time", clock)
    outcome = trainee.fit()
    assert outcome.outcome == "done" and outcome.num_steps is None
    lines = steps_logged(run)
    assert outcome.step == len(lines) and outcome.step in (20, 21)
    scales = [line["lr_scale"] for line in lines]
    assert scales[0] == 1.0 and scales == sorted(scales, reverse=True)
    assert scales[-1] < 0.5
    assert outcome.facts["val_bpb_last"] == 1.25
    assert latest(run) == outcome.step


def scales_on_rank(dist: Dist, path: Path, spec: Any) -> list[float]:
    """The learning rates' factors; rank 1 reads another horizon than rank 0."""
    trainee, scales = Trainee(RunDir(path), spec, dist), []
    trainee.optimizer.set_lr_scale = scales.append  # type: ignore[method-assign]
    if not dist.is_main:
        Horizon.after = lambda self, fraction, step_s: 0.99  # type: ignore[method-assign]
    trainee.fit()
    return scales


def test_all_ranks_learn_at_rank_0s_rate(tmp_path: Path) -> None:
    spec = make_spec(num_steps=3, warmdown_ratio=1.0)
    run = new_run(tmp_path / "run", spec)
    first, second = on_ranks(2, scales_on_rank, run.path, spec)
    assert first == second and len(first) == 3


@pytest.mark.parametrize("age_s", [None, 1e6])
def test_a_budget_horizon_needs_the_supervisor(tmp_path: Path, age_s: float | None) -> None:
    spec = make_spec(num_steps=None, horizon="budget")
    run = new_run(tmp_path / "run", spec)
    if age_s is not None:
        tell_horizon(run, seconds=1.0, age_s=age_s)
    with pytest.raises(SpecError, match="nanochat run"):
        Trainee(run, spec).fit()


def test_a_stop_saves_where_it_stands_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    spec = make_spec()
    whole = Trainee(new_run(tmp_path / "whole", spec), spec, dropout=0.2)
    whole.fit()
    run = new_run(tmp_path / "run", spec)
    calls = 0

    def ask(inputs: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 22:  # in the sixth step
            run.request_stop(StopReason.SIGNAL, time.time() + 60)
        return loss

    outcome = Trainee(run, spec, dropout=0.2, poison=ask).fit()
    assert (outcome.outcome, outcome.step) == ("stopped", 6)
    assert latest(run) == 6
    run.clear_stop()
    resumed = Trainee(run, spec, dropout=0.2)
    assert resumed.fit().outcome == "done"
    assert_equal(resumed.weights(), whole.weights())
    assert [m["loss"] for m in steps_logged(run)] == [m["loss"] for m in steps_logged(whole.run)]


@pytest.mark.parametrize("look_at", [4, 12])
def test_a_stop_in_an_evaluation_does_not_wait_for_it(tmp_path: Path, look_at: int) -> None:
    spec = make_spec()  # looks at steps 0, 4, 8 and 12, which is the last
    run = new_run(tmp_path / "run", spec)
    looks = 0

    def stop_in_it() -> float | None:
        nonlocal looks
        looks += 1
        if looks == look_at // 4 + 1:
            run.request_stop(StopReason.SIGNAL, time.time() + 60)
            return None
        return 1.0

    trainee = Trainee(run, spec)
    outcome = trainee.fit(validate=stop_in_it)
    assert (outcome.outcome, outcome.step) == ("stopped", look_at)
    assert latest(run) == look_at
    run.clear_stop()
    assert Trainee(run, spec).fit().outcome == "done"
    looked = [m["step"] for m in run.metrics() if "val_bpb" in m]
    assert looked == [0, 4, 8, 12]


def test_a_stop_without_time_for_a_save_leaves_the_last_one(tmp_path: Path) -> None:
    spec = make_spec()
    run = new_run(tmp_path / "run", spec)
    calls = 0

    def ask(inputs: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 22:
            run.request_stop(StopReason.SIGNAL, time.time() - 1)
        return loss

    outcome = Trainee(run, spec, poison=ask).fit()
    assert (outcome.outcome, outcome.step) == ("stopped", 6)
    assert latest(run) == 4


def test_steps_after_the_checkpoint_are_logged_again(tmp_path: Path) -> None:
    spec = make_spec()
    whole = Trainee(new_run(tmp_path / "whole", spec), spec)
    whole.fit()
    run = new_run(tmp_path / "run", spec)
    append_jsonl(run.metrics_file, {"stage": STAGE, "step": 3, "loss": 77.0})
    Trainee(run, spec).fit()
    assert sum(m["step"] == 3 and "loss" in m for m in read_jsonl(run.metrics_file)) == 2
    assert [m["loss"] for m in steps_logged(run)] == [m["loss"] for m in steps_logged(whole.run)]
