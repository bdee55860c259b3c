"""The published sets as tasks: their formats, their marking, the places of their splits."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from nanochat import sandbox, touches
from nanochat.calculator import calculate
from nanochat.spec import PUBLISHED_TASKS, SpecError
from nanochat.tasks import TASKS, Mixture, make_task
from nanochat.tasks.core import LABELS, CoreTask, core_score, core_tasks
from nanochat.tasks.gsm8k import final_number, solution_parts
from nanochat.tasks.humaneval import program_of
from nanochat.tokenizer import Tokenizer, render_conversation
from tests.twin import published

ROWS = 24
CHAT_TASKS = sorted(set(PUBLISHED_TASKS) - {"core"})
CASES = [(task, split) for task in CHAT_TASKS for split in touches.TASK_FILES[task]]
TOKENIZER = Tokenizer.train(["the cat and the hat"], 270)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    published.place(home / "data", num_rows=ROWS)
    return home


@pytest.fixture(autouse=True)
def own_home(data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_HOME", str(data))
    core_tasks.cache_clear()
    return data


def test_every_published_task_is_there() -> None:
    assert set(PUBLISHED_TASKS) <= set(TASKS) | {"core"}
    assert set(touches.TASK_FILES) == set(PUBLISHED_TASKS)


@pytest.mark.parametrize(("name", "split"), CASES)
def test_every_row_is_an_example_in_an_order_of_its_own(name: str, split: touches.Split) -> None:
    task, again = make_task(name, split, 1), make_task(name, split, 2)
    examples = [task.example(i) for i in range(task.num_examples)]
    assert [again.example(i) for i in range(again.num_examples)] == examples
    assert len({str(e.conversation) for e in examples}) == len(examples) > 2
    with pytest.raises(IndexError):
        task.example(len(examples))
    for example in examples:
        ids, mask = render_conversation(TOKENIZER, example.conversation, max_tokens=4096)
        assert len(ids) == len(mask) and any(mask)
        if task.kind == "choice":
            assert example.answer in example.letters
            assert task.evaluate(example, example.answer)
            assert not any(
                task.evaluate(example, x) for x in example.letters if x != example.answer
            )


@pytest.mark.parametrize(("name", "split"), CASES)
def test_it_opens_the_files_of_its_split_and_no_other(
    name: str, split: touches.Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: set[str] = set()
    parquet_file = pq.ParquetFile

    def noting(path: Path) -> pq.ParquetFile:
        opened.add(str(path.relative_to(touches.data_roots()[-1])))
        return parquet_file(path)

    monkeypatch.setattr(pq, "ParquetFile", noting)
    task = make_task(name, split)
    for i in range(task.num_examples):
        task.example(i)
    assert opened == set(touches.task_files(name, split))


def test_splits_share_nothing() -> None:
    for name in CHAT_TASKS:
        questions = {}
        for split in touches.TASK_FILES[name]:
            task = make_task(name, split)
            rows = [str(task.example(i).conversation) for i in range(task.num_examples)]
            assert not set(rows) & set(questions)
            questions.update(dict.fromkeys(rows, split))
    train, held_out = make_task("gsm8k", "train"), make_task("gsm8k", "validation")
    assert train.num_examples + held_out.num_examples == 4 * ROWS
    assert 0 < held_out.num_examples < train.num_examples / 4


def test_a_missing_split_or_file_or_column_is_named(data: Path) -> None:
    with pytest.raises(SpecError, match="mmlu has no train split .*mmlu_aux"):
        make_task("mmlu", "train")
    place = data / "data" / touches.TASK_FILES["arc_easy"]["test"][0]
    content = place.read_bytes()
    place.unlink()
    with pytest.raises(SpecError, match=r"arc/ARC-Easy/test-.* is missing .*nanochat fetch"):
        make_task("arc_easy", "test")
    place.write_bytes(published.gsm8k(3))
    with pytest.raises(SpecError, match="has no column choices, answerKey"):
        make_task("arc_easy", "test").example(0)
    place.write_bytes(content[:200])
    with pytest.raises(SpecError, match="delete it and fetch it again"):
        make_task("arc_easy", "test").example(0)
    place.write_bytes(content)


# -- choices


def test_a_choice_is_asked_with_the_letter_behind_each_answer() -> None:
    task = make_task("mmlu", "test")
    example = task.example(0)
    prompt = example.conversation["messages"][0]["content"]
    assert prompt.startswith("Multiple Choice question: Number ")
    lines = prompt.splitlines()
    assert [line[-2:] for line in lines[1:5]] == ["=A", "=B", "=C", "=D"]
    assert prompt.endswith("\n\nRespond only with the letter of the correct answer.")


def test_numbered_choices_keep_their_digits() -> None:
    task = make_task("arc_easy", "test")
    letters = {task.example(i).letters for i in range(task.num_examples)}
    assert letters == {("A", "B", "C", "D"), ("1", "2", "3", "4")}


# -- GSM8K


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is 5.\n#### 5", "5"),
        ("#### 1,234,567", "1234567"),
        ("#### -3", "-3"),
        ("#### 2.50", "2.50"),
        ("#### 18.", "18"),
        ("#### 7 and then #### 8", "7"),
        ("####9", "9"),
        ("It is 5.", None),
        ("#### five", None),
    ],
)
def test_the_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == number


def test_calculator_calls_become_parts_and_are_true() -> None:
    """The worked example of the publisher's card."""
    solution = (
        "Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\n"
        "Working 50 minutes, she earned 0.2 x 50 = $<<0.2*50=10>>10.\n#### 10"
    )
    parts = solution_parts(solution)
    assert [p["type"] for p in parts] == [
        "text", "python", "python_output", "text", "python", "python_output", "text",
    ]  # fmt: skip
    calls = [
        (a["text"], b["text"])
        for a, b in zip(parts, parts[1:], strict=False)
        if a["type"] == "python"
    ]
    assert calls == [("12/60", "0.2"), ("0.2*50", "10")]
    assert all(calculate(expression) == value for expression, value in calls)


def test_a_reply_with_the_number_is_right_whatever_its_way() -> None:
    task = make_task("gsm8k", "test")
    for i in range(5):
        example = task.example(i)
        assert task.evaluate(example, f"I guess.\n#### {int(example.answer):,}")
        assert not task.evaluate(example, f"#### {int(example.answer) + 1}")
        assert not task.evaluate(example, example.answer)


# -- HumanEval


@pytest.mark.skipif(sandbox.problem() is not None, reason="no sandbox here")
def test_programs_are_run() -> None:
    task = make_task("humaneval", "test")
    example = task.example(0)
    prompt, program = (m["content"] for m in example.conversation["messages"])
    body = program.removeprefix(prompt)
    assert task.evaluate(example, program)
    assert task.evaluate(example, f"Here it is:\n\n```python\n{program}\n```\nDone.")
    assert task.evaluate(example, body)
    assert not task.evaluate(example, body.replace("+ b", "- b"))
    assert not task.evaluate(example, "")
    assert not task.evaluate(example, "raise SystemExit")


def test_a_reply_is_completed_with_what_stands_before_the_function() -> None:
    prompt = (
        "import math\n\n\ndef helper(x: int) -> int:\n    return x\n\n\n"
        'def wanted(x: int) -> int:\n    """ Says. """\n'
    )
    whole = "def wanted(x: int) -> int:\n    return helper(math.floor(x))\n"
    assert program_of(prompt, whole) == prompt[: prompt.index("def wanted")] + whole
    assert program_of(prompt, "    return 1\n") == prompt + "    return 1\n"
    assert program_of(prompt, f"```\n{whole}```").endswith(whole.rstrip())
    unclosed = program_of(prompt, f"```python\n{whole}")
    assert unclosed.endswith(whole) and "```" not in unclosed


def test_without_a_sandbox_the_task_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "problem", lambda: "this kernel has no seccomp")
    with pytest.raises(SpecError, match="no seccomp.*Take humaneval out of evaluate.tasks"):
        make_task("humaneval", "test")


# -- SmolTalk


def test_smoltalk_begins_with_a_system_message_and_ends_with_a_reply() -> None:
    task = make_task("smoltalk", "train")
    assert task.num_examples == 4 * ROWS
    roles = {
        tuple(m["role"] for m in task.example(i).conversation["messages"])
        for i in range(task.num_examples)
    }
    assert {r[0] for r in roles} == {"system", "user"} and {r[-1] for r in roles} == {"assistant"}
    for i in (0, 50, 95):
        example = task.example(i)
        assert task.evaluate(example, example.conversation["messages"][-1]["content"])


def test_a_mixture_of_published_and_generated_conversations() -> None:
    mixed = Mixture({"smoltalk": 30, "arc_easy": 10, "identity": 5}, "train", 1)
    assert len(mixed) == 45
    assert len(Mixture({"gsm8k": 500}, "train")) == 500  # passed through more than once


# -- CORE


def task_of(label: str) -> CoreTask:
    return next(task for task in core_tasks() if task.label == label)


def test_all_22_tasks_are_read_by_name() -> None:
    tasks = core_tasks()
    assert tuple(task.label for task in tasks) == LABELS and len(LABELS) == 22
    assert {task.kind for task in tasks} == {"multiple_choice", "schema", "language_modeling"}
    by_label = {label: (kind, shots, chance) for label, _, kind, shots, _, chance in
                published.CORE_TASKS}  # fmt: skip
    for task in tasks:
        kind, shots, chance = by_label[task.label]
        assert (task.kind, task.num_shots) == (kind, shots)
        assert task.chance == pytest.approx(chance / 100)
        assert task.num_examples == 14


def test_a_choice_stands_behind_its_solved_examples() -> None:
    task = task_of("arc_easy")
    example = task.example(3)
    row = task.rows[3]
    assert len(example.texts) == 4 and example.gold == row["gold"]
    *shots, last = example.texts[1].split("\n\n")
    assert last == f"{row['query']}\nAnswer: {row['choices'][1]}"
    assert len(shots) == 10 and len(set(shots)) == 10
    solved = {f"{r['query']}\nAnswer: {r['choices'][r['gold']]}" for r in task.rows if r != row}
    assert set(shots) <= solved
    assert task.example(3) == example != task.example(4)


def test_a_schema_differs_in_the_middle() -> None:
    task = task_of("winograd")
    example = task.example(0)
    row = task.rows[0]
    assert example.texts == tuple(f"{o} {row['continuation']}" for o in row["context_options"])


def test_an_ending_follows_without_a_blank_of_its_own() -> None:
    task = task_of("jeopardy")
    example = task.example(0)
    prompt, whole = example.texts
    assert prompt.endswith("\nAnswer:") and whole.startswith(prompt)
    assert whole[len(prompt) :] == f" {task.rows[0]['continuation']}"
    lambada = task_of("lambada_openai").example(2)
    assert "\n\n" not in lambada.texts[0] and lambada.texts[0].endswith("and")


def test_core_is_the_mean_of_centred_accuracies() -> None:
    tasks = core_tasks()
    assert core_score([(t, t.chance, 0.0) for t in tasks])[0] == pytest.approx(0.0)
    assert core_score([(t, 1.0, 0.0) for t in tasks]) == (pytest.approx(1.0), 0.0)
    # published worked example: BoolQ at 0.62 is chance, HellaSwag at 0.25 too (DCLM)
    assert task_of("boolq").centred(0.62) == pytest.approx(0.0)
    assert task_of("hellaswag").centred(0.625) == pytest.approx(0.5)
    value, stderr = core_score([(t, 0.5, 0.1) for t in tasks])
    assert stderr == pytest.approx(
        sum((0.1 / (1 - t.chance)) ** 2 for t in tasks) ** 0.5 / len(tasks)
    )


def test_another_bundle_is_refused(data: Path) -> None:
    place = data / "data" / "core" / "eval_bundle.zip"
    content = place.read_bytes()
    place.write_bytes(content[:500])
    with pytest.raises(SpecError, match="not the bundle of CORE .*fetch it again"):
        core_tasks()
    place.write_bytes(content)
