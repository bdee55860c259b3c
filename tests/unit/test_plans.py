"""Every shipped config planned for every offer, as `plan` would: none crashes, all in 2 s."""

import subprocess
import sys
import time
from pathlib import Path

from infra.hardware import OFFERS, Offer, parse_offer
from infra.planner import Plan, make_plan
from nanochat.spec import load_spec

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
LIMIT_S = 2.0
"""Of CPU for all plans with their alternatives and their documents (issue F). The measurement of
this machine's CPU, a fixed time of its own, comes before."""
ATTEMPTS = 5
"""A neighbour on the same core makes CPU seconds longer: the best of these counts."""


def all_offers() -> list[Offer]:
    return [*OFFERS.values(), parse_offer("cpu")]


def make_all(offers: list[Offer]) -> list[Plan]:
    """Every plan, with its document made."""
    specs = [load_spec(path) for path in CONFIGS]
    plans = [make_plan(spec, offer) for spec in specs for offer in offers]
    for plan in plans:
        assert plan.to_json()["verdict"] == plan.verdict
    return plans


def test_every_config_on_every_offer_says_why() -> None:
    offers = all_offers()
    plans = make_all(offers)
    assert len(plans) == len(CONFIGS) * len(offers)
    for plan in plans:
        assert plan.verdict in ("ok", "warn", "refused")
        assert plan.verdict == "ok" or plan.reasons
        assert plan.spec.name in plan.render().splitlines()[0]
        for other in plan.alternatives:
            assert other["usd"] >= 0 and other["why"]


def test_every_config_on_every_offer_in_two_seconds() -> None:
    """In a process of its own as `plan` is, with nothing of an earlier plan at hand."""
    taken_s: list[float] = []
    while len(taken_s) < ATTEMPTS and min(taken_s, default=LIMIT_S) >= LIMIT_S:
        timed = [sys.executable, "-m", "tests.unit.test_plans"]
        taken = subprocess.run(timed, cwd=ROOT, check=True, capture_output=True, text=True)
        taken_s.append(float(taken.stdout))
    assert min(taken_s) < LIMIT_S, taken_s


if __name__ == "__main__":
    offers = all_offers()
    started_s = time.process_time()
    make_all(offers)
    print(time.process_time() - started_s)
