"""What all tests share: no network, homes of their own."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["NANOCHAT_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A NANOCHAT_HOME that no other test sees."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("NANOCHAT_HOME", str(home))
    return home
