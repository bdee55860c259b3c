"""The launcher for SkyPilot against a small SkyPilot of our own; tests/e2e has the real one."""

import io
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.launch import sky as launcher
from infra.launch.base import Job, LaunchError
from infra.launch.sky import SkyOptions, cluster_name, fill, render, submit, worst_usd
from nanochat.spec import load_spec
from tests.twin.runpod import catalog

ROOT = Path(__file__).resolve().parents[2]
PLAN = {"usd_per_hour": 21.52, "world_size": 8, "offer": "8xH100-SXM"}


def job(*overrides: str, config: str = "d20") -> Job:
    path = ROOT / "configs" / f"{config}.toml"
    return Job(config=str(path), overrides=overrides, spec=load_spec(path, overrides), plan=PLAN)


class FakeSky:
    """A SkyPilot whose launch works, fails or hangs; it remembers what is up."""

    def __init__(self, trouble: str | None = None, log_code: int = 0) -> None:
        self.up: set[str] = set()
        self.launched: list[dict[str, Any]] = []
        self.secrets: dict[str, str] = {}
        self.cancelled = False
        self._trouble, self._log_code = trouble, log_code

    def launch(self, task: dict[str, Any], cluster: str, secrets: dict[str, str]) -> int:
        self.up.add(cluster)  # a pod is up and billed before its set-up can fail
        self.launched.append(task)
        self.secrets = secrets
        if self._trouble == "hangs":
            while not self.cancelled:
                time.sleep(0.01)
        elif self._trouble:
            raise RuntimeError(self._trouble)
        return 1

    def cancel_launch(self) -> None:
        self.cancelled = True

    def logs(self, cluster: str, job: int) -> int:
        assert cluster in self.up
        return self._log_code

    def exists(self, cluster: str) -> bool:
        return cluster in self.up

    def down(self, cluster: str) -> None:
        self.up.remove(cluster)

    def status(self) -> list[dict[str, Any]]:
        return []


@pytest.fixture(autouse=True)
def no_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "connect", lambda: None)
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def test_the_task_of_the_config_is_found_and_filled() -> None:
    task = fill(
        job("base_train.tokens_per_param=7.0", "seed=3"), SkyOptions(image="ghcr.io/me/kit:1")
    )
    assert task["name"] == "d20"
    assert task["envs"]["ARGS"] == "base_train.tokens_per_param=7.0 seed=3"
    assert task["resources"]["image_id"] == "docker:ghcr.io/me/kit:1"
    assert task["resources"]["autostop"]["down"] is True


def test_overrides_that_a_shell_would_split_stand_quoted_in_the_command() -> None:
    task = fill(job('data.path="a b"'), SkyOptions())
    assert task["run"].strip() == """nanochat run @configs/d20.toml 'data.path="a b"'"""
    assert task["envs"]["ARGS"] == ""


def test_a_config_without_a_task_is_refused_with_the_list() -> None:
    with pytest.raises(LaunchError, match=r"no task in .*sky runs @configs/cpu_large.toml.*d20"):
        fill(job(config="cpu_large"), SkyOptions())


def task_at(tmp_path: Path, instance_type: str, max_hourly_cost: float) -> SkyOptions:
    task = yaml.safe_load((ROOT / "sky" / "d20_h100.yaml").read_text())
    rung = {"infra": "runpod", "instance_type": instance_type}
    task["resources"] |= {"ordered": [rung], "max_hourly_cost": max_hourly_cost}
    path = tmp_path / "task.yaml"
    path.write_text(yaml.safe_dump(task))
    return SkyOptions(task=path)


@pytest.mark.parametrize(
    ("instance_type", "usd"), [("8x_H200-SXM_SECURE", 28.72), ("8x_H100-SXM_SECURE", 21.52)]
)
def test_a_rung_over_max_hourly_cost_is_refused_before_anything_starts(
    instance_type: str, usd: float, tmp_path: Path
) -> None:
    sky, dear = FakeSky(), task_at(tmp_path, instance_type, usd - 0.02)
    for attempt in (lambda: submit(job(), dear, sky, io.StringIO()), lambda: render(job(), dear)):
        with pytest.raises(LaunchError, match=rf"{instance_type} costs \${usd}/h, and max_hourly"):
            attempt()
    assert not sky.launched
    assert fill(job(), task_at(tmp_path, instance_type, usd))["resources"]["max_hourly_cost"] == usd


def test_the_price_of_the_spec_counts_against_max_hourly_cost(tmp_path: Path) -> None:
    dear = Job(**{**vars(job()), "plan": {**PLAN, "usd_per_hour": 25.0}})
    with pytest.raises(LaunchError, match=r"costs \$25.00/h"):
        fill(dear, task_at(tmp_path, "8x_H100-SXM_SECURE", 24.0))


def test_names_of_gpus_are_those_of_the_catalog() -> None:
    theirs = {name: ours for ours, name in catalog.SKY_NAMES.items()}
    assert {n: launcher.RUNPOD_GPUS.get(n, n) for n in theirs} == theirs


def test_another_cloud_is_asked_by_accelerator_and_without_the_volume() -> None:
    task = fill(job(), SkyOptions(infra="lambda"))
    assert task["resources"]["infra"] == "lambda"
    assert task["resources"]["accelerators"] == "H100:8"
    assert "ordered" not in task["resources"]
    assert "volumes" not in task


def test_the_dry_run_is_the_task_and_its_worst_case_has_start_and_autostop() -> None:
    rendered = render(job("budget.max_usd=50.0"), SkyOptions())
    sent = yaml.safe_load(rendered.text)
    assert sent["resources"]["max_hourly_cost"] == 30.0
    assert rendered.worst_case_usd == pytest.approx(50.0 + 30.0 * (15 + 10) / 60)


def test_without_a_budget_nothing_bounds_the_cost() -> None:
    path = ROOT / "configs" / "smoke.toml"
    unbounded = Job(config=str(path), overrides=(), spec=load_spec(path), plan=PLAN)
    assert worst_usd(unbounded, fill(unbounded, SkyOptions())) is None


def test_secrets_go_along_and_are_not_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    sky = FakeSky()
    assert submit(job(), SkyOptions(), sky, io.StringIO()) == 0
    assert sky.secrets == {"WANDB_API_KEY": "hunter2"}
    assert "hunter2" not in str(sky.launched) + render(job(), SkyOptions()).text


def test_a_failed_launch_leaves_nothing_up() -> None:
    sky = FakeSky("runtime set-up failed")
    with pytest.raises(LaunchError, match="set-up failed.*torn down") as e:
        submit(job(), SkyOptions(), sky, io.StringIO())
    assert (e.value.exit_code, sky.up) == (77, set())


def test_a_launch_that_hangs_is_cancelled_and_torn_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "LAUNCH_LIMIT_S", 0.1)
    sky = FakeSky("hangs")
    with pytest.raises(LaunchError, match="not up within"):
        submit(job(), SkyOptions(), sky, io.StringIO())
    assert (sky.cancelled, sky.up) == (True, set())


def test_a_cluster_that_was_up_before_is_not_torn_down() -> None:
    sky = FakeSky("busy")
    sky.up.add("d20")
    with pytest.raises(LaunchError, match="was up before"):
        submit(job(), SkyOptions(), sky, io.StringIO())
    assert sky.up == {"d20"}


def test_the_run_s_own_exit_code_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "exit_code_on", lambda cluster, run: 76)
    assert submit(job(), SkyOptions(), FakeSky(log_code=100), io.StringIO()) == 76


@pytest.mark.parametrize(
    ("run", "cluster"),
    [
        ("d20", "d20"),
        ("d64_1000usd", "d64-1000usd"),
        ("64 Ways", "run-64-ways"),
        ("x" * 50, "x" * 30),
    ],
)
def test_names_of_clusters_are_within_limits(run: str, cluster: str) -> None:
    assert cluster_name(run) == cluster
