"""A small job for the SLURM launcher, and the programs and modules of a cluster that it finds."""

from pathlib import Path
from typing import Any

from infra.launch import slurm
from infra.launch.base import Job
from nanochat.spec import load_spec

TOY = """\
name = "toy"            # it's "quoted" $HOME `id`
stop_grace_s = 8.0
[model]
depth = 2
vocab_size = 512
[data]
source = "embedded"
[runtime]
device = "cpu"
num_ranks = 2
[base_train]
num_steps = 5
total_batch_size = 4096
"""
GPU_PLAN = {"usd_per_hour": 0.0, "hours": 8.0, "world_size": 8, "offer": "8xA100-40GB"}
CPU_PLAN = {"usd_per_hour": 0.0, "hours": 0.1, "world_size": 1, "offer": "cpu"}


def job(
    folder: Path, fields: dict[str, Any], *overrides: str, plan: dict[str, Any] = CPU_PLAN
) -> Job:
    config = folder / "toy.toml"
    config.write_text(TOY)
    spec = slurm.with_fields(load_spec(config, list(overrides)), fields)
    return Job(config=str(config), overrides=overrides, spec=spec, plan=plan)


def put_modules(folder: Path, on_path: str, then: str = "") -> tuple[Path, str]:
    """(folder of the modules apptainer and apptainer/1.4, bash's function `module`).

    folder: has bin, on PATH, where `on_path` takes the place of apptainer. Each program says from
    where it is used, and does `then`.
    """
    modules, tools = folder / "modules", folder / "bin"
    (tools / "apptainer").unlink()
    for place, name in (
        (tools, on_path),
        (modules / "apptainer", "apptainer"),
        (modules / "apptainer" / "1.4", "apptainer"),
    ):
        place.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(f"#!/bin/bash\necho used {place}\n{then}")
        (place / name).chmod(0o755)
    return modules, f"() {{ [ -d {modules}/$2 ] && PATH={modules}/$2:$PATH; }}"
