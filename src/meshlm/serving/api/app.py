"""The API's routes. Every failure has OpenAI's error body."""

import asyncio
import dataclasses
import functools
import importlib.metadata
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from meshlm.serving.api import compat
from meshlm.serving.api.answers import Answer, Frame
from meshlm.serving.api.bodies import read_object
from meshlm.serving.api.chat import chat_choices, plan_chat
from meshlm.serving.api.completions import completion_choices, plan_completion
from meshlm.serving.api.prompts import Vocabulary
from meshlm.serving.api.protocol import (
    AnyRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    read_fields,
    shorten,
)
from meshlm.serving.api.schema import describe_body, describe_query, describe_schema
from meshlm.serving.api.tokens import detokenize, tokenize, tokenizer_info
from meshlm.serving.api.waiting import (
    SEND_GRACE_S,
    EventStream,
    GoneError,
    Run,
    finish,
    to_json,
    whole_json,
)
from meshlm.serving.config import Limits
from meshlm.serving.engine import Engine
from meshlm.serving.errors import ApiError, bug, error_headers, not_ready
from meshlm.serving.metrics import Metrics

# Bodies from this length on are turned into tokens beside the event loop.
_LONG_BYTES = 8192
# nginx's status for a client that did not wait; nobody reads it.
_GONE = 499

Result = TypeVar("Result")


def create_app(
    engine: Engine,
    limits: Limits,
    *,
    model_id: str,
    created: int,
    fingerprint: str,
    chat_template: bool,
    metrics: Metrics,
) -> FastAPI:
    """Returns the API over an engine, which may be loading still.

    Args:
        model_id: the model's name in the API.
        created: when it was made, in seconds since 1970.
        fingerprint: of weights and code.
        chat_template: whether there is /v1/chat/completions, with the plain template.
    """
    version = importlib.metadata.version("meshlm")
    # A request of more would find the queue full for ever.
    room = engine.config.slots + engine.config.max_queue
    limits = dataclasses.replace(limits, max_samples=min(limits.max_samples, room))
    api = _Api(engine, limits, model_id, created, fingerprint, chat_template, metrics, version)
    app = FastAPI(docs_url=None, redoc_url=None, redirect_slashes=False)
    app.openapi = functools.cache(lambda: describe_schema(app, version))
    for path, handler, body in (
        ("/v1/completions", api.completions, "CompletionRequest"),
        ("/v1/chat/completions", api.chat, "ChatRequest"),
        ("/tokenize", api.tokenize, "TokenizeRequest"),
        ("/detokenize", api.detokenize, "DetokenizeRequest"),
        ("/complete", api.complete, "CompleteRequest"),
        ("/completion", api.demo_completion, "DemoRequest"),
    ):
        extra = describe_body(body, streams=path.startswith("/v1/"))
        app.add_api_route(path, handler, methods=["POST"], openapi_extra=extra)
    app.add_api_route("/v1/models", api.models, openapi_extra=describe_query())
    app.add_api_route("/v1/models/{model:path}", api.model, openapi_extra=describe_query())
    app.add_api_route("/tokenizer_info", api.tokenizer_info, openapi_extra=describe_query())
    told = describe_query(limits="1: tell every bound too")
    app.add_api_route("/version", api.version, openapi_extra=told)
    app.add_exception_handler(ApiError, api.on_error)
    app.add_exception_handler(HTTPException, api.on_http_error)
    app.add_exception_handler(Exception, api.on_bug)
    return app


@dataclasses.dataclass(frozen=True)
class _Api:
    """The handlers, and what they stand on."""

    engine: Engine
    limits: Limits
    model_id: str
    created: int
    fingerprint: str
    has_chat: bool
    metrics: Metrics
    code_version: str

    async def completions(self, request: Request) -> Response:
        """Goes on from prompts. OpenAI's API."""
        vocabulary = self._vocabulary()
        data = await read_object(request, self.limits, vocabulary.context_length)
        fields = self._read(CompletionRequest, data)
        plan = await _off_loop(request, lambda: plan_completion(fields, vocabulary, self.limits))
        choices = completion_choices(plan, fields, vocabulary.tokenizer)
        frame = self._frame("cmpl", "text_completion", "text_completion")
        return await self._respond(request, Answer(plan, choices, frame))

    async def chat(self, request: Request) -> Response:
        """Answers a conversation, as plain text. OpenAI's API."""
        if not self.has_chat:
            raise ApiError(
                404,
                "chat is switched off here: use /v1/completions, or start the server with "
                "--chat-template plain",
                code="chat_disabled",
                reason="not_found",
            )
        vocabulary = self._vocabulary()
        data = await read_object(request, self.limits, vocabulary.context_length)
        fields = self._read(ChatRequest, data)
        plan = await _off_loop(request, lambda: plan_chat(fields, vocabulary, self.limits))
        choices = chat_choices(plan, fields, vocabulary.tokenizer)
        frame = self._frame("chatcmpl", "chat.completion", "chat.completion.chunk")
        return await self._respond(request, Answer(plan, choices, frame))

    async def complete(self, request: Request) -> Response:
        """Goes on from a context. The API of the original's server."""
        vocabulary = self._vocabulary()
        data = await read_object(request, self.limits, vocabulary.context_length)
        plan = await _off_loop(request, lambda: compat.plan_complete(data, vocabulary, self.limits))
        return await self._wait_for(
            request, compat.answer_to(plan, vocabulary), lambda text: {"completion": text}
        )

    async def demo_completion(self, request: Request) -> Response:
        """Goes on from a context. The API of the original's web demo."""
        try:
            vocabulary = self._vocabulary()
            data = await read_object(request, self.limits, vocabulary.context_length)
            plan, has_prompt = await _off_loop(
                request, lambda: compat.plan_demo(data, vocabulary, self.limits)
            )
            start = plan.prompts[0].text if has_prompt else ""
            return await self._wait_for(
                request,
                compat.answer_to(plan, vocabulary),
                lambda text: [{"generated_text": start + text}],
            )
        except ApiError as error:
            raise compat.demo_error(error) from None

    async def tokenize(self, request: Request) -> Response:
        """Returns a text's token ids."""
        vocabulary = self._vocabulary()
        data = await read_object(request, self.limits, vocabulary.context_length)
        fields = self._read(TokenizeRequest, data)
        return _json(await _off_loop(request, lambda: tokenize(fields, vocabulary)))

    async def detokenize(self, request: Request) -> Response:
        """Returns the text of token ids."""
        vocabulary = self._vocabulary()
        data = await read_object(request, self.limits, vocabulary.context_length)
        fields = self._read(DetokenizeRequest, data)
        return _json(await _off_loop(request, lambda: detokenize(fields, vocabulary)))

    async def tokenizer_info(self) -> Response:
        """Returns the special tokens and the sizes."""
        return _json(tokenizer_info(self._vocabulary()))

    async def models(self) -> Response:
        """Lists the model that is served."""
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, model: str) -> Response:
        """Describes the model that is served."""
        self._check_model(model)
        return _json(self._model())

    async def version(self, request: Request) -> Response:
        """Tells versions; with `?limits=1` every bound too."""
        told: dict[str, Any] = {
            "version": self.code_version,
            "model": self.model_id,
            "system_fingerprint": self.fingerprint,
            "jax": importlib.metadata.version("jax"),
        }
        if request.query_params.get("limits") in ("1", "true"):
            bounds = dataclasses.asdict(self.limits) | dataclasses.asdict(self.engine.config)
            loaded = self.engine.loaded
            if loaded is not None:
                bounds["context_length"] = loaded.model.shape.config.context_length
            told["limits"] = bounds
        return _json(told)

    async def on_error(self, request: Request, error: Exception) -> Response:
        """Answers a request that failed for a stated reason."""
        assert isinstance(error, ApiError)
        if error.reason is not None:
            self.metrics.rejected(error.reason)
        return _json(error.body, error.status, error.headers)

    async def on_http_error(self, request: Request, error: Exception) -> Response:
        """Answers a path or a method that is not there."""
        assert isinstance(error, HTTPException)
        where = f"{request.method} {shorten(request.url.path)}"
        words = {
            404: "is not here: /openapi.json lists what is",
            405: "is not a method of this path",
        }
        message = f"{where} {words.get(error.status_code, error.detail)}"
        headers = {**error_headers(error.status_code), **(error.headers or {})}
        return await self.on_error(
            request, ApiError(error.status_code, message, headers=headers, reason="not_found")
        )

    async def on_bug(self, request: Request, error: Exception) -> Response:
        """Answers a request that met a bug; the server's log says which."""
        failure = bug()
        return _json(failure.body, failure.status, failure.headers)

    async def _respond(self, request: Request, answer: Answer) -> Response:
        run = Run(self.engine, answer, self.metrics)
        if answer.plan.stream:
            return EventStream(run, self.limits.request_timeout_s + SEND_GRACE_S)
        try:
            answer = await finish(run, request.receive)
        except GoneError:
            return Response(status_code=_GONE)
        return Response(await whole_json(answer), media_type="application/json")

    async def _wait_for(
        self, request: Request, answer: Answer, show: Callable[[str], Any]
    ) -> Response:
        run = Run(self.engine, answer, self.metrics)
        try:
            done = await finish(run, request.receive)
        except GoneError:
            return Response(status_code=_GONE)
        return _json(show(done.choices()[0]["text"]))

    def _vocabulary(self) -> Vocabulary:
        loaded = self.engine.loaded
        if loaded is None:
            raise not_ready(self.engine.state, self.engine.progress)
        return Vocabulary.of(loaded)

    def _read(self, kind: type[AnyRequest], data: Mapping[str, Any]) -> AnyRequest:
        fields = read_fields(kind, data)
        self._check_model(getattr(fields, "model", None))
        return fields

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.model_id:
            raise ApiError(
                404,
                f"the model {shorten(name)} is not here: this server has {self.model_id!r}",
                code="model_not_found",
                param="model",
                reason="not_found",
            )

    def _model(self) -> dict[str, Any]:
        described = {
            "id": self.model_id,
            "object": "model",
            "created": self.created,
            "owned_by": "meshlm",
        }
        loaded = self.engine.loaded
        if loaded is not None:
            vocabulary = Vocabulary.of(loaded)
            described["context_length"] = vocabulary.context_length
            described["vocab_size"] = vocabulary.size
        return described

    def _frame(self, prefix: str, kind: str, chunk_kind: str) -> Frame:
        return Frame(
            id=f"{prefix}-{secrets.token_hex(12)}",
            created=int(time.time()),
            model=self.model_id,
            fingerprint=self.fingerprint,
            kind=kind,
            chunk_kind=chunk_kind,
        )


async def _off_loop(request: Request, work: Callable[[], Result]) -> Result:
    """Returns `work()`, done beside the event loop where the body is long, or does not say."""
    length = request.headers.get("content-length", "")
    is_short = length.isdecimal() and int(length) < _LONG_BYTES
    return work() if is_short else await asyncio.to_thread(work)


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(value), status, dict(headers or {}), media_type="application/json")
