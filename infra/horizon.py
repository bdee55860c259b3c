"""How the budget's time is shared between the stage that runs and what has to follow it.

The estimates are the plan's, corrected by what this run has measured: a stage that took twice its
plan makes the later ones count twice.
"""

import time
from collections.abc import Iterator
from typing import Any

from infra.budget import fraction_used
from nanochat.rundir import RunDir, atomic_write_json
from nanochat.spec import STAGES, RunSpec

SAVE_FACTOR = 2.0
"""A save while others write to the same volume, against the last measured one."""
LEAST_SAVE_S = 1.0
LEAST_REPORT_S = 3.0


class StageClock:
    """Times of the stages of one run: planned, measured, still to come."""

    def __init__(self, run: RunDir, spec: RunSpec, plan: dict[str, Any]) -> None:
        self._run = run
        self._spec = spec
        stages = [*plan.get("stages", ()), *plan.get("other_stages", ())]
        self._planned_s = {s["stage"]: 3600.0 * float(s["hours"] or 0.0) for s in stages}

    def reserve_s(self, stage: str) -> float:
        """Seconds before the end of the budget at which `stage` has to stop.

        Enough for its last save, and for the evaluation and the report where the spec has them.
        """
        reserve_s = self._save_s(stage)
        for last in ("evaluate", "report"):
            if stage != last and getattr(self._spec, last) is not None:
                reserve_s += self._expected_s(last)
        return reserve_s

    def following_s(self, stage: str) -> float:
        """Seconds that its own last save and all stages after `stage` are expected to take."""
        later = [s for s in self._spec.stages if STAGES.index(s) > STAGES.index(stage)]
        return self._save_s(stage) + sum(self._expected_s(s) for s in later)

    def write_horizon(self, stage: str, left_s: float, consumed_s: float) -> None:
        """Tell the trainer how much of a budget horizon is used (see trainer.Horizon)."""
        stage_left_s = max(0.0, left_s - self.following_s(stage))
        fraction, per_s = fraction_used(consumed_s, stage_left_s)
        atomic_write_json(
            self._run.path / "stages" / f"{stage}.horizon.json",
            {"time": time.time(), "fraction": fraction, "fraction_per_s": per_s},
        )

    def _expected_s(self, stage: str) -> float:
        least_s = LEAST_REPORT_S if stage == "report" else 0.0
        return max(least_s, self._planned_s.get(stage, 0.0) * self._slowness())

    def _slowness(self) -> float:
        """Measured over planned time of the training stages that are done; at least 1."""
        ratios = [1.0]
        for stage, seconds in self._done_s():
            if self._planned_s.get(stage, 0.0) > 0.0 and stage in ("base_train", "mid_train"):
                ratios.append(seconds / self._planned_s[stage])
        return max(ratios)

    def _done_s(self) -> Iterator[tuple[str, float]]:
        for stage in self._spec.stages:
            outcome = self._run.outcome(stage)
            if outcome is not None and outcome.outcome == "done":
                yield stage, outcome.seconds

    def _save_s(self, stage: str) -> float:
        measured = self._run.progress(stage).get("save_s") or 0.0
        return max(LEAST_SAVE_S, SAVE_FACTOR * float(measured))
