"""A cluster of SkyPilot's: its runs and their exit codes, what its pods cost, its end."""

import errno
import io
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infra import reap
from infra.launch import sky as launcher
from infra.launch import sky_cluster
from infra.launch.base import LaunchError
from infra.launch.sky import submit
from infra.runpod_api import ProviderError
from tests.unit.test_launch_sky import POD, PULLED, FakeSky, Provider, job


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A cluster d20 that SkyPilot has made: what its pod answers."""
    said: dict[str, Any] = {
        "runs": [{"name": "d20", "state": "RUNNING", "exit_code": None, "heartbeat": 1.0}],
        "asked": [],
        "provider": Provider(POD),
    }
    (tmp_path / ".sky" / "generated" / "ssh").mkdir(parents=True)
    (tmp_path / ".sky" / "generated" / "ssh" / "d20").write_text("Host d20\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sky_cluster, "connect", lambda: said["provider"])

    def on(cluster: str, command: str, timeout_s: float = 0.0) -> str | None:
        said["asked"].append(command)
        if "get_exit_codes(3)" in command:
            return said.get("job_exit_codes")
        if command.startswith("nanochat stop"):
            said["runs"][0] |= {"state": "STOPPED", "exit_code": 75}
        return None if said["runs"] is None else json.dumps(said["runs"])

    monkeypatch.setattr(sky_cluster, "POLL_S", 0.0)
    monkeypatch.setattr(sky_cluster, "on", on)
    return said


def test_status_says_what_the_run_and_the_pod_say(cluster: dict[str, Any]) -> None:
    found = sky_cluster.status("d20")
    assert found is not None
    assert (found["state"], found["exit_code"], found["pod"]) == ("RUNNING", None, "p1")
    assert found["pod_usd"] == pytest.approx(21.52)
    assert found["message"] == "SkyPilot's cluster d20: pod p1 is RUNNING at $21.52/h. RUNNING"
    cluster["runs"] = None
    found = sky_cluster.status("d20")
    assert found is not None and found["state"] == "RUNNING" and found["exit_code"] is None
    cluster["provider"] = Provider()
    found = sky_cluster.status("d20")
    assert found is not None and "sky status -r" in found["message"]
    assert sky_cluster.status("d24") is None


def test_of_several_runs_the_named_or_the_living_one_is_meant(cluster: dict[str, Any]) -> None:
    cluster["runs"] = [
        {"name": "old", "state": "SUCCEEDED", "exit_code": 0, "heartbeat": 1.0},
        {"name": "d64_1000usd", "state": "RUNNING", "exit_code": None, "heartbeat": 9.0},
    ]
    for name, meant in (("d20", "d64_1000usd"), ("old", "old")):
        run = sky_cluster.run_on("d20", name)
        assert run is not None and run["name"] == meant


def ended(name: str, exit_code: int | None, heartbeat: float) -> dict[str, Any]:
    return {"name": name, "state": "ENDED", "exit_code": exit_code, "heartbeat": heartbeat}


def test_the_exit_code_is_that_of_this_launch_s_run(cluster: dict[str, Any]) -> None:
    """Another run of the volume, or an earlier attempt, says nothing of a job that was refused."""
    cluster["runs"] = [ended("smoke", 0, 990.0), ended("smoke2", 0, 1010.0), ended("d20", 0, 999.0)]
    for job_exit_codes, meant in ((None, 70), ("None\n", 70), ("[78]\n", 78), ("[-9]\n", 70)):
        cluster["job_exit_codes"] = job_exit_codes
        assert sky_cluster.exit_code_on("d20", "d20", 3, since=1000.0) == meant
    cluster["runs"].append(ended("d20", 76, 1001.0))
    assert sky_cluster.exit_code_on("d20", "d20", 3, since=1000.0) == 76
    cluster["runs"][-1] = ended("d20", None, 1001.0)  # killed before it could say
    cluster["job_exit_codes"] = "[137]\n"
    assert sky_cluster.exit_code_on("d20", "d20", 3, since=1000.0) == 137
    cluster["runs"] = None
    assert sky_cluster.exit_code_on("d20", "d20", 3, since=1000.0) == 137


def test_a_refused_preflight_is_the_exit_code_of_the_launch(cluster: dict[str, Any]) -> None:
    cluster["runs"] = [ended("smoke", 0, time.time()), ended("d20", 75, time.time() - 3600.0)]
    cluster["job_exit_codes"] = "[77]"
    sky = FakeSky(log_code=100)
    sky.number = 3
    assert submit(job(), PULLED, sky, io.StringIO()) == 77
    cluster["runs"] = [ended("mine", 76, time.time() + 60.0)]
    assert submit(job('name="mine"'), PULLED, sky, io.StringIO()) == 76


def test_the_command_that_asks_for_the_job_s_exit_code_is_one_word_of_a_shell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With a python3 in the place of the one that SkyPilot has put on the machine."""
    (tmp_path / ".sky").mkdir()
    (tmp_path / ".sky" / "python_path").write_text(f"{sys.executable}\n")
    (tmp_path / "sky" / "skylet").mkdir(parents=True)
    noted = "def get_exit_codes(job):\n    return [70 + job]\n"
    (tmp_path / "sky" / "skylet" / "job_lib.py").write_text(noted)
    monkeypatch.setenv("HOME", str(tmp_path))
    asked = f"bash -lc '{sky_cluster.JOB_EXIT_CODES.format(job=8)}'"
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [78]


def test_the_files_of_its_run_can_be_pulled(cluster: dict[str, Any]) -> None:
    cluster["runs"][0]["run_dir"] = "/workspace/nanochat/runs/d20"
    there = sky_cluster.files_of("d20")
    assert there is not None
    assert (there.command[-1], there.path) == ("d20", "/workspace/nanochat/runs/d20")
    assert sky_cluster.files_of("d24") is None


def test_stop_saves_first_and_leaves_nothing_billed(cluster: dict[str, Any]) -> None:
    assert sky_cluster.stop("d20", FakeSky()) == 75
    assert "nanochat stop d20" in cluster["asked"]
    assert cluster["provider"].there == []


def test_a_pod_that_does_not_go_is_told(
    cluster: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sky_cluster, "VERIFY_S", 0.0)
    monkeypatch.setattr(cluster["provider"], "terminate", lambda _: None)
    with pytest.raises(LaunchError, match="may still be billed.*p1"):
        sky_cluster.stop("d20", FakeSky())

    def lost() -> None:
        raise ProviderError("timed out")

    monkeypatch.setattr(cluster["provider"], "pods", lost)
    with pytest.raises(LaunchError, match="RunPod does not answer"):
        sky_cluster.tear_down("d20", FakeSky())


def test_reap_knows_what_a_cluster_may_cost(cluster: dict[str, Any]) -> None:
    sky_cluster.PodNotes("d20", "d20", 20.0).look()
    (row,) = reap.reap(cluster["provider"])
    assert (row.run, row.max_usd, row.action) == ("d20", 20.0, "ended")


def test_a_pod_that_lives_on_counts_its_own_cost(cluster: dict[str, Any]) -> None:
    """Two hours at $21.52 of $100 on the cluster's pod, and $10.76 on one before it."""
    now = time.time()
    reap.note_launch("made", "d20", "p0", usd_per_hour=21.52, born=now - 1800.0, max_usd=125.0)
    reap.note_launch("ended", "d20", "p0")
    cluster["provider"].there = [replace(POD, uptime_s=7200.0)]
    sky_cluster.PodNotes("d20", "d20", 125.0).look()
    sky = FakeSky()
    sky.up.add("d20")
    assert submit(job("budget.max_usd=150.0"), PULLED, sky, io.StringIO()) == 0
    before_usd = float(sky.launched[0]["envs"]["NANOCHAT_LABEL_BEFORE_USD"])
    assert before_usd == pytest.approx(10.76, abs=0.5)
    (row,) = reap.reap(cluster["provider"])
    assert row.max_usd == pytest.approx(150.0 + 30.0 * 50 / 60 - 10.76, abs=0.5)
    assert (row.usd, row.action) == (pytest.approx(43.04, abs=0.1), "kept")


def test_a_living_cluster_is_given_nothing_while_its_cost_is_not_known(
    cluster: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost() -> None:
        raise ProviderError("timed out")

    monkeypatch.setattr(cluster["provider"], "pods", lost)
    sky = FakeSky()
    sky.up.add("d20")
    with pytest.raises(LaunchError, match="d20 is up.*timed out.*again later") as e:
        submit(job(), PULLED, sky, io.StringIO())
    assert (e.value.exit_code, sky.launched) == (77, [])


class SkyThatRents(FakeSky):
    """SkyPilot whose pod of a failed start is there until it is torn down, after half an hour."""

    def __init__(self, provider: Provider, trouble: str) -> None:
        super().__init__(trouble)
        self._provider = provider

    def launch(self, task: dict[str, Any], cluster: str, secrets: dict[str, str]) -> int:
        self._provider.there = [replace(POD, id=f"f{len(self.launched)}", uptime_s=1800.0)]
        return super().launch(task, cluster, secrets)

    def down(self, cluster: str) -> None:
        super().down(cluster)
        self._provider.there = []


def test_failed_starts_count_against_the_budget(cluster: dict[str, Any]) -> None:
    sky = SkyThatRents(cluster["provider"], "set-up failed")
    for start in (1, 2):
        with pytest.raises(LaunchError, match="set-up failed.*torn down"):
            submit(job("budget.max_usd=30.0"), PULLED, sky, io.StringIO())
        assert reap.spent_before("d20") == pytest.approx(start * 10.76, abs=0.5 * start)
    assert float(sky.launched[1]["envs"]["NANOCHAT_LABEL_BEFORE_USD"]) > 10.0
    events = [r["event"] for r in reap.read_jsonl(reap.launches_file())]
    assert events == ["made", "ended"] * 2
    with pytest.raises(LaunchError, match="has cost .* of its budget of"):
        submit(job("budget.max_usd=22.0"), PULLED, sky, io.StringIO())


def test_notes_that_cannot_be_made_keep_no_cluster_up(
    cluster: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reap, "note_launch", full)
    sky = SkyThatRents(cluster["provider"], "set-up failed")
    with pytest.raises(LaunchError, match="set-up failed.*torn down"):
        submit(job("budget.max_usd=30.0"), PULLED, sky, io.StringIO())
    assert cluster["provider"].there == [] and sky.up == set()
    assert "No space left" in capsys.readouterr().err


def test_a_pod_that_skypilot_itself_ends_in_a_start_counts_too(
    cluster: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives up a machine whose sshd never comes, and tries the next one."""
    monkeypatch.setattr(launcher, "LOOK_EVERY_S", 0.01)
    provider = cluster["provider"]
    provider.there = []
    sky = FakeSky()

    def launch(task: dict[str, Any], name: str, secrets: dict[str, str]) -> int:
        for there in ([replace(POD, id="f1", uptime_s=1800.0)], [], [replace(POD, uptime_s=60.0)]):
            provider.there = there
            time.sleep(0.3)
        sky.up.add(name)
        return 1

    monkeypatch.setattr(sky, "launch", launch)
    assert submit(job(), PULLED, sky, io.StringIO()) == 0
    lives = reap._lives(reap.read_jsonl(reap.launches_file()))
    assert {pod: life.is_over for pod, life in lives.items()} == {"f1": True, "p1": False}
    whole_usd = 100.0 + 30.0 * 50 / 60
    assert lives["p1"].max_usd == pytest.approx(whole_usd - 10.76, abs=0.5)
