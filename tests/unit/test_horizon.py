"""The clock of the stages: what a stage still has to do at its end is known over restarts."""

from pathlib import Path
from typing import Any

import pytest

from infra.horizon import LEAST_REPORT_S, SAVE_FACTOR, TRACKER_CLOSE_S, StageClock
from nanochat.rundir import RunDir
from nanochat.spec import RunSpec
from nanochat.trackers import CLOSE_TIMEOUT_S

STAGE = "base_train"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "run")
    made.create()
    return made


def make_clock(run: RunDir, **runtime: Any) -> StageClock:
    """The clock of a new supervisor whose stage is about to start."""
    spec = {
        "name": "t",
        "model": {"depth": 1, "seq_len": 8},
        "runtime": {"tensorboard": False} | runtime,
        STAGE: {"num_steps": 1, "total_batch_size": 8},
        "report": {},
    }
    clock = StageClock(run, RunSpec.model_validate(spec), {})
    clock.begin(STAGE)
    return clock


def tell(clock: StageClock, run: RunDir, **facts: Any) -> None:
    """As a stage and a supervisor that looks at it."""
    run.write_progress(STAGE, "train", **facts)
    clock.note_last_acts(STAGE, run.progress(STAGE))


def test_the_reserve_knows_what_was_measured_before_a_restart(run: RunDir) -> None:
    clock = make_clock(run)
    tell(clock, run, save_s=0.5, eval_s=None)
    tell(clock, run, save_s=4.0, eval_s=6.0, sample_s=2.0)
    expected_s = pytest.approx(SAVE_FACTOR * 4.0 + 6.0 + 2.0 + LEAST_REPORT_S)
    assert clock.reserve_s(STAGE) == expected_s

    resumed = make_clock(run)
    run.write_progress(STAGE, "start")
    assert resumed.reserve_s(STAGE) == expected_s, "nothing told yet"
    tell(resumed, run, save_s=0.1, eval_s=None)
    tell(resumed, run, save_s=0.1, eval_s=None)
    assert resumed.reserve_s(STAGE) == expected_s, "a guess, and no look yet"
    tell(resumed, run, save_s=3.0, eval_s=5.0)
    faster_s = pytest.approx(SAVE_FACTOR * 3.0 + 5.0 + 2.0 + LEAST_REPORT_S)
    assert resumed.reserve_s(STAGE) == faster_s == make_clock(run).reserve_s(STAGE)


def test_a_larger_guess_holds_until_a_save_is_measured(run: RunDir) -> None:
    tell(make_clock(run), run, save_s=1.0)
    tell(clock := make_clock(run), run, save_s=9.0)
    assert clock.reserve_s(STAGE) == pytest.approx(SAVE_FACTOR * 9.0 + LEAST_REPORT_S)
    run.write_progress(STAGE, "start")
    assert make_clock(run).reserve_s(STAGE) < 9.0, "no guess is remembered"


@pytest.mark.parametrize(
    ("runtime", "num_trackers"),
    [({}, 0), ({"tensorboard": True}, 1), ({"tensorboard": True, "wandb": "offline"}, 2)],
)
def test_a_stage_that_trains_waits_for_its_trackers(
    run: RunDir, runtime: dict[str, Any], num_trackers: int
) -> None:
    assert TRACKER_CLOSE_S == CLOSE_TIMEOUT_S
    none, some = make_clock(run), make_clock(run, **runtime)
    waits_s = num_trackers * TRACKER_CLOSE_S
    assert some.reserve_s(STAGE) - none.reserve_s(STAGE) == pytest.approx(waits_s)
    assert some.reserve_s("report") == none.reserve_s("report")
