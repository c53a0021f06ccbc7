"""Hugging Face folders made by hand: what is read, what is refused, what is written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlm.conversion.hf import pickled
from meshlm.conversion.hf.config import read_config
from meshlm.conversion.hf.source import HfSource, is_hf, open_hf
from meshlm.conversion.hf.target import HfTarget
from meshlm.core.errors import BadInputError, UsageError
from meshlm.data.special_tokens import SpecialTokens
from meshlm.data.tokenizer import load_gpt2, train_bpe
from meshlm.data.tokenizer_folder import ReadTokenizer
from meshlm.formats.safetensors import to_bytes
from meshlm.model.config import ModelConfig
from meshlm.model.families import gpt_j
from meshlm.model.presets import PRESETS

# As the published folder has it, but for the sizes.
CONFIG = {
    "activation_function": "gelu_new",
    "architectures": ["GPTJForCausalLM"],
    "attn_pdrop": 0.0,
    "bos_token_id": 50256,
    "embd_pdrop": 0.0,
    "eos_token_id": 50256,
    "gradient_checkpointing": False,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gptj",
    "n_embd": 12,
    "n_head": 2,
    "n_inner": None,
    "n_layer": 2,
    "n_positions": 16,
    "resid_pdrop": 0.0,
    "rotary": True,
    "rotary_dim": 4,
    "scale_attn_weights": True,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "tie_word_embeddings": False,
    "tokenizer_class": "GPT2Tokenizer",
    "transformers_version": "4.18.0.dev0",
    "use_cache": True,
    "vocab_size": 21,
}
MODEL = gpt_j(
    num_layers=2,
    d_model=12,
    num_heads=2,
    head_dim=6,
    d_ff=48,
    vocab_size=21,
    context_length=16,
    rotary_dim=4,
)
MATRICES = {
    "attn.q_proj.weight": (12, 12),
    "attn.k_proj.weight": (12, 12),
    "attn.v_proj.weight": (12, 12),
    "attn.out_proj.weight": (12, 12),
    "mlp.fc_in.weight": (48, 12),
    "mlp.fc_in.bias": (48,),
    "mlp.fc_out.weight": (12, 48),
    "mlp.fc_out.bias": (12,),
    "ln_1.weight": (12,),
    "ln_1.bias": (12,),
}
SHAPES = {f"transformer.h.{i}.{name}": shape for i in range(2) for name, shape in MATRICES.items()}
SHAPES |= {
    "transformer.wte.weight": (21, 12),
    "transformer.ln_f.weight": (12,),
    "transformer.ln_f.bias": (12,),
    "lm_head.weight": (21, 12),
    "lm_head.bias": (21,),
}


def make_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {n: rng.standard_normal(shape).astype(np.float32) for n, shape in SHAPES.items()}


TENSORS = make_tensors()


def write(folder: Path, tensors=TENSORS, file: str = "model.safetensors", **changes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    (folder / file).write_bytes(to_bytes(tensors, {"format": "pt"}))
    return folder


def write_shards(folder: Path, shards: dict[str, list[str]], weight_map=None) -> Path:
    for file, names in shards.items():
        write(folder, {name: TENSORS[name] for name in names}, file)
    listed = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": 1}, "weight_map": listed | (weight_map or {})}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


HALVES = {
    "model-00001-of-00002.safetensors": list(SHAPES)[::2],
    "model-00002-of-00002.safetensors": list(SHAPES)[1::2],
}


def read_all(source: HfSource) -> dict[str, np.ndarray]:
    return {name: part.read(name) for part in source.parts() for name in part.tensors}


def refusal(folder: Path, **options) -> str:
    with pytest.raises(BadInputError) as caught:
        open_hf(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_the_native_tensors_are_the_files(tmp_path):
    source = open_hf(write(tmp_path))
    assert source.model == MODEL
    assert (source.kind, source.groups, source.step, source.sidecar) == (
        "hf",
        ("params",),
        None,
        None,
    )
    found = read_all(source)
    assert found.keys() == source.infos.keys()
    for name, theirs in {
        "embedding.tokens": "transformer.wte.weight",
        "blocks.1.attention.query.weight": "transformer.h.1.attn.q_proj.weight",
        "blocks.1.attention.key.weight": "transformer.h.1.attn.k_proj.weight",
        "blocks.0.attention.value.weight": "transformer.h.0.attn.v_proj.weight",
        "blocks.0.attention.out.weight": "transformer.h.0.attn.out_proj.weight",
        "blocks.0.feed_forward.up.weight": "transformer.h.0.mlp.fc_in.weight",
        "blocks.1.feed_forward.down.bias": "transformer.h.1.mlp.fc_out.bias",
        "final_norm.offset": "transformer.ln_f.bias",
        "head.weight": "lm_head.weight",
    }.items():
        assert np.array_equal(found[name].ravel(), TENSORS[theirs].ravel()), name
    # Row n*6+h of theirs is head n, dim h; columns of the output projection likewise.
    assert (
        found["blocks.1.attention.query.weight"][1, 2, 7]
        == TENSORS["transformer.h.1.attn.q_proj.weight"][8, 7]
    )
    out = TENSORS["transformer.h.0.attn.out_proj.weight"]
    assert found["blocks.0.attention.out.weight"][3, 1, 4] == out[3, 10]
    raw = {n: part.read_raw(n) for part in source.parts() for n in part.raw}
    assert raw.keys() == TENSORS.keys()
    assert all(np.array_equal(raw[n], TENSORS[n]) for n in raw)
    assert [p.key for p in source.parts(order=["head", 1])] == ["head", 1]


def test_shards_mixed_dtypes_and_old_buffers(tmp_path, monkeypatch):
    monkeypatch.setitem(TENSORS, "lm_head.bias", TENSORS["lm_head.bias"].astype(np.float16))
    brain = TENSORS["lm_head.weight"].astype(ml_dtypes.bfloat16)
    monkeypatch.setitem(TENSORS, "lm_head.weight", brain)
    buffers = {
        "transformer.h.0.attn.bias": np.ones((1, 1, 16, 16), np.bool_),
        "transformer.h.1.attn.masked_bias": np.array(-1e9, np.float32),
        "transformer.h.1.attn.embed_positions": np.zeros((16, 4), np.float32),
    }
    for name, array in buffers.items():
        monkeypatch.setitem(TENSORS, name, array)
    shards = {file: list(names) for file, names in HALVES.items()}
    shards["model-00001-of-00002.safetensors"] += buffers
    source = open_hf(write_shards(tmp_path, shards))
    assert source.infos["head.weight"].dtype == ml_dtypes.bfloat16
    assert source.infos["head.bias"].dtype == np.float16
    assert np.array_equal(read_all(source)["head.weight"], brain)


def test_names_without_their_prefix(tmp_path):
    bare = {name.removeprefix("transformer."): array for name, array in TENSORS.items()}
    source = open_hf(write(tmp_path, bare))
    part = next(source.parts())
    assert part.raw == ["transformer.wte.weight"]
    assert np.array_equal(part.read_raw(part.raw[0]), TENSORS["transformer.wte.weight"])
    headless = {name: array for name, array in bare.items() if "lm_head" not in name}
    assert "without its head" in refusal(write(tmp_path, headless))
    both = TENSORS | {"wte.weight": TENSORS["transformer.wte.weight"]}
    assert "wte.weight is there twice" in refusal(write(tmp_path, both))


def without(name: str) -> dict[str, np.ndarray]:
    return {n: array for n, array in TENSORS.items() if n != name}


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        (without("transformer.h.1.ln_1.bias"), "transformer.h.1.ln_1.bias is missing"),
        (without("lm_head.bias"), "lm_head.bias is missing"),
        (TENSORS | {"transformer.h.2.ln_1.bias": np.zeros(12)}, "h.2.ln_1.bias is no tensor"),
        (TENSORS | {"transformer.h.2.attn.bias": np.zeros(1)}, "h.2.attn.bias is no tensor"),
        (TENSORS | {"transformer.wpe.weight": np.zeros(1)}, "wpe.weight is no tensor"),
        (TENSORS | {"lm_head.bias": np.zeros(20, np.float32)}, "[20], and [21] by config.json"),
        (TENSORS | {"lm_head.weight": TENSORS["lm_head.weight"].T}, "[12, 21], and [21, 12]"),
        (TENSORS | {"lm_head.bias": np.zeros(21)}, "lm_head.bias is float64: weights are float32"),
        ({}, "0 tensors for 2 layers"),
    ],
)
def test_tensors_that_are_not_the_models(tmp_path, tensors, why):
    message = refusal(write(tmp_path, tensors))
    assert why in message


@pytest.mark.parametrize(
    ("weight_map", "why"),
    [
        ({"lm_head.bias": "../x.safetensors"}, "no file's name"),
        ({"lm_head.bias": "/etc/passwd"}, "no file's name"),
        ({"lm_head.bias": ".."}, "no file's name"),
        ({"lm_head.bias": "a\x00b"}, "no file's name"),
        ({"lm_head.bias": 3}, "no file's name"),
        ({"lm_head.bias": "model-3.safetensors"}, "model-3.safetensors: missing"),
        ({"more": "model-00001-of-00002.safetensors"}, "more is in it by"),
        ({"lm_head.bias": "model-00002-of-00002.safetensors"}, "lm_head.bias is "),
    ],
)
def test_a_hostile_index(tmp_path, weight_map, why):
    assert why in refusal(write_shards(tmp_path / "folder", HALVES, weight_map))


def test_a_tensor_that_the_index_leaves_out(tmp_path):
    write_shards(tmp_path, HALVES)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["lm_head.bias"]
    path.write_text(json.dumps(index))
    assert "lm_head.bias is not in it by model.safetensors.index.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {}}', '{"a": 1, "a": 2}', "{\xff"]
)
def test_a_damaged_index(tmp_path, text):
    write_shards(tmp_path, HALVES)
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("latin1"))
    assert "index.json" in refusal(tmp_path)


def read(tmp_path: Path, **changes) -> ModelConfig:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in (CONFIG | changes).items() if v != "gone"}))
    return read_config(path).model


def test_shapes(tmp_path):
    assert read(tmp_path, n_inner=7).d_ff == 7
    assert read(tmp_path, n_inner="gone").d_ff == 48
    assert read(tmp_path, rotary_dim=6, layer_norm_epsilon=1e-3).layer_norm_epsilon == 1e-3
    aliases = {"n_layer": "gone", "n_embd": "gone", "n_head": "gone", "n_positions": "gone"} | {
        "num_hidden_layers": 2,
        "hidden_size": 12,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
    }
    assert read(tmp_path, **aliases) == MODEL
    (tmp_path / "config.json").write_text('{"model_type": "gptj"}')
    assert read_config(tmp_path / "config.json").model == PRESETS["gpt-j-6b"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model_type": "gpt_neox"}, 'model_type is "gpt_neox"'),
        ({"model_type": "gone"}, "model_type is null"),
        ({"architectures": ["GPTJForSequenceClassification"]}, "GPTJForCausalLM only"),
        ({"activation_function": "gelu"}, 'activation_function is "gelu"'),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling is"),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, "rope_parameters is"),
        ({"rope_theta": 500000}, "rope_theta is 500000"),
        ({"scale_attn_weights": False}, "scale_attn_weights is false"),
        ({"scale_attn_weights": 1}, "scale_attn_weights is 1"),
        ({"rotary": False}, "rotary is false"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map is"),
        ({"alibi": True}, '"alibi" is a key that MeshLM does not know: delete it'),
        ({"hidden_size": 13}, "hidden_size and n_embd differ"),
        ({"head_dim": 8}, "head_dim is not"),
        ({"n_head": 5}, "n_head is 5, which does not divide"),
        ({"rotary_dim": None}, "rotary_dim is null"),
        ({"rotary_dim": 0}, "rotary_dim is 0"),
        ({"rotary_dim": 3}, "rotary_dim is 3: it must be even"),
        ({"rotary_dim": 8}, "rotary_dim is 8"),
        ({"n_layer": True}, "n_layer is true"),
        ({"n_layer": 20_000}, "n_layer is 20000"),
        ({"n_layer": 2.0}, "n_layer is 2.0"),
        ({"vocab_size": 1 << 40}, "vocab_size is"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is NaN"),
    ],
)
def test_what_would_change_the_numbers_is_refused(tmp_path, changes, why):
    with pytest.raises(BadInputError) as caught:
        read(tmp_path, **changes)
    assert why in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_function": "gelu_pytorch_tanh"},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "rope_scaling": None},
        {"torch_dtype": "float16", "dtype": "float16", "_name_or_path": "x", "pruned_heads": {}},
        {"do_sample": True, "top_k": 3, "output_attentions": True, "id2label": {"0": "LABEL_0"}},
        {"architectures": None},
        {"architectures": ["GPTJModel"]},
        {"resid_pdrop": 0.1, "bos_token_id": 1, "pad_token_id": 3, "eos_token_id": [1, 2]},
    ],
)
def test_what_changes_no_number_is_accepted(tmp_path, changes):
    assert read(tmp_path, **changes) == MODEL


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(sorted(CONFIG)), JSON, max_size=3))
def test_any_config(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("config")
    changes = {k: v for k, v in changes.items() if v != "gone"}
    try:
        read(folder, **changes)
    except BadInputError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message


def test_is_hf(tmp_path):
    assert not is_hf(tmp_path)
    assert not is_hf(tmp_path / "none")
    (tmp_path / "config.json").write_text('{"model": {}}')
    assert not is_hf(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert is_hf(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "model.safetensors").touch()
    assert is_hf(tmp_path)


def test_no_weights_and_pickles(tmp_path, monkeypatch):
    write(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    message = refusal(tmp_path)
    assert "pytorch_model.bin" in message
    assert "--allow-pickle" in message
    monkeypatch.setattr(pickled.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install torch"):
        open_hf(tmp_path, allow_pickle=True)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(UsageError, match=r"no model\.safetensors"):
        open_hf(tmp_path)


def test_whose_tokenizer(tmp_path):
    assert open_hf(write(tmp_path)).tokenizer is None
    tokenizer = train_bpe(["one two three " * 9], 270)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.to_json())
    assert f"{tokenizer.vocab_size} tokens" in refusal(tmp_path)
    big = {"n_layer": 1, "n_embd": 2, "n_head": 1, "rotary_dim": 2, "n_inner": 3}
    tensors = {
        name: np.zeros([{12: 2, 48: 3, 21: 50400}[size] for size in shape], np.float16)
        for name, shape in SHAPES.items()
        if ".h.1." not in name
    }
    write(tmp_path, tensors, vocab_size=50400, **big)
    assert open_hf(tmp_path).tokenizer.fingerprint == tokenizer.fingerprint
    (tmp_path / "tokenizer.json").write_bytes(b'{"added_tokens": [1]}')
    assert "tokenizer.json" in refusal(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert open_hf(tmp_path).tokenizer is load_gpt2()
    write(tmp_path, tensors, vocab_size=50400, **big, eos_token_id=[7])
    assert open_hf(tmp_path).tokenizer is None
    write(tmp_path, tensors, vocab_size=50400, **big, tokenizer_class="GPTNeoXTokenizer")
    assert open_hf(tmp_path).tokenizer is None
    given_one = ReadTokenizer(tokenizer, SpecialTokens.of(tokenizer))
    assert open_hf(tmp_path, given_one).tokenizer is tokenizer


def test_the_published_tokenizer(tmp_path):
    whole = json.loads(load_gpt2().to_json())
    padding = [
        {"id": 50256 + i, "content": f"<|extratoken_{i}|>", "special": False} for i in range(1, 144)
    ]
    whole["added_tokens"] += padding
    write(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    assert "50400 tokens" in refusal(tmp_path)
    # Another token after it is one like any other.
    whole["added_tokens"].append({"id": 50400, "content": "<|mine|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    assert "50401 tokens" in refusal(tmp_path)
    # The two files of old, with what came later beside them.
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(whole["model"]["merges"]))
    (tmp_path / "added_tokens.json").write_text(
        json.dumps({token["content"]: token["id"] for token in padding})
    )
    assert "50400 tokens" in refusal(tmp_path)
    (tmp_path / "merges.txt").write_text("a\n")
    assert "merges.txt" in refusal(tmp_path)


def make_target(folder: Path, source: HfSource, model: ModelConfig, **changes) -> HfTarget:
    return HfTarget(
        folder,
        model=model,
        infos=source.infos,
        groups=["params"],
        tokenizer=None,
        step=None,
        counts={},
        sidecar=None,
        **changes,
    )


def test_what_is_written_reads_back(tmp_path):
    source = open_hf(write(tmp_path / "in"))
    (tmp_path / "out").mkdir()
    target = make_target(tmp_path / "out", source, MODEL, max_file_bytes=4000)
    for part in source.parts(order=target.order):
        target.write("params", part)
    target.finish()
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 2
    assert all((tmp_path / "out" / file).stat().st_size < 4000 + 2000 for file in files)
    again = open_hf(tmp_path / "out")
    assert again.model == MODEL
    wanted = read_all(source)
    for name, array in read_all(again).items():
        assert array.tobytes() == wanted[name].tobytes()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in TENSORS.values())


@pytest.mark.parametrize("changes", [{"rotary_base": 5e5}, {"head_dim": 4, "rotary_dim": 2}])
def test_shapes_that_transformers_has_not(tmp_path, changes):
    source = open_hf(write(tmp_path / "in"))
    (tmp_path / "out").mkdir()
    model = dataclasses.replace(MODEL, **changes)
    with pytest.raises(UsageError, match="--to meshlm"):
        make_target(tmp_path / "out", source, model)
    assert list((tmp_path / "out").iterdir()) == []
