"""What a pod of `launch --to runpod` runs: the node check, one run, and then the end of the pod.

A provider starts a container again that has ended, and bills it; so this process never ends by
itself: when the run is over it asks the API for the end of its pod, until there is no pod.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from infra.deadman import RETRY_S, note_life
from infra.privileges import image_home
from infra.processes import STOP_SIGNALS, python_path
from infra.runpod_api import ProviderError, RunPodApi, connect, this_pod
from nanochat.rundir import EXIT_DONE, EXIT_UNFIT_NODE, atomic_write_json

STATE_FILE = Path("/tmp/nanochat-pod.json")
"""For the launcher, by ssh: phase (check, run, ended) and exit code."""
LOG_FILE = Path("/tmp/nanochat-pod.log")
SEEN_FILE = Path("/tmp/nanochat-pod.seen")
"""The launcher has read the end."""
LINGER_S = 15.0
"""How long an ended pod waits for its launcher to read how it ended."""
CHECK_TIMEOUT_S = 150.0
"""A minute of checks, and the import of torch from a cold disk."""


def main(argv: list[str]) -> int:
    """argv: the command line of a verb, e.g. `run @configs/d20.toml`."""
    start_sshd(os.environ.get("PUBLIC_KEY", ""))
    told: dict[str, Any] = {"phase": "check"}
    atomic_write_json(STATE_FILE, told)
    exit_code = check_node()
    if exit_code == EXIT_DONE:
        atomic_write_json(STATE_FILE, {"phase": "run"})
        exit_code = run(argv)
    atomic_write_json(STATE_FILE, {"phase": "ended", "exit_code": exit_code})
    if this_pod() is None:
        return exit_code
    deadline = time.monotonic() + LINGER_S
    while time.monotonic() < deadline and not SEEN_FILE.exists():
        time.sleep(0.2)
    end_pod(this_pod(), connect(), image_home())
    return exit_code


def check_node() -> int:
    """0, or 77 where this node is unfit; its words stand in the log."""
    command = [sys.executable, "-m", "nanochat.nodecheck", str(image_home())]
    try:
        with open(LOG_FILE, "ab") as log:
            code = subprocess.run(
                command,
                stdout=log,
                stderr=log,
                timeout=CHECK_TIMEOUT_S,
                env={**os.environ, **python_path()},
            ).returncode
    except subprocess.TimeoutExpired:
        return EXIT_UNFIT_NODE
    return EXIT_DONE if code == EXIT_DONE else EXIT_UNFIT_NODE


def run(argv: list[str]) -> int:
    """The verb as a child process; signals go on to it, its output to the log and to stderr."""
    program = shutil.which("nanochat")
    command = [program] if program else [sys.executable, "-m", "entrypoint"]
    process = subprocess.Popen(
        [*command, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **python_path()},
    )

    def pass_on(signum: int, _frame: FrameType | None) -> None:
        process.send_signal(signum)

    for signum in STOP_SIGNALS:
        signal.signal(signum, pass_on)
    copier = threading.Thread(target=_copy, args=(process,), daemon=True)
    copier.start()
    code = process.wait()
    copier.join(2.0)
    return code if code >= 0 else 128 - code


def end_pod(pod_id: str | None, api: RunPodApi | None, home: Path) -> None:
    """Ask for the end of this pod until there is none; returns only where there is no key."""
    if pod_id is None or api is None:
        sys.stderr.write("no RUNPOD_API_KEY: this pod cannot end itself; end it in the console\n")
        return
    for attempt in range(sys.maxsize):
        note_life(home, pod_id)
        try:
            api.terminate(pod_id)
        except ProviderError as e:
            sys.stderr.write(f"the end of this pod is asked for again: {e}\n")
        time.sleep(RETRY_S[min(attempt, len(RETRY_S) - 1)])


def start_sshd(public_key: str) -> None:
    """Let the launcher in, where this is the image and root; without ssh the run goes on."""
    sshd = shutil.which("sshd") or "/usr/sbin/sshd"
    if not public_key or os.geteuid() != 0 or not Path(sshd).exists():
        return
    keys = Path("/root/.ssh/authorized_keys")
    keys.parent.mkdir(mode=0o700, exist_ok=True)
    with open(keys, "a") as f:
        f.write(public_key.strip() + "\n")
    keys.chmod(0o600)
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    subprocess.call(["ssh-keygen", "-A"], stdout=subprocess.DEVNULL)
    subprocess.call([sshd])


def _copy(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdout is not None
    with open(LOG_FILE, "ab", buffering=0) as log:
        while chunk := os.read(process.stdout.fileno(), 1 << 16):
            log.write(chunk)
            sys.stderr.buffer.write(chunk)
            sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
