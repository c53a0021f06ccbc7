"""Memory and time of converting, loading and sampling from a GPT-J of 6 billion random weights.

Makes a random model in Hugging Face's layout (bfloat16, about 12 GB), converts it to MeshLM, to the
original's layout and back to Hugging Face's, compares that with the first tensor by tensor, loads
the MeshLM checkpoint and generates. Every stage is a process of its own, whose anonymous memory is
sampled while it runs. Prints a table, and JSON last; exits 1 where a stage failed or took more
memory than it may: 1.5 GB to convert, 1.1 times the weights to load. Needs about 40 GB of disk;
what is not needed any more is deleted.

    .venv/bin/python bench/convert_6b.py --folder /somewhere/large
    .venv/bin/python bench/convert_6b.py --preset demo
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

MAX_CONVERT_BYTES = 1_500_000_000
MAX_LOAD_SHARE = 1.1
SAMPLE_EVERY_S = 0.02
PROMPT = [464, 3290, 318]
NEW_TOKENS = 8
# What Python and JAX take by themselves: more than a tenth of a small model's weights.
RUNTIME_BYTES = 600_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """What one process took."""

    name: str
    seconds: float
    peak_anonymous_bytes: int
    limit_bytes: int | None
    disk_bytes: int
    exit_code: int

    @property
    def is_good(self) -> bool:
        over = self.limit_bytes is not None and self.peak_anonymous_bytes > self.limit_bytes
        return self.exit_code == 0 and not over


# The stages; each is `python convert_6b.py --stage NAME ...` in a process of its own.


def make(folder: Path, preset: str) -> None:
    """Writes the random model: few random numbers, drawn once and used again in other places."""
    import ml_dtypes
    import numpy as np

    from meshlm.conversion.hf.target import HfTarget
    from meshlm.conversion.parts import native_shapes, part_keys, stacked_name
    from meshlm.conversion.source import Part
    from meshlm.core.tree import to_named
    from meshlm.data.tokenizer import load_gpt2
    from meshlm.formats.tensor import TensorInfo
    from meshlm.model.params import weight_tree
    from meshlm.model.presets import PRESETS

    model = PRESETS[preset]
    weights = to_named(weight_tree(model))
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    # A prime length: no two rows of a matrix are the same.
    normal = np.random.default_rng(0).standard_normal(8_388_617, np.float32).clip(-2, 2)

    class RandomPart(Part):
        def __init__(self, key) -> None:
            self.key, self.raw = key, []
            shapes = native_shapes(model, key)
            self.tensors = {n: TensorInfo(shape=s, dtype=bfloat16) for n, s in shapes.items()}

        def read(self, name: str) -> np.ndarray:
            weight, shape = weights[stacked_name(name)[0]], self.tensors[name].shape
            if not weight.std:
                noise = np.random.default_rng(len(name)).standard_normal(shape)
                return (weight.fill + 0.02 * noise).astype(bfloat16)
            block = (normal * np.float32(weight.std)).astype(bfloat16)
            shift = hash_of(name) % len(block)
            result = np.empty(math.prod(shape), bfloat16)
            for start in range(0, len(result), len(block)):
                piece = result[start : start + len(block)]
                piece[:] = np.roll(block, -shift)[: len(piece)]
            return result.reshape(shape)

        def read_raw(self, name: str) -> np.ndarray:
            raise KeyError(name)

    parts = [RandomPart(key) for key in part_keys(model)]
    infos = {name: info for part in parts for name, info in part.tensors.items()}
    folder.mkdir()
    tokenizer = load_gpt2()
    target = HfTarget(
        folder,
        model=model,
        infos=infos,
        groups=("params",),
        tokenizer=tokenizer,
        step=None,
        counts={},
        sidecar=None,
    )
    for part in parts:
        target.write("params", part)
    target.finish()


def hash_of(name: str) -> int:
    import zlib

    return zlib.crc32(name.encode())


def convert(source: Path, destination: Path, to: str) -> None:
    """Converts as the command does."""
    from meshlm.cli.convert import Config, run

    run(Config(source=source, destination=destination, to=to))  # type: ignore[arg-type]


def pack(folder: Path, archive: Path) -> None:
    """Packs a checkpoint of the original's as it was published."""
    import tarfile

    import zstandard

    with (
        archive.open("xb") as file,
        zstandard.ZstdCompressor(level=1, threads=-1).stream_writer(file) as stream,
        tarfile.open(fileobj=stream, mode="w|") as tar,
    ):
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)


def compare(first: Path, last: Path) -> None:
    """Fails unless both folders have the same numbers in every tensor.

    By way of the original's layout a model gains an embedding bias of zeros, and summed biases
    become float32: the same numbers, then, but for the sign of zeros.
    """
    import numpy as np

    from meshlm.conversion.opening import open_source

    one, other = open_source(first), open_source(last)
    assert one.infos.keys() == other.infos.keys(), "not the same tensors"
    widened = 0
    for here, there in zip(one.parts(), other.parts(), strict=True):
        for name in here.tensors:
            a, b = here.read(name), there.read(name)
            if a.dtype == b.dtype and np.array_equal(bits(a), bits(b)):
                continue
            widened += 1
            rows = range(0, len(a), 1024)
            same = all(
                np.array_equal(a[i : i + 1024].astype("f4"), b[i : i + 1024].astype("f4"))
                for i in rows
            )
            assert same, f"{name} differs"
    print(f"every tensor has the same numbers; {widened} are of another type than at first")


def bits(array):
    """Returns the array's bytes as integers, so that NaN is equal to itself."""
    import numpy as np

    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def load(path: Path) -> None:
    """Loads the model."""
    import meshlm

    model = meshlm.load(path, dtype="bfloat16")
    print(f"{type(model).__name__} loaded")


def generate(path: Path) -> None:
    """Loads the model and lets it write."""
    import meshlm

    model = meshlm.load(path, dtype="bfloat16")
    sample = model.generate([PROMPT], max_tokens=NEW_TOKENS, ignore_end_of_text=True)
    print(f"tokens {sample.tokens}")


# The parent: runs the stages and watches them.


def watch(name: str, words: Sequence[str], limit_bytes: int | None, folder: Path) -> Stage:
    """Runs one stage and returns what it took; its output goes to stderr."""
    print(f"--- {name}", file=sys.stderr, flush=True)
    started_s = time.monotonic()
    arguments = [sys.executable, str(Path(__file__).resolve()), "--stage", *words]
    environment = os.environ | {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
    with subprocess.Popen(arguments, stdout=sys.stderr, env=environment) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(SAMPLE_EVERY_S)
    stage = Stage(
        name=name,
        seconds=time.monotonic() - started_s,
        peak_anonymous_bytes=peak,
        limit_bytes=limit_bytes,
        disk_bytes=sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
        exit_code=process.returncode,
    )
    print(row(stage), file=sys.stderr, flush=True)
    return stage


def anonymous_bytes(pid: int) -> int:
    """Returns a process's RssAnon: memory that is its own, mapped files left out."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
    return int(found[0]) * 1024 if found else 0


def stages(folder: Path, preset: str, keep: bool, archive: bool) -> Iterator[Stage]:
    """Yields what each stage took, in turn."""
    first, own, original, last = (folder / n for n in ("hf", "meshlm", "original", "hf-again"))

    def done_with(path: Path) -> None:
        if not keep:
            shutil.rmtree(path)

    yield watch("make", ["make", str(first), preset], None, folder)
    # The weights are bfloat16: what their files have, and nearly nothing else.
    weights_bytes = sum(p.stat().st_size for p in first.glob("*.safetensors"))
    load_bytes = max(int(MAX_LOAD_SHARE * weights_bytes), weights_bytes + RUNTIME_BYTES)
    for source, destination, to in ((first, own, "meshlm"), (own, original, "mtj")):
        words = ["convert", str(source), str(destination), to]
        yield watch(f"{source.name} to {destination.name}", words, MAX_CONVERT_BYTES, folder)
    for name in ("load", "generate"):
        limit = load_bytes if name == "load" else None
        yield watch(name, [name, str(own)], limit, folder)
    done_with(own)
    if archive:
        yield from archive_stages(folder, original)
    words = ["convert", str(original), str(last), "hf"]
    yield watch("original to hf-again", words, MAX_CONVERT_BYTES, folder)
    done_with(original)
    yield watch("compare", ["compare", str(first), str(last)], None, folder)


def archive_stages(folder: Path, original: Path) -> Iterator[Stage]:
    """Yields what it took to pack the original's folder, and to convert it without unpacking."""
    packed, again = folder / "original.tar.zst", folder / "meshlm-again"
    yield watch("pack", ["pack", str(original), str(packed)], None, folder)
    words = ["convert", str(packed), str(again), "meshlm"]
    yield watch("archive to meshlm", words, MAX_CONVERT_BYTES, folder)
    packed.unlink()
    shutil.rmtree(again)


def row(stage: Stage) -> str:
    limit = "" if stage.limit_bytes is None else f"{stage.limit_bytes / 1e9:.2f}"
    verdict = "" if stage.is_good else "  FAILED"
    return (
        f"{stage.name:<22}{stage.seconds:>9.1f}{stage.peak_anonymous_bytes / 1e9:>12.2f}"
        f"{limit:>10}{stage.disk_bytes / 1e9:>11.1f}{verdict}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="where to work (default: a new temporary one)")
    parser.add_argument("--keep", action="store_true", help="delete nothing")
    parser.add_argument("--archive", action="store_true", help="convert from a .tar.zst as well")
    parser.add_argument("--preset", default="gpt-j-6b", help="a smaller shape, for a trial")
    parser.add_argument("--stage", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        return run_stage(*options.stage)
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="convert-6b-", dir=options.folder))
    done: list[Stage] = []
    try:
        for stage in stages(folder, options.preset, options.keep, options.archive):
            done.append(stage)
            if stage.exit_code:
                break
    finally:
        if not options.keep:
            shutil.rmtree(folder)
    print(f"{'stage':<22}{'seconds':>9}{'peak GB':>12}{'limit':>10}{'disk GB':>11}")
    for stage in done:
        print(row(stage))
    is_good = all(stage.is_good for stage in done)
    facts = [dataclasses.asdict(stage) for stage in done]
    print(json.dumps({"preset": options.preset, "good": is_good, "stages": facts}))
    return 0 if is_good else 1


def run_stage(name: str, *words: str) -> int:
    """Runs one stage in this process."""
    paths = [Path(word) for word in words]
    if name == "make":
        make(paths[0], words[1])
    elif name == "convert":
        convert(paths[0], paths[1], words[2])
    elif name in ("compare", "pack"):
        {"compare": compare, "pack": pack}[name](*paths)
    else:
        {"load": load, "generate": generate}[name](paths[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
