"""Answers as responses, streamed or whole; and streams that are taken up again after a lost connection.

A request with the header X-Conversation-Id is answered to its end whether or not its connection stays: GET /v1/stream with that
name and the number of events that were received gives the rest, DELETE ends it. As in llama.cpp's server.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Protocol

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from moss_jt.serve.answer_events import Finished, Usage
from moss_jt.serve.answering import Answering, Part
from moss_jt.serve.errors import CANCELLED, ApiError
from moss_jt.serve.service import Service
from moss_jt.serve.streams import PING, CompleteAnswer, EventStream

NAME_HEADER = "x-conversation-id"
NAME = re.compile(r"[A-Za-z0-9._:-]{1,128}")
STATUS_S = 1.0  # between looks at what a silent answer waits for


class Form(Protocol):
    """How an interface words an answer: events of a stream, each a text, and the whole."""

    def first(self) -> Iterator[str]: ...

    def event(self, event: Any) -> Iterator[str]: ...

    def status(self, status: dict[str, Any]) -> str | None: ...

    def last(self, usage: Usage) -> Iterator[str]: ...

    def failed(self, error: ApiError) -> Iterator[str]: ...

    def body(self, events: Sequence[Any], usage: Usage) -> dict[str, Any]: ...


def respond(
    service: Service,
    request: Request,
    parts: Sequence[Part],
    form: Form,
    stream: bool,
    interface: str,
) -> Response:
    """Have an answer written, and send it.

    Raises:
        ApiError: too many are being written already.
    """
    name = request.headers.get(NAME_HEADER) if stream else None
    if name is not None:
        if not NAME.fullmatch(name):
            raise ApiError(
                400, "X-Conversation-Id has 1 to 128 letters, digits and . _ : -", code="invalid_value"
            )
        running = service.answers.find(name)
        if running is not None and not running.ended:
            raise ApiError(409, "An answer of that name is being written.", code="conflict")
    answering = service.answers.start(parts, name)
    answering.form = form
    counting = asyncio.get_running_loop().create_task(_count(service, answering, interface))
    service.tasks.add(counting)  # the loop itself keeps no hold of it
    counting.add_done_callback(service.tasks.discard)
    left = answering.cancel if name is None else _nothing
    if stream:
        return EventStream(events_of(service, answering, form), service.settings.limits.slow_reader_s, left)
    return CompleteAnswer(_body(answering, form), left)


def _nothing() -> None:
    pass


async def _count(service: Service, answering: Answering, interface: str) -> None:
    await answering.over()
    for event in answering.log:
        if isinstance(event, Finished):
            service.metrics.count(event)
    outcome = "cancelled" if answering.cancelled.is_set() else "done"
    if answering.error is not None and answering.error.code != CANCELLED:
        outcome = "failed"
    service.metrics.answers.labels(interface, outcome).inc()


async def _body(answering: Answering, form: Form) -> dict[str, Any]:
    events, usage = await answering.whole(), Usage()
    for event in events:
        usage = _added(usage, event)
    return form.body(events, usage)


async def events_of(service: Service, answering: Answering, form: Form, start: int = 0) -> AsyncIterator[str]:
    """A stream from its event ``start`` on; what is there together is sent together. Comments and status are not counted."""
    left = start
    silent_s, told = 0.0, None
    usage = Usage()

    def counted(texts: Iterator[str]) -> str:
        nonlocal left
        new = [*texts]
        skipped = min(left, len(new))
        left -= skipped
        return "".join(new[skipped:])

    if text := counted(form.first()):
        yield text
    try:
        async for part in answering.follow(STATUS_S):
            if part:
                silent_s = 0.0
                texts = []
                for event in part:
                    usage = _added(usage, event)
                    texts.append(counted(form.event(event)))
                if text := "".join(texts):
                    yield text
                continue
            silent_s += STATUS_S
            status = answering.status()
            if status is not None and status != told and (shown := form.status(status)) is not None:
                told = status
                yield shown
            elif silent_s >= service.settings.limits.ping_s:
                silent_s = 0.0
                yield PING
    except ApiError as error:
        yield counted(form.failed(error))
        return
    yield counted(form.last(usage))


def _added(usage: Usage, event: Any) -> Usage:
    """The prompt is read once for all choices."""
    if not isinstance(event, Finished):
        return usage
    if event.choice:
        return Usage(usage.prompt or event.usage.prompt, usage.new + event.usage.new, usage.cached)
    return Usage(event.usage.prompt, usage.new + event.usage.new, event.usage.cached)


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["llama.cpp"])

    def named(name: str) -> Answering:
        answering = service.answers.find(name)
        if answering is None:
            raise ApiError(404, "There is no answer of that name, or not any more.", code="not_found")
        return answering

    @routes.get("/v1/stream", status_code=200, response_class=EventStream)
    async def resume(
        conv_id: str = Query(max_length=128), start: int = Query(0, ge=0, le=1 << 31, alias="from")
    ) -> Response:
        """The rest of a stream, from its event ``from`` on."""
        service.model()
        answering = named(conv_id)
        events = events_of(service, answering, answering.form, start)
        return EventStream(events, service.settings.limits.slow_reader_s)

    @routes.delete("/v1/stream", status_code=204)
    async def stop(conv_id: str = Query(max_length=128)) -> Response:
        """End an answer, and forget it."""
        named(conv_id).cancel(ApiError(409, "This answer was ended by DELETE /v1/stream.", code=CANCELLED))
        service.answers.drop(conv_id)
        return Response(status_code=204)

    return routes
