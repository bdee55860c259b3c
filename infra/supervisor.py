"""The supervisor: runs every stage of a spec, owns signals, ledger and deadline, gives exit codes.

* One stop mechanism: whatever asks (a signal, the budget, a person), RUN/stop.json is written, the
  ranks answer by a checkpoint and an outcome file, and only here outcomes become exit codes.
* Money and time come from RUN/ledger.jsonl alone, so that they hold over restarts.
* A stage without a sign of life is hung: its stacks are dumped, it is ended and continued.
"""

import contextlib
import math
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from infra import budget
from infra.board import Board
from infra.console import Console
from infra.horizon import StageClock
from infra.meter import Price, ledger_line
from infra.notices import Notices
from infra.pointer import point_to
from infra.processes import STOP_SIGNALS, StageProcess, stage_command, stage_env
from nanochat.lease import HEARTBEAT_S, Lease, LeaseLost
from nanochat.rundir import (
    EXIT_BUDGET,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_SPEC,
    EXIT_STOPPED,
    EXIT_UNFIT_NODE,
    OUT_OF_SPACE,
    JobStatus,
    Outcome,
    RunDir,
    StopReason,
    append_jsonl,
    nanochat_home,
    newest_stage,
    read_jsonl,
)
from nanochat.spec import WEIGHT_STAGES, RunSpec
from nanochat.stage import MISSES_RANK, seconds_before

POLL_S = 0.1
STATUS_EVERY_S = 1.0
LEDGER_EVERY_S = 30.0
STARTUP_ALLOWANCE_S = 1800.0
"""Imports, loading and a cold compile (7 minutes were reported on 8 GPUs) before the first step."""
EVALUATION_ALLOWANCE_S = 900.0
"""Between two signs of life of an evaluation or a save."""
HANG_SAVES = 3.0
HANG_STEPS = 10.0
SHORTEST_HANG_S = 120.0
KILL_MARGIN_S = 0.5
MOST_SILENT_S = 10.0
"""What counts of a stage's silence between two looks, which are POLL_S apart."""
MISSED_DEADLINE = "did not stop by the deadline"
AFTER_FAILURE_S = 5.0
END_OF_POD_S = 30.0
"""What a rented pod is billed for after its run: the last look of the launcher, its end."""


class StageStopped(Exception):
    """A stage ended because it was asked to; says what went wrong in that, else nothing."""


class RunEnded(Exception):
    """The run cannot go on; carries the exit code of the contract."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.message = message


class Supervisor:
    """Runs one spec in one run directory."""

    def __init__(
        self,
        spec: RunSpec,
        run: RunDir,
        plan: dict[str, Any],
        price: Price,
        num_ranks: int,
        console: Console,
        command: Callable[[str, Path, int], list[str]] = stage_command,
        meter: Callable[[], Price] | None = None,
        start_process: Callable[[list[str], Path, dict[str, str]], StageProcess] = StageProcess,
    ) -> None:
        self.spec = spec
        self.run_dir = run
        self.plan = plan
        self.price = price
        self.num_ranks = num_ranks
        self.console = console
        self.command = command
        self.meter = meter or (lambda: price)
        self.start_process = start_process
        self.notices = Notices(spec.runtime.webhook_url, spec.name)
        self.board = Board(spec.runtime, run, console.message)
        self.lease = Lease(run)
        self.clock = StageClock(run, spec, plan)
        self.stage: str | None = None
        self.stop_reason: StopReason | None = None
        self.stop_deadline_s = 0.0
        self.signals_seen = 0
        self.stop_now = False
        self.started_s = 0.0
        self.sign_s: float | None = None
        """Of the present stage: its last sign of life, by the file server's clock."""
        self.looked_s = self.silent_s = 0.0
        """When that was last looked at, and how long it has not changed, by the steady clock."""
        self.seconds_before = 0.0
        """Wall clock that the present stage has had in processes before this one."""
        self.outcome_before: tuple[int, bytes] | None = None
        self.is_full_told = False
        never = (-math.inf, -math.inf)
        self._last = {"status": never, "lease": never, "ledger": never}

    # -- the run

    def run(self) -> int:
        """Run every stage that is not done; returns the exit code of the contract.

        Raises RunDirError where the run directory cannot be used.
        """
        run = self.run_dir
        run.create()
        restore_signals = self._catch_signals()
        try:
            if not self.lease.acquire(self.console.message, lambda: self.stop_reason is not None):
                self.console.message("stopped before it had begun; nothing was changed")
                return EXIT_STOPPED
            run.freeze_spec(self.spec)
            run.freeze_plan(self.plan)
            run.clear_stop()
            self._point_to_run()
            self.board.start()
            self.price = self.meter()
            self._ledger("start")
            self._tell_start()
            exit_code, message = self._run_stages()
            self.console.message(message)
            self._tell_end(exit_code, message)
            with contextlib.suppress(OSError):  # a volume that is gone or full has been told of
                self._ledger("stop")
                self._write_status(state_of(exit_code), exit_code, message)
                run.clear_stop()
            return exit_code
        except LeaseLost as e:
            self.console.message(str(e))
            return EXIT_UNFIT_NODE
        finally:
            self.lease.release()
            restore_signals()
            self.board.close()
            self.notices.close()

    def _run_stages(self) -> tuple[int, str]:
        resume = f"run the same command again to resume ({self.run_dir.path})"
        try:
            for stage in self.spec.stages:
                self._run_stage(stage)
        except StageStopped as e:
            if self.stop_reason is StopReason.BUDGET:
                troubles = [*filter(None, [str(e), *self._finish_budget()])]
                return EXIT_BUDGET, self._budget_message(troubles)
            told = f": {e}" if str(e) else ""
            kept = last_checkpoint(self.run_dir)
            return EXIT_STOPPED, f"stopped ({self.stop_reason}){told}; {kept}; {resume}"
        except RunEnded as e:
            return e.exit_code, e.message
        except OSError:
            trouble = self.run_dir.volume_trouble()
            if trouble is None:
                raise
            return trouble
        return EXIT_DONE, f"done: {self.run_dir.path}"

    def _run_stage(self, stage: str) -> None:
        """Run one stage to its end, over crashes and hangs. Raises StageStopped or RunEnded."""
        if self.run_dir.is_done(stage):
            return
        if self.stop_reason is not None:
            raise StageStopped
        self.stage = stage
        restarts = 0
        while True:
            self.console.stage_start(stage)
            outcome, trouble = self._run_once(stage)
            if outcome is not None and outcome.outcome == "done":
                self.console.stage_end(stage, outcome)
                self.notices.tell("stage_end", f"{stage} is done", stage=stage)
                return
            if volume_trouble := self.run_dir.volume_trouble():
                raise RunEnded(*volume_trouble)
            if outcome is not None and outcome.outcome == "failed":
                raise _ended_by(outcome, self.run_dir)
            if self.stop_reason is not None:
                raise StageStopped(f"{stage} {trouble}" if trouble else "")
            if outcome is not None and outcome.outcome == "stopped":
                request = self.run_dir.stop_request()
                self.stop_reason = request.reason if request else StopReason.USER
                raise StageStopped
            if outcome is not None and outcome.outcome == "again":
                self._event(stage, "again", outcome.message)
                continue
            restarts += 1
            self._event(stage, "restart", f"{trouble}; restart {restarts}")
            if restarts > self.spec.runtime.max_restarts:
                raise RunEnded(
                    EXIT_UNFIT_NODE,
                    f"{stage} {trouble}, and so did {restarts - 1} restarts; the last complete "
                    f"checkpoint is kept. See {self.run_dir.log_file(stage)}",
                )

    def _run_once(self, stage: str) -> tuple[Outcome | None, str]:
        """One process tree of a stage: its outcome, or None and what happened to it."""
        ranks = self.num_ranks if stage in (*WEIGHT_STAGES, "evaluate") else 1
        env = stage_env(ranks, self.spec.runtime.num_threads)
        command = self.command(stage, self.run_dir.path, ranks)
        self.run_dir.outcome_file(stage).parent.mkdir(exist_ok=True)
        self.clock.begin(stage)
        self.seconds_before = seconds_before(self.run_dir, stage)
        self.outcome_before = self._written_outcome(stage)
        process = self.start_process(command, self.run_dir.log_file(stage), env)
        self.started_s = time.time()
        self.sign_s, self.silent_s = self.run_dir.last_sign_s(stage), 0.0
        self.looked_s = time.monotonic()
        trouble = ""
        try:
            while process.poll() is None:
                self._tick(stage)
                if self.stop_now or self._past_deadline():
                    trouble = "was ended at once" if self.stop_now else MISSED_DEADLINE
                    break
                if self._is_over(stage):
                    break
                if self._is_hung(stage):
                    trouble = "gave no sign of life and was ended"
                    process.dump_stacks()
                    time.sleep(KILL_MARGIN_S)
                    break
                time.sleep(POLL_S)
        finally:
            code = process.poll()
            process.kill()
        outcome = self._outcome(stage)
        if outcome is None or outcome.outcome == "running":
            return None, trouble or f"was killed (exit {code})"
        if outcome.outcome == "failed" and outcome.facts.get(MISSES_RANK):
            return None, trouble or f"lost a rank, as another says: {outcome.message}"
        return outcome, trouble

    # -- while a stage runs

    def _tick(self, stage: str) -> None:
        """Once per poll: lease, ledger, status, budget and requests to stop."""
        now = time.time()
        # First, so that a process that slept through its lease writes nothing before it knows.
        if self._due("lease", HEARTBEAT_S):
            self._if_there_is_space(self.lease.renew)
        progress = self._progress(stage)
        self.console.update(stage, progress)
        if self._due("ledger", LEDGER_EVERY_S):
            self.price = self.meter()
            self._if_there_is_space(lambda: self._ledger("heartbeat"))
        if self._due("status", STATUS_EVERY_S):
            self.board.watch()
            status = (JobStatus.RUNNING, None, "", progress)
            self._if_there_is_space(lambda: self._write_status(*status))
            self._if_there_is_space(lambda: self.clock.note_last_acts(stage, progress))
            self._watch_budget(stage, now)
            self._if_there_is_space(lambda: self._replan(stage, now))
            self._tell_progress(stage, progress, now)
        if self.stop_reason is None:
            request = self.run_dir.stop_request()
            if request is not None:
                self.stop_reason = request.reason
                self.stop_deadline_s = max(request.deadline_s, now + self.spec.stop_grace_s)
        elif self.run_dir.stop_request() is None:
            self.run_dir.request_stop(self.stop_reason, self.stop_deadline_s)

    def _watch_budget(self, stage: str, now: float) -> None:
        """Ask for a stop when what is left is only enough to save, evaluate and report."""
        left_s = self._left_s(now)
        if left_s is None:
            return
        if self.stop_reason is not None:  # the price may have risen since
            self.stop_deadline_s = min(self.stop_deadline_s, now + left_s)
            return
        if stage == "base_train":
            consumed_s = self._consumed_s(stage, now)
            self._if_there_is_space(lambda: self.clock.write_horizon(stage, left_s, consumed_s))
        reserve_s = self.clock.reserve_s(stage)
        if left_s <= reserve_s:
            self._request_stop(StopReason.BUDGET, min(left_s, max(reserve_s, 1.0)))

    def _replan(self, stage: str, now: float) -> None:
        """After the first steps of a stage: note its speed; say so if the budget is too small."""
        found = self.clock.replan(stage, self._progress(stage), self._left_s(now))
        if found is None:
            return
        speed = found["planned_step_s"] / found["step_s"]
        told = f"runs at {speed:.2f} times the planned speed"
        self.run_dir.append_resolved("replan", stage=stage, reason=told, **found)
        if found["fits"]:
            return
        needed_s, left_s = found["needed_s"], found["left_s"]
        end = f" at about step {found['ends_at_step']}" if found["ends_at_step"] else ""
        self._event(
            stage,
            "warning",
            f"{told}: the rest needs about {needed_s / 3600:.2f} h "
            f"(${needed_s / 3600 * self.price.all_usd_per_hour:.2f}), the budget leaves "
            f"{left_s / 3600:.2f} h; it will stop{end} with everything saved and reported. To go "
            "on then, give the same command with a larger budget",
        )

    def _left_s(self, now: float) -> float | None:
        lived = ledger_line(self.price, "heartbeat", now)  # also where it could not be written
        records = [*read_jsonl(self.run_dir.ledger_file), lived]
        left_s = budget.time_left_s(self.spec.budget, records, now)
        if left_s is None or self.price.instance is None:
            return left_s
        return max(0.0, left_s - END_OF_POD_S)

    def _consumed_s(self, stage: str, now: float) -> float:
        """Wall clock that a stage has had, over all restarts, the time between them aside."""
        outcome = self._outcome(stage)
        if outcome is None:
            return self.seconds_before
        since = float(outcome.facts.get("since", now)) if outcome.outcome == "running" else now
        return outcome.seconds + max(0.0, now - since)

    def _request_stop(self, reason: StopReason, grace_s: float) -> None:
        self.stop_reason = reason
        self.stop_deadline_s = time.time() + grace_s
        if self.lease.is_held:  # until then the run is another's
            self.run_dir.request_stop(reason, self.stop_deadline_s)
        self.console.message(f"stopping ({reason}): saving a checkpoint, at most {grace_s:.0f} s")

    def _past_deadline(self) -> bool:
        return self.stop_reason is not None and time.time() > self.stop_deadline_s - KILL_MARGIN_S

    def _is_over(self, stage: str) -> bool:
        """Whether a rank has failed and the others, waiting for it, have had time to notice."""
        outcome = self._outcome(stage)
        if outcome is None or outcome.outcome not in ("failed", "again"):
            return False
        return time.time() - self.run_dir.outcome_file(stage).stat().st_mtime > AFTER_FAILURE_S

    def _outcome(self, stage: str) -> Outcome | None:
        """What the present process of a stage has left, not one before it.

        Told apart by what has changed: a file server's clock may be behind this machine's.
        """
        if self._written_outcome(stage) == self.outcome_before:
            return None
        return self.run_dir.outcome(stage)

    def _written_outcome(self, stage: str) -> tuple[int, bytes] | None:
        """(time by the file server's clock in ns, content) of a stage's outcome file."""
        file = self.run_dir.outcome_file(stage)
        try:
            return file.stat().st_mtime_ns, file.read_bytes()
        except FileNotFoundError:
            return None

    def _is_hung(self, stage: str) -> bool:
        """Whether a stage has given no sign for too long, by this process's own steady clock.

        Between two looks at most MOST_SILENT_S count: a machine or container that was suspended
        for an hour has held the stage too, and it gets its time from there on.
        """
        sign_s, now_s = self.run_dir.last_sign_s(stage), time.monotonic()
        since_look_s = min(now_s - self.looked_s, MOST_SILENT_S)
        self.silent_s = self.silent_s + since_look_s if sign_s == self.sign_s else 0.0
        self.sign_s, self.looked_s = sign_s, now_s
        planned_step_s = self.clock.planned_step_s(stage)
        hang_s = self.spec.runtime.hang_s
        return self.silent_s > hang_limit_s(self._progress(stage), hang_s, planned_step_s)

    def _progress(self, stage: str) -> dict[str, Any]:
        """What the stage's present process has told; empty before its first word."""
        progress = self.run_dir.progress(stage)
        return progress if progress.get("time", 0.0) >= self.started_s else {}

    def _finish_budget(self) -> list[str]:
        """After a stop by the budget: evaluate what there is in the time left, and report.

        Returns what went wrong in that.
        """
        troubles = []
        for stage in ("evaluate", "report"):
            if getattr(self.spec, stage) is None or self.run_dir.is_done(stage):
                continue
            left_s = self._left_s(time.time()) or 0.0
            has_weights = any(self.run_dir.is_done(s) for s in WEIGHT_STAGES)
            if stage == "evaluate" and not (has_weights and left_s > self.clock.reserve_s(stage)):
                continue
            self.run_dir.clear_stop()
            self.stage, self.stop_reason = stage, None
            _, trouble = self._run_once(stage)
            troubles.append(f"{stage} {trouble}" if trouble else "")
            # done again, with what is new, when the run goes on
            self.run_dir.outcome_file(stage).unlink(missing_ok=True)
        self.stop_reason = StopReason.BUDGET
        return troubles

    def _budget_message(self, troubles: list[str]) -> str:
        if not troubles:
            return f"budget spent; everything is saved in {self.run_dir.path}"
        told, kept = ", ".join(troubles), last_checkpoint(self.run_dir)
        return f"budget spent: {told}; {kept} in {self.run_dir.path}"

    # -- files

    def _ledger(self, event: str) -> None:
        line = ledger_line(self.price, event, time.time())
        append_jsonl(self.run_dir.ledger_file, line, durable=True)

    def _if_there_is_space(self, write: Callable[[], None]) -> None:
        """Small files wait for space; whether the run can go on is up to the next checkpoint."""
        try:
            write()
        except OSError as e:
            if e.errno not in OUT_OF_SPACE:
                raise
            if not self.is_full_told:
                self.console.message(
                    f"the volume of {self.run_dir.path} is full: free space before the next "
                    "checkpoint, or the run ends with the last complete one"
                )
            self.is_full_told = True

    def _event(self, stage: str, kind: str, message: str) -> None:
        append_jsonl(
            self.run_dir.metrics_file,
            {"stage": stage, "event": kind, "message": message, "time_s": time.time()},
        )
        self.console.message(f"{stage}: {message}")
        self.notices.tell(kind, f"{stage}: {message}", stage=stage)

    # -- notices

    def _used(self, now: float) -> tuple[float, str]:
        """(share of the budget that is used, the sum in words)."""
        usd, used_s = budget.spent(read_jsonl(self.run_dir.ledger_file), now)
        bounds = self.spec.budget
        shares = [usd / bounds.max_usd if bounds.max_usd else 0.0]
        shares.append(used_s / 3600.0 / bounds.max_hours if bounds.max_hours else 0.0)
        return max(shares), f"${usd:.2f}, {used_s / 3600.0:.1f} h"

    def _tell_start(self) -> None:
        share, told = self._used(time.time())
        self.notices.skip_budget(share)
        self.notices.tell("start", f"started on {socket.gethostname()}; so far {told}")

    def _tell_progress(self, stage: str, progress: dict[str, Any], now: float) -> None:
        if self.spec.runtime.webhook_url is None:
            return
        self.notices.budget(*self._used(now))
        if (loss := progress.get("loss")) is not None:
            self.notices.tell_once(f"loss {stage}", "first_loss", f"{stage}: first loss {loss:.4f}")
        since = [r for r in self.run_dir.resolved("rollback") if r["time"] >= self.started_s]
        for found in since:
            what = f"{stage}: a loss spike was rolled back at step {found.get('step')}"
            self.notices.tell_once(f"rollback {found['time']}", "rollback", what, stage=stage)

    def _tell_end(self, exit_code: int, message: str) -> None:
        share, told = self._used(time.time())
        self.notices.budget(1.0 if exit_code == EXIT_BUDGET else share, told)
        kinds = {EXIT_DONE: "done", EXIT_STOPPED: "stop", EXIT_BUDGET: "stop"}
        event = kinds.get(exit_code, "failure")
        self.notices.tell(event, f"{message} ({told})", exit_code=exit_code)

    def _write_status(
        self,
        state: JobStatus,
        exit_code: int | None,
        message: str,
        progress: dict[str, Any] | None = None,
    ) -> None:
        now = time.time()
        usd, used_s = budget.spent(read_jsonl(self.run_dir.ledger_file), now)
        facts = {k: v for k, v in (progress or {}).items() if k not in ("time", "phase")}
        self.run_dir.write_status(
            {
                "name": self.spec.name,
                "state": state,
                "stage": self.stage,
                "phase": (progress or {}).get("phase"),
                **facts,
                "spent_usd": round(usd, 6),
                "used_s": round(used_s, 3),
                "max_usd": self.spec.budget.max_usd,
                "max_hours": self.spec.budget.max_hours,
                "exit_code": exit_code,
                "stop_reason": self.stop_reason,
                "message": message,
                "heartbeat": now,
                "progress_time": self.run_dir.last_sign_s(self.stage) if self.stage else None,
                "host": socket.gethostname(),
                "pid": os.getpid(),
            }
        )

    def _point_to_run(self) -> None:
        """Tell health check and switch which run it is; without a writable home there is none."""
        with contextlib.suppress(OSError):
            point_to(nanochat_home(), self.run_dir.path)

    def _due(self, what: str, every_s: float) -> bool:
        """By either clock: the wall clock may be set back, and the other one stands still while the
        machine is suspended."""
        wall_s, steady_s = time.time(), time.monotonic()
        last_wall_s, last_steady_s = self._last[what]
        if max(wall_s - last_wall_s, steady_s - last_steady_s) < every_s:
            return False
        self._last[what] = (wall_s, steady_s)
        return True

    # -- signals

    def _catch_signals(self) -> Callable[[], None]:
        """First signal: stop with a checkpoint. A second SIGINT: stop now."""

        def handle(signum: int, _frame: FrameType | None) -> None:
            self.signals_seen += 1
            if self.stop_reason is None:
                self._request_stop(StopReason.SIGNAL, self.spec.stop_grace_s)
            elif signum == signal.SIGINT and self.signals_seen > 1:
                self.stop_now = True

        before = {s: signal.signal(s, handle) for s in STOP_SIGNALS}

        def restore() -> None:
            for signum, handler in before.items():
                signal.signal(signum, handler)

        return restore


def hang_limit_s(
    progress: dict[str, Any], hang_s: float | None, planned_step_s: float = 0.0
) -> float:
    """Seconds without a sign of life after which a stage counts as hung.

    Derived from the median step, until there is one from the planned one; loading and compiling,
    evaluating and saving have allowances of their own. `hang_s` of the spec replaces the limit of
    the steps, and raises the others.
    """
    phase = progress.get("phase", "start")
    if phase in ("start", "load", "compile"):
        return max(STARTUP_ALLOWANCE_S, hang_s or 0.0, HANG_STEPS * planned_step_s)
    step_s = float(progress.get("median_step_s") or planned_step_s)
    step_limit_s = hang_s or max(HANG_STEPS * step_s, SHORTEST_HANG_S)
    if phase == "train":
        return step_limit_s
    save_s = float(progress.get("save_s") or 0.0) if phase == "save" else 0.0
    return max(step_limit_s, EVALUATION_ALLOWANCE_S, HANG_SAVES * save_s)


def last_checkpoint(run: RunDir) -> str:
    """The newest checkpoint of the last stage that has any, in words."""
    stage = newest_stage(run, WEIGHT_STAGES)
    if stage is None:
        return "no complete checkpoint yet"
    step = (run.checkpoints_dir(stage) / "latest").read_text().strip().removeprefix("step_")
    return f"last complete checkpoint: {stage} step {int(step)}"


def _ended_by(outcome: Outcome, run: RunDir) -> RunEnded:
    code = outcome.exit_code if outcome.exit_code is not None else EXIT_FAILED
    log = "" if code == EXIT_SPEC else f" (log: {run.log_file(outcome.stage)})"
    return RunEnded(code, f"{outcome.stage} failed: {outcome.message}{log}")


def state_of(exit_code: int) -> JobStatus:
    """What a run that has ended with an exit code of the contract is."""
    if exit_code == EXIT_DONE:
        return JobStatus.SUCCEEDED
    return JobStatus.STOPPED if exit_code in (EXIT_STOPPED, EXIT_BUDGET) else JobStatus.FAILED
