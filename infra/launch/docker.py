"""Launcher for Docker on this machine: one container per run, its files on a volume.

* What is rendered is the body of the engine's `POST /containers/create`, and it is what is sent;
  only the values of secrets and the digest of the image are added on the way.
* The container has a read-only root file system: whatever a run writes is on the volume.
* Ctrl-C asks for a stop with a checkpoint, a second one ends the container at once; closing the
  terminal lets the run go on.
* A container that has ended is kept until the next launch of its name, so that `status` can say how
  it ended.
"""

import importlib.util
import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from infra.launch.base import (
    IMAGE_NAME,
    Job,
    LaunchError,
    Rendered,
    default_image,
    worst_case_usd,
)
from nanochat.rundir import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_SPEC,
    EXIT_STOPPED,
    EXIT_UNFIT_NODE,
)

if TYPE_CHECKING:
    from docker import DockerClient
    from docker.models.containers import Container

SOCKET = Path("/var/run/docker.sock")
UNIX = "unix://"
MOUNT = "/workspace"
INPUT_DIR = "/run/nanochat"
LABEL = "nanochat.run"
SHM_GIB_PER_RANK = 1
"""Docker gives 64 MiB for everything; NCCL and data workers of one rank need up to this."""
STOP_MARGIN_S = 5.0
"""From the supervisor's own deadline to the end of the container."""
DOCKERS_GRACE_S = 10
"""Until Docker kills a container that was made without a StopTimeout."""
KILLED = 137
OUT_OF_MEMORY = (KILLED, EXIT_UNFIT_NODE, EXIT_FAILED)
"""Exit codes with which memory can have ended a run: the container was, or its ranks were."""
MEMLOCK = {"Name": "memlock", "Soft": -1, "Hard": -1}
"""Pinned host memory and InfiniBand buffers of a GPU run are locked."""
POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class DockerOptions:
    """What a user may choose about the container."""

    image: str = ""
    """Unset: the image that `make image` of this version makes."""
    volume: str = "nanochat"
    """Name of a volume (made if missing), or the path of a folder that exists."""
    memory_gib: float | None = None
    """Limit of the container; unset: that of the machine."""
    network: bool = True
    """Whether the run can reach anything; it needs nothing once its data is there."""
    detach: bool = False
    """Return as soon as the run has started."""
    user: str | None = None
    """UID:GID; unset: the caller's own for a folder, the image's for a volume."""
    secrets: tuple[str, ...] = ()
    """Variables whose values go along; `base.present_secrets` of the environment."""


def render(job: Job, options: DockerOptions) -> Rendered:
    """The container as the engine's API takes it, as JSON."""
    sent = {"name": container_name(job.name), "body": container_body(job, options)}
    return Rendered(
        json.dumps(sent, indent=2), worst_case_usd(job, float(job.plan["usd_per_hour"]))
    )


def container_name(run_name: str) -> str:
    """Name of the container that runs a run."""
    return f"nanochat-{run_name}"


def container_body(job: Job, options: DockerOptions) -> dict[str, Any]:
    """Body of `POST /containers/create` (Engine API 1.41). Secrets stand in Env by name only."""
    mounts = [_volume_mount(options.volume)]
    command = job.run_command()
    if job.config_file is not None:
        mounts.append(_file_mount(job.config_file))
        command = job.run_command(mounts[-1]["Target"])
    if job.spec.data.path is not None:
        mounts.append(_file_mount(Path(job.spec.data.path).resolve()))
        command.append(f"data.path={json.dumps(mounts[-1]['Target'])}")
    num_ranks = max(1, int(job.plan["world_size"]))
    host: dict[str, Any] = {
        "Mounts": mounts,
        "ReadonlyRootfs": True,
        "ShmSize": num_ranks * SHM_GIB_PER_RANK << 30,
    }
    if job.plan["offer"] != "cpu" and job.spec.runtime.device != "cpu":
        host["DeviceRequests"] = [{"Count": num_ranks, "Capabilities": [["gpu"]]}]
        host["Ulimits"] = [MEMLOCK]
    if options.memory_gib is not None:
        host["Memory"] = host["MemorySwap"] = int(options.memory_gib * 2**30)
    body: dict[str, Any] = {
        "Image": options.image or default_image(),
        "Cmd": command,
        "Env": [*options.secrets, IMAGE_NAME],
        "Labels": {LABEL: job.name},
        "StopTimeout": round(job.spec.stop_grace_s + STOP_MARGIN_S),
        "HostConfig": host,
    }
    if port := job.spec.runtime.tensorboard_port:
        body["Cmd"].append('runtime.tensorboard_host="0.0.0.0"')  # the engine binds it to loopback
        body["ExposedPorts"] = {f"{port}/tcp": {}}
        host["PortBindings"] = {f"{port}/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(port)}]}
    if not options.network:
        host["NetworkMode"] = "none"
        body["Env"].append("NANOCHAT_OFFLINE=1")
    if user := options.user or _owner_of(options.volume):
        body["User"] = user
    return body


def submit(job: Job, options: DockerOptions, out: TextIO = sys.stderr) -> int:
    """Start the run and follow it to its end; its exit code, or 0 at once where detached.

    Raises LaunchError with the fix for whatever the engine refuses.
    """
    engine = connect()
    name = container_name(job.name)
    body = container_body(job, options)
    known = {**os.environ, IMAGE_NAME: _image_digest(engine, body["Image"])}
    body["Env"] = [e if "=" in e else f"{e}={known[e]}" for e in body["Env"]]
    if "DeviceRequests" in body["HostConfig"]:
        _check_gpus(engine)
    _remove_ended(engine, name)
    container = _start(engine, name, body)
    if options.detach:
        out.write(f"{name} has started; nanochat status {job.name}, docker logs -f {name}\n")
        return EXIT_DONE
    return follow(container, job.spec.stop_grace_s + STOP_MARGIN_S, out)


def follow(container: "Container", grace_s: float, out: TextIO) -> int:
    """Copy a container's log until it ends; Ctrl-C stops it with a checkpoint. Its exit code."""
    presses = 0

    def note_press(_signum: int, _frame: FrameType | None) -> None:
        nonlocal presses
        presses += 1

    before = signal.signal(signal.SIGINT, note_press)
    ended = threading.Event()
    threading.Thread(target=_copy_log, args=(container, out, ended), daemon=True).start()
    kill_at_s: float | None = None
    try:
        while not ended.wait(POLL_S):
            if presses and kill_at_s is None:
                out.write("stopping with a checkpoint; Ctrl-C again ends it at once\n")
                kill_at_s = time.monotonic() + grace_s
                _signal(container, "SIGTERM")
            if kill_at_s is not None and (presses > 1 or time.monotonic() > kill_at_s):
                _signal(container, "SIGKILL")
    finally:
        signal.signal(signal.SIGINT, before)
    container.wait()
    container.reload()
    exit_code, message = how_it_ended(container.attrs)
    out.write(f"{container.name}: {message}\n")
    return exit_code


def stop(run_name: str) -> int:
    """Stop a run's container with a checkpoint and wait; its exit code. Raises LaunchError."""
    from requests.exceptions import ConnectionError, ReadTimeout

    container = find(run_name)
    if container is None:
        raise LaunchError(f"there is no container {container_name(run_name)}")
    grace_s = int(container.attrs["Config"].get("StopTimeout") or DOCKERS_GRACE_S)
    try:
        # Told, the SDK waits so long for the answer, and a minute more; untold, 10 s and that.
        container.stop(timeout=grace_s)
    except (ReadTimeout, ConnectionError):
        raise LaunchError(
            f"the Docker engine does not say that {container.name} has stopped, which was to take "
            f"{grace_s} s at most: docker ps shows whether it runs, docker kill {container.name} "
            "ends it at once (its last complete checkpoint is kept)",
            EXIT_UNFIT_NODE,
        ) from None
    container.reload()
    return how_it_ended(container.attrs)[0]


def status(run_name: str | None = None) -> list[dict[str, Any]]:
    """Name, state, exit code and message of the containers of runs. Raises LaunchError."""
    engine = connect()
    wanted = LABEL if run_name is None else f"{LABEL}={run_name}"
    rows = []
    for container in engine.containers.list(all=True, filters={"label": wanted}):
        exit_code, message = how_it_ended(container.attrs)
        running = container.attrs["State"]["Running"]
        rows.append(
            {
                "name": container.labels[LABEL],
                "container": container.name,
                "state": container.status,
                "exit_code": None if running else exit_code,
                "message": message,
            }
        )
    return rows


def find(run_name: str) -> "Container | None":
    """The container of a run, also one that has ended. Raises LaunchError without an engine."""
    from docker.errors import NotFound

    try:
        return connect().containers.get(container_name(run_name))
    except NotFound:
        return None


def how_it_ended(attrs: dict[str, Any]) -> tuple[int, str]:
    """(exit code of the contract, sentence) from what `docker inspect` says of a container.

    A container that was killed leaves 137, which is no code of ours: out of memory becomes 77,
    anything else 75, since the last complete checkpoint is kept and the same command resumes.
    """
    state = attrs["State"]
    resume = "the last complete checkpoint is kept, and the same command resumes"
    if state["Running"]:
        return EXIT_DONE, "is running"
    code = int(state["ExitCode"])
    # Docker notes this when any process was: a rank, say, after which the run went on to its end.
    if state.get("OOMKilled") and code in OUT_OF_MEMORY:
        limit = attrs["HostConfig"].get("Memory") or 0
        where = f"at its limit of {limit / 2**30:.1f} GiB" if limit else "on this machine"
        message = (
            f"out of memory {where}; {resume}. Give it more memory, or a smaller device_batch_size"
        )
        return (EXIT_UNFIT_NODE if code == KILLED else code), message
    if code == KILLED:
        return EXIT_STOPPED, f"was killed; {resume}"
    if state.get("Error"):
        return EXIT_SPEC, str(state["Error"])
    return code, f"ended with exit code {code}"


def has_engine() -> bool:
    """Whether there may be containers of ours: the SDK that starts them, and an engine to ask.

    Asking where there is no engine leaves a socket of the SDK open.
    """
    where = os.environ.get("DOCKER_HOST") or f"{UNIX}{SOCKET}"
    is_there = not where.startswith(UNIX) or Path(where.removeprefix(UNIX)).exists()
    return is_there and importlib.util.find_spec("docker") is not None


def connect() -> "DockerClient":
    """The engine that the environment names. Raises LaunchError that says how to get at it."""
    try:
        import docker
        from docker.errors import DockerException
    except ImportError:
        raise LaunchError(
            "the Docker SDK for Python is missing: pip install 'nanochat-kit[docker]'"
        ) from None
    try:
        engine = docker.from_env()
        engine.ping()
        return engine
    except DockerException as e:
        where = os.environ.get("DOCKER_HOST", str(SOCKET))
        if "Permission denied" in str(e):
            raise LaunchError(
                f"no permission to use the Docker engine at {where}: add yourself to its group "
                "(sudo usermod -aG docker $USER) and log in again",
                EXIT_UNFIT_NODE,
            ) from None
        raise LaunchError(
            f"no Docker engine answers at {where} ({e}): start it (sudo systemctl start docker), "
            "or run without one: nanochat run @CONFIG",
            EXIT_UNFIT_NODE,
        ) from None


def _image_digest(engine: "DockerClient", image: str) -> str:
    """NAME@sha256:… as a registry knows it, else the engine's id. Raises LaunchError without it."""
    from docker.errors import ImageNotFound

    try:
        attrs = engine.images.get(image).attrs
    except ImageNotFound:
        raise LaunchError(
            f"the image {image} is not on this machine: make it (make image) or bring it "
            f"(docker pull {image})"
        ) from None
    return str(next(iter(attrs.get("RepoDigests") or ()), attrs["Id"]))


def _check_gpus(engine: "DockerClient") -> None:
    if "nvidia" not in engine.info().get("Runtimes", {}):
        raise LaunchError(
            "this Docker engine has no NVIDIA runtime: install nvidia-container-toolkit, run "
            "`sudo nvidia-ctk runtime configure --runtime=docker`, and restart Docker; or run on "
            "the CPU with runtime.device='\"cpu\"'",
            EXIT_UNFIT_NODE,
        )


def _remove_ended(engine: "DockerClient", name: str) -> None:
    """Make the name free. Raises LaunchError while a run still has it."""
    from docker.errors import NotFound

    try:
        container = engine.containers.get(name)
    except NotFound:
        return
    if container.status in ("running", "paused", "restarting"):
        raise LaunchError(
            f"{name} is running already: docker logs -f {name} shows it, docker stop {name} stops "
            "it with a checkpoint; for a second run give another name in the spec"
        )
    container.remove()


def _start(engine: "DockerClient", name: str, body: dict[str, Any]) -> "Container":
    from docker.errors import APIError

    try:
        made = engine.api.create_container_from_config(body, name)
        container = engine.containers.get(made["Id"])
        container.start()
        return container
    except APIError as e:
        _explain(str(e.explanation or e), name)


def _explain(reason: str, name: str) -> NoReturn:
    """Raise LaunchError with the fix for what the engine said."""
    fixes = {
        "no space left": "free some: docker system df, docker system prune",
        "port is already allocated": "another program has runtime.tensorboard_port; change it",
        "could not select device driver": "install nvidia-container-toolkit and restart Docker",
        "bind source path does not exist": "make that folder, or name a volume",
        "setting rlimit": "the engine may not raise the memlock limit (a rootless one, say): give "
        "its service LimitMEMLOCK=infinity",
    }
    for sign, fix in fixes.items():
        if sign in reason.lower():
            raise LaunchError(f"{name} cannot start: {reason}. {fix}", EXIT_UNFIT_NODE)
    raise LaunchError(f"{name} cannot start: {reason}")


def _copy_log(container: "Container", out: TextIO, ended: threading.Event) -> None:
    try:
        for chunk in container.logs(stream=True, follow=True):
            out.write(chunk.decode(errors="replace"))
            out.flush()
    finally:
        ended.set()


def _signal(container: "Container", name: str) -> None:
    from docker.errors import APIError

    try:
        container.kill(name)
    except APIError as e:
        # 409: it has ended in the meantime.
        if e.status_code != 409:
            raise


def _volume_mount(volume: str) -> dict[str, Any]:
    kind = "bind" if _is_folder(volume) else "volume"
    source = str(Path(volume).expanduser().resolve()) if kind == "bind" else volume
    return {"Type": kind, "Source": source, "Target": MOUNT}


def _file_mount(source: Path) -> dict[str, Any]:
    """A file of this machine, read-only, under its own name in INPUT_DIR."""
    target = f"{INPUT_DIR}/{source.name}"
    return {"Type": "bind", "Source": str(source), "Target": target, "ReadOnly": True}


def _is_folder(volume: str) -> bool:
    return volume.startswith(("/", "./", "../", "~"))


def _owner_of(volume: str) -> str | None:
    """In a person's folder the files shall be theirs; the image's user has the volumes."""
    if not _is_folder(volume) or os.getuid() == 0:
        return None
    return f"{os.getuid()}:{os.getgid()}"
