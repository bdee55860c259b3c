"""How the training stages of a spec lie on an offer: ranks, sharding, recomputation, batches."""

import bisect
import math
from dataclasses import replace

from infra.hardware import Offer, world_size
from infra.memory import Layout, Memory, step_memory
from infra.throughput import step_time
from nanochat.scaling import GPTConfig, StageNumbers, divisors, resolve_stage
from nanochat.spec import TRAIN_STAGES, RunSpec, TrainStage

WORTH_IT = 0.95
"""How much faster a more complicated layout must be to be chosen."""

Fitted = tuple[StageNumbers, Memory]


def num_ranks(spec: RunSpec, offer: Offer) -> int:
    """Ranks of a training stage: the spec's, else one per device."""
    return spec.runtime.num_ranks or world_size(offer)


def make_layout(
    spec: RunSpec, offer: Offer, *, fsdp: bool = False, recompute: bool = False
) -> Layout:
    """A layout with the precision and the ranks of a spec on an offer."""
    bf16 = spec.runtime.dtype == "bf16" or (spec.runtime.dtype == "auto" and not offer.cpu)
    return Layout(
        world_size=num_ranks(spec, offer),
        fsdp=fsdp,
        recompute=recompute,
        compiled=spec.runtime.compile,
        itemsize=2 if bf16 else 4,
        cpu=offer.cpu,
    )


def choose_layout(spec: RunSpec, offer: Offer, c: GPTConfig) -> tuple[Layout, list[Fitted]]:
    """The layout in which every training stage fits and the longest is fastest, with the largest
    device batches.

    Where none fits, the leanest one, so that its memory can be shown. Raises SpecError where a
    batch cannot be cut as asked.
    """
    ranks = num_ranks(spec, offer)
    firsts = [resolve_stage(spec, name, ranks) for name in TRAIN_STAGES if getattr(spec, name)]
    best: tuple[float, Layout, list[Fitted]] | None = None
    for layout in _candidates(spec, offer):
        fitted = [_fit(spec, offer, c, layout, first) for first in firsts]
        cost = _cost(c, layout, offer, fitted)
        nothing_fits = math.isinf(cost) and best is not None and math.isinf(best[0])
        if best is None or nothing_fits or cost < WORTH_IT * best[0]:
            best = (cost, layout, fitted)
    assert best is not None
    chosen = [
        (resolve_stage(spec, n.stage, ranks, n.device_batch_size), memory) for n, memory in best[2]
    ]
    return best[1], chosen


def _candidates(spec: RunSpec, offer: Offer) -> list[Layout]:
    """Layouts to try, the simplest first."""
    wanted = spec.runtime.sharding
    if wanted == "auto":
        kinds = [False] if num_ranks(spec, offer) == 1 else [False, True]
    else:
        kinds = [wanted == "fsdp"]
    return [
        make_layout(spec, offer, fsdp=fsdp, recompute=recompute)
        for fsdp in kinds
        for recompute in (False, True)
    ]


def _fit(spec: RunSpec, offer: Offer, c: GPTConfig, layout: Layout, first: StageNumbers) -> Fitted:
    """The numbers with the largest device batch that fits; with the smallest where none does."""
    stage: TrainStage = getattr(spec, first.stage)
    sizes = [first.device_batch_size]
    rows_per_rank = first.rows_per_step // layout.world_size
    if stage.device_batch_size == "auto":
        most = first.device_batch_size if offer.cpu else rows_per_rank
        sizes = [d for d in divisors(rows_per_rank) if d <= most]
    memory = step_memory(c, layout, sizes[-1], offer)
    if not memory.fits:  # more rows never take less memory
        first_too_many = bisect.bisect_left(
            sizes[1:-1], True, key=lambda rows: not step_memory(c, layout, rows, offer).fits
        )
        sizes = sizes[: first_too_many + 1]
        memory = step_memory(c, layout, sizes[-1], offer)
    rows = sizes[-1]
    numbers = replace(first, device_batch_size=rows, grad_accum_steps=rows_per_rank // rows)
    return numbers, memory


def _cost(c: GPTConfig, layout: Layout, offer: Offer, fitted: list[Fitted]) -> float:
    """Seconds per step of the longest stage; infinite where a stage does not fit."""
    if not all(memory.fits for _, memory in fitted):
        return math.inf
    if not fitted:
        return 0.0
    longest = max((n for n, _ in fitted), key=lambda n: n.num_tokens or math.inf)
    return stage_step_s(c, layout, offer, longest)


def stage_step_s(c: GPTConfig, layout: Layout, offer: Offer, numbers: StageNumbers) -> float:
    """Seconds of one optimizer step of a stage."""
    return step_time(c, layout, offer, numbers.device_batch_size, numbers.grad_accum_steps).total_s
