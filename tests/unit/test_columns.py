"""Parquet and Arrow: every kind of text column, against pyarrow; saved Hugging Face datasets."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from meshlm.core.errors import BadInputError
from meshlm.data.folders import plan_folder
from meshlm.data.inputs import find_inputs
from meshlm.data.readers import FileReader, Reading
from meshlm.data.records import Record

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TEXTS = ["one", "zwei — 二", None, "", "one", "x" * 300] * 100


def write(table, path: Path) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        make = pa.ipc.new_stream if path.suffix == ".arrow" else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as file, make(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=333)
    return path


def read(path: Path, **options) -> list[Record]:
    (file,) = find_inputs([str(path)], exclude=path / "none").files
    return list(FileReader(file, Reading(**options)).records())


def texts(path: Path, **options) -> list[str | None]:
    return [None if record.bad else record.text for record in read(path, **options)]


KINDS = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "binary": pa.binary(),
    "large_binary": pa.large_binary(),
    "binary_view": pa.binary_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "large_dictionary": pa.dictionary(pa.int8(), pa.large_string()),
    "dictionary_of_binary": pa.dictionary(pa.int16(), pa.binary()),
}


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_text(tmp_path, suffix, kind):
    encoded = pa.array([None if t is None else t.encode() for t in TEXTS], pa.binary())
    of = KINDS[kind]
    if pa.types.is_dictionary(of):
        column = encoded.cast(of.value_type).dictionary_encode().cast(of)
    else:
        column = encoded.cast(of)
    path = write(pa.table({"id": list(range(600)), "text": column}), tmp_path / f"a{suffix}")
    assert texts(path) == TEXTS
    assert read(path)[2].bad == "`text` is null"
    # The same file with no suffix that would tell.
    assert texts(path.rename(tmp_path / "other")) == TEXTS


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_fixed_sizes_nulls_and_structs(tmp_path, suffix):
    fixed = pa.table({"text": pa.array([b"abcd", None, b"efgh"], pa.binary(4))})
    assert texts(write(fixed, tmp_path / f"a{suffix}")) == ["abcd", None, "efgh"]
    nulls = pa.table({"text": pa.nulls(3)})
    assert texts(write(nulls, tmp_path / f"b{suffix}")) == [None] * 3
    struct = pa.StructArray.from_arrays(
        [pa.array(["x", "y", "z"]), pa.array([1, 2, 3])],
        ["body", "n"],
        mask=pa.array([False, True, False]),
    )
    table = pa.table({"doc": struct, "meta": [{"pile_set_name": "S"}] * 3})
    path = write(table, tmp_path / f"c{suffix}")
    assert texts(path, text_field="doc.body") == ["x", None, "z"]
    assert read(path, text_field="doc.body")[0].set_name == "S"
    flat = write(pa.table({"doc.body": ["dotted"]}), tmp_path / f"d{suffix}")
    assert texts(flat, text_field="doc.body") == ["dotted"]
    bad = pa.table({"text": pa.array([b"good", b"caf\xe9"], pa.binary())})
    good, latin = read(write(bad, tmp_path / f"e{suffix}"))
    assert (good.text, (latin.bad or "")[:9]) == ("good", "not UTF-8")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["text", "text"], {}, "2 columns are named `text`: rename all but one"),
        (["body", "title"], {}, "no column `text` among body, title; there is text in `body`"),
        (["text", "body"], {"text_field": "content"}, "no column `content` among text, body"),
        (["text", "body"], {"text_field": "text.x"}, "no column `text.x`"),
    ],
)
def test_columns_that_are_not_there(tmp_path, suffix, names, options, message):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=names)
    with pytest.raises(BadInputError, match=rf"a{suffix}: {message}"):
        read(write(table, tmp_path / f"a{suffix}"), **options)
    numbers = write(pa.table({"text": [1, 2]}), tmp_path / f"b{suffix}")
    with pytest.raises(BadInputError, match="the column `text` holds int64, not text"):
        read(numbers)


def test_an_arrow_stream_that_is_cut(tmp_path):
    table = pa.table({"text": [f"row {i}" for i in range(1000)]})
    whole = write(table, tmp_path / "a.arrow").read_bytes()
    for size in (len(whole) - 8, len(whole) - 9, len(whole) // 2):
        path = tmp_path / "a.arrow"
        path.write_bytes(whole[:size])
        with pytest.raises(BadInputError, match=r"a\.arrow.*truncated"):
            texts(path)
        found = texts(path, allow_truncated=True)
        assert found == [f"row {i}" for i in range(len(found))]
        assert len(found) == (1000 if size > len(whole) - 9 else len(found) // 333 * 333)
    for name in ("a.parquet", "a.feather"):
        path = write(table, tmp_path / name)
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(BadInputError, match=name):
            texts(path)


def test_damage_within_a_file_is_damage(tmp_path):
    path = write(pa.table({"text": ["hello world " * 50] * 3000}), tmp_path / "a.parquet")
    data = bytearray(path.read_bytes())
    data[4:24] = b"\xff" * 20  # pyarrow raises an OSError that has no number
    path.write_bytes(data)
    with pytest.raises(
        BadInputError, match=r"a\.parquet: the file is damaged \(.+\): get it again"
    ):
        read(path)


def save_to_disk(folder: Path, shards: list[list[str]], **state) -> Path:
    """A dataset as `datasets` 5.2 saves it; tests/parity holds that the real one is read."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{len(shards):05}.arrow" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write(pa.table({"text": shard}), folder / name)
    files = [{"filename": name} for name in state.pop("order", names)]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": None} | state))
    (folder / "dataset_info.json").write_text('{"features": {}}')
    return folder


def names(paths) -> list[str]:
    return [Path(p.path).name for p in paths]


def test_a_saved_dataset(tmp_path):
    folder = save_to_disk(tmp_path / "ds", [["a", "b"], ["c"]])
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"].reverse()
    (folder / "state.json").write_text(json.dumps(state))
    write(pa.table({"text": ["an old map"]}), folder / "cache-0123.arrow")
    found = find_inputs([str(folder)], exclude=tmp_path / "none")
    assert names(found.files) == ["data-00001-of-00002.arrow", "data-00000-of-00002.arrow"]
    assert {(Path(o.path).name, o.reason) for o in found.left_out} == {
        ("cache-0123.arrow", "not among the data files of state.json"),
        ("dataset_info.json", "metadata of a Hugging Face dataset"),
        ("state.json", "metadata of a Hugging Face dataset"),
    }
    by_pattern = find_inputs([f"{folder}/*"], exclude=tmp_path / "none")
    assert sorted(names(by_pattern.files)) == sorted(names(found.files))


def test_many_shards_take_linear_time(tmp_path):
    def cpu_s(count: int) -> float:
        names = [f"data-{i:05}.arrow" for i in reversed(range(count))]
        state = {"_data_files": [{"filename": name} for name in names]}
        (tmp_path / "state.json").write_text(json.dumps(state))
        listed, times = [*sorted(names), "state.json"], []
        for _ in range(5):
            began_s = time.process_time()
            plan = plan_folder(str(tmp_path), listed)
            times.append(time.process_time() - began_s)
            assert plan.order == names
        return min(times)

    assert cpu_s(60_000) < 3 * cpu_s(30_000)


def test_a_saved_dict_of_datasets(tmp_path):
    for split in ("train", "test"):
        save_to_disk(tmp_path / "ds" / split, [[split]])
    (tmp_path / "ds/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    found = find_inputs([str(tmp_path / "ds")], exclude=tmp_path / "none")
    assert [Path(f.path).parent.name for f in found.files] == ["test", "train"]
    reasons = {Path(o.path).name: o.reason for o in found.left_out}
    assert "every split is read: to read one, give its folder" in reasons["dataset_dict.json"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"_indices_files": [{"filename": "indices.arrow"}]}, r"flatten_indices\(\)"),
        ({"_indices_data_files": [{"filename": "indices.arrow"}]}, r"flatten_indices\(\)"),
        ({"order": ["data-00007-of-00008.arrow"]}, "data-00007-of-00008.arrow, which is not in"),
        ({"order": ["../data.arrow"]}, "which is not in the folder"),
        ({"_data_files": [None]}, "which is not in the folder"),
    ],
)
def test_datasets_that_cannot_be_read(tmp_path, state, message):
    folder = save_to_disk(tmp_path / "ds", [["a"]], **state)
    with pytest.raises(BadInputError, match=message):
        find_inputs([str(folder)], exclude=tmp_path / "none")


def test_a_datasets_state_that_is_refused_is_no_other_programs(tmp_path):
    for text in ('{"_data_files": [], "a": 1, "a": 2}', '{"_data_files": [], "a": NaN}'):
        (tmp_path / "state.json").write_text(text)
        with pytest.raises(BadInputError, match=r"state\.json .*: get the whole dataset again"):
            plan_folder(str(tmp_path), ["state.json"])


def test_another_programs_state_is_a_text(tmp_path):
    for text in ("{}", "[1]", "no JSON"):
        (tmp_path / "state.json").write_text(text)
        assert names(find_inputs([str(tmp_path)], exclude=tmp_path / "none").files) == [
            "state.json"
        ]


def test_parquet_pages_are_checked_where_they_have_checksums(tmp_path):
    path, words = tmp_path / "a.parquet", "The fox sleeps in the old barn."
    table = pa.table({"text": [f"{words} {i}" for i in range(50)]})
    parquet.write_table(
        table,
        path,
        compression="none",
        write_page_checksum=True,
        use_dictionary=False,
        write_statistics=False,
    )
    assert len(texts(path)) == 50
    data = path.read_bytes()
    path.write_bytes(data.replace(b"sleeps in", b"slaeps in", 1))
    with pytest.raises(BadInputError, match=r"damaged \(.*CRC"):
        texts(path)


def test_what_pyarrow_says_of_damage_reaches_the_message(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["word " * 50] * 2000}), path, compression="none")
    data = bytearray(path.read_bytes())
    data[4:40] = b"\xff" * 36  # the header of the first page
    path.write_bytes(data)
    with pytest.raises(BadInputError, match=r"damaged \([^()]{10}"):
        texts(path)


def test_tables_are_not_mapped(tmp_path):
    """A file that is cut while it is read is an error; mapped, it would end the process."""
    path = write(pa.table({"text": ["word " * 200] * 20_000}), tmp_path / "a.feather")
    (file,) = find_inputs([str(path)], exclude=path / "none").files
    records = FileReader(file, Reading()).records()
    next(records)
    maps = Path("/proc/self/maps").read_text()
    assert str(path) not in maps
    os.truncate(path, 10_000)
    with pytest.raises(BadInputError, match=r"a\.feather"):
        list(records)
