"""Generation on a mesh gives the tokens that one device gives."""

from __future__ import annotations

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

from meshlm.core.sharding import MeshConfig, make_mesh
from meshlm.generation import DecodeModel, Generator, SamplingConfig, Scorer
from meshlm.model.params import init_params
from meshlm.model.presets import PRESETS
from meshlm.model.transformer import Compute

# One layer: all are split alike, and there is much to compile.
CONFIG = dataclasses.replace(PRESETS["test"], vocab_size=384, num_layers=1)
ALLOWED, END = 300, 299
PROMPTS = [[1, 2, 3], [7, 8, 9, 10, 11] * 5, [250]]
GREEDY = SamplingConfig(max_tokens=16, temperature=0.0)
SAMPLED = SamplingConfig(max_tokens=16, top_k=50, top_p=0.95, repetition_penalty=1.1, seed=4)


def prepare(mesh: jax.sharding.Mesh | None) -> DecodeModel:
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        # Larger than at initialisation: greedy text then does not just repeat one token.
        params = jax.jit(lambda key: jax.tree.map(lambda x: 4 * x, init_params(CONFIG, key)))(
            jax.random.key(0)
        )
    compute = Compute(dtype="float32")
    return DecodeModel.prepare(params, CONFIG, compute, allowed_vocab=ALLOWED, mesh=mesh)


def generate(model: DecodeModel) -> dict[str, object]:
    # A lone row is a special case to JAX, and there is one only where the batch is not split.
    alone = PROMPTS[:1] if model.batch_shards == 1 else PROMPTS
    generator = Generator(
        model, end_ids=(END,), start_id=END, token_bytes=lambda token: b"%d " % token
    )
    scores = Scorer(model, start_id=END).token_logprobs([PROMPTS[1]])[0]
    return {
        "greedy": [sample.tokens for (sample,) in generator.generate(PROMPTS, GREEDY)],
        "sampled": [sample.tokens for (sample,) in generator.generate(PROMPTS, SAMPLED)],
        "alone": generator.generate(alone, GREEDY)[0][0].tokens,
        "scores": scores.log_probs,
    }


@pytest.fixture(scope="module")
def expected() -> dict[str, object]:
    found = generate(prepare(None))
    assert found["alone"] == found["greedy"][0]
    return found


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (1, 1, 8), (1, 2, 4), (2, 2, 2)], ids=lambda s: "x".join(map(str, s))
)
def test_tokens_and_scores_are_the_same_on_any_mesh(
    sizes: tuple[int, int, int], expected: dict[str, object]
) -> None:
    replica, data, model = sizes
    mesh = make_mesh(MeshConfig(replica=replica, data=data, model=model))
    found = generate(prepare(mesh))
    assert found["greedy"] == expected["greedy"]
    assert found["sampled"] == expected["sampled"]
    assert found["alone"] == expected["alone"]
    np.testing.assert_allclose(found["scores"], expected["scores"], atol=1e-4)
