"""Score the weights of every training stage on held-out instances of the tasks.

Batches are formed by example index, so that the numbers do not depend on how many ranks share the
work; every example's result is on disk as soon as its batch is answered, so that a killed
evaluation goes on where it was.
"""

import math
import time
from dataclasses import asdict
from pathlib import Path

import torch

from nanochat import distributed
from nanochat.distributed import Dist
from nanochat.engine import Engine
from nanochat.evaluation import evaluate
from nanochat.gpt import GPT
from nanochat.metrics import Metrics
from nanochat.prepare import compute_dtype, gpu_uuids, load_stage_weights
from nanochat.rundir import Outcome, RunDir, append_jsonl, cut_torn_tail, read_jsonl
from nanochat.scaling import gpt_config
from nanochat.spec import WEIGHT_STAGES, Evaluate
from nanochat.stage import run_stage
from nanochat.tasks import Task, make_task
from nanochat.tokenizer import load_tokenizer

STAGE = "evaluate"


def main(run: RunDir) -> Outcome:
    """Accuracy per trained stage and task, as lines of metrics.jsonl."""
    spec = run.spec()
    settings = spec.evaluate
    assert settings is not None
    dist = distributed.init(distributed.pick_device(spec.runtime.device))
    dtype = compute_dtype(spec.runtime.dtype, dist.device)
    tokenizer = load_tokenizer(run.tokenizer_dir)
    trained = [s for s in WEIGHT_STAGES if run.is_done(s)]
    tasks = [make_task(name, "test", spec.seed) for name in settings.tasks]
    metrics = Metrics(run, STAGE, rank=dist.rank, gpu_uuids=gpu_uuids(dist))
    model = GPT(gpt_config(spec.model)).to(dist.device)
    model.init_weights(spec.seed)
    model.eval()
    seconds: dict[str, float] = {}
    for stage in trained:
        load_stage_weights(run, stage, model)
        engine = Engine(model, tokenizer, max_batch=settings.batch_size, dtype=dtype)
        for task in tasks:
            started_s = time.monotonic()
            results = run.path / "evaluations" / stage / f"{task.name}.jsonl"
            if not _answer(run, engine, task, settings, results, dist):
                distributed.shutdown()
                return Outcome(stage=STAGE, outcome="stopped", message=f"at {stage}, {task.name}")
            dist.barrier()
            if dist.is_main:
                _log(metrics, stage, task, _correct_by_index(results))
            seconds[f"{stage}.{task.name}"] = round(time.monotonic() - started_s, 3)
    metrics.close()
    distributed.shutdown()
    return Outcome(stage=STAGE, outcome="done", facts={"seconds_by_task": seconds})


def _answer(
    run: RunDir, engine: Engine, task: Task, settings: Evaluate, results: Path, dist: Dist
) -> bool:
    """Answer this rank's batches that are not on disk; False when asked to stop before the end."""
    results.parent.mkdir(parents=True, exist_ok=True)
    if dist.is_main:
        cut_torn_tail(results)
    dist.barrier()
    batches = evaluate(
        engine,
        task,
        num_examples=settings.max_examples,
        batch_size=settings.batch_size,
        max_tokens=settings.max_tokens,
        rank=dist.rank,
        world_size=dist.world_size,
        done=_correct_by_index(results).keys(),
    )
    for marked in batches:
        for m in marked:
            append_jsonl(results, {"prompt": _prompt(task, m.index), **asdict(m)})
        if dist.is_main:
            run.write_progress(STAGE, "evaluate", step=marked[-1].index, message=task.name)
        if run.stop_file.exists():
            break
    # a rank may have seen the stop and another one not: all of them stop, or none
    return not dist.all_reduce_sum(torch.tensor(int(run.stop_file.exists())))


def _prompt(task: Task, index: int) -> str:
    """What was asked last, for people who read the results."""
    return str(task.example(index).conversation["messages"][-2]["content"])


def _correct_by_index(results: Path) -> dict[int, bool]:
    return {r["index"]: bool(r["correct"]) for r in read_jsonl(results)}


def _log(metrics: Metrics, stage: str, task: Task, correct: dict[int, bool]) -> None:
    n = len(correct)
    share = sum(correct.values()) / n
    stderr = math.sqrt(share * (1 - share) / n)
    metrics.log_task(stage, task.name, "accuracy", share, stderr=stderr, n=n, chance=task.chance)


if __name__ == "__main__":
    run_stage(STAGE, main)
