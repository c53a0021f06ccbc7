"""Waits for the engine on the event loop, and gives up as soon as the client is gone.

Both ways to answer, streamed and whole, run inside `until_gone`, which reads `receive` itself:
nothing else notices a client that goes away while its request waits.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from meshlm.serving.api.answers import Answer
from meshlm.serving.engine import Engine, Submission
from meshlm.serving.errors import ApiError, bug, failed, refused
from meshlm.serving.metrics import Metrics, RequestTimer
from meshlm.serving.requests import (
    Event,
    Failed,
    Finished,
    NotReadyError,
    Piece,
    QueueFullError,
    Request,
)

QUEUE_INTERVAL_S = 1.0
PING_INTERVAL_S = 15.0
# A client that reads nothing for so long after the deadline is gone.
SEND_GRACE_S = 30.0
# An answer of more tokens is written beside the event loop.
_MANY_TOKENS = 512

_log = logging.getLogger(__name__)

Result = TypeVar("Result")


class GoneError(Exception):
    """The client went away."""


class Events:
    """The events of requests that the engine has taken, handed over to the event loop."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        """Submits the requests.

        Raises:
            ApiError: 429 for a full queue, 503 where the engine takes none.
        """
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        try:
            self._submission: Submission = engine.submit(requests, self._hand_over)
        except (QueueFullError, NotReadyError) as error:
            raise refused(error) from None

    def _hand_over(self, index: int, event: Event) -> None:
        # Called on the engine's thread. A loop that is closed has no client left.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

    async def next(self, timeout_s: float | None = None) -> tuple[int, Event] | None:
        """Returns the next event, with the index of its request; None where none comes in time."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._queue.get()
        except TimeoutError:
            return None

    @property
    def ahead(self) -> int | None:
        """How many samples wait before these; None once they run."""
        return self._submission.ahead

    def cancel(self) -> None:
        """Gives the requests up; those that have ended do not mind."""
        self._submission.cancel()


class Run:
    """An answer that the engine is working on, with its times."""

    def __init__(self, engine: Engine, answer: Answer, metrics: Metrics) -> None:
        """Submits the answer's requests; raises as `Events`."""
        self.answer = answer
        self.events = Events(engine, answer.plan.requests)
        self._timer: RequestTimer = metrics.request_started()

    async def take(self, timeout_s: float | None = None) -> list[dict[str, Any]] | None:
        """Returns the parts of a stream that the next event makes, None where none comes in time.

        Raises:
            ApiError: a sample failed.
        """
        following = await self.events.next(timeout_s)
        if following is None:
            return None
        index, event = following
        if isinstance(event, Failed):
            self._timer.finished(event.kind)
            raise failed(event)
        if isinstance(event, Piece):
            self._timer.tokens(len(event.tokens), index)
        if isinstance(event, Finished):
            self._timer.queued(event.queued_s)
        parts = self.answer.take(index, event)
        if self.answer.is_done:
            self._timer.finished(self.answer.finish_reason)
        return parts

    def close(self) -> None:
        """Frees what the requests hold, if they have not ended."""
        self.events.cancel()
        self._timer.finished("cancelled")


async def finish(run: Run, receive: Receive) -> Answer:
    """Returns the answer once it is whole.

    Raises:
        ApiError: a sample failed.
        GoneError: the client went away.
    """

    async def work() -> None:
        while not run.answer.is_done:
            await run.take()

    try:
        await until_gone(receive, work())
    finally:
        run.close()
    return run.answer


async def until_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Returns what `work` returns; cancels it as soon as the client is gone.

    Raises:
        GoneError: the client went away.
    """
    worker = asyncio.create_task(work)
    watcher = asyncio.create_task(_wait_for_end(receive))
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise GoneError
    finally:
        for task in (worker, watcher):
            task.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _wait_for_end(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends an answer as server-sent events while it is made."""

    media_type = "text/event-stream"

    def __init__(self, run: Run, patience_s: float) -> None:
        """`patience_s`: the time that all of it may take."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._run = run
        self._patience_s = patience_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it; a client that goes away, or takes nothing, frees what it holds."""
        request_id = scope.get("state", {}).get("request_id")
        try:
            async with asyncio.timeout(self._patience_s):
                await until_gone(receive, self._send_all(send, request_id))
        except (GoneError, TimeoutError):
            pass
        finally:
            self._run.close()

    async def _send_all(self, send: Send, request_id: str | None) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(head)
        async for text in self._texts(request_id):
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _texts(self, request_id: str | None) -> AsyncIterator[str]:
        try:
            async for text in self._events():
                yield text
        except ApiError as error:
            yield to_event(error.body)
        except Exception:
            # The status went out already: the client can only be told in the stream.
            _log.exception("a stream failed, request %s", request_id)
            yield to_event(bug().body)
        yield "data: [DONE]\n\n"

    async def _events(self) -> AsyncIterator[str]:
        """Yields events, and comments while none comes: who waits ahead, or a sign of life."""
        answer, events = self._run.answer, self._run.events
        quiet_s = 0.0
        if ahead := events.ahead:
            yield f": queued {ahead}\n\n"
        while not answer.is_done:
            parts = await self._run.take(QUEUE_INTERVAL_S)
            for part in parts or ():
                yield to_event(part)
            quiet_s = quiet_s + QUEUE_INTERVAL_S if parts is None else 0.0
            if parts is None and (ahead := events.ahead) is not None:
                yield f": queued {ahead}\n\n"
            elif quiet_s >= PING_INTERVAL_S:
                quiet_s = 0.0
                yield ": ping\n\n"
        last = answer.last_chunk()
        if last is not None:
            yield to_event(last)


def to_event(value: Mapping[str, Any]) -> str:
    """Returns a value as one server-sent event."""
    return f"data: {to_json(value)}\n\n"


async def whole_json(answer: Answer) -> bytes:
    """Returns an answer that is done as JSON; a long one is written beside the event loop."""
    is_long = answer.usage()["total_tokens"] > _MANY_TOKENS
    return await asyncio.to_thread(_write, answer) if is_long else _write(answer)


def _write(answer: Answer) -> bytes:
    whole = answer.whole()
    # One by one: json lets no other thread run while it writes a value.
    choices = ",".join([to_json(choice) for choice in whole.pop("choices")])
    return f'{to_json(whole)[:-1]},"choices":[{choices}]}}'.encode()


def to_json(value: Any) -> str:
    """Returns JSON as it is sent, in one line; raises ValueError for a number that JSON has not."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Some clients take these for the end of a line, and so of an event. `translate` would take
    # seconds for a long answer.
    for end, escaped in (("\x85", "\\u0085"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029")):
        text = text.replace(end, escaped)
    return text
