"""Every body of OpenAI's interface against what OpenAI publishes: the types of its Python package, and its OpenAPI document.

The document is large, and no part of this project: MOSS_JT_OPENAPI says where it is (openapi.json of
github.com/openai/openai-openapi). Without it, those tests are skipped.
"""

import json
import os
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams
from pydantic import BaseModel, ConfigDict, TypeAdapter

from moss_jt.serve.schemas import ChatRequest, CompletionRequest
from tests.support.serving import NAME, client, served, shared_moss, shared_server

DOCUMENT = os.environ.get("MOSS_JT_OPENAPI", "")
HELLO = [{"role": "user", "content": "Hello"}]
SUM = [{"role": "user", "content": "What is 37 times 48?"}]
USAGE = {"stream_options": {"include_usage": True}}
# What is ours beside OpenAI's members: clients ignore what they do not know.
OURS = {"moss", "reasoning_content"}
CHATS: list[dict[str, Any]] = [
    {"messages": HELLO, "plugins": []},
    {"messages": SUM},
    {"messages": SUM, "n": 2, **USAGE},
    {"messages": HELLO, "logprobs": True, "top_logprobs": 3, "max_tokens": 3},
    {"messages": HELLO, "logprobs": True, "stop": "I", "n": 2, **USAGE},
    {"messages": HELLO, "plugins": [], "max_completion_tokens": 1, "return_progress": True},
]
COMPLETIONS: list[dict[str, Any]] = [
    {"prompt": "a"},
    {"prompt": ["a", "你好"], "n": 2, "logprobs": 2, **USAGE},
    {"prompt": [300, 301, 302], "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0},
    {"prompt": [[300], [301]], "echo": True, "max_tokens": 0},
]
# What would be of no effect here, and is: OpenAI's own bookkeeping, and hints.
PASSED_OVER = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier",
    "service_tier", "store", "user",
}  # fmt: skip


class Error(BaseModel):
    """OpenAI's package has no type for it: its client reads these members."""

    model_config = ConfigDict(extra="allow")
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: Error


class Models(BaseModel):
    object: str
    data: list[Model]


TYPES: dict[str, TypeAdapter[Any]] = {
    "CreateChatCompletionResponse": TypeAdapter(ChatCompletion),
    "CreateChatCompletionStreamResponse": TypeAdapter(ChatCompletionChunk),
    "CreateCompletionResponse": TypeAdapter(Completion),
    "Model": TypeAdapter(Model),
    "ListModelsResponse": TypeAdapter(Models),
    "ErrorResponse": TypeAdapter(ErrorBody),
}


def body_of(answer: httpx.Response) -> dict[str, Any]:
    fields: dict[str, Any] = answer.json()
    return fields


def chunks_of(answer: httpx.Response) -> list[dict[str, Any]]:
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert answer.status_code == 200 and lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def bodies_of_answers(http: httpx.Client) -> Iterator[tuple[str, dict[str, Any]]]:
    for asked in CHATS:
        yield "CreateChatCompletionResponse", body_of(http.post("/v1/chat/completions", json=asked))
        for chunk in chunks_of(http.post("/v1/chat/completions", json={**asked, "stream": True})):
            yield "CreateChatCompletionStreamResponse", chunk
    for asked in COMPLETIONS:
        yield "CreateCompletionResponse", body_of(http.post("/v1/completions", json=asked))
        for chunk in chunks_of(http.post("/v1/completions", json={**asked, "stream": True})):
            for choice in chunk["choices"]:
                # A stream's reason comes in the end. The schema, which is that of whole answers, knows no null, and OpenAI's own
                # server says null all the same.
                choice["finish_reason"] = choice["finish_reason"] or "stop"
            if chunk.get("usage", 0) is None:
                del chunk["usage"]
            yield "CreateCompletionResponse", chunk
    yield "ListModelsResponse", body_of(http.get("/v1/models"))
    yield "Model", body_of(http.get(f"/v1/models/{NAME}"))


def bodies_of_errors(http: httpx.Client) -> Iterator[tuple[int, dict[str, Any]]]:
    for status, method, path, asked in (
        (400, "POST", "/v1/chat/completions", {"messages": []}),
        (400, "POST", "/v1/chat/completions", {"messages": HELLO, "tools": [{}]}),
        (400, "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 3000}]}),
        (400, "POST", "/v1/completions", {"prompt": "a", "logit_bias": {"999999": 1}}),
        (404, "POST", "/v1/completions", {"prompt": "a", "model": "gpt-9"}),
        (404, "GET", "/v1/models/gpt-9", None),
        (404, "GET", "/nothing", None),
        (405, "GET", "/v1/chat/completions", None),
        (404, "POST", "/v1/embeddings", {"input": "a"}),
        (413, "POST", "/v1/completions", {"prompt": "a" * (3 << 20)}),
    ):
        answer = http.request(method, path, json=asked)
        assert answer.status_code == status
        yield status, body_of(answer)


@cache
def all_bodies() -> list[tuple[str, dict[str, Any]]]:
    """Each with its name in OpenAI's document."""
    with client(shared_server()) as http:
        return [*bodies_of_answers(http), *(("ErrorResponse", body) for _, body in bodies_of_errors(http))]


def test_every_body_is_what_the_python_package_says() -> None:
    for name, body in all_bodies():
        TYPES[name].validate_json(json.dumps(body), strict=True)
    assert {name for name, _ in all_bodies()} == {*TYPES}


def test_a_server_that_refuses_says_so_in_openai_s_form(tmp_path: Path) -> None:
    with served(None, tmp_path, keys=["secret"]) as server, client(server) as http:
        for status, key in ((401, "wrong"), (503, "secret")):
            headers = {"Authorization": f"Bearer {key}"}
            answer = http.post("/v1/chat/completions", json=CHATS[0], headers=headers)
            assert answer.status_code == status
            TYPES["ErrorResponse"].validate_json(answer.text, strict=True)


def strays(body: Any, known: type[BaseModel]) -> set[str]:
    """Members that OpenAI's types have not."""
    found: set[str] = set()
    model = known.model_validate(body)
    unknown: list[Any] = [model]
    while unknown:
        one = unknown.pop()
        if isinstance(one, BaseModel):
            found |= {*(one.model_extra or {})}
            unknown += [getattr(one, name) for name in type(one).model_fields]
        elif isinstance(one, list):
            unknown += one
    return found


def test_nothing_stands_in_them_that_openai_has_not_but_what_is_ours() -> None:
    kinds: dict[str, type[BaseModel]] = {
        "CreateChatCompletionResponse": ChatCompletion,
        "CreateChatCompletionStreamResponse": ChatCompletionChunk,
        "CreateCompletionResponse": Completion,
        "Model": Model,
    }
    found = {name: set() for name in kinds}
    for name, body in all_bodies():
        if name in kinds:
            found[name] |= strays(body, kinds[name])
    assert found["CreateChatCompletionResponse"] == found["CreateChatCompletionStreamResponse"] == OURS
    assert not found["CreateCompletionResponse"] and not found["Model"]


def test_whatever_a_request_may_have_is_done_or_refused_or_known_to_change_nothing() -> None:
    for published, ours in ((ChatParams, ChatRequest), (CompletionParams, CompletionRequest)):
        assert {*published.__annotations__} - {*ours.model_fields} <= PASSED_OVER


@cache
def document() -> dict[str, Any]:
    if not DOCUMENT:
        pytest.skip("MOSS_JT_OPENAPI does not say where OpenAI's openapi.json is")
    schemas = deepcopy(json.loads(Path(DOCUMENT).read_text())["components"])
    return {"components": _with_null(schemas)}


def _with_null(schema: Any) -> Any:
    """``nullable`` is OpenAPI 3.0's, which the document still has in places; JSON Schema knows it not."""
    if isinstance(schema, list):
        return [_with_null(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    known = {name: _with_null(one) for name, one in schema.items() if name != "nullable"}
    return {"anyOf": [known, {"type": "null"}]} if schema.get("nullable") is True else known


def test_every_body_is_what_the_published_document_says() -> None:
    for name in TYPES:
        validator = Draft202012Validator({"$ref": f"#/components/schemas/{name}", **document()})
        bodies = [body for kind, body in all_bodies() if kind == name]
        faults = [error.message[:300] for body in bodies for error in validator.iter_errors(body)]
        assert bodies and not faults, f"{name}: {faults[:3]}"
        assert [*validator.iter_errors({})], "and what is no such body is refused"


def test_every_request_that_is_answered_is_one_by_the_published_document() -> None:
    for name, asked in (("CreateChatCompletionRequest", CHATS), ("CreateCompletionRequest", COMPLETIONS)):
        validator = Draft202012Validator({"$ref": f"#/components/schemas/{name}", **document()})
        for body in asked:
            assert not [*validator.iter_errors({"model": NAME, **body})]
    assert shared_moss().config.vocab_size > 302
