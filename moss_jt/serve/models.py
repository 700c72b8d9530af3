"""What the server runs and how it is: models, health, properties, slots, metrics, and text to tokens and back."""

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from moss_jt.chat.messages import Message, conversation_of
from moss_jt.chat.prompt import PromptEncoder
from moss_jt.errors import MossError
from moss_jt.serve.errors import ApiError, bad_value
from moss_jt.serve.metrics import CONTENT_TYPE
from moss_jt.serve.schemas import ChatRequest, DetokenizeRequest, TokenizeRequest
from moss_jt.serve.service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter()
    _add_models(routes, service)
    _add_tokens(routes, service)
    _add_state(routes, service)
    return routes


def _add_models(routes: APIRouter, service: Service) -> None:
    async def health() -> dict[str, str]:
        """200 once the model is loaded; 503 before."""
        service.model()
        return {"status": "ok"}

    async def models() -> dict[str, Any]:
        """Also while the model is loaded."""
        return {"object": "list", "data": [model_fields(service, name) for name in service.names]}

    async def model(model_id: str) -> dict[str, Any]:
        service.adapter(model_id)
        return model_fields(service, model_id)

    for prefix in ("/v1", ""):
        for path, endpoint, tag in (
            ("health", health, "llama.cpp"),
            ("models", models, "OpenAI"),
            ("models/{model_id:path}", model, "OpenAI"),
        ):
            routes.add_api_route(
                f"{prefix}/{path}", endpoint, methods=["GET"], tags=[tag], include_in_schema=bool(prefix)
            )

    @routes.post("/v1/embeddings", tags=["OpenAI"])
    async def embeddings() -> Response:
        raise ApiError(404, "MOSS makes no embeddings.", code="not_supported")


def _add_tokens(routes: APIRouter, service: Service) -> None:
    @routes.post("/tokenize", tags=["llama.cpp"])
    async def tokenize(asked: TokenizeRequest) -> dict[str, Any]:
        tokenizer = service.model().tokenizer
        encode = tokenizer.encode if asked.parse_special else tokenizer.encode_plain
        token_ids: list[int] = await service.aside(encode, asked.content)
        if not asked.with_pieces:
            return {"tokens": token_ids}
        return {
            "tokens": [{"id": token, "piece": _piece(tokenizer.token_bytes(token))} for token in token_ids]
        }

    @routes.post("/detokenize", tags=["llama.cpp"])
    async def detokenize(asked: DetokenizeRequest) -> dict[str, str]:
        """Ids that have no text give none."""
        return {"content": await service.aside(service.model().tokenizer.decode, asked.tokens)}

    @routes.post("/apply-template", tags=["llama.cpp"])
    async def apply_template(asked: ChatRequest) -> dict[str, str]:
        """The text that the model would read for a chat without plugins."""
        moss = service.model()
        try:
            conversation = conversation_of([Message(one.role, one.text) for one in asked.messages])
            encoder = PromptEncoder(moss.tokenizer, service.name)
        except MossError as error:
            raise bad_value(error, "messages") from error
        segments = conversation.segments(system=service.settings.system)
        token_ids = await service.aside(encoder.encode, segments)
        return {"prompt": await service.aside(moss.tokenizer.decode, token_ids)}


def _add_state(routes: APIRouter, service: Service) -> None:
    @routes.get("/props", tags=["llama.cpp"])
    async def props() -> dict[str, Any]:
        moss = service.model()
        return {
            "model_alias": service.name,
            "default_generation_settings": {"n_ctx": moss.model.capacity, "params": _params(service)},
            "total_slots": moss.plan.parallel,
            "plugins": [plugin.name for plugin in service.settings.plugins],
            "build_info": service.fingerprint,
        }

    @routes.get("/slots", tags=["llama.cpp"])
    async def slots(fail_on_no_slot: bool = False) -> list[dict[str, Any]]:
        """One for each conversation of full length that the cache has room for. There may be more answers: shorter ones."""
        moss = service.model()
        running = service.answers.running
        if fail_on_no_slot and running >= moss.plan.parallel:
            raise ApiError(503, "No slot is free.", code="no_slot", retry_after_s=5)
        return [
            {"id": number, "n_ctx": moss.model.capacity, "is_processing": number < running}
            for number in range(moss.plan.parallel)
        ]

    @routes.get("/metrics", tags=["llama.cpp"], response_class=Response)
    async def metrics() -> Response:
        if not service.settings.metrics:
            raise ApiError(501, "The server was started with --no-metrics.", code="not_supported")
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


def model_fields(service: Service, name: str) -> dict[str, Any]:
    """The model's, or an adapter's, which has the model as its parent, as in vLLM's server."""
    parent = {} if name == service.name else {"parent": service.name}
    return {"id": name, "object": "model", "created": service.created, "owned_by": "moss-jt", **parent}


def _piece(raw: bytes) -> Any:
    """A token's text, or its bytes where these are no whole characters; as in llama.cpp's server."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return [*raw]


def _params(service: Service) -> dict[str, Any]:
    params = service.settings.params
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return {name: getattr(params, name) for name in names}
