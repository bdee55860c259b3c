"""How the documents are marked; copied beside the task files, whose `!function` lines name it.

`acc_sum` is lm-eval's own `acc` of multiple choice: the largest sum. `acc` is CORE's: the largest
mean over the judged tokens.
"""

import re


def of_choices(doc: dict, results: list) -> dict:
    sums = [likely for likely, _ in results]
    means = [total / n for total, n in zip(sums, doc["num_judged"], strict=True)]
    return {
        "acc": float(means.index(max(means)) == doc["gold"]),
        "acc_sum": float(sums.index(max(sums)) == doc["gold"]),
    }


def of_number(doc: dict, results: list) -> dict:
    """The expression of lm-eval's own task gsm8k (strict-match)."""
    match = re.search(r"#### (\-?[0-9\.\,]+)", results[0])
    said = match[1].replace(",", "").rstrip(".") if match else None
    return {"acc": float(said == doc["answer"])}
