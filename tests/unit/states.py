"""States to save in the tests of checkpoints, and how to compare and damage them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat.checkpoint import Checkpointer
from nanochat.spec import CheckpointPolicy

NO_FLOOR = CheckpointPolicy(free_floor_gib=0.0)
IN_LINE = CheckpointPolicy(free_floor_gib=0.0, asynchronous=False)


def state_of(step: int) -> dict[str, Any]:
    """A small state of many dtypes and shapes that is another one at every step."""
    gen = torch.Generator().manual_seed(step)
    return {
        "model": {
            "wte.weight": torch.randn(5, 3, generator=gen),
            "h.0.scale": torch.randn((), generator=gen).double(),
            "h.0.c_q.weight": torch.randn(4, 6, generator=gen).bfloat16(),
            "empty": torch.empty(0, 3),
        },
        "optimizer": {
            "groups": [
                {"lr": 0.1 * step, "betas": (0.9, 0.95), "name": "muon"},
                {"lr": 0.2, "betas": (0.8, 0.9), "name": None},
            ],
            "momentum": [torch.randn(4, 6, generator=gen), torch.randn(7, generator=gen)],
            "mask": torch.rand(9, generator=gen) > 0.5,
            "step": torch.tensor(step),
        },
    }


def leaves(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return [leaf for key in sorted(node) for leaf in leaves(node[key])]
    if isinstance(node, list):
        return [leaf for child in node for leaf in leaves(child)]
    return [node]


def assert_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    for a, b in zip(leaves(got), leaves(expected), strict=True):
        if isinstance(b, Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b)
        else:
            assert a == b and type(a) is type(b)


def save_steps(directory: Path, *steps: int, policy: CheckpointPolicy = IN_LINE) -> None:
    with Checkpointer(directory, policy) as saver:
        for step in steps:
            saver.save(step, state_of(step), {"cursor": {"document": step}})


def damage(path: Path, offset: int) -> None:
    """Flip one bit."""
    content = bytearray(path.read_bytes())
    content[offset % len(content)] ^= 1 << (offset % 8)
    path.write_bytes(content)
