"""A folder's tokenizer gives transformers' ids, whichever files describe it."""

from __future__ import annotations

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from meshlm.core.errors import BadInputError
from meshlm.data.tokenizer_folder import read_tokenizer
from tokenizer_folders import (
    ASK,
    DIGITS_APART,
    EOT,
    FOLDERS,
    REFUSED,
    TEXTS,
    tokenizer_json,
    write_files,
)

pytestmark = pytest.mark.parity

PIECES = [*"<|>[] \n", "<|ask|>", "<|say|>", "<|endoftext|>", "[PAD]", "the", " cat", "é", "\u3000"]
RANDOM = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_are_those_of_transformers(tmp_path, name):
    folder = write_files(tmp_path / "m", FOLDERS[name])
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours, special_tokens = read_tokenizer(folder)
    assert len(theirs) == ours.vocab_size
    flags = ("special", "lstrip", "rstrip", "single_word", "normalized")
    for token in ours.added:
        their_token = theirs.added_tokens_decoder[token.id]
        assert str(their_token) == token.content
        for flag in flags:
            assert getattr(their_token, flag) == getattr(token, flag), (token, flag)
    assert len(ours.added) == len(theirs.added_tokens_decoder)
    for key, text in special_tokens.texts.items():
        assert getattr(theirs, key) == text, key
    named = {text for text in special_tokens.texts.values() if text is not None}
    assert set(theirs.all_special_tokens) == named | set(special_tokens.others)
    check_texts(theirs, ours.with_special_tokens(special_tokens.mode), TEXTS)


def check_texts(theirs, ours, texts):
    for text in texts:
        tokens = ours.encode(text)
        assert tokens == theirs(text).input_ids, text
        # What a token takes of the white space around it does not come back.
        if not any(token.lstrip or token.rstrip for token in ours.added):
            space = " " if tokens and ours.decode(tokens).startswith(" ") else ""
            whole = ours.decode(tokens)
            assert whole in (text, space + text) or ours.encode(whole) == tokens


@settings(max_examples=60)
@given(texts=st.lists(RANDOM, min_size=5, max_size=5))
@pytest.mark.parametrize("name", ["added", "strips", "not special", "prefix space of the file"])
def test_random_texts(tmp_path_factory, name, texts):
    folder = tmp_path_factory.getbasetemp() / f"random {name}"
    if not folder.exists():
        write_files(folder, FOLDERS[name])
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours, special_tokens = read_tokenizer(folder)
    check_texts(theirs, ours.with_special_tokens(special_tokens.mode), texts)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_what_transformers_does_to_texts(tmp_path, name):
    files, why = REFUSED[name]
    folder = write_files(tmp_path / "m", files)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    text = "the e\u0301"
    plain = transformers.AutoTokenizer.from_pretrained(
        write_files(tmp_path / "plain", FOLDERS["plain"])
    )
    assert theirs(text).input_ids != plain(text).input_ids
    with pytest.raises(BadInputError, match=why):
        read_tokenizer(folder)


@pytest.mark.long
def test_each_class_of_transformers_is_followed_or_refused(tmp_path):
    names = sorted({name for name in TOKENIZER_MAPPING_NAMES.values() if name})
    files = {"tokenizer.json": tokenizer_json(EOT, ASK, pre_tokenizer=DIGITS_APART)}
    refused = followed = 0
    for name in names:
        settings = {"tokenizer_class": name, "eos_token": "<|endoftext|>"}
        folder = write_files(tmp_path / name, files | {"tokenizer_config.json": settings})
        try:
            theirs = transformers.AutoTokenizer.from_pretrained(folder)
            wanted = [theirs(text).input_ids for text in TEXTS]
        except Exception:  # these files are not for that class
            continue
        try:
            ours = read_tokenizer(folder).tokenizer.with_special_tokens("parse")
        except BadInputError as error:
            assert f"tokenizer_class is {name}".removesuffix("Fast") in str(error)  # noqa: PT017
            refused += 1
        else:
            assert [ours.encode(text) for text in TEXTS] == wanted, name
            followed += 1
    assert refused >= 10
    assert followed >= 3
