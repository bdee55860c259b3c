"""The dead man's switch where no provider's API ends the machine: it ends the run instead.

SkyPilot's autostop waits for the job, and a run that hangs keeps its job RUNNING for ever. On a
machine of SkyPilot's that is no pod, `nanochat run` starts this beside itself: with the eyes of
infra/deadman.py, and no more trust in the supervisor, it kills a run that gives no sign of life or
whose budget is spent. The job is over then, and autostop takes the machine.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

import psutil

from infra.deadman import LOOK_EVERY_S, Switch
from infra.processes import python_path
from infra.runpod_api import this_pod
from nanochat.rundir import nanochat_home


def start_guard(environ: Mapping[str, str] = os.environ) -> "subprocess.Popen[bytes] | None":
    """Watch this process where SkyPilot has started it and no pod's switch does."""
    if this_pod(environ) is not None or "SKYPILOT_TASK_ID" not in environ:
        return None
    return subprocess.Popen(
        [sys.executable, "-m", "infra.guard", str(os.getpid())],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env={**environ, **python_path()},
    )


def guard(process: psutil.Process, switch: Switch, say: Callable[[str], object]) -> None:
    """Look until the run is over, or kill it with everything that it has started."""
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if reason := switch.reason_to_end():
            say(f"dead man's switch: {reason}; the run is killed, so that its machine is idle\n")
            for one in [*process.children(recursive=True), process]:
                with contextlib.suppress(psutil.Error):
                    one.kill()
            return
        time.sleep(LOOK_EVERY_S)


def main(argv: list[str]) -> int:
    """argv: the process to watch."""
    with contextlib.suppress(psutil.NoSuchProcess):
        guard(psutil.Process(int(argv[0])), Switch(nanochat_home(), None, None), sys.stderr.write)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
