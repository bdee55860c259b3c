"""Runs side by side: `python -m nanochat.compare RUN RUN… [--json]`, from files alone.

A row is shown where any run has the value; the fields in which the specs differ come last, since
they are why one compares.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanochat import formats
from nanochat.document import Table, table_to_markdown
from nanochat.records import COLUMNS, TASK_NAMES, RunRecord, read_run, trained_stages
from nanochat.rundir import RunDir, RunDirError, find_run

Form = Callable[[Any], str]


def _three_digits(value: float) -> str:
    return formats.fixed(value, 3)


HEAD: tuple[tuple[str, str, Form], ...] = (
    ("state", "state", str),
    ("parameters", "n_params", formats.count),
    ("time", "used_s", formats.duration),
    ("spent", "spent_usd", formats.usd),
)
PER_STAGE: dict[str, Form] = {
    "num_steps": formats.whole,
    "num_tokens": formats.count,
    "val_bpb_best": _three_digits,
    "reward_last": _three_digits,
    "tokens_per_s": formats.whole,
    "mfu": formats.percent,
    "peak_memory_gib": formats.gib,
    "seconds": formats.duration,
}


def facts_of(record: RunRecord) -> dict[str, Any]:
    """What one run is compared by: numbers, null where the run has none."""
    stages = {
        COLUMNS[stage.name]: {
            "num_steps": stage.num_steps,
            "num_tokens": stage.last("num_tokens"),
            "val_bpb_best": stage.best_val_bpb,
            "reward_last": stage.facts.get("reward_last"),
            "tokens_per_s": stage.median("tokens_per_s"),
            "mfu": stage.median("mfu"),
            "peak_memory_gib": stage.peak_memory_gib,
            "seconds": stage.seconds,
        }
        for stage in trained_stages(record)
    }
    scores = {
        f"{TASK_NAMES.get(task, task)} {metric} {COLUMNS[stage]}": score.value
        for (task, metric), by_stage in sorted(record.scores.items())
        for stage, score in by_stage.items()
        if stage in COLUMNS
    }
    return {
        "run_dir": str(record.path),
        "name": record.spec.name,
        "state": record.status.get("state"),
        "n_params": record.n_params,
        "used_s": record.used_s,
        "spent_usd": record.spent_usd,
        "stages": stages,
        "scores": scores,
        "spec": _flat(record.spec.model_dump(mode="json", exclude_none=True)),
    }


def compare(runs: list[RunDir]) -> list[dict[str, Any]]:
    """`facts_of` of every run. Raises RunDirError where one is no run directory."""
    return [facts_of(read_run(run)) for run in runs]


def render(runs: list[dict[str, Any]]) -> str:
    """The runs as a Markdown table, one column each."""
    rows: list[list[str]] = []

    def add(label: str, values: list[Any], form: Form) -> None:
        if any(value is not None for value in values):
            rows.append([label, *("-" if v is None else form(v) for v in values)])

    for label, key, form in HEAD:
        add(label, [run[key] for run in runs], form)
    for stage in COLUMNS.values():
        for key, form in PER_STAGE.items():
            add(f"{stage} {key}", [run["stages"].get(stage, {}).get(key) for run in runs], form)
    for name in dict.fromkeys(name for run in runs for name in run["scores"]):
        add(name, [run["scores"].get(name) for run in runs], _three_digits)
    for name in dict.fromkeys(name for run in runs for name in run["spec"]):
        values = [run["spec"].get(name) for run in runs]
        if name != "name" and any(value != values[0] for value in values):
            add(name, values, json.dumps)
    names = [Path(run["run_dir"]).name for run in runs]
    are_told_apart = len(set(names)) == len(names)
    headers = ["", *(names if are_told_apart else [run["run_dir"] for run in runs])]
    return table_to_markdown(Table(headers, rows))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted field names with their values; a webhook's address is a password and left out."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            out |= _flat(value, f"{prefix}{key}.")
        elif key != "webhook_url":
            out[prefix + key] = value
    return out


def main(argv: list[str] | None = None) -> int:
    """Print the comparison; returns the exit code."""
    parser = argparse.ArgumentParser(prog="nanochat compare", description="Runs side by side.")
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args(argv)
    try:
        runs = compare([find_run(path) for path in args.run_dirs])
    except RunDirError as e:
        sys.stderr.write(f"nanochat compare: {e}\n")
        return 78
    sys.stdout.write((json.dumps(runs, indent=2) if args.json else render(runs)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
