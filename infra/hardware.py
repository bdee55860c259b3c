"""Machines: what they can do, what they cost, and who says so.

* An offer is N GPUs of one type in one machine, with its price, or `cpu`, the machine this runs on.
* Peaks are dense bf16 without sparsity, the denominator of every published MFU. Beside them stand
  what a matrix product and an attention kernel really reach: measured by others, with the source.
* Prices move. They are a list of one day; `budget.usd_per_hour` of the spec replaces them, and a
  provider's billed price wins when it is higher.
"""

import difflib
import functools
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from nanochat.spec import Runtime, SpecError

GIB = 2**30
COUNTS = (1, 2, 4, 8)
"""GPUs of one machine; more machines than one are the business of a cluster's scheduler."""
PRICE_DATE = "2026-11"
RUNPOD = f"RunPod secure cloud, on demand, {PRICE_DATE}"
DATA_SHEET = "NVIDIA data sheet, dense bf16"
MAMF = "MAMF table of stas00/ml-engineering, compute/accelerator"
OTHER_MAMF = "table of mag-/gpu_benchmark, which looks for the best shape likewise"
NVLINK_4 = "NVIDIA in nccl-tests#212: 370 GB/s of a line rate of 450 where no SHARP helps"
NVLINK_3 = (
    "between 208 measured (nccl-tests#178) and 240, the 80 % of nccl-tests#212 of its 300 GB/s"
)
PCIE_4 = "20 GB/s once A100s have to go over PCIe 4 (nccl-tests#178)"
VOLUME_USD_PER_GB_MONTH = 0.07
"""RunPod network volume below 1 TB (docs.runpod.io/serverless/pricing); $0.05 above."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU type. Rates are per GPU and second."""

    name: str
    memory_gib: float
    """What CUDA reports as total, after the driver's own share."""
    peak_flops: float
    matmul_flops: float
    """Best bf16 matrix product that is sustained (maximum achievable matmul FLOPS, MAMF)."""
    matmul_source: str
    attention_flops: float
    """FlashAttention-2, causal, head width 128, forward and backward, at 2k tokens."""
    memory_bytes_per_s: float
    link_bytes_per_s: float
    """Bus bandwidth of a collective over the GPUs of one machine (nccl-tests' busbw)."""
    link_source: str
    has_nvlink: bool
    usd_per_hour: float
    price_source: str = RUNPOD
    driver_names: tuple[str, ...] = ()
    """What `nvidia-smi` calls it."""


GPUS = (
    Gpu(
        name="B200",
        memory_gib=178.3,
        peak_flops=2250e12,
        matmul_flops=1745e12,
        matmul_source=f"{MAMF}: 1,745",
        attention_flops=700e12,
        memory_bytes_per_s=8.0e12,
        link_bytes_per_s=650e9,
        link_source="72 % of a line rate of 900; 770 point to point (AI-benchmarking-guide#7)",
        has_nvlink=True,
        usd_per_hour=5.98,
        driver_names=("B200",),
    ),
    Gpu(
        name="H200",
        memory_gib=139.7,
        peak_flops=989e12,
        matmul_flops=794.5e12,
        matmul_source=f"{MAMF}: 794.5 on H100, the same chip",
        attention_flops=335e12,
        memory_bytes_per_s=4.8e12,
        link_bytes_per_s=360e9,
        link_source=NVLINK_4,
        has_nvlink=True,
        usd_per_hour=3.59,
        driver_names=("H200",),
    ),
    Gpu(
        name="H100-SXM",
        memory_gib=79.2,
        peak_flops=989e12,
        matmul_flops=794.5e12,
        matmul_source=f"{MAMF}: 794.5",
        attention_flops=335e12,
        memory_bytes_per_s=3.35e12,
        link_bytes_per_s=360e9,
        link_source=NVLINK_4,
        has_nvlink=True,
        usd_per_hour=2.69,
        driver_names=("H100 80GB HBM3",),
    ),
    Gpu(
        name="H100-PCIE",
        memory_gib=79.1,
        peak_flops=756e12,
        matmul_flops=499.5e12,
        matmul_source=f"{OTHER_MAMF}: 499.5",
        attention_flops=260e12,
        memory_bytes_per_s=2.0e12,
        link_bytes_per_s=28e9,
        link_source="28 GB/s where 8 RTX 5090 go over PCIe 5; the host bounds it (nccl#1639)",
        has_nvlink=False,
        usd_per_hour=2.39,
        driver_names=("H100 PCIe",),
    ),
    Gpu(
        name="A100-80GB",
        memory_gib=79.2,
        peak_flops=312e12,
        matmul_flops=271.2e12,
        matmul_source=f"{MAMF}: 271.2",
        attention_flops=175e12,
        memory_bytes_per_s=2.04e12,
        link_bytes_per_s=230e9,
        link_source=NVLINK_3,
        has_nvlink=True,
        usd_per_hour=1.49,
        driver_names=("A100-SXM4-80GB",),
    ),
    Gpu(
        name="A100-80GB-PCIE",
        memory_gib=79.2,
        peak_flops=312e12,
        matmul_flops=252.9e12,
        matmul_source=f"{MAMF}: 252.9",
        attention_flops=165e12,
        memory_bytes_per_s=1.94e12,
        link_bytes_per_s=20e9,
        link_source=PCIE_4,
        has_nvlink=False,
        usd_per_hour=1.39,
        driver_names=("A100 80GB PCIe",),
    ),
    Gpu(
        name="A100-40GB",
        memory_gib=39.4,
        peak_flops=312e12,
        matmul_flops=271.2e12,
        matmul_source=f"{MAMF}: 271.2",
        attention_flops=175e12,
        memory_bytes_per_s=1.555e12,
        link_bytes_per_s=230e9,
        link_source=NVLINK_3,
        has_nvlink=True,
        usd_per_hour=1.29,
        price_source="Lambda on demand, 2026; a university cluster sets budget.usd_per_hour = 0",
        driver_names=("A100-SXM4-40GB", "A100-PCIE-40GB"),
    ),
    Gpu(
        name="L40S",
        memory_gib=44.4,
        peak_flops=362e12,
        matmul_flops=252.0e12,
        matmul_source=f"{OTHER_MAMF}: 252.0",
        attention_flops=150e12,
        memory_bytes_per_s=0.864e12,
        link_bytes_per_s=20e9,
        link_source=PCIE_4,
        has_nvlink=False,
        usd_per_hour=0.86,
        driver_names=("L40S",),
    ),
    Gpu(
        name="RTX-4090",
        memory_gib=23.5,
        peak_flops=165.2e12,
        matmul_flops=150e12,
        matmul_source=f"{OTHER_MAMF}: 178.5 at boost clocks; taken as 91 % of the data sheet",
        attention_flops=130e12,
        memory_bytes_per_s=1.008e12,
        link_bytes_per_s=12e9,
        link_source="an estimate: PCIe 4, and every byte crosses the host's memory (no P2P)",
        has_nvlink=False,
        usd_per_hour=0.69,
        driver_names=("GeForce RTX 4090",),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A machine that a run can have, and its price. Rates are per device and second."""

    name: str
    gpu: str
    count: int
    usd_per_hour: float
    """Of the whole machine."""
    price_source: str
    memory_gib: float
    """Per device; on a CPU what is there for the run."""
    peak_flops: float
    peak_source: str
    matmul_flops: float
    attention_flops: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    has_nvlink: bool
    cpu: bool = False

    @property
    def interconnect_gb_per_s(self) -> float:
        return self.link_bytes_per_s / 1e9


def gpu_offer(gpu: Gpu, count: int) -> Offer:
    """`count` GPUs of one type in one machine."""
    return Offer(
        name=f"{count}x{gpu.name}",
        gpu=gpu.name,
        count=count,
        usd_per_hour=round(count * gpu.usd_per_hour, 4),
        price_source=gpu.price_source,
        memory_gib=gpu.memory_gib,
        peak_flops=gpu.peak_flops,
        peak_source=DATA_SHEET,
        matmul_flops=gpu.matmul_flops,
        attention_flops=gpu.attention_flops,
        memory_bytes_per_s=gpu.memory_bytes_per_s,
        link_bytes_per_s=gpu.link_bytes_per_s,
        has_nvlink=gpu.has_nvlink,
    )


OFFERS: dict[str, Offer] = {
    offer.name: offer for offer in (gpu_offer(gpu, n) for gpu in GPUS for n in reversed(COUNTS))
}


def parse_offer(text: str) -> Offer:
    """`8xH100-SXM`, or `cpu` for this machine. Raises SpecError that lists the known ones."""
    wanted = text.strip()
    if wanted.lower() == "cpu":
        return cpu_offer()
    by_name = {name.lower(): offer for name, offer in OFFERS.items()}
    if wanted.lower() in by_name:
        return by_name[wanted.lower()]
    near = [name for name in by_name if name.startswith(wanted.lower())]
    near += difflib.get_close_matches(wanted.lower().replace(" ", ""), list(by_name), cutoff=0.5)
    hint = f" Did you mean {by_name[near[0]].name}?" if near and wanted else ""
    types = ", ".join(gpu.name for gpu in GPUS)
    counts = ", ".join(str(n) for n in COUNTS)
    raise SpecError(
        f"offer = {text!r}: no such offer.{hint} Known: cpu, or N x GPU type with N of {counts} "
        f"and a type of {types}"
    )


def world_size(offer: Offer) -> int:
    """Ranks of a training stage on an offer: one per GPU, one on a CPU."""
    return 1 if offer.cpu else offer.count


def num_ranks(runtime: Runtime) -> int:
    """Ranks of a training stage on this machine."""
    if runtime.num_ranks is not None:
        return runtime.num_ranks
    if runtime.device in ("cpu", "mps"):
        return 1
    return max(1, len(gpus_here()))


# -- this machine


@dataclass(frozen=True)
class GpuHere:
    """A GPU of this machine, as the driver describes it."""

    name: str
    memory_gib: float
    free_gib: float


@functools.cache
def driver_here() -> str | None:
    """Version of the NVIDIA driver, or None where there is none."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None


def gpus_here() -> list[GpuHere]:
    """GPUs that this process may use, by NVML; empty without a driver."""
    import pynvml

    if driver_here() is None:
        return []
    found = {}
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        found[str(pynvml.nvmlDeviceGetUUID(handle))] = _described(handle)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(found.values())
    return [gpu for gpu in (_named(n, found) for n in _entries(visible)) if gpu is not None]


def _described(handle: Any) -> GpuHere:
    import pynvml

    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return GpuHere(str(pynvml.nvmlDeviceGetName(handle)), memory.total / GIB, memory.free / GIB)


def _entries(visible: str) -> list[str]:
    """The devices of CUDA_VISIBLE_DEVICES; of MIG's slices a process is given the first alone."""
    entries = [entry.strip() for entry in visible.split(",")]
    slices = [entry for entry in entries if entry.startswith("MIG-")]
    return slices[:1] or entries


def _named(entry: str, found: Mapping[str, GpuHere]) -> GpuHere | None:
    """What an entry of CUDA_VISIBLE_DEVICES names; None where that is nothing.

    found: the GPUs by UUID, of which CUDA takes the beginning too. A UUID that NVML does not know
    counts as one GPU like the first: to count none would make a good node unfit, and where there
    is none CUDA says so.
    """
    import pynvml

    if entry.isdigit():
        return list(found.values())[int(entry)] if int(entry) < len(found) else None
    if not entry.startswith(("GPU-", "MIG-")):
        return None
    for uuid, gpu in found.items():
        if uuid.startswith(entry):
            return gpu
    try:
        return _described(pynvml.nvmlDeviceGetHandleByUUID(entry))
    except pynvml.NVMLError:
        return next(iter(found.values()), None)


def cores_here() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_here_gib() -> float:
    """Memory of this machine or of the container it is, in GiB."""
    total = float(psutil.virtual_memory().total)
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, float(Path(limit).read_text()))
        except (OSError, ValueError):
            continue
    return total / GIB


@functools.cache
def cpu_offer() -> Offer:
    """This machine's CPU, free of charge.

    Its peak is a measured fp32 matrix product (0.1 s), but not less than half of what the cores
    should do: other work at this moment is no property of the machine.
    """
    measured, expected = measured_cpu_flops(), expected_cpu_flops()
    peak = max(measured, expected / 2)
    return Offer(
        name="cpu",
        gpu=platform.machine() or "cpu",
        count=1,
        usd_per_hour=0.0,
        price_source="this machine",
        memory_gib=memory_here_gib(),
        peak_flops=peak,
        peak_source=f"fp32 matrix product on {cores_here()} cores: {measured / 1e9:.0f} GFLOP/s "
        f"measured, {expected / 1e9:.0f} expected",
        matmul_flops=peak,
        attention_flops=peak / 2,
        memory_bytes_per_s=10e9,
        link_bytes_per_s=10e9,
        has_nvlink=False,
        cpu=True,
    )


FLOPS_PER_CYCLE = {"avx512f": 64, "avx2": 32, "avx": 16, "asimd": 16}
"""fp32 per core and cycle with two fused multiply-adds of the widest vectors; else 8."""


def expected_cpu_flops() -> float:
    """FLOP/s of the cores this process may use, a logical core counted as half a core."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        flags = {"asimd"} if platform.machine() == "arm64" else set()
    per_cycle = next((n for flag, n in FLOPS_PER_CYCLE.items() if flag in flags), 8)
    frequency = psutil.cpu_freq()
    hertz = 1e6 * frequency.current if frequency and frequency.current else 2.5e9
    return cores_here() * per_cycle * hertz / 2


def measured_cpu_flops(size: int = 1024, least_s: float = 0.1) -> float:
    """FLOP/s of the best of several square fp32 products, within about `least_s` seconds."""
    left = np.full((size, size), 0.5, dtype=np.float32)
    right = left.copy()
    left @ right
    best_s = float("inf")
    end = time.perf_counter() + least_s
    while time.perf_counter() < end:
        started = time.perf_counter()
        left @ right
        best_s = min(best_s, time.perf_counter() - started)
    return 2 * size**3 / best_s


def priced(offer: Offer, usd_per_hour: float | None) -> Offer:
    """The offer at the spec's own price, where it gives one."""
    if usd_per_hour is None:
        return offer
    return replace(offer, usd_per_hour=usd_per_hour, price_source="budget.usd_per_hour of the spec")


# -- what `plan --on ?` prints


def offers_json() -> list[dict[str, Any]]:
    """Every offer as JSON, the CPU of this machine last."""
    return [
        {
            "offer": o.name,
            "usd_per_hour": o.usd_per_hour,
            "price_source": o.price_source,
            "memory_gib": round(o.memory_gib, 1),
            "peak_tflops": round(o.peak_flops / 1e12, 3),
            "peak_source": o.peak_source,
            "interconnect_gb_per_s": round(o.interconnect_gb_per_s, 1),
        }
        for o in (*OFFERS.values(), cpu_offer())
    ]


def render_offers(offers: list[dict[str, Any]]) -> str:
    """The offers as a table."""
    lines = [f"{'offer':<18}{'USD/h':>8}{'GiB each':>10}{'peak TFLOP/s each':>19}  price from"]
    lines += [
        f"{o['offer']:<18}{o['usd_per_hour']:>8.2f}{o['memory_gib']:>10.1f}"
        f"{o['peak_tflops']:>19.2f}  {o['price_source']}"
        for o in offers
    ]
    return "\n".join(lines)
