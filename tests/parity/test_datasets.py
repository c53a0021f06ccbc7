"""Folders that Hugging Face's `datasets` saved, as it reads them itself."""

from __future__ import annotations

from pathlib import Path

import pytest

datasets = pytest.importorskip("datasets")

from meshlm.data.inputs import find_inputs  # noqa: E402
from meshlm.data.readers import FileReader  # noqa: E402

pytestmark = pytest.mark.parity


def texts(folder: Path) -> list[str]:
    files = find_inputs([str(folder)], exclude=folder / "none").files
    return [record.text for file in files for record in FileReader(file).records()]


def test_saved_datasets(tmp_path):
    datasets.disable_progress_bars()
    whole = datasets.Dataset.from_dict(
        {"id": range(2500), "text": [f"row {i}" for i in range(2500)]}
    )
    variants = {
        "whole": whole,
        "selected": whole.select([5, 3, 2000, 4]),  # an indices mapping until it is saved
        "shuffled": whole.shuffle(seed=1),
        "mapped": whole.map(lambda row: {"text": row["text"] + "!"}),
        "categories": whole.cast_column("text", datasets.Value("large_string")),
    }
    for name, dataset in variants.items():
        dataset.save_to_disk(tmp_path / name, num_shards=3 if len(dataset) > 100 else 1)
        expected = list(datasets.load_from_disk(tmp_path / name)["text"])
        assert texts(tmp_path / name) == expected
    parts = datasets.DatasetDict(train=whole, test=variants["selected"])
    parts.save_to_disk(tmp_path / "dict")
    loaded = datasets.load_from_disk(tmp_path / "dict")
    assert texts(tmp_path / "dict") == [*loaded["test"]["text"], *loaded["train"]["text"]]
    assert texts(tmp_path / "dict/test") == list(loaded["test"]["text"])
    # A map on what was loaded leaves a cache file beside the data.
    before = texts(tmp_path / "whole")
    datasets.load_from_disk(tmp_path / "whole").map(lambda row: {"text": "no"})
    assert list((tmp_path / "whole").glob("cache-*.arrow"))
    assert texts(tmp_path / "whole") == before
