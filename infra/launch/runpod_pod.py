"""What is done with the pod of a run: its account, the way into it, its state, its end.

Everything here needs a key, ssh or the RunPod SDK; infra/launch/runpod.py is given them.
"""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from infra import reap
from infra.launch.base import VOLUME_MOUNT, LaunchError
from infra.launch.runpod import Launcher, Volume, pod_of, pods_or_explain
from infra.pull import Host
from infra.runpod_api import Pod, RunPodApi, connect
from nanochat.rundir import EXIT_STOPPED, nanochat_home

STOP_S = 900.0
"""Saving the largest run takes six minutes; the pod is ended then in any case."""
SILENT_S = 60.0
"""A pod that does not answer for so long is ended without waiting for more."""


def open_launcher(out: TextIO = sys.stderr) -> Launcher:
    """A launcher with the real SDK. Raises LaunchError that says what is missing."""
    sdk = _sdk()
    api = connect_or_explain()
    try:
        volumes = [
            Volume(str(v["id"]), str(v["name"]), str(v["dataCenterId"]), v.get("size"))
            for v in sdk.get_user().get("networkVolumes") or []
        ]
    except Exception as e:  # whatever the SDK raises
        raise LaunchError(f"RunPod does not let us in: {e}; is the key right?", 77) from None
    key = ssh_key()
    return Launcher(api, sdk.create_pod, volumes, ssh, out, key.with_suffix(".pub").read_text())


def connect_or_explain() -> RunPodApi:
    """The API. Raises LaunchError without a key."""
    api = connect()
    if api is None:
        raise LaunchError(
            "no RunPod key: set RUNPOD_API_KEY, or run `runpod config` (Settings > API Keys in the "
            "console; it needs read and write)"
        )
    return api


def find_pod(api: RunPodApi, run_name: str) -> Pod | None:
    """The pod of a run, also one that is stopped. Raises LaunchError without an answer."""
    return pod_of(pods_or_explain(api), run_name)


def status(api: RunPodApi, run_name: str) -> dict[str, Any] | None:
    """What the pod of a run says of it; None where there is no pod."""
    pod = find_pod(api, run_name)
    if pod is None:
        return None
    told = f"{path_on_pod(run_name)}/status.json"
    text = ssh(pod.address, f"cat {shlex.quote(told)}") if pod.address else None
    try:
        found = json.loads(text or "{}")
    except json.JSONDecodeError:
        found = {}
    usd = reap.cost_of(pod, time.time())
    message = f"pod {pod.id} is {pod.status} at ${pod.usd_per_hour:.2f}/h, so far ${usd:.2f}"
    way_in = ssh_line(pod.address) if pod.address else None
    return {
        "name": run_name,
        "pod": pod.id,
        "ssh": way_in,
        "state": pod.status,
        "exit_code": None,
        **found,
        "pod_usd": round(usd, 4),
        "message": "\n".join(
            filter(None, (f"{message}. {found.get('message') or ''}".rstrip(". "), way_in))
        ),
    }


def stop(launcher: Launcher, run_name: str) -> int:
    """Stop a run with a checkpoint and end its pod; the run's exit code."""
    pod = find_pod(launcher.api, run_name)
    if pod is None:
        raise LaunchError(f"there is no pod of {run_name}: nothing of it is billed but its volume")
    exit_code = EXIT_STOPPED
    phase = launcher.state_of(pod).get("phase")
    if pod.address is not None and phase not in ("check", "ended"):
        # a run that is not there yet, or does not listen, gets the signal
        asked = f"nanochat stop {run_name}; pkill -TERM -f infra[.]podrun"
        launcher.shell(pod.address, f"nohup sh -c {shlex.quote(asked)} >/dev/null 2>&1 &")
        answered = begun = time.monotonic()
        while time.monotonic() < min(begun + STOP_S, answered + SILENT_S):
            if state := launcher.state_of(pod):
                answered = time.monotonic()
            elif launcher.is_gone(pod.id):
                break
            if state.get("phase") == "ended":
                exit_code = int(state["exit_code"])
                break
            time.sleep(1.0)
    launcher.end(run_name, pod.id)
    return exit_code


def ssh(address: tuple[str, int], command: str) -> str | None:
    """What a command prints on a pod; None where it cannot be reached."""
    try:
        done = subprocess.run(
            [*ssh_command(address), command], capture_output=True, timeout=30.0, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def ssh_command(address: tuple[str, int]) -> list[str]:
    """ssh to a pod as root. A pod's host key is made at its birth, so there is none to know."""
    options = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "ConnectTimeout=10")
    quiet = ("BatchMode=yes", "LogLevel=ERROR")
    flags = [word for option in (*options, *quiet) for word in ("-o", option)]
    return ["ssh", *flags, "-i", str(ssh_key()), "-p", str(address[1]), f"root@{address[0]}"]


def ssh_line(address: tuple[str, int]) -> str:
    """What a person types to be there; -L PORT:localhost:PORT in it opens a port of the pod."""
    unknown = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
    return f"ssh {unknown} -i {shlex.quote(str(key_file()))} -p {address[1]} root@{address[0]}"


def run_on_pod(address: tuple[str, int], run_name: str) -> Host:
    """A run's files on its pod, for `pull`."""
    return Host(ssh_command(address), path_on_pod(run_name))


def path_on_pod(run_name: str) -> str:
    """Where a pod has the files of a run; its volume may have those of other runs too."""
    return f"{VOLUME_MOUNT}/nanochat/runs/{run_name}"


def key_file() -> Path:
    """Where the key of this machine for pods is, or will be."""
    return nanochat_home() / "ssh" / "id_ed25519"


def ssh_key() -> Path:
    """The key of this machine for pods; made at first use. Raises LaunchError without ssh."""
    key = key_file()
    if key.exists():
        return key
    key.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "nanochat", "-f", str(key)]
    try:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        raise LaunchError("ssh-keygen is missing: apt-get install openssh-client") from None
    return key


def _sdk() -> Any:
    try:
        import runpod
    except ImportError:
        raise LaunchError("the RunPod SDK is missing: `make cloud-venv` (docs/cloud.md)") from None
    runpod.api_key = connect_or_explain()._key
    return runpod
