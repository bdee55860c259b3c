"""Scoring against results that the benchmarks' authors have published.

* GSM8K: openai/grade-school-math at 3101c7d, data/example_model_solutions.jsonl (MIT): answers of
  their models, cut to their ends, with the verdicts. These have `A: ` where the set has `#### `.
* HumanEval: openai/human-eval at 6d43fb9, data/example_samples.jsonl (MIT); by its README their
  pass@1 is 0.5.
* CORE: mlfoundations/dclm at 361714b, exp_data/evals/evaluation_llama2_7b_openlm_heavy.json (MIT),
  the accuracies of Llama 2 7B and its `Core_v2`; eval/eval_meta_data.csv has what guessing scores.
* ARC and MMLU: the example of each set's card (allenai/ai2_arc, cais/mmlu).
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat import sandbox
from nanochat.engine import Engine
from nanochat.evaluation import evaluate
from nanochat.tasks.arc import ArcChallenge
from nanochat.tasks.common import Example
from nanochat.tasks.core import CoreTask, core_score
from nanochat.tasks.gsm8k import Gsm8k
from nanochat.tasks.humaneval import HumanEval
from nanochat.tasks.mmlu import Mmlu
from nanochat.tokenizer import Tokenizer
from tests.twin import published

# -- GSM8K

GSM8K = {
    "3 bolts of fabric\nA: 3": [
        ("2+1=<<2+1=3>>3 bolts of blue and white fiber\nA: 3", True),
        ("<<2+1=3>>3.0 bolts of blue and white fiber altogether.\nA: 3", True),
        ("a total of 200+50 = <<200+50=250>>250 meters of fiber\nA: 250", False),
    ],
    "A: 276,000": [
        ("So he pays 24000+1000=$<<24000+1000=25000>>25000\nA: 25000", False),
        ("240,000+24,000+288,000=$<<240000+24000+288000=552000>>552,000\nA: 552,000", False),
    ],
    "A: 65,960": [("that is $95060 - $29100 = $<<95060-29100=65960>>65960.\nA: 65960", True)],
    "A: 3000": [("<<6000-3000=3000>>3,000 feet to reach the comb.\nA: 3,000", True)],
    "A: 120000": [("<<120000+6=120006>>120,006\nA: 120,006", False)],
    "A: 14": [("Jean can fill 14 / 10 = <<14/10=1.4>>1.4 bags.\nA: 1.4", False)],
}


@pytest.mark.parametrize("reference", GSM8K)
def test_gsm8k_answers_get_their_authors_verdict(reference: str) -> None:
    task = object.__new__(Gsm8k)  # without its files
    row = {"question": "", "answer": reference.replace("A: ", "#### ")}
    example = task.from_row(row)
    for solution, is_correct in GSM8K[reference]:
        assert task.evaluate(example, solution.replace("A: ", "#### ")) == is_correct, solution


# -- HumanEval

PROBLEM = {
    "prompt": "def return1():\n",
    "canonical_solution": "    return 1",
    "test": "def check(candidate):\n    assert candidate() == 1",
    "entry_point": "return1",
}
SAMPLES = (
    "    import subprocess\n    subprocess.check_output('rm -rf tmp')",
    "    import time\n    time.sleep(10)\n    return 1",
    "    return input('enter a number')",
    "    return 1",
    "  return 1",
    "\treturn 1",
)


@pytest.mark.skipif(sandbox.problem() is not None, reason="no sandbox here")
def test_humaneval_samples_have_their_authors_pass_at_1(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = sandbox.passes
    # their own limit is 3 s; nothing here computes, so a shorter one tells the same
    monkeypatch.setattr(sandbox, "passes", lambda program: passes(program, timeout_s=1.0))
    task = object.__new__(HumanEval)
    example = task.from_row(PROBLEM)
    verdicts = [task.evaluate(example, sample) for sample in SAMPLES]
    assert verdicts == [False, False, False, True, True, True]


# -- CORE

LLAMA_2_7B = {
    "hellaswag_zeroshot": 0.7498506307601929,
    "jeopardy": 0.530568516254425,
    "bigbench_qa_wikidata": 0.7346587181091309,
    "arc_easy": 0.7693602442741394,
    "arc_challenge": 0.5093856453895569,
    "copa": 0.800000011920929,
    "commonsense_qa": 0.6265356540679932,
    "piqa": 0.7948857545852661,
    "openbook_qa": 0.4259999990463257,
    "lambada_openai": 0.7362701296806335,
    "hellaswag": 0.7733519077301025,
    "winograd": 0.8534798622131348,
    "winogrande": 0.6937648057937622,
    "bigbench_dyck_languages": 0.34299999475479126,
    "agi_eval_lsat_ar": 0.2869565188884735,
    "bigbench_cs_algorithms": 0.4469696879386902,
    "bigbench_operators": 0.4571428596973419,
    "bigbench_repeat_copy_logic": 0.21875,
    "squad": 0.6075685620307922,
    "coqa": 0.47037455439567566,
    "boolq": 0.7972477078437805,
    "bigbench_language_identification": 0.3271999955177307,
}
LLAMA_2_7B_CORE = 0.4754504575067023


def test_core_of_llama_2_is_what_its_authors_computed() -> None:
    chances = {row[0]: row[5] / 100 for row in published.CORE_TASKS}
    scored = [
        (CoreTask(label, "multiple_choice", 0, " ", chances[label], []), accuracy, 0.0)
        for label, accuracy in LLAMA_2_7B.items()
    ]
    assert core_score(scored)[0] == pytest.approx(LLAMA_2_7B_CORE, abs=1e-12)


# -- ARC, MMLU

OAKS = {
    "question": "One year, the oak trees in a park began producing more acorns than usual. The "
    "next year, the population of chipmunks in the park also increased. Which best explains why "
    "there were more chipmunks the next year?",
    "choices": {
        "text": [
            "Shady areas increased.",
            "Food sources increased.",
            "Oxygen levels increased.",
            "Available water increased.",
        ],
        "label": ["A", "B", "C", "D"],
    },
    "answerKey": "B",
}
BONE = {
    "question": "What is the embryological origin of the hyoid bone?",
    "choices": [
        "The first pharyngeal arch",
        "The first and second pharyngeal arches",
        "The second pharyngeal arch",
        "The second and third pharyngeal arches",
    ],
    "answer": 3,
}
TOKENIZER = Tokenizer.train(["the oak trees in a park"], 270)


class OneExample:
    """A task of one example, by the rules of another."""

    name, kind, chance, num_examples = "one", "choice", 0.25, 1

    def __init__(self, rules: Any, row: dict[str, Any]) -> None:
        self.rules = object.__new__(rules)
        self.row = row

    def example(self, index: int) -> Example:
        return self.rules.from_row(self.row)

    def evaluate(self, example: Example, completion: str) -> bool:
        return self.rules.evaluate(example, completion)


class Says(Engine):
    """An engine whose next token has the given logits."""

    tokenizer, max_seq_len = TOKENIZER, 4096

    def __init__(self, logits: dict[str, float]) -> None:
        self.logits = logits

    def next_logits(self, prompts: Any) -> Tensor:
        row = torch.full((TOKENIZER.vocab_size,), -5.0)
        for text, value in self.logits.items():
            (token,) = TOKENIZER.encode(text)
            row[token] = value
        return row.repeat(len(prompts), 1)


@pytest.mark.parametrize(("rules", "row", "right"), [(ArcChallenge, OAKS, "B"), (Mmlu, BONE, "D")])
def test_the_likeliest_of_the_letters_is_the_answer(rules: Any, row: Any, right: str) -> None:
    """Not the likeliest token: one that is no letter of the question does not count."""
    task = OneExample(rules, row)
    for letter in "ABCD":
        engine = Says({"E": 9.0, "t": 8.0, letter: 1.5, "C": 1.0 + 0.6 * (letter == "C")})
        ((marked,),) = evaluate(engine, task, num_examples=1, batch_size=1, max_tokens=1)
        assert (marked.completion, marked.correct) == (letter, letter == right)
