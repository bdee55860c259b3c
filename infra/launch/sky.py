"""Launcher for SkyPilot: fills in one of sky/*.yaml and calls SkyPilot's Python API.

* What is rendered is the task that is sent, and `sky launch` takes it as it stands; the values of
  secrets are not in it.
* A launch that fails, or that is not up in time, is torn down, and the provider is asked whether
  anything is left: SkyPilot's autostop lives in the pod, so a pod whose set-up has failed is never
  stopped by anybody.
* SkyPilot knows 0, 100 and 1; the run's own exit code is read from its status.json.
"""

import itertools
import os
import re
import shlex
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import yaml

from infra import reap
from infra.launch.base import (
    IMAGE_NAME,
    POD_PREFIX,
    VOLUME_MOUNT,
    Job,
    LaunchError,
    Rendered,
    check_data,
    check_image,
    present_secrets,
    refuse_spent,
    worst_case_usd,
)
from infra.launch.sky_cluster import (
    PodNotes,
    Sky,
    cluster_name,
    exit_code_on,
    managed_cluster,
    pods_of,
    tear_down,
)
from infra.launch.sky_rungs import SKY_GPUS, check_prices, highest_usd_per_hour, take_offer
from infra.processes import APP_DIR
from infra.runpod_api import ProviderError
from nanochat.rundir import EXIT_DONE, EXIT_STOPPED, EXIT_UNFIT_NODE

TASKS = APP_DIR / "sky"
DATA_PATH = "data.path="
LAUNCH_LIMIT_S = 2400.0
"""Image pull, start and set-up over all rungs; SkyPilot itself waits without a limit. All of it may
be billed before the run starts, whose own budget counts from its first second."""
LOOK_EVERY_S = 30.0
"""Between two looks at what SkyPilot rents while it starts a cluster."""
RENTED_CONTROLLER = (
    "SkyPilot's controller of managed jobs would be a pod of its own, which nothing ends (SkyPilot "
    "has no autostop for it on RunPod). Have it in SkyPilot's server on this machine, which then "
    "has to stay on: put `jobs: {controller: {consolidation_mode: true}}` into ~/.sky/config.yaml, "
    "then `sky api stop`, and give this command again"
)
CPUS_ELSEWHERE = "4+"
"""For a run without GPU on another cloud, which has other names for its machines."""


@dataclass(frozen=True, kw_only=True)
class SkyOptions:
    """What a user may choose about the task."""

    image: str = ""
    """Unset: what the task's file says."""
    task: Path | None = None
    """Unset: the file of sky/ that runs the config."""
    infra: str = ""
    """Another place, e.g. `lambda`, by accelerator instead of by RunPod's instance type."""
    spot: bool = False
    """Interruptible machines: cheaper, and gone at any moment; the same command resumes."""
    detach: bool = False
    """Return as soon as the run has started."""


def task_file(config: str, options: SkyOptions) -> Path:
    """The task that runs a config. Raises LaunchError that lists what there is."""
    if options.task is not None:
        return options.task
    wanted = f"@configs/{Path(config).name} "
    for path in sorted(TASKS.glob("*.yaml")):
        if wanted in str(yaml.safe_load(path.read_text()).get("run", "")):
            return path
    known = ", ".join(p.name for p in sorted(TASKS.glob("*.yaml"))) or "none"
    raise LaunchError(
        f"no task in {TASKS} runs @configs/{Path(config).name} (there are: {known}); write one "
        "beside them: its run line names the config, everything else can be copied"
    )


def own_overrides(config: str, options: SkyOptions) -> tuple[str, ...]:
    """What the task's command itself gives, before ARGS; not its data.path, which is there."""
    command = shlex.split(yaml.safe_load(task_file(config, options).read_text()).get("run") or "")
    begin = next((i for i, word in enumerate(command) if word.startswith("@")), len(command))
    given = itertools.takewhile(lambda word: "=" in word, command[begin + 1 :])
    return tuple(word for word in given if not word.startswith(DATA_PATH))


def fill(job: Job, options: SkyOptions) -> dict[str, Any]:
    """The task as SkyPilot takes it, with the overrides in ARGS."""
    task: dict[str, Any] = yaml.safe_load(task_file(job.config, options).read_text())
    task["envs"] = {**(task.get("envs") or {}), "ARGS": shlex.join(job.overrides)}
    if any(o.startswith(DATA_PATH) for o in job.overrides):
        # the text is elsewhere than where the task's command says: it is not sent along
        mounts = task.pop("file_mounts", {})
        mounts.pop(_text_of_command(task), None)
        task |= {"file_mounts": mounts} if mounts else {}
    if any(shlex.quote(o) != o for o in job.overrides):
        # the shell splits an unquoted $ARGS at blanks and keeps quotes: they stand in the command
        task["run"] = task["run"].replace("$ARGS", shlex.join(job.overrides))
        task["envs"]["ARGS"] = ""
    resources = task["resources"]
    if not options.infra and any(o.startswith("offer=") for o in job.overrides):
        take_offer(job, resources)
    if options.spot:
        resources["use_spot"] = True
    if options.image:
        resources["image_id"] = f"docker:{options.image}"
    task["envs"][IMAGE_NAME] = resources["image_id"].removeprefix("docker:")
    if options.infra:
        count, _, gpu = str(job.plan["offer"]).partition("x")
        resources.pop("ordered", None)
        resources.pop("instance_type", None)
        resources.pop("job_recovery", None)  # nothing would be left to go on from
        task.pop("volumes", None)
        resources["infra"] = options.infra
        if gpu:
            resources["accelerators"] = f"{SKY_GPUS.get(gpu, gpu)}:{count}"
        else:
            resources["cpus"] = CPUS_ELSEWHERE
    check_prices(job, resources)
    return task


def check_reachable(job: Job, task: dict[str, Any]) -> None:
    """Raises LaunchError where the machine could not have the image, or the run not its text."""
    check_image(task["resources"]["image_id"])
    mounts: dict[str, str] = task.get("file_mounts") or {}
    check_data(job, data_path(job, task), "volumes" in task, mounts)
    for target, source in mounts.items():
        if "://" not in str(source) and not Path(source).expanduser().exists():
            raise LaunchError(
                f"{source} is not in this folder, from where {target} is sent along: start from "
                f"the folder that has it, or put it on the volume (docs/cloud.md, A text of your "
                f"own) and give 'data.path=\"{VOLUME_MOUNT}/{Path(source).name}\"'"
            )


def data_path(job: Job, task: dict[str, Any]) -> str | None:
    """data.path as the run reads it: the user's word, else that of the task's command."""
    is_own = any(o.startswith(DATA_PATH) for o in job.overrides)
    return (None if is_own else _text_of_command(task)) or job.spec.data.path


def _text_of_command(task: dict[str, Any]) -> str | None:
    """The data.path that a task's command gives."""
    words = [w for w in shlex.split(task["run"]) if w.startswith(DATA_PATH)]
    return str(tomllib.loads(f"x = {words[-1].removeprefix(DATA_PATH)}")["x"]) if words else None


def volume_gb(config: str, options: SkyOptions) -> float | None:
    """Size of the task's volume in 10^9 bytes as sky/volume.yaml makes it; None for another one."""
    if options.infra:
        return None
    task = yaml.safe_load(task_file(config, options).read_text())
    mounted = (task.get("volumes") or {}).get(VOLUME_MOUNT)
    file = TASKS / "volume.yaml"
    if mounted is None or not file.is_file():
        return None
    try:
        made = yaml.safe_load(file.read_text())
        if mounted != made["name"]:
            return None
        size = made.get("size")  # a volume that was there before needs none
        return None if size is None else _gb(str(size))
    except (yaml.YAMLError, TypeError, KeyError, AttributeError, ValueError) as e:
        raise LaunchError(
            f"{file} does not say the size of a volume ({_told(e)}): SkyPilot reads e.g. "
            "`size: 300Gi`"
        ) from None


def _gb(size: str) -> float:
    """What SkyPilot 0.14.1 asks RunPod for, in 10^9 bytes. Raises ValueError."""
    found = re.fullmatch(r"([0-9]+)(?:([KMGTP])[BI])?", size.upper())
    gb = int(found[1]) * 1024 ** "KMGTP".index(found[2] or "G") // 1024**2 if found else 0
    if gb < 1:
        raise ValueError(f"size {size!r} is none")
    return float(gb)


def render(job: Job, options: SkyOptions) -> Rendered:
    """The task as YAML, and the most that run, start and autostop can cost."""
    task = fill(job, options)
    text = yaml.safe_dump(task, sort_keys=False, width=100)
    return Rendered(text, worst_usd(job, task))


def worst_usd(job: Job, task: dict[str, Any]) -> float | None:
    """Run's bound, the minutes before it starts and those until autostop, at the dearest rung."""
    resources = task["resources"]
    hourly = highest_usd_per_hour(job, resources)
    bound = worst_case_usd(job, hourly)
    if bound is None:
        return None
    idle = float((resources.get("autostop") or {}).get("idle_minutes") or 0.0)
    return bound + hourly * (LAUNCH_LIMIT_S / 60.0 + idle) / 60.0


def submit(job: Job, options: SkyOptions, sky: Sky, out: TextIO = sys.stderr) -> int:
    """Start the run and follow it; its exit code. Nothing stays behind where the start fails."""
    cluster = cluster_name(job.name)
    task = fill(job, options)
    check_reachable(job, task)
    existed = _exists(cluster, sky)
    if existed:
        out.write(f"{cluster} is up already: the run is given to it\n")
    refuse_spent(job, reap.spent_before(job.name), float(job.plan["usd_per_hour"]))
    before = reap.spent_before(job.name, besides=_pods_up(cluster) if existed else ())
    if before > 0.0:
        task["envs"][f"{POD_PREFIX}BEFORE_USD"] = f"{before:.4f}"
    secrets = {name: os.environ[name] for name in present_secrets(os.environ)}
    notes = PodNotes(cluster, job.name, worst_usd(job, task))
    since = time.time()
    try:
        number = _within(
            LAUNCH_LIMIT_S,
            lambda: sky.launch(task, cluster, secrets),
            sky.cancel_launch,
            (lambda: None) if existed else notes.look,
        )
    except KeyboardInterrupt:
        out.write("interrupted before the run has started\n")
        if not existed:
            _clear_away(cluster, sky, notes)
        return EXIT_STOPPED
    except Exception as e:  # SkyPilot raises what any of its parts raises
        if existed:
            raise LaunchError(
                f"{cluster} was up before and did not take the run: {e}. It is billed: look at it "
                f"with sky queue {cluster}, or end it with sky down {cluster}",
                EXIT_UNFIT_NODE,
            ) from None
        _clear_away(cluster, sky, notes)
        raise LaunchError(
            f"SkyPilot could not start {cluster}: {e}. It is torn down, and nothing is billed",
            EXIT_UNFIT_NODE,
        ) from None
    notes.look()
    out.write(f"{cluster} runs {job.name}: nanochat status {job.name}, nanochat stop {job.name}\n")
    if options.detach:
        return EXIT_DONE
    try:
        code = sky.logs(cluster, number)
    except Exception as e:  # SkyPilot raises what any of its parts raises
        raise LaunchError(
            f"SkyPilot follows {cluster} no longer ({_told(e)}); unless its machine is gone, the "
            f"run goes on and is billed: `nanochat status {job.name}` looks, `nanochat stop "
            f"{job.name}` ends it with a checkpoint",
            1,
        ) from None
    return EXIT_DONE if code == 0 else exit_code_on(cluster, job.name, number, since)


def _exists(cluster: str, sky: Sky) -> bool:
    """Whether SkyPilot has the cluster. Raises LaunchError where it cannot say."""
    try:
        return sky.exists(cluster)
    except Exception as e:  # e.g. a state of the provider's that it cannot read
        raise LaunchError(
            f"SkyPilot cannot say whether {cluster} is up ({_told(e)}): run `nanochat reap`, then "
            "the same command again",
            EXIT_UNFIT_NODE,
        ) from None


def _pods_up(cluster: str) -> set[str]:
    """Ids of a cluster's pods that live. Raises LaunchError where the provider is silent."""
    try:
        return {pod.id for pod in pods_of(cluster) if pod.status == "RUNNING"}
    except ProviderError as e:
        raise LaunchError(
            f"{cluster} is up, and what its run has cost elsewhere is not known: {e}. Give the "
            "same command again later",
            EXIT_UNFIT_NODE,
        ) from None


def _clear_away(cluster: str, sky: Sky, notes: PodNotes) -> None:
    """Tear down what a start has made, which counts against the budget. Raises LaunchError."""
    try:
        notes.look()
    finally:
        tear_down(cluster, sky)
    notes.ended()


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def render_sweep(jobs: Sequence[Job], options: SkyOptions) -> Rendered:
    """The tasks of a sweep as YAML documents, and the most that all of them can cost."""
    rendered = [render(job, options) for job in jobs]
    costs = [r.worst_case_usd for r in rendered if r.worst_case_usd is not None]
    total = sum(costs) if len(costs) == len(rendered) else None
    return Rendered("---\n".join(r.text for r in rendered), total)


def submit_sweep(
    jobs: Sequence[Job], options: SkyOptions, sky: Sky, out: TextIO = sys.stderr
) -> int:
    """Give every run to SkyPilot's controller of managed jobs, which starts and recovers them.

    Raises LaunchError where that would be a machine of its own.
    """
    if sky.rents_controller():
        raise LaunchError(RENTED_CONTROLLER)
    secrets = {name: os.environ[name] for name in present_secrets(os.environ)}
    tasks = [fill(job, options) for job in jobs]
    for job, task in zip(jobs, tasks, strict=True):
        check_reachable(job, task)
    submitted: list[str] = []
    for job, task in zip(jobs, tasks, strict=True):
        try:
            number = sky.launch_managed(task, cluster_name(job.name), secrets)
        except Exception as e:  # SkyPilot raises what any of its parts raises
            there = f"; submitted so far: {', '.join(submitted)}" if submitted else ""
            raise LaunchError(
                f"SkyPilot did not take {job.name}: {e}{there}. sky jobs queue lists them, "
                "sky jobs cancel NUMBER ends one",
                EXIT_UNFIT_NODE,
            ) from None
        submitted.append(f"{job.name} (job {number})")
        reap.note_expected(managed_cluster(job.name, number), job.name, worst_usd(job, task))
        out.write(f"{submitted[-1]} is submitted\n")
    out.write("sky jobs queue lists them, sky jobs logs NUMBER follows one\n")
    return EXIT_DONE


def _within(
    limit_s: float, call: Callable[[], int], give_up: Callable[[], None], look: Callable[[], None]
) -> int:
    """Result of a call, with a look every so often while it lasts.

    Raises what it raises, or TimeoutError after giving it up.
    """
    result: list[int] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            result.append(call())
        except BaseException as e:
            raised.append(e)

    thread = threading.Thread(target=work, daemon=True)
    deadline = time.monotonic() + limit_s
    thread.start()
    try:
        while thread.is_alive() and (left_s := deadline - time.monotonic()) > 0.0:
            thread.join(min(left_s, LOOK_EVERY_S))
            if thread.is_alive():
                look()
    except BaseException:
        give_up()
        raise
    if thread.is_alive():
        give_up()
        raise TimeoutError(f"not up within {limit_s:.0f} s")
    if raised:
        raise raised[0]
    return result[0]
