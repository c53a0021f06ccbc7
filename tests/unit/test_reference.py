"""The reference forward: against the original's recorded logits, and float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import gptj_float64
import tiny
from meshlm.conversion.opening import open_source
from meshlm.conversion.parts import native_names, part_keys, stacked_name
from meshlm.conversion.proof import reference, streamed
from meshlm.conversion.proof.reference import ReferenceForward
from meshlm.conversion.proof.streamed import StreamedForward
from meshlm.conversion.source import Part
from meshlm.core.tree import from_named, to_named
from meshlm.formats.tensor import TensorInfo
from meshlm.model.families import with_embedding_bias
from meshlm.model.params import Embedding

FIXTURE = Path(__file__).parents[1] / "fixtures/mtj/dev_s4_distinct"
TOLERANCE = 2e-6


class DictPart(Part):
    """A part whose tensors are at hand."""

    def __init__(self, key, arrays: Mapping[str, np.ndarray]) -> None:
        self.key, self._arrays, self.raw = key, arrays, list(arrays)
        self.tensors = {n: TensorInfo(shape=a.shape, dtype=a.dtype) for n, a in arrays.items()}

    def read(self, name: str) -> np.ndarray:
        return self._arrays[name]

    read_raw = read


def parts_of(config, params, dtype="float32"):
    """A model's parts under native names."""
    named = to_named(params)
    for key in part_keys(config):
        arrays = {}
        for name in native_names(config, key):
            stacked, layer = stacked_name(name)
            whole = np.asarray(named[stacked])
            arrays[name] = (whole if layer is None else whole[layer]).astype(jnp.dtype(dtype))
        yield DictPart(key, arrays)


def hf_part(part: Part) -> DictPart:
    """The same part as transformers has it; its names written out once more, by hand."""
    if part.key == "embedding":
        return DictPart(part.key, {"transformer.wte.weight": part.read("embedding.tokens")})
    if part.key == "head":
        names = {
            "transformer.ln_f.weight": "final_norm.scale",
            "transformer.ln_f.bias": "final_norm.offset",
            "lm_head.weight": "head.weight",
            "lm_head.bias": "head.bias",
        }
        return DictPart(part.key, {hf: part.read(own) for hf, own in names.items()})
    width = tiny.CONFIG.d_model
    attention = f"blocks.{part.key}.attention"
    module = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    arrays = {
        f"attn.{hf}.weight": part.read(f"{attention}.{own}.weight").reshape(-1, width)
        for own, hf in module.items()
    }
    rest = {
        "ln_1.weight": "attention_norm.scale",
        "ln_1.bias": "attention_norm.offset",
        "mlp.fc_in.weight": "feed_forward.up.weight",
        "mlp.fc_in.bias": "feed_forward.up.bias",
        "mlp.fc_out.weight": "feed_forward.down.weight",
        "mlp.fc_out.bias": "feed_forward.down.bias",
    }
    arrays |= {hf: part.read(f"blocks.{part.key}.{own}") for hf, own in rest.items()}
    out = part.read(f"blocks.{part.key}.attention.out.weight").reshape(width, -1)
    arrays["attn.out_proj.weight"] = out
    return DictPart(part.key, {f"transformer.h.{part.key}.{n}": a for n, a in arrays.items()})


def run(forward, parts):
    for part in parts:
        forward.feed(part)
    return forward.logits


def float64_logits(config, params, tokens):
    """The oracle has no embedding bias: it is added to the table."""
    table = np.asarray(params.embedding.tokens, np.float64)
    if params.embedding.bias is not None:
        table = table + np.asarray(params.embedding.bias, np.float64)
    params = dataclasses.replace(params, embedding=Embedding(tokens=table))
    return gptj_float64.forward(params, config, np.asarray(tokens)[None])[0]


TOKENS = [3, 0, 47, 11, 11, 29, 1, 30, 8, 15]


@pytest.mark.parametrize("bias", [False, True])
def test_own_weights_agree_with_float64(bias):
    config = with_embedding_bias(tiny.CONFIG, bias)
    params = tiny.draw_params(config)
    wanted = float64_logits(config, params, TOKENS)
    for forward in (
        ReferenceForward(config, "meshlm", TOKENS),
        StreamedForward(config, TOKENS),
    ):
        found = run(forward, parts_of(config, params))
        assert found.dtype == np.float32
        assert tiny.relative_max(found, wanted) < TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_are_computed_in_float32(dtype, monkeypatch):
    """Also when they are cast a few columns at a time."""
    monkeypatch.setattr(reference, "_BLOCK_NUMBERS", 250)
    monkeypatch.setattr(streamed, "_BLOCK_NUMBERS", 250)
    config, params = tiny.CONFIG, tiny.draw_params(tiny.CONFIG)
    rounded = {n: a.astype(dtype).astype(jnp.float32) for n, a in to_named(params).items()}
    wanted = float64_logits(config, from_named(params, rounded), TOKENS)
    for forward in (
        ReferenceForward(config, "meshlm", TOKENS),
        StreamedForward(config, TOKENS),
    ):
        assert tiny.relative_max(run(forward, parts_of(config, params, dtype)), wanted) < TOLERANCE


def test_hugging_faces_names_and_layout():
    config, params = tiny.CONFIG, tiny.draw_params(tiny.CONFIG)
    parts = (hf_part(part) for part in parts_of(config, params))
    found = run(ReferenceForward(config, "hf", TOKENS), parts)
    assert tiny.relative_max(found, float64_logits(config, params, TOKENS)) < TOLERANCE


def test_the_originals_logits():
    """Four shards whose summed biases differ, and whose norms are trained in the first alone."""
    golden = np.load(FIXTURE / "golden.npz")
    source = open_source(FIXTURE / "slim")
    for forward, tolerance in (
        (ReferenceForward(source.model, "mtj", golden["tokens"]), 2e-5),
        (StreamedForward(source.model, golden["tokens"]), 2e-5),
    ):
        found = run(forward, source.parts())
        assert tiny.relative_max(found, golden["logits"]) <= tolerance


def test_two_bytes_without_a_name_are_bfloat16():
    values = np.array([1.5, -3.0], jnp.bfloat16)
    assert reference._floats(values.view("V2")).tolist() == [1.5, -3.0]
