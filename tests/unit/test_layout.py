"""Layouts of tensors in the formats: each is inverted bit for bit."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlm.conversion.hf.gptj import TABLE as HF_GPT_J
from meshlm.conversion.layout import Layout, Rearranged
from meshlm.conversion.mtj.leaves import make_leaves
from meshlm.conversion.mtj.shares import Replicas, Shares
from meshlm.conversion.mtj.table import GPT_J as MTJ_GPT_J
from meshlm.conversion.parts import native_names, native_shapes, part_keys, weight_of
from meshlm.conversion.table import Table
from meshlm.model.config import ModelConfig
from meshlm.model.families import gpt_j, with_embedding_bias
from meshlm.model.params import count_params

DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
TABLES = {"hf": HF_GPT_J, "mtj": MTJ_GPT_J}


@st.composite
def models(draw) -> tuple[ModelConfig, int]:
    """A GPT-J without a bias of the embedding, and shards that it can be cut into."""
    shards, heads, head_dim = (
        draw(st.sampled_from(sizes)) for sizes in ([1, 2, 4], [4, 8], [2, 6])
    )
    d_model = heads * head_dim
    model = gpt_j(
        num_layers=draw(st.integers(1, 12)),
        d_model=d_model,
        num_heads=heads,
        head_dim=head_dim,
        d_ff=4 * d_model,
        vocab_size=4 * draw(st.integers(1, 9)),
        context_length=8,
        rotary_dim=2,
    )
    return model, shards


def random_bits(shape: tuple[int, ...], dtype: np.dtype, seed: int) -> np.ndarray:
    """Any bits: NaN, infinities, zeros of both signs."""
    count = math.prod(shape) * dtype.itemsize
    return np.frombuffer(np.random.default_rng(seed).bytes(count), dtype).reshape(shape)


def bits(array: np.ndarray) -> bytes:
    return array.tobytes()


@pytest.mark.parametrize("name", TABLES)
@given(models(), st.sampled_from(DTYPES), st.integers(0, 99))
def test_every_row_is_inverted_bit_for_bit(name, model_and_shards, dtype, seed):
    (model, shards), table = model_and_shards, TABLES[name]
    shards = shards if name == "mtj" else 1
    model = with_embedding_bias(model, name == "mtj")
    for key in ("embedding", model.num_layers - 1, "head"):
        rows = table.rows(key)
        for native, shape in native_shapes(model, key).items():
            layout = rows[native].layout
            array = random_bits(shape, dtype, seed)
            if isinstance(layout, Shares):
                array = np.linspace(-9, 9, math.prod(shape), dtype=np.float32).reshape(shape)
            arrays = layout.split(array, shards, array.dtype)
            assert [a.shape for a in arrays] == [layout.array_shape(shape, shards)] * shards
            # As files have them: copies, contiguous.
            files = [np.array(a, order="C") for a in arrays]
            joined = layout.join(files, shape)
            assert joined.shape == shape
            assert bits(joined) == bits(array), native
            again = layout.split(joined, shards, array.dtype)
            assert [bits(a) for a in again] == [bits(a) for a in files], native


@given(models())
def test_a_table_has_every_tensor_of_the_description_once(model_and_shards):
    model, _ = model_and_shards
    for table, own in ((HF_GPT_J, model), (MTJ_GPT_J, with_embedding_bias(model))):
        outside: list[str] = []
        for key in part_keys(own):
            assert sorted(table.rows(key)) == sorted(native_names(own, key))
            outside += [row.outside for row in table.rows(key).values()]
        assert len(set(outside)) == len(outside) == table.count(model.num_layers)


def test_what_is_summed_over_shards_is_what_the_description_says_is_shared():
    model = with_embedding_bias(tiny())
    for key in part_keys(model):
        for name, row in MTJ_GPT_J.rows(key).items():
            is_summed = isinstance(row.layout, Shares)
            assert is_summed == weight_of(model, name).shared, name
            if is_summed:
                assert isinstance(row.moments, Replicas), name


def test_the_leaves_of_a_shard_hold_every_number_of_the_model():
    model, shards = with_embedding_bias(tiny()), 2
    whole = sum(
        shards * math.prod(leaf.layout.array_shape(leaf.shape, shards))
        for leaf in make_leaves(model, full=False).tensors
        if not leaf.layout.has_more
    )
    vectors = sum(
        math.prod(leaf.shape)
        for leaf in make_leaves(model, full=False).tensors
        if leaf.layout.has_more
    )
    assert whole + vectors == count_params(model)


def tiny() -> ModelConfig:
    return gpt_j(
        num_layers=3,
        d_model=16,
        num_heads=4,
        head_dim=4,
        d_ff=64,
        vocab_size=24,
        context_length=8,
        rotary_dim=2,
    )


# Fused and permuted matrices of the other families, written by index from their definitions.
#
# Source: transformers 5.23, models gpt2 (Conv1D), gpt_neox and codegen.

N, H, D, BLOCKS = 8, 6, 48, 4


def gpt2(qkv: np.ndarray) -> np.ndarray:
    """[D, 3 D]: inputs by outputs, all queries, then all keys, then all values."""
    return np.concatenate([w.reshape(N * H, D) for w in qkv]).T


def gpt_neox(qkv: np.ndarray) -> np.ndarray:
    """[3 D, D]: query, key and value of head 0, then of head 1, and so on."""
    return np.concatenate([qkv[part, head] for head in range(N) for part in range(3)])


def codegen(qvk: np.ndarray) -> np.ndarray:
    """[3 D, D]: blocks of heads, in each all queries, then all values, then all keys."""
    size = N // BLOCKS
    return np.concatenate(
        [
            qvk[part, block * size : (block + 1) * size].reshape(-1, D)
            for block in range(BLOCKS)
            for part in range(3)
        ]
    )


def rotary_halves(pairs: np.ndarray) -> np.ndarray:
    """[N x R, D]: the first of each pair of rotary rows, then the second of each, by head."""
    return np.concatenate([np.concatenate([head[0::2], head[1::2]]) for head in pairs])


@pytest.mark.parametrize(
    ("pattern", "shape", "wanted"),
    [
        ("three N H D -> D (three N H)", (3, N, H, D), gpt2),
        ("three N H D -> (N three H) D", (3, N, H, D), gpt_neox),
        ("three (4 n) H D -> (4 three n H) D", (3, N, H, D), codegen),
        ("N H D -> (N H) D", (N, H, D), lambda w: w.reshape(N * H, D)),
        ("D N H -> (N H) D", (D, N, H), lambda w: w.reshape(D, N * H).T),
    ],
)
def test_patterns_express_the_fused_matrices_of_the_family(pattern, shape, wanted):
    layout, native = Rearranged(pattern), np.arange(math.prod(shape)).reshape(shape)
    (array,) = layout.split(native, 1, native.dtype)
    assert np.array_equal(array, wanted(native))
    assert np.array_equal(layout.join([np.array(array)], shape), native)


def test_patterns_express_the_rows_of_half_split_rotary_dims():
    layout, native = Rearranged("N r two D -> (N two r) D"), np.arange(N * H * D)
    native = native.reshape(N, H // 2, 2, D)
    (array,) = layout.split(native, 1, native.dtype)
    assert np.array_equal(array, rotary_halves(native.reshape(N, H, D)))
    assert np.array_equal(layout.join([np.array(array)], native.shape), native)


def test_arrays_that_are_read_into_are_views():
    """Reading fills the native tensor through them."""
    for table, shards in ((HF_GPT_J, 1), (MTJ_GPT_J, 2)):
        model = with_embedding_bias(tiny(), table is MTJ_GPT_J)
        for key in part_keys(model):
            for name, shape in native_shapes(model, key).items():
                layout: Layout = table.rows(key)[name].layout
                store = np.zeros(layout.store_shape(shape, shards), np.int32)
                for view in layout.arrays(store, shards):
                    view += 1
                assert (store == 1).all(), name


@pytest.mark.parametrize(
    "pattern", ["N D -> N", "N N -> N", "N D", "D (S n) -> n S D", "N D -> N D D"]
)
def test_a_pattern_that_is_no_rearrangement_is_refused(pattern):
    with pytest.raises(AssertionError):
        Rearranged(pattern)


def test_a_table_finds_the_rows_of_a_layer():
    table: Table = HF_GPT_J
    row = table.rows(27)["blocks.27.attention.query.weight"]
    assert row.outside == "transformer.h.27.attn.q_proj.weight"
