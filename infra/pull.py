"""`pull`: the weights of a run without optimizer state, from a folder or over ssh.

* `RUN_DIR` is a run of this machine, or `[ssh://]user@host[:port]:PATH` of any other.
* A broken line goes on where it stopped; what arrives is compared with the sha256 of the
  checkpoint's manifest before the manifest is written, so that half a model is never taken for one.
* The result is a run directory: chat, serve, export and report take it as they take the original.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from nanochat.checkpoint_dir import (
    MANIFEST,
    MODEL_FILES,
    STATE_FILE,
    Manifest,
    best_of,
    step_name,
)
from nanochat.rundir import RunDirError, atomic_write_text, find_run
from nanochat.spec import WEIGHT_STAGES

BESIDE = ("spec.json", "plan.json", "resolved.jsonl", "metrics.jsonl", "report.md", "report.html")
FOLDERS = ("tokenizer", "report", "stages")
"""What chat, serve, export and report read beside the weights."""
ATTEMPTS = 5
REMOTE = re.compile(r"(?:ssh://)?(?P<host>[\w.-]+@[\w.-]+)(?::(?P<port>\d+))?:(?P<path>[/~].*)")


@dataclass(frozen=True)
class Pulled:
    """What has been brought."""

    run_dir: str
    stage: str
    step: int
    val_bpb: float | None
    bytes: int

    def render(self) -> str:
        loss = "" if self.val_bpb is None else f", val_bpb {self.val_bpb:.4f}"
        return (
            f"{self.stage} step {self.step}{loss}: {self.bytes / 1e9:.2f} GB, verified. "
            f"Talk to it: nanochat chat {self.run_dir}"
        )


class Source(Protocol):
    """Files of a run, wherever it is; paths are relative to it. Raises RunDirError."""

    def files(self, folder: str, deep: bool = True) -> list[str]:
        """deep: also those in folders below it."""
        ...

    def copy(self, file: str, to: Path) -> None: ...


class Folder:
    """A run on this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def files(self, folder: str, deep: bool = True) -> list[str]:
        found = (self.path / folder).glob("**/*" if deep else "*")
        return sorted(str(p.relative_to(self.path)) for p in found if p.is_file())

    def copy(self, file: str, to: Path) -> None:
        try:
            shutil.copyfile(self.path / file, to)
        except OSError as e:
            raise RunDirError(f"{self.path / file} cannot be copied: {e.strerror}") from None


class Host:
    """A run on another machine, by ssh; nothing but a shell is needed there."""

    def __init__(self, command: list[str], path: str) -> None:
        self.command = command
        self.path = path

    def files(self, folder: str, deep: bool = True) -> list[str]:
        root, depth = _shell_path(self.path), "" if deep else "-maxdepth 1 "
        script = f"cd {root} && {{ [ ! -d {folder} ] || find {folder} {depth}-type f; }}"
        done = subprocess.run([*self.command, script], capture_output=True, check=False)
        if done.returncode:
            raise RunDirError(
                f"{' '.join(self.command)} {self.path}: {done.stderr.decode().strip()[-300:]}"
            )
        return sorted(done.stdout.decode().splitlines())

    def copy(self, file: str, to: Path) -> None:
        """A part that is there already is kept; the sha256 finds out if it is another file's."""
        source = f"{_shell_path(self.path)}/{shlex.quote(file)}"
        for _ in range(ATTEMPTS):
            have = to.stat().st_size if to.exists() else 0
            with open(to, "ab") as f:
                done = subprocess.run(
                    [*self.command, f"tail -c +{have + 1} {source}"], stdout=f, check=False
                )
            if done.returncode == 0:
                return
        raise RunDirError(f"{self.path}/{file} does not come through; the same command goes on")


def open_source(run: str, ssh_options: list[str] | None = None) -> Source:
    """The run as the command line names it. Raises RunDirError."""
    if found := REMOTE.fullmatch(run):
        port = ["-p", found["port"]] if found["port"] else []
        command = ["ssh", "-o", "ConnectTimeout=15", *(ssh_options or []), *port, found["host"]]
        return Host(command, found["path"].rstrip("/"))
    return Folder(find_run(run).path)


def is_at(source: Source, to: Path) -> bool:
    """Whether the run is in that very folder."""
    return isinstance(source, Folder) and source.path.resolve() == to.resolve()


def pull(
    source: Source, to: Path, best: bool, say: Callable[[str], object] = sys.stderr.write
) -> Pulled:
    """Bring one checkpoint's weights and what belongs to them. Raises RunDirError.

    best: the lowest validation loss of the last stage that has weights, else its newest step.
    """
    if is_at(source, to):
        raise RunDirError(f"{to} is the run itself: --to takes another folder")
    to.mkdir(parents=True, exist_ok=True)
    stage, manifest = _choose(source, to, best)
    folder = f"checkpoints/{stage}/{step_name(manifest.step)}"
    target = to / folder
    target.mkdir(parents=True, exist_ok=True)
    kept = {
        name: record
        for name, record in manifest.files.items()
        if name.startswith(MODEL_FILES) or name == STATE_FILE
    }
    weights = replace(manifest, kind="weights", files=kept)
    for name, record in kept.items():
        say(f"{name}: {record.size / 1e6:.1f} MB\n")
        _bring_checked(source, weights, folder, name, target)
    there = {file.removeprefix("./") for file in source.files(".", deep=False)}
    if "spec.json" not in there:
        raise RunDirError("this run has no spec.json")
    below = [file for folder in FOLDERS for file in source.files(folder)]
    for file in (*(file for file in BESIDE if file in there), *below):
        (to / file).parent.mkdir(parents=True, exist_ok=True)
        (to / file).unlink(missing_ok=True)
        try:
            source.copy(file, to / file)
        except RunDirError:
            if file == "spec.json":
                raise
            (to / file).unlink(missing_ok=True)
    (target / MANIFEST).write_bytes(weights.encode())
    for pointer in ("latest", "best"):
        atomic_write_text(to / "checkpoints" / stage / pointer, step_name(manifest.step) + "\n")
    return Pulled(str(to), stage, manifest.step, manifest.val_bpb, weights.size)


def _choose(source: Source, to: Path, best: bool) -> tuple[str, Manifest]:
    """(last stage with weights, its manifest)."""
    there = source.files("checkpoints")
    for stage in reversed(WEIGHT_STAGES):
        names = [
            f
            for f in there
            if re.fullmatch(rf"checkpoints/{stage}/step_\d+/{re.escape(MANIFEST)}", f)
        ]
        found = []
        for name in names:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / name).unlink(missing_ok=True)
            source.copy(name, to / name)
            found.append(Manifest.read((to / name).parent))
            (to / name).unlink()  # it comes back when its files are there
        for name in names:
            folder = (to / name).parent
            if not any(folder.iterdir()):
                folder.rmdir()
        if found:
            newest = max(found, key=lambda m: m.step)
            return stage, (best_of(found) or newest) if best else newest
    raise RunDirError("this run has no complete checkpoint yet")


def _bring_checked(
    source: Source, manifest: Manifest, folder: str, name: str, target: Path
) -> None:
    """One file, verified; a wrong one is brought once more from its start."""
    for attempt in range(2):
        source.copy(f"{folder}/{name}", target / name)
        try:
            manifest.check(target, [name], sha256=True)
            return
        except RunDirError:
            (target / name).unlink(missing_ok=True)
            if attempt:
                raise


def _shell_path(path: str) -> str:
    """Quoted, but with a leading ~ left to the shell there."""
    if path.startswith("~/"):
        return "~/" + shlex.quote(path[2:])
    return shlex.quote(path)
