"""`nanochat sync`: push what Weights & Biases has written offline, from a machine with network.

W&B marks what it has pushed, so that this may be repeated while the run goes on elsewhere. The key
is taken from WANDB_API_KEY by W&B itself; a run needs neither, its truth is metrics.jsonl.
"""

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from nanochat.rundir import EXIT_DONE, EXIT_SPEC, RunDir
from nanochat.spec import SpecError


@dataclass
class Pushed:
    """What a sync did."""

    run_dir: str
    pushed: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    """Left for another time, because they could not be pushed."""
    exit_code: int = EXIT_DONE

    def render(self) -> str:
        """For people."""
        if not self.pushed and not self.waiting:
            return f"{self.run_dir}: nothing to push"
        lines = [f"pushed: {name}" for name in self.pushed]
        lines += [f"not pushed, try again: {name}" for name in self.waiting]
        return "\n".join(lines)


def push(run_dir: RunDir, command: tuple[str, ...] = (sys.executable, "-m", "wandb")) -> Pushed:
    """Push every offline part of a run. Raises SpecError where W&B or its key is missing."""
    parts = offline_parts(run_dir.path)
    result = Pushed(str(run_dir.path))
    if not parts:
        return result
    if command[0] == sys.executable and importlib.util.find_spec("wandb") is None:
        raise SpecError("W&B is not installed here: pip install 'nanochat-kit[wandb]'")
    if not os.environ.get("WANDB_API_KEY") and not (Path.home() / ".netrc").is_file():
        raise SpecError("W&B has no key here: set WANDB_API_KEY (wandb.ai/authorize shows yours)")
    for part in parts:
        # Its own log goes to the folder `wandb` of the working directory.
        done = subprocess.run(
            [*command, "sync", str(part.resolve())], stdout=sys.stderr, cwd=run_dir.path
        )
        (result.waiting if done.returncode else result.pushed).append(part.name)
    result.exit_code = EXIT_SPEC if result.waiting else EXIT_DONE
    return result


def offline_parts(folder: Path) -> list[Path]:
    """W&B's folders of a run that have not been pushed whole, the oldest first."""
    parts = sorted((folder / "wandb").glob("offline-run-*"))
    return [part for part in parts if not any(part.glob("*.wandb.synced"))]
