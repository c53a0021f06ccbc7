"""Prefill and cached decoding against the plain forward pass, and the loop around them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshlm.core.errors import UsageError
from meshlm.generation import (
    DecodeModel,
    Generation,
    Generator,
    SamplingConfig,
    Scorer,
    buckets,
    decode,
    generate,
)
from meshlm.generation.sampling import RowOptions
from meshlm.model.config import ModelConfig
from meshlm.model.params import Params, init_params
from meshlm.model.presets import PRESETS
from meshlm.model.transformer import Compute, forward

CONFIG = dataclasses.replace(PRESETS["test"], vocab_size=384)
CONTEXT = CONFIG.context_length
ALLOWED = 300
END = 299
F32 = Compute(dtype="float32")
SHORT, LONG = [1, 2, 3], [7, 8, 9, 10, 11] * 8


@pytest.fixture(scope="module")
def params() -> Params:
    # Larger than at initialisation: greedy text then does not just repeat one token.
    return jax.jit(lambda key: jax.tree.map(lambda x: 4 * x, init_params(CONFIG, key)))(
        jax.random.key(0)
    )


@pytest.fixture(scope="module")
def model(params: Params) -> DecodeModel:
    return DecodeModel.prepare(params, CONFIG, F32, allowed_vocab=ALLOWED)


@pytest.fixture(scope="module")
def generator(model: DecodeModel) -> Generator:
    return make_generator(model)


def token_bytes(token: int) -> bytes:
    """Two bytes a token: every other one cuts a two-byte character in half."""
    return chr(0x100 + token).encode()[:1] + b"-" if token % 7 == 0 else f"{token} ".encode()


def make_generator(model: DecodeModel, end: int = END) -> Generator:
    return Generator(
        model, end_ids=() if end is None else (end,), start_id=end, token_bytes=token_bytes
    )


def greedy(max_tokens: int = 20, **options: object) -> SamplingConfig:
    return SamplingConfig(max_tokens=max_tokens, temperature=0.0, **options)


_forward = jax.jit(lambda params, tokens: forward(params, CONFIG, tokens, F32))


def full_logits(params: Params, tokens: list[int]) -> np.ndarray:
    """The plain forward pass, padded on the right to the context: what follows cannot be seen."""
    padded = decode.pad_rows([tokens], 1, CONTEXT)
    return np.asarray(_forward(params, padded))[0, : len(tokens)]


def full_log_probs(params: Params, tokens: list[int]) -> np.ndarray:
    logits = full_logits(params, tokens).astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def tolerance(params: Params, tokens: list[int]) -> float:
    """1e-5 of the logits' scale."""
    return 1e-5 * float(np.abs(full_logits(params, tokens)).max())


def tokens_of(results: list[list[Generation]]) -> list[list[int]]:
    return [sample.tokens for samples in results for sample in samples]


# Cached decoding is the forward pass.


def test_cached_logits_equal_the_full_forward_at_every_position(
    params: Params, model: DecodeModel
) -> None:
    sequences = [list(SHORT), list(LONG)]
    rows = [len(tokens) for tokens in sequences]
    seen = np.zeros((2, CONFIG.vocab_size), bool)
    state = decode.init_state(seen, num_places=64, shape=model.shape)
    for row, tokens in enumerate(sequences):
        length = buckets.prompt_bucket(len(tokens), CONTEXT)
        hidden, cache = decode.prefill(
            model.params,
            decode.pad_rows([tokens], 1, length),
            np.array([len(tokens)], np.int32),
            shape=model.shape,
        )
        source = np.where(np.arange(2) == row, 0, -1).astype(np.int32)
        state = decode.place(state, hidden, cache, source)
    options = greedy_options(2)
    for _ in range(64 - max(rows)):
        cached = np.asarray(decode.next_logits(model.params, state, model.shape))
        for row, tokens in enumerate(sequences):
            full = full_logits(params, tokens)[-1]
            assert np.abs(cached[row] - full).max() <= 1e-5 * np.abs(full).max()
        progress = decode.RowProgress(
            positions=np.array([len(tokens) for tokens in sequences], np.int32),
            remaining=np.full(2, 9, np.int32),
            end_tokens=np.full((2, 1), -1, np.int32),
        )
        state, steps = decode.decode(
            model.params,
            state,
            progress,
            options,
            np.int32(1),
            alternatives=False,
            shape=model.shape,
        )
        for row, tokens in enumerate(sequences):
            tokens.append(int(steps.tokens[0, row]))
    assert len(set(sequences[0])) > 5, "too dull a text to test anything"


def greedy_options(rows: int) -> RowOptions:
    zeros = np.zeros(rows, np.int32)
    return RowOptions(
        seed=zeros.astype(np.uint32),
        seed_high=zeros.astype(np.uint32),
        prompt_index=zeros,
        sample_index=zeros,
        temperature=np.zeros(rows, np.float32),
        top_k=np.full(rows, CONFIG.vocab_size, np.int32),
        top_p=np.ones(rows, np.float32),
        min_p=np.zeros(rows, np.float32),
        repetition_penalty=np.ones(rows, np.float32),
    )


def test_log_probabilities_and_alternatives_are_those_of_the_forward_pass(
    params: Params, generator: Generator
) -> None:
    config = SamplingConfig(max_tokens=30, temperature=0.7, top_k=9, logprobs=3, seed=3)
    (result,) = generator.generate([LONG], config)[0]
    expected = full_log_probs(params, LONG + result.tokens)[len(LONG) - 1 : -1]
    close = tolerance(params, LONG + result.tokens)
    assert result.top_logprobs is not None
    for row, token, log_prob, best in zip(
        expected, result.tokens, result.logprobs, result.top_logprobs, strict=True
    ):
        assert log_prob == pytest.approx(row[token], abs=close)
        ids = np.argsort(-row[:ALLOWED])[:3]
        assert list(best) == ids.tolist()
        assert list(best.values()) == pytest.approx(row[ids], abs=close)


def test_repetition_penalty_counts_prompt_and_output(params: Params, generator: Generator) -> None:
    (result,) = generator.generate([LONG], greedy(25, repetition_penalty=1.7))[0]
    tokens = list(LONG)
    for _ in range(25):
        logits = full_logits(params, tokens)[-1, :ALLOWED].copy()
        seen = list(set(tokens))
        logits[seen] = np.where(logits[seen] < 0, logits[seen] * 1.7, logits[seen] / 1.7)
        tokens.append(int(logits.argmax()))
    assert result.tokens == tokens[len(LONG) :]
    plain = generator.generate([LONG], greedy(25))[0][0]
    assert plain.tokens != result.tokens


def test_bfloat16_follows_the_same_weights(params: Params) -> None:
    compute = Compute(dtype="bfloat16")
    model = DecodeModel.prepare(params, CONFIG, compute, allowed_vocab=ALLOWED)
    assert model.params.head.weight.dtype == jnp.bfloat16
    assert model.params.embedding.tokens.dtype == jnp.float32
    (result,) = make_generator(model).generate([SHORT], greedy(8))[0]
    found = jax.jit(lambda p, t: forward(p, CONFIG, t, compute))(
        params, decode.pad_rows([SHORT + result.tokens], 1, CONTEXT)
    )
    expected = jax.nn.log_softmax(found[0])
    for i, (token, log_prob) in enumerate(zip(result.tokens, result.logprobs, strict=True)):
        assert log_prob == pytest.approx(float(expected[len(SHORT) - 1 + i, token]), abs=0.05)


# Who else is in the batch makes no difference.


def test_greedy_tokens_are_the_same_alone_together_and_in_another_order(
    generator: Generator,
) -> None:
    prompts = [SHORT, LONG, [5] * 20, [250, 4]]
    together = tokens_of(generator.generate(prompts, greedy()))
    assert [tokens_of(generator.generate([p], greedy()))[0] for p in prompts] == together
    assert tokens_of(generator.generate(prompts[::-1], greedy()))[::-1] == together
    assert len({tuple(tokens) for tokens in together}) == len(prompts)


def test_sampled_tokens_depend_on_seed_prompt_index_and_sample_index(generator: Generator) -> None:
    config = SamplingConfig(max_tokens=20, top_p=0.95, seed=11, n=2)
    alone = generator.generate([SHORT], config)
    together = generator.generate([SHORT, LONG, SHORT], config)
    assert tokens_of(together[:1]) == tokens_of(alone)
    assert tokens_of(together[2:]) != tokens_of(alone), "another prompt index"
    assert alone[0][0].tokens != alone[0][1].tokens, "another sample index"
    assert tokens_of(generator.generate([SHORT], dataclasses.replace(config, n=1))) == [
        alone[0][0].tokens
    ]
    other_seed = generator.generate([SHORT], dataclasses.replace(config, seed=12))
    assert other_seed[0][0].tokens != alone[0][0].tokens


def test_numbers_are_bit_identical_within_a_batch_bucket(generator: Generator) -> None:
    config = SamplingConfig(max_tokens=16, seed=1)
    first = generator.generate([SHORT, LONG, [9]], config)
    second = generator.generate([SHORT, [30] * 35, [250], [1, 2]], config)
    assert first[0][0].tokens == second[0][0].tokens
    assert first[0][0].logprobs == second[0][0].logprobs


def test_rows_beyond_one_group_are_generated_too(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SamplingConfig(max_tokens=6, n=2)
    prompts = [SHORT, LONG, [4]]
    whole = tokens_of(generator.generate(prompts, config))
    monkeypatch.setattr(generate, "MAX_ROWS", 4)
    assert tokens_of(generator.generate(prompts, config)) == whole


def test_a_generator_may_decode_more_or_fewer_rows_together(
    model: DecodeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[int] = []
    run_group = Generator._run_group

    def count(self, rows, *rest):
        groups.append(len(rows))
        run_group(self, rows, *rest)

    monkeypatch.setattr(Generator, "_run_group", count)
    few = Generator(model, end_ids=(), start_id=None, token_bytes=token_bytes, max_rows=2)
    few.generate([SHORT, [4], [5]], SamplingConfig(max_tokens=2))
    assert groups == [2, 1]


# Stopping.


def test_end_of_text_ends_a_sample_unless_ignored(model: DecodeModel, generator: Generator) -> None:
    plain = generator.generate([SHORT], greedy())[0][0]
    assert plain.finish_reason == "length"
    end = plain.tokens[9]
    first = plain.tokens.index(end)
    ending = make_generator(model, end)
    result = ending.generate([SHORT], greedy())[0][0]
    assert result.finish_reason == "stop"
    assert result.tokens == plain.tokens[: first + 1]
    expected = b"".join(map(token_bytes, plain.tokens[:first]))
    assert result.text == expected.decode(errors="replace")
    ignored = ending.generate([SHORT], greedy(ignore_end_of_text=True))[0][0]
    assert (ignored.tokens, ignored.text) == (plain.tokens, plain.text)
    assert ignored.finish_reason == "length"


def test_stop_text_across_tokens_is_cut_out(generator: Generator) -> None:
    plain = generator.generate([SHORT], greedy())[0][0]
    middle = len(plain.text) // 2
    stop = plain.text[middle - 3 : middle + 3]
    at = plain.text.index(stop)
    result = generator.generate([SHORT], greedy(stop=(stop,)))[0][0]
    assert (result.text, result.finish_reason) == (plain.text[:at], "stop")
    assert result.tokens == plain.tokens[: len(result.tokens)]
    needed = b"".join(map(token_bytes, result.tokens)).decode(errors="replace")
    assert stop in needed
    assert stop not in b"".join(map(token_bytes, result.tokens[:-1])).decode(errors="ignore")


def test_streamed_pieces_are_the_text(generator: Generator) -> None:
    pieces: dict[tuple[int, int], list[str]] = {}

    def on_text(prompt: int, sample: int, piece: str) -> None:
        assert piece
        pieces.setdefault((prompt, sample), []).append(piece)

    config = SamplingConfig(max_tokens=20, n=2, stop=("1 2", "55"), seed=5)
    streamed = generator.generate([SHORT, LONG], config, on_text)
    assert streamed == generator.generate([SHORT, LONG], config)
    for prompt, samples in enumerate(streamed):
        for sample, result in enumerate(samples):
            assert "".join(pieces[prompt, sample]) == result.text
    assert max(map(len, pieces.values())) > 2, "it came all at once"


def test_generation_ends_with_the_context(generator: Generator) -> None:
    prompt = list(range(CONTEXT - 5))
    result = generator.generate([prompt, SHORT], greedy(64))
    assert (len(result[0][0].tokens), result[0][0].finish_reason) == (5, "length")
    assert len(result[1][0].tokens) == 64
    assert len(generator.generate([[1] * (CONTEXT - 1)], greedy(64))[0][0].tokens) == 1


def test_prompt_without_room_is_refused_with_both_numbers(generator: Generator) -> None:
    with pytest.raises(UsageError, match=rf"prompt 1 has {CONTEXT + 2} tokens.* {CONTEXT},"):
        generator.generate([SHORT, [1] * (CONTEXT + 2)], greedy())
    with pytest.raises(UsageError, match="no room"):
        generator.generate([[1] * CONTEXT], greedy())


def test_id_that_is_no_token_is_refused(generator: Generator) -> None:
    for wrong in (-1, ALLOWED):
        with pytest.raises(UsageError, match=f"token id {wrong}: give ids from 0 to {ALLOWED - 1}"):
            generator.generate([[1, wrong]], greedy())


def test_empty_prompt_is_one_end_of_text(generator: Generator) -> None:
    assert generator.generate([[]], greedy()) == generator.generate([[END]], greedy())


def test_padded_ids_are_never_chosen(params: Params) -> None:
    bias = params.head.bias.at[ALLOWED:].set(1e4)
    model = DecodeModel.prepare(
        dataclasses.replace(params, head=dataclasses.replace(params.head, bias=bias)),
        CONFIG,
        F32,
        allowed_vocab=ALLOWED,
    )
    generator = make_generator(model)
    wild = SamplingConfig(
        max_tokens=40, temperature=50.0, n=2, logprobs=20, ignore_end_of_text=True
    )
    for config in (wild, greedy(logprobs=20)):
        for result in generator.generate([SHORT], config)[0]:
            assert max(result.tokens) < ALLOWED
            assert result.top_logprobs is not None
            assert max(token for best in result.top_logprobs for token in best) < ALLOWED


# Compilations.


@pytest.fixture(scope="module")
def compilations() -> Iterator[list[str]]:
    events: list[str] = []

    def listen(event: str, duration_s: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def test_new_lengths_and_options_do_not_compile_again(
    params: Params, compilations: list[str]
) -> None:
    # A vocabulary of its own, so that nothing is compiled yet.
    generator = make_generator(
        DecodeModel.prepare(params, CONFIG, F32, allowed_vocab=ALLOWED + 1), ALLOWED
    )
    compilations.clear()
    generator.generate([[1] * 20], greedy(20))
    first = len(compilations)
    assert 1 <= first <= 4, "prefill, an empty state, placing and decoding"
    for length in (1, 2, 17, 31, 32):
        for config in (
            greedy(32),
            SamplingConfig(max_tokens=3, top_k=5, top_p=0.5, min_p=0.1, seed=length),
            SamplingConfig(max_tokens=7, temperature=0.3, repetition_penalty=1.3, stop=("x",)),
        ):
            generator.generate([[1] * length], config)
    assert len(compilations) == first
    generator.generate([[1] * 33], greedy(20))
    # A new prompt bucket; the cache's is the same.
    assert len(compilations) <= first + 2


@pytest.mark.parametrize("context", [16, 100, 128, 2048])
def test_buckets_are_few_and_hold_what_they_must(context: int) -> None:
    prompts = {buckets.prompt_bucket(n, context) for n in range(1, context)}
    caches = {buckets.cache_bucket(n, context) for n in range(1, context + 1)}
    assert len(prompts) <= 7
    assert len(caches) <= 6
    assert all(
        n <= buckets.prompt_bucket(n, context) <= buckets.cache_bucket(n, context) <= context
        for n in range(1, context + 1)
    )
    for shards in (1, 3, 4):
        rows = {n: buckets.row_bucket(n, shards) for n in range(1, buckets.MAX_ROWS + 1)}
        assert all(n <= r and r % shards == 0 for n, r in rows.items())
        assert len(set(rows.values())) <= 6


def test_a_prefill_is_bounded_and_shared_within_a_bucket_only() -> None:
    lengths = [10, 2000, 500, 31, 2000, 2000, 33]
    parts = buckets.prefill_parts(lengths, 2048, 1)
    assert sorted(i for _, part in parts for i in part) == list(range(len(lengths)))
    for bucket, part in parts:
        assert len(part) * bucket <= buckets.MAX_PREFILL_TOKENS
        assert {buckets.prompt_bucket(lengths[i], 2048) for i in part} == {bucket}


# Scores.


@pytest.fixture(scope="module")
def scorer(model: DecodeModel) -> Scorer:
    return Scorer(model, start_id=END)


def test_scores_are_those_of_the_forward_pass(params: Params, scorer: Scorer) -> None:
    sequences = [LONG + SHORT, SHORT, [4], [], [3] * CONTEXT]
    for tokens, scores in zip(sequences, scorer.token_logprobs(sequences), strict=True):
        assert len(scores.log_probs) == max(0, len(tokens) - 1)
        if len(tokens) < 2:
            continue
        expected = full_log_probs(params, tokens)[:-1]
        own = expected[np.arange(len(tokens) - 1), tokens[1:]]
        np.testing.assert_allclose(scores.log_probs, own, atol=tolerance(params, tokens), rtol=0)
        best = expected[:, :ALLOWED].argmax(axis=-1)
        np.testing.assert_array_equal(scores.is_greedy, best == np.array(tokens[1:]))


def test_likelihood_of_a_continuation(scorer: Scorer, generator: Generator) -> None:
    result = generator.generate([SHORT], greedy(10))[0][0]
    wrong = [*result.tokens[:-1], (result.tokens[-1] + 1) % ALLOWED]
    found = scorer.loglikelihood([(SHORT, result.tokens), (SHORT, wrong), ([], [5]), ([END], [5])])
    assert found[0].log_prob == pytest.approx(sum(result.logprobs), abs=1e-4)
    assert [likelihood.is_greedy for likelihood in found[:2]] == [True, False]
    assert found[2] == found[3]


def test_logits_are_those_of_the_forward_pass(params: Params, scorer: Scorer) -> None:
    tokens = np.array([LONG, LONG[::-1]])
    found = scorer.logits(tokens)
    assert found.shape == (2, len(LONG), CONFIG.vocab_size)
    for row, logits in zip(tokens.tolist(), found, strict=True):
        expected = full_logits(params, row)
        assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_sequence_longer_than_the_context_is_refused(scorer: Scorer) -> None:
    with pytest.raises(UsageError, match=rf"{CONTEXT + 1} tokens.* {CONTEXT}:"):
        scorer.token_logprobs([[1] * (CONTEXT + 1)])


def test_a_context_that_is_no_power_of_two(params: Params) -> None:
    config: ModelConfig = dataclasses.replace(CONFIG, context_length=100)
    model = DecodeModel.prepare(params, config, F32, allowed_vocab=ALLOWED)
    result = make_generator(model).generate([[1] * 90], greedy(64))[0][0]
    assert len(result.tokens) == 10
    scores = Scorer(model, start_id=END).token_logprobs([[1] * 90 + result.tokens])[0]
    np.testing.assert_allclose(scores.log_probs[89:], result.logprobs, atol=1e-4)
