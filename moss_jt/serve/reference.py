"""POST / as the reference's moss_api_demo.py has it: a prompt, and a uid that a conversation goes on by.

The same members, and none of its faults: conversations are bounded and kept on the disk, requests of one conversation do not mix,
and one that does not fit into the context loses its oldest turns instead of failing.
"""

import dataclasses
import time
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from moss_jt.chat.saved import About
from moss_jt.engine.sampling import REPETITION_PENALTY
from moss_jt.serve.answering import Answering
from moss_jt.serve.conversation import Question, ServedConversation
from moss_jt.serve.errors import ApiError
from moss_jt.serve.kept_conversations import ConversationStore
from moss_jt.serve.page_interface import MESSAGE_CHARACTERS
from moss_jt.serve.schemas import Body, Positive
from moss_jt.serve.service import Service
from moss_jt.serve.streams import CompleteAnswer

MARK = "\n<|MOSS|>: "  # its answers begin so, and its clients cut it off
TOP_K = 40


class PromptRequest(BaseModel):
    model_config = Body
    prompt: str = Field(min_length=1, max_length=MESSAGE_CHARACTERS, pattern=r"\S")
    uid: str | None = Field(None, max_length=200)
    max_length: Positive = Field(2048, description="Of prompt and answer together.")
    top_p: Annotated[float, Field(ge=0.0001, le=1)] = 0.8
    temperature: Annotated[float, Field(ge=0, le=5)] = 0.7
    model: str | None = Field(
        None,
        max_length=200,
        description="Ours: the model's name, or an adapter's, from this answer on. Without it: as before, at first the model.",
    )


def router(service: Service, store: ConversationStore) -> APIRouter:
    routes = APIRouter(tags=["reference"])

    @routes.post("/", response_model=None)
    async def ask(asked: PromptRequest, request: Request) -> Response:
        """Answer a prompt; without a uid, or with one that is not known, a conversation begins."""
        service.model(asked.model)
        conversation = await conversation_of(store, asked.uid)
        if asked.model is not None:
            async with store.changing(conversation.id):
                await service.aside(conversation.answer_with, service.adapter(asked.model))
        params = dataclasses.replace(
            conversation.chat.params,
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=TOP_K,
            repetition_penalty=REPETITION_PENALTY,
        )
        # Where the conversation has nearly all of it, its oldest turns go.
        most = max(asked.max_length - len(conversation.chat.token_ids), asked.max_length // 4, 1)
        conversation = await store.ask(
            conversation.id, Question(asked.prompt, len(conversation.turns), params, most)
        )
        assert conversation.answering is not None
        return CompleteAnswer(_body(conversation, conversation.answering), conversation.answering.cancel)

    return routes


async def conversation_of(store: ConversationStore, uid: str | None) -> ServedConversation:
    if uid is not None:
        try:
            return await store.find(uid)
        except ApiError as error:
            if error.status != 404:
                raise
    return await store.create(About())


async def _body(conversation: ServedConversation, answering: Answering) -> dict[str, Any]:
    text = "".join(fields["text"] for fields in await answering.whole() if fields["type"] == "text")
    return {
        "response": MARK + text,
        "history": [[turn.message, MARK + turn.answer] for turn in conversation.turns],
        "status": 200,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "uid": conversation.id,
    }
