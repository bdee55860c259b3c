"""A stage's processes: start them, see whether they live, end all of them.

The tree of a stage is torchrun, its ranks and their workers; ranks are session leaders, so a group
kill misses them. Every process of the tree is looked up by parentage and killed by id.
"""

import ctypes
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import psutil

PR_SET_PDEATHSIG = 1
TORCHRUN = "torch.distributed.run"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What asks a run for a stop with a checkpoint; SLURM's --signal may be either of the last two."""
APP_DIR = Path(__file__).resolve().parent.parent


def die_with_parent(parent: int) -> None:
    """Between fork and exec: a killed supervisor takes its stage along (Linux, prctl(2)).

    parent: its process id, from before the fork; it may be dead by now.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


class StageProcess:
    """One running stage."""

    def __init__(self, command: list[str], log_file: Path, env: dict[str, str]) -> None:
        self._log = open(log_file, "ab")  # noqa: SIM115 - lives as long as the process
        die_with_us = partial(die_with_parent, os.getpid())
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
            preexec_fn=die_with_us if sys.platform == "linux" else None,
        )
        self._is_launcher = TORCHRUN in command
        self._seen: dict[int, psutil.Process] = {}

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        self._look()
        return self._process.poll()

    def dump_stacks(self) -> None:
        """Ask every Python rank to write its stacks to the log (SIGUSR2, faulthandler).

        torchrun is no rank: the signal would end it, and with it the ranks.
        """
        for process in self._tree():
            try:
                if process.pid != self.pid or not self._is_launcher:
                    process.send_signal(signal.SIGUSR2)
            except psutil.Error:
                continue

    def kill(self) -> None:
        """End every process of the tree and wait until they are gone."""
        tree = self._tree()
        for process in tree:
            try:
                process.kill()
            except psutil.Error:
                continue
        psutil.wait_procs(tree, timeout=10.0)
        self._process.wait()
        self._log.close()

    def _look(self) -> None:
        """Remember the descendants: once their parent is dead they can no longer be found."""
        try:
            root = psutil.Process(self.pid)
            for process in [root, *root.children(recursive=True)]:
                self._seen.setdefault(process.pid, process)
        except psutil.Error:
            pass

    def _tree(self) -> list[psutil.Process]:
        self._look()
        return [p for p in self._seen.values() if p.is_running()]


def stage_command(stage: str, run_dir: Path, num_ranks: int) -> list[str]:
    """Command line of a stage; torchrun only where there is more than one rank."""
    module = f"nanochat.stages.{stage}"
    if num_ranks == 1:
        return [sys.executable, "-m", module, str(run_dir)]
    # else the ranks meet under the host's name, which a container without network cannot resolve
    where = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={num_ranks}"]
    return [sys.executable, "-m", TORCHRUN, *where, "-m", module, str(run_dir)]


def stage_env(num_ranks: int, num_threads: int | None) -> dict[str, str]:
    """The supervisor's environment with the threads of each rank fixed.

    The thread count decides the order of floating-point sums, so that a resumed run gives the
    same bits only with the same count.
    """
    threads = num_threads or max(1, len(_usable_cpus()) // num_ranks)
    own = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **own, **python_path()}


def python_path() -> dict[str, str]:
    """So that a child process finds this checkout from any folder, installed or not."""
    folders = [str(APP_DIR), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {"PYTHONPATH": os.pathsep.join(folders)}


def _usable_cpus() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
