"""The planner: a spec and an offer -> what it will take, whether it can work, what else would.

Pure arithmetic on the numbers of scaling.resolve; plan.json of a run is its result, frozen.
"""

import math
import sys
from dataclasses import dataclass, replace
from typing import Any

from infra import alternatives, plan_table, verdict
from infra.estimates import (
    COMPILE_S,
    START_S,
    CheckpointForecast,
    OtherStage,
    data_bytes,
    data_tokens,
    forecast_checkpoints,
    other_stages,
    validation_tokens,
)
from infra.hardware import VOLUME_USD_PER_GB_MONTH, Offer, cpu_offer, parse_offer, priced
from infra.layout import choose_layout, make_layout, num_ranks
from infra.memory import Layout, Memory
from infra.throughput import forward_s, step_time
from nanochat.scaling import (
    GPTConfig,
    StageNumbers,
    flops_per_token,
    gpt_config,
    num_params,
    num_params_matmul,
)
from nanochat.spec import TRAIN_STAGES, WEIGHT_STAGES, RunSpec, SpecError, TrainStage
from nanochat.touches import source_facts

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
    """One pass over the base data; None where the text is not on this machine."""
    data_bytes: float
    """What the run puts on the volume beside its checkpoints; 0 where its space is not known."""
    free_gib: float | None
    """Free space on the volume; None where that is another machine's."""
    verdict: str = "ok"
    """ok | warn | refused"""
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    alternatives: tuple[dict[str, Any], ...] = ()

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
            "storage_usd_per_hour": round(self.storage_usd / self.hours if self.hours else 0.0, 6),
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
            "data": [dict(vars(facts)) for facts in source_facts(self.spec)],
            "stop": self.stop,
        }

    def render(self) -> str:
        """A table that a person reads in ten seconds."""
        return plan_table.render(self.to_json(), self.spec)


def make_plan(
    spec: RunSpec,
    offer: Offer | None = None,
    *,
    free_gib: float | None = None,
    look_further: bool = True,
) -> Plan:
    """Plan a run on an offer (unset: the spec's).

    free_gib: free space on the volume, where that is known. A run that cannot work
    is no error but refused, with the reason; `look_further` then looks for runs that can.
    Raises SpecError for an offer or a model shape that there is not.
    """
    offer = machine_of(spec, offer or parse_offer(spec.offer))
    config = gpt_config(spec.model)
    try:
        plan = _judged(_priced(_Sketch(spec, offer, config), free_gib))
    except SpecError as e:
        plan = _refused(spec, offer, config, str(e))
    if look_further and plan.verdict != "ok":
        plan = replace(plan, alternatives=tuple(alternatives.find(plan, make_plan)))
    return plan


def machine_of(spec: RunSpec, offer: Offer) -> Offer:
    """The offer at the spec's price; its CPU where the spec trains there, shared by the ranks."""
    offer = priced(offer, spec.budget.usd_per_hour)
    if spec.runtime.device == "cpu" and not offer.cpu:
        offer = replace(
            cpu_offer(),
            name=offer.name,
            usd_per_hour=offer.usd_per_hour,
            price_source=offer.price_source,
        )
    ranks = num_ranks(spec, offer)
    if not offer.cpu or ranks == 1:
        return offer
    return replace(
        offer,
        memory_gib=offer.memory_gib / ranks,
        peak_flops=offer.peak_flops / ranks,
        matmul_flops=offer.matmul_flops / ranks,
        attention_flops=offer.attention_flops / ranks,
        memory_bytes_per_s=offer.memory_bytes_per_s / ranks,
    )


class _Sketch:
    """A spec on an offer in its chosen layout: what all stages of one plan share.

    Raises SpecError where a batch cannot be cut as asked.
    """

    def __init__(self, spec: RunSpec, offer: Offer, config: GPTConfig) -> None:
        self.spec, self.offer, self.config = spec, offer, config
        self.layout, self.fitted = choose_layout(spec, offer, config)
        self.others = other_stages(spec, config, self.layout, offer)
        self.data_tokens = data_tokens(spec)
        self.step_s = {n.stage: self._step_s(n) for n, _ in self.fitted}
        self.look_s = {n.stage: self._look_s(n.stage) for n, _ in self.fitted}
        self.stall_s = forecast_checkpoints(spec, config, self.layout, offer, {}).stall_s

    def stages(self) -> list[StagePlan]:
        """All training stages; one whose horizon is the budget gets what the others leave."""
        stages = [self.stage(n, m) for n, m in self.fitted if n.num_steps is not None]
        for numbers, memory in self.fitted:
            if numbers.num_steps is None:
                taken_h = sum(o.hours for o in self.others) + sum(s.hours for s in stages)
                num_steps = self.steps_within(numbers, self.budget_s() - 3600 * taken_h)
                stages.append(self.stage(replace(numbers, num_steps=num_steps), memory))
        return sorted(stages, key=lambda s: TRAIN_STAGES.index(s.stage))

    def budget_s(self) -> float:
        """Seconds that the budget allows on this offer."""
        budget, bounds = self.spec.budget, [math.inf]
        if budget.max_hours is not None:
            bounds.append(3600 * budget.max_hours)
        if budget.max_usd is not None and self.offer.usd_per_hour > 0:
            bounds.append(3600 * budget.max_usd / (self.offer.usd_per_hour + self.storage_usd_h()))
        return min(bounds)

    def storage_usd_h(self) -> float:
        """Price of the volume for the checkpoints, while the run goes on: for all that the policy
        keeps of stages of any length, as a budget horizon's length follows from this price."""
        if self.offer.cpu or self.offer.usd_per_hour == 0:
            return 0.0
        endless = {s: (sys.maxsize, 1.0) for s in WEIGHT_STAGES if getattr(self.spec, s)}
        kept = forecast_checkpoints(self.spec, self.config, self.layout, self.offer, endless).kept
        return kept / 1e9 * VOLUME_USD_PER_GB_MONTH / HOURS_PER_MONTH

    def stage_s(self, numbers: StageNumbers, num_steps: int) -> float:
        """Seconds of a stage: start, compile, steps, looks at the validation loss, saves."""
        stage: TrainStage = getattr(self.spec, numbers.stage)
        looks = math.ceil(num_steps / stage.eval_every_steps) + 1
        train_s = num_steps * self.step_s[numbers.stage] + looks * self.look_s[numbers.stage]
        saves = train_s / self.spec.budget.checkpoint_every_s + looks
        start_s = START_S + (COMPILE_S[self.offer.cpu] if self.layout.compiled else 0.0)
        return start_s + train_s + saves * self.stall_s

    def _step_s(self, numbers: StageNumbers) -> float:
        """Seconds of an optimizer step of a stage."""
        rows, accum = numbers.device_batch_size, numbers.grad_accum_steps
        return step_time(self.config, self.layout, self.offer, rows, accum).total_s

    def _look_s(self, stage: str) -> float:
        """Seconds of one look of a stage at the validation loss."""
        tokens = validation_tokens(self.spec, getattr(self.spec, stage))
        return forward_s(self.config, self.layout, self.offer, tokens)

    def steps_within(self, numbers: StageNumbers, left_s: float) -> int:
        """Most steps of a stage that fit into so many seconds, at least one (by bisection)."""
        if math.isinf(left_s):
            raise SpecError(
                f'{numbers.stage}.horizon = "budget" on {self.offer.name}, which costs nothing: '
                "give budget.max_hours"
            )
        low, high = 1, 2
        while self.stage_s(numbers, high) <= left_s:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.stage_s(numbers, middle) <= left_s else (low, middle)
        return low

    def stage(self, numbers: StageNumbers, memory: Memory) -> StagePlan:
        """The plan of one training stage whose steps are known."""
        assert numbers.num_steps is not None and numbers.num_tokens is not None
        c, offer = self.config, self.offer
        tokens_per_s = numbers.total_batch_size / self.step_s[numbers.stage]
        hours = self.stage_s(numbers, numbers.num_steps) / 3600
        stage = getattr(self.spec, numbers.stage)
        epochs = getattr(stage, "num_epochs", None)
        if numbers.stage == "base_train" and self.data_tokens:
            epochs = numbers.num_tokens / self.data_tokens
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
            flops=float(flops_per_token(c) * numbers.num_tokens),
            tokens_per_s=tokens_per_s,
            mfu=tokens_per_s * flops_per_token(c) / (offer.peak_flops * self.layout.world_size),
            hours=hours,
            usd=hours * offer.usd_per_hour,
            memory=memory,
        )


def _priced(sketch: _Sketch, free_gib: float | None) -> Plan:
    """The whole run: hours, dollars and bytes over all stages."""
    stages = sketch.stages()
    hours = sum(o.hours for o in sketch.others) + sum(s.hours for s in stages)
    storage_usd = hours * sketch.storage_usd_h()
    lengths = {s.stage: (s.num_steps, s.hours) for s in stages}
    if sketch.spec.chat_rl is not None:
        rl_hours = next(o.hours for o in sketch.others if o.stage == "chat_rl")
        lengths["chat_rl"] = (sketch.spec.chat_rl.num_steps, rl_hours)
    return Plan(
        spec=sketch.spec,
        offer=sketch.offer,
        config=sketch.config,
        layout=sketch.layout,
        stages=tuple(stages),
        others=tuple(sketch.others),
        checkpoints=forecast_checkpoints(
            sketch.spec, sketch.config, sketch.layout, sketch.offer, lengths
        ),
        hours=hours,
        usd=hours * sketch.offer.usd_per_hour + storage_usd,
        storage_usd=storage_usd,
        data_tokens=sketch.data_tokens,
        data_bytes=(
            0.0 if free_gib is None else data_bytes(sketch.spec, missing_only=sketch.offer.cpu)
        ),
        free_gib=free_gib,
    )


def _judged(plan: Plan) -> Plan:
    """The plan with its verdict, reasons for a refusal, and warnings."""
    reasons, notes = verdict.refusals(plan), verdict.warnings(plan)
    word = "refused" if reasons else "warn" if notes else "ok"
    return replace(plan, verdict=word, reasons=(*reasons, *notes), warnings=tuple(notes))


def _refused(spec: RunSpec, offer: Offer, c: GPTConfig, reason: str) -> Plan:
    """A plan without stages, for a spec that cannot be cut into steps on this offer."""
    layout = make_layout(spec, offer)
    return Plan(
        spec=spec,
        offer=offer,
        config=c,
        layout=layout,
        stages=(),
        others=(),
        checkpoints=forecast_checkpoints(spec, c, layout, offer, {}),
        hours=0.0,
        usd=0.0,
        storage_usd=0.0,
        data_tokens=None,
        data_bytes=0.0,
        free_gib=None,
        verdict="refused",
        reasons=(reason,),
    )
