"""The planner: a spec and an offer -> what it will take, whether it can work, what else would.

Pure arithmetic on the numbers of scaling.resolve; plan.json of a run is its result, frozen.
"""

import dataclasses
import math
from dataclasses import dataclass, field, replace
from typing import Any

from infra import alternatives, plan_table
from infra.estimates import (
    COMPILE_S,
    START_S,
    CheckpointForecast,
    OtherStage,
    data_tokens,
    forecast_checkpoints,
    other_stages,
)
from infra.hardware import (
    VOLUME_USD_PER_GB_MONTH,
    Offer,
    cpu_offer,
    parse_offer,
    priced,
    world_size,
)
from infra.memory import Layout, Memory, step_memory
from infra.throughput import forward_s, step_time
from nanochat.scaling import (
    GPTConfig,
    StageNumbers,
    divisors,
    flops_per_token,
    gpt_config,
    num_params,
    num_params_matmul,
    resolve_stage,
)
from nanochat.spec import TRAIN_STAGES, RunSpec, SpecError, TrainStage

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
HOURS_PER_MONTH = 730.0


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One training stage; the fields are those of `stages[]` in plan --json."""

    stage: str
    num_steps: int
    total_batch_size: int
    device_batch_size: int
    grad_accum_steps: int
    seq_len: int
    num_tokens: int
    tokens_per_param: float
    epochs: float | None
    flops: float
    tokens_per_s: float
    mfu: float
    hours: float
    usd: float
    memory: Memory

    def to_json(self) -> dict[str, Any]:
        tree = {k: v for k, v in vars(self).items() if k != "memory"}
        tree["epochs"] = None if self.epochs is None else round(self.epochs, 4)
        for name, digits in (("tokens_per_param", 4), ("tokens_per_s", 1), ("mfu", 4)):
            tree[name] = round(tree[name], digits)
        tree["hours"], tree["usd"] = round(self.hours, 5), round(self.usd, 4)
        return {**tree, "memory_gib": self.memory.to_json()}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is derived from a spec and an offer."""

    spec: RunSpec
    offer: Offer
    config: GPTConfig
    layout: Layout
    stages: tuple[StagePlan, ...]
    others: tuple[OtherStage, ...]
    checkpoints: CheckpointForecast
    hours: float
    usd: float
    storage_usd: float
    data_tokens: float | None
    verdict: str
    """ok | warn | refused"""
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    alternatives: tuple[dict[str, Any], ...] = field(default=())

    @property
    def n_params(self) -> int:
        return num_params(self.config)

    @property
    def stop(self) -> dict[str, Any]:
        """What a stop signal leaves: a fresh checkpoint, or the last complete one."""
        fresh = self.checkpoints.save_s < self.spec.stop_grace_s
        return {
            "expect": "fresh checkpoint" if fresh else "last complete checkpoint",
            "save_s": round(self.checkpoints.save_s, 1),
            "stop_grace_s": self.spec.stop_grace_s,
        }

    def to_json(self) -> dict[str, Any]:
        """The document of `plan --json`."""
        return {
            "name": self.spec.name,
            "offer": self.offer.name,
            "n_params": self.n_params,
            "n_params_matmul": num_params_matmul(self.config),
            "usd_per_hour": self.offer.usd_per_hour,
            "price_source": self.offer.price_source,
            "hours": round(self.hours, 4),
            "usd": round(self.usd, 4),
            "storage_usd": round(self.storage_usd, 4),
            "verdict": self.verdict,
            "reasons": list(self.reasons),
            "warnings": list(self.warnings),
            "alternatives": list(self.alternatives),
            "checkpoint_gib": self.checkpoints.to_json(),
            "stages": [s.to_json() for s in self.stages],
            "other_stages": [
                {"stage": o.stage, "hours": round(o.hours, 5), "why": o.why} for o in self.others
            ],
            "world_size": self.layout.world_size,
            "sharding": self.layout.sharding,
            "recompute": self.layout.recompute,
            "device_batch_sizes": {s.stage: s.device_batch_size for s in self.stages},
            "peak_flops": self.offer.peak_flops,
            "peak_source": self.offer.peak_source,
            "data_tokens": self.data_tokens,
            "stop": self.stop,
        }

    def render(self) -> str:
        """A table that a person reads in ten seconds."""
        return plan_table.render(self.to_json(), self.spec)


def make_plan(spec: RunSpec, offer: Offer | None = None, *, look_further: bool = True) -> Plan:
    """Plan a run on an offer (unset: the spec's). Never raises for a run that cannot work: it is
    refused with the reason; `look_further` also looks for runs that could.

    Raises SpecError for an offer or a shape that there is not.
    """
    offer = machine_of(spec, offer or parse_offer(spec.offer))
    config = gpt_config(spec.model)
    try:
        plan = _plan(spec, offer, config)
    except SpecError as e:
        plan = _refused(spec, offer, config, str(e))
    if look_further and plan.verdict != "ok":
        found = alternatives.find(plan, make_plan)
        plan = dataclasses.replace(plan, alternatives=tuple(found))
    return plan


def machine_of(spec: RunSpec, offer: Offer) -> Offer:
    """The offer at the spec's price; its CPU, where the spec trains there."""
    offer = priced(offer, spec.budget.usd_per_hour)
    if spec.runtime.device == "cpu" and not offer.cpu:
        cpu = cpu_offer()
        return replace(
            cpu,
            name=offer.name,
            usd_per_hour=offer.usd_per_hour,
            price_source=offer.price_source,
        )
    return offer


def _plan(spec: RunSpec, offer: Offer, c: GPTConfig) -> Plan:
    layout, chosen = _choose_layout(spec, offer, c)
    others = other_stages(spec, c, layout, offer)
    available = data_tokens(spec)
    budget_s = _budget_s(spec, offer)
    taken_s = 3600 * sum(o.hours for o in others)
    save_s = forecast_checkpoints(spec, c, layout, offer, [0.0]).stall_s
    stages: list[StagePlan] = []
    open_numbers: list[tuple[StageNumbers, Memory]] = []
    for numbers, memory in chosen:
        if numbers.num_steps is None:
            open_numbers.append((numbers, memory))
            continue
        stage = _stage_plan(spec, offer, c, layout, numbers, memory, available, save_s)
        stages.append(stage)
        taken_s += 3600 * stage.hours
    for numbers, memory in open_numbers:
        left_s = (budget_s or 0.0) - taken_s
        numbers = replace(numbers, num_steps=_steps_within(spec, offer, c, layout, numbers, left_s))
        stages.append(_stage_plan(spec, offer, c, layout, numbers, memory, available, save_s))
    stages.sort(key=lambda s: TRAIN_STAGES.index(s.stage))
    hours = sum(o.hours for o in others) + sum(s.hours for s in stages)
    checkpoints = forecast_checkpoints(spec, c, layout, offer, [s.hours for s in stages])
    storage_usd = 0.0
    if not offer.cpu and offer.usd_per_hour > 0:
        months = hours / HOURS_PER_MONTH
        storage_usd = checkpoints.kept / 1e9 * VOLUME_USD_PER_GB_MONTH * months
    plan = Plan(
        spec=spec,
        offer=offer,
        config=c,
        layout=layout,
        stages=tuple(stages),
        others=tuple(others),
        checkpoints=checkpoints,
        hours=hours,
        usd=hours * offer.usd_per_hour + storage_usd,
        storage_usd=storage_usd,
        data_tokens=available,
        verdict="ok",
    )
    return _judged(plan)


def _refused(spec: RunSpec, offer: Offer, c: GPTConfig, reason: str) -> Plan:
    layout = _layout(spec, offer, fsdp=False, recompute=False)
    return Plan(
        spec=spec,
        offer=offer,
        config=c,
        layout=layout,
        stages=(),
        others=(),
        checkpoints=forecast_checkpoints(spec, c, layout, offer, []),
        hours=0.0,
        usd=0.0,
        storage_usd=0.0,
        data_tokens=None,
        verdict="refused",
        reasons=(reason,),
    )


# -- layout and device batch


def _layout(spec: RunSpec, offer: Offer, *, fsdp: bool, recompute: bool) -> Layout:
    bf16 = spec.runtime.dtype == "bf16" or (spec.runtime.dtype == "auto" and not offer.cpu)
    return Layout(
        world_size=spec.runtime.num_ranks or world_size(offer),
        fsdp=fsdp,
        recompute=recompute,
        compiled=spec.runtime.compile,
        itemsize=2 if bf16 else 4,
        cpu=offer.cpu,
    )


def _choose_layout(
    spec: RunSpec, offer: Offer, c: GPTConfig
) -> tuple[Layout, list[tuple[StageNumbers, Memory]]]:
    """The fastest layout in which every training stage fits, with the largest device batches.

    Where none fits, the leanest one, so that its memory can be shown. Raises SpecError where a
    batch cannot be cut as asked.
    """
    names = [name for name in TRAIN_STAGES if getattr(spec, name) is not None]
    best: tuple[float, Layout, list[tuple[StageNumbers, Memory]]] | None = None
    for layout in _layouts(spec, offer):
        chosen = [_fit_stage(spec, offer, c, layout, name) for name in names]
        token_s = sum(
            step_time(c, layout, offer, n.device_batch_size, n.grad_accum_steps).total_s
            / n.total_batch_size
            for n, _ in chosen
        )
        cost = (0.0 if all(m.fits for _, m in chosen) else math.inf) or token_s
        if best is None or cost < best[0] or (math.isinf(cost) and math.isinf(best[0])):
            best = (cost, layout, chosen)
    assert best is not None
    return best[1], best[2]


def _layouts(spec: RunSpec, offer: Offer) -> list[Layout]:
    """Candidates, the roomiest first."""
    wanted = spec.runtime.sharding
    alone = (spec.runtime.num_ranks or world_size(offer)) == 1
    kinds = [False, True] if wanted == "auto" else [wanted == "fsdp"]
    if alone and wanted == "auto":
        kinds = [False]
    return [
        _layout(spec, offer, fsdp=fsdp, recompute=recompute)
        for fsdp in kinds
        for recompute in (False, True)
    ]


def _fit_stage(
    spec: RunSpec, offer: Offer, c: GPTConfig, layout: Layout, name: str
) -> tuple[StageNumbers, Memory]:
    """Numbers with the largest device batch that fits; with one row where none does."""
    stage: TrainStage = getattr(spec, name)
    first = resolve_stage(spec, name, layout.world_size)
    sizes = [first.device_batch_size]
    if stage.device_batch_size == "auto":
        rows_per_rank = first.rows_per_step // layout.world_size
        most = first.device_batch_size if offer.cpu else rows_per_rank
        sizes = [d for d in divisors(rows_per_rank) if d <= most]
    for rows in sorted(sizes, reverse=True):
        memory = step_memory(c, layout, rows, offer)
        if memory.fits:
            break
    return resolve_stage(spec, name, layout.world_size, rows), memory


# -- time and money


def _budget_s(spec: RunSpec, offer: Offer) -> float | None:
    """Seconds that the budget allows on this offer; None where nothing bounds the run."""
    bounds = []
    if spec.budget.max_hours is not None:
        bounds.append(3600 * spec.budget.max_hours)
    if spec.budget.max_usd is not None and offer.usd_per_hour > 0:
        bounds.append(3600 * spec.budget.max_usd / offer.usd_per_hour)
    return min(bounds) if bounds else None


def _seconds(
    spec: RunSpec,
    offer: Offer,
    c: GPTConfig,
    layout: Layout,
    numbers: StageNumbers,
    num_steps: int,
    save_s: float,
) -> tuple[float, float]:
    """(seconds of one step, seconds of the stage) with start, compile, evaluation and saves."""
    stage: TrainStage = getattr(spec, numbers.stage)
    step_s = step_time(
        c, layout, offer, numbers.device_batch_size, numbers.grad_accum_steps
    ).total_s
    looks = math.ceil(num_steps / stage.eval_every_steps) + 1
    eval_s = looks * forward_s(c, layout, offer, _eval_tokens(spec, stage))
    start_s = START_S + (COMPILE_S[offer.cpu] if layout.compiled else 0.0)
    train_s = num_steps * step_s + eval_s
    saves = train_s / spec.budget.checkpoint_every_s + looks
    return step_s, start_s + train_s + saves * save_s


def _eval_tokens(spec: RunSpec, stage: TrainStage) -> float:
    """Validation tokens of one look: no more than the validation split has."""
    tokens = data_tokens(spec)
    if tokens is None or spec.data.source == "fineweb_edu":
        return stage.eval_tokens
    held_out = tokens * spec.data.val_fraction / (1 - spec.data.val_fraction)
    return min(stage.eval_tokens, held_out)


def _steps_within(
    spec: RunSpec,
    offer: Offer,
    c: GPTConfig,
    layout: Layout,
    numbers: StageNumbers,
    left_s: float,
) -> int:
    """Most steps of a stage that fit in so many seconds, at least one (by bisection)."""
    save_s = forecast_checkpoints(spec, c, layout, offer, [0.0]).stall_s
    low, high = 1, 2
    while _seconds(spec, offer, c, layout, numbers, high, save_s)[1] <= left_s:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        fits = _seconds(spec, offer, c, layout, numbers, middle, save_s)[1] <= left_s
        low, high = (middle, high) if fits else (low, middle)
    return low


def _stage_plan(
    spec: RunSpec,
    offer: Offer,
    c: GPTConfig,
    layout: Layout,
    numbers: StageNumbers,
    memory: Memory,
    available: float | None,
    save_s: float,
) -> StagePlan:
    assert numbers.num_steps is not None and numbers.num_tokens is not None
    step_s, stage_s = _seconds(spec, offer, c, layout, numbers, numbers.num_steps, save_s)
    tokens_per_s = numbers.total_batch_size / step_s
    per_token = flops_per_token(c)
    stage = getattr(spec, numbers.stage)
    if numbers.stage == "base_train":
        epochs = numbers.num_tokens / available if available else None
    else:
        epochs = float(stage.num_epochs) if stage.num_epochs else None
    return StagePlan(
        stage=numbers.stage,
        num_steps=numbers.num_steps,
        total_batch_size=numbers.total_batch_size,
        device_batch_size=numbers.device_batch_size,
        grad_accum_steps=numbers.grad_accum_steps,
        seq_len=numbers.seq_len,
        num_tokens=numbers.num_tokens,
        tokens_per_param=numbers.num_tokens / num_params(c),
        epochs=epochs,
        flops=float(per_token * numbers.num_tokens),
        tokens_per_s=tokens_per_s,
        mfu=tokens_per_s * per_token / (offer.peak_flops * layout.world_size),
        hours=stage_s / 3600,
        usd=stage_s / 3600 * offer.usd_per_hour,
        memory=memory,
    )


# -- verdict


def _judged(plan: Plan) -> Plan:
    """The plan with its verdict, reasons for a refusal, and warnings."""
    reasons = [*_does_not_fit(plan), *_over_budget(plan)]
    warnings = _warnings(plan)
    verdict = "refused" if reasons else "warn" if warnings else "ok"
    return replace(plan, verdict=verdict, reasons=(*reasons, *warnings), warnings=tuple(warnings))


def _does_not_fit(plan: Plan) -> list[str]:
    return [
        f"{s.stage} does not fit: {s.memory.total / 2**30:.1f} GiB per device at "
        f"{s.device_batch_size} rows ({plan.layout.sharding}"
        f"{', recomputed' if plan.layout.recompute else ''}), {plan.offer.name} has "
        f"{s.memory.available / 2**30:.1f} GiB to use"
        for s in plan.stages
        if not s.memory.fits
    ]


def _over_budget(plan: Plan) -> list[str]:
    budget, found = plan.spec.budget, []
    slack = CPU_SLACK if plan.offer.cpu else 1.0001
    if budget.max_usd is not None and plan.usd > budget.max_usd * slack:
        found.append(
            f"costs more than the budget: about ${plan.usd:,.2f}, budget.max_usd is "
            f"${budget.max_usd:,.2f}"
        )
    if budget.max_hours is not None and plan.hours > budget.max_hours * slack:
        found.append(
            f"cannot finish: about {plan.hours:.1f} h, budget.max_hours is {budget.max_hours:g}"
        )
    return found


def _warnings(plan: Plan) -> list[str]:
    found = []
    base = next((s for s in plan.stages if s.stage == "base_train"), None)
    budget = plan.spec.budget
    is_horizon = base is not None and getattr(plan.spec.base_train, "horizon", None) == "budget"
    if base is not None and not plan.offer.cpu and base.tokens_per_param < FEW_TOKENS:
        found.append(
            f"{base.tokens_per_param:.2f} tokens per parameter; {COMPUTE_OPTIMAL:.0f} is "
            "compute-optimal: a smaller model would be better for the same money"
        )
    if base is not None and base.epochs is not None and base.epochs > MANY_EPOCHS:
        found.append(
            f"{base.epochs:.0f} passes over {plan.data_tokens or 0:.2g} tokens: overfitting is "
            "likely after about 4; keep early stopping, dropout and weight decay on, or bring more "
            "text"
        )
    if base is not None and plan.data_tokens is None:
        found.append(
            f"data.path = {plan.spec.data.path!r} is not on this machine, so the passes over it "
            f"are unknown; {base.num_tokens / MANY_EPOCHS:.2g} tokens would make four"
        )
    for name, used, most in (
        ("max_usd", plan.usd, budget.max_usd),
        ("max_hours", plan.hours, budget.max_hours),
    ):
        if most is not None and not is_horizon and used > TIGHT * most:
            found.append(f"tight: about {used:.3g} of budget.{name} = {most:g}")
    if plan.stop["expect"] != "fresh checkpoint" and not plan.offer.cpu:
        found.append(
            f"a stop leaves the last complete checkpoint: a save takes about "
            f"{plan.stop['save_s']:.0f} s, stop_grace_s is {plan.spec.stop_grace_s:g}"
        )
    return found
