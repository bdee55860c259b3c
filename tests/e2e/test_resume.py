"""A run that is killed or stopped in any stage goes on, and ends with the bits of a whole one."""

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat.rundir import RunDir
from tests.toyrun import (
    STAGES,
    TRAINED,
    copy_done_stages,
    finish,
    kill_tree,
    losses,
    start,
    wait_for,
    weights_digest,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def own_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_HOME", str(home))
    return home


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunDir]:
    """An uninterrupted toy run."""
    run = RunDir(tmp_path_factory.mktemp("whole") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_HOME", str(home))
        code, err = finish(run.path)
    assert code == 0, err
    yield run


@pytest.mark.parametrize("stage", STAGES)
def test_killed_in_any_stage_it_finishes_with_the_same_bits(
    whole: RunDir, tmp_path: Path, stage: str
) -> None:
    run = RunDir(tmp_path / "run")
    copy_done_stages(whole, run, before=stage)
    process = start(run.path)
    wait_for(lambda: run.progress_file(stage).exists() or run.is_done(stage))
    if stage in TRAINED:
        after = random.Random(stage).randint(1, 15)
        wait_for(lambda: (run.progress(stage).get("step") or 0) >= after or run.is_done(stage))
    kill_tree(process)
    code, err = finish(run.path)
    assert code == 0, err
    for trained in TRAINED:
        assert weights_digest(run, trained) == weights_digest(whole, trained)
        assert losses(run, trained) == losses(whole, trained)
    base = [r.outcome("base_train") for r in (run, whole)]
    assert base[0] is not None and base[1] is not None
    assert base[0].facts["val_bpb_last"] == base[1].facts["val_bpb_last"]


def test_ctrl_c_saves_and_says_how_to_resume(whole: RunDir, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    copy_done_stages(whole, run, before="base_train")
    process = start(run.path)
    wait_for(lambda: (run.progress("base_train").get("step") or 0) >= 3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "run the same command again to resume" in err
    outcome = run.outcome("base_train")
    assert outcome is not None and outcome.outcome == "stopped"
    assert (run.checkpoints_dir("base_train") / "latest").exists()
    code, err = finish(run.path)
    assert code == 0, err
    assert weights_digest(run, "base_train") == weights_digest(whole, "base_train")
    assert losses(run, "base_train") == losses(whole, "base_train")


def test_a_corrupt_checkpoint_is_walked_over_loudly(whole: RunDir, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    copy_done_stages(whole, run, before="mid_train")
    run.outcome_file("base_train").unlink()
    folder = run.checkpoints_dir("base_train")
    newest = folder / (folder / "latest").read_text().strip()
    victim = max(newest.glob("model*"), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    code, err = finish(run.path)
    assert code == 0, err
    events = [m["message"] for m in run.metrics() if m.get("event") == "corrupt_checkpoint"]
    assert events and newest.name in " ".join(events)
    assert weights_digest(run, "base_train") == weights_digest(whole, "base_train")
