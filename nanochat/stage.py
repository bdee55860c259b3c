"""The frame around every stage: arguments, signals, and the outcome file as the last act.

A stage is `main(run) -> Outcome | dict | None`, run as `python -m nanochat.stages.X RUN_DIR`, alone
or under the supervisor (then perhaps as many ranks under torchrun). Whatever happens in it ends
up in RUN/stages/X.json, and the process exits 0; torchrun would turn any other code into 1 and kill
the other ranks. A process that ends without an outcome was killed.
"""

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from nanochat.offline import install_guard
from nanochat.rundir import (
    EXIT_FAILED,
    EXIT_SPEC,
    EXIT_UNFIT_NODE,
    Outcome,
    RunDir,
    RunDirError,
    StopReason,
)
from nanochat.spec import SpecError

PR_SET_PDEATHSIG = 1
EXIT_BUG = 1
MISSES_RANK = "misses_rank"
"""Fact of a failure that is the consequence of another rank's end."""
LINE_ERRORS = ("LostRank", "DistNetworkError", "DistBackendError")
LINE_WORDS = (
    "Connection reset by peer",
    "Connection closed by peer",
    "Broken pipe",
    "Socket closed",
)


class StageFailed(RuntimeError):
    """The training itself failed (diverged, out of memory at the smallest batch): exit 70."""


class NodeUnfit(RuntimeError):
    """This machine cannot go on, another may: exit 77."""


def run_stage(name: str, main: Callable[[RunDir], Outcome | dict[str, Any] | None]) -> None:
    """Run a stage from the command line. Writes the outcome; exits 0, or 78 for wrong arguments."""
    if len(sys.argv) != 2:
        sys.stderr.write(f"usage: python -m nanochat.stages.{name} RUN_DIR\n")
        sys.exit(EXIT_SPEC)
    run = RunDir(Path(sys.argv[1]))
    if not run.path.is_dir():
        sys.stderr.write(f"{run.path} is no run directory\n")
        sys.exit(EXIT_SPEC)
    is_rank_0 = os.environ.get("RANK", "0") == "0"
    live_and_die_with_parent()
    stop_on_signals(run, is_alone=os.environ.get("WORLD_SIZE", "1") == "1")
    install_guard()
    before_s = seconds_before(run, name)
    started = time.monotonic()
    if is_rank_0:
        run.create()
        _forget_old_stop(run)
        run.write_outcome(
            Outcome(stage=name, outcome="running", seconds=before_s, facts={"since": time.time()})
        )
        run.write_progress(name, "start")
    try:
        result = main(run)
        outcome = _as_outcome(name, result)
    except Exception as e:
        outcome = _failure(name, e)
    outcome.seconds = before_s + time.monotonic() - started
    if outcome.outcome in ("failed", "again"):
        _write_first_failure(run, outcome)
    elif is_rank_0:
        run.write_outcome(outcome)
        if outcome.outcome == "stopped" and not run.lease_file.exists():
            run.clear_stop()  # no supervisor does it, and the same command goes on
    sys.stdout.flush()
    # A library thread that does not end (a tracker, a CUDA context) must not hold the run.
    os._exit(0)


def live_and_die_with_parent() -> None:
    """End with SIGKILL when the parent ends, at once where it has; dump all stacks on SIGUSR2.

    torchrun's workers start sessions of their own and outlive a SIGKILL of the group, still
    writing to the run directory; PR_SET_PDEATHSIG (prctl(2)) is what reaches them. A torchrun that
    died while this rank imported torch is no longer the parent: the rank would wait for init.
    """
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(EXIT_BUG)
    else:
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()
    if "TORCHELASTIC_RUN_ID" in os.environ and not _is_torchrun(parent):
        sys.stderr.write("the torchrun of this rank is gone; nothing was changed\n")
        os._exit(EXIT_BUG)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(EXIT_BUG)


def _is_torchrun(pid: int) -> bool:
    """Whether a process was started as torchrun, by either of its names."""
    try:
        words = psutil.Process(pid).cmdline()
    except psutil.Error:
        return False
    return any("torchrun" in word or "torch.distributed" in word for word in words)


def stop_on_signals(run: RunDir, is_alone: bool) -> None:
    """Turn a signal that reaches a stage (run alone, or by scancel) into the one stop mechanism.

    Under torchrun a signal means that another rank has ended; the supervisor decides what follows.
    """

    def ask(signum: int, _frame: Any) -> None:
        if run.stop_request() is None and run.path.is_dir():
            run.request_stop(StopReason.SIGNAL, time.time() + run.spec().stop_grace_s)

    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, ask if is_alone else signal.SIG_IGN)


def _forget_old_stop(run: RunDir) -> None:
    """A stop whose deadline has passed was meant for a process before this one."""
    request = run.stop_request()
    if request is not None and request.deadline_s < time.time():
        run.clear_stop()


def _as_outcome(name: str, result: Outcome | dict[str, Any] | None) -> Outcome:
    if isinstance(result, Outcome):
        return result
    return Outcome(stage=name, outcome="done", facts=result or {})


def _failure(name: str, error: Exception) -> Outcome:
    traceback.print_exc()
    text = str(error) or type(error).__name__
    if isinstance(error, SpecError | RunDirError):
        code = EXIT_SPEC
    elif isinstance(error, StageFailed):
        code = EXIT_FAILED
    elif isinstance(error, NodeUnfit):
        code = EXIT_UNFIT_NODE
    else:
        code, text = EXIT_BUG, f"{type(error).__name__}: {text}"
    facts = {MISSES_RANK: True} if code == EXIT_BUG and _misses_a_rank(error) else {}
    return Outcome(stage=name, outcome="failed", message=text, exit_code=code, facts=facts)


def _misses_a_rank(error: BaseException | None) -> bool:
    """Whether a rank failed for another one that is gone: told by name, as torch is not loaded
    here, or by what gloo and NCCL say."""
    while error is not None:
        if type(error).__name__ in LINE_ERRORS or any(w in str(error) for w in LINE_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def _write_first_failure(run: RunDir, outcome: Outcome) -> None:
    """The rank that fails first knows why; the others then fail because it is gone."""
    written = run.outcome(outcome.stage)
    if written is None or written.outcome == "running":
        run.write_outcome(outcome)


def seconds_before(run: RunDir, name: str) -> float:
    """Wall clock that earlier processes of this stage have used, the killed ones too."""
    before = run.outcome(name)
    if before is None:
        return 0.0
    if before.outcome != "running":
        return before.seconds
    last_sign_s = run.last_sign_s(name) or 0.0
    return before.seconds + max(0.0, last_sign_s - float(before.facts.get("since", last_sign_s)))
