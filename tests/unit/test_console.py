"""The display of a run: bars on a terminal, plain lines elsewhere, and never the end of a run."""

import io
import time
from pathlib import Path
from typing import Any

import pytest

from infra import console as console_module
from infra.console import Console, render_status
from nanochat.checkpoint_dir import MANIFEST, Kind, Manifest, step_name
from nanochat.rundir import Outcome, RunDir

STAGES = ("tok_train", "base_train", "report")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path)
    run.create()
    run.write_status({"spent_usd": 1.5})
    return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The console's monotonic clock: add seconds to its only element."""
    now = [1000.0]
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now[0])
    return now


def progress(**facts: Any) -> dict[str, Any]:
    return {
        "phase": "train",
        "time": time.time(),
        "step": 250,
        "num_steps": 1000,
        "eta_s": 125.0,
        "loss": 3.25,
        "tokens_per_s": 12345.0,
        "val_bpb": 1.875,
    } | facts


def write_checkpoint(run: RunDir, step: int, kind: Kind) -> None:
    """A checkpoint of base_train that holds no tensors."""
    folder = run.checkpoints_dir("base_train") / step_name(step)
    folder.mkdir(parents=True)
    manifest = Manifest(step, kind, 1, None, {}, "2026-01-01T00:00:00+00:00")
    (folder / MANIFEST).write_bytes(manifest.encode())


def test_plain_lines_come_every_few_seconds_and_then_more_rarely(
    run: RunDir, clock: list[float]
) -> None:
    out = io.StringIO()
    shown = Console(run, STAGES, tty=False, stream=out)
    shown.stage_start("base_train")
    lines_at = {}
    for tenth in range(36_000):
        shown.update("base_train", progress())
        lines_at[tenth // 10] = out.getvalue().count("\n")
        clock[0] += 0.1
    shown.close()
    assert lines_at[4] == 1 and lines_at[60] in (12, 13)
    assert 150 < lines_at[3599] < 350
    line = out.getvalue().splitlines()[1]
    for part in (
        "[2/3] base_train train",
        "step 250/1,000",
        "eta 2:0",
        "loss 3.2500",
        "val_bpb 1.8750",
        "12,345 tok/s",
        "$1.50",
    ):
        assert part in line


def test_a_resume_says_from_where(run: RunDir, clock: list[float]) -> None:
    out = io.StringIO()
    write_checkpoint(run, 83, "full")
    write_checkpoint(run, 90, "weights")
    shown = Console(run, STAGES, tty=False, stream=out)
    shown.stage_start("base_train")
    assert out.getvalue() == "[2/3] base_train resumes from step_000083\n"


def test_nothing_is_resumed_from_weights_alone(run: RunDir, clock: list[float]) -> None:
    out = io.StringIO()
    write_checkpoint(run, 90, "weights")
    (run.checkpoints_dir("base_train") / "latest").write_text("step_000090\n")
    shown = Console(run, STAGES, tty=False, stream=out)
    shown.stage_start("base_train")
    assert out.getvalue() == "[2/3] base_train starts\n"


def test_a_terminal_gets_a_bar_and_a_line_per_finished_stage(
    run: RunDir, clock: list[float]
) -> None:
    out = io.StringIO()
    shown = Console(run, STAGES, tty=True, stream=out)
    shown.stage_start("base_train")
    shown.update("base_train", progress())
    assert "250/1,000" in out.getvalue() and "\x1b[" in out.getvalue()
    before = len(out.getvalue())
    shown.update("base_train", progress())
    assert len(out.getvalue()) == before  # drawn at most five times a second
    shown.message("base_train: was killed (exit -9); restart 1")
    facts = {"val_bpb_last": 1.25, "tokens_per_s": 999.6}
    shown.stage_end("base_train", Outcome("base_train", "done", seconds=3725.0, facts=facts))
    shown.close()
    assert "restart 1" in out.getvalue()
    last = out.getvalue().splitlines()[-1]
    assert last.endswith("[2/3] base_train done in 1:02:05  val_bpb 1.2500  1,000 tok/s")
    assert out.getvalue().count("\x1b[?25h") == 1  # the cursor is given back


def test_a_budget_horizon_and_a_stage_without_steps_show_the_time_that_passed(
    run: RunDir, clock: list[float]
) -> None:
    out = io.StringIO()
    shown = Console(run, STAGES, tty=True, stream=out)
    shown.stage_start("tok_train")
    clock[0] += 65
    shown.update("tok_train", {"phase": "train", "time": time.time(), "message": "32,768 merges"})
    shown.update("tok_train", {})
    shown.close()
    assert "1:05 passed" in out.getvalue() and "32,768 merges" in out.getvalue()


class GoneTerminal(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError("the terminal has gone")


@pytest.mark.parametrize("tty", [True, False])
def test_a_terminal_that_has_gone_away_ends_only_the_display(
    run: RunDir, clock: list[float], tty: bool
) -> None:
    shown = Console(run, STAGES, tty=tty, stream=GoneTerminal())
    shown.stage_start("base_train")
    clock[0] += 10
    shown.update("base_train", progress())
    shown.stage_end("base_train", Outcome("base_train", "done"))
    shown.message("x")
    shown.close()
    assert shown._is_gone


def status(**facts: Any) -> dict[str, Any]:
    now = time.time()
    return {
        "name": "d20",
        "run_dir": "/runs/d20",
        "state": "RUNNING",
        "stage": "base_train",
        "exit_code": None,
        "message": "",
        "heartbeat": now,
        "progress_time": now,
        "host": "node-1",
        "spent_usd": 21.5,
        "max_usd": 100.0,
        "used_s": 3600.0,
        "max_hours": 5.0,
    } | progress(**facts)


def test_status_of_one_run_is_its_facts() -> None:
    text = render_status([status()])
    facts = {line[:10].strip(): line[10:] for line in text.splitlines()}
    assert facts["run"] == "/runs/d20" and facts["state"] == "RUNNING"
    assert facts["stage"] == "base_train train" and facts["step"] == "250/1,000"
    assert facts["spent"] == "$21.50 of $100.00" and facts["used"] == "1:00:00 of 5 h"
    assert facts["eta"].startswith("2:0") and "exit code" not in facts and "message" not in facts


def test_status_of_several_runs_is_a_table_with_their_messages() -> None:
    done = {"name": "smoke", "state": "SUCCEEDED", "exit_code": 0, "message": "done", "eta_s": 9}
    lines = render_status([status(), done]).splitlines()
    assert lines[0].split()[:3] == ["run", "state", "stage"]
    assert lines[2].split()[:3] == ["d20", "RUNNING", "base_train"]
    assert lines[3].split() == ["smoke", "SUCCEEDED", *["-"] * 6, "0"]
    assert lines[4] == "smoke: done"


def test_status_of_no_run_says_how_to_start_one() -> None:
    assert "nanochat run" in render_status([])
