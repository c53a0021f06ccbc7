"""Texts for the model from words and files: as they are, in UTF-8, and other encodings by name."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlm.cli.texts import read_text, text_of_word
from meshlm.core.errors import UsageError
from meshlm.data.kinds import encoding_without_mark

TEXT = "The boats came back\r\nbefore the rain.\n"
AS_IT_IS = [
    "",
    "\n",
    "a\r\nb\rc\n",
    "\0",
    "a\0bc\0d",
    "\ufeff",
    "a\ufeffb",
    "日本\0語",
    "-",
    "\x1b[31m",
]
OTHERS = ["UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE"]


@pytest.mark.parametrize("text", AS_IT_IS)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_file_is_the_prompt_as_it_is(text: str, mark: str, tmp_path: Path) -> None:
    path = tmp_path / "--prompt=1"
    path.write_bytes((mark + text).encode())
    wanted = text if mark or not text.startswith("\ufeff") else text[1:]
    assert read_text(path, "--prompt-file") == wanted


@pytest.mark.parametrize("encoding", OTHERS)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_other_encoding_is_named(encoding: str, mark: str, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes((mark + TEXT).encode(encoding))
    named = encoding[:6] if mark else encoding
    with pytest.raises(UsageError) as caught:
        read_text(path, "--prompt-file")
    message = f"--prompt-file {path} is {named}: convert it: iconv -f {named} -t UTF-8"
    assert str(caught.value) == message


@given(st.text(st.characters(min_codepoint=1, exclude_categories=["Cs"])))
def test_text_without_nul_is_never_taken_for_another_encoding(text: str) -> None:
    assert encoding_without_mark(text.encode()) is None


@pytest.mark.parametrize(
    ("data", "named"), [(b"\xff", "not UTF-8"), (b"a\xe9", "not UTF-8"), (b"\xff\xfe", "UTF-16")]
)
def test_standard_input(data: bytes, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert read_text(Path("-"), "--prompt-file") == TEXT
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    with pytest.raises(UsageError, match=f"--prompt-file -: standard input is {named}"):
        read_text(Path("-"), "--prompt-file")
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UsageError, match="--prompt-file -: standard input is closed"):
        read_text(Path("-"), "--prompt-file")


def test_word_of_an_ascii_locale_is_its_bytes() -> None:
    word = "été".encode().decode("ascii", "surrogateescape")
    assert text_of_word(word, "--stop") == text_of_word("été", "--stop") == "été"
    with pytest.raises(UsageError, match="--stop is not UTF-8"):
        text_of_word("\udcff", "--stop")
