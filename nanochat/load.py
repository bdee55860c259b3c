"""A trained model to talk to or to score: of a run's stage, or of an exported folder.

Works while the run goes on: it takes the newest complete checkpoint.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from nanochat import hf
from nanochat.arguments import STAGE_OF
from nanochat.gpt import GPT
from nanochat.rundir import RunDir, find_run, newest_stage
from nanochat.scaling import gpt_config
from nanochat.spec import WEIGHT_STAGES, SpecError
from nanochat.tokenizer import TokenizerLike, load_tokenizer
from nanochat.weights import load_weights

Which = Literal["latest", "best"]


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, and where it came from."""

    model_id: str
    """Name for clients: the run's and the stage's, as `smoke-sft`."""
    model: GPT
    tokenizer: TokenizerLike
    stage: str
    step: int | None
    """None for a folder that does not say."""


def open_trained(
    name: str,
    stage: str | None = None,
    *,
    which: Which = "latest",
    device: str = "auto",
    dtype: torch.dtype | None = None,
) -> Loaded:
    """A run, by folder or by name, or a folder that `export` or another program wrote for Hugging
    Face transformers. Raises SpecError, RunDirError, CheckpointError."""
    if not hf.is_folder(Path(name)):
        return load_trained(find_run(name), stage, which=which, device=device, dtype=dtype)
    if stage is not None or which != "latest":
        raise SpecError(f"{name} is an exported model; it has no stages and checkpoints to choose")
    model, tokenizer = hf.read_folder(Path(name))
    origin = hf.read_origin(Path(name))
    stage = origin.get("stage", "chat_sft")
    model_id = f"{origin.get('run', Path(name).resolve().name)}-{_short(stage)}"
    return Loaded(model_id, _place(model, device, dtype), tokenizer, stage, origin.get("step"))


def load_trained(
    run: RunDir,
    stage: str | None = None,
    *,
    which: Which = "latest",
    device: str = "auto",
    dtype: torch.dtype | None = None,
) -> Loaded:
    """The weights of a stage (its name or short name; the newest stage that has any).

    dtype: of the weights; by default bf16 on CUDA and fp32 elsewhere. Raises SpecError where the
    run has no weights or no tokenizer yet, CheckpointError where a checkpoint cannot be read.
    """
    spec = run.spec()
    stage = _pick_stage(run, stage)
    if not run.tokenizer_dir.is_dir():
        raise SpecError(f"{run.path} has no tokenizer yet; its stage tok_train has not finished")
    tokenizer = load_tokenizer(run.tokenizer_dir)
    weights, extra = load_weights(run.checkpoints_dir(stage), which)
    model = GPT(gpt_config(spec.model))
    model.load_state_dict(weights)
    step = extra["position"]["step"]
    model_id = f"{spec.name}-{_short(stage)}"
    return Loaded(model_id, _place(model, device, dtype), tokenizer, stage, step)


def _place(model: GPT, device: str, dtype: torch.dtype | None) -> GPT:
    """The model for inference on a device; dtype: by default bf16 on CUDA, fp32 elsewhere."""
    place = torch.device(pick_device() if device == "auto" else device)
    if dtype is None:
        dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    hf.cast_weights(model, dtype)
    return model.to(place).eval().requires_grad_(False)


def _short(stage: str) -> str:
    return next(short for short, name in STAGE_OF.items() if name == stage)


def dtype_named(name: str) -> torch.dtype | None:
    """The dtype of `--dtype`; None for auto."""
    return {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}[name]


def pick_device() -> str:
    """cuda where there is one, else mps, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _pick_stage(run: RunDir, wanted: str | None) -> str:
    if wanted is None:
        newest = newest_stage(run, WEIGHT_STAGES)
        if newest is None:
            raise SpecError(
                f"{run.path} has no complete checkpoint yet; `status {run.path}` shows how far the "
                "run is"
            )
        return newest
    stage = STAGE_OF.get(wanted, wanted)
    if stage not in WEIGHT_STAGES:
        known = ", ".join([*STAGE_OF, *WEIGHT_STAGES])
        raise SpecError(f"unknown stage {wanted!r}; known: {known}")
    if not (run.checkpoints_dir(stage) / "latest").is_file():
        there = [s for s in WEIGHT_STAGES if (run.checkpoints_dir(s) / "latest").is_file()]
        raise SpecError(
            f"{run.path} has no complete checkpoint of {stage}; stages that have one: "
            f"{', '.join(there) or 'none yet'}"
        )
    return stage
