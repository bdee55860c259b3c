"""`reap`: the stop from outside. Ends what is over its budget, from a laptop or a cron line.

* What is ours is known by the labels that the launcher gave it, by its name, by the launches that
  this machine remembers, and where SkyPilot has made it by our image; what is not ours is never
  touched.
* It trusts nobody's ledger: what a pod has cost is its price times its age.
* A plain `sky launch` tells nobody what its run may cost: such a pod may reach an age, and no more.
* A refused end is asked for again; what still stands afterwards is said, with exit code 1.
"""

import math
import re
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from infra.budget import TICK_S
from infra.runpod_api import Pod, ProviderError
from nanochat.rundir import append_jsonl, nanochat_home, read_jsonl

NAME_PREFIX = "nanochat-"
SKYPILOT_NAME = re.compile(r"-[0-9a-f]{8,}-head$")
"""CLUSTER-USERHASH-head; SkyPilot gives its pods no labels."""
CONTROLLER_NAME = re.compile(r"^sky-(jobs|serve)-controller-")
"""A pod in which SkyPilot manages jobs; they may be others than ours: it is named, not ended."""
OUR_IMAGE = re.compile(r"(^|/)nanochat(:|@|$)")
GONE_S = 900.0
"""A pod that vanished unseen counts as alive until that was noticed, or for this time at most: more
than the ten minutes between two looks of a cron line."""
BOOT_S = 1200.0
"""A pod that after this time has no address will not come up: image pulls take minutes."""
EXPECTED = "expected"
"""Event of a launch whose pods are made later, and by somebody else."""
MAX_AGE_H = 48.0
"""Of a pod whose budget nobody here knows; the longest run of sky/*.yaml has 46 hours."""
CONTROLLER = (
    "SkyPilot's controller of managed jobs, which nothing ends by itself: when no job needs it, "
    "end it with sky down and its name in `sky status`, or in the console"
)
ATTEMPTS = 4
RETRY_S = 3.0


class Provider(Protocol):
    """What `reap` needs of a provider; both calls raise ProviderError."""

    def pods(self) -> list[Pod]: ...

    def terminate(self, pod_id: str) -> None: ...


@dataclass(frozen=True)
class Row:
    """One pod of ours, and what was done about it."""

    pod: str
    run: str
    state: str
    usd: float
    max_usd: float | None
    action: str
    """kept | ended | would end | refused"""
    message: str


def launches_file() -> Path:
    """What this machine has launched; append-only."""
    return nanochat_home() / "launches.jsonl"


def note_launch(event: str, run: str, pod: str, file: Path | None = None, **facts: Any) -> None:
    """Remember something of a pod: made, seen, ended. Durable before the next call."""
    file = file or launches_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    record = {"event": event, "run": run, "pod": pod, "time": time.time(), **facts}
    append_jsonl(file, record, durable=True)


def note_expected(cluster: str, run: str, max_usd: float | None, file: Path | None = None) -> None:
    """Remember what pods may cost that SkyPilot's controller will make for a cluster."""
    note_launch(EXPECTED, run, cluster, file, max_usd=max_usd)


def _adopt(pods: Iterable[Pod], file: Path) -> None:
    """Remember the pods that were expected, each with what its run's earlier ones have left."""
    records = list(read_jsonl(file))
    expected = {str(r["pod"]): r for r in records if r.get("event") == EXPECTED}
    known = _lives(records)
    for pod in pods:
        found = expected.get(SKYPILOT_NAME.sub("", pod.name))
        if found is None or pod.id in known:
            continue
        run, most = str(found["run"]), _number(found.get("max_usd"))
        note_launch(
            "made",
            run,
            pod.id,
            file,
            usd_per_hour=pod.usd_per_hour,
            born=time.time() - pod.uptime_s,
            max_usd=None if most is None else max(0.0, most - spent_before(run, file)),
        )


def spent_before(run: str, file: Path | None = None, besides: Collection[str] = ()) -> float:
    """Dollars that pods of a run have cost as far as this machine has seen: whole minutes are
    billed.

    besides: ids of pods that count their cost themselves.
    """
    now = time.time()
    usd = 0.0
    for pod, life in _lives(read_jsonl(file or launches_file())).items():
        if life.run == run and pod not in besides:
            last = life.last if life.is_over else min(now, life.last + GONE_S)
            usd += math.ceil((last - life.born) / TICK_S) * TICK_S / 3600.0 * life.usd_per_hour
    return usd


@dataclass
class Life:
    """What this machine has seen of one pod: the highest price, the bound of its last launch."""

    run: str
    born: float
    last: float
    usd_per_hour: float
    max_usd: float | None
    is_over: bool = False


def _lives(records: Iterable[dict[str, Any]]) -> dict[str, Life]:
    lives: dict[str, Life] = {}
    for r in records:
        if r.get("event") == EXPECTED:
            continue
        pod, price = str(r.get("pod")), float(r.get("usd_per_hour") or 0.0)
        life = lives.setdefault(
            pod,
            Life(str(r.get("run")), r.get("born") or r["time"], r["time"], price, r.get("max_usd")),
        )
        if r.get("event") == "made":  # also of a pod that a list has left out for once
            life.max_usd, life.is_over = r.get("max_usd"), False
        if not life.is_over:
            longest = life.last + GONE_S if r.get("event") == "gone" else r["time"]
            life.last = max(life.last, min(r["time"], longest))
        life.usd_per_hour = max(life.usd_per_hour, price)
        life.is_over = life.is_over or r.get("event") in ("ended", "gone")
    return lives


def cost_of(
    pod: Pod, now: float, highest_usd_per_hour: float = 0.0, born_seen: float | None = None
) -> float:
    """Dollars that a pod has cost at most: its age by its label or as it was seen, or what is
    billed, at the highest price that was seen."""
    hours = _age_s(pod, now, born_seen) / 3600.0
    return hours * max(pod.usd_per_hour, highest_usd_per_hour)


def _age_s(pod: Pod, now: float, born_seen: float | None = None) -> float:
    """Seconds since a pod was born, by its label or as it was seen, or for which it is billed."""
    born = _number(pod.labels.get("born"), born_seen)
    return pod.uptime_s if born is None else max(pod.uptime_s, now - born)


def note_gone(pods: Iterable[Pod], file: Path | None = None) -> None:
    """Remember that pods have vanished, so that their cost no longer grows."""
    there = {pod.id for pod in pods}
    for pod, life in _lives(read_jsonl(file or launches_file())).items():
        if not life.is_over and pod not in there:
            note_launch("gone", life.run, pod, file)


def reap(
    api: Provider,
    dry_run: bool = False,
    file: Path | None = None,
    sleep: Callable[[float], None] = time.sleep,
    max_age_h: float = MAX_AGE_H,
) -> list[Row]:
    """Look once at every pod of ours and end those that must not live.

    max_age_h: most hours of a pod that has neither a label nor a budget that is remembered here.
    Raises ProviderError where the provider does not even list them.
    """
    rows = []
    pods = api.pods()
    note_gone(pods, file)
    _adopt(pods, file or launches_file())
    remembered = _lives(read_jsonl(file or launches_file()))
    for pod in pods:
        if CONTROLLER_NAME.match(pod.name):
            usd = round(cost_of(pod, time.time()), 4)
            rows.append(Row(pod.id, pod.name, pod.status, usd, None, "kept", CONTROLLER))
        if not (is_ours(pod) or pod.id in remembered):
            continue
        life = remembered.get(pod.id)
        run = pod.labels.get("run") or (life.run if life else pod.name)
        max_usd = _number(pod.labels.get("max_usd"), life.max_usd if life else None)
        now = time.time()
        usd = cost_of(pod, now, *((life.usd_per_hour, life.born) if life else ()))
        reason = why_end(pod, usd, max_usd, now)
        action, message = "kept", "within its budget" if max_usd else "has no budget"
        if max_usd is None and not pod.labels:  # a launcher's label would tell of a budget
            message = f"its budget is not known here, so it may live for {max_age_h:g} h"
            if reason is None and _age_s(pod, now, life.born if life else None) > 3600 * max_age_h:
                reason = (
                    f"its budget is not known here, and it is older than {max_age_h:g} h "
                    "(--max-age-h); the last checkpoint is on its volume"
                )
        if reason is not None:
            action, message = ("would end", reason) if dry_run else _end(api, pod, reason, sleep)
        note_launch(
            "ended" if action == "ended" else "seen",
            run,
            pod.id,
            file,
            usd_per_hour=pod.usd_per_hour,
        )
        rows.append(Row(pod.id, run, pod.status, round(usd, 4), max_usd, action, message))
    return rows


def is_ours(pod: Pod) -> bool:
    """Whether the pod itself tells that this kit has asked for it."""
    by_skypilot = SKYPILOT_NAME.search(pod.name) and OUR_IMAGE.search(pod.image)
    return bool(pod.labels or pod.name.startswith(NAME_PREFIX) or by_skypilot)


def why_end(pod: Pod, usd: float, max_usd: float | None, now: float) -> str | None:
    """Why a pod of ours must not live; None where it may."""
    if pod.status != "RUNNING":
        return f"it is {pod.status}, and its disk is still billed"
    if max_usd is not None and usd >= max_usd:
        return f"it has cost ${usd:.2f} of ${max_usd:.2f}"
    until = _number(pod.labels.get("until"))
    if until is not None and now >= until:
        return "its hours are over"
    age_s = _age_s(pod, now)
    if pod.address is None and age_s > BOOT_S:
        return f"it has not come up in {age_s / 60:.0f} min"
    return None


def render(rows: Iterable[Row]) -> str:
    """For a person."""
    lines = []
    for r in rows:
        bound = "" if r.max_usd is None else f" of ${r.max_usd:.2f}"
        lines.append(
            f"{r.run} (pod {r.pod}, {r.state}): ${r.usd:.2f}{bound}; {r.action}: {r.message}"
        )
    return "\n".join(lines) or "no pod of nanochat exists: nothing is billed but volumes"


def to_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    return [asdict(r) for r in rows]


def _end(api: Provider, pod: Pod, reason: str, sleep: Callable[[float], None]) -> tuple[str, str]:
    trouble = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            sleep(RETRY_S)
        try:
            api.terminate(pod.id)
            if all(p.id != pod.id for p in api.pods()):
                return "ended", reason
            trouble = "it is still there"
        except ProviderError as e:
            trouble = str(e)
    return "refused", f"{reason}, but the provider does not end it ({trouble}): reap again"


def _number(*values: Any) -> float | None:
    for value in values:
        try:
            return float(value)
        except (TypeError, ValueError):
            continue
    return None
