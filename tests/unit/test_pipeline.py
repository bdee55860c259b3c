"""The toy run: every stage of configs/e2e.toml for real, killed, stopped, resumed, talked to."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from nanochat.rundir import RunDir, read_json

ROOT = Path(__file__).resolve().parent.parent.parent
STAGES = ["data_fetch", "tok_train", "base_train", "mid_train", "chat_sft", "evaluate", "report"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One home for the module, so that the embedded corpus is made once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def own_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_HOME", str(home))
    return home


def start(run_dir: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "entrypoint.py", "run", "@configs/e2e.toml", *overrides]
    return subprocess.Popen(
        [*command, "--run-dir", str(run_dir)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(run_dir: Path, *overrides: str) -> tuple[int, str]:
    process = start(run_dir, *overrides)
    _, err = process.communicate(timeout=200)
    return process.returncode, err


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunDir]:
    """An uninterrupted toy run."""
    run = RunDir(tmp_path_factory.mktemp("whole") / "run")
    os.environ["NANOCHAT_HOME"] = str(home)
    code, err = finish(run.path)
    assert code == 0, err
    yield run


def weights_digest(run: RunDir, stage: str) -> dict[str, str]:
    """sha256 of every weight file of the latest checkpoint."""
    folder = run.checkpoints_dir(stage)
    manifest = read_json(folder / (folder / "latest").read_text().strip() / "manifest.json")
    assert manifest is not None
    return {k: v["sha256"] for k, v in manifest["files"].items() if k.startswith("model")}


def losses(run: RunDir, stage: str) -> list[tuple[int, float]]:
    return [(m["step"], m["loss"]) for m in run.metrics() if m["stage"] == stage and "loss" in m]


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
    assert scored == {"base_train", "mid_train", "chat_sft"}


def test_it_learns(whole: RunDir) -> None:
    base = whole.outcome("base_train")
    assert base is not None
    assert base.facts["val_bpb_last"] < 0.8 * base.facts["val_bpb_first"]


def test_running_it_again_does_nothing(whole: RunDir) -> None:
    before = whole.metrics_file.read_bytes()
    started = time.monotonic()
    code, err = finish(whole.path)
    assert code == 0, err
    assert whole.metrics_file.read_bytes() == before
    assert time.monotonic() - started < 30


def test_another_spec_is_refused_with_the_field(whole: RunDir) -> None:
    code, err = finish(whole.path, "base_train.num_steps=61")
    assert code == 78
    assert "base_train.num_steps: 60 -> 61" in err


def test_two_runs_in_one_directory(whole: RunDir, tmp_path: Path) -> None:
    first = start(tmp_path / "run")
    try:
        _wait_for(lambda: (tmp_path / "run" / "lease.json").exists())
        code, err = finish(tmp_path / "run")
        assert code == 78
        assert "in use by pid" in err
    finally:
        _kill_tree(first)


@pytest.mark.parametrize("stage", ["data_fetch", "tok_train", "base_train", "mid_train",
                                   "chat_sft", "evaluate", "report"])  # fmt: skip
def test_killed_in_any_stage_it_finishes_with_the_same_bits(
    whole: RunDir, tmp_path: Path, stage: str
) -> None:
    run = RunDir(tmp_path / "run")
    _copy_done_stages(whole, run, before=stage)
    process = start(run.path, "budget.checkpoint_every_s=5.0")
    _wait_for(lambda: run.progress_file(stage).exists() or run.is_done(stage))
    if stage in ("base_train", "mid_train", "chat_sft"):
        after = random.Random(stage).randint(1, 15)
        _wait_for(lambda: (run.progress(stage).get("step") or 0) >= after or run.is_done(stage))
    _kill_tree(process)
    code, err = finish(run.path)
    assert code == 0, err
    for trained in ("base_train", "mid_train", "chat_sft"):
        assert weights_digest(run, trained) == weights_digest(whole, trained)
        assert losses(run, trained) == losses(whole, trained)


def test_ctrl_c_saves_and_says_how_to_resume(whole: RunDir, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    _copy_done_stages(whole, run, before="base_train")
    process = start(run.path)
    _wait_for(lambda: (run.progress("base_train").get("step") or 0) >= 3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "run the same command again to resume" in err
    outcome = run.outcome("base_train")
    assert outcome is not None and outcome.outcome == "stopped"
    assert (run.checkpoints_dir("base_train") / "latest").exists()
    code, err = finish(run.path)
    assert code == 0, err
    assert weights_digest(run, "base_train") == weights_digest(whole, "base_train")
    assert losses(run, "base_train") == losses(whole, "base_train")


def test_a_corrupt_checkpoint_is_walked_over_loudly(whole: RunDir, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    _copy_done_stages(whole, run, before="mid_train")
    run.outcome_file("base_train").unlink()
    folder = run.checkpoints_dir("base_train")
    newest = folder / (folder / "latest").read_text().strip()
    victim = max(newest.glob("model*"), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    code, err = finish(run.path)
    assert code == 0, err
    events = [m["message"] for m in run.metrics() if m.get("event") == "corrupt_checkpoint"]
    assert events and newest.name in " ".join(events)
    assert weights_digest(run, "base_train") == weights_digest(whole, "base_train")


def test_an_unwritable_home_is_78(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path / "file" / "home"))
    out = subprocess.run(
        [sys.executable, "entrypoint.py", "run", "@configs/e2e.toml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 78
    assert "Traceback" not in out.stderr and "NANOCHAT_HOME" in out.stderr


def test_chat_answers_a_prompt(whole: RunDir) -> None:
    out = subprocess.run(
        [sys.executable, "entrypoint.py", "chat", str(whole.path), "--prompt", "Repeat: a b"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr


def test_status_tells_progress_and_exit_code(whole: RunDir) -> None:
    command = [sys.executable, "entrypoint.py", "status", str(whole.path), "--json"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0
    assert json.loads(out.stdout)["state"] == "SUCCEEDED"


def _copy_done_stages(whole: RunDir, run: RunDir, before: str) -> None:
    """A run in which the stages before one are done, as copied from the whole run."""
    run.create()
    done = STAGES[: STAGES.index(before)]
    shutil.copy(whole.spec_file, run.spec_file)
    shutil.copy(whole.plan_file, run.plan_file)
    for stage in done:
        shutil.copy(whole.outcome_file(stage), run.outcome_file(stage))
        if whole.checkpoints_dir(stage).exists():
            shutil.copytree(whole.checkpoints_dir(stage), run.checkpoints_dir(stage))
    if "tok_train" in done:
        shutil.copytree(whole.tokenizer_dir, run.tokenizer_dir)
    lines = [json.loads(line) for line in whole.metrics_file.read_text().splitlines()]
    kept = [m for m in lines if m["stage"] in done and "task" not in m]
    run.metrics_file.write_text("".join(json.dumps(m) + "\n" for m in kept))


def _wait_for(condition, timeout_s: float = 60.0) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def _kill_tree(process: subprocess.Popen[str]) -> None:
    """SIGKILL for every process of the run, the supervisor first."""
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for victim in tree:
        victim.kill()
    psutil.wait_procs(tree, timeout=10)
    process.communicate()
