"""Readers against Python's own gzip, lzma, tarfile and json, and against what is broken."""

import bz2
import functools
import gzip
import io
import lzma
import os
import random
import tarfile
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from meshlm.core.errors import BadInputError, UsageError
from meshlm.data import records, streams
from meshlm.data.compression import decompress
from meshlm.data.inputs import find_inputs
from meshlm.data.kinds import named_kind
from meshlm.data.parsing import Parser
from meshlm.data.readers import FileReader, Prefix, Reading
from meshlm.data.records import Record
from meshlm.formats.byte_source import DamagedStreamError, RefusedStreamError

COMPRESS = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".bz2": bz2.compress,
}
CONTENT = random.Random(0).randbytes(300_000) + b"text " * 200_000


def chunked(data: bytes, size: int = 7919):
    return (data[i : i + size] for i in range(0, len(data), size))


def reader_of(path: Path, *, expected: Prefix | None = None, **options) -> FileReader:
    (file,) = find_inputs([str(path)], exclude=path / "none").files
    return FileReader(file, Reading(**options), expected=expected)


def read(path: Path, **options) -> list[Record]:
    return list(reader_of(path, **options).records())


def texts(path: Path, **options) -> list[str]:
    parser = Parser(options.get("text_field", "text"), options.get("split_on"))
    found: list[str] = []
    for document in (d for r in read(path, **options) for d in parser.documents(r)):
        if not (document.bad or document.left_out):
            found += [document.text] if document.first else [found.pop() + document.text]
    return found


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("chunk", [1009, 1 << 20])
def test_decompress_members_in_bounded_chunks(suffix, chunk):
    data = COMPRESS[suffix](CONTENT) + COMPRESS[suffix](b"") + COMPRESS[suffix](b"end")
    parts = list(decompress(chunked(data, chunk), suffix))
    assert b"".join(parts) == CONTENT + b"end"
    assert max(map(len, parts)) <= streams.CHUNK_BYTES


def test_zstd_forms():
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(CONTENT)
    skippable = (0x184D2A53).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"hello"
    streaming = zstandard.ZstdCompressor(level=19).compressobj()
    second = streaming.compress(b"a" * 10**6) + streaming.flush()
    data = skippable + frame + skippable + second
    assert b"".join(decompress(chunked(data), ".zst")) == CONTENT + b"a" * 10**6


@functools.cache
def _compressed(suffix: str) -> bytes:
    return COMPRESS[suffix](CONTENT[:60_000] + CONTENT[-60_000:])


@pytest.mark.parametrize("suffix", COMPRESS)
@given(share=st.floats(0, 1, exclude_max=True))
def test_every_truncation_is_noticed(suffix, share):
    data = _compressed(suffix)
    with pytest.raises(EOFError):
        for _ in decompress(chunked(data[: int(share * len(data))]), suffix):
            pass


@pytest.mark.parametrize("suffix", COMPRESS)
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_never_gives_other_text(suffix, share, bit):
    content = CONTENT[:3000]
    data = bytearray(COMPRESS[suffix](content))
    data[int(share * len(data))] ^= 1 << bit
    try:
        result = b"".join(decompress(chunked(bytes(data)), suffix))
    except (EOFError, DamagedStreamError):
        return
    assert result == content  # a bit of a gzip header's time or system, say


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_bomb_needs_no_memory(suffix):
    size = 50 << 20
    data = COMPRESS[suffix](bytes(size))
    tracemalloc.start()
    total = sum(map(len, decompress(chunked(data, 1 << 20), suffix)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == size
    assert peak < 12 << 20


def test_too_large_a_window_is_refused():
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = compressor.compress(b"x" * 1000) + compressor.flush()
    with pytest.raises(RefusedStreamError, match=r"window of 256 MiB.*compress it again"):
        list(decompress(iter([data]), ".zst"))


def _tar(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _header(size: bytes, kind: bytes) -> bytes:
    head = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    head[124:136], head[156:157], head[148:156] = size.ljust(12, b"\0"), kind, b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


@given(
    pieces=st.lists(st.binary(max_size=6).map(lambda b: b.replace(b"a", b"\n")), max_size=30),
    limit=st.integers(0, 8),
)
def test_lines_equal_split(pieces, limit):
    whole = b"".join(pieces).split(b"\n")
    whole = whole[:-1] if whole[-1] == b"" else whole
    found = list(streams.lines(pieces, limit))
    assert found == [line if len(line) <= limit else None for line in whole]


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n  \n{"text": "two"}')
    assert [(r.where, r.document) for r in read(path)] == [(":1", 0), (":4", 1)]
    assert texts(path) == ["one", "two"]


def test_a_long_line_is_a_bad_document(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_DOCUMENT_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "' + "x" * (3 << 20) + '"}\n{"text": "two"}\n')
    first, second = read(path)
    assert (first.where, first.bad) == (":1", "longer than 1 MiB")
    assert (second.where, second.bad) == (":2", None)


@pytest.mark.parametrize("suffix", ["", *COMPRESS])
@pytest.mark.parametrize("size", [10, 5 << 20])
def test_a_text_is_one_document_in_pieces(tmp_path, suffix, size):
    text = "\ufeff" + ("Ein Satz über Bäume, 漢字.\r\n" * (size // 25))
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS.get(suffix, bytes)(text.encode()))
    found = read(path)
    assert "".join(r.text for r in found) == text[1:]
    assert [r.first for r in found] == [True] + [False] * (len(found) - 1)
    assert [r.last for r in found] == [False] * (len(found) - 1) + [True]
    assert len({r.key for r in found}) == 1
    assert (len(found) > 1) == (size > 1 << 20)
    assert max(len(r.text) for r in found) < 1.5 * records.PIECE_CHARACTERS


@pytest.mark.parametrize("limit", [1 << 10, 32 << 20])
def test_bad_utf8_is_named_by_its_line_however_long_the_text(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(records, "MAX_DOCUMENT_BYTES", limit)
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"good line\n" * 50_000 + b"bad \xff line\n" + b"more\n" * 9))
    (record,) = read(path)
    assert record.where == ":50001"
    assert (record.bad or "").startswith("not UTF-8 (invalid start byte 0xff); if it is Windows-")


def test_tar_of_texts(tmp_path):
    data = _tar(**{"b.txt": b"two", ".hidden": b"no", "bad": b"\xff", "./c": b"three"})
    for name in ("a.tar.gz", "a.tgz", "a.gz"):
        (tmp_path / name).write_bytes(gzip.compress(data))
        found = [(r.where, r.text, (r.bad or "")[:9]) for r in read(tmp_path / name)]
        assert found == [("!b.txt", "two", ""), ("!bad:1", "", "not UTF-8"), ("!./c", "three", "")]


def test_truncated_files(tmp_path):
    lines = b"".join(b'{"text": "%d"}\n' % i for i in range(20_000))
    for name, data in [("a.jsonl.gz", lines), ("b.txt.zst", lines), ("c.tar.xz", _tar(x=lines))]:
        path = tmp_path / name
        whole = COMPRESS[path.suffix](data)
        path.write_bytes(whole[: len(whole) * 2 // 3])
        with pytest.raises(BadInputError, match=f"{name}.*truncated"):
            read(path)
        records = read(path, allow_truncated=True)
        assert all(not r.bad for r in records)
    assert 1000 < len(texts(tmp_path / "a.jsonl.gz", allow_truncated=True)) < 20_000
    (text,) = texts(tmp_path / "b.txt.zst", allow_truncated=True, format="text")
    assert lines.decode().startswith(text)
    assert 1000 < len(texts(tmp_path / "c.tar.xz", allow_truncated=True)) < 20_000


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.xz", "a.zst", "a.tar.zst", "a.parquet"])
def test_damaged_files_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xa7\0\xff is not what the name says, not at all" * 100)
    with pytest.raises(BadInputError, match=name):
        read(tmp_path / name)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_an_empty_compressed_file_is_said_to_be_empty(tmp_path, suffix):
    (tmp_path / f"a.txt{suffix}").write_bytes(b"")
    with pytest.raises(BadInputError, match="the file is empty"):
        read(tmp_path / f"a.txt{suffix}")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"text": f"row {i}", "meta": {"pile_set_name": f"S{i % 3}"}} for i in range(1000)]
    rows[7]["text"] = None
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    records = read(tmp_path / "a.parquet")
    assert (records[7].where, records[7].bad) == (":row 7", "`text` is null")
    assert [r.text for r in records[:2]] == ["row 0", "row 1"]
    assert [r.set_name for r in records[:4]] == ["S0", "S1", "S2", "S0"]
    assert len(records) == 1000
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(BadInputError, match=r"b\.parquet: no column `text`.*body"):
        read(tmp_path / "b.parquet")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"install meshlm\[parquet\]"):
        read(tmp_path / "a.parquet")


def test_a_changed_beginning_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(CONTENT[:1].hex().encode() * 300_000)
    reader = reader_of(path)
    list(reader.records())
    assert reader.prefix.num_bytes == 600_000
    assert len(read(path, expected=reader.prefix)) == 1
    for prefix in (
        Prefix(num_bytes=300_001, sha256="0" * 64),
        Prefix(num_bytes=700_000, sha256=""),
    ):
        with pytest.raises(BadInputError, match="changed"):
            read(path, expected=prefix)


def test_formats():
    names = ["a.txt", "a", "a.py.gz", "a.jsonl.zst", "A.JSONL", "a.tar.xz", "a.tgz", "x.parquet"]
    assert [named_kind(name) for name in names] == (
        [None, None, None, "jsonl", "jsonl", "tar", "tar", "parquet"]
    )


def found(*paths: Path | str, exclude: Path = Path("/none")) -> list[str]:
    return [file.path for file in find_inputs([str(p) for p in paths], exclude=exclude).files]


def test_folders_and_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ["b/2.txt", "b/10.txt", "a.txt", ".git/x", "b/__pycache__/y.pyc", "store/t.bin"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "b/up").symlink_to("..")
    (tmp_path / "b/same").symlink_to("2.txt")
    (tmp_path / "b/gone").symlink_to("nowhere")
    inside = ["b/10.txt", "b/2.txt"]
    assert found(".", exclude=tmp_path / "store") == ["./a.txt", "./b/10.txt", "./b/2.txt"]
    assert found("b") == [*inside, "b/up/a.txt", "b/up/store/t.bin"]
    assert found("b/*.txt", "b/2.txt", "a.txt") == [*inside, "a.txt"]
    assert found("**/*.txt") == ["a.txt", *inside]
    for missing in ("c", "c/*.txt", ".git/*.md", "b/gone"):
        with pytest.raises(UsageError, match=missing.replace("*", r"\*")):
            found(missing)
    os.mkfifo("pipe")
    with pytest.raises(UsageError, match="not a regular file"):
        found("pipe")
    with pytest.raises(UsageError, match="no input"):
        found()


def test_binary_files_in_folders_are_passed_over_but_not_when_named(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\0\xff\xfe" * 100)
    reader = reader_of(tmp_path)
    (record,) = reader.records()
    assert (record.left_out, record.last) == ("binary: byte 0 is NUL", False)
    assert reader.kind == "left out"
    assert read(tmp_path / "a.bin")[0].bad


FIVE = b"words".ljust(512, b"\0")


def test_tar_members_of_unknown_types_are_named(tmp_path):
    data = _header(b"5", b"Z") + FIVE + _header(b"5", b"0") + FIVE + bytes(1024)
    (tmp_path / "a.tar").write_bytes(data)
    first, second = read(tmp_path / "a.tar")
    assert (first.where, first.left_out) == ("!x", "a tar member of an unknown type (b'Z')")
    assert second.text == "words"


def test_a_zstd_frame_without_its_checksum_keeps_its_last_block():
    data = zstandard.ZstdCompressor(write_checksum=True).compress(CONTENT[:5000])
    for cut in range(1, 5):
        chunks = decompress(iter([data[:-cut]]), ".zst")
        parts = []
        with pytest.raises(EOFError):
            parts.extend(chunks)
        assert b"".join(parts) == CONTENT[:5000]
