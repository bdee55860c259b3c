"""Every sky/*.yaml: its money, its config and its plan here; its schema and its place by SkyPilot.

SkyPilot has an environment of its own (`make cloud-venv`), so it checks them in one subprocess.
"""

import itertools
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
from infra.launch.base import Job
from infra.launch.sky import SkyOptions, render
from nanochat.spec import load_spec
from tests.twin.engine import image_tag
from tests.twin.runpod import catalog

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-cloud" / "bin" / "python"
FILES = sorted((ROOT / "sky").glob("*.yaml"))
VOLUME = ROOT / "sky" / "volume.yaml"
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


def config_of(path: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """The config that a task runs, and its own overrides, with a text that there is."""
    task = load(path)
    found = re.search(r"@(configs/\S+\.toml)((?: \S+)*) \$ARGS", task["run"])
    assert found is not None
    overrides = found[2].replace("'", "").split()
    if "file_mounts" in task:
        text = tmp_path / "combined_output.txt"
        text.write_text("Once upon a time there was a lamp. " * 20_000)
        overrides = [f'data.path="{text}"']
    return ROOT / found[1], overrides


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
    assert task["volumes"]["/workspace"] == load(VOLUME)["name"]


def head(path: Path) -> str:
    """The comment that a file begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    return " ".join(lines)


@pytest.mark.parametrize("path", TASKS, ids=ids)
def test_the_first_lines_say_what_it_costs_and_how_to_stop(path: Path) -> None:
    text = head(path)
    assert "$" in text
    assert "sky down" in text
    assert "sky launch" in text
    # as it stands, image_id is an image of this machine, which no rented one can pull
    assert f"--image-id docker:REGISTRY/{image_tag()}" in text


@pytest.mark.parametrize("path", [p for p in RUNS if p.stem != "cpu_smoke"], ids=ids)
def test_the_dollars_of_the_file_are_those_of_the_plan(path: Path, tmp_path: Path) -> None:
    """Each rung says price, hours and dollars as planned, the first lines those of the first."""
    config, overrides = config_of(path, tmp_path)
    said = re.findall(r"(8x_\S+)_SECURE\}  # \$([\d.]+)/h, ([\d.]+) h, \$(\d+)\n", path.read_text())
    assert len(said) == len(list(rungs(load(path))))
    for kind, price, hours, usd in said:
        offer = offer_of(f"{kind}_SECURE")
        made = planner.make_plan(load_spec(config, [*overrides, f'offer="{offer.name}"']), offer)
        assert float(price) == offer.usd_per_hour
        assert float(hours) == pytest.approx(made.hours, rel=0.02)
        assert float(usd) == pytest.approx(made.usd, rel=0.01)
    _, _, hours, usd = said[0]
    assert f"{hours} hours, ${usd} as planned" in head(path)
    most = load_spec(config, overrides).budget.max_usd
    told = {float(word) for word in re.findall(r"\$(\d+)", head(path))}
    assert told <= {most, *(float(usd) for *_, usd in said)} and most in told


def test_a_chat_costs_at_most_what_its_first_lines_say() -> None:
    task = load(ROOT / "sky" / "serve.yaml")
    hours = float(task["envs"]["HOURS"])
    dearest = max(prices()[rung["instance_type"]] for rung in rungs(task))
    assert f"${hours * dearest:.0f} at most" in head(ROOT / "sky" / "serve.yaml")


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
    config, overrides = config_of(path, tmp_path)
    volume_gib = float(load(VOLUME)["size"].removesuffix("Gi")) * 1e9 / 2**30
    for rung in rungs(task):
        offer = "cpu"
        if not rung["instance_type"].startswith("cpu"):
            offer = offer_of(rung["instance_type"]).name
        spec = load_spec(config, [*overrides, f'offer="{offer}"'])
        assert spec.budget.max_usd is not None
        made = planner.make_plan(spec, hardware.parse_offer(offer), free_gib=volume_gib)
        assert made.verdict != "refused", (rung["instance_type"], made.reasons)
    hook = task["config"]["hooks"][0]
    assert hook["run"] == "nanochat stop", "whatever name ARGS gives the run"


CHECK = """
import json, sys, unittest.mock as mock
from pathlib import Path
import sky, yaml
from sky import clouds, global_user_state, models
from sky.optimizer import Optimizer
from sky.utils.registry import CLOUD_REGISTRY
from sky.volumes.volume import Volume

made = Volume.from_yaml_config(yaml.safe_load(Path(sys.argv[2]).read_text()))
made.validate()
volume = models.VolumeConfig(
    name=made.name, type=made.type, cloud=str(CLOUD_REGISTRY.from_str(made.cloud)),
    region=made.region, zone=made.zone, name_on_cloud=made.name, size=made.size,
)
# what the API server remembers after `sky volumes apply`
volumes = {made.name: {"handle": volume, "status": None}}
global_user_state.get_volume_by_name = volumes.get
found = {"volume": made.to_yaml_config()}
for path, cloud, spot in json.loads(sys.argv[1]):
    config = yaml.safe_load(Path(path).read_text())
    for target in (config.get("file_mounts") or {}).values():
        Path(target).touch()
    task = sky.Task.from_yaml_config(config)
    task.validate()
    task.resolve_and_validate_volumes()
    if spot:
        task.set_resources_override({"use_spot": True})
    dag = sky.Dag()
    dag.add(task)
    enabled = lambda *a, **k: [getattr(clouds, cloud)()]
    with mock.patch("sky.check.get_cached_enabled_clouds_or_refresh", enabled):
        Optimizer.optimize(dag, quiet=True)
    best = dag.tasks[0].best_resources
    found[f"{Path(path).stem} {cloud} {spot}"] = {
        "instance_type": best.instance_type, "usd_per_hour": best.get_cost(3600),
        "down": best.autostop_config.down, "image": best.extract_docker_image(),
        "hooks": len((config.get("config") or {}).get("hooks", [])), "spot": best.use_spot,
        "place": f"{best.region}/{best.zone}",
        "mounted": [(v.path, v.volume_name) for v in task.volume_mounts or ()],
    }
print(json.dumps(found))
"""
HEAD = (
    "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,Price,Region,GpuInfo,SpotPrice\n"
)
ELSEWHERE = {
    "lambda": HEAD
    + "gpu_8x_h100_sxm5,H100,8.0,208.0,1800.0,23.92,us-east-1,H100,\n"
    + "cpu_4x_general,,,4.0,16.0,0.1,us-east-1,,\n",
    "nebius": HEAD
    + "gpu-h100-sxm_8gpu-128vcpu-1600gb,H100,8.0,128.0,1600.0,23.6,eu-north1,H100,\n"
    + "cpu-d3_4vcpu-16gb,,,4.0,16.0,0.1,eu-north1,,\n",
}
"""Machines of two more clouds as SkyPilot's catalog has them; prices of 2026-11."""
CLOUDS = {"lambda": "Lambda", "nebius": "Nebius"}


def skypilot(
    home: Path, *asked: tuple[Path, str, bool], volume: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    """SkyPilot's schema and optimizer with a catalog on disk: no server, no key, no network."""
    if not PYTHON.exists():
        if os.environ.get("CI"):
            pytest.fail("CI has no .venv-cloud: make cloud-venv")
        pytest.skip("SkyPilot is not installed: make cloud-venv")
    others = {f"{name}/vms.csv": text for name, text in ELSEWHERE.items()}
    for name, text in (catalog.files() | others).items():
        file = home / ".sky" / "catalogs" / "v8" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    env = {
        "HOME": str(home),
        "PATH": os.environ["PATH"],
        "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
    }
    listed = [(str(path), cloud, spot) for path, cloud, spot in asked]
    command = [str(PYTHON), "-c", CHECK, json.dumps(listed), str(volume or VOLUME)]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=home)


def elsewhere(path: Path, infra: str, to: Path) -> Path:
    """The task as `launch --to sky --infra` sends it to another cloud."""
    found = re.search(r"@(configs/\S+\.toml)", load(path)["run"])
    assert found is not None
    spec = load_spec(ROOT / found[1])
    plan = {"offer": spec.offer, "usd_per_hour": 0.1 if spec.offer == "cpu" else 21.52}
    job = Job(config=found[1], overrides=(), spec=spec, plan=plan)
    to.mkdir(exist_ok=True)
    sent = to / path.name
    sent.write_text(render(job, SkyOptions(infra=infra, task=path)).text)
    return sent


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What SkyPilot makes of every task, on RunPod, there on spot, and on two more clouds."""
    home = tmp_path_factory.mktemp("sky")
    asked = [(path, "RunPod", spot) for path in TASKS for spot in (False, True)]
    for infra, cloud in CLOUDS.items():
        asked += [(elsewhere(path, infra, home / infra), cloud, False) for path in RUNS]
    done = skypilot(home, *(a for a in asked if not (a[2] and a[0].stem == "cpu_smoke")))
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("path", TASKS, ids=ids)
def test_skypilot_takes_every_file_and_picks_the_first_rung(
    path: Path, taken: dict[str, dict[str, Any]]
) -> None:
    first = next(rungs(load(path)))
    took = taken[f"{path.stem} RunPod False"]
    assert took["instance_type"] == first["instance_type"]
    assert took["usd_per_hour"] <= first["max_hourly_cost"]
    assert took["down"] is True
    assert took["image"] == image_tag()
    assert took["mounted"] == [["/workspace", "nanochat"]]
    assert took["place"] == "CA/CA-MTL-1", "the volume pins the data centre"


def test_skypilot_takes_the_volume(taken: dict[str, dict[str, Any]]) -> None:
    took = taken["volume"]
    place = (took["cloud"].lower(), took["region"], took["zone"])
    assert place == ("runpod", "CA", "CA-MTL-1")
    assert (took["name"], took["size"]) == ("nanochat", "300")


@pytest.mark.parametrize("path", [p for p in TASKS if p.stem != "cpu_smoke"], ids=ids)
def test_every_file_is_its_own_spot_variant(path: Path, taken: dict[str, dict[str, Any]]) -> None:
    """With --use-spot of sky launch and sky jobs launch; RunPod has no CPU pods on spot."""
    took, dear = taken[f"{path.stem} RunPod True"], taken[f"{path.stem} RunPod False"]
    assert took["spot"] is True
    assert took["instance_type"] == dear["instance_type"]
    assert took["usd_per_hour"] < dear["usd_per_hour"]


@pytest.mark.parametrize("infra", CLOUDS)
@pytest.mark.parametrize("path", RUNS, ids=ids)
def test_every_run_fits_two_more_clouds(
    path: Path, infra: str, taken: dict[str, dict[str, Any]]
) -> None:
    took = taken[f"{path.stem} {CLOUDS[infra]} False"]
    assert took["instance_type"] in ELSEWHERE[infra]
    assert took["usd_per_hour"] <= next(rungs(load(path)))["max_hourly_cost"]
    assert took["down"] is True and took["image"] == image_tag()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("type:", "typ:"), ("300Gi", "3Gi"), ("runpod/CA/CA-MTL-1", "runpod/CA")],
    ids=["key", "size", "zone"],
)
def test_a_wrong_volume_is_refused(right: str, wrong: str, tmp_path: Path) -> None:
    volume = tmp_path / "volume.yaml"
    volume.write_text(VOLUME.read_text().replace(right, wrong))
    done = skypilot(tmp_path, volume=volume)
    assert done.returncode != 0 and "ValueError" in done.stderr


def test_a_typo_is_refused(tmp_path: Path) -> None:
    typo = tmp_path / "typo.yaml"
    text = (ROOT / "sky" / "d20_h100.yaml").read_text()
    typo.write_text(text.replace("disk_size", "disc_size"))
    assert "disc_size" in skypilot(tmp_path, (typo, "RunPod", False)).stderr
