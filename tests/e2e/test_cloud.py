"""The unmodified SkyPilot against RunPod in a box, whose pods are containers of our image.

SkyPilot's API server has a HOME of its own, is started and stopped by SkyPilot's own commands, and
asks for nothing but the emulated hosts.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.twin.engine import ROOT, Engine, wait_until
from tests.twin.runpod.account import Fault, Pod
from tests.twin.runpod.cloud import Cloud
from tests.twin.runpod.metrics import assert_equal, results
from tests.twin.runpod.venv import cloud_bin

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]

HOME = "/workspace/nanochat"
IMAGE = ("--image", "registry.example/nanochat:0")
"""The name alone counts: whatever is asked for, the emulated pods are of the image under test."""
COMMAND_S = 1500.0
"""Ceiling of one command on a machine that others use too; a launch takes about a minute."""
SIZE = (
    "runtime.num_threads=1 model.depth=2 model.aspect_ratio=32 model.head_dim=32 model.seq_len=64 "
    "model.vocab_size=512 tok_train.max_chars=200000 budget.checkpoint_every_s=1.0 "
    "base_train.total_batch_size=1024 base_train.eval_tokens=4096 base_train.eval_every_steps=50 "
    "mid_train.total_batch_size=1024 mid_train.eval_tokens=4096 "
    "chat_sft.total_batch_size=1024 chat_sft.eval_tokens=4096 "
    "chat_rl.num_steps=2 chat_rl.prompts_per_step=2 chat_rl.samples_per_prompt=2 "
    "chat_rl.max_tokens=8 chat_rl.eval_examples=4 evaluate.max_examples=4 evaluate.max_tokens=8"
)
TOY = f"{SIZE} base_train.num_steps=300 mid_train.num_steps=4 chat_sft.num_steps=4"
D20_TOY = (
    f'{SIZE} offer="cpu" runtime.device="cpu" runtime.compile=false data.source="embedded" '
    "base_train.tokens_per_param=2.0 checkpoint.free_floor_gib=0.05 "
    "mid_train.mixture={spelling=30,identity=6} chat_sft.mixture={spelling=30,identity=6} "
    'chat_rl.task="spelling" evaluate.tasks=["spelling"]'
)
"""d20 on the CPU that a pod here has, from the text and the tasks that are in the image."""
BROKEN = "ln -sf /bin/false /root/.local/bin/uv; ln -sf /bin/false /usr/bin/curl"


class Client:
    """The command line of make cloud-venv in a HOME of its own."""

    def __init__(self, cloud: Cloud, home: Path) -> None:
        self.cloud = cloud
        self.account = cloud.account
        self.env = cloud.client_env(home)
        self.env["PATH"] = f"{cloud_bin()}:{self.env['PATH']}"

    def __call__(self, *command: str, timeout_s: float = COMMAND_S) -> tuple[int, str]:
        """(exit code, output) of a command."""
        done = subprocess.run(
            command,
            env=self.env,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
        )
        return done.returncode, done.stdout

    def start(self) -> None:
        """Start the API server; on a loaded machine it takes longer than SkyPilot waits."""
        for _ in range(5):
            code, said = self("sky", "check", "runpod")
            if code == 0 and "RunPod: enabled" in said:
                return
        pytest.fail(f"SkyPilot does not start: {said}")

    def pod(self) -> Pod:
        """The one pod that is billed."""
        (pod,) = self.account.alive()
        return pod

    def in_pod(self, *command: str) -> str:
        """What a command prints in it; nothing where there is no pod or it fails."""
        for pod in self.account.alive():
            if pod.container is not None:
                return self.cloud.engine.run(pod.container, *command)
        return ""

    def status(self, run: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.in_pod("cat", f"{HOME}/runs/{run}/status.json"))
        return found

    def autostop(self, cluster: str) -> tuple[int, bool]:
        """(idle minutes, whether it goes down) as SkyPilot has recorded them."""
        code, said = self("sky", "status", "-o", "json", cluster)
        assert code == 0, said
        (found,) = json.JSONDecoder().raw_decode(said[said.index("[\n") :])[0]
        return found["autostop"], found["to_down"]

    def on_volume(self, engine: Engine, script: str) -> str:
        (volume,) = self.account.volumes.values()
        return engine.shell(volume["docker"], script)

    def kill_in_base_train(self, run: str) -> None:
        """Wait for a first checkpoint, then take the pod away with all its processes."""
        latest = f"{HOME}/runs/{run}/checkpoints/base_train/latest"
        wait_until(lambda: "step_" in self.in_pod("cat", latest), COMMAND_S, "a first checkpoint")
        self.account.preempt(self.pod().id)
        assert self.account.alive() == []


@pytest.fixture(scope="module")
def client(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    cloud_bin()
    for tool in ("rsync", "ssh", "openssl"):
        assert shutil.which(tool), f"{tool} is not installed; .ci/run does"
    home = tmp_path_factory.mktemp("sky")
    with Cloud(image) as cloud:
        made = Client(cloud, home)
        try:
            made.start()
            code, said = made("sky", "volumes", "apply", "-y", "sky/volume.yaml")
            assert code == 0, said
            yield made
        finally:
            made("sky", "api", "stop")


def check_resume(client: Client, engine: Engine, run: str, task: str, toy: str) -> None:
    """Launched as the file stands; its pod killed; the same command again: equal results,
    and autodown, which the pod itself calls."""
    launch = ("sky", "launch", "-y", "-c", run, task, "--env", f"ARGS={toy}")
    code, said = client(*launch, "-d")
    assert code == 0, said
    first = client.pod()
    client.kill_in_base_train(run)
    command = str(yaml.safe_load((ROOT / task).read_text())["run"]).removeprefix("nanochat")
    with engine.volume() as volume:
        reference = engine.start(
            *(*command.replace("$ARGS", "").split(), *toy.split()),
            volumes={volume: {"bind": "/workspace"}},
        )
        code, said = client(*launch)
        assert code == 0, said
        assert "base_train resumes from step_" in said, "the log of the run comes through"
        status = client.status(run)
        assert (status["state"], status["exit_code"]) == ("SUCCEEDED", 0)
        pod = client.pod()
        assert pod.id != first.id
        asked = yaml.safe_load((ROOT / task).read_text())["resources"]["autostop"]
        assert client.autostop(run) == (asked["idle_minutes"], True), "the file's own setting"
        # sooner than that, so that it comes while the reference ends
        code, said = client("sky", "autostop", "-y", "--down", "-i", "0", run)
        assert code == 0, said
        found = results(client.in_pod("cat", f"{HOME}/runs/{run}/metrics.jsonl"))
        ended = engine.wait(reference)
        assert ended.exit_code == 0, ended.output
        wanted = results(engine.shell(volume, f"cat {HOME}/runs/{run}/metrics.jsonl"))
    assert_equal(found, wanted)
    wait_until(lambda: pod.ended is not None, COMMAND_S, "autodown of the pod")
    assert str(pod.ended_by).startswith("172.30.77."), "the call comes from the pod"
    assert not [h for h in client.cloud.foreign if "runpod" in h]


def test_smoke_by_sky_launch_resumes_after_its_pod_is_gone(client: Client, engine: Engine) -> None:
    check_resume(client, engine, "smoke", "sky/cpu_smoke.yaml", TOY)


def test_a_failed_set_up_leaves_no_pod(client: Client) -> None:
    account = client.account
    account.on_start = BROKEN
    try:
        code, said = client("nanochat", "launch", "@configs/smoke.toml", "--to", "sky", *IMAGE)
    finally:
        account.on_start = None
    assert code == 77, said
    assert "torn down" in said, said
    assert account.alive() == []
    assert any(c["operation"] == "podTerminate" for c in account.calls)


@pytest.mark.long
def test_d20_by_sky_launch_resumes_after_its_pod_is_gone(client: Client, engine: Engine) -> None:
    check_resume(client, engine, "d20", "sky/d20_h100.yaml", D20_TOY)


@pytest.mark.long
def test_status_and_stop_are_ours_too(client: Client) -> None:
    """launch --to sky, status, stop: a checkpoint, exit code 75, nothing billed."""
    endless = (*SIZE.split(), "base_train.num_steps=100000", 'name="mine"')
    budget = ("budget.max_usd=1.0", "budget.usd_per_hour=0.12")
    launch = ("nanochat", "launch", "@configs/smoke.toml", "--to", "sky", *IMAGE, *endless, *budget)
    code, said = client(*launch, "--detach")
    assert code == 0, said
    latest = f"{HOME}/runs/mine/checkpoints/base_train/latest"
    wait_until(lambda: "step_" in client.in_pod("cat", latest), COMMAND_S, "a first checkpoint")
    code, said = client("nanochat", "status", "mine", "--json")
    found = json.loads(said)
    assert code == 0 and found["state"] == "RUNNING" and found["pod"] == client.pod().id
    code, said = client("nanochat", "stop", "mine")
    assert code == 75, said
    assert client.account.alive() == []
    code, said = client("nanochat", "reap")
    assert code == 0 and "no pod" in said
    code, said = client("nanochat", "status", "mine")
    assert code == 78, "neither a run nor a cluster is there"


@pytest.mark.long
def test_sky_down_saves_first(client: Client, engine: Engine) -> None:
    """The hook of the file stops the run, which has saved nothing yet."""
    never = "budget.checkpoint_every_s=100000.0 base_train.eval_every_steps=100000"
    endless = f'name="saved" {TOY} {never} base_train.num_steps=100000'
    launch = ("sky", "launch", "-y", "-c", "saved", "sky/cpu_smoke.yaml")
    code, said = client(*launch, "--env", f"ARGS={endless}", "-d")
    assert code == 0, said
    run = f"{HOME}/runs/saved"
    trains = '"step": 20,'
    wait_until(lambda: trains in client.in_pod("cat", f"{run}/metrics.jsonl"), COMMAND_S, "a run")
    saved = f"find {run}/checkpoints -name manifest.json"
    assert client.on_volume(engine, saved) == ""
    code, said = client("sky", "down", "-y", "saved")
    assert code == 0, said
    assert client.account.alive() == []
    assert "manifest.json" in client.on_volume(engine, saved)
    status = json.loads(client.on_volume(engine, f"cat {run}/status.json"))
    assert (status["state"], status["exit_code"]) == ("STOPPED", 75)


@pytest.mark.long
def test_an_exited_spot_pod_is_reaped_and_the_run_goes_on(client: Client) -> None:
    """What SkyPilot cannot read (KeyError 'EXITED') is ended by `reap`, and it can launch again."""
    launch = ("sky", "launch", "-y", "-c", "outbid", "sky/cpu_smoke.yaml")
    arguments = ("--env", f'ARGS=name="outbid" {TOY}')
    code, said = client(*launch, *arguments, "-d")
    assert code == 0, said
    pod = client.pod()
    client.account.exit_pod(pod.id)
    code, said = client("nanochat", "reap")
    assert code == 0 and "it is EXITED" in said, said
    assert client.account.alive() == []
    code, said = client(*launch, *arguments)
    assert code == 0, said
    client("sky", "down", "-y", "outbid")
    assert client.account.alive() == []


@pytest.mark.long
def test_no_capacity_falls_through_to_the_next_rung(client: Client) -> None:
    account = client.account
    account.faults["deploy"] = Fault(times=1)
    code, said = client(
        *("sky", "launch", "-y", "-c", "ladder", "sky/d20_h100.yaml"),
        *("--env", "ARGS=--version"),
    )
    asked = [c["input"].get("gpuTypeId") for c in account.calls if "Deploy" in c["operation"]]
    assert asked[-2:] == ["NVIDIA H100 80GB HBM3", "NVIDIA H200"], said
    client("sky", "down", "-y", "ladder")
    assert account.alive() == []
