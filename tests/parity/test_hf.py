"""Hugging Face folders: transformers' own are read, and ours are read by transformers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.conversion.cast import CastPart
from meshlm.conversion.hf.config import make_config
from meshlm.conversion.hf.pickled import write_safetensors
from meshlm.conversion.hf.source import open_hf
from meshlm.conversion.hf.target import HfTarget
from meshlm.conversion.opening import open_source
from meshlm.conversion.parts import part_keys, stacked_name
from meshlm.conversion.proof.record import check_all
from meshlm.conversion.source import Source
from meshlm.core.errors import BadInputError
from meshlm.core.tree import from_named
from meshlm.data.special_tokens import SpecialTokens
from meshlm.data.tokenizer import load_gpt2, train_bpe
from meshlm.data.tokenizer_folder import ReadTokenizer
from meshlm.formats.safetensors import from_bytes, to_bytes
from meshlm.model.families import with_embedding_bias
from meshlm.model.params import Params, weight_tree
from meshlm.model.presets import PRESETS
from meshlm.model.transformer import forward
from tiny import F32, draw_tokens, relative_max

pytestmark = pytest.mark.parity

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BASE = {"n_layer": 3, "n_embd": 24, "n_head": 3, "rotary_dim": 6} | {
    "vocab_size": 61,
    "n_positions": 16,
}


def make_model(seed: int = 0, dtype: str = "float32", **changes) -> transformers.GPTJForCausalLM:
    config = transformers.GPTJConfig(**BASE | {"bos_token_id": 0, "eos_token_id": 0} | changes)
    model = transformers.GPTJForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.to(TORCH_DTYPES[dtype]).eval()


def to_params(source: Source) -> Params:
    """The native tree in float32."""
    layers: dict[str, list[np.ndarray]] = {}
    for part in source.parts():
        for name, info in part.tensors.items():
            array = part.read(name)
            assert (array.shape, array.dtype) == (info.shape, info.dtype)
            layers.setdefault(stacked_name(name)[0], []).append(array.astype(np.float32))
    named = {
        name: jnp.asarray(np.stack(rows) if name.startswith("blocks.") else rows[0])
        for name, rows in layers.items()
    }
    return from_named(weight_tree(source.model), named)


def our_logits(source: Source, tokens) -> np.ndarray:
    run = jax.jit(lambda params: forward(params, source.model, tokens, F32))
    return np.asarray(run(to_params(source)))


def their_logits(model: transformers.GPTJForCausalLM, tokens) -> np.ndarray:
    # A new model: .half() rounds the rotary table of the old one too, for good.
    exact = transformers.GPTJForCausalLM(model.config).float().eval()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        return exact(torch.from_numpy(np.array(tokens)).long()).logits.numpy()


def write_folder(folder: Path, source: Source, dtype: str | None = None, **changes) -> HfTarget:
    folder.mkdir()
    infos = dict(source.infos)
    if dtype is not None:
        numpy_dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
        infos = {n: dataclasses.replace(i, dtype=numpy_dtype) for n, i in infos.items()}
    target = HfTarget(
        folder,
        model=source.model,
        infos=infos,
        groups=source.groups,
        tokenizer=source.tokenizer,
        step=source.step,
        counts=source.counts,
        sidecar=source.sidecar,
        special_tokens=source.special_tokens,
        **changes,
    )
    for part in source.parts(order=target.order):
        target.write("params", part if dtype is None else CastPart(part, numpy_dtype))
    target.finish()
    return target


def assert_same_weights(found, wanted) -> None:
    found, wanted = found.state_dict(), wanted.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@st.composite
def shapes(draw) -> dict:
    heads, head_dim = draw(st.integers(1, 4)), draw(st.integers(1, 8)) * 2
    return {
        "n_layer": draw(st.integers(1, 3)),
        "n_embd": heads * head_dim,
        "n_head": heads,
        "rotary_dim": 2 * draw(st.integers(1, head_dim // 2)),
        "n_inner": draw(st.none() | st.integers(3, 50)),
        "vocab_size": 2 * draw(st.integers(3, 40)) + 1,
        "layer_norm_epsilon": draw(st.sampled_from([1e-5, 1e-3])),
    }


@settings(max_examples=5)
@given(shapes(), st.sampled_from(list(TORCH_DTYPES)), st.booleans(), st.integers(0, 99))
def test_what_transformers_saves_gives_its_logits_and_goes_back(shape, dtype, in_shards, seed):
    model = make_model(seed, dtype, **shape)
    with tempfile.TemporaryDirectory() as name:
        theirs = Path(name) / "theirs"
        model.save_pretrained(theirs, max_shard_size="4KB" if in_shards else "1GB")
        assert (theirs / "model.safetensors").exists() != in_shards
        source = open_hf(theirs)
        assert source.tokenizer is None
        tokens = draw_tokens(source.model, 2, 9, seed)

        target = write_folder(Path(name) / "ours", source, max_file_bytes=4000 + 10**6 * in_shards)
        again = transformers.GPTJForCausalLM.from_pretrained(Path(name) / "ours")
        assert_same_weights(again, model)
        assert target.notes == []
        assert open_hf(Path(name) / "ours").model == source.model

        wanted = their_logits(model, tokens)
        assert relative_max(our_logits(source, tokens), wanted) <= 2e-5
        assert np.array_equal(their_logits(again, tokens), wanted)


def test_our_safetensors_and_the_library_agree():
    rng = np.random.default_rng(0)
    arrays = {
        "a.half": rng.standard_normal((3, 5)).astype(np.float16),
        "b.full": rng.standard_normal((2, 1, 3)).astype(np.float32),
        "c.brain": rng.standard_normal(7).astype(ml_dtypes.bfloat16),
        "d.double": rng.standard_normal(()),
        "e.none": np.zeros((0, 3), np.int16),
        "f.ids": rng.integers(0, 255, 3).astype(np.uint8),
    }
    metadata = {"format": "pt", "ключ": "значение"}

    theirs = safetensors.torch.load(to_bytes(arrays, metadata))
    assert theirs.keys() == arrays.keys()
    for name, array in arrays.items():
        assert tuple(theirs[name].shape) == array.shape
        assert (
            theirs[name].contiguous().view(-1).numpy(force=True).dtype == array.dtype
            if (name != "c.brain")
            else theirs[name].dtype == torch.bfloat16
        )
        assert theirs[name].reshape(-1).view(torch.uint8).numpy().tobytes() == array.tobytes()

    found, remarks = from_bytes(safetensors.numpy.save(arrays, metadata), "x")
    assert remarks == metadata
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
        assert found[name].tobytes() == array.tobytes()


def test_what_the_library_refuses_we_refuse():
    good = to_bytes({"a": np.ones(3, np.float32), "b": np.ones((2, 2), np.float16)}, {})
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(3000):
        damaged = bytearray(good)
        for _ in range(rng.integers(1, 3)):
            damaged[rng.integers(0, len(good) - 20)] = rng.integers(0, 256)
        try:
            theirs = safetensors.numpy.load(bytes(damaged))
        except Exception:  # whatever the library has for it
            refused += 1
            with pytest.raises(BadInputError):
                from_bytes(bytes(damaged), "x")
        else:
            assert theirs is not None
    assert 1000 < refused < 3000


def test_mixed_dtypes_are_written_as_they_are_and_loaded_exactly(tmp_path):
    model = make_model(dtype="bfloat16")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = "transformer.h.1.mlp.fc_out.bias"
    state[name] = state[name].float() + 1e-6  # not a number of bfloat16
    model.config.save_pretrained(tmp_path)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})

    write_folder(tmp_path / "ours", open_hf(tmp_path))
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"
    again = transformers.GPTJForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(again[n], tensor.float()) for n, tensor in state.items())

    state[name] = state[name].bfloat16().float()  # one again
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    write_folder(tmp_path / "narrow", open_hf(tmp_path))
    again = transformers.GPTJForCausalLM.from_pretrained(tmp_path / "narrow")
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.state_dict()[name], state[name].bfloat16())


def test_one_dtype_for_all(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "theirs")
    write_folder(tmp_path / "ours", open_hf(tmp_path / "theirs"), dtype="float16")
    again = transformers.GPTJForCausalLM.from_pretrained(tmp_path / "ours")
    assert_same_weights(again, model.half())


class WithBias(Source):
    """A source with an embedding bias, as the original's are."""

    def __init__(self, source: Source, bias: np.ndarray) -> None:
        self._source, self._bias = source, bias
        self.__dict__ |= {k: v for k, v in vars(source).items() if not k.startswith("_")}
        self.kind, self.groups, self.step, self.sidecar = "mtj", ("params", "mu", "nu"), 3, None
        self.counts, self.shards = {}, None
        self.model = with_embedding_bias(source.model)

    @property
    def infos(self):
        info = dataclasses.replace(
            self._source.infos["embedding.tokens"], shape=self._bias.shape, dtype=self._bias.dtype
        )
        return {**self._source.infos, "embedding.bias": info}

    def parts(self, group="params", order=None):
        for part in self._source.parts(order=order):
            if part.key == "embedding":
                part.tensors = {n: self.infos[n] for n in ("embedding.tokens", "embedding.bias")}
                read = part.read
                part.read = lambda n, read=read: self._bias if n == "embedding.bias" else read(n)
            yield part


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_embedding_bias_is_folded_in_float32(tmp_path, dtype):
    make_model(dtype="bfloat16").save_pretrained(tmp_path / "theirs")
    bare = open_hf(tmp_path / "theirs")
    bias = np.linspace(-1, 1, BASE["n_embd"]).astype(np.float32)
    source = WithBias(bare, bias if dtype is None else bias.astype(dtype_of(dtype)))
    target = write_folder(tmp_path / "ours", source, dtype)
    again = transformers.GPTJForCausalLM.from_pretrained(tmp_path / "ours")
    table = next(bare.parts()).read("embedding.tokens").astype(np.float32)
    wanted = torch.from_numpy(table) + torch.from_numpy(np.asarray(source._bias, np.float32))
    if dtype is None:
        assert again.dtype == torch.float32
    else:
        wanted = wanted.bfloat16()
    assert torch.equal(again.transformer.wte.weight, wanted)
    assert not target.model.has_bias("embedding")
    assert f"stored as {dtype or 'float32'}" in target.notes[0]
    assert "optimizer's state" in target.notes[1]


def dtype_of(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


TEXTS = ["Hello  world\n\n", "ünï 日本 \t x=1;  ", "<|endoftext|>a<|endoftext|>", "don't 1234567"]


def test_gpt2s_tokenizer_with_the_published_extra_tokens(tmp_path):
    shape = {"n_layer": 1, "n_embd": 4, "n_head": 1, "rotary_dim": 2, "vocab_size": 50400}
    make_model(**shape, bos_token_id=50256, eos_token_id=50256).save_pretrained(tmp_path / "theirs")
    source = open_hf(tmp_path / "theirs")
    assert source.tokenizer is load_gpt2()
    target = write_folder(tmp_path / "ours", source)
    assert len(target.notes) == 1
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert (len(theirs), theirs.vocab_size) == (50400, 50257)
    assert theirs.eos_token_id == theirs.bos_token_id == 50256
    assert theirs.model_max_length == 16
    for text in TEXTS:
        tokens = source.tokenizer.encode(text, "parse")
        assert theirs(text)["input_ids"] == tokens
        assert theirs.decode(tokens) == text
    extra = theirs.convert_tokens_to_ids(["<|extratoken_1|>", "<|extratoken_143|>"])
    assert extra == [50257, 50399]
    assert theirs("a<|extratoken_2|>")["input_ids"] == [64, 50258]

    # Read again: from tokenizer.json, from what transformers saves, and from the two old files.
    theirs.save_pretrained(tmp_path / "theirs")
    check_extra_tokens(open_hf(tmp_path / "theirs").tokenizer)
    again = open_hf(tmp_path / "ours")
    check_extra_tokens(again.tokenizer)
    write_folder(tmp_path / "again", again)
    written = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("ours", "again")]
    assert written[0] == written[1]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        os.remove(tmp_path / "ours" / name)
    assert open_hf(tmp_path / "ours").tokenizer.name == "gpt2"


def check_extra_tokens(tokenizer):
    """They are known, and no text becomes one."""
    assert (tokenizer.vocab_size, tokenizer.text_vocab_size) == (50400, 50257)
    assert tokenizer.token_bytes(50399) == b"<|extratoken_143|>"
    for text in (*TEXTS, "<|extratoken_2|>"):
        assert tokenizer.encode(text) == load_gpt2().encode(text)


def test_a_trained_tokenizer(tmp_path):
    tokenizer = train_bpe(["one two three one two two " * 9, "def f(x):\n    return x\n" * 9], 300)
    make_model(vocab_size=384).save_pretrained(tmp_path / "theirs")
    given_one = ReadTokenizer(tokenizer, SpecialTokens.of(tokenizer))
    source = open_hf(tmp_path / "theirs", given_one)
    write_folder(tmp_path / "ours", source)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.eos_token_id == tokenizer.end_of_text_id
    for text in (*TEXTS, "def one(two):\n"):
        assert theirs(text)["input_ids"] == tokenizer.encode(text, "parse")
    assert open_hf(tmp_path / "ours").tokenizer.fingerprint == tokenizer.fingerprint
    config = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    # The id that the weights' own files declare stays.
    assert config.eos_token_id == 0


def test_our_config_is_the_published_one(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(make_config(PRESETS["gpt-j-6b"], "float16", SpecialTokens.of(load_gpt2())))
    )
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    wanted = transformers.GPTJConfig().to_dict()
    found = theirs.to_dict()
    same = wanted.keys() - {"dtype", "architectures", "_name_or_path"}
    assert {k: found[k] for k in same} == {k: wanted[k] for k in same}
    assert theirs.dtype == torch.float16


def save_pickled(folder: Path, model, parts: int = 1) -> None:
    model.config.save_pretrained(folder)
    items = list(model.state_dict().items())
    if parts == 1:
        torch.save(dict(items), folder / "pytorch_model.bin")
        return
    files = [f"pytorch_model-{i + 1:05}-of-{parts:05}.bin" for i in range(parts)]
    for i, file in enumerate(files):
        torch.save(dict(items[i::parts]), folder / file)
    weight_map = {name: files[i % parts] for i, (name, _) in enumerate(items)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("parts", [1, 2])
def test_a_pickle_is_read_only_where_it_is_allowed(tmp_path, parts, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    folder = tmp_path / "folder"
    model = make_model(dtype="bfloat16", n_layer=1)
    save_pickled(folder, model, parts)
    with pytest.raises(BadInputError, match=r"pytorch_model\.bin.*--allow-pickle"):
        open_hf(folder)
    source = open_hf(folder, allow_pickle=True)
    assert list(scratch.iterdir()) == []
    tokens = draw_tokens(source.model, 1, 5)
    ours = our_logits(source, tokens)
    assert relative_max(ours, their_logits(model, tokens)) <= 2e-5

    # Safetensors go first: what is beside them is not touched.
    model.save_pretrained(folder)
    assert np.array_equal(our_logits(open_hf(folder), tokens), ours)


class Marker:
    """A pickle of this makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_hostile_pickle_never_runs(tmp_path):
    marker, folder = tmp_path / "it ran", tmp_path / "folder"
    model = make_model(n_layer=1)
    model.config.save_pretrained(folder)
    torch.save({**model.state_dict(), "more": Marker(marker)}, folder / "pytorch_model.bin")
    for allow_pickle in (False, True):
        with pytest.raises(BadInputError, match=r"pytorch_model\.bin") as caught:
            open_hf(folder, allow_pickle=allow_pickle)
        assert "\n" not in str(caught.value)
    assert not marker.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert marker.exists()  # it would have


def test_pickles_that_are_no_weights(tmp_path):
    path, target = tmp_path / "pytorch_model.bin", tmp_path / "x.safetensors"
    whole = {
        "not a dict": [1],
        "dict of tensors": {"model": {"a": torch.zeros(3)}},
        "larger than the file": {"a": torch.zeros(1).expand(1 << 40)},
        "not a weight": {"a": torch.zeros(3, dtype=torch.complex64)},
        "torch does not take it": None,
    }
    for why, value in whole.items():
        if value is None:
            path.write_bytes(path.read_bytes()[:100])
        else:
            torch.save(value, path)
        with pytest.raises(BadInputError, match=why):
            write_safetensors(path, target)
        assert not target.exists()


def test_a_pickle_of_before_torch_1_6(tmp_path):
    path, target = tmp_path / "pytorch_model.bin", tmp_path / "x.safetensors"
    tensor = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": tensor.T}, path, _use_new_zipfile_serialization=False)
    write_safetensors(path, target)
    assert torch.equal(safetensors.torch.load_file(target)["a"], tensor.T)


def test_the_sum_of_parts_is_every_tensor(tmp_path):
    model = make_model(n_layer=11)
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    source = open_hf(tmp_path)
    raw = {
        n: part.read_raw(n)
        for part in source.parts(order=part_keys(source.model)[::-1])
        for n in part.raw
    }
    state = model.state_dict()
    assert raw.keys() == state.keys()
    assert all(np.array_equal(raw[n], state[n].numpy()) for n in state)


def numbers_of(source: Source) -> dict[str, bytes]:
    return {name: part.read(name).tobytes() for part in source.parts() for name in part.tensors}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[transformers.GPTJForCausalLM, Path, dict[str, bytes]]:
    """A model, its folder as transformers saves it, and the numbers in it."""
    model = make_model()
    folder = tmp_path_factory.mktemp("saved") / "plain"
    model.save_pretrained(folder)
    return model, folder, numbers_of(open_source(folder))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
def test_names_that_torchs_wrappers_give(saved, tmp_path):
    model, _, wanted = saved
    wrapped = torch.nn.DataParallel(torch.compile(model))
    state = {name: tensor.clone() for name, tensor in wrapped.state_dict().items()}
    assert all(name.startswith("module._orig_mod.") for name in state)
    model.config.save_pretrained(tmp_path)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert numbers_of(open_source(tmp_path)) == wanted


@pytest.mark.parametrize("size", ["1GB", "30KB"])
def test_variants_as_transformers_saves_them(saved, tmp_path, size):
    model, _, wanted = saved
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
    assert not (tmp_path / "model.safetensors").exists()
    assert any("fp16" in path.name for path in tmp_path.iterdir())
    assert numbers_of(open_source(tmp_path)) == wanted
    # Without the index, the shards are named; beside a whole file they are not read, there as here.
    index = tmp_path / "model.safetensors.index.fp16.json"
    if size == "30KB":
        model.save_pretrained(tmp_path / "other", max_shard_size=size)
        other = make_model(seed=1)
        other.save_pretrained(tmp_path / "one")
        (tmp_path / "one/model.safetensors").rename(tmp_path / "other/model.safetensors")
        read = transformers.GPTJForCausalLM.from_pretrained(tmp_path / "other")
        for name, tensor in other.state_dict().items():
            assert torch.equal(read.state_dict()[name], tensor), name
        theirs = open_source(tmp_path / "other")
        assert numbers_of(theirs)["head.weight"] == other.lm_head.weight.detach().numpy().tobytes()
        index.unlink()
        with pytest.raises(BadInputError, match=r"of weights and no model\.safetensors\.index"):
            open_source(tmp_path)


def test_wide_and_narrow_types_are_named(saved, tmp_path):
    model, _, _ = saved
    wide = make_model().double()
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(BadInputError, match=r"is float64: .* model\.float\(\)\.save_pretrained"):
        open_source(tmp_path / "wide")
    model.config.save_pretrained(tmp_path / "narrow")
    state = {name: t.to(torch.float8_e4m3fn) for name, t in model.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "narrow/model.safetensors", {"format": "pt"})
    with pytest.raises(BadInputError, match="is 'F8_E4M3', a type that is not known here"):
        open_source(tmp_path / "narrow")


def test_a_cache_of_the_hubs_client(saved, tmp_path, monkeypatch):
    """The layout and the checksums are those that huggingface_hub writes."""
    from huggingface_hub import file_download
    from huggingface_hub._local_folder import write_download_metadata

    _, plain, wanted = saved
    cache = tmp_path / file_download.repo_folder_name(repo_id="a/b", repo_type="model")
    snapshot = cache / "snapshots/0123abcd"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for path in plain.iterdir():
        blob = cache / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        file_download._create_symlink(str(blob), str(snapshot / path.name), new_blob=True)
    source = open_source(cache, verify=True)
    assert numbers_of(source) == wanted
    local = shutil.copytree(plain, tmp_path / "local")
    digest = hashlib.sha256((local / "model.safetensors").read_bytes()).hexdigest()
    write_download_metadata(local, "model.safetensors", "0" * 40, digest)
    (proof,) = check_all(open_source(local))
    assert proof == "the checksums of the download: model.safetensors"
    (local / "config.json").write_bytes((local / "config.json").read_bytes() + b"\n")
    write_download_metadata(local, "config.json", "0" * 40, digest)
    with pytest.raises(BadInputError, match=r"config\.json is not what was downloaded"):
        check_all(open_source(local))
