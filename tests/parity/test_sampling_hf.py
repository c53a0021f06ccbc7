"""The logits pipeline against the processors of transformers, in its order."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from meshlm.generation import sampling

pytestmark = pytest.mark.parity

ROWS, VOCAB, SEEN = 16, 997, 40
CASES = {
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 12},
    "top_p": {"top_p": 0.83},
    "min_p": {"min_p": 0.04},
    "repetition": {"repetition_penalty": 1.8},
    "all": {
        "temperature": 1.6,
        "top_k": 60,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.3,
    },
    "cold": {"temperature": 0.4, "top_p": 0.95, "repetition_penalty": 0.8},
}


def theirs(logits: np.ndarray, tokens: np.ndarray, options: dict[str, float]) -> np.ndarray:
    makers = {
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    processors = LogitsProcessorList(
        [makers[name](options[name]) for name in makers if name in options]
    )
    scores = processors(torch.from_numpy(tokens), torch.from_numpy(logits.copy()))
    return torch.softmax(scores, dim=-1).numpy()


def ours(logits: np.ndarray, tokens: np.ndarray, options: dict[str, float]) -> np.ndarray:
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, tokens, True, axis=1)

    def column(name: str, neutral: float, dtype: type = np.float32) -> jnp.ndarray:
        return jnp.full(ROWS, options.get(name, neutral), dtype)

    rows = sampling.RowOptions(
        seed=jnp.zeros(ROWS, np.uint32),
        seed_high=jnp.zeros(ROWS, np.uint32),
        prompt_index=jnp.zeros(ROWS, np.int32),
        sample_index=jnp.zeros(ROWS, np.int32),
        temperature=column("temperature", 1.0),
        top_k=column("top_k", VOCAB, np.int32),
        top_p=column("top_p", 1.0),
        min_p=column("min_p", 0.0),
        repetition_penalty=column("repetition_penalty", 1.0),
    )
    scores = sampling.process_logits(jnp.asarray(logits), jnp.asarray(seen), rows, VOCAB)
    return np.exp(np.asarray(sampling.log_probs(scores)))


@pytest.mark.parametrize("case", CASES)
def test_the_distribution_is_that_of_transformers(case: str) -> None:
    generator = np.random.default_rng(3)
    logits = generator.normal(size=(ROWS, VOCAB), scale=2.5).astype(np.float32)
    tokens = generator.integers(0, VOCAB, (ROWS, SEEN))
    expected = theirs(logits, tokens, CASES[case])
    found = ours(logits, tokens, CASES[case])
    assert (expected == 0).any() or case in ("temperature", "repetition")
    np.testing.assert_array_equal(found > 0, expected > 0)
    np.testing.assert_allclose(found, expected, atol=2e-7, rtol=2e-5)
