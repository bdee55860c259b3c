"""`launch --to runpod` on the emulated provider: pods are containers of the image."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from infra.launch.runpod import CPU_INSTANCES
from tests.twin.engine import ROOT, Engine, wait_until
from tests.twin.runpod.account import Fault, Pod
from tests.twin.runpod.cloud import Cloud
from tests.twin.runpod.metrics import assert_equal, results
from tests.twin.runpod.venv import cloud_bin

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(1800)]

IMAGE = "registry.example/nanochat:0"
"""The name alone counts: whatever is asked for, the emulated pods are of the image under test."""
RUN = "/workspace/nanochat/runs/e2e"
TRAINS_ONLY = (
    *("base_train.num_steps=400", "base_train.eval_every_steps=400"),
    "budget.checkpoint_every_s=60.0",
)
"""An evaluation and a save have an allowance of their own, a quarter of an hour."""
IMPATIENT = """
import functools, sys
from infra.launch import runpod_pod
import entrypoint
runpod_pod.Launcher = functools.partial(runpod_pod.Launcher, boot_deadline_s=180.0)
sys.exit(entrypoint.main())
"""
"""`nanochat` that waits three minutes for a pod, not a quarter of an hour."""
START_S = 400.0
"""A toy run on two cores that others use too."""


@dataclass
class Client:
    """A person's shell: `nanochat` of make cloud-venv, a key, and nothing else of this machine."""

    cloud: Cloud
    home: Path
    processes: "list[subprocess.Popen[str]]" = field(default_factory=list)

    def env(self) -> dict[str, str]:
        return {
            "HOME": str(self.home),
            "PATH": os.environ["PATH"],
            "NANOCHAT_HOME": str(self.home / "nanochat"),
            "RUNPOD_API_KEY": self.cloud.account.key,
            "RUNPOD_API_BASE_URL": self.cloud.url,
        }

    def start(self, *words: str, command: str | None = None) -> "subprocess.Popen[str]":
        """`nanochat`, or a Python program in its place."""
        program = [cloud_bin() / "nanochat"]
        if command is not None:
            program = [cloud_bin() / "python", "-c", command]
        process = subprocess.Popen(
            [*program, *words],
            cwd=ROOT,
            env=self.env(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.processes.append(process)
        return process

    def close(self) -> None:
        for process in self.processes:
            with process:  # waits, and closes its output
                process.kill()

    def run(self, *words: str, command: str | None = None) -> tuple[int, str]:
        process = self.start(*words, command=command)
        output = process.communicate(timeout=1500)[0]
        return process.returncode, output

    def launch(self, *words: str) -> tuple[str, ...]:
        to = ("--to", "runpod", "--image", IMAGE, "--max-usd-per-hour", "10")
        return ("launch", "@configs/e2e.toml", *words, *to)

    def shown(self, pod: Pod, path: str) -> str:
        """A file in a pod; empty where there is none."""
        if pod.container is None:
            return ""
        text = self.cloud.engine.run(pod.container, "cat", path)
        return "" if text.startswith("cat:") else text

    def on_volume(self, engine: Engine, script: str) -> str:
        (volume,) = self.cloud.account.volumes.values()
        return engine.shell(volume["docker"], script)

    def pod(self) -> Pod:
        """The one pod that is billed."""
        (pod,) = self.cloud.account.alive()
        return pod

    def wait_for(self, happened: Callable[[], bool], process: Any, what: str) -> None:
        def seen() -> bool:
            assert process.poll() is None, f"{what}: {process.stdout.read()}"
            return happened()

        wait_until(seen, START_S, what)


@pytest.fixture
def client(engine: Engine, image: str, tmp_path: Path) -> Iterator[Client]:
    cloud_bin()
    with Cloud(image) as cloud:
        cloud.account.make_volume("nanochat", "CA-MTL-1", 10)
        made = Client(cloud, tmp_path)
        yield made
        made.close()


def test_a_killed_pod_is_resumed_with_equal_metrics(
    client: Client, engine: Engine, image: str
) -> None:
    with engine.volume() as volume:
        reference = engine.start(
            "run", "@configs/e2e.toml", volumes={volume: {"bind": "/workspace"}}
        )
        first = client.start(*client.launch())

        def is_training() -> bool:
            pods = client.cloud.account.alive()
            told = client.shown(pods[0], f"{RUN}/metrics.jsonl") if pods else ""
            return '"step": 12,' in told or '"mid_train"' in told

        client.wait_for(is_training, first, "the first pod trains")
        killed = client.pod()
        client.cloud.account.preempt(killed.id)
        assert first.wait(120) == 75, first.stdout.read()  # type: ignore[union-attr]
        code, output = client.run(*client.launch())
        assert code == 0, output
        assert "done" in output, "the log of the run comes through"
        ended = engine.wait(reference)
        assert ended.exit_code == 0, ended.output
        wanted = results(engine.shell(volume, f"cat {RUN}/metrics.jsonl"))
    assert_equal(results(client.on_volume(engine, f"cat {RUN}/metrics.jsonl")), wanted)
    assert client.cloud.account.alive() == [], "nothing is billed any more"
    # the pod has ended itself: the call came from the pod's network
    last = [p for p in client.cloud.account.pods.values() if p.id != killed.id][-1]
    assert str(last.ended_by).startswith("172.30.")
    assert "manifest.json" in client.on_volume(engine, f"ls -R {RUN}/checkpoints")


def test_the_budget_ends_the_run_and_the_pod(client: Client, engine: Engine) -> None:
    """$0.08 at $1.20 per hour: four minutes, boot and end included."""
    account = client.cloud.account
    account.price_factor = 20.0
    max_usd = 0.08
    code, output = client.run(
        *client.launch(
            f"budget.max_usd={max_usd}",
            "budget.checkpoint_every_s=5.0",
            "base_train.num_steps=1000000",
        )
    )
    assert code == 76, output
    assert account.alive() == []
    assert 0.0 < account.spent_usd() <= max_usd
    assert account.spent_usd() > 0.4 * max_usd, "the money was used"
    status = json.loads(client.on_volume(engine, f"cat {RUN}/status.json"))
    assert (status["exit_code"], status["stop_reason"]) == (76, "budget")
    assert "val_bpb" in client.on_volume(engine, f"cat {RUN}/report.md")
    found = client.on_volume(engine, f"ls {RUN}/checkpoints/base_train/*/manifest.json")
    assert "manifest.json" in found
    code, output = client.run("reap")
    assert code == 0 and "no pod" in output


def test_a_refused_end_is_asked_again_and_reaped(client: Client) -> None:
    """The provider refuses terminate for a while: `reap` says so, and finishes it."""
    refusal = Fault(times=10**6, message="try later", status=500)
    client.cloud.account.faults["podTerminate"] = refusal
    process = client.start(*client.launch("budget.max_usd=0.0001", "--detach"))
    client.wait_for(lambda: bool(client.cloud.account.alive()), process, "a pod")
    process.wait(START_S)
    time.sleep(5.0)  # the label's money is gone
    code, output = client.run("reap")
    assert code == 1 and "refused" in output, output
    code, output = client.run("status", "e2e")
    assert "is RUNNING at $" in output, "what is still billed is said"
    refusal.times = 0
    code, output = client.run("reap")
    assert code == 0, output
    assert client.cloud.account.alive() == []


def test_a_stopped_supervisor_cannot_spend_more(client: Client, engine: Engine) -> None:
    """SIGSTOP of the supervisor: the dead man's switch counts the ledger and ends the pod."""
    account = client.cloud.account
    account.price_factor = 20.0
    max_usd = 0.08
    endless = ("base_train.num_steps=1000000", "budget.checkpoint_every_s=5.0")
    process = client.start(*client.launch(f"budget.max_usd={max_usd}", *endless))

    def has_checkpoint() -> bool:
        pods = account.alive()
        return bool(pods and client.shown(pods[0], f"{RUN}/checkpoints/base_train/latest"))

    client.wait_for(has_checkpoint, process, "a checkpoint")
    pod = client.pod()
    pid = json.loads(client.shown(pod, f"{RUN}/status.json"))["pid"]
    assert pod.container is not None
    client.cloud.engine.run(pod.container, "kill", "-STOP", str(pid))
    assert process.wait(START_S) == 75, "the launcher saw the pod vanish"
    assert account.alive() == []
    assert str(pod.ended_by).startswith("172.30."), "by the pod itself"
    assert account.spent_usd() <= max_usd + pod.usd_per_hour / 60.0, "one tick"
    found = client.on_volume(engine, f"ls {RUN}/checkpoints/base_train/*/manifest.json")
    assert "manifest.json" in found


def test_a_stopped_trainer_is_ended_and_continued(client: Client, engine: Engine) -> None:
    """SIGSTOP of the trainer: within `runtime.hang_s` it is ended, and the run goes to its end."""
    process = client.start(
        *client.launch("runtime.hang_s=10.0", "budget.max_usd=1.0", *TRAINS_ONLY)
    )

    def trains() -> bool:
        pods = client.cloud.account.alive()
        return bool(pods) and '"step": 40,' in client.shown(pods[0], f"{RUN}/metrics.jsonl")

    client.wait_for(trains, process, "a run")
    pod = client.pod()
    container = pod.container
    assert container is not None

    def stops_in_training() -> bool:
        for signal in ("-STOP", "-CONT"):
            client.cloud.engine.run(
                container, "pkill", signal, "-f", "nanochat[.]stages.base_train"
            )
            told = json.loads(client.shown(pod, f"{RUN}/stages/base_train.progress.json"))
            if signal == "-STOP" and told["phase"] == "train":
                return True
        return False

    wait_until(stops_in_training, START_S, "it is stopped while it trains")
    output = process.communicate(timeout=1500)[0]
    assert process.returncode == 0, output
    assert "gave no sign of life and was ended" in output
    assert client.cloud.account.alive() == []


def test_stock_outs_prices_and_boot_failures_fall_through(client: Client) -> None:
    """A dear offer is not asked for, a stock-out takes the next rung, a pod that costs more than
    the list says is ended, one that does not come up too, and another of its rung is slow."""
    account = client.cloud.account
    first, dear, broken = CPU_INSTANCES
    account.faults["deploy"] = Fault(times=1)
    account.dearer[dear] = 1000.0
    account.fails_to_boot[broken] = 1
    account.boot_s = 5.0
    endless = ("base_train.num_steps=1000000", "budget.checkpoint_every_s=5.0")
    offers = ("--offers", "8xH100-SXM,cpu", "--volume", "none", "--detach")
    code, output = client.run(*client.launch(*offers, *endless), command=IMPATIENT)
    assert code == 0, output
    assert "left out: 8xH100-SXM: costs $21.52/h, more than" in output
    asked = [p.asked["instanceId"] for p in account.pods.values()]
    assert asked == [dear, broken, broken], output
    assert [p.ended is None for p in account.pods.values()] == [False, False, True]
    assert "more than $10.00/h" in output and "was not up within" in output
    assert "no longer any instances" not in output
    assert len(account.alive()) == 1
    code, output = client.run(*client.launch())
    assert code == 78 and "has pod" in output, "two pods would write one run directory"

    def has_checkpoint() -> bool:
        return bool(client.shown(client.pod(), f"{RUN}/checkpoints/base_train/latest"))

    wait_until(has_checkpoint, START_S, "a checkpoint")
    code, output = client.run("status", "e2e", "--json")
    found = json.loads(output)
    assert code == 0 and (found["state"], found["pod"]) == ("RUNNING", client.pod().id)
    code, output = client.run("pull", "e2e", "--to", str(client.home / "pulled"))
    assert code == 0 and "verified" in output, output
    assert list((client.home / "pulled").glob("checkpoints/base_train/step_*/model-*"))
    code, output = client.run("stop", "e2e")
    assert code in (0, 75), output
    assert account.alive() == []


def test_an_exited_pod_is_noticed_and_ended(client: Client) -> None:
    process = client.start(*client.launch())

    def trains() -> bool:
        pods = client.cloud.account.alive()
        return bool(pods) and bool(client.shown(pods[0], f"{RUN}/metrics.jsonl"))

    client.wait_for(trains, process, "a run")
    client.cloud.account.exit_pod(client.pod().id)
    assert process.wait(120) == 75
    assert client.cloud.account.alive() == []
