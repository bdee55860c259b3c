"""A base_train run on two ranks under supervisor and torchrun, small, as real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from nanochat.checkpoint_dir import CheckpointDir
from nanochat.rundir import RunDir, read_jsonl
from tests.toyrun import ROOT, wait_for

STAGE = "base_train"
SAVE_EVERY_STEPS = 10
CONFIG = """
name = "faults"
seed = 3
offer = "cpu"
stop_grace_s = {grace_s}

[budget]
max_hours = 10.0

[checkpoint]
keep_last = 3
free_floor_gib = 0.1

[model]
depth = 1
aspect_ratio = 32
head_dim = 32
seq_len = 64
vocab_size = 300

[runtime]
compile = false
num_threads = 1
num_ranks = 2
tensorboard = false

[data_fetch]

[tok_train]
max_chars = 200_000

[base_train]
num_steps = {num_steps}
total_batch_size = 2048
eval_every_steps = 10
eval_tokens = {eval_tokens}
sample_every_steps = 1_000_000
"""


class FaultyRun:
    """A run directory and what the faults in it record."""

    def __init__(
        self, folder: Path, num_steps: int, eval_tokens: int = 4096, grace_s: float = 8.0
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.run = RunDir(folder / "run")
        self.num_steps = num_steps
        (folder / "faults.toml").write_text(
            CONFIG.format(num_steps=num_steps, eval_tokens=eval_tokens, grace_s=grace_s)
        )

    def start(self, **plan: Any) -> subprocess.Popen[str]:
        """`run` in the background, with the faults of a plan (see inject)."""
        (self.folder / "paused").unlink(missing_ok=True)
        (self.folder / "plan.json").unlink(missing_ok=True)
        if plan:
            (self.folder / "plan.json").write_text(json.dumps(plan))
        # where the stage's last process had come to is not what this one has
        self.run.progress_file(STAGE).unlink(missing_ok=True)
        command = [sys.executable, "entrypoint.py", "run", f"@{self.folder / 'faults.toml'}"]
        python_path = f"{ROOT / 'tests' / 'faults'}:{ROOT}"
        with open(self.folder / "stderr.txt", "a") as log:
            return subprocess.Popen(
                [*command, "--run-dir", str(self.run.path)],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=log,
                text=True,
                env={
                    **os.environ,
                    "FAULTS": str(self.folder),
                    "NANOCHAT_HOME": str(self.folder / "home"),
                    "PYTHONPATH": python_path,
                },
            )

    def finish(self) -> None:
        """`run` to its end."""
        code = self.start().wait(timeout=600)
        assert code == 0, (self.folder / "stderr.txt").read_text()

    def wait_for_step(self, process: subprocess.Popen[str], step: int) -> None:
        """Until the stage has begun that step, or the run has ended."""
        wait_for(lambda: self.step >= step or process.poll() is not None, timeout_s=300)

    @property
    def step(self) -> int:
        """Steps of the present process of the stage, -1 before it has loaded."""
        progress = self.run.progress(STAGE)
        return int(progress.get("step", -1)) if progress.get("phase") != "load" else -1

    @property
    def phase(self) -> str:
        return str(self.run.progress(STAGE).get("phase", ""))

    def complete_steps(self) -> list[int]:
        """Steps with a complete checkpoint, also one that was just being replaced."""
        folder = self.run.checkpoints_dir(STAGE)
        replaced = [int(p.name[6:-4]) for p in folder.glob(".step_*.old")]
        return sorted({*(m.step for m in CheckpointDir(folder).complete()), *replaced})

    def events(self, kind: str) -> list[str]:
        if not self.run.metrics_file.exists():
            return []
        lines = read_jsonl(self.run.metrics_file)
        return [m["message"] for m in lines if m.get("event") == kind and m["stage"] == STAGE]

    def drawn(self) -> list[list[dict[str, Any]]]:
        """Batches that were drawn, one list per process that drew any."""
        by_pid: dict[int, list[dict[str, Any]]] = {}
        for line in read_jsonl(self.folder / "drawn.jsonl"):
            by_pid.setdefault(line["pid"], []).append(line)
        return list(by_pid.values())

    def save_in_flight(self) -> int | None:
        """Step of the oldest save that the last process to ask for any has not completed."""
        if not (self.folder / "saves.jsonl").exists():
            return None
        lines = list(read_jsonl(self.folder / "saves.jsonl"))
        last = [line for line in lines if line["pid"] == lines[-1]["pid"]]
        complete = [line["step"] for line in last if line["is_complete"]]
        asked = [line["step"] for line in last if not line["is_complete"]]
        return min((step for step in asked if step not in complete), default=None)

    def is_alive(self) -> bool:
        """Whether any process of the run is left."""
        return any(str(self.run.path) in " ".join(_command(p)) for p in psutil.process_iter())


def _command(process: psutil.Process) -> list[str]:
    try:
        return [] if process.status() == psutil.STATUS_ZOMBIE else process.cmdline()
    except psutil.Error:
        return []
