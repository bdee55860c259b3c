"""The frame around a stage: it follows its parent, and a signal asks for a stop."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat.rundir import RunDir, StopReason
from nanochat.spec import RunSpec

REPO = Path(__file__).resolve().parents[2]
STAGE = """
import sys
from nanochat.rundir import Outcome, RunDir
from nanochat.stage import run_stage

def main(run: RunDir) -> Outcome:
    print("up", flush=True)
    sys.stdin.readline()
    return Outcome(stage="report", outcome="stopped" if run.stop_request() else "done")

run_stage("report", main)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run directory with nothing in it but its spec."""
    made = RunDir(tmp_path / "run")
    made.create()
    spec = {"name": "t", "model": {"depth": 1, "seq_len": 8}, "report": {}}
    made.freeze_spec(RunSpec.model_validate(spec))
    return made


def start(run: RunDir, *parent: str, is_rank: bool = False) -> "subprocess.Popen[str]":
    """The stage as a child of `parent`, else of this process."""
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    if is_rank:
        env["TORCHELASTIC_RUN_ID"] = "some"
    return subprocess.Popen(
        [*parent, sys.executable, "-c", STAGE, str(run.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )


def test_a_rank_whose_torchrun_died_before_it_was_ready_changes_nothing(run: RunDir) -> None:
    """Its parent is then another process: here, the one of the tests."""
    process = start(run, is_rank=True)
    said, error = process.communicate("\n", timeout=60)
    assert (process.returncode, said) == (1, "")
    assert "the torchrun of this rank is gone" in error
    assert run.outcome("report") is None and run.progress("report") == {}


def test_a_rank_whose_torchrun_lives_goes_on(run: RunDir) -> None:
    # a shell that waits, with torchrun's name among its words
    process = start(run, "sh", "-c", '"$@"; true', "torch.distributed.run", is_rank=True)
    said, error = process.communicate("\n", timeout=60)
    assert (process.returncode, said) == (0, "up\n"), error
    assert run.is_done("report")


@pytest.mark.parametrize(
    "signum",
    [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1],
    ids=lambda signum: signum.name,
)
def test_a_signal_to_a_stage_alone_asks_for_a_stop(run: RunDir, signum: signal.Signals) -> None:
    """And the same command goes on."""
    process = start(run)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signum)
    _, error = process.communicate("\n", timeout=60)
    assert process.returncode == 0, error
    outcome = run.outcome("report")
    assert outcome is not None and outcome.outcome == "stopped"
    process = start(run)
    _, error = process.communicate("\n", timeout=60)
    assert run.is_done("report"), error


@pytest.mark.parametrize(
    ("raises", "misses_a_rank"),
    [
        (
            "RuntimeError('gloo/transport/tcp/pair.cc:537 Read error: Connection reset by peer')",
            True,
        ),
        ("ValueError('no such thing')", False),
        ("RuntimeError('CUDA error: device-side assert triggered')", False),
    ],
)
def test_a_failure_tells_whether_it_is_another_ranks(
    run: RunDir, raises: str, misses_a_rank: bool
) -> None:
    main = f"def main(run):\n    raise {raises}\n"
    code = f"from nanochat.stage import run_stage\n{main}run_stage('report', main)"
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    subprocess.run([sys.executable, "-c", code, str(run.path)], env=env, check=True)
    outcome = run.outcome("report")
    assert outcome is not None and (outcome.outcome, outcome.exit_code) == ("failed", 1)
    assert outcome.facts.get("misses_rank", False) == misses_a_rank


def test_a_stop_that_came_with_a_supervisor_is_left_to_it(run: RunDir) -> None:
    run.lease_file.write_text("{}")
    process = start(run)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    process.communicate("\n", timeout=60)
    request = run.stop_request()
    assert request is not None and request.reason == StopReason.SIGNAL


def test_a_stop_whose_deadline_has_passed_stops_nothing(run: RunDir) -> None:
    run.request_stop(StopReason.USER, time.time() - 1.0)
    start(run).communicate("\n", timeout=60)
    assert run.is_done("report")
