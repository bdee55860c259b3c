"""The stage evaluate on 1, 2 and 4 ranks, and killed: every verdict and every score is the same."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from infra.planner import make_plan
from infra.processes import stage_command, stage_env
from nanochat import sandbox
from nanochat.checkpoint import Checkpointer
from nanochat.gpt import GPT
from nanochat.rundir import RunDir
from nanochat.scaling import gpt_config
from nanochat.spec import RunSpec
from nanochat.tokenizer import Tokenizer
from tests.twin import published

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

TASKS = ["core", "arc_easy", "arc_challenge", "mmlu", "gsm8k", "spelling", "kinds"]
if sandbox.problem() is None:
    TASKS.append("humaneval")
SPEC = RunSpec.model_validate(
    {
        "name": "scored",
        "model": {"depth": 2, "aspect_ratio": 32, "head_dim": 32, "seq_len": 256,
                  "vocab_size": 400},
        "checkpoint": {"free_floor_gib": 0.0, "asynchronous": False},
        "runtime": {"compile": False, "tensorboard": False},
        "base_train": {"num_steps": 1, "total_batch_size": 1024},
        "chat_sft": {"num_steps": 1, "total_batch_size": 1024, "mixture": {"kinds": 1}},
        "evaluate": {"tasks": TASKS, "max_examples": 10, "max_tokens": 12, "batch_size": 3},
    }
)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    published.place(home / "data")
    return home


def new_run(path: Path) -> RunDir:
    """A run whose weights are random, of two stages."""
    run = RunDir(path)
    run.create()
    run.freeze_spec(SPEC)
    run.freeze_plan(make_plan(SPEC).to_json())
    text = "the lamp is kept in a cellar, in a boat, on a meadow. Spell the word " * 9
    Tokenizer.train([text], SPEC.model.vocab_size).save(run.tokenizer_dir)
    for seed, stage in enumerate(("base_train", "chat_sft")):
        model = GPT(gpt_config(SPEC.model))
        model.init_weights(seed)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        with Checkpointer(run.checkpoints_dir(stage), SPEC.checkpoint) as checkpointer:
            checkpointer.save(1, {"model": model.state_dict()}, {}, wait=True)
        outcome = run.outcome_file(stage)
        outcome.write_text(json.dumps({"stage": stage, "outcome": "done"}))
    return run


def start(run: RunDir, home: Path, ranks: int) -> subprocess.Popen[bytes]:
    env = {**stage_env(ranks, None), "NANOCHAT_HOME": str(home), "NANOCHAT_OFFLINE": "1"}
    env["OMP_WAIT_POLICY"] = "passive"  # four ranks of as many threads as cores share the cores
    with open(run.log_file("evaluate"), "ab") as log:
        return subprocess.Popen(
            stage_command("evaluate", run.path, ranks), env=env, stdout=log, stderr=log
        )


def finish(run: RunDir, home: Path, ranks: int) -> None:
    assert start(run, home, ranks).wait(timeout=400) == 0
    outcome = run.outcome("evaluate")
    assert outcome is not None and outcome.outcome == "done", run.log_file("evaluate").read_text()


def verdicts(run: RunDir) -> dict[str, list[dict[str, Any]]]:
    """Per file of results the lines in order of their index, each example once."""
    folder = run.path / "evaluations"
    found = {}
    for path in sorted(folder.rglob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        by_index = {line["index"]: line for line in lines}
        found[str(path.relative_to(folder))] = [by_index[i] for i in sorted(by_index)]
    return found


def scores(run: RunDir) -> list[dict[str, Any]]:
    return [m for m in run.metrics() if "task" in m]


@pytest.fixture(scope="module")
def alone(home: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = new_run(tmp_path_factory.mktemp("alone") / "run")
    finish(run, home, 1)
    return run


def test_all_of_it_is_scored(alone: RunDir) -> None:
    found = verdicts(alone)
    assert len([name for name in found if "/core/" in name]) == 22
    scored = {(m["stage"], m["task"]) for m in scores(alone)}
    assert ("base_train", "core") in scored and ("chat_sft", "mmlu") in scored
    assert ("chat_sft", "chatcore") in scored or "humaneval" not in TASKS
    by_name = {(m["stage"], m["task"]): m for m in scores(alone)}
    assert by_name["chat_sft", "mmlu"]["n"] == 10
    assert sum((m["stderr"] or 0.0) > 0.0 for m in by_name.values()) > 8  # right and wrong
    for lines in found.values():
        assert [line["index"] for line in lines] == list(range(len(lines)))


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_change_nothing(alone: RunDir, home: Path, tmp_path: Path, ranks: int) -> None:
    run = new_run(tmp_path / "run")
    finish(run, home, ranks)
    assert verdicts(run) == verdicts(alone)
    assert scores(run) == scores(alone)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_killed_and_resumed_on_other_ranks(
    alone: RunDir, home: Path, tmp_path: Path, before: int, after: int
) -> None:
    """With half of the files begun; what is answered is not answered again."""
    run = new_run(tmp_path / "run")
    process = start(run, home, before)
    folder = run.path / "evaluations"
    deadline = time.monotonic() + 300
    while len(list(folder.rglob("*.jsonl"))) < 18:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for victim in tree:
        victim.kill()
    psutil.wait_procs(tree, timeout=10)
    process.wait()
    assert not run.is_done("evaluate")
    answered = {p: p.read_text() for p in folder.rglob("*.jsonl")}
    finish(run, home, after)
    assert verdicts(run) == verdicts(alone)
    assert scores(run) == scores(alone)
    whole = [p for p, text in answered.items() if text.count("\n") == 10]
    assert whole and all(p.read_text() == answered[p] for p in whole)
