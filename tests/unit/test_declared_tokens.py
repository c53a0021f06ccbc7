"""What a folder declares of its special tokens: used, carried through all formats, certified.

The weights always say `<|say|>`: that token ends a sample where the folder declares it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import meshlm
from meshlm.api import served
from meshlm.conversion.convert import convert
from meshlm.conversion.hf import target as hf_target
from meshlm.conversion.hf.config import read_config
from meshlm.conversion.hf.gptj import TABLE
from meshlm.conversion.opening import open_source
from meshlm.conversion.parts import part_keys
from meshlm.core.errors import BadInputError, MeshLMError, UsageError
from meshlm.core.sharding import use_mesh
from meshlm.data.prepare import PrepareConfig, prepare
from meshlm.data.special_tokens import SpecialTokens
from meshlm.data.tokenizer_folder import read_tokenizer
from meshlm.formats.safetensors import to_bytes
from meshlm.model.families import gpt_j
from meshlm.serving.api.prompts import Vocabulary
from meshlm.serving.api.tokens import tokenizer_info
from meshlm.serving.config import EngineConfig
from meshlm.serving.engine import Engine
from meshlm.serving.requests import Finished, Piece, Request
from meshlm.training.config import TrainConfig
from meshlm.training.start import resolve
from meshlm.training.validation import sample_texts
from tokenizer_folders import ASK, END, EOT, FAST, FOLDERS, SAY, token, tokenizer_json

ROWS, SAYS = 272, END + 2
MODEL = gpt_j(
    num_layers=1,
    d_model=16,
    num_heads=2,
    head_dim=8,
    d_ff=64,
    vocab_size=ROWS,
    context_length=64,
    rotary_dim=4,
)
FILES = {
    "tokenizer.json": tokenizer_json(EOT, ASK, SAY | {"lstrip": True}),
    "tokenizer_config.json": {
        "eos_token": "<|say|>",
        "pad_token": "<|ask|>",
        "sep_token": "<|say|>",
        "unk_token": None,
        "extra_special_tokens": ["<|ask|>"],
    },
    "generation_config.json": {"eos_token_id": [SAYS, 3], "temperature": 0.7, "do_sample": True},
}
IDS = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": END + 1}
DECLARED = SpecialTokens(
    eos_token_ids=(SAYS, 3),
    bos_token_id=END,
    pad_token_id=END + 1,
    bos_token="<|endoftext|>",
    eos_token="<|say|>",
    pad_token="<|ask|>",
    sep_token="<|say|>",
    others=("<|ask|>",),
    mode="parse",
)


def write(folder: Path, files: dict[str, Any] = FILES, **config: Any) -> Path:
    """Writes a Hugging Face folder of random weights that always say `<|say|>`."""
    rng = np.random.default_rng(0)
    tensors = {
        row.outside: rng.normal(0, 0.1, shape).astype(np.float32)
        for key in part_keys(MODEL)
        for row, shape in TABLE.shapes(MODEL, key)
    }
    tensors["lm_head.bias"][SAYS] = 100
    shape = {"n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 64, "rotary_dim": 4}
    whole = {"model_type": "gptj", "vocab_size": ROWS, **shape, **IDS} | config
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(to_bytes(tensors, {"format": "pt"}))
    for name, content in (files | {"config.json": whole}).items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text)
    return folder


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("hf") / "m")


@pytest.fixture(scope="module")
def model(theirs) -> meshlm.Model:
    return meshlm.load(theirs)


def test_any_declared_end_ends_a_sample(model):
    assert model.end_ids == (SAYS, 3)
    done = model.generate("hi", max_tokens=5, temperature=0)
    assert (done.tokens, done.text, done.finish_reason) == ([SAYS], "", "stop")
    on = model.generate("hi", max_tokens=5, temperature=0, ignore_end_of_text=True)
    assert (on.tokens, on.text, on.finish_reason) == ([SAYS] * 5, "<|say|>" * 5, "length")
    third = model.generate("hi", max_tokens=5, temperature=0, stop="say", ignore_end_of_text=True)
    assert (third.text, third.finish_reason) == ("<|", "stop")


def test_an_end_without_a_row_ends_nothing(tmp_path):
    generation = {"eos_token_id": [2**40, ROWS, -1, SAYS]}
    model = meshlm.load(write(tmp_path / "m", FILES | {"generation_config.json": generation}))
    assert model.generate("hi", max_tokens=5, temperature=0).tokens == [SAYS]


def test_prompts_are_parsed_unless_asked_otherwise(theirs, model):
    assert model.encode("<|ask|>hi") == [END + 1, *model.tokenizer.encode("hi")]
    assert model.tokenizer.encode("<|ask|>") == [END + 1]
    [score] = model.score("<|ask|>")
    assert score.tokens == [END + 1]
    as_text = meshlm.load(theirs, special_tokens="text")
    assert END + 1 not in as_text.encode("<|ask|>hi")
    assert as_text.end_ids == (SAYS, 3)
    assert meshlm.load(theirs, tokenizer=str(theirs / "tokenizer.json")).encode("<|ask|>") == [
        END + 1
    ]


def test_a_server_ends_at_any_of_them(model):
    engine = Engine(lambda: served(model), EngineConfig(slots=1, prefill_chunk=16))
    engine.start()
    while engine.state == "loading":
        time.sleep(0.01)
    events: list[Any] = []
    for on in (False, True):
        request = Request(prompt=(1, 2), max_tokens=3, temperature=0, ignore_end_of_text=on)
        engine.submit([request], lambda _, event: events.append(event))
    engine.drain()
    assert engine.join(60)
    pieces = [[t.token for t in event.tokens] for event in events if isinstance(event, Piece)]
    assert pieces == [[SAYS]] * 4
    assert [e.reason for e in events if isinstance(e, Finished)] == ["stop", "length"]


def test_a_server_tells_the_end_and_its_id_together(model, tmp_path):
    told = tokenizer_info(Vocabulary.of(served(model)))
    assert (told["eos_token"], told["eos_token_id"]) == ("<|say|>", SAYS)
    # config.json and the tokenizer's files may name different ends: the model ends at the former.
    other = write(tmp_path / "m", FILES | {"generation_config.json": {"eos_token_id": END}})
    told = tokenizer_info(Vocabulary.of(served(meshlm.load(other))))
    assert (told["eos_token"], told["eos_token_id"]) == ("<|endoftext|>", END)


@pytest.mark.parametrize(
    "way", [("hf",), ("meshlm", "hf"), ("mtj", "hf"), ("mtj", "meshlm", "mtj", "hf")]
)
def test_every_format_keeps_what_is_declared(theirs, tmp_path, way):
    source = open_source(theirs)
    assert source.special_tokens == DECLARED
    for number, to in enumerate(way):
        folder = tmp_path / str(number)
        certificate = convert(source, folder, to=to, shards=1)
        assert certificate.metadata["eos_token_ids"] == [SAYS, 3]
        assert certificate.metadata["tokenizer"] == source.tokenizer.fingerprint
        assert certificate.metadata["pad_token"] == "<|ask|>"
        if number == 0:
            notes = " ".join(certificate.notes)
            assert "temperature, do_sample are left out" in notes
        source = open_source(folder)
        assert source.special_tokens == DECLARED
        assert source.tokenizer.added[2].lstrip
    for name in ("config.json", "generation_config.json"):
        assert read(folder, name)["eos_token_id"] == [SAYS, 3]
        assert read(folder, name)["bos_token_id"] == END
        assert read(folder, name)["pad_token_id"] == END + 1
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        assert read(folder, name)["eos_token"] == "<|say|>"
        assert read(folder, name)["additional_special_tokens"] == ["<|ask|>"]
    assert read(folder, "tokenizer_config.json")["unk_token"] is None
    assert "unk_token" not in read(folder, "special_tokens_map.json")


def test_a_writer_that_loses_an_id_fails(theirs, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_target, "id_settings", lambda declared: {"eos_token_id": END})
    with pytest.raises(MeshLMError, match=rf"changed eos_token_ids: \[{END}\].*\[{SAYS}, 3\]"):
        convert(open_source(theirs), tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()


def test_a_chat_template_is_noted(tmp_path):
    for number, more in enumerate(
        [{"chat_template.jinja": "{{ x }}"}, {"tokenizer_config.json": {"chat_template": "x"}}]
    ):
        source = open_source(write(tmp_path / str(number), FILES | more))
        assert any("chat template is left out" in line for line in source.left_out)


@pytest.mark.parametrize(
    ("config", "generation", "wanted"),
    [
        ({}, None, (END,)),
        ({"eos_token_id": SAYS}, None, (SAYS,)),
        ({"eos_token_id": [SAYS, 5]}, None, (SAYS, 5)),
        ({"eos_token_id": 4}, {"eos_token_id": SAYS}, (SAYS,)),
        ({"eos_token_id": SAYS}, {"eos_token_id": None}, (SAYS,)),
        ({"eos_token_id": SAYS}, {"temperature": 1}, (SAYS,)),
        ({"eos_token_id": None}, None, (SAYS,)),  # the tokenizer's eos_token
    ],
)
def test_which_file_names_the_end(tmp_path, config, generation, wanted):
    files = {k: v for k, v in FILES.items() if k != "generation_config.json"}
    if generation is not None:
        files["generation_config.json"] = generation
    source = open_source(write(tmp_path / "m", files, **config))
    assert source.special_tokens.end_ids(source.tokenizer) == wanted
    if config.get("eos_token_id", 0) is None:  # and stays undeclared
        convert(source, tmp_path / "again", to="hf")
        assert read(tmp_path / "again", "config.json")["eos_token_id"] is None


@pytest.mark.parametrize("value", ["x", 1.5, True, [1, None], [[1]], {}, list(range(2000))])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_ids_that_are_none_are_named(tmp_path, file, value):
    if file == "config.json":
        folder = write(tmp_path / "m", eos_token_id=value)
    else:
        folder = write(tmp_path / "m", FILES | {file: {"eos_token_id": value}})
    with pytest.raises(BadInputError, match="eos_token_id") as caught:
        open_source(folder)
    assert str(folder / file) in str(caught.value)


def test_a_token_without_a_row_is_no_obstacle(tmp_path):
    fill = [token(f"<|extratoken_{i}|>", END + i, special=False) for i in range(1, ROWS - END)]
    whole = tokenizer_json(EOT, *fill, token("[PAD]", ROWS))
    files = FILES | {"tokenizer.json": whole, "tokenizer_config.json": {}}
    model = meshlm.load(write(tmp_path / "m", files))
    assert model.decode_model.shape.allowed_vocab == ROWS
    assert model.generate("hi", max_tokens=1).tokens == [SAYS]
    with pytest.raises(UsageError, match=r"'\[PAD\]', token 272, which has no row"):
        model.generate("hi [PAD]", max_tokens=1)
    with pytest.raises(UsageError, match="token id 272"):
        model.generate([[ROWS]], max_tokens=1)
    source = open_source(tmp_path / "m")
    assert "1 token has no row in the model and cannot be used: [PAD] (id 272)" in source.left_out
    assert open_source(tmp_path / "m", tokenizer=str(tmp_path / "m")).tokenizer.vocab_size == 273


def test_an_end_beyond_the_text_can_be_sampled(tmp_path):
    extra = token("<|extratoken_1|>", SAYS, special=False)
    files = FILES | {"tokenizer.json": tokenizer_json(EOT, ASK, extra)}
    files["tokenizer_config.json"] = {}
    model = meshlm.load(write(tmp_path / "m", files))
    assert model.tokenizer.text_vocab_size == SAYS
    assert model.generate("hi", max_tokens=3, temperature=0).tokens == [SAYS]


@pytest.fixture(scope="module")
def stores(theirs, tmp_path_factory) -> dict[str, str]:
    """A store in each mode, of a text that spells a special token."""
    folder = tmp_path_factory.mktemp("stores")
    (folder / "a.txt").write_text("the cat <|ask|> sat " * 50)
    for mode in ("parse", "text"):
        options = {"tokenizer": str(theirs), "special_tokens": mode, "val_fraction": 0}
        prepare(PrepareConfig(paths=(str(folder / "a.txt"),), out=str(folder / mode), **options))
    return {mode: str(folder / mode) for mode in ("parse", "text")}


def record_of(tmp_path: Path, **options: Any):
    config = TrainConfig(run=tmp_path / "run", seq_len=16, steps=1, **options)
    return config, *resolve(config)


def test_a_run_keeps_them_with_the_stores_mode(theirs, stores, tmp_path):
    for mode in ("parse", "text"):
        _, record, *_ = record_of(tmp_path, data=(stores[mode],), init=theirs)
        assert record.special_tokens == dataclasses.replace(DECLARED, mode=mode)
    _, record, *_ = record_of(tmp_path, data=(stores["parse"],), preset="test")
    assert record.special_tokens.end_ids(None) == (END,)
    assert record.special_tokens.mode == "parse"
    _, record, *_ = record_of(tmp_path, data=(stores["text"],), preset="test")
    assert record.special_tokens is None


def test_data_with_a_token_that_the_weights_have_no_row_for(stores, tmp_path, theirs):
    shifted = tokenizer_json(EOT, *[token(f"<|{i}|>", END + i) for i in range(1, ROWS - END + 1)])
    folder = write(
        tmp_path / "m", FILES | {"tokenizer.json": shifted, "tokenizer_config.json": FAST}
    )
    for text, name in (("fine <|1|>", "good"), ("bad <|9|>", "bad")):
        (tmp_path / "b.txt").write_text(text * 50)
        out = str(tmp_path / name)
        prepare(
            PrepareConfig(
                paths=(str(tmp_path / "b.txt"),), out=out, tokenizer=str(folder), val_fraction=0
            )
        )
    record_of(tmp_path, data=(str(tmp_path / "good"),), init=folder)
    with pytest.raises(UsageError, match=r"'<\|9\|>', token 272, and the weights of .* 272 rows"):
        record_of(tmp_path, data=(str(tmp_path / "bad"),), init=folder)


def test_samples_of_training_end_there_too(theirs, stores, tmp_path, model):
    config, record, (store,), mesh = record_of(
        tmp_path,
        data=(stores["parse"],),
        init=theirs,
        sample_prompts=("<|ask|>",),
        sample_tokens=4,
        compute_dtype="float32",
    )
    with use_mesh(mesh):
        samples = sample_texts(model.params, record, store.tokenizer, config, 1)
    assert samples == [("<|ask|>", "")]


def test_all_unknown_keys_are_named_at_once(tmp_path):
    keys = {"welcome": "hi", "model_max_length": 2048, "unsloth_version": "1", "top_h": None}
    keys |= {"my_norm": 1, "other_scale": 2, "cache_config": None}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gptj"} | keys))
    with pytest.raises(BadInputError, match='"my_norm", "other_scale" are keys that MeshLM') as e:
        read_config(tmp_path / "config.json")
    assert "welcome" not in str(e.value)


def test_a_length_without_a_limit_is_infinity_in_a_tokenizers_config(tmp_path):
    folder = write(tmp_path / "m", FILES)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    text = json.dumps(config | {"model_max_length": math.inf})
    assert "Infinity" in text
    (folder / "tokenizer_config.json").write_text(text)
    assert read_tokenizer(folder).tokenizer.to_json()


def test_the_published_files_of_old_give_a_tokenizer_everywhere(tmp_path):
    files = {k: v for k, v in FILES.items() if not k.startswith("tokenizer")}
    folder = write(tmp_path / "m", files | FOLDERS["two files of old, with more"])
    assert meshlm.load(folder).tokenizer.to_json() == read_tokenizer(folder).tokenizer.to_json()
    assert open_source(folder, tokenizer=str(folder)).tokenizer.id_of("<|ask|>") == END + 1
