"""The price that counts is the higher one, and a lost API changes nothing."""

from dataclasses import replace

import pytest

from infra import meter
from infra.meter import Meter, Price
from infra.runpod_api import Pod, ProviderError

QUOTED = Price(20.0, "plan", "p")


class Provider:
    """Answers with a price; None: the API is lost."""

    def __init__(self, usd_per_hour: float | None) -> None:
        self.usd_per_hour = usd_per_hour
        self.is_gone = False

    def ask(self) -> Pod | None:
        if self.usd_per_hour is None:
            raise ProviderError("timed out")
        return None if self.is_gone else Pod("p", "", "RUNNING", self.usd_per_hour, 60.0, {})


def test_the_higher_of_quoted_and_billed_counts() -> None:
    provider = Provider(19.0)
    asked = Meter(QUOTED, provider.ask)
    asked.refresh()
    assert (asked().usd_per_hour, asked().source) == (20.0, "plan")
    provider.usd_per_hour = 25.0
    asked.refresh()
    assert (asked().usd_per_hour, asked().source) == (25.0, "billed by the provider")


def test_the_volume_counts_on_top_of_whichever_price_is_higher() -> None:
    provider = Provider(19.0)
    asked = Meter(replace(QUOTED, storage_usd_per_hour=0.03), provider.ask)
    for billed, counts in ((19.0, 20.03), (25.0, 25.03), (21.0, 21.03)):
        provider.usd_per_hour = billed
        asked.refresh()
        assert asked().all_usd_per_hour == pytest.approx(counts)


def test_while_the_api_is_lost_or_the_pod_is_not_listed_the_last_answer_holds() -> None:
    provider = Provider(25.0)
    asked = Meter(QUOTED, provider.ask)
    asked.refresh()
    provider.usd_per_hour = None
    asked.refresh()
    assert asked().usd_per_hour == 25.0
    provider.usd_per_hour, provider.is_gone = 99.0, True
    asked.refresh()
    assert asked().usd_per_hour == 25.0


def test_whatever_the_provider_raises_the_last_answer_holds() -> None:
    def ask() -> Pod | None:
        raise RuntimeError("of a kind that nobody thought of")

    asked = Meter(QUOTED, ask)
    asked.refresh()
    assert asked() == QUOTED


def test_the_moment_from_which_the_pod_is_billed_is_taken_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    asked = Meter(QUOTED, Provider(20.0).ask)
    assert asked().billed_from is None
    asked.refresh()
    now[0] = 5000.0
    asked.refresh()
    assert asked().billed_from == 940.0


def test_off_a_pod_the_quoted_price_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNPOD_POD_ID", raising=False)
    made = meter.meter_of_this_pod(QUOTED)
    assert made() == Price(20.0, "plan", None)
