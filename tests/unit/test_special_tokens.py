"""Special tokens: parsed as `tokenizers` does or left text, declared by a folder, carried on."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from apps import CONTEXT
from meshlm.conversion.mtj.tokens import read_kept_tokens
from meshlm.core.errors import BadInputError, UsageError
from meshlm.data import bpe, records
from meshlm.data.prepare import PrepareConfig, prepare
from meshlm.data.special_tokens import SpecialTokens, check_rows, fits
from meshlm.data.store import TokenStore
from meshlm.data.tokenizer import from_json, load_gpt2, train_bpe
from meshlm.data.tokenizer_folder import find_tokenizer, read_tokenizer
from meshlm.serving.api.chat import plan_chat
from meshlm.serving.api.prompts import Vocabulary, read_prompts
from meshlm.serving.api.protocol import ChatRequest, TokenizeRequest, read_fields
from meshlm.serving.api.tokens import tokenize, tokenizer_info
from meshlm.serving.config import Limits
from meshlm.serving.errors import ApiError
from tokenizer_folders import (
    ASK,
    END,
    EOT,
    FOLDERS,
    REFUSED,
    SAY,
    TEXTS,
    token,
    tokenizer_json,
    write_files,
)

CONTENTS = ["<|ask|>", "<|a", "|>", "ask", " the", "é", "\n\n", "the cat", "[PAD]"]
FLAGS = st.tuples(*[st.booleans()] * 5)
ADDED = st.lists(st.tuples(st.sampled_from(CONTENTS), FLAGS), max_size=5, unique_by=lambda t: t[0])
PIECES = st.sampled_from([*CONTENTS, *" \t\n", "\u3000", "a", "sk", "the", "<|endoftext|>", "!"])
RANDOM = st.lists(PIECES, max_size=25).map("".join)


def make_json(added, *, prefix_space: bool) -> bytes:
    names = ("special", "lstrip", "rstrip", "single_word", "normalized")
    tokens = [
        token(content, END + 1 + i) | dict(zip(names, flags, strict=True))
        for i, (content, flags) in enumerate(added)
    ]
    return json.dumps(tokenizer_json(EOT, *tokens, prefix_space=prefix_space)).encode()


@given(added=ADDED, prefix_space=st.booleans(), text=RANDOM)
def test_added_tokens_are_parsed_as_tokenizers_does(added, prefix_space, text):
    data = make_json(added, prefix_space=prefix_space)
    theirs = tokenizers.Tokenizer.from_str(data.decode())
    ours = from_json(data)
    assert ours.encode(text, "parse") == theirs.encode(text, add_special_tokens=False).ids
    known = theirs.get_added_tokens_decoder()
    assert {t.id: t.content for t in ours.added} == {i: t.content for i, t in known.items()}
    again = from_json(ours.to_json())
    assert (again.to_json(), again.added) == (ours.to_json(), ours.added)


@given(added=ADDED, prefix_space=st.booleans(), text=RANDOM)
def test_as_text_no_added_token_comes(added, prefix_space, text):
    data = make_json(added, prefix_space=prefix_space)
    without = json.loads(data) | {"added_tokens": []}
    theirs = tokenizers.Tokenizer.from_str(json.dumps(without))
    assert from_json(data).encode(text) == theirs.encode(text, add_special_tokens=False).ids


@given(added=ADDED, prefix_space=st.booleans(), text=RANDOM)
def test_long_texts_are_cut_where_it_changes_nothing(added, prefix_space, text):
    ours = from_json(make_json(added, prefix_space=prefix_space))
    for mode in ("parse", "text"):
        whole = ours.encode(text, mode)
        place = 0
        while (place := ours.cut_point(text, place + 1, len(text), mode)) is not None:
            assert ours.encode(text[:place], mode) + ours.encode(text[place:], mode) == whole


def test_long_texts_with_added_tokens_equal_tokenizers(monkeypatch):
    data = json.dumps(tokenizer_json(EOT, ASK | {"rstrip": True}, SAY | {"lstrip": True})).encode()
    theirs = tokenizers.Tokenizer.from_str(data.decode())
    text = "the cat <|ask|>  sat on\n\n<|say|> a mat <|endoftext|> and so on and on " * 40
    wanted = theirs.encode(text, add_special_tokens=False).ids
    monkeypatch.setattr(bpe, "_SEGMENT_CHARACTERS", 60)
    tokenizer = from_json(data)
    assert len(list(bpe.segments(text, lambda *a: tokenizer.cut_point(*a, "parse")))) > 20
    assert tokenizer.encode(text, "parse") == wanted


def test_flags_and_texts_are_kept(tmp_path):
    tokenizer, special_tokens = read_tokenizer(write_files(tmp_path, FOLDERS["strips"]))
    ask, say = tokenizer.added[1:]
    assert (ask.lstrip, ask.rstrip, ask.special) == (True, False, True)
    assert (say.rstrip, say.single_word, say.normalized) == (True, True, False)
    entries = json.loads(tokenizer.to_json())["added_tokens"]
    assert entries[1] == ASK | {"lstrip": True}
    assert special_tokens.mode == "parse"
    assert tokenizer.encode("a <|ask|> the", "parse") == [64, END + 1, *tokenizer.encode(" the")]


def test_fingerprints_of_old_tokenizers_stay():
    # As format 1 wrote them: GPT-2's, and one that was trained.
    assert load_gpt2().fingerprint[:12] == "36636125b8f0"
    trained = train_bpe(["the cat sat on the mat; the end. " * 9], 262)
    assert trained.fingerprint[:12] == "6cfdcd618d1b"
    # A folder's, in which every token was special then.
    theirs = from_json(json.dumps(tokenizer_json(EOT, ASK)).encode())
    assert theirs.fingerprint[:12] == "25faeae2394a"


@pytest.mark.parametrize(
    ("files", "eos_token", "end_of_text"),
    [
        (FOLDERS["plain"], "<|endoftext|>", "<|endoftext|>"),
        (FOLDERS["no end of text"], "<|ask|>", "<|ask|>"),
        (FOLDERS["two files of old, with more"], "<|ask|>", "<|endoftext|>"),
        (FOLDERS["no eos"], None, "<|endoftext|>"),
    ],
)
def test_the_end_of_documents_and_eos(tmp_path, files, eos_token, end_of_text):
    tokenizer, special_tokens = read_tokenizer(write_files(tmp_path, files))
    assert (special_tokens.eos_token, tokenizer.end_of_text) == (eos_token, end_of_text)
    wanted = tokenizer.id_of(eos_token or end_of_text)
    assert special_tokens.end_ids(tokenizer) == (wanted,)
    assert dataclasses.replace(special_tokens, eos_token_ids=(3, 4)).end_ids(tokenizer) == (3, 4)


def test_refusals_are_one_line_with_the_file(tmp_path):
    for number, (files, why) in enumerate(REFUSED.values()):
        folder = write_files(tmp_path / str(number), files)
        with pytest.raises(BadInputError, match=why) as caught:
            find_tokenizer(folder)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_why_a_file_cannot_be_read_is_said(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"\xff{}")
    with pytest.raises(BadInputError, match=r"tokenizer\.json is not JSON \(not UTF-8 at byte 0\)"):
        find_tokenizer(tmp_path)
    (tmp_path / "special_tokens.json").write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(BadInputError, match=r"special_tokens\.json: over 1 MiB"):
        read_kept_tokens(tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": "[1]"},
        {"tokenizer_config.json": {"eos_token": 3}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"x": {"content": "a"}}}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"3": {}}}},
        {"tokenizer_config.json": {"additional_special_tokens": 3}},
        {"special_tokens_map.json": {"pad_token": {"content": "x", "lstrip": "yes"}}},
        {"added_tokens.json": {"x": "y"}},
        {"tokenizer.json": tokenizer_json(EOT, token("x" * 2000, END + 1))},
        {"tokenizer.json": tokenizer_json(EOT, token("", END + 1))},
        {"tokenizer.json": tokenizer_json(EOT, token("<|x|>", END))},
        {"tokenizer.json": tokenizer_json(EOT, ASK, ASK | {"id": END + 2})},
        {"added_tokens.json": {"<|x|>": END}},
        {
            "tokenizer.json": tokenizer_json(EOT, token("<|x|>", END + 1, special=False)),
            "tokenizer_config.json": {"split_special_tokens": True},
        },
        {"tokenizer.json": "{"},
    ],
)
def test_damaged_files_are_named_in_one_line(tmp_path, files):
    folder = write_files(tmp_path, FOLDERS["plain"] | files)
    with pytest.raises(BadInputError) as caught:
        read_tokenizer(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tokens_without_a_row(tmp_path):
    tokenizer, special_tokens = read_tokenizer(
        write_files(tmp_path, FOLDERS["named in its config"])
    )
    rows = tokenizer.vocab_size - 1  # [PAD] has none
    assert fits(tokenizer, rows)
    assert not fits(tokenizer, END)  # the end of text has none
    with pytest.raises(UsageError, match=r"'\[PAD\]', token .* no row"):
        check_rows(tokenizer.encode("a[PAD]", "parse"), tokenizer, rows)
    check_rows(tokenizer.encode("a[PAD]"), tokenizer, rows)
    vocabulary = Vocabulary(
        tokenizer=tokenizer, special_tokens=special_tokens, size=rows, context_length=CONTEXT
    )
    with pytest.raises(ApiError) as caught:
        read_prompts(["a", "b[PAD]"], vocabulary, Limits())
    assert (caught.value.status, caught.value.param) == (400, "prompt[1]")


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Vocabulary:
    folder = write_files(tmp_path_factory.mktemp("m"), FOLDERS["two files of old, with more"])
    tokenizer, special_tokens = read_tokenizer(folder)
    return Vocabulary(
        tokenizer=tokenizer,
        special_tokens=special_tokens,
        size=tokenizer.vocab_size,
        context_length=CONTEXT,
    )


@pytest.mark.parametrize("mode", ["parse", "text"])
def test_prompts_of_a_server(vocabulary, mode):
    special_tokens = dataclasses.replace(vocabulary.special_tokens, mode=mode)
    server = dataclasses.replace(vocabulary, special_tokens=special_tokens)
    ask = vocabulary.tokenizer.id_of("<|ask|>")
    (prompt,) = read_prompts("<|ask|>hi", server, Limits())
    assert (prompt.tokens[0] == ask) == (mode == "parse")
    assert prompt.text == "<|ask|>hi"
    found = tokenize(read_fields(TokenizeRequest, {"text": "<|ask|>hi"}), server)
    assert found["tokens"] == list(prompt.tokens)
    assert tokenizer_info(server)["special_tokens"] == mode


@given(
    parts=st.lists(st.sampled_from(["<|", "ask", "|>", "<|ask|>", "\n\nUser: ", "hi"]), max_size=8)
)
def test_no_message_of_a_chat_becomes_a_special_token(vocabulary, parts):
    messages = [{"role": "user", "content": "".join(parts)}, {"role": "user", "content": "<|as"}]
    request = read_fields(ChatRequest, {"messages": messages, "max_tokens": 1})
    (prompt,) = plan_chat(request, vocabulary, Limits()).prompts
    assert max(prompt.tokens) < END


def prepared(tmp_path, *texts: str, name: str = "store", **options) -> tuple[TokenStore, str]:
    """A store of one JSON line a text, and what was said on the way."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "texts.jsonl").write_text(lines)
    console = Console(record=True, width=200)
    out = str(tmp_path / name)
    paths = (str(tmp_path / "texts.jsonl"),)
    prepare(PrepareConfig(paths=paths, out=out, val_fraction=0, **options), console)
    return TokenStore.open(out), console.export_text()


def test_data_prepare_parses_or_says_that_it_does_not(tmp_path):
    folder = write_files(tmp_path / "m", FOLDERS["added"])
    tokenizer = read_tokenizer(folder).tokenizer
    texts = ("<|ask|>the cat<|say|>", "<|endoftext|>the")
    for mode in ("parse", "text"):
        chosen = {} if mode == "parse" else {"special_tokens": "text"}
        store, said = prepared(tmp_path, *texts, name=mode, tokenizer=str(folder), **chosen)
        wanted = [t for text in texts for t in (*tokenizer.encode(text, mode), END)]
        assert store.read("train", 0, store.num_tokens("train")).tolist() == wanted
        assert store.manifest.tokenizer.special_tokens == mode
        assert ("2 other special tokens of the tokenizer are written out" in said) == (
            mode == "text"
        )
        assert read_tokenizer(store.path).special_tokens.mode == mode
    with pytest.raises(UsageError, match="--special-tokens was parse, now not given"):
        prepared(tmp_path, *texts, name="parse", tokenizer=str(folder), special_tokens="text")


def test_gpt2_stays_text_and_trained_too(tmp_path):
    for tokenizer in ("gpt2", "train:260"):
        store, said = prepared(
            tmp_path, "a<|endoftext|>b" * 9, name=tokenizer[:4], tokenizer=tokenizer
        )
        tokens = store.read("train", 0, store.num_tokens("train"))
        assert np.count_nonzero(tokens == store.tokenizer.end_of_text_id) == 1
        assert "is written out in 1 documents" in said
        assert "special_tokens" not in store.manifest.options


def test_an_end_of_text_that_is_no_token_is_not_counted_as_one(tmp_path):
    folder = write_files(tmp_path / "m", FOLDERS["no end of text"])
    for text, count in (("<|endoftext|>the cat", 0), ("<|endoftext|>the cat<|ask|>", 1)):
        options = {"tokenizer": str(folder), "special_tokens": "text"}
        _, said = prepared(tmp_path, text, name=f"store{count}", **options)
        assert "is written out in 1 documents" in said
        assert ("1 other special tokens" in said, "other special tokens" in said) == (count,) * 2


def test_another_end_of_documents_goes_through_a_store(tmp_path):
    folder = write_files(tmp_path / "m", FOLDERS["no end of text"])
    store, _ = prepared(tmp_path, "the cat", tokenizer=str(folder))
    assert store.tokenizer.end_of_text == "<|ask|>"
    assert store.read("train", 0, store.num_tokens("train"))[-1] == store.tokenizer.end_of_text_id
    assert read_tokenizer(store.path).tokenizer.end_of_text == "<|ask|>"


def test_a_long_text_is_cut_between_its_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(records, "CHUNK_BYTES", 30)
    for name in ("strips", "prefix space of the file"):
        folder = write_files(tmp_path / name, FOLDERS[name])
        tokenizer = read_tokenizer(folder).tokenizer
        text = "the cat <|ask|>  sat on the <|say|>  mat,\n and so on and on " * 30
        (tmp_path / "text.txt").write_text(text)
        config = PrepareConfig(
            paths=(str(tmp_path / "text.txt"),),
            out=str(tmp_path / f"store {name}"),
            val_fraction=0,
            tokenizer=str(folder),
        )
        prepare(config)
        store = TokenStore.open(config.out)
        found = store.read("train", 0, store.num_tokens("train")).tolist()
        assert found == [*tokenizer.encode(text, "parse"), END]


def test_extra_tokens_are_generated_where_a_fine_tune_added_others():
    extra = [token(f"<|extratoken_{i}|>", END + i, special=False) for i in (1, 2)]
    pad, ask = token("[PAD]", END + 3), token("<|ask|>", END + 3)

    def text_size(*added) -> int:
        return from_json(json.dumps(tokenizer_json(EOT, *extra, *added)).encode()).text_vocab_size

    assert text_size() == text_size(pad) == END + 1
    assert text_size(ask) == END + 4


def test_all_texts_of_the_table_in_both_modes(tmp_path):
    # transformers' ids, as tests/parity holds them for every folder of the table.
    tokenizer = read_tokenizer(write_files(tmp_path, FOLDERS["added"])).tokenizer
    the, cat = tokenizer.encode("the"), tokenizer.encode(" cat")
    parsed = [*the, 220, END + 1, *cat, END + 2, 220, *tokenizer.encode(" at"), 198, END]
    assert tokenizer.encode(TEXTS[3], "parse") == parsed
    assert END not in tokenizer.encode(TEXTS[3])


def test_of_and_start():
    gpt2 = load_gpt2()
    special_tokens = SpecialTokens.of(gpt2)
    assert special_tokens.end_ids(gpt2) == (50256,)
    assert special_tokens.start_id(gpt2, 50400) == 50256
    assert dataclasses.replace(special_tokens, bos_token_id=7).start_id(gpt2, 50400) == 7
    # transformers' default, in a model that has no row for it.
    assert SpecialTokens(bos_token_id=50256, eos_token_ids=(3,)).start_id(None, 300) == 3
    assert SpecialTokens().start_id(None, 300) is None
    assert SpecialTokens.of(None).end_ids(None) == ()
