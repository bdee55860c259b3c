"""Errors in the form of OpenAI's API: the bodies, and which exception becomes which answer."""

import itertools
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from nanochat.chat.answers import ClientGone
from nanochat.chat.worker import EngineFailed


class ApiError(Exception):
    """An answer in OpenAI's form of an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.body = error_body(status, message, param, code)


TYPE_NAME = re.compile(r"str|constrained-str|list\[.*")
"""What pydantic adds to the place of a field that may be of several types."""
ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The JSON of an error."""
    kind = "server_error" if status >= 500 else ERROR_TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def add_error_handlers(app: FastAPI) -> None:
    """Answer every known exception in OpenAI's form."""
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(EngineFailed, _answer_engine_failed)
    app.add_exception_handler(ClientGone, _answer_gone)


def _error(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(error_body(status, message, param, code), status, headers)


async def _answer_api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def _answer_invalid(request: Request, error: Exception) -> Response:
    """A body that is no JSON or has a wrong field: the first mistake, and where it is."""
    assert isinstance(error, RequestValidationError)
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip() != "application/json":
        return _error(415, "The content type must be application/json.")
    first = error.errors()[0]
    where = [str(part) for part in first["loc"][1:]]
    if first["type"] == "json_invalid":
        return _error(400, f"The body is no JSON: {first['ctx']['error']} at {where[0]}.")
    if not where and first["type"] == "missing":
        return _error(400, "The body is missing.")
    param = ".".join(itertools.takewhile(lambda part: not TYPE_NAME.fullmatch(part), where))
    return _error(400, f"{param}: {first['msg']}" if param else first["msg"], param or None)


async def _answer_http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail, headers=error.headers)


async def _answer_engine_failed(_request: Request, _error_: Exception) -> Response:
    return _error(500, "The engine failed while it wrote the answer.", code="engine_failed")


async def _answer_gone(_request: Request, _error_: Exception) -> Response:
    """Read by nobody; 499 is nginx's status for it, seen in the metrics."""
    return Response(status_code=499)
