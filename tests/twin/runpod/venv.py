"""The environment of `make cloud-venv`, which a user of the cloud has too."""

import os
from pathlib import Path

import pytest

from tests.twin.engine import ROOT

BIN = ROOT / ".venv-cloud" / "bin"


def cloud_bin() -> Path:
    """Folder of its programs; skips the test without it, and fails it in CI."""
    if not (BIN / "sky").exists():
        if os.environ.get("CI"):
            pytest.fail("CI has no .venv-cloud: make cloud-venv")
        pytest.skip("SkyPilot is not installed: make cloud-venv")
    return BIN
