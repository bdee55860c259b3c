"""One run in the hostile world: launched, broken as the seed says, and billed to its end."""

import contextlib
import io
import json
import random
from pathlib import Path
from typing import Any

from infra import deadman, podrun, reap
from infra.console import Console
from infra.launch.base import POD_PREFIX, Job, LaunchError
from infra.launch.runpod import Launcher, RunPodOptions, Volume
from infra.meter import ASK_EVERY_S, Meter, Price
from infra.runpod_api import RunPodApi, label
from infra.supervisor import END_OF_POD_S, Supervisor
from nanochat.checkpoint_dir import CheckpointDir
from nanochat.rundir import EXIT_BUDGET, EXIT_DONE, RunDir
from nanochat.spec import RunSpec
from tests.twin.hostile import (
    FOREVER,
    LATEST_S,
    PLAN,
    QUOTED_USD_PER_HOUR,
    REAP_PERIOD_S,
    RESTART_S,
    SAVE_EVERY_S,
    TICK_S,
    Actor,
    Pod,
    Result,
    Stage,
    World,
    clock_of,
    draw,
)

WATCHED_S = 3 * 3600.0
"""Every schedule is over by then: budgets are of 15 minutes at most."""
LAUNCHES = 4


class Schedule:
    """The actors and the faults of one seed."""

    def __init__(self, seed: int, home: Path) -> None:
        self.rng = random.Random(seed)
        self.outlook = draw(self.rng)
        self.world = World(self.rng, home)
        self.api = RunPodApi("key", post=self.world.post)
        self.spec = RunSpec.model_validate(
            {
                "name": "hostile",
                "offer": "8xH100-SXM",
                "stop_grace_s": 20.0,
                "budget": {"max_usd": self.outlook.max_usd, "checkpoint_every_s": SAVE_EVERY_S},
                "model": {"depth": 1, "seq_len": 8},
                "runtime": {"max_restarts": 100},
                "base_train": {"num_steps": 10**6, "total_batch_size": 8},
                "report": {},
            }
        )
        self.job = Job(config="none.toml", overrides=(), spec=self.spec, plan=PLAN)
        self.run_dir = RunDir(home / "runs" / "hostile")
        self.length_s = self.rng.choice([120.0, 600.0, FOREVER, FOREVER])
        self.supervisors: dict[str, Actor] = {}
        self.switches: dict[str, Actor] = {}
        self.exit_codes: list[int | None] = []
        self.finished = False
        self.unseen_s = 0.0
        """What pods have lived on after their supervisor stood still, until they vanished."""

    # -- what lives where

    def create(self, **asked: Any) -> dict[str, Any]:
        """The SDK's create_pod."""
        world = self.world
        if world.is_lost():
            raise OSError("timed out")
        pod_id = f"pod{len(world.pods)}"
        env = dict(asked["env"])
        pod = Pod(pod_id, asked["name"], env, world.now, [(world.now, world.price)])
        world.pods[pod_id] = pod
        self.start_container(pod, self.rng.uniform(5.0, 90.0))
        return {"id": pod_id}

    def start_container(self, pod: Pod, after: float) -> None:
        """The image's entry point: the dead man's switch first, then podrun."""
        if "switch" not in self.outlook.dead:
            self.switches[pod.id] = self.world.spawn(lambda: self.watch(pod), pod.id, after)
        self.world.spawn(lambda: self.podrun(pod), pod.id, after)

    def watch(self, pod: Pod) -> None:
        env = {k: v for k, v in pod.env.items() if k.startswith(POD_PREFIX)}
        limit, born = label(env, "MAX_USD"), label(env, "BORN")
        switch = deadman.Switch(self.world.home, pod.id, self.api, limit, born)
        deadman.watch(switch, lambda _: None)

    def podrun(self, pod: Pod) -> None:
        """As infra.podrun: the run, then the end of the pod."""
        pod.up = True
        pod.state = {"phase": "run"}
        before_usd = label(pod.env, "BEFORE_USD") or 0.0
        quoted = Price(QUOTED_USD_PER_HOUR, "plan", pod.id, before_usd=before_usd)
        meter = Meter(quoted, lambda: self.api.pod(pod.id))
        meter.refresh()
        self.world.spawn(lambda: self.keep_asking(meter), pod.id, ASK_EVERY_S)
        ended: list[int | None] = []
        supervisor = self.world.spawn(lambda: ended.append(self.supervise(pod, meter)), pod.id)
        self.supervisors[pod.id] = supervisor
        while not supervisor.over:
            self.world.sleep(1.0)
        exit_code = ended[0] if ended else 137
        pod.state = {"phase": "ended", "exit_code": exit_code}
        self.exit_codes.append(exit_code)
        self.finished = self.finished or exit_code in (EXIT_DONE, EXIT_BUDGET)
        podrun.end_pod(pod.id, self.api, self.world.home)

    def keep_asking(self, meter: Meter) -> None:
        while True:
            meter.refresh()
            self.world.sleep(ASK_EVERY_S)

    def supervise(self, pod: Pod, meter: Meter) -> int:
        run, world = self.run_dir, self.world
        supervisor = Supervisor(
            self.spec,
            run,
            PLAN,
            meter(),
            8,
            Console(run, self.spec.stages, tty=False, stream=io.StringIO()),
            command=lambda stage, path, ranks: [stage],
            meter=meter,
            start_process=lambda command, log, env: Stage(  # type: ignore[arg-type,return-value]
                world, pod.id, run, command[0], self.length_s
            ),
        )
        return supervisor.run()

    def client(self) -> None:
        """Launches, follows, and launches again what has not ended by itself."""
        launcher = Launcher(
            self.api,
            self.create,
            [Volume("vol", "nanochat", "CA-MTL-1")],
            self.shell,
            io.StringIO(),
            "ssh-ed25519 AAAA",
            boot_deadline_s=300.0,
        )
        options = RunPodOptions(
            image="image", max_usd_per_hour=1000.0, detach=not self.outlook.client_follows
        )
        for _ in range(LAUNCHES):
            if self.finished:
                return
            with contextlib.suppress(LaunchError):
                launcher.submit([self.job], options)
            self.world.sleep(self.rng.uniform(5.0, 600.0))

    def shell(self, address: tuple[str, int], command: str) -> str | None:
        pod = self.world.pods[address[0]]
        if pod.ended is not None or not pod.up:
            return None
        return json.dumps(pod.state) if command.startswith("cat") else ""

    def reaper(self) -> None:
        while True:
            with contextlib.suppress(reap.ProviderError):
                reap.reap(self.api)
            self.world.sleep(REAP_PERIOD_S)

    # -- faults

    def plant(self) -> None:
        rng, world, outlook = self.rng, self.world, self.outlook
        horizon = outlook.max_usd / QUOTED_USD_PER_HOUR * 3600.0
        for _ in range(outlook.kills):
            kind = rng.choice([self.kill_supervisor, self.kill_container, self.lose, self.hang])
            world.at(rng.uniform(0.0, horizon * 1.1), kind)
        if "supervisor" in outlook.dead:
            world.at(rng.uniform(0.0, horizon), self.freeze)
        if outlook.lost_api:
            for _ in range(rng.randint(1, 3)):
                begin = rng.uniform(0.0, horizon * 1.2)
                world.outages.append((begin, begin + rng.uniform(30.0, 900.0)))
        for _ in range(outlook.moves):
            factor = rng.choice([0.6, 0.9, 1.2, 1.8])
            world.at(rng.uniform(0.0, horizon), lambda f=factor: world.move_price(f))

    def _someone(self) -> Pod | None:
        alive = self.world.alive()
        return self.rng.choice(alive) if alive else None

    def kill_supervisor(self) -> None:
        if (pod := self._someone()) and pod.id in self.supervisors:
            self.world.kill(self.supervisors[pod.id])

    def kill_container(self) -> None:
        """Everything in it dies; the provider starts it again."""
        if pod := self._someone():
            pod.up = False
            self.world.deaths.append(self.world.now)
            self.world.kill_pod_actors(pod.id)
            self.world.at(self.world.now + RESTART_S, lambda: self.restart(pod))

    def restart(self, pod: Pod) -> None:
        if pod.ended is None:
            self.start_container(pod, 0.0)

    def lose(self) -> None:
        """A spot host goes: the pod vanishes."""
        if pod := self._someone():
            for begin, end in self.world.stalls:
                self.unseen_s += max(0.0, min(end, self.world.now) - max(begin, pod.born))
            self.world.end_pod(pod.id)

    def hang(self) -> None:
        """The supervisor stands still for a while (a slow volume, SIGSTOP), and wakes up."""
        if (pod := self._someone()) and pod.id in self.supervisors:
            self.supervisors[pod.id].hang_s = self.rng.uniform(30.0, 600.0)

    def freeze(self) -> None:
        """The supervisor's stop is dead: it never acts again, here and on every later pod."""
        for actor in self.supervisors.values():
            actor.hang_s = FOREVER
        self.world.at(self.world.now + 30.0, self.freeze)

    # -- the end

    def play(self) -> Result:
        world = self.world
        # podrun says on stderr what it asks for again: thousands of lines over all schedules
        with clock_of(world), contextlib.redirect_stderr(io.StringIO()):
            try:
                self.plant()
                client = world.spawn(self.client)
                if "reap" not in self.outlook.dead:
                    world.spawn(self.reaper, after=self.rng.uniform(0.0, REAP_PERIOD_S))
                world.run_until(
                    WATCHED_S, lambda: client.over and not world.alive() and world.now > 1.0
                )
                return self.result()
            finally:
                world.close()

    def result(self) -> Result:
        complete = CheckpointDir(self.run_dir.checkpoints_dir("base_train")).complete()
        for manifest in complete:
            folder = self.run_dir.checkpoints_dir("base_train") / f"step_{manifest.step:06d}"
            manifest.check(folder, manifest.files, sha256=True)
        return Result(
            outlook=self.outlook,
            spent_usd=self.world.bill_usd(),
            bound_usd=self.bound_usd(),
            pods_left=len(self.world.alive()),
            has_checkpoint=bool(complete),
            trained_s=self.world.trained_s.get("base_train", 0.0),
            exit_codes=self.exit_codes,
        )

    def bound_usd(self) -> float:
        """docs/decisions.md argues it: cap + price x (absence of every living stop + one tick)."""
        outlook, world = self.outlook, self.world
        price = max(
            [QUOTED_USD_PER_HOUR, *(p for pod in world.pods.values() for _, p in pod.prices)]
        )
        # from here on an absence is not made up for: before, the stop is not due yet
        due = world.moment_of(outlook.max_usd - price / 3600.0 * END_OF_POD_S)
        late_deaths = sum(moment + RESTART_S > due for moment in world.deaths)
        absent_s = TICK_S + RESTART_S * late_deaths
        if "switch" in outlook.dead:
            stalled_s = sum(max(0.0, min(b, world.now) - max(a, due)) for a, b in world.stalls)
            stalled_s += self.unseen_s
            if "supervisor" in outlook.dead:
                absent_s += REAP_PERIOD_S
            elif "reap" in outlook.dead:
                absent_s += stalled_s
            else:
                absent_s += min(stalled_s, REAP_PERIOD_S)
        if outlook.lost_api:
            only_reap = {"supervisor", "switch"} <= outlook.dead
            gap_s = REAP_PERIOD_S if only_reap else deadman.RETRY_S[-1] + LATEST_S
            outage_s = max((b - a for a, b in merged(world.outages, gap_s)), default=0.0)
            absent_s += outage_s + (REAP_PERIOD_S if outlook.dead else 0.0)
        moved_s = TICK_S * world.rises  # one is known a minute later
        return outlook.max_usd + price / 3600.0 * (absent_s + moved_s)


def merged(spans: list[tuple[float, float]], gap_s: float) -> list[tuple[float, float]]:
    """Outages that overlap, or between which no stop need have asked, are one."""
    out: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if out and begin <= out[-1][1] + gap_s:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((begin, end))
    return out


def play(seed: int, home: Path) -> Result:
    """One schedule in an empty folder."""
    return Schedule(seed, home).play()
