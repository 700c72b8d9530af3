"""What OpenAI's two interfaces have in common: their addresses, and the frame of an answer, as events and whole."""

import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from moss_jt.serve.answer_events import Usage
from moss_jt.serve.errors import ApiError
from moss_jt.serve.schemas import Sampling
from moss_jt.serve.service import Service
from moss_jt.serve.streams import DONE, OR_STREAM, Chunks, data_event


def router_at(path: str, answer: Callable[..., Awaitable[Response]]) -> APIRouter:
    """One that answers at /v1/PATH, and at /PATH, as some clients ask."""
    routes = APIRouter(tags=["OpenAI"])
    for prefix in ("/v1", ""):
        options: dict[str, Any] = {"include_in_schema": prefix != "", "responses": OR_STREAM}
        routes.add_api_route(f"{prefix}/{path}", answer, methods=["POST"], **options)
    return routes


class OpenAiForm:
    """See the module; moss_jt.serve.replay.Form is the rest.

    Args:
        prefix: of the answer's id.
        kind: of object that the whole answer is; ``chunk``: that an event is.
    """

    def __init__(
        self, service: Service, asked: Sampling, choices: int, prefix: str, kind: str, chunk: str
    ) -> None:
        self._service = service
        self._choices = choices
        self._usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
        self._progress = bool(asked.return_progress)
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": service.adapter(asked.model) or service.name,
            "system_fingerprint": service.fingerprint,
        }
        self._chunks = Chunks({**self._head, "object": chunk})

    def last(self, usage: Usage) -> Iterator[str]:
        if self._usage:
            yield self._chunks.event({"choices": [], "usage": usage_fields(usage)})
        yield DONE

    def failed(self, error: ApiError) -> Iterator[str]:
        yield data_event(error.body)
        yield DONE

    def _event(self, choice: dict[str, Any], more: dict[str, Any] | None = None) -> str:
        """An event about one choice."""
        usage = {"usage": None} if self._usage else {}
        return self._chunks.event({"choices": [choice], **usage, **(more or {})})

    def _body(self, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        return {**self._head, "choices": choices, "usage": usage_fields(usage)}


def usage_fields(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.new,
        "total_tokens": usage.prompt + usage.new,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }
