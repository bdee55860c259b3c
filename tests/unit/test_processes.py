"""A stage's processes: whose stacks are dumped."""

import os
import sys
import time
from pathlib import Path

import pytest

from infra.processes import TORCHRUN, StageProcess

RANK = """
import faulthandler, signal, subprocess, sys
faulthandler.register(signal.SIGUSR2)
def waits_for_ever():
    print("ready", flush=True)
    signal.pause()
helper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
waits_for_ever()
"""
LAUNCHER = """
import signal, subprocess, sys
signal.signal(signal.SIGUSR2, lambda *_: print("signalled", flush=True))
subprocess.Popen([sys.executable, "-c", sys.argv[1]]).wait()
"""


def wait_for(text: str, log: Path) -> None:
    deadline = time.monotonic() + 60
    while text not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


@pytest.mark.parametrize("is_launched", [False, True])
def test_the_stacks_of_ranks_are_dumped_and_a_launcher_is_left_alone(
    tmp_path: Path, is_launched: bool
) -> None:
    """Also where the only rank has children of its own, as a compile has."""
    launched = ["-c", LAUNCHER, RANK, TORCHRUN]
    log = tmp_path / "log"
    command = [sys.executable, *(launched if is_launched else ["-c", RANK])]
    process = StageProcess(command, log, dict(os.environ))
    try:
        wait_for("ready", log)
        assert process.poll() is None, "it runs, and its children are known"
        process.dump_stacks()
        wait_for("in waits_for_ever", log)
        assert "signalled" not in log.read_text()
    finally:
        process.kill()
