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
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "sum", "none"]

SOFTCAP = 15.0
IGNORED_TARGET = -100
"""torch's own `ignore_index`: positions with this target count in no loss."""

CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**30, "mps": 2**28}
"""Size of one chunk of logits, chosen so that a CPU's last-level cache holds it and that a GPU's
matrix multiplications are large."""


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
    losses = torch.zeros(len(x), dtype=_loss_dtype(x), device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        weight = weight.to(x.dtype)
        kernel = _compiled(_losses_of_chunk) if compiled else _losses_of_chunk
        for rows, logits in _logit_chunks(x, weight):
            losses[rows] = kernel(logits, targets[rows])
    return losses


def _weighted_loss_kernel(
    x: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor, compiled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of row_weights * losses, its gradient by x, its gradient by weight)."""
    losses = torch.zeros(len(x), dtype=_loss_dtype(x), device=x.device)
    grad_x = torch.empty_like(x)
    grad_weight = torch.zeros(weight.shape, dtype=_loss_dtype(x), device=x.device)
    weight_dtype = weight.dtype
    with torch.autocast(x.device.type, enabled=False):
        weight = weight.to(x.dtype)
        kernel = _compiled(_gradient_of_chunk) if compiled else _gradient_of_chunk
        for rows, logits in _logit_chunks(x, weight):
            losses[rows] = kernel(logits, targets[rows], row_weights[rows])
            torch.mm(logits, weight, out=grad_x[rows])
            _accumulate_outer(grad_weight, logits, x[rows])
    return (losses * row_weights).sum(), grad_x, grad_weight.to(weight_dtype)


def _logit_chunks(x: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their logits before the soft cap), all in one reused buffer."""
    step = min(len(x), chunk_rows(len(weight), x.element_size(), x.device.type))
    buffer = x.new_empty(step, len(weight))
    for start in range(0, len(x), step):
        rows = slice(start, min(start + step, len(x)))
        logits = buffer[: rows.stop - start]
        torch.mm(x[rows], weight.T, out=logits)
        yield rows, logits


def _accumulate_outer(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left.T @ right, with the sum over chunks kept in total's own precision."""
    if total.dtype == left.dtype:
        total.addmm_(left.T, right)
    else:
        total.add_(left.T @ right)


def _losses_of_chunk(logits: Tensor, targets: Tensor) -> Tensor:
    """Losses [rows]; the logits [rows, V] are overwritten where they have the loss's dtype."""
    r = logits.to(_loss_dtype(logits)).mul_(-2 / SOFTCAP).sigmoid_()
    valid = targets != IGNORED_TARGET
    r_target = r.gather(1, torch.where(valid, targets, 0)[:, None])[:, 0]
    losses = r.mul_(-2 * SOFTCAP).exp_().sum(1).log() + 2 * SOFTCAP * r_target
    return torch.where(valid, losses, 0)


def _gradient_of_chunk(logits: Tensor, targets: Tensor, row_weights: Tensor) -> Tensor:
    """Losses [rows]; the logits [rows, V] are overwritten with their weighted gradient.

    With p = softmax(softcap(x)), d loss / d x = (p - onehot) * 4r(1 - r); see the module text.
    """
    r = logits.to(_loss_dtype(logits)).mul_(-2 / SOFTCAP).sigmoid_()
    exps = torch.mul(r, -2 * SOFTCAP).exp_()
    sums = exps.sum(1)
    valid = targets != IGNORED_TARGET
    column = torch.where(valid, targets, 0)[:, None]
    losses = sums.log() + 2 * SOFTCAP * r.gather(1, column)[:, 0]
    slope = r.addcmul_(r, r, value=-1)
    row_weights = torch.where(valid, row_weights, 0)
    hit = slope.gather(1, column) * (-4 * row_weights)[:, None]
    gradient = slope.mul_(exps).mul_((4 * row_weights / sums)[:, None])
    gradient.scatter_add_(1, column, hit)
    if gradient.dtype != logits.dtype:
        logits.copy_(gradient)
    return torch.where(valid, losses, 0)


def _loss_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# -----------------------------------------------------------------------------
# The compiler is imported where it is wanted: that alone takes seconds. (torch.library.custom_op
# would import it at the first call.)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


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
