"""The budget as horizon: what the supervisor tells a training stage about the time it has.

The trainer knows no money; it reads stages/STAGE.horizon.json, which is written here once a second.
"""

from typing import Any

from infra import budget
from nanochat.rundir import RunDir, atomic_write_json, read_json, read_jsonl
from nanochat.spec import STAGES, TRAIN_STAGES, RunSpec

SAVE_MARGIN = 2.0
"""Planned or measured save times are doubled: a shared volume is not always as fast."""
LEAST_RESERVE_S = 5.0


def write_horizon(run: RunDir, spec: RunSpec, stage: str, left_s: float, now: float) -> None:
    """Tell a stage whose horizon is the budget how much of it is used."""
    settings = getattr(spec, stage)
    if getattr(settings, "horizon", None) != "budget":
        return
    path = run.path / "stages" / f"{stage}.horizon.json"
    _, used_s = budget.spent(read_jsonl(run.ledger_file), now)
    told = read_json(path)
    began_s = float(told["began_used_s"]) if isinstance(told, dict) else used_s
    left_s -= reserve_s(run, spec, stage) + later_s(run, spec, stage)
    fraction, per_s = budget.fraction_used(used_s - began_s, left_s)
    atomic_write_json(
        path,
        {"time": now, "fraction": fraction, "fraction_per_s": per_s, "began_used_s": began_s},
    )


def reserve_s(run: RunDir, spec: RunSpec, stage: str) -> float:
    """Seconds to keep back for what follows a stop of `stage`: the save, evaluation and report."""
    plan = read_json(run.plan_file) or {}
    save_s = max(float((plan.get("stop") or {}).get("save_s", 0.0)), _measured_save_s(run))
    tail = ("evaluate", "report") if stage in TRAIN_STAGES else ("report",)
    rest_s = sum(_planned_s(plan, name) for name in tail if name in spec.stages)
    return max(LEAST_RESERVE_S, SAVE_MARGIN * save_s + _slowness(run, plan, stage) * rest_s)


def later_s(run: RunDir, spec: RunSpec, stage: str) -> float:
    """Seconds that the training stages after `stage` will take, at the speed that was measured."""
    plan = read_json(run.plan_file) or {}
    after = [s for s in spec.stages if STAGES.index(s) > STAGES.index(stage)]
    later = sum(_planned_s(plan, s) for s in after if s not in ("evaluate", "report"))
    return _slowness(run, plan, stage) * later


def _planned_s(plan: dict[str, Any], stage: str) -> float:
    listed = [*plan.get("stages", []), *plan.get("other_stages", [])]
    return sum(3600.0 * float(s["hours"]) for s in listed if s["stage"] == stage)


def _measured_save_s(run: RunDir) -> float:
    """The slowest save that a stage of this run has reported."""
    outcomes = [run.outcome(stage) for stage in TRAIN_STAGES]
    return max((float(o.facts.get("checkpoint_s") or 0.0) for o in outcomes if o), default=0.0)


def _slowness(run: RunDir, plan: dict[str, Any], stage: str) -> float:
    """Planned over measured tokens per second of the running stage, at least 1."""
    planned = next((s for s in plan.get("stages", []) if s["stage"] == stage), None)
    measured = float(run.progress(stage).get("tokens_per_s") or 0.0)
    if planned is None or measured <= 0.0:
        return 1.0
    return max(1.0, float(planned["tokens_per_s"]) / measured)
