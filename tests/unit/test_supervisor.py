"""The supervisor turns what happens to stages into exit codes, and leaves nothing running."""

import errno
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra import budget
from infra.console import Console
from infra.horizon import StageClock
from infra.meter import Price, ledger_line
from infra.supervisor import Supervisor, hang_limit_s
from nanochat.rundir import (
    Outcome,
    RunDir,
    RunDirError,
    StopReason,
    append_jsonl,
    read_json,
    read_jsonl,
)
from nanochat.spec import RunSpec

FAKE = Path(__file__).with_name("fake_stage.py")
PLAN: dict[str, Any] = {
    "offer": "cpu",
    "world_size": 1,
    "usd_per_hour": 0.0,
    "hours": 0.1,
    "stages": [],
}


def make_spec(**changes: Any) -> RunSpec:
    fields: dict[str, Any] = {
        "name": "t",
        "stop_grace_s": 3.0,
        "model": {"depth": 1, "seq_len": 8},
        "runtime": {"hang_s": 0.5, "max_restarts": 2, "tensorboard": False},
        "data_fetch": {},
        "base_train": {"num_steps": 1, "total_batch_size": 8},
        "report": {},
    }
    return RunSpec.model_validate(fields | changes)


Supervise = Callable[..., tuple[int, RunDir]]


@pytest.fixture
def supervise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Supervise:
    def supervise(
        acts: dict[str, list[str]],
        spec: RunSpec | None = None,
        usd_per_hour: float = 0.0,
        plan: dict[str, Any] = PLAN,
    ) -> tuple[int, RunDir]:
        monkeypatch.setenv("FAKE_STAGE", json.dumps({"data_fetch": ["done"]} | acts))
        monkeypatch.setenv("PYTHONPATH", str(FAKE.parent.parent.parent))
        spec = spec or make_spec()
        run = RunDir(tmp_path / "run")
        supervisor = Supervisor(
            spec,
            run,
            plan,
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


def message(run: RunDir) -> str:
    status = run.status()
    assert status is not None
    return str(status["message"])


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


def test_tensorboard_ends_with_the_run(
    supervise: Supervise, new_children: Callable[[], list[psutil.Process]]
) -> None:
    spec = make_spec(runtime={"tensorboard_port": 6006, "hang_s": 0.5})
    code, run = supervise(ALL_DONE, spec)
    assert code == 0
    assert run.log_file("tensorboard").exists(), "it was started"
    assert new_children() == []


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


def test_a_rank_that_was_killed_is_no_failure_of_those_that_missed_it(
    supervise: Supervise,
) -> None:
    code, run = supervise(ALL_DONE | {"base_train": ["lose_a_rank", "done"]})
    assert code == 0
    (event,) = [m["message"] for m in run.metrics() if m.get("event") == "restart"]
    assert event.startswith("lost a rank, as another says: no peer")


def test_ranks_that_are_lost_again_and_again_mean_an_unfit_node(supervise: Supervise) -> None:
    assert supervise({"base_train": ["lose_a_rank"]})[0] == 77


def test_a_machine_that_slept_gives_its_stage_time(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Suspended for an hour, as by the lid of a laptop, `docker pause` or a step of the clock."""
    right, right_steady, slept_s = time.time, time.monotonic, [0.0]
    monkeypatch.setattr(time, "time", lambda: right() + slept_s[0])
    monkeypatch.setattr(time, "monotonic", lambda: right_steady() + slept_s[0])
    monkeypatch.setattr("infra.supervisor.MOST_SILENT_S", 0.2)
    run = RunDir(tmp_path / "run")
    _when(
        lambda: run.progress_file("base_train").exists(),
        lambda: slept_s.__setitem__(0, 3600.0),
    )
    spec = make_spec(runtime={"hang_s": 3.0, "max_restarts": 2, "tensorboard": False})
    code, run = supervise(ALL_DONE | {"base_train": ["work_s:1.0"]}, spec)
    assert code == 0
    assert not [m for m in run.metrics() if m.get("event") == "restart"]


def test_a_hung_stage_is_ended_and_continued(supervise: Supervise) -> None:
    code, run = supervise(ALL_DONE | {"base_train": ["hang", "done"]})
    assert code == 0
    assert_nothing_runs(run)


def test_out_of_memory_restarts_do_not_count(supervise: Supervise) -> None:
    code, run = supervise(ALL_DONE | {"base_train": [*["again"] * 5, "done"]})
    assert code == 0
    assert [m["event"] for m in read_jsonl(run.metrics_file)] == ["again"] * 5
    assert len(acts(run)) == 8


@pytest.mark.parametrize(
    "signum",
    [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2],
    ids=lambda signum: signum.name,
)
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
    told = message(run)
    assert "base_train did not stop by the deadline; no complete checkpoint yet" in told


def test_the_budgets_end_tells_what_was_not_saved(supervise: Supervise, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    latest = run.checkpoints_dir("base_train") / "latest"
    latest.parent.mkdir(parents=True)
    latest.write_text("step_000300\n")
    _when_running(tmp_path, lambda: run.request_stop(StopReason.BUDGET, 0.0))
    spec = make_spec(budget={"max_hours": 1.0}, stop_grace_s=1.0)
    assert supervise({"base_train": ["ignore_stop"], "report": ["done"]}, spec)[0] == 76
    assert "base_train did not stop by the deadline" in message(run)
    assert "last complete checkpoint: base_train step 300" in message(run)
    assert "everything is saved" not in message(run)


def test_a_person_stops_it_by_file(supervise: Supervise, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    _when_running(tmp_path, lambda: run.request_stop(StopReason.USER, time.time() + 3))
    code, run = supervise({"base_train": ["stopped_when_asked"]})
    assert code == 75
    status = run.status()
    assert status is not None and status["stop_reason"] == "user"


def test_the_budget_stops_it_with_a_report(supervise: Supervise) -> None:
    spec = make_spec(budget={"max_hours": 8 / 3600})
    code, run = supervise({"base_train": ["stopped_when_asked"], "report": ["done"]}, spec)
    assert code == 76
    assert acts(run)[-1] == ("report", "done")
    usd, used_s = budget.spent(list(read_jsonl(run.ledger_file)), time.time())
    assert usd == 0.0 and used_s > 0


SPEED_PLAN = PLAN | {
    "stages": [{"stage": "base_train", "hours": 0.1, "total_batch_size": 8, "tokens_per_s": 80.0}],
    "other_stages": [{"stage": "report", "hours": 0.001}],
}


def test_a_slow_stage_is_told_early(supervise: Supervise, tmp_path: Path) -> None:
    """950 steps of 0.3 s are left, planned were 0.1 s, and the budget has a minute."""
    spec = make_spec(base_train={"num_steps": 1000, "total_batch_size": 8},
                     budget={"max_hours": 60 / 3600})  # fmt: skip
    run = RunDir(tmp_path / "run")
    _when(lambda: bool(run.resolved("replan")), lambda: run.request_stop(StopReason.USER, 0.0))
    code, _ = supervise({"base_train": ["step_s:0.3"]}, spec, usd_per_hour=7.2, plan=SPEED_PLAN)
    assert code == 75
    [facts] = run.resolved("replan")
    assert facts["planned_step_s"] == 0.1 and facts["step_s"] == 0.3 and not facts["fits"]
    # its own end (a save of at least 1 s, a look of 0.2 s) and a report three times as slow, which
    # has twice its time
    assert facts["needed_s"] == pytest.approx(950 * 0.3 + 1.2 + 2 * 3 * 3.6)
    assert 50 < facts["left_s"] <= 60
    assert facts["ends_at_step"] == 50 + int((facts["left_s"] - 1.2 - 2 * 3 * 3.6) / 0.3)
    [warning] = [m["message"] for m in run.metrics() if m.get("event") == "warning"]
    assert "0.33 times the planned speed" in warning and "$0.6" in warning
    assert f"stop at about step {facts['ends_at_step']}" in warning


def test_a_stage_that_fits_is_noted_without_a_warning(supervise: Supervise, tmp_path: Path) -> None:
    spec = make_spec(base_train={"num_steps": 1000, "total_batch_size": 8},
                     budget={"max_hours": 1.0})  # fmt: skip
    run = RunDir(tmp_path / "run")
    _when(lambda: bool(run.resolved("replan")), lambda: run.request_stop(StopReason.USER, 0.0))
    supervise({"base_train": ["step_s:0.05"]}, spec, plan=SPEED_PLAN)
    [facts] = run.resolved("replan")
    assert facts["fits"] and facts["ends_at_step"] is None
    assert [m for m in run.metrics() if m.get("event") == "warning"] == []


def test_a_volume_that_vanishes_means_an_unfit_node(supervise: Supervise, tmp_path: Path) -> None:
    code, run = supervise({"base_train": ["vanish"]})
    assert code == 77
    assert not run.path.exists()
    (tmp_path / "elsewhere").rename(run.path)
    assert_nothing_runs(run)
    run.lease_file.unlink()  # of this process, which lives
    assert supervise(ALL_DONE)[0] == 0


def test_a_full_volume_holds_up_only_what_the_supervisor_writes(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage decides: its next checkpoint fits, or it does not."""
    write_status = RunDir.write_status

    def full(self: RunDir, status: dict[str, Any]) -> None:
        if status["state"] == "RUNNING":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_status(self, status)

    monkeypatch.setattr(RunDir, "write_status", full)
    assert supervise(ALL_DONE)[0] == 0


def test_a_stage_that_dies_on_a_full_volume_is_78(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    trouble = (78, "the volume of here is full; the last complete checkpoint is kept")
    monkeypatch.setattr(RunDir, "volume_trouble", lambda self: trouble)
    code, run = supervise({"base_train": ["die"]})
    assert code == 78
    status = run.status()
    assert status is not None and "is full" in status["message"]
    assert acts(run)[-1] == ("base_train", "die") and len(acts(run)) == 2


def test_the_budget_counts_while_the_ledger_cannot_be_written(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Supervisor, event: str) -> None:
        if event != "start":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        line = ledger_line(self.price, event, time.time() - 40.0)
        append_jsonl(self.run_dir.ledger_file, line)

    monkeypatch.setattr(Supervisor, "_ledger", full)
    spec = make_spec(budget={"max_hours": 42 / 3600})
    code, _ = supervise({"base_train": ["stopped_when_asked"], "report": ["done"]}, spec)
    assert code == 76


def horizon_spec(hours: float) -> RunSpec:
    base = {"horizon": "budget", "total_batch_size": 8}
    return make_spec(base_train=base, budget={"max_hours": hours})


@pytest.mark.parametrize(
    ("owner", "method"),
    [
        (StageClock, "write_horizon"),
        (StageClock, "note_last_acts"),
        (RunDir, "append_resolved"),
    ],
)
def test_a_full_volume_does_not_end_a_stage_by_its_clock(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, owner: Any, method: str
) -> None:
    run = RunDir(tmp_path / "run")

    def full(*_: Any, **__: Any) -> None:
        if run.progress_file("base_train").exists():
            run.request_stop(StopReason.USER, 0.0)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(owner, method, full)
    code, _ = supervise({"base_train": ["step_s:0.05"]}, horizon_spec(1.0), plan=SPEED_PLAN)
    assert code == 75
    assert ("base_train", "step_s:0.05") in acts(run), "the volume was full while it trained"


def test_the_time_between_a_kill_and_the_resume_is_no_training_time(
    supervise: Supervise, tmp_path: Path
) -> None:
    """Killed ten hours ago after ten minutes; the new process has not said a word yet."""
    run = RunDir(tmp_path / "run")
    run.create()
    since = time.time() - 36_600.0
    run.write_outcome(Outcome("base_train", "running", facts={"since": since}))
    run.write_progress("base_train", "train")
    os.utime(run.progress_file("base_train"), (since + 600.0,) * 2)
    horizon = run.path / "stages" / "base_train.horizon.json"
    told: list[Any] = []

    def stop() -> None:
        told.append(read_json(horizon))
        run.request_stop(StopReason.USER, 0.0)

    _when(horizon.exists, stop)
    assert supervise({"base_train": ["stopped_when_asked"]}, horizon_spec(1.0))[0] == 75
    assert told[0]["fraction"] == pytest.approx(600.0 / (600.0 + 3600.0), rel=0.05)


def test_an_outcome_counts_though_the_file_server_is_behind(supervise: Supervise) -> None:
    code, run = supervise({"base_train": ["again", "done_behind"], "report": ["done_behind"]})
    assert code == 0, message(run)


def test_an_evaluation_before_the_end_is_done_again_when_the_run_goes_on(
    supervise: Supervise, tmp_path: Path
) -> None:
    spec = make_spec(
        budget={"max_hours": 1.0},
        mid_train={"num_steps": 1, "total_batch_size": 8, "mixture": {"copying": 1}},
        evaluate={"tasks": ["copying"]},
    )
    plan = {"base_train": ["done"], "mid_train": ["stopped_when_asked", "done"]}
    ends = {"evaluate": ["done"], "report": ["done"]}
    run = RunDir(tmp_path / "run")
    ask = partial(run.request_stop, StopReason.BUDGET, time.time() + 60)
    _when(lambda: run.progress_file("mid_train").exists(), ask)
    assert supervise(plan | ends, spec)[0] == 76
    assert acts(run)[-2:] == [("evaluate", "done"), ("report", "done")]
    assert not run.is_done("evaluate") and not run.is_done("report")
    assert supervise(plan | ends, spec)[0] == 0
    assert run.is_done("evaluate") and run.is_done("report")


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


@pytest.mark.parametrize("phase", ["start", "load", "compile"])
def test_hang_limit_before_the_first_step_follows_the_plan(phase: str) -> None:
    assert hang_limit_s({"phase": phase}, None, planned_step_s=1.0) == 1800.0
    assert hang_limit_s({"phase": phase}, None, planned_step_s=758.0) == 7580.0
    assert hang_limit_s({"phase": phase}, 7200.0, planned_step_s=1.0) == 7200.0


def test_hang_limit_of_looks_and_saves_follows_what_they_take() -> None:
    assert hang_limit_s({"phase": "evaluate"}, None, planned_step_s=758.0) == 7580.0
    assert hang_limit_s({"phase": "save", "save_s": 10.0}, 2.0) == 900.0
    assert hang_limit_s({"phase": "save", "save_s": 1000.0, "median_step_s": 20.0}, 2.0) == 3000.0


def test_a_stage_is_given_the_time_of_a_planned_step(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def limit_s(progress: dict[str, Any], hang_s: float | None, planned_step_s: float) -> float:
        asked.append(planned_step_s)
        return 60.0

    monkeypatch.setattr("infra.supervisor.hang_limit_s", limit_s)
    supervise(ALL_DONE, plan=SPEED_PLAN)
    assert 0.1 in asked


def _other_holder(run: RunDir) -> None:
    run.lease_file.write_text(json.dumps({"id": "1", "host": "c1", "boot": "other", "pid": 7}))


def test_a_run_that_was_taken_over_ends_before_it_writes_more(
    supervise: Supervise, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    taken: dict[str, bytes] = {}

    def take_over() -> None:
        for path in (run.status_file, run.ledger_file, run.lease_file):
            path.unlink(missing_ok=True)
        _other_holder(run)
        taken["lease"] = run.lease_file.read_bytes()

    _when_running(tmp_path, take_over)
    code, _ = supervise({"base_train": ["ignore_stop"]})
    assert code == 77
    assert run.lease_file.read_bytes() == taken["lease"]
    assert not run.ledger_file.exists()
    assert_nothing_runs(run)


def test_a_clock_that_is_set_back_stops_no_look(
    supervise: Supervise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lease, ledger and status go on at once, not when the hour has passed again."""
    run = RunDir(tmp_path / "run")
    right, steps_s = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: right() - steps_s[0])
    monkeypatch.setattr("infra.supervisor.LEDGER_EVERY_S", 0.2)
    monkeypatch.setattr("infra.supervisor.HEARTBEAT_S", 0.2)

    def latest() -> dict[str, float]:
        """When each was written last, by the clock of the supervisor."""
        return {
            "lease": float(json.loads(run.lease_file.read_text())["heartbeat"]),
            "ledger": list(read_jsonl(run.ledger_file))[-1]["time"],
            "status": (run.status() or {})["heartbeat"],
        }

    seen: dict[str, float] = {}

    def set_back() -> None:
        steps_s[0] = 3600.0
        deadline = time.monotonic() + 10
        try:
            while time.monotonic() < deadline:
                seen.update(latest())
                if max(seen.values()) < right() - 1800.0:
                    break
                time.sleep(0.1)
        finally:
            run.request_stop(StopReason.USER, time.time() + 3)

    _when(lambda: run.status_file.exists() and run.ledger_file.exists(), set_back)
    code, _ = supervise({"base_train": ["stopped_when_asked"]})
    assert code == 75
    assert len(seen) == 3
    assert {what for what, moment in seen.items() if moment > right() - 1800.0} == set()


def test_a_signal_while_waiting_for_another_holder_leaves_its_run_alone(
    supervise: Supervise, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    _other_holder(run)
    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    timer.start()
    started = time.monotonic()
    code, _ = supervise(ALL_DONE)
    assert (code, run.stop_request(), run.spec_file.exists()) == (75, None, False)
    assert time.monotonic() - started < 10
    assert json.loads(run.lease_file.read_text())["host"] == "c1"


def _when(condition: Callable[[], bool], act: Callable[[], None]) -> None:
    def wait() -> None:
        deadline = time.monotonic() + 20
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)
        act()

    threading.Thread(target=wait, daemon=True).start()


def _when_running(tmp_path: Path, act: Callable[[], None]) -> None:
    progress = tmp_path / "run" / "stages" / "base_train.progress.json"
    _when(progress.exists, act)


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
