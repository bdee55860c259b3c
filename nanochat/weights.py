"""The weights of a checkpoint alone: for the next stage, evaluation, chat and export.

Works on any checkpoint of a stage, also one thinned to its weights, from any number of ranks, and
while the run that writes it goes on. Nothing is unpickled.
"""

import json
import logging
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from nanochat.checkpoint_dir import (
    MODEL_FILES,
    STATE_FILE,
    CheckpointDir,
    CheckpointError,
    DamagedCheckpoint,
    Manifest,
)
from nanochat.shards import ShardReader, index_from_json

Which = Literal["latest", "best"] | int
PREFIX = "model."
log = logging.getLogger(__name__)


def load_weights(
    directory: Path, which: Which = "latest", *, verify: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights by name, `extra` of the save) from RUN/checkpoints/STAGE.

    The tensors are on the CPU; those written in one piece lie on the mapped file, so that they are
    read when used (writing to them does not touch the file). which: latest, best (lowest val_bpb;
    the latest where none was validated) or a step; a damaged latest or best is passed over for the
    next one, loudly. verify: compare sha256. Raises CheckpointError.
    """
    reader, names, extra = _open_model(directory, which, verify)
    return {name.removeprefix(PREFIX): reader.whole(name) for name in names}, extra


def load_model(
    directory: Path, model_state: dict[str, Tensor], which: Which = "latest", *, verify: bool = True
) -> dict[str, Any]:
    """Fill a model's state dict in place (DTensors: each rank its shard); returns `extra`.

    Raises CheckpointError when there is no checkpoint, or it is one of another model.
    """
    reader, names, extra = _open_model(directory, which, verify)
    wanted = {PREFIX + name: tensor for name, tensor in model_state.items()}
    if unknown := [name for name in names if name not in wanted]:
        raise CheckpointError(
            f"the checkpoint in {directory} is one of another model: it has "
            f"{unknown[0].removeprefix(PREFIX)}, which this model has not"
        )
    reader.fill(wanted)
    return extra


def by_val_bpb(manifests: list[Manifest]) -> list[Manifest]:
    """Those with a val_bpb, the lowest first, of equal ones the oldest first."""
    known = [(m.val_bpb, m.step, m) for m in manifests if m.val_bpb is not None]
    return [m for _, _, m in sorted(known, key=lambda k: k[:2])]


def _open_model(
    directory: Path, which: Which, verify: bool
) -> tuple[ShardReader, list[str], dict[str, Any]]:
    folder_of = CheckpointDir(directory).folder
    complete = CheckpointDir(directory).complete()
    if which == "best":
        unknown = [m for m in reversed(complete) if m.val_bpb is None]
        candidates = [*by_val_bpb(complete), *unknown]
    elif which == "latest":
        candidates = list(reversed(complete))
    else:
        candidates = [m for m in complete if m.step == which]
    for manifest in candidates:
        folder = folder_of(manifest.step)
        names = [n for n in manifest.files if n.startswith(MODEL_FILES) or n == STATE_FILE]
        try:
            manifest.check(folder, names, verify)
        except DamagedCheckpoint as e:
            log.warning("step %d is not used: %s", manifest.step, e)
            continue
        saved = json.loads((folder / STATE_FILE).read_bytes())
        index = index_from_json(saved["tensors"])
        weights = [name for name in index if name.startswith(PREFIX)]
        return ShardReader(folder, index), weights, saved["extra"]
    have = ", ".join(str(m.step) for m in complete) or "none"
    raise CheckpointError(f"no whole checkpoint {which!r} in {directory}; complete steps: {have}")
