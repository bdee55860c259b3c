"""Money and time of a run: what counts, what does not, and that no schedule overspends."""

import math
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.budget import HEARTBEAT_S, TICK_S, Deadlines, fraction_used, spent, time_left_s
from nanochat.spec import Budget


def record(event: str, time: float, usd_per_hour: float = 36.0, **more: Any) -> dict[str, Any]:
    return {"event": event, "time": time, "usd_per_hour": usd_per_hour, "source": "test", **more}


# 36 dollars per hour are a cent per second


def test_nothing_is_spent_before_the_first_start() -> None:
    assert spent([], 1e9) == (0.0, 0.0)


def test_a_run_costs_its_time() -> None:
    lines = [record("start", 0), record("heartbeat", 30), record("stop", 50)]
    assert spent(lines, 1e6) == (pytest.approx(0.5), pytest.approx(50))


def test_a_running_run_is_counted_to_now() -> None:
    assert spent([record("start", 100)], 110) == (pytest.approx(0.1), pytest.approx(10))


def test_records_after_the_moment_asked_for_do_not_count() -> None:
    lines = [record("start", 0), record("heartbeat", 30), record("stop", 60)]
    assert spent(lines, 30)[1] == pytest.approx(30)


def test_a_kill_without_a_stop_costs_one_heartbeat_at_most() -> None:
    lines = [record("start", 0), record("heartbeat", 30), record("start", 10_000)]
    assert spent(lines, 10_000)[1] == pytest.approx(30 + HEARTBEAT_S)


def test_a_billed_instance_costs_its_silence_too() -> None:
    lines = [record("start", 0, instance="pod"), record("start", 10_000, instance="pod")]
    usd, used_s = spent(lines, 10_000)
    assert usd == pytest.approx(100.0)
    assert used_s == pytest.approx(HEARTBEAT_S)


def test_a_billed_instance_costs_its_idle_time_between_two_runs() -> None:
    lines = [
        record("start", 0, instance="pod"),
        record("stop", 100, instance="pod"),
        record("start", 1000, instance="pod"),
    ]
    usd, used_s = spent(lines, 1010)
    assert usd == pytest.approx(10.1)
    assert used_s == pytest.approx(110)


def test_an_instance_whose_end_was_not_seen_is_billed_to_its_next_heartbeat_and_a_tick() -> None:
    lines = [record("start", 0, instance="a"), record("start", 10_000, instance="b")]
    assert HEARTBEAT_S < TICK_S
    assert spent(lines, 10_000)[0] == pytest.approx(2 * TICK_S / 100)


def test_an_instance_that_ended_is_billed_whole_ticks() -> None:
    lines = [
        record("start", 0, instance="a"),
        record("stop", 70, instance="a"),
        record("start", 10_000, instance="b"),
    ]
    assert spent(lines, 10_010)[0] == pytest.approx((120 + 10) / 100)


def test_what_the_launcher_has_seen_counts_where_it_is_more() -> None:
    """A pod that was gone before its supervisor had started is in no ledger."""
    lines = [record("start", 0, instance="b", before_usd=2.0), record("stop", 60, instance="b")]
    assert spent(lines, 60)[0] == pytest.approx(2.6)
    known = [record("start", 0, instance="a"), record("stop", 240, instance="a")]
    later = [record("start", 900, instance="b", before_usd=2.0)]
    assert spent(known + later, 960)[0] == pytest.approx(2.4 + 0.6), "the ledger knew more"
    later[0]["before_usd"] = 3.0
    assert spent(known + later, 960)[0] == pytest.approx(3.0 + 0.6)


def test_boot_time_is_paid() -> None:
    lines = [record("start", 600, instance="pod", billed_from=0)]
    assert spent(lines, 610) == (pytest.approx(6.1), pytest.approx(610))


def test_two_instances_at_a_time_are_both_paid_but_the_time_passes_once() -> None:
    lines = [
        record("start", 0, instance="a"),
        record("heartbeat", 100, instance="a"),
        record("start", 100, instance="b", billed_from=40),
    ]
    usd, used_s = spent(lines, 100)
    assert usd == pytest.approx(1.6 + 0.8), "two minutes and one are billed of the first"
    assert used_s == pytest.approx(100)


def test_boot_time_is_not_paid_twice() -> None:
    lines = [
        record("start", 600, instance="pod", billed_from=0),
        record("stop", 700, instance="pod"),
        record("start", 800, instance="pod", billed_from=0),
    ]
    assert spent(lines, 800)[0] == pytest.approx(8.0)


def test_a_price_rise_counts_from_the_last_record() -> None:
    """When the price rose between two heartbeats is not known; the higher one counts."""
    lines = [record("start", 0, 36.0), record("heartbeat", 30, 72.0)]
    assert spent(lines, 30)[0] == pytest.approx(0.6)
    lines = [record("start", 0, 36.0, instance="p"), record("start", 30, 72.0, instance="p")]
    assert spent(lines, 30)[0] == pytest.approx(0.6)


def test_the_provider_wins_where_it_bills_more() -> None:
    lines = [record("start", 0, instance="p"), record("stop", 100, instance="p", billed_usd=1.5)]
    assert spent(lines, 100)[0] == pytest.approx(1.5)
    lines[1]["billed_usd"] = 0.1
    assert spent(lines, 100)[0] == pytest.approx(1.0)


def test_damaged_lines_are_left_out() -> None:
    lines = [
        record("start", 0),
        {"event": "heartbeat"},
        {"time": 5},
        {"event": "dance", "time": 7},
        {"event": "heartbeat", "time": "noon"},
        {"event": "heartbeat", "time": math.nan},
        record("heartbeat", 10, None),  # type: ignore[arg-type]
    ]
    assert spent(lines, 10)[1] == pytest.approx(10)


def test_a_clock_that_went_back_does_not_pay_back() -> None:
    lines = [record("start", 100), record("heartbeat", 40), record("stop", 130)]
    usd, used_s = spent(lines, 200)
    assert usd >= 0 and used_s >= 0


EVENTS = st.lists(
    st.builds(
        record,
        st.sampled_from(["start", "heartbeat", "stop"]),
        st.floats(0, 1e5, allow_nan=False),
        st.floats(0, 100),
        instance=st.sampled_from([None, "a", "b"]),
    ),
    max_size=12,
)


@given(EVENTS, st.floats(0, 2e5), st.floats(0, 1e4))
def test_spending_never_falls(lines: list[dict[str, Any]], now: float, later_s: float) -> None:
    """Not with time, as long as nothing is added to the ledger."""
    last = max((r["time"] for r in lines), default=0.0)
    now = max(now, last)
    before, after = spent(lines, now), spent(lines, now + later_s)
    assert after[0] >= before[0] - 1e-9
    assert after[1] >= before[1] - 1e-9


@given(EVENTS, st.randoms(use_true_random=False))
def test_order_of_lines_does_not_matter(lines: list[dict[str, Any]], rng: random.Random) -> None:
    unique = list({r["time"]: r for r in lines}.values())
    shuffled = list(unique)
    rng.shuffle(shuffled)
    assert spent(shuffled, 2e5) == pytest.approx(spent(unique, 2e5))


# -- deadlines


def test_no_bound_no_deadline() -> None:
    assert time_left_s(Budget(), [record("start", 0)], 10) is None
    assert Deadlines.of(Budget(), [], 0.0, 5.0) is None


def alive_until(now: float, usd_per_hour: float = 36.0) -> list[dict[str, Any]]:
    """The ledger of a supervisor that has just written its heartbeat."""
    return [record("start", 0, usd_per_hour), record("heartbeat", now, usd_per_hour)]


def test_the_first_bound_ends_the_run() -> None:
    lines = alive_until(600)
    assert time_left_s(Budget(max_hours=1.0), lines, 600) == pytest.approx(3000)
    assert time_left_s(Budget(max_usd=10.0), lines, 600) == pytest.approx(400)
    both = Budget(max_hours=1.0, max_usd=10.0)
    assert time_left_s(both, lines, 600) == pytest.approx(400)
    assert time_left_s(both, alive_until(5000), 5000) == 0.0


def test_a_free_machine_is_bounded_by_hours_alone() -> None:
    lines = alive_until(600, 0.0)
    assert time_left_s(Budget(max_usd=1.0), lines, 600) is None
    assert time_left_s(Budget(max_usd=1.0, max_hours=1.0), lines, 600) == pytest.approx(3000)


def test_money_spent_elsewhere_ends_a_run_on_a_free_machine() -> None:
    lines = [record("start", 0), record("stop", 100), record("start", 200, 0.0)]
    assert time_left_s(Budget(max_usd=0.9), lines, 200) == 0.0


def test_a_clock_that_is_set_back_gives_no_money_back() -> None:
    lines = alive_until(3600)
    for bounds in (Budget(max_hours=2.0), Budget(max_usd=80.0)):
        assert time_left_s(bounds, lines, 1800) == time_left_s(bounds, lines, 3600)


def test_a_line_of_a_clock_that_was_far_ahead_takes_no_money() -> None:
    lines = [*alive_until(3600), record("heartbeat", 5 * 3600)]
    left_s = time_left_s(Budget(max_hours=3.0), lines, 3600)
    assert left_s == pytest.approx(7200)


def test_soft_stop_keeps_the_reserve() -> None:
    found = Deadlines.of(Budget(max_usd=10.0), alive_until(600), 600.0, 120.0)
    assert found == Deadlines(soft_s=pytest.approx(880), hard_s=pytest.approx(1000))
    late = Deadlines.of(Budget(max_usd=10.0), alive_until(990), 990.0, 120.0)
    assert late is not None and late.soft_s == pytest.approx(990)


def test_fraction_used() -> None:
    assert fraction_used(0.0, 100.0) == (0.0, 0.01)
    assert fraction_used(75.0, 25.0) == (pytest.approx(0.75), pytest.approx(0.01))
    assert fraction_used(10.0, -5.0) == (1.0, pytest.approx(0.1))
    assert fraction_used(0.0, 0.0) == (1.0, 0.0)


# -- a hostile world: restarts, kills, hangs, price moves, lost nodes


@dataclass
class World:
    """A provider with a meter of its own, and a supervisor that only writes its ledger.

    One second per tick. The supervisor stops at the hard deadline or when it is killed; between
    two supervisors of one instance the meter runs on.
    """

    rng: random.Random
    budget: Budget
    now: float = 0.0
    meter_usd: float = 0.0
    price: float = 36.0
    instance: int = 0
    lines: list[dict[str, Any]] = field(default_factory=list)

    def write(self, event: str, **more: Any) -> None:
        name = f"pod{self.instance}"
        self.lines.append(record(event, self.now, self.price, instance=name, **more))

    def pass_time(self, seconds: int) -> None:
        self.now += seconds
        self.meter_usd += seconds * self.price / 3600

    def boot(self) -> None:
        self.instance += 1
        born = self.now
        self.pass_time(self.rng.randrange(0, 300))
        self.write("start", billed_from=born)

    def is_over(self) -> bool:
        left = time_left_s(self.budget, self.lines, self.now)
        return left is not None and left <= 0.0

    def live(self, seconds: int) -> bool:
        """Run for a while; False when the supervisor ended the run by itself."""
        for tick in range(seconds):
            if self.is_over():
                self.write("stop")
                return False
            if tick % 30 == 29:
                if self.rng.random() < 0.05:  # seen at once: the price is asked every heartbeat
                    self.price *= self.rng.choice([0.8, 1.25, 2.0])
                self.write("heartbeat")
            self.pass_time(1)
        return True


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.5, 20.0))
def test_no_schedule_overspends(seed: int, max_usd: float) -> None:
    """With a supervisor alive at the end, the meter is at the cap at most, up to what no
    supervisor could see: a boot, a killed node's last heartbeat, and one poll."""
    rng = random.Random(seed)
    world = World(rng, Budget(max_usd=max_usd))
    unseen_usd = 0.0
    for _ in range(200):
        world.boot()
        alive = True
        while alive:
            alive = world.live(rng.randrange(1, 600))
            if not alive:
                break
            fate = rng.random()
            if fate < 0.3:  # the node is lost: its last silence is not in the ledger
                unseen_usd += HEARTBEAT_S * world.price / 3600
                break
            if fate < 0.6:  # the supervisor alone is killed and comes back on the same node
                world.pass_time(rng.randrange(0, 400))
                world.write("start", billed_from=0.0)
            elif fate < 0.7:  # a hang of everything, then life goes on
                world.pass_time(rng.randrange(0, 400))
                world.write("heartbeat")
        if not alive:
            break
        if world.is_over():
            break
    usd, _ = spent(world.lines, world.now)
    # a boot or an absence that began within the budget may end beyond it
    slack = 400 * world.price / 3600 + unseen_usd
    assert world.meter_usd <= usd + unseen_usd + 1e-6, "the ledger knows of every dollar"
    assert world.meter_usd <= max_usd + slack


def test_an_undisturbed_run_ends_at_the_cap() -> None:
    world = World(random.Random(1), Budget(max_usd=5.0))
    world.rng = random.Random(7)
    world.instance = 1
    world.write("start")
    world.rng.random = lambda: 1.0  # type: ignore[method-assign]
    assert not world.live(100_000)
    assert 5.0 - 0.02 <= world.meter_usd <= 5.0 + 0.02
