"""Training on 1, 2 and 4 ranks is the same training, replicated or sharded, also over a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor

from nanochat import distributed
from nanochat.checkpoint import Checkpointer
from nanochat.distributed import Dist, seed_rank
from nanochat.gpt import GPT, shard_model
from nanochat.optim import Optimizer, build_optimizer, muon_momentum
from nanochat.scaling import GPTConfig
from nanochat.spec import CheckpointPolicy

# Rows and numbers of matrices that no number of ranks divides: padding is at work everywhere.
CONFIG = GPTConfig(n_layer=2, n_head=3, n_kv_head=1, n_embd=18, seq_len=8, vocab_size=37)
NUM_STEPS = 3
TOTAL_ROWS = 8


def setup(dist: Dist, layout: str) -> tuple[GPT, Optimizer]:
    model = GPT(CONFIG).double()
    if layout == "sharded":
        shard_model(model, dist, recompute=True, compute_dtype=None)
    model.init_weights(seed=0)
    optimizer = build_optimizer(
        model,
        embedding_lr=0.2,
        unembedding_lr=0.004,
        matrix_lr=0.02,
        weight_decay=0.1,
        n_embd=CONFIG.n_embd,
        dist=dist,
    )
    return model, optimizer


def train(dist: Dist, model: GPT, optimizer: Optimizer, steps: range) -> list[tuple[float, ...]]:
    """(loss, gradient norm) of each step; every world size sees the same rows in each step."""
    facts = []
    rows = TOTAL_ROWS // 2 // dist.world_size  # two micro-batches per step and rank
    for step in steps:
        batch = torch.randint(0, 37, (TOTAL_ROWS, 9), generator=torch.Generator().manual_seed(step))
        losses = []
        for half in batch.chunk(2):
            mine = half[dist.rank * rows : (dist.rank + 1) * rows]
            loss = model(mine[:, :-1], mine[:, 1:]) / 2
            loss.backward()
            losses.append(loss.detach())
        optimizer.set_momentum(muon_momentum(step))
        optimizer.set_lr_scale(1 / (step + 1))
        norm = optimizer.step(max_grad_norm=1.0)
        facts.append((float(dist.all_reduce_mean(sum(losses))), float(norm)))
    return facts


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in tensors.items()
    }


def train_from_start(dist: Dist, layout: str) -> dict[str, Any]:
    model, optimizer = setup(dist, layout)
    facts = train(dist, model, optimizer, range(NUM_STEPS))
    return {
        "facts": facts,
        "weights": whole(model.state_dict()),
        "state": whole(optimizer.state_dict()),
        "numel": sum(
            (t.to_local() if isinstance(t, DTensor) else t).numel()
            for t in optimizer.state_dict().values()
        ),
    }


def resume_two_steps(dist: Dist, layout: str, directory: Path) -> list[tuple[float, ...]]:
    """Load the newest checkpoint if there is one, train two steps, save."""
    model, optimizer = setup(dist, layout)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    policy = CheckpointPolicy(free_floor_gib=0.0)
    with Checkpointer(directory, policy, rank=dist.rank, world_size=dist.world_size) as saver:
        loaded = saver.load_latest(state)
        step = 0 if loaded is None else loaded.step
        facts = train(dist, model, optimizer, range(step, step + 2))
        saver.save(step + 2, state, {}, wait=True)
    return facts


def talk(dist: Dist) -> dict[str, Any]:
    seed_rank(3, dist.rank)
    dist.barrier()
    return {
        "flag": dist.broadcast_flag(40 + dist.rank),
        "sum": float(dist.all_reduce_sum(torch.tensor(1.0 + dist.rank))),
        "mean": float(dist.all_reduce_mean(torch.tensor(1.0 + dist.rank))),
        "main": dist.is_main,
        "random": float(torch.rand(())),
    }


def everything(dist: Dist, directory: Path, resumed_layout: str) -> dict[str, Any]:
    """All that a world size has to show, in one start of its processes."""
    return {
        "replicated": train_from_start(dist, "replicated"),
        "sharded": train_from_start(dist, "sharded"),
        "resumed": resume_two_steps(dist, resumed_layout, directory),
        "talk": talk(dist),
    }


@pytest.fixture(scope="module")
def by_world_size(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """Results of every rank. One run continues from 4 sharded over 2 replicated ranks to 1."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints" / "base_train"
    four = on_ranks(4, everything, directory, "sharded")
    two = on_ranks(2, everything, directory, "replicated")
    one = {
        "replicated": train_from_start(Dist(), "replicated"),
        "resumed": resume_two_steps(Dist(), "replicated", directory),
        "talk": talk(Dist()),
    }
    return {4: four, 2: two, 1: [one]}


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_ranks_train_as_one(
    layout: str, world_size: int, by_world_size: dict[int, list[dict[str, Any]]]
) -> None:
    expected = by_world_size[1][0]["replicated"]
    for result in (rank[layout] for rank in by_world_size[world_size]):
        for (loss, norm), (one_loss, one_norm) in zip(
            result["facts"], expected["facts"], strict=True
        ):
            assert abs(loss - one_loss) < 1e-9
            assert norm == pytest.approx(one_norm, rel=1e-6)
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(result["weights"][name], weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_every_state_has_an_owner_and_no_rank_has_them_all(
    layout: str, world_size: int, by_world_size: dict[int, list[dict[str, Any]]]
) -> None:
    expected = by_world_size[1][0]["replicated"]
    results = [rank[layout] for rank in by_world_size[world_size]]
    merged = {name: t for result in results for name, t in result["state"].items()}
    assert merged.keys() == expected["state"].keys()
    for name, state in expected["state"].items():
        torch.testing.assert_close(merged[name], state, rtol=0, atol=1e-9)
    assert max(r["numel"] for r in results) < expected["numel"] * 1.6 / world_size


def test_a_resume_may_change_ranks_and_layout(
    by_world_size: dict[int, list[dict[str, Any]]],
) -> None:
    model, optimizer = setup(Dist(), "replicated")
    uninterrupted = [loss for loss, _ in train(Dist(), model, optimizer, range(6))]
    resumed = [loss for n in (4, 2, 1) for loss, _ in by_world_size[n][0]["resumed"]]
    assert resumed == pytest.approx(uninterrupted, abs=1e-9, rel=0)


def test_what_ranks_tell_each_other(by_world_size: dict[int, list[dict[str, Any]]]) -> None:
    first, second = (rank["talk"] for rank in by_world_size[2])
    assert first.pop("random") != second.pop("random")
    assert first == {"flag": 40, "sum": 3.0, "mean": 1.5, "main": True}
    assert second == first | {"main": False}


def test_one_rank_needs_no_group(by_world_size: dict[int, list[dict[str, Any]]]) -> None:
    facts = by_world_size[1][0]["talk"]
    assert (facts["flag"], facts["sum"], facts["mean"], facts["main"]) == (40, 1.0, 1.0, True)


@pytest.mark.parametrize("amd", [True, False])
@pytest.mark.parametrize("rounds_to_bf16", [True, False])
def test_fast_float32_kernels_are_taken_only_where_they_are_exact(
    amd: bool, rounds_to_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # torch's default
    monkeypatch.setattr(distributed, "is_amd_cpu", lambda: amd)
    monkeypatch.setattr(distributed, "_product_error", lambda: 4e-3 if rounds_to_bf16 else 8e-7)
    try:
        distributed.choose_float32_kernels("cpu")
        expected = "medium" if amd and not rounds_to_bf16 else "highest"
        assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision(before)


def test_float32_products_are_exact_after_the_choice() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        distributed.choose_float32_kernels("cpu")
        assert distributed._product_error() < 1e-5
    finally:
        torch.set_float32_matmul_precision(before)
