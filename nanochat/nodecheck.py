"""Is this node fit to be paid for? A minute at most: driver, matrix product, all-reduce, disk.

`python -m nanochat.nodecheck [FOLDER] [--json]` exits 0 or 77 (another node). The limits are low:
they find a GPU that is broken, throttled or wrongly cabled, not one that is a little slow.
"""

import argparse
import dataclasses
import json
import os
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

EXIT_UNFIT_NODE = 77
GEMM_SIZE = 8192
GEMM_REPEATS = 20
LEAST_GPU_TFLOPS = 30.0
"""An L40S sustains 5 times this; a GPU in its lowest clock does not reach it."""
LEAST_SHARE_OF_BEST = 0.6
"""The slowest GPU of a node sets the pace of all."""
ALL_REDUCE_BYTES = 256 << 20
LEAST_BUS_GB_S = 2.0
"""PCIe 4 through the host gives some 10; sockets give less than 1."""
DISK_BYTES = 256 << 20
LEAST_DISK_MB_S = 20.0
TIMEOUT_S = 60.0


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that was tried."""

    name: str
    ok: bool
    message: str


def check_node(folder: Path) -> list[Check]:
    """Every check; a check that raises counts as failed and does not hide the others."""
    checks = [_tried("driver", _driver), _tried("disk", lambda: _disk(folder))]
    if torch.cuda.is_available():
        checks.append(_tried("gemm", _gemm))
        if torch.cuda.device_count() > 1:
            checks.append(_tried("all_reduce", lambda: _all_reduce(torch.cuda.device_count())))
    return checks


def _driver() -> tuple[bool, str]:
    """A GPU that the machine has must be one that torch can use."""
    present = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if present == 0 and usable == 0:
        return True, "no GPU on this machine"
    wanted = torch.version.cuda
    if usable < present and "CUDA_VISIBLE_DEVICES" not in os.environ:
        return False, f"{present} GPUs, {usable} usable: the driver does not fit CUDA {wanted}"
    return True, f"{usable} GPUs, CUDA {wanted}"


def _disk(folder: Path) -> tuple[bool, str]:
    """Writes and syncs DISK_BYTES in the folder of the runs."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f".nodecheck.{secrets.token_hex(4)}"
    block = os.urandom(1 << 20)
    try:
        start = time.monotonic()
        with open(file, "wb") as f:
            for _ in range(DISK_BYTES >> 20):
                f.write(block)
            f.flush()
            os.fsync(f.fileno())
        mb_s = DISK_BYTES / 1e6 / max(time.monotonic() - start, 1e-6)
    finally:
        file.unlink(missing_ok=True)
    return mb_s >= LEAST_DISK_MB_S, f"{mb_s:.0f} MB/s written to {folder}"


def _gemm() -> tuple[bool, str]:
    """bf16 product of square matrices on each GPU; the result must be right, too."""
    rates = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        a = torch.ones(GEMM_SIZE, GEMM_SIZE, dtype=torch.bfloat16, device=device)
        product = a @ a
        if not bool((product == GEMM_SIZE).all()):
            return False, f"GPU {index} multiplies wrongly"
        torch.cuda.synchronize(device)
        start = time.monotonic()
        for _ in range(GEMM_REPEATS):
            torch.mm(a, a, out=product)
        torch.cuda.synchronize(device)
        seconds = time.monotonic() - start
        rates.append(2.0 * GEMM_SIZE**3 * GEMM_REPEATS / seconds / 1e12)
    told = f"{min(rates):.0f} to {max(rates):.0f} TFLOP/s in bf16"
    slow = [i for i, r in enumerate(rates) if r < LEAST_SHARE_OF_BEST * max(rates)]
    if slow:
        return False, f"{told}: GPUs {slow} are far slower than the best"
    return min(rates) >= LEAST_GPU_TFLOPS, told


def _all_reduce(num_ranks: int, backend: str = "nccl") -> tuple[bool, str]:
    """All GPUs sum one tensor; bus bandwidth as nccl-tests define it. Ended after TIMEOUT_S."""
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    port = _free_port()
    ranks = [
        context.Process(target=_one_rank, args=(r, num_ranks, port, backend, results), daemon=True)
        for r in range(num_ranks)
    ]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + TIMEOUT_S
    for rank in ranks:
        rank.join(max(0.0, deadline - time.monotonic()))
    if any(rank.exitcode != 0 for rank in ranks):
        for rank in ranks:
            rank.kill()
        return False, f"the all-reduce of {num_ranks} ranks did not end in {TIMEOUT_S:.0f} s"
    seconds = results.get()
    gb_s = 2.0 * (num_ranks - 1) / num_ranks * ALL_REDUCE_BYTES / seconds / 1e9
    least = LEAST_BUS_GB_S if backend == "nccl" else 0.0
    return gb_s >= least, f"{gb_s:.1f} GB/s on the bus of {num_ranks} ranks"


def _one_rank(
    rank: int, num_ranks: int, port: int, backend: str, results: "mp.SimpleQueue"
) -> None:
    address = f"tcp://127.0.0.1:{port}"
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=num_ranks)
    tensor = torch.ones(ALL_REDUCE_BYTES // 4, device=device)
    dist.all_reduce(tensor)
    if float(tensor[-1]) != num_ranks:
        raise RuntimeError("the all-reduce sums wrongly")
    repeats = 5 if backend == "nccl" else 1
    start = time.monotonic()
    for _ in range(repeats):
        dist.all_reduce(tensor)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if rank == 0:
        results.put((time.monotonic() - start) / repeats)
    dist.destroy_process_group()


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _tried(name: str, check: Callable[[], tuple[bool, str]]) -> Check:
    try:
        return Check(name, *check())
    except (OSError, RuntimeError, ValueError) as e:
        return Check(name, False, f"{type(e).__name__}: {e}")


def main() -> int:
    """Print the checks; 77 where one failed."""
    parser = argparse.ArgumentParser(prog="python -m nanochat.nodecheck", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path.cwd())
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    checks = check_node(args.folder)
    if args.json:
        sys.stdout.write(json.dumps([dataclasses.asdict(c) for c in checks]) + "\n")
    else:
        for c in checks:
            sys.stdout.write(f"{'ok  ' if c.ok else 'FAIL'} {c.name}: {c.message}\n")
    return 0 if all(c.ok for c in checks) else EXIT_UNFIT_NODE


if __name__ == "__main__":
    sys.exit(main())
