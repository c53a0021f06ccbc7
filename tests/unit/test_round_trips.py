"""From one format through another and back, in the corners that the recordings do not have."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import original
import tiny
from meshlm.checkpoint import Checkpointer
from meshlm.conversion.convert import convert
from meshlm.conversion.opening import open_source
from meshlm.core.config import to_dict, to_json
from meshlm.core.errors import BadInputError
from meshlm.core.tree import to_named
from meshlm.training.config import TrainConfig
from meshlm.training.origin import open_origin
from original import BFLOAT16, make_trees, small, write_config


def write(folder: Path, trees) -> Path:
    folder.mkdir()
    write_config(folder / "config.json", small())
    return original.write(folder, trees)


def arrays_of(folder: Path) -> dict[str, tuple[str, bytes]]:
    found = {}
    for path in sorted(folder.rglob("*.npz")):
        with np.load(path) as arrays:
            for name, array in arrays.items():
                place = f"{path.parent.name}/{path.name}/{name}"
                found[place] = (array.dtype.str, array.tobytes())
    return found


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=["float32", "bfloat16"])
def test_counts_that_differ_and_moments_come_back(tmp_path, dtype):
    """Step 7, Adam's count 8, the schedule's 4: as a fine-tuned checkpoint of the original has."""
    trees = make_trees(small(), 2, dtype, full=True)
    for tree in trees:  # moments are float32, whatever the weights are
        scale, clip, adam, *after = tree["opt_state"]
        adam = adam._replace(mu=floats(adam.mu), nu=floats(adam.nu))
        tree["opt_state"] = (scale, clip, adam, *after)
    source = open_source(write(tmp_path / "theirs", trees))
    assert source.counts == {"adam": 8, "schedule": 4}
    convert(source, tmp_path / "ours", to="meshlm")
    ours = open_source(tmp_path / "ours")
    assert (ours.step, ours.counts, ours.shards) == (7, {"adam": 8, "schedule": 4}, 2)
    convert(ours, tmp_path / "again", to="mtj", shards=2)
    assert arrays_of(tmp_path / "again") == arrays_of(tmp_path / "theirs")
    # To go on from it would be at another learning rate than its own.
    config = TrainConfig(run=tmp_path / "run", resume_from=tmp_path / "ours")
    with pytest.raises(ValueError, match="learning rate is at step 4 and its weights at 7"):
        open_origin(config)


def floats(params):
    return {
        module: {name: np.asarray(value, np.float32) for name, value in leaves.items()}
        for module, leaves in params.items()
    }


def test_a_run_that_skipped_steps_keeps_adams_count(tmp_path):
    params = tiny.draw_params(tiny.CONFIG)
    named = {"params." + name: array for name, array in to_named(params).items()}
    moments = {
        f"optimizer.adam.{group}.{name}": array
        for group in ("mu", "nu")
        for name, array in to_named(params).items()
    }
    counters = {"step": np.int32(9), "optimizer.adam.count": np.int32(6)}
    run = {"model": to_dict(tiny.CONFIG), "optimizer": {"bias_shares": 4}}
    arrays = named | moments | {n: tiny.jnp.asarray(v) for n, v in counters.items()}
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(9, arrays, {"config.json": to_json({"run": run})})
    source = open_source(tmp_path)
    assert (source.counts, source.shards) == ({"adam": 6, "schedule": 9}, 4)
    convert(source, tmp_path / "ours", to="meshlm")
    assert open_source(tmp_path / "ours").counts == {"adam": 6, "schedule": 9}


def test_another_config_beside_the_destination_is_none_of_its_own(tmp_path):
    source = open_source(write(tmp_path / "theirs", make_trees(small(), 1, np.float32)))
    other = json.loads((tmp_path / "theirs" / "config.json").read_text()) | {"seq": 99}
    (tmp_path / "other.json").write_text(json.dumps(other))
    convert(source, tmp_path / "again", to="mtj", shards=1)
    assert arrays_of(tmp_path / "again") == arrays_of(tmp_path / "theirs")


def test_token_ids_of_a_hugging_face_folder_stay(tmp_path):
    source = open_source(write(tmp_path / "theirs", make_trees(small(), 1, np.float32)))
    convert(source, tmp_path / "hf", to="hf")
    path = tmp_path / "hf" / "config.json"
    ids = {"bos_token_id": 3, "eos_token_id": 5}
    path.write_text(json.dumps(json.loads(path.read_text()) | ids))
    (tmp_path / "hf" / "certificate.json").unlink()  # it is of the folder before that
    convert(open_source(tmp_path / "hf"), tmp_path / "hf2", to="hf")
    config = json.loads((tmp_path / "hf2" / "config.json").read_text())
    assert ids.items() <= config.items()


def test_weights_that_are_not_numbers_are_named(tmp_path):
    trees = make_trees(small(), 1, np.float32)
    leaf = original.leaf(trees, "layer_1/~/linear_5", "w")[0]
    leaf[2, 1] = np.nan
    source = open_source(write(tmp_path / "theirs", trees))
    with pytest.raises(
        BadInputError,
        match=r"blocks\.1\.feed_forward\.down\.weight .*: 1 NaN of 1,024 numbers, "
        r"the first at \[1, 2\]",
    ):
        convert(source, tmp_path / "ours", to="meshlm")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_what_was_to_be_replaced_comes_back_after_a_kill(tmp_path):
    """Killed between the two renames: the old weights are hidden, and nothing has the name."""
    source = open_source(write(tmp_path / "theirs", make_trees(small(), 1, np.float32)))
    convert(source, tmp_path / "ours", to="meshlm")
    (tmp_path / "ours").rename(tmp_path / ".ours.replaced-12345678")
    with pytest.raises(ValueError, match="is there already"):
        convert(source, tmp_path / "ours", to="mtj", shards=1)
    assert open_source(tmp_path / "ours").kind == "meshlm"
