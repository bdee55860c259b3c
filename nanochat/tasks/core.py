"""CORE (DataComp-LM, arXiv 2406.11794): 22 tasks that a model without any chat training can do.

Each shows some solved examples and then asks. Three kinds: `multiple_choice` (which of some
endings is likelier), `schema` (after which of some beginnings is an ending likelier) and
`language_modeling` (are all tokens of the ending the most likely ones). The score of a task is its
accuracy, centred so that guessing is 0 and all right is 1; CORE is the mean.

Examples, their order and the solved examples in front of each are drawn as nanochat draws them
(seeds 1337 and 1234 + index), so that numbers of other nanochat models can be compared.

The publisher's bundle is read where it lies, a zip of core.yaml (the tasks), eval_meta_data.csv
(what guessing scores) and JSON lines.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import random
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from nanochat.spec import SpecError
from nanochat.touches import require, task_files

LABELS = (
    "hellaswag_zeroshot", "jeopardy", "bigbench_qa_wikidata", "arc_easy", "arc_challenge", "copa",
    "commonsense_qa", "piqa", "openbook_qa", "lambada_openai", "hellaswag", "winograd",
    "winogrande", "bigbench_dyck_languages", "agi_eval_lsat_ar", "bigbench_cs_algorithms",
    "bigbench_operators", "bigbench_repeat_copy_logic", "squad", "coqa", "boolq",
    "bigbench_language_identification",
)  # fmt: skip
KINDS = ("multiple_choice", "schema", "language_modeling")
ORDER_SEED = 1337
SHOTS_SEED = 1234
ROOT = "eval_bundle"


@dataclass(frozen=True, slots=True)
class CoreExample:
    """Texts to compare, and which of them is right."""

    texts: tuple[str, ...]
    """One per choice; of language_modeling: the prompt, and the prompt with its ending."""
    gold: int
    ending: tuple[str, ...]
    """What tells the choices apart, for people; of language_modeling the right ending."""


@dataclass(frozen=True)
class CoreTask:
    """One of the 22."""

    label: str
    kind: str
    num_shots: int
    delimiter: str
    """Between a question and its ending."""
    chance: float
    """What guessing scores, 0 to 1."""
    rows: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return f"core.{self.label}"

    @property
    def num_examples(self) -> int:
        return len(self.rows)

    def example(self, index: int) -> CoreExample:
        """The example at `index`, behind its solved examples."""
        row = self.rows[index]
        solved = "".join(self._solved(shot) + "\n\n" for shot in self._shots(index))
        if self.kind == "multiple_choice":
            texts = [solved + row["query"] + self.delimiter + choice for choice in row["choices"]]
            return CoreExample(tuple(texts), row["gold"], tuple(row["choices"]))
        if self.kind == "schema":
            end = self.delimiter + row["continuation"]
            options = row["context_options"]
            return CoreExample(
                tuple(solved + o + end for o in options), row["gold"], tuple(options)
            )
        # blanks at the end would be tokens of their own, where the ending's first token has one
        prompt = solved + row["context"].strip() + self.delimiter
        texts = [prompt.strip(), prompt + row["continuation"]]
        return CoreExample(tuple(texts), 1, (row["continuation"],))

    def centred(self, accuracy: float) -> float:
        """0 for guessing, 1 for all right."""
        return (accuracy - self.chance) / (1 - self.chance)

    def _solved(self, row: dict[str, Any]) -> str:
        if self.kind == "multiple_choice":
            return str(row["query"] + self.delimiter + row["choices"][row["gold"]])
        if self.kind == "schema":
            context = row["context_options"][row["gold"]]
            return str(context + self.delimiter + row["continuation"])
        return str(row["context"].strip() + self.delimiter + row["continuation"])

    def _shots(self, index: int) -> Sequence[dict[str, Any]]:
        """Other rows, drawn for this one."""
        if self.num_shots == 0:
            return ()
        others = [i for i in range(len(self.rows)) if i != index]
        drawn = random.Random(SHOTS_SEED + index).sample(others, self.num_shots)
        return [self.rows[i] for i in drawn]


@functools.cache
def core_tasks() -> tuple[CoreTask, ...]:
    """The 22 tasks of the bundle. Raises SpecError where it is missing or not as expected."""
    (path,) = task_files("core", "test")
    place = require(path)
    try:
        with zipfile.ZipFile(place) as bundle:
            listed = yaml.safe_load(bundle.read(f"{ROOT}/core.yaml"))["icl_tasks"]
            chances = _chances(bundle.read(f"{ROOT}/eval_meta_data.csv").decode())
            tasks = tuple(_read(bundle, entry, chances) for entry in listed)
    except (OSError, zipfile.BadZipFile, KeyError, TypeError, ValueError, yaml.YAMLError) as e:
        raise SpecError(
            f"{place} is not the bundle of CORE that the kit knows ({type(e).__name__}: {e}); "
            "delete it and fetch it again: nanochat fetch @CONFIG"
        ) from None
    if odd := sorted({task.label for task in tasks} ^ set(LABELS)):
        raise SpecError(f"{place} has not the 22 tasks of CORE; it differs in {', '.join(odd)}")
    return tasks


def core_score(scored: Sequence[tuple[CoreTask, float, float]]) -> tuple[float, float]:
    """(CORE, its standard error) of (task, accuracy, standard error) for all tasks."""
    value = sum(task.centred(accuracy) for task, accuracy, _ in scored) / len(scored)
    variance = sum((stderr / (1 - task.chance)) ** 2 for task, _, stderr in scored)
    return value, variance**0.5 / len(scored)


def _read(bundle: zipfile.ZipFile, entry: dict[str, Any], chances: dict[str, float]) -> CoreTask:
    kind = entry["icl_task_type"]
    if kind not in KINDS:
        raise ValueError(f"{entry['label']} is of the unknown type {kind}")
    lines = bundle.read(f"{ROOT}/eval_data/{entry['dataset_uri']}").decode().splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    random.Random(ORDER_SEED).shuffle(rows)
    return CoreTask(
        label=entry["label"],
        kind=kind,
        num_shots=entry["num_fewshot"][0],
        delimiter=entry.get("continuation_delimiter", " "),
        chance=chances[entry["label"]],
        rows=rows,
    )


def _chances(table: str) -> dict[str, float]:
    """Task -> accuracy of guessing; the table has per cent."""
    rows = csv.DictReader(io.StringIO(table))
    return {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in rows}
