"""JSON from files and strangers: what is more than JSON is refused by name, soon, in one line."""

import ast
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlm import checkpoint
from meshlm.conversion.hf.json_files import read_json
from meshlm.core.errors import BadInputError, UsageError
from meshlm.core.strict_json import MAX_DEPTH, JsonError, parse_object, read_object
from meshlm.data.store import read_manifest
from meshlm.training.run_folder import read_config
from meshlm.training.settings import read_settings

PACKAGE = Path(__file__).resolve().parents[2] / "src/meshlm"
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), VALUES, max_size=4), st.booleans())
def test_an_object_comes_through(value, ascii_only):
    assert parse_object(json.dumps(value, ensure_ascii=ascii_only).encode(), "x") == value


@given(st.binary(max_size=200) | st.text('[]{}",:\\u0019e+-. tfn', max_size=60).map(str.encode))
def test_no_more_than_json_is_taken(data):
    try:
        wanted = json.loads(data.decode("utf-8-sig"))
    except ValueError:
        wanted = None
    try:
        found = parse_object(data, "x")
    except JsonError:
        return
    assert found == wanted


REFUSED = {
    "nothing": (b"", "is not JSON (Expecting value at line 1, column 1)"),
    "cut": (b'{"a": "b', "is not JSON (Unterminated string"),
    "two": (b"{} {}", "is not JSON (Extra data at line 1, column 4)"),
    "not UTF-8": (b'{"a": "\xff"}', "is not JSON (not UTF-8 at byte 7)"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "is not JSON (not UTF-8 at byte 0)"),
    "NaN": (b'{"a": NaN}', "holds NaN, which JSON has not"),
    "infinity": (b'{"a": [-Infinity]}', "holds -Infinity, which JSON has not"),
    "large number": (b'{"a": 1e999}', "holds 1e999, beyond a float"),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", "holds a number of thousands of digits"),
    "key twice": (b'{"a": {"b": 1, "b": 1}}', "has the key 'b' twice"),
    "long key twice": (b'{"%b": 1, "%b": 1}' % (b"k" * 999, b"k" * 999), f"'{'k' * 80}' twice"),
    "text": (b'"x"', "is a text, not a JSON object"),
    "list": (b"[]", "is a list, not a JSON object"),
    "number": (b"42", "is a number, not a JSON object"),
    "null": (b"null", "is null, not a JSON object"),
    "true": (b"true", "is true or false, not a JSON object"),
    "deep": (b'{"a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", f"more than {MAX_DEPTH} deep"),
    "one too deep": (b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "nested more than"),
    "open": (b"[" * 2_000_000, "nested more than"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    data, why = REFUSED[name]
    with pytest.raises(JsonError) as caught:
        parse_object(data, "a.json", remedy="get it again")
    assert why in caught.value.why
    assert "\n" not in caught.value.why
    assert str(caught.value) == f"a.json {caught.value.why}: get it again"


def test_bounds():
    deepest = b'{"a": ' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}"
    assert parse_object(deepest, "x")
    assert parse_object(b'{"a": "' + b"[" * 1000 + b'\\"{{"}', "x")
    assert parse_object(b'\xef\xbb\xbf{"a": 1}', "x") == {"a": 1}
    with pytest.raises(JsonError, match="x has more than 7 bytes"):
        parse_object(b'{"a": 1}', "x", max_bytes=7)
    with pytest.raises(JsonError, match="more than 1 fields"):
        parse_object(b'{"a": 1, "b": 2}', "x", max_keys=1)


def test_numbers_that_are_not_finite_where_they_are_wanted():
    data = b'{"a": [NaN, Infinity, -Infinity, 1e999, 1.5]}'
    nan, *others = parse_object(data, "x", not_finite=float)["a"]
    assert math.isnan(nan)
    assert others == [math.inf, -math.inf, math.inf, 1.5]
    found = parse_object(data, "x", not_finite=lambda _: None)
    assert found == {"a": [None, None, None, None, 1.5]}


@pytest.mark.parametrize(
    "text", ['"' * 400_001, '"' + '\\"' * 400_000, "[]," * 300_000, "\\" * 999]
)
def test_twice_as_much_takes_twice_as_long(text):
    def seconds(data: bytes) -> float:
        best = math.inf
        for _ in range(5):
            began_s = time.process_time()
            with pytest.raises(JsonError):
                parse_object(b"[" * 33 + data, "x")
            best = min(best, time.process_time() - began_s)
        return best

    once = seconds(text.encode())
    assert seconds(text.encode() * 2) < 3 * once + 0.001


def test_the_depth_of_a_long_text_takes_no_memory():
    """16 MB of escapes: state for going back in them would be 60 times as large."""
    code = (
        "import resource, sys; from meshlm.core.strict_json import _check_depth\n"
        "data = b'[]' * 40 + b'\"' + b'\\\\n' * (8 << 20) + b'\"'\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = used(); _check_depth(data); print(used() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 << 10  # KiB


READERS = {
    "a checkpoint's manifest": ("manifest.json", lambda p: checkpoint.read_manifest(p.parent)),
    "its small files": ("manifest.json", lambda p: checkpoint.read_files(p.parent)),
    "a store's manifest": ("manifest.json", lambda p: read_manifest(p.parent)),
    "a run's record": ("config.json", lambda p: read_config(p.parent)),
    "a Hugging Face config": ("config.json", read_json),
    "a file of options": ("options.json", read_settings),
    "any object": ("any.json", read_object),
}


@pytest.mark.parametrize("name", READERS)
def test_a_file_without_an_end_is_refused(tmp_path, name):
    file, read = READERS[name]
    with (tmp_path / file).open("wb") as sparse:
        sparse.truncate(200 << 30)
    with pytest.raises(BadInputError, match=r"json: over \d+ MiB, too large for this file"):
        read(tmp_path / file)
    (tmp_path / file).unlink()
    os.mkfifo(tmp_path / file)
    with pytest.raises(UsageError, match=rf"{file}( is a named pipe|: no such file)"):
        read(tmp_path / file)


# Nobody else reads JSON.

_PARSERS = ("json.loads", "json.load", "msgspec.json.decode", "msgspec.json.Decoder")
_ALLOWED = {
    "core/strict_json.py": "here",
    "core/processes.py": "what the processes of one run say to one another",
    "core/watch.py": "the same",
    "training/start.py": "the same",
    "planning/compiling.py": "what our own child process answers, and",
    "planning/worker.py": "what it is asked",
    "data/bpe.py": "what the tokenizers library has just made",
    "data/journal.py": "lines that msgspec wrote, decoded into types",
    "data/parsing.py": "documents: a key twice is common there, and the last one counts",
    "data/records.py": "the same",
    "data/kinds.py": "the same",
}


def test_json_is_read_in_one_place():
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in _PARSERS
    }
    assert found == _ALLOWED.keys()
