"""What a file is read as: by its content, with its name as the second witness."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import pickle
import random
import sqlite3
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zstandard

from meshlm.core.errors import BadInputError
from meshlm.data import kinds, records
from meshlm.data.inputs import find_inputs
from meshlm.data.parsing import Parser
from meshlm.data.readers import FileReader, Reading
from meshlm.data.streams import Peeked

TALES = [f'Tale {i}: the fox, the hen and a "quoted" word\nin two lines.' for i in range(5)]
OBJECTS = [{"text": tale, "id": i} for i, tale in enumerate(TALES)]
LINES = "".join(json.dumps(o) + "\n" for o in OBJECTS).encode()
LIST = json.dumps(OBJECTS).encode()
PACKAGE = json.dumps({"name": "left-pad", "scripts": {"test": "node test"}}, indent=2).encode()


def reader_of(path: Path, *, in_folder: bool = False, **options) -> FileReader:
    given = path.parent if in_folder else path
    files = find_inputs([str(given)], exclude=path / "none").files
    (file,) = (f for f in files if f.path == str(path))
    return FileReader(file, Reading(**options))


def documents(reader: FileReader, **options) -> list[str]:
    parser = Parser(options.get("text_field", "text"), options.get("split_on"))
    found: list[str] = []
    for document in (d for record in reader.records() for d in parser.documents(record)):
        assert not document.bad, document.bad
        if not document.left_out:
            found += [document.text] if document.first else [found.pop() + document.text]
    return found


def read(path: Path, data: bytes, *, in_folder: bool = False, **options) -> tuple[str, list[str]]:
    path.write_bytes(data)
    reader = reader_of(path, in_folder=in_folder, **options)
    found = documents(reader, **options)
    return reader.kind, found


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.txt", "part-0001", "a.jl", "a.ndjson"])
@pytest.mark.parametrize("in_folder", [True, False])
def test_json_lines_under_any_name(tmp_path, name, in_folder):
    data = gzip.compress(LINES) if name.endswith(".gz") else LINES
    assert read(tmp_path / name, data, in_folder=in_folder) == ("jsonl", TALES)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt"])
@pytest.mark.parametrize(
    "data",
    [
        LIST,
        json.dumps(OBJECTS, indent=4).encode(),
        b"\xef\xbb\xbf \r\n" + LIST + b"\n",
        "".join(json.dumps(o, indent=2) + "\n" for o in OBJECTS).encode(),  # as jq prints them
        "".join(json.dumps(o) for o in OBJECTS).encode(),  # one after another in a line
    ],
)
def test_lists_and_objects_that_span_lines(tmp_path, name, data):
    assert read(tmp_path / name, data) == ("json", TALES)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("package.json", PACKAGE),
        ("package.min.json", json.dumps(json.loads(PACKAGE)).encode()),
        ("notebook.ipynb", json.dumps({"cells": [{"source": ["x"]}], "text": [1]}).encode()),
        ("numbers.json", b"[1, 2, 3]"),
        ("words.json", b'["one", "two"]'),
        ("matrix.json", b'[{"x": 1}, {"x": 2}]'),
        ("metrics.txt", b'{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.4}\n'),
        ("style.css", b'{ "not": "css" } p { color: red }'),
        ("code.py", b'{"text": "a set"}\nprint("and more")\n'),
        ("config.toml", b"[section]\nkey = 1\n"),
        ("empty.json", b"{}"),
        ("template.txt", b"{{ text }}"),
        ("cut.json", b'{"text": "no end'),
    ],
)
@pytest.mark.parametrize("in_folder", [True, False])
def test_honest_texts_stay_texts(tmp_path, name, data, in_folder):
    assert read(tmp_path / name, data, in_folder=in_folder) == ("text", [data.decode()])


def test_a_list_of_other_objects_is_a_text_in_a_folder_and_an_error_by_name(tmp_path):
    data = b'[{"content": "words", "id": 1}, {"content": "more", "id": 2}]'
    path = tmp_path / "a.json"
    assert read(path, data, in_folder=True) == ("text", [data.decode()])
    reader = reader_of(path, in_folder=True)
    list(reader.records())
    assert "without a field `text`; there is text in `content`" in reader.note
    with pytest.raises(BadInputError, match=r"a\.json: JSON values without a field `text`"):
        documents(reader_of(path))
    assert documents(reader_of(path, format="text")) == [data.decode()]
    assert documents(reader_of(path, text_field="content"), text_field="content") == [
        "words",
        "more",
    ]


@pytest.mark.parametrize("in_folder", [True, False])
def test_json_lines_with_another_field_are_an_error_that_names_it(tmp_path, in_folder):
    data = b'{"url": "u", "content": "some words", "n": 1}\n{"url": "v", "content": "x"}\n'
    expected = r"in `content`, `url`: choose with --text-field, or .* --format text"
    with pytest.raises(BadInputError, match=expected):
        read(tmp_path / "a.json.gz", gzip.compress(data), in_folder=in_folder)
    options = {"text_field": "content"}
    assert read(tmp_path / "a.json", data, **options) == ("jsonl", ["some words", "x"])


@pytest.mark.parametrize("data", [b'["one", "two"]', b'{"data": [{"text": "x"}]}', PACKAGE])
def test_json_that_is_one_text_is_said_where_it_was_given_by_name(tmp_path, data):
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(data))
    for in_folder in (False, True):
        reader = reader_of(tmp_path / "a.json.gz", in_folder=in_folder)
        assert documents(reader) == [data.decode()]
        assert ("no list or lines of objects with `text`" in reader.note) == (not in_folder)


def test_lines_with_no_string_in_the_field_are_bad_documents(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"text": ["a", "b"]}\n{"text": null}\n')
    found = [Parser().documents(r)[0].bad or "" for r in reader_of(tmp_path / "a.json").records()]
    assert [reason[:7] for reason in found] == ["no text"] * 2


def test_format_decides(tmp_path):
    assert read(tmp_path / "a.jsonl", LINES, format="text") == ("text", [LINES.decode()])
    assert read(tmp_path / "a.json", b'{"text": "one"}', format="json") == ("jsonl", ["one"])
    (tmp_path / "a.txt").write_text("no JSON")
    (record,) = reader_of(tmp_path / "a.txt", format="json").records()
    assert (Parser().documents(record)[0].bad or "").startswith("not JSON")


def test_a_single_object_with_a_text(tmp_path):
    assert read(tmp_path / "a.json", json.dumps(OBJECTS[0], indent=1).encode()) == (
        "json",
        TALES[:1],
    )
    assert read(tmp_path / "b.json", b'{"text": "one"}') == ("jsonl", ["one"])


def test_a_damaged_first_line_makes_no_text_of_json_lines(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"text": "cut\n' + LINES)
    reader = reader_of(tmp_path / "a.json")
    first, *rest = [Parser().documents(record)[0] for record in reader.records()]
    assert (first.where, (first.bad or "")[:8]) == (":1", "not JSON")
    assert [document.text for document in rest] == TALES


def test_fields_below_fields_and_with_dots(tmp_path):
    data = b'{"a": {"b": "deep"}}\n{"a.b": "flat"}\n'
    assert read(tmp_path / "x.jsonl", data, text_field="a.b")[1] == ["deep", "flat"]
    bad = Parser("a.b").documents(records.Record(":1", 0, b'{"a": {"c": "words"}}'))[0].bad
    assert bad == (
        "no text: Object missing required field `a.b`; there is text in `a.c`: choose with "
        "--text-field"
    )
    assert Parser("meta").documents(records.Record(":1", 0, b'{"meta": "x"}'))[0].text == "x"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000, 1 << 20])
def test_json_values_equal_json(size):
    dice = random.Random(0)
    strings = ["", "}", "{[,]", '"', "\\", '\\"', "é\n", "x" * 50]

    def value(depth):
        kind = dice.randrange(5 if depth else 3)
        if kind == 3:
            return [value(depth - 1) for _ in range(dice.randrange(4))]
        if kind == 4:
            return {dice.choice(strings): value(depth - 1) for _ in range(dice.randrange(4))}
        return (dice.choice(strings), dice.random(), None)[kind]

    for indent in (None, 2):
        values = [{"v": value(3)} for _ in range(20)]
        listed = json.dumps(values, indent=indent).encode()
        joined = b" ".join(json.dumps(v, indent=indent).encode() for v in values)
        for data in (listed, joined, listed + b"\n" + joined):
            chunks = (data[i : i + size] for i in range(0, len(data), size))
            found = list(records.json_values(chunks))
            assert all(reason is None for _, reason in found)
            expected = values * 2 if len(data) > len(listed) + len(joined) else values
            assert [json.loads(v or b"") for v, _ in found] == expected


def test_json_values_that_are_none():
    def found(data: bytes) -> list:
        return list(records.json_values(iter([data])))

    assert found(b'[{"a": 1}, {"a": 2}') == [
        (b'{"a": 1}', None),
        (b'{"a": 2}', None),
        (None, "the JSON list has no end"),
    ]
    assert found(b'{"a": 1} words and {"b": 2}') == [
        (b'{"a": 1}', None),
        (None, records.NOT_JSON),
        (b'{"b": 2}', None),
    ]
    assert found(b'[1, "x",, {"a": [2]},]') == [(b"1", None), (b'"x"', None), (b'{"a": [2]}', None)]


def test_a_long_value_is_bad_and_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_DOCUMENT_BYTES", 1000)
    data = json.dumps([{"text": "a"}, {"text": "b" * 3000}, {"text": "c"}]).encode()
    (tmp_path / "a.json").write_bytes(data)
    found = list(reader_of(tmp_path / "a.json").records())
    assert [record.bad for record in found] == [None, "longer than 0 MiB", None]
    assert [record.where for record in found] == [":value 1", ":value 2", ":value 3"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst", ".bz2"])
@pytest.mark.parametrize(
    ("compress", "name"),
    [
        (gzip.compress, "gzip"),
        (lzma.compress, "xz"),
        (zstandard.ZstdCompressor().compress, "zstd"),
        (bz2.compress, "bzip2"),
        (bytes, None),
    ],
)
def test_compression_is_told_by_the_content(tmp_path, suffix, compress, name):
    path = tmp_path / f"a.jsonl{suffix}"
    assert read(path, compress(LINES)) == ("jsonl", TALES)
    reader = reader_of(path)
    list(reader.records())
    names = {".gz": "gzip", ".xz": "xz", ".zst": "zstd", ".bz2": "bzip2", "": None}
    if names[suffix] == name:
        assert reader.note == ""
    else:
        assert reader.note == (f"compressed with {name}" if name else "not compressed")


@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        ("utf-16-le", codecs.BOM_UTF16_LE),
        ("utf-16-be", codecs.BOM_UTF16_BE),
        ("utf-32-le", codecs.BOM_UTF32_LE),
        ("utf-32-be", codecs.BOM_UTF32_BE),
    ],
)
def test_utf16_and_utf32(tmp_path, encoding, mark):
    text = "Bäume, 漢字 and \U0001f600\r\n" * 9000
    path = tmp_path / "a.txt"
    assert read(path, mark + text.encode(encoding)) == ("text", [text])
    assert read(tmp_path / "b.jsonl", mark + LINES.decode().encode(encoding)) == ("jsonl", TALES)
    reader = reader_of(path)
    list(reader.records())
    assert reader.note == f"converted from {encoding[:6].upper()}"
    plain = "Mostly Latin text with some w\u00f6rds.\n" * 20
    for in_folder in (False, True):
        path.write_bytes(plain.encode(encoding))
        if in_folder:
            (record,) = reader_of(path, in_folder=True).records()
            reason = record.left_out or ""
        else:
            with pytest.raises(BadInputError) as caught:
                list(reader_of(path).records())
            reason = str(caught.value)
        name = encoding[:6].upper() + encoding[7:].upper()
        assert f"{name} without a byte-order mark" in reason
        assert f"iconv -f {name} -t UTF-8" in reason
    path.write_bytes(mark + text.encode(encoding)[:-1])
    with pytest.raises(BadInputError, match="not UTF-"):
        list(reader_of(path).records())


def test_byte_order_marks(tmp_path):
    mark = codecs.BOM_UTF8
    lines = mark + b'{"text": "one"}\n' + mark + b'{"text": "two"}\n'
    assert read(tmp_path / "a.jsonl", lines) == ("jsonl", ["one", "two"])
    assert read(tmp_path / "b.json.gz", gzip.compress(lines[:19]) + gzip.compress(lines[19:])) == (
        "jsonl",
        ["one", "two"],
    )
    assert read(tmp_path / "a.txt", mark + b"one" + mark + b"two")[1] == ["one\ufefftwo"]


def _npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.ones(3))
    return file.getvalue()


def _npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.ones(3))
    return file.getvalue()


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "words")
    return file.getvalue()


def _sqlite(folder: Path) -> bytes:
    path = folder / "made.db"
    connection = sqlite3.connect(path)
    connection.execute("create table t (x)")
    connection.commit()
    connection.close()
    data = path.read_bytes()
    path.unlink()
    return data


def test_what_is_left_out_is_named_with_its_kind(tmp_path):
    safetensors = (64).to_bytes(8, "little") + json.dumps({"__metadata__": {}}).ljust(64).encode()
    files = {
        "zip archive": _zip(),
        "zip archive (": _npz(),
        "NumPy array": _npy(),
        "Python pickle": pickle.dumps({"a": 1}),
        "SQLite": _sqlite(tmp_path),
        "safetensors": safetensors,
        "a PDF": b"%PDF-1.4\nall of it is text",
        "Avro": b"Obj\x01\x04\x14avro",
        "ORC": b"ORC\0\x01\x02",
        "gzip inside": gzip.compress(gzip.compress(b"x")),
        "binary: byte 3 is NUL": b"one\0two",
        "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    }
    for number, (reason, data) in enumerate(files.items()):
        path = tmp_path / f"file{number}"
        path.write_bytes(data)
        (record,) = reader_of(path, in_folder=True).records()
        assert reason in (record.left_out or ""), (reason, record)
        if "NUL" not in reason:
            with pytest.raises(BadInputError, match=f"file{number}: .*{reason.rstrip(' (')}"):
                list(reader_of(path).records())


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", LFS, "Git LFS pointer.*run git lfs pull"),
        ("a.parquet", LFS, "Git LFS pointer.*run git lfs pull"),
        ("a.jsonl.gz", LFS, "Git LFS pointer.*run git lfs pull"),
        ("a.jsonl.gz", b"<!DOCTYPE html><html>404</html>", "HTML or XML page"),
        ("a.parquet", b'<?xml version="1.0"?><Error>', "HTML or XML page"),
        ("a.parquet", b"Entry not found", "is not that .it begins with 'Entry not found'"),
        ("a.arrow", b"", "it is empty"),
        ("a.tar", b"words", "named tar but is not that"),
        ("a.txt.gz", b"\x1f\x8a\x08\0\0\0" + bytes(99), "not compressed, nor text"),
        ("a.txt.zst", b"caf\xe9 and more", "not compressed, nor text"),
        ("a.parquet.gz", gzip.compress(b"PAR1\0", mtime=0), "parquet compressed with gzip"),
    ],
)
@pytest.mark.parametrize("in_folder", [True, False])
def test_a_name_that_promises_data_makes_an_error(tmp_path, name, data, message, in_folder):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadInputError, match=rf"{name}: .*{message}"):
        list(reader_of(tmp_path / name, in_folder=in_folder).records())


def test_an_html_page_is_a_text_under_its_own_name(tmp_path):
    page = b"<!DOCTYPE html><p>Words.</p>"
    assert read(tmp_path / "a.html", page) == ("text", [page.decode()])


def test_latin1_is_said(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\ncafé\n".encode("latin-1"))
    (record,) = reader_of(tmp_path / "a.txt").records()
    assert record.where == ":2"
    assert "0xe9" in (record.bad or "")
    assert "iconv -f WINDOWS-1252 -t UTF-8" in (record.bad or "")


def test_members_of_archives_are_read_like_files(tmp_path):
    members = {
        "a.txt": b"one text",
        "b.jsonl": LINES,
        "c.jsonl.zst": zstandard.ZstdCompressor().compress(LINES),
        "d.json": LIST,
        "e.npy": _npy(),
        b"caf\xe9.txt".decode(errors="surrogateescape"): b"with an accent",
        "f.parquet": b"PAR1\0\0",
        "g.txt": "two|texts".encode("utf-16"),
    }
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz", errors="surrogateescape") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    found = documents(reader_of(path, split_on="|"), split_on="|")
    assert found == ["one text", *TALES * 3, "with an accent", "two", "texts"]
    left_out = {r.where: r.left_out for r in reader_of(path).records() if r.left_out}
    assert left_out == {
        "!e.npy": "a NumPy array",
        "!f.parquet": "parquet inside an archive: unpack the archive",
    }
    numbers = [r.document for r in reader_of(path, split_on="|").records() if not r.left_out]
    assert numbers == list(range(len(numbers)))


def test_separators(tmp_path):
    path = tmp_path / "a.txt"
    text = "one<|endoftext|>\ntwo<|endoftext|><|endoftext|>three<|endoftext|>"
    assert read(path, text.encode())[1] == ["one", "\ntwo", "", "three"]
    reader = reader_of(path)
    list(reader.records())
    assert reader.note == "split at each <|endoftext|> (--split-on '' keeps it one text)"
    assert read(path, text.encode(), split_on="")[1] == [text]
    assert read(path, b"one\n\ntwo\nthree\n\n", split_on="\n\n")[1] == ["one", "two\nthree"]
    line = json.dumps({"text": text}).encode()
    assert read(tmp_path / "a.jsonl", line)[1] == [text]
    options = {"split_on": "<|endoftext|>"}
    assert read(tmp_path / "a.jsonl", line, **options)[1] == ["one", "\ntwo", "", "three"]


def test_bad_and_long_documents_between_separators(tmp_path, monkeypatch):
    """A document that is no text is left out alone, and named by its line in the file."""
    monkeypatch.setattr(records, "MAX_DOCUMENT_BYTES", 100_000)
    good, long = b"good\n" * 3, b"a long line\n" * 60_000
    parts = [good, b"x\nbad \xff\n", long, good, long + b"bad \xff", b"end \xff", good]
    path = tmp_path / "a.txt"
    path.write_bytes(b"--".join(parts))
    found: list = []
    for record in reader_of(path, split_on="--").records():
        if record.first:
            found.append("")
        found[-1] = (record.where, "bad") if record.bad else found[-1] + record.text
    assert found == [
        good.decode(),
        (":5", "bad"),
        long.decode(),
        good.decode(),
        (f":{1 + 3 + 2 + 60_000 + 3 + 60_000}", "bad"),
        (f":{1 + 3 + 2 + 60_000 + 3 + 60_000}", "bad"),
        good.decode(),
    ]


def test_documents_of_one_file_are_a_stream(tmp_path):
    path = tmp_path / "a.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(40):
            file.write(b"<|endoftext|>".join([b"a few words " * 800] * 100) + b"<|endoftext|>")
    tracemalloc.start()
    count = sum(record.last for record in reader_of(path).records())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 4000
    assert peak < 8 << 20


def test_a_long_json_list_is_a_stream(tmp_path):
    path = tmp_path / "a.json"
    with open(path, "wb") as file:
        file.write(
            b"[" + b",\n".join([json.dumps({"text": "words " * 2000}).encode()] * 3000) + b"]"
        )
    tracemalloc.start()
    count = sum(record.last for record in reader_of(path).records())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 3000
    assert peak < 8 << 20


def test_sniffing_a_large_object_stops(tmp_path, monkeypatch):
    """An object of any size is read at most to the bound before it counts as a text."""
    monkeypatch.setattr(kinds, "MAX_DOCUMENT_BYTES", 1 << 20)
    seen = 0

    def chunks():
        nonlocal seen
        for i in range(100):
            seen += 1
            yield b'{"a": "' + b"x" * 65_529 if i == 0 else b"x" * 65_536

    peeked = Peeked(chunks())
    found = kinds.find_kind(peeked, "a.json", named=True, text_field="text")
    assert found.kind == "text"
    assert seen <= 17
    assert sum(map(len, peeked.chunks())) == 100 * 65_536


@pytest.mark.parametrize("in_folder", [True, False])
@pytest.mark.parametrize(
    "first", ["{}", '{"header": 1}', '{"header": "x"}', '{"text": null}', "null", "# v1"]
)
def test_an_odd_first_line_makes_no_text_of_json_lines(tmp_path, first, in_folder):
    (tmp_path / "a.json").write_bytes(first.encode() + b"\n" + LINES.rstrip())
    reader = reader_of(tmp_path / "a.json", in_folder=in_folder)
    parsed = [Parser().documents(record)[0] for record in reader.records()]
    assert reader.kind == "jsonl"
    assert [d.bad is not None for d in parsed] == [True] + [False] * 5
    assert [d.text for d in parsed[1:]] == TALES


@pytest.mark.parametrize("first", [[None], [{}], [None, {}, {"id": 1}]])
def test_an_odd_first_value_makes_no_text_of_a_list(tmp_path, first):
    (tmp_path / "a.json").write_text(json.dumps([*first, *OBJECTS]))
    reader = reader_of(tmp_path / "a.json", in_folder=True)
    parsed = [Parser().documents(record)[0] for record in reader.records()]
    assert reader.kind == "json"
    assert [d.text for d in parsed if not d.bad] == TALES
    assert sum(d.bad is not None for d in parsed) == len(first)


@pytest.mark.parametrize(
    "data",
    [
        "# Format\n\nOne object a line, for example:\n\n"
        + '{"text": "a"}\n{"text": "b"}\n'
        + "\nDone.\n",
        json.dumps([{"kind": "x"}, {"kind": "y"}, {"kind": "z"}, {"text": "note"}]),
    ],
)
def test_a_few_objects_with_a_text_make_no_records_of_a_text(tmp_path, data):
    assert read(tmp_path / "a.md", data.encode(), in_folder=True) == ("text", [data])


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", "a\x01", "", "é.ü", "__class__"])
def test_any_name_of_a_field(tmp_path, name):
    data = json.dumps({name or " ": "tale"}) + "\n"
    assert read(tmp_path / "a.jsonl", data.encode(), text_field=name or " ") == ("jsonl", ["tale"])


def test_half_of_a_pair_is_said(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\\ud83d"}\n{"text": "\\ud83d\\ude00"}\n')
    parsed = [Parser().documents(r)[0] for r in reader_of(tmp_path / "a.jsonl").records()]
    assert parsed[0].bad == "a \\u escape is half of a UTF-16 pair, which is no character"
    assert parsed[1].text == "\U0001f600"
