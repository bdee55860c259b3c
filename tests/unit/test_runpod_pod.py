"""What `status` says of a pod: where the run is, and the way there."""

import json
import shlex
from pathlib import Path

import pytest

from infra.launch import runpod_pod
from infra.runpod_api import Pod


class Account:
    def __init__(self, address: tuple[str, int] | None) -> None:
        self.address = address

    def pods(self) -> list[Pod]:
        return [Pod("pod1", "nanochat-d20", "RUNNING", 21.52, 60.0, {}, self.address)]


def test_status_says_how_to_get_to_the_pod(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path / "my home"))
    monkeypatch.setattr(runpod_pod, "ssh", lambda *_: json.dumps({"state": "RUNNING"}))
    found = runpod_pod.status(Account(("192.0.2.1", 40022)), "d20")  # type: ignore[arg-type]
    assert found is not None
    assert found["message"].splitlines()[-1] == found["ssh"]
    words = shlex.split(found["ssh"])
    assert words[0] == "ssh" and words[-3:] == ["-p", "40022", "root@192.0.2.1"]
    assert words[words.index("-i") + 1] == str(tmp_path / "my home" / "ssh" / "id_ed25519")


def test_a_pod_that_is_not_up_yet_has_no_way_in() -> None:
    found = runpod_pod.status(Account(None), "d20")  # type: ignore[arg-type]
    assert found is not None and found["ssh"] is None
    assert found["message"].startswith("pod pod1 is RUNNING at $21.52/h")
