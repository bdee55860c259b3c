"""`reap`: the stop from outside. Ends what is over its budget, from a laptop or a cron line.

* What is ours is known by the labels that the launcher gave it, by its name, and by the launches
  that this machine remembers; what is not ours is never touched.
* It trusts nobody's ledger: what a pod has cost is its price times its age.
* A refused end is asked for again; what still stands afterwards is said, with exit code 1.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from infra.runpod_api import Pod, ProviderError
from nanochat.rundir import append_jsonl, nanochat_home, read_jsonl

NAME_PREFIX = "nanochat-"
BOOT_S = 1200.0
"""A pod that after this time has no address will not come up: image pulls take minutes."""
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


def spent_before(run: str, file: Path | None = None) -> float:
    """Dollars that earlier pods of a run have cost as far as this machine has seen."""
    born: dict[str, dict[str, Any]] = {}
    usd: dict[str, float] = {}
    for r in read_jsonl(file or launches_file()):
        if r.get("run") != run:
            continue
        pod = str(r.get("pod"))
        if r["event"] == "made":
            born[pod] = r
        elif pod in born:
            hours = max(0.0, r["time"] - born[pod]["time"]) / 3600.0
            price = max(float(born[pod]["usd_per_hour"]), float(r.get("usd_per_hour") or 0.0))
            usd[pod] = max(usd.get(pod, 0.0), hours * price)
    return sum(usd.values())


def cost_of(pod: Pod, now: float) -> float:
    """Dollars a pod has cost at its present price, from the label's birth or what is billed."""
    born = _number(pod.labels.get("born"))
    lived_s = pod.uptime_s if born is None else max(pod.uptime_s, now - born)
    return lived_s / 3600.0 * pod.usd_per_hour


def reap(
    api: Provider,
    dry_run: bool = False,
    file: Path | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Row]:
    """Look once at every pod of ours and end those that must not live.

    Raises ProviderError where the provider does not even list them.
    """
    remembered = {str(r.get("pod")): r for r in read_jsonl(file or launches_file())}
    rows = []
    for pod in api.pods():
        if not (pod.labels or pod.name.startswith(NAME_PREFIX) or pod.id in remembered):
            continue
        made = remembered.get(pod.id, {})
        run = pod.labels.get("run") or str(made.get("run") or pod.name)
        max_usd = _number(pod.labels.get("max_usd"), made.get("max_usd"))
        now = time.time()
        usd = cost_of(pod, now)
        reason = why_end(pod, usd, max_usd, now)
        action, message = "kept", "within its budget" if max_usd else "has no budget that is known"
        if reason is not None:
            action, message = ("would end", reason) if dry_run else _end(api, pod, reason, sleep)
        if action == "ended":
            note_launch("ended", run, pod.id, file, usd_per_hour=pod.usd_per_hour)
        rows.append(Row(pod.id, run, pod.status, round(usd, 4), max_usd, action, message))
    return rows


def why_end(pod: Pod, usd: float, max_usd: float | None, now: float) -> str | None:
    """Why a pod of ours must not live; None where it may."""
    if pod.status != "RUNNING":
        return f"it is {pod.status}, and its disk is still billed"
    if max_usd is not None and usd >= max_usd:
        return f"it has cost ${usd:.2f} of ${max_usd:.2f}"
    until = _number(pod.labels.get("until"))
    if until is not None and now >= until:
        return "its hours are over"
    born = _number(pod.labels.get("born"))
    age_s = max(pod.uptime_s, 0.0 if born is None else now - born)
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
