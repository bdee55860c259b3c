"""`make push` to a registry of this machine (Debian's docker-registry), and the image back from it
by the digest that it prints."""

import contextlib
import io
import shutil
import socket
import subprocess
import tarfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from docker.errors import ImageNotFound

from tests.twin.engine import ROOT, Engine, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """HOST:PORT of a registry on loopback, which engines trust without TLS."""
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("no registry here: apt-get install docker-registry")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = tmp_path / "registry.yml"
    config.write_text(
        f"version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {tmp_path}/blobs\n"
        f"http:\n  addr: {address}\n"
    )
    process = subprocess.Popen([program, "serve", config], stderr=subprocess.DEVNULL)
    try:
        host, _, port = address.partition(":")
        wait_until(lambda: answers(host, int(port)), 30.0, "the registry")
        yield address
    finally:
        process.terminate()
        process.wait(30)


def answers(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def test_what_is_pushed_comes_back_by_its_digest(engine: Engine, registry: str) -> None:
    """A small image in place of the kit's 6 GB, which take minutes to compress."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a-file"))
    name, tag = f"{registry}/me/nanochat-push", uuid.uuid4().hex[:12]
    engine.client.api.import_image_from_data(archive.getvalue(), "nanochat-push", tag)
    image = f"nanochat-push:{tag}"
    try:
        command = ["make", "--no-print-directory", "--assume-old=image", "push"]
        pushed = subprocess.run(
            [*command, f"REGISTRY={registry}/me", f"IMAGE={image}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert pushed.returncode == 0, pushed.stderr
        digest = pushed.stdout.strip().splitlines()[-1]
        assert digest.startswith(f"{name}@sha256:"), pushed.stdout
        image_id = engine.client.images.get(image).id
        for there in (image, f"{name}:{tag}"):
            engine.client.images.remove(there)
        with pytest.raises(ImageNotFound):
            engine.client.images.get(image_id)
        assert engine.client.images.pull(digest).id == image_id
        engine.client.images.remove(digest)
    finally:
        with contextlib.suppress(ImageNotFound):
            engine.client.images.remove(image, force=True)


def test_without_a_registry_nothing_is_built() -> None:
    command = ["make", "--no-print-directory", "push", "REGISTRY="]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert asked.returncode != 0
    assert asked.stdout.strip() == "Where to? make push REGISTRY=ghcr.io/yourname"
