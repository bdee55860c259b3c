"""Managed jobs by SkyPilot's own controller, which runs in the API server of this machine.

A sweep with one budget, and a spot job that is taken back twice: once it vanishes, once it is
EXITED, which SkyPilot cannot read and `reap` ends.
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.twin.engine import Engine, wait_until
from tests.twin.runpod.skypilot import COMMAND_S, D20_TOY, HOME, IMAGE, TOY, Client, skypilot

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def client(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with skypilot(image, tmp_path_factory.mktemp("sky"), controller=True) as made:
        yield made


def jobs(client: Client) -> dict[str, dict[str, Any]]:
    """The controller's jobs by name."""
    code, said = client("sky", "jobs", "queue", "-o", "json")
    assert code == 0, said
    listed = json.JSONDecoder().raw_decode(said[said.index("[") :])[0]
    return {job["job_name"]: job for job in listed}


def wait_for_end(client: Client, names: set[str]) -> dict[str, dict[str, Any]]:
    """The jobs of these names, all of which have ended."""
    found: dict[str, dict[str, Any]] = {}

    def ended() -> bool:
        found.update(jobs(client))
        over = {n for n in names if found[n]["status"].startswith(("SUCC", "FAIL", "CANC"))}
        return over == names

    wait_until(ended, COMMAND_S, f"the end of {sorted(names)}", 5.0)
    return {name: found[name] for name in names}


def test_a_spot_job_is_taken_back_twice_and_ends(client: Client, engine: Engine) -> None:
    spot = ("sky", "jobs", "launch", "-y", "-n", "spot", "sky/d20_h100.yaml", "--use-spot")
    code, said = client(*spot, "-d", "--env", f"ARGS={D20_TOY}")
    assert code == 0, said
    account, latest = client.account, f"{HOME}/runs/d20/checkpoints/base_train/latest"

    def has_saved_after(step: str) -> bool:
        now = client.in_pod("cat", latest)
        return "step_" in now and now != step

    wait_until(lambda: has_saved_after(""), COMMAND_S, "a first checkpoint")
    first = client.pod()
    assert first.spot
    saved = client.in_pod("cat", latest)
    account.preempt(first.id)
    wait_until(lambda: bool(account.alive()), COMMAND_S, "a second pod")
    wait_until(lambda: has_saved_after(saved), COMMAND_S, "a checkpoint of the second pod")
    second = client.pod()
    account.exit_pod(second.id)
    code, said = client("nanochat", "reap")
    assert code == 0 and "it is EXITED" in said, said
    assert second.ended is not None
    job = wait_for_end(client, {"spot"})["spot"]
    assert (job["status"], job["recovery_count"]) == ("SUCCEEDED", 2)
    run = json.loads(client.on_volume(engine, f"cat {HOME}/runs/d20/status.json"))
    assert (run["state"], run["exit_code"]) == ("SUCCEEDED", 0)
    wait_until(lambda: account.alive() == [], COMMAND_S, "the end of the last pod")


def test_a_sweep_shares_one_budget(client: Client, engine: Engine) -> None:
    sweep = ("launch", "@configs/smoke.toml", "--to", "sky", *IMAGE, "--sweep", "seed=1,2")
    budget = ("budget.max_usd=1.0", "budget.usd_per_hour=0.12")
    code, said = client("nanochat", *sweep, *TOY.split(), *budget)
    assert code == 0, said
    names = {"smoke-1", "smoke-2"}
    ended = wait_for_end(client, names)
    assert {job["status"] for job in ended.values()} == {"SUCCEEDED"}
    for name, seed in (("smoke-1", 1), ("smoke-2", 2)):
        run = f"{HOME}/runs/{name}"
        spec = json.loads(client.on_volume(engine, f"cat {run}/spec.json"))
        assert (spec["seed"], spec["budget"]["max_usd"]) == (seed, 0.5)
        status = json.loads(client.on_volume(engine, f"cat {run}/status.json"))
        assert (status["state"], status["exit_code"]) == ("SUCCEEDED", 0)
    wait_until(lambda: client.account.alive() == [], COMMAND_S, "the end of both pods")
    code, said = client("nanochat", "reap")
    assert code == 0 and "no pod" in said, said
