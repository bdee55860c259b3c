"""Seconds before hours: what would make a run fail on this machine, found before it starts.

* `preflight` returns problems, each with the exit code of its kind: 77, another machine may do it;
  78, the spec or the data must change.
* `doctor` says the same and more as facts, for a person who has just cloned the kit.
No torch: the driver is asked by NVML, versions come from package metadata.
"""

import importlib.metadata
import os
import platform
import shutil
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from infra import hardware, nodes
from infra.estimates import LESS_SPACE, data_bytes, volume_gib
from infra.hardware import GIB
from nanochat import sandbox
from nanochat.rundir import EXIT_DONE, EXIT_SPEC, EXIT_UNFIT_NODE, RunDir, nanochat_home
from nanochat.spec import RunSpec, SpecError
from nanochat.touches import missing_files, roots_text

if TYPE_CHECKING:
    from infra.planner import Plan

LEAST_SHM_BYTES = 256 * 2**20
"""Docker gives 64 MiB; NCCL maps buffers of several MiB per pair of ranks there."""
LEAST_DRIVERS = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
"""Oldest Linux driver of each CUDA major version (NVIDIA, CUDA compatibility guide, table 2)."""
OLDER_CUDA, OLDER_LOCK = 12, "requirements-cuda12.lock"
"""What runs under a driver that is too old for the CUDA of requirements.lock."""
COMPILERS = ("g++", "clang++", "c++")


@dataclass(frozen=True)
class Problem:
    """Why a run cannot start here."""

    name: str
    """The fact that it comes from."""
    message: str
    exit_code: int


@dataclass(frozen=True)
class Fact:
    """One line of `doctor`."""

    name: str
    value: str
    level: str
    """ok | info | warn | bad"""
    fix: str = ""
    exit_code: int = EXIT_DONE


def preflight(spec: RunSpec, plan: "Plan", run_dir: RunDir) -> list[Problem]:
    """Everything that would end this run early on this machine; empty when it can start."""
    needs_gpus = spec.runtime.device not in ("cpu", "mps") and not plan.offer.cpu
    facts = [
        *(_driver_here() if needs_gpus else ()),
        *_tools(),
        *_writable(run_dir.path),
        *_gpus(spec, plan),
        *_compiler(spec),
        *_shared_memory(spec, plan),
        *_clock(),
        *_data(spec, run_dir),
        *_sandbox(spec),
        *_volume(spec, plan, run_dir),
    ]
    return [
        Problem(f.name, f"{f.name}: {f.value}. {f.fix}".rstrip(" ."), f.exit_code)
        for f in facts
        if f.level == "bad"
    ]


def exit_code(found: Sequence[Problem | Fact]) -> int:
    """The code of what was found together; a driver that is too old comes before all else.

    What the spec or the data lack can be mended here (78), what the machine lacks cannot (77), and
    both together want the former; but on a machine with such a driver mending would be in vain.
    """
    of_driver = [f for f in found if f.name == "driver" and f.exit_code]
    return max((f.exit_code for f in of_driver or found), default=EXIT_DONE)


def doctor(spec: RunSpec | None) -> list[Fact]:
    """Facts about this machine; with a spec also what that spec needs of it."""
    from infra.planner import make_plan

    facts = [
        *_driver_here(),
        *_machine(),
        *_tools(),
        *_writable(nanochat_home()),
        *_clock(),
        _network(),
    ]
    if spec is None:
        return [*facts, *_shared_memory(None, None)]
    plan = make_plan(spec, look_further=False)
    run_dir = RunDir(nanochat_home() / "runs" / spec.name)
    level = {"ok": "ok", "warn": "warn", "refused": "bad"}[plan.verdict]
    reasons = "; ".join(plan.reasons) or f"{plan.hours:.2f} h, ${plan.usd:.2f}"
    code = EXIT_SPEC if plan.verdict == "refused" else EXIT_DONE
    return [
        *facts,
        Fact("plan", reasons, level, "nanochat plan shows all of it", code),
        *_gpus(spec, plan),
        *_compiler(spec),
        *_shared_memory(spec, plan),
        *_data(spec, run_dir),
        *_sandbox(spec),
        *_volume(spec, plan, run_dir),
    ]


def render_doctor(facts: list[Fact]) -> str:
    """The facts as lines; what is wrong carries its fix."""
    marks = {"ok": "ok  ", "info": "    ", "warn": "warn", "bad": "BAD "}
    lines = []
    for fact in facts:
        lines.append(f"{marks[fact.level]} {fact.name:<12} {fact.value}")
        if fact.fix and fact.level in ("warn", "bad"):
            lines.append(f"{'':<18}{fact.fix}")
    return "\n".join(lines)


# -- the machine


def _machine() -> list[Fact]:
    offer = hardware.cpu_offer()
    memory = f"{offer.memory_gib:.1f} GiB"
    cores = f"{hardware.cores_here()} cores, {offer.peak_flops / 1e9:.0f} GFLOP/s in fp32"
    gpus = hardware.gpus_here()
    facts = [Fact("processor", cores, "info"), Fact("memory", memory, "info")]
    if gpus:
        text = ", ".join(f"{g.name} ({g.memory_gib:.0f} GiB)" for g in gpus)
        facts.append(Fact("GPUs", text, "ok"))
    else:
        facts.append(Fact("GPUs", "none that an NVIDIA driver knows", "info"))
    return facts


def cuda_version() -> str | None:
    """CUDA that the installed torch was built for, from package metadata."""
    names = ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu13", "nvidia-cuda-runtime-cu12")
    return next(filter(None, map(_version, names)), None)


def _driver_here() -> list[Fact]:
    """The NVIDIA driver, where there is one and torch needs it."""
    driver, cuda = hardware.driver_here(), cuda_version()
    if driver is None or cuda is None:
        return []
    major = int(cuda.split(".")[0])
    least = LEAST_DRIVERS.get(major)
    if least is None or _numbers(driver) >= _numbers(least):
        return [Fact("driver", f"{driver}, CUDA {cuda}", "ok")]
    fix = f"Install driver {least} or newer, or go to a machine that has one"
    if major > OLDER_CUDA and _numbers(driver) >= _numbers(LEAST_DRIVERS[OLDER_CUDA]):
        fix += (
            f"; for this driver there is the image of CUDA {OLDER_CUDA}: make image "
            f"REQUIREMENTS={OLDER_LOCK} (docs/docker.md, GPUs and drivers)"
        )
    text = f"{driver} is older than CUDA {cuda} of this installation needs ({least})"
    return [Fact("driver", text, "bad", fix, EXIT_UNFIT_NODE)]


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


def _tools() -> list[Fact]:
    """Python and the packages that the stages import; cargo matters where one is missing."""
    facts = [Fact("Python", platform.python_version(), "ok")]
    for name, package, fix in (
        ("torch", "torch", "make setup, then .venv/bin/nanochat"),
        ("tokenizer", "rustbpe", f"make setup ({_cargo()}), then .venv/bin/nanochat"),
    ):
        if (version := _version(package)) is not None:
            facts.append(Fact(name, f"{package} {version}", "ok"))
        else:
            text = f"{package} is not installed in {sys.prefix}"
            facts.append(Fact(name, text, "bad", fix, EXIT_SPEC))
    return facts


def need_packages(*packages: str) -> None:
    """Raise SpecError where one is missing, as in SkyPilot's environment."""
    for package in packages:
        if _version(package) is None:
            raise SpecError(
                f"{package} is not installed in {sys.prefix}; make setup, then .venv/bin/nanochat"
            )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cargo() -> str:
    found = shutil.which("cargo")
    return f"builds it with {found}" if found else "needs Rust first, see docs/local.md"


def _network() -> Fact:
    offline = os.environ.get("NANOCHAT_OFFLINE") == "1"
    text = "not to be used (NANOCHAT_OFFLINE=1)" if offline else "may be used by fetch and launch"
    return Fact("network", text, "info")


def _clock() -> list[Fact]:
    """A clock behind the files of the kit breaks ledgers, leases and TLS."""
    newest = max(path.stat().st_mtime for path in Path(__file__).parent.glob("*.py"))
    if time.time() < newest - 86_400:
        return [
            Fact(
                "clock",
                f"{time.ctime()} is before the kit was installed",
                "bad",
                "set the clock (ntp)",
                EXIT_UNFIT_NODE,
            )
        ]
    return [Fact("clock", time.strftime("%Y-%m-%d %H:%M:%S %Z"), "ok")]


# -- what a spec needs


def _gpus(spec: RunSpec, plan: "Plan") -> list[Fact]:
    if spec.runtime.device in ("cpu", "mps") or plan.offer.cpu:
        return []
    here = hardware.gpus_here()
    wanted = plan.layout.world_size // nodes.num_nodes()
    if len(here) < wanted:
        return [
            Fact(
                "GPUs",
                f"{len(here)} here, offer = {plan.offer.name!r} means {wanted}",
                "bad",
                'give the offer that this machine is (offer="1xH200"), or offer="cpu"',
                EXIT_UNFIT_NODE,
            )
        ]
    need_gib = max((s.memory.total / GIB for s in plan.stages), default=0.0)
    short = [g for g in here if g.free_gib < need_gib]
    if short:
        fix = "end what else runs there, or set device_batch_size lower"
        text = f"{short[0].name} has {short[0].free_gib:.1f} GiB free, the plan {need_gib:.1f}"
        return [Fact("GPU memory", text, "bad", fix, EXIT_UNFIT_NODE)]
    return [Fact("GPUs", f"{wanted} of {len(here)}", "ok")]


def _compiler(spec: RunSpec) -> list[Fact]:
    if not spec.runtime.compile:
        return []
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    found = os.environ.get("CXX") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if found is None or not headers.exists():
        what = "no C++ compiler" if found is None else f"no {headers}"
        fix = "apt-get install g++ python3-dev, or runtime.compile=false"
        text = f"{what}, and torch.compile needs one"
        return [Fact("compiler", text, "bad", fix, EXIT_UNFIT_NODE)]
    return [Fact("compiler", found, "ok")]


def _shared_memory(spec: RunSpec | None, plan: "Plan | None") -> list[Fact]:
    try:
        stat = os.statvfs("/dev/shm")
    except OSError:
        return []
    size = stat.f_frsize * stat.f_bavail
    text = f"{size / GIB:.2f} GiB free"
    several = plan is not None and not plan.offer.cpu and plan.layout.world_size > 1
    if several and size < LEAST_SHM_BYTES:
        fix = "docker run --shm-size=8g (or --ipc=host)"
        return [Fact("/dev/shm", text, "bad", fix, EXIT_UNFIT_NODE)]
    return [Fact("/dev/shm", text, "info")]


def _writable(path: Path) -> list[Fact]:
    place = _existing(path)
    if os.access(place, os.W_OK | os.X_OK) and place.is_dir():
        return [Fact("home", f"{path} ({shutil.disk_usage(place).free / GIB:.1f} GiB free)", "ok")]
    fix = "set NANOCHAT_HOME, or give --run-dir"
    return [Fact("home", f"{place} cannot be written", "bad", fix, EXIT_SPEC)]


def _existing(path: Path) -> Path:
    """The path itself, or its nearest parent that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def _data(spec: RunSpec, run_dir: RunDir) -> list[Fact]:
    facts = []
    for stage, paths in missing_files(spec).items():
        if run_dir.is_done(stage) and run_dir.is_done("base_train"):
            continue
        shown = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
        places = f"(looked in {roots_text()})"
        if Path(paths[0]).is_absolute():
            fix, places = "put the file there, or set data.path", ""
        else:
            fix = "bring it on a machine with network: nanochat fetch @CONFIG"
        text = f"{stage} needs {shown}: not there, or not whole {places}".rstrip()
        facts.append(Fact("data", text, "bad", fix, EXIT_SPEC))
    return facts or [Fact("data", "all that the stages read is here", "ok")]


def _sandbox(spec: RunSpec) -> list[Fact]:
    """HumanEval is refused where programs cannot be locked in: now, and not after the training."""
    if spec.evaluate is None or "humaneval" not in spec.evaluate.tasks:
        return []
    problem = sandbox.problem()
    if problem is None:
        return [Fact("sandbox", "programs that a model wrote can be locked in", "ok")]
    rest = ", ".join(f'"{task}"' for task in spec.evaluate.tasks if task != "humaneval")
    text = f"evaluate needs one for humaneval, and {problem}"
    return [Fact("sandbox", text, "bad", f"leave it out: 'evaluate.tasks=[{rest}]'", EXIT_SPEC)]


def free_gib(run_dir: RunDir) -> float:
    """Space for what a run writes: what is free, and what it already has."""
    written = sum(_bytes_below(run_dir.path / name) for name in ("checkpoints", "conversations"))
    return (shutil.disk_usage(_existing(run_dir.path)).free + written) / GIB


def _volume(spec: RunSpec, plan: "Plan", run_dir: RunDir) -> list[Fact]:
    there_gib = free_gib(run_dir)
    is_cached = run_dir.checkpoints_dir("base_train").exists()  # the cache comes before the first
    data = data_bytes(spec, missing_only=True, is_cached=is_cached)
    need_gib, of_what = volume_gib(spec, plan.checkpoints, data)
    text = (
        f"{there_gib:.1f} GiB free on {_existing(run_dir.path)}, {need_gib:.1f} needed ({of_what})"
    )
    if there_gib < need_gib:
        return [Fact("volume", text, "bad", f"a larger volume; {LESS_SPACE}", EXIT_SPEC)]
    return [Fact("volume", text, "ok")]


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*") if folder.exists() else ():
        try:
            total += path.stat().st_size
        except OSError:
            continue
    return total
