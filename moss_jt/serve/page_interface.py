"""What the page asks: conversations that the server keeps, and their answers as they are written. docs/serving.md lists it all."""

import dataclasses
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field
from starlette.responses import FileResponse, Response

from moss_jt.chat.saved import About
from moss_jt.engine.sampling import SamplingParams
from moss_jt.errors import MossError
from moss_jt.serve.conversation import Question, ServedConversation, turn_fields
from moss_jt.serve.errors import ApiError, bad_value
from moss_jt.serve.kept_conversations import ConversationStore
from moss_jt.serve.schemas import Body, Integral, Natural, Positive
from moss_jt.serve.service import SEEDS, Service
from moss_jt.serve.streams import PING, EventStream, named_event

STATUS_S = 1.0
MESSAGE_CHARACTERS = 1 << 20
PICTURE = re.compile(r"[\w-][\w.-]{0,200}\.(?:png|jpe?g)", re.IGNORECASE)
SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")


class Sampling(BaseModel):
    """How tokens are chosen; what is left out stays as it is, and null is the server's own value."""

    model_config = Body
    temperature: Annotated[float, Field(ge=0, le=5)] | None = None
    top_k: Natural | None = None
    top_p: Annotated[float, Field(ge=0.0001, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    seed: Annotated[int, Field(ge=0), Integral] | None = None
    max_new_tokens: Positive | None = None


class Change(BaseModel):
    """What is left out stays as it is."""

    model_config = Body
    title: str | None = Field(None, max_length=200)
    plugins: list[str] | None = Field(None, max_length=50)
    system: str | None = Field(None, max_length=100_000)
    sampling: Sampling | None = None
    model: str | None = Field(None, max_length=200, description="The model's name, or an adapter's.")


class Message(BaseModel):
    model_config = Body
    message: str = Field(min_length=1, max_length=MESSAGE_CHARACTERS, pattern=r"\S")


def router(service: Service, store: ConversationStore) -> APIRouter:
    routes = APIRouter(prefix="/api", tags=["conversations"])
    _add_server(routes, service)
    _add_conversations(routes, service, store)
    _add_answers(routes, service, store)
    _add_pictures(routes, service)
    return routes


def _add_server(routes: APIRouter, service: Service) -> None:
    @routes.get("/server")
    async def server() -> dict[str, Any]:
        """What a page must know of the server; also while the model is loaded."""
        settings = service.settings
        return {
            "model": service.name,
            "models": service.names,
            "ready": service.moss is not None,
            "context": None if service.moss is None else service.moss.model.capacity,
            "plugins": [{"name": one.name, "label": one.label} for one in settings.plugins],
            "default_plugins": [*settings.default_plugins],
            "sampling": sampling_fields(settings.params, settings.max_new_tokens),
        }


def _add_conversations(routes: APIRouter, service: Service, store: ConversationStore) -> None:
    @routes.get("/conversations")
    async def conversations() -> dict[str, Any]:
        """Those used last first."""
        return {"conversations": await store.summaries()}

    @routes.post("/conversations", status_code=201)
    async def create(asked: Change) -> dict[str, Any]:
        service.model(asked.model)
        settings = service.settings
        plugins = tuple(plugin.name for plugin in service.plugins(asked.plugins))
        params, most = changed(asked.sampling, service, settings.params, settings.max_new_tokens)
        sampling = sampling_fields(params, most)
        model = service.adapter(asked.model) or ""
        about = About("", asked.system, plugins, sampling, model=model, title=asked.title or "")
        return conversation_fields(service, await store.create(about))

    @routes.get("/conversations/{name}")
    async def conversation(name: str) -> dict[str, Any]:
        """All of it. While an answer is being written, take that from /answer."""
        return conversation_fields(service, await store.find(name))

    @routes.patch("/conversations/{name}")
    async def change(name: str, asked: Change) -> dict[str, Any]:
        async with store.changing(name) as kept:
            if asked.model is not None:
                await service.aside(kept.answer_with, service.adapter(asked.model))
            if asked.plugins is not None or asked.system is not None:
                plugins = kept.chat.plugins if asked.plugins is None else service.plugins(asked.plugins)
                system = kept.chat.system if asked.system is None else asked.system or service.settings.system
                await service.aside(kept.chat.begin_with, plugins, system)
            if asked.sampling is not None:
                chat = kept.chat
                chat.params, chat.max_new_tokens = changed(
                    asked.sampling, service, chat.params, chat.max_new_tokens
                )
            await store.keep(kept, asked.title)
            return conversation_fields(service, kept)

    @routes.delete("/conversations/{name}", status_code=204)
    async def remove(name: str) -> Response:
        await store.remove(name)
        return Response(status_code=204)


def _add_answers(routes: APIRouter, service: Service, store: ConversationStore) -> None:
    async def answered(name: str, question: Question) -> Response:
        kept = await store.ask(name, question)
        return EventStream(events_of(service, kept, 0), service.settings.limits.slow_reader_s)

    @routes.post("/conversations/{name}/turns", status_code=200, response_class=EventStream)
    async def say(name: str, asked: Message) -> Response:
        """Say something. The answer goes on whether or not its connection stays: see /answer and /stop."""
        kept = await store.find(name)
        return await answered(name, Question(asked.message, len(kept.turns)))

    @routes.put("/conversations/{name}/turns/{turn}", status_code=200, response_class=EventStream)
    async def edit(name: str, turn: int, asked: Message) -> Response:
        """Say something else in the place of a turn, and forget all that came after it."""
        if turn < 0:
            raise ApiError(404, "Turns count from 0.", "turn", "not_found")
        return await answered(name, Question(asked.message, turn))

    @routes.post("/conversations/{name}/retry", status_code=200, response_class=EventStream)
    async def retry(name: str) -> Response:
        """Have another answer to the last message."""
        return await answered(name, Question(None, 0))

    @routes.get("/conversations/{name}/answer", status_code=200, response_class=EventStream)
    async def answer(name: str, start: int = Query(0, ge=0, le=1 << 31, alias="from")) -> Response:
        """The answer that is being written, or was last, from its event ``from`` on."""
        kept = await store.find(name)
        if kept.answering is None:
            raise ApiError(404, "No answer was written since the server began.", code="not_found")
        return EventStream(events_of(service, kept, start), service.settings.limits.slow_reader_s)

    @routes.post("/conversations/{name}/stop", status_code=204)
    async def stop(name: str) -> Response:
        """End the answer that is being written; what is there of it is kept."""
        kept = await store.find(name)
        if kept.answering is not None:
            kept.answering.cancel()
        return Response(status_code=204)


def _add_pictures(routes: APIRouter, service: Service) -> None:
    @routes.get("/pictures/{name}", status_code=200, response_class=FileResponse)
    async def picture(name: str) -> Response:
        """A picture that MOSS had drawn."""
        folder = service.settings.plugin_settings.picture_folder
        path = None if folder is None or not PICTURE.fullmatch(name) else folder / name
        if path is None or not await service.aside(_is_picture, path, folder):
            raise ApiError(404, "There is no such picture.", code="not_found")
        headers = {
            "Content-Security-Policy": "default-src 'none'; sandbox",
            "X-Content-Type-Options": "nosniff",
        }
        return FileResponse(path, headers=headers)


def _is_picture(path: Path, folder: Path) -> bool:
    """Whether it is a file of that folder, and no link to elsewhere."""
    try:
        return path.is_file() and path.resolve().parent == folder.resolve()
    except OSError:
        return False


async def events_of(service: Service, kept: ServedConversation, start: int) -> AsyncIterator[str]:
    """An answer's events, each with its number ``n``, from the given one on. Status has none: it is not repeated."""
    answering = kept.answering
    assert answering is not None
    silent_s, told, number = 0.0, None, 1
    if start == 0:
        yield named_event("start", {"n": 0, **kept.asked})
    try:
        async for part in answering.follow(STATUS_S):
            texts = []
            for fields in part:
                if number >= start:
                    texts.append(named_event(fields["type"], {"n": number, **fields}))
                number += 1
            if texts:
                yield "".join(texts)
            silent_s = 0.0 if part else silent_s + STATUS_S
            status = None if part else answering.status()
            if status is not None and status != told:
                told = status
                yield named_event(status["type"], status)
            elif silent_s >= service.settings.limits.ping_s:
                silent_s = 0.0
                yield PING
    except ApiError as error:
        yield named_event("error", {"n": number, "type": "error", **error.body})


def changed(
    asked: Sampling | None, service: Service, params: SamplingParams, most: int
) -> tuple[SamplingParams, int]:
    """
    Raises:
        ApiError: a value is impossible.
    """
    if asked is None:
        return params, most
    own = service.settings.params
    given = {
        name: getattr(own, name) if getattr(asked, name) is None else getattr(asked, name)
        for name in asked.model_fields_set & {*SAMPLING}
    }
    if given.get("seed") is not None:
        given["seed"] %= SEEDS
    if "max_new_tokens" in asked.model_fields_set:
        most = service.settings.max_new_tokens if asked.max_new_tokens is None else asked.max_new_tokens
    try:
        return dataclasses.replace(params, **given), most
    except MossError as error:
        raise bad_value(error, "sampling") from error


def sampling_fields(params: SamplingParams, max_new_tokens: int) -> dict[str, Any]:
    return {**{name: getattr(params, name) for name in SAMPLING}, "max_new_tokens": max_new_tokens}


def conversation_fields(service: Service, kept: ServedConversation) -> dict[str, Any]:
    chat = kept.chat
    return {
        "id": kept.id,
        "title": kept.title,
        "updated": int(kept.updated),
        "model": kept.adapter or service.name,
        "plugins": [plugin.name for plugin in chat.plugins],
        "system": kept.about.system,
        "sampling": sampling_fields(chat.params, chat.max_new_tokens),
        "answering": kept.busy,
        "damaged": kept.damaged,
        "turns": [turn_fields(number, turn) for number, turn in enumerate(kept.turns)],
    }
