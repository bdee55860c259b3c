"""Saving and loading on one rank."""

import json
import pickle
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faultfs import FullStorage
from safetensors.torch import load_file
from states import IN_LINE, NO_FLOOR, assert_same, damage, leaves, save_steps, state_of
from torch import Tensor

from nanochat.checkpoint import (
    Checkpointer,
    CheckpointError,
    load_model,
    load_weights,
    rng_state,
    set_rng_state,
)
from nanochat.checkpoint_dir import CheckpointDir, Manifest
from nanochat.spec import CheckpointPolicy
from nanochat.storage import Storage

THIN = CheckpointPolicy(keep_last=1, thin_old=True, free_floor_gib=0.0)


def files_in(directory: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


# -----------------------------------------------------------------------------
# one rank


def test_state_comes_back_bit_equal_with_what_was_given_along(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, NO_FLOOR) as saver:
        saver.save(7, state_of(7), {"cursor": [1, 2]}, rank_extra={"rng": "x"}, val_bpb=1.25)
        saver.wait()
        state = state_of(0)
        loaded = saver.load_latest(state)
    assert loaded is not None
    assert_same(state, state_of(7))
    assert (loaded.step, loaded.extra, loaded.rank_extra) == (7, {"cursor": [1, 2]}, {"rng": "x"})
    assert loaded.skipped == []
    manifest = json.loads((tmp_path / "step_000007" / "manifest.json").read_text())
    assert manifest["cursor"] == [1, 2] and manifest["metrics"] == {"val_bpb": 1.25}
    assert manifest["world_size"] == 1 and manifest["kind"] == "full"
    on_disk = {p.name: p.stat().st_size for p in (tmp_path / "step_000007").iterdir()}
    del on_disk["manifest.json"]
    assert on_disk == {name: f["size"] for name, f in manifest["files"].items()}
    assert saver.last_bytes == sum(on_disk.values())
    assert (tmp_path / "latest").read_text() == (tmp_path / "best").read_text() == "step_000007\n"


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    save_steps(tmp_path, 3)
    weights = load_file(tmp_path / "step_000003" / "model-00000.safetensors")
    assert_same(weights, state_of(3)["model"])


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(tmp_path, 1)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    state = state_of(0)
    assert Checkpointer(tmp_path, NO_FLOOR).load_latest(state) is not None
    assert_same(state, state_of(1))
    assert_same(load_weights(tmp_path)[0], state_of(1)["model"])


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "new", NO_FLOOR) as saver:
        assert saver.load_latest(state_of(0)) is None
        assert saver.load_best(state_of(0)) is None
        assert saver.list_complete() == []
    with pytest.raises(CheckpointError, match="complete steps: none"):
        load_weights(tmp_path / "new")


def test_a_run_does_not_go_on_from_weights_alone(tmp_path: Path) -> None:
    """Starting over would prune them away; nothing of them is touched, and they still load."""
    directory = tmp_path / "base_train"
    save_steps(directory, 8)
    CheckpointDir(directory).thin(8)
    before = files_in(directory)
    for _ in range(2):
        with Checkpointer(directory, NO_FLOOR) as saver:
            assert saver.has_any()
            for load in (saver.load_latest, saver.load_best):
                with pytest.raises(
                    CheckpointError, match=r"only weights are left of step 8 of base_train: .*move"
                ):
                    load(state_of(0))
    assert files_in(directory) == before
    assert (directory / "latest").read_text() == "step_000008\n"
    assert_same(load_weights(directory)[0], state_of(8)["model"])


@pytest.mark.parametrize("name", ["state.json", "optimizer-00000.safetensors"])
def test_a_damaged_full_one_before_thinned_ones_is_told(tmp_path: Path, name: str) -> None:
    """Whether the damage is found by the look at the folder, or by the hashes."""
    with Checkpointer(tmp_path, THIN) as saver:
        saver.save(1, state_of(1), {}, val_bpb=1.0)
        saver.save(2, state_of(2), {}, val_bpb=2.0)
    assert [m.kind for m in saver.list_complete()] == ["weights", "full"]
    damage(tmp_path / "step_000002" / name, -3)
    with (
        Checkpointer(tmp_path, THIN) as saver,
        pytest.raises(
            CheckpointError, match=r"only weights are left of step 1 of (.|\n)*step_000002/" + name
        ),
    ):
        saver.load_latest(state_of(0))
    assert (tmp_path / "step_000002").is_dir() and (tmp_path / "step_000001").is_dir()


def test_a_thinned_best_beside_a_full_one_is_no_hindrance(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, THIN) as saver:
        saver.save(1, state_of(1), {}, val_bpb=1.0)
        saver.save(2, state_of(2), {})
        saver.wait()
        state = state_of(0)
        loaded = saver.load_latest(state)
        assert loaded is not None and loaded.step == 2
        assert saver.load_best(state) is None  # the only validated one is no full one
    assert (tmp_path / "latest").read_text() == "step_000002\n"


def test_checkpoints_that_go_while_the_process_begins_are_missed(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    with Checkpointer(tmp_path, NO_FLOOR) as saver:
        assert saver.has_any()
        shutil.rmtree(tmp_path / "step_000001")
        with pytest.raises(CheckpointError, match="have gone"):
            saver.load_latest(state_of(0))
        assert not saver.has_any()
        assert saver.load_latest(state_of(0)) is None


def test_asynchronous_and_waiting_saves_write_the_same_bytes(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, CheckpointPolicy(keep_last=3, free_floor_gib=0.0)) as saver:
        saver.save(1, state_of(5), {})
        saver.save(2, state_of(5), {}, wait=True)
        assert saver.saving_step is None
    save_steps(tmp_path / "in_line", 5)
    hashes = [
        {name: f.sha256 for name, f in Manifest.read(folder).files.items() if name[-1] == "s"}
        for folder in (tmp_path / "step_000001", tmp_path / "step_000002")
    ]
    in_line = Manifest.read(tmp_path / "in_line" / "step_000005").files
    assert hashes[0] == hashes[1] == {n: f.sha256 for n, f in in_line.items() if n[-1] == "s"}


class HeldStorage(Storage):
    """Lets no byte through until released; notes the order of the final renames."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.events: list[str] = []

    def write(self, fd: int, data: memoryview) -> None:
        assert self.release.wait(60)
        super().write(fd, data)

    def make_dir(self, path: Path) -> None:
        self.events.append(path.name)
        super().make_dir(path)

    def rename(self, source: Path, target: Path) -> None:
        self.events.append(target.name)
        super().rename(source, target)


def test_the_loop_may_change_the_state_while_it_is_written(tmp_path: Path) -> None:
    storage = HeldStorage()
    with Checkpointer(tmp_path, NO_FLOOR, storage=storage) as saver:
        state = state_of(1)
        saver.save(1, state, {})
        for leaf in leaves(state):
            if isinstance(leaf, Tensor):
                leaf.zero_()
        assert saver.saving_step == 1 and saver.list_complete() == []
        storage.release.set()
        saver.save(2, state_of(2), {})  # waits for the first
        saver.wait()
        first = state_of(0)
        (tmp_path / "step_000002" / "manifest.json").unlink()
        assert saver.load_latest(first) is not None
    assert_same(first, state_of(1))
    steps = [name for name in storage.events if "step" in name]
    assert steps.index("step_000001") < steps.index(".step_000002.tmp")


@pytest.mark.parametrize("policy", [NO_FLOOR, IN_LINE])
def test_buffers_may_be_prepared(tmp_path: Path, policy: CheckpointPolicy) -> None:
    with Checkpointer(tmp_path, policy) as saver:
        saver.prepare(state_of(0))
        assert saver.saving_step is None
        saver.save(1, state_of(1), {})
        saver.wait()
        state = state_of(0)
        assert saver.load_latest(state) is not None
    assert_same(state, state_of(1))


def test_state_that_grows_is_planned_anew(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, NO_FLOOR) as saver:
        saver.save(1, {"model": {"w": torch.ones(2)}}, {})
        saver.save(2, {"model": {"w": torch.ones(3), "v": torch.zeros(1)}}, {})
        saver.wait()
        state = {"model": {"w": torch.zeros(3), "v": torch.ones(1)}}
        assert saver.load_latest(state) is not None
    assert_same(state, {"model": {"w": torch.ones(3), "v": torch.zeros(1)}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["model"].update(new=torch.ones(1)), "no tensor model.new"),
        (lambda s: s["model"].pop("h.0.scale"), "do.* not have.*model.h.0.scale"),
        (lambda s: s["model"].update(empty=torch.ones(2)), "model.empty is F32 .0, 3."),
        (lambda s: s["optimizer"].update(step=torch.tensor(1.0)), "I64"),
        (lambda s: s["optimizer"].update(seed=1), "no value optimizer.seed"),
        (lambda s: s["optimizer"].pop("groups"), "optimizer.groups.0.betas"),
    ],
)
def test_another_models_checkpoint_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    save_steps(tmp_path, 1)
    state = state_of(0)
    change(state)
    with pytest.raises(CheckpointError, match=message):
        Checkpointer(tmp_path, NO_FLOOR).load_latest(state)
    assert (tmp_path / "step_000001").is_dir()


def test_state_that_no_checkpoint_can_hold_is_refused(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, NO_FLOOR) as saver:
        with pytest.raises(CheckpointError, match="optimizer.hook is a function"):
            saver.save(1, {"optimizer": {"hook": assert_same}}, {})
        with pytest.raises(CheckpointError, match="complex64"):
            saver.save(1, {"model": {"w": torch.ones(1, dtype=torch.complex64)}}, {})


def test_rng_states_come_back() -> None:
    saved = json.loads(json.dumps(rng_state()))
    first = (random.random(), np.random.normal(), torch.rand(3).tolist())
    set_rng_state(saved)
    assert (random.random(), np.random.normal(), torch.rand(3).tolist()) == first


# -----------------------------------------------------------------------------
# weights alone


def test_weights_of_latest_best_and_a_step(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, CheckpointPolicy(keep_last=3, free_floor_gib=0.0)) as saver:
        for step, val_bpb in ((1, 2.0), (2, 1.0), (3, float("nan"))):
            saver.save(step, state_of(step), {"at": step}, val_bpb=val_bpb)
    for which, step in (("latest", 3), ("best", 2), (1, 1)):
        weights, extra = load_weights(tmp_path, which)
        assert_same(weights, state_of(step)["model"])
        assert extra == {"at": step}
    weights["wte.weight"].zero_()
    assert_same(load_weights(tmp_path, 1)[0], state_of(1)["model"])
    with pytest.raises(CheckpointError, match="4.*complete steps: 1, 2, 3"):
        load_weights(tmp_path, 4)


def test_best_is_the_latest_where_none_was_validated(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    assert_same(load_weights(tmp_path, "best")[0], state_of(2)["model"])


def test_weights_of_a_damaged_latest_are_passed_over(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    damage(tmp_path / "step_000002" / "model-00000.safetensors", 700)
    assert_same(load_weights(tmp_path)[0], state_of(1)["model"])
    assert_same(load_weights(tmp_path, verify=False)[0].keys(), state_of(1)["model"].keys())


def test_model_is_filled_from_a_checkpoint(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    model = state_of(0)["model"]
    assert load_model(tmp_path, model) == {"cursor": {"document": 1}}
    assert_same(model, state_of(1)["model"])
    del model["empty"]
    with pytest.raises(CheckpointError, match="another model: it has empty"):
        load_model(tmp_path, model)


# -----------------------------------------------------------------------------
# what is known later: validation loss, roll-backs


def test_val_bpb_may_come_after_the_save(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, NO_FLOOR) as saver:
        for step, val_bpb in ((1, 1.5), (2, 1.0), (3, 2.0), (4, float("inf"))):
            saver.save(step, state_of(step), {})
            saver.note_val_bpb(step, val_bpb)
        saver.wait()
        assert (tmp_path / "best").read_text() == "step_000002\n"
        assert [m.step for m in saver.list_complete()] == [2, 3, 4]
        state = state_of(0)
        loaded = saver.load_best(state)
        assert loaded is not None and loaded.manifest.val_bpb == 1.0
        assert_same(state, state_of(2))


def test_checkpoints_after_a_roll_back_are_discarded(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, CheckpointPolicy(keep_last=9, free_floor_gib=0.0)) as saver:
        for step in (1, 2, 3):
            saver.save(step, state_of(step), {}, val_bpb=1.0 / step)
        saver.discard_after(1)
        assert [m.step for m in saver.list_complete()] == [1]
    assert (tmp_path / "latest").read_text() == (tmp_path / "best").read_text() == "step_000001\n"


def test_an_error_in_the_block_is_not_hidden_by_the_save(tmp_path: Path) -> None:
    storage = FullStorage(tmp_path, 0, honest=False)
    with (
        pytest.raises(ZeroDivisionError),
        Checkpointer(tmp_path, NO_FLOOR, storage=storage) as saver,
    ):
        saver.save(1, state_of(1), {})
        raise ZeroDivisionError
