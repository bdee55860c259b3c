"""The run directory: files that survive kills, one writer, derived metrics."""

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.rundir import (
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


def changed(**sections: Any) -> RunSpec:
    return RunSpec.model_validate(SPEC.model_dump() | sections)


def test_another_machine_may_resume_and_is_noted(run: RunDir) -> None:
    run.freeze_spec(SPEC)
    before = run.spec_file.read_bytes()
    here = changed(offer="4xH100-SXM", runtime={"num_ranks": 4}, budget={"max_usd": 9.0})
    run.freeze_spec(here)
    run.freeze_spec(here)
    assert run.spec() == here
    assert run.spec_file.read_bytes() == before
    [note] = run.resolved("spec")
    assert "runtime.num_ranks: null -> 4" in note["changes"]
    with pytest.raises(RunDirError, match="model.depth: 2 -> 3") as refused:
        run.freeze_spec(changed(model={"depth": 3}, runtime={"num_ranks": 2}))
    assert "num_ranks" not in str(refused.value)
    run.freeze_spec(SPEC)
    assert run.spec() == SPEC
    assert len(run.resolved("spec")) == 2


def test_a_budget_that_is_the_horizon_is_part_of_the_schedule(run: RunDir) -> None:
    base = {"horizon": "budget", "total_batch_size": 2048}
    spec = changed(base_train=base, budget={"max_hours": 1.0})
    run.freeze_spec(spec)
    with pytest.raises(RunDirError, match="budget.max_hours: 1.0 -> 2.0"):
        run.freeze_spec(changed(base_train=base, budget={"max_hours": 2.0}))
    run.freeze_spec(changed(base_train=base, budget={"max_hours": 1.0, "usd_per_hour": 3.0}))
    run.write_outcome(Outcome(stage="base_train", outcome="done"))
    run.freeze_spec(changed(base_train=base, budget={"max_hours": 2.0}))
    assert run.spec().budget.max_hours == 2.0


def test_the_plan_of_the_last_machine_holds(run: RunDir) -> None:
    first = {"offer": "8xH100-SXM", "world_size": 8, "usd_per_hour": 21.5, "hours": 4.0}
    run.freeze_plan(first)
    run.freeze_plan(first | {"hours": 4.1})  # a forecast; the machine is the same
    assert run.plan() == first and run.resolved("plan") == []
    second = first | {"offer": "4xH100-SXM", "world_size": 4}
    run.freeze_plan(second)
    assert run.plan() == second
    assert read_json(run.plan_file) == first


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [
        (errno.ENOSPC, 78, "is full"),
        (errno.EDQUOT, 78, "is full"),
        (errno.EROFS, 78, "read-only"),
        (errno.ESTALE, 77, "is gone"),
        (errno.EIO, 77, "is gone"),
    ],
)
def test_trouble_with_the_volume(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, number: int, code: int, says: str
) -> None:
    assert run.volume_trouble() is None

    def fail(path: Path, text: str) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("nanochat.rundir.atomic_write_text", fail)
    trouble = run.volume_trouble()
    assert trouble is not None
    assert trouble[0] == code and says in trouble[1] and "last complete checkpoint" in trouble[1]


def test_a_volume_that_is_not_mounted_any_more(tmp_path: Path) -> None:
    trouble = RunDir(tmp_path / "gone").volume_trouble()
    assert trouble is not None and trouble[0] == 77 and "No such file" in trouble[1]


def test_progress_on_a_full_volume_is_still_a_sign_of_life(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run.last_sign_s("base_train") is None
    run.write_progress("base_train", "train", step=3)
    os.utime(run.progress_file("base_train"), (1000.0, 1000.0))

    def full(self: Path, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    run.write_progress("base_train", "train", step=4)
    assert run.progress("base_train")["step"] == 3
    sign_s = run.last_sign_s("base_train")
    assert sign_s is not None and abs(time.time() - sign_s) < 60


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


@pytest.mark.parametrize(
    "resume",
    [
        {"event": "start", "message": "from step 2", "step": 2},
        {"event": "rollback", "message": "a spike", "step": 4, "resume_step": 2},
    ],
)
def test_what_lies_behind_the_checkpoint_gone_on_from_is_left_out(
    run: RunDir, resume: dict[str, Any]
) -> None:
    """The stage ended at step 3, once it had been at step 4."""
    before: list[dict[str, Any]] = [
        *({"stage": "s", "step": step, "loss": 1.0} for step in range(1, 5)),
        {"stage": "s", "step": 4, "val_bpb": 1.0},
        {"stage": "s", "step": 4, "event": "warning", "message": "a slow step"},
        {"stage": "other", "step": 4, "loss": 1.0},
        {"stage": "s", "task": "a", "metric": "accuracy", "value": 0.1},
    ]
    after = {"stage": "s", "step": 3, "loss": 2.0}
    resume = {"stage": "s"} | resume
    for record in (*before, resume, after):
        append_jsonl(run.metrics_file, record)
    assert run.metrics() == [*before[:2], *before[5:], resume, after]


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
