"""The page's files: what lies in the folder page/ beside this module, and nothing else.

The page runs no script and loads nothing from anywhere but this server, whatever a model, a source or a user writes into it.
"""

from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import APIRouter
from starlette.responses import HTMLResponse, Response

from moss_jt.serve.errors import ApiError

TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "mjs": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "json": "application/json",
    "svg": "image/svg+xml",
    "png": "image/png",
    "ico": "image/x-icon",
    "woff2": "font/woff2",
    "txt": "text/plain; charset=utf-8",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; font-src 'self'; connect-src 'self'; "
    "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def page_files(folder: Traversable) -> dict[str, tuple[str, bytes]]:
    """Path below the folder -> type and content, of all files that a page may have."""
    pages: dict[str, tuple[str, bytes]] = {}
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.is_dir():
            below = page_files(entry)
            pages.update({f"{entry.name}/{path}": content for path, content in below.items()})
        elif (kind := TYPES.get(entry.name.rpartition(".")[2])) is not None:
            pages[entry.name] = (kind, entry.read_bytes())
    return pages


def router() -> APIRouter:
    routes = APIRouter()
    pages = page_files(files("moss_jt.serve") / "page")

    def answer(path: str) -> Response:
        if path not in pages:
            raise ApiError(404, "There is no such file.", code="not_found")
        kind, content = pages[path]
        return Response(content, headers={"Content-Type": kind, **HEADERS})

    @routes.get("/", response_class=HTMLResponse)
    async def page() -> Response:
        """The page."""
        return answer("index.html")

    @routes.get("/page/{path:path}", include_in_schema=False)
    async def file(path: str) -> Response:
        return answer(path)

    return routes
