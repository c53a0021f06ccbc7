"""What the engine's thread does in a turn: give up, run prompts, take a step.

The queue is shared with other threads, under one lock; the device belongs to this thread alone and
computes outside of the lock.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Collection

from meshlm.generation.config import FinishReason
from meshlm.generation.text import TextStream
from meshlm.serving.prefixes import PrefixCache
from meshlm.serving.requests import (
    Event,
    Failed,
    FailureKind,
    Finished,
    OnEvent,
    Piece,
    PromptScores,
    Request,
    TokenScore,
)
from meshlm.serving.runner import Prefilled, Runner
from meshlm.serving.scheduler import MIN_CHUNK, Job, Scheduler
from meshlm.serving.stats import Counts

_log = logging.getLogger(__name__)
_NOT_FINITE = Failed("engine", "the model's output is not finite")


@dataclasses.dataclass(eq=False)
class Sample(Job):
    """A job with what belongs to its client."""

    on_event: Callable[[Event], None] = lambda event: None
    stream: TextStream = dataclasses.field(default_factory=TextStream)
    given_up: bool = False
    """Nobody waits for it any more; set by any thread."""
    prefilled_as: Prefilled | None = None
    """Its prompt on the device, while it is in prefill."""
    prompt_scores: list[TokenScore] = dataclasses.field(default_factory=list)
    cached_tokens: int = 0
    submitted_s: float = dataclasses.field(default_factory=time.monotonic)
    queued_s: float = 0.0
    last_token: int = 0

    @classmethod
    def of(cls, request: Request, index: int, on_event: OnEvent) -> "Sample":
        """Returns the sample for one request of a submission."""
        return cls(
            request=request,
            on_event=lambda event: on_event(index, event),
            stream=TextStream(request.stop),
        )


class Worker:
    """Takes turns on the device."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler[Sample],
        prefixes: PrefixCache,
        lock: threading.RLock,
        *,
        chunk: int,
        end_ids: Collection[int],
        token_bytes: Callable[[int], bytes],
    ) -> None:
        """Makes a worker; `lock` guards the scheduler, and any of `end_ids` ends a sample."""
        self._runner = runner
        self._scheduler = scheduler
        self._prefixes = prefixes
        self._lock = lock
        self._chunk = chunk
        self._end_ids = frozenset(end_ids)
        self._token_bytes = token_bytes
        self.counts = Counts()

    def turn(self) -> None:
        """Computes at most one chunk's worth of prompts and one step of the batch."""
        self._drop_given_up()
        self._run_prompts()
        self._run_step()

    def fail_all(self, kind: FailureKind, message: str) -> None:
        """Ends every sample."""
        with self._lock:
            samples = self._scheduler.jobs
        for sample in samples:
            self._end(sample, Failed(kind, message))

    def _drop_given_up(self) -> None:
        now_s = time.monotonic()
        with self._lock:
            samples = self._scheduler.jobs
        for sample in samples:
            deadline_s = sample.request.deadline_s
            if sample.given_up:
                self._end(sample, Failed("cancelled", "the client went away"))
            elif deadline_s is not None and now_s > deadline_s:
                self._end(sample, Failed("deadline", "the request took longer than it may"))

    def _run_prompts(self) -> None:
        budget = self._chunk
        while budget > 0:
            with self._lock:
                sample = self._scheduler.next_prompt()
            if sample is None:
                return
            budget -= max(MIN_CHUNK, self._run_chunk(sample))

    def _run_chunk(self, sample: Sample) -> int:
        """Returns how many tokens of a prompt it ran; after the last ones the sample starts."""
        request = sample.request
        prompt = request.prompt
        prefilled = sample.prefilled_as or self._begin(sample)
        start = sample.prefilled
        chunk = prompt[start : start + self._chunk]
        if chunk:
            following = prompt[start + 1 : start + 1 + len(chunk)] if request.score_prompt else ()
            prefilled, scores = self._runner.prefill(prefilled, chunk, start, following)
            sample.prefilled += len(chunk)
            if scores is not None:
                count = request.alternatives
                found = [scores.score(i, count) for i in range(len(following))]
                if not all(score.is_finite for score in found):
                    self._end(sample, _NOT_FINITE)
                    return len(chunk)
                sample.prompt_scores += found
        sample.prefilled_as = prefilled
        if sample.prefilled == len(prompt):
            self._start(sample, prefilled)
        return len(chunk)

    def _begin(self, sample: Sample) -> Prefilled:
        """Returns what the prompt runs into, with as much of it done as others have done before."""
        request = sample.request
        sample.queued_s = time.monotonic() - sample.submitted_s
        # Scores come from running the tokens.
        match = None if request.score_prompt else self._prefixes.find(request.prompt)
        self.counts.prompt_tokens += len(request.prompt)
        if match is None:
            return self._runner.begin(len(request.prompt), None)
        sample.prefilled = sample.cached_tokens = match.num_tokens
        self.counts.cached_tokens += match.num_tokens
        if match.num_tokens == len(request.prompt):
            return match.prefilled
        return self._runner.begin(len(request.prompt), match.prefilled)

    def _start(self, sample: Sample, prefilled: Prefilled) -> None:
        """Tells the prompt's scores, chooses the first token, and gives the sample its row."""
        request = sample.request
        sample.prefilled_as = None
        if request.score_prompt:
            self._tell(sample, PromptScores(tuple(sample.prompt_scores)))
        if request.max_tokens == 0:
            self._finish(sample, "length")
            return
        first = self._runner.choose(prefilled, request).score(0, request.alternatives)
        if first.is_finite:
            # One that is not would spoil every prompt that begins alike.
            self._prefixes.add(request.prompt, prefilled)
        self._take(sample, first)
        with self._lock:
            if sample is not self._scheduler.prefilling:
                return
            layout = self._scheduler.start(sample)
        if layout is not None:
            self._runner.reform(layout)
        assert sample.row is not None
        self._runner.put(sample.row, prefilled, request)

    def _run_step(self) -> None:
        with self._lock:
            rows = dict(self._scheduler.running)
            layout = (self._scheduler.fit() or self._scheduler.shrink()) if rows else None
            idle = not rows and self._scheduler.reset()
            rows = dict(self._scheduler.running)
            num_rows = self._scheduler.num_rows
        if idle:
            self._runner.reset()
        if layout is not None:
            self._runner.reform(layout)
        if not rows:
            return
        tokens, positions = [0] * num_rows, [0] * num_rows
        for row, sample in rows.items():
            tokens[row], positions[row] = sample.last_token, sample.position - 1
        chosen = self._runner.decode(tokens, positions)
        self.counts.decode_steps += 1
        for row, sample in rows.items():
            if not sample.given_up:
                self._take(sample, chosen.score(row, sample.request.alternatives))

    def _take(self, sample: Sample, score: TokenScore) -> None:
        """Gives a sample its next token, which may end it."""
        if not score.is_finite:
            self._end(sample, _NOT_FINITE)
            return
        request = sample.request
        sample.generated += 1
        sample.last_token = score.token
        self.counts.generated_tokens += 1
        ended = score.token in self._end_ids and not request.ignore_end_of_text
        text = "" if ended else sample.stream.push(self._token_bytes(score.token))
        reason: FinishReason | None = "stop" if ended or sample.stream.stopped else None
        if reason is None and sample.generated == request.max_tokens:
            reason = "length"
        if reason is not None:
            text += sample.stream.finish()
            reason = "stop" if sample.stream.stopped else reason
        self._tell(sample, Piece((score,), text))
        if reason is not None:
            self._finish(sample, reason)

    def _finish(self, sample: Sample, reason: FinishReason) -> None:
        self._end(sample, Finished(reason, sample.cached_tokens, sample.queued_s))

    def _end(self, sample: Sample, event: Finished | Failed) -> None:
        """Takes a sample out, wherever it is, and tells its client."""
        row = sample.row
        with self._lock:
            self._scheduler.end(sample)
        if row is not None:
            self._runner.remove(row)
        sample.prefilled_as = None
        if isinstance(event, Finished):
            self.counts.finished += 1
        elif event.kind == "cancelled":
            self.counts.cancelled += 1
        else:
            self.counts.failed += 1
        self._tell(sample, event)

    def _tell(self, sample: Sample, event: Event) -> None:
        try:
            sample.on_event(event)
        except Exception:
            # A client that cannot be told must not harm the others.
            _log.exception("a client could not be told of %s", type(event).__name__)
            sample.given_up = True
