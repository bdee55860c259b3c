"""Every file from outside that the stages of a spec will open: one list for preflight and fetch."""

from dataclasses import dataclass
from pathlib import Path

from nanochat.rundir import IMAGE_DATA, nanochat_home
from nanochat.spec import GENERATED_TASKS, RunSpec

LAST_SHARD = 1_822
"""The validation shard of karpathy/fineweb-edu-100b-shuffle."""


@dataclass(frozen=True)
class Touch:
    """A file that a stage opens."""

    stage: str
    path: str
    """Relative to a data folder, or absolute for a file of the user's own."""

    def found(self) -> Path | None:
        """Where it lies: in the image first, then below NANOCHAT_HOME."""
        for root in (IMAGE_DATA, nanochat_home() / "data"):
            if (root / self.path).exists():
                return root / self.path
        return None


def required_files(spec: RunSpec) -> list[Touch]:
    """Files of every stage that is switched on, in run order."""
    touches = []
    reader = "tok_train" if spec.tok_train is not None else "base_train"
    if spec.data.source == "fineweb_edu" and getattr(spec, reader) is not None:
        numbers = (*range(spec.data.num_shards), LAST_SHARD)
        touches += [Touch(reader, f"fineweb_edu/shard_{n:05d}.parquet") for n in numbers]
    if spec.data.source == "text" and spec.data.path is not None:
        touches.append(Touch(reader, str(Path(spec.data.path).absolute())))
    for name in ("mid_train", "chat_sft"):
        stage = getattr(spec, name)
        for task in stage.mixture if stage is not None else ():
            touches += _task(name, task)
    if spec.chat_rl is not None:
        touches += _task("chat_rl", spec.chat_rl.task)
    for task in spec.evaluate.tasks if spec.evaluate is not None else ():
        touches += _task("evaluate", task)
    return touches


def _task(stage: str, task: str) -> list[Touch]:
    return [] if task in GENERATED_TASKS else [Touch(stage, f"{task}/data.lock.json")]


def missing_files(spec: RunSpec) -> dict[str, list[str]]:
    """Files that are not there, by the stage that opens them first."""
    found: dict[str, list[str]] = {}
    for touch in required_files(spec):
        if touch.found() is None and not _is_cut(spec, touch):
            found.setdefault(touch.stage, []).append(touch.path)
    return found


def _is_cut(spec: RunSpec, touch: Touch) -> bool:
    """Whether shards were already made from a text file that has since gone."""
    if spec.data.source != "text" or spec.data.path is None or touch.path.endswith(".json"):
        return False
    stem = Path(spec.data.path).stem
    folders = (nanochat_home() / "data" / "text").glob(f"{stem}-*")
    return any((folder / "data.lock.json").exists() for folder in folders)
