"""The image's health check, bill of materials and entry point, without an engine."""

import argparse
import io
import json
import modulefinder
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import uuid
from pathlib import Path
from typing import Any, Literal

import pytest

from entrypoint import build_parser
from infra.image.health import SILENCE_S, health
from infra.image.sbom import _debian_licences, make_sbom, python_components, rust_components
from infra.pointer import point_to, pointer_file
from tests.twin.layers import Scan

ROOT = Path(__file__).resolve().parents[2]
NOW = 1_800_000_000.0
HERE = socket.gethostname()


# -- health


def write_run(home: Path, **status: Any) -> None:
    """A run directory with this status, and the pointer to it."""
    (home / "r").mkdir()
    point_to(home, home / "r")
    going = {"state": "RUNNING", "stage": "base_train", "host": HERE, "pid": os.getpid()}
    (home / "r" / "status.json").write_text(json.dumps({**going, "heartbeat": NOW, **status}))


def test_a_beating_run_is_healthy(tmp_path: Path) -> None:
    write_run(tmp_path, heartbeat=NOW - SILENCE_S + 1)
    healthy, why = health(tmp_path, HERE, NOW)
    assert healthy
    assert why == f"{tmp_path}/r: base_train, last sign of life 59 s ago"


def test_a_silent_run_is_not(tmp_path: Path) -> None:
    write_run(tmp_path, heartbeat=NOW - SILENCE_S - 1)
    assert health(tmp_path, HERE, NOW) == (
        False,
        f"{tmp_path}/r: base_train: no sign of life for 61 s",
    )


@pytest.mark.parametrize(
    "status",
    [
        {"state": "SUCCEEDED"},
        {"host": "another-container"},
        {"pid": 2**22 + 1},
    ],
    ids=["ended", "elsewhere", "killed"],
)
def test_a_silent_run_that_is_not_going_on_here_is_no_trouble(
    tmp_path: Path, status: dict[str, Any]
) -> None:
    write_run(tmp_path, heartbeat=NOW - 9999, **status)
    assert health(tmp_path, HERE, NOW)[0]


def test_a_run_of_another_container_on_the_volume_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, heartbeat=NOW - SILENCE_S - 1)
    with monkeypatch.context() as patch:
        patch.setattr("socket.gethostname", lambda: "another-container")
        point_to(tmp_path, tmp_path / "other")
    assert not health(tmp_path, HERE, NOW)[0], "ours hangs, whatever another one does"
    assert health(tmp_path, "another-container", NOW) == (True, "no run is going on")


def test_a_shell_and_a_torn_pointer_are_healthy(tmp_path: Path) -> None:
    assert health(tmp_path / "nothing", HERE, NOW) == (True, "no run")
    pointer_file(tmp_path).write_text('"/work')
    assert health(tmp_path, HERE, NOW) == (True, "no run")


def test_the_check_as_a_program_needs_no_pydantic(tmp_path: Path) -> None:
    write_run(tmp_path, heartbeat=1.0)
    code = (
        "import sys; from infra.image.health import main; code = main(); "
        "assert 'pydantic' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "NANOCHAT_HOME": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "no sign of life" in done.stdout


# -- bill of materials


def install(site: Path, name: str, version: str, *fields: str) -> None:
    """The metadata of a distribution, as an installer leaves it."""
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", *fields, "", ""]
    (folder / "METADATA").write_text("\n".join(lines))


def test_python_components_state_their_licence_or_none(tmp_path: Path) -> None:
    install(tmp_path, "Typing_Ext", "1.0", "License-Expression: MIT AND BSD-3-Clause")
    install(tmp_path, "named", "2", "License: Apache 2.0")
    install(tmp_path, "classed", "3", "Classifier: License :: OSI Approved :: BSD License")
    install(tmp_path, "silent", "4", "License: UNKNOWN")
    install(tmp_path, "texted", "5", "License: MIT License", "        ", "        Copyright")
    found = {c["name"]: c for c in python_components([tmp_path])}
    assert found["Typing_Ext"]["purl"] == "pkg:pypi/typing-ext@1.0"
    assert found["Typing_Ext"]["licenses"] == [{"expression": "MIT AND BSD-3-Clause"}]
    assert found["named"]["licenses"] == [{"license": {"name": "Apache 2.0"}}]
    assert found["classed"]["licenses"] == [{"license": {"name": "BSD License"}}]
    assert found["texted"]["licenses"] == [{"license": {"name": "MIT License"}}]
    assert "licenses" not in found["silent"]


def test_licences_of_a_debian_package_from_fields_or_from_prose(tmp_path: Path) -> None:
    def licences(text: str) -> list[str]:
        (tmp_path / "copyright").write_text(text)
        return [c["license"]["name"] for c in _debian_licences(tmp_path / "copyright")]

    prose = "is in /usr/share/common-licenses/GPL-2. See /usr/share/common-licenses/LGPL-2.1\n"
    assert licences(prose) == ["GPL-2", "LGPL-2.1"]
    assert licences(f"License: Expat\n {prose}License: BSD-3-clause\n") == ["BSD-3-clause", "Expat"]
    assert licences("all yours") == []
    assert _debian_licences(tmp_path / "none") == []


def test_rust_components_are_what_cargo_resolved_without_the_crate_itself() -> None:
    metadata = {
        "workspace_members": ["own"],
        "resolve": {"nodes": [{"id": "own"}, {"id": "used"}]},
        "packages": [
            {"id": "own", "name": "rustbpe", "version": "0.2.0", "license": "MIT"},
            {"id": "used", "name": "regex", "version": "1.2.3", "license": "MIT/Apache-2.0"},
            {"id": "unused", "name": "winapi", "version": "0.3.0", "license": None},
        ],
    }
    (component,) = rust_components(metadata)
    assert component["purl"] == "pkg:cargo/regex@1.2.3"
    assert component["licenses"] == [{"expression": "MIT OR Apache-2.0"}]


def test_the_same_image_has_the_same_bill_and_another_has_another(tmp_path: Path) -> None:
    install(tmp_path, "b", "1")
    install(tmp_path, "a", "1")
    components = python_components([tmp_path, tmp_path])
    first = make_sbom("nanochat", "1", components)
    assert [c["name"] for c in first["components"]] == ["a", "b"]
    assert first == make_sbom("nanochat", "1", reversed(components))
    other = make_sbom("nanochat", "1", components[:1])
    assert other["serialNumber"] != first["serialNumber"]
    assert uuid.UUID(first["serialNumber"]).urn == first["serialNumber"]


# -- layers, as the end-to-end tests read them


def packed(members: dict[str, bytes], mode: Literal["w", "w:gz"] = "w") -> bytes:
    """A tar archive of files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def saved(names: list[str], history: str = "RUN make", mode: Literal["w", "w:gz"] = "w") -> bytes:
    """What `docker save` writes of an image of three layers, one of them without files."""
    secret = {"root/.netrc": b"", "etc/token": b"the-" + b"secret" * 100}
    layers = [packed({"usr/bin/tool": b"x" * 3000}, mode), packed({}, mode), packed(secret, mode)]
    config = json.dumps({"history": [{"created_by": history}], "padding": "x" * 600})
    manifest = json.dumps([{"Config": names[-1], "Layers": names[:-1]}])
    rest = {names[-1]: config.encode(), "manifest.json": manifest.encode(), "VERSION": b"1.0"}
    return packed({**dict(zip(names, layers, strict=False)), **rest})


OLD_FORM = ["a/layer.tar", "b/layer.tar", "c/layer.tar", "d.json"]
OCI_FORM = [f"blobs/sha256/{digit * 64}" for digit in "abcd"]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("names", [OLD_FORM, OCI_FORM], ids=["layer.tar", "blobs"])
def test_both_forms_of_a_saved_image_are_searched(
    names: list[str], mode: Literal["w", "w:gz"]
) -> None:
    scan = Scan(re.compile(b"secret"))
    image = saved(names, history="RUN TOKEN=secret make", mode=mode)
    scan.read(image[i : i + 777] for i in range(0, len(image), 777))
    assert scan.layers == names[:-1]
    assert [scan.layer_bytes[name] for name in scan.layers] == [3000, 0, 604]
    assert scan.found == ["secret: etc/token", f"secret: {names[-1]}"]
    assert scan.forbidden == ["credentials: root/.netrc"]
    assert scan.table().splitlines()[-1].strip() == "0.0 MB in all"


def test_a_layer_that_was_not_read_is_no_clean_layer() -> None:
    manifest = json.dumps([{"Config": "c.json", "Layers": ["gone"]}]).encode()
    image = packed({"c.json": b"{}", "manifest.json": manifest})
    with pytest.raises(ValueError, match="gone"):
        Scan(re.compile(b"secret")).read([image])


# -- data layer


def copied_to_the_data_stage() -> set[str]:
    """What the Dockerfile's stage `data` copies from the checkout, its configs left out."""
    text = (ROOT / "Dockerfile").read_text()
    stage = re.search(r"^FROM \w+ AS data\n(.*?)^# ---", text, flags=re.MULTILINE | re.DOTALL)
    assert stage is not None
    copies = re.findall(r"^COPY (.*)$", stage[1].replace("\\\n", " "), flags=re.MULTILINE)
    return {source for copy in copies for source in copy.split()[:-1]} - {"configs"}


def test_the_data_layer_depends_on_what_the_fetch_imports_and_on_no_other_code() -> None:
    """Else every change of code fetches and copies it again, or the build of it fails."""
    finder = modulefinder.ModuleFinder(path=[str(ROOT)])
    finder.run_script(str(ROOT / "infra" / "image" / "bake_data.py"))
    files = {Path(m.__file__).relative_to(ROOT) for m in finder.modules.values() if m.__file__}
    packages = {folder / "__init__.py" for file in files for folder in file.parents[:-1]}
    wanted = {str(file) for file in files | packages} | {"nanochat/data.lock.json"}
    assert copied_to_the_data_stage() == wanted


def test_what_is_copied_there_suffices(tmp_path: Path) -> None:
    for file in copied_to_the_data_stage():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    command = [sys.executable, "-m", "infra.image.bake_data", "smoek", "cache", "out"]
    mistyped = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert mistyped.returncode == 78, mistyped.stderr
    assert "smoek" in mistyped.stderr and "Traceback" not in mistyped.stderr


# -- entry point


def test_the_entry_point_knows_every_verb() -> None:
    actions = build_parser()._actions
    (verbs,) = (a.choices for a in actions if isinstance(a, argparse._SubParsersAction))
    script = (ROOT / "infra" / "image" / "entrypoint.sh").read_text()
    listed = re.search(r"-\* \| (.*?)\)", script, flags=re.DOTALL)
    assert listed is not None
    assert set(verbs) <= set(re.findall(r"\w+", listed[1]))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["echo", "a  b", "*"], "a  b *"),
        (["sh", "-c", "echo $0 $#", "x", "y"], "x 1"),
    ],
)
def test_what_is_no_verb_is_run_as_it_stands(words: list[str], expected: str) -> None:
    script = ROOT / "infra" / "image" / "entrypoint.sh"
    done = subprocess.run(["sh", script, *words], capture_output=True, text=True, check=True)
    assert done.stdout == f"{expected}\n"
