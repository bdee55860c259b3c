"""Whatever happens, the last complete checkpoint loads, bit-equal."""

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from faultfs import Crash, FaultStorage, FullStorage, Killed
from states import IN_LINE, NO_FLOOR, assert_same, damage, save_steps, state_of

from nanochat.checkpoint import (
    Checkpointer,
    CheckpointError,
    load_weights,
)
from nanochat.checkpoint_dir import GIB, Manifest
from nanochat.spec import CheckpointPolicy
from nanochat.storage import Storage

# -----------------------------------------------------------------------------
# kills and power cuts at every call of a save


SCENARIOS = {
    "next step, old one pruned": (2, CheckpointPolicy(keep_last=1, free_floor_gib=0.0)),
    "next step, old one thinned": (
        2,
        CheckpointPolicy(keep_last=1, keep_every_h=1.0, thin_old=True, free_floor_gib=0.0),
    ),
    "same step again": (1, CheckpointPolicy(free_floor_gib=0.0)),
}


def crash_once(template: Path, directory: Path, step: int, storage: Storage, policy: Any) -> None:
    shutil.copytree(template, directory)
    saver = Checkpointer(directory, policy, storage=storage)
    saver.save(step, state_of(20 + step), {}, wait=True)
    saver.wait()


@pytest.mark.parametrize("how", [Crash.KILL, Crash.POWER_CUT])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_crash_at_any_call_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, scenario: str, how: Crash
) -> None:
    step, policy = SCENARIOS[scenario]
    save_steps(tmp_path / "template", 1)
    counter = FaultStorage()
    crash_once(tmp_path / "template", tmp_path / "whole", step, counter, policy)
    loaded_steps = set()
    for crash_at in range(len(counter.calls)):
        directory = tmp_path / str(crash_at)
        with pytest.raises(Killed):
            storage = FaultStorage(crash_at, how)
            crash_once(tmp_path / "template", directory, step, storage, policy)
        state = state_of(0)
        loaded = Checkpointer(directory, policy).load_latest(state)
        at = counter.calls[crash_at]
        assert loaded is not None and loaded.skipped == [], at
        is_new = loaded.extra == {}
        assert_same(state, state_of(20 + step) if is_new else state_of(1))
        loaded_steps.add(is_new)
        hidden = [p.name for p in directory.iterdir() if p.name.startswith(".step")]
        assert hidden == [], at
        assert (directory / "latest").read_text() == f"step_{loaded.step:06d}\n", at
        assert_same(load_weights(directory)[0], state["model"])
        shutil.rmtree(directory)
    assert loaded_steps == {False, True}


def test_a_crash_while_recovering_from_a_crash(tmp_path: Path) -> None:
    step, policy = SCENARIOS["same step again"]
    save_steps(tmp_path / "template", 1)
    counter = FaultStorage()
    crash_once(tmp_path / "template", tmp_path / "whole", step, counter, policy)
    for crash_at in range(0, len(counter.calls), 3):
        for crash_again_at in range(6):
            directory = tmp_path / "crashed"
            with pytest.raises(Killed):
                storage = FaultStorage(crash_at)
                crash_once(tmp_path / "template", directory, step, storage, policy)
            with contextlib.suppress(Killed):
                Checkpointer(directory, policy, storage=FaultStorage(crash_again_at))
            state = state_of(0)
            loaded = Checkpointer(directory, policy).load_latest(state)
            assert loaded is not None
            assert_same(state, state_of(20 + step) if loaded.extra == {} else state_of(1))
            shutil.rmtree(directory)


def test_sigkill_of_a_process_that_saves_in_the_background(tmp_path: Path) -> None:
    """Real processes and real kills, in different places of the second save and after."""
    loaded_steps = set()
    for crash_at in range(28, 70, 7):
        directory = tmp_path / str(crash_at)
        child = os.fork()
        if child == 0:
            storage = FaultStorage(crash_at, Crash.SIGKILL)
            saver = Checkpointer(directory, NO_FLOOR, storage=storage)
            for step in range(1, 9):
                saver.save(step, state_of(step), {})
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        state = state_of(0)
        loaded = Checkpointer(directory, NO_FLOOR).load_latest(state)
        assert loaded is not None
        assert_same(state, state_of(loaded.step))
        loaded_steps.add(loaded.step)
    assert len(loaded_steps) > 1


# -----------------------------------------------------------------------------
# damage


FILES = ("manifest.json", "state.json", "model-00000.safetensors", "optimizer-00000.safetensors")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["truncated", "missing", "bit at 9", "bit at 80", "bit at -3"])
def test_damage_is_found_and_walked_back(
    tmp_path: Path, name: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_steps(tmp_path, 1, 2)
    path = tmp_path / "step_000002" / name
    if kind == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif kind == "missing":
        path.unlink()
    else:
        damage(path, int(kind.split()[-1]))
    with Checkpointer(tmp_path, NO_FLOOR) as saver:
        state = state_of(0)
        loaded = saver.load_latest(state)
        assert loaded is not None and loaded.step == 1
        assert_same(state, state_of(1))
        assert len(loaded.skipped) == 1 and "step_000002" in loaded.skipped[0]
        assert "set aside" in caplog.text
        assert (tmp_path / "step_000002.damaged").is_dir()
        assert (tmp_path / "latest").read_text() == "step_000001\n"
        saver.save(2, state_of(22), {}, wait=True)  # the step is reached again
        assert saver.load_latest(state) is not None
        assert_same(state, state_of(22))


def test_all_damaged_is_an_error_and_touches_nothing(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    for step in (1, 2):
        damage(tmp_path / f"step_{step:06d}" / "state.json", 5)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"no checkpoint .* is whole(.|\n)*step_000001"):
            Checkpointer(tmp_path, NO_FLOOR).load_latest(state_of(0))
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        load_weights(tmp_path)


def test_flipped_bits_are_not_looked_for_when_not_asked(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    damage(tmp_path / "step_000001" / "optimizer-00000.safetensors", -3)
    loaded = Checkpointer(tmp_path, NO_FLOOR).load_latest(state_of(0), verify=False)
    assert loaded is not None and loaded.skipped == []
    damage(tmp_path / "step_000001" / "state.json", -3)  # the index always is
    with pytest.raises(CheckpointError, match="no checkpoint .* is whole"):
        Checkpointer(tmp_path, NO_FLOOR).load_latest(state_of(0), verify=False)


def test_a_later_format_is_refused_not_walked_over(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    folder = tmp_path / "step_000002"
    manifest = Manifest.read(folder)
    object.__setattr__(manifest, "format_version", 99)
    (folder / "manifest.json").write_bytes(manifest.encode())
    with pytest.raises(CheckpointError, match="format version 99"):
        Checkpointer(tmp_path, NO_FLOOR)
    assert folder.is_dir()


# -----------------------------------------------------------------------------
# full volumes


@pytest.mark.parametrize("policy", [NO_FLOOR, IN_LINE])
@pytest.mark.parametrize("honest", [True, False])
def test_a_full_volume_keeps_the_last_checkpoint(
    tmp_path: Path, honest: bool, policy: CheckpointPolicy, caplog: pytest.LogCaptureFixture
) -> None:
    save_steps(tmp_path, 1)
    used = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    storage = FullStorage(tmp_path, used + 250, honest)
    saver = Checkpointer(tmp_path, policy, storage=storage)
    with pytest.raises(CheckpointError, match=r"no space .*step 1 is complete.*keep_last = 1"):
        saver.save(2, state_of(2), {})
        saver.wait()
    saver.wait()  # reported once
    assert "no space" in caplog.text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_000001"]
    storage.size = 1 << 30
    saver.save(2, state_of(2), {}, wait=True)  # somebody made room
    assert [m.step for m in saver.list_complete()] == [1, 2]


def test_an_error_in_the_background_comes_up_at_the_next_save(tmp_path: Path) -> None:
    storage = FullStorage(tmp_path, 0, honest=False)
    saver = Checkpointer(tmp_path, NO_FLOOR, storage=storage)
    saver.save(1, state_of(1), {})
    with pytest.raises(CheckpointError, match="none is complete"):
        saver.save(2, state_of(2), {})


def test_a_save_after_a_failed_one_tries_the_present_state_first(tmp_path: Path) -> None:
    storage = FullStorage(tmp_path, 0, honest=False)
    saver = Checkpointer(tmp_path, NO_FLOOR, storage=storage)
    saver.save(1, state_of(1), {})
    saver.note_val_bpb(1, 1.0)  # on a checkpoint that never came to be
    while saver.saving_step is not None:
        time.sleep(0.001)
    assert saver.has_failed
    storage.size = 1 << 30  # somebody made room
    saver.save(2, state_of(2), {})
    assert not saver.has_failed
    assert [m.step for m in saver.list_complete()] == [2]
    saver.wait()


def test_a_failure_is_taken_once(tmp_path: Path) -> None:
    saver = Checkpointer(tmp_path, NO_FLOOR, storage=FullStorage(tmp_path, 0, honest=False))
    assert saver.take_failure() is None
    saver.save(1, state_of(1), {})
    assert "none is complete" in str(saver.take_failure())
    assert not saver.has_failed and saver.take_failure() is None
    with pytest.raises(CheckpointError):  # while the caller waits
        saver.save(1, state_of(1), {})


def test_room_is_made_before_writing(tmp_path: Path) -> None:
    """Damaged ones go first, then what the policy spares only until the next one stands."""
    save_steps(tmp_path, 1, 2, policy=IN_LINE)
    size = Manifest.read(tmp_path / "step_000002").size
    used = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    shutil.copytree(tmp_path / "step_000001", tmp_path / "step_000000.damaged")
    storage = FullStorage(tmp_path, used + size + 2000, honest=True)
    saver = Checkpointer(tmp_path, IN_LINE, storage=storage)
    saver.save(3, state_of(3), {})
    assert not (tmp_path / "step_000000.damaged").exists()
    assert [m.step for m in saver.list_complete()] == [2, 3]
    storage.size = used + 2000
    saver.save(4, state_of(4), {})
    assert [m.step for m in saver.list_complete()] == [3, 4]


def test_a_checkpoint_kept_for_its_hour_goes_when_space_is_short(tmp_path: Path) -> None:
    policy = CheckpointPolicy(keep_last=1, keep_every_h=0.0001, free_floor_gib=0.0)
    save_steps(tmp_path, 1, policy=policy)
    used = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    storage = FullStorage(tmp_path, 2 * used + 2000, honest=True)
    with Checkpointer(tmp_path, policy, storage=storage) as saver:
        saver.save(2, state_of(2), {}, wait=True)
        saver.save(3, state_of(3), {}, wait=True)
        assert [m.step for m in saver.list_complete()][-1] == 3
        assert len(saver.list_complete()) <= 2


def test_the_free_space_floor_is_kept(tmp_path: Path) -> None:
    storage = FullStorage(tmp_path, GIB, honest=True)
    policy = CheckpointPolicy(free_floor_gib=2.0)
    with (
        Checkpointer(tmp_path, policy, storage=storage) as saver,
        pytest.raises(CheckpointError, match="free_floor_gib = 2 .*only 1.00 GiB"),
    ):
        saver.save(1, state_of(1), {}, wait=True)


def test_probe_proves_that_the_volume_can_be_written(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, NO_FLOOR) as saver:
        probe = saver.probe_write(need_bytes=1000)
        assert probe.free_bytes > 0 and probe.bytes_per_s > 0
        assert list(tmp_path.iterdir()) == []
        assert saver.expected_save_s == pytest.approx(1000 / probe.bytes_per_s)
        saver.save(1, state_of(1), {}, wait=True)
        assert saver.expected_save_s == saver.last_save_s
        with pytest.raises(CheckpointError, match="no space"):
            saver.probe_write(need_bytes=1 << 60)


def test_probe_names_the_reason(tmp_path: Path) -> None:
    saver = Checkpointer(tmp_path, NO_FLOOR, storage=FullStorage(tmp_path, 0, honest=True))
    with pytest.raises(CheckpointError, match=r"No space left on device \(0.00 GiB free\).*mount"):
        saver.probe_write()


class LyingStorage(Storage):
    """Takes every byte and keeps zeros, as a broken network volume did."""

    def write(self, fd: int, data: memoryview) -> None:
        super().write(fd, memoryview(bytes(len(data))))


def test_probe_reads_back(tmp_path: Path) -> None:
    saver = Checkpointer(tmp_path, NO_FLOOR, storage=LyingStorage())
    with pytest.raises(CheckpointError, match="does not read back"):
        saver.probe_write()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file/checkpoints"):
        Checkpointer(tmp_path / "file" / "checkpoints", NO_FLOOR)
