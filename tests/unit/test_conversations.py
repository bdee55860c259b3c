"""What mid_train and chat_sft pass: every conversation, and the whole of it."""

from pathlib import Path

import pytest
from tiny_run import make_run_for, spec_of_stage

from nanochat.conversations import train_on_conversations

STAGE = "chat_sft"
SPEC = spec_of_stage(
    STAGE,
    num_epochs=2,
    total_batch_size=128,
    eval_every_steps=1000,
    mixture={"copying": 40, "arithmetic": 30},
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_epochs_pass_every_conversation(tmp_path: Path) -> None:
    """Padding takes places of rows: steps counted from tokens end before the conversations do."""
    run = make_run_for(tmp_path / "run", STAGE, SPEC, device_batch_size=2)
    outcome = train_on_conversations(run, STAGE, "base_train")
    assert outcome.outcome == "done"
    assert 2.0 <= outcome.facts["epochs"] < 2.2
    metrics = [m for m in run.metrics() if m["stage"] == STAGE and "epoch" in m]
    assert metrics[-2]["epoch"] <= 2.0, "no step more than it takes"
