"""Launcher for SLURM with Apptainer: one sbatch script, which also drives the chain of jobs.

* What is rendered is the script, and `launch --dry-run` prints it so that `| sbatch` takes it: the
  spec is in it, so that nothing but the SIF and scratch has to be on the cluster.
* Signals, requeueing and the nodes to avoid are the script's business, in the batch shell outside
  of the container (there is no scontrol inside): infra/slurm/job.sbatch.j2.
* No secret goes along. A compute node has no network; `nanochat sync` pushes from the login node.
"""

import contextlib
import getpass
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import jinja2

from infra.launch.base import Job, LaunchError, Rendered, worst_case_usd
from nanochat.rundir import (
    EXIT_DONE,
    EXIT_SPEC,
    EXIT_UNFIT_NODE,
    RunDir,
    nanochat_home,
    read_jsonl,
)
from nanochat.spec import RunSpec, Slurm, spec_from_json
from nanochat.touches import missing_files

FIELDS = tuple(Slurm.model_fields)
"""Fields of [slurm]; `launch` has an option for each."""
TEMPLATE = Path(__file__).resolve().parent.parent / "slurm" / "job.sbatch.j2"
CPUS_PER_GPU = 8
"""Loader, compile workers and NCCL's threads of one rank."""
MOST_UNFIT = 2
"""Jobs that find their nodes unfit before a chain takes the fault for its own."""
KILL_WAIT_S = 30
"""SLURM's default from the end of the wall time to SIGKILL."""
PROGRAMS = ("apptainer", "singularity")
"""What runs the SIF, the better one first; a module that brings one usually has its name."""
SSH_MARK = "nanochat: the command's output follows"
"""On ssh's stdout after what the other side's shell says to everybody."""
MOST_NAMED = 3
"""Missing files that a message names."""
SEEN_QUEUE = "NANOCHAT_SQUEUE"
"""The variable in which nanochat.sh hands the queue into the SIF."""
COMMAND_TIMEOUT_S = 60.0
SSH_FAILED = 255
"""What ssh ends with where the other side was not reached; else the command's own code."""
END_OF_JOB_S = 30.0
"""From the end of a run to that of its job."""


@dataclass(frozen=True)
class QueueEntry:
    """A job as squeue shows it."""

    job_id: str
    state: str
    reason: str
    """Why it waits, or the nodes it runs on."""
    start: str | None
    """Estimate of the scheduler, or when it started; None where there is none yet."""
    time_left: str
    num_ahead: int | None = None
    """Waiting jobs of the partition with a higher place."""

    def render(self) -> str:
        """For people, on one line."""
        if self.state != "PENDING":
            return f"job {self.job_id} {self.state} on {self.reason}, {self.time_left} of it left"
        ahead = "" if self.num_ahead is None else f", {self.num_ahead} jobs ahead"
        start = f", expected to start {self.start}" if self.start else ", no start estimate yet"
        return f"job {self.job_id} PENDING ({self.reason}){ahead}{start}"


@dataclass(frozen=True)
class Outlook:
    """What a chain of jobs takes of an allocation, by the plan and at most."""

    jobs: int
    gpu_hours: float
    """By the plan; 0 on a CPU, as is the next one."""
    max_jobs: int
    job_hours: float
    """Wall time of a job."""
    max_hours: float
    """That jobs run at most: all of them to their end, or the budget."""
    max_gpu_hours: float

    def render(self) -> str:
        """For people, on one line."""
        jobs = "1 job" if self.jobs == 1 else f"{self.jobs} jobs"
        if self.jobs > self.max_jobs:
            jobs += f" (more than slurm.max_jobs = {self.max_jobs} allows: launch it again then)"
        expected = f", {self.gpu_hours:.0f} GPU-hours" if self.max_gpu_hours else ""
        most = f", {self.max_gpu_hours:.0f} GPU-hours" if self.max_gpu_hours else ""
        return (
            f"{jobs}{expected}; at most {self.max_jobs} of {self.job_hours:.3g} h each, "
            f"{self.max_hours:.3g} h in all{most}"
        )


def outlook(spec: RunSpec, plan: Mapping[str, Any]) -> Outlook:
    """Jobs and GPU-hours of a run, by its document of `plan --json`."""
    is_cpu = plan["offer"] == "cpu" or spec.runtime.device == "cpu"
    gpus = 0 if is_cpu else int(plan["world_size"])
    job_hours = seconds(spec.slurm.time) / 3600
    max_hours = spec.slurm.max_jobs * job_hours
    if spec.budget.max_hours is not None:
        max_hours = min(max_hours, spec.budget.max_hours)
    hours = float(plan["hours"])
    return Outlook(
        jobs=num_jobs(hours, spec.slurm),
        gpu_hours=gpus * hours,
        max_jobs=spec.slurm.max_jobs,
        job_hours=job_hours,
        max_hours=max_hours,
        max_gpu_hours=gpus * max_hours,
    )


def with_fields(spec: RunSpec, fields: Mapping[str, Any]) -> RunSpec:
    """The spec with what the command line says of the cluster. Raises SpecError."""
    given = {name: value for name, value in fields.items() if value is not None}
    memory = given.get("memory_gib")  # of a container it may be a fraction; SLURM takes whole ones
    if isinstance(memory, float) and memory.is_integer():
        given["memory_gib"] = int(memory)
    tree = json.loads(spec.model_dump_json())
    return spec_from_json(json.dumps(tree | {"slurm": tree["slurm"] | given}), "the command line")


def job_name(run_name: str) -> str:
    """Name of the jobs of a run; one runs at a time (dependency singleton)."""
    return f"nanochat-{run_name}"


def render(job: Job, user: str = "") -> Rendered:
    """The sbatch script. Raises LaunchError where the spec does not say enough of the cluster.

    user: whose account it is on the cluster, for $USER in paths; unset: this process's.
    """
    slurm = job.spec.slurm
    scratch = _scratch(slurm, user or getpass.getuser())
    sif = _expand(slurm.sif or f"{scratch}/nanochat.sif", user or getpass.getuser())
    _check_times(job)
    _check_nodes(job)
    embedded, config = _config(job)
    words = [f"@{config}", *(o for o in job.overrides if not o.startswith("slurm."))]
    text_file = _text_file(job)
    if text_file is not None:
        words.append(f"data.path={json.dumps(text_file)}")
    overrides = shlex.join(words[1:])
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, autoescape=False
    )
    log = f"{scratch}/nanochat-{job.name}-%j.out"
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=job.name,
        version=importlib.metadata.version("nanochat-kit"),
        config=f"@{job.config}".replace("\n", " "),
        outlook=outlook(job.spec, job.plan).render(),
        missing=_missing_data(job, scratch),
        job_name=job_name(job.name),
        options=_options(job, log),
        scratch=scratch,
        sif=sif,
        log=f'"{log}"',
        max_jobs=slurm.max_jobs,
        requeue=slurm.requeue,
        most_unfit=MOST_UNFIT,
        module=slurm.module,
        programs=sorted(PROGRAMS, key=lambda p: not (slurm.module or "").startswith(p)),
        gpus=_uses_gpus(job),
        nodes=slurm.nodes,
        text_file=text_file and shlex.quote(text_file),
        embedded=embedded,
        end_mark="END_OF_SPEC",
        run_words=" ".join(map(_quoted, words)),
        config_words=_quoted(words[0]) + (shlex.quote(f" {overrides}") if overrides else ""),
    )
    return Rendered(text, worst_case_usd(job, float(job.plan["usd_per_hour"])), comment="# ")


def submit(job: Job, out: TextIO = sys.stderr) -> int:
    """Submit the run with sbatch, here or over ssh; 0 once it is queued.

    Raises LaunchError where a chain of this run is queued already, or sbatch refuses.
    """
    host = job.spec.slurm.ssh
    if host is None and shutil.which("sbatch") is None:
        raise LaunchError(
            "there is no sbatch here: run this on a login node, name one (--ssh USER@HOST), or "
            "look at the job with --dry-run and pipe that to sbatch there",
            EXIT_UNFIT_NODE,
        )
    user = _command(host, ["id", "-un"]).strip() if host else getpass.getuser()
    rendered = render(job, user)
    for entry in queue(job.name, host, user):
        raise LaunchError(
            f"{job.name} is queued already: {entry.render()}. scancel {entry.job_id} ends it, and "
            "for a second run give another name in the spec"
        )
    _check_places(job, user, host)
    job_id = _command(host, ["sbatch", "--parsable"], rendered.text).strip().partition(";")[0]
    log = f"{_scratch(job.spec.slurm, user)}/nanochat-{job.name}-{job_id}.out"
    if host is None and (missing := _missing_data(job, _scratch(job.spec.slurm, user))):
        out.write(f"{missing}\n")
    out.write(f"{outlook(job.spec, job.plan).render()}\n")
    where = f"on {host}: " if host else ""
    out.write(f"job {job_id} is queued; {where}nanochat status {job.name}, tail -F {log}\n")
    return EXIT_DONE


def queue(run_name: str, host: str | None = None, user: str = "") -> list[QueueEntry]:
    """Jobs of a user's run that wait or run, the oldest first; empty where there is no SLURM.

    user: whose account it is on the host; unset: this process's.
    """
    if host is None and shutil.which("squeue") is None:
        return _queue_seen(run_name)
    form = "%i|%T|%R|%S|%L|%P"
    mine = ["squeue", "--noheader", "--sort=i", f"--name={job_name(run_name)}"]
    mine.append(f"--user={user or getpass.getuser()}")
    entries = []
    for line in _command(host, [*mine, f"--format={form}"]).splitlines():
        job_id, state, reason, start, left, partition = line.strip().split("|")
        ahead = _num_ahead(job_id, partition, host) if state == "PENDING" else None
        known = None if start == "N/A" else start
        entries.append(QueueEntry(job_id, state, reason.strip("()"), known, left, ahead))
    return entries


def _queue_seen(run_name: str) -> list[QueueEntry]:
    """The jobs that nanochat.sh has seen outside the SIF, in which there is no squeue.

    One per `;`: name|id|state|reason or nodes|start|time left|jobs ahead, the last may be empty.
    """
    entries = []
    for row in filter(None, os.environ.get(SEEN_QUEUE, "").split(";")):
        name, job_id, state, reason, start, left, ahead = row.split("|")
        if name == run_name:
            known = None if start == "N/A" else start
            num_ahead = int(ahead) if ahead else None
            entries.append(QueueEntry(job_id, state, reason, known, left, num_ahead))
    return entries


def chain(run_dir: RunDir) -> dict[str, Any] | None:
    """How far the chain of jobs has come, from the lines that its batch shells have written.

    exit_code and reason are None where the last job has not ended.
    """
    events = list(read_jsonl(run_dir.path / "slurm.jsonl"))
    if not events:
        return None
    last = events[-1]
    return {
        "time": last["time"],
        "jobs": last["jobs"],
        "job": last["job"],
        "host": last["host"],
        "last": last["event"],
        "exit_code": last["exit_code"],
        "reason": last.get("reason") or None,
    }


def end_jobs(run_name: str, wait_s: float = END_OF_JOB_S) -> list[str]:
    """Cancel the jobs that a stopped run has left, after `wait_s` in which they may end; their ids.

    One that waits in the queue would go on with the run, and so would one that has just begun.
    """
    deadline = time.monotonic() + wait_s
    while left := queue(run_name):
        is_ending = any(e.state in ("RUNNING", "COMPLETING") for e in left)
        if not is_ending or time.monotonic() > deadline:
            _command(None, ["scancel", *(e.job_id for e in left)])
            break
        time.sleep(1.0)
    return [e.job_id for e in left]


def describe(run_name: str, run_dir: RunDir | None) -> dict[str, Any] | None:
    """What `status` adds for a run that SLURM has to do with: queue and chain; else None."""
    entries: Sequence[QueueEntry] = ()
    # Inside the SIF nanochat.sh has asked outside, and told people itself.
    is_unseen = shutil.which("squeue") is None and SEEN_QUEUE not in os.environ
    with contextlib.suppress(LaunchError):  # a controller that does not answer hides no run
        entries = queue(run_name)
    found = chain(run_dir) if run_dir else None
    if not entries and found is None:
        return None
    return {
        "queue": [vars(e) for e in entries],
        "chain": found,
        "message": "; ".join(e.render() for e in entries) or (None if is_unseen else "not queued"),
    }


def unstarted(run: str) -> dict[str, Any] | None:
    """Status of a run without spec.json: queued, or refused before its first step; else None.

    run: its name, or a folder. What a refused job leaves there is slurm.jsonl with the reason.
    """
    places = (Path(run), nanochat_home() / "runs" / run)
    run_dir = next((RunDir(p) for p in places if (p / "slurm.jsonl").is_file()), None)
    name = run_dir.path.name if run_dir else run
    found = describe(name, run_dir)
    if found is None:
        return None
    state, exit_code, message = "PENDING", None, found["message"]
    last = found["chain"]
    if last is not None and not found["queue"]:
        where = f"job {last['job']} on {last['host']}"
        exit_code = last["exit_code"]
        if exit_code is None:
            message = f"{where} has begun, and not yet got as far as the first stage"
        else:
            state = "FAILED"
            message = f"{where} has ended with {exit_code}: {last['reason'] or 'see its log'}"
    return {
        "name": name,
        "state": state,
        "exit_code": exit_code,
        "message": message,
        "slurm": found,
    }


# -- the script


def _options(job: Job, log: str) -> list[str]:
    """The #SBATCH lines, without their mark."""
    slurm, gpus = job.spec.slurm, _gpus_per_node(job)
    cpus = slurm.cpus_per_task or (CPUS_PER_GPU * gpus if gpus else None)
    memory = slurm.memory_gib
    options = [
        ("account", slurm.account),
        ("partition", slurm.partition),
        ("qos", slurm.qos),
        ("nodes", slurm.nodes),
        ("ntasks-per-node", 1),
        ("cpus-per-task", cpus),
        ("gres", slurm.gres or (f"gpu:{gpus}" if gpus else None)),
        ("mem", f"{memory}G" if memory else ("0" if gpus else None)),
        ("time", slurm.time),
        ("signal", f"B:USR2@{slurm.signal_s}"),
        ("dependency", "singleton"),
        ("open-mode", "append"),
        ("output", log),
    ]
    lines = [f"{name}={value}" for name, value in options if value is not None]
    return [*lines, "requeue" if slurm.requeue else "no-requeue"]


def _quoted(word: str) -> str:
    """For the shell, in which $spec is where the job writes the spec that it was sent with."""
    return f'"{word}"' if word == "@$spec" else shlex.quote(word)


def _uses_gpus(job: Job) -> bool:
    return job.plan["offer"] != "cpu" and job.spec.runtime.device != "cpu"


def _gpus_per_node(job: Job) -> int:
    if not _uses_gpus(job):
        return 0
    return max(1, int(job.plan["world_size"]) // job.spec.slurm.nodes)


def _config(job: Job) -> tuple[str | None, str]:
    """(text to write on the node, or None; the config's path inside the container)."""
    if job.config_file is None:
        return None, job.config
    text = job.config_file.read_text(encoding="utf-8").rstrip("\n")
    if re.search(r"^END_OF_SPEC$", text, re.MULTILINE):
        raise LaunchError(f"{job.config}: a line END_OF_SPEC cannot stand in a spec that is sent")
    return text, "$spec"


def _text_file(job: Job) -> str | None:
    """The text of the user's own as the job reads it; None where there is none.

    Raises LaunchError for one that only this machine could find.
    """
    data = job.spec.data
    if data.source != "text" or data.path is None:
        return None
    if job.spec.slurm.ssh is None:
        return str(Path(data.path).resolve())
    if not Path(data.path).is_absolute():
        raise LaunchError(
            f"data.path = {data.path!r} is relative to a folder of this machine; with --ssh give "
            "the file's whole path on the cluster"
        )
    return data.path


def _missing_data(job: Job, scratch: str) -> str:
    """On one line what the job would miss, if its data lie on this machine; else empty.

    A warning: an image of the user's own may have the data in it, and they may come while the job
    waits. The job looks again and refuses.
    """
    home = Path(scratch) / "nanochat"
    if job.spec.slurm.ssh is not None or nanochat_home().resolve() != home.resolve():
        return ""
    by_stage = missing_files(job.spec).values()
    # A text of the user's own need not be visible here, inside the SIF on a login node.
    files = [file for files in by_stage for file in files if not Path(file).is_absolute()]
    if not files:
        return ""
    more = len(files) - MOST_NAMED
    named = ", ".join(files[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
    command = shlex.join([f"@{job.config}", *job.overrides])
    text = (
        f"not in {home}/data, or not whole: {named}. The job will refuse that, unless its image "
        f"has them; bring them: nanochat fetch {command}"
    )
    return " ".join(text.splitlines())


def _check_times(job: Job) -> None:
    slurm, grace_s = job.spec.slurm, job.spec.stop_grace_s
    if slurm.signal_s < grace_s + KILL_WAIT_S:
        raise LaunchError(
            f"slurm.signal_s = {slurm.signal_s} leaves no room for stop_grace_s = {grace_s:g}: the "
            f"checkpoint and the requeue need {KILL_WAIT_S} s more; set slurm.signal_s to "
            f"{round(grace_s) + KILL_WAIT_S} or more"
        )
    if seconds(slurm.time) <= slurm.signal_s:
        raise LaunchError(
            f"slurm.time = {slurm.time!r} is not longer than slurm.signal_s = {slurm.signal_s}: the"
            " job would be asked to stop as it starts"
        )


def _check_nodes(job: Job) -> None:
    nodes, ranks = job.spec.slurm.nodes, job.spec.runtime.num_ranks
    if nodes > 1 and (ranks is None or ranks % nodes):
        raise LaunchError(
            f"slurm.nodes = {nodes} needs runtime.num_ranks, the ranks on all of them, a multiple "
            f"of {nodes}; it is {ranks or 'unset'}"
        )


def seconds(time: str) -> int:
    """sbatch's time: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        h, m, s = [*parts, 0, 0][:3]
    elif len(parts) < 3:
        h, (m, s) = 0, [*parts, 0][:2]
    else:
        h, m, s = parts
    return (int(days or 0) * 24 + h) * 3600 + m * 60 + s


def num_jobs(hours: float, slurm: Slurm) -> int:
    """Jobs that a run of so many hours takes: each is asked to stop `signal_s` (and up to a minute
    more) before its end."""
    usable_s = max(60, seconds(slurm.time) - slurm.signal_s - 60)
    return max(1, -int(-hours * 3600 // usable_s))


def _scratch(slurm: Slurm, user: str) -> str:
    if slurm.scratch is None:
        raise LaunchError(
            "where do data, runs and logs go? Give a folder that every node sees: "
            "--scratch '/scratch/$USER', or slurm.scratch in the spec"
        )
    return _expand(slurm.scratch, user).rstrip("/")


def _expand(path: str, user: str) -> str:
    expanded = path.replace("${USER}", user).replace("$USER", user)
    if "$" in expanded:
        raise LaunchError(f"{path}: of variables only $USER is known")
    if not re.fullmatch(r"[\w./@%+:,=~-]+", expanded):
        raise LaunchError(f"{expanded!r} has a character that no shell would leave alone")
    return expanded


# -- the cluster


def _check_places(job: Job, user: str, host: str | None) -> None:
    """What the job opens first, as the login node sees it; the job looks again on its own."""
    scratch = _scratch(job.spec.slurm, user)
    sif = _expand(job.spec.slurm.sif or f"{scratch}/nanochat.sif", user)
    problems = {
        f"{scratch} is no folder there that can be written; set slurm.scratch": ["-w", scratch],
        f"there is no {sif}; bring it there: infra/slurm/build_sif.sh docker://HOST/NAME {sif}": [
            "-f",
            sif,
        ],
    }
    if text_file := _text_file(job):
        problems[f"there is no {text_file} there; set data.path to a file that every node sees"] = [
            "-f",
            text_file,
        ]
    for problem, test in problems.items():
        if _run(host, ["test", *test]).returncode:
            raise LaunchError(problem)


def _num_ahead(job_id: str, partition: str, host: str | None) -> int | None:
    """Waiting jobs of the partition before this one, by priority."""
    asked = ["squeue", "--noheader", "--states=PENDING", f"--partition={partition}"]
    ids = _command(host, [*asked, "--sort=-p,i", "--format=%i"]).split()
    return ids.index(job_id) if job_id in ids else None


def _command(host: str | None, command: list[str], text: str = "") -> str:
    """Output of a command here or on a host. Raises LaunchError with what it said."""
    done = _run(host, command, text)
    if done.returncode:
        where = f" on {host}" if host else ""
        raise LaunchError(
            f"{command[0]}{where}: {done.stderr.strip() or done.stdout.strip()}",
            EXIT_UNFIT_NODE if host and done.returncode == SSH_FAILED else EXIT_SPEC,
        )
    return done.stdout


def _run(host: str | None, command: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
    if host is not None:
        there = f"echo {shlex.quote(SSH_MARK)}; {shlex.join(command)}"
        command = ["ssh", "-o", "BatchMode=yes", "--", host, there]
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
        )
    except FileNotFoundError:
        raise LaunchError(f"{command[0]} is not installed here", EXIT_UNFIT_NODE) from None
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"{shlex.join(command[:4])} has not answered within {COMMAND_TIMEOUT_S:.0f} s; is the "
            "SLURM controller up? Try: sinfo",
            EXIT_UNFIT_NODE,
        ) from None
    if host is not None:
        done.stdout = done.stdout.partition(f"{SSH_MARK}\n")[2]
    return done
