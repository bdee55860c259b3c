"""Runs near a plan that warns or is refused: another offer, a smaller model, another config."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.hardware import OFFERS, Offer
from nanochat.scaling import gpt_config
from nanochat.spec import RunSpec, SpecError, load_spec

if TYPE_CHECKING:
    from infra.planner import Plan

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SENSIBLE = ("d32_1000usd", "d24", "d20")
"""Shipped runs that train to the compute-optimal point, the largest first."""
MOST = 4

MakePlan = Callable[..., "Plan"]


def find(plan: "Plan", make_plan: MakePlan) -> list[dict[str, Any]]:
    """At most four alternatives that are not refused, as `alternatives[]` of plan --json."""
    spec, offer = plan.spec, plan.offer
    if offer.cpu:
        found = _smaller(plan, make_plan) if plan.verdict == "refused" else []
        return found[:MOST]
    found = _shipped(plan, make_plan)
    if plan.verdict == "refused":
        found += _smaller(plan, make_plan)[:1]
        found += _other_offers(spec, offer, make_plan)
    return found[:MOST]


def _entry(config: str, plan: "Plan", why: str) -> dict[str, Any]:
    return {
        "config": config,
        "n_params": plan.n_params,
        "hours": round(plan.hours, 2),
        "usd": round(plan.usd, 2),
        "why": why,
    }


def _shipped(plan: "Plan", make_plan: MakePlan) -> list[dict[str, Any]]:
    """The largest shipped run of another model that this budget pays for."""
    most = plan.spec.budget.max_usd or plan.usd or None
    for name in SENSIBLE:
        if name == plan.spec.name or not (CONFIGS / f"{name}.toml").exists():
            continue
        other = _plan_of(name, make_plan)
        if other.verdict == "refused" or other.n_params >= plan.n_params:
            continue
        if most is None or other.usd <= most:
            ratio = next((s.tokens_per_param for s in other.stages), 0.0)
            why = f"{other.n_params / 1e9:.2g} B parameters at {ratio:.0f} tokens each"
            return [_entry(f"configs/{name}.toml", other, f"{why} on {other.offer.name}")]
    return []


@functools.cache
def _plan_of(name: str, make_plan: MakePlan) -> "Plan":
    return make_plan(load_spec(CONFIGS / f"{name}.toml"), look_further=False)


def _smaller(plan: "Plan", make_plan: MakePlan) -> list[dict[str, Any]]:
    """The largest smaller depth that works on the same offer, by bisection: a deeper model takes
    more memory, time and money."""
    spec, best = plan.spec, None
    depths = [d for d in range(1, spec.model.depth) if (d <= 8 or d % 2 == 0) and _has(spec, d)]
    while depths:
        depth = depths[len(depths) // 2]
        other = _try(_of_depth(spec, depth), plan.offer, make_plan)
        if other is not None:
            best = other
        depths = [d for d in depths if (d > depth if other is not None else d < depth)]
    if best is None:
        return []
    config = f"{spec.name} model.depth={best.config.n_layer}"
    return [_entry(config, best, f"the largest depth that works on {plan.offer.name}")]


def _of_depth(spec: RunSpec, depth: int) -> RunSpec:
    return spec.model_copy(update={"model": spec.model.model_copy(update={"depth": depth})})


def _has(spec: RunSpec, depth: int) -> bool:
    """Whether the spec's heads allow a depth."""
    try:
        gpt_config(_of_depth(spec, depth).model)
    except SpecError:
        return False
    return True


def _other_offers(spec: RunSpec, offer: Offer, make_plan: MakePlan) -> list[dict[str, Any]]:
    """The same spec on more or fewer of these GPUs, or as many others; the cheapest first."""
    if spec.budget.usd_per_hour is not None:
        return []
    near = [
        candidate
        for candidate in OFFERS.values()
        if (candidate.gpu == offer.gpu) != (candidate.count == offer.count)
    ]
    plans = [p for candidate in near if (p := _try(spec, candidate, make_plan)) is not None]
    plans.sort(key=lambda p: p.usd)
    return [
        _entry(f'{spec.name} offer="{p.offer.name}"', p, f"the same run on {p.offer.name}")
        for p in plans[:2]
    ]


@functools.lru_cache(maxsize=512)
def _try(spec: RunSpec, offer: Offer, make_plan: MakePlan) -> "Plan | None":
    """The plan where it is not refused; a spec that is refused on many offers is tried on the same
    few again and again."""
    try:
        plan = make_plan(spec, offer, look_further=False)
    except SpecError:
        return None
    return None if plan.verdict == "refused" else plan
