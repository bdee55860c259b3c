"""Checkpoints of two ranks, and from one number of ranks to another."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from states import NO_FLOOR, assert_same, damage, leaves, state_of
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from nanochat.checkpoint import (
    Checkpointer,
    CheckpointError,
    load_model,
    load_weights,
)
from nanochat.checkpoint_dir import CheckpointDir
from nanochat.distributed import Dist
from nanochat.storage import Storage


def sharded(state: dict[str, Any], rank: int) -> dict[str, Any]:
    """The state as two ranks hold it: one matrix cut in two, one optimizer entry per owner."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    model = dict(state["model"])
    model["wte.weight"] = distribute_tensor(model["wte.weight"], mesh, [Shard(0)])
    model["h.0.c_q.weight"] = distribute_tensor(model["h.0.c_q.weight"], mesh, [Shard(1)])
    momentum = {str(rank): state["optimizer"]["momentum"][rank]}
    return {"model": model, "optimizer": {**state["optimizer"], "momentum": momentum}}


def whole(state: dict[str, Any]) -> dict[str, Any]:
    """The same state on one rank."""
    momentum = dict(enumerate(state["optimizer"]["momentum"]))
    return {**state, "optimizer": {**state["optimizer"], "momentum": momentum}}


class Rank1Full(Storage):
    """Rank 1's disk is full for the files of step 3."""

    def open_new(self, path: Path) -> int:
        if path.parent.name == ".step_000003.tmp" and "00001" in path.name:
            raise OSError(28, "No space left on device")
        return super().open_new(path)


def two_ranks(ranks: Dist, folder: Path) -> dict[str, Any]:
    """What rank `ranks.rank` sees; asserted on by the tests below."""
    rank = ranks.rank
    facts: dict[str, Any] = {}

    def saver_of(name: str) -> Checkpointer:
        return Checkpointer(folder / name, NO_FLOOR, rank=rank, world_size=2, storage=Rank1Full())

    def is_state(state: dict[str, Any], step: int) -> bool:
        expected = leaves(sharded(state_of(step), rank))
        local = [t.to_local() if isinstance(t, DTensor) else t for t in leaves(state)]
        expected = [t.to_local() if isinstance(t, DTensor) else t for t in expected]
        return all(
            torch.equal(a, b) if isinstance(a, Tensor) else a == b
            for a, b in zip(local, expected, strict=True)
        )

    saver = saver_of("by_two")
    saver.probe_write()
    for step in (1, 2):
        saver.save(step, sharded(state_of(step), rank), {"at": step}, rank_extra={"rank": rank})
    saver.wait()
    if rank == 0:
        shutil.copytree(folder / "by_two", folder / "from_two")
    try:
        saver.save(3, sharded(state_of(3), rank), {}, wait=True)
    except CheckpointError as e:
        facts["full"] = str(e)
    if rank == 0:
        damage(folder / "by_two" / "step_000002" / "optimizer-00001.safetensors", -3)
    dist.barrier()
    state = sharded(state_of(0), rank)
    loaded = saver.load_latest(state)
    assert loaded is not None
    facts["walked back"] = (loaded.step, loaded.extra, loaded.rank_extra, is_state(state, 1))

    loaded = saver_of("by_one").load_latest(state)
    assert loaded is not None
    facts["by one"] = (loaded.step, loaded.rank_extra, is_state(state, 4))
    model = sharded(state_of(0), rank)["model"]
    load_model(folder / "by_one", model)
    facts["model"] = is_state({**sharded(state_of(4), rank), "model": model}, 4)

    thinned = saver_of("thinned")
    facts["has any"] = (thinned.has_any(), saver_of("none").has_any())
    try:
        thinned.load_latest(state)
    except CheckpointError as e:
        facts["thinned"] = str(e)

    return facts


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two_ranks")
    with Checkpointer(folder / "by_one", NO_FLOOR) as saver:
        saver.save(4, whole(state_of(4)), {})
    shutil.copytree(folder / "by_one", folder / "thinned")
    CheckpointDir(folder / "thinned").thin(4)
    return folder, on_ranks(2, two_ranks, folder)


def test_two_ranks_load_what_one_wrote(by_two: tuple[Path, list[dict[str, Any]]]) -> None:
    assert [f["by one"] for f in by_two[1]] == [(4, None, True)] * 2
    assert [f["model"] for f in by_two[1]] == [True, True]


def test_one_rank_loads_what_two_wrote(by_two: tuple[Path, list[dict[str, Any]]]) -> None:
    directory = by_two[0] / "from_two"
    state = whole(state_of(0))
    loaded = Checkpointer(directory, NO_FLOOR).load_latest(state)
    assert loaded is not None and loaded.step == 2
    assert (loaded.extra, loaded.rank_extra) == ({"at": 2}, None)
    assert_same(state, whole(state_of(2)))
    assert_same(load_weights(directory)[0], state_of(2)["model"])
    files = {p.name for p in (directory / "step_000002").iterdir()}
    assert {"model-00000.safetensors", "model-00001.safetensors"} <= files


def test_an_error_on_one_rank_is_one_on_all(by_two: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, facts = by_two
    assert [("rank 1" in f["full"], "no space" in f["full"]) for f in facts] == [(True, True)] * 2
    assert not list((folder / "by_two").glob(".step*"))


def test_ranks_walk_back_together(by_two: tuple[Path, list[dict[str, Any]]]) -> None:
    for rank, facts in enumerate(by_two[1]):
        assert facts["walked back"] == (1, {"at": 1}, {"rank": rank}, True)


def test_ranks_refuse_weights_alone_together(by_two: tuple[Path, list[dict[str, Any]]]) -> None:
    assert [f["has any"] for f in by_two[1]] == [(True, False)] * 2
    messages = {f["thinned"] for f in by_two[1]}
    assert len(messages) == 1 and "only weights are left of step 4 of thinned" in messages.pop()
