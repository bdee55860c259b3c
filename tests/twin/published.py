"""Small sets of our own in the publishers' exact formats: file names, columns and types.

What stands in them is made up; a model can be right or wrong about it, which is all tests need.
"""

import csv
import hashlib
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from nanochat.touches import LOCK_FORMAT, LOCK_NAME

ONE = "00000-of-00001.parquet"
THINGS = ("stone", "river", "lamp", "apple", "bird", "cloud", "rope", "key")
PLACES = ("a shelf", "a boat", "a cellar", "a meadow")


def parquet(rows: Sequence[Mapping[str, Any]], schema: pa.Schema | None = None) -> bytes:
    """Rows as the bytes of a parquet file."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), buffer)
    return buffer.getvalue()


def arc(num_rows: int, start: int = 0) -> bytes:
    """allenai/ai2_arc; every seventh question has its choices numbered, as some there have."""
    rows = []
    for i in range(start, start + num_rows):
        labels = list("1234") if i % 7 == 3 else list("ABCD")
        rows.append(
            {
                "id": f"made_{i}",
                "question": f"Question {i}: where is the {THINGS[i % 8]} kept?",
                "choices": {"text": [f"in {place}" for place in PLACES], "label": labels},
                "answerKey": labels[i % 4],
            }
        )
    return parquet(rows)


def gsm8k(num_rows: int, start: int = 0) -> bytes:
    """openai/gsm8k: the solution calls the calculator between << and >>, and ends in `#### N`."""
    rows = []
    for i in range(start, start + num_rows):
        price, count = i % 40 + 2, i % 7 + 3
        total = 1000 * price * count if i % 5 == 0 else price * count
        factor = "1000*" if i % 5 == 0 else ""
        rows.append(
            {
                "question": f"Shop {i} sells a {THINGS[i % 8]} for ${factor}{price}. What do "
                f"{count} cost?",
                "answer": f"One costs ${price}.\n{count} cost {factor}{price}*{count} = "
                f"$<<{factor}{price}*{count}={total}>>{total}.\n#### {total:,}",
            }
        )
    return parquet(rows)


def mmlu(num_rows: int, start: int = 0, subject: str = "anatomy") -> bytes:
    """cais/mmlu, configuration `all`: the answer is the index of a choice."""
    return parquet(
        [
            {
                "question": f"Number {i}: what lies beside the {THINGS[i % 8]}?",
                "subject": subject,
                "choices": [f"{place}, {i + k}" for k, place in enumerate(PLACES)],
                "answer": i % 4,
            }
            for i in range(start, start + num_rows)
        ]
    )


def humaneval(num_rows: int) -> bytes:
    """openai/openai_humaneval: `add_N(a, b)` is to return a + b + N."""
    rows = []
    for i in range(num_rows):
        name = f"add_{i}"
        rows.append(
            {
                "task_id": f"HumanEval/{i}",
                "prompt": f"from typing import List\n\n\ndef {name}(a: int, b: int) -> int:\n"
                f'    """ Return the sum of a, b and {i}.\n    >>> {name}(1, 2)\n    {3 + i}\n'
                '    """\n',
                "canonical_solution": f"    return a + b + {i}\n",
                "test": "\n\nMETADATA = {'author': 'nobody'}\n\n\ndef check(candidate):\n"
                f"    assert candidate(1, 2) == {3 + i}\n"
                f"    assert candidate(-1, 1) == {i}\n",
                "entry_point": name,
            }
        )
    return parquet(rows)


def smoltalk(num_rows: int, start: int = 0) -> bytes:
    """HuggingFaceTB/smol-smoltalk: messages, some of them begun by a system message."""
    rows = []
    for i in range(start, start + num_rows):
        messages = [
            {"content": f"Tell me about the {THINGS[i % 8]} {i}.", "role": "user"},
            {"content": f"The {THINGS[i % 8]} lies in {PLACES[i % 4]}.", "role": "assistant"},
        ]
        if i % 3 == 0:
            messages.insert(0, {"content": "You are brief.", "role": "system"})
        if i % 4 == 0:
            messages.append({"content": "Why?", "role": "user"})
            messages.append({"content": "It was put there.", "role": "assistant"})
        rows.append({"messages": messages, "source": "made"})
    return parquet(rows)


def fineweb(num_rows: int, start: int = 0) -> bytes:
    """karpathy/fineweb-edu-100b-shuffle: one column of text."""
    texts = [
        f"Page {i}. A {THINGS[i % 8]} was seen in {PLACES[i % 4]}, and nobody knew why. " * 6
        for i in range(start, start + num_rows)
    ]
    return parquet([{"text": text} for text in texts])


# -- CORE

CORE_TASKS: tuple[tuple[str, str, str, int, str | None, float], ...] = (
    ("hellaswag_zeroshot", "language_understanding/hellaswag", "multiple_choice", 0, None, 25),
    ("jeopardy", "world_knowledge/jeopardy_all", "language_modeling", 10, "\nAnswer: ", 0),
    (
        "bigbench_qa_wikidata",
        "world_knowledge/bigbench_qa_wikidata",
        "language_modeling",
        10,
        None,
        0,
    ),  # noqa: E501
    ("arc_easy", "world_knowledge/arc_easy", "multiple_choice", 10, "\nAnswer: ", 25),
    ("arc_challenge", "world_knowledge/arc_challenge", "multiple_choice", 10, "\nAnswer: ", 25),
    ("copa", "commonsense_reasoning/copa", "multiple_choice", 0, None, 50),
    ("commonsense_qa", "commonsense_reasoning/commonsense_qa", "multiple_choice", 10, None, 40.3),
    ("piqa", "commonsense_reasoning/piqa", "multiple_choice", 10, "\nAnswer: ", 50),
    ("openbook_qa", "commonsense_reasoning/openbook_qa", "multiple_choice", 0, None, 25),
    ("lambada_openai", "language_understanding/lambada_openai", "language_modeling", 0, None, 0),
    ("hellaswag", "language_understanding/hellaswag", "multiple_choice", 10, None, 25),
    ("winograd", "language_understanding/winograd_wsc", "schema", 0, None, 50),
    ("winogrande", "language_understanding/winogrande", "schema", 0, None, 50),
    (
        "bigbench_dyck_languages",
        "symbolic_problem_solving/bigbench_dyck_languages",
        "language_modeling",
        10,
        None,
        0,
    ),  # noqa: E501
    (
        "agi_eval_lsat_ar",
        "symbolic_problem_solving/agi_eval_lsat_ar",
        "multiple_choice",
        3,
        None,
        25,
    ),  # noqa: E501
    (
        "bigbench_cs_algorithms",
        "symbolic_problem_solving/bigbench_cs_algorithms",
        "language_modeling",
        10,
        None,
        0,
    ),  # noqa: E501
    (
        "bigbench_operators",
        "symbolic_problem_solving/bigbench_operators",
        "language_modeling",
        10,
        None,
        0,
    ),  # noqa: E501
    (
        "bigbench_repeat_copy_logic",
        "symbolic_problem_solving/bigbench_repeat_copy_logic",
        "language_modeling",
        10,
        None,
        0,
    ),  # noqa: E501
    ("squad", "reading_comprehension/squad", "language_modeling", 10, None, 0),
    ("coqa", "reading_comprehension/coqa", "language_modeling", 0, None, 0),
    ("boolq", "reading_comprehension/boolq", "multiple_choice", 10, "\nAnswer: ", 62),
    (
        "bigbench_language_identification",
        "language_understanding/bigbench_language_identification",
        "multiple_choice",
        10,
        None,
        25,
    ),  # noqa: E501
)
"""(label, file, type, shots, delimiter, chance in per cent) as in DCLM's definition of CORE."""


def core_rows(kind: str, num_rows: int, salt: int = 0) -> list[dict[str, Any]]:
    """Examples of one of the three types of in-context tasks."""
    rows: list[dict[str, Any]] = []
    for i in range(num_rows):
        thing, place = THINGS[(i + salt) % 8], PLACES[(i + salt) % 4]
        if kind == "multiple_choice":
            choices = [f"in {p} {i % 5}" for p in PLACES]
            rows.append({"query": f"The {thing} {i} lies", "choices": choices, "gold": i % 4})
        elif kind == "schema":
            rows.append(
                {
                    "context_options": [f"The {thing} {i} was under", f"The {thing} {i} was over"],
                    "continuation": f"{place}.",
                    "gold": i % 2,
                }
            )
        else:
            # a blank at the end of the context, as some of the publisher's files have it
            rows.append({"context": f"Row {i}: {thing} and ", "continuation": f"{thing} {i % 3}"})
    return rows


def core_bundle(num_rows: int = 14) -> bytes:
    """eval_bundle.zip: core.yaml, eval_meta_data.csv and one JSON-lines file per data set."""
    tasks, buffer = [], io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bundle:
        written = set()
        for salt, (label, file, kind, shots, delimiter, _) in enumerate(CORE_TASKS):
            task: dict[str, Any] = {
                "label": label,
                "dataset_uri": f"{file}.jsonl",
                "num_fewshot": [shots],
                "icl_task_type": kind,
            }
            if delimiter is not None:
                task["continuation_delimiter"] = delimiter
            tasks.append(task)
            if file not in written:
                written.add(file)
                lines = "".join(json.dumps(r) + "\n" for r in core_rows(kind, num_rows, salt))
                bundle.writestr(f"eval_bundle/eval_data/{file}.jsonl", lines)
        bundle.writestr("eval_bundle/core.yaml", yaml.safe_dump({"icl_tasks": tasks}))
        bundle.writestr("eval_bundle/eval_meta_data.csv", _meta_data(num_rows))
    return buffer.getvalue()


def _meta_data(num_rows: int) -> str:
    text = io.StringIO()
    columns = ["Eval Task", "Task Category", "Task Type", "#shots", "#datapoints",
               "Random baseline", "Centered Metric?", "Description"]  # fmt: skip
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    # a task that CORE has not, as in the publisher's table
    for label, file, kind, shots, _, chance in (
        *CORE_TASKS,
        ("siqa", "commonsense_reasoning/siqa", "multiple_choice", 10, None, 50),
    ):
        row = (label, file.partition("/")[0], kind.replace("_", " "), shots, num_rows, chance)
        writer.writerow(dict(zip(columns, (*row, "", "made up, for tests"), strict=True)))
    return text.getvalue()


# -- all of them, by repository


FOLDERS = {
    "karpathy/fineweb-edu-100b-shuffle": "fineweb_edu",
    "allenai/ai2_arc": "arc",
    "openai/gsm8k": "gsm8k",
    "cais/mmlu": "mmlu",
    "openai/openai_humaneval": "humaneval",
    "HuggingFaceTB/smol-smoltalk": "smoltalk",
    "files": "core",
}
"""Repository -> the source's folder in a data folder."""


def place(
    data_folder: Path, num_rows: int = 24, num_shards: int = 2, *, locked: bool = False
) -> None:
    """Put all sets into a data folder, as if fetched; with `locked`, also the locks beside them."""
    for repository, files in repositories(num_rows, num_shards).items():
        source = FOLDERS[repository]
        entries = {}
        for name, content in files.items():
            path = data_folder / source / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
            entries[name] = {"size": len(content), "sha256": digest}
        if locked:
            lock = {"format": LOCK_FORMAT, "source": source, "files": entries}
            (data_folder / source / LOCK_NAME).write_text(json.dumps(lock))


def repositories(num_rows: int = 24, num_shards: int = 2) -> dict[str, dict[str, bytes]]:
    """Repository -> file -> content, for tests/twin/hub.py."""
    n = num_rows
    return {
        "karpathy/fineweb-edu-100b-shuffle": {
            f"shard_{i:05d}.parquet": fineweb(40, 40 * i) for i in (*range(num_shards), 1822)
        },
        "allenai/ai2_arc": {
            f"ARC-{kind}/{split}-{ONE}": arc(n, 1000 * k + 100 * j)
            for k, kind in enumerate(("Easy", "Challenge"))
            for j, split in enumerate(("train", "validation", "test"))
        },
        "openai/gsm8k": {
            f"main/train-{ONE}": gsm8k(4 * n),
            f"main/test-{ONE}": gsm8k(n, 5000),
        },
        "cais/mmlu": {
            f"all/auxiliary_train-{ONE}": mmlu(n, 0, subject=""),
            f"all/validation-{ONE}": mmlu(n, 300),
            f"all/test-{ONE}": mmlu(n, 600),
        },
        "openai/openai_humaneval": {f"openai_humaneval/test-{ONE}": humaneval(6)},
        "HuggingFaceTB/smol-smoltalk": {
            **{f"data/train-{i:05d}-of-00004.parquet": smoltalk(n, 100 * i) for i in range(4)},
            f"data/test-{ONE}": smoltalk(n, 900),
        },
        "files": {"eval_bundle.zip": core_bundle()},
    }
