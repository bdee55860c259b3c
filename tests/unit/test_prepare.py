"""What a training stage is built from, and how it finds a device batch that fits."""

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import make_run_for, spec_of_stage

from nanochat import prepare as preparing
from nanochat.checkpoint import CheckpointError, load_weights
from nanochat.checkpoint_dir import CheckpointDir
from nanochat.conversations import train_on_conversations
from nanochat.data import IGNORE_INDEX
from nanochat.distributed import Dist
from nanochat.gpt import GPT
from nanochat.prepare import compute_dtype, note_out_of_memory, prepare
from nanochat.rundir import Outcome, RunDir, StopReason, newest_stage
from nanochat.scaling import gpt_config
from nanochat.stage import StageFailed
from nanochat.stages.base_train import sample_prompts
from nanochat.tokenizer import CharTokenizer

STAGE = "mid_train"
SPEC = spec_of_stage(
    STAGE, num_steps=3, total_batch_size=512, eval_every_steps=10, mixture={"copying": 60}
)

pytestmark = pytest.mark.usefixtures("one_thread")


def make_run(path: Path, device_batch_size: int = 8, world_size: int = 1) -> RunDir:
    return make_run_for(path, STAGE, SPEC, device_batch_size, world_size)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run whose mid-training went through at two rows per forward pass."""
    run = make_run(tmp_path_factory.mktemp("whole") / "run", device_batch_size=2)
    assert train_on_conversations(run, STAGE, "base_train").outcome == "done"
    return run


def fits_only(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose memory is enough for so many rows."""
    forward = GPT.forward

    def limited(self: GPT, idx: torch.Tensor, *args: Any, **kw: Any) -> torch.Tensor:
        if len(idx) > rows:
            raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")
        return forward(self, idx, *args, **kw)

    monkeypatch.setattr(GPT, "forward", limited)


def run_until_it_fits(run: RunDir) -> list[Outcome]:
    """Process after process, as the supervisor starts them."""
    outcomes = [train_on_conversations(run, STAGE, "base_train")]
    while outcomes[-1].outcome == "again":
        outcomes.append(train_on_conversations(run, STAGE, "base_train"))
    return outcomes


def losses(run: RunDir) -> list[float]:
    return [m["loss"] for m in run.metrics() if m["stage"] == STAGE and "loss" in m]


def test_out_of_memory_halves_the_device_batch_and_keeps_the_step(
    whole: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    fits_only(2, monkeypatch)
    outcomes = run_until_it_fits(run)
    assert [o.outcome for o in outcomes] == ["again", "again", "done"]
    assert "out of memory at 8 rows per rank; next: 4 rows" in outcomes[0].message
    fits = run.resolved("fit")
    assert [f["device_batch_size"] for f in fits] == [4, 2]
    assert all((f["stage"], f["device"], f["world_size"]) == (STAGE, "cpu", 1) for f in fits)
    facts = outcomes[-1].facts
    assert (facts["device_batch_size"], facts["grad_accum_steps"]) == (2, 4)
    assert facts["num_tokens"] == 3 * 512
    assert losses(run) == losses(whole) and len(losses(run)) == 3


def test_out_of_memory_at_one_row_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", device_batch_size=2)
    fits_only(0, monkeypatch)
    assert train_on_conversations(run, STAGE, "base_train").outcome == "again"
    with pytest.raises(StageFailed, match=r"one row of 64 tokens.*model.depth or model.seq_len"):
        train_on_conversations(run, STAGE, "base_train")


def test_no_memory_for_the_model_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No smaller batch would help; an error that is none of memory stays what it is."""
    run = make_run(tmp_path / "run")
    errors = iter([torch.OutOfMemoryError("tried to allocate 200 GiB"), RuntimeError("a bug")])

    def fail(*args: Any, **kw: Any) -> None:
        raise next(errors)

    monkeypatch.setattr(preparing, "build_optimizer", fail)
    with pytest.raises(StageFailed, match=r"while the model is built.*smaller model.depth"):
        train_on_conversations(run, STAGE, "base_train")
    with pytest.raises(RuntimeError, match="^a bug$"):
        prepare(run, STAGE)
    assert run.resolved("fit") == []


def test_memory_of_the_host_may_run_out_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch raises a plain RuntimeError for it; another one is not taken for it."""
    run = make_run(tmp_path / "run")
    forward = GPT.forward

    def failing(self: GPT, idx: torch.Tensor, *args: Any, **kw: Any) -> torch.Tensor:
        torch.empty(1 << 50 if len(idx) > 4 else 1)
        return forward(self, idx, *args, **kw)

    monkeypatch.setattr(GPT, "forward", failing)
    assert [o.outcome for o in run_until_it_fits(run)] == ["again", "done"]
    assert [f["device_batch_size"] for f in run.resolved("fit")] == [4]
    with pytest.raises(RuntimeError, match="a bug"):
        note_out_of_memory(prepare(run, STAGE), RuntimeError("a bug"))
    assert len(run.resolved("fit")) == 1


def test_any_rank_may_be_the_one_that_runs_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    prepared = prepare(run, STAGE)
    prepared.dist = Dist(rank=1, world_size=2)
    outcome = note_out_of_memory(prepared, torch.OutOfMemoryError("full"))
    assert outcome.outcome == "again"
    [fit] = run.resolved("fit")
    assert (fit["device_batch_size"], fit["world_size"]) == (4, 2)
    assert prepare(run, STAGE).numbers.device_batch_size == 8  # found out on two ranks only


def test_what_fitted_is_remembered_per_kind_of_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    note_out_of_memory(prepare(run, STAGE), torch.OutOfMemoryError("full"))
    assert prepare(run, STAGE).numbers.device_batch_size == 4
    monkeypatch.setattr(preparing, "device_name", lambda device: "another")
    assert prepare(run, STAGE).numbers.device_batch_size == 8


def test_a_plan_for_other_ranks_says_nothing_about_the_batch(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", device_batch_size=1, world_size=4)
    assert prepare(run, STAGE).numbers.device_batch_size == 8
    run.freeze_plan({"offer": "cpu", "world_size": 1, "stages": [
        {"stage": STAGE, "device_batch_size": 2}]})  # fmt: skip
    assert prepare(run, STAGE).numbers.device_batch_size == 2
    assert json.loads(run.plan_file.read_text())["world_size"] == 4


def test_validation_gives_signs_of_life_and_leaves_the_model_in_training(
    whole: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    signs: list[str] = []
    monkeypatch.setattr(RunDir, "give_sign_of_life", lambda self, stage: signs.append(stage))
    before = whole.progress(STAGE)
    prepared = prepare(whole, STAGE, weights_from="base_train")
    prepared.model.train()
    rows = torch.randint(0, 300, (6, 64))
    validation = preparing.ValidationSet(rows.int(), rows.int(), None, 2, 6 * 64)
    bpb = prepared.bits_per_byte(validation)
    assert bpb is not None and 0 < bpb < 100
    assert signs == [STAGE] * 3
    assert prepared.model.training
    assert whole.progress(STAGE) == before


@pytest.mark.parametrize(
    ("reason", "is_cut_short"), [(StopReason.SIGNAL, True), (StopReason.BUDGET, False)]
)
def test_a_stop_ends_a_validation_but_for_the_budgets(
    whole: RunDir, reason: StopReason, is_cut_short: bool
) -> None:
    prepared = prepare(whole, STAGE, weights_from="base_train")
    prepared.model.train()
    rows = torch.randint(0, 300, (2, 64))
    validation = preparing.ValidationSet(rows.int(), rows.int(), None, 2, 2 * 64)
    whole.request_stop(reason, time.time() + 8.0)
    try:
        assert (prepared.bits_per_byte(validation) is None) is is_cut_short
    finally:
        whole.clear_stop()
    assert prepared.model.training


def test_rows_without_targets_have_no_finite_loss(whole: RunDir) -> None:
    """As of a chat stage whose few rows hold nothing but what the user says."""
    rows = torch.randint(0, 300, (2, 64)).int()
    nothing = torch.full_like(rows, IGNORE_INDEX)
    validation = preparing.ValidationSet(rows, nothing, None, 2, 2 * 64)
    bpb = prepare(whole, STAGE).bits_per_byte(validation)
    assert bpb is not None and math.isnan(bpb)


def train_further(whole: RunDir, path: Path) -> RunDir:
    """A copy of the run whose mid-training goes on from its last checkpoint."""
    shutil.copytree(whole.path, path)
    run = RunDir(path)
    run.outcome_file(STAGE).unlink(missing_ok=True)
    return run


def test_a_resume_does_not_need_the_weights_of_the_stage_before(
    whole: RunDir, tmp_path: Path
) -> None:
    """Somebody has made room."""
    run = train_further(whole, tmp_path / "run")
    shutil.rmtree(run.checkpoints_dir("base_train"))
    outcome = train_on_conversations(run, STAGE, "base_train")
    assert (outcome.outcome, outcome.step) == ("done", 3)
    assert [m["message"] for m in run.metrics() if m.get("event") == "start"][-1].endswith("step 3")
    shutil.rmtree(run.checkpoints_dir(STAGE))
    with pytest.raises(CheckpointError, match=r"base_train; complete steps: none"):
        train_on_conversations(run, STAGE, "base_train")


def test_a_stage_with_weights_alone_says_so_and_keeps_them(whole: RunDir, tmp_path: Path) -> None:
    run = train_further(whole, tmp_path / "run")
    CheckpointDir(run.checkpoints_dir(STAGE)).thin(3)
    shutil.rmtree(run.checkpoints_dir("base_train"))
    with pytest.raises(CheckpointError, match="only weights are left of step 3 of mid_train"):
        train_on_conversations(run, STAGE, "base_train")
    assert newest_stage(run) == STAGE
    assert load_weights(run.checkpoints_dir(STAGE))[1]["position"]["step"] == 3


def test_weights_are_those_of_the_stage_before(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    prepared = prepare(run, STAGE, weights_from="base_train")
    fresh = prepare(run, STAGE)
    saved = GPT(gpt_config(SPEC.model))
    saved.init_weights(0)
    assert torch.equal(prepared.model.wte.weight, saved.wte.weight)
    assert not torch.equal(fresh.model.wte.weight, saved.wte.weight)


def test_compute_dtype() -> None:
    cpu = torch.device("cpu")
    assert compute_dtype("auto", cpu) == torch.float32
    assert compute_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert compute_dtype("bf16", cpu) == torch.bfloat16


@pytest.mark.parametrize(
    ("alphabet", "prompts"),
    [("abcdefghijklmnopqrstuvwxyz ICRTu", 6), ("The cat", 1), ("\u0430\u0431\u0432", 1)],
)
def test_a_text_without_the_letters_of_a_prompt_is_not_asked_to_continue_it(
    alphabet: str, prompts: int
) -> None:
    """A text in another script would else end its run at the first sample, with 78."""
    found = sample_prompts(CharTokenizer(alphabet, 64), seq_len=64)
    assert len(found) == prompts
    assert all(ids[0] == CharTokenizer(alphabet, 64).bos_id for ids in found.values())
    assert ("The " in found) == ("T" in alphabet)


def test_prompts_fit_the_shortest_context() -> None:
    """Character by character, "import " and <|bos|> fill a context of 8."""
    tokenizer = CharTokenizer("abcdefghijklmnopqrstuvwxyz ICRT", 64)
    for seq_len, prompts in ((9, 5), (8, 4), (5, 1), (3, 1)):
        found = sample_prompts(tokenizer, seq_len)
        assert len(found) == prompts
        assert all(len(ids) < seq_len for ids in found.values())
    assert list(found.values()) == [[tokenizer.bos_id]]
