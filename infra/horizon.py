"""How the budget's time is shared between the stage that runs and what has to follow it.

The estimates are the plan's, corrected by what this run has measured: a stage that takes twice its
plan makes the later ones count twice.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra.budget import fraction_used
from nanochat.rundir import RunDir, atomic_write_json, read_json
from nanochat.spec import STAGES, WEIGHT_STAGES, RunSpec

REPLAN_STEPS = 50
"""Steps whose median is the speed of a stage."""

SAVE_FACTOR = 2.0
"""A save while others write to the same volume, against the last measured one."""
LEAST_SAVE_S = 1.0
LOOKS = ("eval_s", "sample_s")
"""What a stage tells of its last acts beside the save, in seconds; not every stage has both."""
TRACKER_CLOSE_S = 10.0
"""Most that each tracker holds a stage's end: trackers.CLOSE_TIMEOUT_S, a module that has torch."""
LEAST_REPORT_S = 3.0
REPORT_FACTOR = 2.0
"""The report must be there at the end, and its imports and plots are not sped up by GPUs."""


class StageClock:
    """Times of the stages of one run: planned, measured, still to come."""

    def __init__(self, run: RunDir, spec: RunSpec, plan: dict[str, Any]) -> None:
        self._run = run
        self._spec = spec
        training = plan.get("stages", ())
        stages = [*training, *plan.get("other_stages", ())]
        self._planned_s = {s["stage"]: 3600.0 * float(s["hours"] or 0.0) for s in stages}
        self._planned_step_s: dict[str, float] = {
            s["stage"]: float(s["total_batch_size"] / s["tokens_per_s"]) for s in training
        }
        self._step_ratio: dict[str, float] = {}
        self._last_acts_s: dict[str, dict[str, float]] = {}
        self._guessed_save_s: dict[str, float] = {}

    def begin(self, stage: str) -> None:
        """Before a process of `stage`: read what earlier ones took, and forget their horizon.

        The time that has passed since they told it is not the stage's.
        """
        self._horizon_file(stage).unlink(missing_ok=True)
        self._guessed_save_s.pop(stage, None)
        known = read_json(self._last_acts_file(stage))
        self._last_acts_s.setdefault(stage, known if isinstance(known, dict) else {})

    def note_last_acts(self, stage: str, progress: dict[str, Any]) -> None:
        """Remember over restarts how long the last acts of a stage took when it did them before.

        progress: what the present process of the stage tells. Its first save_s is a guess from a
        probe; another one is measured. Raises OSError where it cannot be written.
        """
        told_s = {act: progress[act] for act in LOOKS if progress.get(act) is not None}
        save_s = progress.get("save_s")
        if save_s is not None and save_s != self._guessed_save_s.setdefault(stage, save_s):
            told_s["save_s"] = save_s
        known_s = self._last_acts_s.get(stage, {})
        if told_s.items() <= known_s.items():
            return
        self._last_acts_s[stage] = known_s | told_s
        atomic_write_json(self._last_acts_file(stage), self._last_acts_s[stage])

    def planned_step_s(self, stage: str) -> float:
        """Seconds of a step as planned; 0 where the plan has none."""
        return self._planned_step_s.get(stage, 0.0)

    def reserve_s(self, stage: str) -> float:
        """Seconds before the end of the budget at which `stage` has to stop.

        Enough for its last save, and for the evaluation and the report where the spec has them.
        """
        reserve_s = self._end_s(stage)
        for last in ("evaluate", "report"):
            if stage != last and getattr(self._spec, last) is not None:
                reserve_s += self._expected_s(last)
        return reserve_s

    def following_s(self, stage: str) -> float:
        """Seconds that its own last acts and all stages after `stage` are expected to take."""
        later = [s for s in self._spec.stages if STAGES.index(s) > STAGES.index(stage)]
        return self._end_s(stage) + sum(self._expected_s(s) for s in later)

    def replan(
        self, stage: str, progress: dict[str, Any], left_s: float | None
    ) -> dict[str, Any] | None:
        """What the first REPLAN_STEPS steps of a stage say about the rest of the run; told once.

        progress: what the stage tells. left_s: of the budget, None where nothing bounds the run.
        Facts: step, planned_step_s, step_s (measured), needed_s (to the end of the run), left_s,
        fits, ends_at_step (where the stage will be when the budget ends; None where it gets to
        its end).
        """
        planned_step_s = self._planned_step_s.get(stage)
        if stage in self._step_ratio or planned_step_s is None:
            return None
        if progress.get("num_timed", 0) < REPLAN_STEPS:
            return None
        step_s, step = float(progress["median_step_s"]), int(progress["step"])
        self._step_ratio[stage] = step_s / planned_step_s
        num_steps = progress.get("num_steps")
        if num_steps is None:  # the budget is the horizon: it fits if a step is left at all
            needed_s = step_s + self.following_s(stage)
        else:
            needed_s = (num_steps - step) * step_s + self.following_s(stage)
        fits = left_s is None or needed_s <= left_s
        trained_s = 0.0 if left_s is None else max(0.0, left_s - self.reserve_s(stage))
        ends_at_step = step + int(trained_s / step_s)
        return {
            "step": step,
            "planned_step_s": planned_step_s,
            "step_s": step_s,
            "needed_s": needed_s,
            "left_s": left_s,
            "fits": fits,
            "ends_at_step": None if fits or ends_at_step >= (num_steps or 0) else ends_at_step,
        }

    def write_horizon(self, stage: str, left_s: float, consumed_s: float) -> None:
        """Tell the trainer how much of a budget horizon is used (see trainer.Horizon)."""
        stage_left_s = max(0.0, left_s - self.following_s(stage))
        fraction, per_s = fraction_used(consumed_s, stage_left_s)
        atomic_write_json(
            self._horizon_file(stage),
            {"time": time.time(), "fraction": fraction, "fraction_per_s": per_s},
        )

    def _horizon_file(self, stage: str) -> Path:
        return self._run.path / "stages" / f"{stage}.horizon.json"

    def _last_acts_file(self, stage: str) -> Path:
        return self._run.path / "stages" / f"{stage}.last_acts.json"

    def _expected_s(self, stage: str) -> float:
        planned_s = self._planned_s.get(stage, 0.0) * self._slowness()
        return max(LEAST_REPORT_S, REPORT_FACTOR * planned_s) if stage == "report" else planned_s

    def _slowness(self) -> float:
        """Measured over planned time of training: stages that are done, steps of the present one.

        At least 1.
        """
        ratios = [1.0, *self._step_ratio.values()]
        for stage, seconds in self._done_s():
            if self._planned_s.get(stage, 0.0) > 0.0 and stage in ("base_train", "mid_train"):
                ratios.append(seconds / self._planned_s[stage])
        return max(ratios)

    def _done_s(self) -> Iterator[tuple[str, float]]:
        for stage in self._spec.stages:
            outcome = self._run.outcome(stage)
            if outcome is not None and outcome.outcome == "done":
                yield stage, outcome.seconds

    def _end_s(self, stage: str) -> float:
        """Seconds from the last step of a stage to its outcome: a save, looks, the trackers."""
        told, known = self._run.progress(stage), self._last_acts_s.get(stage, {})
        save_s = max(float(told.get("save_s") or 0.0), known.get("save_s", 0.0))
        looks_s = sum(float(told.get(act) or known.get(act, 0.0)) for act in LOOKS)
        trackers_s = self._trackers_s() if stage in WEIGHT_STAGES else 0.0
        return max(LEAST_SAVE_S, SAVE_FACTOR * save_s) + looks_s + trackers_s

    def _trackers_s(self) -> float:
        runtime = self._spec.runtime
        return TRACKER_CLOSE_S * sum((runtime.tensorboard, runtime.wandb != "off"))
