"""A request's text as it comes from the worker: whole characters, cut at stop strings, in time."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal, TypeVar

from starlette.requests import Request

from nanochat.chat.prometheus import ServerMetrics
from nanochat.chat.worker import Job, Worker
from nanochat.text import TextStream

T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """Some more text; the last piece has the reason why it is the last."""

    text: str
    num_tokens: int
    """Tokens of the answer up to here."""
    finish_reason: Literal["stop", "length"] | None = None


class StopFilter:
    """Holds text back while it may be the beginning of a stop string, and ends at a whole one."""

    def __init__(self, stops: list[str]) -> None:
        self.stops = stops
        self.stopped = False
        self._held = ""

    def feed(self, text: str) -> str:
        """The text that is sure to be part of the answer."""
        held = self._held + text
        found = [at for stop in self.stops if (at := held.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return held[: min(found)]
        keep = max((_overlap(held, stop) for stop in self.stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """What was held back when the answer ends of itself."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


async def answer(
    worker: Worker, job: Job, *, stops: list[str], time_limit_s: float, metrics: ServerMetrics
) -> AsyncGenerator[Piece, None]:
    """Text of a job, piece by piece. At the time limit it ends as if it were at its length.

    Ending the iteration early (a client that has gone) cancels the job. Raises EngineFailed.
    """
    started_s = time.monotonic()
    text, stop = TextStream(worker.engine.tokenizer), StopFilter(stops)
    num_tokens = 0
    ended = False
    metrics.prompt_tokens.add(len(job.request.prompt))
    try:
        async with aclosing(worker.updates(job, time_limit_s)) as updates:
            async for update in updates:
                if num_tokens == 0 and update.ids:
                    metrics.first_token_s.observe(time.monotonic() - started_s)
                num_tokens += len(update.ids)
                piece = stop.feed("".join([text.feed(token) for token in update.ids]))
                if stop.stopped:
                    ended = True
                    yield Piece(piece, num_tokens, "stop")
                    return
                if update.finish_reason is not None:
                    ended = True
                    piece += stop.feed(text.finish()) + stop.finish()
                    ran_out = update.finish_reason != "stop"
                    yield Piece(piece, num_tokens, "length" if ran_out else "stop")
                    return
                if piece:
                    yield Piece(piece, num_tokens)
    except TimeoutError:
        ended = True
        yield Piece(text.finish() + stop.finish(), num_tokens, "length")
    finally:
        metrics.generated_tokens.add(num_tokens)
        metrics.answer_s.observe(time.monotonic() - started_s)
        if not ended:
            metrics.cancelled.add()


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def collect(pieces: AsyncGenerator[Piece, None]) -> tuple[str, Piece]:
    """(whole text, last piece) of an answer."""
    texts: list[str] = []
    async for piece in pieces:
        texts.append(piece.text)
    return "".join(texts), piece


async def unless_gone(request: Request, wanted: Awaitable[T]) -> T:
    """The result; given up, with ClientGone, when the client disconnects before it is there."""
    task = asyncio.ensure_future(wanted)
    gone = asyncio.ensure_future(_wait_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
