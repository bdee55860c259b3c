"""What is in the image: labels, layers, bill of materials, nothing private, nothing twice."""

import json
import re
import shutil
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import pytest

from tests.twin.engine import ROOT, Engine, build_image

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]

SCANNED_BYTES = 1 << 20
"""Files up to this size are searched; whoever leaks a key does not pad it."""
PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----\s+[A-Za-z0-9+/=\s]{200}")
FORBIDDEN = {
    "git": re.compile(r"(^|/)\.git(/|$)"),
    "package caches": re.compile(
        r"^(root|home/[^/]+)/\.(cache|cargo|npm)/.|^var/cache/apt/archives/.*\.deb$"
        r"|^var/lib/apt/lists/.*Packages"
    ),
    "host keys": re.compile(r"^etc/ssh/ssh_host_"),
    "credentials": re.compile(
        r"(^|/)(\.env|\.netrc|\.pypirc|\.runpod|id_(rsa|ed25519)|\.docker/config\.json)(/|$)"
    ),
    "tests": re.compile(r"^opt/nanochat/app/(.*/)?(tests/|test_[^/]*\.py$)"),
    "Rust": re.compile(r"^usr/bin/(rustc|cargo)|(^|/)[^/]+\.rlib$"),
    "build folder": re.compile(r"^(build|out)(/|$)"),
}
TWICE_BYTES = 8 << 20
"""What Debian's own files (passwd, dpkg's lists, linker cache) may take in more than one layer."""
KEY_SAMPLES = re.compile(r"^(opt/nanochat/venv|root/skypilot-runtime)/.*/(tests?|testing)/")


@dataclass
class Scan:
    """All layers of an image, read once."""

    layer_bytes: dict[str, int] = field(default_factory=dict)
    names: Counter[str] = field(default_factory=Counter)
    twice_bytes: int = 0
    forbidden: list[str] = field(default_factory=list)
    private: list[str] = field(default_factory=list)

    def add_layer(self, name: str, layer: tarfile.TarFile, host_paths: list[bytes]) -> None:
        total = 0
        for entry in layer:
            path = entry.name.removeprefix("./").rstrip("/")
            total += entry.size
            self.forbidden += [f"{why}: {path}" for why, p in FORBIDDEN.items() if p.search(path)]
            if not entry.isfile():
                continue
            if self.names[path]:
                self.twice_bytes += entry.size
            self.names[path] += 1
            if entry.size <= SCANNED_BYTES:
                content = cast(IO[bytes], layer.extractfile(entry)).read()
                if PRIVATE_KEY.search(content) and not KEY_SAMPLES.search(path):
                    self.private.append(f"private key: {path}")
                self.private += [f"{p.decode()}: {path}" for p in host_paths if p in content]
        self.layer_bytes[name] = total


class Stream:
    """What the Docker SDK yields as chunks, as a file that tarfile reads once."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def read(self, size: int) -> bytes:
        parts, have = [self._rest], len(self._rest)
        while have < size:
            chunk = next(self._chunks, b"")
            if not chunk:
                break
            parts.append(chunk)
            have += len(chunk)
        data = b"".join(parts)
        self._rest = data[size:]
        return data[:size]


@pytest.fixture(scope="module")
def config(engine: Engine, image: str) -> dict[str, Any]:
    """`docker image inspect`."""
    return cast(dict[str, Any], engine.client.images.get(image).attrs)


@pytest.fixture(scope="module")
def sbom(engine: Engine, image: str) -> dict[str, Any]:
    document = engine.run("cat", "/opt/nanochat/sbom.cdx.json").output
    return cast(dict[str, Any], json.loads(document))


def test_labels_and_defaults(config: dict[str, Any], image: str) -> None:
    found, labels = config["Config"], config["Config"]["Labels"]
    prefix = "org.opencontainers.image."
    assert labels[f"{prefix}version"] == image.split(":")[1]
    assert re.fullmatch(r"[0-9a-f]{40}(-changed)?|unknown", labels[f"{prefix}revision"])
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT[\d:]{8}Z", labels[f"{prefix}created"])
    assert labels[f"{prefix}licenses"] == "MIT"
    assert found["User"] == ""
    assert found["Entrypoint"][0] == "/usr/bin/tini"
    assert found["Cmd"] == ["run", "@configs/smoke.toml"]
    assert found["Healthcheck"]["Test"][0] == "CMD"
    assert not [e for e in found["Env"] if re.search("KEY|TOKEN|SECRET|PASSWORD", e)]


def test_the_bill_lists_every_wheel_package_and_crate(engine: Engine, sbom: dict[str, Any]) -> None:
    purls = {component["purl"] for component in sbom["components"]}
    assert len(purls) == len(sbom["components"])
    for python in ("/opt/nanochat/venv/bin/python", "/root/skypilot-runtime/bin/python"):
        listing = engine.run("/opt/nanochat/bin/uv", "pip", "list", "--format=json", "-p", python)
        wheels = json.loads(listing.output[listing.output.index("[") :].splitlines()[0])
        assert len(wheels) > 40
        missing = {f"pkg:pypi/{w['name']}@{w['version']}" for w in wheels} - purls
        assert not missing
    packages = engine.run("dpkg-query", "--show", "--showformat=${Package}\n").output.split()
    listed = {re.match(r"pkg:deb/debian/([^@]+)@", p)[1] for p in purls if "pkg:deb" in p}  # type: ignore[index]
    assert listed == set(packages)
    assert {"pyo3", "parquet"} <= {p[10:].split("@")[0] for p in purls if "pkg:cargo" in p}


def test_most_components_say_their_licence(sbom: dict[str, Any]) -> None:
    for kind, share in {"pkg:pypi": 0.95, "pkg:cargo": 1.0, "pkg:deb": 0.95}.items():
        components = [c for c in sbom["components"] if c["purl"].startswith(kind)]
        licensed = [c for c in components if c.get("licenses")]
        assert len(licensed) >= share * len(components), (kind, len(licensed), len(components))


def test_layers_hold_nothing_private_and_nothing_twice(engine: Engine, image: str) -> None:
    host_paths = [str(ROOT).encode(), str(Path.home() / ".docker").encode()]
    scan = Scan()
    archive = tarfile.open(  # noqa: SIM115 - a stream has nothing to close
        fileobj=cast(Any, Stream(engine.client.images.get(image).save(chunk_size=1 << 22))),
        mode="r|",
    )
    for member in archive:
        if member.name.endswith("layer.tar"):
            with tarfile.open(fileobj=archive.extractfile(member), mode="r|") as layer:
                scan.add_layer(member.name, layer, host_paths)
    assert len(scan.names) > 20_000
    assert scan.forbidden == []
    assert scan.private == []
    assert scan.twice_bytes < TWICE_BYTES


def test_a_change_of_code_changes_the_last_small_layer_only(
    engine: Engine, image: str, tmp_path: Path
) -> None:
    ignored = shutil.ignore_patterns(".git", ".venv", "target", "build", "runs", "__pycache__")
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT, checkout, ignore=ignored)
    with open(checkout / "nanochat" / "spec.py", "a") as f:
        f.write("\n# changed\n")
    tag = f"{image}-changed"
    started = time.monotonic()
    build_image(tag, folder=checkout)
    seconds = time.monotonic() - started
    try:
        before, after = (engine.client.images.get(t).attrs for t in (image, tag))
        old, new = before["RootFS"]["Layers"], after["RootFS"]["Layers"]
        assert old[:-1] == new[:-1]
        assert old[-1] != new[-1]
        last = engine.client.images.get(tag).history()
        code = [entry["Size"] for entry in last if entry["Size"]][0]
        assert code < 32 << 20
    finally:
        engine.client.images.remove(tag)
    # Engines without a native diff (fuse-overlayfs) walk the whole image for a layer.
    assert seconds < 180


@pytest.mark.long
def test_the_unit_tests_pass_inside(engine: Engine, image: str) -> None:
    tag = f"{image}-test"
    build_image(tag, "--target=test")
    ended = engine.run(image=tag, network_mode="none")
    assert ended.exit_code == 0, ended.output[-4000:]
    assert re.search(r"\d+ passed", ended.output)
