"""A trained model to talk to or to score: weights of a stage and the run's tokenizer.

Works while the run goes on: it takes the newest complete checkpoint.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from nanochat.gpt import GPT
from nanochat.rundir import RunDir, newest_stage
from nanochat.scaling import gpt_config
from nanochat.spec import WEIGHT_STAGES, SpecError
from nanochat.tokenizer import TokenizerLike, load_tokenizer
from nanochat.weights import load_weights

STAGE_OF = {"base": "base_train", "mid": "mid_train", "sft": "chat_sft", "rl": "chat_rl"}
"""The short names of `chat -i`."""


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, and where it came from."""

    model_id: str
    """Name for clients: the run's and the stage's, as `smoke-sft`."""
    model: GPT
    tokenizer: TokenizerLike
    stage: str
    step: int
    extra: dict[str, Any]
    """As the stage gave it to its checkpoint."""


def load_trained(
    run: RunDir,
    stage: str | None = None,
    *,
    which: Literal["latest", "best"] = "latest",
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
    place = torch.device(pick_device() if device == "auto" else device)
    if dtype is None:
        dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    model = GPT(gpt_config(spec.model))
    model.load_state_dict(weights)
    model.to(device=place, dtype=dtype).eval().requires_grad_(False)
    short = next(name for name, full in STAGE_OF.items() if full == stage)
    step = extra["position"]["step"]
    return Loaded(f"{spec.name}-{short}", model, tokenizer, stage, step, extra)


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
