"""The loop of reinforcement learning: what is on the disk when it looks, stops and goes on."""

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_run import save

from nanochat.gpt import GPT
from nanochat.rundir import RunDir, StopReason
from nanochat.scaling import gpt_config
from nanochat.spec import RunSpec
from nanochat.stages import chat_rl
from nanochat.storage import Storage
from nanochat.tokenizer import Tokenizer

STAGE = "chat_rl"
SPEC = RunSpec.model_validate(
    {
        "name": "t",
        "model": {"depth": 1, "aspect_ratio": 16, "head_dim": 16, "seq_len": 64, "vocab_size": 300},
        "checkpoint": {"free_floor_gib": 0.0, "keep_last": 5},
        "runtime": {"compile": False, "tensorboard": False, "device": "cpu"},
        "base_train": {"num_steps": 1, "total_batch_size": 512},
        STAGE: {
            "task": "copying",
            "num_steps": 4,
            "prompts_per_step": 2,
            "samples_per_prompt": 2,
            "max_tokens": 4,
            "eval_every_steps": 2,
            "eval_examples": 2,
        },
    }
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run whose base training is done."""
    made = RunDir(tmp_path / "run")
    made.create()
    made.freeze_spec(SPEC)
    made.freeze_plan({"offer": "cpu", "world_size": 1, "stages": []})
    Tokenizer.train(["the cat and the hat"] * 9, 300).save(made.tokenizer_dir)
    model = GPT(gpt_config(SPEC.model))
    model.init_weights(0)
    save(made, "base_train", model)
    return made


def complete(run: RunDir) -> list[str]:
    return sorted(p.name for p in run.checkpoints_dir(STAGE).glob("step_*"))


def stop_in_look(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A stop is asked while the held-out reward is looked at for the n-th time."""
    look, looks = chat_rl._look, []

    def stopping(engine: Any, task: Any, settings: Any, run: RunDir, dist: Any) -> Any:
        looks.append(None)
        if len(looks) == number:
            run.request_stop(StopReason.SIGNAL, time.time() - 1)  # no time for another save
        return look(engine, task, settings, run, dist)

    monkeypatch.setattr(chat_rl, "_look", stopping)


def test_it_saves_before_it_looks_and_not_again_when_it_goes_on(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_in_look(monkeypatch, 2)
    outcome = chat_rl.main(run)
    assert (outcome.outcome, outcome.step) == ("stopped", 2)
    assert complete(run) == ["step_000002"]
    file = run.checkpoints_dir(STAGE) / "step_000002" / "state.json"
    before = file.stat()
    run.clear_stop()
    assert chat_rl.main(run).outcome == "done"
    assert complete(run) == ["step_000002", "step_000004"]
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    looks = [m["step"] for m in run.metrics() if "val_reward" in m]
    assert looks == [0, 2, 4]


def test_a_save_that_fails_is_told_and_made_again(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanochat.trainer.SAVE_AGAIN_S", 0.0)
    open_new = Storage.open_new

    def failing(storage: Storage, path: Path) -> int:
        if path.parent.name == ".step_000002.tmp":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return open_new(storage, path)

    monkeypatch.setattr(Storage, "open_new", failing)
    assert chat_rl.main(run).outcome == "done"
    assert complete(run)[-1] == "step_000004" and "step_000002" not in complete(run)
    [event] = [m for m in run.metrics() if m.get("event") == "save_failed"]
    assert "Input/output error" in event["message"]
