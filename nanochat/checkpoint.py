"""Save and load the whole state of a stage, such that what was paid for is on the disk.

* The loop is held only while the state is copied to reused (on CUDA: pinned) host buffers. A thread
  writes them, with a gloo group of its own for what the ranks have to agree on.
* `has_failed` tells at once that the thread could not write; `take_failure` why, on all ranks.
  The save after that is written while the loop waits: it is on the disk, or it raises.
* A checkpoint appears under its final name only when every byte of it is durable (checkpoint_dir),
  and is compared with its manifest on load; a damaged one is set aside, loudly, and the one before
  is taken.
* The number of ranks may differ between save and load (shards). Nothing is ever unpickled.
"""

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from nanochat.agreement import Agreement, LostRank, RankError
from nanochat.checkpoint_dir import (
    GIB,
    STATE_FILE,
    CheckpointDir,
    CheckpointError,
    DamagedCheckpoint,
    Manifest,
    utc_now,
)
from nanochat.rng import rng_state, set_rng_state
from nanochat.rundir import OUT_OF_SPACE
from nanochat.shards import (
    ShardReader,
    State,
    WrittenFiles,
    build_index,
    fill_values,
    flatten,
    index_from_json,
    index_to_json,
    plan_bytes,
    write_shards,
)
from nanochat.spec import CheckpointPolicy
from nanochat.storage import Storage
from nanochat.weights import by_val_bpb, load_model, load_weights

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "LoadedCheckpoint",
    "ProbeResult",
    "load_model",
    "load_weights",
    "rng_state",
    "set_rng_state",
]

GROUP_TIMEOUT = timedelta(hours=1)
"""Longest wait for another rank in a save: the slowest rank's write of its part."""
PROBE_BYTES = 16 << 20

T = TypeVar("T")
Resolve = Callable[[WriteItem], Tensor]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What came with the tensors."""

    step: int
    extra: dict[str, Any]
    """As given to `save` on rank 0."""
    rank_extra: dict[str, Any] | None
    """As given to `save` on this rank; None when the number of ranks was another one."""
    manifest: Manifest
    skipped: list[str] = field(default_factory=list)
    """Why newer checkpoints were not taken; empty when the newest was good."""


@dataclass(frozen=True)
class ProbeResult:
    """What the small write at the start of a run has shown."""

    free_bytes: int
    bytes_per_s: float
    """Of one rank writing and syncing a small file; a first guess for the time of a save."""


@dataclass(frozen=True)
class _Job:
    """One save, as the writing thread gets it."""

    step: int
    items: list[WriteItem]
    resolve: Resolve
    values: State
    extra: dict[str, Any]
    rank_extra: dict[str, Any]
    val_bpb: float | None
    prune: bool
    started_s: float


@dataclass(frozen=True)
class _Part:
    """What one rank gives to a checkpoint."""

    written: WrittenFiles
    values: State
    rank_extra: dict[str, Any]


class Checkpointer:
    """Writes and reads the checkpoints of one stage. All ranks call the same methods in step.

    directory: RUN/checkpoints/STAGE, on a volume that all ranks share. With world_size > 1 the
    constructor makes a process group, so that every rank has to construct it.
    """

    def __init__(
        self,
        directory: Path,
        policy: CheckpointPolicy,
        *,
        rank: int = 0,
        world_size: int = 1,
        storage: Storage | None = None,
    ) -> None:
        self.dir = CheckpointDir(directory, storage)
        self.policy = policy
        self.rank = rank
        self.world_size = world_size
        self.last_save_s: float | None = None
        """Seconds from the call of `save` until the checkpoint was complete."""
        self.last_stall_s: float | None = None
        """Seconds that `save` held the loop."""
        self.last_bytes: int | None = None
        """Size of the last checkpoint, all ranks together."""
        self._ranks = Agreement(rank, world_size, GROUP_TIMEOUT)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: list[Future[None]] = []
        self._saving: tuple[int, Future[None]] | None = None
        self._is_retry = False
        self._had_any = False
        self._guessed_save_s: float | None = None
        self._buffers: dict[MetadataIndex, Tensor] = {}
        self._local_plan: SavePlan | None = None
        self._plan = SavePlan([])
        self._total_bytes = 0
        self._on_rank_0(self.dir.recover)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.wait()
        self._thread.shutdown()

    # -------------------------------------------------------------------------
    # saving

    def probe_write(self, need_bytes: int = 0) -> ProbeResult:
        """Prove at the start of a run that checkpoints can be written here.

        Every rank writes, syncs, renames and removes a small file. need_bytes: forecast size of a
        checkpoint. Raises CheckpointError that names the folder, the reason and the free space.
        """
        self.wait()
        rate = self._all_ranks(self._probe)
        self._guessed_save_s = need_bytes / (min(rate) * self.world_size)
        free_bytes = self.dir.storage.free_bytes(self.dir.path)
        held_bytes = sum(m.size for m in self.dir.complete())
        floor_bytes = self.policy.free_floor_gib * GIB
        if free_bytes + held_bytes < need_bytes + floor_bytes:
            raise CheckpointError(self.dir.no_room(need_bytes, self.policy))
        return ProbeResult(free_bytes, min(rate))

    def _probe(self) -> float:
        path = self.dir.path / f".probe-{self.rank:05d}"
        content = os.urandom(PROBE_BYTES)
        storage = self.dir.storage
        started_s = time.monotonic()
        try:
            storage.replace(path, content)
            elapsed_s = time.monotonic() - started_s
            if path.read_bytes() != content:
                raise CheckpointError(f"{path} does not read back as it was written")
            storage.remove(path)
        except OSError as e:
            raise CheckpointError(
                f"checkpoints cannot be written to {self.dir.path}: {e.strerror} "
                f"({storage.free_bytes(self.dir.path) / GIB:.2f} GiB free); "
                "mount a volume that this user can write, or give another --run-dir"
            ) from None
        return PROBE_BYTES / elapsed_s

    def prepare(self, state: State) -> None:
        """Allocate the host buffers in the background: the first save then stalls as the later do.

        state: as it will be given to `save`; only shapes and devices matter.
        """
        self.wait()
        planner = self._planner(flatten(state)[0])
        if self.policy.asynchronous:
            self._in_background(lambda: self._allocate(planner))

    def save(
        self,
        step: int,
        state: State,
        extra: dict[str, Any],
        *,
        rank_extra: dict[str, Any] | None = None,
        val_bpb: float | None = None,
        prune: bool = True,
        wait: bool = False,
    ) -> None:
        """Save the state after `step` steps.

        state: nested dicts of tensors and JSON values; the entry "model" holds the weights. extra:
        JSON, rank 0's is kept (schedule, `cursor` of the data, best so far); rank_extra: JSON, kept
        per rank (RNG states). prune: remove what the policy does not keep; False where these
        weights may yet turn out to be bad. wait: return when the checkpoint is complete (a stop).
        Where the save before this one failed in the background, the present state is tried first
        and waited for. Raises CheckpointError where what is waited for cannot be written.
        """
        started_s = time.monotonic()
        self.take_failure()
        tensors, values = flatten(state)
        planner = self._planner(tensors)
        background = self.policy.asynchronous and not wait and not self._is_retry
        job = _Job(
            step,
            self._plan.items,
            self._copy(planner) if background else cast(Resolve, planner.resolve_data),
            json.loads(json.dumps(values)),
            json.loads(json.dumps(extra)),
            json.loads(json.dumps(rank_extra or {})),
            val_bpb if val_bpb is not None and math.isfinite(val_bpb) else None,
            prune,
            started_s,
        )
        if background:
            self._saving = step, self._in_background(lambda: self._write(job))
        else:
            self._write(job)
        self.last_stall_s = time.monotonic() - started_s

    def wait(self) -> None:
        """Return when all that was asked is on the disk. Raises CheckpointError if it is not."""
        if (failure := self.take_failure()) is not None:
            raise failure

    def take_failure(self) -> CheckpointError | None:
        """Wait for the background; why it failed, told once, or None. For who will save again.

        What follows from a failure (nothing is there to note a loss on) is part of it.
        """
        pending, self._pending = self._pending, []
        failures = []
        for future in pending:
            try:
                future.result()
            except CheckpointError as e:
                failures.append(e)
        self._is_retry = self._is_retry or bool(failures)
        return failures[0] if failures else None

    @property
    def has_failed(self) -> bool:
        """Whether the background has failed and nobody took it; ranks may see it at other times."""
        return any(f.done() and f.exception() is not None for f in self._pending)

    @property
    def expected_save_s(self) -> float | None:
        """Seconds of the next save: as the last one, at first a guess from `probe_write`."""
        return self._guessed_save_s if self.last_save_s is None else self.last_save_s

    @property
    def saving_step(self) -> int | None:
        """The step that is being written in the background, if any."""
        return self._saving[0] if self._saving and not self._saving[1].done() else None

    def note_val_bpb(self, step: int, val_bpb: float) -> None:
        """Add the validation loss, in bits per byte, to a checkpoint saved before it was known.

        Happens in the background, after a save that is being written; errors as for `save`.
        """
        if math.isfinite(val_bpb):
            self._in_background(
                lambda: self._on_rank_0(
                    lambda: self.dir.note_metrics(step, {"val_bpb": val_bpb}),
                )
            )

    def discard_after(self, step: int) -> None:
        """Remove checkpoints newer than `step`: after a roll-back they are not this run's past."""
        self.wait()

        def discard() -> None:
            kept = [m for m in self.dir.complete() if m.step <= step]
            self.dir.point(kept)
            for m in self.dir.complete():
                if m.step > step:
                    self.dir.remove(m.step)

        self._on_rank_0(discard)

    def _in_background(self, act: Callable[[], None]) -> Future[None]:
        """What is handed in here happens in order, and in the same order on all ranks."""
        future = self._thread.submit(act)
        self._pending.append(future)
        return future

    def _planner(self, tensors: dict[str, Tensor]) -> DefaultSavePlanner:
        """Agree on who writes what; asked again only when the tensors of any rank have changed."""
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(tensors, is_coordinator=self.rank == 0)
        local = planner.create_local_plan()
        if any(self._ranks.gather(local != self._local_plan)):
            plans, _ = planner.create_global_plan(self._ranks.gather(local))
            self._local_plan, self._plan = local, plans[self.rank]
            self._total_bytes = sum(plan_bytes(plan.items) for plan in plans)
            self._buffers = {}
        return planner

    def _allocate(self, planner: DefaultSavePlanner) -> None:
        for item in self._plan.items:
            if item.index not in self._buffers:
                live = cast(Tensor, planner.resolve_data(item))
                self._buffers[item.index] = torch.zeros(
                    live.shape, dtype=live.dtype, pin_memory=live.is_cuda
                )

    def _copy(self, planner: DefaultSavePlanner) -> Resolve:
        """Copy this rank's part of the state to the host buffers."""
        self._allocate(planner)
        on_cuda = False
        for item in self._plan.items:
            live = cast(Tensor, planner.resolve_data(item))
            self._buffers[item.index].copy_(live.detach(), non_blocking=live.is_cuda)
            on_cuda = on_cuda or live.is_cuda
        if on_cuda:
            torch.cuda.synchronize()
        return lambda item: self._buffers[item.index]

    def _write(self, job: _Job) -> None:
        """Write a checkpoint; runs in the thread, or in the caller's when the save is to wait."""
        staged = self.dir.staged(job.step)

        def write_part() -> _Part:
            self.dir.storage.make_dir(staged)
            written = write_shards(job.items, job.resolve, staged, self.rank, self.dir.storage)
            return _Part(written, job.values, job.rank_extra)

        try:
            self._on_rank_0(lambda: self._prepare(job))
            parts = self._all_ranks(write_part)
            self.last_bytes = self._on_rank_0(lambda: self._finish(job, parts))
        except CheckpointError as e:
            log.error("%s", e)
            if self.rank == 0:
                with contextlib.suppress(OSError):  # the next save or start removes it
                    self.dir.abandon(job.step)
            raise
        self._is_retry = False
        self.last_save_s = time.monotonic() - job.started_s

    def _prepare(self, job: _Job) -> None:
        self.dir.make_room(self._total_bytes, self.policy)
        self.dir.stage(job.step)

    def _finish(self, job: _Job, parts: list[_Part]) -> int:
        """Index, manifest, final name, pruning: rank 0 alone. Returns the bytes of all files."""
        values = {name: v for part in reversed(parts) for name, v in part.values.items()}
        state = {
            "tensors": index_to_json(build_index([part.written for part in parts])),
            "values": values,
            "extra": job.extra,
            "rank_extra": [part.rank_extra for part in parts],
        }
        files = {name: r for part in parts for name, r in part.written.files.items()}
        files[STATE_FILE] = self.dir.storage.write_new(
            self.dir.staged(job.step) / STATE_FILE, json.dumps(state).encode()
        )
        manifest = Manifest(
            step=job.step,
            kind="full",
            world_size=self.world_size,
            cursor=job.extra.get("cursor"),
            files=files,
            time=utc_now(),
            metrics={} if job.val_bpb is None else {"val_bpb": job.val_bpb},
        )
        self.dir.commit(manifest)
        if job.prune:
            self.dir.prune(self.policy)
        return manifest.size

    # -------------------------------------------------------------------------
    # loading

    def load_latest(self, state: State, *, verify: bool = True) -> LoadedCheckpoint | None:
        """Fill `state` from the newest checkpoint that is whole; None where there is none at all.

        verify: compare the sha256 of all tensors, each rank a part of the files (sizes always are).
        Damaged ones are renamed to step_X.damaged and reported. Raises CheckpointError when all
        are damaged or only weights are left (starting over would cost what was paid, and prune
        it), or when the state does not fit.
        """
        return self._load(state, verify, lambda complete: list(reversed(complete)))

    def load_best(self, state: State, *, verify: bool = True) -> LoadedCheckpoint | None:
        """As load_latest, by lowest val_bpb; None where no full checkpoint has one."""
        return self._load(state, verify, by_val_bpb)

    def has_any(self) -> bool:
        """Whether the stage has a checkpoint, whole or not; `load_latest` is then never None."""
        complete, damaged = self._on_rank_0(self.dir.scan)
        self._had_any = bool(complete or damaged)
        return self._had_any

    def list_complete(self) -> list[Manifest]:
        """Manifests of the complete checkpoints in order of step."""
        return self.dir.complete()

    def _load(
        self, state: State, verify: bool, order: Callable[[list[Manifest]], list[Manifest]]
    ) -> LoadedCheckpoint | None:
        self.wait()
        complete, damaged = self._on_rank_0(self.dir.scan)
        full = [m for m in complete if m.kind == "full"]
        candidates = order(full)
        for manifest in candidates:
            reasons = [r for r in self._ranks.gather(self._check_part(manifest, verify)) if r]
            if not reasons:
                self._on_rank_0(lambda: self._set_aside(damaged))
                return self._fill(manifest, state, list(damaged.values()))
            damaged[manifest.step] = reasons[0]
            log.warning("step %d is not used: %s", manifest.step, reasons[0])
        if damaged or (complete and not full):
            weights = [m.step for m in complete if m.kind == "weights"]
            raise CheckpointError(self._no_full(weights, list(damaged.values())))
        if self._had_any and not complete:
            raise CheckpointError(
                f"the checkpoints in {self.dir.path} have gone since this process began: "
                "put them back, or run the same command again to begin this stage anew"
            )
        return None

    def _no_full(self, weights: list[int], damages: list[str]) -> str:
        """The message where there are checkpoints, and none to go on from."""
        folder, reasons = self.dir.path, "\n  ".join(damages)
        if not weights:
            return (
                f"no checkpoint in {folder} is whole:\n  {reasons}\n"
                "Restore one from a copy, or move the folder away to start this stage over"
            )
        steps = ", ".join(map(str, weights))
        return (
            f"only weights are left of step {steps} of {folder.name}: a run goes on from a full "
            f"checkpoint; bring one back from where it was trained, or move {folder} away to begin "
            "this stage anew"
        ) + (f". Not whole:\n  {reasons}" if damages else "")

    def _check_part(self, manifest: Manifest, sha256: bool) -> str | None:
        names = sorted(manifest.files)[self.rank :: self.world_size]
        try:
            manifest.check(self.dir.folder(manifest.step), names, sha256)
        except DamagedCheckpoint as e:
            return str(e)
        return None

    def _set_aside(self, damaged: Mapping[int, str]) -> None:
        for step, reason in damaged.items():
            log.warning("damaged checkpoint set aside as %s: %s", self.dir.set_aside(step), reason)
        if damaged:
            self.dir.point(self.dir.complete())

    def _fill(self, manifest: Manifest, state: State, skipped: list[str]) -> LoadedCheckpoint:
        folder = self.dir.folder(manifest.step)
        saved = json.loads((folder / STATE_FILE).read_bytes())
        index = index_from_json(saved["tensors"])

        def fill() -> set[str]:
            tensors, values = flatten(state)
            ShardReader(folder, index).fill(tensors)
            fill_values(state, saved["values"])
            return tensors.keys() | values.keys()

        asked_for: set[str] = set().union(*self._all_ranks(fill))
        if unknown := sorted((index.keys() | saved["values"].keys()) - asked_for):
            raise CheckpointError(
                f"{folder} holds {len(unknown)} entries that this run does not have, the first is "
                f"{unknown[0]}: the model or the optimizer of the spec differs"
            )
        same_ranks = manifest.world_size == self.world_size
        return LoadedCheckpoint(
            manifest.step,
            saved["extra"],
            saved["rank_extra"][self.rank] if same_ranks else None,
            manifest,
            skipped,
        )

    # -------------------------------------------------------------------------
    # errors: on one rank or on several a CheckpointError on all, but for a rank that is gone

    def _all_ranks(self, act: Callable[[], T]) -> list[T]:
        try:
            return self._ranks.all_ranks(lambda: self._guard(act))
        except LostRank:
            raise
        except RankError as e:
            raise CheckpointError(str(e)) from e

    def _on_rank_0(self, act: Callable[[], T]) -> T:
        return self._all_ranks(lambda: act() if self.rank == 0 else cast(T, None))[0]

    def _guard(self, act: Callable[[], T]) -> T:
        try:
            return act()
        except OSError as e:
            if e.errno in OUT_OF_SPACE:
                raise CheckpointError(self.dir.no_room(self._total_bytes, self.policy)) from e
            raise CheckpointError(f"checkpoints in {self.dir.path}: {e}") from e
