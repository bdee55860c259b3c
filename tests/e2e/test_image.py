"""What is in the image: labels, layers, bill of materials, nothing private, nothing twice."""

import ipaddress
import json
import re
import shutil
import tarfile
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import pytest
import tomli_w

from tests.twin.engine import ROOT, Engine, build_image
from tests.twin.hub import Hub
from tests.twin.published import repositories

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

    def add_layer(self, name: str, layer: tarfile.TarFile, host_path: re.Pattern[bytes]) -> None:
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
                if found := host_path.search(content):
                    self.private.append(f"{found[0].decode()}: {path}")
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


def copy_of_the_checkout(folder: Path) -> Path:
    """The files that the image is built from, to change them."""
    ignored = shutil.ignore_patterns(".git", ".venv", "target", "build", "runs", "__pycache__")
    return shutil.copytree(ROOT, folder / "checkout", ignore=ignored)


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
    # The checkout's path alone may stand anywhere: Git's release notes have a /work/main.
    inside = "|".join(re.escape(f"{ROOT}/{p.name}") for p in ROOT.iterdir())
    outside = "|".join(re.escape(p) for p in (f"file://{ROOT}", f"{Path.home()}/.docker"))
    host_path = re.compile(f"{inside}|{outside}".encode())
    scan = Scan()
    archive = tarfile.open(  # noqa: SIM115 - a stream has nothing to close
        fileobj=cast(Any, Stream(engine.client.images.get(image).save(chunk_size=1 << 22))),
        mode="r|",
    )
    for member in archive:
        if member.name.endswith("layer.tar"):
            with tarfile.open(fileobj=archive.extractfile(member), mode="r|") as layer:
                scan.add_layer(member.name, layer, host_path)
    assert len(scan.names) > 20_000
    assert scan.forbidden == []
    assert scan.private == []
    assert scan.twice_bytes < TWICE_BYTES


def test_a_change_of_code_changes_the_last_small_layer_only(
    engine: Engine, image: str, tmp_path: Path
) -> None:
    checkout = copy_of_the_checkout(tmp_path)
    with open(checkout / "nanochat" / "spec.py", "a") as f:
        f.write("\n# changed\n")
    tag = f"{image}-changed"
    build_image(tag, folder=checkout)
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


def test_baked_data_is_fetched_once_and_found_without_network(
    engine: Engine, image: str, tmp_path: Path
) -> None:
    checkout = copy_of_the_checkout(tmp_path)
    lock_file = checkout / "nanochat" / "data.lock.json"
    lock = json.loads(lock_file.read_text())
    # The hub on this machine has sets of its own, of which the kit's lock knows nothing.
    lock["sources"]["gsm8k"].update(revision=None, files={})
    lock_file.write_text(json.dumps(lock))
    toy = tomllib.loads((ROOT / "configs" / "e2e.toml").read_text())
    toy["evaluate"]["tasks"] = ["gsm8k"]
    (checkout / "configs" / "mirror.toml").write_text(tomli_w.dumps(toy))
    subnet = engine.client.networks.get("bridge").attrs["IPAM"]["Config"][0]["Subnet"]
    # The host is the first address; engines before 23 do not name it as the gateway.
    bridge = str(next(ipaddress.ip_network(subnet).hosts()))
    tag = f"{image}-mirror"
    with Hub(address=bridge, store_name=bridge) as hub:
        hub.repositories.update(repositories())
        arguments = ("--build-arg=DATA=mirror", f"--build-arg=HF_ENDPOINT={hub.url}")
        build_image(tag, *arguments, folder=checkout)
        assert hub.requests
    try:
        check = ("fetch", "@configs/mirror.toml", "--check")
        ended = engine.run(*check, image=tag, network_mode="none", read_only=True, user="4711")
        assert ended.exit_code == 0, ended.output
        kept = engine.run("bash", "-c", "find /opt/nanochat/data -perm /222 ! -type l", image=tag)
        assert kept.output == ""
        locked = engine.run("bash", "-c", "cat /opt/nanochat/data/gsm8k/data.lock.json", image=tag)
        assert re.search(r'"sha256": "[0-9a-f]{64}"', locked.output)
    finally:
        engine.client.images.remove(tag)


@pytest.mark.long
def test_the_unit_tests_pass_inside(engine: Engine, image: str) -> None:
    tag = f"{image}-test"
    build_image(tag, "--target=test")
    ended = engine.run(image=tag, network_mode="none")
    assert ended.exit_code == 0, ended.output[-4000:]
    assert re.search(r"\d+ passed", ended.output)
