"""How long a save holds the training loop, against a blocking torch.save of the same state.

The state has the tensors of upstream nanochat's d12: 286 M parameters in float32 (12 layers of
width 768, eight tables of 32,768 x 768), one momentum per matrix and two moments per table, 3.1 GB
in all. A loop of matrix products runs between and during the saves. Ours and the peer's take turns;
the disk is synced before each. The host buffers are made ahead, as trainer.fit has it. Files are
read from the page cache where the memory holds them. Needs 12 GB of memory and 10 GB of disk.

* stall_s: the loop stands still. `stall_ratio` is ours over the peer's.
* slowed_s: what the steps beside the background's write took longer, all together (on a CPU they
  share its cores; on a GPU they do not). `held_ratio` counts it as a stall too.

    nice -n 10 python bench/checkpoint.py [--rounds 3] [--dir DIR]      prints JSON
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat.checkpoint import Checkpointer, load_weights
from nanochat.spec import CheckpointPolicy

LAYERS, WIDTH, VOCAB, TABLES = 12, 768, 32_768, 8
POLICY = CheckpointPolicy(keep_last=1, free_floor_gib=1.0)


def make_state(fill: Callable[..., Tensor]) -> dict[str, dict[str, Tensor]]:
    """Model and optimizer state, all float32, in bytes 1.15 + 1.95 GB."""
    matrices = {
        f"h.{layer}.{name}": shape
        for layer in range(LAYERS)
        for name, shape in {
            **{f"attn.c_{k}.weight": (WIDTH, WIDTH) for k in ("q", "k", "v", "proj")},
            "mlp.c_fc.weight": (4 * WIDTH, WIDTH),
            "mlp.c_proj.weight": (WIDTH, 4 * WIDTH),
        }.items()
    }
    tables = {f"table.{i}.weight": (VOCAB, WIDTH) for i in range(TABLES)}
    optimizer = {f"{n}.momentum": s for n, s in matrices.items()}
    optimizer |= {f"{n}.exp_avg": s for n, s in tables.items()}
    optimizer |= {f"{n}.exp_avg_sq": s for n, s in tables.items()}
    return {
        "model": {n: fill(s) for n, s in {**matrices, **tables}.items()},
        "optimizer": {n: fill(s) for n, s in optimizer.items()},
    }


class Loop:
    """Stands for training: one step is a few products of matrices."""

    def __init__(self) -> None:
        self._a = torch.randn(1024, 1024)
        self.alone_s = statistics.median([self.step() for _ in range(50)])
        """Seconds of a step that nothing runs beside."""

    def step(self) -> float:
        """Seconds of one step."""
        started_s = time.perf_counter()
        for _ in range(8):
            self._a @ self._a
        return time.perf_counter() - started_s


def timed(act: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    started_s = time.perf_counter()
    act()
    return time.perf_counter() - started_s


def save_ours(saver: Checkpointer, step: int, state: dict[str, Any], loop: Loop) -> dict[str, Any]:
    """Save in the background while the loop goes on; times in seconds."""
    stall_s = timed(lambda: saver.save(step, state, {"cursor": step}))
    steps_s = []
    while saver.saving_step is not None:
        steps_s.append(loop.step())
    saver.wait()
    assert saver.last_save_s is not None
    return {
        "stall_s": stall_s,
        "slowed_s": sum(steps_s) - len(steps_s) * loop.alone_s,
        "done_s": saver.last_save_s,
        "step_while_saving_s": steps_s,
    }


def save_peer(folder: Path, state: dict[str, Any]) -> None:
    """As upstream does: model, then optimizer, to their final names, without a sync."""
    folder.mkdir(exist_ok=True)
    for name, part in state.items():
        torch.save(part, folder / f"{name}.pt")


def load_peer(folder: Path, state: dict[str, Any]) -> None:
    """torch.load of both files into the tensors of the state."""
    for name, part in state.items():
        loaded = torch.load(folder / f"{name}.pt", weights_only=True)
        for key, tensor in part.items():
            tensor.copy_(loaded[key])


def is_equal(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> bool:
    return all(torch.equal(a[part][name], t) for part in b for name, t in b[part].items())


def median(values: list[float]) -> float:
    return round(statistics.median(values), 4)


def measure(directory: Path, rounds: int) -> dict[str, Any]:
    """All figures; times are medians over the rounds, in seconds."""
    state, loop = make_state(torch.randn), Loop()
    ours: list[dict[str, Any]] = []
    peer: list[float] = []
    resume: dict[str, list[float]] = {"ours": [], "ours_unverified": [], "peer": []}
    with Checkpointer(directory / "ours", POLICY) as saver:
        saver.prepare(state)
        saver.wait()
        ours_first = save_ours(saver, 0, state, loop)
        for step in range(1, rounds + 1):
            os.sync()
            ours.append(save_ours(saver, step, state, loop))
            os.sync()
            peer.append(timed(lambda: save_peer(directory / "peer", state)))
        target = make_state(torch.zeros)
        same = True
        for _ in range(rounds):
            resume["peer"].append(timed(lambda: load_peer(directory / "peer", target)))
            for part in target.values():
                torch._foreach_zero_(list(part.values()))
            resume["ours"].append(timed(lambda: saver.load_latest(target)))
            same = same and is_equal(target, state)
            resume["ours_unverified"].append(timed(lambda: saver.load_latest(target, verify=False)))
        weights_s = timed(lambda: load_weights(directory / "ours", verify=False))
        waited_s = timed(lambda: saver.save(rounds + 1, state, {}, wait=True))
        size = saver.last_bytes
    stall_s = median([r["stall_s"] for r in ours])
    held_s = median([r["stall_s"] + r["slowed_s"] for r in ours])
    return {
        "state_bytes": sum(t.nbytes for part in state.values() for t in part.values()),
        "checkpoint_bytes": size,
        "peer_bytes": sum(p.stat().st_size for p in (directory / "peer").iterdir()),
        "peer": f"torch.save of torch {torch.__version__}, blocking",
        "rounds": rounds,
        "stall_s": {"ours": stall_s, "peer": median(peer)},
        "stall_ratio": round(stall_s / median(peer), 4),
        "stall_target_ratio": 0.2,
        "slowed_s": median([r["slowed_s"] for r in ours]),
        "held_ratio": round(held_s / median(peer), 4),
        "first_stall_s": round(ours_first["stall_s"], 4),
        "complete_after_s": median([r["done_s"] for r in ours]),
        "blocking_save_s": round(waited_s, 4),
        "step_s": {
            "alone": round(loop.alone_s, 4),
            "while_saving": median([s for r in ours for s in r["step_while_saving_s"]]),
        },
        "resume_s": {name: median(times) for name, times in resume.items()},
        "weights_mapped_s": round(weights_s, 4),
        "loaded_bit_equal": same,
        "threads": torch.get_num_threads(),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="a folder on the disk to measure")
    args = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="checkpoint-bench-", dir=args.dir))
    try:
        print(json.dumps(measure(directory, args.rounds), indent=2))
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
