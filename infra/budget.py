"""Money and time of a run, derived from its ledger alone; no I/O, no clock of its own.

* The ledger is append-only: `start`, `heartbeat` and `stop` of every supervisor that has worked on
  the run, each with the price at that moment. Nothing is stored that can be derived.
* A record may name an `instance`: something that a provider bills while it exists, busy or idle.
  Two records of one instance therefore bound a time that was paid for in full, whatever happened
  in between. Without an instance a silence counts for one heartbeat at most.
* An instance that is gone was billed whole minutes, and one more where its end was not seen.
* What the launcher has seen of earlier instances (`before_usd`) counts where it is more than the
  ledger knows: one that was gone before its supervisor had started has left no line.
* Where the provider has said what it billed (`billed_usd` of an instance), the larger sum counts.
* docs/decisions.md states the bound on overspending and argues it.
"""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nanochat.spec import Budget

HEARTBEAT_S = 30.0
"""Seconds between two heartbeats of a living supervisor."""

TICK_S = 60.0
"""Providers bill every minute that has begun."""

AHEAD_S = 3600.0
"""How far behind the ledger a clock may be for the ledger to be believed."""

Record = Mapping[str, Any]


def spent(records: Iterable[Record], until: float) -> tuple[float, float]:
    """(dollars, seconds) that a run has taken until `until` (Unix time).

    records: ledger lines in any order; lines that are damaged or later than `until` are left out.
    `usd_per_hour` of a line is of all that is billed while the run goes on, the volume included.
    Without new lines neither number ever falls as `until` grows.
    """
    lines = [r for r in records if _is_whole(r) and r["time"] <= until]
    lines.sort(key=lambda r: float(r["time"]))
    derived: dict[str, float] = {}
    billed: dict[str, float] = {}
    lived_s: dict[str, float] = {}
    before_usd: dict[str, float] = {}
    used_s = 0.0
    before: Record | None = None
    for record, following in itertools.zip_longest(lines, lines[1:]):
        instance = str(record.get("instance") or "")
        boot_s, new_s = (0.0, 0.0) if instance in derived else _boot(record, before)
        paid_s, run_s = _interval(record, following, until)
        price = _price(record, following)
        usd = (boot_s * _usd_per_s(record)) + paid_s * price
        derived[instance] = derived.get(instance, 0.0) + usd
        lived_s[instance] = lived_s.get(instance, 0.0) + boot_s + paid_s
        used_s += new_s + run_s
        for told, known in (("billed_usd", billed), ("before_usd", before_usd)):
            if isinstance(record.get(told), int | float):
                known[instance] = max(known.get(instance, 0.0), float(record[told]))
        before = record
    last = {str(r.get("instance") or ""): r for r in lines}
    for instance, record in last.items():
        if instance and record is not lines[-1]:
            rest_s = -lived_s[instance] % TICK_S + (0.0 if record["event"] == "stop" else TICK_S)
            derived[instance] += rest_s * _usd_per_s(record)
    usd = since_usd = 0.0
    for name in reversed(derived):  # from the newest instance to the oldest
        since_usd += max(derived[name], billed.get(name, 0.0))
        usd = max(usd, since_usd + before_usd.get(name, 0.0))
    return usd, used_s


def _boot(record: Record, before: Record | None) -> tuple[float, float]:
    """(seconds, of these not counted yet) that an instance was billed before its first record."""
    if record["event"] != "start" or not isinstance(record.get("billed_from"), int | float):
        return 0.0, 0.0
    born, now = float(record["billed_from"]), float(record["time"])
    counted_to = born if before is None else max(born, float(before["time"]))
    return max(0.0, now - born), max(0.0, now - counted_to)


def _interval(record: Record, following: Record | None, until: float) -> tuple[float, float]:
    """(seconds that are paid, seconds that the run has worked) from a record to the next one."""
    end = until if following is None else float(following["time"])
    gap_s = max(0.0, end - float(record["time"]))
    if record["event"] == "stop":
        return (gap_s if _same(record, following) else 0.0), 0.0
    if following is not None and following["event"] != "start":
        return gap_s, gap_s  # one supervisor lived through all of it
    short_s = min(gap_s, HEARTBEAT_S)
    still_there = bool(record.get("instance")) and following is None
    return (gap_s if still_there or _same(record, following) else short_s), short_s


def _price(record: Record, following: Record | None) -> float:
    """Dollars per second from a record to the next: the higher of the two, where one supervisor
    or one instance links them, since when the price moved is not known."""
    price = _usd_per_s(record)
    if following is not None and (_same(record, following) or following["event"] != "start"):
        return max(price, _usd_per_s(following))
    return price


def _same(a: Record, b: Record | None) -> bool:
    """Whether two records come from one billed instance."""
    return b is not None and bool(a.get("instance")) and a.get("instance") == b.get("instance")


def _usd_per_s(record: Record) -> float:
    return max(0.0, float(record.get("usd_per_hour") or 0.0)) / 3600.0


def _is_whole(record: Record) -> bool:
    try:
        return record["event"] in ("start", "heartbeat", "stop") and math.isfinite(record["time"])
    except (KeyError, TypeError):
        return False


def time_left_s(budget: Budget, records: Iterable[Record], now: float) -> float | None:
    """Seconds from `now` until the first bound of the budget is reached at the present price.

    Zero when it is reached; None where nothing bounds the run. What was written less than AHEAD_S
    before a clock was set back counts all the same.
    """
    lines = [r for r in records if _is_whole(r)]
    newest = max(lines, key=lambda r: float(r["time"]), default=None)
    if newest is not None and now < float(newest["time"]) < now + AHEAD_S:
        now = float(newest["time"])
    usd, used_s = spent(lines, now)
    bounds = []
    if budget.max_hours is not None:
        bounds.append(3600.0 * budget.max_hours - used_s)
    if budget.max_usd is not None:
        price = 0.0 if newest is None else _usd_per_s(newest)
        if price > 0.0:
            bounds.append((budget.max_usd - usd) / price)
        elif usd >= budget.max_usd:
            bounds.append(0.0)
    return max(0.0, min(bounds)) if bounds else None


@dataclass(frozen=True)
class Deadlines:
    """When a run has to stop, as Unix times."""

    soft_s: float
    """From here on what is left is only enough to save, evaluate and report."""
    hard_s: float
    """The budget is spent."""

    @classmethod
    def of(
        cls, budget: Budget, records: Iterable[Record], now: float, reserve_s: float
    ) -> "Deadlines | None":
        """Deadlines at the present price; None where nothing bounds the run."""
        left_s = time_left_s(budget, records, now)
        if left_s is None:
            return None
        return cls(soft_s=now + max(0.0, left_s - reserve_s), hard_s=now + left_s)


def fraction_used(consumed_s: float, left_s: float) -> tuple[float, float]:
    """(share of a stage's horizon that is used, its growth per second), 0 to 1.

    consumed_s: what the stage has had; left_s: what it may still have. Both zero: all is used.
    """
    total_s = max(0.0, consumed_s) + max(0.0, left_s)
    if total_s <= 0.0:
        return 1.0, 0.0
    return max(0.0, consumed_s) / total_s, 1.0 / total_s
