"""SIGTERM to the container's PID 1, two ranks in it: 75, and a whole checkpoint, in the grace."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from docker.models.containers import Container

from tests.faults.tworanks import CONFIG, STAGE
from tests.twin.engine import MOUNT, ROOT, Ended, Engine

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

GRACE_S = 30
"""As test_sigterm.py: long enough for a machine on which ten others work."""
BUSY_WITH = ["train", "evaluate", "save"]
RUN = f"{MOUNT}/nanochat/runs/faults"
FAULTS = f"{MOUNT}/faults"
SLOW = {"act": "slow", "delay_s": 0.05}
"""A save of the toy lasts a second or two with this, long enough to be hit."""

WATCH = """
import json, re, sys, time
from pathlib import Path
run, stage, phase, before = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])

def is_there():
    try:
        told = json.loads((run / "stages" / f"{stage}.progress.json").read_text())
    except FileNotFoundError:
        return False
    if told.get("step", 0) <= before:
        return False
    if phase != "save":
        return told["phase"] == phase
    staged = (run / "checkpoints" / stage).glob(".step_*.tmp")
    return any(int(re.findall("[0-9]+", p.name)[0]) > before for p in staged)

deadline = time.monotonic() + 300
while not is_there():
    if time.monotonic() > deadline:
        sys.exit(1)
    time.sleep(0.005)
"""
"""Returns when the stage is in that phase, behind a step. In the container: from outside each look
would take longer than a step."""

CHECK = """
import json, sys
from pathlib import Path
from nanochat.checkpoint_dir import CheckpointDir
from nanochat.rundir import RunDir
run, stage = RunDir(Path(sys.argv[1])), sys.argv[2]
checkpoints = CheckpointDir(run.checkpoints_dir(stage))
newest = checkpoints.complete()[-1]
newest.check(checkpoints.folder(newest.step), newest.files, True)
outcome = run.outcome(stage)
print(json.dumps({"newest": newest.step, "outcome": outcome.outcome, "step": outcome.step}))
"""
"""Reads every byte of the newest checkpoint."""


class RunInContainer:
    """The toy run on two ranks, stopped again and again; each container goes on with it."""

    def __init__(self, engine: Engine, volume: str, config: Path) -> None:
        self.engine = engine
        self.volume = volume
        self.config = config
        self.newest = 0
        plan = json.dumps(SLOW)
        script = f"mkdir -p {FAULTS} && echo '{plan}' > {FAULTS}/plan.json"
        engine.shell(volume, f"{script} && chown -R 1000:0 {FAULTS}")

    def start(self) -> Container:
        self.engine.shell(self.volume, f"rm -f {RUN}/stages/{STAGE}.progress.json")
        return self.engine.start(
            *("run", "@/faults.toml"),
            network_mode="none",
            read_only=True,
            environment={"FAULTS": FAULTS, "PYTHONPATH": "/kit/tests/faults:/kit"},
            volumes={
                self.volume: {"bind": MOUNT, "mode": "rw"},
                str(self.config): {"bind": "/faults.toml", "mode": "ro"},
                str(ROOT / "tests"): {"bind": "/kit/tests", "mode": "ro"},
            },
        )

    def stop_while(self, phase: str) -> None:
        container = self.start()
        try:
            self._stop(container, phase)
        finally:
            self.engine.remove(container)

    def _stop(self, container: Container, phase: str) -> None:
        watch = ["python3", "-P", "-c", WATCH, RUN, STAGE, phase, str(self.newest)]
        code, _ = container.exec_run(watch, environment={"PYTHONPATH": ""})
        assert code == 0, container.logs().decode()
        started_s = time.monotonic()
        container.stop(timeout=GRACE_S)  # SIGTERM to PID 1; SIGKILL, and 137, past the grace
        took_s = time.monotonic() - started_s
        ended: Ended = self.engine.wait(container)
        assert ended.exit_code == 75, ended.output
        print(json.dumps({"while": phase, "stopped_after_s": round(took_s, 2)}))
        said = self.engine.shell(self.volume, f"python3 -P -c '{CHECK}' {RUN} {STAGE}")
        found = json.loads(said.splitlines()[-1])
        assert found["outcome"] == "stopped"
        assert found["newest"] == found["step"] > self.newest
        self.newest = found["newest"]


@pytest.fixture(scope="module")
def stopped(
    engine: Engine, image: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunInContainer]:
    config = tmp_path_factory.mktemp("sigterm") / "faults.toml"
    config.write_text(CONFIG.format(num_steps=20_000, eval_tokens=400_000, grace_s=GRACE_S))
    config.chmod(0o644)
    with engine.volume() as volume:
        yield RunInContainer(engine, volume, config)


@pytest.mark.parametrize("phase", BUSY_WITH)
def test_docker_stop_of_two_ranks_leaves_a_checkpoint_in_time(
    stopped: RunInContainer, phase: str
) -> None:
    stopped.stop_while(phase)


@pytest.mark.long
@pytest.mark.parametrize("number", range(20))
def test_twenty_docker_stops_of_twenty(stopped: RunInContainer, number: int) -> None:
    stopped.stop_while(BUSY_WITH[number % 3])
