"""The Docker launcher against a small engine of our own; tests/e2e has the real one."""

import gc
import io
import json
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from docker.errors import APIError, ImageNotFound, NotFound
from requests.exceptions import ReadTimeout

import entrypoint
from infra.launch import docker as launcher
from infra.launch.base import IMAGE_NAME, Job, LaunchError, present_secrets
from infra.launch.docker import DockerOptions, container_body, follow, how_it_ended, render
from nanochat.rundir import RunDir, nanochat_home
from nanochat.spec import RunSpec, load_spec

ROOT = Path(__file__).resolve().parents[2]
SMOKE = ROOT / "configs" / "smoke.toml"
GPU_PLAN = {"usd_per_hour": 21.52, "world_size": 8, "offer": "8xH100-SXM"}
CPU_PLAN = {"usd_per_hour": 0.0, "world_size": 1, "offer": "cpu"}

ENGINE_ID = "sha256:" + "5e" * 32


def job(*overrides: str, plan: dict[str, Any] = CPU_PLAN, config: Path = SMOKE) -> Job:
    spec = load_spec(config, overrides)
    return Job(config=str(config), overrides=overrides, spec=spec, plan=plan)


class FakeContainer:
    """A container whose log and end are given; it remembers what was done to it."""

    def __init__(self, name: str, status: str = "created", **state: Any) -> None:
        self.name = name
        self.status = status
        self.labels = {launcher.LABEL: name.removeprefix("nanochat-")}
        self.attrs = {
            "State": {"Running": status == "running", "ExitCode": 0, **state},
            "Config": {"StopTimeout": 125},
            "HostConfig": {"Memory": 0},
        }
        self.signals: list[str] = []
        self.removed = False
        self.ended = threading.Event()
        self.interrupts = 0
        self.ends_on = "SIGTERM"

    def start(self) -> None:
        self.status = "running"

    def remove(self) -> None:
        self.removed = True

    def logs(self, stream: bool, follow: bool) -> Any:
        assert stream and follow
        yield b"base_train step 1\n"
        for _ in range(self.interrupts):
            signal.raise_signal(signal.SIGINT)
        self.ended.wait(10.0) if self.interrupts else None
        yield b"saved\n"

    def kill(self, name: str) -> None:
        self.signals.append(name)
        if name == self.ends_on:
            self.ended.set()

    def stop(self, timeout: int) -> None:
        self.signals.append(f"SIGTERM, {timeout} s to the SIGKILL")
        if not self.ends_on:
            raise ReadTimeout("Read timed out.")
        self.attrs["State"].update(Running=False, ExitCode=75)

    def wait(self) -> None: ...

    def reload(self) -> None: ...


class FakeEngine:
    """What the launcher uses of docker.DockerClient."""

    def __init__(self, *containers: FakeContainer, image: bool = True, gpus: bool = False) -> None:
        self.made: list[tuple[str, dict[str, Any]]] = []
        self.refuses: APIError | None = None
        self._all = {c.name: c for c in containers}
        self._image, self._gpus = image, gpus
        self.images = self.containers = self.api = self
        self.attrs = {"Id": ENGINE_ID, "RepoDigests": []}

    def info(self) -> dict[str, Any]:
        return {"Runtimes": {"runc": {}, **({"nvidia": {}} if self._gpus else {})}}

    def get(self, name: str) -> Any:
        if name.startswith("nanochat:"):
            if not self._image:
                raise ImageNotFound(name)
            return self
        if name not in self._all or self._all[name].removed:
            raise NotFound(name)
        return self._all[name]

    def list(self, all: bool, filters: dict[str, str]) -> list[FakeContainer]:
        assert all
        key, _, value = filters["label"].partition("=")
        return [c for c in self._all.values() if key in c.labels and value in ("", c.labels[key])]

    def create_container_from_config(self, body: dict[str, Any], name: str) -> dict[str, str]:
        if self.refuses is not None:
            raise self.refuses
        self.made.append((name, body))
        self._all[name] = FakeContainer(name)
        return {"Id": name}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    made = FakeEngine()
    monkeypatch.setattr(launcher, "connect", lambda: made)
    return made


# -- rendering


def test_the_body_of_a_cpu_run_is_complete_and_read_only() -> None:
    body = container_body(job("base_train.num_steps=7"), DockerOptions(image="nanochat:1"))
    assert body == {
        "Image": "nanochat:1",
        "Cmd": ["run", "@/run/nanochat/smoke.toml", "base_train.num_steps=7"],
        "Env": ["NANOCHAT_IMAGE"],
        "Labels": {"nanochat.run": "smoke"},
        "StopTimeout": 13,
        "HostConfig": {
            "Mounts": [
                {"Type": "volume", "Source": "nanochat", "Target": "/workspace"},
                {
                    "Type": "bind",
                    "Source": str(SMOKE),
                    "Target": "/run/nanochat/smoke.toml",
                    "ReadOnly": True,
                },
            ],
            "ReadonlyRootfs": True,
            "ShmSize": 2**30,
        },
    }


def test_a_config_that_only_the_image_has_is_named_and_not_mounted() -> None:
    made = Job(config="configs/none.toml", overrides=(), spec=load_spec(SMOKE), plan=CPU_PLAN)
    body = container_body(made, DockerOptions())
    assert body["Cmd"] == ["run", "@configs/none.toml"]
    assert [m["Target"] for m in body["HostConfig"]["Mounts"]] == ["/workspace"]


def test_gpus_are_asked_for_where_the_offer_has_some() -> None:
    host = container_body(job(plan=GPU_PLAN), DockerOptions())["HostConfig"]
    assert host["DeviceRequests"] == [{"Count": 8, "Capabilities": [["gpu"]]}]
    assert host["ShmSize"] == 8 * 2**30
    assert host["Ulimits"] == [{"Name": "memlock", "Soft": -1, "Hard": -1}]
    on_cpu = container_body(job('runtime.device="cpu"', plan=GPU_PLAN), DockerOptions())
    assert "DeviceRequests" not in on_cpu["HostConfig"]


def test_options_reach_the_engine() -> None:
    options = DockerOptions(memory_gib=1.5, network=False, user="12345:0")
    body = container_body(job("runtime.tensorboard_port=6006", "stop_grace_s=60.0"), options)
    assert body["User"] == "12345:0"
    assert body["StopTimeout"] == 65
    assert body["HostConfig"]["Memory"] == body["HostConfig"]["MemorySwap"] == 3 * 2**29
    assert body["HostConfig"]["NetworkMode"] == "none"
    assert body["Env"] == ["NANOCHAT_IMAGE", "NANOCHAT_OFFLINE=1"]
    assert body["HostConfig"]["PortBindings"]["6006/tcp"][0]["HostIp"] == "127.0.0.1"
    assert load_spec(SMOKE, body["Cmd"][2:]).runtime.tensorboard_host == "0.0.0.0"


def test_a_text_file_goes_along(tmp_path: Path) -> None:
    text = tmp_path / "poems.txt"
    text.write_text("words\n")
    made = job('data.source="text"', f'data.path="{text}"')
    body = container_body(made, DockerOptions())
    assert body["HostConfig"]["Mounts"][-1]["Source"] == str(text)
    assert body["Cmd"][-1] == 'data.path="/run/nanochat/poems.txt"'
    assert load_spec(SMOKE, body["Cmd"][2:]).data.path == "/run/nanochat/poems.txt"


def test_a_folder_is_bound_and_a_name_is_a_volume(tmp_path: Path) -> None:
    mount = container_body(job(), DockerOptions(volume=str(tmp_path)))["HostConfig"]["Mounts"][0]
    assert mount == {"Type": "bind", "Source": str(tmp_path), "Target": "/workspace"}
    mount = container_body(job(), DockerOptions(volume="disk2"))["HostConfig"]["Mounts"][0]
    assert mount["Type"] == "volume"


def test_a_run_is_told_the_digest_that_a_registry_knows(engine: FakeEngine) -> None:
    engine.attrs["RepoDigests"] = ["registry.example/nanochat@sha256:77"]
    launcher.submit(job(), DockerOptions(detach=True), io.StringIO())
    assert engine.made[0][1]["Env"] == [f"{IMAGE_NAME}=registry.example/nanochat@sha256:77"]


def test_what_is_rendered_is_sent_and_secrets_are_only_named(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "wandb-very-secret")
    secrets = present_secrets({"WANDB_API_KEY": "x", "HF_TOKEN": "", "PATH": "/bin"})
    options = DockerOptions(secrets=secrets, detach=True)
    rendered = render(job(), options)
    assert "very-secret" not in rendered.dry_run()
    launcher.submit(job(), options, io.StringIO())
    (name, body), sent = engine.made[0], json.loads(rendered.text)
    assert name == sent["name"]
    assert body.pop("Env") == ["WANDB_API_KEY=wandb-very-secret", f"NANOCHAT_IMAGE={ENGINE_ID}"]
    assert sent["body"].pop("Env") == ["WANDB_API_KEY", "NANOCHAT_IMAGE"]
    assert body == sent["body"]


def test_the_worst_case_is_the_budget_not_the_plan() -> None:
    assert render(job(), DockerOptions()).worst_case_usd == 0.0
    bounded = job("budget.max_usd=100.0", "budget.max_hours=2.0", plan=GPU_PLAN)
    assert render(bounded, DockerOptions()).worst_case_usd == pytest.approx(43.04)
    text = render(job(plan=GPU_PLAN), DockerOptions()).dry_run()
    assert "not bounded; set budget.max_usd" in text


# -- submitting


def test_a_container_that_ended_makes_room_and_one_that_runs_does_not() -> None:
    ended = FakeContainer("nanochat-smoke", "exited")
    engine = FakeEngine(ended)
    launcher._remove_ended(engine, "nanochat-smoke")  # type: ignore[arg-type]
    assert ended.removed
    running = FakeContainer("nanochat-smoke", "running")
    with pytest.raises(LaunchError, match="running already.*docker stop nanochat-smoke"):
        launcher._remove_ended(FakeEngine(running), "nanochat-smoke")  # type: ignore[arg-type]
    assert not running.removed


def test_a_missing_image_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(image=False)
    monkeypatch.setattr(launcher, "connect", lambda: engine)
    with pytest.raises(LaunchError, match="make image.*docker pull nanochat:9") as e:
        launcher.submit(job(), DockerOptions(image="nanochat:9"))
    assert e.value.exit_code == 78
    assert engine.made == []


def test_gpus_without_an_nvidia_runtime_are_another_machine(engine: FakeEngine) -> None:
    with pytest.raises(LaunchError, match="nvidia-container-toolkit") as e:
        launcher.submit(job(plan=GPU_PLAN), DockerOptions())
    assert e.value.exit_code == 77
    assert engine.made == []


@pytest.mark.parametrize(
    ("said", "fix"),
    [
        ("write /var/lib/docker/x: no space left on device", "docker system prune"),
        ("Bind for 127.0.0.1:6006 failed: port is already allocated", "tensorboard_port"),
        ("invalid mount config: bind source path does not exist: /x", "make that folder"),
        ("something else", "something else"),
    ],
)
def test_what_the_engine_refuses_comes_with_its_fix(
    engine: FakeEngine, said: str, fix: str
) -> None:
    engine.refuses = APIError("500", explanation=said)
    with pytest.raises(LaunchError, match=fix):
        launcher.submit(job(), DockerOptions())


def test_an_engine_is_asked_where_its_socket_and_the_sdk_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    socket = tmp_path / "docker.sock"
    monkeypatch.setenv("DOCKER_HOST", f"unix://{socket}")
    assert not launcher.has_engine()
    socket.write_text("")
    assert launcher.has_engine()
    monkeypatch.setenv("DOCKER_HOST", "ssh://elsewhere")
    assert launcher.has_engine()
    monkeypatch.setattr(launcher.importlib.util, "find_spec", lambda _: None)
    assert not launcher.has_engine()


# The SDK leaves the socket of a failed connection to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_engine_says_how_to_start_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    with pytest.raises(LaunchError, match="systemctl start docker.*nanochat run") as e:
        launcher.connect()
    assert e.value.exit_code == 77
    del e
    gc.collect()


# -- following and ending


def test_the_log_is_copied_and_the_exit_code_is_the_containers() -> None:
    out = io.StringIO()
    assert follow(FakeContainer("nanochat-smoke", ExitCode=76), 1.0, out) == 76  # type: ignore[arg-type]
    assert out.getvalue() == "base_train step 1\nsaved\nnanochat-smoke: ended with exit code 76\n"


def test_ctrl_c_stops_with_a_checkpoint() -> None:
    container, out = FakeContainer("nanochat-smoke", ExitCode=75), io.StringIO()
    container.interrupts = 1
    assert follow(container, 30.0, out) == 75  # type: ignore[arg-type]
    assert container.signals == ["SIGTERM"]
    assert "stopping with a checkpoint" in out.getvalue()
    assert out.getvalue().index("saved") > out.getvalue().index("stopping")


def test_a_container_that_ignores_the_stop_is_ended_after_its_grace() -> None:
    container = FakeContainer("nanochat-smoke", ExitCode=137)
    container.interrupts, container.ends_on = 1, "SIGKILL"
    assert follow(container, 0.01, io.StringIO()) == 75  # type: ignore[arg-type]
    assert container.signals[:2] == ["SIGTERM", "SIGKILL"]


def test_stop_gives_the_container_the_time_that_it_was_made_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    container = FakeContainer("nanochat-smoke", "running")
    monkeypatch.setattr(launcher, "connect", lambda: FakeEngine(container))
    assert launcher.stop("smoke") == 75
    assert container.signals == ["SIGTERM, 125 s to the SIGKILL"]
    container.ends_on = ""
    with pytest.raises(LaunchError, match="has stopped.*125 s.*docker kill nanochat-smoke") as e:
        launcher.stop("smoke")
    assert e.value.exit_code == 77


@pytest.mark.parametrize(
    ("state", "memory_gib", "code", "words"),
    [
        ({"ExitCode": 0}, 0, 0, "exit code 0"),
        ({"ExitCode": 78}, 0, 78, "exit code 78"),
        ({"ExitCode": 137}, 0, 75, "was killed; .*same command resumes"),
        ({"ExitCode": 137, "OOMKilled": True}, 2, 77, r"limit of 2.0 GiB.*device_batch_size"),
        ({"ExitCode": 77, "OOMKilled": True}, 0, 77, "out of memory on this machine"),
        ({"ExitCode": 70, "OOMKilled": True}, 0, 70, "out of memory"),
        ({"ExitCode": 0, "OOMKilled": True}, 2, 0, "exit code 0"),
        ({"ExitCode": 75, "OOMKilled": True}, 2, 75, "exit code 75"),
        ({"ExitCode": 76, "OOMKilled": True}, 2, 76, "exit code 76"),
        ({"ExitCode": 127, "Error": "exec: not found"}, 0, 78, "exec: not found"),
        ({"ExitCode": 0, "Running": True}, 0, 0, "is running"),
    ],
)
def test_how_a_container_ended(
    state: dict[str, Any], memory_gib: int, code: int, words: str
) -> None:
    attrs = {
        "State": {"Running": False, **state},
        "HostConfig": {"Memory": memory_gib * 2**30},
    }
    found, message = how_it_ended(attrs)
    assert found == code
    assert re.search(words, message)


def test_status_lists_runs_and_keeps_running_ones_without_a_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended = FakeContainer("nanochat-a", "exited", ExitCode=75)
    engine = FakeEngine(ended, FakeContainer("nanochat-b", "running"))
    monkeypatch.setattr(launcher, "connect", lambda: engine)
    rows = {row["name"]: row for row in launcher.status()}
    assert rows["a"]["exit_code"] == 75 and rows["a"]["state"] == "exited"
    assert rows["b"]["exit_code"] is None and rows["b"]["message"] == "is running"
    assert [row["name"] for row in launcher.status("a")] == ["a"]
    assert launcher.find("c") is None


def test_the_spec_of_the_job_is_the_config_with_its_overrides() -> None:
    made = job('name="other"')
    assert isinstance(made.spec, RunSpec)
    assert launcher.container_name(made.name) == "nanochat-other"


# -- status and stop


@pytest.fixture
def run_here() -> RunDir:
    """An old run of the name smoke on this machine."""
    run = RunDir(nanochat_home() / "runs" / "smoke")
    run.create()
    run.freeze_spec(load_spec(SMOKE))
    run.freeze_plan({})
    run.write_status({"name": "smoke", "state": "SUCCEEDED", "exit_code": 0, "heartbeat": 1e9})
    return run


def engine_with(monkeypatch: pytest.MonkeyPatch, *containers: FakeContainer) -> None:
    monkeypatch.setattr(launcher, "has_engine", lambda: True)
    monkeypatch.setattr(launcher, "connect", lambda: FakeEngine(*containers))


def test_a_container_that_runs_comes_before_an_old_run_here(
    run_here: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    container = FakeContainer("nanochat-smoke", "running")
    engine_with(monkeypatch, container)
    assert entrypoint.main(["status", "smoke"]) == 0
    assert capsys.readouterr().out == "nanochat-smoke: is running\n"
    assert entrypoint.main(["status", str(run_here.path)]) == 0
    assert "SUCCEEDED" in capsys.readouterr().out, "a folder is that folder"
    assert entrypoint.main(["stop", "smoke"]) == 75
    assert len(container.signals) == 1


def test_a_run_that_goes_on_here_comes_before_a_container(
    run_here: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    container = FakeContainer("nanochat-smoke", "running")
    engine_with(monkeypatch, container)
    run_here.write_status({"name": "smoke", "state": "RUNNING", "heartbeat": time.time()})
    assert entrypoint.main(["stop", "smoke"]) == 0
    assert run_here.stop_request() is not None
    assert container.signals == []
    run_here.write_status({"name": "smoke", "state": "RUNNING", "heartbeat": time.time() - 60.0})
    assert entrypoint.main(["stop", "smoke"]) == 75
    assert len(container.signals) == 1, "killed long ago, its status still says RUNNING"


def test_an_ended_container_does_not_hide_a_run_here(
    run_here: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine_with(monkeypatch, FakeContainer("nanochat-smoke", "exited", ExitCode=78))
    assert entrypoint.main(["status", "smoke"]) == 0
    assert "SUCCEEDED" in capsys.readouterr().out


def test_status_of_everything_has_the_containers_too(
    run_here: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine_with(monkeypatch, FakeContainer("nanochat-d20", "exited", ExitCode=75))
    assert entrypoint.main(["status", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["name"], r["exit_code"]) for r in rows] == [("smoke", 0), ("d20", 75)]
    assert entrypoint.main(["status"]) == 0
    assert "d20: ended with exit code 75" in capsys.readouterr().out


def test_an_engine_that_refuses_is_told_with_the_fix(
    run_here: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise LaunchError("no permission to use the Docker engine: usermod -aG docker")

    monkeypatch.setattr(launcher, "has_engine", lambda: True)
    monkeypatch.setattr(launcher, "connect", refuse)
    for words, code in ((["stop", "nowhere"], 78), (["stop", "smoke"], 0), (["status"], 0)):
        assert entrypoint.main(words) == code
        assert "usermod -aG docker" in capsys.readouterr().err, words
