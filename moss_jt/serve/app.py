"""The application: every interface over one service."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware

from moss_jt.serve import (
    chat_completions,
    completions,
    errors,
    models,
    page_interface,
    reference,
    replay,
    vortex,
    web,
)
from moss_jt.serve.kept_conversations import ConversationStores
from moss_jt.serve.security import Guard
from moss_jt.serve.service import Service


class ErrorFields(BaseModel):
    """OpenAI's error object; all four are always there."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorFields


# What any address may answer with.
ANY_TIME: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": description}
    for status, description in {
        400: "Something is wrong with the request",
        401: "A key is needed",
        403: "The request comes from another site, or by a name that is not this machine's",
        404: "There is no such thing",
        405: "The method is not possible here",
        408: "The request did not arrive in time",
        409: "It is being done already",
        413: "The body is too large",
        429: "Too many answers are being written",
        501: "It is not done here",
        503: "The model is being loaded",
        507: "It cannot be kept on the disk",
    }.items()
}


def make_app(service: Service, stores: ConversationStores) -> FastAPI:
    # No pages of the framework's own: they load scripts from elsewhere.
    app = FastAPI(title="moss-jt", docs_url=None, redoc_url=None, responses=ANY_TIME)
    errors.install(app)
    for module in (models, chat_completions, completions, replay, vortex):
        app.include_router(module.router(service))
    app.include_router(page_interface.router(service, stores.page))
    app.include_router(reference.router(service, stores.reference))
    app.include_router(web.router())
    app.openapi = lambda: _schema(app)  # type: ignore[method-assign]
    app.add_middleware(Guard, settings=service.settings)
    if service.settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[*service.settings.origins],
            allow_methods=["*"],
            allow_headers=["*"],
        )
    return app


def _schema(app: FastAPI) -> dict[str, Any]:
    """OpenAPI's description, without the framework's own answer to a body that is wrong: ours is a 400."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
                for status, response in operation["responses"].items():
                    if int(status) >= 400:  # errors are JSON where answers are something else, too
                        response["content"] = {"application/json": [*response["content"].values()][0]}
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        app.openapi_schema = schema
    return app.openapi_schema
