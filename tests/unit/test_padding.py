"""What follows the last member, judged as gzip, xz, zstd, bzip2 and tar judge it."""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import json
import lzma
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import zstandard

from meshlm.core.errors import BadInputError
from meshlm.data.compression import compression_of, decompress
from meshlm.data.inputs import find_inputs
from meshlm.data.readers import FileReader, Reading
from meshlm.data.streams import split
from meshlm.formats.byte_source import ByteSource, DamagedStreamError, RefusedStreamError
from meshlm.formats.tar import tar_members

COMPRESS = {
    # Its time would be in the names of tests, which every worker must collect alike.
    ".gz": functools.partial(gzip.compress, mtime=0),
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".bz2": bz2.compress,
}
TOOLS = {".gz": "gzip", ".xz": "xz", ".zst": "zstd", ".bz2": "bzip2"}
SKIPPABLE = (0x184D2A55).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"abc"


def chunked(data: bytes, size: int = 5):
    return (data[i : i + size] for i in range(0, len(data), size))


def by_tool(suffix: str, data: bytes) -> bytes | None:
    """What the format's own tool gives, None where it refuses or warns."""
    if not shutil.which(TOOLS[suffix]):
        pytest.skip(f"{TOOLS[suffix]} is not installed")
    done = subprocess.run([TOOLS[suffix], "-dc"], input=data, capture_output=True, check=False)
    return done.stdout if done.returncode == 0 else None


@pytest.mark.parametrize(
    ("suffix", "tail"),
    [
        (".gz", bytes(1)),
        (".gz", bytes(512)),
        (".xz", bytes(4)),
        (".xz", bytes(512)),
        (".bz2", bytes(7)),
        (".zst", SKIPPABLE),
        *((suffix, COMPRESS[suffix](b" and more")) for suffix in COMPRESS),
        (".xz", bytes(8) + lzma.compress(b" and more") + bytes(12)),
        (".zst", SKIPPABLE + COMPRESS[".zst"](b" and more") + SKIPPABLE),
    ],
)
def test_padding_and_members_as_the_tools_read_them(suffix, tail):
    data = COMPRESS[suffix](b"a text") + tail
    expected = by_tool(suffix, data)
    assert expected is not None
    for size in (1, 3, 1 << 20):
        assert b"".join(decompress(chunked(data, size), suffix)) == expected


@pytest.mark.parametrize(
    ("suffix", "tail", "reason"),
    [
        (".gz", b"garbage", "bytes that are not gzip follow its end"),
        (".gz", bytes(5) + b"garbage", "bytes that are not gzip follow its end"),
        (".bz2", b"garbage", "bytes that are not bzip2 follow its end"),
        (".xz", b"garbage of some length", "bytes that are not xz follow its end"),
        (".xz", bytes(3), "3 bytes of xz padding are no multiple of 4"),
        (".xz", bytes(6), "6 bytes of xz padding are no multiple of 4"),
        (".xz", bytes(2) + lzma.compress(b"x"), "2 bytes of xz padding"),
        (".zst", b"garbage", "bytes that are not zstd follow its end"),
        (".zst", bytes(4), "bytes that are not zstd follow its end"),
    ],
)
def test_what_is_no_padding_is_refused_where_the_tools_refuse_or_warn(suffix, tail, reason):
    data = COMPRESS[suffix](b"a text") + tail
    if suffix != ".bz2":  # bzip2 warns, but exits with 0
        assert by_tool(suffix, data) is None
    for size in (1, 3, 1 << 20):
        with pytest.raises(DamagedStreamError, match=reason):
            list(decompress(chunked(data, size), suffix))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_second_member_that_is_cut_is_noticed(suffix):
    whole, second = COMPRESS[suffix](b"one"), COMPRESS[suffix](b"two, longer than the first")
    for size in range(1, len(second)):
        with pytest.raises(EOFError):
            list(decompress(chunked(whole + second[:size], 4), suffix))


def test_zstd_windows_and_dictionaries_are_said():
    samples = [f"sample number {i} of some words".encode() for i in range(500)]
    dictionary = zstandard.train_dictionary(2000, samples)
    data = zstandard.ZstdCompressor(dict_data=dictionary).compress(b"some words")
    with pytest.raises(RefusedStreamError, match="dictionary"):
        list(decompress(iter([data]), ".zst"))
    parameters = zstandard.ZstdCompressionParameters(window_log=31)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = compressor.compress(b"x" * 100) + compressor.flush()
    with pytest.raises(RefusedStreamError, match=r"window of 2048 MiB.*zstd -dc --long=31"):
        list(decompress(iter([data]), ".zst"))


def test_xz_beyond_the_memory_is_said():
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 512 << 20}]
    data = bytearray(lzma.compress(b"x", filters=[{**filters[0], "dict_size": 4096}]))
    # A dictionary of 512 MiB is only claimed: to write one takes a multiple of that.
    properties = data.index(b"\x21\x01\x00") + 2
    data[properties] = 34
    data[20:24] = __import__("zlib").crc32(bytes(data[12:20])).to_bytes(4, "little")
    with pytest.raises(RefusedStreamError, match="more than 192 MiB of memory"):
        list(decompress(iter([bytes(data)]), ".xz"))


def test_compressions_by_their_first_bytes():
    for suffix, compress in COMPRESS.items():
        assert compression_of(compress(b"text")[:10]) == suffix
    assert compression_of(SKIPPABLE[:10]) == ".zst"
    for text in (b"BZh is a magic", b"plain text", b"", b"\x1f\x8a\x08"):
        assert compression_of(text) is None
    assert compression_of(b"\x1f", ".gz") == ".gz"
    assert compression_of(b"\x1f") is None


def tar_of(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def contents(data: bytes) -> dict[str, bytes]:
    found = tar_members(ByteSource(chunked(data, 1000)))
    return {one.name: b"".join(one.chunks()) for one in found}


def test_tar_padding_and_joined_archives():
    first, second = tar_of(a=b"one"), tar_of(b=b"two")
    assert contents(first + bytes(100_000) + bytes(7)) == {"a": b"one"}
    # As `tar --ignore-zeros` reads them; without it, tar would lose the second.
    assert contents(first + second + bytes(512)) == {"a": b"one", "b": b"two"}
    for garbage in (b"garbage", b"garbage" * 100, bytes(100) + second):
        with pytest.raises(DamagedStreamError, match="follow the archive's end"):
            contents(first + garbage)


def texts(path: Path, **options) -> list[str]:
    (file,) = find_inputs([str(path)], exclude=path / "none").files
    records = FileReader(file, Reading(**options)).records()
    return [r.text or json.loads(r.line or b"null")["text"] for r in records]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_allow_truncated_loses_no_whole_document(tmp_path, suffix):
    """Whatever the cut, all documents are there whose lines can be decompressed whole."""
    lines = [json.dumps({"text": f"note {i}"}).encode() for i in range(300)]
    data = COMPRESS[suffix](b"\n".join(lines[:200]) + b"\n") + COMPRESS[suffix](
        b"\n".join(lines[200:])
    )
    path = tmp_path / f"a.jsonl{suffix}"
    for size in range(len(data) - 90, len(data), 7):
        path.write_bytes(data[:size])
        with pytest.raises(BadInputError, match="truncated"):
            texts(path)
        seen = b""
        try:
            for part in decompress(iter([data[:size]]), suffix):
                seen += part
        except EOFError:
            pass
        whole = sum(b"\n".join(lines[:n]) == seen[: len(b"\n".join(lines[:n]))] for n in range(301))
        found = texts(path, allow_truncated=True)
        assert found == [f"note {i}" for i in range(whole - 1)]
        assert len(found) >= 200


def test_allow_truncated_keeps_a_last_line_that_is_whole(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    data = gzip.compress(b'{"text": "one"}\n{"text": "two"}\n', mtime=0)
    path.write_bytes(data[:-8])  # all of the text, but not the checksum
    assert texts(path, allow_truncated=True) == ["one", "two"]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 1000])
@pytest.mark.parametrize("separator", [b"|", b"<|>", b"ab", b"aab"])
def test_split_equals_bytes_split(size, separator):
    for data in (b"", b"one", b"a<|>b<||<|><|>c<|", b"|a||b|", b"aabaabbaaab", b"<|>" * 3, b"xaab"):
        parts = [b"".join(part) for part in split(chunked(data, size), separator)]
        expected = data.split(separator)
        expected = expected[:-1] if len(expected) > 1 and not expected[-1] else expected
        assert parts == expected, data
