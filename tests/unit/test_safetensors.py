"""Safetensors: what is written reads back, and no damage gives anything but one line."""

from __future__ import annotations

import json
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlm.core.errors import BadInputError, UsageError
from meshlm.formats.safetensors import (
    MAX_HEADER_BYTES,
    TensorWriter,
    from_bytes,
    open_tensors,
    to_bytes,
)
from meshlm.formats.tensor import TensorInfo


def make_file(header: object, data: bytes = b"") -> bytes:
    """A file by hand, as the format says; `header` is JSON text or what becomes it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: list, start: int, end: int, dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


ARRAYS = {
    "half": np.array([[1, -2, 0.5]], np.float16),
    "brain": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3).T,
    "full": np.array([[0.1], [-3e38]], np.float32),
    "one": np.array(7, np.int32),
    "none": np.zeros((0, 4), np.float32),
    "flags": np.array([True, False, True]),
}
GOOD = to_bytes(ARRAYS, {"made by": "a test", "é": "ü"})


def assert_same(found, wanted) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def test_a_file_made_by_hand():
    header = {
        "b": entry([3], 4, 10, "F16"),
        "__metadata__": {"k": "v"},
        "a": entry([2, 1], 0, 4, "BF16"),
    }
    data = bytes([0x80, 0x3F, 0, 0xC0]) + np.array([1, 2, 3], "<f2").tobytes()
    arrays, metadata = from_bytes(make_file(header, data), "x")
    assert metadata == {"k": "v"}
    assert_same(
        arrays,
        {
            "a": np.array([[1], [-2]], ml_dtypes.bfloat16),
            "b": np.array([1, 2, 3], np.float16),
        },
    )


def test_what_is_written_reads_back():
    arrays, metadata = from_bytes(GOOD, "x")
    assert_same(arrays, ARRAYS)
    assert metadata == {"made by": "a test", "é": "ü"}
    assert int.from_bytes(GOOD[:8], "little") % 8 == 0


def test_an_unaligned_tensor_reads_as_any_other():
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    for pad in range(8):
        data = make_file(header + b" " * pad, np.array([1.5, -2], "<f4").tobytes())
        assert from_bytes(data, "x")[0]["a"].tolist() == [1.5, -2]


def test_the_writer_takes_any_order_and_the_mapping_is_read_only(tmp_path):
    path = tmp_path / "x.safetensors"
    infos = {name: TensorInfo(shape=a.shape, dtype=a.dtype) for name, a in ARRAYS.items()}
    writer = TensorWriter(path, infos, {"made by": "a test", "é": "ü"})
    for name in sorted(ARRAYS):
        assert not writer.is_whole
        writer.write(name, ARRAYS[name])
    writer.finish()
    assert path.read_bytes() == GOOD
    tensors = open_tensors(path)
    assert tensors.infos == infos
    assert_same({name: tensors.read(name) for name in infos}, ARRAYS)
    with pytest.raises(ValueError, match="read-only"):
        tensors.read("full")[0] = 1


def test_large_rows_out_of_order_are_written_in_blocks(tmp_path):
    array = np.arange(6_000_000, dtype=np.float32).reshape(6, -1).T
    path = tmp_path / "x.safetensors"
    writer = TensorWriter(path, {"a": TensorInfo(shape=array.shape, dtype=array.dtype)}, {})
    tracemalloc.start()
    writer.write("a", array)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < array.nbytes / 2
    assert np.array_equal(open_tensors(path).read("a"), array)


F4 = bytes(4)
BAD = {
    "shorter than 8": b"\x05\0\0",
    "at most": (1 << 63).to_bytes(8, "little") + b"{}",
    f"{MAX_HEADER_BYTES + 1} bytes": make_file(b"{" + b" " * (MAX_HEADER_BYTES - 1) + b"}"),
    "not a JSON object": make_file(b"[]"),
    "not a JSON object ": make_file(b' {"a":1}'),
    "Expecting": make_file(b'{"a":'),
    "has the key 'a' twice": make_file(b'{"a":1,"a":1}'),
    "has the key 'dtype' twice": make_file(
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', F4
    ),
    "NaN": make_file(b'{"a":NaN}'),
    "not UTF-8 at byte": make_file(b'{"\xff":1}'),
    "nested more than 32 deep": make_file(b'{"a":' + b"[" * 100_000),
    "not just dtype": make_file({"a": 1}),
    "not just dtype ": make_file({"a": entry([1], 0, 4) | {"more": 1}}, F4),
    "not text by name": make_file({"__metadata__": {"a": 1}}),
    "'F8_E4M3', a type that is not known": make_file({"a": entry([4], 0, 4, "F8_E4M3")}, F4),
    "'3', a type that is not known": make_file({"a": entry([1], 0, 4, 3)}, F4),
    "at most 16 whole": make_file({"a": entry([-1], 0, 4)}, F4),
    "at most 16 whole ": make_file({"a": entry([1.0], 0, 4)}, F4),
    "at most 16 whole  ": make_file({"a": entry([True], 0, 4)}, F4),
    "at most 16 whole   ": make_file({"a": entry([1] * 17, 0, 4)}, F4),
    "too large": make_file({"a": entry([1 << 32, 1 << 32], 0, 0)}),
    "too large ": make_file({"a": entry([0, 1 << 62], 0, 0)}),
    "two whole": make_file({"a": entry([1], -4, 0)}),
    "two whole ": make_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, F4),
    "8 bytes for 4": make_file({"a": entry([1], 0, 8)}, F4 * 2),
    "-4 bytes for 4": make_file({"a": entry([1], 4, 0)}, F4),
    "cut short": make_file({"a": entry([2], 0, 8)}, F4),
    "goes on after": make_file({"a": entry([1], 0, 4)}, F4 + b"more"),
    "no tensor has lie before": make_file({"a": entry([1], 4, 8)}, F4 * 2),
    "b: overlaps": make_file({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, F4 * 2),
    "overlaps": make_file({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, F4),
    "no name": make_file({"": entry([1], 0, 4)}, F4),
    "no name ": make_file({"a\nb": entry([1], 0, 4)}, F4),
    "no name  ": make_file({"a" * 513: entry([1], 0, 4)}, F4),
    "no name   ": make_file({"\ud800": entry([1], 0, 4)}, F4),
}


@pytest.mark.parametrize("why", BAD)
def test_damage_is_one_line_at_once(why, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(BAD[why])
    start = time.monotonic()
    with pytest.raises(BadInputError) as caught:
        open_tensors(path)
    assert time.monotonic() - start < 1
    message = str(caught.value)
    assert str(path) in message
    assert why.strip() in message
    assert "\n" not in message
    assert len(message) < 400 + len(str(path))


def test_a_lie_about_sizes_allocates_nothing():
    data = make_file({"a": entry([1 << 44], 0, 1 << 46)}, F4)
    tracemalloc.start()
    with pytest.raises(BadInputError, match="cut short"):
        from_bytes(data, "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_no_file_and_no_regular_file(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        open_tensors(tmp_path / "none")
    with pytest.raises(BadInputError, match="not a file"):
        open_tensors(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(BadInputError, match="shorter"):
        open_tensors(tmp_path / "empty")


def read_or_refuse(data: bytes) -> None:
    """Tensors that tile the file, or one line."""
    try:
        arrays, _ = from_bytes(data, "x")
    except BadInputError as error:
        message = str(error)
    else:
        body = len(data) - 8 - int.from_bytes(data[:8], "little")
        assert sum(array.nbytes for array in arrays.values()) == body
        message = ""
    assert "\n" not in message


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255), st.integers(0, len(GOOD)))
def test_any_byte_changed_and_any_cut(at, value, length):
    read_or_refuse(GOOD[:at] + bytes([value]) + GOOD[at + 1 :])
    if length < len(GOOD):
        with pytest.raises(BadInputError):
            from_bytes(GOOD[:length], "x")
    with pytest.raises(BadInputError):
        from_bytes(GOOD + GOOD[:length] + b"\0", "x")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
NUMBERS = st.lists(st.integers(-1, 9) | st.integers(0, 1 << 70), max_size=3)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "BOOL", "F8_E5M2"]) | JSON,
        "shape": NUMBERS | JSON,
        "data_offsets": NUMBERS | JSON,
    }
)
HEADER = st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), ENTRY | JSON, max_size=3)


@given(HEADER | JSON, st.binary(max_size=40))
def test_any_header(header, data):
    read_or_refuse(make_file(header, data))


@given(st.binary(max_size=200))
def test_any_bytes(data):
    read_or_refuse(data)
    read_or_refuse(make_file(b"{" + data))
