"""The engine as its clients see it, against the generator and the scorer, which batch otherwise."""

from __future__ import annotations

import dataclasses
import math
import queue
import threading
import time
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
import pytest

from meshlm.data.special_tokens import SpecialTokens
from meshlm.data.tokenizer import Tokenizer, train_bpe
from meshlm.generation import DecodeModel, Generator, SamplingConfig, Scorer
from meshlm.model.params import Embedding
from meshlm.serving.config import EngineConfig
from meshlm.serving.engine import Engine, Loaded
from meshlm.serving.requests import (
    Event,
    Failed,
    Finished,
    NotReadyError,
    Piece,
    PromptScores,
    QueueFullError,
    Request,
    TokenScore,
)
from tiny import CONFIG, F32, draw_params, mesh_of

TEXT = "the quick brown fox jumps over the lazy dog; the dog sleeps, and the fox runs on. " * 20
MODEL = dataclasses.replace(CONFIG, vocab_size=384, context_length=300)
# Small enough to compile in seconds, and still with rows, places and chunks of several sizes.
SIZES = EngineConfig(slots=3, max_queue=12, prefill_chunk=64)
TIMEOUT_S = 60


class Client:
    """What one submission hears."""

    def __init__(self, engine: Engine, *requests: Request) -> None:
        self.events: list[list[Event]] = [[] for _ in requests]
        self.heard: queue.Queue[tuple[int, Event]] = queue.Queue()
        self._open = len(requests)
        self.submission = engine.submit(requests, lambda i, event: self.heard.put((i, event)))

    def next(self) -> tuple[int, Event]:
        index, event = self.heard.get(timeout=TIMEOUT_S)
        self.events[index].append(event)
        self._open -= isinstance(event, Finished | Failed)
        return index, event

    def finish(self) -> Client:
        while self._open:
            self.next()
        return self

    def scores(self, index: int = 0) -> list[TokenScore]:
        pieces = [event for event in self.events[index] if isinstance(event, Piece)]
        return [score for piece in pieces for score in piece.tokens]

    def tokens(self, index: int = 0) -> list[int]:
        return [score.token for score in self.scores(index)]

    def text(self, index: int = 0) -> str:
        return "".join(event.text for event in self.events[index] if isinstance(event, Piece))

    def end(self, index: int = 0) -> Event:
        return self.events[index][-1]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([TEXT], 300)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> DecodeModel:
    return make_model(tokenizer)


def make_model(tokenizer: Tokenizer, nan_token: int | None = None) -> DecodeModel:
    params = draw_params(MODEL)
    if nan_token is not None:
        table = params.embedding.tokens.at[nan_token].set(jnp.nan)
        params = dataclasses.replace(params, embedding=Embedding(tokens=table))
    return DecodeModel.prepare(
        params, MODEL, F32, allowed_vocab=tokenizer.vocab_size, mesh=mesh_of()
    )


def started(model: DecodeModel, tokenizer: Tokenizer, config: EngineConfig = SIZES) -> Engine:
    loaded = Loaded(model=model, tokenizer=tokenizer, special_tokens=SpecialTokens.of(tokenizer))
    engine = Engine(lambda: loaded, config)
    engine.start()
    wait_until(lambda: engine.state != "loading")
    assert engine.state == "ready", engine.error
    return engine


def wait_until(condition) -> None:
    done = threading.Event()
    for _ in range(100 * TIMEOUT_S):
        if condition():
            return
        done.wait(0.01)
    raise AssertionError("waited in vain")


@pytest.fixture(scope="module")
def engine(model: DecodeModel, tokenizer: Tokenizer) -> Iterator[Engine]:
    engine = started(model, tokenizer)
    yield engine
    engine.drain()
    assert engine.join(TIMEOUT_S)
    assert engine.state == "stopped"


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, 256, length).tolist())


def expect(
    model: DecodeModel, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], **options
) -> list[list[list[int]]]:
    generator = Generator(
        model,
        end_ids=(tokenizer.end_of_text_id,),
        start_id=tokenizer.end_of_text_id,
        token_bytes=tokenizer.token_bytes,
    )
    done = generator.generate(prompts, SamplingConfig(**options))
    return [[sample.tokens for sample in samples] for samples in done]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 0.9, "top_p": 0.9, "seed": 7},
        {"temperature": 1.3, "top_k": 20, "min_p": 0.02, "repetition_penalty": 1.2, "seed": 1},
    ],
)
def test_gives_the_generators_tokens(engine, model, tokenizer, options) -> None:
    lengths = (1, 5, 63, 64, 65, 200, 270)
    prompts = [prompt(length, seed=length) for length in lengths]
    expected = expect(model, tokenizer, prompts, max_tokens=24, n=2, **options)
    requests = [
        Request(prompt=one, max_tokens=24, prompt_index=i, sample_index=j, **options)
        for i, one in enumerate(prompts)
        for j in range(2)
    ]
    client = Client(engine, *requests).finish()
    got = [client.tokens(k) for k in range(len(requests))]
    assert got == [tokens for samples in expected for tokens in samples]


def test_neighbours_change_nothing(engine: Engine) -> None:
    asked = Request(prompt=prompt(40), max_tokens=30, temperature=1.0, seed=3)
    alone = Client(engine, asked).finish()
    others = [
        Request(prompt=prompt(100 + i, i), max_tokens=10 + i, temperature=0.5, seed=i)
        for i in range(4)
    ]
    among = Client(engine, others[0], others[1], asked, *others[2:]).finish()
    assert among.tokens(2) == alone.tokens()
    np.testing.assert_allclose(
        [score.log_prob for score in among.scores(2)],
        [score.log_prob for score in alone.scores()],
        atol=1e-5,
    )


def test_nothing_compiles_once_it_is_ready(engine: Engine) -> None:
    before = engine.stats.compilations
    assert before > 0
    for length in range(1, 290, 4):
        count = length % 5 + 1
        Client(
            engine,
            *(
                Request(
                    prompt=prompt(length, i),
                    max_tokens=i % 3 + 1,
                    score_prompt=i % 2 == 0,
                    temperature=float(i % 2),
                )
                for i in range(count)
            ),
        ).finish()
    assert engine.stats.compilations == before


@pytest.mark.parametrize("length", [1, 2, 64, 65, 130, 299])
def test_scores_the_prompt_as_the_scorer_does(engine, model, tokenizer, length: int) -> None:
    tokens = prompt(length, 5)
    request = Request(prompt=tokens, max_tokens=1, temperature=0, score_prompt=True, alternatives=5)
    client = Client(engine, request).finish()
    first = client.events[0][0]
    assert isinstance(first, PromptScores)
    expected = Scorer(model, start_id=tokenizer.end_of_text_id).token_logprobs([tokens])[0]
    assert [score.token for score in first.scores] == list(tokens[1:])
    found = [score.log_prob for score in first.scores]
    np.testing.assert_allclose(found, expected.log_probs, atol=2e-5)
    greedy = [score.log_prob == max(p for _, p in score.top) for score in first.scores]
    assert greedy == expected.is_greedy.tolist()
    for score in (*first.scores, *client.scores()):
        assert len(score.top) == 5
        assert sorted((p for _, p in score.top), reverse=True) == [p for _, p in score.top]
        assert all(p == score.log_prob for token, p in score.top if token == score.token)


def test_scores_without_generating(engine: Engine) -> None:
    client = Client(engine, Request(prompt=prompt(70), max_tokens=0, score_prompt=True)).finish()
    scores, end = client.events[0]
    assert isinstance(scores, PromptScores)
    assert len(scores.scores) == 69
    assert end == Finished("length", 0)


def test_penalties_and_biases_are_those_of_their_definition(engine, model, tokenizer) -> None:
    tokens = prompt(12)
    request = Request(
        prompt=tokens,
        max_tokens=24,
        temperature=0,
        presence_penalty=0.7,
        frequency_penalty=0.4,
        logit_bias={7: 3.0, 9: -100.0, 30: 1.5},
        ignore_end_of_text=True,
    )
    got = Client(engine, request).finish().tokens()
    scorer = Scorer(model, start_id=tokenizer.end_of_text_id)
    expected: list[int] = []
    for _ in got:
        logits = scorer.logits(np.array([[*tokens, *expected]]))[0, -1].astype(np.float64)
        logits = logits[: tokenizer.vocab_size]
        for token in set(expected):
            logits[token] -= 0.7 + 0.4 * expected.count(token)
        for token, bias in request.logit_bias.items():
            logits[token] += bias
        expected.append(int(np.argmax(logits)))
    assert got == expected
    plain = dataclasses.replace(request, presence_penalty=0, frequency_penalty=0, logit_bias={})
    assert Client(engine, plain).finish().tokens() != got


def test_a_bias_of_minus_100_forbids(engine: Engine) -> None:
    asked = Request(prompt=prompt(8), max_tokens=12, temperature=0, repetition_penalty=0.01)
    repeated = Client(engine, asked).finish().tokens()[-1]
    forbidden = dataclasses.replace(asked, logit_bias={repeated: -100.0})
    assert repeated not in Client(engine, forbidden).finish().tokens()


def test_stop_texts_end_it_and_stay_out(engine: Engine, tokenizer: Tokenizer) -> None:
    asked = Request(prompt=prompt(9), max_tokens=40, temperature=1.0, seed=5)
    whole = Client(engine, asked).finish()
    text = whole.text()
    stop = text[5:8]
    client = Client(engine, dataclasses.replace(asked, stop=(stop, "never this"))).finish()
    assert client.text() == text[: text.index(stop)]
    assert isinstance(client.end(), Finished)
    assert client.end().reason == "stop"
    assert b"".join(map(tokenizer.token_bytes, client.tokens())).decode(errors="replace")


def test_end_of_text_ends_it_and_is_told(engine: Engine, tokenizer: Tokenizer) -> None:
    end = tokenizer.end_of_text_id
    asked = Request(prompt=prompt(10), max_tokens=9, temperature=0, logit_bias={end: 100.0})
    client = Client(engine, asked).finish()
    assert (client.tokens(), client.text(), client.end()) == ([end], "", Finished("stop", 0))
    on = Client(engine, dataclasses.replace(asked, ignore_end_of_text=True)).finish()
    assert on.tokens() == [end] * 9
    assert isinstance(on.end(), Finished)
    assert on.end().reason == "length"


def test_prompts_that_begin_alike_run_their_beginning_once(engine: Engine) -> None:
    common = prompt(150, seed=77)
    first = Client(engine, Request(prompt=common, max_tokens=8, temperature=0)).finish()
    assert first.end() == Finished("length", 0)
    again = Client(engine, Request(prompt=common, max_tokens=8, temperature=0)).finish()
    assert again.end() == Finished("length", 150)
    assert again.scores() == first.scores()
    longer = (*common, *prompt(100, seed=78))
    reused = Client(engine, Request(prompt=longer, max_tokens=8, temperature=0)).finish()
    assert reused.end() == Finished("length", 128)
    scored = Request(prompt=longer, max_tokens=8, temperature=0, score_prompt=True)
    anew = Client(engine, scored).finish()
    assert anew.end() == Finished("length", 0)
    assert anew.tokens() == reused.tokens()


def test_a_client_that_goes_frees_its_slot_in_two_steps(engine: Engine) -> None:
    client = Client(engine, *(Request(prompt=prompt(9, i), max_tokens=250) for i in range(3)))
    while sum(isinstance(event, Piece) for events in client.events for event in events) < 9:
        client.next()
    before = engine.stats
    client.submission.cancel()
    client.finish()
    after = engine.stats
    assert after.decode_steps - before.decode_steps <= 2
    assert (after.cancelled - before.cancelled, after.running) == (3, 0)
    assert {end.kind for end in map(client.end, range(3)) if isinstance(end, Failed)} == {
        "cancelled"
    }


def test_a_client_that_goes_while_it_waits_is_forgotten(engine: Engine) -> None:
    running = Client(engine, *(Request(prompt=prompt(9, i), max_tokens=200) for i in range(3)))
    wait_until(lambda: engine.stats.running == 3 and not engine.stats.waiting)
    waiting = Client(engine, Request(prompt=prompt(200), max_tokens=200))
    assert waiting.submission.ahead == 0
    behind = Client(engine, Request(prompt=prompt(3), max_tokens=2))
    assert behind.submission.ahead == 1
    assert running.submission.ahead is None
    waiting.submission.cancel()
    running.submission.cancel()
    assert waiting.finish().events == [[Failed("cancelled", "the client went away")]]
    running.finish()
    assert isinstance(behind.finish().end(), Finished)


def test_deadlines_end_what_runs_and_what_waits(engine: Engine) -> None:
    soon = time.monotonic() + 0.02
    asked = [Request(prompt=prompt(200, i), max_tokens=90, deadline_s=soon) for i in range(8)]
    client = Client(engine, *asked).finish()
    ends = [client.end(i) for i in range(8)]
    assert all(isinstance(end, Failed) and end.kind == "deadline" for end in ends[-3:])
    assert engine.stats.running == engine.stats.waiting == 0


def test_the_queue_is_bounded_and_takes_all_or_none(engine: Engine) -> None:
    full = Client(engine, *(Request(prompt=prompt(20), max_tokens=200) for _ in range(15)))
    with pytest.raises(QueueFullError):
        Client(engine, Request(prompt=prompt(2)), Request(prompt=prompt(2)))
    full.submission.cancel()
    full.finish()
    Client(engine, Request(prompt=prompt(2))).finish()


def test_a_client_that_cannot_be_told_harms_nobody(engine: Engine) -> None:
    def broken(index: int, event: Event) -> None:
        raise RuntimeError("no ears")

    good = Client(engine, Request(prompt=prompt(30), max_tokens=30, temperature=0))
    engine.submit([Request(prompt=prompt(31), max_tokens=200)], broken)
    assert len(good.finish().tokens()) == 30
    wait_until(lambda: engine.stats.running == 0)


def test_numbers_that_are_not_finite_fail_their_own_sample(tokenizer: Tokenizer) -> None:
    poisoned = 250
    engine = started(make_model(tokenizer, nan_token=poisoned), tokenizer)
    clean = tuple(token for token in prompt(30) if token != poisoned)
    bias = {poisoned: -100.0}
    client = Client(
        engine,
        Request(prompt=(1, poisoned, 2), max_tokens=5),
        Request(prompt=clean, max_tokens=20, temperature=0, logit_bias=bias),
        Request(prompt=clean[:9], max_tokens=20, temperature=0, logit_bias=bias),
    ).finish()
    assert client.end(0) == Failed("engine", "the model's output is not finite")
    for index in (1, 2):
        assert isinstance(client.end(index), Finished)
        assert all(math.isfinite(score.log_prob) for score in client.scores(index))
    # Nor does what begins like it, nor whoever has its row next.
    common = (clean * 3)[:70]
    scored = Request(prompt=(*common, poisoned, 2), max_tokens=0, score_prompt=True)
    spoiled = Request(prompt=(*common, *clean[:20], poisoned), max_tokens=5)
    ends = Client(engine, scored, spoiled).finish()
    assert ends.end(0) == ends.end(1) == Failed("engine", "the model's output is not finite")
    after = Request(prompt=(*common, 1, 2), max_tokens=9, temperature=0, logit_bias=bias)
    assert isinstance(Client(engine, after).finish().end(), Finished)
    engine.drain()
    assert engine.join(TIMEOUT_S)


def test_drains_aborts_and_refuses(model: DecodeModel, tokenizer: Tokenizer) -> None:
    config = dataclasses.replace(SIZES, slots=1)
    engine = started(model, tokenizer, config)
    running = Client(engine, Request(prompt=prompt(5), max_tokens=40))
    running.next()
    engine.drain()
    with pytest.raises(NotReadyError) as refused:
        Client(engine, Request(prompt=prompt(5)))
    assert refused.value.state == "draining"
    assert isinstance(running.finish().end(), Finished)
    assert engine.join(TIMEOUT_S)
    assert engine.state == "stopped"

    engine = started(model, tokenizer, config)
    client = Client(engine, *(Request(prompt=prompt(5, i), max_tokens=280) for i in range(3)))
    client.next()
    engine.abort("the server stops now")
    client.finish()
    assert [client.end(i) for i in range(3)] == [Failed("draining", "the server stops now")] * 3
    assert engine.join(TIMEOUT_S)


def test_a_device_that_fails_ends_everything_in_words(
    model, tokenizer, monkeypatch, caplog
) -> None:
    engine = started(model, tokenizer, dataclasses.replace(SIZES, slots=1))
    client = Client(engine, *(Request(prompt=prompt(5, i), max_tokens=280) for i in range(3)))
    client.next()

    def fail(*_: object) -> None:
        raise RuntimeError("device lost")

    assert engine._worker is not None
    monkeypatch.setattr(engine._worker._runner, "decode", fail)
    client.finish()
    ends = [client.end(i) for i in range(3)]
    assert all(isinstance(end, Failed) and end.kind == "engine" for end in ends)
    assert engine.join(TIMEOUT_S)
    assert engine.state == "failed"
    assert str(engine.error) == "device lost"
    assert "the engine has failed" in caplog.text
    with pytest.raises(NotReadyError):
        Client(engine, Request(prompt=prompt(5)))


def test_weights_that_cannot_be_loaded_are_told() -> None:
    def load() -> Loaded:
        raise ValueError("no weights there")

    engine = Engine(load, SIZES)
    with pytest.raises(NotReadyError):
        engine.submit([Request(prompt=(1,))], lambda index, event: None)
    engine.start()
    assert engine.join(TIMEOUT_S)
    assert (engine.state, str(engine.error)) == ("failed", "no weights there")
