"""The image's software bill of materials: CycloneDX 1.6 of Python, Debian and Rust components.

* Python from the metadata of the installed distributions, Debian from dpkg, Rust from
  `cargo metadata`, so a component is listed because it is there, not because it was asked for.
* Licences as each component states them itself; where it states none, none is made up.
* The same input gives the same bytes: no time and no random serial number.
"""

import email.message
import importlib.metadata
import json
import re
import subprocess
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SPEC_VERSION = "1.6"
LONGEST_LICENCE_NAME = 100
"""Some packages put the whole text of a licence into the field for its name; its title is first."""
COMMON_LICENCE = re.compile(r"/usr/share/common-licenses/([\w.+-]*\w)")
OSI_PREFIX = "License :: OSI Approved :: "

Component = dict[str, Any]


def make_sbom(name: str, version: str, components: Iterable[Component]) -> dict[str, Any]:
    """The CycloneDX document of an image, each component once, sorted by package URL."""
    unique = {component["purl"]: component for component in components}
    ordered = [unique[purl] for purl in sorted(unique)]
    contents = json.dumps([name, version, ordered], sort_keys=True)
    return {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPEC_VERSION}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, contents)}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "container",
                "bom-ref": f"{name}@{version}",
                "name": name,
                "version": version,
            }
        },
        "components": ordered,
    }


def python_components(site_packages: Sequence[Path]) -> list[Component]:
    """Every distribution installed in these folders."""
    folders = [str(folder) for folder in site_packages]
    return [
        _component(
            name=distribution.metadata["Name"],
            version=distribution.version,
            purl=f"pkg:pypi/{_normal(distribution.metadata['Name'])}@{distribution.version}",
            licences=_python_licences(distribution.metadata),
        )
        for distribution in importlib.metadata.distributions(path=folders)
    ]


def debian_components(doc_dir: Path = Path("/usr/share/doc")) -> list[Component]:
    """Every installed Debian package, as dpkg knows them."""
    fields = "${db:Status-Abbrev}\t${Package}\t${Version}\t${Architecture}\n"
    listed = subprocess.run(
        ["dpkg-query", "--show", f"--showformat={fields}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    components = []
    for line in listed.splitlines():
        status, name, version, architecture = line.split("\t")
        if not status.startswith("ii"):
            continue
        purl = f"pkg:deb/debian/{name}@{_quoted(version)}?arch={architecture}&distro=debian-12"
        licences = _debian_licences(doc_dir / name / "copyright")
        components.append(_component(name, version, purl, licences))
    return components


def rust_components(cargo_metadata: dict[str, Any]) -> list[Component]:
    """Every crate that `cargo metadata` resolved; the crates of the workspace are the kit's own."""
    own = set(cargo_metadata["workspace_members"])
    resolved = {node["id"] for node in cargo_metadata["resolve"]["nodes"]}
    return [
        _component(
            name=crate["name"],
            version=crate["version"],
            purl=f"pkg:cargo/{crate['name']}@{crate['version']}",
            licences=[_expression(crate["license"].replace("/", " OR "))]
            if crate["license"]
            else [],
        )
        for crate in cargo_metadata["packages"]
        if crate["id"] in resolved and crate["id"] not in own
    ]


def _component(name: str, version: str, purl: str, licences: list[dict[str, Any]]) -> Component:
    component: Component = {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": version,
        "purl": purl,
    }
    if licences:
        component["licenses"] = licences
    return component


def _python_licences(metadata: importlib.metadata.PackageMetadata) -> list[dict[str, Any]]:
    """Licence expression (PEP 639), else the licence field if it is a name, else classifiers."""
    assert isinstance(metadata, email.message.Message)
    if expression := metadata.get("License-Expression"):
        return [_expression(expression)]
    name = str(metadata.get("License") or "").strip().partition("\n")[0].strip()
    if name and name.upper() != "UNKNOWN" and len(name) < LONGEST_LICENCE_NAME:
        return [_named(name)]
    classifiers = metadata.get_all("Classifier") or []
    return [_named(c.removeprefix(OSI_PREFIX)) for c in classifiers if c.startswith("License ::")]


def _debian_licences(copyright_file: Path) -> list[dict[str, Any]]:
    """Short names of a machine-readable copyright file; of prose, the common licences it names."""
    try:
        text = copyright_file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    names = sorted(set(re.findall(r"^License:[ \t]*(\S[^\n]*)$", text, flags=re.MULTILINE)))
    names = names or sorted(set(COMMON_LICENCE.findall(text)))
    return [_named(name.strip()) for name in names]


def _expression(expression: str) -> dict[str, Any]:
    return {"expression": expression}


def _named(name: str) -> dict[str, Any]:
    return {"license": {"name": name}}


def _normal(name: str) -> str:
    """The name under which the package index knows a distribution (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _quoted(version: str) -> str:
    """A Debian version in a package URL: its plus sign and colon are percent-encoded."""
    return version.replace("%", "%25").replace("+", "%2B").replace(":", "%3A")
