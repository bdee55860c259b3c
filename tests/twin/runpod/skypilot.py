"""The unmodified SkyPilot as a client of the emulated provider, and runs small enough for its pods.

SkyPilot's API server has a HOME of its own, is started and stopped by SkyPilot's own commands, and
asks for nothing but the emulated hosts.
"""

import contextlib
import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.twin.engine import ROOT, Engine, wait_until
from tests.twin.runpod.account import Pod
from tests.twin.runpod.cloud import Cloud
from tests.twin.runpod.venv import cloud_bin

HOME = "/workspace/nanochat"
IMAGE = ("--image", "registry.example/nanochat:0")
"""The name alone counts: whatever is asked for, the emulated pods are of the image under test."""
OFFLINE = Path(__file__).with_name("offline")
"""With the module that tells SkyPilot's controller where the internet is."""
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


class Client:
    """The command line of make cloud-venv in a HOME of its own."""

    def __init__(self, cloud: Cloud, home: Path) -> None:
        self.cloud = cloud
        self.account = cloud.account
        self.env = cloud.client_env(home)
        self.env["PATH"] = f"{cloud_bin()}:{self.env['PATH']}"

    def __call__(
        self, *command: str, cwd: Path = ROOT, timeout_s: float = COMMAND_S
    ) -> tuple[int, str]:
        """(exit code, output) of a command."""
        done = subprocess.run(
            command,
            env=self.env,
            cwd=cwd,
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

    @contextlib.contextmanager
    def tunnel(self, cluster: str, port: int) -> Iterator[int]:
        """A port of this machine that leads to one of a cluster's, by the entry that SkyPilot
        writes for ssh (which looks for it, and for the key, in the account's own home, not in
        HOME)."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            mine = int(free.getsockname()[1])
        made = Path(self.env["HOME"]) / ".sky" / "generated"
        entry = ("-F", made / "ssh" / cluster, "-i", made / "ssh-keys" / f"{cluster}.key")
        way = ("-N", "-o", "ExitOnForwardFailure=yes", "-L", f"{mine}:127.0.0.1:{port}")
        with subprocess.Popen(["ssh", *entry, *way, cluster], env=self.env) as ssh:
            try:
                wait_until(lambda: ssh.poll() is not None or _listens(mine), COMMAND_S, "a tunnel")
                assert ssh.poll() is None, "ssh has ended"
                yield mine
            finally:
                ssh.terminate()

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

    def down(self, cluster: str) -> None:
        """End a cluster, its hooks included."""
        code, said = self("sky", "down", "-y", cluster)
        assert code == 0, said

    def on_volume(self, engine: Engine, script: str) -> str:
        (volume,) = self.account.volumes.values()
        return engine.shell(volume["docker"], script)

    def kill_in_base_train(self, run: str) -> None:
        """Wait for a first checkpoint, then take the pod away with all its processes."""
        latest = f"{HOME}/runs/{run}/checkpoints/base_train/latest"
        wait_until(lambda: "step_" in self.in_pod("cat", latest), COMMAND_S, "a first checkpoint")
        self.account.preempt(self.pod().id)
        assert self.account.alive() == []


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def skypilot(image: str, home: Path, *, controller: bool = False) -> Iterator[Client]:
    """A client whose account has the volume of sky/volume.yaml; its server ends with it.

    controller: whether the server is the controller of managed jobs too, which else is a pod.
    """
    cloud_bin()
    for tool in ("rsync", "ssh", "openssl"):
        assert shutil.which(tool), f"{tool} is not installed; .ci/run does"
    with Cloud(image) as cloud:
        made = Client(cloud, home)
        if controller:
            config = home / ".sky" / "config.yaml"
            config.parent.mkdir()
            config.write_text("jobs: {controller: {consolidation_mode: true}}\n")
            made.env |= {"PYTHONPATH": str(OFFLINE), "EMULATED_INTERNET": cloud.url}
        try:
            made.start()
            code, said = made("sky", "volumes", "apply", "-y", "sky/volume.yaml")
            assert code == 0, said
            yield made
        finally:
            made("sky", "api", "stop")
