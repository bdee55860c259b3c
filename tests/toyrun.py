"""The toy run of configs/e2e.toml as real processes: start it, kill it, compare what it leaves."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from nanochat.rundir import RunDir, read_json

ROOT = Path(__file__).resolve().parent.parent
STAGES = [
    "data_fetch",
    "tok_train",
    "base_train",
    "mid_train",
    "chat_sft",
    "chat_rl",
    "evaluate",
    "report",
]
TRAINED = ["base_train", "mid_train", "chat_sft", "chat_rl"]


def start(run_dir: Path, *overrides: str) -> subprocess.Popen[str]:
    """The run command, in the background."""
    command = [sys.executable, "entrypoint.py", "run", "@configs/e2e.toml", *overrides]
    return subprocess.Popen(
        [*command, "--run-dir", str(run_dir)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(run_dir: Path, *overrides: str) -> tuple[int, str]:
    """The run command to its end: (exit code, stderr)."""
    process = start(run_dir, *overrides)
    _, err = process.communicate(timeout=600)
    return process.returncode, err


def verb(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Another verb, to its end."""
    command = [sys.executable, "entrypoint.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def weights_digest(run: RunDir, stage: str) -> dict[str, str]:
    """sha256 of every weight file of the latest checkpoint."""
    folder = run.checkpoints_dir(stage)
    manifest = read_json(folder / (folder / "latest").read_text().strip() / "manifest.json")
    assert manifest is not None
    return {k: v["sha256"] for k, v in manifest["files"].items() if k.startswith("model")}


def losses(run: RunDir, stage: str) -> list[tuple[int, float]]:
    return [(m["step"], m["loss"]) for m in run.metrics() if m["stage"] == stage and "loss" in m]


def copy_done_stages(whole: RunDir, run: RunDir, before: str) -> None:
    """A run in which the stages before one are done, as copied from a whole run."""
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


def wait_for(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def kill_tree(process: subprocess.Popen[str]) -> None:
    """SIGKILL for every process of the run, the supervisor first."""
    root = psutil.Process(process.pid)
    tree = [root, *root.children(recursive=True)]
    for victim in tree:
        victim.kill()
    psutil.wait_procs(tree, timeout=10)
    process.communicate()
