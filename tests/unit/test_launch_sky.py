"""The launcher for SkyPilot against a small SkyPilot of our own; tests/e2e has the real one."""

import io
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra import reap
from infra.launch import sky as launcher
from infra.launch import sky_cluster, sky_rungs
from infra.launch.base import Job, LaunchError
from infra.launch.sky import (
    SkyOptions,
    fill,
    render,
    render_sweep,
    submit,
    submit_sweep,
    worst_usd,
)
from infra.launch.sky_cluster import cluster_name
from infra.launch.sky_sweep import points
from infra.runpod_api import Pod
from nanochat.spec import SpecError, load_spec
from tests.twin.runpod import catalog

ROOT = Path(__file__).resolve().parents[2]
PLAN = {"usd_per_hour": 21.52, "world_size": 8, "offer": "8xH100-SXM"}


PULLED = SkyOptions(image="me/nanochat:1")


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
        self.controller_is_rented = False
        self.number = 1
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
        return self.number

    def launch_managed(self, task: dict[str, Any], name: str, secrets: dict[str, str]) -> int:
        if self._trouble and len(self.launched) == 1:
            raise RuntimeError(self._trouble)
        self.launched.append(task)
        return len(self.launched)

    def rents_controller(self) -> bool:
        return self.controller_is_rented

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
    monkeypatch.setattr(sky_cluster, "connect", lambda: None)
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
    assert {n: sky_rungs.RUNPOD_GPUS.get(n, n) for n in theirs} == theirs


def test_another_cloud_is_asked_by_accelerator_and_without_the_volume() -> None:
    task = fill(job(), SkyOptions(infra="lambda"))
    assert task["resources"]["infra"] == "lambda"
    assert task["resources"]["accelerators"] == "H100:8"
    assert "ordered" not in task["resources"]
    assert "volumes" not in task and "job_recovery" not in task["resources"]


def test_the_dry_run_is_the_task_and_its_worst_case_has_start_and_autostop() -> None:
    rendered = render(job("budget.max_usd=50.0"), SkyOptions())
    sent = yaml.safe_load(rendered.text)
    assert sent["resources"]["max_hourly_cost"] == 30.0
    assert rendered.worst_case_usd == pytest.approx(50.0 + 30.0 * (40 + 10) / 60)
    assert launcher.LAUNCH_LIMIT_S == 40 * 60, "billed until it is given up"


def planned_on(offer: str, usd_per_hour: float, *overrides: str) -> Job:
    """A d20 whose user has asked for another machine."""
    plan = {**PLAN, "offer": offer, "usd_per_hour": usd_per_hour}
    return replace(job(f'offer="{offer}"', *overrides), plan=plan)


def test_the_hours_of_a_run_count_at_the_dearest_price_that_is_allowed() -> None:
    """d64's second rung: `reap` must not end it before its own 31 hours are over."""
    plan = {**PLAN, "offer": "8xH100-PCIE", "usd_per_hour": 19.12}
    d64 = replace(job(config="d64_1000usd"), plan=plan)
    task = fill(d64, SkyOptions())
    assert worst_usd(d64, task) == pytest.approx(31 * 24.0 + 24.0 * (40 + 10) / 60)
    del task["resources"]["max_hourly_cost"]
    assert worst_usd(d64, task) == pytest.approx(31 * 21.52 + 21.52 * (40 + 10) / 60)


def test_what_the_task_itself_gives_is_known() -> None:
    own = launcher.own_overrides("configs/smoke.toml", SkyOptions())
    assert own == ("budget.max_usd=1.0", "budget.usd_per_hour=0.12")
    assert launcher.own_overrides("configs/d64_1000usd.toml", SkyOptions()) == ()
    assert launcher.own_overrides("configs/d20.toml", SkyOptions()) == ()


def test_the_offer_that_is_asked_for_is_the_machine_that_is_rented() -> None:
    second = fill(planned_on("8xH200", 28.72), SkyOptions())["resources"]
    assert [r["instance_type"] for r in second["ordered"]] == [
        "8x_H200-SXM_SECURE",
        "8x_H100-SXM_SECURE",
    ]
    other = fill(planned_on("1xH100-PCIE", 2.39), SkyOptions())["resources"]
    assert "ordered" not in other
    assert (other["instance_type"], other["max_hourly_cost"]) == ("1x_H100_SECURE", 2.75)
    for offer in ("8xA100-40GB", "cpu"):
        with pytest.raises(LaunchError, match=f"plan is for {offer}, which RunPod does not rent"):
            fill(planned_on(offer, 1.0), SkyOptions())


def test_without_a_budget_nothing_bounds_the_cost() -> None:
    path = ROOT / "configs" / "smoke.toml"
    unbounded = Job(config=str(path), overrides=(), spec=load_spec(path), plan=PLAN)
    assert worst_usd(unbounded, fill(unbounded, SkyOptions())) is None


def test_secrets_go_along_and_are_not_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    sky = FakeSky()
    assert submit(job(), PULLED, sky, io.StringIO()) == 0
    assert sky.secrets == {"WANDB_API_KEY": "hunter2"}
    assert "hunter2" not in str(sky.launched) + render(job(), SkyOptions()).text


def test_a_failed_launch_leaves_nothing_up() -> None:
    sky = FakeSky("runtime set-up failed")
    with pytest.raises(LaunchError, match="set-up failed.*torn down") as e:
        submit(job(), PULLED, sky, io.StringIO())
    assert (e.value.exit_code, sky.up) == (77, set())


def test_a_launch_that_hangs_is_cancelled_and_torn_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "LAUNCH_LIMIT_S", 0.1)
    sky = FakeSky("hangs")
    with pytest.raises(LaunchError, match="not up within"):
        submit(job(), PULLED, sky, io.StringIO())
    assert (sky.cancelled, sky.up) == (True, set())


def test_a_machine_that_stays_up_on_another_cloud_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sky_cluster, "VERIFY_S", 0.0)
    sky = FakeSky("runtime set-up failed")

    def refuse(cluster: str) -> None:
        raise RuntimeError("503")

    monkeypatch.setattr(sky, "down", refuse)
    with pytest.raises(LaunchError, match="may still be billed .503.*sky down d20") as e:
        submit(job(), SkyOptions(image="me/nanochat:1", infra="lambda"), sky, io.StringIO())
    assert e.value.exit_code == 1


def test_a_cluster_that_was_up_before_is_not_torn_down() -> None:
    sky = FakeSky("busy")
    sky.up.add("d20")
    with pytest.raises(LaunchError, match="was up before"):
        submit(job(), PULLED, sky, io.StringIO())
    assert sky.up == {"d20"}


def test_the_run_s_own_exit_code_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {("d20", "d20", 1): 76}
    monkeypatch.setattr(launcher, "exit_code_on", lambda *of: told[of[:3]])
    assert submit(job(), PULLED, FakeSky(log_code=100), io.StringIO()) == 76


def test_a_cluster_whose_state_cannot_be_read_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    sky = FakeSky()

    def unreadable(cluster: str) -> bool:
        raise KeyError("EXITED")

    monkeypatch.setattr(sky, "exists", unreadable)
    with pytest.raises(LaunchError, match=r"KeyError: 'EXITED'.*`nanochat reap`, then") as e:
        submit(job(), PULLED, sky, io.StringIO())
    assert (e.value.exit_code, sky.launched) == (77, [])


def test_a_log_that_breaks_off_is_no_end_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    sky = FakeSky()

    def lost(cluster: str, number: int) -> int:
        raise RuntimeError("connection lost")

    monkeypatch.setattr(sky, "logs", lost)
    with pytest.raises(LaunchError, match=r"connection lost.*status d20`.*stop d20`") as e:
        submit(job(), PULLED, sky, io.StringIO())
    assert (e.value.exit_code, sky.up) == (1, {"d20"})


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


def test_the_hook_stops_the_run_of_the_machine_whatever_its_name() -> None:
    task = fill(job('name="mine"'), SkyOptions(spot=True))
    assert task["config"]["hooks"][0]["run"] == "nanochat stop"
    assert task["resources"]["use_spot"] is True


def test_a_sweep_is_a_run_per_value_with_a_share_of_the_budget_and_a_name_of_its_own() -> None:
    found = points(job("budget.max_usd=100.0").spec, ["model.depth=8,10", "seed=1,2"])
    assert [p[0] for p in found] == [f'name="d20-{d}-{s}"' for d in (8, 10) for s in (1, 2)]
    runs = [job(*p) for p in found]
    assert [r.spec.budget.max_usd for r in runs] == [25.0] * 4
    assert [r.spec.model.depth for r in runs] == [8, 8, 10, 10]
    rendered = render_sweep(runs, SkyOptions())
    assert len(list(yaml.safe_load_all(rendered.text))) == 4
    assert rendered.worst_case_usd == pytest.approx(100.0 + 4 * 30.0 * (40 + 10) / 60)


@pytest.mark.parametrize(
    ("axis", "told"),
    [
        ("seed=", "TOML literals"),
        ("seed", "TOML literals"),
        ("seed=1,1", "the same values"),
        (f"seed={','.join(map(str, range(40)))}", "more than 32"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(axis: str, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        points(job().spec, [axis])


def test_a_sweep_without_a_budget_is_refused() -> None:
    with pytest.raises(SpecError, match=r"needs budget\.max_usd"):
        points(load_spec(ROOT / "configs" / "smoke.toml"), ["seed=1,2"])


def test_a_sweep_is_given_to_the_controller_and_says_what_was_taken() -> None:
    runs = [job(*p) for p in points(job().spec, ["seed=1,2"])]
    sky, out = FakeSky(), io.StringIO()
    assert submit_sweep(runs, PULLED, sky, out) == 0
    assert [shlex.split(t["run"])[3] for t in sky.launched] == ['name="d20-1"', 'name="d20-2"']
    assert "d20-2 (job 2) is submitted" in out.getvalue()
    share_usd = 100.0 / 2 + 30.0 * (40 + 10) / 60
    pods = [
        replace(POD, id=f"p{n}", name=f"d20-{n}-{n}-0a1b2c3d-head", uptime_s=60) for n in (1, 2)
    ]
    rows = reap.reap(Provider(*pods))
    assert [(r.run, r.max_usd) for r in rows] == [("d20-1", share_usd), ("d20-2", share_usd)]
    with pytest.raises(LaunchError, match=r"did not take d20-2.*submitted so far: d20-1 \(job 1\)"):
        submit_sweep(runs, PULLED, FakeSky("queue is full"), io.StringIO())


def test_a_controller_that_nothing_would_end_is_not_made() -> None:
    sky = FakeSky()
    sky.controller_is_rented = True
    with pytest.raises(LaunchError, match="consolidation_mode: true.*sky api stop"):
        submit_sweep([job()], PULLED, sky, io.StringIO())
    assert not sky.launched


class Provider:
    """RunPod with the pods of a cluster."""

    def __init__(self, *pods: Pod) -> None:
        self.there = list(pods)

    def pods(self) -> list[Pod]:
        return list(self.there)

    def terminate(self, pod_id: str) -> None:
        self.there = [p for p in self.there if p.id != pod_id]


POD = Pod("p1", "d20-0a1b2c3d-head", "RUNNING", 21.52, 3600.0, {}, ("10.0.0.1", 22))


@pytest.mark.parametrize("image", ["", "nanochat:0.1.0", "docker:nanochat"])
def test_an_image_that_is_only_here_is_refused_before_anything_starts(image: str) -> None:
    """SkyPilot would ask Docker Hub's library for it, and wait beside a pod that is billed."""
    sky, runs = FakeSky(), [job(*p) for p in points(job().spec, ["seed=1,2"])]
    options = SkyOptions(image=image)
    with pytest.raises(LaunchError, match="make push REGISTRY=.*--image ghcr.io/YOU/nanochat"):
        submit(job(), options, sky, io.StringIO())
    with pytest.raises(LaunchError, match="pulls its image from a registry"):
        submit_sweep(runs, options, sky, io.StringIO())
    assert not sky.launched


def test_a_text_of_one_s_own_is_sent_along_or_on_the_volume_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    d64, on_volume = job(config="d64_1000usd"), 'data.path="/workspace/a b.txt"'
    with pytest.raises(LaunchError, match=r"output.txt is not in this folder.*on the volume"):
        submit(d64, PULLED, FakeSky(), io.StringIO())
    (tmp_path / "combined_output.txt").write_text("Once upon a time")
    sky = FakeSky()
    assert submit(d64, PULLED, sky, io.StringIO()) == 0
    assert sky.launched[0]["file_mounts"] == {"/tmp/combined_output.txt": "combined_output.txt"}
    assert submit(job(on_volume, config="d64_1000usd"), PULLED, sky, io.StringIO()) == 0
    assert "file_mounts" not in sky.launched[1], "and what the task would send is not asked for"
    for lost in ('data.path="combined_output.txt"', 'data.path="/home/me/a.txt"'):
        with pytest.raises(LaunchError, match="not on the machine that is rented"):
            submit(job(lost, config="d64_1000usd"), PULLED, FakeSky(), io.StringIO())
    elsewhere = SkyOptions(image="me/nanochat:1", infra="lambda")
    with pytest.raises(LaunchError, match="not on the machine that is rented"):
        submit(job(on_volume, config="d64_1000usd"), elsewhere, FakeSky(), io.StringIO())


def test_the_volume_of_a_task_has_the_size_that_its_file_gives_it() -> None:
    assert launcher.volume_gb("d20.toml", PULLED) == 300.0
    assert launcher.volume_gb("d20.toml", SkyOptions(infra="lambda")) is None


@pytest.mark.parametrize(
    ("line", "size_gb"),
    [
        ("size: 400GB", 400.0),
        ("size: 400gi", 400.0),
        ("size: 1Ti", 1024.0),
        ("size: 2097152Mb", 2048.0),
        ("size: '400'", 400.0),
        ("size: 400", 400.0),
        ("use_existing: true", None),
    ],
)
def test_the_size_of_a_volume_has_skypilot_s_units(
    line: str, size_gb: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(PULLED, task=ROOT / "sky" / "d20_h100.yaml")
    monkeypatch.setattr(launcher, "TASKS", tmp_path)
    assert launcher.volume_gb("d20.toml", options) is None, "there is no such file"
    (tmp_path / "volume.yaml").write_text(f"name: nanochat\n{line}\n")
    assert launcher.volume_gb("d20.toml", options) == size_gb


@pytest.mark.parametrize(
    "text",
    ["name: nanochat\nsize: much", "name: nanochat\nsize: 5Mi", "size: 3", "", "a: [", "- a"],
)
def test_a_size_that_cannot_be_read_is_told_with_its_file(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "TASKS", tmp_path)
    (tmp_path / "volume.yaml").write_text(text)
    options = replace(PULLED, task=ROOT / "sky" / "d20_h100.yaml")
    with pytest.raises(LaunchError, match=r"(?s)volume\.yaml does not say the size.*size: 300Gi"):
        launcher.volume_gb("d20.toml", options)
