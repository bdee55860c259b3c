"""A hostile world on a virtual clock: one account of a provider, pods, outages, kills and hangs.

Only what costs money or time is replaced: the clock (`time`), the provider behind the transport of
RunPodApi, and the stage's process. Supervisor, budget, meter, dead man's switch, launcher, reap and
checkpoint folder are the production classes. Every actor is a thread, and one runs at a time: who
sleeps hands the turn to whoever wakes next, so that a schedule is a function of its seed.
"""

import heapq
import itertools
import json
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from nanochat.checkpoint_dir import CheckpointDir, Manifest, utc_now
from nanochat.rundir import Outcome, RunDir

TICK_S = 60.0
"""The provider bills every minute that has begun."""
REAP_PERIOD_S = 600.0
SAVE_EVERY_S = 60.0
RESTART_S = 30.0
"""A container that ended is started again by the provider within this time."""
LATEST_S = 12.0
"""A busy machine wakes a sleeper this late."""
QUOTED_USD_PER_HOUR = 20.0
EPOCH = 1.9e9
FOREVER = 1e7
PLAN: dict[str, Any] = {
    "offer": "8xH100-SXM",
    "world_size": 8,
    "usd_per_hour": QUOTED_USD_PER_HOUR,
    "hours": 0.1,
    "stages": [],
}


class Killed(BaseException):
    """The actor is gone; nothing of the code under test catches this."""


@dataclass
class Pod:
    id: str
    name: str
    env: dict[str, str]
    born: float
    prices: list[tuple[float, float]]
    """(moment, dollars per hour) of every price since birth."""
    ended: float | None = None
    up: bool = False
    state: dict[str, Any] = field(default_factory=dict)

    def bill_usd(self, now: float) -> float:
        """Whole ticks, each at the price of its moments."""
        return self.usd_until(self.born + TICK_S * -(-((self.ended or now) - self.born) // TICK_S))

    def usd_until(self, end: float) -> float:
        """Of its life until a moment, to the second."""
        usd = 0.0
        for (since, price), following in itertools.zip_longest(self.prices, self.prices[1:]):
            until = min(end, following[0]) if following else end
            usd += max(0.0, until - since) / 3600.0 * price
        return usd


class Actor(threading.Thread):
    def __init__(self, world: "World", work: Callable[[], None], pod: str | None) -> None:
        super().__init__(daemon=True)
        self.world = world
        self.work = work
        self.pod = pod
        self.turn = threading.Semaphore(0)
        self.killed = False
        self.hang_s = 0.0
        self.over = False
        self.error: BaseException | None = None

    def run(self) -> None:
        self.turn.acquire()
        try:
            if not self.killed:
                self.work()
        except Killed:
            pass
        except BaseException as e:
            self.error = e
        self.over = True
        self.world.back.release()


class World:
    """Runs one schedule: `run(seed)` gives what was spent and what it may be."""

    def __init__(self, rng: random.Random, home: Path) -> None:
        self.rng = rng
        self.home = home
        self.now = 0.0
        self.heap: list[tuple[float, int, Any]] = []
        self.number = itertools.count()
        self.back = threading.Semaphore(0)
        self.current: Actor | None = None
        self.actors: list[Actor] = []
        self.pods: dict[str, Pod] = {}
        self.price = QUOTED_USD_PER_HOUR
        self.outages: list[tuple[float, float]] = []
        self.stalls: list[tuple[float, float]] = []
        self.deaths: list[float] = []
        """Moments at which a container died that is started again."""
        self.rises = 0
        """Of the price, while there was a pod."""
        self.trained_s: dict[str, float] = {}

    # -- time

    def sleep(self, seconds: float) -> None:
        actor = self.current
        assert actor is not None, "only actors sleep"
        if not actor.killed:
            late_s = self.rng.uniform(3.0, LATEST_S)  # a busy machine wakes late
            wake = self.now + max(seconds, late_s) + actor.hang_s
            if actor.hang_s:
                self.stalls.append((wake - actor.hang_s, wake))
            actor.hang_s = 0.0
            self.at(wake, actor)
            self.back.release()
            actor.turn.acquire()
        if actor.killed:
            raise Killed

    def at(self, moment: float, what: Any) -> None:
        heapq.heappush(self.heap, (moment, next(self.number), what))

    def spawn(self, work: Callable[[], None], pod: str | None = None, after: float = 0.0) -> Actor:
        actor = Actor(self, work, pod)
        self.actors.append(actor)
        actor.start()
        self.at(self.now + after, actor)
        return actor

    def kill(self, actor: Actor) -> None:
        """At once: its next moment is its last."""
        if not actor.over and not actor.killed:
            actor.killed = True
            self.at(self.now, actor)

    def kill_pod_actors(self, pod: str) -> None:
        for actor in self.actors:
            if actor.pod == pod:
                self.kill(actor)

    def run_until(self, end: float, is_over: Callable[[], bool]) -> None:
        while self.heap and not is_over():
            moment, _, what = heapq.heappop(self.heap)
            if moment > end:
                break
            self.now = max(self.now, moment)
            if not isinstance(what, Actor):
                what()
                continue
            if what.over:
                continue
            self.current = what
            what.turn.release()
            self.back.acquire()
            self.current = None
            if what.error is not None:
                raise what.error

    def close(self) -> None:
        for actor in self.actors:
            while not actor.over:
                actor.killed = True
                self.current = actor
                actor.turn.release()
                self.back.acquire()
                self.current = None
            actor.join()

    # -- the provider

    def post(self, url: str, headers: dict[str, str], body: bytes) -> bytes:
        """The transport of RunPodApi."""
        if self.is_lost():
            raise OSError("timed out")
        query = json.loads(body)["query"]
        if "podTerminate" in query:
            (pod_id,) = re.findall(r'podId: "(\w+)"', query)
            self.end_pod(pod_id)
            return b'{"data": {"podTerminate": null}}'
        if "myself" in query:
            there = [self.shown(p) for p in self.pods.values() if p.ended is None]
            return json.dumps({"data": {"myself": {"pods": there}}}).encode()
        (pod_id,) = re.findall(r'podId: "(\w+)"', query)
        pod = self.pods.get(pod_id)
        shown = None if pod is None or pod.ended is not None else self.shown(pod)
        return json.dumps({"data": {"pod": shown}}).encode()

    def shown(self, pod: Pod) -> dict[str, Any]:
        port = {
            "ip": pod.id,
            "isIpPublic": True,
            "privatePort": 22,
            "publicPort": 22,
            "type": "tcp",
        }
        return {
            "id": pod.id,
            "name": pod.name,
            "desiredStatus": "RUNNING",
            "costPerHr": pod.prices[-1][1],
            "uptimeSeconds": int(self.now - pod.born),
            "env": [f"{k}={v}" for k, v in pod.env.items()],
            "runtime": {"ports": [port]} if pod.up else None,
        }

    def is_lost(self) -> bool:
        return any(a <= self.now < b for a, b in self.outages)

    def end_pod(self, pod_id: str) -> None:
        pod = self.pods.get(pod_id)
        if pod is None or pod.ended is not None:
            return
        pod.ended = self.now
        # the caller may live in it, and returns from its call first
        self.at(self.now, lambda: self.kill_pod_actors(pod_id))

    def move_price(self, factor: float) -> None:
        self.price *= factor
        self.rises += factor > 1.0 and bool(self.alive())
        for pod in self.pods.values():
            if pod.ended is None:
                pod.prices.append((self.now, self.price))

    def bill_usd(self) -> float:
        return sum(p.bill_usd(self.now) for p in self.pods.values())

    def moment_of(self, usd: float) -> float:
        """When so much was spent, by bisection; the present where it was not."""
        low, high = 0.0, self.now
        while high - low > 0.1:
            middle = (low + high) / 2
            ends = ((p, min(middle, p.ended or middle)) for p in self.pods.values())
            low, high = (
                (low, middle) if sum(p.usd_until(e) for p, e in ends) >= usd else (middle, high)
            )
        return low

    def alive(self) -> list[Pod]:
        return [p for p in self.pods.values() if p.ended is None]


@contextmanager
def clock_of(world: World) -> Iterator[None]:
    """`time.time`, `time.monotonic` and `time.sleep` of the code under test are the world's."""
    with (
        mock.patch.object(time, "time", lambda: EPOCH + world.now),
        mock.patch.object(time, "monotonic", lambda: world.now),
        mock.patch.object(time, "sleep", world.sleep),
        mock.patch.object(signal, "signal", lambda *_: None),  # actors are threads
        mock.patch.dict(os.environ, {"NANOCHAT_HOME": str(world.home)}),
    ):
        yield


class Stage:
    """Stands in for a stage's process: trains while it is looked at, saves by the clock, and
    answers a stop with a checkpoint."""

    def __init__(self, world: World, pod: str, run: RunDir, stage: str, length_s: float) -> None:
        self.world = world
        self.pod_id = pod
        self.run = run
        self.stage = stage
        self.begun = self.saved = world.now
        self.looked = world.now
        self.trained_s = 0.0
        self.length_s = length_s
        self.half: Manifest | None = None
        self.code: int | None = None
        self.pid = 1
        self.checkpoints = CheckpointDir(run.checkpoints_dir(stage))
        self.checkpoints.path.mkdir(parents=True, exist_ok=True)
        self.checkpoints.recover()
        done = self.checkpoints.complete()
        self.step = done[-1].step if done else 0
        self._tell()

    def poll(self) -> int | None:
        if self.code is not None:
            return self.code
        self.step += 1
        self._tell()
        # what a stalled supervisor does not look at does not train in this stand-in
        self.trained_s += min(self.world.now - self.looked, LATEST_S)
        self.looked = self.world.now
        longest = max(self.world.trained_s.get(self.stage, 0.0), self.trained_s)
        self.world.trained_s[self.stage] = longest
        if self.stage == "report":
            return self._end("done") if self.world.now - self.begun > 5.0 else None
        if self.half is not None:  # a kill between writing and naming is possible
            self.checkpoints.commit(self.half)
            self.half, self.saved = None, self.world.now
        if self.run.stop_request() is not None:
            self._write()
            self.checkpoints.commit(self.half)  # type: ignore[arg-type]
            return self._end("stopped")
        if self.world.now - self.begun > self.length_s:
            return self._end("done")
        if self.world.now - self.saved >= SAVE_EVERY_S:
            self._write()
        return None

    def kill(self) -> None:
        self.code = -9

    def dump_stacks(self) -> None:
        pass

    def _write(self) -> None:
        self.checkpoints.stage(self.step)
        folder = self.checkpoints.staged(self.step)
        storage = self.checkpoints.storage
        files = {"state.json": storage.write_new(folder / "state.json", b"{}")}
        self.half = Manifest(self.step, "full", 8, None, files, utc_now())

    def _tell(self) -> None:
        self.run.outcome_file(self.stage).parent.mkdir(parents=True, exist_ok=True)
        self.run.write_progress(self.stage, "train", step=self.step, median_step_s=1.0, save_s=1.0)
        self._touch(self.run.progress_file(self.stage))

    def _end(self, outcome: str) -> int:
        self.run.write_outcome(Outcome(stage=self.stage, outcome=outcome, step=self.step))
        self._touch(self.run.outcome_file(self.stage))
        self.code = 0
        return 0

    def _touch(self, file: Path) -> None:
        os.utime(file, (EPOCH + self.world.now, EPOCH + self.world.now))


@dataclass
class Outlook:
    """One schedule: what is broken in it, and what may be spent for that."""

    max_usd: float
    dead: frozenset[str]
    """Of supervisor, switch and reap two at most."""
    client_follows: bool
    kills: int
    lost_api: bool
    moves: int


@dataclass
class Result:
    outlook: Outlook
    spent_usd: float
    bound_usd: float
    pods_left: int
    has_checkpoint: bool
    trained_s: float
    exit_codes: list[int | None]


def draw(rng: random.Random) -> Outlook:
    stops = ["supervisor", "switch", "reap"]
    dead = frozenset(rng.sample(stops, rng.choice([0, 0, 1, 1, 2])))
    return Outlook(
        max_usd=QUOTED_USD_PER_HOUR / 3600.0 * rng.uniform(200.0, 900.0),
        dead=dead,
        client_follows=rng.random() < 0.5,
        kills=rng.choice([0, 1, 2, 3]),
        lost_api=rng.random() < 0.4,
        moves=rng.choice([0, 0, 1, 2]),
    )
