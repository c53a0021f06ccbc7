"""Npz files: what numpy writes is read, what could harm is refused, ours is numpy's to the byte."""

import functools
import io
import struct
import tempfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as hnp

from meshlm.core.errors import BadInputError
from meshlm.formats.npz import NpzFile
from meshlm.formats.npz_writer import NpzWriter
from original import BFLOAT16, savez_to_bucket

DTYPES = [np.dtype("<f4"), np.dtype("<f2"), np.dtype("<i4"), BFLOAT16]


def saved(*arrays: np.ndarray, savez=np.savez) -> bytes:
    buffer = io.BytesIO()
    savez(buffer, *arrays)
    return buffer.getvalue()


def read_all(data: bytes) -> list[np.ndarray]:
    file = NpzFile(data, "x.npz")
    return [file.read(number) for number in range(len(file.headers))]


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@st.composite
def arrays(draw) -> np.ndarray:
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9))
    array = np.asarray(np.random.default_rng(draw(st.integers(0, 99))).normal(size=shape) * 9)
    array = array.astype(draw(st.sampled_from(DTYPES)))
    return np.asfortranarray(array) if draw(st.booleans()) else array


@given(st.lists(arrays(), min_size=1, max_size=4), st.sampled_from(["s", "compressed", "bucket"]))
def test_reads_what_numpy_writes(content, how):
    savez = {"s": np.savez, "compressed": np.savez_compressed, "bucket": savez_to_bucket}[how]
    for read, array in zip(read_all(saved(*content, savez=savez)), content, strict=True):
        assert same(read, array)


@given(content=st.lists(arrays(), min_size=1, max_size=3), transposed=st.booleans())
def test_writes_the_bytes_that_numpy_writes(content, transposed):
    content = [np.ascontiguousarray(a).reshape(a.shape) for a in content]
    views = [a.T.copy().T if transposed else a for a in content]
    with_numpy = saved(*content)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.npz"
        with NpzWriter(path) as writer:
            for view in views:
                writer.add(view)
        assert path.read_bytes() == with_numpy


def test_a_stored_array_is_read_once_into_memory_of_its_own(tmp_path):
    array = np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024)
    (tmp_path / "x.npz").write_bytes(saved(array))
    file = NpzFile.open(tmp_path / "x.npz")
    tracemalloc.start()
    read = file.read(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert same(read, array)
    assert not read.flags.writeable
    assert peak < array.nbytes + 100_000


GOOD = saved(np.arange(6, dtype=np.float32).reshape(2, 3), np.array(5, np.int32))
GOOD_DEFLATED = saved(np.arange(600, dtype=np.float32).reshape(2, 300), savez=np.savez_compressed)


@pytest.mark.parametrize("data", [GOOD, GOOD_DEFLATED], ids=["stored", "deflated"])
def test_cut_short_anywhere_is_refused(data):
    for length in range(len(data)):
        with pytest.raises(BadInputError, match=r"x\.npz"):
            read_all(data[:length])


@pytest.mark.parametrize("data", [GOOD, GOOD_DEFLATED], ids=["stored", "deflated"])
def test_a_flipped_bit_is_refused_or_harmless(data):
    good = read_all(data)
    harmless = 0
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 7
        try:
            read = read_all(bytes(flipped))
        except BadInputError:
            continue
        harmless += 1
        assert all(same(a, b) for a, b in zip(read, good, strict=True))
    # Times of day, versions and attributes: no more than a few bytes of a member.
    assert harmless < 80 * len(good)


def npz(*members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, data in members:
            file.writestr(name, data)
    return buffer.getvalue()


def npy(shape: str, descr: str = "'<f4'", data: bytes = b"", order: str = "False") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"
    text = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + data


EIGHT = bytes(8)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (npz(("arr_0.npy", npy("(2,)", "'|O'", EIGHT))), "pickled"),
        (npz(("arr_0.npy", npy("(2,)", "'<f8'", bytes(16)))), "dtype '<f8'"),
        (npz(("arr_0.npy", npy("(2,)", "'>f4'", EIGHT))), "dtype '>f4'"),
        (npz(("arr_0.npy", npy("(2,)", "[('a', '<f4')]", EIGHT))), "plain array"),
        (npz(("arr_0.npy", npy("(2, 2)", data=EIGHT))), "should have 144 bytes"),
        (npz(("arr_0.npy", npy("(1,)", data=EIGHT))), "should have 132 bytes"),
        (npz(("arr_0.npy", npy("(-2,)", data=EIGHT))), "plain array"),
        (npz(("arr_0.npy", npy("(999999999999, 999999999999)", data=EIGHT))), "should have"),
        (npz(("arr_0.npy", npy("(1, 1, 1, 1, 2)", data=EIGHT))), "5 dims"),
        (npz(("arr_0.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + EIGHT)), "header of 2147483647"),
        (npz(("arr_0.npy", b"hello world!")), "not a numpy array"),
        (npz(("arr_1.npy", npy("(2,)", data=EIGHT))), "'arr_1.npy'"),
        (npz(("../arr_0.npy", npy("(2,)", data=EIGHT))), r"'\.\./arr_0\.npy'"),
        (npz(("arr_0.npy", npy("(2,)", data=EIGHT)), method=zipfile.ZIP_BZIP2), "method 12"),
        (b"", "not a whole npz"),
        (b"PK\x03\x04" + bytes(100), "not a whole npz"),
    ],
)
def test_what_no_weights_are_is_refused(data, why):
    with pytest.raises(BadInputError, match=why) as caught:
        read_all(data)
    assert "x.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_members_of_one_name_are_refused():
    member = ("arr_0.npy", npy("(2,)", data=EIGHT))
    with pytest.warns(UserWarning, match="Duplicate"):
        data = npz(member, member)
    with pytest.raises(BadInputError, match="a name twice"):
        read_all(data)


@functools.cache
def deflated_zeros(shape: str) -> bytes:
    """An array's header and 200 MB of zeros, deflated."""
    deflate = zlib.compressobj(1, zlib.DEFLATED, -15)
    parts = [deflate.compress(npy(shape)), *(deflate.compress(bytes(1 << 20)) for _ in range(200))]
    return b"".join((*parts, deflate.flush()))


def bomb(shape: str, stated: int) -> bytes:
    """A member that inflates to 200 MB and states another length."""
    data, name = deflated_zeros(shape), b"arr_0.npy"
    common = (8, 0, 0, 0, len(data), stated, len(name))
    local = struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, 0, *common, 0) + name + data
    entry = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, 20, 0, *common, 0, 0, 0, 0, 0, 0) + name
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, len(entry), len(local), 0)
    return local + entry + end


@pytest.mark.parametrize(
    ("shape", "stated"), [("(2,)", 136), ("(99999999,)", 136), ("(2,)", (200 << 20) + 128)]
)
def test_a_bomb_is_refused_before_it_fills_the_memory(shape, stated):
    data = bomb(shape, stated)
    assert len(data) < 2_000_000
    tracemalloc.start()
    with pytest.raises(BadInputError, match="arr_0"):
        read_all(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


def test_members_that_overlap_are_refused():
    """The trick of the densest bombs: one stream of bytes, many members."""
    inner = npz(("arr_1.npy", npy("(2,)", data=EIGHT)))
    inner = inner[: inner.index(b"PK\x01\x02")] + bytes(3)
    first = ("arr_0.npy", npy(f"({len(inner) // 4},)", data=inner))
    outer = bytearray(npz(first, ("arr_1.npy", npy("(2,)", data=EIGHT))))
    entry = outer.rindex(b"PK\x01\x02")
    outer[entry + 42 : entry + 46] = struct.pack("<I", outer.index(inner))
    with pytest.raises(BadInputError, match="overlap"):
        read_all(bytes(outer))


def test_bfloat16_is_what_ml_dtypes_says():
    array = np.array([1.5, -2.25, 3e38], ml_dtypes.bfloat16)
    (read,) = read_all(saved(array))
    assert read.dtype == BFLOAT16
    assert read.astype(np.float32).tolist() == array.astype(np.float32).tolist()
