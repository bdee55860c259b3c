"""The unmodified SkyPilot against RunPod in a box, whose pods are containers of our image.

SkyPilot's API server has a HOME of its own, is started and stopped by SkyPilot's own commands, and
asks for nothing but the emulated hosts.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.twin.engine import ROOT, wait_until
from tests.twin.runpod.account import Pod
from tests.twin.runpod.cloud import Cloud

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(3600)]

BIN = ROOT / ".venv-cloud" / "bin"
RUN = "/workspace/nanochat/runs/smoke"
COMMAND_S = 1500.0
TOY = (
    "base_train.num_steps=60 mid_train.num_steps=4 chat_sft.num_steps=4 chat_rl.num_steps=2 "
    "base_train.eval_tokens=4096 evaluate.max_examples=4 tok_train.max_chars=200000 "
    "budget.checkpoint_every_s=1.0"
)
BROKEN = "rm -rf /root/.local/bin/uv /root/skypilot-runtime; ln -sf /bin/false /usr/bin/curl"


class Client:
    """SkyPilot's command line in a HOME of its own."""

    def __init__(self, cloud: Cloud, home: Path) -> None:
        self.cloud = cloud
        self.env = cloud.client_env(home)
        self.env["PATH"] = f"{BIN}:{self.env['PATH']}"

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


@pytest.fixture(scope="module")
def client(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    if not (BIN / "sky").exists():
        if os.environ.get("CI"):
            pytest.fail("CI has no .venv-cloud: make cloud-venv")
        pytest.skip("SkyPilot is not installed: make cloud-venv")
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


def the_pod(cloud: Cloud) -> Pod:
    (pod,) = cloud.account.alive()
    return pod


def in_pod(cloud: Cloud, *command: str) -> str:
    pod = the_pod(cloud)
    assert pod.container is not None
    return cloud.engine.run(pod.container, *command)


def test_smoke_by_sky_launch_resumes_after_its_pod_is_gone(client: Client) -> None:
    cloud = client.cloud
    launch = (
        "sky",
        "launch",
        "-y",
        "-d",
        "-c",
        "smoke",
        "sky/cpu_smoke.yaml",
        "--env",
        f"ARGS={TOY}",
    )
    code, said = client(*launch)
    assert code == 0, said
    latest = f"{RUN}/checkpoints/base_train/latest"
    wait_until(lambda: "step_" in in_pod(cloud, "cat", latest), COMMAND_S, "a first checkpoint")
    first = the_pod(cloud)
    cloud.account.preempt(first.id)
    assert cloud.account.alive() == []

    follow = [word for word in launch if word != "-d"]
    code, said = client(*follow)
    assert code == 0, said
    assert "resume" in said.lower(), said
    status = json.loads(in_pod(cloud, "cat", f"{RUN}/status.json"))
    assert (status["state"], status["exit_code"]) == ("SUCCEEDED", 0)
    pod = the_pod(cloud)
    assert pod.id != first.id

    # autodown: the call comes from the pod, not from this machine
    code, said = client("sky", "autostop", "-y", "--down", "-i", "0", "smoke")
    assert code == 0, said
    wait_until(lambda: pod.ended is not None, COMMAND_S, "autodown of the pod")
    assert pod.ended_by is not None and pod.ended_by.startswith("172.30.77.")
    assert not [h for h in cloud.foreign if "runpod" in h]


def test_a_failed_set_up_leaves_no_pod(client: Client) -> None:
    account = client.cloud.account
    account.on_start = BROKEN
    try:
        code, said = client("nanochat", "launch", "@configs/smoke.toml", "--to", "sky")
    finally:
        account.on_start = None
    assert code == 77, said
    assert "torn down" in said, said
    assert account.alive() == []
    assert any(c["operation"] == "podTerminate" for c in account.calls)


def test_no_capacity_falls_through_to_the_next_rung(client: Client) -> None:
    from tests.twin.runpod.account import Fault

    account = client.cloud.account
    account.faults["deploy"] = Fault(times=1)
    code, said = client(
        *("sky", "launch", "-y", "-c", "ladder", "sky/d20_h100.yaml"),
        *("--env", "ARGS=--version"),
    )
    asked = [c["input"].get("gpuTypeId") for c in account.calls if "Deploy" in c["operation"]]
    assert asked[-2:] == ["NVIDIA H100 80GB HBM3", "NVIDIA H200"], said
    client("sky", "down", "-y", "ladder")
    assert account.alive() == []
