"""TensorBoard beside a run, on `runtime.tensorboard_port`; it can neither stop nor delay the run.

It has no password, so it listens on loopback unless `runtime.tensorboard_host` says otherwise. One
that cannot start (no package, the port is taken) or dies is told of once and not started again.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial

from infra.processes import die_with_parent
from nanochat.rundir import RunDir
from nanochat.spec import Runtime

MODULE = (sys.executable, "-m", "tensorboard.main")
END_S = 1.0
"""Between asking it to end and killing it."""


class Board:
    """The server of one run; without a port it does nothing. No method raises."""

    def __init__(
        self,
        runtime: Runtime,
        run: RunDir,
        say: Callable[[str], None],
        command: Sequence[str] = MODULE,
    ) -> None:
        self._port, self._host = runtime.tensorboard_port, runtime.tensorboard_host
        self._folder, self._log_file = run.tensorboard_dir, run.log_file("tensorboard")
        self._say = say
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; at once, as it takes a second until it answers."""
        if self._port is None:
            return
        behind_us = partial(_stand_behind, os.getpid())
        where = ["--logdir", str(self._folder), "--host", self._host, "--port", str(self._port)]
        try:
            with open(self._log_file, "wb") as log:
                self._process = subprocess.Popen(
                    [*self._command, *where],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a terminal's Ctrl-C is the supervisor's
                    preexec_fn=behind_us if sys.platform == "linux" else None,
                )
        except (OSError, subprocess.SubprocessError) as e:
            self._warn(str(e))

    def watch(self) -> None:
        """Say it once if it has ended by itself."""
        if self._process is None or self._process.poll() is None:
            return
        self._process = None
        said = ""
        with contextlib.suppress(OSError):
            said = self._log_file.read_text(errors="replace")
        self._warn((said.strip().splitlines() or ["it ended by itself"])[-1])

    def close(self) -> None:
        """End it with the run."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _warn(self, why: str) -> None:
        self._say(
            f"warning: no TensorBoard on port {self._port}: {why} ({self._log_file}); the run goes "
            "on without it"
        )


def _stand_behind(supervisor: int) -> None:
    """Between fork and exec: it ends with the supervisor, and the run's processes go first."""
    die_with_parent(supervisor)
    os.nice(10)
