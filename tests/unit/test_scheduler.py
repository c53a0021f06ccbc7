"""The scheduler by itself: whatever comes in whatever order, nobody is lost, doubled or starved."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from meshlm.serving.requests import QueueFullError, Request
from meshlm.serving.scheduler import (
    PATIENCE,
    Job,
    Layout,
    Scheduler,
    chunk_sizes,
    place_sizes,
    row_sizes,
)

ROWS, PLACES = (1, 2, 4, 5), (8, 16, 32)


def job(prompt: int = 3) -> Job:
    return Job(request=Request(prompt=(1,) * prompt))


def scheduler(slots: int = 5, max_queue: int = 4) -> Scheduler[Job]:
    return Scheduler(slots=slots, max_queue=max_queue, rows=ROWS, places=PLACES)


def start(queue: Scheduler[Job], one: Job) -> Layout | None:
    assert queue.next_prompt() is one
    one.generated = 1
    return queue.start(one)


class Machine(RuleBasedStateMachine):
    """Mirrors what each row of the batch holds, as the runner would, by the layouts alone."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = scheduler()
        self.order: list[Job] = []
        self.begun: list[Job] = []
        self.rows: list[Job | None] = [None]

    def reform(self, layout: Layout | None) -> None:
        if layout is None:
            return
        assert layout.num_rows in ROWS
        assert layout.num_places in PLACES
        # The batch is compiled to change its rows by one size at a time.
        steps = abs(ROWS.index(layout.num_rows) - ROWS.index(len(self.rows)))
        assert steps <= 1
        self.rows = [None if old < 0 else self.rows[old] for old in layout.source]

    @rule(count=st.integers(1, 6), prompt=st.integers(1, 20))
    def submit(self, count: int, prompt: int) -> None:
        jobs = [job(prompt) for _ in range(count)]
        room = 5 + 4 - len(self.queue.jobs)
        try:
            self.queue.submit(jobs)
        except QueueFullError:
            assert count > room
            assert not any(one in self.queue.jobs for one in jobs)
        else:
            assert count <= room
            self.order += jobs

    @rule()
    def begin(self) -> None:
        one = self.queue.next_prompt()
        if one is not None and (not self.begun or self.begun[-1] is not one):
            self.begun.append(one)

    @precondition(lambda self: self.queue.prefilling is not None)
    @rule()
    def prefill(self) -> None:
        one = self.queue.prefilling
        assert one is not None
        self.begin()
        one.generated = 1
        self.reform(self.queue.start(one))
        assert one.row is not None
        self.rows[one.row] = one

    @precondition(lambda self: self.queue.running)
    @rule()
    def decode(self) -> None:
        self.reform(self.queue.fit() or self.queue.shrink())
        for row, one in self.queue.running.items():
            assert self.rows[row] is one
            assert one.position <= self.queue.num_places
            one.generated += 1
        for one in [one for one in self.queue.running.values() if one.position > 30]:
            self.queue.end(one)

    @precondition(lambda self: self.queue.jobs)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(range(len(self.queue.jobs))))
        gone = self.queue.jobs[one]
        self.queue.end(gone)
        assert gone not in self.queue.jobs

    @precondition(lambda self: not self.queue.running)
    @rule()
    def reset(self) -> None:
        if self.queue.reset():
            self.rows = [None] * ROWS[0]

    @invariant()
    def keeps_order(self) -> None:
        places = [self.order.index(one) for one in self.begun]
        assert places == sorted(places)
        waiting = [self.order.index(one) for one in self.queue.waiting]
        assert waiting == sorted(waiting)

    @invariant()
    def has_room(self) -> None:
        busy = len(self.queue.running) + (self.queue.prefilling is not None)
        assert busy <= 5
        assert len(self.queue.jobs) <= 5 + 4
        assert len(self.rows) == self.queue.num_rows
        assert all(row < self.queue.num_rows for row in self.queue.running)
        assert all(one.row == row for row, one in self.queue.running.items())
        assert len(set(map(id, self.queue.jobs))) == len(self.queue.jobs)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


def test_grows_at_once_and_halves_after_a_while() -> None:
    queue = scheduler()
    jobs = [job() for _ in range(3)]
    queue.submit(jobs)
    assert [start(queue, one) for one in jobs] == [
        None,
        Layout(2, 8, (0, -1)),
        Layout(4, 8, (0, 1, -1, -1)),
    ]
    queue.end(jobs[0])
    for _ in range(PATIENCE - 1):
        assert queue.shrink() is None
    # The third moves into the first one's row.
    assert queue.shrink() == Layout(2, 8, (2, 1))
    assert (jobs[1].row, jobs[2].row) == (1, 0)


def test_a_busy_moment_starts_the_while_again() -> None:
    queue = scheduler()
    jobs = [job() for _ in range(2)]
    queue.submit(jobs)
    for one in jobs:
        start(queue, one)
    queue.end(jobs[1])
    for _ in range(PATIENCE - 1):
        assert queue.shrink() is None
    again = job()
    queue.submit([again])
    start(queue, again)
    assert queue.shrink() is None
    queue.end(again)
    assert queue.shrink() is None


def test_places_grow_with_the_longest() -> None:
    queue = scheduler()
    short, long = job(3), job(15)
    queue.submit([short, long])
    start(queue, short)
    assert start(queue, long) == Layout(2, 16, (0, -1))
    long.generated = 2
    assert queue.fit() == Layout(2, 32, (0, 1))


def test_nobody_begins_without_a_row() -> None:
    queue = scheduler(slots=1, max_queue=2)
    jobs = [job(), job()]
    queue.submit(jobs)
    start(queue, jobs[0])
    assert queue.next_prompt() is None
    queue.end(jobs[0])
    assert queue.next_prompt() is jobs[1]


def test_says_how_many_wait() -> None:
    queue = scheduler(slots=1, max_queue=2)
    queue.submit([job(), job(), job()])
    with pytest.raises(QueueFullError, match="3 samples wait and 2 may"):
        queue.submit([job()])


@given(context=st.integers(1, 5000), chunk=st.integers(16, 600))
def test_places_hold_whole_chunks_and_the_context(context: int, chunk: int) -> None:
    sizes = place_sizes(context, chunk)
    assert all(size % chunk == 0 for size in sizes)
    assert list(sizes) == sorted(set(sizes))
    assert context <= sizes[-1] < context + chunk
    assert max(chunk_sizes(chunk)) == chunk


@given(slots=st.integers(1, 100))
def test_rows_hold_all_slots(slots: int) -> None:
    sizes = row_sizes(slots)
    assert sizes[0] == 1
    assert sizes[-1] == slots
    assert all(a < b <= 2 * a for a, b in itertools.pairwise(sizes))


def test_a_job_knows_its_position() -> None:
    assert dataclasses.replace(job(4), generated=3).position == 7
