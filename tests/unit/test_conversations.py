"""What mid_train and chat_sft pass: every conversation, and the whole of it."""

from pathlib import Path

import pytest
from tiny_run import save

from nanochat.conversations import train_on_conversations
from nanochat.gpt import GPT
from nanochat.rundir import RunDir
from nanochat.scaling import gpt_config
from nanochat.spec import RunSpec
from nanochat.tokenizer import Tokenizer

STAGE = "chat_sft"
SPEC = RunSpec.model_validate(
    {
        "name": "t",
        "model": {"depth": 1, "aspect_ratio": 16, "head_dim": 16, "seq_len": 64, "vocab_size": 300},
        "checkpoint": {"free_floor_gib": 0.0},
        "runtime": {"compile": False, "tensorboard": False, "device": "cpu"},
        "base_train": {"num_steps": 1, "total_batch_size": 512},
        STAGE: {
            "num_epochs": 2,
            "total_batch_size": 128,
            "eval_every_steps": 1000,
            "eval_tokens": 512,
            "mixture": {"copying": 40, "arithmetic": 30},
        },
    }
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_epochs_pass_every_conversation(tmp_path: Path) -> None:
    """Padding takes places of rows: steps counted from tokens end before the conversations do."""
    run = RunDir(tmp_path / "run")
    run.create()
    run.freeze_spec(SPEC)
    stages = [{"stage": STAGE, "device_batch_size": 2}]
    run.freeze_plan({"offer": "cpu", "world_size": 1, "stages": stages})
    Tokenizer.train(["the cat and the hat"] * 9, 300).save(run.tokenizer_dir)
    model = GPT(gpt_config(SPEC.model))
    model.init_weights(0)
    save(run, "base_train", model)
    outcome = train_on_conversations(run, STAGE, "base_train")
    assert outcome.outcome == "done"
    assert 2.0 <= outcome.facts["epochs"] < 2.2
    metrics = [m for m in run.metrics() if m["stage"] == STAGE and "epoch" in m]
    assert metrics[-2]["epoch"] <= 2.0, "no step more than it takes"
