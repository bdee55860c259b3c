"""Tasks: disjoint splits, equal examples for equal seeds, answers that mark themselves right."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.calculator import calculate
from nanochat.spec import GENERATED_TASKS, SpecError
from nanochat.tasks import TASKS, Mixture, make_task
from nanochat.tasks.common import in_test_split

NAMES = sorted(GENERATED_TASKS)


def question(conversation: dict) -> str:
    return conversation["messages"][0]["content"]


def reply_text(conversation: dict) -> str:
    content = conversation["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


@pytest.mark.parametrize("name", NAMES)
@given(seeds=st.tuples(st.integers(0, 2**31), st.integers(0, 2**31)), start=st.integers(0, 900_000))
def test_no_question_is_in_both_splits(name: str, seeds: tuple[int, int], start: int) -> None:
    train, test = make_task(name, "train", seeds[0]), make_task(name, "test", seeds[1])
    trained_on = {question(train.example(start + i).conversation) for i in range(40)}
    held_out = {question(test.example(i).conversation) for i in range(10)}
    assert not trained_on & held_out


@pytest.mark.parametrize("name", NAMES)
def test_every_drawn_instance_belongs_to_one_split_by_its_key(name: str) -> None:
    task = TASKS[name]("train")
    rng = random.Random(0)
    keys = {task.draw(rng).key for _ in range(3000)}
    share = sum(in_test_split(name, key) for key in keys) / len(keys)
    assert 0.02 < share < 0.2


@pytest.mark.parametrize("name", NAMES)
def test_examples_depend_on_seed_split_and_index_alone(name: str) -> None:
    for split in ("train", "test"):
        forwards, backwards = make_task(name, split, 5), make_task(name, split, 5)
        indices = range(min(30, forwards.num_examples))
        expected = [forwards.example(i) for i in indices]
        assert [backwards.example(i) for i in reversed(indices)] == expected[::-1]
        other = [make_task(name, split, 6).example(i) for i in indices]
        assert other != expected
        with pytest.raises(IndexError):
            forwards.example(forwards.num_examples)


@pytest.mark.parametrize("name", NAMES)
def test_held_out_instances_are_distinct(name: str) -> None:
    task = make_task(name, "test")
    asked = [question(task.example(i).conversation) for i in range(task.num_examples)]
    assert len(set(asked)) == len(asked)


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_reply_is_right_and_another_one_is_not(name: str) -> None:
    task = make_task(name, "test")
    examples = [task.example(i) for i in range(40)]
    for example in examples:
        assert reply_text(example.conversation) == example.answer
        assert task.evaluate(example, f" {example.answer}\n")
        assert not task.evaluate(example, example.answer + " or so")
        assert not task.evaluate(example, "")
        if task.kind == "choice":
            assert example.answer in example.letters
            assert task.chance == 1 / len(example.letters)
    wrong = sum(
        task.evaluate(a, b.answer) for a, b in itertools.pairwise(examples) if a.answer != b.answer
    )
    assert wrong == 0


def test_arithmetic_says_what_the_calculator_says() -> None:
    task = make_task("arithmetic", "train")
    for i in range(200):
        expression, output, _ = task.example(i).conversation["messages"][-1]["content"]
        assert calculate(expression["text"]) == output["text"] == task.example(i).answer


def test_both_orders_of_a_sum_are_one_question() -> None:
    keys = {}
    rng = random.Random(1)
    for _ in range(5000):
        instance = TASKS["arithmetic"]("train").draw(rng)
        expression = instance.example.conversation["messages"][-1]["content"][0]["text"]
        keys[expression] = instance.key
    swapped = [(e, " + ".join(reversed(e.split(" + ")))) for e in keys if " + " in e]
    both = [(a, b) for a, b in swapped if b in keys and a != b]
    assert both and all(keys[a] == keys[b] for a, b in both)


def test_a_mixture_holds_what_was_asked_in_a_fixed_order() -> None:
    sizes = {"copying": 30, "identity": 20}
    conversations = Mixture(sizes, "train", seed=3)
    assert list(conversations) == list(Mixture(dict(reversed(sizes.items())), "train", seed=3))
    assert list(conversations) != list(Mixture(sizes, "train", seed=4))
    copied = [make_task("copying", "train", 3).example(i).conversation for i in range(30)]
    assert [conversations[i] for i in range(30)] == copied and len(conversations) == 50
    twice = Mixture({"identity": 100}, "test")  # of 40: passed through more than once
    assert len(twice) == 100 and twice[99] == twice[19]
    with pytest.raises(IndexError):
        twice[100]


def test_an_unknown_task_names_the_known_ones() -> None:
    with pytest.raises(SpecError, match="unknown task 'copyng'; known tasks: .*copying"):
        make_task("copyng", "train")
