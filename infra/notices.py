"""Notices to a person who is away: a JSON POST to `runtime.webhook_url`.

A notice can never stop, slow or fail a run: one thread sends, a full queue drops, errors are
swallowed after a few attempts, and the end of the run waits a few seconds at most.
"""

import json
import queue
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import Any

QUEUE_LENGTH = 64
ATTEMPTS = 3
RETRY_AFTER_S = 2.0
TIMEOUT_S = 5.0
LAST_WAIT_S = 6.0
"""How long the end of a run waits for its last notice."""
BUDGET_MARKS = (0.5, 0.8, 1.0)

Send = Callable[[str, bytes], None]


class Notices:
    """Sends notices of one run; without an address it does nothing."""

    def __init__(self, url: str | None, run: str, send: Send | None = None) -> None:
        self._url = url
        self._run = run
        self._send = send or _post
        self._queue: queue.Queue[bytes] = queue.Queue(QUEUE_LENGTH)
        self._told: set[str] = set()
        if url is not None:
            threading.Thread(target=self._work, daemon=True, name="notices").start()

    def tell(self, event: str, message: str, **facts: Any) -> None:
        """Queue one notice: {"run", "event", "text", "time", …}; `text` is what chat hooks show."""
        if self._url is None:
            return
        text = f"{self._run}: {message}"
        document = {"run": self._run, "event": event, "text": text, "time": time.time(), **facts}
        try:
            self._queue.put_nowait(json.dumps(document, default=str).encode())
        except (queue.Full, TypeError, ValueError):
            return

    def tell_once(self, key: str, event: str, message: str, **facts: Any) -> None:
        """`tell`, but only the first time for this key in this process."""
        if key not in self._told:
            self._told.add(key)
            self.tell(event, message, **facts)

    def budget(self, fraction: float, spent: str) -> None:
        """Tell the highest mark of the budget that has been reached, each once."""
        reached = [mark for mark in BUDGET_MARKS if fraction >= mark]
        if reached:
            mark = reached[-1]
            what = f"{mark:.0%} of the budget is used ({spent})"
            self.tell_once(f"budget {mark}", "budget", what, fraction=fraction)

    def skip_budget(self, fraction: float) -> None:
        """Marks that an earlier process of the run has told are not told again."""
        self._told.update(f"budget {mark}" for mark in BUDGET_MARKS if fraction >= mark)

    def close(self) -> None:
        """Wait a little for what is queued."""
        deadline = time.monotonic() + LAST_WAIT_S
        while self._url and self._queue.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.05)

    def _work(self) -> None:
        while True:
            body = self._queue.get()
            for attempt in range(ATTEMPTS):
                try:
                    self._send(str(self._url), body)
                    break
                except Exception:  # whatever a webhook does, the run goes on
                    if attempt + 1 < ATTEMPTS:
                        time.sleep(RETRY_AFTER_S)
            self._queue.task_done()


def _post(url: str, body: bytes) -> None:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S):
        pass
