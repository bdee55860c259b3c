"""The launcher for RunPod against a small account; tests/e2e has pods that are containers."""

import base64
import io
import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infra import reap
from infra.launch import runpod, runpod_pod
from infra.launch.base import Job, LaunchError
from infra.launch.runpod import Launcher, RunPodOptions, Volume, pod_command, render, rungs
from infra.runpod_api import Pod, ProviderError
from nanochat.spec import load_spec

ROOT = Path(__file__).resolve().parents[2]
VOLUME = Volume("vol1", "nanochat", "CA-MTL-1")
ADDRESS = ("10.0.0.1", 22022)
RUNNING = Pod("", "", "RUNNING", 21.52, 60.0, {}, ADDRESS)


def job(*overrides: str, offer: str = "8xH100-SXM", usd_per_hour: float = 21.52) -> Job:
    path = ROOT / "configs" / "d20.toml"
    plan = {"usd_per_hour": usd_per_hour, "world_size": 8, "offer": offer}
    spec = load_spec(path, overrides)
    return Job(config=str(path), overrides=overrides, spec=spec, plan=plan)


class Account:
    """Pods that are up at once; what is wrong with the first ones is said by `troubles`."""

    def __init__(self, *troubles: str) -> None:
        self.troubles = list(troubles)
        self.there: dict[str, Pod] = {}
        self.asked: list[dict[str, Any]] = []
        self.states: dict[str, dict[str, Any]] = {}
        self.refuses_end = 0
        self.interrupts = False

    def create(self, **asked: Any) -> dict[str, Any] | None:
        self.asked.append(asked)
        trouble = self.troubles.pop(0) if self.troubles else ""
        if trouble == "no capacity":
            return None
        if trouble == "error":
            raise OSError("timed out")
        if trouble == "interrupted":
            self.interrupts = True
        pod_id = f"pod{len(self.asked)}"
        pod = replace(RUNNING, id=pod_id, name=asked["name"])
        self.states[pod_id] = {"phase": "run"}
        if trouble == "dear":
            pod = replace(pod, usd_per_hour=99.0)
        if trouble == "exited":
            pod = replace(pod, status="EXITED")
        if trouble == "no address":
            pod = replace(pod, address=None)
        if trouble == "unfit":
            self.states[pod_id] = {"phase": "ended", "exit_code": 77}
        if trouble == "failed":
            self.states[pod_id] = {"phase": "ended", "exit_code": 78}
        self.there[pod_id] = pod
        if trouble == "answer lost":
            raise OSError("Read timed out")
        return {"id": pod_id}

    def pods(self) -> list[Pod]:
        return list(self.there.values())

    def pod(self, pod_id: str) -> Pod | None:
        if self.interrupts:
            raise KeyboardInterrupt
        return self.there.get(pod_id)

    def terminate(self, pod_id: str) -> None:
        if self.refuses_end > 0:
            self.refuses_end -= 1
            raise ProviderError("try later")
        self.there.pop(pod_id, None)

    def shell(self, _address: tuple[str, int], command: str) -> str | None:
        if not self.there:
            return None
        (pod_id,) = self.there
        if command.startswith("cat"):
            return json.dumps(self.states[pod_id])
        return "a line\n" if command == f"tail -c +1 {runpod.LOG_FILE}" else ""


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No test waits: sleeping moves the clock."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.sleep", lambda s: now.__setitem__(0, now[0] + s))
    return now


def submit(account: Account, *jobs: Job, **options: Any) -> tuple[int | None, str]:
    """(exit code, or None where there was no pod; what a person reads)."""
    out = io.StringIO()
    launcher = Launcher(account, account.create, [VOLUME], account.shell, out, "ssh-ed25519 A")  # type: ignore[arg-type]
    chosen = RunPodOptions(**{"image": "me/nanochat:1", "detach": True, **options})
    try:
        return launcher.submit(jobs or [job()], chosen), out.getvalue()
    except LaunchError as e:
        return None, f"{out.getvalue()}{e}"


def test_rungs_are_offers_in_order_each_where_the_volume_is() -> None:
    two = [Volume("a", "nanochat", "CA-MTL-1"), Volume("b", "nanochat-3f-0a1b2c", "US-KS-2")]
    jobs = [job(), job(offer="8xH200", usd_per_hour=28.72)]
    found = [r for _, r in rungs(jobs, RunPodOptions(), two)]
    assert [(r.offer, r.data_center, r.volume_id) for r in found] == [
        ("8xH100-SXM", "CA-MTL-1", "a"),
        ("8xH100-SXM", "US-KS-2", "b"),
        ("8xH200", "CA-MTL-1", "a"),
        ("8xH200", "US-KS-2", "b"),
    ]
    chosen = RunPodOptions(data_centers=("US-KS-2",), max_usd_per_hour=30.0)
    found = [r for _, r in rungs(jobs, chosen, two)]
    assert {r.data_center for r in found} == {"US-KS-2"}
    assert {r.ceiling_usd_per_hour for r in found} == {30.0}


def test_a_volume_that_is_not_there_is_refused_with_the_way_to_make_it() -> None:
    with pytest.raises(LaunchError, match="no network volume 'other'.*sky volumes apply"):
        list(rungs([job()], RunPodOptions(volume="other"), [VOLUME]))


def test_an_offer_that_runpod_does_not_rent_is_refused() -> None:
    with pytest.raises(LaunchError, match="does not rent"):
        list(rungs([job(offer="8xA100-40GB")], RunPodOptions(), [VOLUME]))


def test_what_is_sent_is_secure_labelled_and_names_secrets_without_values() -> None:
    sent = json.loads(render([job()], RunPodOptions(secrets=("HF_TOKEN",)), [VOLUME]).text)
    pod = sent[0]["pod"]
    assert pod["cloud_type"] == "SECURE" and pod["network_volume_id"] == "vol1"
    assert pod["env"]["HF_TOKEN"] is None and pod["env"]["PUBLIC_KEY"] is None
    assert pod["env"]["NANOCHAT_LABEL_MAX_USD"] == "100.0000"
    assert pod["docker_args"].startswith("python -m infra.podrun run @")


def test_hosts_are_wanted_whose_driver_can_run_the_torch_of_the_lock() -> None:
    text = render([job()], RunPodOptions(), [VOLUME]).text
    allowed = json.loads(text)[0]["pod"]["allowed_cuda_versions"]
    assert f"\ncuda-toolkit=={allowed[0]}." in (ROOT / "requirements.lock").read_text()
    on_cpu = render([job(offer="cpu", usd_per_hour=0.0)], RunPodOptions(), [VOLUME]).text
    assert json.loads(on_cpu)[0]["pod"]["allowed_cuda_versions"] is None


def test_the_worst_case_is_the_budget_or_its_hours_at_the_ceiling() -> None:
    assert render([job()], RunPodOptions(), [VOLUME]).worst_case_usd == 100.0
    hours = [job("budget.max_hours=1.0")]
    ceiling = 21.52 * runpod.PRICE_MARGIN
    assert render(hours, RunPodOptions(), [VOLUME]).worst_case_usd == pytest.approx(ceiling, 1e-4)


def test_a_config_of_this_machine_travels_within_the_command(tmp_path: Path) -> None:
    config = tmp_path / "mine.toml"
    config.write_text((ROOT / "configs" / "e2e.toml").read_text())
    mine = replace(job(), config=str(config), overrides=())
    command = pod_command(mine)
    assert command[:2] == ["bash", "-c"] and "run @/tmp/mine.toml" in command[2]
    (packed,) = (w for w in command[2].split() if len(w) > 400)
    assert zlib.decompress(base64.b64decode(packed)) == config.read_bytes()


@pytest.mark.parametrize("trouble", ["no capacity", "error", "dear", "exited", "unfit"])
def test_a_rung_that_does_not_work_is_left_for_the_next(trouble: str) -> None:
    account = Account(trouble)
    code, _ = submit(account, job(), job(offer="8xH200", usd_per_hour=28.72))
    assert code == 0
    assert [a["gpu_type_id"] for a in account.asked] == ["NVIDIA H100 80GB HBM3", "NVIDIA H200"]
    assert list(account.there) == ["pod2"], "the first is not billed any more"


def test_a_pod_whose_birth_was_not_answered_is_the_run_s() -> None:
    account = Account("answer lost")
    code, said = submit(account)
    assert code == 0 and "pod pod1 runs d20" in said
    assert list(account.there) == ["pod1"] and len(account.asked) == 1


def test_a_pod_that_may_have_been_made_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    account = Account("answer lost")
    create = account.create

    def then_silent(**asked: Any) -> dict[str, Any] | None:
        monkeypatch.setattr(account, "pods", lost)
        return create(**asked)

    def lost() -> list[Pod]:
        raise ProviderError("RunPod does not answer")

    monkeypatch.setattr(account, "create", then_silent)
    code, said = submit(account)
    assert code is None and "it may be billed" in said and "nanochat stop d20" in said
    assert len(account.asked) == 1, "no other rung is asked for"


def test_ctrl_c_before_the_run_has_started_ends_its_pod() -> None:
    account = Account("interrupted")
    code, said = submit(account)
    assert code == 75 and "pod pod1 is ended" in said
    assert account.there == {}


def test_a_detached_launch_tells_of_a_run_that_has_failed_at_once() -> None:
    account = Account("failed")
    assert submit(account)[0] == 78


def test_no_pod_is_free_whatever_the_spec_says() -> None:
    free = job("budget.usd_per_hour=0.0", usd_per_hour=0.0)
    (rung,) = (r for _, r in rungs([free], RunPodOptions(), [VOLUME]))
    assert (rung.usd_per_hour, rung.ceiling_usd_per_hour) == (21.52, 24.748)
    assert render([free], RunPodOptions(), [VOLUME]).worst_case_usd == 100.0


def test_with_one_offer_another_pod_is_asked_for_up_to_three_times() -> None:
    account = Account("unfit", "exited")
    code, said = submit(account)
    assert code == 0 and "pod pod3 runs d20" in said
    assert list(account.there) == ["pod3"], "the others are not billed any more"
    assert len({a["gpu_type_id"] for a in account.asked}) == 1
    account = Account("unfit", "unfit", "unfit")
    code, said = submit(account)
    assert code is None and said.count("failed its node check\n") >= 3
    assert len(account.asked) == runpod.MAX_PODS and not account.there


@pytest.mark.parametrize("trouble", ["dear", "no capacity"])
def test_an_offer_that_is_too_dear_or_sold_out_is_not_asked_for_again(trouble: str) -> None:
    account = Account(*[trouble] * 3)
    code, _ = submit(account)
    assert code is None and len(account.asked) == 1 and not account.there


def test_what_failed_pods_of_this_launch_have_cost_is_off_the_next_label(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spent = iter([0.0, 5.0])
    monkeypatch.setattr(reap, "spent_before", lambda run: next(spent))
    account = Account("unfit")
    assert submit(account)[0] == 0
    labels = [a["env"]["NANOCHAT_LABEL_MAX_USD"] for a in account.asked]
    assert labels == ["100.0000", "95.0000"]


def test_a_pod_that_does_not_come_up_is_ended_at_the_deadline(clock: list[float]) -> None:
    account = Account("no address", "no address", "no address", "no address")
    code, said = submit(account, *[job()] * 5)
    assert code is None and "was not up within 900 s" in said
    assert len(account.asked) == runpod.MAX_PODS and not account.there
    assert clock[0] - 1000.0 < runpod.MAX_PODS * (runpod.BOOT_DEADLINE_S + 60.0)


def test_a_pod_that_does_not_end_is_said() -> None:
    account = Account("unfit")
    account.refuses_end = 100
    code, said = submit(account)
    assert code is None and "which is billed: run `nanochat reap`" in said


def test_a_second_pod_of_a_run_is_refused() -> None:
    account = Account()
    assert submit(account)[0] == 0
    code, said = submit(account)
    assert code is None and "has pod pod1 already" in said and len(account.asked) == 1


def test_a_run_whose_pods_have_cost_its_budget_is_refused() -> None:
    reap.note_launch("made", "d20", "old", usd_per_hour=50.0, born=1.0)
    account = Account()
    code, said = submit(account)
    assert code is None and "of its budget of $100.00" in said and not account.asked


@pytest.mark.parametrize(("before", "asked"), [(98.0, 1), (99.0, 0)])
def test_a_pod_that_could_only_boot_is_not_asked_for(
    before: float, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three minutes of it cost $1.08."""
    monkeypatch.setattr(reap, "spent_before", lambda run: before)
    account = Account()
    submit(account)
    assert len(account.asked) == asked


def test_what_earlier_pods_have_cost_is_off_the_next_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reap, "spent_before", lambda run: 40.0)
    account = Account()
    submit(account)
    env = account.asked[0]["env"]
    assert env["NANOCHAT_LABEL_MAX_USD"] == "60.0000"
    assert env["NANOCHAT_LABEL_BEFORE_USD"] == "40.0000", "for the ledger"


def test_following_copies_the_log_and_ends_with_the_exit_code_of_the_run() -> None:
    account = Account()
    original = account.shell

    def shell(address: tuple[str, int], command: str) -> str | None:
        if command.startswith("tail"):
            account.states["pod1"] = {"phase": "ended", "exit_code": 76}
        if command.startswith("touch"):
            account.there.clear()  # the pod ends itself
            return ""
        return original(address, command)

    account.shell = shell  # type: ignore[method-assign]
    code, said = submit(account, detach=False)
    assert code == 76 and "a line\n" in said


@pytest.mark.parametrize(
    ("happens", "told"),
    [
        (lambda account: account.there.clear(), "is gone"),
        (
            lambda account: account.there.update(
                pod1=replace(account.there["pod1"], status="EXITED")
            ),
            "was EXITED and is ended",
        ),
    ],
    ids=["vanishes", "exits"],
)
def test_a_pod_that_is_lost_ends_the_launch_with_75(
    happens: Callable[[Account], None], told: str
) -> None:
    account = Account()
    original = account.shell

    def shell(address: tuple[str, int], command: str) -> str | None:
        text = original(address, command)
        if command.startswith("tail"):
            happens(account)
        return text

    account.shell = shell  # type: ignore[method-assign]
    code, said = submit(account, detach=False)
    assert code == 75 and told in said and not account.there


def test_stop_asks_for_a_checkpoint_and_ends_the_pod() -> None:
    account = Account()
    submit(account)
    asked: list[str] = []
    original = account.shell

    def shell(address: tuple[str, int], command: str) -> str | None:
        asked.append(command)
        if "nanochat stop d20" in command:
            account.states["pod1"] = {"phase": "ended", "exit_code": 75}
            return ""
        return original(address, command)

    launcher = Launcher(account, account.create, [VOLUME], shell, io.StringIO())  # type: ignore[arg-type]
    assert runpod_pod.stop(launcher, "d20") == 75
    assert any("nanochat stop d20" in command for command in asked) and not account.there
    with pytest.raises(LaunchError, match="no pod of d20"):
        runpod_pod.stop(launcher, "d20")


def test_stop_ends_a_pod_that_does_not_answer(clock: list[float]) -> None:
    account = Account()
    submit(account)
    launcher = Launcher(account, account.create, [VOLUME], lambda *_: None, io.StringIO())  # type: ignore[arg-type]
    assert runpod_pod.stop(launcher, "d20") == 75
    assert not account.there and clock[0] - 1000.0 < 2 * runpod_pod.SILENT_S


def test_status_is_of_the_named_run_whatever_else_is_on_the_volume(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    account = Account()
    submit(account)
    files = {
        "/workspace/nanochat/runs/d20/status.json": {"name": "d20", "state": "RUNNING"},
        "/workspace/nanochat/runs/d24/status.json": {"name": "d24", "state": "FAILED"},
    }

    def ssh(_address: tuple[str, int], command: str) -> str:
        return json.dumps(files[command.removeprefix("cat ")])

    monkeypatch.setattr(runpod_pod, "ssh", ssh)
    found = runpod_pod.status(account, "d20")  # type: ignore[arg-type]
    assert found is not None
    assert (found["name"], found["state"], found["pod"]) == ("d20", "RUNNING", "pod1")
