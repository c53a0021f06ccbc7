"""Routes of the server's own: health, metrics, and the page's files."""

import hashlib
import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from meshlm.serving.errors import LOADING_RETRY_S
from meshlm.serving.metrics import CONTENT_TYPE, Metrics
from meshlm.serving.requests import State

_RETRY = {"Retry-After": str(LOADING_RETRY_S)}
_WORDS: Mapping[State, str] = {
    "loading": "Loading model",
    "draining": "Stopping",
    "stopped": "Stopped",
    "failed": "The engine failed",
}
# A table of our own: the machine's may say otherwise, and a module of another type does not run.
_MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "png": "image/png",
}


class Health(Protocol):
    """What health depends on."""

    @property
    def state(self) -> State:
        """What the engine does now, or `draining` once the server is told to stop."""
        ...

    @property
    def progress(self) -> str:
        """While loading: what is done now."""
        ...


@dataclass(frozen=True)
class PageFile:
    """A file of the page, in memory."""

    content: bytes
    media_type: str
    etag: str


def page_files() -> dict[str, PageFile]:
    """Returns the page's files by name. Only what is in here is ever sent: no path is opened."""
    folder = importlib.resources.files("meshlm.serving") / "static"
    found = {}
    if folder.is_dir():
        for file in folder.iterdir():
            media_type = _MEDIA_TYPES.get(file.name.rpartition(".")[2])
            if file.is_file() and media_type is not None:
                content = file.read_bytes()
                etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
                found[file.name] = PageFile(content, media_type, etag)
    return found


def own_routes(
    condition: Health, metrics: Metrics, files: Mapping[str, PageFile]
) -> Sequence[Route]:
    """Returns the routes /health, /ready, /metrics, / and /static/NAME."""

    async def health(request: Request) -> Response:
        # A server that drains is well: who restarts it then would cut requests off.
        if condition.state in ("ready", "draining"):
            return JSONResponse({"status": "ok"})
        return _unwell(condition)

    async def ready(request: Request) -> Response:
        if condition.state == "ready":
            return JSONResponse({"status": "ready"})
        return _unwell(condition)

    async def numbers(request: Request) -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE)

    async def page(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        return _file(request, files.get(name))

    endpoints = {
        "/health": health,
        "/ready": ready,
        "/metrics": numbers,
        "/": page,
        "/static/{name}": page,
    }
    return [
        Route(path, endpoint, methods=["GET"], include_in_schema=False)
        for path, endpoint in endpoints.items()
    ]


def _unwell(condition: Health) -> Response:
    """Returns llama.cpp's body, which clients look for, and beside it what is done now."""
    state = condition.state
    words = _WORDS.get(state, "Not ready")
    content: dict = {"error": {"code": 503, "message": words, "type": "unavailable_error"}}
    if state == "loading":
        content["progress"] = condition.progress
    return JSONResponse(content, 503, _RETRY)


def _file(request: Request, file: PageFile | None) -> Response:
    if file is None:
        raise HTTPException(404)
    headers = {"etag": file.etag, "cache-control": "no-cache"}
    given = request.headers.get("if-none-match", "")
    if file.etag in (tag.strip().removeprefix("W/") for tag in given.split(",")):
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
