"""The machines that a task of sky/ asks for: SkyPilot's names of RunPod's, in order, and prices."""

import re
from collections.abc import Iterator
from typing import Any

from infra.hardware import OFFERS
from infra.launch.base import PRICE_MARGIN, Job, LaunchError

RUNPOD_GPUS = {
    "H100": "H100-PCIE",
    "H200-SXM": "H200",
    "A100-80GB-SXM": "A100-80GB",
    "A100-80GB": "A100-80GB-PCIE",
    "RTX4090": "RTX-4090",
}
"""SkyPilot's name of a RunPod GPU -> ours, where they differ."""

SKY_GPUS = {
    "H100-SXM": "H100",
    "H100-PCIE": "H100",
    "A100-40GB": "A100",
    "A100-80GB-PCIE": "A100-80GB",
    "RTX-4090": "RTX4090",
}
"""What SkyPilot calls them on other clouds than RunPod."""

Resources = dict[str, Any]


def rungs_of(resources: Resources) -> Iterator[Resources]:
    """What is asked for, in order, each with what all of them have in common."""
    common = {k: v for k, v in resources.items() if k != "ordered"}
    for rung in resources.get("ordered") or [{}]:
        yield {**common, **rung}


def offer_of(rung: Resources) -> str | None:
    """Our name of a rung's machine: 8xH100-SXM, or cpu; None where it pins no type of RunPod's."""
    kind = str(rung.get("instance_type") or "")
    if re.fullmatch(r"cpu\w+-\d+-\d+", kind):
        return "cpu"
    found = re.fullmatch(r"(\d+)x_(.+)_(?:SECURE|COMMUNITY)", kind)
    return f"{found[1]}x{RUNPOD_GPUS.get(found[2], found[2])}" if found else None


def take_offer(job: Job, resources: Resources) -> None:
    """Ask first for the machine of the plan, which may not be the one of the task's file.

    One that the file does not name is asked for alone. Raises LaunchError where RunPod has no such
    machine.
    """
    wanted = str(job.plan["offer"])
    offers = [offer_of(rung) for rung in rungs_of(resources)]
    if None in offers:
        return  # a task of the user's own, that says in another way what it wants
    if wanted in offers:
        if "ordered" in resources:
            resources["ordered"].sort(key=lambda rung: offer_of(rung) != wanted)
        return
    offer = OFFERS.get(wanted)
    if offer is None or not offer.price_source.startswith("RunPod"):
        raise LaunchError(
            f"the task rents {' or '.join(map(str, offers))}, and the plan is for {wanted}, which "
            "RunPod does not rent (`nanochat plan --on ?` says who rents what): give an offer of "
            "RunPod's, or --task with a file of your own"
        )
    names = {ours: theirs for theirs, ours in RUNPOD_GPUS.items()}
    count, _, gpu = wanted.partition("x")
    resources.pop("ordered", None)
    resources["infra"] = "runpod"
    resources["instance_type"] = f"{count}x_{names.get(gpu, gpu)}_SECURE"
    ceiling, price = resources.get("max_hourly_cost"), rung_usd_per_hour(resources, job)
    if ceiling and price:
        resources["max_hourly_cost"] = min(float(ceiling), round(PRICE_MARGIN * price, 2))


def check_prices(job: Job, resources: Resources) -> None:
    """Raises LaunchError where a rung costs more than the task's max_hourly_cost.

    SkyPilot 0.14.1 compares that with the catalog's prices, but not for a pinned instance type.
    """
    for rung in rungs_of(resources):
        ceiling, price = rung.get("max_hourly_cost"), rung_usd_per_hour(rung, job)
        if ceiling is not None and price is not None and price > float(ceiling):
            raise LaunchError(
                f"{rung['instance_type']} costs ${price:.2f}/h, and max_hourly_cost of the task is "
                f"${float(ceiling):.2f}: take this rung out of the task, or raise max_hourly_cost "
                "(SkyPilot itself does not hold it against a pinned instance_type)"
            )


def rung_usd_per_hour(rung: Resources, job: Job) -> float | None:
    """USD per hour of a rung's machine: the plan's where that is its offer, which may be the spec's
    own price, else the list's; None for a machine that neither knows."""
    offer = offer_of(rung)
    if offer == job.plan["offer"] and float(job.plan["usd_per_hour"]) > 0.0:
        return float(job.plan["usd_per_hour"])
    return OFFERS[offer].usd_per_hour if offer in OFFERS else None


def highest_usd_per_hour(job: Job, resources: Resources) -> float:
    """USD per hour that a machine of the task may cost: its own ceiling, else its dearest rung."""
    if ceiling := float(resources.get("max_hourly_cost") or 0.0):
        return ceiling
    prices = [rung_usd_per_hour(rung, job) or 0.0 for rung in rungs_of(resources)]
    return max(float(job.plan["usd_per_hour"]), *prices)
