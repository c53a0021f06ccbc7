"""The engine: one thread that owns the device. It loads, compiles, and then serves in turns."""

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence

import jax

from meshlm.core.errors import MeshLMError, UsageError
from meshlm.data.special_tokens import SpecialTokens
from meshlm.data.tokenizer import Tokenizer
from meshlm.generation import DecodeModel
from meshlm.serving.compiled import Compiled
from meshlm.serving.config import EngineConfig
from meshlm.serving.prefixes import PrefixCache
from meshlm.serving.requests import NotReadyError, OnEvent, Request, State
from meshlm.serving.runner import Runner
from meshlm.serving.scheduler import Scheduler
from meshlm.serving.stats import Stats
from meshlm.serving.worker import Sample, Worker

__all__ = ["Engine", "Loaded", "Stats", "Submission"]

_log = logging.getLogger(__name__)
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_NOT_READY = {
    "loading": "the model is loading: try again soon",
    "draining": "the server is stopping and takes no more requests",
    "stopped": "the server has stopped",
    "failed": "the engine has failed; see the server's log",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """What is served."""

    model: DecodeModel
    tokenizer: Tokenizer
    special_tokens: SpecialTokens

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The token ids of which any ends a sample."""
        return self.special_tokens.end_ids(self.tokenizer)


class Submission:
    """Requests that were accepted together."""

    def __init__(self, engine: "Engine", samples: Sequence[Sample]) -> None:
        """Made by `Engine.submit`."""
        self._engine = engine
        self._samples = samples

    def cancel(self) -> None:
        """Gives the requests up: their slots are free within two decoding steps. Any thread."""
        for sample in self._samples:
            sample.given_up = True

    @property
    def ahead(self) -> int | None:
        """How many samples wait before the first of these; None once it runs. Any thread."""
        return self._engine.ahead_of(self._samples[0])


class Engine:
    """Serves requests, all in one thread of its own. Its methods may be called from any thread."""

    def __init__(self, load: Callable[[], Loaded], config: EngineConfig) -> None:
        """Makes an engine; nothing is loaded yet."""
        self._load = load
        self._config = config
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._state: State = "loading"
        self._progress = "loading the weights"
        self._error: BaseException | None = None
        self._loaded: Loaded | None = None
        self._scheduler: Scheduler[Sample] | None = None
        self._worker: Worker | None = None
        self._prefixes: PrefixCache | None = None
        self._abort_message: str | None = None
        self._compilations = 0

    def start(self) -> None:
        """Starts the thread, which loads and compiles, and is then `ready`."""
        self._thread.start()

    @property
    def state(self) -> State:
        """What the engine does now."""
        return self._state

    @property
    def progress(self) -> str:
        """While loading: what is done now, in words for a person ("compiling 7 of 24")."""
        return self._progress

    @property
    def error(self) -> BaseException | None:
        """Why the state is `failed`."""
        return self._error

    @property
    def loaded(self) -> Loaded | None:
        """What is served, once it is loaded."""
        return self._loaded

    @property
    def config(self) -> EngineConfig:
        """The sizes that it was made with."""
        return self._config

    @property
    def stats(self) -> Stats:
        """A snapshot."""
        scheduler, worker, loaded = self._scheduler, self._worker, self._loaded
        if scheduler is None or worker is None or loaded is None:
            return Stats(slots=self._config.slots, compilations=self._compilations)
        with self._lock:
            running = list(scheduler.running.values())
            waiting, in_prefill = len(scheduler.waiting), scheduler.prefilling is not None
        return Stats(
            **dataclasses.asdict(worker.counts),
            running=len(running) + in_prefill,
            waiting=waiting,
            compilations=self._compilations,
            slots=self._config.slots,
            places_used=sum(sample.position for sample in running),
            places=self._config.slots * loaded.model.shape.config.context_length,
            prefix_bytes=0 if self._prefixes is None else self._prefixes.num_bytes,
        )

    def submit(self, requests: Sequence[Request], on_event: OnEvent) -> Submission:
        """Queues requests, all of them or none.

        Raises:
            QueueFullError: the queue has not room for all.
            NotReadyError: the state is not `ready`.
        """
        samples = [Sample.of(request, i, on_event) for i, request in enumerate(requests)]
        with self._changed:
            if self._state != "ready" or self._scheduler is None:
                raise NotReadyError(self._state, _NOT_READY[self._state])
            self._scheduler.submit(samples)
            self._changed.notify_all()
        return Submission(self, samples)

    def ahead_of(self, sample: Sample) -> int | None:
        """Returns how many samples wait before this one; None if it does not wait."""
        with self._lock:
            waiting = () if self._scheduler is None else self._scheduler.waiting
            return next((i for i, other in enumerate(waiting) if other is sample), None)

    def drain(self) -> None:
        """Takes no more requests; the thread ends when those that are in have ended."""
        with self._changed:
            if self._state in ("loading", "ready"):
                self._state = "draining"
            self._changed.notify_all()

    def abort(self, message: str) -> None:
        """Fails whatever is queued or runs (kind `draining`); the thread ends. Follows `drain`."""
        with self._changed:
            self._abort_message = message
            self._changed.notify_all()
        self.drain()

    def join(self, timeout_s: float | None = None) -> bool:
        """Returns whether the thread has ended, after waiting for it."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            with self._compilations_counted():
                self._prepare()
                with self._entered():
                    self._serve()
        except BaseException as error:
            # Whatever it is: nobody else sees this thread end, and its clients wait.
            if not isinstance(error, MeshLMError):  # which says all in its line
                _log.exception("the engine has failed")
            self._error = error
            with self._lock:
                self._state = "failed"
            if self._worker is not None:
                self._worker.fail_all("engine", _NOT_READY["failed"])
        else:
            self._state = "stopped"

    def _entered(self) -> contextlib.AbstractContextManager[object]:
        assert self._loaded is not None
        return self._loaded.model.entered()

    def _prepare(self) -> None:
        """Loads and compiles, and is ready then, unless it is to stop already."""
        loaded = self._load()
        self._loaded = loaded
        config = self._config
        if loaded.model.batch_shards > 1:
            raise UsageError(
                f"a server has one replica, and --mesh.* splits the batch in "
                f"{loaded.model.batch_shards}: use --mesh.model, and several servers"
            )
        # Prompts end within the context; a chunk beyond it would only be padding.
        chunk = min(config.prefill_chunk, loaded.model.shape.config.context_length)
        compiled = Compiled(loaded.model, slots=config.slots, chunk=chunk)
        compiled.compile(self._on_compiled)
        with self._entered():
            runner = Runner(compiled)
        prefixes = PrefixCache(max_bytes=config.prefix_cache_bytes, chunk=chunk)
        scheduler: Scheduler[Sample] = Scheduler(
            slots=config.slots,
            max_queue=config.max_queue,
            rows=compiled.row_sizes,
            places=compiled.place_sizes,
        )
        self._worker = Worker(
            runner,
            scheduler,
            prefixes,
            self._lock,
            chunk=chunk,
            end_ids=loaded.end_ids,
            token_bytes=loaded.tokenizer.token_bytes,
        )
        with self._lock:
            self._scheduler, self._prefixes = scheduler, prefixes
            self._progress = ""
            if self._state == "loading":
                self._state = "ready"

    def _on_compiled(self, done: int, total: int) -> None:
        self._progress = f"compiling {done} of {total}"

    def _serve(self) -> None:
        assert self._worker is not None
        while self._wait():
            if self._abort_message is not None:
                self._worker.fail_all("draining", self._abort_message)
            else:
                self._worker.turn()

    def _wait(self) -> bool:
        """Returns True once there is work, False once there will be none."""
        with self._changed:
            assert self._scheduler is not None
            while not self._scheduler.jobs:
                if self._state != "ready":
                    return False
                self._changed.wait()
            return True

    @contextlib.contextmanager
    def _compilations_counted(self):
        """Counts what XLA compiles in this process."""

        def on_event(event: str, duration_secs: float, **kwargs: str | int) -> None:
            self._compilations += event == _COMPILE_EVENT

        jax.monitoring.register_event_duration_secs_listener(on_event)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(on_event)
