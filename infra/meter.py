"""The price that counts: the higher of the quoted one and the one the provider bills now."""

import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from infra.runpod_api import Pod, connect, label, this_pod

ASK_EVERY_S = 60.0


@dataclass(frozen=True)
class Price:
    """Dollars per hour of this machine, and who says so."""

    usd_per_hour: float
    source: str
    instance: str | None = None
    """What a provider bills while it exists, busy or idle."""
    billed_from: float | None = None
    """Unix time since when the instance is billed; None where the provider has not said."""
    before_usd: float = 0.0
    """What earlier instances of the run have cost, as far as its launcher has seen."""
    storage_usd_per_hour: float = 0.0
    """Of the run's share of the volume, which no provider's price of a machine contains."""

    @property
    def all_usd_per_hour(self) -> float:
        """All that is billed while the run goes on: the ledger's price."""
        return self.usd_per_hour + self.storage_usd_per_hour


def ledger_line(price: Price, event: str, now: float) -> dict[str, Any]:
    """A line of ledger.jsonl: `start`, `heartbeat` or `stop` at a Unix time, and what is billed."""
    return {
        "event": event,
        "time": now,
        "usd_per_hour": price.all_usd_per_hour,
        "storage_usd_per_hour": price.storage_usd_per_hour,
        "source": price.source,
        "host": socket.gethostname(),
        "instance": price.instance,
        "billed_from": price.billed_from,
        "before_usd": price.before_usd,
    }


class Meter:
    """Asks the provider for the price of one pod, and never waits for the answer in a run.

    While the API is lost the last answer holds; a price that has once been seen to be lower than
    the quoted one does not lower it.
    """

    def __init__(self, quoted: Price, ask: Callable[[], Pod | None]) -> None:
        self._quoted = quoted
        self._ask = ask
        self._price = quoted

    def __call__(self) -> Price:
        """The price as it is known now."""
        return self._price

    def refresh(self) -> None:
        """Ask once; without an answer nothing changes."""
        try:
            pod = self._ask()
        except Exception:  # whatever the provider does, the run and this thread go on
            return
        if pod is None:
            return
        price = self._price
        if price.billed_from is None and pod.uptime_s > 0.0:
            price = replace(price, billed_from=time.time() - pod.uptime_s)
        billed = pod.usd_per_hour
        if billed > self._quoted.usd_per_hour:
            price = replace(price, usd_per_hour=billed, source="billed by the provider")
        else:
            quoted = self._quoted
            price = replace(price, usd_per_hour=quoted.usd_per_hour, source=quoted.source)
        self._price = price

    def start(self) -> None:
        """Ask now, then once a minute in the background for as long as the process lives."""
        self.refresh()

        def keep_asking() -> None:
            while True:
                time.sleep(ASK_EVERY_S)
                self.refresh()

        threading.Thread(target=keep_asking, daemon=True, name="meter").start()


def meter_of_this_pod(quoted: Price) -> Meter:
    """A meter that asks about the pod this process runs in; elsewhere the quoted price holds."""
    pod_id, api = this_pod(), connect()
    quoted = replace(quoted, instance=pod_id, before_usd=label(os.environ, "BEFORE_USD") or 0.0)
    if pod_id is None or api is None:
        return Meter(quoted, lambda: None)
    meter = Meter(quoted, lambda: api.pod(pod_id))
    meter.start()
    return meter
