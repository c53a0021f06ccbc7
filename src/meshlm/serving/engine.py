"""The one thread that owns the device: it loads, compiles, and then serves requests in turn."""

import dataclasses
from collections.abc import Callable, Sequence

from meshlm.data.tokenizer import Tokenizer
from meshlm.generation import DecodeModel
from meshlm.serving.config import EngineConfig
from meshlm.serving.requests import OnEvent, Request, State


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """What is served."""

    model: DecodeModel
    tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stats:
    """Counts since the start, and what is so now."""

    running: int = 0
    """Requests that have a slot or are in prefill."""
    waiting: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    decode_steps: int = 0
    prompt_tokens: int = 0
    """Tokens of prompts that were taken up, the reused ones included."""
    cached_tokens: int = 0
    """Of those, tokens whose keys and values were there from an earlier prompt."""
    generated_tokens: int = 0
    compilations: int = 0
    slots: int = 0
    places_used: int = 0
    """Positions of the key-value cache in use, over all slots."""
    places: int = 0
    """Positions of all slots: slots times context length."""
    prefix_bytes: int = 0


class Submission:
    """Requests that were accepted together."""

    def cancel(self) -> None:
        """Gives the requests up: their slots are free within two decoding steps. Any thread."""
        raise NotImplementedError

    @property
    def ahead(self) -> int:
        """How many samples wait before the first of these; 0 once it runs. Any thread."""
        raise NotImplementedError


class Engine:
    """Serves requests, all in one thread of its own. Its methods may be called from any thread."""

    def __init__(self, load: Callable[[], Loaded], config: EngineConfig) -> None:
        """Makes an engine; nothing is loaded yet."""

    def start(self) -> None:
        """Starts the thread, which loads and compiles, and is then `ready`."""

    @property
    def state(self) -> State:
        """What the engine does now."""
        raise NotImplementedError

    @property
    def progress(self) -> str:
        """While loading: what is done now, in words for a person ("compiling 7 of 24")."""
        raise NotImplementedError

    @property
    def error(self) -> BaseException | None:
        """Why the state is `failed`."""
        raise NotImplementedError

    @property
    def loaded(self) -> Loaded | None:
        """What is served, once it is loaded."""
        raise NotImplementedError

    @property
    def stats(self) -> Stats:
        """A snapshot."""
        raise NotImplementedError

    def submit(self, requests: Sequence[Request], on_event: OnEvent) -> Submission:
        """Queues requests, all of them or none.

        Raises:
            BusyError: the queue has not room for all.
            NotReadyError: the state is not `ready`.
        """
        raise NotImplementedError

    def drain(self) -> None:
        """Takes no more requests; the thread ends when those that are in have ended."""

    def abort(self, message: str) -> None:
        """Fails whatever is queued or runs (kind `draining`); the thread ends. Follows `drain`."""

    def join(self, timeout_s: float | None = None) -> bool:
        """Returns whether the thread has ended, after waiting for it."""
        raise NotImplementedError
