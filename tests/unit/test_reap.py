"""`reap` ends what is ours and past its bound, and nothing else."""

import re
import time
from pathlib import Path

import pytest

from entrypoint import build_parser
from infra import reap
from infra.runpod_api import Pod, ProviderError
from nanochat.spec import load_spec

ROOT = Path(__file__).resolve().parents[2]


def pod(pod_id: str = "p", age_s: float = 3600.0, status: str = "RUNNING", **labels: str) -> Pod:
    address = ("127.0.0.1", 22)
    return Pod(pod_id, f"nanochat-{pod_id}", status, 10.0, age_s, labels, address)


class Account:
    """Pods of an account; the first `refuse` ends are refused."""

    def __init__(self, *pods: Pod, refuse: int = 0) -> None:
        self.there = list(pods)
        self.refuse = refuse

    def pods(self) -> list[Pod]:
        return list(self.there)

    def terminate(self, pod_id: str) -> None:
        if self.refuse > 0:
            self.refuse -= 1
            raise ProviderError("try later")
        self.there = [p for p in self.there if p.id != pod_id]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "launches.jsonl"


def actions(account: Account, file: Path, dry_run: bool = False) -> list[str]:
    return [r.action for r in reap.reap(account, dry_run, file, sleep=lambda _: None)]


def test_a_pod_within_its_budget_is_kept(file: Path) -> None:
    assert actions(Account(pod(run="a", max_usd="10.01")), file) == ["kept"]


def test_a_pod_past_its_budget_or_its_hours_is_ended(file: Path) -> None:
    over = Account(pod(run="a", max_usd="9.99"))
    assert actions(over, file, dry_run=True) == ["would end"] and over.there
    assert actions(over, file) == ["ended"] and not over.there
    late = Account(pod(run="a", until=str(time.time() - 1)))
    assert actions(late, file) == ["ended"]


def test_a_stopped_pod_and_one_that_never_came_up_are_ended(file: Path) -> None:
    assert actions(Account(pod(status="EXITED")), file) == ["ended"]
    young, old = (
        Pod("x", "nanochat-x", "RUNNING", 1.0, age_s, {}) for age_s in (60.0, reap.BOOT_S + 1)
    )
    assert actions(Account(young), file) == ["kept"]
    assert actions(Account(old), file) == ["ended"]


def test_the_pods_of_others_are_never_touched(file: Path) -> None:
    other = Pod("x", "stable-diffusion", "EXITED", 1.0, 1e6, {})
    assert actions(Account(other), file) == []


def test_pods_of_skypilot_are_known_by_our_image(file: Path) -> None:
    def made(name: str, image: str) -> Account:
        return Account(Pod("x", name, "EXITED", 1.0, 1e6, {}, image=image))

    ours, image = "d20-0a1b2c3d-head", "ghcr.io/me/nanochat@sha256:0a"
    assert actions(made(ours, image), file) == ["ended"]
    assert actions(made(ours, "nanochat:0.1.0"), file, dry_run=True) == ["would end"]
    file.unlink()
    for name, of in ((ours, "me/not-nanochat:1"), ("my-pod", image), (ours, "nanochat-ui")):
        assert actions(made(name, of), file) == []


def test_a_controller_of_skypilot_s_is_named_and_not_ended(file: Path) -> None:
    """It is billed, so "no pod exists" would be wrong; its jobs may be others than ours."""
    made = Pod("x", "sky-jobs-controller-0a1b2c3d-0a1b2c3d-head", "RUNNING", 0.2, 1e6, {})
    account = Account(made)
    (row,) = reap.reap(account, False, file)
    assert (row.action, account.there) == ("kept", [made])
    assert "sky down" in reap.render([row]) and "nothing is billed" not in reap.render([row])


def test_a_pod_of_a_plain_sky_launch_may_reach_an_age_and_is_told_of_it(file: Path) -> None:
    """Nobody here knows its budget: neither a label nor a launch that is remembered tells it."""

    def look(age_h: float, max_age_h: float = reap.MAX_AGE_H, **labels: str) -> reap.Row:
        age_s, address, image = age_h * 3600.0, ("127.0.0.1", 22), "me/nanochat:1"
        made = Pod("x", "d20-0a1b2c3d-head", "RUNNING", 20.0, age_s, labels, address, image)
        (row,) = reap.reap(Account(made), False, file, lambda _: None, max_age_h)
        return row

    young = look(47.0)
    assert young.action == "kept" and "may live for 48 h" in young.message
    old = look(49.0)
    assert old.action == "ended" and "older than 48 h (--max-age-h)" in old.message
    file.unlink()
    assert look(49.0, max_age_h=100.0).action == "kept"
    assert look(2.0, max_age_h=1.0).action == "ended"
    file.unlink()
    assert look(9999.0, run="a").message == "has no budget", "as its launcher was told"
    file.unlink()
    reap.note_launch("made", "d20", "x", file, usd_per_hour=20.0, max_usd=1e6)
    assert look(49.0).message == "within its budget"


def test_the_flag_s_default_is_that_of_reap_and_longer_than_every_run() -> None:
    assert build_parser().parse_args(["reap"]).max_age_h == reap.MAX_AGE_H
    said = "".join(path.read_text() for path in (ROOT / "sky").glob("*.yaml"))
    specs = [load_spec(ROOT / name) for name in set(re.findall(r"@(configs/\S+\.toml)", said))]
    assert 40 < max(spec.budget.max_hours or 0.0 for spec in specs) < reap.MAX_AGE_H - 1


def test_a_refusal_is_asked_again_and_then_said(file: Path) -> None:
    assert actions(Account(pod(run="a", max_usd="1"), refuse=2), file) == ["ended"]
    account = Account(pod(run="a", max_usd="1"), refuse=100)
    assert actions(account, file) == ["refused"] and account.there


def test_earlier_pods_count_against_the_next_one(file: Path) -> None:
    now = time.time()
    reap.note_launch("made", "a", "p1", file, usd_per_hour=10.0, born=now - 3590.0)
    reap.note_launch("ended", "a", "p1", file, usd_per_hour=20.0)
    reap.note_launch("made", "b", "p2", file, usd_per_hour=10.0, born=now - 3600.0)
    assert reap.spent_before("a", file) == pytest.approx(20.0, rel=0.01)


def test_pods_that_count_their_cost_themselves_are_left_out(file: Path) -> None:
    for pod_id in ("p1", "p2"):
        born = time.time() - 3590.0
        reap.note_launch("made", "a", pod_id, file, usd_per_hour=10.0, born=born)
    assert reap.spent_before("a", file) == pytest.approx(20.0, rel=0.01)
    assert reap.spent_before("a", file, besides={"p2"}) == pytest.approx(10.0, rel=0.01)


@pytest.mark.parametrize(("raised", "action"), [(20.0, "kept"), (None, "kept"), (9.0, "ended")])
def test_a_later_launch_on_the_same_pod_has_the_word(
    raised: float | None, action: str, file: Path
) -> None:
    """The pod has cost $10."""
    made = Pod(
        "x", "d20-0a1b2c3d-head", "RUNNING", 10.0, 3600.0, {}, ("127.0.0.1", 22), "a/nanochat"
    )
    for most in (5.0, raised):
        reap.note_launch("made", "d20", "x", file, usd_per_hour=10.0, max_usd=most)
    reap.note_launch("seen", "d20", "x", file, usd_per_hour=10.0)
    (row,) = reap.reap(Account(made), False, file, lambda _: None)
    assert (row.max_usd, row.action) == (raised, action)


def test_a_pod_that_vanished_unseen_counts_for_a_quarter_of_an_hour(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reap.note_launch("made", "a", "p1", file, usd_per_hour=36.0, born=time.time())
    tomorrow = time.time() + 86_400.0
    monkeypatch.setattr(time, "time", lambda: tomorrow)
    assert reap.spent_before("a", file) == pytest.approx(reap.GONE_S / 100, rel=0.1)
    reap.note_gone([], file)
    assert reap.spent_before("a", file) == pytest.approx(reap.GONE_S / 100, rel=0.1)


def test_a_price_that_fell_does_not_make_the_past_cheaper(file: Path) -> None:
    reap.note_launch("made", "a", "p", file, usd_per_hour=40.0, max_usd=30.0)
    assert actions(Account(pod(run="a", max_usd="30")), file) == ["ended"]


def test_the_pods_of_a_sweep_are_known_though_the_controller_makes_them(file: Path) -> None:
    """A run of $30 at $20 an hour, whose first pod was lost after an hour."""

    def look(pod_id: str, hours: float, name: str = "d20-8-1-7-0a1b2c3d-head") -> reap.Row:
        where = ("127.0.0.1", 22)
        made = Pod(pod_id, name, "RUNNING", 20.0, 3600.0 * hours, {}, where, "me/nanochat")
        (row,) = reap.reap(Account(made), False, file, lambda _: None)
        return row

    reap.note_expected("d20-8-1-7", "d20-8-1", 30.0, file)
    first = look("p1", 1.0)
    assert (first.run, first.max_usd, first.action) == ("d20-8-1", 30.0, "kept")
    second = look("p2", 0.1)
    assert second.run == "d20-8-1" and second.action == "kept"
    assert second.max_usd == pytest.approx(10.0, abs=0.5)
    assert look("p2", 0.6).action == "ended"
    assert look("p3", 0.1, "d20-8-2-8-0a1b2c3d-head").max_usd is None, "of another launch"
