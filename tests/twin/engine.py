"""The real Docker engine for end-to-end tests: the image built once, everything removed at the end.

What a test starts has the label of its session, so that leftovers of a killed session can be told
from a user's containers: `docker ps --all --filter label=nanochat.twin`.
"""

import contextlib
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
from docker.errors import APIError, DockerException, NotFound
from docker.models.containers import Container

from tests.twin.baseimage import ensure_base_image

ROOT = Path(__file__).resolve().parents[2]
LABEL = "nanochat.twin"
BUILD_TIMEOUT_S = 3600.0
ANSWER_S = 900.0
"""The engine packs 6 GB before the first byte of `save`, minutes where the disk is busy."""
RUN_TIMEOUT_S = 1200.0
MOUNT = "/workspace"


class EngineError(RuntimeError):
    """The engine or the image is not there; the message says what to do."""


@dataclass(frozen=True)
class Ended:
    """A container that has ended."""

    exit_code: int
    output: str
    attrs: dict[str, Any]


def given_image() -> str | None:
    """An image to test as it is, from a registry for one: NANOCHAT_IMAGE."""
    return os.environ.get("NANOCHAT_IMAGE")


def image_tag() -> str:
    """The given image, else the tag that stands in the Makefile."""
    if given := given_image():
        return given
    lines = (ROOT / "Makefile").read_text().splitlines()
    (version,) = (line.split(":=")[1].strip() for line in lines if line.startswith("VERSION "))
    return f"nanochat:{version}"


def build_image(tag: str, *options: str, folder: Path = ROOT) -> str:
    """Build with the project's own script; its log. Raises EngineError with the end of it."""
    ensure_base_image()
    built = subprocess.run(
        [folder / "infra" / "image" / "build.sh", tag, "--progress=plain", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BUILD_TIMEOUT_S,
    )
    if built.returncode:
        raise EngineError(f"{tag} could not be built:\n{built.stdout[-4000:]}")
    return built.stdout


class Engine:
    """Containers and volumes of one test session."""

    def __init__(self) -> None:
        try:
            self.client = docker.from_env(timeout=ANSWER_S)
            self.client.ping()
        except DockerException as e:
            raise EngineError(f"end-to-end tests need a Docker engine: {e}") from None
        self.session = uuid.uuid4().hex[:12]
        self.image = image_tag()

    def start(self, *command: str, **options: Any) -> Container:
        """A container of the image in the background; `options` as in the Docker SDK."""
        labels = {LABEL: self.session}
        image = options.pop("image", self.image)
        return self.client.containers.run(
            image, list(command) or None, detach=True, labels=labels, **options
        )

    def run(self, *command: str, **options: Any) -> Ended:
        """A container of the image, from start to end; it is removed."""
        container = self.start(*command, **options)
        try:
            return self.wait(container)
        finally:
            self.remove(container)

    def wait(self, container: Container, timeout_s: float = RUN_TIMEOUT_S) -> Ended:
        """Wait for the end. Raises TimeoutError with the log."""
        deadline = time.monotonic() + timeout_s
        while True:
            container.reload()
            if container.attrs["State"]["Status"] in ("exited", "dead"):
                break
            if time.monotonic() > deadline:
                log = container.logs().decode(errors="replace")
                raise TimeoutError(f"{container.name} still runs after {timeout_s} s:\n{log}")
            time.sleep(0.2)
        output = container.logs().decode(errors="replace")
        return Ended(container.attrs["State"]["ExitCode"], output, container.attrs)

    def remove(self, container: Container) -> None:
        """Remove a container, whatever it does."""
        with contextlib.suppress(NotFound):
            container.remove(force=True, v=True)

    @contextlib.contextmanager
    def volume(self, **options: Any) -> Iterator[str]:
        """A fresh volume, removed afterwards together with what still uses it."""
        made = self.client.volumes.create(labels={LABEL: self.session}, **options)
        try:
            yield made.name
        finally:
            for container in self.client.containers.list(all=True, filters={"volume": made.name}):
                self.remove(container)
            made.remove(force=True)

    def shell(self, volume: str, script: str) -> str:
        """What a root shell prints that has the volume at /workspace."""
        done = self.run(
            "bash", "-c", script, volumes={volume: {"bind": MOUNT}}, network_mode="none"
        )
        if done.exit_code:
            raise EngineError(f"{script!r} ended with {done.exit_code}:\n{done.output}")
        return done.output

    def close(self) -> None:
        """Remove what the session has left."""
        mine = {"label": f"{LABEL}={self.session}"}
        for container in self.client.containers.list(all=True, filters=mine):
            self.remove(container)
        for volume in self.client.volumes.list(filters=mine):
            with contextlib.suppress(APIError):
                volume.remove(force=True)
        self.client.close()


def wait_until(
    happened: Callable[[], bool], timeout_s: float, what: str, every_s: float = 0.1
) -> None:
    """Poll until something has happened. Raises TimeoutError that names it."""
    deadline = time.monotonic() + timeout_s
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(every_s)
