"""The same model, the same questions: lm-evaluation-harness marks every example as we do.

The harness runs in an environment of its own (tests/oracle/), on the exported model through Hugging
Face transformers, with task files made here from the sets in the publishers' formats. Where its
conventions differ from CORE's, docs/evaluation.md says how, and the task files follow CORE's.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nanochat.engine import Engine, num_common
from nanochat.evaluation import accuracy, evaluate
from nanochat.gpt import GPT
from nanochat.hf import write_folder
from nanochat.scaling import GPTConfig
from nanochat.tasks import Task, make_task
from nanochat.tasks.core import LABELS, CoreTask, core_tasks
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer, render_conversation
from tests.twin import published

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(3600)]

ROOT = Path(__file__).resolve().parents[2]
ORACLE = Path(os.environ.get("NANOCHAT_ORACLE", ROOT / "build" / "oracle"))
CHAT_TASKS = ("arc_easy", "arc_challenge", "mmlu", "gsm8k")
SEQ_LEN = 1024
NUM_EXAMPLES = 12
MAX_TOKENS = 60
NAMES = (*(f"core_{label}" for label in LABELS), *CHAT_TASKS)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("oracle")
    published.place(home / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_HOME", str(home))
        core_tasks.cache_clear()
        yield home
    core_tasks.cache_clear()


@pytest.fixture(scope="module")
def oracle() -> Path:
    """The harness's interpreter; its environment is made from the lock where there is none."""
    if not (ORACLE / ".ready").exists():
        subprocess.run([ROOT / "tests" / "oracle" / "venv.sh", ORACLE], check=True)
    return ORACLE / "bin" / "python"


@pytest.fixture(scope="module")
def tokenizer(home: Path) -> Tokenizer:
    texts = [text for task in core_tasks() for text in task.example(0).texts]
    return Tokenizer.train(texts, 512)


@pytest.fixture(scope="module")
def model(home: Path, tokenizer: Tokenizer) -> GPT:
    """Knows a part of the answers by heart, so that both verdicts occur."""
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_kv_head=2, n_embd=64, seq_len=SEQ_LEN,
                          vocab_size=tokenizer.vocab_size))  # fmt: skip
    model.init_weights(3)
    rows = []
    for task in core_tasks():
        if task.kind == "language_modeling":
            texts = [task.example(i).texts[1] for i in (0, 3, 6, 9)]
            rows += [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
    gsm8k = make_task("gsm8k", "test")
    solutions = []
    for i in (0, 3, 6, 9):
        question, reply = gsm8k.example(i).conversation["messages"]
        said = "".join(p["text"] for p in reply["content"] if p["type"] == "text")
        messages = [question, {"role": "assistant", "content": said}]
        solutions.append(render_conversation(tokenizer, {"messages": messages}, SEQ_LEN)[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    rows.sort(key=len)
    batches = [rows[start : start + 8] for start in range(0, len(rows), 8)]
    for batch in [*batches * 20, *[*[solutions] * 4, *batches] * 30]:
        width = max(map(len, batch)) - 1
        inputs = torch.zeros(len(batch), width, dtype=torch.int64)
        targets = torch.full((len(batch), width), -100)
        for k, row in enumerate(batch):
            inputs[k, : len(row) - 1] = torch.tensor(row[:-1])
            targets[k, : len(row) - 1] = torch.tensor(row[1:])
        model(inputs, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def ours(home: Path, model: GPT, tokenizer: Tokenizer) -> dict[str, list[bool]]:
    """Our verdict per task and example."""
    engine = Engine(model, tokenizer, max_batch=8)
    tasks: list[Task | CoreTask] = [*core_tasks(), *(make_task(t, "test") for t in CHAT_TASKS)]
    found = {}
    for task in tasks:
        batches = evaluate(engine, task, num_examples=NUM_EXAMPLES, batch_size=4,
                           max_tokens=MAX_TOKENS)  # fmt: skip
        marked = [m for batch in batches for m in batch]
        found[task.name.replace(".", "_")] = [m.correct for m in marked]
    return found


@pytest.fixture(scope="module")
def theirs(oracle: Path, home: Path, model: GPT, tokenizer: Tokenizer) -> dict[str, Any]:
    """The harness's verdicts."""
    write_folder(home / "model", model, tokenizer, {"run": "oracle"})
    tasks = home / "tasks"
    tasks.mkdir()
    shutil.copy(ROOT / "tests" / "oracle" / "marking.py", tasks)
    for core_task in core_tasks():
        write_core(tasks, core_task, tokenizer)
    for name in CHAT_TASKS:
        write_chat(tasks, name)
    env = {**os.environ, "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1",
           "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # fmt: skip
    command = [oracle, ROOT / "tests" / "oracle" / "score.py", home / "model", tasks]
    done = subprocess.run([*command, home / "scores.json"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads((home / "scores.json").read_text())
    if keep := os.environ.get("NANOCHAT_ORACLE_OUT"):
        Path(keep).write_text(json.dumps(found))
    return found


# -- task files


def write_task(folder: Path, name: str, documents: list[dict[str, Any]], **fields: Any) -> None:
    """A task file and its documents."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(d) + "\n" for d in documents))
    marking = fields.pop("marking", None)
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "num_fewshot": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        **fields,
    }
    text = yaml.safe_dump(task)
    if marking:
        text += f"process_results: !function marking.{marking}\n"
    (folder / f"{name}.yaml").write_text(text)


def write_core(folder: Path, task: CoreTask, tokenizer: Tokenizer) -> None:
    """CORE's conventions: what the choices have in common is not judged, and means decide."""
    documents = []
    both = [
        {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_sum")
    ]
    for i in range(NUM_EXAMPLES):
        example = task.example(i)
        rows = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in example.texts]
        if task.kind == "language_modeling":
            start = min(len(rows[0]), num_common(rows))
            documents.append({"context": tokenizer.decode(rows[1][:start]),
                              "ending": tokenizer.decode(rows[1][start:])})  # fmt: skip
            continue
        if task.kind == "schema":
            num_judged = num_common([row[::-1] for row in rows])
            starts = [len(row) - num_judged for row in rows]
        else:
            starts = [num_common(rows)] * len(rows)
        heads = [tokenizer.decode(row[:s]) for row, s in zip(rows, starts, strict=True)]
        ends = [tokenizer.decode(row[s:]) for row, s in zip(rows, starts, strict=True)]
        judged = [len(row) - s for row, s in zip(rows, starts, strict=True)]
        documents.append({"contexts": heads, "context": heads[0], "choices": ends,
                          "ending": ends[0], "gold": example.gold,
                          "num_judged": judged})  # fmt: skip
    name = f"core_{task.label}"
    if task.kind == "language_modeling":
        write_task(folder, name, documents, output_type="loglikelihood",
                   doc_to_text="{{context}}", doc_to_target="{{ending}}")  # fmt: skip
    elif task.kind == "schema":
        write_task(folder, name, documents, output_type="multiple_choice", doc_to_text="gold",
                   doc_to_target="ending", doc_to_choice="contexts", metric_list=both,
                   marking="of_choices")  # fmt: skip
    else:
        write_task(folder, name, documents, output_type="multiple_choice",
                   doc_to_text="{{context}}", doc_to_target="gold", doc_to_choice="choices",
                   metric_list=both, marking="of_choices")  # fmt: skip


def write_chat(folder: Path, name: str) -> None:
    """The question in the form of a conversation; a letter, or a written solution, is the reply."""
    task = make_task(name, "test")
    documents = []
    for i in range(NUM_EXAMPLES):
        example = task.example(i)
        question = example.conversation["messages"][0]["content"]
        context = f"<|bos|><|user_start|>{question}<|user_end|><|assistant_start|>"
        document: dict[str, Any] = {"context": context, "answer": example.answer}
        if task.kind == "choice":
            document["choices"] = list(example.letters)
            document["gold"] = example.letters.index(example.answer)
            document["num_judged"] = [1] * len(example.letters)
        documents.append(document)
    if task.kind == "choice":
        write_task(folder, name, documents, output_type="multiple_choice",
                   doc_to_text="{{context}}", doc_to_target="gold", doc_to_choice="choices",
                   marking="of_choices")  # fmt: skip
    else:
        until = {"until": ["<|assistant_end|>"], "max_gen_toks": MAX_TOKENS, "do_sample": False}
        write_task(folder, name, documents, output_type="generate_until",
                   doc_to_text="{{context}}", doc_to_target="{{answer}}",
                   generation_kwargs=until, marking="of_number")  # fmt: skip


# -- what is proven


@pytest.mark.parametrize("name", NAMES)
def test_every_example_has_the_same_verdict(
    name: str, ours: dict[str, list[bool]], theirs: dict[str, Any]
) -> None:
    assert theirs[name]["correct"] == ours[name]
    assert theirs[name]["metrics"]["acc"] == pytest.approx(accuracy(ours[name])[0], abs=1e-9)


def test_both_verdicts_occur(ours: dict[str, list[bool]]) -> None:
    """Otherwise agreement would mean nothing."""
    mixed = [name for name in NAMES if len(set(ours[name])) == 2]
    assert len(mixed) > len(NAMES) / 2, ours
    assert "gsm8k" in mixed
    assert {task.kind for task in core_tasks() if f"core_{task.label}" in mixed} == {
        "multiple_choice", "schema", "language_modeling"
    }  # fmt: skip
    assert set(SPECIAL_TOKENS) >= {"<|bos|>", "<|user_start|>", "<|assistant_end|>"}
