"""The engine behind a server: one thread steps it, any number of coroutines wait for its tokens.

- Submissions and cancellations reach the thread through one queue; new tokens come back in one
  call into the event loop per step, whatever the number of requests.
- The number of requests is bounded; a coroutine that is cancelled (the client has gone) takes its
  request out of the batch.
- A step that fails ends the requests in flight with its error; the thread goes on.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from nanochat.engine import Engine, FinishReason, Generation, Request

log = logging.getLogger(__name__)


class QueueFull(Exception):
    """No room for another request; try again later."""


class EngineFailed(Exception):
    """The engine failed while it answered."""


@dataclass(frozen=True)
class Update:
    """What a step has brought for one request."""

    ids: list[int]
    finish_reason: FinishReason | None = None


@dataclass(eq=False)
class Job:
    """A request on its way through the worker."""

    request: Request
    generation: Generation | None = None
    num_sent: int = 0
    updates: asyncio.Queue[Update | Exception] = field(default_factory=asyncio.Queue)


News = tuple[Job, Update | Exception]


@dataclass(frozen=True)
class _Submit:
    job: Job


@dataclass(frozen=True)
class _Cancel:
    job: Job


class _Stop:
    """Ends the thread."""


class Worker:
    """Runs an engine in a thread of its own. Made and used in one event loop."""

    def __init__(self, engine: Engine, max_waiting: int) -> None:
        """max_waiting: requests that may wait for a row beside those being answered."""
        self.engine = engine
        self.max_open = engine.max_batch + max_waiting
        self._loop = asyncio.get_running_loop()
        self._commands: queue.SimpleQueue[_Submit | _Cancel | _Stop] = queue.SimpleQueue()
        self._open: set[Job] = set()
        self._running: dict[Generation, Job] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def num_open(self) -> int:
        """Requests submitted and not ended."""
        return len(self._open)

    def submit(self, request: Request) -> Job:
        """Hand a request to the engine. Raises QueueFull, and ValueError as `Engine.check`."""
        self.engine.check(request)
        if len(self._open) >= self.max_open:
            raise QueueFull
        job = Job(request)
        self._open.add(job)
        self._commands.put(_Submit(job))
        return job

    async def updates(self, job: Job, time_limit_s: float) -> AsyncGenerator[Update, None]:
        """What comes for a job, up to and with its finish_reason. Raises EngineFailed, and
        TimeoutError at the time limit. Ending the iteration early cancels the request."""
        deadline = self._loop.time() + time_limit_s
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    update = await job.updates.get()
                if isinstance(update, Exception):
                    raise EngineFailed(str(update)) from update
                yield update
                if update.finish_reason is not None:
                    return
        finally:
            self.cancel(job)

    def cancel(self, job: Job) -> None:
        """Take a job out, if it has not ended."""
        if job in self._open:
            self._open.discard(job)
            self._commands.put(_Cancel(job))

    async def close(self) -> None:
        """End the thread; what is still in flight is given up."""
        self._commands.put(_Stop())
        await asyncio.to_thread(self._thread.join)

    # -------------------------------------------------------------------------
    # In the thread

    def _run(self) -> None:
        while self._obey():
            try:
                news = self._step()
            except Exception as e:
                log.exception("the engine failed")
                news = self._fail_all(e)
            if news:
                self._loop.call_soon_threadsafe(self._deliver, news)

    def _obey(self) -> bool:
        """Follow the commands that are there, waiting for one while nothing runs; False to end."""
        while not self._running or not self._commands.empty():
            command = self._commands.get()
            match command:
                case _Submit(job):
                    job.generation = self.engine.submit(job.request)
                    self._running[job.generation] = job
                case _Cancel(job):
                    if job.generation is not None:
                        self.engine.cancel(job.generation)
                        self._running.pop(job.generation, None)
                case _Stop():
                    return False
        return True

    def _step(self) -> list[News]:
        """One step of the engine; what is new for each request that it has moved."""
        news: list[News] = []
        for generation in self.engine.step():
            job = self._running[generation]
            new = generation.ids[job.num_sent :]
            job.num_sent += len(new)
            if generation.finish_reason is not None:
                del self._running[generation]
            news.append((job, Update(new, generation.finish_reason)))
        return news

    def _fail_all(self, error: Exception) -> list[News]:
        failed: list[News] = [(job, error) for job in self._running.values()]
        for generation in self._running:
            self.engine.cancel(generation)
        self._running.clear()
        return failed

    # In the event loop again

    def _deliver(self, news: list[News]) -> None:
        for job, update in news:
            if isinstance(update, Exception) or update.finish_reason is not None:
                self._open.discard(job)
            job.updates.put_nowait(update)
