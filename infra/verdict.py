"""What is wrong with a plan, and what a person should know before paying for it."""

from typing import TYPE_CHECKING

from infra.estimates import LESS_SPACE, volume_gib
from infra.hardware import GIB

if TYPE_CHECKING:
    from infra.planner import Plan

COMPUTE_OPTIMAL = 20.0
"""Tokens per parameter (Hoffmann et al. 2022)."""
FEW_TOKENS = 5.0
MANY_EPOCHS = 4.0
"""Passes after which repeated text teaches clearly less (Muennighoff et al. 2023)."""
TIGHT = 0.85
"""Share of a budget above which a plan warns: the time model is good to about ten percent."""
CPU_SLACK = 5.0
"""How far over its budget a plan on a CPU must be to be refused: its speed depends on what else
runs, and the run itself stops at the budget with everything saved."""
GPU_SLACK = 1.0001
"""A horizon that is the budget ends there up to rounding."""


def refusals(plan: "Plan") -> list[str]:
    """Why the run cannot work; empty where it can."""
    return [
        *_too_many_ranks(plan),
        *_does_not_fit(plan),
        *_over_budget(plan),
        *_volume_too_small(plan),
    ]


def warnings(plan: "Plan") -> list[str]:
    """What could go wrong, or could be had better for the same money."""
    return [*_learning(plan), *_tight(plan), *_stopping(plan), *_single_copy(plan)]


def _too_many_ranks(plan: "Plan") -> list[str]:
    """A rank has a GPU of its own."""
    ranks, nodes = plan.layout.world_size, plan.spec.slurm.nodes
    if plan.offer.cpu or ranks <= nodes * plan.offer.count:
        return []
    there = f"{nodes} nodes of {plan.offer.name} have" if nodes > 1 else f"{plan.offer.name} has"
    return [f"runtime.num_ranks = {ranks}: {there} {nodes * plan.offer.count} GPUs, one per rank"]


def _does_not_fit(plan: "Plan") -> list[str]:
    layout = plan.layout
    how = f"{layout.sharding}{', blocks recomputed' if layout.recompute else ''}"
    return [
        f"{s.stage} does not fit: {s.memory.total / GIB:.1f} GiB per device at "
        f"{s.device_batch_size} rows ({how}), {plan.offer.name} has "
        f"{s.memory.available / GIB:.1f} GiB to use"
        for s in plan.stages
        if not s.memory.fits
    ]


def _over_budget(plan: "Plan") -> list[str]:
    budget, found = plan.spec.budget, []
    slack = CPU_SLACK if plan.offer.cpu else GPU_SLACK
    if budget.max_usd is not None and plan.usd > slack * budget.max_usd:
        found.append(
            f"costs more than the budget: about ${plan.usd:,.2f}, budget.max_usd is "
            f"${budget.max_usd:,.2f}"
        )
    if budget.max_hours is not None and plan.hours > slack * budget.max_hours:
        found.append(
            f"cannot finish: about {plan.hours:.1f} h, budget.max_hours is {budget.max_hours:g}"
        )
    return found


def _volume_too_small(plan: "Plan") -> list[str]:
    if plan.free_gib is None or not plan.stages:
        return []
    need_gib, of_what = volume_gib(plan.spec, plan.checkpoints, plan.data_bytes)
    if need_gib <= plan.free_gib:
        return []
    return [
        f"volume too small: {plan.free_gib:.1f} GiB free, {need_gib:.1f} needed ({of_what}); "
        f"{LESS_SPACE}"
    ]


def _learning(plan: "Plan") -> list[str]:
    base = next((s for s in plan.stages if s.stage == "base_train"), None)
    if base is None:
        return []
    found = []
    if not plan.offer.cpu and base.tokens_per_param < FEW_TOKENS:
        found.append(
            f"{base.tokens_per_param:.2g} tokens per parameter, {COMPUTE_OPTIMAL:.0f} are "
            "compute-optimal: a smaller model would learn more for the same money"
        )
    if base.epochs is not None and base.epochs > MANY_EPOCHS:
        found.append(
            f"{base.epochs:.0f} passes over {plan.data_tokens or 0:.2g} tokens: expect overfitting "
            "after about 4; keep early stopping and dropout on, or bring more text"
        )
    if plan.data_tokens is None:
        found.append(
            f"data.path = {plan.spec.data.path!r} is not on this machine, so the number of passes "
            f"is unknown: {base.num_tokens / MANY_EPOCHS:.2g} tokens would make 4"
        )
    return found


def _tight(plan: "Plan") -> list[str]:
    budget = plan.spec.budget
    if plan.spec.base_train is not None and plan.spec.base_train.horizon == "budget":
        return []
    slack = CPU_SLACK if plan.offer.cpu else GPU_SLACK
    bounds = (("max_usd", plan.usd, budget.max_usd), ("max_hours", plan.hours, budget.max_hours))
    return [
        f"tight: about {used:.3g} of budget.{name} = {most:g}; the estimate is good to 10 percent"
        for name, used, most in bounds
        if most is not None and TIGHT * most < used <= slack * most
    ]


def _stopping(plan: "Plan") -> list[str]:
    if plan.offer.cpu or plan.stop["expect"] == "fresh checkpoint":
        return []
    return [
        f"a stop signal leaves the last complete checkpoint: a save takes about "
        f"{plan.stop['save_s']:.0f} s, stop_grace_s is {plan.spec.stop_grace_s:g}"
    ]


def _single_copy(plan: "Plan") -> list[str]:
    """Where one damaged file can cost a whole stage."""
    policy = plan.spec.checkpoint
    older_are_full = not policy.thin_old and (policy.keep_best or policy.keep_every_h is not None)
    if not plan.stages or policy.keep_last > 1 or older_are_full:
        return []
    return [
        "a stage has one checkpoint to go on from (checkpoint.keep_last = 1), and starts over if "
        f"that is damaged; keep_last = 2 takes {plan.checkpoints.each / GIB:.3g} GiB more"
    ]
