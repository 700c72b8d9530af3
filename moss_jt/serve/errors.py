"""What goes wrong, as HTTP and as OpenAI's error object. No answer names a path or shows a traceback."""

import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from moss_jt.errors import MossError

log = logging.getLogger("moss_jt.serve")

# Status -> OpenAI's name of the kind of error.
KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    501: "not_supported_error",
    503: "unavailable_error",
}
MODEL_FAILED = "The model failed while it computed this answer; the server's log says why."
STOPPING = "The server is being stopped."
CANCELLED = "cancelled"  # code of an answer that was ended by who asked for it
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
MOST_LISTED = 400  # characters of a message about a body


class ApiError(Exception):
    """An error that a client reads.

    extra  further members of the error object
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        **extra: Any,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.extra = status, message, param, code, extra
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        return error_body(self.status, self.message, self.param, self.code, **self.extra)

    @property
    def response(self) -> Response:
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        return JSONResponse(self.body, self.status, headers)


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None, **extra: Any
) -> dict[str, Any]:
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code, **extra}}


def bad_value(error: MossError, param: str | None = None) -> ApiError:
    """What a person's value is refused for, by those who check it below the server: these messages hold no paths."""
    return ApiError(400, str(error), param, "invalid_value")


def failure_of(error: BaseException) -> ApiError:
    """What a client is told of an error while an answer was written."""
    if isinstance(error, ApiError):
        return error
    log.error("an answer failed", exc_info=error)
    return ApiError(500, MODEL_FAILED, code="model_failed")


def install(app: FastAPI) -> None:
    """Have every error of the application answered in this form."""

    def handler(to_error: Callable[[Any], ApiError]) -> Callable[[Request, Exception], Awaitable[Response]]:
        async def handle(request: Request, error: Exception) -> Response:
            return to_error(error).response

        return handle

    app.add_exception_handler(ApiError, handler(lambda error: error))
    app.add_exception_handler(RequestValidationError, handler(_of_validation))
    app.add_exception_handler(Exception, handler(failure_of))
    app.add_exception_handler(HTTPException, _of_http)


def _of_validation(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong, and where it stands."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "The body is no JSON.", code="invalid_json")
    path = [str(part) for part in first["loc"][1:]]
    param = path[0] if path else None
    where = ".".join(path) or "the body"
    reason = str(first.get("ctx", {}).get("reason") or first["msg"])
    message = f"{where}: {reason}"[:MOST_LISTED]
    return ApiError(400, message, param, "invalid_value")


async def _of_http(request: Request, error: Exception) -> Response:
    """What the framework refuses by itself: no such address, another method."""
    assert isinstance(error, HTTPException)
    message = {
        404: f"There is nothing at {request.url.path[:100]}.",
        405: f"{request.method} is not possible at {request.url.path[:100]}.",
    }.get(error.status_code, error.detail)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(sorted(_methods(request)))
    return JSONResponse(error_body(error.status_code, message), error.status_code, headers)


def _methods(request: Request) -> set[str]:
    """What is possible at an address: the framework itself knows one route's methods alone."""
    return {
        method
        for method in METHODS
        for route in request.app.routes
        if route.matches({**request.scope, "method": method})[0] is Match.FULL
    }
