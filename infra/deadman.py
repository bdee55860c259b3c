"""The dead man's switch: on a rented pod, ends the pod when no run lives in it any more.

* The image's entry point starts it before anything else, also when the command is SkyPilot's.
* It trusts neither the supervisor nor the client: it reads the run's ledger by itself, asks the
  provider for the price by itself, and ends the pod by the provider's API with the pod's own id.
* It ends the pod when nothing of a run has given a sign of life for SILENCE_S, when the budget of
  the ledger is used up, or when the pod alone has cost more than its label allows.
* A refused or lost call is made again, for ever; nothing that cannot be read ends the switch.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from infra import budget, pointer
from infra.privileges import image_home
from infra.runpod_api import Pod, ProviderError, RunPodApi, connect, label, this_pod
from nanochat.rundir import RunDir, RunDirError, append_jsonl, read_jsonl

LOOK_EVERY_S = 5.0
EARLY_S = 12.0
"""The end is asked for this much before the money is gone: a busy machine looks late."""
ASK_EVERY_S = 60.0
SILENCE_S = 900.0
"""Longer than an image's start, SkyPilot's set-up and a supervisor's restart take together."""
RETRY_S = (5.0, 10.0, 20.0, 30.0)
SERVING = "nanochat.chat."
"""Chat and web server are life of their own: a person or autostop ends them."""


def tell(text: str) -> None:
    """A line on stderr, if that takes any."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"dead man's switch: {text}\n")
        sys.stderr.flush()


class Switch:
    """Looks at the run of one pod. Clock and provider are given, so that a test can be hostile."""

    def __init__(
        self,
        home: Path,
        pod_id: str | None,
        api: RunPodApi | None,
        max_usd: float | None = None,
        born: float | None = None,
        silence_s: float = SILENCE_S,
        is_serving: Callable[[], bool] = lambda: False,
        tell: Callable[[str], None] = tell,
    ) -> None:
        self.home = home
        self.pod_id = pod_id
        self.api = api
        self.max_usd = max_usd
        self.born = born
        self.silence_s = silence_s
        self._is_serving = is_serving
        self._tell = tell
        self._unjudged: set[str] = set()
        self._born = time.monotonic()
        self._life: Any = None
        self._life_seen = self._born
        self._asked: float | None = None
        self._pod: Pod | None = None
        self._highest_usd_per_hour = 0.0
        self._pod_seen = self._born

    def reason_to_end(self) -> str | None:
        """Why the pod has to go now; None while all is well. Raises nothing.

        What cannot be judged is told once, and judged again by the next look.
        """
        now = time.monotonic()
        judges = {
            "the price": self._ask_price,
            "what the pod may cost": self._over_label,
            "the budget of the run": self._over_budget,
            "the silence of the run": self._over_silence,
        }
        for what, judge in judges.items():
            try:
                reason = judge(now)
            except Exception as e:  # whatever it is, the others count
                if what not in self._unjudged:
                    self._tell(f"{what} cannot be judged: {e!r}; looking on")
                self._unjudged.add(what)
                continue
            self._unjudged.discard(what)
            if reason is not None:
                return reason
        return None

    def end(self) -> bool:
        """Ask once for the end of the pod; True when the provider has taken it."""
        if self.api is None or self.pod_id is None:
            return False
        try:
            self.api.terminate(self.pod_id)
        except ProviderError as e:
            # another stop may have been first
            return "not found" in str(e).lower()
        return True

    def _signs_of(self, run: RunDir | None) -> tuple[Any, ...]:
        """Changes with every sign of life; times are only compared for equality, since the clock
        of a volume is another one."""
        if run is None:
            return ()
        signs: list[Any] = [str(run.path)]
        with contextlib.suppress(OSError):
            files = [run.ledger_file, run.lease_file, *run.path.glob("stages/*.progress.json")]
            for file in files:
                with contextlib.suppress(OSError):
                    signs.append(file.stat().st_mtime_ns)
        return tuple(signs)

    def _over_label(self, now: float) -> str | None:
        if self.max_usd is None or self._pod is None:
            return None
        lived_s = self._pod.uptime_s + now - self._pod_seen
        if self.born is not None:
            lived_s = max(lived_s, time.time() - self.born)
        lived_s += EARLY_S
        if lived_s / 3600.0 * self._highest_usd_per_hour >= self.max_usd:
            return f"the pod has cost the ${self.max_usd:.2f} that it may"
        return None

    def _over_silence(self, now: float) -> str | None:
        life = self._signs_of(current_run(self.home))
        if life != self._life:
            self._life, self._life_seen = life, now
        silence_s = now - self._life_seen
        if silence_s <= self.silence_s:
            return None
        if self._is_serving():
            self._life_seen = now
            return None
        return f"no run has given a sign of life for {silence_s:.0f} s"

    def _over_budget(self, _now: float) -> str | None:
        """Whether the money of the ledger is used up by a late next look, this pod still billed."""
        path = pointer.current_run(self.home)
        if path is None:
            return None
        run = RunDir(path)
        try:
            bounds = run.spec().budget
        except RunDirError:
            return None
        mine = [r for r in read_jsonl(run.ledger_file) if r.get("instance") == self.pod_id]
        if not mine:  # the ledger of an earlier pod; its supervisor has yet to start here
            return None
        now = time.time()
        price = float(mine[-1].get("usd_per_hour") or 0.0)
        if self._pod is not None:
            storage = float(mine[-1].get("storage_usd_per_hour") or 0.0)
            price = max(price, self._pod.usd_per_hour + storage)
        lives = {"event": "heartbeat", "time": now, "usd_per_hour": price, "instance": self.pod_id}
        left_s = budget.time_left_s(bounds, [*read_jsonl(run.ledger_file), lives], now)
        if left_s is not None and left_s <= EARLY_S:
            return f"the budget of {run.path} is spent"
        return None

    def _ask_price(self, now: float) -> str | None:
        if self.api is None or self.pod_id is None:
            return None
        if self._asked is not None and now - self._asked < ASK_EVERY_S:
            return None
        self._asked = now
        with contextlib.suppress(ProviderError):
            if pod := self.api.pod(self.pod_id):
                self._pod, self._pod_seen = pod, now
                self._highest_usd_per_hour = max(self._highest_usd_per_hour, pod.usd_per_hour)
        return None


def current_run(home: Path) -> RunDir | None:
    """The run that was last started on this machine, not on another one with the same volume."""
    with contextlib.suppress(OSError):
        if path := pointer.current_run(home):
            return RunDir(path)
    return None


def note_life(home: Path, pod_id: str | None) -> None:
    """Count the pod in the ledger of its run up to now: a supervisor that hung, or was killed, has
    left off before, and the pod that goes on with the run must know. Raises nothing."""
    with contextlib.suppress(Exception):  # a ledger that takes no line must not keep the pod
        run = current_run(home)
        mine = (
            [r for r in read_jsonl(run.ledger_file) if r.get("instance") == pod_id] if run else []
        )
        if run and mine:
            now = max(time.time(), float(mine[-1]["time"]))
            append_jsonl(run.ledger_file, {**mine[-1], "event": "stop", "time": now}, durable=True)


def watch(switch: Switch, say: Callable[[str], None]) -> None:
    """Look until there is a reason, then ask for the end until the pod is gone."""
    while (reason := switch.reason_to_end()) is None:
        time.sleep(LOOK_EVERY_S)
    say(f"{reason}; this pod ends itself")
    for attempt in range(sys.maxsize):
        note_life(switch.home, switch.pod_id)
        switch.api = switch.api or connect()
        if not switch.end():
            say("the provider did not end the pod; asking again")
        time.sleep(RETRY_S[min(attempt, len(RETRY_S) - 1)])


def is_serving() -> bool:
    """Whether a chat or the web page runs on this machine."""
    for process in psutil.process_iter(["cmdline"]):
        if any(word.startswith(SERVING) for word in process.info["cmdline"] or ()):
            return True
    return False


def main() -> int:
    """Started by the image's entry point on a pod; elsewhere it ends at once."""
    pod_id = this_pod()
    if pod_id is None:
        return 0
    max_usd, born = label(os.environ, "MAX_USD"), label(os.environ, "BORN")
    switch = Switch(image_home(), pod_id, connect(), max_usd, born, is_serving=is_serving)
    watch(switch, tell)
    return 0


if __name__ == "__main__":
    sys.exit(main())
