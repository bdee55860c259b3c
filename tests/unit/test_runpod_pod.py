"""What `status` says of a pod: where the run is, and the way there."""

import json
import shlex
from pathlib import Path

import pytest

import entrypoint
from infra import cloud
from infra.launch import runpod_pod, slurm
from infra.runpod_api import Pod, ProviderError
from nanochat.rundir import EXIT_UNFIT_NODE, RunDir
from tests.unit.test_supervisor import make_spec


class Silent:
    def pods(self) -> list[Pod]:
        raise ProviderError("the provider is silent")


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


@pytest.mark.parametrize("verb", ["status", "stop"])
def test_an_ended_run_here_does_not_hide_a_pod_of_its_name(
    verb: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = RunDir(tmp_path / "runs" / "d20")
    run.create()
    run.freeze_spec(make_spec())
    run.write_status({"name": "d20", "state": "SUCCEEDED", "exit_code": 0, "heartbeat": 1.0})
    stopped: list[str] = []
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path))
    monkeypatch.setattr(cloud, "connect", lambda: Account(None))
    monkeypatch.setattr(cloud, "remote_stop", lambda name: stopped.append(name) or 75)
    code = entrypoint.main([verb, "d20"])
    said = capsys.readouterr()
    assert f"{run.path} has a run of that name too" in said.err
    if verb == "status":
        assert "pod pod1 is RUNNING at $21.52/h" in said.out
    else:
        assert (code, stopped) == (75, ["d20"])
    assert entrypoint.main([verb, str(run.path)]) == 0, "a path means the run here"
    assert "pod1" not in capsys.readouterr().out


def test_a_provider_that_is_silent_is_no_run_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path))
    monkeypatch.setattr(cloud, "connect", Silent)
    for verb in ("status", "stop"):
        assert entrypoint.main([verb, "d20"]) == EXIT_UNFIT_NODE
        assert "the provider is silent" in capsys.readouterr().err


def test_an_entry_that_is_left_of_a_cluster_hides_no_run_that_ended_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path / "runs" / "toy")
    run.create()
    run.freeze_spec(make_spec())
    run.write_status({"name": "toy", "state": "FAILED", "exit_code": 70, "heartbeat": 1.0})
    left = {"name": "toy", "state": "UNKNOWN", "exit_code": None, "message": "no answer"}
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path))
    monkeypatch.setattr(cloud, "connect", lambda: None)
    monkeypatch.setattr(cloud.sky_cluster, "status", lambda name: left)
    assert entrypoint.main(["status", "toy"]) == 70
    assert entrypoint.main(["stop", "toy"]) == 0
    assert "no answer" in capsys.readouterr().err


def test_a_job_in_the_queue_is_cancelled_also_where_the_provider_is_silent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path))
    monkeypatch.setattr(cloud, "connect", Silent)
    monkeypatch.setattr(slurm, "queue", lambda name: [{"job": "123"}])
    monkeypatch.setattr(slurm, "end_jobs", lambda name, wait_s: ["123"])
    assert entrypoint.main(["stop", "d20"]) == 0
    assert "cancelled job 123" in capsys.readouterr().err
