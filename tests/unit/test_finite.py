"""NaN and infinities: in weights, by every way in; and in what finite weights compute."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import tiny
from meshlm import checkpoint
from meshlm.api import load
from meshlm.checkpoint import Checkpointer, Restored
from meshlm.cli.main import main
from meshlm.comparison import Side, compare
from meshlm.conversion.cast import cast
from meshlm.conversion.convert import convert
from meshlm.conversion.finite import Place, check_finite, is_finite
from meshlm.conversion.hf.config import make_config
from meshlm.conversion.hf.gptj import TABLE
from meshlm.conversion.hf.source import open_hf
from meshlm.conversion.loading import load_stacked
from meshlm.conversion.native.source import open_native
from meshlm.conversion.parts import part_keys
from meshlm.core.config import to_dict, to_json
from meshlm.core.errors import BadInputError
from meshlm.core.sharding import MeshConfig
from meshlm.core.tree import to_named
from meshlm.data.special_tokens import SpecialTokens
from meshlm.data.tokenizer import train_bpe
from meshlm.formats.safetensors import to_bytes
from meshlm.model.families import gpt_j
from meshlm.step import abstract_state
from meshlm.training.saved import refuse_not_finite

MODEL = gpt_j(
    num_layers=2,
    d_model=32,
    num_heads=4,
    head_dim=8,
    d_ff=128,
    vocab_size=264,
    context_length=32,
    rotary_dim=4,
)
TYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


def make_tensors(dtype=np.float32, scale: float = 0.1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        row.outside: (scale * rng.standard_normal(shape)).astype(dtype)
        for key in part_keys(MODEL)
        for row, shape in TABLE.shapes(MODEL, key)
    }


def write(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    tokenizer = train_bpe(["ab ba"], 260)
    config = make_config(MODEL, "float32", SpecialTokens.of(tokenizer))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes(tokenizer.to_json())
    (folder / "model.safetensors").write_bytes(to_bytes(tensors, {"format": "pt"}))
    return folder


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory) -> Path:
    """A Hugging Face folder with two infinities and a NaN in the second layer."""
    tensors = make_tensors()
    query = tensors["transformer.h.1.attn.q_proj.weight"]
    query[11, 5], query[30, 1], query[31, 31] = np.inf, np.nan, -np.inf
    return write(tmp_path_factory.mktemp("spoiled") / "model", tensors)


TOLD = (
    r"model\.safetensors: transformer\.h\.1\.attn\.q_proj\.weight: 1 NaN and 2 infinite of 1,024 "
    r"numbers, the first at \[11, 5\]"
)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_every_pattern_of_sixteen_bits(dtype):
    patterns = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    finite = np.isfinite(patterns.astype(np.float32))
    assert is_finite(patterns[finite])
    assert not any(is_finite(patterns[i : i + 1]) for i in np.flatnonzero(~finite))


def test_patterns_of_thirty_two_bits():
    rng = np.random.default_rng(0)
    edges = [0x7F7FFFFF, 0x7F800000, 0x7F800001, 0xFF7FFFFF, 0xFF800000, 0xFFFFFFFF, 0x80000000]
    bits = np.concatenate([rng.integers(0, 1 << 32, 2000), edges]).astype(np.uint32)
    bits[:500] |= 0x7F800000
    for number in bits.view(np.float32):
        assert is_finite(np.array([1, number, -1], np.float32)) == bool(np.isfinite(number))


@pytest.mark.parametrize("dtype", TYPES)
def test_where_and_how_many(dtype):
    array = np.ones((900, 700), dtype)
    check_finite(array, Place("x", array.shape))
    check_finite(array[:0], Place("x", (0, 700)))
    check_finite(np.ones((), dtype), Place("x", ()))
    array[899, 3] = np.nan
    array[700, 699] = -np.inf
    for given, place in ((array, array.shape), (array.T.copy().T, array.shape)):
        told = r"^x: 1 NaN and 1 infinite of 630,000 numbers, the first at \[700, 699\]: "
        with pytest.raises(BadInputError, match=told):
            check_finite(given, Place("x", place))
    with pytest.raises(BadInputError, match=r"the first at \[490699\]"):
        check_finite(array, Place("x", (630_000,)))


def test_no_way_in_takes_weights_that_are_no_numbers(spoiled, tmp_path):
    for options in ({}, {"dtype": "bfloat16"}, {"quantize": "int8"}, {"profile": "hf"}):
        with pytest.raises(BadInputError, match=TOLD):
            load(spoiled, **options)
    with pytest.raises(BadInputError, match=TOLD):
        load(spoiled, mesh=MeshConfig(model=4))
    abstract = abstract_state(tiny.step_config(MODEL), tiny.mesh_of(data=2))
    with pytest.raises(BadInputError, match=TOLD):
        load_stacked(open_hf(spoiled), "params", abstract.params)
    for to in ("meshlm", "hf", "mtj"):
        with pytest.raises(BadInputError, match=TOLD):
            convert(open_hf(spoiled), tmp_path / "converted", to=to, shards=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_types_are_looked_at_too(tmp_path, dtype):
    tensors = make_tensors(dtype)
    tensors["lm_head.bias"][263] = np.nan
    told = r"lm_head\.bias: 1 NaN of 264 numbers, the first at \[263\]"
    with pytest.raises(BadInputError, match=told):
        load(write(tmp_path / "model", tensors), dtype="float32")


def test_commands_end_with_one_line_and_code_3(spoiled, capsys):
    path = str(spoiled)
    for words in (
        ["generate", path, "--prompt", "a", "--max-tokens", "2"],
        ["generate", path, "--prompt", "a", "--json"],
        ["compare", path],
        ["serve", path, "--port", "0", "--compile-cache", ""],
    ):
        assert main(words) == 3
        said = capsys.readouterr()
        assert "\0" not in said.out
        assert "NaN" not in said.out
        assert "q_proj.weight: 1 NaN and 2 infinite" in said.err.splitlines()[-1]


def save(folder: Path, arrays) -> Path:
    files = {"config.json": to_json({"run": {"model": to_dict(MODEL)}})}
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(5, arrays, files)
    return folder / "step_5"


def test_a_checkpoint_of_ours(tmp_path):
    stacked = to_named(tiny.draw_params(MODEL))
    stacked["blocks.feed_forward.up.weight"] = (
        stacked["blocks.feed_forward.up.weight"].at[1, 7, 9].set(jnp.nan)
    )
    arrays = {f"params.{name}": array for name, array in stacked.items()}
    moments = {
        f"optimizer.adam.{group}.{name}": jnp.ones_like(array)
        for group in ("mu", "nu")
        for name, array in stacked.items()
    }
    moments["optimizer.adam.nu.head.weight"] = (
        moments["optimizer.adam.nu.head.weight"].at[3, 4].set(jnp.inf)
    )
    moments["optimizer.adam.count"] = jnp.asarray(5, jnp.int32)
    step = save(tmp_path / "checkpoints", arrays | moments)
    told = (
        r"step_5: array params\.blocks\.feed_forward\.up\.weight, layer 1: 1 NaN .* "
        r"first at \[7, 9\]"
    )
    with pytest.raises(BadInputError, match=told):
        load(step)
    abstract = abstract_state(tiny.step_config(MODEL), tiny.mesh_of())
    with pytest.raises(
        BadInputError, match=r"array optimizer\.adam\.nu\.head\.weight: 1 inf.* \[3, 4\]"
    ):
        load_stacked(open_native(step), "nu", abstract.params)


def test_what_a_run_goes_on_from(tmp_path):
    sharding = tiny.mesh_of(data=2, model=2)
    params = tiny.on_mesh(sharding, MODEL, tiny.draw_params(MODEL))
    arrays = {f"params.{name}": array for name, array in to_named(params).items()}
    # Losses that are not known yet are infinite, and the state of no parameter.
    arrays["recent_losses"] = jnp.full(4, jnp.inf)
    arrays["optimizer.adam.count"] = jnp.asarray(5, jnp.int32)
    refuse_not_finite(Restored(path=tmp_path, step=5, arrays=arrays, files={}))
    for value in (jnp.nan, jnp.inf, -jnp.inf):
        wrong = np.asarray(params.head.weight).copy()
        wrong[200, 30] = value
        spoiled = arrays | {
            "params.head.weight": jax.device_put(wrong, params.head.weight.sharding)
        }
        step = save(tmp_path / str(value), spoiled)
        told = r"step_5: array params\.head\.weight: 1 (NaN|inf).* first at \[200, 30\]"
        with pytest.raises(BadInputError, match=told):
            refuse_not_finite(Restored(path=step, step=5, arrays=spoiled, files={}))
    assert checkpoint.verify(step) == []


def test_a_cast_that_overflows_names_the_tensor():
    wide = np.array([[1, 7e4], [1, 2]], np.float32)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        fits = wide if dtype != np.float16 else np.minimum(wide, 65504)
        assert is_finite(cast(fits, np.dtype(dtype), "head"))
    with pytest.raises(BadInputError, match="head has numbers too large for float16"):
        cast(wide, np.dtype(np.float16), "head")
    with pytest.raises(BadInputError, match="head has numbers too large for bfloat16"):
        cast(np.array([3.4e38], np.float32), np.dtype(ml_dtypes.bfloat16), "head")


@pytest.fixture(scope="module")
def huge(tmp_path_factory) -> Path:
    """Finite weights whose logits are not."""
    tensors = make_tensors()
    tensors["lm_head.weight"] *= np.float32(1e38)
    tensors["transformer.ln_f.weight"][:] = 1e5
    return write(tmp_path_factory.mktemp("huge") / "model", tensors)


def test_output_that_is_not_finite_is_an_error(huge):
    model = load(huge)
    told = "at position 2 of prompt 0 is NaN or infinite, though its weights are finite"
    with pytest.raises(BadInputError, match=told):
        model.generate("ab", max_tokens=3)
    with pytest.raises(BadInputError, match="position 1 of sequence 0 is NaN or infinite"):
        model.score("ab")
    with pytest.raises(BadInputError, match="is NaN or infinite"):
        model.loglikelihood("a", "b")
    told = r"model \(fast, float32\): .* of its 264 logits are NaN or infinite, the first at posi"
    with pytest.raises(BadInputError, match=told):
        compare(Side(path=huge, dtype="float32"), Side(path=huge), "a")


def test_commands_say_so(huge, capsys):
    for words in (["--json"], []):
        assert main(["generate", str(huge), "--prompt", "ab", "--max-tokens", "2", *words]) == 3
        said = capsys.readouterr()
        assert "NaN" not in said.out
        assert "\0" not in said.out
        assert said.out == ("" if words else "ab\n")
        assert "though its weights are finite" in said.err


def test_no_json_of_ours_holds_nan():
    with pytest.raises(ValueError, match="JSON"):
        to_json({"x": float("nan")})
