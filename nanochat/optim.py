"""Muon for the matrices of the blocks, AdamW for embedding and head, as one optimizer.

What is special here:
- Matrices of one shape are stacked, so that Newton-Schulz is a few batched multiplications.
- Replicated over ranks (every rank holds all weights): gradients are averaged at the step alone,
  each rank updates only the matrices and rows that it owns and keeps state only for those, and
  the weights are gathered. This is ZeRO-1 (arXiv 1910.02054) with whole matrices as its unit.
- Sharded by FSDP2 (every rank holds a slice of each matrix): slices travel such that a rank has a
  few whole matrices at a time, orthogonalises them, and sends the slices back.
- State has one entry per parameter and kind, whatever the layout; a checkpoint of one layout and
  world size therefore fills any other.

Muon: Keller Jordan 2024, https://kellerjordan.github.io/posts/muon; learning rates as nanochat,
October 2025. torch.optim.Muon and torch.optim.AdamW are the oracles in the tests.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim.adamw import adamw

from nanochat.distributed import Dist

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
NORM_EPS = 1e-7

ADAM_BETAS = (0.8, 0.95)
ADAM_EPS = 1e-10
ADAM_WIDTH = 768
"""Width at which the learning rates of AdamW hold as given."""

MOMENTUM_START, MOMENTUM_END, MOMENTUM_STEPS = 0.85, 0.95, 300

STACK_NUMEL = 2**25
"""Elements of one stack of matrices (128 MiB in float32), to bound temporaries."""


def muon_momentum(step: int) -> float:
    """nanochat's warm-up of the momentum, 0.85 to 0.95 over the first 300 steps."""
    done = min(step / MOMENTUM_STEPS, 1.0)
    return MOMENTUM_START + done * (MOMENTUM_END - MOMENTUM_START)


def newton_schulz_dtype(x: Tensor) -> torch.dtype:
    """bf16 where hardware multiplies it fast; float64 stays, so that layouts can be compared."""
    if x.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if x.is_cuda else torch.float32


def orthogonalize(stack: Tensor) -> Tensor:
    """Replace the singular values of each matrix by values near 1 (quintic Newton-Schulz).

    stack: [n, rows, cols] -> [n, rows, cols] in newton_schulz_dtype. A zero matrix stays zero.
    """
    a, b, c = NEWTON_SCHULZ
    x = stack.to(newton_schulz_dtype(stack))
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=NORM_EPS)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Optimizer:
    """AdamW and Muon over all parameters of a model.

    `step` uses the gradients up (they are None afterwards), since keeping them would cost one
    more copy of the model. The learning rates of a step are the base ones times the lr scale.
    """

    def __init__(self, groups: "list[Group]", dist: Dist, device: torch.device) -> None:
        self.groups = groups
        self.dist = dist
        self.lr_scale = 1.0
        self.momentum = MOMENTUM_END
        self.num_steps = torch.zeros((), device=device)

    def set_lr_scale(self, scale: float) -> None:
        """Factor of all learning rates from the next step on."""
        self.lr_scale = scale

    def set_momentum(self, momentum: float) -> None:
        """Muon's momentum from the next step on; see muon_momentum."""
        self.momentum = momentum

    def step(self, *, max_grad_norm: float | None = None) -> Tensor:
        """`reduce`, then `update`. Returns the global gradient norm, a scalar on the device."""
        norm = self.reduce(max_grad_norm)
        self.update()
        return norm

    @torch.no_grad()
    def reduce(self, max_grad_norm: float | None = None) -> Tensor:
        """Average the gradients over ranks and take them from the parameters.

        max_grad_norm: scale the gradients down to this global norm where they exceed it.
        Returns the global gradient norm before that, a scalar on the device. Without `update` the
        weights stay as they are.
        """
        gradients = [g for group in self.groups for g in group.reduce()]
        # float32 at least; float64 stays, so that layouts can be compared
        norms = torch.stack(
            [n if n.dtype == torch.float64 else n.float() for n in torch._foreach_norm(gradients)]
        )
        norm = self.dist.all_reduce_sum(norms.square().sum()).sqrt()
        if max_grad_norm is not None:
            torch._foreach_mul_(gradients, (max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @torch.no_grad()
    def update(self) -> None:
        """Change all weights by the gradients of the last `reduce`."""
        for group in self.groups:
            group.update(group.lr * self.lr_scale, self.momentum, self.num_steps)
        self.num_steps += 1

    def zero_grad(self) -> None:
        """Forget gradients that no step has used."""
        for group in self.groups:
            for p in group.params:
                p.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """`KIND.PARAMETER` -> the live state: whole tensors, DTensors, and of matrices only those
        that this rank owns. A checkpoint may fill them in place."""
        state = {"num_steps": self.num_steps}
        for group in self.groups:
            state |= group.state()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a state of the same layout. Raises KeyError for an entry that is missing."""
        for name, own in self.state_dict().items():
            own.copy_(state[name])


def build_optimizer(
    model: nn.Module,
    *,
    embedding_lr: float,
    unembedding_lr: float,
    matrix_lr: float,
    weight_decay: float,
    n_embd: int,
    dist: Dist | None = None,
) -> Optimizer:
    """The optimizer of a GPT (its parameters `wte.weight`, `lm_head.weight`, `blocks.*`).

    Learning rates are those at lr scale 1; AdamW's are scaled by (n_embd / 768)^-0.5.
    weight_decay: decoupled, times the learning rate, on the matrices of the blocks only.
    dist: the ranks that train the model together; alone where None.
    """
    dist = dist or Dist()
    parameters = dict(model.named_parameters())
    sharded = isinstance(parameters["wte.weight"], DTensor)
    adam_scale = (n_embd / ADAM_WIDTH) ** -0.5
    groups: list[Group] = []
    for name, lr in (("wte.weight", embedding_lr), ("lm_head.weight", unembedding_lr)):
        adam = ShardedAdamW if sharded else ReplicatedAdamW
        groups.append(adam(name, parameters.pop(name), lr * adam_scale, dist))
    by_shape = sorted(parameters.items(), key=lambda item: tuple(item[1].shape))
    for _, same in itertools.groupby(by_shape, key=lambda item: tuple(item[1].shape)):
        named = list(same)
        per_rank = max(1, STACK_NUMEL // (named[0][1].numel() * dist.world_size))
        size = per_rank * dist.world_size
        for start in range(0, len(named), size):
            muon = ShardedMuon if sharded else ReplicatedMuon
            groups.append(muon(dict(named[start : start + size]), matrix_lr, weight_decay, dist))
    return Optimizer(groups, dist, parameters[by_shape[0][0]].device)


class Group(Protocol):
    """Parameters that are updated together."""

    params: list[nn.Parameter]
    lr: float

    def reduce(self) -> list[Tensor]:
        """Average over ranks; return the gradients that this rank owns, to be scaled in place."""

    def update(self, lr: float, momentum: float, num_steps: Tensor) -> None:
        """Change the weights by the gradients of `reduce`."""

    def state(self) -> dict[str, Tensor]:
        """The live state that this rank owns."""


# -----------------------------------------------------------------------------
# Every rank holds all weights


class ReplicatedAdamW:
    """AdamW of one parameter; each rank updates ceil(rows / world_size) of its rows."""

    def __init__(self, name: str, param: nn.Parameter, lr: float, dist: Dist) -> None:
        self.name, self.params, self.lr, self.dist = name, [param], lr, dist
        self.chunk = math.ceil(len(param) / dist.world_size)
        start = min(dist.rank * self.chunk, len(param))
        self.own = param.data[start : start + self.chunk]
        self.exp_avg = torch.zeros_like(self.own)
        self.exp_avg_sq = torch.zeros_like(self.own)
        self.gradient = self.own

    def reduce(self) -> list[Tensor]:
        [param] = self.params
        whole = _pad_rows(_take_gradient(param), self.chunk * self.dist.world_size)
        self.gradient = self.dist.reduce_scatter_mean(whole)[: len(self.own)]
        return [self.gradient]

    def update(self, lr: float, momentum: float, num_steps: Tensor) -> None:
        _adamw(self.own, self.gradient, self.exp_avg, self.exp_avg_sq, num_steps, lr)
        del self.gradient
        if self.dist.world_size > 1:
            [param] = self.params
            param.copy_(self.dist.all_gather(_pad_rows(self.own, self.chunk))[: len(param)])

    def state(self) -> dict[str, Tensor]:
        moments = {f"exp_avg.{self.name}": self.exp_avg, f"exp_avg_sq.{self.name}": self.exp_avg_sq}
        if self.dist.world_size == 1:
            return moments
        [param] = self.params
        return {
            name: DTensor.from_local(
                rows, self.dist.mesh(), [Shard(0)], shape=param.shape, stride=param.stride()
            )
            for name, rows in moments.items()
        }


class ReplicatedMuon:
    """Muon of matrices of one shape; each rank updates ceil(n / world_size) of them."""

    def __init__(
        self, named: dict[str, nn.Parameter], lr: float, weight_decay: float, dist: Dist
    ) -> None:
        self.names, self.params = list(named), list(named.values())
        self.lr, self.weight_decay, self.dist = lr, weight_decay, dist
        self.per_rank = math.ceil(len(named) / dist.world_size)
        start = min(dist.rank * self.per_rank, len(named))
        self.own = range(start, min(start + self.per_rank, len(named)))
        self.momentum = self.params[0].new_zeros(len(self.own), *self.params[0].shape)
        self.gradient = self.momentum

    def reduce(self) -> list[Tensor]:
        stack = torch.stack([_take_gradient(p) for p in self.params])
        whole = _pad_rows(stack, self.per_rank * self.dist.world_size)
        self.gradient = self.dist.reduce_scatter_mean(whole)[: len(self.own)]
        return [self.gradient]

    def update(self, lr: float, momentum: float, num_steps: Tensor) -> None:
        direction = orthogonalize(_nesterov(self.gradient, self.momentum, momentum))
        del self.gradient
        own: list[Tensor] = [self.params[i] for i in self.own]
        if own:
            torch._foreach_mul_(own, 1 - lr * self.weight_decay)
            step = -lr * _shape_factor(own[0])
            torch._foreach_add_(own, list(direction.to(own[0].dtype)), alpha=step)
        if self.dist.world_size > 1:
            mine = torch.stack(own) if own else self.momentum
            whole = self.dist.all_gather(_pad_rows(mine, self.per_rank))
            torch._foreach_copy_(list[Tensor](self.params), list(whole[: len(self.params)]))

    def state(self) -> dict[str, Tensor]:
        return {
            f"momentum.{self.names[i]}": m for i, m in zip(self.own, self.momentum, strict=True)
        }


# -----------------------------------------------------------------------------
# Every rank holds some rows of each parameter (FSDP2, Shard(0)); gradients come averaged


class ShardedAdamW:
    """AdamW of one parameter, on this rank's rows."""

    def __init__(self, name: str, param: nn.Parameter, lr: float, dist: Dist) -> None:
        self.name, self.params, self.lr = name, [param], lr
        self.exp_avg = torch.zeros_like(param.data)
        self.exp_avg_sq = torch.zeros_like(param.data)
        self.gradient = _local(self.exp_avg)

    def reduce(self) -> list[Tensor]:
        self.gradient = _local(_take_gradient(self.params[0]))
        return [self.gradient]

    def update(self, lr: float, momentum: float, num_steps: Tensor) -> None:
        moments = _local(self.exp_avg), _local(self.exp_avg_sq)
        _adamw(_local(self.params[0]), self.gradient, *moments, num_steps, lr)
        del self.gradient

    def state(self) -> dict[str, Tensor]:
        return {f"exp_avg.{self.name}": self.exp_avg, f"exp_avg_sq.{self.name}": self.exp_avg_sq}


class ShardedMuon:
    """Muon of matrices of one shape; a rank has ceil(n / world_size) of them whole at a time."""

    def __init__(
        self, named: dict[str, nn.Parameter], lr: float, weight_decay: float, dist: Dist
    ) -> None:
        self.names, self.params = list(named), list(named.values())
        self.lr, self.weight_decay, self.dist = lr, weight_decay, dist
        self.momentum = [torch.zeros_like(p.data) for p in self.params]
        self.gradient: list[Tensor] = []

    def reduce(self) -> list[Tensor]:
        self.gradient = [_local(_take_gradient(p)) for p in self.params]
        return self.gradient

    def update(self, lr: float, momentum: float, num_steps: Tensor) -> None:
        local = [_local(p) for p in self.params]
        updates = [
            _nesterov(g, _local(m), momentum)
            for g, m in zip(self.gradient, self.momentum, strict=True)
        ]
        self.gradient = []
        torch._foreach_mul_(local, 1 - lr * self.weight_decay)
        step = -lr * _shape_factor(self.params[0])
        torch._foreach_add_(local, self._orthogonalize_slices(updates), alpha=step)

    def _orthogonalize_slices(self, updates: list[Tensor]) -> list[Tensor]:
        """Slices [rows of this rank, cols] of every matrix -> slices of the orthogonalised ones.

        Matrix i is put together on rank i // per_rank; slices are padded to equal height.
        """
        n_ranks, (n_rows, n_cols) = self.dist.world_size, self.params[0].shape
        per_rank, height = math.ceil(len(updates) / n_ranks), math.ceil(n_rows / n_ranks)
        slices = updates[0].new_zeros(n_ranks * per_rank, height, n_cols)
        for slot, update in zip(slices, updates, strict=False):
            slot[: len(update)] = update
        # [rank, matrix, height, cols]: by owner of the matrix, then by owner of the slice.
        received = self.dist.all_to_all(slices.view(n_ranks, per_rank, height, n_cols))
        whole = received.transpose(0, 1).reshape(per_rank, n_ranks * height, n_cols)
        done = orthogonalize(whole[:, :n_rows]).to(slices.dtype)
        done = F.pad(done, (0, 0, 0, n_ranks * height - n_rows))
        back = done.view(per_rank, n_ranks, height, n_cols).transpose(0, 1).contiguous()
        returned = self.dist.all_to_all(back).flatten(0, 1)
        return [slot[: len(u)] for slot, u in zip(returned, updates, strict=False)]

    def state(self) -> dict[str, Tensor]:
        return {f"momentum.{n}": m for n, m in zip(self.names, self.momentum, strict=True)}


# -----------------------------------------------------------------------------
# Arithmetic shared by the layouts


def _nesterov(gradient: Tensor, average: Tensor, momentum: float) -> Tensor:
    """Update the running average; return the look-ahead direction, in the gradient's memory."""
    average.lerp_(gradient, 1 - momentum)
    return gradient.lerp_(average, momentum)


def _shape_factor(matrix: Tensor) -> float:
    """Muon's factor for matrices [rows, cols] with more outputs than inputs."""
    return math.sqrt(max(1.0, matrix.shape[0] / matrix.shape[1]))


def _adamw(
    param: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, steps: Tensor, lr: float
) -> None:
    """One AdamW update in place (arXiv 1711.05101), by torch's fused kernel."""
    if not param.numel():
        return
    adamw(
        [param],
        [gradient],
        [exp_avg],
        [exp_avg_sq],
        [],
        [steps.clone()],
        fused=True,
        amsgrad=False,
        beta1=ADAM_BETAS[0],
        beta2=ADAM_BETAS[1],
        lr=lr,
        weight_decay=0.0,
        eps=ADAM_EPS,
        maximize=False,
    )


def _local(sharded: Tensor) -> Tensor:
    """This rank's rows of a DTensor, not a copy."""
    assert isinstance(sharded, DTensor)
    return sharded.to_local()


def _take_gradient(param: nn.Parameter) -> Tensor:
    """The gradient, which the parameter gives up."""
    gradient, param.grad = param.grad, None
    assert gradient is not None, "a parameter took no part in the backward pass"
    return gradient


def _pad_rows(x: Tensor, n: int) -> Tensor:
    """x [m, ...] with zero rows behind it, [n, ...]."""
    if len(x) == n:
        return x
    return torch.cat((x, x.new_zeros(n - len(x), *x.shape[1:])))
