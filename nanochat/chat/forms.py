"""Answers in the two forms of OpenAI's API: whole, and as server-sent events."""

import json
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any, Protocol

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from nanochat.chat.answers import Piece
from nanochat.chat.api import usage
from nanochat.chat.errors import error_body
from nanochat.chat.worker import EngineFailed, Job, Worker

Json = dict[str, Any]


class Form(Protocol):
    """How one of the two endpoints writes its answers."""

    id_prefix: str
    object: str
    chunk_object: str

    def choice(self, index: int, text: str, finish_reason: str | None) -> Json:
        """A whole answer."""

    def first_chunks(self) -> Iterable[Json]:
        """Choices to send before any text."""

    def chunk(self, text: str, finish_reason: str | None) -> Json:
        """A choice with some more text."""


class ChatForm:
    """/v1/chat/completions."""

    id_prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def choice(self, index: int, text: str, finish_reason: str | None) -> Json:
        message = {"role": "assistant", "content": text}
        return {
            "index": index,
            "message": message,
            "logprobs": None,
            "finish_reason": finish_reason,
        }

    def first_chunks(self) -> Iterable[Json]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": 0, "delta": delta, "finish_reason": None}]

    def chunk(self, text: str, finish_reason: str | None) -> Json:
        delta = {"content": text} if text else {}
        return {"index": 0, "delta": delta, "finish_reason": finish_reason}


class TextForm:
    """/v1/completions."""

    id_prefix = "cmpl"
    object = "text_completion"
    chunk_object = "text_completion"

    def choice(self, index: int, text: str, finish_reason: str | None) -> Json:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}

    def first_chunks(self) -> Iterable[Json]:
        return []

    def chunk(self, text: str, finish_reason: str | None) -> Json:
        return self.choice(0, text, finish_reason)


async def events(
    form: Form,
    head: Json,
    pieces: AsyncGenerator[Piece, None],
    *,
    prompt_tokens: int,
    with_usage: bool,
) -> AsyncGenerator[str, None]:
    """An answer as server-sent events, closed by `[DONE]`."""
    head = {**head, "object": form.chunk_object}
    no_usage: Json = {"usage": None} if with_usage else {}
    for choice in form.first_chunks():
        yield _event({**head, "choices": [choice], **no_usage})
    num_tokens = 0
    try:
        async with aclosing(pieces):
            async for piece in pieces:
                num_tokens = piece.num_tokens
                choice = form.chunk(piece.text, piece.finish_reason)
                yield _event({**head, "choices": [choice], **no_usage})
    except EngineFailed:
        yield _event(error_body(500, "The engine failed while it wrote the answer."))
        return
    if with_usage:
        yield _event({**head, "choices": [], "usage": usage(prompt_tokens, num_tokens)})
    yield "data: [DONE]\n\n"


def _event(document: Json) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"


class JobStream(StreamingResponse):
    """Streams the answer to a job, and takes the job out however the response ends, also before
    its first event."""

    def __init__(self, content: AsyncGenerator[str, None], worker: Worker, job: Job) -> None:
        super().__init__(content, media_type="text/event-stream")
        self._worker = worker
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._worker.cancel(self._job)
