"""Ranks: who this process is, and the few things that all ranks do together.

The only reader of torchrun's environment. One rank needs no process group; every function here is
then the identity. Tensors on the CPU travel by gloo also where the gradients travel by NCCL, so
that asking about a stop does not wait for the GPU.
"""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nanochat.stage import NodeUnfit

# torch 2.13 renamed these two and deprecated the old names.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, kw_only=True)
class Dist:
    """This rank among its peers. With world_size 1 nothing is sent."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mesh(self) -> DeviceMesh:
        """The ranks in one dimension, for sharding. Needs a process group."""
        return init_device_mesh(self.device.type, (self.world_size,))

    def broadcast_flag(self, flag: int) -> int:
        """Rank 0's flag, on every rank."""
        if self.world_size == 1:
            return flag
        carrier = torch.tensor(flag)
        dist.broadcast(carrier, src=0)
        return int(carrier)

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def all_reduce_mean(self, x: Tensor) -> Tensor:
        """Mean over ranks, in place."""
        return self.all_reduce_sum(x).div_(self.world_size)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.all_reduce(torch.zeros(()))

    def reduce_scatter_mean(self, x: Tensor) -> Tensor:
        """x: [world_size * n, ...], one part per rank -> this rank's part [n, ...], averaged."""
        if self.world_size == 1:
            return x
        part = x.new_empty(x.shape[0] // self.world_size, *x.shape[1:])
        _reduce_scatter(part, x, op=dist.ReduceOp.AVG)
        return part

    def all_gather(self, part: Tensor) -> Tensor:
        """Every rank's part [n, ...] -> [world_size * n, ...], in order of rank."""
        if self.world_size == 1:
            return part
        whole = part.new_empty(self.world_size * part.shape[0], *part.shape[1:])
        _all_gather(whole, part)
        return whole

    def all_to_all(self, x: Tensor) -> Tensor:
        """x: [world_size, ...], part i for rank i -> [world_size, ...], part i from rank i."""
        if self.world_size == 1:
            return x
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x)
        return received


def pick_device(wanted: str = "auto") -> str:
    """The device type to train on. Raises NodeUnfit where the wanted one is missing."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        return next((name for name, is_there in there.items() if is_there), "cpu")
    if not there.get(wanted, True):
        raise NodeUnfit(f'runtime.device = "{wanted}", but torch finds no such device here')
    return wanted


def init(device_type: str, timeout_s: float = 1800.0) -> Dist:
    """Join the ranks that torchrun has started, or be alone.

    device_type: "cpu", "cuda" or "mps". timeout_s: longest wait for another rank.
    """
    env = os.environ
    rank, local_rank = int(env.get("RANK", 0)), int(env.get("LOCAL_RANK", 0))
    world_size = int(env.get("WORLD_SIZE", 1))
    device = torch.device(device_type, local_rank) if device_type == "cuda" else device_type
    choose_float32_kernels(device_type)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout_s),
            device_id=device if isinstance(device, torch.device) else None,
        )
    return Dist(
        rank=rank, local_rank=local_rank, world_size=world_size, device=torch.device(device)
    )


def choose_float32_kernels(device_type: str) -> None:
    """Let float32 products run on the kernels that are fast on this device.

    CUDA: TF32. AMD CPUs: oneDNN, which torch takes at "medium" only; it reached 200 GFLOP/s per
    core of a Zen 5 where MKL, the default, reached 90, with the same rounding error (8e-7 of the
    largest entry). Where "medium" does round to bf16 (CPUs with AMX), and on other CPUs, the
    default stays. By the processor's name and not by a timing, so that a resume chooses the same.
    """
    if device_type == "cuda":
        torch.set_float32_matmul_precision("high")
    elif device_type == "cpu" and is_amd_cpu():
        torch.set_float32_matmul_precision("medium")
        if _product_error() > 1e-5:
            torch.set_float32_matmul_precision("highest")


def is_amd_cpu() -> bool:
    """Whether this machine has an x86 processor of AMD's."""
    facts = Path("/proc/cpuinfo")
    return platform.machine() == "x86_64" and facts.exists() and "AuthenticAMD" in facts.read_text()


def _product_error() -> float:
    """Largest error of a float32 product against float64, relative to its largest entry."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 256, 256, generator=generator)
    exact = left.double() @ right.double()
    return float((left @ right - exact).abs().max() / exact.abs().max())


def shutdown() -> None:
    """Leave the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def joined(device_type: str) -> Iterator[Dist]:
    """`init`, then `shutdown` however the block ends."""
    try:
        yield init(device_type)
    finally:
        shutdown()


def seed_rank(seed: int, rank: int, batch: int = 0) -> None:
    """Seed torch's generators of every device: other dropout for every rank and every batch."""
    torch.manual_seed(((seed * 1_000_003 + rank) * 1_000_003 + batch) % 2**63)
