"""What a person sees of a run: progress bars on a terminal, else one plain line every few seconds.

Everything goes to stderr. A terminal that has gone away (ssh, tmux) ends the display and never the
run.
"""

import atexit
import contextlib
import io
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nanochat.checkpoint_dir import CheckpointDir, step_name
from nanochat.rundir import Outcome, RunDir, RunDirError

DRAW_EVERY_S = 0.2
PLAIN_EVERY_S = 5.0
PLAIN_MOST_S = 60.0
"""Plain lines grow rarer, by one hundredth of the stage's time, so that a log stays readable."""
STATUS_EVERY_S = 1.0
WIDE = 240


class _Terminal(RichConsole):
    """rich ends the process when its stream has gone; here that is an error like any other."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Console:
    """Display of the running stage. `tty` overrides whether the stream is a terminal."""

    def __init__(
        self,
        run_dir: RunDir,
        stages: Sequence[str],
        tty: bool | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self._run = run_dir
        self._stages = list(stages)
        self._stream = stream or sys.stderr
        self._is_tty = self._stream.isatty() if tty is None else tty
        self._rich = _Terminal(
            file=self._stream, force_terminal=self._is_tty, highlight=False, markup=False
        )
        self._live: Live | None = None
        self._is_gone = False
        self._stage_started_s = time.monotonic()
        self._drawn_s = -PLAIN_MOST_S
        self._status: dict[str, Any] = {}
        self._status_read_s = -STATUS_EVERY_S
        atexit.register(self.close)

    def stage_start(self, stage: str) -> None:
        """A stage begins, or begins again."""
        self._stage_started_s = time.monotonic()
        self._drawn_s = -PLAIN_MOST_S
        if not self._is_tty:
            self._show(lambda: self._line(f"{self._place(stage)} {stage} {self._begins(stage)}"))

    def update(self, stage: str, progress: dict[str, Any]) -> None:
        """Show the progress that the stage has written; cheap, so call it at every poll."""
        now = time.monotonic()
        elapsed_s = now - self._stage_started_s
        every_s = DRAW_EVERY_S
        if not self._is_tty:
            every_s = min(max(PLAIN_EVERY_S, elapsed_s / 100), PLAIN_MOST_S)
            if elapsed_s < PLAIN_EVERY_S:
                return
        if now - self._drawn_s < every_s or not progress:
            return
        self._drawn_s = now
        if self._is_tty:
            self._show(lambda: self._draw(stage, progress, elapsed_s))
        else:
            head = f"{self._place(stage)} {stage} {progress.get('phase', '')}"
            parts = [head.strip(), *_position(progress, elapsed_s), *self._facts(progress)]
            self._show(lambda: self._line("  ".join(parts)))

    def stage_end(self, stage: str, outcome: Outcome) -> None:
        """A stage has ended; one line of it stays."""
        parts = [f"{self._place(stage)} {stage} {outcome.outcome} in {_clock(outcome.seconds)}"]
        for key, text in (("val_bpb_last", "val_bpb {:.4f}"), ("tokens_per_s", "{:,.0f} tok/s")):
            if isinstance(value := outcome.facts.get(key), int | float):
                parts.append(text.format(value))
        if outcome.message:
            parts.append(outcome.message)
        self._show(self._stop_live)
        self._show(lambda: self._line("  ".join(parts)))

    def message(self, text: str) -> None:
        """A sentence for people; above the bar where there is one."""
        self._show(lambda: self._line(text))

    def close(self) -> None:
        """Give the terminal back."""
        atexit.unregister(self.close)
        self._show(self._stop_live)

    def _begins(self, stage: str) -> str:
        """How the stage begins: it can be resumed from a full checkpoint only."""
        with contextlib.suppress(OSError, RunDirError):
            complete = CheckpointDir(self._run.checkpoints_dir(stage)).complete()
            if full := [m.step for m in complete if m.kind == "full"]:
                return f"resumes from {step_name(full[-1])}"
        return "starts"

    # -- drawing

    def _show(self, draw: Callable[[], None]) -> None:
        if self._is_gone:
            return
        try:
            draw()
        except (OSError, ValueError):  # the terminal has gone, or its stream is closed
            self._is_gone = True

    def _line(self, text: str) -> None:
        self._rich.print(text, soft_wrap=True)
        self._stream.flush()

    def _draw(self, stage: str, progress: dict[str, Any], elapsed_s: float) -> None:
        if self._live is None:
            self._live = Live(
                console=self._rich,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        num_steps, step = progress.get("num_steps"), progress.get("step")
        head = Text.assemble(
            (f"{self._place(stage)} ", "dim"),
            (stage, "bold"),
            (f" {progress.get('phase', '')}", "cyan"),
        )
        bar = ProgressBar(
            total=num_steps or 100.0, completed=step or 0, pulse=not num_steps, width=None
        )
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True, justify="right")
        grid.add_row(head, bar, Text("  ".join(_position(progress, elapsed_s))))
        facts = Text("  ".join(self._facts(progress)), style="dim", no_wrap=True)
        self._live.update(Group(grid, facts), refresh=True)

    def _stop_live(self) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()

    def _place(self, stage: str) -> str:
        if stage not in self._stages:
            return ""
        return f"[{self._stages.index(stage) + 1}/{len(self._stages)}]"

    def _facts(self, progress: dict[str, Any]) -> list[str]:
        now = time.monotonic()
        if now - self._status_read_s > STATUS_EVERY_S:
            self._status_read_s = now
            self._status = self._run.status() or {}
        parts = [
            text.format(progress[key])
            for key, text in (
                ("loss", "loss {:.4f}"),
                ("val_bpb", "val_bpb {:.4f}"),
                ("tokens_per_s", "{:,.0f} tok/s"),
            )
            if isinstance(progress.get(key), int | float)
        ]
        if spent_usd := self._status.get("spent_usd"):
            parts.append(f"${spent_usd:,.2f}")
        if progress.get("message"):
            parts.append(str(progress["message"]))
        return parts


def render_status(rows: Sequence[dict[str, Any]]) -> str:
    """Runs as text: a table of several, the facts of a single one; rows as status.json has them."""
    if not rows:
        return "no runs yet; start one with `nanochat run @configs/smoke.toml`"
    if len(rows) == 1:
        return _render_one(rows[0])
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in ("run", "state", "stage", "step", "val_bpb", "eta", "used", "spent", "exit"):
        is_number = title not in ("run", "state", "stage")
        table.add_column(title, justify="right" if is_number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(_dash(cell) for cell in _cells(row)))
    notes = [f"{row.get('name')}: {row['message']}" for row in rows if row.get("message")]
    return "\n".join([_to_text(table), *notes])


def _cells(row: dict[str, Any]) -> list[str | None]:
    return [
        row.get("name"),
        row.get("state"),
        row.get("stage"),
        _steps(row),
        _number(row.get("val_bpb"), ".4f"),
        _eta(row),
        _used(row),
        _usd(row.get("spent_usd")),
        None if row.get("exit_code") is None else str(row["exit_code"]),
    ]


def _render_one(row: dict[str, Any]) -> str:
    max_usd, max_hours = row.get("max_usd"), row.get("max_hours")
    is_running = row.get("state") == "RUNNING"
    age_s = time.time() - row["heartbeat"] if row.get("heartbeat") else None
    stage = " ".join(str(x) for x in (row.get("stage"), row.get("phase")) if x)
    facts = [
        ("run", row.get("run_dir") or row.get("name")),
        ("state", row.get("state")),
        ("stage", stage or None),
        ("step", _steps(row)),
        ("loss", _number(row.get("loss"), ".4f")),
        ("val_bpb", _number(row.get("val_bpb"), ".4f")),
        ("speed", _number(row.get("tokens_per_s"), ",.0f", " tokens/s")),
        ("eta", _eta(row)),
        ("used", _of(_used(row), _number(max_hours, "g", " h"))),
        ("spent", _of(_usd(row.get("spent_usd")), _usd(max_usd))),
        ("host", row.get("host")),
        ("jobs", _chain(row)),
        ("slurm", (row.get("slurm") or {}).get("message")),
        ("alive", f"{age_s:.0f} s ago" if is_running and age_s is not None else None),
        ("exit code", row.get("exit_code")),
        ("message", row.get("message") or None),
    ]
    return "\n".join(f"{name:<10}{value}" for name, value in facts if value is not None)


def _chain(row: dict[str, Any]) -> str | None:
    """How many SLURM jobs the run has had, and which was the last."""
    chain = (row.get("slurm") or {}).get("chain")
    return None if chain is None else f"{chain['jobs']}, the last is {chain['job']}"


def _position(progress: dict[str, Any], elapsed_s: float) -> list[str]:
    """Step, and the time that is left (or that has passed)."""
    parts = []
    if (steps := _steps(progress)) is not None:
        parts.append(f"step {steps}")
    left_s = _left_s(progress)
    parts.append(f"eta {_clock(left_s)}" if left_s is not None else f"{_clock(elapsed_s)} passed")
    return parts


def _steps(facts: dict[str, Any]) -> str | None:
    step, num_steps = facts.get("step"), facts.get("num_steps")
    if step is None:
        return None
    return f"{step:,}" if not num_steps else f"{step:,}/{num_steps:,}"


def _eta(row: dict[str, Any]) -> str | None:
    left_s = _left_s(row)
    return None if left_s is None or row.get("state") != "RUNNING" else _clock(left_s)


def _used(row: dict[str, Any]) -> str | None:
    return None if row.get("used_s") is None else _clock(row["used_s"])


def _left_s(facts: dict[str, Any]) -> float | None:
    """eta_s, less what has passed since it was written."""
    if not isinstance(eta_s := facts.get("eta_s"), int | float):
        return None
    written_s = facts.get("time") or facts.get("progress_time") or time.time()
    return max(0.0, eta_s - (time.time() - written_s))


def _clock(seconds: float) -> str:
    """1:02:03, 2:03 or 3.4 s."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def _usd(usd: float | None) -> str | None:
    return None if usd is None else f"${usd:,.2f}"


def _number(value: Any, form: str, unit: str = "") -> str | None:
    return f"{value:{form}}{unit}" if isinstance(value, int | float) else None


def _of(value: str | None, limit: str | None) -> str | None:
    return value if limit is None or value is None else f"{value} of {limit}"


def _dash(cell: str | None) -> str:
    return "-" if cell is None else cell


def _to_text(table: Table) -> str:
    out = io.StringIO()
    RichConsole(file=out, width=WIDE, force_terminal=False, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
