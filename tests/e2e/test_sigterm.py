"""SIGTERM to the supervisor under torchrun with two ranks: 75, and a whole checkpoint, in time."""

import json
import random
import signal
import time

import pytest

from nanochat.checkpoint_dir import CheckpointDir, Manifest
from nanochat.rundir import EXIT_STOPPED
from tests.faults.tworanks import STAGE, FaultyRun
from tests.toyrun import wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

GRACE_S = 30.0
"""Long enough for a machine on which ten others work; a run that is let alone needs one or two."""
BUSY_WITH = ["train", "evaluate", "save"]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> FaultyRun:
    """One run for all of the stops: it goes on each time, and an evaluation of it takes long."""
    return FaultyRun(
        tmp_path_factory.mktemp("sigterm"), num_steps=20_000, eval_tokens=400_000, grace_s=GRACE_S
    )


def stop_while(run: FaultyRun, phase: str, delay_s: float) -> None:
    before = max(run.complete_steps(), default=0)
    process = run.start(act="slow", delay_s=0.02)
    try:
        wait_for(
            lambda: (run.phase == phase and run.step > before) or process.poll() is not None,
            timeout_s=300,
        )
        time.sleep(delay_s)
        asked_s = time.monotonic()
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
        took_s = time.monotonic() - asked_s
    finally:
        process.kill()
        process.wait()
    assert code == EXIT_STOPPED, (run.folder / "stderr.txt").read_text()
    assert took_s < GRACE_S, f"stopped after {took_s:.1f} s"
    print(json.dumps({"while": phase, "stopped_after_s": round(took_s, 2)}))
    wait_for(lambda: not run.is_alive())
    complete = CheckpointDir(run.run.checkpoints_dir(STAGE)).complete()
    newest: Manifest = complete[-1]
    assert newest.step > before
    newest.check(run.run.checkpoints_dir(STAGE) / f"step_{newest.step:06d}", newest.files, True)
    outcome = run.run.outcome(STAGE)
    assert outcome is not None and outcome.outcome == "stopped"
    assert newest.step == outcome.step


@pytest.mark.parametrize("phase", BUSY_WITH)
def test_sigterm_leaves_a_checkpoint_in_time(faulty: FaultyRun, phase: str) -> None:
    stop_while(faulty, phase, delay_s=0.0)


@pytest.mark.long
@pytest.mark.parametrize("number", range(20))
def test_twenty_sigterms_of_twenty(faulty: FaultyRun, number: int) -> None:
    stop_while(faulty, BUSY_WITH[number % 3], random.Random(number).uniform(0.0, 0.2))
