"""Replicas of `meshlm serve` under Ray Serve.

    pip install "ray[serve]"
    serve run ray_serve:application weights=/weights "options=--api-key-file /keys/keys.txt"

Each replica is the real server, a process beside a worker of Ray's. The worker passes requests and
answers on as they are: limits, keys, streaming and errors are the server's. Ray starts replicas,
spreads requests among them, adds some under load, and replaces one whose server has ended. MeshLM
and all that is named here must be on every node. More words for `serve run`:

    weights=PATH        what to serve
    options=OPTIONS     of `meshlm serve`; its address is chosen here
    replicas=1          at least
    most_replicas=4     at most, under load
    cpus=4  gpus=0      of each replica

To end it so that running requests finish, within DRAIN_S:

    python -c "from ray import serve; serve.delete('default')"

Ctrl-C and `serve shutdown` end Ray's own proxies first, which cuts off what runs. Ray's ports need
a private network.
"""

import asyncio
import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import aiohttp
from ray import cloudpickle, serve
from ray.serve import Application
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from yarl import URL

# How long running requests may take to finish when a replica is to end, and a server to start.
DRAIN_S = 60
START_S = 1800
# After its server has ended, a worker has so long to pass on the last answers.
LINGER_S = 2
# Headers of one connection only; the next one has its own.
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade", "trailer"}
# Ray's proxy sends its own; the request's id is the same.
RAYS_OWN = {"date", "server", "x-request-id"}
PR_SET_PDEATHSIG = 1

# Workers get what is here from this process: the other nodes need not have this file.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def stop_with_the_worker() -> None:
    """Has Linux send this process SIGTERM where Ray ends the worker without asking."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Forwarded(Response):
    """The server's answer to a request, passed on as it comes.

    Ray cancels the call when the client goes away. That closes the connection to the server, which
    then frees the slot.
    """

    def __init__(self, client: aiohttp.ClientSession, url: str, request: Request) -> None:
        self.client, self.url, self.request = client, url, request

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Asks the server, and sends what it answers."""
        query = scope["query_string"].decode("latin-1")
        path = scope["raw_path"].decode("latin-1") + (f"?{query}" if query else "")
        sent = self.request.headers
        has_body = "content-length" in sent or "transfer-encoding" in sent
        asking = self.client.request(
            self.request.method,
            URL(self.url + path, encoded=True),
            headers=[(k, v) for k, v in sent.items() if k not in HOP_BY_HOP],
            data=self.request.stream() if has_body else None,
            allow_redirects=False,
        )
        try:
            answer = await asking
        except aiohttp.ClientConnectionError:
            error = {"message": "this replica's server has ended; try again", "code": "server_gone"}
            await JSONResponse({"error": error}, 503, {"retry-after": "1"})(scope, receive, send)
            return
        async with answer:
            headers = [(k.lower(), v) for k, v in answer.raw_headers]
            dropped = HOP_BY_HOP | RAYS_OWN
            kept = [(k, v) for k, v in headers if k.decode("latin-1") not in dropped]
            start = {"type": "http.response.start", "status": answer.status, "headers": kept}
            await send(start)
            async for piece in answer.content.iter_any():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


# More requests than these wait with Ray: they are more than a replica's slots, less than its queue.
@serve.deployment(
    max_ongoing_requests=64, graceful_shutdown_timeout_s=DRAIN_S, health_check_period_s=5
)
class Replica:
    """One server, and the way to it."""

    async def __init__(self, weights: str, options: str) -> None:
        """Starts the server and returns when it is ready."""
        command = [str(Path(sys.executable).with_name("meshlm")), "serve", weights]
        command += ["--port", "0", *shlex.split(options)]
        loop = asyncio.get_running_loop()
        self.url: asyncio.Future[str] = loop.create_future()
        self.is_ending = False
        self.server = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, preexec_fn=stop_with_the_worker
        )
        threading.Thread(target=self.read, args=[loop], daemon=True).start()
        async with asyncio.timeout(START_S):
            await self.url
        self.client = aiohttp.ClientSession(
            auto_decompress=False,
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=["accept", "accept-encoding", "content-type", "user-agent"],
            timeout=aiohttp.ClientTimeout(total=None),
        )

    def read(self, loop: asyncio.AbstractEventLoop) -> None:
        """Passes on what the server prints until it ends; then this worker ends too."""
        assert self.server.stdout is not None
        for line in self.server.stdout:
            print(line, end="", flush=True)
            if found := re.match(r"ready in .*(http://\S+)", line):
                loop.call_soon_threadsafe(self.url.set_result, found[1])
        error = RuntimeError(f"meshlm serve ended with exit code {self.server.wait()}")
        if not self.url.done():
            loop.call_soon_threadsafe(self.url.set_exception, error)
        elif not self.is_ending:
            print(error, file=sys.stderr, flush=True)
            time.sleep(LINGER_S)
            os._exit(1)  # Ray sees it at once, and starts another replica

    async def __call__(self, request: Request) -> Forwarded:
        """Passes a request on."""
        return Forwarded(self.client, self.url.result(), request)

    async def check_health(self) -> None:
        """Raises where the server is not well; Ray then starts another replica."""
        async with self.client.get(f"{self.url.result()}/health") as answer:
            answer.raise_for_status()

    def __del__(self) -> None:
        """Ends the server; Ray calls it when the requests of this replica are done."""
        self.is_ending = True
        self.server.terminate()
        self.server.wait()


def application(words: dict[str, str]) -> Application:
    """Returns what `serve run` starts, as the words after it say."""
    known = {"options": "", "replicas": "1", "most_replicas": "4", "cpus": "4", "gpus": "0"}
    if unknown := words.keys() - known.keys() - {"weights"}:
        raise ValueError(f"{', '.join(sorted(unknown))}: known are weights, {', '.join(known)}")
    given = {**known, **words}
    least, most = int(given["replicas"]), int(given["most_replicas"])
    replica = Replica.options(
        ray_actor_options={"num_cpus": float(given["cpus"]), "num_gpus": float(given["gpus"])},
        autoscaling_config={
            "min_replicas": least,
            "max_replicas": max(least, most),
            "target_ongoing_requests": 8,
        },
    )
    return replica.bind(given["weights"], given["options"])
