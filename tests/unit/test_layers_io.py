"""Reading and writing checkpoints a layer at a time: against what Orbax writes and reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts

from meshlm import checkpoint
from meshlm.checkpoint import ArrayInfo, Checkpointer, LayerReader, LayerWriter, layers
from meshlm.core.errors import BadInputError, UsageError


def draw(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    """Any bits at all, NaNs, infinities and signed zeros among them."""
    size = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    bits = np.random.default_rng(seed).bytes(size)
    return np.frombuffer(bits, jnp.dtype(dtype)).reshape(shape)


ARRAYS = {
    "params.blocks.query": draw((3, 4, 5), "bfloat16"),
    "params.blocks.norm": draw((3, 300), "float32"),
    "params.embedding": draw((70, 30), "float16"),
    "params.bias": np.zeros(9, np.float32),
    "step": np.array(7, np.int32),
    "params.long": draw((50_000,), "int32"),
}
INFOS = {n: ArrayInfo(shape=a.shape, dtype=a.dtype.name) for n, a in ARRAYS.items()}


def write(folder: Path, arrays=ARRAYS, files=None) -> Path:
    folder.mkdir()
    infos = {n: ArrayInfo(shape=a.shape, dtype=a.dtype.name) for n, a in arrays.items()}
    writer = LayerWriter(folder, infos)
    for name, array in arrays.items():
        if checkpoint.is_layer_stack(name):
            for layer in reversed(range(len(array))):
                writer.write(name, array[layer], layer)
        else:
            writer.write(name, array)
    writer.seal(7, files or {"config.json": b"{}"})
    return folder


def save(folder: Path, arrays=ARRAYS) -> Path:
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(7, {name: jnp.asarray(a) for name, a in arrays.items()})
    return checkpoint.step_path(folder, 7)


def assert_identical(found: np.ndarray, wanted: np.ndarray) -> None:
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    assert np.asarray(found).tobytes() == wanted.tobytes()


def test_restore_reads_what_was_written_by_layers(tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "MAX_CHUNK_BYTES", 1000)
    folder = write(tmp_path / "written")
    assert checkpoint.verify(folder) == []
    assert checkpoint.read_manifest(folder).step == 7
    abstract = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in ARRAYS.items()}
    restored = checkpoint.restore(folder, abstract)
    for name, array in ARRAYS.items():
        assert_identical(np.asarray(restored[name]), array)


@pytest.mark.parametrize("make", [write, save])
def test_layers_are_read_alone(tmp_path, make, monkeypatch):
    monkeypatch.setattr(layers, "MAX_CHUNK_BYTES", 1000)
    reader = LayerReader(make(tmp_path / "checkpoint"))
    assert dict(reader.manifest.arrays) == INFOS
    for name, array in ARRAYS.items():
        assert_identical(reader.read(name), array)
        if checkpoint.is_layer_stack(name):
            for layer in range(len(array)):
                assert_identical(reader.read(name, layer), array[layer])


def test_the_store_is_as_orbax_makes_it(tmp_path):
    """Same zarr metadata and chunks, so that a checkpoint is one format whoever wrote it."""
    stores = [write(tmp_path / "written"), save(tmp_path / "saved")]
    contents = []
    for folder in stores:
        base = {"driver": "file", "path": f"{folder}/arrays/state/"}
        store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
        keys = [key.decode() for key in store.list().result()]
        metadata = {
            key: json.loads(store.read(key).result().value) for key in keys if key.endswith("json")
        }
        contents.append((sorted(keys), metadata))
    assert contents[0] == contents[1]


def test_a_store_that_promises_more_than_it_has_is_refused(tmp_path, monkeypatch):
    """Chunks that are missing read as zeros, so a small file could ask for all memory."""
    folder = tmp_path / "bomb"
    folder.mkdir()
    writer = LayerWriter(folder, {"params.embedding": ArrayInfo(shape=(1 << 20, 64), dtype="int8")})
    writer._create("params.embedding", writer._arrays["params.embedding"])
    writer._left.clear()
    writer.seal(0, {})
    with pytest.raises(BadInputError, match=r"67,108,864 bytes and its files"):
        LayerReader(folder)


def test_damage_is_named_by_its_array(tmp_path):
    folder = write(tmp_path / "written")
    reader = LayerReader(folder)
    for path in (folder / "arrays" / "state" / "d").iterdir():
        path.write_bytes(b"")
    with pytest.raises(BadInputError, match=r"array params\.blocks\.query cannot be read"):
        reader.read("params.blocks.query", 0)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no checkpoint"):
        LayerReader(tmp_path)


def test_a_file_is_added_to_the_manifest(tmp_path):
    folder = write(tmp_path / "written")
    checkpoint.add_file(folder, "certificate.json", b'{"a": 1}')
    assert checkpoint.verify(folder) == []
    assert checkpoint.read_files(folder)["certificate.json"] == b'{"a": 1}'
    (folder / "certificate.json").write_bytes(b'{"a": 2}')
    assert [d.file for d in checkpoint.verify(folder)] == ["certificate.json"]


def test_retention_waits_for_a_reader(tmp_path):
    folder = save(tmp_path / "run")
    reader = LayerReader(folder)
    assert not checkpoint.folder.delete_step(tmp_path / "run", folder)
    del reader
    assert checkpoint.folder.delete_step(tmp_path / "run", folder)


MEASURE = """
import sys, threading, time
from pathlib import Path
import numpy as np
from meshlm.checkpoint import ArrayInfo, LayerReader, LayerWriter
import jax; jax.devices()

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)

layers, rows, width = 5, 10_000, 1000
array = np.ones((rows, width), np.float32)
folder = Path(sys.argv[1])
small = Path(sys.argv[2])
for path, shape in ((small, (2, 10, 10)), (folder, (layers, rows, width))):
    path.mkdir()
    infos = {"blocks.w": ArrayInfo(shape=shape, dtype="float32")}
    writer = LayerWriter(path, infos)
    if path == folder:
        before, peak = anonymous(), [0]
        threading.Thread(target=watch, daemon=True).start()
    for layer in range(shape[0]):
        writer.write("blocks.w", array[: shape[1], : shape[2]], layer)
    writer.seal(0, {})
wrote = (peak[0] - before) / array.nbytes
reader, peak[0] = LayerReader(folder), 0
for layer in range(layers):
    assert reader.read("blocks.w", layer)[3, 4] == 1
print(wrote, (peak[0] - before) / array.nbytes)
"""


@pytest.mark.long
def test_memory_is_that_of_a_layer(tmp_path):
    """40 MB layers, 200 MB in all: one is held in writing, two in reading, never the stack."""
    arguments = [sys.executable, "-c", MEASURE, str(tmp_path / "big"), str(tmp_path / "small")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    wrote, read = map(float, done.stdout.split())
    assert wrote < 1.8
    assert read < 2.8
