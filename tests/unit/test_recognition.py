"""What lies at a path: the folder that is meant, or a line that says what is there instead."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from meshlm.cli.main import main
from meshlm.conversion.hf.config import make_config
from meshlm.conversion.hf.gptj import TABLE
from meshlm.conversion.hf.source import HfSource
from meshlm.conversion.opening import open_source
from meshlm.conversion.parts import part_keys
from meshlm.conversion.source import Source
from meshlm.core.errors import BadInputError, MeshLMError, UsageError
from meshlm.data.special_tokens import SpecialTokens
from meshlm.data.tokenizer_folder import read_tokenizer
from meshlm.formats.safetensors import to_bytes
from meshlm.model.families import gpt_j

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
ORIGINAL = Path(__file__).parents[1] / "fixtures/mtj/dev_s4_distinct/slim"
RNG = np.random.default_rng(0)
TENSORS = {
    row.outside: RNG.standard_normal(shape).astype(np.float32)
    for key in part_keys(MODEL)
    for row, shape in TABLE.shapes(MODEL, key)
}
CONFIG = json.dumps(make_config(MODEL, "float32", SpecialTokens(eos_token_ids=(20,))))
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{7:064}\nsize 24207819307\n"
# As PEFT 0.18 writes it, shortened.
ADAPTER = {
    "auto_mapping": None,
    "base_model_name_or_path": "EleutherAI/gpt-j-6b",
    "lora_alpha": 16,
    "peft_type": "LORA",
    "r": 8,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}


def renamed(prefix: str) -> dict[str, np.ndarray]:
    return {prefix + name: array for name, array in TENSORS.items()}


def model(folder: Path, file: str = "model.safetensors", tensors=TENSORS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(CONFIG)
    (folder / file).write_bytes(to_bytes(tensors, {"format": "pt"}))
    return folder


def sharded(folder: Path, count: int = 3) -> Path:
    weight_map = {}
    for shard in range(count):
        file = f"model-{shard + 1:05}-of-{count:05}.safetensors"
        part = dict(list(TENSORS.items())[shard::count])
        model(folder, file, part)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def files(folder: Path, **content: str) -> Path:
    """Writes files; in their names __ stands for a dot, and IN for a slash."""
    for name, text in content.items():
        path = folder / name.replace("__", ".").replace("IN", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def read_all(source: Source) -> dict[str, np.ndarray]:
    return {name: part.read(name) for part in source.parts() for name in part.tensors}


def assert_is_the_model(path: Path) -> HfSource:
    source = open_source(path)
    assert isinstance(source, HfSource)
    found = read_all(source)
    for key in part_keys(MODEL):
        for name, row in TABLE.rows(key).items():
            assert np.array_equal(found.pop(name).ravel(), TENSORS[row.outside].ravel()), name
    assert not found
    return source


def refusal(path: Path) -> MeshLMError:
    with pytest.raises(MeshLMError) as caught:
        open_source(path)
    assert "\n" not in str(caught.value)
    return caught.value


# A name, what makes it at a path and returns the path to give, the exit code, what is said.
Case = tuple[str, Callable[[Path], Path], int, str]


def _missing_shard(path: Path) -> Path:
    (sharded(path) / "model-00002-of-00003.safetensors").unlink()
    return path


def _two_missing_shards(path: Path) -> Path:
    (_missing_shard(path) / "model-00001-of-00003.safetensors").unlink()
    return path


def _no_index(path: Path) -> Path:
    (_missing_shard(path) / "model.safetensors.index.json").unlink()
    return path


def _dangling(path: Path) -> Path:
    snapshot = path / "models--a--b/snapshots/01"
    files(snapshot, config__json=CONFIG)
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    return snapshot


def _incomplete(path: Path) -> Path:
    return files(_cached(path, "01", {"config.json": CONFIG}), blobsIN0123__incomplete="x")


def _downloading(path: Path) -> Path:
    files(path, config__json=CONFIG)
    return files(path, __cacheINhuggingfaceINdownloadINx__incomplete="x")


def _cached(path: Path, name: str, content: dict[str, str]) -> Path:
    folder = path / "models--a--b"
    (folder / "snapshots" / name).mkdir(parents=True)
    for file, text in content.items():
        (folder / "snapshots" / name / file).write_text(text)
    return folder


def _two_snapshots(path: Path) -> Path:
    for name in ("01", "02"):
        model(path / "models--a--b/snapshots" / name)
    return files(path / "models--a--b", refsINmain="01\n")


def _trainer(path: Path) -> Path:
    for step in (500, 1000, 90):
        model(path / f"checkpoint-{step}")
    return files(path, training_args__bin="x")


def _pointer_shard(path: Path) -> Path:
    (sharded(path) / "model-00003-of-00003.safetensors").write_text(POINTER)
    return path


def _pointers(name: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        (model(path) / name).write_text(POINTER)
        return path

    return make


def _pointer_of_the_original(path: Path) -> Path:
    shutil.copytree(ORIGINAL, path)
    next(path.glob("step_*/shard_1/7.npz")).write_text(POINTER)
    return path


def _adapter(path: Path) -> Path:
    files(path, adapter_config__json=json.dumps(ADAPTER))
    return files(path, adapter_model__safetensors="x", README__md="x")


def _adapter_over_weights(path: Path) -> Path:
    return _adapter(model(path))


def _alone(name: str, text: str = "x") -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        files(path, config__json=CONFIG)
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
        return path

    return make


def _file(name: str) -> Callable[[Path], Path]:
    return lambda path: _alone(name)(path) / name


def _variants(path: Path) -> Path:
    model(path, "model.fp16.safetensors")
    return model(path, "model.bf16.safetensors")


def _tensors(tensors) -> Callable[[Path], Path]:
    return lambda path: model(path, tensors=tensors)


def _with(name: str, array: np.ndarray) -> Callable[[Path], Path]:
    return _tensors(TENSORS | {name: array})


def _eight_bits(path: Path) -> Path:
    model(path)
    header = {"x": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"ab")
    return path


def _link(path: Path) -> Path:
    path.mkdir()
    (path / "link").symlink_to("gone")
    return path / "link"


def _store(path: Path) -> Path:
    return files(path, manifest__json='{"format": "meshlm-token-store", "version": 1}')


def _inside(path: Path) -> Path:
    model(path / "gpt-j")
    return files(path, README__md="x")


def _empty(path: Path) -> Path:
    path.mkdir()
    return path


CASES: tuple[Case, ...] = (
    ("a pointer", _pointers("model.safetensors"), 3, "model.safetensors is a Git LFS pointer"),
    ("of the config", _pointers("config.json"), 3, "config.json is a Git LFS pointer, not the fi"),
    ("of a tokenizer", _pointers("tokenizer.json"), 3, "run `git lfs pull` in "),
    ("of one shard", _pointer_shard, 3, "model-00003-of-00003.safetensors is a Git LFS pointer"),
    ("of the original", _pointer_of_the_original, 3, "shard_1/7.npz is a Git LFS pointer"),
    ("an adapter", _adapter, 3, "is a PEFT adapter (LORA) for EleutherAI/gpt-j-6b, and no model"),
    ("an adapter over weights", _adapter_over_weights, 3, "call merge_and_unload()"),
    ("a trainer's folder", _trainer, 2, "checkpoint-1000, the newest of 3"),
    ("two snapshots", _two_snapshots, 2, "with 2 snapshots: give one of them, such as "),
    ("main of two snapshots", _two_snapshots, 2, "refs/main is 01"),
    ("the whole cache", lambda p: _two_snapshots(p).parent, 2, "give a model's folder, "),
    ("a blob that is gone", _dangling, 3, "model.safetensors is a link to a file that is not"),
    ("an unfinished blob", _incomplete, 3, "0123.incomplete is a download that was not finished"),
    ("an unfinished file", _downloading, 3, "x.incomplete is a download that was not finished"),
    ("a missing shard", _missing_shard, 3, "model-00002-of-00003.safetensors: missing, 1 of the 3"),
    ("two missing shards", _two_missing_shards, 3, "and 1 more: missing, 2 of the 3 files"),
    ("no index", _no_index, 3, "has 2 of 3 shards of weights and no model.safetensors.index.json"),
    ("two variants", _variants, 3, "several variants of the weights, model.bf16.safetensors, mod"),
    ("gguf", _alone("gpt-j-q4_0.gguf"), 3, "gguf is GGUF, the format of llama.cpp: get the model"),
    ("gguf itself", _file("x.gguf"), 3, "x.gguf is GGUF"),
    ("flax", _alone("flax_model.msgpack"), 3, "is in Flax's format: load it in transformers 4 wi"),
    ("tensorflow", _alone("tf_model.h5"), 3, "is in TensorFlow's format"),
    ("onnx", _alone("model.onnx"), 3, "is in ONNX's format"),
    ("deepspeed", _alone("global_step500/x.pt"), 3, "global_step500 is of a DeepSpeed checkpoint"),
    ("fsdp", _alone("__0_0.distcp"), 3, "is of PyTorch's distributed checkpoint"),
    ("llama", _alone("consolidated.00.pth"), 3, "is in the form of Llama's and Mistral's own pro"),
    ("a pickle", _alone("gptj.pt"), 3, "gptj.pt is a pickle, a program, under a name of its own"),
    ("lightning", _file("last.ckpt"), 3, "name it pytorch_model.bin, put the model's config.json"),
    ("a zip", _file("model.zip"), 3, "model.zip is an archive: unpack it, and give the folder"),
    ("a tar", _alone("model.tar.gz"), 3, "model.tar.gz is an archive"),
    ("a shard of the original", _file("0.npz"), 3, "give the folder step_N that has all shards"),
    ("another name", _alone("gptj.safetensors"), 3, "gptj.safetensors is not called as transform"),
    (
        "another file",
        _file("notes.md"),
        2,
        "no weights that are known here (it has notes.md)",
    ),
    ("an empty folder", _empty, 2, "is empty: give a folder with weights in it"),
    ("a config alone", _alone("README.md"), 2, "has a config.json and no weights: no model.safet"),
    ("a model inside", _inside, 2, "holds no weights itself: give "),
    ("a token store", _store, 2, "is a token store, which a model is trained on: give a run"),
    ("a dangling link", _link, 2, "it is a link to gone, which is not there"),
    ("float64", _with("lm_head.bias", np.zeros(21)), 3, "model.float().save_pretrained(FOLDER)"),
    ("int8", _with("lm_head.bias", np.zeros(21, np.int8)), 3, "lm_head.bias is int8: weights are"),
    ("8 bits", _eight_bits, 3, "x is 'F8_E4M3', a type that is not known here: get the model in"),
    (
        "gptq",
        _with("transformer.h.0.attn.q_proj.qweight", np.zeros(1, np.int32)),
        3,
        "q_proj.qweight is no tensor of a GPT-J of 2 layers: GPTQ or AWQ packed it",
    ),
    (
        "bitsandbytes",
        _with("transformer.h.0.attn.q_proj.weight.quant_state.bitsandbytes__nf4", np.zeros(1)),
        3,
        "bitsandbytes packed it; get the model unquantised",
    ),
    ("peft", _tensors(renamed("base_model.model.")), 3, "it is PEFT's; call merge_and_unload()"),
    ("inside a module", _tensors(renamed("model.")), 3, "saved from inside another module"),
    ("some of it", _tensors(TENSORS | {"module.lm_head.bias": np.zeros(21)}), 3, "module.lm_head"),
)


@pytest.mark.parametrize(
    ("make", "code", "said"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_what_cannot_be_read_is_named(tmp_path, make, code, said):
    error = refusal(make(tmp_path / "at"))
    assert said in str(error)
    assert str(tmp_path) in str(error)
    assert error.exit_code == code


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("EleutherAI/gpt-j-6b", "hf download EleutherAI/gpt-j-6b --local-dir gpt-j-6b, and give"),
        ("~/gpt-j", "~ stands for your home folder in a shell alone"),
        ("https://huggingface.co/EleutherAI/gpt-j-6b", "MeshLM downloads nothing"),
        ("gpt-j-6", "did you mean gpt-j-6b?"),
        ("elsewhere", "elsewhere: there is nothing at this path"),
    ],
)
def test_where_nothing_is(tmp_path, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt-j-6b").mkdir()
    error = refusal(Path(given))
    assert isinstance(error, UsageError)
    assert "there is nothing at this path" in str(error)
    assert said in str(error)


def test_the_folder_that_is_meant(tmp_path):
    folder = model(tmp_path / "models--a--b/snapshots/0123")
    assert assert_is_the_model(tmp_path / "models--a--b").path == folder
    assert assert_is_the_model(folder / "model.safetensors").path == folder
    shards = sharded(tmp_path / "shards")
    for name in ("model-00002-of-00003.safetensors", "model.safetensors.index.json"):
        assert assert_is_the_model(shards / name).path == shards
    (shards / "other.safetensors").write_bytes(b"")
    with pytest.raises(BadInputError, match=r"\(model\.safetensors\.index\.json is\): give the fo"):
        open_source(shards / "other.safetensors")


def test_what_is_read_of_several(tmp_path):
    """safetensors before pickles, a whole file before an index, variants last."""
    wrong = {name: array + 1 for name, array in TENSORS.items()}
    folder = model(tmp_path / "m", "model.fp16.safetensors", wrong)
    (folder / "pytorch_model.bin").write_text("x")
    assert "pytorch_model.bin: these weights are a pickle" in str(refusal(folder))
    sharded(folder)
    assert_is_the_model(folder)
    (folder / "model-00001-of-00003.safetensors").unlink()
    assert "missing, 1 of the 3 files" in str(refusal(folder))
    assert_is_the_model(model(folder))


def test_the_only_variant(tmp_path):
    assert_is_the_model(model(tmp_path / "m", "model.fp16.safetensors"))
    shards = sharded(tmp_path / "s")
    index = shards / "model.safetensors.index.json"
    index.rename(shards / "model.safetensors.index.fp16.json")
    assert_is_the_model(shards)
    pickled = files(tmp_path / "p", config__json=CONFIG)
    (pickled / "pytorch_model.fp16.bin").write_text("x")
    assert "pytorch_model.fp16.bin: these weights are a pickle" in str(refusal(pickled))


@pytest.mark.parametrize("option", ["tokenizer", "config"])
def test_a_pointer_that_an_option_names(tmp_path, option):
    folder = files(model(tmp_path / "m").parent, other__json=POINTER)
    with pytest.raises(BadInputError, match=r"other\.json is a Git LFS pointer"):
        open_source(tmp_path / "m", **{option: str(folder / "other.json")})


def test_a_pointer_in_place_of_the_tokenizer_for_data(tmp_path):
    folder = files(tmp_path / "t", tokenizer__json=POINTER)
    for path in (folder, folder / "tokenizer.json"):
        with pytest.raises(BadInputError, match=r"tokenizer\.json is a Git LFS pointer"):
            read_tokenizer(path)


def test_pointers_that_do_no_harm(tmp_path):
    folder = model(tmp_path / "m")
    for name in ("pytorch_model.bin", "flax_model.msgpack", "README.md"):
        (folder / name).write_text(POINTER)
    assert_is_the_model(folder)


@pytest.mark.parametrize(
    ("prefix", "wrappers"),
    [
        ("module.", "DistributedDataParallel"),
        ("_orig_mod.", "torch.compile"),
        ("module._orig_mod.", "DistributedDataParallel in torch.compile"),
        ("_orig_mod.module.", "torch.compile in DistributedDataParallel"),
    ],
)
def test_what_torch_puts_around_a_model(tmp_path, caplog, prefix, wrappers):
    caplog.set_level(logging.WARNING)
    source = assert_is_the_model(model(tmp_path / "m", tensors=renamed(prefix)))
    assert f"begin with {prefix}, as {wrappers} saves them" in caplog.text
    assert source.place("lm_head.bias").name.endswith(f": {prefix}lm_head.bias")
    bare = {
        prefix + name.removeprefix("transformer."): array.astype(ml_dtypes.bfloat16)
        for name, array in TENSORS.items()
    }
    assert len(read_all(open_source(model(tmp_path / "bare", tensors=bare)))) == len(TENSORS)


def test_verify_says_it_too(tmp_path, capsys):
    for make, code, said in (
        (_trainer, 2, "is the output folder of a Trainer"),
        (_adapter, 3, "is a PEFT adapter"),
        (_pointers("config.json"), 3, "is a Git LFS pointer"),
        (_empty, 2, "is empty"),
    ):
        assert main(["verify", str(make(tmp_path / said.split()[-1]))]) == code
        told = capsys.readouterr().err
        assert said in told
        assert told.count("\n") == 1
