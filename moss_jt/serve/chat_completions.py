"""POST /v1/chat/completions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from moss_jt.chat.field_reader import MARKERS
from moss_jt.chat.messages import Message, conversation_of
from moss_jt.chat.prompt import PromptEncoder
from moss_jt.errors import MossError
from moss_jt.serve.answer_events import Extra, Finished, Thinking, Token, Usage, Words
from moss_jt.serve.answering import Part
from moss_jt.serve.errors import ApiError, bad_value
from moss_jt.serve.openai_form import OpenAiForm, router_at
from moss_jt.serve.replay import respond
from moss_jt.serve.schemas import ChatRequest
from moss_jt.serve.service import Service
from moss_jt.serve.text_answers import Wanted, write_plain
from moss_jt.serve.turn_answers import WantedTurn, write_turn
from moss_jt.store.tokenizer import Tokenizer


def router(service: Service) -> APIRouter:
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        service.model(asked.model)
        parts = await service.aside(prepared, service, asked)
        form = ChatForm(service, asked)
        return respond(service, request, parts, form, bool(asked.stream), "chat")

    return router_at("chat/completions", chat_completions)


def prepared(service: Service, asked: ChatRequest) -> list[Part]:
    """What writes the choices. Whatever is wrong with the request is said here.

    Raises:
        ApiError: something is.
    """
    moss, adapter = service.model(asked.model), service.adapter(asked.model)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true.", "top_logprobs", "invalid_value")
    try:
        messages = [Message(message.role, message.text) for message in asked.messages]
        conversation = conversation_of(messages)
        encoder = PromptEncoder(moss.tokenizer, service.name)
    except MossError as error:
        raise bad_value(error, "messages") from error
    plugins = service.plugins(asked.plugins)
    if plugins and asked.logprobs:
        if asked.plugins is not None:
            raise ApiError(
                400, "logprobs are not done where plugins are on.", "logprobs", "unsupported_parameter"
            )
        plugins = []  # nobody asked for them
    system = service.settings.system
    token_ids = encoder.encode(conversation.segments(plugins, system))
    free = service.check_length(len(token_ids))
    params = service.params(asked)
    most = min(asked.max_completion_tokens or asked.max_tokens or free, free)
    stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    choices = range(asked.n or 1)
    if plugins:
        turn = WantedTurn(conversation, plugins, params, most, stops, system, adapter)
        return [partial(write_turn, moss, turn, choice) for choice in choices]
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    stop_ids = encoder.special | moss.stop_ids
    limits = most, stop_ids, [*stops, *MARKERS], None, logprobs
    wanted = Wanted(token_ids, params, *limits, lead=True, adapter=adapter)
    return [partial(write_plain, moss, wanted, choice) for choice in choices]


@dataclass
class Choice:
    """What has come of one choice."""

    text: str = ""
    thoughts: str = ""
    tokens: list[Token] = field(default_factory=list)
    extras: list[dict[str, Any]] = field(default_factory=list)
    reason: str | None = None


class ChatForm(OpenAiForm):
    """What an answer looks like: as events, and whole."""

    def __init__(self, service: Service, asked: ChatRequest) -> None:
        kinds = "chatcmpl", "chat.completion", "chat.completion.chunk"
        super().__init__(service, asked, asked.n or 1, *kinds)
        self._logprobs = bool(asked.logprobs)

    def first(self) -> Iterator[str]:
        for index in range(self._choices):
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def event(self, event: Any) -> Iterator[str]:
        if isinstance(event, Words):
            yield self._chunk(event.choice, {"content": event.text}, self._likely(event.tokens))
        elif isinstance(event, Thinking):
            yield self._chunk(event.choice, {"reasoning_content": event.text})
        elif isinstance(event, Extra):
            yield self._chunk(event.choice, {}, {}, {"moss": event.fields})
        elif isinstance(event, Finished) and event.reason is not None:
            yield self._chunk(event.choice, {}, {"finish_reason": event.reason})

    def status(self, status: dict[str, Any]) -> str | None:
        return self._chunk(0, {}, {}, {"moss": status}) if self._progress else None

    def body(self, events: Sequence[Any], usage: Usage) -> dict[str, Any]:
        choices = [Choice() for _ in range(self._choices)]
        for event in events:
            choice = choices[event.choice]
            if isinstance(event, Words):
                choice.text += event.text
                choice.tokens += event.tokens
            elif isinstance(event, Thinking):
                choice.thoughts += event.text
            elif isinstance(event, Extra):
                choice.extras.append(event.fields)
            elif isinstance(event, Finished):
                choice.reason = event.reason
        return self._body(
            [self._complete_choice(index, choice) for index, choice in enumerate(choices)], usage
        )

    def _complete_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.thoughts:
            message["reasoning_content"] = choice.thoughts
        if choice.extras:
            message["moss"] = choice.extras
        logprobs = {"logprobs": None, **self._likely(choice.tokens)}
        return {"index": index, "message": message, **logprobs, "finish_reason": choice.reason}

    def _likely(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """The member of a choice that says how likely its tokens were, where that was asked for."""
        if not self._logprobs:
            return {}
        tokenizer = self._service.model().tokenizer
        content = [token_fields(tokenizer, token) for token in tokens]
        return {"logprobs": {"content": content, "refusal": None}}

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        choice: dict[str, Any] | None = None,
        more: dict[str, Any] | None = None,
    ) -> str:
        fields = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **(choice or {})}
        return self._event(fields, more)


def token_fields(tokenizer: Tokenizer, token: Token) -> dict[str, Any]:
    """A token and the likeliest in its place, in OpenAI's form."""
    assert token.logprob is not None
    return {
        "token": token.text,
        "logprob": token.logprob.logprob,
        "bytes": [*token.bytes],
        "top_logprobs": [
            {
                "token": (raw := tokenizer.token_bytes(one)).decode("utf-8", "replace"),
                "logprob": logprob,
                "bytes": [*raw],
            }
            for one, logprob in token.logprob.top
        ],
    }
