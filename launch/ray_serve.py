"""Replicas of `meshlm serve` under Ray Serve.

    pip install "ray[serve]"
    MESHLM_WEIGHTS=/weights MESHLM_API_KEY=... serve run ray_serve:application

Each replica is the real server, a process on a port of its own, and Ray Serve passes requests on to
it: so limits, keys, streaming and drain are the server's. Ray starts replicas, checks their health,
spreads requests among them and adds some under load. Ray's own ports need a private network.
"""

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI, Request
from ray import serve
from starlette.responses import StreamingResponse

DRAIN_S = 30
START_S = 1800
# Headers of one connection only; the next one has its own.
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade", "trailer", "host"}

ingress = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)


@serve.deployment(
    ray_actor_options={"num_cpus": 4},
    autoscaling_config={"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 8},
    # More than a replica's slots and less than its queue: the rest waits with Ray.
    max_ongoing_requests=64,
    graceful_shutdown_timeout_s=DRAIN_S + 15,
    health_check_period_s=10,
)
@serve.ingress(ingress)
class Replica:
    """One server, and the way to it."""

    async def __init__(self) -> None:
        """Starts the server and waits until it is ready."""
        command = [str(Path(sys.executable).with_name("meshlm")), "serve"]
        command += [os.environ["MESHLM_WEIGHTS"], "--port", "0", "--drain-s", str(DRAIN_S)]
        self.process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE
        )
        async with asyncio.timeout(START_S):
            url = await self._url()
        self.client = httpx.AsyncClient(base_url=url, timeout=None)

    async def _url(self) -> str:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            if found := re.match(r"ready in .*(http://\S+)", line.decode()):
                # What it says later is not read: it is little.
                return found[1]
        raise RuntimeError(f"the server ended with {await self.process.wait()}")

    @ingress.api_route("/{path:path}", methods=["GET", "POST", "OPTIONS"])
    async def forward(self, path: str, request: Request) -> StreamingResponse:
        """Passes a request on, and its answer back as it comes."""
        headers = [(k, v) for k, v in request.headers.items() if k not in HOP_BY_HOP]
        is_read = asyncio.Event()
        if request.method != "POST":
            is_read.set()
        asked = self.client.build_request(
            request.method,
            httpx.URL(path=f"/{path}", query=request.url.query.encode()),
            headers=headers,
            content=_body(request, is_read) if request.method == "POST" else None,
        )
        told = await _unless_gone(request, is_read, self.client.send(asked, stream=True))
        if told is None:
            return StreamingResponse(iter(()), 499)
        kept = {k: v for k, v in told.headers.items() if k not in HOP_BY_HOP}
        return StreamingResponse(_pieces(told), told.status_code, kept)

    async def check_health(self) -> None:
        """Raises where the server is not well; Ray then starts another."""
        if self.process.returncode is not None:
            raise RuntimeError(f"the server ended with {self.process.returncode}")
        (await self.client.get("/health")).raise_for_status()

    async def __del__(self) -> None:
        """Lets the server finish what it has."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
            await self.process.wait()


async def _unless_gone(
    request: Request, is_read: asyncio.Event, sending: Coroutine[Any, Any, httpx.Response]
) -> httpx.Response | None:
    """Returns what the server tells; None where the client went away before it told anything."""
    answer = asyncio.create_task(sending)
    leaving = asyncio.create_task(_gone(request, is_read))
    try:
        await asyncio.wait((answer, leaving), return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        # A request that is given up closes its connection: the server frees its slot.
        for task in (answer, leaving):
            task.cancel()
        await asyncio.gather(answer, leaving, return_exceptions=True)


async def _body(request: Request, is_read: asyncio.Event) -> AsyncIterator[bytes]:
    async for piece in request.stream():
        yield piece
    is_read.set()


async def _gone(request: Request, is_read: asyncio.Event) -> None:
    """Returns once the client is gone; while the body comes, the sending itself would notice."""
    await is_read.wait()
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _pieces(told: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for piece in told.aiter_raw():
            yield piece
    finally:
        # The client went away: so does the request, and its slot is free.
        await told.aclose()


application = Replica.bind()
