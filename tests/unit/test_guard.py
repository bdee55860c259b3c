"""A run that hangs on a machine without a provider's API is killed, and one that lives is not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from infra import guard as guarding
from infra.deadman import Switch
from infra.guard import guard, start_guard
from infra.pointer import point_to
from nanochat.rundir import RunDir, append_jsonl
from tests.unit.test_supervisor import make_spec

SLEEPER = (
    "import subprocess, sys, time; "
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    "print('up', flush=True); time.sleep(600)"
)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A run that has just written its ledger: $1 at $36 per hour."""
    run = RunDir(tmp_path / "runs" / "t")
    run.create()
    run.freeze_spec(make_spec(budget={"max_usd": 1.0}))
    point_to(tmp_path, run.path)
    line = {"event": "start", "time": time.time(), "usd_per_hour": 36.0, "instance": None}
    append_jsonl(run.ledger_file, line)
    return tmp_path


def test_a_stopped_run_is_killed_with_what_it_has_started(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarding, "LOOK_EVERY_S", 0.05)
    process = subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    (child,) = psutil.Process(process.pid).children()
    os.kill(process.pid, signal.SIGSTOP)
    said: list[str] = []
    guard(psutil.Process(process.pid), Switch(home, None, None, silence_s=0.2), said.append)
    assert process.wait(30) == -signal.SIGKILL
    assert "no run has given a sign of life" in said[0]
    psutil.wait_procs([child], timeout=30.0)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    process.stdout.close()


def test_a_run_whose_budget_is_spent_is_due_without_its_supervisor(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch = Switch(home, None, None)
    assert switch.reason_to_end() is None
    later = time.time() + 100.0
    monkeypatch.setattr(time, "time", lambda: later)
    run = RunDir(home / "runs" / "t")
    for at in range(0, 100, 20):  # as a supervisor that no longer looks at its budget
        line = {"event": "heartbeat", "time": later - 100.0 + at, "usd_per_hour": 36.0}
        append_jsonl(run.ledger_file, line)
    assert "budget" in str(switch.reason_to_end())


def test_the_guard_ends_with_the_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarding, "LOOK_EVERY_S", 0.01)
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    watched = psutil.Process(process.pid)
    process.wait()
    guard(watched, Switch(home, None, None), pytest.fail)


def test_it_is_started_on_machines_of_skypilot_that_are_no_pods() -> None:
    assert start_guard({}) is None
    assert start_guard({"SKYPILOT_TASK_ID": "1", "RUNPOD_POD_ID": "p"}) is None
    started = start_guard({"SKYPILOT_TASK_ID": "1", "PATH": os.environ["PATH"]})
    assert started is not None
    started.kill()
    started.wait()
