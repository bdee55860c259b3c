"""Pods as containers: a bridge of their own, sshd's port on loopback, a fake nvidia-smi."""

import contextlib
import io
import os
import tarfile
from typing import Any

import docker
from docker.errors import APIError, NotFound
from docker.models.containers import Container
from docker.types import IPAMConfig, IPAMPool

LABEL = "nanochat.twin.runpod"
SUBNET = "172.30.77.0/24"
GATEWAY = "172.30.77.1"
NVIDIA_SMI = """#!/bin/sh
# stands for the driver's own: the pod's GPUs by number and name
for n in $(seq 0 $((EMULATED_GPUS - 1))); do
  case "$*" in
    *--query-gpu*) echo "$n, $EMULATED_GPU" ;;
    *) echo "GPU $n: $EMULATED_GPU (UUID: GPU-$n)" ;;
  esac
done
"""


class Pods:
    """Containers of one emulated account."""

    def __init__(self, session: str, network: str = "nanochat-runpod") -> None:
        self.client = docker.from_env(timeout=120)
        self.session = session
        self._network = network
        self._labels = {LABEL: session}
        self._made_network = self._ensure_network()

    def _ensure_network(self) -> bool:
        with contextlib.suppress(NotFound):
            self.client.networks.get(self._network)
            return False
        pool = IPAMPool(subnet=SUBNET, gateway=GATEWAY)
        self.client.networks.create(
            self._network, driver="bridge", ipam=IPAMConfig(pool_configs=[pool])
        )
        return True

    def start(
        self,
        name: str,
        image: str,
        command: list[str],
        env: dict[str, str],
        mounts: dict[str, str],
        gpus: tuple[int, str],
    ) -> str:
        """Start a pod; its container's id. `mounts`: volume -> path."""
        count, gpu = gpus
        container = self.client.containers.create(
            image,
            command,
            name=name,
            network=self._network,
            environment={**env, "EMULATED_GPUS": str(count), "EMULATED_GPU": gpu},
            ports={"22/tcp": ("127.0.0.1", None)},
            volumes={v: {"bind": path} for v, path in mounts.items()},
            labels=self._labels,
            shm_size="1g",
        )
        if count:
            container.put_archive("/usr/bin", _archive("nvidia-smi", NVIDIA_SMI))
        container.start()
        return str(container.id)

    def address(self, container_id: str) -> tuple[int | None, str | None]:
        """(public port of sshd, internal address) of a running container."""
        container = self._find(container_id)
        if container is None or container.status != "running":
            return None, None
        settings: dict[str, Any] = container.attrs["NetworkSettings"]
        bound = settings["Ports"].get("22/tcp") or []
        internal = settings["Networks"][self._network]["IPAddress"]
        return (int(bound[0]["HostPort"]) if bound else None), internal

    def is_running(self, container_id: str) -> bool:
        """Whether its main process lives."""
        container = self._find(container_id)
        return container is not None and container.status == "running"

    def stop(self, container_id: str) -> None:
        """End it and keep it: EXITED."""
        if container := self._find(container_id):
            container.stop(timeout=2)

    def kill(self, container_id: str) -> None:
        """Remove it without any notice."""
        if container := self._find(container_id):
            with contextlib.suppress(NotFound, APIError):
                container.remove(force=True, v=True)

    def run(self, container_id: str, *command: str) -> str:
        """What a command prints in a pod."""
        container = self._find(container_id)
        assert container is not None, "no such pod"
        return bytes(container.exec_run(list(command)).output).decode(errors="replace")

    def log(self, container_id: str) -> str:
        """What the pod's main process has written."""
        container = self._find(container_id)
        return container.logs().decode(errors="replace") if container else ""

    def make_volume(self, name: str) -> str:
        """A Docker volume for a network volume."""
        return str(self.client.volumes.create(name=name, labels=self._labels).name)

    def remove_volume(self, name: str) -> None:
        """Remove it with what is on it."""
        with contextlib.suppress(NotFound, APIError):
            self.client.volumes.get(name).remove(force=True)

    def close(self) -> None:
        """Remove everything that this account has made."""
        mine = {"label": f"{LABEL}={self.session}"}
        for container in self.client.containers.list(all=True, filters=mine):
            self.kill(container.id)
        for volume in self.client.volumes.list(filters=mine):
            self.remove_volume(volume.name)
        if self._made_network:
            with contextlib.suppress(NotFound, APIError):
                self.client.networks.get(self._network).remove()
        self.client.close()

    def _find(self, container_id: str) -> Container | None:
        try:
            return self.client.containers.get(container_id)
        except NotFound:
            return None


def _archive(name: str, text: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        entry = tarfile.TarInfo(name)
        content = text.encode()
        entry.size, entry.mode, entry.uid, entry.gid = len(content), 0o755, os.getuid(), 0
        tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()
