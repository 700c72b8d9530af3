"""Who may ask, and how much at a time: everything that is decided before a request reaches its handler.

A page of another site that the user has open could ask a server on this machine, so a key is not the only guard: requests that a
browser sends for another site are refused unless that site was named, and so are names that lead to this machine by a trick (DNS
rebinding), where the server listens to this machine alone.
"""

import asyncio
import hashlib
import hmac
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moss_jt.serve.errors import ApiError
from moss_jt.serve.settings import LOOPBACK, MIB, Settings

# Answered without a key, as llama.cpp's server does: whether it runs, what it runs, and the page, which asks for the key itself.
OPEN = ("/health", "/v1/health", "/v1/models", "/models", "/openapi.json")
OPEN_FOLDERS = ("/v1/models/", "/page/")
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class Guard:
    """Middleware; see the module."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._keys = [_digest(key) for key in settings.keys]
        self._hosts = {*LOOPBACK, settings.host}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # there are no WebSockets here, and uvicorn refuses them
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check_host(headers)
            self._check_origin(scope, headers)
            self._check_key(scope, headers)
            self._check_length(headers)
            body = await self._body(scope, receive)
        except ApiError as error:
            await error.response(scope, receive, send)
            return
        if body is None:
            return
        await self._app(scope, body, send)

    def _check_host(self, headers: dict[str, str]) -> None:
        if self._settings.loopback and _host_of(headers.get("host", "")) not in self._hosts:
            raise ApiError(403, "This server answers to localhost alone.", code="host_not_allowed")

    def _check_origin(self, scope: Scope, headers: dict[str, str]) -> None:
        origin = headers.get("origin")
        if origin is None or scope["method"] in SAFE_METHODS or origin in self._settings.origins:
            return
        if urlsplit(origin).netloc != headers.get("host"):
            raise ApiError(403, "Pages of other sites may not ask this server.", code="origin_not_allowed")

    def _check_key(self, scope: Scope, headers: dict[str, str]) -> None:
        path = scope["path"]
        opened = (
            path in OPEN or path.startswith(OPEN_FOLDERS) or (path == "/" and scope["method"] in SAFE_METHODS)
        )
        if not self._keys or opened or scope["method"] == "OPTIONS":
            return
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = [headers.get("x-api-key", ""), headers.get("apikey", "")]
        given += [bearer.strip()] if scheme.lower() == "bearer" else []
        if not any([self._is_key(key) for key in given]):  # all of them, so that time tells nothing
            raise ApiError(401, "Invalid API Key", code="invalid_api_key")

    def _is_key(self, key: str) -> bool:
        digest = _digest(key)
        return any([hmac.compare_digest(digest, known) for known in self._keys])

    async def _body(self, scope: Scope, receive: Receive) -> Receive | None:
        """The body, within bounds; None where the client has gone.

        Raises:
            ApiError: it is too long, or comes too slowly.
        """
        limits, data = self._settings.limits, bytearray()
        try:
            async with asyncio.timeout(limits.body_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    data += message.get("body", b"")
                    if len(data) > limits.body_bytes:
                        raise too_large(limits.body_bytes)
                    if not message.get("more_body", False):
                        return _replayed(bytes(data), receive)
        except TimeoutError:
            raise ApiError(408, "The request did not arrive in time.", code="timeout") from None

    def _check_length(self, headers: dict[str, str]) -> None:
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._settings.limits.body_bytes:
            raise too_large(self._settings.limits.body_bytes)


def _replayed(data: bytes, receive: Receive) -> Receive:
    """A body that has arrived, and then whatever else comes."""
    told = False

    async def replay() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": data, "more_body": False}

    return replay


def too_large(most: int) -> ApiError:
    return ApiError(413, f"The body has more than {most / MIB:g} MiB.", code="request_too_large")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _host_of(header: str) -> str:
    """The name in a Host header, without its port and brackets."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def read_keys(lines: Iterable[str]) -> list[str]:
    """Keys from a file's lines; empty ones and those that begin with # are none."""
    return [key for line in lines if (key := line.strip()) and not key.startswith("#")]
