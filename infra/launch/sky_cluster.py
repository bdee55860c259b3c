"""What is done with a cluster that SkyPilot has made: the way into it, its state, its end.

* SkyPilot's own word for a run's end is 0, 100 or 1; what the run says stands in its status.json.
* The way in is the entry for ssh that SkyPilot writes on this machine; without one there is no
  cluster of that name here.
* Its end is believed when the provider no longer lists a pod of it.
"""

import contextlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from infra import reap
from infra.launch.base import LaunchError
from infra.pull import Host
from infra.runpod_api import Pod, ProviderError, connect
from nanochat.rundir import EXIT_FAILED, EXIT_STOPPED

NAME_LIMIT = 30
"""RunPod's names; SkyPilot adds a hash and `-head` to a cluster's."""
VERIFY_S = 120.0
POLL_S = 2.0
ANSWER_S = 60.0
STOP_S = 360.0
"""A stop with a checkpoint of the largest run, over ssh."""
JOB_EXIT_CODES = (
    'cd ~ && env -u PYTHONPATH "$(cat ~/.sky/python_path)" -c '
    '"from sky.skylet import job_lib; print(job_lib.get_exit_codes({job}))"'
)
"""SkyPilot's own call for managed jobs, in the Python that it has put on the machine."""


class Sky(Protocol):
    """What is used of SkyPilot; every call waits for its result."""

    def launch(self, task: dict[str, Any], cluster: str, secrets: dict[str, str]) -> int:
        """Provision and submit; the job's number."""

    def launch_managed(self, task: dict[str, Any], name: str, secrets: dict[str, str]) -> int:
        """Give it to the controller of managed jobs; the job's number."""

    def rents_controller(self) -> bool:
        """Whether the controller of managed jobs would be a machine that SkyPilot rents where it
        likes: neither within its server here, nor where the user's own settings put it."""

    def cancel_launch(self) -> None:
        """Give up a launch that hangs."""

    def logs(self, cluster: str, job: int) -> int:
        """Copy the log to its end; 0, or 100 where the job failed."""

    def exists(self, cluster: str) -> bool:
        """Whether SkyPilot knows a cluster of that name that is not down."""

    def down(self, cluster: str) -> None:
        """Terminate it."""

    def status(self) -> list[dict[str, Any]]:
        """Name, status and autostop of every cluster."""


def cluster_name(run_name: str) -> str:
    """Name of the cluster of a run: lower case, digits and hyphens, short enough for RunPod."""
    name = re.sub(r"[^a-z0-9]+", "-", run_name.lower()).strip("-")
    return (name if name[:1].isalpha() else f"run-{name}")[:NAME_LIMIT].rstrip("-")


def managed_cluster(run_name: str, job: int) -> str:
    """Name of the cluster that the controller of managed jobs makes for a job; a longer name than
    its 25 characters gets a hash there, and `reap` then knows the pod by its age alone."""
    return f"{cluster_name(run_name)}-{job}"


def is_known(cluster: str) -> bool:
    """Whether SkyPilot has brought up a cluster of that name from this machine."""
    return ssh_entry(cluster).is_file()


def status(name: str) -> dict[str, Any] | None:
    """What the run on a cluster says, and what the cluster costs; None where there is no cluster.

    name: the run's or the cluster's.
    """
    cluster = cluster_name(name)
    if not is_known(cluster):
        return None
    try:
        pods = pods_of(cluster)
        where = "; ".join(f"pod {p.id} is {p.status} at ${p.usd_per_hour:.2f}/h" for p in pods)
        pod = pods[0] if pods else None
    except ProviderError:
        where, pod = "RunPod does not answer", None
    run = run_on(cluster, name)
    if run is None and pod is None:
        where = where or "it does not answer; sky status -r says whether it is still there"
    facts: dict[str, Any] = {"name": name, "exit_code": None, **(run or {}), "cluster": cluster}
    facts.setdefault("state", pod.status if pod else "UNKNOWN")
    if pod is not None:
        facts |= {"pod": pod.id, "pod_usd": round(reap.cost_of(pod, time.time()), 4)}
    told = str((run or {}).get("message") or (run or {}).get("state") or "")
    facts["message"] = f"SkyPilot's cluster {cluster}: " + ". ".join(filter(None, (where, told)))
    return facts


def stop(name: str, sky: Sky) -> int:
    """Stop the run on a cluster with a checkpoint, then bring the cluster down; the exit code."""
    cluster = cluster_name(name)
    run = run_on(cluster, name)
    if run is not None and run["exit_code"] is None:
        on(cluster, f"nanochat stop {run['name']}", STOP_S)
        run = run_on(cluster, name)
    tear_down(cluster, sky)
    exit_code = (run or {}).get("exit_code")
    return EXIT_STOPPED if exit_code is None else int(exit_code)


def files_of(name: str) -> Host | None:
    """The files of the run on a cluster, for `pull`; None where there is no cluster or no run."""
    cluster = cluster_name(name)
    run = run_on(cluster, name) if is_known(cluster) else None
    return Host([*_ssh(cluster), cluster], str(run["run_dir"])) if run else None


def exit_code_on(cluster: str, run_name: str, job: int, since: float) -> int:
    """Exit code of a job that has not ended with 0: the run's own, else the job's, else 70.

    since: Unix time of the launch; what the run has said before is of an earlier attempt. A run
    that its preflight refuses says nothing.
    """
    named = [r for r in _runs_on(cluster) if r.get("name") == run_name and _heartbeat(r) >= since]
    run = max(named, key=_heartbeat, default=None)
    if run is not None and run["exit_code"] is not None:
        return int(run["exit_code"])
    code = _job_exit_code(cluster, job)
    return EXIT_FAILED if code is None else code


def _job_exit_code(cluster: str, job: int) -> int | None:
    """What a failed job's command has returned; None where SkyPilot's runtime there has not noted
    it."""
    text = on(cluster, JOB_EXIT_CODES.format(job=job))
    with contextlib.suppress(ValueError, TypeError):
        codes = [int(code) for code in json.loads(text or "null")]
        return next((code for code in codes if 0 < code < 256), None)
    return None


def run_on(cluster: str, name: str) -> dict[str, Any] | None:
    """status.json of the run of that name on a cluster, else of the one that was last alive."""
    runs = _runs_on(cluster)
    named = [r for r in runs if r.get("name") == name]
    return max(named or runs, key=_heartbeat, default=None)


def _runs_on(cluster: str) -> list[dict[str, Any]]:
    """status.json of every run on a cluster's volume; none where it does not answer."""
    try:
        told = json.loads(on(cluster, "nanochat status --json") or "[]")
    except json.JSONDecodeError:
        return []
    return [r for r in told if isinstance(r, dict) and "exit_code" in r]


def _heartbeat(run: dict[str, Any]) -> float:
    return float(run.get("heartbeat") or 0.0)


def on(cluster: str, command: str, timeout_s: float = ANSWER_S) -> str | None:
    """What a command prints there; None where it cannot be asked.

    The image's variables are in the login shell only. The exit code of `nanochat status` is the
    run's, so what is printed counts.
    """
    there = [*_ssh(cluster), cluster, f"bash -lc '{command}'"]
    with contextlib.suppress(subprocess.SubprocessError, OSError):
        done = subprocess.run(there, capture_output=True, text=True, timeout=timeout_s)
        return done.stdout if done.stdout else None
    return None


def _ssh(cluster: str) -> list[str]:
    options = [word for o in ("BatchMode=yes", "ConnectTimeout=15") for word in ("-o", o)]
    return ["ssh", "-F", str(ssh_entry(cluster)), *options]


def ssh_entry(cluster: str) -> Path:
    """The file that SkyPilot makes for ssh."""
    return Path.home() / ".sky" / "generated" / "ssh" / cluster


def tear_down(cluster: str, sky: Sky) -> None:
    """Terminate a cluster until SkyPilot and the provider no longer know it.

    Raises LaunchError where it may still be there.
    """
    deadline = time.monotonic() + VERIFY_S
    while True:
        trouble = ""
        try:
            sky.down(cluster)
        except Exception as e:  # whatever SkyPilot raises, also where there is no such cluster
            trouble = str(e) or type(e).__name__
        left = strays(cluster)
        if left is None:
            trouble = "RunPod does not answer"
        elif left:
            trouble = f"still there: {', '.join(left)}"
        elif not _is_known(cluster, sky, otherwise=bool(trouble)):
            return
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    raise LaunchError(
        f"{cluster} may still be billed ({trouble or 'SkyPilot still lists it'}): run `sky down "
        f"{cluster}` and `nanochat reap`, or end it in the console",
        1,
    )


def _is_known(cluster: str, sky: Sky, otherwise: bool) -> bool:
    """Whether SkyPilot still has the cluster; `otherwise` where it cannot say."""
    try:
        return sky.exists(cluster)
    except Exception:  # e.g. a state of the provider's that it cannot read
        return otherwise


def strays(cluster: str) -> list[str] | None:
    """Ids of the cluster's pods on RunPod, which are ended; None while RunPod does not answer."""
    api = connect()
    if api is None:
        return []
    try:
        mine = pods_of(cluster)
        for pod in mine:
            with contextlib.suppress(ProviderError):
                api.terminate(pod.id)
        return [p.id for p in mine]
    except ProviderError:
        return None


def pods_of(cluster: str) -> list[Pod]:
    """Pods of a cluster on RunPod; none without a key. Raises ProviderError."""
    api = connect()
    pods = [] if api is None else api.pods()
    return [p for p in pods if re.fullmatch(rf"{cluster}-[0-9a-f]+-head", p.name)]


class PodNotes:
    """What launches.jsonl is told of a cluster's pods while it starts: also of those that SkyPilot
    ends itself before it tries the next machine."""

    def __init__(self, cluster: str, run_name: str, max_usd: float | None) -> None:
        self._cluster, self._run_name, self._max_usd = cluster, run_name, max_usd
        self._noted: set[str] = set()

    def look(self) -> None:
        """Note each pod at its first sight with what it may cost, later that it is there or gone;
        nothing while the provider does not answer. A note that cannot be made is told, no more."""
        try:
            self._look()
        except ProviderError:
            return
        except (OSError, LookupError, ValueError) as e:
            self._tell(e)

    def _look(self) -> None:
        there = {pod.id: pod for pod in pods_of(self._cluster)}
        for pod_id in sorted(self._noted - there.keys()):
            reap.note_launch("gone", self._run_name, pod_id)
        for pod_id, pod in there.items():
            if pod_id in self._noted:
                price = pod.usd_per_hour
                reap.note_launch("seen", self._run_name, pod_id, usd_per_hour=price)
            else:
                self._note_made(pod)
        self._noted = set(there)

    def _note_made(self, pod: Pod) -> None:
        before = reap.spent_before(self._run_name, besides={pod.id})
        reap.note_launch(
            "made",
            self._run_name,
            pod.id,
            usd_per_hour=pod.usd_per_hour,
            born=time.time() - pod.uptime_s,
            max_usd=None if self._max_usd is None else max(0.0, self._max_usd - before),
        )

    def ended(self) -> None:
        """Note that none of those that were there at the last look is left."""
        try:
            for pod_id in sorted(self._noted):
                reap.note_launch("ended", self._run_name, pod_id)
        except OSError as e:
            self._tell(e)

    def _tell(self, trouble: Exception) -> None:
        sys.stderr.write(f"{reap.launches_file()} is not told of {self._cluster}: {trouble!r}\n")
