"""Running a program that a model wrote: in a process of its own that can do nothing but compute.

What locks the process in stands in nanochat/sandbox_child.py. This side gives it an empty
environment and no files, waits for as long as it may take, and kills it. Without seccomp nothing is
run. What the sandbox does not do: a program that looks for it can claim to have passed.
"""

import contextlib
import functools
import json
import math
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import IO

CHILD = Path(__file__).with_name("sandbox_child.py")
TIMEOUT_S = 5.0
START_S = 20.0
"""Longest time for the interpreter to start and lock itself in, on a machine under load."""
MEMORY_BYTES = 1 << 30
"""Address space; an interpreter with the preloaded modules takes about 60 MiB of it."""
READY = "ready "
PASSED = "ready passed"
MOST_TOLD = 1000


@functools.cache
def problem() -> str | None:
    """Why programs cannot be locked in here; None where they can."""
    if sys.platform != "linux":
        return f"{sys.platform} has no seccomp"
    told = _run("", TIMEOUT_S)
    return None if told == PASSED else told or "the interpreter did not come up"


def passes(program: str, timeout_s: float = TIMEOUT_S) -> bool:
    """Whether a program ends by itself, in time and without an error. It runs locked in."""
    assert problem() is None, "never run bare"
    return _run(program, timeout_s) == PASSED


def _run(program: str, timeout_s: float) -> str:
    """What the child tells: `ready passed`, `ready`, or why it could not lock itself in."""
    end, tell = os.pipe()
    task = {"program": program, "cpu_s": math.ceil(timeout_s), "memory_bytes": MEMORY_BYTES}
    with open(end, "rb", buffering=0) as told, subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(CHILD), str(tell)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={},
        cwd="/",
        pass_fds=(tell,),
        start_new_session=True,
    ) as process:  # fmt: skip
        os.close(tell)
        assert process.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(task).encode())
                process.stdin.close()
            # the clock starts when the program does: an interpreter may take long to come up
            first = _read(told, START_S)
            if not first.startswith(READY):
                return first
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout_s)
            return first + _read(told, 0.0)
        finally:
            process.kill()


def _read(pipe: IO[bytes], timeout_s: float) -> str:
    """What has come through a pipe, waiting for the first byte."""
    ready, _, _ = select.select([pipe], [], [], timeout_s)
    return pipe.read(MOST_TOLD).decode(errors="replace") if ready else ""
