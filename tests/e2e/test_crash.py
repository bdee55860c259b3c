"""Every process of a run on two ranks is killed again and again; nothing is lost, nothing differs.

Supervisor, torchrun and ranks get SIGKILL at instants that a seed chooses: while they start, while
they train, and inside of a save, in any call to the file layer; the newest checkpoint is truncated
or a bit of it flipped; the volume is full. After every one: what was complete is what the run goes
on from, and at the end the weights are those of a whole run, and every batch held its documents.
"""

import json
import random
import signal
import subprocess
from collections import Counter
from pathlib import Path

import psutil
import pytest

from nanochat.rundir import EXIT_SPEC
from tests.faults.tworanks import SAVE_EVERY_STEPS, STAGE, FaultyRun
from tests.toyrun import kill_tree, losses, wait_for, weights_digest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]

NUM_STEPS = 240
KINDS = ["training", "saving", "starting", "bit flipped", "saving", "truncated", "full", "training"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> FaultyRun:
    """The run that nothing happens to."""
    made = FaultyRun(tmp_path_factory.mktemp("whole"), NUM_STEPS)
    made.finish()
    return made


def hit(run: FaultyRun, kind: str, rng: random.Random) -> None:
    """Start the run, and let that happen to it."""
    first = max(run.complete_steps(), default=0)
    soon = first + rng.randint(1, 2 * SAVE_EVERY_STEPS)
    if kind == "saving":
        process = run.start(act="pause", call=rng.randint(1, 60))
        wait_for(lambda: (run.folder / "paused").exists() or has_ended(process), timeout_s=300)
    elif kind == "full":
        process = run.start(act="full", call=rng.randint(8, 60))
        assert process.wait(timeout=300) == EXIT_SPEC
        return
    else:
        process = run.start()
        if kind == "starting":
            delay_s = rng.uniform(0.0, 8.0)
            wait_for_time(process, delay_s)
        else:
            run.wait_for_step(process, soon)
            wait_for_time(process, rng.uniform(0.0, 0.3))
        if kind in ("bit flipped", "truncated"):
            wait_for(lambda: len(run.complete_steps()) > 1 or has_ended(process), timeout_s=300)
    assert not has_ended(process), "the run ended before its time: more steps are needed"
    kill_tree(process)
    wait_for(lambda: not run.is_alive())


def has_ended(process: subprocess.Popen[str]) -> bool:
    return process.poll() is not None


def wait_for_time(process: subprocess.Popen[str], seconds: float) -> None:
    """The kill's instant is to be anywhere, not where the run tells of itself."""
    try:
        psutil.Process(process.pid).wait(timeout=seconds)
    except psutil.TimeoutExpired:
        return


def damage_newest(run: FaultyRun, kind: str, rng: random.Random) -> None:
    newest = run.run.checkpoints_dir(STAGE) / f"step_{run.complete_steps()[-1]:06d}"
    victim = rng.choice([p for p in sorted(newest.iterdir()) if p.stat().st_size > 0])
    content = bytearray(victim.read_bytes())
    if kind == "truncated":
        del content[rng.randrange(len(content)) :]
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    victim.write_bytes(content)


def crash_campaign(whole: FaultyRun, folder: Path, kinds: list[str], seed: int) -> None:
    run, rng = FaultyRun(folder, whole.num_steps), random.Random(seed)
    goes_on_from: set[int] = {0}
    most_lost = 0
    for kind in kinds:
        hit(run, kind, rng)
        check_start(run, goes_on_from)
        complete = run.complete_steps()
        reached = max((step for step, _ in losses(run.run, STAGE)), default=0)
        kept = complete[-1] if complete else 0
        # until a save in the background is complete, the one before it counts
        saving = run.save_in_flight()
        meanwhile = 0 if saving is None else max(0, reached - saving)
        assert reached - kept <= SAVE_EVERY_STEPS + meanwhile, (kind, kept, saving, reached)
        most_lost = max(most_lost, reached - kept)
        goes_on_from = {kept}
        if kind in ("bit flipped", "truncated"):
            damage_newest(run, kind, rng)
            goes_on_from = {complete[-2]}
    run.finish()
    check_start(run, goes_on_from)
    assert weights_digest(run.run, STAGE) == weights_digest(whole.run, STAGE)
    assert losses(run.run, STAGE) == losses(whole.run, STAGE)
    check_documents(run, whole)
    if any(kind in ("bit flipped", "truncated") for kind in kinds):
        assert run.events("corrupt_checkpoint")
    print(json.dumps({"seed": seed, "hits": Counter(kinds), "most_steps_lost": most_lost}))


def check_start(run: FaultyRun, goes_on_from: set[int]) -> None:
    """Where the last process that came so far has started is where it had to."""
    starts = run.events("start")
    known = getattr(run, "starts_seen", 0)
    for start in starts[known:]:
        step = 0 if start.endswith("nothing") else int(start.split("step ")[1])
        assert step in goes_on_from
    run.starts_seen = len(starts)  # type: ignore[attr-defined]


def check_documents(run: FaultyRun, whole: FaultyRun) -> None:
    """Batch by batch the same documents; none twice before all were read."""
    (expected,) = whole.drawn()
    place = {json.dumps(b["cursor"]): number for number, b in enumerate(expected)}
    last: dict[int, list[list[int]]] = {}
    for session in run.drawn():
        numbers = [place[json.dumps(b["cursor"])] for b in session]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert numbers[0] % SAVE_EVERY_STEPS == 0
        last |= {n: b["documents"] for n, b in zip(numbers, session, strict=True)}
    assert sorted(last) == list(range(whole.num_steps))
    begun = [tuple(document) for n in sorted(last) for document in last[n]]
    assert begun == [tuple(d) for b in expected for d in b["documents"]]
    assert len(begun) == len(set(begun)) > whole.num_steps


def test_eight_hits_change_nothing(whole: FaultyRun, tmp_path: Path) -> None:
    crash_campaign(whole, tmp_path, KINDS, seed=0)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 6))
def test_fifty_hits_change_nothing(whole: FaultyRun, tmp_path: Path, seed: int) -> None:
    """Ten per run; of 240 steps each hit takes at most 20."""
    rng = random.Random(100 + seed)
    kinds = [*KINDS, "saving", rng.choice(["saving", "training"])]
    rng.shuffle(kinds)
    # damage needs an older checkpoint to go back to
    kinds.sort(key=lambda kind: kind in ("bit flipped", "truncated"))
    crash_campaign(whole, tmp_path, kinds, seed)


# -- one process of the tree is killed, and the others are to follow

SOON_S = 5.0
IMPORTS_S = 60.0
"""Of torch, where others use the machine too."""


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> FaultyRun:
    """A run that goes on from test to test."""
    return FaultyRun(tmp_path_factory.mktemp("endless"), num_steps=20_000)


def torchrun_and_ranks(
    process: subprocess.Popen[str],
) -> tuple[psutil.Process, list[psutil.Process]]:
    """Of a run's training stage, as soon as they are there."""
    found: list[psutil.Process] = []

    def are_there() -> bool:
        assert not has_ended(process)
        try:
            tree = {p: p.cmdline() for p in psutil.Process(process.pid).children(recursive=True)}
        except psutil.NoSuchProcess:  # of another stage
            return False
        torchruns = [p for p, words in tree.items() if "torch.distributed.run" in words]
        ranks = [
            p for p, words in tree.items() if words[-3:-1] == ["-m", f"nanochat.stages.{STAGE}"]
        ]
        ranks = [p for p in ranks if p not in torchruns]
        found[:] = [*torchruns[:1], *ranks]
        return len(found) == 1 + 2

    wait_for(are_there, timeout_s=300)
    return found[0], found[1:]


def test_when_the_supervisor_is_killed_its_ranks_end(endless: FaultyRun) -> None:
    process = endless.start()
    try:
        torchrun, ranks = torchrun_and_ranks(process)
        endless.wait_for_step(process, 1)
        process.kill()
        _, alive = psutil.wait_procs([torchrun, *ranks], timeout=SOON_S)
        assert not alive
    finally:
        kill_tree(process)


def test_when_torchrun_is_killed_its_ranks_end(endless: FaultyRun) -> None:
    """Without the supervisor's help, which stands still."""
    process = endless.start()
    try:
        torchrun, ranks = torchrun_and_ranks(process)
        endless.wait_for_step(process, 1)
        process.send_signal(signal.SIGSTOP)
        torchrun.kill()
        _, alive = psutil.wait_procs(ranks, timeout=SOON_S)
        assert not alive
    finally:
        kill_tree(process)


def test_when_torchrun_is_killed_while_its_ranks_import_they_touch_nothing(
    endless: FaultyRun,
) -> None:
    process = endless.start()
    try:
        torchrun, ranks = torchrun_and_ranks(process)
        for rank in ranks:
            rank.suspend()
        process.send_signal(signal.SIGSTOP)
        progress = endless.run.progress_file(STAGE)
        assert not progress.exists(), "the ranks have begun before they were stopped"
        torchrun.kill()
        for rank in ranks:
            rank.resume()
        _, alive = psutil.wait_procs(ranks, timeout=IMPORTS_S)
        assert not alive
        assert not progress.exists()
    finally:
        kill_tree(process)


def test_when_one_rank_is_killed_the_run_goes_on(tmp_path: Path, whole: FaultyRun) -> None:
    """As the host's out-of-memory killer does; the rank that is left tells of a broken line."""
    run = FaultyRun(tmp_path, NUM_STEPS)
    process = run.start()
    try:
        _, ranks = torchrun_and_ranks(process)
        run.wait_for_step(process, SAVE_EVERY_STEPS + 2)
        ranks[1].kill()
        assert process.wait(timeout=300) == 0
    finally:
        if not has_ended(process):
            kill_tree(process)
    (restart,) = run.events("restart")
    assert "lost a rank" in restart or "was killed" in restart
    assert weights_digest(run.run, STAGE) == weights_digest(whole.run, STAGE)
    assert losses(run.run, STAGE) == losses(whole.run, STAGE)
