"""POST /v1/completions: any text goes on, as it is. Special tokens that are written in it count as such."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from moss_jt.serve.answer_events import Finished, Token, Usage, Words
from moss_jt.serve.answering import Part
from moss_jt.serve.errors import ApiError
from moss_jt.serve.openai_form import OpenAiForm, router_at
from moss_jt.serve.replay import respond
from moss_jt.serve.schemas import CompletionRequest
from moss_jt.serve.service import Service
from moss_jt.serve.text_answers import Wanted, write_plain
from moss_jt.store.tokenizer import BYTE_ORDER_MARK, Tokenizer

DEFAULT_TOKENS = 16
MOST_CHOICES = 128


def router(service: Service) -> APIRouter:
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        service.model(asked.model)
        parts = await service.aside(prepared, service, asked)
        form = CompletionForm(service, asked, len(parts))
        return respond(service, request, parts, form, bool(asked.stream), "completion")

    return router_at("completions", completions)


def prepared(service: Service, asked: CompletionRequest) -> list[Part]:
    """What writes the choices: n of each prompt.

    Raises:
        ApiError: something is wrong with the request.
    """
    moss, adapter = service.model(asked.model), service.adapter(asked.model)
    params = service.params(asked)
    stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    parts: list[Part] = []
    for token_ids in prompts_of(asked.prompt, moss.tokenizer):
        if max(token_ids) >= moss.config.vocab_size:
            message = f"prompt: ids of tokens are 0 to {moss.config.vocab_size - 1}."
            raise ApiError(400, message, "prompt", "invalid_value")
        most = DEFAULT_TOKENS if asked.max_tokens is None else asked.max_tokens
        most = min(most, service.check_length(len(token_ids)))
        limits = most, moss.stop_ids, stops, None, asked.logprobs, bool(asked.echo)
        wanted = Wanted(token_ids, params, *limits, adapter=adapter)
        for _ in range(asked.n or 1):
            parts.append(partial(write_plain, moss, wanted, len(parts)))
    if len(parts) > MOST_CHOICES:
        raise ApiError(
            400, f"n times the prompts are {len(parts)}; {MOST_CHOICES} are possible.", "n", "invalid_value"
        )
    return parts


def prompts_of(prompt: Any, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of each prompt, in whichever of OpenAI's four forms they came."""
    several = prompt if isinstance(prompt, list) and isinstance(prompt[0], str | list) else [prompt]
    prompts = [
        tokenizer.encode(one.removeprefix(BYTE_ORDER_MARK)) if isinstance(one, str) else [*one]
        for one in several
    ]
    if not all(prompts):
        raise ApiError(400, "prompt: there is no text to continue.", "prompt", "invalid_value")
    return prompts


class CompletionForm(OpenAiForm):
    """What an answer looks like: as events, and whole."""

    def __init__(self, service: Service, asked: CompletionRequest, choices: int) -> None:
        super().__init__(service, asked, choices, "cmpl", "text_completion", "text_completion")
        self._logprobs = asked.logprobs

    def first(self) -> Iterator[str]:
        yield self._chunk(0, "")

    def event(self, event: Any) -> Iterator[str]:
        if isinstance(event, Words):
            yield self._chunk(event.choice, event.text, event.tokens)
        elif isinstance(event, Finished) and event.reason is not None:
            yield self._chunk(event.choice, "", (), event.reason)

    def status(self, status: dict[str, Any]) -> str | None:
        return self._event(self._choice(0, "", ()), {"moss": status}) if self._progress else None

    def body(self, events: Sequence[Any], usage: Usage) -> dict[str, Any]:
        texts = [""] * self._choices
        tokens: list[list[Token]] = [[] for _ in texts]
        reasons: list[str | None] = [None] * self._choices
        for event in events:
            if isinstance(event, Words):
                texts[event.choice] += event.text
                tokens[event.choice] += event.tokens
            elif isinstance(event, Finished):
                reasons[event.choice] = event.reason
        choices = [
            self._choice(index, texts[index], tokens[index], reasons[index]) for index in range(len(texts))
        ]
        return self._body(choices, usage)

    def _choice(
        self, index: int, text: str, tokens: Sequence[Token], reason: str | None = None
    ) -> dict[str, Any]:
        logprobs = None
        if self._logprobs is not None:
            logprobs = legacy_logprobs(self._service.model().tokenizer, tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _chunk(self, index: int, text: str, tokens: Sequence[Token] = (), reason: str | None = None) -> str:
        return self._event(self._choice(index, text, tokens, reason))


def legacy_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict[str, Any]:
    """OpenAI's old form. A text's first token follows nothing, and its schema wants a number there: 0."""
    tops: list[dict[str, float]] = []
    for token in tokens:
        if token.logprob is None:
            tops.append({})
            continue
        top: dict[str, float] = {}
        for one, logprob in token.logprob.top:
            # Tokens that are parts of characters may read the same: the likeliest of them stays.
            top.setdefault(tokenizer.token_bytes(one).decode("utf-8", "replace"), logprob)
        top.setdefault(token.bytes.decode("utf-8", "replace"), token.logprob.logprob)
        tops.append(top)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [0.0 if token.logprob is None else token.logprob.logprob for token in tokens],
        "top_logprobs": tops,
        "text_offset": [token.offset for token in tokens],
    }
