"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}, with the field at fault."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from fathom.errors import FathomError, ServingError

log = logging.getLogger("fathom.serving")


class ApiError(ServingError):
    """A refusal with its HTTP status."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        return error_body(str(self), self.status, self.param, self.code)

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


_TYPES = {
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


def error_body(
    message: str, status: int = 400, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The JSON of an error."""
    usual = "server_error" if status >= 500 else "invalid_request_error"
    kind = _TYPES.get(status, usual)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def translated(error: FathomError) -> ApiError:
    """What a refusal of the engine or of the tokenizer is to a client; messages begin with `field=value`."""
    if isinstance(error, ApiError):
        return error
    field = re.match(r"(\w+)=|(?:the |a )?guide\b", str(error))
    name = (field[1] or "guide") if field else ""
    return ApiError(str(error), 400, _FIELDS.get(name, name) or None)


_FIELDS = {"max_new_tokens": "max_tokens", "guide": "response_format"}
"""The engine's names of fields that clients know by others."""


def install(app: FastAPI) -> None:
    """Let the app answer with such errors whatever goes wrong."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return refusal_of(max(error.errors(), key=lambda problem: len(problem["loc"]))).response()

    @app.exception_handler(FathomError)
    async def refused(_: Request, error: FathomError) -> JSONResponse:
        return translated(error).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        headers = dict(error.headers or {})
        return ApiError(message, error.status_code, headers=headers).response()

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        # Starlette logs the traceback; the client learns that it was not its fault.
        del error
        return ApiError("the server failed; its log says why", 500).response()


def refusal_of(problem: Mapping[str, Any]) -> ApiError:
    """One of pydantic's findings as an error that names the field."""
    kind, message = problem["type"], problem["msg"]
    place = _place(problem["loc"])
    if kind == "json_invalid":
        return ApiError(f"the body is not valid JSON: {problem['ctx']['error']}")
    if kind == "at_fault":
        place.append(problem["ctx"]["param"])
    param = ".".join(place) or None
    if kind == "extra_forbidden":
        param = ".".join([*_place(problem["loc"][:-1]), str(problem["loc"][-1])])
        return ApiError(
            f"{param} is not a field this server knows; leave it out",
            400,
            param,
            "unknown_parameter",
        )
    if kind == "missing" and param is None:
        return ApiError("the request has no body; send JSON with the header Content-Type")
    if kind == "missing":
        return ApiError(f"{param} is missing", 400, param, "missing_required_parameter")
    return ApiError(f"{param or 'the body'}: {message}", 400, param, "invalid_value")


def _place(location: Sequence[str | int]) -> list[str]:
    """Where a field is, without the names of types that pydantic puts between fields for a choice of types."""
    return [str(p) for p in location if isinstance(p, int) or _FIELD.fullmatch(p)]


_FIELD = re.compile(r"(?!body$|str$|int$|list$)[a-z_]+")
