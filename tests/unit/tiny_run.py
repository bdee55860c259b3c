"""A run directory made in two seconds, whose model has learned a few answers by heart."""

import copy
from pathlib import Path
from typing import Any

import torch

from nanochat.checkpoint import Checkpointer
from nanochat.gpt import GPT
from nanochat.rundir import RunDir
from nanochat.scaling import gpt_config
from nanochat.spec import RunSpec
from nanochat.tokenizer import (
    CharTokenizer,
    Tokenizer,
    TokenizerLike,
    load_tokenizer,
    render_conversation,
)

ANSWERS = {
    "Who are you?": "A tiny model, très petit.",
    "Say hi.": "hi",
    "Show an image.": "<img src=x onerror=boom()> **b**",
    "What is 27 + 45?": [
        {"type": "python", "text": "27 + 45"},
        {"type": "python_output", "text": "72"},
        {"type": "text", "text": "It is 72."},
    ],
}
FOLLOW_UP = [
    {"role": "user", "content": "Say hi."},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "Again?"},
    {"role": "assistant", "content": "hi hi"},
]
SPEC = RunSpec.model_validate(
    {
        "name": "tiny",
        "model": {"depth": 2, "aspect_ratio": 32, "head_dim": 32, "seq_len": 96, "vocab_size": 300},
        "checkpoint": {"free_floor_gib": 0.0, "asynchronous": False},
    }
)


def conversations() -> list[dict]:
    """What the model of the SFT stage knows by heart."""
    single = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in ANSWERS.items()
    ]
    return [*single, {"messages": FOLLOW_UP}]


def learn_by_heart(
    model: GPT, tokenizer: TokenizerLike, num_steps: int = 150, known: list[dict] | None = None
) -> None:
    """Overfit on some conversations, `conversations` unless given."""
    known = conversations() if known is None else known
    rendered = [render_conversation(tokenizer, c, max_tokens=96) for c in known]
    longest = max(len(ids) for ids, _ in rendered)
    idx = torch.zeros(len(rendered), longest, dtype=torch.int64)
    targets = torch.full_like(idx, -100)
    for row, (ids, mask) in enumerate(rendered):
        idx[row, : len(ids)] = torch.tensor(ids)
        for i in range(1, len(ids)):
            if mask[i]:
                targets[row, i - 1] = ids[i]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(num_steps):
        loss = model(idx, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05


def make_run(path: str) -> RunDir:
    """RUN with a tokenizer, an untrained base_train and a chat_sft that knows `conversations`."""
    run, model = begin_run(path, Tokenizer.train(["the cat and the hat"] * 9, 300))
    save(run, "base_train", model)
    learn_by_heart(model, load_tokenizer(run.tokenizer_dir))
    save(run, "chat_sft", model)
    return run


def make_char_run(path: str) -> RunDir:
    """RUN with one id per character; step 7 of chat_sft, which has the better val_bpb, answers
    "Say hi." with "hi", step 9 knows nothing."""
    run, model = begin_run(path, CharTokenizer("Say hi.", 300))
    conversation = {"messages": FOLLOW_UP[:2]}
    untrained = copy.deepcopy(model)
    learn_by_heart(model, load_tokenizer(run.tokenizer_dir), known=[conversation])
    save(run, "chat_sft", model, step=7, val_bpb=1.0)
    save(run, "chat_sft", untrained, step=9, val_bpb=2.0)
    return run


def begin_run(
    path: Path | str, tokenizer: Tokenizer | CharTokenizer, spec: RunSpec = SPEC
) -> tuple[RunDir, GPT]:
    """A run with its tokenizer, and its model before any training."""
    run = RunDir(path)
    run.create()
    run.freeze_spec(spec)
    tokenizer.save(run.tokenizer_dir)
    model = GPT(gpt_config(spec.model))
    model.init_weights(0)
    return run, model


def spec_of_stage(stage: str, **settings: Any) -> RunSpec:
    """A spec whose one stage behind base training learns from conversations."""
    return RunSpec.model_validate(
        {
            "name": "t",
            "model": {
                "depth": 1,
                "aspect_ratio": 16,
                "head_dim": 16,
                "seq_len": 64,
                "vocab_size": 300,
            },
            "checkpoint": {"free_floor_gib": 0.0},
            "runtime": {"compile": False, "tensorboard": False, "device": "cpu"},
            "base_train": {"num_steps": 1, "total_batch_size": 512},
            stage: {"eval_tokens": 512, **settings},
        }
    )


def make_run_for(
    path: Path, stage: str, spec: RunSpec, device_batch_size: int, world_size: int = 1
) -> RunDir:
    """A run whose base training is done, with a plan that chose a device batch for a stage."""
    run, model = begin_run(path, Tokenizer.train(["the cat and the hat"] * 9, 300), spec)
    stages = [{"stage": stage, "device_batch_size": device_batch_size}]
    run.freeze_plan({"offer": "cpu", "world_size": world_size, "stages": stages})
    save(run, "base_train", model)
    return run


def save(run: RunDir, stage: str, model: GPT, step: int = 7, val_bpb: float = 1.0) -> None:
    """One complete checkpoint of a stage."""
    with Checkpointer(run.checkpoints_dir(stage), SPEC.checkpoint) as checkpointer:
        extra = {"position": {"step": step}, "cursor": None}
        checkpointer.save(step, {"model": model.state_dict()}, extra, val_bpb=val_bpb, wait=True)
