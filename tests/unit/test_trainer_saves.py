"""What `fit` saves, and what it does when a save in the background fails."""

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_training import (
    STAGE,
    Poison,
    Trainee,
    batch_inputs,
    latest,
    make_spec,
    new_run,
    steps_logged,
)

from nanochat.checkpoint import CheckpointError
from nanochat.rundir import RunDir, StopReason
from nanochat.storage import Storage

pytestmark = pytest.mark.usefixtures("one_thread")


class Broken(Storage):
    """Writes nothing for the checkpoints of these steps."""

    def __init__(self, *steps: int) -> None:
        self.folders = {f".step_{step:06d}.tmp" for step in steps}

    def open_new(self, path: Path) -> int:
        if path.parent.name in self.folders:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().open_new(path)


def broken_trainee(run: RunDir, spec: Any, *steps: int, poison: Poison | None = None) -> Trainee:
    """It finishes its saves within the step after them."""

    def wait_for_save(inputs: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        while trainee.checkpointer.saving_step is not None:
            time.sleep(0.001)
        return loss if poison is None else poison(inputs, loss)

    trainee = Trainee(run, spec, poison=wait_for_save, storage=Broken(*steps))
    return trainee


def saves_failed(run: RunDir) -> list[str]:
    return [m["message"] for m in run.metrics() if m.get("event") == "save_failed"]


def test_a_save_that_fails_is_told_at_once_and_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanochat.trainer.SAVE_AGAIN_S", 0.0)
    spec = make_spec(num_steps=20, eval_every_steps=10)
    run = new_run(tmp_path / "run", spec)
    trainee = broken_trainee(run, spec, 10)
    assert trainee.fit().outcome == "done"
    assert [m.step for m in trainee.checkpointer.list_complete()] == [12, 20]
    [message] = saves_failed(run)
    assert "a save has failed" in message and "Input/output error" in message
    [event] = [m for m in run.metrics() if m.get("event") == "save_failed"]
    assert event["step"] == 11


def test_a_second_failure_in_a_row_ends_the_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanochat.trainer.SAVE_AGAIN_S", 0.0)
    spec = make_spec(num_steps=40, eval_every_steps=10)
    run = new_run(tmp_path / "run", spec)
    with pytest.raises(CheckpointError, match="Input/output error"):
        broken_trainee(run, spec, *range(11, 41)).fit()
    assert latest(run) == 10
    assert max(m["step"] for m in steps_logged(run)) == 22
    assert len(saves_failed(run)) == 1


def test_a_stop_after_a_failed_save_saves_where_it_stands(tmp_path: Path) -> None:
    spec = make_spec()
    run = new_run(tmp_path / "run", spec)
    fifth = batch_inputs(5)[0]

    def ask(inputs: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        if torch.equal(inputs[0], fifth):
            run.request_stop(StopReason.SIGNAL, time.time() + 60)
        return loss

    outcome = broken_trainee(run, spec, 4, poison=ask).fit()
    assert (outcome.outcome, outcome.step, latest(run)) == ("stopped", 5, 5)
    assert len(saves_failed(run)) == 1


def test_a_failed_save_of_the_last_step_is_made_again(tmp_path: Path) -> None:
    """The one before an early end is written in the background."""
    spec = make_spec(num_steps=100, early_stop_patience=1)
    run = new_run(tmp_path / "run", spec)
    trainee = broken_trainee(run, spec, 4)
    looks = iter([1.0, 2.0])

    def look() -> float:
        while trainee.checkpointer.saving_step is not None:
            time.sleep(0.001)
        trainee.checkpointer.dir.storage = Storage()
        return next(looks)

    trainee.bpb = look
    outcome = trainee.fit()
    assert (outcome.outcome, outcome.step, latest(run)) == ("done", 4, 4)
    [manifest] = trainee.checkpointer.list_complete()
    assert manifest.val_bpb == 2.0


def test_host_buffers_are_made_before_the_first_save(tmp_path: Path) -> None:
    spec = make_spec()
    trainee = Trainee(new_run(tmp_path / "run", spec), spec)
    prepare, save, order = trainee.checkpointer.prepare, trainee.checkpointer.save, []
    trainee.checkpointer.prepare = lambda s: (order.append("prepare"), prepare(s))[1]  # type: ignore
    trainee.checkpointer.save = lambda *a, **k: (order.append("save"), save(*a, **k))[1]  # type: ignore
    trainee.fit()
    assert order == ["prepare", "save", "save", "save"]


def test_a_checkpoint_is_not_written_twice(tmp_path: Path) -> None:
    """A stop in a look: the step of it stands already when the look is made again."""
    spec = make_spec()
    run = new_run(tmp_path / "run", spec)
    looks = iter([1.0, None])

    def stop_in_it() -> float | None:
        if (look := next(looks)) is None:
            run.request_stop(StopReason.SIGNAL, time.time() + 60)
        return look

    assert Trainee(run, spec).fit(validate=stop_in_it).step == 4
    run.clear_stop()
    file = run.checkpoints_dir(STAGE) / "step_000004" / "state.json"
    before = file.stat()
    resumed = Trainee(run, spec)
    resumed.fit()
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert [m.val_bpb for m in resumed.checkpointer.list_complete()] == [1.0, 1.0, 1.0]
