"""The checkpoints of one stage on the disk: what is complete, what is damaged, what is kept.

    step_000123/           complete only if manifest.json stands in it and names all its files
    step_000123.damaged/   failed its check on load; first to go when space is short
    .step_000123.tmp/      being written          .step_000123.deleted/   being removed
    .step_000123.old/      the former one of the same step, until the new one stands
    latest, best           name of a step; derived from the manifests, replaced atomically;
                           latest is full, unless only weights are left

* A manifest carries the sha256 of itself and of every file, so that any flipped bit is found.
* What pruning keeps is one pure function, `steps_to_keep`; the newest checkpoint from which a run
  can be resumed is always among it.

No torch here, also indirectly: a report or `pull` can read manifests without it.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from nanochat.rundir import RunDirError
from nanochat.spec import CheckpointPolicy
from nanochat.storage import FileRecord, Storage, sha256_of

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
STATE_FILE = "state.json"
MODEL_FILES = "model-"
"""Prefix of the files that stay when a checkpoint is thinned to its weights."""
GIB = 1 << 30

Kind = Literal["full", "weights"]
log = logging.getLogger(__name__)


class CheckpointError(RunDirError):
    """A checkpoint cannot be written or loaded; the message says where, why and what to do."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint is not what its manifest says, or has no manifest."""


@dataclass(frozen=True)
class Manifest:
    """manifest.json: the last file of a checkpoint; without it there is no checkpoint."""

    step: int
    kind: Kind
    """full: a run can be resumed from it; weights: only the model is left."""
    world_size: int
    cursor: Any
    """Position in the data after this step (JSON), as the loader gave it."""
    files: dict[str, FileRecord]
    time: str
    """Moment of the save: ISO 8601, UTC."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Such as val_bpb; only finite numbers."""
    format_version: int = FORMAT_VERSION

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(record.size for record in self.files.values())

    @property
    def hours(self) -> float:
        """Moment of the save in hours since 1970."""
        return datetime.fromisoformat(self.time).timestamp() / 3600

    @property
    def val_bpb(self) -> float | None:
        return self.metrics.get("val_bpb")

    def encode(self) -> bytes:
        """JSON with the sha256 of all other fields as last field."""
        fields = asdict(self)
        return (json.dumps({**fields, "sha256": _digest(fields)}, indent=1) + "\n").encode()

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a checkpoint. Raises DamagedCheckpoint."""
        try:
            fields = json.loads((folder / MANIFEST).read_bytes())
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{folder} has no {MANIFEST}") from None
        except (ValueError, OSError) as e:
            raise DamagedCheckpoint(f"{folder / MANIFEST} is unreadable ({e})") from None
        if not isinstance(fields, dict) or fields.pop("sha256", None) != _digest(fields):
            raise DamagedCheckpoint(f"{folder / MANIFEST} was changed: its own sha256 differs")
        if fields["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"{folder} has format version {fields['format_version']}, this program reads "
                f"{FORMAT_VERSION}: load it with the release that wrote it"
            )
        files = {name: FileRecord(**record) for name, record in fields.pop("files").items()}
        manifest = cls(**fields, files=files)
        if folder.name.startswith("step_") and folder.name != step_name(manifest.step):
            raise DamagedCheckpoint(f"{folder} holds the manifest of step {manifest.step}")
        return manifest

    def check(self, folder: Path, names: Iterable[str], sha256: bool) -> None:
        """Compare files with what was written. Raises DamagedCheckpoint that names the file.

        The hash of the index is always compared: it says where everything else lies.
        """
        for name in names:
            record, path = self.files[name], folder / name
            try:
                size = path.stat().st_size
                if size != record.size:
                    raise DamagedCheckpoint(f"{path} has {size} bytes, written were {record.size}")
                if (sha256 or name == STATE_FILE) and sha256_of(path) != record.sha256:
                    raise DamagedCheckpoint(f"{path} was changed: its sha256 differs")
            except OSError as e:
                raise DamagedCheckpoint(f"{path} is unreadable ({e.strerror})") from None


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def utc_now() -> str:
    """This moment as ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def step_name(step: int) -> str:
    """Name of a step's folder."""
    return f"step_{step:06d}"


def steps_to_keep(
    manifests: list[Manifest], policy: CheckpointPolicy, coming: int = 0
) -> tuple[set[int], set[int]]:
    """What pruning leaves: (all kept steps, those of them that stay as they are).

    manifests: of the complete checkpoints; coming: how many are about to be written and take a
    place among the last ones. The newest full checkpoint is always kept as it is. With
    `thin_old` the rest of the kept ones (best, one per N hours) loses its optimizer state.
    """
    by_step = sorted(manifests, key=lambda m: m.step)
    full = [m.step for m in by_step if m.kind == "full"]
    last = set(full[-max(1, policy.keep_last - coming) :])
    keep = set(last)
    best = best_of(by_step)
    if policy.keep_best and best is not None:
        keep.add(best.step)
    if policy.keep_every_h is not None:
        oldest_of: dict[int, int] = {}
        for m in by_step:
            oldest_of.setdefault(math.floor(m.hours / policy.keep_every_h), m.step)
        keep |= set(oldest_of.values())
    return keep, last if policy.thin_old else keep


def best_of(manifests: Iterable[Manifest]) -> Manifest | None:
    """The one with the lowest val_bpb (of equal ones the oldest), None where none has any."""
    known = [(m.val_bpb, m.step, m) for m in manifests if m.val_bpb is not None]
    return min(known)[2] if known else None


class CheckpointDir:
    """The folder RUN/checkpoints/STAGE. One process writes; any may read."""

    def __init__(self, path: Path, storage: Storage | None = None) -> None:
        self.path = path
        self.storage = storage or Storage()

    # -- reading

    def folder(self, step: int) -> Path:
        """Final place of a step's files."""
        return self.path / step_name(step)

    def scan(self) -> tuple[list[Manifest], dict[int, str]]:
        """(manifests of the complete checkpoints in order of step, step -> damage of the others).

        Looks at manifests and sizes; hashes are compared on load.
        """
        complete, damaged = [], {}
        for step in sorted(self._steps()):
            try:
                manifest = Manifest.read(self.folder(step))
                manifest.check(self.folder(step), manifest.files, sha256=False)
                complete.append(manifest)
            except DamagedCheckpoint as e:
                damaged[step] = str(e)
        return complete, damaged

    def complete(self) -> list[Manifest]:
        """Manifests of the complete checkpoints in order of step."""
        return self.scan()[0]

    def _steps(self) -> list[int]:
        if not self.path.is_dir():
            return []
        matches = (re.fullmatch(r"step_(\d{6,})", p.name) for p in self.path.iterdir())
        return [int(m[1]) for m in matches if m]

    def _hidden(self, step: int, state: str) -> Path:
        return self.path / f".{step_name(step)}.{state}"

    # -- writing

    def recover(self) -> None:
        """Undo what a killed process left half done; call it before the first load or save."""
        self.storage.make_dir(self.path)
        self.storage.sync_dir(self.path.parent)
        for old in self.path.glob(".step_*.old"):
            target = self.path / old.name[1:].removesuffix(".old")
            if not target.exists():
                self.storage.rename(old, target)
        for pattern in (".step_*.tmp", ".step_*.old", ".step_*.deleted"):
            for folder in self.path.glob(pattern):
                self.storage.remove_tree(folder)
        for manifest in self.complete():
            folder = self.folder(manifest.step)
            for path in [*folder.glob("*.safetensors"), *folder.glob(".*.tmp")]:
                if path.name not in manifest.files:
                    self.storage.remove(path)
        self.storage.sync_dir(self.path)
        self.point(self.complete())

    def staged(self, step: int) -> Path:
        """The hidden folder to which a step's files are written."""
        return self._hidden(step, "tmp")

    def stage(self, step: int) -> None:
        """Make the folder for a step's files."""
        self.abandon(step)
        self.storage.make_dir(self.staged(step))

    def abandon(self, step: int) -> None:
        """Remove what was written of a step and not committed."""
        if self.staged(step).exists():
            self.storage.remove_tree(self.staged(step))

    def commit(self, manifest: Manifest) -> None:
        """Make the staged files of a step the checkpoint of that step.

        Raises DamagedCheckpoint when a file is not here as it was written (a rank that writes to
        another volume).
        """
        step, staged = manifest.step, self.staged(manifest.step)
        manifest.check(staged, manifest.files, sha256=False)
        self.storage.write_new(staged / MANIFEST, manifest.encode())
        self.storage.sync_dir(staged)
        old, target = self._hidden(step, "old"), self.folder(step)
        if target.exists():
            self.storage.rename(target, old)
        self.storage.rename(staged, target)
        self.storage.sync_dir(self.path)
        if old.exists():
            self.storage.remove_tree(old)
        self.point(self.complete())

    def point(self, manifests: list[Manifest]) -> None:
        """Let `latest` and `best` name what they should of these checkpoints."""
        full = [m for m in manifests if m.kind == "full"]
        newest = max(full or manifests, key=lambda m: m.step, default=None)
        for name, manifest in (("latest", newest), ("best", best_of(manifests))):
            path = self.path / name
            if manifest is None:
                if path.exists():
                    self.storage.remove(path)
                continue
            text = f"{step_name(manifest.step)}\n".encode()
            if not path.exists() or path.read_bytes() != text:
                self.storage.replace(path, text)

    def note_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Add metrics (finite numbers) to a complete checkpoint and let `best` follow."""
        manifest = Manifest.read(self.folder(step))
        manifest = replace(manifest, metrics={**manifest.metrics, **metrics})
        self.storage.replace(self.folder(step) / MANIFEST, manifest.encode())
        self.point(self.complete())

    def thin(self, step: int) -> None:
        """Drop all but the weights of a checkpoint: chat, evaluation and export still work."""
        folder = self.folder(step)
        manifest = Manifest.read(folder)
        kept = {
            name: record
            for name, record in manifest.files.items()
            if name.startswith(MODEL_FILES) or name == STATE_FILE
        }
        thinned = replace(manifest, kind="weights", files=kept)
        self.storage.replace(folder / MANIFEST, thinned.encode())
        for name in manifest.files.keys() - kept.keys():
            self.storage.remove(folder / name)

    def remove(self, step: int) -> None:
        """Remove a checkpoint; a kill in between leaves a hidden folder, never a half one."""
        hidden = self._hidden(step, "deleted")
        if hidden.exists():
            self.storage.remove_tree(hidden)
        self.storage.rename(self.folder(step), hidden)
        self.storage.sync_dir(self.path)
        self.storage.remove_tree(hidden)

    def set_aside(self, step: int) -> Path:
        """Rename a damaged checkpoint so that it is not tried again; its data stay."""
        target = self.path / f"{step_name(step)}.damaged"
        number = 2
        while target.exists():
            target = self.path / f"{step_name(step)}.damaged{number}"
            number += 1
        self.storage.rename(self.folder(step), target)
        self.storage.sync_dir(self.path)
        return target

    def prune(self, policy: CheckpointPolicy, coming: int = 0) -> None:
        """Remove, or thin, what the policy does not keep."""
        manifests = self.complete()
        keep, unchanged = steps_to_keep(manifests, policy, coming)
        self.point([m for m in manifests if m.step in keep])
        for m in manifests:
            if m.step not in keep:
                self.remove(m.step)
            elif m.step not in unchanged and m.kind == "full":
                self.thin(m.step)

    def make_room(self, need_bytes: int, policy: CheckpointPolicy) -> None:
        """See to it that `need_bytes` fit above the free-space floor.

        Gives up, in this order and only as far as needed: damaged checkpoints, what the policy
        does not keep once the coming one stands, those kept for their hour alone (oldest first).
        Raises CheckpointError with the numbers where that is not enough.
        """
        floor_bytes = policy.free_floor_gib * GIB

        def short_bytes() -> float:
            return need_bytes + floor_bytes - self.storage.free_bytes(self.path)

        if short_bytes() <= 0:
            return
        for folder in sorted(self.path.glob("step_*.damaged*")):
            log.warning("space is short: removing %s", folder)
            self.storage.remove_tree(folder)
        if short_bytes() > 0:
            self.prune(policy, coming=1)
        without_ladder = policy.model_copy(update={"keep_every_h": None})
        for m in self.complete():
            keep, _ = steps_to_keep(self.complete(), without_ladder, coming=1)
            if short_bytes() > 0 and m.step not in keep:
                log.warning("space is short: removing %s", self.folder(m.step))
                self.remove(m.step)
        if short_bytes() > 0:
            raise CheckpointError(self.no_room(need_bytes, policy))

    def no_room(self, need_bytes: int, policy: CheckpointPolicy) -> str:
        """The message for a full volume."""
        complete = self.complete()
        kept = f"step {complete[-1].step} is complete and kept" if complete else "none is complete"
        staged_bytes = sum(p.stat().st_size for p in self.path.glob(".step_*.tmp/*"))
        free_gib = (self.storage.free_bytes(self.path) + staged_bytes) / GIB
        return (
            f"no space for a checkpoint in {self.path}: it needs {need_bytes / GIB:.2f} GiB and "
            f"checkpoint.free_floor_gib = {policy.free_floor_gib:g} are to stay free, but only "
            f"{free_gib:.2f} GiB are; {kept}. Free space, use a larger volume, or set "
            f"checkpoint.keep_last = 1 (it is {policy.keep_last}) or checkpoint.thin_old = true, "
            "then run the same command again"
        )
