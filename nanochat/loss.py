"""Cross-entropy of the soft-capped language-model head, without the logits.

What is special here:
- The logits of one step are the largest tensor of training (16,384 tokens x 32,768 entries in
  float32 = 2.1 GB, several times over in autograd). Here they live one chunk of rows at a time.
- A mean or a sum needs no second pass: the weight of every row is known beforehand, so that the
  gradients of features and head are computed while the chunk is at hand, and the backward pass
  only scales them. Per-row losses recompute the chunk in the backward pass instead.
- The soft cap bounds the logits, so the softmax needs no search for its maximum: with
  r = sigmoid(-2x/cap), cap*tanh(x/cap) - cap = -2*cap*r and its derivative is 4r(1 - r).
- The operators are opaque to torch.compile (one node each), which therefore can neither
  materialise the logits nor break the graph; inside a compiled model the row-wise arithmetic is
  compiled on its own.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "sum", "none"]

SOFTCAP = 15.0
IGNORED_TARGET = -100
"""torch's own `ignore_index`: positions with this target count in no loss."""

CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**30, "mps": 2**28}
"""Size of the logits held at once: enough rows for the matrix product to run at its full speed."""

BLOCK_BYTES = {"cpu": 2**21, "cuda": 2**28, "mps": 2**26}
"""Size of the logits that go through the row-wise arithmetic at once, per thread on a CPU, whose
second-level cache then holds them: at 2 MiB it takes a third of the time that it takes at 64."""

LOG2_E = math.log2(math.e)


def softcap(logits: Tensor) -> Tensor:
    """15 * tanh(x / 15), elementwise (the soft cap of Gemma 2, arXiv 2408.00118)."""
    return SOFTCAP * torch.tanh(logits / SOFTCAP)


def chunk_rows(vocab_size: int, itemsize: int, device_type: str) -> int:
    """Rows of logits held at once, for a vocabulary and the bytes of one logit."""
    return max(1, CHUNK_BYTES[device_type] // (vocab_size * itemsize))


def head_loss(
    x: Tensor, weight: Tensor, targets: Tensor, reduction: Reduction, *, compiled: bool = False
) -> Tensor:
    """Cross-entropy of softcap(x @ weight.T) against targets.

    x: [N, D] in the compute dtype. weight: [V, D], any floating dtype. targets: [N] int64 in
    [0, V), or IGNORED_TARGET. Returns a scalar for "mean" (over the targets not ignored; 0 when
    there are none) and "sum", [N] for "none" (0 where ignored); float32, or float64 when x is.
    compiled: whether the row-wise arithmetic is compiled too.
    """
    if reduction == "none":
        return _row_losses(x, weight, targets, compiled)
    row_weights = (targets != IGNORED_TARGET).to(_loss_dtype(x))
    if reduction == "mean":
        row_weights = row_weights / row_weights.sum().clamp(min=1)
    if not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        return (_row_losses(x, weight, targets, compiled) * row_weights).sum()
    return _weighted_loss(x, weight, targets, row_weights, compiled)[0]


# -----------------------------------------------------------------------------
# The two operators


def _row_losses_kernel(x: Tensor, weight: Tensor, targets: Tensor, compiled: bool) -> Tensor:
    """Loss of every row, [N]."""
    losses = torch.empty(len(x), dtype=_loss_dtype(x), device=x.device)
    valid = targets != IGNORED_TARGET
    columns = torch.where(valid, targets, 0)[:, None]
    row_wise = _compiled(_losses_of_rows) if compiled else _losses_of_rows
    with torch.autocast(x.device.type, enabled=False):
        for start, logits in _logit_chunks(x, weight.to(x.dtype)):
            for rows, block in _row_blocks(start, logits):
                losses[rows] = row_wise(block, columns[rows])
    return torch.where(valid, losses, 0)


def _weighted_loss_kernel(
    x: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor, compiled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of row_weights * losses, its gradient by x, its gradient by weight)."""
    losses = torch.empty(len(x), dtype=_loss_dtype(x), device=x.device)
    grad_x = torch.empty_like(x)
    grad_weight = torch.empty(weight.shape, dtype=_loss_dtype(x), device=x.device)
    valid = targets != IGNORED_TARGET
    columns = torch.where(valid, targets, 0)[:, None]
    row_weights = torch.where(valid, row_weights, 0)
    row_wise = _compiled(_gradient_of_rows) if compiled else _gradient_of_rows
    with torch.autocast(x.device.type, enabled=False):
        cast_weight = weight.to(x.dtype)
        for start, logits in _logit_chunks(x, cast_weight):
            for rows, block in _row_blocks(start, logits):
                losses[rows], at_target = row_wise(block, columns[rows], row_weights[rows])
                block.scatter_add_(1, columns[rows], at_target.to(block.dtype)[:, None])
            chunk = slice(start, start + len(logits))
            torch.mm(logits, cast_weight, out=grad_x[chunk])
            _accumulate_outer(grad_weight, logits, x[chunk], first=start == 0)
        loss = (losses * row_weights).sum()
    return loss, grad_x, grad_weight.to(weight.dtype)


def _logit_chunks(x: Tensor, weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, logits before the soft cap) of each chunk, all in one reused buffer."""
    step = min(len(x), chunk_rows(len(weight), x.element_size(), x.device.type))
    buffer = x.new_empty(step, len(weight))
    for start in range(0, len(x), step):
        logits = buffer[: min(step, len(x) - start)]
        torch.mm(x[start : start + step], weight.T, out=logits)
        yield start, logits


def _row_blocks(start: int, logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows of the whole, their logits) in blocks of BLOCK_BYTES; `start` is the first row."""
    threads = torch.get_num_threads() if logits.device.type == "cpu" else 1
    row_bytes = logits.size(1) * logits.element_size()
    step = max(1, BLOCK_BYTES[logits.device.type] * threads // row_bytes)
    for block in logits.split(step):
        yield slice(start, start + len(block)), block
        start += len(block)


def _accumulate_outer(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """total += left.T @ right (or = for the first), the sum in total's own precision."""
    if total.dtype == left.dtype:
        total.addmm_(left.T, right, beta=0 if first else 1)
    elif total.is_cuda:
        # cuBLAS adds to float32 itself: at d20 a tenth faster, and no product is rounded to bf16
        if first:
            total.zero_()
        torch.addmm(total, left.T, right, out_dtype=total.dtype, out=total)
    elif first:
        total.copy_(left.T @ right)
    else:
        total.add_(left.T @ right)


def _losses_of_rows(logits: Tensor, columns: Tensor) -> Tensor:
    """Losses [rows] at columns [rows, 1]; logits [rows, V] of the loss's dtype are overwritten."""
    r = logits.to(_loss_dtype(logits)).mul_(-2 / SOFTCAP).sigmoid_()
    r_target = r.gather(1, columns)[:, 0]
    # torch's exp2 is several times faster on a CPU than its exp.
    sums = r.mul_(-2 * SOFTCAP * LOG2_E).exp2_().sum(1)
    return sums.log() + 2 * SOFTCAP * r_target


def _gradient_of_rows(
    logits: Tensor, columns: Tensor, row_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses [rows], and what is left to be added to the gradient at columns [rows, 1].

    The logits [rows, V] are overwritten with the rest of their weighted gradient: with
    p = softmax(softcap(x)), d loss / d x = (p - onehot) * 4r(1 - r); see the module text.
    """
    r = logits.to(_loss_dtype(logits)).mul_(-2 / SOFTCAP).sigmoid_()
    exps = torch.mul(r, -2 * SOFTCAP * LOG2_E).exp2_()
    sums = exps.sum(1)
    r_target = r.gather(1, columns)[:, 0]
    gradient = r.addcmul_(r, r, value=-1).mul_(exps).mul_((4 * row_weights / sums)[:, None])
    if gradient.dtype != logits.dtype:
        logits.copy_(gradient)
    losses = sums.log() + 2 * SOFTCAP * r_target
    return losses, (r_target.square() - r_target) * 4 * row_weights


def _loss_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# -----------------------------------------------------------------------------
# The compiler is imported where it is wanted: that alone takes seconds. (torch.library.custom_op
# would import it at the first call.)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


@functools.cache
def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compiler.disable(function)


def _define(name: str, schema: str, kernel: Callable[..., Any]) -> Any:
    """Register an operator; returns what calls it."""

    def call(*args: Any) -> Any:
        return _untraced(kernel)(*args) if args[-1] else kernel(*args)

    torch.library.define(f"nanochat::{name}", schema)
    torch.library.impl(f"nanochat::{name}", "default", call)
    return getattr(torch.ops.nanochat, name).default


_row_losses = _define(
    "row_losses",
    "(Tensor x, Tensor weight, Tensor targets, bool compiled) -> Tensor",
    _row_losses_kernel,
)
_weighted_loss = _define(
    "weighted_loss",
    "(Tensor x, Tensor weight, Tensor targets, Tensor row_weights, bool compiled)"
    " -> (Tensor, Tensor, Tensor)",
    _weighted_loss_kernel,
)


# -----------------------------------------------------------------------------
# Shapes for tracing, and gradients


@torch.library.register_fake("nanochat::row_losses")
def _(x: Tensor, weight: Tensor, targets: Tensor, compiled: bool) -> Tensor:
    return x.new_empty(x.shape[0], dtype=_loss_dtype(x))


@torch.library.register_fake("nanochat::weighted_loss")
def _(
    x: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor, compiled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty((), dtype=_loss_dtype(x)), torch.empty_like(x), torch.empty_like(weight)


def _save_row_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, targets, ctx.compiled = inputs
    ctx.save_for_backward(x, weight, targets)


def _row_losses_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    _, grad_x, grad_weight = _weighted_loss(*ctx.saved_tensors, grad, ctx.compiled)
    return grad_x, grad_weight, None, None


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _weighted_loss_backward(ctx: Any, grad: Tensor, *unused: None) -> tuple[Tensor | None, ...]:
    grad_x, grad_weight = ctx.saved_tensors
    return grad_x * grad.to(grad_x.dtype), grad_weight * grad, None, None, None


torch.library.register_autograd(
    "nanochat::row_losses", _row_losses_backward, setup_context=_save_row_inputs
)
torch.library.register_autograd(
    "nanochat::weighted_loss", _weighted_loss_backward, setup_context=_save_gradients
)
