"""How the training stages of a spec lie on an offer: ranks, sharding, recomputation, batches."""

import bisect
import math
from collections.abc import Callable

from infra.hardware import Offer, world_size
from infra.memory import Layout, Memory, memory_by_rows
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
    sizes = [_device_batches(spec, offer, first) for first in firsts]
    most = [able[-1] for able in sizes]
    all_rows_fit = False
    best: tuple[float, Layout, list[tuple[int, Memory]]] | None = None
    for layout in _candidates(spec, offer):
        if layout.recompute and all_rows_fit:
            continue  # recomputation only costs, unless it makes room for more rows
        memory_of = memory_by_rows(c, layout, offer)
        fitted = [_fit(memory_of, able) for able in sizes]
        cost = math.inf
        if all(memory.fits for _, memory in fitted):
            device_rows = [rows for rows, _ in fitted]
            cost = _longest_step_s(c, layout, offer, firsts, device_rows)
            all_rows_fit = not layout.recompute and device_rows == most
        nothing_fits = math.isinf(cost) and best is not None and math.isinf(best[0])
        if best is None or nothing_fits or cost < WORTH_IT * best[0]:
            best = (cost, layout, fitted)
    assert best is not None
    chosen = [
        (resolve_stage(spec, first.stage, ranks, rows), memory)
        for first, (rows, memory) in zip(firsts, best[2], strict=True)
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


def _device_batches(spec: RunSpec, offer: Offer, first: StageNumbers) -> tuple[int, ...]:
    """Device batches of a stage to choose from, ascending; one where the spec says which."""
    stage: TrainStage = getattr(spec, first.stage)
    if stage.device_batch_size != "auto":
        return (first.device_batch_size,)
    able = divisors(first.device_batch_size * first.grad_accum_steps)
    return able[: bisect.bisect_right(able, first.device_batch_size)] if offer.cpu else able


def _fit(memory_of: Callable[[int], Memory], sizes: tuple[int, ...]) -> tuple[int, Memory]:
    """The largest device batch that fits, the smallest where none does; and its memory."""
    if not memory_of(sizes[-1]).fits:  # more rows never take less memory
        first_too_many = bisect.bisect_left(
            sizes[1:-1], True, key=lambda rows: not memory_of(rows).fits
        )
        sizes = sizes[: first_too_many + 1]
    return sizes[-1], memory_of(sizes[-1])


def _longest_step_s(
    c: GPTConfig, layout: Layout, offer: Offer, firsts: list[StageNumbers], device_rows: list[int]
) -> float:
    """Seconds per step of the longest stage; 0 where there is none.

    device_rows: of each stage, rows per device and forward pass.
    """
    if not firsts:
        return 0.0
    stages = zip(firsts, device_rows, strict=True)
    longest, rows = max(stages, key=lambda stage: stage[0].num_tokens or math.inf)
    accum = longest.rows_per_step // layout.world_size // rows
    return step_time(c, layout, offer, rows, accum).total_s
