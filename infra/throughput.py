"""Time of a training step: a roofline of its own operations, corrected by one fitted factor.

* Matrix products at the best rate that others measured for the GPU, attention at the published rate
  of FlashAttention-2, elementwise work at memory bandwidth, Newton-Schulz with the matrix products.
* Communication by the bytes that each layout sends over the bus bandwidth of the machine's links;
  what FSDP sends runs beside the computation, the rest does not.
* Fitted, and nothing else: ACHIEVED (shapes that are not the best, gaps between kernels, clocks
  under load) on nanochat's d20 on 8 x H100, FSDP_EXPOSED on one row of llm-foundry, and the two
  numbers of the CPU. tests/unit/test_planner.py holds the other public runs back.
"""

from dataclasses import dataclass

from infra.hardware import Offer
from infra.memory import Layout
from nanochat.scaling import (
    GPTConfig,
    flops_per_token,
    num_params,
    num_params_matmul,
    num_params_per_layer,
)

ACHIEVED = 0.79
"""Share of the roofline that a training step reaches on a GPU. Fitted."""
FSDP_EXPOSED = 0.2
"""Share of FSDP's traffic that the computation does not hide even where it is longer: the first
and the last block, and the multiprocessors that NCCL takes. Fitted."""
CPU_ACHIEVED = {True: 0.45, False: 0.24}
"""The same for a CPU against its measured matrix product, compiled and eager. Fitted."""
CPU_HALF_WIDTH = 64
"""Width at which a CPU reaches half of that. Fitted."""

TF32_SHARE = 0.5
"""What a GPU's matrix units do in TF32, which fp32 trains in there (distributed.
choose_float32_kernels), of what they do in bf16: half on every data sheet (A100 156 of 312 TFLOP/s,
H100 SXM 494.5 of 989, H100 PCIe 378 of 756, L40S 183 of 362, RTX 4090 82.6 of 165.2)."""
BANDWIDTH_SHARE = 0.9
"""Of the data sheet's memory bandwidth, what a long copy reaches."""
NEWTON_SCHULZ_STEPS = 5
FORWARD_SHARE = 1 / 3
STEP_OVERHEAD_S = {False: 0.005, True: 0.003}
"""Loader, logging and asking about a stop, per step."""
EAGER_LAUNCH_S = 10e-6 * 60
"""Per block and micro-step in eager mode: about 60 kernels forward and backward."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by cause; `exposed_s` is communication that nothing hides."""

    compute_s: float
    exposed_s: float
    optimizer_s: float
    overhead_s: float

    @property
    def total_s(self) -> float:
        return self.compute_s + self.exposed_s + self.optimizer_s + self.overhead_s


def step_time(c: GPTConfig, layout: Layout, offer: Offer, rows: int, accum: int) -> StepTime:
    """One optimizer step of `accum` forward and backward passes of `rows` rows per device."""
    tokens = rows * c.seq_len
    micro_s = tokens * token_s(c, layout, offer)
    if not layout.compiled and not layout.cpu:
        micro_s = max(micro_s, c.n_layer * EAGER_LAUNCH_S)
    exposed_s = 0.0
    if layout.world_size > 1:
        sent_s = _micro_bytes(c, layout) / offer.link_bytes_per_s
        exposed_s = accum * max(FSDP_EXPOSED * sent_s, sent_s - micro_s)
        exposed_s += _step_bytes(c, layout) / offer.link_bytes_per_s
    return StepTime(
        compute_s=accum * micro_s,
        exposed_s=exposed_s,
        optimizer_s=optimizer_s(c, layout, offer),
        overhead_s=STEP_OVERHEAD_S[layout.cpu],
    )


def token_s(c: GPTConfig, layout: Layout, offer: Offer) -> float:
    """Seconds of forward and backward per token on one device."""
    attention_flops = 12.0 * c.n_layer * c.n_embd * c.seq_len
    again = 4 / 3 if layout.recompute else 1.0
    if layout.cpu:
        share = CPU_ACHIEVED[layout.compiled] * c.n_embd / (c.n_embd + CPU_HALF_WIDTH)
        return flops_per_token(c) * again / (offer.matmul_flops * share)
    head = 6 * c.vocab_size * c.n_embd
    code = layout.code
    kernels = TF32_SHARE if layout.itemsize == 4 else 1.0
    products = 1 + code.recomputed_products / 3 if layout.recompute else 1.0
    matmul_flops = (6 * num_params_matmul(c) - head) * products + head
    matmul_s = matmul_flops / (offer.matmul_flops * kernels)
    # the formula counts the full square; a causal kernel does half of it
    attention_flops *= (again if code.recomputes_attention else 1.0) / 2
    attention_s = attention_flops / (offer.attention_flops * kernels)
    passes = code.passes_compiled if layout.compiled else code.passes_eager
    passes *= c.n_layer * c.n_embd
    moved = layout.itemsize * (passes * again + code.logit_passes * c.vocab_size)
    elementwise_s = moved / (offer.memory_bytes_per_s * BANDWIDTH_SHARE)
    return (matmul_s + attention_s + elementwise_s) / ACHIEVED


def optimizer_s(c: GPTConfig, layout: Layout, offer: Offer) -> float:
    """Newton-Schulz, shared out over the ranks, and one pass over weights, gradients and state."""
    share = CPU_ACHIEVED[True] if layout.cpu else ACHIEVED
    flops = newton_schulz_flops(c) if layout.code.uses_muon else 0.0
    newton_s = flops / layout.world_size / (offer.matmul_flops * share)
    moved = 4 * 5 * num_params(c) / layout.world_size
    return newton_s + moved / (offer.memory_bytes_per_s * BANDWIDTH_SHARE)


def newton_schulz_flops(c: GPTConfig) -> float:
    """FLOPs of one step of Muon over all matrices.

    Per iteration, with r <= c the sides of a matrix: X X^T (2 r^2 c), its square (2 r^3), and the
    product with X (2 r^2 c).
    """
    d, kv = c.n_embd, c.n_kv_head * c.head_dim
    shapes = [(d, d), (kv, d), (kv, d), (d, d), (d, 4 * d), (d, 4 * d)]
    per_layer = sum(4 * r * r * k + 2 * r**3 for r, k in shapes)
    return float(NEWTON_SCHULZ_STEPS * c.n_layer * per_layer)


def _micro_bytes(c: GPTConfig, layout: Layout) -> float:
    """Bytes on the bus of every forward and backward pass: FSDP gathers the weights twice in the
    compute dtype and scatters the gradients in float32."""
    if not layout.fsdp:
        return 0.0
    share = (layout.world_size - 1) / layout.world_size
    return share * num_params(c) * (2 * layout.itemsize + 4)


def _step_bytes(c: GPTConfig, layout: Layout) -> float:
    """Bytes on the bus of every optimizer step: gradients scattered and weights gathered in
    float32 where replicated; slices sent to and fro for Newton-Schulz where sharded."""
    share = (layout.world_size - 1) / layout.world_size
    if layout.fsdp:
        return share * 2 * 4 * c.n_layer * num_params_per_layer(c) / layout.world_size
    return share * 2 * 4 * num_params(c)


def forward_s(c: GPTConfig, layout: Layout, offer: Offer, tokens: float) -> float:
    """Seconds of a forward pass over `tokens` tokens on all devices together."""
    return tokens * FORWARD_SHARE * token_s(c, layout, offer) / layout.world_size


def decode_s(c: GPTConfig, offer: Offer) -> float:
    """Seconds of one generated token of a batch: all weights are read once."""
    launch_s = 20e-6 * (4 if offer.cpu else 8) * c.n_layer
    return max(launch_s, 4 * num_params(c) / offer.memory_bytes_per_s)
