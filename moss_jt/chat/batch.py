"""Many prompts from lines of JSON, and their answers as lines of JSON, in the same order.

A line is one of three: {"prompt": TEXT}, {"messages": [{"role": .., "content": ..}, ..]}, or a line of OpenAI's batch files
({"custom_id", "method", "url", "body"}), which is answered in that form. A line that cannot be answered gets an error, and the
others their answers.
"""

import hashlib
import json
import re
import time
from collections.abc import Collection
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from moss_jt.chat.messages import ROLES, Message, conversation_of
from moss_jt.chat.prompt import PromptEncoder
from moss_jt.engine.sampling import SamplingParams
from moss_jt.errors import MossError
from moss_jt.store.tokenizer import Tokenizer

CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"
# Names of options in a line or a request's body, and ours.
SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "seed",
    "length_penalty",
    "regulation_start",
    "presence_penalty",
    "frequency_penalty",
    "min_p",
)
LIMITS = {
    "max_new_tokens": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
}
# What OpenAI's requests may hold that changes the answer, and that is not done here.
UNSUPPORTED = {
    "n": 1, "tools": None, "functions": None, "response_format": None, "logprobs": None, "suffix": None,
    "echo": False, "best_of": 1,
}  # fmt: skip
# What may stand there and changes no answer; "metadata" is the user's own.
IGNORED = (
    "metadata", "model", "user", "store", "stream", "stream_options", "service_tier", "safety_identifier", "prompt_cache_key",
)  # fmt: skip
# Of a line of results: the answer to a line of prompts, its error, an error of a line that was changed since, or none of it.
Standing = Literal["answer", "error", "old error", "foreign"]


@dataclass(frozen=True)
class Request:
    """One line, understood.

    custom_id  OpenAI's name of the line; None for lines in our own form
    chat       its answer is a message
    adapter    with which it is answered; None for the model alone
    """

    token_ids: list[int]
    params: SamplingParams
    max_new_tokens: int
    stop: list[str]
    custom_id: str | None = None
    chat: bool = False
    adapter: str | None = None


@dataclass(frozen=True)
class Defaults:
    """What holds where a line does not say otherwise.

    adapters  that a line may name; it has none where it does not
    """

    params: SamplingParams
    max_new_tokens: int
    adapters: Collection[str] = ()


def parse_line(line: str, tokenizer: Tokenizer, defaults: Defaults) -> Request:
    """
    Raises:
        MossError: the line is none of the three forms, or asks for something that is not done.
    """
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MossError(f"the line is not JSON ({error}).") from error
    if not isinstance(fields, dict):
        raise MossError("the line is not a JSON object.")
    if "custom_id" not in fields:
        return _request(fields, tokenizer, defaults, "messages" in fields)
    custom_id, url, body = fields["custom_id"], fields.get("url"), fields.get("body")
    if not isinstance(custom_id, str) or not isinstance(body, dict):
        raise MossError("custom_id must be text, and body an object.")
    if fields.get("method", "POST") != "POST" or url not in (CHAT_URL, TEXT_URL):
        raise MossError(f"only POST to {CHAT_URL} and {TEXT_URL} is supported.")
    return _request(body, tokenizer, defaults, url == CHAT_URL, custom_id)


def _request(
    fields: dict[str, Any], tokenizer: Tokenizer, defaults: Defaults, chat: bool, custom_id: str | None = None
) -> Request:
    _check_names(fields, "messages" if chat else "prompt")
    for name, neutral_value in UNSUPPORTED.items():
        if fields.get(name, neutral_value) not in (neutral_value, None):
            raise MossError(f"{name} is not supported.")
    sampling = {name: _number(fields, name) for name in SAMPLING if fields.get(name) is not None}
    sampling |= {"logit_bias": _biases(fields["logit_bias"])} if fields.get("logit_bias") else {}
    limits = [_number(fields, name) for name in LIMITS if fields.get(name) is not None]
    stop = fields.get("stop") or []
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(one, str) for one in stops):
        raise MossError("stop must be text, or a list of texts.")
    return Request(
        token_ids=_messages(fields.get("messages"), tokenizer)
        if chat
        else _prompt(fields.get("prompt"), tokenizer),
        params=SamplingParams(**(vars(defaults.params) | sampling)),
        max_new_tokens=int(limits[0]) if limits else defaults.max_new_tokens,
        stop=stops,
        custom_id=custom_id,
        chat=chat,
        adapter=_adapter(fields, defaults.adapters),
    )


def _adapter(fields: dict[str, Any], adapters: Collection[str]) -> str | None:
    """The adapter that a line names, or asks for as its model, as requests to a server do."""
    name = fields.get("adapter")
    if name is None:
        model = fields.get("model")
        return model if isinstance(model, str) and model in adapters else None
    if not isinstance(name, str) or name not in adapters:
        raise MossError(f"there is no adapter {name!r:.80}; there are {', '.join(adapters) or 'none'}.")
    return name


def _check_names(fields: dict[str, Any], text: str) -> None:
    """
    Raises:
        MossError: an option has a name that is none: it would be passed over, and the answer be another than was asked for.
    """
    known = (text, "stop", "logit_bias", "adapter", *SAMPLING, *LIMITS)
    for name in fields.keys() - {*known, *IGNORED, *UNSUPPORTED}:
        close = get_close_matches(name, known, 1)
        meant = f"did you mean {close[0]}?" if close else 'what is your own goes into "metadata".'
        raise MossError(f"{name!r:.80} is not an option; {meant}")


def _number(fields: dict[str, Any], name: str) -> Any:
    value = fields[name]
    integral = name in ("top_k", "seed", "regulation_start", *LIMITS)
    if isinstance(value, bool) or not isinstance(value, int if integral else (int, float)):
        raise MossError(f"{name} must be a {'whole ' if integral else ''}number.")
    return value


def _biases(given: Any) -> dict[int, Any]:
    """JSON's objects have texts for names."""
    if not isinstance(given, dict) or not all(token.isascii() and token.isdigit() for token in given):
        raise MossError("logit_bias must be an object of token ids and numbers.")
    return {int(token): bias for token, bias in given.items()}


def _prompt(prompt: Any, tokenizer: Tokenizer) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return list(prompt)
    raise MossError("prompt must be text, or a list of token ids.")


def _messages(messages: Any, tokenizer: Tokenizer) -> list[int]:
    """A conversation without plugins, up to where MOSS writes."""
    if not isinstance(messages, list) or not messages:
        raise MossError("messages must be a list of objects with a role and a content.")
    conversation = conversation_of([_message(message) for message in messages])
    return PromptEncoder(tokenizer).encode(conversation.segments())


def _message(message: Any) -> Message:
    role = message.get("role") if isinstance(message, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if role not in ROLES or not isinstance(content, str):
        raise MossError(f"a message has a role ({', '.join(ROLES)}) and a content that is text.")
    return Message(str(role), content)


def custom_id_of(line: str) -> str | None:
    """OpenAI's name of a line, whatever else is wrong with it."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    name = fields.get("custom_id") if isinstance(fields, dict) else None
    return name if isinstance(name, str) else None


@dataclass(frozen=True)
class Done:
    """What became of a request."""

    text: str
    prompt_tokens: int
    new_tokens: int
    stop_reason: str | None


def mark_of(line: str) -> str:
    """What tells a line of prompts from others, so that an answer is never taken for another line's."""
    return hashlib.sha256(line.strip().encode(errors="surrogatepass")).hexdigest()[:16]


def answer_line(number: int, model: str, line: str, request: Request, done: Done) -> str:
    """The answer to line ``number`` as one line of JSON."""
    text = done.text.strip() if request.chat else done.text
    if request.custom_id is None:
        fields: dict[str, Any] = {
            "index": number,
            "line": mark_of(line),
            "model": model,
            "text": text,
            "prompt_tokens": done.prompt_tokens,
            "new_tokens": done.new_tokens,
            "stop_reason": done.stop_reason,
        }
        return json.dumps(fields, ensure_ascii=False)
    finish = "stop" if done.stop_reason in ("eos", "stop") else "length"
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
    if request.chat:
        choice["message"] = {"role": "assistant", "content": text, "refusal": None}
    else:
        choice["text"] = text
    body = {
        "id": f"{'chatcmpl' if request.chat else 'cmpl'}-{number}",
        "object": "chat.completion" if request.chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": done.prompt_tokens,
            "completion_tokens": done.new_tokens,
            "total_tokens": done.prompt_tokens + done.new_tokens,
        },
    }
    response = {"status_code": 200, "request_id": f"request-{number}", "body": body}
    return _openai_line(number, line, request.custom_id, response, None)


def error_line(number: int, model: str, line: str, message: str) -> str:
    custom_id = custom_id_of(line)
    if custom_id is None:
        fields = {"index": number, "line": mark_of(line), "model": model, "error": message}
        return json.dumps(fields, ensure_ascii=False)
    return _openai_line(number, line, custom_id, None, {"code": "invalid_request", "message": message})


def _openai_line(number: int, line: str, custom_id: str, response: Any, error: Any) -> str:
    fields = {
        "id": f"batch_req_{number}_{mark_of(line)}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return json.dumps(fields, ensure_ascii=False)


def standing(answer: str, number: int, model: str, line: str) -> Standing:
    """What a line of results is to line ``number`` of the prompts."""
    try:
        fields = json.loads(answer)
    except (ValueError, RecursionError):
        return "foreign"
    if not isinstance(fields, dict):
        return "foreign"
    if "custom_id" in fields:
        response = fields.get("response")
        body = response.get("body") if isinstance(response, dict) else {"model": model}
        said = body.get("model") if isinstance(body, dict) else None
        whose = re.fullmatch(r"batch_req_(\d+)_([0-9a-f]+)", str(fields.get("id")))
        index, mark = (int(whose[1]), whose[2]) if whose else (None, None)
    else:
        index, mark, said = fields.get("index"), fields.get("line"), fields.get("model")
    if (index, said) != (number, model):
        return "foreign"
    if mark == mark_of(line):
        return "error" if fields.get("error") else "answer"
    return "old error" if fields.get("error") else "foreign"
