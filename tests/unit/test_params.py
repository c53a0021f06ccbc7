"""The parameters: the original's initialisation, alike on every mesh, and which ones decay."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshlm.checkpoint.format_1 import PARAMETERS
from meshlm.core.errors import UsageError
from meshlm.core.sharding import MeshConfig
from meshlm.core.tree import to_named
from meshlm.model.config import ModelConfig
from meshlm.model.families import gpt_j
from meshlm.model.params import (
    abstract_params,
    check_divides,
    count_params,
    init_params,
    unstack_blocks,
    weight_table,
    weight_tree,
)
from meshlm.model.presets import PRESETS
from tiny import CONFIG, DIVISIBLE, assert_trees_identical, draw_params, mesh_of

MATRICES = {
    "embedding.tokens",
    "head.weight",
    "blocks.attention.query.weight",
    "blocks.attention.key.weight",
    "blocks.attention.value.weight",
    "blocks.attention.out.weight",
    "blocks.feed_forward.up.weight",
    "blocks.feed_forward.down.weight",
}
SCALES = {"blocks.attention_norm.scale", "final_norm.scale"}
# Of a normal cut at two sigma: sqrt(1 - 4 phi(2) / (2 Phi(2) - 1)).
CUT_STD = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))
WIDE = gpt_j(
    num_layers=8,
    d_model=64,
    num_heads=4,
    head_dim=16,
    d_ff=256,
    vocab_size=512,
    context_length=8,
    rotary_dim=4,
)


@functools.cache
def compiled_init(config: ModelConfig):
    return jax.jit(lambda seed: init_params(config, jax.random.key(seed)))


@pytest.fixture(scope="module")
def drawn():
    params = compiled_init(WIDE)(3)
    return {name: np.asarray(value, np.float64) for name, value in to_named(params).items()}


def wanted_sigma(config: ModelConfig) -> dict[str, float]:
    """By the original's code: what writes to the residual stream is drawn 2/layers as wide."""
    read = 1 / math.sqrt(config.d_model)
    write = 2 / config.num_layers / math.sqrt(config.d_model)
    sigma = dict.fromkeys(MATRICES, read)
    sigma |= {"blocks.attention.out.weight": write, "blocks.feed_forward.down.weight": write}
    return sigma | {"embedding.tokens": 1 / math.sqrt(config.vocab_size)}


def test_the_cut_normal():
    assert round(CUT_STD, 4) == 0.8796


@pytest.mark.parametrize("name", sorted(MATRICES))
def test_matrices_are_drawn_from_a_normal_cut_at_two_sigma(drawn, name):
    sigma, values = wanted_sigma(WIDE)[name], drawn[name]
    # Five standard errors of the sample's own standard deviation.
    assert values.std() == pytest.approx(CUT_STD * sigma, rel=5 / math.sqrt(2 * values.size))
    assert abs(values.mean()) < 5 * sigma / math.sqrt(values.size)
    assert 1.99 * sigma < np.abs(values).max() <= 2.000001 * sigma


def test_gpt_j_6b_is_drawn_as_the_original():
    found = to_named(jax.tree.map(lambda weight: weight.std, weight_tree(PRESETS["gpt-j-6b"])))
    published = dict.fromkeys(MATRICES, 0.015625) | {"embedding.tokens": 0.004454}
    published |= {
        "blocks.attention.out.weight": 0.001116,
        "blocks.feed_forward.down.weight": 0.001116,
    }
    assert {name: round(std, 6) for name, std in found.items() if std} == published


def test_norms_start_at_one_and_biases_at_zero(drawn):
    for name in drawn.keys() - MATRICES:
        assert (drawn[name] == (1.0 if name in SCALES else 0.0)).all(), name


def test_no_two_weights_or_layers_are_drawn_alike(drawn):
    layers = [
        drawn[name][i]
        for name in (
            "blocks.attention.query.weight",
            "blocks.attention.key.weight",
            "blocks.attention.value.weight",
        )
        for i in (0, 7)
    ]
    rows = np.stack([layer.ravel() for layer in layers])
    correlation = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlation).max() < 0.1
    again = to_named(compiled_init(WIDE)(4))
    assert (
        abs(np.corrcoef(np.ravel(again["head.weight"]), drawn["head.weight"].ravel())[0, 1]) < 0.05
    )


def test_every_mesh_draws_the_same():
    alone = compiled_init(DIVISIBLE)(5)
    mesh = mesh_of(2, 2, 2)
    with jax.set_mesh(mesh):
        split = jax.jit(lambda: init_params(DIVISIBLE, jax.random.key(5)))()
    # XLA's vector code rounds the last bit by the shard's shape.
    for name, value in to_named(split).items():
        np.testing.assert_allclose(value, to_named(alone)[name], rtol=1e-6, err_msg=name)
    # And each weight lives in its shards, not whole on every device.
    wanted = to_named(abstract_params(DIVISIBLE, mesh))
    for name, value in to_named(split).items():
        assert value.sharding.is_equivalent_to(wanted[name].sharding, value.ndim), name
    shard = split.blocks.feed_forward.up.weight.addressable_shards[0].data
    assert 4 * shard.size == split.blocks.feed_forward.up.weight.size


def test_decay_pulls_on_matrices_only():
    assert {name for name, weight in weight_table(CONFIG).items() if weight.decay} == MATRICES
    # A stacked bias has two dims and is no matrix.
    assert weight_tree(CONFIG).blocks.feed_forward.up.bias.shape == (2, 40)


def test_shapes_come_without_memory():
    config = PRESETS["23b"]
    shapes = jax.tree.leaves(abstract_params(config, dtype=jnp.bfloat16))
    assert sum(math.prod(s.shape) for s in shapes) == count_params(config)
    assert {s.dtype for s in shapes} == {jnp.dtype(jnp.bfloat16)}


def test_unstacking_gives_each_layer_its_own_arrays():
    params = draw_params(CONFIG)
    apart = unstack_blocks(params)
    assert len(apart.blocks) == CONFIG.num_layers
    for i, block in enumerate(apart.blocks):
        assert_trees_identical(block, jax.tree.map(lambda x, i=i: x[i], params.blocks))
    assert apart.head is params.head


@pytest.mark.parametrize(
    ("mesh", "complaint"),
    [
        (MeshConfig(model=3), r"has 4 rows of 'heads'|has 24 rows|has 40 rows of 'ff'"),
        (MeshConfig(data=5), r"24 rows of"),
        (MeshConfig(data=2, model=8), r"24 rows of 'table_embed', which 16 devices"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused(mesh, complaint):
    with pytest.raises(UsageError, match=complaint) as caught:
        check_divides(CONFIG, mesh)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["125m", "350m", "1.3b", "2.7b", "gpt-j-6b", "23b"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 8, 1), (4, 16, 1), (1, 8, 4)])
def test_the_presets_fit_the_usual_meshes(name, sizes):
    replica, data, model = sizes
    check_divides(PRESETS[name], MeshConfig(replica=replica, data=data, model=model))


def test_check_divides_agrees_with_jax():
    # What it accepts can be placed; what it refuses JAX would refuse as well.
    mesh = mesh_of(1, 2, 4)
    check_divides(CONFIG, MeshConfig(data=2, model=4))
    with jax.set_mesh(mesh):
        jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))
    with pytest.raises(UsageError):
        check_divides(CONFIG, MeshConfig(model=8))
    with jax.set_mesh(mesh_of(1, 1, 8)), pytest.raises(ValueError, match="divi"):
        jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))


# The first and the last number of each matrix by its name in format 1, drawn by the code of then.
DRAWN = {
    "embedding": (0.132221058011055, -0.1751844435930252),
    "blocks.query": (-0.19205373525619507, -0.035628508776426315),
    "blocks.key": (-0.04748159646987915, -0.2330254763364792),
    "blocks.value": (0.2795448899269104, -0.1268591582775116),
    "blocks.attention_out": (-0.0819014459848404, 0.10520493984222412),
    "blocks.ff_in": (0.3602486252784729, -0.09421706944704056),
    "blocks.ff_out": (-0.2441662847995758, -0.014836553484201431),
    "head": (0.16648022830486298, -0.03709740564227104),
}


def test_a_seed_gives_the_weights_that_it_always_gave():
    drawn = to_named(compiled_init(CONFIG)(3))
    assert {PARAMETERS[old] for old in DRAWN} == MATRICES
    for old, (first, last) in DRAWN.items():
        numbers = np.ravel(drawn[PARAMETERS[old]])
        np.testing.assert_allclose(numbers[[0, -1]], (first, last), rtol=1e-6, err_msg=old)
