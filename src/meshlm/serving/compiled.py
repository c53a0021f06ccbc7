"""Every function of `steps.py`, compiled for every size before the first request.

XLA compiles for shapes. A length that was not met before would hold everybody up, so there are few
lengths, and they are all compiled at the start.
"""

import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from meshlm.generation.decode import DecodeModel
from meshlm.model.cache import Cache
from meshlm.serving import steps
from meshlm.serving.scheduler import chunk_sizes, place_sizes, row_sizes
from meshlm.serving.settings import row_settings

OnProgress = Callable[[int, int], None]
Key = tuple[str | int, ...]
Job = tuple[Key, Callable[[], Any]]
"""What to compile: its key, and the function that traces it."""

# Compilations side by side: each has phases that use one core.
_COMPILERS = 2


class Compiled:
    """The executables, by name and size."""

    def __init__(self, model: DecodeModel, *, slots: int, chunk: int) -> None:
        """Chooses the sizes; nothing is compiled yet.

        Args:
            slots: rows that the batch must be able to have.
            chunk: the most tokens of a prompt that run at once.
        """
        self.model = model
        self.shape = model.shape
        self.chunk_sizes = chunk_sizes(chunk)
        self.place_sizes = place_sizes(self.shape.config.context_length, chunk)
        self.row_sizes = row_sizes(slots)
        self._executables: dict[Key, Callable[..., Any]] = {}

    def get(self, *key: str | int) -> Callable[..., Any]:
        """Returns an executable; KeyError where there is none of this size."""
        return self._executables[key]

    def compile(self, on_progress: OnProgress) -> None:
        """Compiles everything; `on_progress(done, all)` hears of each, on some thread."""
        jobs = [*self._decoding(), *self._prefilling(), *self._moves()]
        done = itertools.count(1)
        lock = threading.Lock()

        def run(job: Job) -> None:
            key, lower = job
            with self.model.entered():
                self._executables[key] = lower().compile()
            with lock:
                on_progress(next(done), len(jobs))

        with ThreadPoolExecutor(_COMPILERS, thread_name_prefix="compile") as pool:
            list(pool.map(run, jobs))

    def _decoding(self) -> Iterator[Job]:
        """Yields the steps of the batch, the slowest to compile."""
        params, shape = self.model.params, self.shape
        for rows, places in itertools.product(self.row_sizes, self.place_sizes):
            ints = np.zeros(rows, np.int32)
            settings = row_settings([None] * rows, shape.config.vocab_size)
            arguments = (params, self._batch(rows, places), ints, ints, settings)
            yield ("decode", rows, places), _lowering(steps.decode, *arguments, shape=shape)

    def _prefilling(self) -> Iterator[Job]:
        """Yields what runs prompts, scores them and chooses their first token."""
        params, shape = self.model.params, self.shape
        for size, places in itertools.product(self.chunk_sizes, self.place_sizes):
            arguments = self._chunk(size, places)
            yield ("prefill", size, places), _lowering(steps.prefill, *arguments, shape=shape)
        least = self.place_sizes[0]
        for size in self.chunk_sizes:
            _, x, _ = self._abstract(steps.prefill, *self._chunk(size, least), shape=shape)
            tokens = np.zeros(size, np.int32)
            yield ("score", size), _lowering(steps.score, params, x, tokens, shape=shape)
        chunk = self._chunk(self.chunk_sizes[0], least)
        _, _, hidden = self._abstract(steps.prefill, *chunk, shape=shape)
        wide = (1, shape.config.vocab_size)
        rows = [np.zeros(wide, dtype) for dtype in (bool, np.int32, np.float32)]
        settings, position = row_settings([None], wide[1]), np.zeros(1, np.int32)
        arguments = (params, hidden, *rows, settings, position)
        yield ("choose",), _lowering(steps.choose, *arguments, shape=shape)

    def _chunk(self, size: int, places: int) -> tuple[Any, ...]:
        """Returns the arguments of `steps.prefill`."""
        tokens, zero = np.zeros((1, size), np.int32), np.int32(0)
        return self.model.params, self._cache(places), tokens, zero, zero

    def _moves(self) -> Iterator[Job]:
        """Yields what makes caches and the batch, changes their sizes and fills their rows."""
        for places in self.place_sizes:
            yield (
                ("cache", places),
                _lowering(steps.empty_cache, num_places=places, shape=self.shape),
            )
        least = {"num_rows": self.row_sizes[0], "num_places": self.place_sizes[0]}
        yield ("batch",), _lowering(steps.init_batch, **least, shape=self.shape)
        for rows, places in itertools.product(self.row_sizes, self.place_sizes):
            keys = self._batch(rows, places).cache.layers[0].keys
            for part in self.place_sizes[: self.place_sizes.index(places) + 1]:
                one = self._cache(part).layers[0].keys
                yield (
                    ("put", "cache", rows, places, part),
                    _lowering(steps.put, keys, one, np.int32(0)),
                )
            for new in self._neighbours(rows):
                yield self._resizing("cache", keys, new, places)
            for new in self.place_sizes:
                if new != places:
                    yield self._resizing("cache", keys, rows, new)
        # What a kept prompt is copied with; to other sizes it is that of a batch of one row.
        for places in self.place_sizes:
            yield self._resizing("cache", self._cache(places).layers[0].keys, 1, places)
        for rows in self.row_sizes:
            batch = self._batch(rows, self.place_sizes[0])
            for name in ("seen", "counts", "bias"):
                array = getattr(batch, name)
                part = np.zeros((1, array.shape[1]), array.dtype)
                yield ("put", name, rows), _lowering(steps.put, array, part, np.int32(0))
                for new in self._neighbours(rows):
                    yield self._resizing(name, array, new, 0)

    def _resizing(self, name: str, array: Any, num_rows: int, num_places: int) -> Job:
        """Returns the job for an array of one size to become one of another."""
        before = array.shape[2] if array.ndim == 4 else 0
        return (
            ("resize", name, array.shape[0], before, num_rows, num_places),
            _lowering(steps.resize, array, np.zeros(num_rows, np.int32), num_places=num_places),
        )

    def _neighbours(self, rows: int) -> list[int]:
        """Returns the sizes that come before and after; the batch grows and shrinks by one size."""
        place = self.row_sizes.index(rows)
        return [*self.row_sizes[max(0, place - 1) : place], *self.row_sizes[place + 1 : place + 2]]

    def _batch(self, rows: int, places: int) -> steps.Batch:
        return self._abstract(steps.init_batch, num_rows=rows, num_places=places, shape=self.shape)

    def _cache(self, places: int) -> Cache:
        return self._abstract(steps.empty_cache, num_places=places, shape=self.shape)

    def _abstract(self, function: Callable[..., Any], *arguments: Any, **static: Any) -> Any:
        """Returns the shapes, types and shardings of a function's results."""
        with self.model.entered():
            return jax.eval_shape(functools.partial(function, **static), *arguments)


def _lowering(function: Any, *arguments: Any, **static: Any) -> Callable[[], Any]:
    return lambda: function.lower(*arguments, **static)
