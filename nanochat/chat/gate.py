"""What every HTTP request passes first: host name, size, time, key; status count, safe headers.

Plain ASGI, so that a streamed answer is not buffered on its way.
"""

import asyncio
import hmac
import json
from collections.abc import MutableMapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.chat.errors import error_body
from nanochat.chat.prometheus import ServerMetrics

OPEN_PATHS = ("/", "/health")
"""Need no key: the page asks for one itself, and a probe of liveness has none."""
BODY_TIME_LIMIT_S = 30.0
"""A body that is not whole by then is refused with 408."""
SAFE_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


class Gate:
    """Middleware around the whole application."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: ServerMetrics,
        max_body_bytes: int,
        api_key: str | None,
        allowed_hosts: frozenset[str] | None,
    ) -> None:
        """allowed_hosts: names under which the server may be asked for; None: any."""
        self.app = app
        self.allowed_hosts = allowed_hosts
        self.metrics = metrics
        self.max_body_bytes = max_body_bytes
        self.api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        num_bytes, is_whole = 0, False
        deadline = asyncio.get_running_loop().time() + BODY_TIME_LIMIT_S

        async def limited_receive() -> Message:
            nonlocal num_bytes, is_whole
            if is_whole:  # from here on it only waits for the client to go
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                text = f"The request was not whole after {BODY_TIME_LIMIT_S:g} s."
                raise HTTPException(408, text) from None
            is_whole = not message.get("more_body", False)
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_body_bytes:
                # passed on by FastAPI, unlike any other exception that reading a body raises
                raise HTTPException(413, self._too_large()[1])
            return message

        async def noted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.add(label=str(message["status"]))
                message = {**message, "headers": [*message.get("headers", []), *SAFE_HEADERS]}
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            await _refuse(noted_send, *refusal)
            return
        await self.app(scope, limited_receive, noted_send)

    def _refusal(self, scope: Scope) -> tuple[int, str, str] | None:
        """(status, message, code) for a request that goes no further."""
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if self.allowed_hosts is not None and _without_port(host) not in self.allowed_hosts:
            return 421, f"This server is not known as {host!r}.", "misdirected_request"
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.max_body_bytes:
            return self._too_large()
        if self.api_key is None or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return None
        if not hmac.compare_digest(_bearer(headers), self.api_key.encode()):
            return 401, "The API key is missing or wrong.", "invalid_api_key"
        return None

    def _too_large(self) -> tuple[int, str, str]:
        limit = f"The request is larger than {self.max_body_bytes} bytes."
        return 413, limit, "request_too_large"


def _without_port(host: str) -> str:
    """`[::1]:8000` -> `[::1]`."""
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host


def _bearer(headers: MutableMapping[bytes, bytes]) -> bytes:
    """The key of `Authorization: Bearer KEY`, else nothing."""
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""


async def _refuse(send: Any, status: int, message: str, code: str) -> None:
    body = json.dumps(error_body(status, message, code=code)).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
