"""POST /inference as MOSS Vortex has it: a conversation's text goes on, and may be streamed to a WebSocket that the client names.

The same members, and none of its faults: what a request asks for holds for that request alone. The address to stream to must be on
the client's own machine, or on one that the server's owner named: a server that connects wherever it is told can be led anywhere.
"""

import asyncio
import datetime
import ipaddress
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import websockets
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response
from websockets.asyncio.client import ClientConnection, connect

from moss_jt.chat.prompt import COMMANDS, HUMAN, MOSS, PromptEncoder, Switch, meta_instruction
from moss_jt.engine.sampling import REGULATION_START, SamplingParams
from moss_jt.errors import MossError
from moss_jt.serve.answering import Answering
from moss_jt.serve.errors import CANCELLED, ApiError, bad_value
from moss_jt.serve.schemas import Natural, Positive
from moss_jt.serve.service import Service
from moss_jt.serve.streams import CompleteAnswer, json_text
from moss_jt.serve.text_answers import Waiting
from moss_jt.store.tokenizer import IncrementalDecoder

if TYPE_CHECKING:
    from moss_jt.moss import Moss

MOST_TOKENS = 512
FRAME_TOKENS = 30
FRAME_S = 5.0  # the published back end gives up after eleven seconds without a frame
CONNECT_S = 10.0
SPOKEN = f"<|{COMMANDS}|>:"


class InferenceRequest(BaseModel):
    """What is not said is Vortex's own default."""

    model_config = ConfigDict(strict=True, populate_by_name=True)
    x: str = Field(min_length=1, description="The conversation's text, without the instruction before it.")
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_k: Natural = 0
    top_p: Annotated[float, Field(ge=0.0001, le=1)] = 0.92
    length_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    max_time: Annotated[float, Field(ge=0.001, le=1e9)] = 50.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.1
    max_iterations: Positive = MOST_TOKENS
    regulation_start: Natural = REGULATION_START
    url: str | None = Field(None, max_length=2000, description="A WebSocket to stream to.")
    web_search: bool = Field(False, alias="Web search")
    calculator: bool = Field(False, alias="Calculator")
    equation_solver: bool = Field(False, alias="Equation solver")
    text_to_image: bool = Field(False, alias="Text-to-image")
    model: str | None = Field(None, max_length=200, description="Ours: the model's name, or an adapter's.")


@dataclass
class PluginSwitch:
    """A switch of the instruction: the client runs what it calls."""

    label: str
    function: str
    argument: str


SWITCHES: dict[str, Switch] = {
    "web_search": PluginSwitch("Web search", "Search", "query"),
    "calculator": PluginSwitch("Calculator", "Calculate", "expression"),
    "equation_solver": PluginSwitch("Equation solver", "Solve", "equation"),
    "text_to_image": PluginSwitch("Text-to-image", "Text2Image", "description"),
}


@dataclass(frozen=True)
class Prompt:
    """
    text    the client's, as far as the context has room for it
    """

    text: str
    token_ids: list[int]


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["MOSS Vortex"])

    @routes.post("/inference", response_model=None)
    async def inference(asked: InferenceRequest, request: Request) -> Response:
        """Write on, up to the answer's end, or that of its commands."""
        moss, adapter = service.model(asked.model), service.adapter(asked.model)
        prompt = await service.aside(prompt_of, moss, asked)
        params = params_of(asked)
        target = None if asked.url is None else await allowed(asked.url, service, request)
        answering = service.answers.start([partial(write, moss, asked, prompt, params, adapter)])
        if target is not None:
            task = asyncio.get_running_loop().create_task(stream(target, answering))
            service.tasks.add(task)
            task.add_done_callback(service.tasks.discard)
        gone = ApiError(409, "The request's connection was closed.", code=CANCELLED)
        return CompleteAnswer(_answer(prompt, answering), partial(answering.cancel, gone))

    return routes


def params_of(asked: InferenceRequest) -> SamplingParams:
    try:
        return SamplingParams(
            asked.temperature,
            asked.top_k,
            asked.top_p,
            asked.repetition_penalty,
            length_penalty=asked.length_penalty,
            regulation_start=asked.regulation_start,
        )
    except MossError as error:
        raise bad_value(error) from error


def prompt_of(moss: "Moss", asked: InferenceRequest) -> Prompt:
    """The instruction, today's date, and the end of the text that the context has room for, from where a user speaks.

    Raises:
        ApiError: no such end fits.
    """
    plugins = [switch for name, switch in SWITCHES.items() if getattr(asked, name)]
    date = f"- Current date: {datetime.date.today().isoformat()}.\n"
    prefix = moss.tokenizer.encode(meta_instruction(plugins) + date)
    free = moss.model.capacity - min(asked.max_iterations, MOST_TOKENS) - len(prefix)
    text = asked.x
    token_ids = moss.tokenizer.encode(text)
    if len(token_ids) >= free:
        end = moss.tokenizer.decode(token_ids[-max(free, 0) :]) if free > 0 else ""
        start = end.find(f"<|{HUMAN}|>")
        if start < 0:
            raise ApiError(
                400,
                f"The text has {len(token_ids)} tokens, the context has room for {max(free, 0)}, and no turn begins in these.",
                "x",
                "context_length_exceeded",
            )
        text = end[start:]
        token_ids = moss.tokenizer.encode(text)
    return Prompt(text, [*prefix, *token_ids])


def write(
    moss: "Moss",
    asked: InferenceRequest,
    prompt: Prompt,
    params: SamplingParams,
    adapter: str | None,
    answering: Answering,
) -> None:
    """Write on; the log gets each token's text, special tokens included."""
    text = moss.session(adapter=adapter)
    text.extend(prompt.token_ids)
    answering.when_cancelled(text.cancel)
    answering.status = Waiting(text).status
    ends = PromptEncoder(moss.tokenizer).ends
    decoder, written = IncrementalDecoder(moss.tokenizer), ""
    most = min(asked.max_iterations, MOST_TOKENS)
    for token in text.decode(params, most, {ends[MOSS], *moss.stop_ids}, asked.max_time):
        piece = decoder.push(token)
        written += piece
        answering.put(piece)
        if token in ends.values() and SPOKEN in written:
            break
        if answering.cancelled.is_set():
            return
    if rest := decoder.finish():
        answering.put(rest)


async def _answer(prompt: Prompt, answering: Answering) -> dict[str, Any]:
    pieces = await answering.whole()
    written = "".join(pieces)
    return {
        "pred": prompt.text + written,
        "input_token_num": len(prompt.token_ids),
        "new_generations_token_num": len(pieces),
        "new_generations": written,
    }


@dataclass(frozen=True)
class Target:
    """Where to stream: the address that was looked up is the one that is connected to."""

    url: str
    host: str
    port: int


async def allowed(url: str, service: Service, request: Request) -> Target:
    """The address, if it is the client's own, or one that the owner named.

    Raises:
        ApiError: it is another, or none.
    """
    refused = ApiError(
        400, "url must be a ws:// address on the client's own machine, or one that the server's owner named.", "url",
        "invalid_value",
    )  # fmt: skip
    try:
        parts = urlsplit(url)
        name, port = parts.hostname or "", parts.port or (443 if parts.scheme == "wss" else 80)
    except ValueError:
        raise refused from None
    if parts.scheme not in ("ws", "wss") or not name or parts.username is not None:
        raise refused
    try:
        addresses = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise refused from None
    for *_, address in addresses:
        if name in service.settings.streams or _same(str(address[0]), request):
            return Target(url, str(address[0]), port)
    raise refused


def _same(address: str, request: Request) -> bool:
    client = request.client.host if request.client is not None else ""
    try:
        one, other = ipaddress.ip_address(address), ipaddress.ip_address(client)
    except ValueError:
        return False
    return one == other or (one.is_loopback and other.is_loopback)


async def stream(target: Target, answering: Answering) -> None:
    """Send the text so far, every FRAME_TOKENS tokens and every FRAME_S seconds, and an end. Whoever does not listen misses it."""
    options: dict[str, Any] = {
        "host": target.host,
        "port": target.port,
        "open_timeout": CONNECT_S,
        "proxy": None,
    }
    try:
        async with connect(target.url, **options) as connection:
            try:
                async for output in _outputs(answering):
                    await _send(connection, {"status": 1, "offset": 0, "output": output})
                await _send(connection, {"status": 0, "offset": 0, "output": None})
            except ApiError as error:
                await _send(connection, {"status": -1, "offset": 0, "output": error.message})
    except (OSError, TimeoutError, ValueError, websockets.WebSocketException):
        return


async def _outputs(answering: Answering) -> AsyncIterator[str]:
    text, tokens = "", 0
    async for part in answering.follow(FRAME_S):
        text += "".join(part)
        tokens += len(part)
        if tokens >= FRAME_TOKENS or not part:
            tokens = 0
            yield text
    if tokens or not text:
        yield text


async def _send(connection: ClientConnection, frame: dict[str, Any]) -> None:
    async with asyncio.timeout(CONNECT_S):
        await connection.send(json_text(frame))
