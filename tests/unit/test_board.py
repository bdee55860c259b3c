"""TensorBoard beside a run: it serves the run's files, and whatever it does the run goes on."""

import os
import socket
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from infra.board import Board
from nanochat.rundir import RunDir
from nanochat.spec import Runtime
from nanochat.trackers import TensorBoardSink
from tests.toyrun import wait_for

Children = Callable[[], list[psutil.Process]]
WAITS = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "run")
    made.create()
    return made


def test_it_serves_the_files_of_the_run_on_loopback_until_the_run_ends(
    run: RunDir, new_children: Children
) -> None:
    sink = TensorBoardSink(run.tensorboard_dir / "base_train", 0)
    sink.scalars(1, {"loss": 2.0})
    sink.close()
    port, said = free_port(), []
    board = Board(Runtime(tensorboard_port=port), run, said.append)
    board.start()

    def runs() -> bytes:
        try:
            address = f"http://127.0.0.1:{port}/data/runs"
            with urllib.request.urlopen(address, timeout=5.0) as answer:
                return bytes(answer.read())
        except OSError:
            return b""

    wait_for(lambda: b"base_train" in runs())
    listening = [c for p in new_children() for c in p.net_connections() if c.status == "LISTEN"]
    assert {c.laddr.ip for c in listening} <= {"127.0.0.1", "::1"}
    board.watch()
    board.close()
    assert new_children() == [] and said == []


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ([sys.executable, "-m", "no_such_tensorboard"], "No module named no_such_tensorboard"),
        ([sys.executable, "-c", "import sys; sys.exit('the port was in use')"], "port was in use"),
        (["/nonexistent/tensorboard"], "No such file"),
    ],
)
def test_one_that_cannot_start_is_one_warning(run: RunDir, command: list[str], why: str) -> None:
    said: list[str] = []
    board = Board(Runtime(tensorboard_port=6006), run, said.append, command)
    board.start()

    def is_told() -> bool:
        board.watch()
        return bool(said)

    wait_for(is_told)
    board.watch()
    board.close()
    assert len(said) == 1 and why in said[0] and "the run goes on" in said[0]


def test_one_that_does_not_end_is_killed(run: RunDir, new_children: Children) -> None:
    board = Board(Runtime(tensorboard_port=6006), run, print, [sys.executable, "-c", WAITS])
    board.start()
    (child,) = new_children()
    wait_for(lambda: child.status() == psutil.STATUS_SLEEPING)
    begun = time.monotonic()
    board.close()
    assert time.monotonic() - begun < 5.0
    assert not psutil.pid_exists(child.pid)


def test_it_stands_behind_the_run(run: RunDir, new_children: Children) -> None:
    board = Board(Runtime(tensorboard_port=6006), run, print, [sys.executable, "-c", WAITS])
    board.start()
    (child,) = new_children()
    wait_for(lambda: child.nice() > os.nice(0) or sys.platform != "linux")
    board.close()


def test_without_a_port_there_is_none(run: RunDir, new_children: Children) -> None:
    board = Board(Runtime(), run, print)
    board.start()
    assert new_children() == []
    board.close()
