"""Tokenizers against tiktoken and Hugging Face's tokenizers, each built here from OpenAI's file."""

import json
import sys
from importlib import resources

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tiktoken_ext.openai_public import r50k_pat_str

from meshlm.core.errors import BadInputError, UsageError
from meshlm.data import bpe
from meshlm.data.tokenizer import (
    GPT2_FINGERPRINT,
    Tokenizer,
    from_json,
    load_gpt2,
    train_bpe,
)
from meshlm.data.tokenizer_folder import read_tokenizer
from meshlm.data.tokenizer_json import AddedToken, ByteLevelBPE

TEXTS = ["def is_even(i):\n    return i % 2 == 0\n" * 9, "the cat sat on the mat; the end. " * 9]
UNICODE = st.text(st.characters(exclude_categories=("Cs",)), max_size=200)
ODD = ["<|endoftext|>", "   ", "\n\n", "\t", "'s", "'ll", "don't", "漢字", "é", "e\u0301", "🤖"]
ODD += ["\u3000", "\x1c", "\x85", "\u200b", "\u2028", "123", "½", "a", "!!", "\r\n", "\0", "٣"]
MIXED = st.lists(st.sampled_from(ODD), max_size=40).map("".join)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return load_gpt2()


@pytest.fixture(scope="module")
def tiktoken_gpt2() -> tiktoken.Encoding:
    """tiktoken's own gpt2, from the same merges, read by the rules of its data_gym loader."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    to_byte = {chr(b): b for b in printable}
    hidden = [b for b in range(256) if b not in printable]
    to_byte |= {chr(256 + n): b for n, b in enumerate(hidden)}
    ranks = {bytes([b]): i for i, b in enumerate([*printable, *hidden])}
    lines = (resources.files("meshlm.data") / "gpt2/vocab.bpe").read_text("utf-8").split("\n")
    for line in lines[1:-1]:
        ranks[bytes(to_byte[c] for c in line.replace(" ", ""))] = len(ranks)
    return tiktoken.Encoding(
        "gpt2",
        explicit_n_vocab=50257,
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 50256},
    )


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_bpe(TEXTS, 280)


def test_gpt2_known_ids(gpt2):
    # The ids that OpenAI's documentation and the transformers documentation give.
    assert gpt2.encode("hello world") == [31373, 995]
    assert gpt2.encode("Hello, my dog is cute") == [15496, 11, 616, 3290, 318, 13779]
    assert gpt2.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    assert gpt2.encode("a<|endoftext|>b", special_tokens="parse") == [64, 50256, 65]
    assert (gpt2.name, gpt2.vocab_size, gpt2.end_of_text_id) == ("gpt2", 50257, 50256)


@given(text=UNICODE | MIXED)
@example(text=" \n" * 50 + "x")
def test_gpt2_equals_tiktoken(gpt2, tiktoken_gpt2, text):
    tokens = gpt2.encode(text)
    assert tokens == tiktoken_gpt2.encode_ordinary(text)
    assert gpt2.decode(tokens) == text
    special = tiktoken_gpt2.encode(text, allowed_special="all")
    assert gpt2.encode(text, "parse") == special


def test_gpt2_equals_tiktoken_on_every_character(gpt2, tiktoken_gpt2):
    # In a context that tells letters, digits, white space and the rest apart.
    points = [c for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000]
    for start in range(0, len(points), 1 << 14):
        text = "".join(f"a{chr(c)}  {chr(c)}1" for c in points[start : start + (1 << 14)])
        expected = tiktoken_gpt2.encode_to_numpy(text, disallowed_special=())
        assert np.array_equal(gpt2.encode_array(text), expected)


@pytest.mark.parametrize("unit", ["a", " ", "!", "\n", "\t ", "0", "漢", "ab9", " \u3000"])
@pytest.mark.parametrize("end", ["", "x", " ", "\n\nwords"])
def test_long_runs_equal_the_other_engine(gpt2, unit, end):
    # Longer than a segment. tiktoken alone overflows its stack on a million spaces before a word.
    text = "start " + unit * (70_000 // len(unit)) + end
    engine = bpe.HuggingFaceEngine(gpt2.to_json().decode())
    assert np.array_equal(gpt2.encode_array(text), engine.encode(text))


def test_a_million_spaces_before_a_word(gpt2):
    tokens = gpt2.encode(" " * 1_200_000 + "word")
    assert tokens == [220] * 1_199_999 + gpt2.encode(" word")


@given(parts=st.lists(st.sampled_from([" ", "\n", "\u3000", "\x1c", "a", "é", "!", "7"])))
def test_segments_change_nothing(gpt2, parts):
    text = "".join(parts)
    whole = gpt2.encode(text)
    cut = bpe.cut_point(text, 1, len(text))
    if cut is not None:
        assert gpt2.encode(text[:cut]) + gpt2.encode(text[cut:]) == whole


def test_unbroken_text_is_cut_at_the_limit(monkeypatch):
    monkeypatch.setattr(bpe, "_SEGMENT_CHARACTERS", 4)
    monkeypatch.setattr(bpe, "MAX_UNBROKEN_CHARACTERS", 10)
    parts = list(bpe.segments("ab cd ef " + "x" * 25 + " end"))
    assert "".join(parts) == "ab cd ef " + "x" * 25 + " end"
    assert max(map(len, parts)) == 10


@given(text=UNICODE | MIXED)
def test_trained_equals_tokenizers(trained, text):
    theirs = tokenizers.Tokenizer.from_str(trained.to_json().decode())
    theirs.encode_special_tokens = True
    tokens = trained.encode(text)
    assert tokens == theirs.encode(text).ids
    assert trained.decode(tokens) == text
    assert [a.tolist() for a in trained.encode_batch([text, "x"])] == [tokens, trained.encode("x")]


def test_trained_layout(trained):
    assert trained.end_of_text_id == trained.vocab_size - 1 == 279
    assert trained.name == "bpe-280"
    assert trained.token_bytes(279) == b"<|endoftext|>"
    assert [trained.token_bytes(i) for i in (0, 255)] == [b"!", b"\xad"]
    assert trained.encode("<|endoftext|>", special_tokens="parse") == [279]


def test_training_does_not_depend_on_the_order_of_texts(trained):
    assert train_bpe(reversed(TEXTS), 280).to_json() == trained.to_json()


def test_training_stops_where_no_pair_repeats():
    assert train_bpe(["abcdefg"], 4096).vocab_size == 257


def test_training_on_a_megabyte_without_a_space():
    letters = np.random.default_rng(0).choice(list("abcdefgh"), 1 << 20)
    assert train_bpe(["".join(letters)], 300).vocab_size == 300


@pytest.mark.parametrize("size", [0, 256, 1 << 21, -1])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(UsageError, match=str(size)):
        train_bpe(TEXTS, size)


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff ok", "\ude00\ud83d"])
def test_lone_surrogates_are_refused(gpt2, trained, text):
    for tokenizer in (gpt2, trained):
        with pytest.raises(BadInputError, match="lone surrogate"):
            tokenizer.encode(text)


def test_decode_of_incomplete_characters(gpt2):
    assert gpt2.decode([*gpt2.encode("é")[:1], 50256]) in ("é<|endoftext|>", "\ufffd<|endoftext|>")
    assert gpt2.decode([gpt2.encode("🤖")[0]]) == "\ufffd"
    for token in (-1, 50257):
        with pytest.raises(ValueError, match=str(token)):
            gpt2.decode([token])


def test_json_round_trip(gpt2, trained, tmp_path):
    assert gpt2.fingerprint == GPT2_FINGERPRINT
    for tokenizer in (gpt2, trained):
        (tmp_path / "tokenizer.json").write_bytes(tokenizer.to_json())
        for path in (tmp_path, tmp_path / "tokenizer.json"):
            again = read_tokenizer(path).tokenizer
            assert again.to_json() == tokenizer.to_json()
            assert (again.name, again.fingerprint) == (tokenizer.name, tokenizer.fingerprint)


def test_a_file_written_by_tokenizers_is_the_same_tokenizer(trained):
    theirs = tokenizers.Tokenizer.from_str(trained.to_json().decode()).to_str(pretty=True)
    assert from_json(theirs.encode()).fingerprint == trained.fingerprint


def test_a_tokenizer_with_specials_first_and_another_pattern():
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\d|[^\d]+"), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    theirs.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<pad>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator(TEXTS, trainer)
    ours = from_json(theirs.to_str().encode())
    assert ours.end_of_text_id == 0
    theirs.encode_special_tokens = True
    for text in [*TEXTS, "12 <pad> the cat<|endoftext|>"]:
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    assert ours.encode("a<pad>", special_tokens="parse")[-1] == 1


def test_merges_that_tiktoken_would_misread_go_to_tokenizers():
    # "abc" is merged from a+bc only, but ab comes first: tiktoken's rule would still make abc.
    merges = [("a", "b"), ("b", "c"), ("a", "bc")]
    vocabulary = {c: i for i, c in enumerate([*bpe.CHARACTER_TO_BYTE, "ab", "bc", "abc"])}
    assert not bpe.is_greedy(vocabulary, merges)
    added = [AddedToken(content="<|endoftext|>", id=259)]
    tokenizer = Tokenizer(ByteLevelBPE(vocabulary=vocabulary, merges=merges, added=added))
    assert tokenizer.encode("abc") == [256, vocabulary["c"]]


def _changed(tokenizer: Tokenizer, change) -> bytes:
    loaded = json.loads(tokenizer.to_json())
    change(loaded)
    return json.dumps(loaded).encode()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda d: d["model"].update(type="WordPiece"), "its model is WordPiece"),
        (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), "does not work on bytes"),
        (lambda d: d.update(pre_tokenizer=None), "does not work on bytes"),
        (lambda d: d.update(decoder=None), "does not work on bytes"),
        (lambda d: d.update(normalizer={"type": "NFC"}), "normaliser"),
        (lambda d: d["model"].update(byte_fallback=True), "byte_fallback"),
        (lambda d: d.update(added_tokens=[]), "no special token"),
        (lambda d: d["model"]["vocab"].pop("!"), "1 of the 256 bytes"),
        (lambda d: d["model"]["vocab"].update({"th": 10_000}), "ids are not 0"),
        (lambda d: d.update(post_processor={"type": "RobertaProcessing"}), "post_processor"),
        (lambda d: d["model"]["vocab"].update({"漢": 300}), "byte alphabet"),
        (lambda d: d["model"]["merges"].append("Q Q"), "merge"),
        (lambda d: d.pop("model"), "missing"),
        (lambda d: d.update(model=[]), "malformed"),
    ],
)
def test_other_tokenizers_are_refused(trained, change, why):
    with pytest.raises(BadInputError, match=why):
        from_json(_changed(trained, change))


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b"null"])
def test_what_is_no_tokenizer_is_refused(data):
    with pytest.raises(BadInputError, match="cannot be used"):
        from_json(data)


def test_a_missing_tokenizer_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="nowhere"):
        read_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        read_tokenizer(tmp_path)


def test_one_changed_byte_in_the_merges_is_refused(monkeypatch, tmp_path):
    data = (resources.files("meshlm.data") / "gpt2/vocab.bpe").read_bytes()
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2/vocab.bpe").write_bytes(data[:5000] + b"x" + data[5001:])
    monkeypatch.setattr(bpe.resources, "files", lambda _: tmp_path)
    with pytest.raises(BadInputError, match="sha256"):
        bpe.load_gpt2_merges()


def test_extra_tokens_are_known_and_are_no_text():
    whole = json.loads(load_gpt2().to_json())
    whole["added_tokens"] += [
        {"id": 50_256 + i, "content": f"<|extratoken_{i}|>", "special": False}
        for i in range(1, 144)
    ]
    tokenizer = from_json(json.dumps(whole).encode())
    assert (tokenizer.vocab_size, tokenizer.text_vocab_size) == (50_400, 50_257)
    assert tokenizer.decode([50_257]) == "<|extratoken_1|>"
    text = "a <|extratoken_1|> b"
    assert tokenizer.encode(text) == load_gpt2().encode(text)
    assert load_gpt2().text_vocab_size == load_gpt2().vocab_size == 50_257
