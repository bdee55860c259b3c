"""What launchers share: a job, what is rendered from it, and the error that a user gets.

Secrets are named in a rendered job and never in it: their values go from the environment of
`submit` straight to the engine.
"""

import importlib.metadata
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.rundir import EXIT_SPEC
from nanochat.spec import RunSpec

SECRETS = ("WANDB_API_KEY", "HF_TOKEN")
"""The variables that pass from the user's environment into a run."""
IMAGE_NAME = "NANOCHAT_IMAGE"
"""The variable that tells a run which image it is in; nanochat/machine.py reads it."""
POD_PREFIX = "NANOCHAT_LABEL_"
"""Variables of a pod that are labels: for `reap`, the dead man's switch and the ledger."""
LEAST_LEFT_S = 180.0
"""A machine that could only live for this time is not asked for."""
PRICE_MARGIN = 1.15
"""A machine may cost so many times what its plan says before it is not asked for."""
VOLUME_MOUNT = "/workspace"
"""Where a rented machine has the network volume."""
IMAGE_PLACE = "/opt/nanochat"


class LaunchError(RuntimeError):
    """The job cannot be submitted; the message says why and what to do."""

    def __init__(self, message: str, exit_code: int = EXIT_SPEC) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run to be submitted somewhere."""

    config: str
    """As given on the command line, without the @."""
    overrides: tuple[str, ...]
    spec: RunSpec
    """The config with the overrides."""
    plan: dict[str, Any]
    """The document of `plan --json`."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def config_file(self) -> Path | None:
        """The config on this machine; None where only the image has one of that name."""
        path = Path(self.config)
        return path.resolve() if path.is_file() else None

    def run_command(self, config: str | None = None) -> list[str]:
        """The verb and its arguments; `config` is where the config lies on the other side."""
        return ["run", f"@{config or self.config}", *self.overrides]


@dataclass(frozen=True)
class Rendered:
    """Everything that would be sent to a place."""

    text: str
    worst_case_usd: float | None
    """What the job costs at most; None where nothing bounds it."""
    comment: str = ""
    """What begins a comment where the text is a program: the dry run can then be submitted."""

    def dry_run(self) -> str:
        """What `launch --dry-run` prints."""
        if self.worst_case_usd is None:
            cost = "worst case: not bounded; set budget.max_usd or budget.max_hours in the spec"
        else:
            cost = f"worst case: ${self.worst_case_usd:.2f}"
        return f"{self.text.rstrip()}\n{self.comment}{cost}"


def worst_case_usd(job: Job, usd_per_hour: float) -> float | None:
    """Most that the run can cost: its budget, not its plan; None where it has no bound.

    usd_per_hour: the highest price that its machine may have; 0 for one that is not rented.
    Storage, and the minutes before the run starts, are the launcher's to add.
    """
    if usd_per_hour == 0.0:
        return 0.0
    budget = job.spec.budget
    bounds = [] if budget.max_usd is None else [budget.max_usd]
    if budget.max_hours is not None:
        bounds.append(budget.max_hours * usd_per_hour)
    return min(bounds) if bounds else None


def refuse_spent(job: Job, before_usd: float, usd_per_hour: float) -> None:
    """Raises LaunchError where what is left of the budget would be gone before a machine is up.

    before_usd: what earlier machines of the run have cost.
    """
    most = job.spec.budget.max_usd
    if most is None or before_usd == 0.0:
        return
    if (most - before_usd) * 3600.0 < LEAST_LEFT_S * usd_per_hour:
        raise LaunchError(
            f"{job.name} has cost ${before_usd:.2f} of its budget of ${most:.2f}, and what is left "
            "would go into the start of a machine; raise budget.max_usd to go on. (Another run is "
            'one of another name: name="...".)'
        )


def present_secrets(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the secrets that the environment has a value for."""
    return tuple(name for name in SECRETS if environ.get(name))


def check_image(image: str) -> str:
    """The image without SkyPilot's prefix. Raises LaunchError where a rented machine could not pull
    it: a pod whose image never comes starts neither its switch nor SkyPilot's autostop."""
    image = image.removeprefix("docker:") or default_image()
    if "/" in image:
        return image
    raise LaunchError(
        f"a rented machine pulls its image from a registry, and {image} is only here: "
        f"make push REGISTRY=ghcr.io/YOU, then --image ghcr.io/YOU/{default_image()}"
    )


def check_data(job: Job, path: str | None, on_volume: bool, sent: Collection[str] = ()) -> None:
    """Raises LaunchError where a text of the user's own would not be found on a rented machine.

    path: data.path as the run reads it there; on_volume: whether a volume is mounted there; sent:
    files that travel along.
    """
    if job.spec.data.source != "text" or path is None or path in sent:
        return
    places = (VOLUME_MOUNT, IMAGE_PLACE) if on_volume else (IMAGE_PLACE,)
    if any(Path(path).is_relative_to(place) for place in places):
        return
    there = f"{VOLUME_MOUNT}/{Path(path).name}"
    raise LaunchError(
        f"data.path = {path!r} is not on the machine that is rented. Put the file on the volume "
        f"(docs/cloud.md, A text of your own), then give 'data.path=\"{there}\"'"
    )


def default_image() -> str:
    """The image that `make image` of this version makes."""
    return f"nanochat:{importlib.metadata.version('nanochat-kit')}"
