"""The machine a stage runs on: facts for the report, and its state while the stage runs.

No torch: versions come from the package metadata and GPUs from NVML, so a node without either is
described as what it is. The facts are written into the run, since the report may be made elsewhere.
"""

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import platform
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from nanochat.rundir import read_json

GIB = 2**30
SAMPLE_EVERY_S = 2.0
"""Seconds between two looks at the machine; NVML takes milliseconds per GPU."""
SOURCE_DIR = Path(__file__).resolve().parent.parent
"""The checkout, or the folder of an installed package."""
IMAGE_FILE = Path("/opt/nanochat/image.json")
"""What the image says of itself (infra/image/describe.py), where this is one."""
IMAGE_NAME = "NANOCHAT_IMAGE"
"""What the launcher knows it as: NAME@sha256:…, an engine's id, the sha256 of a SIF, a tag."""
SOURCE_SUFFIXES = (".py", ".rs", ".html", ".j2")

log = logging.getLogger(__name__)


def machine_facts() -> dict[str, Any]:
    """Host, processor, memory, GPUs, versions and provenance of this process, as JSON has them."""
    packages = ("torch", "numpy", "pyarrow", "nanochat-kit")
    return {
        "host": platform.node(),
        "os": platform.platform(),
        "cpu": _cpu_name(),
        "cores": num_cores(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "gpus": _gpu_facts(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "git": git_state(SOURCE_DIR),
        "image": _image(),
        "requirements_lock_sha256": _sha256(SOURCE_DIR / "requirements.lock"),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit, branch and number of changed files of a checkout; None where it is none."""
    if not (folder / ".git").exists():
        return None

    def git(*args: str) -> str:
        command = ["git", "-C", str(folder), *args]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "branch": git("rev-parse", "--abbrev-ref", "HEAD"),
            "changed_files": len(git("status", "--porcelain").splitlines()),
        }
    except (OSError, subprocess.SubprocessError):
        return None


class MachineStats:
    """Memory of the process, and load, memory and power of the run's GPUs on this node.

    `gpu_uuids` are CUDA's UUIDs of the devices ("GPU-…"), since NVML numbers devices otherwise
    than CUDA does (CUDA_VISIBLE_DEVICES, PCI order).
    """

    def __init__(self, gpu_uuids: list[str]) -> None:
        self._uuids = gpu_uuids
        self._gpus: list[Any] | None = None
        self._process = psutil.Process()
        self._next_s = 0.0

    def sample(self) -> dict[str, float]:
        """At most every two seconds: host_memory_gib, and with GPUs gpu_util (percent, mean),
        gpu_memory_gib (largest), gpu_memory_total_gib, gpu_power_w (sum). Else nothing."""
        if time.monotonic() < self._next_s:
            return {}
        self._next_s = time.monotonic() + SAMPLE_EVERY_S
        stats = {"host_memory_gib": round(self._process.memory_info().rss / GIB, 4)}
        if not self._uuids:
            return stats
        try:
            return stats | self._gpu_sample()
        except Exception as e:  # NVML is a driver's library: it must not end a run
            log.warning("GPU statistics are switched off: %s: %s", type(e).__name__, e)
            self._uuids = []
            return stats

    def _gpu_sample(self) -> dict[str, float]:
        import pynvml

        if self._gpus is None:
            pynvml.nvmlInit()
            self._gpus = [pynvml.nvmlDeviceGetHandleByUUID(u.encode()) for u in self._uuids]
        memory = [pynvml.nvmlDeviceGetMemoryInfo(g) for g in self._gpus]
        util = [pynvml.nvmlDeviceGetUtilizationRates(g).gpu for g in self._gpus]
        milliwatts = [pynvml.nvmlDeviceGetPowerUsage(g) for g in self._gpus]
        return {
            "gpu_util": round(statistics.fmean(util), 1),
            "gpu_memory_gib": round(max(m.used for m in memory) / GIB, 3),
            "gpu_memory_total_gib": round(memory[0].total / GIB, 3),
            "gpu_power_w": round(sum(milliwatts) / 1000, 1),
        }


def _gpu_facts() -> list[dict[str, Any]]:
    """Name and memory of every GPU of the node, and the driver; empty without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
        gpus = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return [
            {
                "name": pynvml.nvmlDeviceGetName(gpu),
                "memory_gib": round(pynvml.nvmlDeviceGetMemoryInfo(gpu).total / GIB, 1),
                "driver": driver,
            }
            for gpu in gpus
        ]
    except pynvml.NVMLError:
        return []


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def num_cores() -> int:
    """Cores that this process may use; a batch system gives a job fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _image() -> dict[str, Any] | None:
    """What is known of the image: its own words, and its digest or name where the launcher gave it.

    An image cannot contain its own digest, and a container cannot ask the engine.
    """
    facts = read_json(IMAGE_FILE)
    if not isinstance(facts, dict):
        return None
    name = os.environ.get(IMAGE_NAME)
    return {"name": name, **facts} if name else facts


def _sha256(path: Path) -> str | None:
    with contextlib.suppress(OSError):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return None


@dataclass(frozen=True)
class SourceSize:
    """How much there is to read."""

    files: int
    lines: int
    characters: int
    dependencies: int | None
    """Locked packages; None where the lock file is not there (an installed wheel)."""


def source_size() -> SourceSize:
    """Counts this project's own source files."""
    roots = [SOURCE_DIR / name for name in ("entrypoint.py", "infra", "nanochat", "rustbpe/src")]
    files = [f for root in roots for f in _source_files(root)]
    texts = [f.read_text(encoding="utf-8", errors="replace") for f in files]
    lock = SOURCE_DIR / "requirements.lock"
    return SourceSize(
        files=len(files),
        lines=sum(text.count("\n") for text in texts),
        characters=sum(len(text) for text in texts),
        dependencies=lock.read_text().count("==") if lock.is_file() else None,
    )


def _source_files(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    return sorted(f for f in root.rglob("*") if f.suffix in SOURCE_SUFFIXES)
