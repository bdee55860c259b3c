"""The HTTP application: OpenAI's chat and text completions, a page, health and metrics."""

import asyncio
import base64
import hashlib
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.responses import Response

from nanochat import engine
from nanochat.chat.answers import Piece, answer, collect, unless_gone
from nanochat.chat.api import (
    ChatRequest,
    CompletionRequest,
    StreamOptions,
    usage,
)
from nanochat.chat.errors import ApiError, add_error_handlers
from nanochat.chat.forms import ChatForm, Form, JobStream, TextForm, events
from nanochat.chat.gate import Gate
from nanochat.chat.prometheus import CONTENT_TYPE, Gauge, ServerMetrics
from nanochat.chat.worker import Job, QueueFull, Worker
from nanochat.load import Loaded
from nanochat.sampling import Sampling
from nanochat.tokenizer import render_for_completion

PAGE = Path(__file__).with_name("ui.html")
RETRY_AFTER_S = 2


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may ask for."""

    max_waiting: int = 64
    """Requests that wait beside those being answered; more are refused with 429."""
    max_body_bytes: int = 1 << 20
    max_tokens: int = 1024
    """Tokens of one answer at most; longer ones are cut."""
    time_limit_s: float = 300.0
    """An answer ends after this time, as if it were at its length."""


class Server:
    """The handlers and what they share. The application is `app`."""

    def __init__(
        self,
        loaded: Loaded,
        max_batch: int,
        limits: Limits,
        *,
        api_key: str | None = None,
        cors_origins: Sequence[str] = (),
        allowed_hosts: Sequence[str] | None = None,
        compile: bool = False,
        keep_weights: bool = True,
    ) -> None:
        """allowed_hosts: names under which the server may be asked for; a loopback server names
        its own, so that no page elsewhere can reach it by a name that it has made point here.
        compile, keep_weights: see Inference."""
        self.loaded = loaded
        self.model_id = loaded.model_id
        self.limits = limits
        self.num_params = loaded.model.num_params()
        self.engine = engine.Engine(
            loaded.model,
            loaded.tokenizer,
            max_batch=max_batch,
            compile=compile,
            keep_weights=keep_weights,
        )
        self._page = PAGE.read_text(encoding="utf-8")
        self.draining = False
        self.created = int(time.time())
        self.metrics = ServerMetrics(
            [
                Gauge("nanochat_requests_open", "Queued or being answered.", self.num_open),
                Gauge("nanochat_rows_in_use", "Rows of the KV cache in use.", self.num_rows),
            ]
        )
        self.app = FastAPI(title="nanochat", lifespan=self._lifespan, docs_url=None, redoc_url=None)
        self._add_routes()
        self.app.add_middleware(
            Gate,
            metrics=self.metrics,
            max_body_bytes=limits.max_body_bytes,
            api_key=api_key,
            allowed_hosts=None if allowed_hosts is None else frozenset(allowed_hosts),
        )
        if cors_origins:
            self.app.add_middleware(
                CORSMiddleware,
                allow_origins=list(cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["authorization", "content-type"],
            )

    def num_open(self) -> int:
        """Requests queued or being answered."""
        return self.worker.num_open

    def num_rows(self) -> int:
        """Rows of the KV cache in use."""
        return self.engine.num_active

    @asynccontextmanager
    async def _lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        self.worker = Worker(self.engine, self.limits.max_waiting)
        yield
        await self.worker.close()

    def _add_routes(self) -> None:
        get, post = self.app.get, self.app.post
        route = self.app.api_route
        route("/", methods=["GET", "HEAD"], response_class=HTMLResponse)(self.page)
        route("/health", methods=["GET", "HEAD"])(self.health)
        get("/metrics")(self.show_metrics)
        get("/v1/models")(self.list_models)
        get("/v1/models/{model_id:path}")(self.show_model)
        post("/v1/chat/completions", response_model=None)(self.chat)
        post("/v1/completions", response_model=None)(self.complete)
        add_error_handlers(self.app)

    # -------------------------------------------------------------------------
    # Small answers

    async def page(self) -> HTMLResponse:
        return HTMLResponse(
            self._page, headers={"content-security-policy": page_policy(self._page)}
        )

    async def health(self) -> JSONResponse:
        document = {
            "status": "draining" if self.draining else "ok",
            "model": self.model_id,
            "max_context_tokens": self.engine.max_seq_len,
            "open": self.num_open(),
        }
        return JSONResponse(document, status_code=503 if self.draining else 200)

    async def show_metrics(self) -> PlainTextResponse:
        return PlainTextResponse(self.metrics.render(), media_type=CONTENT_TYPE)

    async def list_models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model()]}

    async def show_model(self, model_id: str) -> dict[str, Any]:
        self._check_model(model_id)
        return self._model()

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.model_id,
            "object": "model",
            "created": self.created,
            "owned_by": "nanochat",
            "stage": self.loaded.stage,
            "step": self.loaded.step,
            "num_params": self.num_params,
            "max_context_tokens": self.engine.max_seq_len,
        }

    # -------------------------------------------------------------------------
    # Completions

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """POST /v1/chat/completions."""
        prompt = self._chat_prompt(body)
        return await self._respond(body, prompt, request, ChatForm())

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """POST /v1/completions: the prompt is continued as text."""
        tokenizer = self.loaded.tokenizer
        if isinstance(body.prompt, str):
            with _as_api_error("prompt"):
                prompt = [tokenizer.bos_id, *tokenizer.encode(body.prompt)]
        else:
            prompt = body.prompt
            if not all(0 <= token < tokenizer.vocab_size for token in prompt):
                message = f"Token ids are from 0 to {tokenizer.vocab_size - 1}."
                raise ApiError(400, message, param="prompt")
        return await self._respond(body, prompt, request, TextForm())

    def _chat_prompt(self, body: ChatRequest) -> list[int]:
        """The conversation as tokens; a base model is given the last message as text to continue,
        since it knows no conversations."""
        messages = [message.as_plain() for message in body.messages]
        tokenizer = self.loaded.tokenizer
        if messages[-1]["role"] != "user":
            raise ApiError(400, "The last message must be the user's.", param="messages")
        with _as_api_error("messages"):
            if self.loaded.stage == "base_train":
                return [tokenizer.bos_id, *tokenizer.encode(messages[-1]["content"])]
            return render_for_completion(tokenizer, {"messages": messages})

    async def _respond(
        self,
        body: ChatRequest | CompletionRequest,
        prompt: list[int],
        request: Request,
        form: Form,
    ) -> Response:
        if body.model is not None:
            self._check_model(body.model)
        if body.stream and (body.n or 1) > 1:
            raise ApiError(400, "A stream has one choice.", param="n")
        jobs = self._submit(body, prompt)
        head = {
            "id": f"{form.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self.model_id,
        }
        answers = [self._answer(job, body.stops) for job in jobs]
        if body.stream:
            options = body.stream_options or StreamOptions()
            stream = events(
                form,
                head,
                answers[0],
                prompt_tokens=len(prompt),
                with_usage=options.include_usage,
            )
            return JobStream(stream, self.worker, jobs[0])
        try:
            whole = await unless_gone(request, asyncio.gather(*map(collect, answers)))
        finally:
            for job in jobs:
                self.worker.cancel(job)
        choices = [
            form.choice(i, text, piece.finish_reason) for i, (text, piece) in enumerate(whole)
        ]
        num_tokens = sum(piece.num_tokens for _, piece in whole)
        document = {
            "object": form.object,
            "choices": choices,
            "usage": usage(len(prompt), num_tokens),
        }
        return JSONResponse({**head, **document})

    def _answer(self, job: Job, stops: list[str]) -> AsyncGenerator[Piece, None]:
        return answer(
            self.worker,
            job,
            stops=stops,
            time_limit_s=self.limits.time_limit_s,
            metrics=self.metrics,
        )

    def _submit(self, body: ChatRequest | CompletionRequest, prompt: list[int]) -> list[Job]:
        """Queue the request's choices, all or none."""
        if self.draining:
            raise ApiError(503, "The server is shutting down.", code="shutting_down")
        context = self.engine.max_seq_len
        room = context - len(prompt)
        if room < (body.wanted_tokens or 1):
            raise ApiError(
                400,
                f"The prompt has {len(prompt)} tokens and leaves room for {max(room, 0)} in the "
                f"model's context of {context} tokens; the answer may take "
                f"{body.wanted_tokens or 'at least 1'}.",
                param="messages" if isinstance(body, ChatRequest) else "prompt",
                code="context_length_exceeded",
            )
        max_tokens = min(body.wanted_tokens or room, self.limits.max_tokens)
        seed = uuid.uuid4().int % 2**31 if body.seed is None else body.seed
        jobs: list[Job] = []
        try:
            for i in range(body.n or 1):
                sampling = Sampling(
                    temperature=1.0 if body.temperature is None else body.temperature,
                    top_k=body.top_k,
                    top_p=body.top_p,
                    seed=seed + i,
                )
                request = engine.Request(
                    prompt=tuple(prompt), max_tokens=max_tokens, sampling=sampling
                )
                jobs.append(self.worker.submit(request))
        except QueueFull:
            for job in jobs:
                self.worker.cancel(job)
            raise ApiError(
                429,
                "The server is busy; try again later.",
                code="queue_full",
                headers={"Retry-After": str(RETRY_AFTER_S)},
            ) from None
        return jobs

    def _check_model(self, model_id: str) -> None:
        if model_id != self.model_id:
            message = f"There is no model {model_id!r} here; there is {self.model_id!r}."
            raise ApiError(404, message, param="model", code="model_not_found")


def page_policy(page: str) -> str:
    """Content-Security-Policy: this page's own script and style, known by their hashes, and
    connections to this server; nothing else, whatever an answer may bring into the page."""

    def hashes(tag: str) -> str:
        texts = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in texts]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


@contextmanager
def _as_api_error(param: str) -> Iterator[None]:
    """What the tokenizer refuses is the client's mistake."""
    try:
        yield
    except ValueError as e:
        raise ApiError(400, str(e), param=param) from None
