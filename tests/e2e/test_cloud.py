"""The unmodified SkyPilot against RunPod in a box, whose pods are containers of our image."""

import contextlib
import http.client
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.twin.engine import ROOT, Engine, wait_until
from tests.twin.runpod.account import Fault
from tests.twin.runpod.metrics import assert_equal, results
from tests.twin.runpod.skypilot import (
    COMMAND_S,
    D20_TOY,
    HOME,
    IMAGE,
    SIZE,
    TOY,
    Client,
    skypilot,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]

D64_TOY = (
    'offer="cpu" runtime.device="cpu" runtime.compile=false runtime.num_threads=1 model.depth=2 '
    "model.aspect_ratio=32 model.head_dim=32 model.seq_len=64 base_train.total_batch_size=1024 "
    "base_train.eval_tokens=4096 base_train.eval_every_steps=50 checkpoint.free_floor_gib=0.05 "
    "budget.checkpoint_every_s=1.0 base_train.num_steps=300"
)
"""Of d64's own stay the text, its characters and the sharding; its budget would be the horizon."""
NEVER_UP_S = 150.0
IMPATIENT = f"""
import sys
from infra.launch import sky
import entrypoint
sky.LAUNCH_LIMIT_S = {NEVER_UP_S}
sys.exit(entrypoint.main())
"""
"""`nanochat` that waits so long for a cluster, not forty minutes."""
BROKEN = "ln -sf /bin/false /root/.local/bin/uv; ln -sf /bin/false /usr/bin/curl"


@pytest.fixture(scope="module")
def client(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with skypilot(image, tmp_path_factory.mktemp("sky")) as made:
        yield made


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
    client.down("saved")
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


@pytest.mark.long
def test_a_launch_that_never_returns_is_given_up(client: Client) -> None:
    """SkyPilot waits without a limit for a pod that never opens its port."""
    account = client.account
    account.boot_s = 1e6
    try:
        code, said = client(
            *("python", "-c", IMPATIENT, "launch", "@configs/smoke.toml", "--to", "sky", *IMAGE),
            *("--detach", 'name="never"'),
        )
    finally:
        account.boot_s = 0.0
    assert code == 77, said
    assert f"not up within {NEVER_UP_S:.0f} s" in said and "torn down" in said, said
    assert account.alive() == []
    code, said = client("nanochat", "reap")
    assert code == 0 and "no pod" in said, said


@pytest.mark.long
def test_a_private_image_is_pulled_with_a_login_that_is_removed(
    client: Client, engine: Engine
) -> None:
    """As docs/cloud.md types it; the password is nowhere but in the call to the provider."""
    account, password = client.account, "ghp_of_this_test"
    login = {"USERNAME": "acme", "PASSWORD": password, "SERVER": "registry.example"}
    secrets = {f"SKYPILOT_DOCKER_{key}": value for key, value in login.items()}
    client.env |= secrets
    try:
        code, said = client(
            *("sky", "launch", "-y", "-c", "private", "sky/cpu_smoke.yaml"),
            *("--image-id", "docker:acme/nanochat:v1", "--env", f'ARGS=name="private" {TOY}'),
            *(word for name in secrets for word in ("--secret", name)),
        )
    finally:
        for name in secrets:
            del client.env[name]
    assert code == 0, said
    (login_call,) = [c["input"] for c in account.calls if c["operation"] == "saveRegistryAuth"]
    assert (login_call["username"], login_call["password"]) == ("acme", password)
    asked = client.pod().asked
    assert asked["imageName"] == "registry.example/acme/nanochat:v1"
    assert account.login_of(asked["templateId"]) == login_call["name"]
    assert password not in said
    assert client.on_volume(engine, f"grep -rl {password} /workspace || true").strip() == ""
    client.down("private")
    assert account.alive() == [] and account.logins() == []


@pytest.mark.long
def test_d64_by_sky_launch_sends_its_text_and_resumes(
    client: Client, engine: Engine, tmp_path: Path
) -> None:
    """The text comes from the folder of the command, with both launches."""
    line = "Return the fox that jumps over a lazy dog. If I can: The import class.\n"
    (tmp_path / "combined_output.txt").write_text(line * 6000)
    launch = (
        *("sky", "launch", "-y", "-c", "d64", str(ROOT / "sky" / "d64_1000usd.yaml")),
        *("--env", f"ARGS={D64_TOY}"),
    )
    code, said = client(*launch, "-d", cwd=tmp_path)
    assert code == 0, said
    asked = client.pod().asked
    assert (asked["gpuTypeId"], asked["gpuCount"]) == ("NVIDIA H100 PCIe", 8)
    client.kill_in_base_train("d64_1000usd")
    code, said = client(*launch, cwd=tmp_path)
    assert code == 0, said
    assert "base_train resumes from step_" in said
    status = client.status("d64_1000usd")
    assert (status["state"], status["exit_code"]) == ("SUCCEEDED", 0)
    run = f"{HOME}/runs/d64_1000usd"
    report = client.on_volume(engine, f"cat {run}/report.md")
    assert "combined_output.txt" in report
    client.down("d64")
    assert client.account.alive() == []


@pytest.mark.long
def test_serve_by_sky_launch_talks_through_a_tunnel(client: Client) -> None:
    """A run that another pod has left on the volume, on a GPU's pod of its own."""
    code, said = client(
        *("sky", "launch", "-y", "-c", "smoke", "sky/cpu_smoke.yaml", "--env", f"ARGS={TOY}")
    )
    assert code == 0, said
    client.down("smoke")
    serve = ("sky", "launch", "-y", "-c", "serve", "sky/serve.yaml", "--env", "RUN=smoke", "-d")
    code, said = client(*serve)
    assert code == 0, said
    assert client.pod().asked["gpuTypeId"] == "NVIDIA GeForce RTX 4090"
    with client.tunnel("serve", 8000) as port:

        def answers() -> bool:
            with contextlib.suppress(OSError, http.client.HTTPException):
                return urllib.request.urlopen(f"http://127.0.0.1:{port}/health").status == 200
            return False

        wait_until(answers, COMMAND_S, "the web server")
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/").read().decode()
        assert "<title>" in page
        asked = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        answer = json.loads(urllib.request.urlopen(request).read())
        assert answer["choices"][0]["message"]["role"] == "assistant"
    client.down("serve")
    assert client.account.alive() == []
