"""The dead man's switch ends a pod in which no run lives, or whose money is gone."""

import json
import os
import time
from pathlib import Path

import pytest

from infra import deadman
from infra.budget import spent
from infra.deadman import Switch
from infra.pointer import point_to, pointer_file
from infra.runpod_api import RunPodApi, api_key, labels_of
from nanochat.rundir import RunDir, append_jsonl, read_jsonl
from tests.unit.test_supervisor import make_spec


class Provider:
    """Answers as RunPod does for one pod; `lost` makes every call fail."""

    def __init__(self, usd_per_hour: float = 36.0, uptime_s: float = 0.0) -> None:
        self.usd_per_hour = usd_per_hour
        self.uptime_s = uptime_s
        self.lost = False
        self.ended = False

    def post(self, _url: str, _headers: dict[str, str], body: bytes) -> bytes:
        if self.lost:
            raise OSError("timed out")
        if "podTerminate" in json.loads(body)["query"]:
            self.ended = True
            return b'{"data": {"podTerminate": null}}'
        shown = {"id": "p", "costPerHr": self.usd_per_hour, "uptimeSeconds": self.uptime_s}
        return json.dumps({"data": {"pod": shown}}).encode()


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock, in a box."""
    clock = [1e9]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    return clock


def a_run(home: Path, max_usd: float, start: float, name: str = "t", pod: str = "p") -> RunDir:
    run = RunDir(home / "runs" / name)
    run.create()
    run.freeze_spec(make_spec(budget={"max_usd": max_usd}))
    point_to(home, run.path)
    line = {"event": "start", "time": start, "usd_per_hour": 36.0, "instance": pod}
    append_jsonl(run.ledger_file, line)
    return run


def test_silence_ends_the_pod_and_any_sign_of_life_puts_it_off(
    tmp_path: Path, now: list[float]
) -> None:
    run = a_run(tmp_path, 1e6, now[0])
    switch = Switch(tmp_path, "p", RunPodApi("k", post=Provider().post))
    for _ in range(5):
        now[0] += deadman.SILENCE_S - 10
        os.utime(run.ledger_file, (now[0], now[0]))
        assert switch.reason_to_end() is None
    now[0] += deadman.SILENCE_S + 1
    assert "no run has given a sign of life" in str(switch.reason_to_end())


def test_the_run_of_another_pod_on_the_volume_is_not_looked_at(
    tmp_path: Path, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pods on one volume: the one that started last neither hides nor keeps alive the first."""
    hostname = ["pod-a"]
    monkeypatch.setattr("socket.gethostname", lambda: hostname[0])
    ours = a_run(tmp_path, 1.0, now[0], "d20", "a")
    hostname[0] = "pod-b"
    other = a_run(tmp_path, 1e6, now[0], "d24", "b")
    switches = {"a": Switch(tmp_path, "a", None), "b": Switch(tmp_path, "b", None)}

    def look(pod: str) -> str | None:
        hostname[0] = f"pod-{pod}"
        return switches[pod].reason_to_end()

    now[0] += 50
    assert look("a") is None and look("b") is None
    now[0] += 45
    assert f"budget of {ours.path} is spent" in str(look("a"))
    assert look("b") is None, "it has a budget of its own"
    ours.spec_file.unlink()  # without a budget: the silence alone counts
    for moment in (600.0, 1200.0):  # the other run ends here, ours goes on
        os.utime(ours.ledger_file, (moment, moment))
        now[0] += 600
        reasons = look("a"), look("b")
    assert reasons[0] is None
    assert "no run has given a sign of life" in str(reasons[1])
    assert other.path.exists()


def test_pointers_of_machines_that_are_gone_are_forgotten(tmp_path: Path) -> None:
    gone, long, alive = (RunDir(tmp_path / "runs" / name) for name in ("gone", "long", "alive"))
    for host, run, silent_s in (("a", gone, 90_000), ("b", long, 90_000), ("c", alive, 10)):
        run.create()
        run.status_file.write_text("{}")
        file = pointer_file(tmp_path, host)
        file.write_text(json.dumps(str(run.path)))
        for one in (file, *([run.status_file] if host != "b" else [])):
            os.utime(one, (time.time() - silent_s,) * 2)
    point_to(tmp_path, tmp_path / "runs" / "new")
    left = {f.name for f in tmp_path.glob("current-run.*")}
    assert left == {pointer_file(tmp_path, h).name for h in ("b", "c", None)}


def test_a_pod_without_any_run_is_ended_too(tmp_path: Path, now: list[float]) -> None:
    switch = Switch(tmp_path, "p", None)
    assert switch.reason_to_end() is None
    now[0] += deadman.SILENCE_S + 1
    assert switch.reason_to_end() is not None


def test_a_server_is_life(tmp_path: Path, now: list[float]) -> None:
    switch = Switch(tmp_path, "p", None, is_serving=lambda: True)
    now[0] += 10 * deadman.SILENCE_S
    assert switch.reason_to_end() is None


def test_the_ledger_is_counted_without_the_supervisor(tmp_path: Path, now: list[float]) -> None:
    """$1 at $36 per hour is 100 s; at twice the price that the API tells, 50 s."""
    a_run(tmp_path, 1.0, now[0])
    switch = Switch(tmp_path, "p", RunPodApi("k", post=Provider(36.0).post))
    now[0] += 85
    assert switch.reason_to_end() is None
    now[0] += 8
    assert "budget" in str(switch.reason_to_end())
    dearer = Switch(tmp_path, "p", RunPodApi("k", post=Provider(72.0).post))
    now[0] -= 40
    assert "budget" in str(dearer.reason_to_end())


def test_a_price_that_the_switch_alone_knows_has_the_volume_on_top(
    tmp_path: Path, now: list[float]
) -> None:
    run = a_run(tmp_path, 1.0, now[0])
    line = {"event": "heartbeat", "time": now[0], "usd_per_hour": 36.0, "instance": "p"}
    append_jsonl(run.ledger_file, {**line, "storage_usd_per_hour": 36.0})
    switch = Switch(tmp_path, "p", RunPodApi("k", post=Provider(36.0).post))
    now[0] += 37
    assert switch.reason_to_end() is None
    now[0] += 2
    assert "budget" in str(switch.reason_to_end()), "50 s at $72, less what it is early"


def test_the_label_holds_without_a_run(tmp_path: Path, now: list[float]) -> None:
    provider = Provider(36.0, uptime_s=0.0)
    switch = Switch(tmp_path, "p", RunPodApi("k", post=provider.post), max_usd=1.0, born=now[0])
    assert switch.reason_to_end() is None
    provider.lost = True
    now[0] += 96
    assert "may" in str(switch.reason_to_end())
    assert not switch.end()
    provider.lost = False
    assert switch.end() and provider.ended


def test_the_ledger_learns_how_long_a_pod_lived_on(tmp_path: Path, now: list[float]) -> None:
    """The supervisor hung or was killed: whoever ends the pod writes the last line."""
    run = a_run(tmp_path, 1e6, now[0])
    now[0] += 500.0
    deadman.note_life(tmp_path, "another pod")
    deadman.note_life(tmp_path, "p")
    lines = list(read_jsonl(run.ledger_file))
    assert [(r["event"], r["time"] - 1e9) for r in lines] == [("start", 0.0), ("stop", 500.0)]
    assert spent(lines, now[0])[0] == pytest.approx(5.0)
    deadman.note_life(tmp_path / "nowhere", "p")


def test_a_ledger_that_cannot_be_read_is_told_once_and_the_rest_counts(
    tmp_path: Path, now: list[float]
) -> None:
    run = a_run(tmp_path, 1.0, now[0])
    ledger = run.ledger_file.read_bytes()
    run.ledger_file.unlink()
    run.ledger_file.mkdir()
    said: list[str] = []
    api = RunPodApi("k", post=Provider(36.0).post)
    labelled = Switch(tmp_path, "p", api, 2.0, now[0], tell=said.append)
    bare = Switch(tmp_path, "p", None, tell=said.append)
    for _ in range(2):
        assert labelled.reason_to_end() is None and bare.reason_to_end() is None
        now[0] += 95
    assert len(said) == 2 and all("Is a directory" in text for text in said)
    assert "may" in str(labelled.reason_to_end())
    now[0] += deadman.SILENCE_S
    assert "no run has given a sign of life" in str(bare.reason_to_end())
    deadman.note_life(tmp_path, "p")
    run.ledger_file.rmdir()
    run.ledger_file.write_bytes(ledger)
    assert "budget" in str(bare.reason_to_end()), "judged again as soon as it can be read"
    assert len(said) == 2


def test_the_watch_goes_on_over_whatever_fails_in_a_look(
    tmp_path: Path, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged ledger, and processes that cannot be listed, until both are well again."""
    run = a_run(tmp_path, 1e6, now[0])
    append_jsonl(run.ledger_file, {"event": "start", "instance": "p", "usd_per_hour": "?"})
    looks: list[float] = []

    class Gone(BaseException):
        pass

    def is_serving() -> bool:
        looks.append(now[0])
        if len(looks) < 4:
            raise PermissionError("/proc")
        return False

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if provider.ended:
            raise Gone

    provider = Provider()
    monkeypatch.setattr(time, "sleep", sleep)
    told: list[str] = []
    said: list[str] = []
    api = RunPodApi("k", post=provider.post)
    with pytest.raises(Gone):
        deadman.watch(
            Switch(tmp_path, "p", api, is_serving=is_serving, tell=told.append), said.append
        )
    assert len(looks) == 4 and "no run has given a sign of life" in said[0]
    assert len(told) == 2 and "budget" in told[0] and "silence" in told[1]


def test_keys_and_labels(tmp_path: Path) -> None:
    assert api_key({"RUNPOD_API_KEY": "a", "HOME": str(tmp_path)}) == "a"
    (tmp_path / ".runpod").mkdir()
    (tmp_path / ".runpod" / "config.toml").write_text('[default]\napi_key = "b"\n')
    assert api_key({"HOME": str(tmp_path)}) == "b"
    assert labels_of(["NANOCHAT_LABEL_RUN=d20", "HF_TOKEN=secret"]) == {"run": "d20"}
