"""Score the weights of the training stages on held-out examples of the tasks.

Batches are formed by example index and answered with a fixed number of threads, so that the numbers
do not depend on how many ranks share the work. Every result is on disk as soon as its batch is
answered, so that a killed evaluation goes on where it was: RUN/evaluations/STAGE/TASK.jsonl, and
core/TASK.jsonl for those of CORE.
"""

import time
from pathlib import Path

import torch

from nanochat import distributed
from nanochat.distributed import Dist
from nanochat.engine import Engine
from nanochat.evaluation import accuracy, evaluate
from nanochat.gpt import GPT
from nanochat.machine import num_cores
from nanochat.metrics import Metrics
from nanochat.prepare import compute_dtype, gpu_uuids, load_stage_weights
from nanochat.rundir import (
    Outcome,
    RunDir,
    append_jsonl,
    atomic_write_json,
    cut_torn_tail,
    read_json,
    read_jsonl,
)
from nanochat.scaling import gpt_config
from nanochat.spec import CHATCORE_TASKS, WEIGHT_STAGES, Evaluate
from nanochat.stage import run_stage
from nanochat.tasks import Task, make_task
from nanochat.tasks.core import CoreTask, core_score, core_tasks
from nanochat.tokenizer import load_tokenizer

STAGE = "evaluate"
Part = Task | CoreTask


def main(run: RunDir) -> Outcome:
    """Accuracy per trained stage and task, as lines of metrics.jsonl."""
    spec = run.spec()
    settings = spec.evaluate
    assert settings is not None
    dist = distributed.init(distributed.pick_device(spec.runtime.device))
    num_threads = _fix_threads(run, spec.runtime.num_threads, dist)
    dtype = compute_dtype(spec.runtime.dtype, dist.device)
    tokenizer = load_tokenizer(run.tokenizer_dir)
    trained = [s for s in WEIGHT_STAGES if run.is_done(s)]
    parts = {name: _parts(name, spec.seed) for name in settings.tasks}
    metrics = Metrics(run, STAGE, rank=dist.rank, gpu_uuids=gpu_uuids(dist))
    model = GPT(gpt_config(spec.model)).to(dist.device)
    model.init_weights(spec.seed)
    model.eval()
    seconds: dict[str, float] = {}
    for stage in trained:
        load_stage_weights(run, stage, model)
        engine = Engine(model, tokenizer, max_batch=settings.batch_size, dtype=dtype)
        found: dict[str, float] = {}
        for name in settings.tasks:
            if stage not in spec.scored_stages(name):
                continue
            started_s = time.monotonic()
            for part in parts[name]:
                if not _answer(run, engine, part, settings, _results(run, stage, part), dist):
                    metrics.close()
                    distributed.shutdown()
                    return Outcome(stage=STAGE, outcome="stopped", message=f"at {stage}, {name}")
            dist.barrier()
            if dist.is_main:
                found[name] = _log(run, metrics, stage, name, parts[name])
            seconds[f"{stage}.{name}"] = round(time.monotonic() - started_s, 3)
        if dist.is_main:
            _log_chatcore(metrics, stage, found, parts)
    metrics.close()
    distributed.shutdown()
    facts = {"num_threads": num_threads, "seconds_by_task": seconds}
    return Outcome(stage=STAGE, outcome="done", facts=facts)


def _fix_threads(run: RunDir, wanted: int | None, dist: Dist) -> int:
    """Set torch's threads of this rank: as an unfinished evaluation had them, else as wanted, else
    all cores for a CPU and one beside a GPU.

    The number of threads decides the order of a CPU's sums, so it must not follow from the number
    of ranks, as it does in training; ranks that share a CPU then share its cores too.
    """
    num_threads = wanted or (num_cores() if dist.device.type == "cpu" else 1)
    if dist.is_main:
        file = run.path / "evaluations" / "threads.json"
        file.parent.mkdir(exist_ok=True)
        num_threads = (read_json(file) or {}).get("num_threads", num_threads)
        atomic_write_json(file, {"num_threads": num_threads})
    num_threads = dist.broadcast_flag(num_threads)
    torch.set_num_threads(num_threads)
    return num_threads


def _parts(name: str, seed: int) -> tuple[Part, ...]:
    """What is answered for a task: itself, or the 22 tasks of CORE."""
    return core_tasks() if name == "core" else (make_task(name, "test", seed),)


def _results(run: RunDir, stage: str, part: Part) -> Path:
    return run.path / "evaluations" / stage / f"{part.name.replace('.', '/')}.jsonl"


def _answer(
    run: RunDir, engine: Engine, part: Part, settings: Evaluate, results: Path, dist: Dist
) -> bool:
    """Answer this rank's batches that are not on disk; False when asked to stop before the end."""
    results.parent.mkdir(parents=True, exist_ok=True)
    if dist.is_main:
        cut_torn_tail(results)
    dist.barrier()
    batches = evaluate(
        engine,
        part,
        num_examples=settings.max_examples,
        batch_size=settings.batch_size,
        max_tokens=settings.max_tokens,
        rank=dist.rank,
        world_size=dist.world_size,
        done=_correct_by_index(results).keys(),
    )
    for marked in batches:
        for m in marked:
            append_jsonl(
                results,
                {
                    "prompt": m.prompt,
                    "index": m.index,
                    "correct": m.correct,
                    "completion": m.completion,
                },
            )
        if dist.is_main:
            run.write_progress(STAGE, "evaluate", step=marked[-1].index, message=part.name)
        if run.stop_file.exists():
            break
    # a rank may have seen the stop and another one not: all of them stop, or none
    return not dist.all_reduce_sum(torch.tensor(int(run.stop_file.exists())))


def _correct_by_index(results: Path) -> dict[int, bool]:
    return {r["index"]: bool(r["correct"]) for r in read_jsonl(results)}


# -- scores


def _log(run: RunDir, metrics: Metrics, stage: str, name: str, parts: tuple[Part, ...]) -> float:
    """Log the accuracy of every part, and CORE; returns the score of the task."""
    scored = []
    num_examples = 0
    for part in parts:
        correct = _correct_by_index(_results(run, stage, part))
        value, stderr = accuracy(correct.values())
        num_examples += len(correct)
        metrics.log_task(
            stage, part.name, "accuracy", value, stderr=stderr, n=len(correct), chance=part.chance
        )
        scored.append((part, value, stderr))
    if name != "core":
        return value
    value, stderr = core_score([(p, v, e) for p, v, e in scored if isinstance(p, CoreTask)])
    metrics.log_task(stage, "core", "core", value, stderr=stderr, n=num_examples, chance=0.0)
    return value


def _log_chatcore(
    metrics: Metrics, stage: str, found: dict[str, float], parts: dict[str, tuple[Part, ...]]
) -> None:
    """The mean of the centred accuracies, where all of its tasks have been scored."""
    if not set(CHATCORE_TASKS) <= set(found):
        return
    chances = {name: parts[name][0].chance for name in CHATCORE_TASKS}
    centred = [(found[name] - chances[name]) / (1 - chances[name]) for name in CHATCORE_TASKS]
    value = sum(centred) / len(centred)
    metrics.log_task(stage, "chatcore", "chatcore", value, stderr=None, n=len(centred), chance=0.0)


if __name__ == "__main__":
    run_stage(STAGE, main)
