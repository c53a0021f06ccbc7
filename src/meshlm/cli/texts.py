"""Texts for the model: from words of the command line, from files and from standard input."""

import codecs
import sys
from pathlib import Path

from meshlm.core.errors import UsageError
from meshlm.data.kinds import encoding_of, encoding_without_mark


def text_of_word(word: str, option: str) -> str:
    """Returns the text of a word; in a locale of ASCII the bytes of other characters are escaped.

    Raises:
        UsageError: it has bytes that are not UTF-8.
    """
    return _decode(word.encode("utf-8", "surrogateescape"), option)


def read_text(path: Path, option: str) -> str:
    """Returns the whole text of a file, or of standard input for `-`, without a byte-order mark.

    Raises:
        UsageError: it cannot be read, or is not UTF-8; another encoding that it seems to have is
            named.
    """
    if str(path) == "-":
        if sys.stdin is None:
            raise UsageError(f"{option} -: standard input is closed")
        data, what = sys.stdin.buffer.read(), f"{option} -: standard input"
    else:
        try:
            data, what = path.read_bytes(), f"{option} {path}"
        except OSError as error:
            raise UsageError(f"{option} {path}: {error.strerror}") from None
    if encoding := encoding_of(data) or encoding_without_mark(data):
        raise UsageError(f"{what} is {encoding}: convert it: iconv -f {encoding} -t UTF-8")
    return _decode(data.removeprefix(codecs.BOM_UTF8), what)


def _decode(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{what} is not UTF-8: {error}") from None
