"""Whatever goes wrong, as OpenAI's error body: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from fourfold.server.worker import JobFailed

UNREADABLE = "the body is no JSON that can be read: not UTF-8, nested too deep, or with a number of thousands of digits"
RETRY_SECONDS = 1  # what a client is told to wait where the server is full


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """A refusal, or a failure, as the client is to see it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        """OpenAI's error body."""
        return error_body(self.status_code, self.detail, self.param, self.code)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error body; its type follows from the status."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request is wrong, and says what would be right."""
    return ApiError(400, message, param=param, code=code)


def too_busy(message: str) -> ApiError:
    """429: try again later."""
    return ApiError(429, message, code="server_busy", headers={"Retry-After": str(RETRY_SECONDS)})


def unavailable(message: str) -> ApiError:
    """503: the server starts, ends, or has failed."""
    return ApiError(503, message, code="unavailable", headers={"Retry-After": str(RETRY_SECONDS)})


def failed(error: JobFailed) -> ApiError:
    """What ended a job, as its client is to see it: a form that cannot be followed is the client's own."""
    if error.kind in ("waited", "memory", "ended"):
        return unavailable(str(error))
    return bad_request(str(error)) if error.kind == "grammar" else ApiError(500, str(error))


def install_handlers(app: FastAPI) -> None:
    """Every error that a route raises becomes OpenAI's body."""

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        if not isinstance(error, ApiError):  # the framework's own: no such path, no such method, a body that is no JSON
            detail = UNREADABLE if error.status_code == 400 else str(error.detail)
            error = ApiError(error.status_code, detail, headers=error.headers)
        return JSONResponse(error.body(), error.status_code, headers=dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        message, param = explain(error.errors())
        return JSONResponse(error_body(400, message, param), 400)


def explain(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """The first of pydantic's complaints as a sentence, and the field that it is about.

    Where a field may have several types, pydantic complains once for each; the one that went deepest was meant.
    """
    error = max(errors, key=lambda e: (e["type"] == "extra_forbidden", len(e["loc"])))
    where = [part for part in error["loc"] if part != "body"]
    path = [part for i, part in enumerate(where) if not _is_type_name(part, behind=where[i - 1] if i else None)]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".") or None
    if error["type"] == "json_invalid":
        return f"the body is not valid JSON: {error.get('ctx', {}).get('error', error['msg'])}", None
    if error["type"] == "extra_forbidden":
        return f"{param} is not a field that this server honours; leave it out", param
    if not path and isinstance(error.get("input"), bytes):
        return "the body must be JSON and say so: send the header Content-Type: application/json", None
    if error["type"] == "missing":
        return f"{param or 'the body'} is missing", param
    message = str(error["msg"]).removeprefix("Value error, ")
    shown = "" if isinstance(error.get("input"), dict | list) else f" (it is {_short(error.get('input'))})"
    return f"{param or 'the body'}: {message}{shown}", param


def _is_type_name(part: object, behind: object) -> bool:
    """Whether a part of a location is the name by which pydantic calls a member of a union, or a message's role."""
    if not isinstance(part, str):
        return False
    of_role = isinstance(behind, int) and part in _ROLES
    return of_role or part[:1].isupper() or "[" in part or part in _SCALARS


_ROLES = {"system", "developer", "user", "assistant", "tool"}
_SCALARS = {"str", "int", "float", "bool"}


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return json.dumps(text) if isinstance(value, str) else text
