"""What `launch` refuses before a rented machine is asked for: its volume, its data, its image."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import entrypoint
from entrypoint import build_parser
from infra import cloud
from infra.launch import runpod_pod, sky
from infra.launch.base import Job, LaunchError, Rendered
from infra.launch.runpod import RunPodOptions, Volume
from infra.runpod_api import Pod, ProviderError
from nanochat.spec import load_spec

ROOT = Path(__file__).resolve().parents[2]
IMAGE = ("--image", "me/nanochat:1")


class Launcher:
    """RunPod with these volumes; it remembers what it is given."""

    def __init__(self, *volumes: Volume) -> None:
        self.volumes = list(volumes)
        self.given: list[Job] = []

    def submit(self, jobs: Sequence[Job], options: RunPodOptions) -> int:
        self.given = list(jobs)
        return 0


def launch(config: str, to: str, *words: str) -> int | Rendered:
    path = ROOT / "configs" / f"{config}.toml"
    args = build_parser().parse_args(["launch", f"@{path}", *words, "--to", to])
    spec = load_spec(path, args.overrides)
    return (cloud.launch_runpod if to == "runpod" else cloud.launch_sky)(args, spec, path)


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Launcher:
    made = Launcher(Volume("v", "nanochat", "CA-MTL-1", 300.0))
    monkeypatch.setattr(runpod_pod, "open_launcher", lambda: made)
    return made


def test_a_run_that_fits_its_volume_is_launched(account: Launcher) -> None:
    assert launch("d20", "runpod", *IMAGE) == 0
    assert [job.name for job in account.given] == ["d20"]


def test_an_offer_above_the_ceiling_is_not_asked_for(
    account: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    offers = ("--offers", "8xH200,8xH100-SXM", "--max-usd-per-hour", "25")
    assert launch("d20", "runpod", *IMAGE, *offers) == 0
    assert [job.plan["offer"] for job in account.given] == ["8xH100-SXM"]
    assert "8xH200: costs $28.72/h, more than --max-usd-per-hour 25" in capsys.readouterr().err
    with pytest.raises(LaunchError, match=r"8xH100-SXM: costs \$21\.52/h"):
        launch("d20", "runpod", *IMAGE, "--max-usd-per-hour", "20")


def test_a_volume_that_is_too_small_is_refused_before_any_money(account: Launcher) -> None:
    """d20 keeps 53 GiB of checkpoints, one of 5 in the making, 25 of data, and leaves 5 free."""
    account.volumes = [Volume("v", "nanochat", "CA-MTL-1", 30.0)]
    for words in (IMAGE, ("--dry-run",)):
        with pytest.raises(LaunchError, match=r"volume too small: 27\.9 GiB"):
            launch("d20", "runpod", *words)
    assert not account.given
    account.volumes = [replace(account.volumes[0], size_gb=None)]
    assert launch("d20", "runpod", *IMAGE) == 0, "a size that is not told refuses nothing"
    account.volumes = [Volume("v", "nanochat", "CA-MTL-1", 30.0)]
    assert launch("d20", "runpod", *IMAGE, "--volume", "none") == 0


def test_the_volume_of_sky_is_as_its_file_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(launch("d20", "sky", "--dry-run"), Rendered)
    monkeypatch.setattr(sky, "volume_gb", lambda config, options: 30.0)
    with pytest.raises(LaunchError, match=r"volume too small: 27\.9 GiB"):
        launch("d20", "sky", "--dry-run")


def test_runpod_is_asked_for_nothing_where_the_text_would_stay_here(account: Launcher) -> None:
    for words in (IMAGE, ("--dry-run",)):
        with pytest.raises(LaunchError, match="combined_output.txt' is not on the machine that"):
            launch("d64_1000usd", "runpod", *words)
    assert not account.given
    there = 'data.path="/workspace/combined_output.txt"'
    assert launch("d64_1000usd", "runpod", there, *IMAGE) == 0
    with pytest.raises(LaunchError, match="Put the file on the volume"):
        launch("d64_1000usd", "runpod", there, *IMAGE, "--volume", "none")


@pytest.mark.parametrize("image", ["", "nanochat:0.1.0"])
def test_runpod_is_asked_for_no_image_that_is_only_here(account: Launcher, image: str) -> None:
    with pytest.raises(LaunchError, match="make push REGISTRY="):
        launch("d20", "runpod", "--image", image)
    assert not account.given


def test_the_size_of_an_account_s_volume_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Sdk:
        create_pod = None

        def get_user(self) -> dict[str, Any]:
            volume = {"id": "v", "name": "nanochat", "dataCenterId": "CA-MTL-1", "size": 300}
            return {"networkVolumes": [volume, {**volume, "size": None}]}

    key = tmp_path / "key"
    key.with_suffix(".pub").write_text("ssh-ed25519 A")
    monkeypatch.setattr(runpod_pod, "_sdk", Sdk)
    monkeypatch.setattr(runpod_pod, "ssh_key", lambda: key)
    monkeypatch.setenv("RUNPOD_API_KEY", "k")
    assert [v.size_gb for v in runpod_pod.open_launcher().volumes] == [300, None]


def test_the_worst_case_of_a_task_is_that_of_its_own_command() -> None:
    """sky/cpu_smoke.yaml gives a budget and a price, though the plan of a CPU costs nothing."""
    sent = launch("smoke", "sky", "--dry-run")
    assert isinstance(sent, Rendered)
    assert sent.worst_case_usd == pytest.approx(1.0 + 0.2 * (40 + 10) / 60)


@pytest.mark.parametrize("words", [("--spot",), ("--sweep", "seed=1,2")])
def test_where_no_volume_is_nothing_is_started_again(words: tuple[str, ...]) -> None:
    with pytest.raises(LaunchError, match="no network volume on lambda"):
        launch("d20", "sky", "--infra", "lambda", "--dry-run", *words)


def test_a_provider_that_does_not_answer_is_not_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Silent:
        def pods(self) -> list[Pod]:
            raise ProviderError("RunPod does not answer")

    class Enough(Exception):
        """Ends the loop."""

    def no_more(_: float) -> None:
        raise Enough

    monkeypatch.setattr(runpod_pod, "connect_or_explain", Silent)
    monkeypatch.setattr("time.sleep", no_more)
    with pytest.raises(Enough):
        cloud.reap_verb(build_parser().parse_args(["reap", "--every", "60"]))
    assert capsys.readouterr().out.startswith("RunPod does not answer: what is billed is not known")


@pytest.mark.parametrize(
    ("to", "words", "says"),
    [
        ("sky", ("--max-usd-per-hour", "5"), "--max-usd-per-hour is for --to runpod, not for sky"),
        ("sky", ("--volume", "other"), "--volume is for --to docker and runpod, not for sky"),
        ("runpod", ("--sweep", "seed=1,2"), "--sweep is for --to sky, not for runpod"),
        ("runpod", ("--spot",), "--spot is for --to sky, not for runpod"),
        ("docker", ("--offers", "8xH200"), "--offers is for --to runpod, not for docker"),
        ("sky", ("--no-requeue",), "--no-requeue is for --to slurm, not for sky"),
        ("runpod", ("--memory-gib", "8"), "--memory-gib is for --to docker and slurm"),
    ],
)
def test_an_option_that_the_place_does_not_take_is_refused(
    to: str, words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = f"@{ROOT / 'configs' / 'd20.toml'}"
    assert entrypoint.main(["launch", config, "--to", to, "--dry-run", *words]) == 78
    assert says in capsys.readouterr().err
