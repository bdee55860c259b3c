"""Memory of a training step by term, per device, counted from the model's own tensors.

* Parameters, gradients and optimizer state are exact. Activations are the tensors that the backward
  pass reads, counted operation by operation; `plan --rehearse` holds the count against the real
  model with fake tensors.
* The total is that of the start of the backward pass, when all activations are there.
* What is counted stands in a `Code`, so that the published figures of other training codes can be
  held against the same arithmetic (tests/golden).
"""

import functools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from infra.hardware import GIB, Offer
from nanochat.scaling import GPTConfig, num_params, num_params_per_layer

FRAGMENTATION = 0.03
"""Share of the tensors' bytes that the caching allocator cannot use (blocks of other sizes)."""
CONTEXT_BYTES = {False: 1.2 * GIB, True: 0.5 * GIB}
"""CUDA context, library workspaces and NCCL buffers on a GPU; the interpreter and torch on a CPU.
Keys: whether it is a CPU."""
USABLE_SHARE = {False: 0.97, True: 0.80}
"""Share of a device's memory that a plan may fill; a CPU's is shared with all else that runs."""

STACK_NUMEL = 2**25
"""optim.STACK_NUMEL: elements whose Newton-Schulz runs at a time."""
CHUNK_BYTES = {False: 2**30, True: 2**26}
"""loss.CHUNK_BYTES: logits that are held at a time. Keys: whether it is a CPU."""
BLOCK_BYTES = {False: 2**28, True: 2**21}
"""loss.BLOCK_BYTES: of these, what goes through the row-wise arithmetic at a time; in eager mode
with two float32 copies. Keys: whether it is a CPU."""


@dataclass(frozen=True, kw_only=True)
class Code:
    """What a training code keeps and moves: counted in its source, not fitted."""

    kept_d: int = 15
    """Tensors [token, n_embd] in the compute dtype that a block keeps: x and its norm, q in the
    joint product, rotated q, the attention's output, x and its norm before the MLP, and the MLP's
    product and its square at four widths each."""
    kept_kv: int = 3
    """Tensors as wide as the keys: k and v in the joint product, rotated k."""
    kept_recomputed_d: float = 1.0
    """Of these, in widths of n_embd, what a block keeps where it is recomputed: its input."""
    in_hand_compiled: int = 3
    """Tensors [token, n_embd] more at the peak of a recomputed block's backward pass, behind the
    MLP's second product: its gradient at four widths and that of the residual stream, less the
    block's input and the last x and its norm, which are counted elsewhere."""
    in_hand_eager: int = 11
    """The same without fusion, within the square's backward pass: two temporaries and the result
    of four widths each, while the square itself is gone."""
    held_logit_bytes: int = 0
    """Bytes per logit where all of a forward pass are there at a time; 0: a chunk of them is."""
    stale_bytes_per_matrix_param: float = 0.0
    """Buffers of the last step's collectives that are still there, per matrix parameter."""
    stale_bytes_per_param: float = 0.0
    passes_compiled: int = 52
    """Reads and writes of a [token, n_embd] tensor per block, forward and backward, outside of
    matrix products and attention, when pointwise work is fused."""
    passes_eager: int = 170
    """The same without fusion."""
    logit_passes: int = 4
    """Reads and writes of the logits in the compute dtype, outside of matrix products."""
    recomputed_products: float = 1.0
    """Share of the FLOPs of a block's matrix products that recomputation does again."""
    recomputes_attention: bool = True
    uses_muon: bool = True
    """Else AdamW has two moments of every parameter."""


OURS = Code()


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
    code: Code = OURS

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
        state = self.params + self.grads + self.optimizer
        return state + self.activations + self.logits + self.overhead

    @property
    def fits(self) -> bool:
        return self.total <= self.available

    def to_json(self) -> dict[str, float]:
        """`memory_gib` of plan --json."""
        tree = {k: round(v / GIB, 4) for k, v in vars(self).items()}
        return {**tree, "total": round(self.total / GIB, 4)}


def step_memory(c: GPTConfig, layout: Layout, rows: int, offer: Offer) -> Memory:
    """Largest memory of a step with `rows` rows per device and forward pass."""
    return memory_by_rows(c, layout, offer)(rows)


def memory_by_rows(c: GPTConfig, layout: Layout, offer: Offer) -> Callable[[int], Memory]:
    """Rows per device and forward pass -> `step_memory`; what rows do not change is counted once,
    since a search asks for many."""
    weights, optimizer, loose = state_bytes(c, layout)
    per_token = activation_bytes_per_token(c, layout)
    available = offer.memory_gib * GIB * USABLE_SHARE[offer.cpu]

    @functools.cache
    def memory(rows: int) -> Memory:
        tokens = rows * c.seq_len
        activations = float(tokens * per_token)
        logits = logit_bytes(c, layout, tokens)
        in_tensors = 2 * weights + optimizer + activations + logits
        return Memory(
            params=weights,
            grads=weights,
            optimizer=optimizer,
            activations=activations,
            logits=logits,
            overhead=FRAGMENTATION * in_tensors + loose,
            available=available,
        )

    return memory


@functools.lru_cache(maxsize=1024)
def state_bytes(c: GPTConfig, layout: Layout) -> tuple[float, float, float]:
    """Whatever the rows are: weights, optimizer state, and the overhead of context, casts of the
    weights and the last step's buffers."""
    stale = layout.code.stale_bytes_per_matrix_param * c.n_layer * num_params_per_layer(c)
    stale += layout.code.stale_bytes_per_param * num_params(c)
    loose = CONTEXT_BYTES[layout.cpu] + weight_casts(c, layout) + stale
    return float(4 * held_params(c, layout)), float(optimizer_bytes(c, layout)), loose


@functools.lru_cache(maxsize=1024)
def matrix_shapes(c: GPTConfig) -> Counter[tuple[int, int]]:
    """Shape -> number of the matrices of all blocks (rows are outputs)."""
    d, kv = c.n_embd, c.n_kv_head * c.head_dim
    per_layer = [(d, d), (kv, d), (kv, d), (d, d), (4 * d, d), (d, 4 * d)]
    return Counter({shape: c.n_layer * n for shape, n in Counter(per_layer).items()})


def held_params(c: GPTConfig, layout: Layout) -> int:
    """Parameters on the first device: all, or its slice of each matrix (FSDP2 cuts rows)."""
    if not layout.fsdp:
        return num_params(c)
    parts = layout.world_size
    matrices = sum(n * math.ceil(r / parts) * k for (r, k), n in matrix_shapes(c).items())
    return matrices + 2 * math.ceil(c.vocab_size / parts) * c.n_embd


def optimizer_bytes(c: GPTConfig, layout: Layout) -> int:
    """State on the first device: Muon's momentum of the matrices, AdamW's two moments of the ends.

    Replicated, a device has the state of whole matrices and of rows; sharded, of its slices.
    """
    parts = layout.world_size
    ends = 8 * 2 * math.ceil(c.vocab_size / parts) * c.n_embd
    if layout.fsdp:
        matrices = sum(n * math.ceil(r / parts) * k for (r, k), n in matrix_shapes(c).items())
        return ends + (4 if layout.code.uses_muon else 8) * matrices
    owned = 0
    for (rows, cols), n in matrix_shapes(c).items():
        group = parts * max(1, STACK_NUMEL // (rows * cols * parts))
        full, rest = divmod(n, group)
        owned += (full * group // parts + math.ceil(rest / parts)) * rows * cols
    return ends + 4 * owned


def activation_bytes_per_token(c: GPTConfig, layout: Layout) -> float:
    """Bytes that the backward pass reads: of all blocks; or, recomputed, of every block's input,
    of one block, and of the gradients that are in hand there."""
    block, wide = layer_activations(c, layout), c.n_embd * layout.itemsize
    kept: float = c.n_layer * block
    if layout.recompute:
        code = layout.code
        in_hand = code.in_hand_compiled if layout.compiled else code.in_hand_eager
        kept = c.n_layer * code.kept_recomputed_d * wide + block + in_hand * wide
    # the embedding in float32, the last x and its norm, token ids and targets
    ends = 4 * c.n_embd + 2 * wide + 16
    return kept + ends


def layer_activations(c: GPTConfig, layout: Layout) -> int:
    """Bytes per token that the backward pass of one block reads; see Code."""
    d, kv, code = c.n_embd, c.n_kv_head * c.head_dim, layout.code
    wide = layout.itemsize * (code.kept_d * d + code.kept_kv * kv)
    dropped = 2 * d if c.dropout else 0  # a byte of mask per value, two places
    statistics = 4 * (2 + 2 * c.n_head + c.n_kv_head)  # of the norms and of the attention
    return wide + dropped + statistics


def logit_bytes(c: GPTConfig, layout: Layout, tokens: int) -> float:
    """Logits at a time, and the gradients of head and features that the loss makes with them."""
    if layout.code.held_logit_bytes:
        return float(tokens * c.vocab_size * layout.code.held_logit_bytes)
    all_logits = tokens * c.vocab_size * layout.itemsize
    chunk = min(CHUNK_BYTES[layout.cpu], all_logits)
    if not layout.compiled:
        chunk += 2 * min(BLOCK_BYTES[layout.cpu], all_logits) * 4 // layout.itemsize
    weight_itemsize = layout.itemsize if layout.fsdp else 4
    return float(chunk + c.vocab_size * c.n_embd * weight_itemsize + tokens * c.n_embd * 4)


def weight_casts(c: GPTConfig, layout: Layout) -> float:
    """Bytes of the weights in the compute dtype. Replicated: of all matrices, while they are used.
    Sharded: of two gathered blocks with the gradients of one, and of embedding and head."""
    block, ends = num_params_per_layer(c), 2 * c.vocab_size * c.n_embd
    if layout.fsdp:
        return float(block * (3 * layout.itemsize + 4) + ends * (2 * layout.itemsize + 4))
    if layout.itemsize == 4:
        return 0.0
    return float(layout.itemsize * (c.n_layer * block + c.vocab_size * c.n_embd))
