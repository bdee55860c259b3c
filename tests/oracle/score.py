"""Score an exported model with lm-evaluation-harness; runs in the oracle's own environment.

    score.py MODEL_DIR TASKS_DIR OUT.json

TASKS_DIR holds lm-eval's task files (*.yaml) with their documents (*.jsonl). OUT maps a task to its
metrics and to one record per document: index, correct, and what the model said or found likely.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    model, tasks, out = map(Path, sys.argv[1:])
    names = sorted(path.stem for path in tasks.glob("*.yaml"))
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={model},dtype=float32,backend=causal,max_length=1024",
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=8,
        device="cpu",
        log_samples=True,
        bootstrap_iters=0,
    )
    found = {}
    for name in names:
        samples = sorted(results["samples"][name], key=lambda s: s["doc_id"])
        metrics = {
            key.partition(",")[0]: value
            for key, value in results["results"][name].items()
            if isinstance(value, float) and "stderr" not in key
        }
        found[name] = {
            "metrics": metrics,
            "correct": [bool(s["acc"]) for s in samples],
            "likely": [s["filtered_resps"] for s in samples],
        }
    out.write_text(json.dumps(found, default=str))


if __name__ == "__main__":
    main()
