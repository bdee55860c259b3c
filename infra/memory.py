"""Memory of a training step by term, per device, counted from the model's own tensors.

Parameters, gradients and optimizer state are exact. Activations are the tensors that the backward
pass reads, counted operation by operation; `plan --rehearse` holds the count against the real model
with fake tensors. Nothing here is fitted to a run but the two allowances at the top.
"""

import math
from dataclasses import asdict, dataclass, replace

from infra.hardware import GIB, Offer
from nanochat.scaling import GPTConfig, num_params, num_params_per_layer

FRAGMENTATION = 0.04
"""Share of the tensors' bytes that the caching allocator cannot use (blocks of other sizes)."""
CONTEXT_BYTES = {False: 1.2 * GIB, True: 0.7 * GIB}
"""CUDA context, library workspaces and NCCL buffers on a GPU; the interpreter and torch on a CPU.
Keys: whether it is a CPU."""
USABLE_SHARE = {False: 0.97, True: 0.80}
"""Share of a device's memory that a plan may fill; a CPU's is shared with all else that runs."""

STACK_BYTES = 4 * 2**25
"""optim.STACK_NUMEL in float32: matrices whose Newton-Schulz runs at a time."""
CHUNK_BYTES = {False: 2**30, True: 2**24}
"""loss.CHUNK_BYTES: logits that are held at a time. Keys: whether it is a CPU."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a training stage lies on its devices."""

    world_size: int
    fsdp: bool
    recompute: bool
    compiled: bool
    itemsize: int
    """Bytes of an activation: 2 in bf16, 4 in fp32."""
    cpu: bool = False

    @property
    def sharding(self) -> str:
        return "fsdp" if self.fsdp else "replicated"


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes per device."""

    params: float
    grads: float
    optimizer: float
    activations: float
    logits: float
    overhead: float
    available: float

    @property
    def total(self) -> float:
        return (
            self.params
            + self.grads
            + self.optimizer
            + self.activations
            + self.logits
            + self.overhead
        )

    @property
    def fits(self) -> bool:
        return self.total <= self.available

    def to_json(self) -> dict[str, float]:
        """`memory_gib` of plan --json."""
        tree = {k: round(v / GIB, 4) for k, v in asdict(self).items()}
        return {**tree, "total": round(self.total / GIB, 4)}


def step_memory(c: GPTConfig, layout: Layout, rows: int, offer: Offer) -> Memory:
    """Largest memory of a step with `rows` rows per device and forward pass."""
    parts = layout.world_size if layout.fsdp else 1
    tokens = rows * c.seq_len
    kept = c.n_layer * layer_activations(c, layout)
    if layout.recompute:
        kept = c.n_layer * c.n_embd * layout.itemsize + layer_activations(c, layout)
    ends = 3 * c.n_embd * layout.itemsize + 8  # embedded x, its norm, the final norm; token ids
    activations = tokens * (kept + ends) + weight_casts(c, layout)
    logits = min(CHUNK_BYTES[layout.cpu], tokens * c.vocab_size * layout.itemsize)
    logits += c.vocab_size * c.n_embd * (4 + layout.itemsize) + tokens * c.n_embd * layout.itemsize
    before = Memory(
        params=4 * num_params(c) / parts,
        grads=4 * num_params(c) / parts,
        optimizer=optimizer_bytes(c, layout),
        activations=activations,
        logits=logits,
        overhead=0.0,
        available=offer.memory_gib * GIB * USABLE_SHARE[offer.cpu],
    )
    return replace(before, overhead=CONTEXT_BYTES[layout.cpu] + FRAGMENTATION * before.total)


def layer_activations(c: GPTConfig, layout: Layout) -> float:
    """Bytes per token that the backward pass of one block reads.

    Eager: x, its norm, q k v as one tensor, rotated q and k in fp32, both normed, the attention's
    output and log-sum-exp, x and its norm before the MLP, relu and its square. Compiled, whatever
    is a pointwise function of a kept tensor is computed again: x twice, q k v, normed q and k, the
    attention's output, and the MLP's first product.
    """
    d, s = c.n_embd, layout.itemsize
    kv = c.n_kv_head * c.head_dim
    statistics = 4 * (c.n_head + 2 + c.n_head + c.n_kv_head)
    if layout.compiled:
        return s * (2 * d + (d + 2 * kv) + (d + kv) + d + 4 * d) + statistics
    rotated = 4 * (d + kv)
    return s * (2 * d + (d + 2 * kv) + (d + kv) + d + 2 * d + 8 * d) + rotated + statistics


def weight_casts(c: GPTConfig, layout: Layout) -> float:
    """Bytes of the weights in the compute dtype: of all of them, or of two gathered blocks."""
    if layout.fsdp:
        return 2 * layout.itemsize * num_params_per_layer(c)
    if layout.itemsize == 4:
        return 0.0
    return layout.itemsize * c.n_layer * num_params_per_layer(c)


def optimizer_bytes(c: GPTConfig, layout: Layout) -> float:
    """State on one device: Muon's momentum for the matrices, AdamW's two moments for the ends.

    Sharded over the ranks in both layouts: by whole matrices and rows, or by slices.
    """
    matrices = c.n_layer * num_params_per_layer(c)
    return (4 * matrices + 8 * 2 * c.vocab_size * c.n_embd) / layout.world_size


def largest_batch(
    c: GPTConfig, layout: Layout, offer: Offer, candidates: list[int]
) -> tuple[int, Memory] | None:
    """The largest of some device batches (rows) that fits, with its memory; None: none does."""
    for rows in sorted(candidates, reverse=True):
        memory = step_memory(c, layout, rows, offer)
        if memory.fits:
            return rows, memory
    return None


def checkpoint_copies(bytes_each: float, run_s: float, every_s: float) -> int:
    """Checkpoints that a stage of `run_s` seconds writes: by the clock, and one at its end."""
    return math.floor(run_s / every_s) + 1 if bytes_each else 0
