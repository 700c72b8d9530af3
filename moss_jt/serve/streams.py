"""Server-sent events, and answers that are sent whole: both end at once when the client is gone.

No event has an ``id`` line, and no line sets ``retry``: OpenAI's client takes comments after such lines for broken JSON.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from moss_jt.serve.errors import ApiError

DONE = "data: [DONE]\n\n"
PING = ": still here\n\n"
# What a description of an interface says, where an answer is a stream if that was asked for.
OR_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
T = TypeVar("T")


ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def json_text(fields: Any) -> str:
    return ENCODER.encode(fields)


def data_event(fields: Any) -> str:
    return f"data: {json_text(fields)}\n\n"


class Chunks:
    """Events of one stream, which begin alike.

    Args:
        head: members of all of them.
    """

    def __init__(self, head: Mapping[str, Any]) -> None:
        self._begin = f"data: {json_text(head)[:-1]},"

    def event(self, fields: Mapping[str, Any]) -> str:
        return f"{self._begin}{json_text(fields)[1:]}\n\n"


def named_event(name: str, fields: Any) -> str:
    return f"event: {name}\ndata: {json_text(fields)}\n\n"


class GoneError(Exception):
    """The client has closed the connection, or takes nothing any more."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What the work gives.

    Raises:
        GoneError: the client went first; the work is cancelled then.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise GoneError
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """
    Args:
        events: texts of events; what they are sent in is one write.
        left: called in the end, however that comes.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[str],
        slow_reader_s: float,
        left: Callable[[], None] = lambda: None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(None, headers={**STREAM_HEADERS, **(headers or {})})
        del self.headers["content-length"]
        self._events, self._slow_reader_s, self._left = events, slow_reader_s, left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._write(send))
        except (GoneError, TimeoutError):
            pass
        finally:
            self._left()

    async def _write(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await send(start)
        now = asyncio.get_running_loop().time
        async with asyncio.timeout(None) as slow:
            async for text in self._events:
                slow.reschedule(now() + self._slow_reader_s)
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
                slow.reschedule(None)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class CompleteAnswer(Response):
    """An answer that is sent when it is whole, as JSON.

    Args:
        body: gives it, or raises ApiError.
        left: called in the end, however that comes.
    """

    def __init__(self, body: Coroutine[Any, Any, Any], left: Callable[[], None] = lambda: None) -> None:
        super().__init__(None)
        self._body, self._left = body, left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response: Response = JSONResponse(await while_connected(receive, self._body))
        except GoneError:
            return
        except ApiError as error:
            response = error.response
        finally:
            self._left()
        await response(scope, receive, send)
