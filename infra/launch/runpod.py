"""Launcher for RunPod: one pod per run, its files on a network volume, the end by the pod itself.

* A pod is asked for rung by rung: every offer that is given, in every data centre that has the
  volume. A rung that is refused or too dear is left; one whose pod was not up in time or was unfit
  is asked again after the others, for the next pod is another machine.
* What bounds the pod stands in its labels, so that `reap` ends it from any machine with the key.
* Secrets are named in what is rendered; `submit` fills their values in on the way to the SDK.
* SECURE hosts only: the pod has a key that can end it.
"""

import base64
import json
import os
import shlex
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TextIO

from infra import reap
from infra.hardware import GPUS, OFFERS
from infra.launch.base import (
    IMAGE_NAME,
    POD_PREFIX,
    PRICE_MARGIN,
    VOLUME_MOUNT,
    Job,
    LaunchError,
    Rendered,
    default_image,
    refuse_spent,
)
from infra.processes import APP_DIR
from infra.runpod_api import Pod, ProviderError, RunPodApi
from nanochat.rundir import EXIT_DONE, EXIT_SPEC, EXIT_STOPPED, EXIT_UNFIT_NODE

CONTAINER_DISK_GB = 40
CUDA_VERSIONS = ("13.0", "13.1", "13.2", "13.3", "13.4")
"""Of hosts whose driver can run the torch of requirements.lock; RunPod compares by name. On another
one the node check would end the pod with 77, paid for."""
BOOT_DEADLINE_S = 900.0
"""Image pull, start and node check; the image is some 6 GB."""
MAX_PODS = 3
"""Pods of one launch that may fail their start before a person has to look."""
POLL_S = 5.0
SEEN_EVERY_S = 60.0
LOST_AFTER_S = 180.0
CPU_USD_PER_HOUR = 0.12
"""The dearest of CPU_INSTANCES, 2026-11; to a plan a CPU is this machine and costs nothing."""
CPU_INSTANCES = ("cpu3c-2-4", "cpu3g-2-8", "cpu5c-2-4")
STATE_FILE = "/tmp/nanochat-pod.json"
LOG_FILE = "/tmp/nanochat-pod.log"
SEEN_FILE = "/tmp/nanochat-pod.seen"


@dataclass(frozen=True, kw_only=True)
class RunPodOptions:
    """What a user may choose about the pod."""

    image: str = ""
    """An image in a registry that RunPod can pull."""
    volume: str | None = "nanochat"
    """Name or id of a network volume; it pins the data centre. None: the run dies with the pod."""
    max_usd_per_hour: float | None = None
    """Highest price of a rung; unset: 1.15 times what its plan says."""
    data_centers: tuple[str, ...] = ()
    """Data centres in order; unset: those of the volume, or any."""
    detach: bool = False
    """Return as soon as the run has started."""
    secrets: tuple[str, ...] = ()
    """Variables whose values go along."""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One thing to ask for: an offer at a price, somewhere."""

    offer: str
    gpu_type: str | None
    """RunPod's id; None for a pod without GPU."""
    instance: str | None
    gpu_count: int
    usd_per_hour: float
    ceiling_usd_per_hour: float
    data_center: str | None
    volume_id: str | None


@dataclass(frozen=True)
class Volume:
    """A network volume of the account."""

    id: str
    name: str
    data_center: str
    size_gb: float | None = None
    """10^9 bytes; None where the account does not tell."""


def render(jobs: Sequence[Job], options: RunPodOptions, volumes: Sequence[Volume]) -> Rendered:
    """What would be asked for, rung by rung, as JSON; `jobs` is one run planned on each offer."""
    asked = [
        {**vars(rung), "pod": pod_arguments(job, rung, options, born=None, usd_before=0.0)}
        for job, rung in rungs(jobs, options, volumes)
    ]
    costs = [pod_usd(job, 0.0, r.ceiling_usd_per_hour) for job, r in rungs(jobs, options, volumes)]
    worst = None if any(c is None for c in costs) else max(c for c in costs if c is not None)
    return Rendered(json.dumps(asked, indent=2), worst)


def rungs(
    jobs: Sequence[Job], options: RunPodOptions, volumes: Sequence[Volume]
) -> Iterator[tuple[Job, Rung]]:
    """Offers in the order given, each in every data centre. Raises LaunchError without one."""
    places = _places(options, volumes)
    for job in jobs:
        offer = str(job.plan["offer"])
        count, gpu_type = gpu_of(offer)
        listed = CPU_USD_PER_HOUR if gpu_type is None else OFFERS[offer].usd_per_hour
        price = float(job.plan["usd_per_hour"]) or listed  # no pod is free, whatever the spec says
        ceiling = options.max_usd_per_hour or price * PRICE_MARGIN
        for place, volume_id in places:
            for instance in CPU_INSTANCES if gpu_type is None else (None,):
                yield (
                    job,
                    Rung(
                        offer=offer,
                        gpu_type=gpu_type,
                        instance=instance,
                        gpu_count=count,
                        usd_per_hour=price,
                        ceiling_usd_per_hour=round(ceiling, 4),
                        data_center=place,
                        volume_id=volume_id,
                    ),
                )


def gpu_of(offer: str) -> tuple[int, str | None]:
    """(GPUs, RunPod's id of their type). Raises LaunchError for what RunPod does not rent."""
    if offer == "cpu":
        return 0, None
    count, _, name = offer.partition("x")
    for gpu in GPUS:
        if gpu.name == name and gpu.driver_names and gpu.price_source.startswith("RunPod"):
            return int(count), f"NVIDIA {gpu.driver_names[0]}"
    raise LaunchError(f"RunPod does not rent {offer}; `nanochat plan --on ?` says who rents what")


def pod_arguments(
    job: Job, rung: Rung, options: RunPodOptions, born: float | None, usd_before: float
) -> dict[str, Any]:
    """Arguments of the SDK's create_pod; secrets stand in env by name, without a value."""
    command = pod_command(job)
    image = options.image or default_image()
    env = {name: None for name in (*options.secrets, "PUBLIC_KEY")}
    labels = {"RUN": job.name, "BORN": None if born is None else f"{born:.0f}"}
    if usd_before > 0.0:
        labels["BEFORE_USD"] = f"{usd_before:.4f}"
    usd = pod_usd(job, usd_before, rung.ceiling_usd_per_hour)
    if usd is not None:
        labels["MAX_USD"] = f"{usd:.4f}"
    hours = job.spec.budget.max_hours
    if hours is not None and born is not None:
        labels["UNTIL"] = f"{born + 3600.0 * hours:.0f}"
    ports = ["22/tcp"]
    if port := job.spec.runtime.tensorboard_port:
        ports.append(f"{port}/http")
    return {
        "name": f"{reap.NAME_PREFIX}{job.name}",
        "image_name": image,
        "gpu_type_id": rung.gpu_type,
        "instance_id": rung.instance,
        "cloud_type": "SECURE",
        "support_public_ip": True,
        "start_ssh": True,
        "data_center_id": rung.data_center,
        "gpu_count": rung.gpu_count,
        "allowed_cuda_versions": None if rung.gpu_type is None else list(CUDA_VERSIONS),
        "container_disk_in_gb": CONTAINER_DISK_GB,
        "docker_args": shlex.join(command),
        "ports": ",".join(ports),
        "volume_mount_path": VOLUME_MOUNT,
        "network_volume_id": rung.volume_id,
        "env": {**env, IMAGE_NAME: image, **{POD_PREFIX + k: v for k, v in labels.items()}},
    }


def pod_command(job: Job) -> list[str]:
    """What the image's entry point runs. A config of this machine travels within the command."""
    run = ["python", "-m", "infra.podrun", *job.run_command()]
    if job.config_file is None or job.config_file.parent == APP_DIR / "configs":
        return run  # the image has it
    packed = base64.b64encode(zlib.compress(job.config_file.read_bytes(), 9)).decode()
    config = f"/tmp/{job.config_file.name}"
    unpack = (
        "import base64,sys,zlib;"
        "open(sys.argv[1],'wb').write(zlib.decompress(base64.b64decode(sys.argv[2])))"
    )
    run = ["python", "-m", "infra.podrun", *job.run_command(config)]
    words = shlex.join(["python", "-c", unpack, config, packed])
    return ["bash", "-c", f"{words} && exec {shlex.join(run)}"]


def pod_usd(job: Job, usd_before: float, usd_per_hour: float) -> float | None:
    """Most that one pod may cost: the run's bound less what its earlier pods have cost."""
    budget = job.spec.budget
    bounds = [] if budget.max_usd is None else [budget.max_usd]
    if budget.max_hours is not None:
        bounds.append(budget.max_hours * usd_per_hour)
    return max(0.0, min(bounds) - usd_before) if bounds else None


class Trouble(NamedTuple):
    """Why a pod was not taken."""

    text: str
    is_of_rung: bool = False
    """Whether another pod of its rung would have it too."""


class Launcher:
    """Asks RunPod for pods; the SDK, the API and the way in are given, so that tests need none."""

    def __init__(
        self,
        api: RunPodApi,
        create: Callable[..., dict[str, Any]],
        volumes: Sequence[Volume],
        shell: Callable[[tuple[str, int], str], str | None],
        out: TextIO = sys.stderr,
        public_key: str = "",
        boot_deadline_s: float = BOOT_DEADLINE_S,
    ) -> None:
        self.api = api
        self.create = create
        self.volumes = volumes
        self.shell = shell
        self.out = out
        self.public_key = public_key
        self.boot_deadline_s = boot_deadline_s

    def submit(self, jobs: Sequence[Job], options: RunPodOptions) -> int:
        """Start the run on the first rung that works and follow it; its exit code."""
        name = jobs[0].name
        self.refuse_second(name)
        failed: list[str] = []
        pods = 0
        left = list(rungs(jobs, options, self.volumes))
        while left and pods < MAX_PODS:
            job, rung = left.pop(0)
            before = reap.spent_before(name)  # with what pods of this launch have cost
            refuse_spent(job, before, rung.usd_per_hour)
            where = f"{rung.offer} in {rung.data_center or 'any data centre'}"
            self._say(f"asking for {where}")
            try:
                pod_id = self.ask(job, rung, options, before)
            except ProviderError as e:
                failed.append(f"{where}: {e}")
                continue
            pods += 1
            self._say(f"pod {pod_id} is billed and starts")
            try:
                trouble = self.wait_until_fit(name, pod_id, rung)
            except KeyboardInterrupt:
                self._say(f"interrupted before {name} has started: pod {pod_id} is ended")
                self.end(name, pod_id)
                return EXIT_STOPPED
            if trouble is None:
                return self._started(name, pod_id, options)
            self.end(name, pod_id)
            failed.append(f"{where}: pod {pod_id} {trouble.text}")
            self._say(failed[-1])
            if not trouble.is_of_rung:
                left.append((job, rung))
        raise LaunchError(
            f"no pod for {name}:\n  " + "\n  ".join(failed) + "\nTry later, or give more offers: "
            "--offers 8xH100-SXM,8xH100-PCIE",
            EXIT_UNFIT_NODE,
        )

    def _started(self, name: str, pod_id: str, options: RunPodOptions) -> int:
        """0 for a run that goes on without us, else its exit code at its end."""
        if not options.detach:
            self._say(f"pod {pod_id} runs {name}; Ctrl-C leaves it, nanochat stop {name} ends it")
            return self.follow(name, pod_id)
        pod = self.look(name, pod_id)
        if pod is not None and self.state_of(pod).get("phase") == "ended":
            return self.follow(name, pod_id)
        self._say(f"pod {pod_id} runs {name}; nanochat status {name}, nanochat stop {name}")
        return EXIT_DONE

    def refuse_second(self, name: str) -> None:
        """Raises LaunchError while a pod of that run exists: two would write one directory."""
        pods = pods_or_explain(self.api)
        reap.note_gone(pods)
        if pod := pod_of(pods, name):
            raise LaunchError(
                f"{name} has pod {pod.id} already ({pod.status}); nanochat status {name} looks, "
                f"nanochat stop {name} ends it"
            )

    def ask(self, job: Job, rung: Rung, options: RunPodOptions, usd_before: float) -> str:
        """One pod; its id. Raises ProviderError where there is none at this price."""
        born = time.time()
        arguments = pod_arguments(job, rung, options, born, usd_before)
        values = {"PUBLIC_KEY": self.public_key, **{n: os.environ[n] for n in options.secrets}}
        env = {k: values.get(k) if v is None else v for k, v in arguments["env"].items()}
        arguments["env"] = {k: _quoted(v) for k, v in env.items() if v}
        arguments["docker_args"] = _quoted(arguments["docker_args"])
        try:
            made = self.create(**arguments)
            pod_id = str((made or {}).get("id") or "")
            trouble = "no capacity"
        except Exception as e:  # the SDK raises what requests and GraphQL raise
            pod_id, trouble = self._made_all_the_same(job.name), str(e) or type(e).__name__
        if not pod_id:
            raise ProviderError(trouble)
        reap.note_launch(
            "made",
            job.name,
            pod_id,
            usd_per_hour=rung.usd_per_hour,
            born=born,
            max_usd=pod_usd(job, usd_before, rung.ceiling_usd_per_hour),
        )
        return pod_id

    def _made_all_the_same(self, name: str) -> str:
        """Id of the run's pod whose birth was answered by an error, such as a lost connection.

        Empty where there is none. Raises LaunchError where that cannot be known.
        """
        for attempt in range(reap.ATTEMPTS):
            if attempt:
                time.sleep(reap.RETRY_S)
            try:
                pod = pod_of(self.api.pods(), name)
                return pod.id if pod else ""
            except ProviderError:
                continue
        raise LaunchError(
            f"a pod for {name} was asked for, and then RunPod did not answer: it may be billed. "
            f"nanochat status {name} says so when RunPod answers again, nanochat stop {name} ends "
            "it, and the same command starts it where there is none",
            EXIT_UNFIT_NODE,
        )

    def wait_until_fit(self, name: str, pod_id: str, rung: Rung) -> Trouble | None:
        """None once the pod is up, fit and not dearer than its ceiling; else what is wrong."""
        deadline = time.monotonic() + self.boot_deadline_s
        while time.monotonic() < deadline:
            pod = self.look(name, pod_id)
            if pod is not None:
                if pod.usd_per_hour > rung.ceiling_usd_per_hour > 0.0:
                    ceiling = rung.ceiling_usd_per_hour
                    text = f"costs ${pod.usd_per_hour:.2f}/h, more than ${ceiling:.2f}/h"
                    return Trouble(text, is_of_rung=True)
                if pod.status != "RUNNING":
                    return Trouble(f"is {pod.status}")
                state = self.state_of(pod)
                if state.get("phase") in ("run", "ended"):
                    unfit = state.get("exit_code") == EXIT_UNFIT_NODE
                    return Trouble("failed its node check") if unfit else None
            elif self.is_gone(pod_id):
                return Trouble("is gone")
            time.sleep(POLL_S)
        return Trouble(f"was not up within {self.boot_deadline_s:.0f} s")

    def follow(self, name: str, pod_id: str) -> int:
        """Copy the run's log until it ends; its exit code. Ctrl-C leaves the run going."""
        offset, seen_s = 0, time.monotonic()
        try:
            while True:
                pod = self.look(name, pod_id)
                if pod is None and self.is_gone(pod_id):
                    self._say(
                        f"pod {pod_id} is gone; the last complete checkpoint is on the volume, and "
                        "the same command resumes"
                    )
                    return EXIT_STOPPED
                if pod is not None and pod.status != "RUNNING":
                    self.end(name, pod_id)
                    self._say(f"pod {pod_id} was {pod.status} and is ended; resume: same command")
                    return EXIT_STOPPED
                if pod is not None and pod.address is not None:
                    if text := self.shell(pod.address, f"tail -c +{offset + 1} {LOG_FILE}"):
                        offset += len(text.encode())
                        self.out.write(text)
                        self.out.flush()
                    state = self.state_of(pod)
                    if state:
                        seen_s = time.monotonic()
                    if state.get("phase") == "ended":
                        self.shell(pod.address, f"touch {SEEN_FILE}")
                        self._wait_for_end(name, pod_id)
                        return int(state["exit_code"])
                if time.monotonic() - seen_s > LOST_AFTER_S:
                    self._say(f"pod {pod_id} does not answer; `nanochat status {name}` looks again")
                    seen_s = time.monotonic()
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            self._say(f"{name} goes on; nanochat stop {name} stops it with a checkpoint")
            return EXIT_STOPPED

    def end(self, name: str, pod_id: str) -> None:
        """End a pod. Raises LaunchError where it stands after several tries."""
        for attempt in range(reap.ATTEMPTS):
            if attempt:
                time.sleep(reap.RETRY_S)
            try:
                self.api.terminate(pod_id)
            except ProviderError as e:
                self._say(f"pod {pod_id} is not ended yet: {e}")
            if self.is_gone(pod_id):
                reap.note_launch("ended", name, pod_id)
                return
        raise LaunchError(
            f"RunPod does not end pod {pod_id}, which is billed: run `nanochat reap` until it is "
            "gone, or end it in the console",
            1,
        )

    def _wait_for_end(self, name: str, pod_id: str) -> None:
        """The pod ends itself; where it has not, it is ended from here."""
        deadline = time.monotonic() + 60.0
        while time.monotonic() < deadline:
            if self.is_gone(pod_id):
                reap.note_launch("ended", name, pod_id)
                return
            time.sleep(1.0)
        self.end(name, pod_id)

    def look(self, name: str, pod_id: str) -> Pod | None:
        """The pod, and a note of its price; None where it is gone or the API does not answer."""
        try:
            pod = self.api.pod(pod_id)
        except ProviderError:
            return None
        if pod is not None and time.monotonic() - getattr(self, "_noted_s", -1e9) > SEEN_EVERY_S:
            self._noted_s = time.monotonic()
            reap.note_launch("seen", name, pod_id, usd_per_hour=pod.usd_per_hour)
        return pod

    def is_gone(self, pod_id: str) -> bool:
        """Whether the provider answers that there is no such pod."""
        try:
            return all(p.id != pod_id for p in self.api.pods())
        except ProviderError:
            return False

    def state_of(self, pod: Pod) -> dict[str, Any]:
        """What infra.podrun in the pod says: phase and exit code; empty without an answer."""
        text = self.shell(pod.address, f"cat {STATE_FILE}") if pod.address else None
        try:
            state = json.loads(text or "{}")
        except json.JSONDecodeError:
            return {}
        return state if isinstance(state, dict) else {}

    def _say(self, text: str) -> None:
        self.out.write(text + "\n")
        self.out.flush()


def pods_or_explain(api: RunPodApi) -> list[Pod]:
    """Every pod of the account. Raises LaunchError without an answer."""
    try:
        return api.pods()
    except ProviderError as e:
        raise LaunchError(str(e), EXIT_UNFIT_NODE) from None


def pod_of(pods: Sequence[Pod], run_name: str) -> Pod | None:
    """The pod of a run by its label or name."""
    names = (f"{reap.NAME_PREFIX}{run_name}",)
    return next((p for p in pods if p.labels.get("run") == run_name or p.name in names), None)


def _places(
    options: RunPodOptions, volumes: Sequence[Volume]
) -> list[tuple[str | None, str | None]]:
    """(data centre, volume id) in order; a volume of SkyPilot's is NAME-userhash-xxxxxx."""
    if options.volume is None:
        return [(place, None) for place in options.data_centers] or [(None, None)]
    return [(v.data_center, v.id) for v in fitting_volumes(options, volumes)]


def fitting_volumes(options: RunPodOptions, volumes: Sequence[Volume]) -> list[Volume]:
    """The volumes of the name or id that is asked for, in the order of the data centres. Raises
    LaunchError without one."""
    wanted = options.volume
    fitting = [
        v
        for v in volumes
        if wanted in (v.id, v.name) or (v.name.startswith(f"{wanted}-") and v.name.count("-") > 1)
    ]
    if options.data_centers:
        order = {place: i for i, place in enumerate(options.data_centers)}
        fitting = sorted(
            (v for v in fitting if v.data_center in order), key=lambda v: order[v.data_center]
        )
    if not fitting:
        known = ", ".join(f"{v.name} in {v.data_center}" for v in volumes) or "none"
        raise LaunchError(
            f"RunPod has no network volume {wanted!r} (there are: {known}). Make one: `sky volumes "
            "apply sky/volume.yaml`, or Storage > New Network Volume in the console; or --volume "
            "none, and the run is lost with its pod",
            EXIT_SPEC,
        )
    return fitting


def _quoted(text: str) -> str:
    """The SDK puts strings between quotes as they are."""
    return json.dumps(text)[1:-1]
