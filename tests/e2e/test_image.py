"""What is in the image: labels, layers, bill of materials, nothing private, nothing twice."""

import ipaddress
import json
import re
import shutil
import tomllib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import tomli_w

from tests.twin.engine import MOUNT, ROOT, Engine, build_image, given_image
from tests.twin.hub import Hub
from tests.twin.layers import Scan
from tests.twin.published import repositories

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]

TWICE_BYTES = 8 << 20
"""What Debian's own files (passwd, dpkg's lists, linker cache) may take in more than one layer."""
MOST_BYTES = 7_200_000_000
"""The table of layers in docs/docker.md, and a tenth."""
CODE_BYTES = 32 << 20
"""The last layer."""
TOKEN = f"hf_{uuid.uuid4().hex}"


def copy_of_the_checkout(folder: Path) -> Path:
    """The files that the image is built from, to change them."""
    ignored = shutil.ignore_patterns(".git", ".venv", "target", "build", "runs", "__pycache__")
    return shutil.copytree(ROOT, folder / "checkout", ignore=ignored)


def change(file: Path) -> None:
    with open(file, "a") as f:
        f.write("\n# changed\n")


@dataclass(frozen=True)
class Mirrored:
    """An image whose data came from a hub of ours, which asks for a token, and its builds."""

    tag: str
    checkout: Path
    first_log: str
    second_log: str
    """After a change of the fetch's code."""
    files_sent: list[int]
    """By the hub, during each."""


@pytest.fixture(scope="module")
def mirrored(
    engine: Engine, image: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mirrored]:
    """Build it twice: the layer of the data depends on the hub's address, so none has it yet."""
    folder = tmp_path_factory.mktemp("mirrored")
    checkout = copy_of_the_checkout(folder)
    lock_file = checkout / "nanochat" / "data.lock.json"
    lock = json.loads(lock_file.read_text())
    # The hub on this machine has sets of its own, of which the kit's lock knows nothing.
    lock["sources"]["gsm8k"].update(revision=None, files={})
    lock_file.write_text(json.dumps(lock))
    toy = tomllib.loads((ROOT / "configs" / "e2e.toml").read_text())
    toy["evaluate"]["tasks"] = ["gsm8k"]
    del toy["chat_rl"]
    (checkout / "configs" / "mirror.toml").write_text(tomli_w.dumps(toy))
    (folder / "token").write_text(TOKEN)
    subnet = engine.client.networks.get("bridge").attrs["IPAM"]["Config"][0]["Subnet"]
    # The host is the first address; engines before 23 do not name it as the gateway.
    bridge = str(next(ipaddress.ip_network(subnet).hosts()))
    tag = f"{image}-mirror"
    logs: list[str] = []
    files_sent: list[int] = []
    try:
        with Hub(address=bridge, store_name=bridge, token=TOKEN) as hub:
            hub.repositories.update(repositories())
            options = [f"--secret=id=HF_TOKEN,src={folder}/token", "--build-arg=DATA=mirror"]
            options.append(f"--build-arg=HF_ENDPOINT={hub.url}")
            for _ in range(2):
                hub.requests.clear()
                logs.append(build_image(tag, *options, folder=checkout))
                sent = [r for r in hub.requests if r.method == "GET" and "/store/" in r.path]
                files_sent.append(len(sent))
                change(checkout / "infra" / "fetch.py")
        yield Mirrored(tag, checkout, logs[0], logs[1], files_sent)
    finally:
        engine.client.images.remove(tag, force=True)


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
    # The kit's own folder is on the path by a .pth file, which `uv pip list` does not follow.
    ours = {p.split("@")[0] for p in purls}
    assert {"pkg:pypi/rustbpe", "pkg:pypi/nanochat-kit"} <= ours
    packages = engine.run("dpkg-query", "--show", "--showformat=${Package}\n").output.split()
    listed = {re.match(r"pkg:deb/debian/([^@]+)@", p)[1] for p in purls if "pkg:deb" in p}  # type: ignore[index]
    assert listed == set(packages)
    assert {"pyo3", "parquet"} <= {p[10:].split("@")[0] for p in purls if "pkg:cargo" in p}


def test_most_components_say_their_licence(sbom: dict[str, Any]) -> None:
    for kind, share in {"pkg:pypi": 0.95, "pkg:cargo": 1.0, "pkg:deb": 0.95}.items():
        components = [c for c in sbom["components"] if c["purl"].startswith(kind)]
        licensed = [c for c in components if c.get("licenses")]
        assert len(licensed) >= share * len(components), (kind, len(licensed), len(components))


def test_layers_hold_nothing_private_and_nothing_twice(
    engine: Engine, request: pytest.FixtureRequest
) -> None:
    """Of an image that was built with a secret, where none is given: also the secret."""
    tag, checkout = given_image(), ROOT
    if tag is None:
        mirrored: Mirrored = request.getfixturevalue("mirrored")
        tag, checkout = mirrored.tag, mirrored.checkout
    # The checkout's path alone may stand anywhere: Git's release notes have a /work/main.
    inside = [re.escape(f"{root}/{p.name}") for root in (ROOT, checkout) for p in ROOT.iterdir()]
    outside = [re.escape(p) for p in (f"file://{ROOT}", f"{Path.home()}/.docker", TOKEN)]
    scan = Scan(re.compile("|".join(inside + outside).encode()))
    scan.read(engine.client.images.get(tag).save(chunk_size=1 << 22))
    assert len(scan.names) > 20_000
    assert scan.forbidden == []
    assert scan.found == []
    assert scan.twice_bytes < TWICE_BYTES
    print(scan.table())
    assert sum(scan.layer_bytes.values()) < MOST_BYTES, scan.table()
    assert scan.layer_bytes[scan.layers[-1]] < CODE_BYTES, scan.table()


def test_a_change_of_code_changes_the_last_small_layer_only(
    engine: Engine, image: str, tmp_path: Path
) -> None:
    checkout = copy_of_the_checkout(tmp_path)
    change(checkout / "nanochat" / "trainer.py")
    tag = f"{image}-changed"
    log = build_image(tag, folder=checkout)
    try:
        # A step that is done again tells; one from the cache says so.
        (number,) = set(re.findall(r"^#(\d+) \[data \d+/\d+\] RUN", log, flags=re.MULTILINE))
        assert f"#{number} CACHED" in log
        before, after = (engine.client.images.get(t).attrs for t in (image, tag))
        old, new = before["RootFS"]["Layers"], after["RootFS"]["Layers"]
        assert old[:-1] == new[:-1]
        assert old[-1] != new[-1]
        last = engine.client.images.get(tag).history()
        code = [entry["Size"] for entry in last if entry["Size"]][0]
        assert code < CODE_BYTES
    finally:
        engine.client.images.remove(tag)


def test_baked_data_is_fetched_once(mirrored: Mirrored) -> None:
    assert "1 files right in /var/cache/nanochat-data/mirror-" in mirrored.first_log
    assert "1 of them fetched" in mirrored.first_log
    assert mirrored.files_sent[0] == 1
    assert "1 files right in /var/cache/nanochat-data/mirror-" in mirrored.second_log
    assert mirrored.files_sent[1] == 0


def test_baked_data_is_read_only_and_found_without_network(
    engine: Engine, mirrored: Mirrored, volume: str
) -> None:
    tag = mirrored.tag
    offline: dict[str, Any] = {"network_mode": "none", "read_only": True}
    check = ("fetch", "@configs/mirror.toml", "--check")
    ended = engine.run(*check, image=tag, user="4711", **offline)
    assert ended.exit_code == 0, ended.output
    kept = engine.run("bash", "-c", "find /opt/nanochat/data -perm /222 ! -type l", image=tag)
    assert kept.output == ""
    locked = engine.run("bash", "-c", "cat /opt/nanochat/data/gsm8k/data.lock.json", image=tag)
    assert re.search(r'"sha256": "[0-9a-f]{64}"', locked.output)
    few = [f"{stage}.num_steps=2" for stage in ("base_train", "mid_train", "chat_sft")]
    there = {volume: {"bind": MOUNT, "mode": "rw"}}
    run = ("run", "@configs/mirror.toml", *few)
    ended = engine.run(*run, image=tag, volumes=there, **offline)
    assert ended.exit_code == 0, ended.output
    report = engine.shell(volume, f"cat {MOUNT}/nanochat/runs/e2e/report.md")
    assert "GSM8K" in report


@pytest.mark.long
def test_the_unit_tests_pass_inside(engine: Engine, image: str) -> None:
    tag = f"{image}-test"
    build_image(tag, "--target=test")
    ended = engine.run(image=tag, network_mode="none")
    assert ended.exit_code == 0, ended.output[-4000:]
    assert re.search(r"\d+ passed", ended.output)
