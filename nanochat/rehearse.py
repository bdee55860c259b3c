"""Two training steps at full size without the machine: every shape, no numbers.

* Tensors are fake (shape and dtype only), ranks are fake (rank 0 of as many as the plan has), so a
  model of 13 B parameters on eight ranks is rehearsed on a laptop within a minute.
* Memory is counted by this module's own book of live storages, since torch's FSDPMemTracker counts
  temporaries of the optimizer as state.
* The steps run eagerly. Where the plan compiles, what is alive is looked at only where a matrix
  product or an attention ends: between them an eager run holds temporaries of pointwise work that a
  compiled one fuses away (8 of 33 widths at the peak of a recomputed block).
* Model, sharding, loss and optimizer are the ones that train; a shape or sharding mistake raises
  here as it would there.

`python -m nanochat.rehearse` reads {"spec": …, "plan": …} as JSON on stdin and prints a JSON
document; `plan --rehearse` calls it.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat.distributed import Dist
from nanochat.gpt import GPT, shard_model
from nanochat.optim import Optimizer, build_optimizer
from nanochat.scaling import gpt_config
from nanochat.spec import RunSpec, spec_from_json

GIB = 2**30
NUM_STEPS = 2
MOST_MICRO_STEPS = 1
"""Forward passes per step; more of them have the same shapes and hold no more memory."""
LOOK_EVERY_CALLS = 16
"""Operations between two sums over all live storages; what holds tokens is summed more often."""
PRODUCTS = ("mm", "addmm", "bmm")
ATTENTION = "_scaled_dot_product"
TOLERANCES = {"params": 0.001, "grads": 0.001, "optimizer": 0.001, "activations": 0.10}
"""Largest difference from the plan, as a share."""


def main() -> None:
    """Read spec and plan from stdin, rehearse the stage that needs most memory, print JSON."""
    task = json.loads(sys.stdin.read())
    spec = spec_from_json(json.dumps(task["spec"]))
    sys.stdout.write(json.dumps(rehearse(spec, task["plan"]), indent=2) + "\n")


def rehearse(spec: RunSpec, plan: dict[str, Any]) -> dict[str, Any]:
    """Two steps of the planned stage with the largest memory; memory beside the plan's.

    Raises whatever the model, the sharding or the optimizer raise for such shapes.
    """
    stages = plan["stages"]
    if not stages:
        return {"ok": True, "message": "no training stage is planned"}
    stage = max(stages, key=lambda s: s["memory_gib"]["total"])
    started_s = time.perf_counter()
    with _ranks(plan["world_size"]) as dist:
        measured = _measure(spec, plan, stage, dist)
    memory = {
        term: _compare(stage["memory_gib"][term], measured[term], tolerance)
        for term, tolerance in TOLERANCES.items()
    }
    return {
        "ok": all(term["ok"] for term in memory.values()),
        "stage": stage["stage"],
        "world_size": plan["world_size"],
        "sharding": plan["sharding"],
        "recompute": plan["recompute"],
        "device_batch_size": stage["device_batch_size"],
        "num_steps": NUM_STEPS,
        "memory_gib": memory,
        "peak_gib": round(measured["peak"] / GIB, 3),
        "seconds": round(time.perf_counter() - started_s, 1),
    }


def _compare(planned_gib: float, measured: float, tolerance: float) -> dict[str, Any]:
    measured_gib = measured / GIB
    # the plan's JSON has four digits behind the point
    is_near = abs(planned_gib - measured_gib) <= max(tolerance * measured_gib, 1e-4)
    return {"planned": planned_gib, "measured": round(measured_gib, 4), "ok": is_near}


# -- ranks


@dataclass(frozen=True, kw_only=True)
class FakeDist(Dist):
    """Rank 0 of ranks that answer at once; the mesh was made before the tensors became fake."""

    fake_mesh: DeviceMesh | None = None

    def mesh(self) -> DeviceMesh:
        assert self.fake_mesh is not None
        return self.fake_mesh


@contextlib.contextmanager
def _ranks(world_size: int) -> Iterator[Dist]:
    """A fake process group of so many ranks, or none for one rank."""
    if world_size == 1:
        yield Dist()
        return
    store = FakeStore()
    torch.distributed.init_process_group("fake", store=store, rank=0, world_size=world_size)
    try:
        mesh = init_device_mesh("cpu", (world_size,))
        yield FakeDist(world_size=world_size, fake_mesh=mesh)
    finally:
        torch.distributed.destroy_process_group()


# -- the steps


def _measure(
    spec: RunSpec, plan: dict[str, Any], stage: dict[str, Any], dist: Dist
) -> dict[str, float]:
    """Bytes by term of two steps, and the largest sum of live storages."""
    rows, seq_len = stage["device_batch_size"], stage["seq_len"]
    book = Book(rows, seq_len, is_fused=spec.runtime.compile)
    with FakeTensorMode(allow_non_fake_inputs=True), book:
        model, precision = _build(spec, plan, dist)
        optimizer = build_optimizer(
            model,
            dist=dist,
            n_embd=model.config.n_embd,
            embedding_lr=0.1,
            unembedding_lr=0.1,
            matrix_lr=0.1,
            weight_decay=0.1,
        )
        terms = {"params": _bytes(model.parameters()), "optimizer": _state_bytes(optimizer)}
        for _ in range(NUM_STEPS):
            terms |= _step(model, optimizer, precision, book, stage["grad_accum_steps"])
    return {**terms, "peak": book.peak}


def _build(
    spec: RunSpec, plan: dict[str, Any], dist: Dist
) -> tuple[GPT, AbstractContextManager[Any]]:
    """The model in its layout, and the context of its forward passes (as stages build it)."""
    config = gpt_config(spec.model)
    is_bf16 = spec.runtime.dtype == "bf16" or (
        spec.runtime.dtype == "auto" and plan["offer"] != "cpu"
    )
    if plan["sharding"] == "replicated" or dist.world_size == 1:
        model = GPT(config)
        model.recompute = plan["recompute"]
        on_bf16 = torch.autocast("cpu", torch.bfloat16)
        return model, on_bf16 if is_bf16 else contextlib.nullcontext()
    with torch.device("meta"):
        model = GPT(config)
    half = torch.bfloat16 if is_bf16 else None
    shard_model(model, dist, recompute=plan["recompute"], compute_dtype=half)
    model.to_empty(device="cpu")
    return model, contextlib.nullcontext()


def _step(
    model: GPT,
    optimizer: Optimizer,
    precision: AbstractContextManager[Any],
    book: "Book",
    num_micro_steps: int,
) -> dict[str, float]:
    """One optimizer step; bytes of activations and gradients at their largest."""
    activations = 0.0
    for _ in range(min(num_micro_steps, MOST_MICRO_STEPS)):
        inputs, targets = book.tokens(), book.tokens()
        with precision:
            loss = model(inputs, targets, reduction="sum")
        kept = book.peak_of_tokens = book.look()
        (loss / book.rows).backward()
        # recomputed, the largest moment is within the backward pass
        activations = max(activations, book.peak_of_tokens if model.recompute else kept)
    grads = _bytes(p.grad for p in model.parameters() if p.grad is not None)
    optimizer.step(max_grad_norm=1.0)
    return {"activations": activations, "grads": grads}


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def _bytes(tensors: Any) -> float:
    return float(sum(_local(t).numel() * t.element_size() for t in tensors))


def _state_bytes(optimizer: Optimizer) -> float:
    return _bytes(t for t in optimizer.state_dict().values() if t.dim() > 0)


# -- the book of live storages


@dataclass(frozen=True)
class Entry:
    """One storage."""

    reference: StorageWeakRef
    share: float
    """Of its bytes, what a GPU would hold."""

    @property
    def is_alive(self) -> bool:
        return not self.reference.expired()

    def num_bytes(self) -> float | None:
        """Its present size, since FSDP2 empties storages and fills them again; None: it is gone."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self.reference.cdata)
        return None if storage is None else self.share * storage.nbytes()


class Book(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and of those that hold something per token.

    Whatever an operation makes from something per token is per token too, except for the gradients
    of weights and what the loss makes, which the plan counts with the logits. is_fused: see above.
    """

    def __init__(self, rows: int, seq_len: int, *, is_fused: bool) -> None:
        super().__init__()
        self.rows, self.seq_len = rows, seq_len
        self.is_fused = is_fused
        self.peak = 0.0
        self.peak_of_tokens = 0.0
        self._live: dict[int, Entry] = {}
        self._of_tokens: set[int] = set()
        """Keys of what was computed from the step's tokens and holds something for each of them."""
        self._calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        source = None if self._makes_gradient_of_weight(func, args) else self._tokens_among(args)
        for leaf in out if isinstance(out, tuple | list) else (out,):
            if isinstance(leaf, Tensor):
                self._note(leaf, source)
        self._calls += 1
        if self._calls % LOOK_EVERY_CALLS == 0:
            self._sum()
        if not self.is_fused or _name(func) in PRODUCTS or ATTENTION in _name(func):
            self._look_at_tokens()
        return out

    def tokens(self) -> Tensor:
        """Input of a forward pass: [rows, seq_len] int64."""
        tokens = torch.zeros(self.rows, self.seq_len, dtype=torch.int64)
        storage = tokens.untyped_storage()
        self._book(storage, 1.0, True)
        return tokens

    def _makes_gradient_of_weight(self, func: Any, args: tuple[Any, ...]) -> bool:
        """Whether a result sums over tokens: the product of two things that hold some, a lookup's
        gradient, or what the loss makes."""
        if func.namespace == "nanochat" or _name(func) == "embedding_dense_backward":
            return True
        return _name(func) in PRODUCTS and all(self._tokens_among((a,)) is not None for a in args)

    def _tokens_among(self, args: tuple[Any, ...]) -> Tensor | None:
        """The first argument that holds something per token."""
        for leaf in args:
            if type(leaf) is FakeTensor:
                key = leaf.untyped_storage()._cdata
                if key in self._of_tokens and self._live[key].is_alive:
                    return leaf
            elif isinstance(leaf, list | tuple) and leaf and isinstance(leaf[0], Tensor):
                found = self._tokens_among(tuple(leaf[:4]))
                if found is not None:
                    return found
        return None

    def _note(self, tensor: Tensor, source: Tensor | None) -> None:
        """Book the storage of a result; `source` is what per token it was computed from."""
        storage = _local(tensor).untyped_storage()
        known = self._live.get(storage._cdata)
        if known is not None and known.is_alive:
            return
        # the float copy that the RMS norm of a CPU makes; a GPU's kernel keeps its input instead,
        # which for queries and keys (of four dimensions) is part of a product that is there anyway
        is_copy = (
            source is not None
            and (source.element_size(), tensor.element_size()) == (2, 4)
            and tensor.shape == source.shape
        )
        share = (0.5 if tensor.dim() == 3 else 0.0) if is_copy else 1.0
        self._book(storage, share, source is not None)

    def _book(self, storage: torch.UntypedStorage, share: float, of_tokens: bool) -> None:
        key = storage._cdata
        self._live[key] = Entry(StorageWeakRef(storage), share)
        (self._of_tokens.add if of_tokens else self._of_tokens.discard)(key)

    def look(self) -> float:
        """Note the largest sums; returns the bytes that hold something per token."""
        self._sum()
        return self._look_at_tokens()

    def _sum(self) -> None:
        """Drop what has died, note the largest sum of all."""
        self._live = {key: e for key, e in self._live.items() if e.is_alive}
        self._of_tokens &= self._live.keys()
        self.peak = max(self.peak, sum(e.num_bytes() or 0.0 for e in self._live.values()))

    def _look_at_tokens(self) -> float:
        of_tokens = sum(self._live[key].num_bytes() or 0.0 for key in self._of_tokens)
        self.peak_of_tokens = max(self.peak_of_tokens, of_tokens)
        return of_tokens


def _name(func: Any) -> str:
    """`mm` of aten.mm.default."""
    return str(func.overloadpacket.__name__)


if __name__ == "__main__":
    main()
