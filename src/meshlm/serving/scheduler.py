"""Who runs, who waits, and what is computed next. Plain Python: neither JAX nor NumPy.

A job waits in the order of arrival, has its prompt run in chunks (one job at a time), then has a
row of the batch until it ends. Between two decoding steps at most one chunk's worth of prompts
runs, so that a long prompt does not hold up those who are already being served.

The batch has `num_rows` rows and `num_places` places, out of few sizes. It grows as soon as it must
and halves when half of it has been enough for a while.
"""

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

from meshlm.serving.requests import QueueFullError, Request

MIN_CHUNK = 32
MIN_PLACES = 256
# Decoding steps for which half of the batch has to be enough before it is halved.
PATIENCE = 32


def chunk_sizes(chunk: int) -> tuple[int, ...]:
    """Returns the lengths to which a prompt's chunks are padded."""
    return (MIN_CHUNK, chunk) if chunk > MIN_CHUNK else (chunk,)


def place_sizes(context_length: int, chunk: int) -> tuple[int, ...]:
    """Returns the numbers of places of a cache: each holds whole chunks, the last the context."""
    last = -(-context_length // chunk) * chunk
    sizes = []
    size = -(-MIN_PLACES // chunk) * chunk
    while size < last:
        sizes.append(size)
        size *= 2
    return (*sizes, last)


def row_sizes(slots: int) -> tuple[int, ...]:
    """Returns the numbers of rows of the batch, powers of two up to what is enough for all."""
    sizes = [1]
    while sizes[-1] < slots:
        sizes.append(min(2 * sizes[-1], slots))
    return tuple(sizes)


def enough(sizes: Sequence[int], needed: int) -> int:
    """Returns the smallest size that is at least `needed`."""
    return next(size for size in sizes if size >= needed)


@dataclasses.dataclass(eq=False)
class Job:
    """A request on its way through the engine."""

    request: Request
    row: int | None = None
    """Its row of the batch, once it has one."""
    prefilled: int = 0
    """Tokens of the prompt whose keys and values are there."""
    generated: int = 0

    @property
    def position(self) -> int:
        """The position of the next token."""
        return len(self.request.prompt) + self.generated


JobT = TypeVar("JobT", bound=Job)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A new form of the batch."""

    num_rows: int
    num_places: int
    source: tuple[int, ...]
    """For each new row, the old row that it takes over; -1 where nothing is taken over."""


class Scheduler(Generic[JobT]):
    """The queue, the job in prefill and the rows of the batch."""

    def __init__(
        self, *, slots: int, max_queue: int, rows: Sequence[int], places: Sequence[int]
    ) -> None:
        """Makes a scheduler with nothing to do.

        Args:
            rows, places: the sizes that the batch may have, ascending.
        """
        self._slots = slots
        self._max_queue = max_queue
        self._row_sizes = tuple(rows)
        self._place_sizes = tuple(places)
        self._roomy_steps = {"rows": 0, "places": 0}
        self.waiting: deque[JobT] = deque()
        self.prefilling: JobT | None = None
        self.running: dict[int, JobT] = {}
        self.num_rows = self._row_sizes[0]
        self.num_places = self._place_sizes[0]

    @property
    def jobs(self) -> list[JobT]:
        """All jobs that have not ended."""
        first = [] if self.prefilling is None else [self.prefilling]
        return [*self.running.values(), *first, *self.waiting]

    def submit(self, jobs: Sequence[JobT]) -> None:
        """Queues all jobs or none.

        Raises:
            QueueFullError: there is not room for all of them.
        """
        free = self._slots - len(self.running) - (self.prefilling is not None)
        if len(self.waiting) + len(jobs) > self._max_queue + free:
            raise QueueFullError(
                f"{len(self.waiting)} samples wait and {self._max_queue} may: try again later"
            )
        self.waiting.extend(jobs)

    def next_prompt(self) -> JobT | None:
        """Returns the job whose prompt runs now; None where there is none, or no row for it."""
        if self.prefilling is None and self.waiting and len(self.running) < self._slots:
            self.prefilling = self.waiting.popleft()
        return self.prefilling

    def start(self, job: JobT) -> Layout | None:
        """Gives the job in prefill the lowest free row; returns the batch's form, if that grew."""
        assert job is self.prefilling
        self.prefilling = None
        job.row = next(row for row in range(self._slots) if row not in self.running)
        self.running[job.row] = job
        return self.fit()

    def end(self, job: JobT) -> None:
        """Takes a job out, wherever it is."""
        if job is self.prefilling:
            self.prefilling = None
        elif job.row is not None:
            del self.running[job.row]
            job.row = None
        else:
            self.waiting.remove(job)

    def fit(self) -> Layout | None:
        """Returns a larger form of the batch where the jobs need one for their next step."""
        rows = enough(self._row_sizes, max(self.running, default=0) + 1)
        places = enough(self._place_sizes, self._places_needed())
        return self._reform(max(rows, self.num_rows), max(places, self.num_places))

    def shrink(self) -> Layout | None:
        """Returns a smaller form where one has been enough for a while; call it once a step."""
        rows = self._smaller("rows", self._row_sizes, self.num_rows, len(self.running))
        places = self._smaller("places", self._place_sizes, self.num_places, self._places_needed())
        return self._reform(rows, places)

    def reset(self) -> bool:
        """Goes back to the smallest form and returns True, if it is larger and nobody is in it."""
        smallest = self._row_sizes[0], self._place_sizes[0]
        if self.running or (self.num_rows, self.num_places) == smallest:
            return False
        self.num_rows, self.num_places = smallest
        return True

    def _places_needed(self) -> int:
        # The last chosen token is run next, at the position before the next one.
        return max((job.position for job in self.running.values()), default=1)

    def _smaller(self, what: str, sizes: Sequence[int], size: int, needed: int) -> int:
        """Returns the next smaller size, where it has been enough for PATIENCE calls in a row."""
        before = max((s for s in sizes if s < size), default=size)
        is_roomy = before < size and needed <= before
        self._roomy_steps[what] = self._roomy_steps[what] + 1 if is_roomy else 0
        if self._roomy_steps[what] < PATIENCE:
            return size
        self._roomy_steps[what] = 0
        return before

    def _reform(self, num_rows: int, num_places: int) -> Layout | None:
        if (num_rows, num_places) == (self.num_rows, self.num_places):
            return None
        source = [
            row if row in self.running and row < self.num_rows else -1 for row in range(num_rows)
        ]
        free = (row for row in range(num_rows) if row not in self.running)
        for row in sorted(row for row in self.running if row >= num_rows):
            job = self.running.pop(row)
            job.row = next(free)
            self.running[job.row] = job
            source[job.row] = row
        self.num_rows, self.num_places = num_rows, num_places
        return Layout(num_rows, num_places, tuple(source))
