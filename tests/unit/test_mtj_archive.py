"""Archives of the original's checkpoints: the tensors as unpacked, in passes; and hostile ones."""

import io
import itertools
import os
import random
import subprocess
import tarfile
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import zstandard

import original
from meshlm.conversion.mtj import archive as mtj_archive
from meshlm.conversion.mtj.source import is_mtj, open_mtj
from meshlm.conversion.mtj.target import MtjTarget
from meshlm.core.errors import BadInputError
from meshlm.formats import archive
from original import BFLOAT16, make_trees, pack_members, small

FIXTURE = Path(__file__).parents[1] / "fixtures" / "mtj" / "dev_s4_distinct"


def contents(source) -> dict[str, tuple[str, bytes]]:
    """Every native and raw tensor of every group."""
    result = {}
    for group in source.groups:
        for part in source.parts(group):
            for name in part.tensors:
                array = part.read(name)
                result[f"{group} {name}"] = (f"{array.dtype}{array.shape}", array.tobytes())
            for name in part.raw:
                array = part.read_raw(name)
                result[f"{group} raw {name}"] = (f"{array.dtype}{array.shape}", array.tobytes())
    return result


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small checkpoint with its config, as a tar."""
    folder = tmp_path_factory.mktemp("tar")
    original.write_config(folder / "config.json", small(num_layers=1))
    original.write(folder, make_trees(small(num_layers=1), 2, BFLOAT16))
    command = ["tar", "-C", str(folder), "-cf", "-", "config.json", "step_7"]
    return subprocess.run(command, check=True, capture_output=True).stdout


@pytest.mark.parametrize(
    ("savez", "full", "budget"),
    [
        (np.savez, False, 1),
        (np.savez_compressed, False, 10**9),
        (np.savez_compressed, False, 5_000),
        (original.savez_to_bucket, False, 5_000),
        (original.savez_to_bucket, True, 10**9),
    ],
)
def test_an_archive_has_what_its_folder_has(tmp_path, monkeypatch, savez, full, budget):
    monkeypatch.setattr(mtj_archive, "PASS_BYTES", budget)
    model = small(num_layers=11)
    folder = tmp_path / "unpacked"
    trees = make_trees(model, 2, np.float32 if full else BFLOAT16, full=full)
    original.write(folder, trees, savez)
    original.write_config(tmp_path / "config.json", model)
    path = original.pack(tmp_path / "x.tar.zst", folder, "./step_7")
    assert is_mtj(path)
    before = sorted(tmp_path.rglob("*"))
    source = open_mtj(path)
    assert contents(source) == contents(open_mtj(folder))
    assert (source.step, source.kind) == (7, "mtj")
    assert sorted(tmp_path.rglob("*")) == before


def test_passes_hold_no_more_than_the_budget(tmp_path, monkeypatch):
    model = small(num_layers=6, num_heads=32, vocab_size=64)
    original.write(tmp_path / "unpacked", make_trees(model, 4, np.float32))
    path = original.pack(tmp_path / "x.tar.zstd", tmp_path / "unpacked", "step_7")
    layer_bytes = 12 * 128 * 128 * 4
    monkeypatch.setattr(mtj_archive, "PASS_BYTES", 2 * layer_bytes)
    passes = []
    plain = mtj_archive.archived_files
    monkeypatch.setattr(mtj_archive, "archived_files", lambda p: passes.append(1) or plain(p))
    source = open_mtj(path, model)
    tracemalloc.start()
    for part in source.parts():
        for name in part.tensors:
            part.read(name)
        del name
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The index; embedding and a layer; three times two layers, the last with the head.
    assert len(passes) == 5
    assert peak < 2 * layer_bytes + 1_500_000


def test_parts_in_the_order_of_the_file(tmp_path):
    source = open_mtj(original.pack(tmp_path / "a.tar.zst", FIXTURE, "slim", "config.json"))
    (tmp_path / "out").mkdir()
    assert source.sidecar is not None
    target = MtjTarget(
        tmp_path / "out",
        model=source.model,
        infos=source.infos,
        groups=source.groups,
        tokenizer=None,
        step=source.step,
        counts=source.counts,
        sidecar=source.sidecar,
        shards=4,
    )
    for part in source.parts("params", target.order):
        target.write("params", part)
    target.finish()
    for path in (FIXTURE / "slim").rglob("*.npz"):
        written = tmp_path / "out" / path.relative_to(FIXTURE / "slim")
        assert written.read_bytes() == path.read_bytes()


def test_the_config_beside_an_archive_may_be_in_it_too(tmp_path):
    original.write_config(tmp_path / "config.json", small())
    original.write(tmp_path, make_trees(small(), 2, np.float32))
    path = original.pack(tmp_path / "x.tar.zst", tmp_path, "step_7", "config.json")
    assert open_mtj(path).model == small()
    original.write_config(tmp_path / "config.json", small(), seq=99)
    with pytest.raises(BadInputError, match="several configs"):
        open_mtj(path)
    (tmp_path / "config.json").unlink()
    assert open_mtj(path).model == small()


def test_the_newest_of_several_steps(tmp_path):
    model = small()
    for step in (3, 12):
        original.write(tmp_path / "x", make_trees(model, 2, np.float32, step=step, seed=step))
    path = original.pack(tmp_path / "x.tar.zst", tmp_path, "x")
    with pytest.raises(BadInputError, match=r"no meta\.json"):
        open_mtj(path, model)
    (tmp_path / "x/meta.json").write_text('{"step": 12, "checkpoints": [3, 12], "aux": {}}')
    path = original.pack(tmp_path / "x.tar.zst", tmp_path, "x")
    assert open_mtj(path, model).step == 12
    (tmp_path / "x/meta.json").write_text('{"step": 13, "checkpoints": [3, 13], "aux": {}}')
    path = original.pack(tmp_path / "x.tar.zst", tmp_path, "x")
    with pytest.raises(BadInputError, match="step_13"):
        open_mtj(path, model)
    path = original.pack(tmp_path / "x.tar.zst", tmp_path, "x/meta.json", "x/step_12")
    with pytest.raises(BadInputError, match="step_13"):
        open_mtj(path, model)


def test_two_readers_do_not_take_each_others_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(mtj_archive, "PASS_BYTES", 1)
    original.write(tmp_path, make_trees(small(), 2, np.float32))
    source = open_mtj(original.pack(tmp_path / "x.tar.zst", tmp_path, "step_7"), small())
    wanted = [
        part.read("blocks.0.attention.query.weight").tolist() for part in source.parts(order=[0])
    ]
    slow = source.parts(order=[0])
    part = next(slow)
    for other in source.parts():
        assert other.key != 0 or other.read("blocks.0.attention.query.weight").tolist() == wanted[0]
    assert part.read("blocks.0.attention.query.weight").tolist() == wanted[0]


def test_several_frames_are_one_archive(tmp_path, tar):
    half = len(tar) // 2
    path = tmp_path / "x.tar.zst"
    path.write_bytes(zstandard.compress(tar[:half]) + zstandard.compress(tar[half:]))
    assert open_mtj(path).step == 7


def open_bytes(tmp_path: Path, tar: bytes):
    path = tmp_path / "x.tar.zst"
    path.write_bytes(zstandard.compress(tar))
    return contents(open_mtj(path))


def test_cut_short_anywhere_is_refused(tmp_path, tar):
    with tarfile.open(fileobj=io.BytesIO(tar)) as file:
        whole = file.getmembers()[-1]
    end = whole.offset_data + -(-whole.size // 512) * 512
    for length in (0, 1, 511, *random.Random(0).sample(range(512, end), 30), end, end + 511):
        with pytest.raises(BadInputError, match=r"x\.tar\.zst"):
            open_bytes(tmp_path, tar[:length])
    packed = zstandard.compress(tar)
    for length in range(0, len(packed) - 200, 397):
        (tmp_path / "x.tar.zst").write_bytes(packed[:length])
        with pytest.raises(BadInputError, match=r"x\.tar\.zst"):
            open_mtj(tmp_path / "x.tar.zst")


def test_a_flipped_bit_is_refused_or_harmless(tmp_path, tar):
    good = open_bytes(tmp_path, tar)
    rng = random.Random(1)
    for at in rng.sample(range(len(tar)), 80):
        flipped = bytearray(tar)
        flipped[at] ^= 1 << rng.randrange(8)
        try:
            read = open_bytes(tmp_path, bytes(flipped))
        except BadInputError:
            continue
        assert read == good


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = ""):
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info


NPZ = "step_7/shard_0/0.npz"


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ([(member("../shard_0/0.npz"), b"x")], r"'\.\./shard_0/0\.npz' leads out"),
        ([(member("step_7/../../0.npz"), b"x")], "leads out"),
        ([(member("/" + NPZ), b"x")], "leads out"),
        ([(member("C:\\0.npz"), b"x")], "leads out"),
        ([(member("a\x1b[31m.json"), b"x")], "leads out"),
        ([(member("a\x1b[31m", tarfile.SYMTYPE, link="x"), b"")], r"'a\\x1b\[31m' leads out"),
        ([(member(NPZ, tarfile.SYMTYPE, link="/etc/passwd"), b"")], "is a symbolic link"),
        ([(member(NPZ, tarfile.LNKTYPE, link="x"), b"")], "is a hard link"),
        ([(member(NPZ, tarfile.CHRTYPE), b"")], "is a device"),
        ([(member(NPZ, tarfile.BLKTYPE), b"")], "is a device"),
        ([(member(NPZ, tarfile.FIFOTYPE), b"")], "is a pipe"),
        ([(member(NPZ, b"S"), b"")], "0.npz is a sparse file"),
        ([(member(NPZ, size=1 << 50), b"")], "claims 1125899906842624 bytes; at most 68719476736"),
        ([(member("x", tarfile.DIRTYPE, size=9), b"")], "claims 9 bytes; at most 0"),
        ([(member("x", b"L", size=1 << 50), b"")], "header of 1125899906842624 bytes"),
        ([(member("x", b"x", size=1 << 30), b"")], "header of 1073741824 bytes"),
        ([(member("x", b"x"), b"99 path=a\n")], "damaged tar"),
        ([(member("x", b"x"), b"22 GNU.sparse.major=1\n"), (member("a"), b"b")], "a is a sparse"),
        ([(member("x", b"x"), b"10 path=a\n")], "ends where a long name or a pax header has no"),
        ([(member("x", b"x"), b"17 path=../../ab\n"), (member("a"), b"b")], "leads out"),
        ([(member("x", b"L"), b"/etc/passwd\0"), (member("a"), b"b")], "leads out"),
        ([(member("README.md"), b"x")], "README.md is no part of a checkpoint"),
        ([(member("step_7/shard_0/99.exe"), b"x")], "no part of a checkpoint"),
        ([(member("big.json", size=2 << 20), bytes(2 << 20))], "big.json is no part"),
        ([(member("a.json"), b"{}"), (member("./a.json"), b"{}")], "a.json is in it twice"),
        ([(member(NPZ), b"hello world")], "0.npz is not a whole npz"),
        ([(member("a.json"), b"{}")], "it is no checkpoint"),
        ([], "it is no checkpoint"),
    ],
)
def test_what_no_checkpoint_has_is_refused(tmp_path, members, why):
    before = os.getcwd(), threading.active_count()
    path = pack_members(tmp_path / "x.tar.zst", members)
    tracemalloc.start()
    with pytest.raises(BadInputError, match=why) as caught:
        open_mtj(path, small())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000
    assert "x.tar.zst" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]
    assert before == (os.getcwd(), threading.active_count())


def test_a_bomb_is_refused_after_a_hundred_times_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "FREE_BYTES", 1 << 20)
    start = member(NPZ, size=1 << 33).tobuf(tarfile.GNU_FORMAT)
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    parts = [compressor.compress(start)]
    parts += [compressor.compress(bytes(1 << 20)) for _ in range(64)]
    path = tmp_path / "x.tar.zst"
    path.write_bytes(b"".join((*parts, compressor.flush())))
    # What states no array is refused for that; so the growth is looked at by itself.
    (file,) = itertools.islice(archive.archived_files(path), 1)
    with pytest.raises(BadInputError, match="more than 100 times"):
        file.skip(file.left)


def test_arrays_that_grow_within_the_archive_are_refused(tmp_path):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, np.zeros((1 << 13, 1 << 12), np.float32))
    path = pack_members(tmp_path / "x.tar.zst", [(member(NPZ), buffer.getvalue())])
    with pytest.raises(
        BadInputError, match=r"arr_0\.npy and those before it grow to more than 100"
    ):
        open_mtj(path, small())


def test_a_window_that_would_fill_the_memory_is_refused(tmp_path, tar):
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = tmp_path / "x.tar.zst"
    path.write_bytes(compressor.compress(tar) + compressor.flush())
    with pytest.raises(BadInputError, match="window beyond 128 MiB"):
        open_mtj(path)


def test_what_follows_the_end_is_refused(tmp_path, tar):
    with pytest.raises(BadInputError, match="follow the archive's end"):
        open_bytes(tmp_path, tar + b"more")


def test_shards_are_counted_in_archives_too(tmp_path):
    step_folder = original.write(tmp_path, make_trees(small(), 2, np.float32))
    (step_folder / "shard_1/3.npz").unlink()
    with pytest.raises(BadInputError, match=r"shard_1 has no 3\.npz"):
        open_mtj(original.pack(tmp_path / "x.tar.zst", tmp_path, "step_7"), small())
    (step_folder / "shard_0").rename(step_folder / "shard_2")
    with pytest.raises(BadInputError, match="no shard_0"):
        open_mtj(original.pack(tmp_path / "x.tar.zst", tmp_path, "step_7"), small())
