"""Every sky/*.yaml: its money, its config and its plan here; its schema and its place by SkyPilot.

SkyPilot has an environment of its own (`make cloud-venv`), so it checks them in one subprocess.
"""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra import hardware, planner
from nanochat.spec import load_spec
from tests.twin.engine import image_tag
from tests.twin.runpod import catalog

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-cloud" / "bin" / "python"
FILES = sorted((ROOT / "sky").glob("*.yaml"))
TASKS = [p for p in FILES if p.stem != "volume"]
RUNS = [p for p in TASKS if p.stem != "serve"]
OFFERS = {name: ours for ours, name in catalog.SKY_NAMES.items()}
CONFIG_KEYS = {"hooks": {"run", "events", "timeout"}}
"""SkyPilot lets a typo below `config` pass."""


def load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text())
    return loaded


def rungs(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    resources = task["resources"]
    common = {k: v for k, v in resources.items() if k != "ordered"}
    for rung in resources.get("ordered") or [{}]:
        yield {**common, **rung}


def offer_of(instance_type: str) -> hardware.Offer:
    """Ours of SkyPilot's `8x_H100_SECURE`."""
    found = re.fullmatch(r"(\d+)x_(.+)_SECURE", instance_type)
    assert found is not None
    return hardware.parse_offer(f"{found[1]}x{OFFERS[found[2]]}")


def prices() -> dict[str, float]:
    rows = [line.split(",") for line in catalog.vms_csv().splitlines()[1:]]
    return {row[0]: float(row[7]) for row in rows}


def ids(path: Path) -> str:
    return path.stem


def test_no_python_shadows_skypilot() -> None:
    assert {p.suffix for p in (ROOT / "sky").iterdir()} == {".yaml"}
    assert {p.stem for p in FILES} == {
        *("cpu_smoke", "d20_h100", "d32_1000usd", "d64_1000usd", "serve", "volume")
    }


@pytest.mark.parametrize("path", TASKS, ids=ids)
def test_money_is_bounded(path: Path) -> None:
    task = load(path)
    autostop = task["resources"]["autostop"]
    assert autostop["down"] is True, "RunPod cannot stop, and without down it fails with a live pod"
    assert 0 < autostop["idle_minutes"] <= 15
    assert "any_of" not in task["resources"], "tried in no order"
    for rung in rungs(task):
        kind = rung["instance_type"]
        assert kind.startswith("cpu") or kind.endswith("_SECURE"), "the pod gets a key: pin SECURE"
        assert prices()[kind] <= rung["max_hourly_cost"]
        if not kind.startswith("cpu"):
            assert offer_of(kind).usd_per_hour <= rung["max_hourly_cost"]
        assert rung["image_id"] == f"docker:{image_tag()}"
    assert len(task["volumes"]) == 1
    assert task["volumes"]["/workspace"] == load(ROOT / "sky" / "volume.yaml")["name"]


@pytest.mark.parametrize("path", TASKS, ids=ids)
def test_the_first_lines_say_what_it_costs_and_how_to_stop(path: Path) -> None:
    head = [line for line in path.read_text().splitlines()[:4] if line.startswith("#")]
    text = " ".join(head)
    assert "$" in text
    assert "sky down" in text
    assert "sky launch" in text


@pytest.mark.parametrize("path", TASKS, ids=ids)
def test_names_and_config_keys_are_known(path: Path) -> None:
    task = load(path)
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,13}", task["name"]), "RunPod adds up to 16 characters"
    assert "workdir" not in task, "the code is in the image"
    for key, value in (task.get("config") or {}).items():
        assert key in CONFIG_KEYS
        for hook in value:
            assert set(hook) == CONFIG_KEYS[key]
            assert set(hook["events"]) <= {"stop", "preemption", "down"}


@pytest.mark.parametrize("path", RUNS, ids=ids)
def test_its_config_has_a_budget_and_a_plan_for_every_rung(path: Path, tmp_path: Path) -> None:
    task = load(path)
    assert task["envs"]["ARGS"] == ""
    assert task["run"].rstrip().endswith("$ARGS")
    found = re.search(r"@(configs/\S+\.toml)((?: \S+)*) \$ARGS", task["run"])
    assert found is not None
    overrides = found[2].replace("'", "").split()
    if "file_mounts" in task:
        text = tmp_path / "combined_output.txt"
        text.write_text("Once upon a time there was a lamp. " * 20_000)
        overrides = [f'data.path="{text}"']
    for rung in rungs(task):
        offer = "cpu"
        if not rung["instance_type"].startswith("cpu"):
            offer = offer_of(rung["instance_type"]).name
        spec = load_spec(ROOT / found[1], [*overrides, f'offer="{offer}"'])
        assert spec.budget.max_usd is not None
        made = planner.make_plan(spec, hardware.parse_offer(offer))
        assert made.verdict != "refused", (rung["instance_type"], made.reasons)
    hook = task["config"]["hooks"][0]
    assert hook["run"] == f"nanochat stop {load_spec(ROOT / found[1], overrides).name}"


CHECK = """
import json, sys, unittest.mock as mock
from pathlib import Path
import sky, yaml
from sky import clouds
from sky.optimizer import Optimizer

found = {}
for path in sys.argv[1:]:
    config = yaml.safe_load(Path(path).read_text())
    config.pop("volumes", None)          # looked up on the API server
    for target in (config.get("file_mounts") or {}).values():
        Path(target).touch()
    task = sky.Task.from_yaml_config(config)
    task.validate()
    dag = sky.Dag()
    dag.add(task)
    enabled = lambda *a, **k: [clouds.RunPod()]
    with mock.patch("sky.check.get_cached_enabled_clouds_or_refresh", enabled):
        Optimizer.optimize(dag, quiet=True)
    best = dag.tasks[0].best_resources
    found[Path(path).stem] = {
        "instance_type": best.instance_type, "usd_per_hour": best.get_cost(3600),
        "down": best.autostop_config.down, "image": best.extract_docker_image(),
        "hooks": len((config.get("config") or {}).get("hooks", [])),
    }
print(json.dumps(found))
"""


def skypilot(tmp_path: Path, *files: Path) -> "subprocess.CompletedProcess[str]":
    """SkyPilot's schema and optimizer with a catalog on disk: no server, no key, no network."""
    if not PYTHON.exists():
        if os.environ.get("CI"):
            pytest.fail("CI has no .venv-cloud: make cloud-venv")
        pytest.skip("SkyPilot is not installed: make cloud-venv")
    for name, text in catalog.files().items():
        file = tmp_path / ".sky" / "catalogs" / "v8" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    env = {
        "HOME": str(tmp_path),
        "PATH": os.environ["PATH"],
        "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
    }
    command = [str(PYTHON), "-c", CHECK, *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)


def test_skypilot_takes_every_file_and_picks_the_first_rung(tmp_path: Path) -> None:
    done = skypilot(tmp_path, *TASKS)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for path in TASKS:
        first = next(rungs(load(path)))
        took = found[path.stem]
        assert took["instance_type"] == first["instance_type"]
        assert took["usd_per_hour"] <= first["max_hourly_cost"]
        assert took["down"] is True
        assert took["image"] == image_tag()


def test_a_typo_is_refused(tmp_path: Path) -> None:
    typo = tmp_path / "typo.yaml"
    text = (ROOT / "sky" / "d20_h100.yaml").read_text()
    typo.write_text(text.replace("disk_size", "disc_size"))
    assert "disc_size" in skypilot(tmp_path, typo).stderr
