"""The supervisor turns what happens to stages into exit codes, and leaves nothing running."""

import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra import budget
from infra.console import Console
from infra.supervisor import Price, Supervisor, hang_limit_s
from nanochat.rundir import RunDir, RunDirError, StopReason, read_jsonl
from nanochat.spec import RunSpec

FAKE = Path(__file__).with_name("fake_stage.py")
PLAN = {"usd_per_hour": 0.0, "hours": 0.1, "stages": []}


def make_spec(**changes: Any) -> RunSpec:
    fields: dict[str, Any] = {
        "name": "t",
        "stop_grace_s": 3.0,
        "model": {"depth": 1, "seq_len": 8},
        "runtime": {"hang_s": 0.5, "max_restarts": 2},
        "data_fetch": {},
        "base_train": {"num_steps": 1, "total_batch_size": 8},
        "report": {},
    }
    return RunSpec.model_validate(fields | changes)


Supervise = Callable[..., tuple[int, RunDir]]


@pytest.fixture
def supervise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Supervise:
    def supervise(
        plan: dict[str, list[str]], spec: RunSpec | None = None, usd_per_hour: float = 0.0
    ) -> tuple[int, RunDir]:
        monkeypatch.setenv("FAKE_STAGE", json.dumps({"data_fetch": ["done"]} | plan))
        monkeypatch.setenv("PYTHONPATH", str(FAKE.parent.parent.parent))
        spec = spec or make_spec()
        run = RunDir(tmp_path / "run")
        supervisor = Supervisor(
            spec,
            run,
            PLAN,
            Price(usd_per_hour, "test"),
            1,
            Console(run, spec.stages, stream=io.StringIO()),
            command=lambda stage, path, ranks: [sys.executable, str(FAKE), stage, str(path)],
        )
        return supervisor.run(), run

    return supervise


def acts(run: RunDir) -> list[tuple[str, str]]:
    return [(a["stage"], a["act"]) for a in read_jsonl(run.path / "acts.jsonl")]


def assert_nothing_runs(run: RunDir) -> None:
    pids = [a["pid"] for a in read_jsonl(run.path / "acts.jsonl")]
    assert [p for p in pids if psutil.pid_exists(p)] == []


ALL_DONE = {"base_train": ["done"], "report": ["done"]}


def test_every_stage_once_and_skipped_when_done(supervise: Supervise) -> None:
    code, run = supervise(ALL_DONE)
    assert code == 0
    assert acts(run) == [("data_fetch", "done"), ("base_train", "done"), ("report", "done")]
    status = run.status()
    assert status is not None
    assert (status["state"], status["exit_code"]) == ("SUCCEEDED", 0)
    code, run = supervise(ALL_DONE)
    assert code == 0 and len(acts(run)) == 3


@pytest.mark.parametrize("code", [70, 77, 78, 1])
def test_a_failed_stage_ends_the_run_with_its_code(supervise: Supervise, code: int) -> None:
    got, run = supervise({"base_train": [f"fail:{code}"]})
    assert got == code
    status = run.status()
    assert status is not None
    assert status["exit_code"] == code and "because" in status["message"]
    assert status["state"] == "FAILED"


def test_a_killed_stage_is_continued(supervise: Supervise) -> None:
    code, run = supervise(ALL_DONE | {"base_train": ["die", "die", "done"]})
    assert code == 0
    events = [m["message"] for m in run.metrics() if m.get("event") == "restart"]
    assert len(events) == 2 and "was killed" in events[0]


def test_a_stage_that_keeps_dying_means_an_unfit_node(supervise: Supervise) -> None:
    code, run = supervise({"base_train": ["die"]})
    assert code == 77
    assert len(acts(run)) == 1 + 3


def test_a_hung_stage_is_ended_and_continued(supervise: Supervise) -> None:
    code, run = supervise(ALL_DONE | {"base_train": ["hang", "done"]})
    assert code == 0
    assert_nothing_runs(run)


def test_out_of_memory_restarts_do_not_count(supervise: Supervise) -> None:
    code, run = supervise(ALL_DONE | {"base_train": [*["again"] * 5, "done"]})
    assert code == 0
    assert len(acts(run)) == 8


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2])
def test_a_signal_stops_with_75(supervise: Supervise, signum: int, tmp_path: Path) -> None:
    _signal_when_running(tmp_path, [signum])
    code, run = supervise({"base_train": ["stopped_when_asked"]})
    assert code == 75
    status = run.status()
    assert status is not None
    assert (status["state"], status["stop_reason"]) == ("STOPPED", "signal")
    assert run.stop_request() is None
    assert not run.lease_file.exists()
    assert supervise(ALL_DONE)[0] == 0


def test_a_second_ctrl_c_stops_now(supervise: Supervise, tmp_path: Path) -> None:
    _signal_when_running(tmp_path, [signal.SIGINT, signal.SIGINT])
    started = time.monotonic()
    code, run = supervise({"base_train": ["ignore_stop"]}, make_spec(stop_grace_s=60.0))
    assert code == 75
    assert time.monotonic() - started < 20
    assert_nothing_runs(run)


def test_a_stage_that_does_not_stop_is_ended_at_the_deadline(
    supervise: Supervise, tmp_path: Path
) -> None:
    _signal_when_running(tmp_path, [signal.SIGTERM])
    code, run = supervise({"base_train": ["ignore_stop"]}, make_spec(stop_grace_s=1.0))
    assert code == 75
    assert_nothing_runs(run)


def test_a_person_stops_it_by_file(supervise: Supervise, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    _when_running(tmp_path, lambda: run.request_stop(StopReason.USER, time.time() + 3))
    code, run = supervise({"base_train": ["stopped_when_asked"]})
    assert code == 75
    status = run.status()
    assert status is not None and status["stop_reason"] == "user"


def test_the_budget_stops_it_with_a_report(supervise: Supervise) -> None:
    spec = make_spec(budget={"max_hours": 1.5 / 3600})
    code, run = supervise({"base_train": ["stopped_when_asked"], "report": ["done"]}, spec)
    assert code == 76
    assert acts(run)[-1] == ("report", "done")
    usd, used_s = budget.spent(list(read_jsonl(run.ledger_file)), time.time())
    assert usd == 0.0 and used_s > 0


def test_another_spec_in_the_same_directory_is_refused(supervise: Supervise) -> None:
    supervise(ALL_DONE)
    with pytest.raises(RunDirError, match="seed: 42 -> 7"):
        supervise(ALL_DONE, make_spec(seed=7))


def test_hang_limit_follows_the_steps() -> None:
    assert hang_limit_s({"phase": "start"}, 1.0) > 600
    assert hang_limit_s({"phase": "train", "median_step_s": 30.0}, None) == 300.0
    assert hang_limit_s({"phase": "train", "median_step_s": 0.1}, None) == 120.0
    assert hang_limit_s({"phase": "train", "median_step_s": 0.1}, 2.0) == 2.0
    assert hang_limit_s({"phase": "evaluate", "median_step_s": 0.1}, 2.0) > 600


def _when_running(tmp_path: Path, act: Callable[[], None]) -> None:
    progress = tmp_path / "run" / "stages" / "base_train.progress.json"

    def wait() -> None:
        deadline = time.monotonic() + 20
        while not progress.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        act()

    threading.Thread(target=wait, daemon=True).start()


def _signal_when_running(tmp_path: Path, signals: list[int]) -> None:
    def send() -> None:
        for signum in signals:
            os.kill(os.getpid(), signum)
            time.sleep(0.3)

    _when_running(tmp_path, send)


def test_a_failed_stage_is_tried_again_by_the_same_command(supervise: Supervise) -> None:
    assert supervise({"base_train": ["fail:70"]})[0] == 70
    code, run = supervise({"base_train": ["fail:70", "done"], "report": ["done"]})
    assert code == 0
    assert acts(run)[-2:] == [("base_train", "done"), ("report", "done")]
