"""Last step of the image's build: what is in it, as image.json and as a bill of materials.

image.json marks the image (infra/privileges.py) and tells doctor which CUDA its torch was built
for, without importing torch.
"""

import argparse
import json
import platform
import re
import runpy
import subprocess
from pathlib import Path
from typing import Any

from infra.image.sbom import (
    Component,
    debian_components,
    make_sbom,
    python_components,
    rust_components,
)

SITE_PACKAGES = Path("/opt/nanochat/venv/lib/python3.11/site-packages")
SKYPILOT_SITE_PACKAGES = Path("/root/skypilot-runtime/lib/python3.11/site-packages")
UV = Path("/opt/nanochat/bin/uv")


def main() -> None:
    """Write image.json and sbom.cdx.json into the folder that becomes /opt/nanochat."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="what becomes /opt/nanochat")
    parser.add_argument("--version", required=True)
    parser.add_argument("--revision", required=True)
    parser.add_argument("--cargo-metadata", type=Path, required=True)
    args = parser.parse_args()
    _write(args.folder / "image.json", image_facts(args.version, args.revision))
    crates = rust_components(json.loads(args.cargo_metadata.read_text()))
    python = python_components([SITE_PACKAGES, args.folder / "app", SKYPILOT_SITE_PACKAGES])
    components = [*python, *_uv_component(), *debian_components(), *crates]
    _write(args.folder / "sbom.cdx.json", make_sbom("nanochat", args.version, components))


def image_facts(version: str, revision: str) -> dict[str, Any]:
    """What the image says of itself; `cuda` is the toolkit that its torch was built with."""
    torch = runpy.run_path(str(SITE_PACKAGES / "torch" / "version.py"))
    return {
        "version": version,
        "revision": revision,
        "python": platform.python_version(),
        "torch": torch["__version__"],
        "cuda": torch["cuda"],
        "debian": Path("/etc/debian_version").read_text().strip(),
        "skypilot_runtime": SKYPILOT_SITE_PACKAGES.is_dir(),
    }


def _uv_component() -> list[Component]:
    """The uv binary, which no package manager in the image knows; its licence as on its wheel."""
    if not UV.is_file():
        return []
    said = subprocess.run([UV, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.match(r"uv (\S+)", said)
    assert found, said
    purl = f"pkg:pypi/uv@{found[1]}"
    return [
        {
            "type": "application",
            "bom-ref": purl,
            "name": "uv",
            "version": found[1],
            "purl": purl,
            "licenses": [{"expression": "MIT OR Apache-2.0"}],
        }
    ]


def _write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
