"""The run directory: files that survive kills, one writer, derived metrics."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.rundir import (
    Lease,
    LeaseLost,
    Outcome,
    RunDir,
    RunDirError,
    StopReason,
    append_jsonl,
    atomic_write_json,
    cut_torn_tail,
    find_run,
    nanochat_home,
    read_json,
    read_jsonl,
)
from nanochat.spec import Model, RunSpec


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    return run


SPEC = RunSpec(name="x", model=Model(depth=2))


def test_spec_is_frozen_and_another_one_is_refused_by_field(run: RunDir) -> None:
    run.freeze_spec(SPEC)
    run.freeze_spec(SPEC)
    before = run.spec_file.read_bytes()
    with pytest.raises(RunDirError, match="model.depth: 2 -> 3"):
        run.freeze_spec(RunSpec(name="x", model=Model(depth=3)))
    assert run.spec_file.read_bytes() == before


@given(st.lists(st.dictionaries(st.text(max_size=5), st.integers()), max_size=8), st.data())
def test_a_torn_tail_loses_only_the_torn_line(tmp_path_factory, records, data) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp("torn") / "log.jsonl"
    for record in records:
        append_jsonl(path, record)
    whole = path.read_bytes() if records else b""
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    complete = whole[:cut].count(b"\n")
    cut_torn_tail(path)
    append_jsonl(path, {"after": 1})
    assert list(read_jsonl(path)) == [*records[:complete], {"after": 1}]


def test_atomic_write_leaves_no_other_file(run: RunDir) -> None:
    atomic_write_json(run.path / "a.json", {"x": 1})
    atomic_write_json(run.path / "a.json", {"x": 2})
    assert read_json(run.path / "a.json") == {"x": 2}
    assert [p.name for p in run.path.iterdir() if "tmp" in p.name] == []


def test_last_metric_line_per_stage_step_and_kind_wins(run: RunDir) -> None:
    for record in (
        {"stage": "s", "step": 1, "loss": 3.0, "time_s": 1},
        {"stage": "s", "step": 1, "val_bpb": 2.0, "time_s": 1},
        {"stage": "s", "step": 2, "loss": 2.0, "time_s": 2},
        {"stage": "s", "step": 1, "loss": 2.5, "time_s": 3, "gpu_util": 99},
        {"stage": "s", "task": "a", "metric": "accuracy", "value": 0.1},
        {"stage": "s", "task": "a", "metric": "accuracy", "value": 0.9},
    ):
        append_jsonl(run.metrics_file, record)
    lines = run.metrics()
    assert [m["loss"] for m in lines if m.get("step") == 1 and "loss" in m] == [2.5]
    assert [m["val_bpb"] for m in lines if "val_bpb" in m] == [2.0]
    assert [m["value"] for m in lines if "task" in m] == [0.9]


def test_one_writer_per_run_directory(run: RunDir) -> None:
    first, second = Lease(run), Lease(run)
    first.acquire()
    with pytest.raises(RunDirError, match=f"in use by pid {os.getpid()}.*nanochat stop"):
        second.acquire()
    first.renew()
    first.release()
    second.acquire()
    with pytest.raises(LeaseLost):
        first.renew()


def test_a_lease_of_a_dead_process_is_over(run: RunDir) -> None:
    code = (
        "import sys; from nanochat.rundir import *; "
        "Lease(RunDir(sys.argv[1])).acquire(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(run.path)], check=True)
    assert run.lease_file.exists()
    Lease(run).acquire()


def test_a_lease_of_another_machine_is_over_when_its_heartbeat_stands_still(run: RunDir) -> None:
    holder = {"id": "1", "host": "c1", "boot": "other", "pid": 1, "heartbeat": time.time()}
    atomic_write_json(run.lease_file, holder)
    with pytest.raises(RunDirError, match="c1"):
        Lease(run).acquire()
    atomic_write_json(run.lease_file, holder | {"heartbeat": time.time() - 61})
    Lease(run).acquire()
    run.lease_file.write_text("{broken")
    Lease(run).acquire()


def test_an_unwritable_place_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="--run-dir"):
        RunDir(tmp_path / "file" / "run").create()


def test_stop_and_outcome_round_trip(run: RunDir) -> None:
    assert run.stop_request() is None
    run.request_stop(StopReason.BUDGET, 12.5)
    request = run.stop_request()
    assert request is not None
    assert (request.reason, request.deadline_s) == (StopReason.BUDGET, 12.5)
    run.clear_stop()
    assert run.stop_request() is None
    outcome = Outcome(stage="base_train", outcome="done", step=3, facts={"a": 1})
    run.write_outcome(outcome)
    assert run.outcome("base_train") == outcome
    assert run.is_done("base_train") and not run.is_done("mid_train")
    run.outcome_file("base_train").write_text('{"stage": "ba')
    assert run.outcome("base_train") is None


def test_home_is_the_variable_then_a_mounted_workspace_then_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path))
    assert nanochat_home() == tmp_path
    monkeypatch.delenv("NANOCHAT_HOME")
    monkeypatch.setattr(os.path, "ismount", lambda p: p == "/workspace")
    assert nanochat_home() == Path("/workspace/nanochat")
    monkeypatch.setattr(os.path, "ismount", lambda p: False)
    assert nanochat_home() == Path.home() / ".cache" / "nanochat"


def test_find_run_by_path_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path))
    run = RunDir(tmp_path / "runs" / "mine")
    run.create()
    run.freeze_spec(SPEC)
    assert find_run("mine").path == run.path
    assert find_run(run.path).path == run.path
    with pytest.raises(RunDirError, match="runs in .*: mine"):
        find_run("yours")
    assert json.loads(run.spec_file.read_text())["name"] == "x"
