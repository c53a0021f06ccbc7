"""A server on a `model` axis gives the tokens that one device gives; rows are not split."""

from __future__ import annotations

import dataclasses
import queue

import numpy as np
import pytest

from meshlm.core.errors import UsageError
from meshlm.data.special_tokens import SpecialTokens
from meshlm.data.tokenizer import Tokenizer, train_bpe
from meshlm.generation import DecodeModel, Generator, SamplingConfig, Scorer
from meshlm.serving.config import EngineConfig
from meshlm.serving.engine import Engine, Loaded
from meshlm.serving.requests import Event, Failed, Finished, Piece, PromptScores, Request
from tiny import DIVISIBLE, F32, draw_params, mesh_of, on_mesh

MODEL = dataclasses.replace(DIVISIBLE, vocab_size=384, context_length=300, num_layers=1)
PROMPTS = [(1, 2, 3), tuple(range(70)), (250,)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["what is said here is said twice here"], 300)


def prepare(tokenizer: Tokenizer, **axes: int) -> DecodeModel:
    mesh = mesh_of(**axes)
    params = on_mesh(mesh, MODEL, draw_params(MODEL))
    return DecodeModel.prepare(params, MODEL, F32, allowed_vocab=tokenizer.vocab_size, mesh=mesh)


def started(tokenizer: Tokenizer, **axes: int) -> Engine:
    model = prepare(tokenizer, **axes)
    config = EngineConfig(slots=2, prefill_chunk=64)
    loaded = Loaded(model=model, tokenizer=tokenizer, special_tokens=SpecialTokens.of(tokenizer))
    engine = Engine(lambda: loaded, config)
    engine.start()
    return engine


def test_tokens_and_scores_are_those_of_one_device(tokenizer: Tokenizer) -> None:
    model = prepare(tokenizer)
    end = tokenizer.end_of_text_id
    generator = Generator(
        model,
        end_ids=() if end is None else (end,),
        start_id=end,
        token_bytes=tokenizer.token_bytes,
    )
    sampling = SamplingConfig(max_tokens=24, temperature=0.8, top_p=0.9, seed=3)
    expected = [sample.tokens for (sample,) in generator.generate(PROMPTS, sampling)]
    scores = Scorer(model, start_id=end).token_logprobs([PROMPTS[1]])[0]

    engine = started(tokenizer, model=8)
    heard: queue.Queue[tuple[int, Event]] = queue.Queue()
    requests = [
        Request(
            prompt=prompt,
            max_tokens=24,
            temperature=0.8,
            top_p=0.9,
            seed=3,
            prompt_index=i,
            score_prompt=i == 1,
        )
        for i, prompt in enumerate(PROMPTS)
    ]
    while engine.state == "loading":
        assert engine.join(0.05) is False
    engine.submit(requests, lambda i, event: heard.put((i, event)))
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    ended = 0
    while ended < len(PROMPTS):
        i, event = heard.get(timeout=60)
        assert not isinstance(event, Failed), event
        ended += isinstance(event, Finished)
        if isinstance(event, Piece):
            tokens[i] += [score.token for score in event.tokens]
        if isinstance(event, PromptScores):
            found = [score.log_prob for score in event.scores]
            np.testing.assert_allclose(found, scores.log_probs, atol=2e-5)
    engine.drain()
    assert engine.join(60)
    assert tokens == expected


def test_rows_are_not_split(tokenizer: Tokenizer) -> None:
    engine = started(tokenizer, data=2)
    assert engine.join(60)
    assert isinstance(engine.error, UsageError)
    assert "--mesh.model" in str(engine.error)
