"""The server's life: it listens, loads, serves, drains, and ends with an exit code.

uvicorn runs inside a loop that is ours: it would raise SIGTERM again after its own shutdown, and it
knows nothing of an engine that loads, drains or fails.
"""

import asyncio
import contextlib
import errno
import os
import resource
import signal
import socket
import sys
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from meshlm.core.errors import BusyError, MeshLMError, UsageError
from meshlm.serving.api.app import create_app
from meshlm.serving.config import EngineConfig, Limits
from meshlm.serving.engine import Engine, Loaded
from meshlm.serving.http.announcements import Announcements
from meshlm.serving.http.connections import connection_class
from meshlm.serving.http.guards import Keys, is_loopback
from meshlm.serving.http.logs import LineLog, LogLines
from meshlm.serving.http.middleware import protect
from meshlm.serving.http.pages import own_routes, page_files
from meshlm.serving.metrics import Metrics
from meshlm.serving.requests import State

_POLL_S = 0.05
# Between the engine's failure and the end: time for the errors to go out and for health to be seen.
_FAILED_S = 1.0
# After the last sample: time for the last bytes of the answers to go out.
_CLOSE_S = 5
# Files and pipes that the process has open besides connections.
_OTHER_FILES = 128
_EXIT_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What a server is, besides the weights."""

    model_id: str
    """The name of the model in the API."""
    fingerprint: str
    """Changes when the weights or the code do."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0: any that is free."""
    keys: Keys = field(default_factory=lambda: Keys(()))
    """Without any, everybody who reaches the address may ask."""
    allowed_hosts: tuple[str, ...] = ()
    """Names, beside those of this machine, that requests may be for."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may ask."""
    chat_template: bool = True
    limits: Limits = field(default_factory=Limits)
    engine: EngineConfig = field(default_factory=EngineConfig)
    open_browser: bool = False
    access_log: bool = True
    """A line for each request."""


def serve(load: Callable[[], Loaded], options: ServeOptions) -> int:
    """Serves until a signal or a failure, and returns the exit code: 0 after SIGTERM.

    Args:
        load: gives what is served; called on the engine's thread, while the server already answers.

    Raises:
        UsageError: the host is none of this machine's, or the port is not allowed.
        BusyError: the port is taken.
        MeshLMError: the engine failed, or could not load.
    """
    listener = bind(options.host, options.port)
    log = LineLog(sys.stderr)
    try:
        LogLines(log).install()
        server = _Server(load, options, listener, log)
        code = asyncio.run(server.run())
    finally:
        listener.close()
        log.close()
    if not server.engine.join(1.0):
        # It compiles, which nothing can interrupt. Nobody waits for it any more.
        sys.stdout.flush()
        os._exit(code)
    return code


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket that listens at this address: from now on clients can connect.

    Raises:
        UsageError: the host is none of this machine's, or the port is not allowed.
        BusyError: the port is taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError):
        raise UsageError(f"--host {host}: no address of that name is known here") from None
    # With the protocol named, asyncio sends small writes at once: tokens must not wait for a
    # client's acknowledgement of the one before.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise _refused(error, host, port) from None
    return listener


def _refused(error: OSError, host: str, port: int) -> MeshLMError:
    if error.errno == errno.EADDRINUSE:
        return BusyError(f"--port {port} of {host} is taken: give another, or 0 for any free one")
    if error.errno == errno.EACCES:
        return UsageError(f"--port {port}: only the administrator may take it; give 1024 or more")
    return UsageError(f"--host {host}: {error.strerror}")


def make_app(
    engine: Engine, options: ServeOptions, metrics: Metrics, condition: "Condition"
) -> FastAPI:
    """Returns all routes: the API's, and the server's own. Nothing guards them yet."""
    app = create_app(
        engine,
        options.limits,
        model_id=options.model_id,
        created=int(time.time()),
        fingerprint=options.fingerprint,
        chat_template=options.chat_template,
        metrics=metrics,
    )
    app.router.routes[:0] = own_routes(condition, metrics, page_files())
    return app


class Condition:
    """What the server does now: as its engine, unless it was told to stop."""

    def __init__(self, engine: Engine) -> None:
        """Looks at `engine`."""
        self._engine = engine
        self.stopping = False
        """Whether a signal has come."""

    @property
    def state(self) -> State:
        """As `Engine.state`, and `draining` from the signal on."""
        state = self._engine.state
        return "draining" if self.stopping and state != "failed" else state

    @property
    def progress(self) -> str:
        """As `Engine.progress`."""
        return self._engine.progress


class _Server:
    """One run of the server."""

    def __init__(
        self,
        load: Callable[[], Loaded],
        options: ServeOptions,
        listener: socket.socket,
        log: LineLog,
    ) -> None:
        self.options = options
        self.engine = Engine(load, options.engine)
        self.condition = Condition(self.engine)
        self.people = Announcements()
        self.url = _url(options.host, listener.getsockname()[1])
        self.signal: signal.Signals | None = None
        self._listener = listener
        self._log = log
        metrics = Metrics()
        metrics.watch_engine(lambda: self.engine.stats)
        limits = options.limits
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                self._guarded(make_app(self.engine, options, metrics, self.condition), metrics),
                http=connection_class(limits, metrics),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=limits.idle_timeout_s,  # type: ignore[arg-type]
                timeout_graceful_shutdown=_CLOSE_S,
            )
        )
        metrics.watch_connections(lambda: len(self._uvicorn.server_state.connections))

    def _guarded(self, app: ASGIApp, metrics: Metrics) -> ASGIApp:
        options = self.options
        # A server for this machine alone is asked for by this machine's names alone.
        bound = bool(options.allowed_hosts) or is_loopback(options.host)
        return protect(
            app,
            options.limits,
            metrics,
            keys=options.keys,
            hosts=options.allowed_hosts if bound else None,
            origins=options.cors_origins,
            draining=lambda: self.condition.stopping,
            log=self._log if options.access_log else None,
        )

    async def run(self) -> int:
        """Returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in _EXIT_CODES:
            loop.add_signal_handler(number, self._on_signal, number)
        _allow_files(self.options.limits.max_connections + _OTHER_FILES)
        answering = asyncio.create_task(self._uvicorn.serve(sockets=[self._listener]))
        self.people.listening(self.options.model_id, self.url)
        self.engine.start()
        try:
            await self._watch(answering)
            if self.signal is not None:
                await self._drain()
        finally:
            self.people.close()
            self._uvicorn.should_exit = True
            await answering
        if self.signal is None:
            raise self.engine.error or MeshLMError(
                "the server ended by itself; its log may say why"
            )
        return _EXIT_CODES[self.signal]

    async def _watch(self, answering: asyncio.Task[None]) -> None:
        """Returns when a signal came or the engine failed."""
        announced = False
        while self.signal is None and not answering.done():
            state, loaded = self.engine.state, self.engine.loaded
            if state in ("failed", "stopped"):
                self._log.write("engine", state=state)
                await asyncio.sleep(_FAILED_S)
                return
            if state == "loading":
                self.people.loading(self.engine.progress)
            elif loaded is not None and not announced:
                announced = True
                self._ready(loaded)
            await asyncio.sleep(_POLL_S)

    def _ready(self, loaded: Loaded) -> None:
        self.people.ready(self.options.model_id, loaded, self.options.engine, self.url)
        if self.options.open_browser:
            # Some browsers only return when they are closed.
            threading.Thread(target=webbrowser.open, args=[self.url], daemon=True).start()

    def _on_signal(self, number: signal.Signals) -> None:
        self.signal = number
        self.condition.stopping = True
        # The second one does what it does to any program, whatever this one is at.
        for other in _EXIT_CODES:
            asyncio.get_running_loop().remove_signal_handler(other)
            signal.signal(other, signal.SIG_DFL)

    async def _drain(self) -> None:
        """Lets what runs finish, for as long as it may, and fails the rest."""
        stats, drain_s = self.engine.stats, self.options.limits.drain_s
        self.people.stopping(stats.running + stats.waiting, drain_s)
        was_loading = self.engine.state == "loading"
        self.engine.drain()
        if was_loading:
            return
        end_s = time.monotonic() + drain_s
        while not self.engine.join(0) and time.monotonic() < end_s:
            await asyncio.sleep(_POLL_S)
        if not self.engine.join(0):
            self.engine.abort("the server is stopping and has no more time for this request")
            end_s = time.monotonic() + _CLOSE_S
            while not self.engine.join(0) and time.monotonic() < end_s:
                await asyncio.sleep(_POLL_S)


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signals: they are the server's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


def _url(host: str, port: int) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host)
    return f"http://{shown or (f'[{host}]' if ':' in host else host)}:{port}"


def _allow_files(wanted: int) -> None:
    """Raises the number of files that the process may have open, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))
