"""The toy run: every stage of configs/e2e.toml for real, and what the verbs say of it."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat.rundir import RunDir
from tests.toyrun import STAGES, finish, kill_tree, start, verb, wait_for

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One home for the module, so that the embedded corpus is made once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def own_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_HOME", str(home))
    return home


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunDir]:
    """An uninterrupted toy run."""
    run = RunDir(tmp_path_factory.mktemp("whole") / "run")
    os.environ["NANOCHAT_HOME"] = str(home)
    code, err = finish(run.path)
    assert code == 0, err
    yield run


def test_every_stage_is_done_and_leaves_what_the_contract_names(whole: RunDir) -> None:
    assert [s for s in STAGES if whole.is_done(s)] == STAGES
    for name in ("spec.json", "plan.json", "ledger.jsonl", "metrics.jsonl", "report.md",
                 "report.html"):  # fmt: skip
        assert (whole.path / name).stat().st_size > 0, name
    status = whole.status()
    assert status is not None
    assert (status["state"], status["exit_code"]) == ("SUCCEEDED", 0)
    metrics = whole.metrics()
    steps = [m["step"] for m in metrics if m["stage"] == "base_train" and "val_bpb" in m]
    assert steps[0] == 0 and steps[-1] == 60
    scored = {m["stage"] for m in metrics if "task" in m}
    assert scored == {"base_train", "mid_train", "chat_sft", "chat_rl"}


def test_it_learns(whole: RunDir) -> None:
    base = whole.outcome("base_train")
    assert base is not None
    assert base.facts["val_bpb_last"] < 0.8 * base.facts["val_bpb_first"]


def test_running_it_again_does_nothing(whole: RunDir) -> None:
    before = whole.metrics_file.read_bytes()
    code, err = finish(whole.path)
    assert code == 0, err
    assert whole.metrics_file.read_bytes() == before


def test_another_spec_is_refused_with_the_field(whole: RunDir) -> None:
    code, err = finish(whole.path, "base_train.num_steps=61")
    assert code == 78
    assert "base_train.num_steps: 60 -> 61" in err


def test_two_runs_in_one_directory(whole: RunDir, tmp_path: Path) -> None:
    first = start(tmp_path / "run")
    try:
        wait_for((tmp_path / "run" / "lease.json").exists)
        code, err = finish(tmp_path / "run")
        assert code == 78
        assert "in use by pid" in err
    finally:
        kill_tree(first)


def test_an_unwritable_home_is_78(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path / "file" / "home"))
    out = verb("run", "@configs/e2e.toml")
    assert out.returncode == 78
    assert "Traceback" not in out.stderr and "NANOCHAT_HOME" in out.stderr


def test_chat_answers_a_prompt(whole: RunDir) -> None:
    out = verb("chat", str(whole.path), "--prompt", "Repeat: a b")
    assert out.returncode == 0, out.stderr


def test_status_tells_progress_and_exit_code(whole: RunDir) -> None:
    out = verb("status", str(whole.path), "--json")
    assert out.returncode == 0
    assert json.loads(out.stdout)["state"] == "SUCCEEDED"
