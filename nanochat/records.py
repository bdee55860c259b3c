"""What a run directory tells: everything the report and `compare` show, read from files alone.

Works on half a run and on another machine: whatever is absent is None or empty. No torch.
"""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat.rundir import Outcome, RunDir, read_json, read_jsonl
from nanochat.scaling import gpt_config, num_params
from nanochat.spec import STAGES, WEIGHT_STAGES, RunSpec

COLUMNS = {"base_train": "BASE", "mid_train": "MID", "chat_sft": "SFT", "chat_rl": "RL"}
CORE_PART = "core."
"""What the names of CORE's 22 tasks begin with."""
TASK_NAMES = {
    "core": "CORE",
    "arc_challenge": "ARC-Challenge",
    "arc_easy": "ARC-Easy",
    "gsm8k": "GSM8K",
    "humaneval": "HumanEval",
    "mmlu": "MMLU",
    "chatcore": "ChatCORE",
}
"""Published benchmarks in the order of the table; generated tasks follow."""


@dataclass(frozen=True)
class Score:
    """One evaluation record of metrics.jsonl."""

    value: float
    stderr: float | None
    n: int
    chance: float | None

    def __str__(self) -> str:
        text = f"{self.value:.3f}"
        return text if self.stderr is None else f"{text} ± {self.stderr:.3f}"


@dataclass
class StageRecord:
    """What one stage has left behind."""

    name: str
    outcome: Outcome | None = None
    plan: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    vals: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    repeated_steps: int = 0
    """Steps that were done again after a restart."""
    repeated_s: float = 0.0
    """What those had taken the first time."""
    first_line_s: float | None = None
    last_line_s: float | None = None

    @property
    def state(self) -> str:
        if self.outcome is not None and self.outcome.outcome != "running":
            return self.outcome.outcome
        return "begun" if self.first_line_s or self.outcome else "not begun"

    @property
    def facts(self) -> dict[str, Any]:
        return self.outcome.facts if self.outcome else {}

    @property
    def seconds(self) -> float | None:
        """Wall clock over all restarts; of a killed stage what its metrics span."""
        if self.outcome is not None and self.outcome.seconds:
            return self.outcome.seconds
        if self.first_line_s is None or self.last_line_s is None:
            return None
        return self.last_line_s - self.first_line_s

    @property
    def num_steps(self) -> int | None:
        done = self.facts.get("num_steps") or (self.outcome.step if self.outcome else None)
        return done or (self.steps[-1].get("step") if self.steps else None)

    @property
    def first_val_bpb(self) -> float | None:
        known = self._val_bpbs
        return self.facts.get("val_bpb_first") or (known[0] if known else None)

    @property
    def best_val_bpb(self) -> float | None:
        return self.facts.get("val_bpb_best") or min(self._val_bpbs, default=None)

    @property
    def last_val_bpb(self) -> float | None:
        known = self._val_bpbs
        return self.facts.get("val_bpb_last") or (known[-1] if known else None)

    @property
    def _val_bpbs(self) -> list[float]:
        return [r["val_bpb"] for r in self.vals if r.get("val_bpb") is not None]

    @property
    def peak_memory_gib(self) -> float | None:
        """Of a device where there is one, else of the process."""
        return self.peak("peak_memory_gib", "gpu_memory_gib") or self.peak("host_memory_gib")

    def last(self, key: str) -> Any:
        """A fact of the outcome, else the last value in the step lines."""
        if self.facts.get(key) is not None:
            return self.facts[key]
        return next((r[key] for r in reversed(self.steps) if r.get(key) is not None), None)

    def median(self, key: str) -> float | None:
        """Middle value of a key over the step lines."""
        values = sorted(r[key] for r in self.steps if isinstance(r.get(key), int | float))
        return values[len(values) // 2] if values else None

    def peak(self, *keys: str) -> float | None:
        """Largest value of any of the keys, in the facts and the step lines."""
        found = [r.get(k) for r in (self.facts, *self.steps) for k in keys]
        return max((v for v in found if isinstance(v, int | float)), default=None)


@dataclass
class RunRecord:
    """One run, as far as it has come."""

    path: Path
    spec: RunSpec
    plan: dict[str, Any]
    status: dict[str, Any]
    stages: dict[str, StageRecord]
    scores: dict[tuple[str, str], dict[str, Score]]
    """(task, metric) -> stage whose weights were scored -> score."""
    events: list[dict[str, Any]]
    machines: list[dict[str, Any]]
    """Every machine that the run was on, in order of appearance, without its git state."""
    git_states: list[dict[str, Any]]
    """Every state of the source that the run was made with, in order of appearance."""
    ledger: list[dict[str, Any]]
    resolved: list[dict[str, Any]]

    @property
    def n_params(self) -> int:
        return self.plan.get("n_params") or num_params(gpt_config(self.spec.model))

    @property
    def is_complete(self) -> bool:
        """Every stage that trains or scores is done."""
        return all(self.stages[s].state == "done" for s in self.spec.stages if s != "report")

    @property
    def usd_per_hour(self) -> float:
        prices = [r["usd_per_hour"] for r in self.ledger if r.get("usd_per_hour") is not None]
        return float(prices[-1] if prices else self.plan.get("usd_per_hour") or 0.0)

    @property
    def used_s(self) -> float | None:
        """Wall clock that the run has been charged for, by the ledger."""
        return self.status.get("used_s")

    @property
    def spent_usd(self) -> float | None:
        return self.status.get("spent_usd")

    @property
    def num_starts(self) -> int:
        """How often the run was started (or resumed)."""
        return sum(r.get("event") == "start" for r in self.ledger)

    def usd(self, seconds: float | None) -> float | None:
        return None if seconds is None else seconds / 3600 * self.usd_per_hour


def read_run(run: RunDir) -> RunRecord:
    """Read a run directory. Raises RunDirError where it is none."""
    plan = read_json(run.plan_file)
    plan = plan if isinstance(plan, dict) else {}
    spec = run.spec()
    stages = {name: StageRecord(name) for name in STAGES}
    for planned in plan.get("stages", []):
        if planned.get("stage") in stages:
            stages[planned["stage"]].plan = planned
    for name, stage in stages.items():
        with contextlib.suppress(TypeError):  # an outcome that another version wrote
            stage.outcome = run.outcome(name)
    record = RunRecord(
        path=run.path,
        spec=spec,
        plan=plan,
        status=run.status() or {},
        stages=stages,
        scores={},
        events=[],
        machines=[],
        git_states=[],
        ledger=list(read_jsonl(run.ledger_file)),
        resolved=list(read_jsonl(run.resolved_file)),
    )
    for line in run.metrics():
        _sort_in(record, line)
    for stage in stages.values():
        stage.steps.sort(key=lambda r: r["step"])
        stage.vals.sort(key=lambda r: r["step"])
    _count_repeated_steps(run, stages)
    return record


def _sort_in(record: RunRecord, line: dict[str, Any]) -> None:
    stage = record.stages.get(line.get("stage", ""))
    if "task" in line:
        if isinstance(line.get("value"), int | float) and stage is not None:
            key = (line["task"], line.get("metric") or "accuracy")
            score = Score(line["value"], line.get("stderr"), line.get("n", 0), line.get("chance"))
            record.scores.setdefault(key, {})[stage.name] = score
        return
    if stage is None:
        return
    if (time_s := line.get("time_s")) is not None:
        stage.first_line_s = min(time_s, stage.first_line_s or time_s)
        stage.last_line_s = max(time_s, stage.last_line_s or time_s)
    if "event" in line:
        record.events.append(line)
        if machine := line.get("machine"):
            git = machine.pop("git", None)
            if machine not in record.machines:
                record.machines.append(machine)
            if git and git not in record.git_states:
                record.git_states.append(git)
    elif "sample" in line:
        stage.samples.append(line)
    elif "step" in line:
        (stage.vals if "val_bpb" in line else stage.steps).append(line)


def _count_repeated_steps(run: RunDir, stages: dict[str, StageRecord]) -> None:
    seen: dict[tuple[str, int], float] = {}
    for line in read_jsonl(run.metrics_file):
        if "loss" not in line or line.get("stage") not in stages:
            continue
        key = (line["stage"], line["step"])
        if key in seen:
            stages[key[0]].repeated_steps += 1
            stages[key[0]].repeated_s += seen[key]
        seen[key] = line.get("step_s") or 0.0


def score_rows(record: RunRecord) -> list[tuple[str, str, dict[str, Score]]]:
    """(label, task, scores by stage), published benchmarks first, then the generated tasks."""
    order = list(TASK_NAMES)
    keys = sorted(
        record.scores,
        key=lambda k: (order.index(k[0]) if k[0] in order else len(order), k),
    )
    metrics_of = [task for task, _ in keys]
    return [
        (
            TASK_NAMES.get(task, task) + (f" ({metric})" if metrics_of.count(task) > 1 else ""),
            task,
            record.scores[task, metric],
        )
        for task, metric in keys
    ]


def first_answers(
    record: RunRecord, per_task: int
) -> dict[tuple[str, int], dict[str, dict[str, Any]]]:
    """The first answered examples of each task: (task, index) -> stage -> line of the results."""
    found: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for stage in COLUMNS:
        for results in sorted((record.path / "evaluations" / stage).glob("*.jsonl")):
            for line in read_jsonl(results):
                if isinstance(index := line.get("index"), int) and index < per_task:
                    found.setdefault((results.stem, index), {})[stage] = line
    return dict(sorted(found.items()))


def trained_stages(record: RunRecord) -> list[StageRecord]:
    """Stages that change weights and have logged something, in run order."""
    stages = [record.stages[name] for name in WEIGHT_STAGES]
    return [s for s in stages if s.steps or s.vals or s.outcome]
