"""`meshlm data prepare`: the same store however it is made, and nothing quietly lost."""

import errno
import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import zstandard
from rich.console import Console

from meshlm.core.errors import BadInputError, BusyError, MeshLMError, UsageError
from meshlm.data import journal, prepare, sample
from meshlm.data.prepare import PrepareConfig
from meshlm.data.store import TokenStore, verify_store

DRIVER = """
import resource, sys
from pathlib import Path
from meshlm.core.errors import MeshLMError
from meshlm.data import prepare, sample
if __name__ == "__main__":
    prepare._BYTES_PER_WORKER = 1
    prepare._FLUSH_EVERY_S = 0.0
    sample.SAMPLE_BYTES = 200_000
    workers, tokenizer, out, *paths = sys.argv[1:]
    code = 0
    try:
        prepare.prepare(prepare.PrepareConfig(paths=tuple(paths), out=out, tokenizer=tokenizer,
                                              workers=int(workers), val_fraction=0.1))
    except MeshLMError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    # The process's own peak: getrusage would begin with the peak of the process that started this.
    status = Path("/proc/self/status").read_text()
    print(status.split("VmHWM:")[1].split()[0])
    sys.exit(code)
"""


def run(config_paths, out, **options):
    paths = tuple(map(str, config_paths))
    return prepare.prepare(PrepareConfig(paths=paths, out=str(out), **options))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def start(folder: Path, workers: int, tokenizer: str, out: Path, *paths: Path) -> subprocess.Popen:
    (folder / "driver.py").write_text(DRIVER)
    command = [sys.executable, "driver.py", str(workers), tokenizer, out, *paths]
    return subprocess.Popen(
        list(map(str, command)),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Every kind of input, a few megabytes, with a bad document and an empty one."""
    folder = tmp_path_factory.mktemp("corpus") / "in"
    folder.mkdir()
    dice = random.Random(0)
    words = ["mesh", "Wörter", "漢字", "the", "model,", "of", "10", "def", "(x):\n", "\n\n"]
    text = [" ".join(dice.choices(words, k=dice.randint(1, 400))) for _ in range(4000)]
    lines = [
        json.dumps({"text": t, "meta": {"pile_set_name": dice.choice("abc")}}).encode()
        for t in text
    ]
    lines[17], lines[40] = b"{", b'{"text": ""}'
    zstd = zstandard.ZstdCompressor().compress
    (folder / "a.jsonl.zst").write_bytes(zstd(b"\n".join(lines[:1000])))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines[1000:2000])))
    (folder / "c.jsonl").write_bytes(b"\n".join(lines[2000:2500]))
    (folder / "long.txt").write_text("".join(text[2500:]))
    for i, part in enumerate(text[:50]):
        (folder / f"small{i}.txt").write_text(part)
    return folder


@pytest.fixture(scope="module")
def expected(corpus) -> dict[str, dict[str, bytes]]:
    result = {}
    for tokenizer in ("gpt2", "train:400"):
        out = corpus.parent / tokenizer.replace(":", "")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sample, "SAMPLE_BYTES", 200_000)
            run([corpus], out, tokenizer=tokenizer, workers=1, val_fraction=0.1)
        result[tokenizer] = contents(out)
    return result


def test_any_number_of_workers_gives_the_same_bytes(corpus, expected, tmp_path):
    process = start(tmp_path, 4, "train:400", tmp_path / "out", corpus)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    assert contents(tmp_path / "out") == expected["train:400"]
    assert len(expected["train:400"]) == 6
    verify_store(tmp_path / "out")


def _kill_and_go_on(folder: Path, workers: int, tokenizer: str, corpus: Path, kills: int) -> None:
    """Kills the work at random moments, half of them soon after a line of the journal, then lets it
    end."""
    dice = random.Random(f"{workers} {tokenizer} {kills}")
    out = folder / "out"
    written = out / "unfinished/journal.jsonl"
    for _ in range(kills):
        process = start(folder, workers, tokenizer, out, corpus)
        size = written.stat().st_size if written.exists() else 0
        until_s = time.monotonic() + dice.uniform(0.2, 1.5) + 20 * dice.randrange(2)
        while time.monotonic() < until_s and process.poll() is None:
            is_patient = until_s - time.monotonic() > 2 and written.exists()
            if is_patient and written.stat().st_size > size + 300:
                until_s = time.monotonic() + dice.uniform(0, 0.1)
            time.sleep(0.002)
        if process.poll() is not None:  # it ended before the kill came
            _, errors = process.communicate()
            assert (process.returncode, errors) == (0, "")
            break
        children = psutil.Process(process.pid).children()
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(children, timeout=20)
        for child in alive:
            child.kill()
        process.communicate()
        assert not alive  # no worker outlives its parent
        if not (out / "manifest.json").exists() and out.exists():
            with pytest.raises(BadInputError, match="run the same command again"):
                TokenStore.open(out)
    process = start(folder, workers, tokenizer, out, corpus)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")


@pytest.mark.parametrize(("workers", "tokenizer"), [(1, "train:400"), (4, "gpt2")])
def test_killed_at_random_moments_and_run_again(corpus, expected, tmp_path, workers, tokenizer):
    _kill_and_go_on(tmp_path, workers, tokenizer, corpus, 4)
    assert contents(tmp_path / "out") == expected[tokenizer]


@pytest.mark.long
@pytest.mark.parametrize("kills", range(8, 18))
def test_killed_many_times(corpus, expected, tmp_path, kills):
    workers, tokenizer = (1, 4)[kills % 2], ("gpt2", "train:400")[kills // 2 % 2]
    _kill_and_go_on(tmp_path, workers, tokenizer, corpus, kills)
    assert contents(tmp_path / "out") == expected[tokenizer]


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("tokenizer", ["gpt2", "train:400"])
def test_stopped_at_every_durable_step(corpus, expected, tmp_path, monkeypatch, tokenizer):
    """Stops before each fsync, rename and removal in turn, one run after another."""
    monkeypatch.setattr(prepare, "_FLUSH_EVERY_S", 0.0)
    monkeypatch.setattr(sample, "SAMPLE_BYTES", 200_000)
    real = {name: getattr(os, name) for name in ("fsync", "replace", "unlink")}
    left = [0]

    def stopping(name):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise _KilledError
            return real[name](*args, **kwargs)

        return call

    for name in real:
        monkeypatch.setattr(os, name, stopping(name))
    for step in range(3, 10_000, 4):  # further on each time, so that it ends
        left[0] = step
        try:
            run([corpus], tmp_path / "out", tokenizer=tokenizer, workers=1, val_fraction=0.1)
        except _KilledError:
            continue
        break
    assert step > 3
    monkeypatch.undo()
    assert contents(tmp_path / "out") == expected[tokenizer]


def test_stopped_again_and_again_when_all_but_the_manifest_is_there(
    corpus, expected, tmp_path, monkeypatch
):
    """A regression: the second stop there once made the third run begin anew, behind what was
    there."""

    def stop(*_):
        raise _KilledError

    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(prepare.Judge, "check_result", stop)
            with pytest.raises(_KilledError):
                run([corpus], tmp_path / "out", workers=1, val_fraction=0.1)
    run([corpus], tmp_path / "out", workers=1, val_fraction=0.1)
    assert contents(tmp_path / "out") == expected["gpt2"]


def test_a_damaged_or_foreign_journal_is_named(corpus, tmp_path):
    out = tmp_path / "out"
    (out / "unfinished").mkdir(parents=True)
    (out / "unfinished/tokenizer.json").write_text("{}")
    (out / "unfinished/journal.jsonl").write_text("{\n")
    with pytest.raises(BadInputError, match=r"journal\.jsonl: damaged"):
        run([corpus], out)
    with pytest.raises(BadInputError, match="unfinished: run the same command again"):
        TokenStore.open(out)


def _interrupted(monkeypatch, paths, out, **options) -> None:
    """Leaves `out` as a kill after the first flush would."""
    monkeypatch.setattr(prepare, "_FLUSH_EVERY_S", 0.0)
    flush = journal.Appender.flush

    def stop(self):
        flush(self)
        raise _KilledError

    with monkeypatch.context() as patch:
        patch.setattr(journal.Appender, "flush", stop)
        with pytest.raises(_KilledError):
            run(paths, out, workers=1, **options)


def test_other_inputs_or_options_than_those_begun_with_are_refused(corpus, tmp_path, monkeypatch):
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_text('{"text": "some words"}\n' * 100_000)
    _interrupted(monkeypatch, [path], out)
    with pytest.raises(UsageError, match=r"--val-fraction was 0\.01, now 0\.5"):
        run([path], out, val_fraction=0.5)
    with pytest.raises(UsageError, match="1 input files, now 2"):
        run([path, corpus / "c.jsonl"], out)
    whole = path.read_text()
    path.write_text(whole.replace("some", "soma"))
    with pytest.raises(BadInputError, match="changed since"):
        run([path], out)
    path.write_text(whole + "\n")
    with pytest.raises(UsageError, match="had 2300000 bytes, now 2300001"):
        run([path], out)
    run([path], out, force=True)
    run([path], tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_file_changed_after_it_was_read_is_refused(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).write_text(f"text {name} " * 200_000)
    paths, out = [tmp_path / "a", tmp_path / "b"], tmp_path / "out"
    monkeypatch.setattr("meshlm.data.batches._BATCH_BYTES", 1)
    append, count = journal.Appender.append, []

    def stop(self, *args):
        append(self, *args)
        self.flush()
        count.append(args)
        if len(count) == 3:  # the second file has begun
            raise _KilledError

    with monkeypatch.context() as patch:
        patch.setattr(journal.Appender, "append", stop)
        with pytest.raises(_KilledError):
            run(paths, out, workers=1)
    text = paths[0].read_text()
    paths[0].write_text(text.replace("text a", "text c"))
    with pytest.raises(BadInputError, match="a: the file changed"):
        run(paths, out)
    paths[0].write_text(text)  # as it was, at another time
    run(paths, out)
    verify_store(out)


def test_a_finished_store(tmp_path):
    path, out = tmp_path / "a.txt", tmp_path / "out"
    path.write_text("one")
    first = run([path], out)
    printed = io.StringIO()
    config = PrepareConfig(paths=(str(path),), out=str(out))
    assert prepare.prepare(config, Console(file=printed)) == first
    assert "already done" in printed.getvalue()
    with pytest.raises(UsageError, match=r"--tokenizer was.*--force"):
        run([path], out, tokenizer="train:257")
    path.write_text("two")
    with pytest.raises(UsageError, match=r"the content of .*a\.txt changed.*--force"):
        run([path], out)
    run([path], out, force=True)
    assert TokenStore.open(out).tokenizer.decode(TokenStore.open(out).read("train", 0, 1)) == "two"


def test_folders_and_files_in_the_way(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="thesis"):
        run([tmp_path / "a.txt"], tmp_path / "mine", force=True)
    with pytest.raises(UsageError, match="a file is there"):
        run([tmp_path / "a.txt"], tmp_path / "a.txt")


def test_a_full_disk_is_said_and_the_work_goes_on(corpus, expected, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(journal.Appender, "flush", full)
        with pytest.raises(MeshLMError, match=r"No space left on device.*same command again"):
            run([corpus], tmp_path / "out", workers=1, val_fraction=0.1)
    run([corpus], tmp_path / "out", workers=1, val_fraction=0.1)
    assert contents(tmp_path / "out") == expected["gpt2"]


def test_two_at_once(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    with (
        journal.Workspace(tmp_path / "out"),
        pytest.raises(BusyError, match="another"),
    ):
        run([tmp_path / "a.txt"], tmp_path / "out")
    run([tmp_path / "a.txt"], tmp_path / "out")


def _jsonl(path: Path, total: int, bad: dict[int, bytes]) -> Path:
    path.write_bytes(b"\n".join(bad.get(i, b'{"text": "x"}') for i in range(1, total + 1)))
    return path


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"[1]", "no text"),
        (b"{}", "no text"),
        (b'{"text": 3}', "no text"),
        (b'{"text": "a', "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "not JSON"),
        (b'{"text": "a", "k": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "JSON nested too deep"),
    ],
)
def test_bad_documents_are_counted_and_named(tmp_path, line, reason):
    path = _jsonl(tmp_path / "a.jsonl", 10, {3: line})
    with pytest.raises(BadInputError, match=rf"1 of 10 documents.*a\.jsonl:3: {reason}"):
        run([path], tmp_path / "out")
    manifest = run([path], tmp_path / "out", max_bad_documents=0.1)
    assert manifest.num_bad_documents == 1
    assert f"a.jsonl:3: {reason}" in manifest.bad_documents[0]
    assert sum(c.num_documents for c in manifest.splits.values()) == 9


@pytest.mark.parametrize(
    ("total", "bad", "fails"),
    [
        (999, [1], True),  # judged at the end
        (1000, [1], False),  # just 0.1 %
        (5000, [1, 2], True),  # at the 1,000th
        (5000, [1, 2000], False),
        (5000, [1, 1999], True),  # 2 of 1,999
        (5000, [1001], False),
    ],
)
def test_the_share_of_bad_documents_is_judged_as_promised(tmp_path, monkeypatch, total, bad, fails):
    path = _jsonl(tmp_path / "a.jsonl", total, dict.fromkeys(bad, b"?"))
    for batch_records in (10_000, 700):
        monkeypatch.setattr("meshlm.data.batches._BATCH_RECORDS", batch_records)
        if fails:
            with pytest.raises(BadInputError, match=r"documents are bad.*a\.jsonl:"):
                run([path], tmp_path / "out", force=True)
        else:
            assert run([path], tmp_path / "out", force=True).num_bad_documents == len(bad)


@pytest.mark.parametrize("data", [b"", b"\n\n", b'{"text": ""}\n'])
def test_no_text_is_an_error_and_no_store(tmp_path, data):
    (tmp_path / "a.jsonl").write_bytes(data)
    for tokenizer in ("gpt2", "train:300"):
        with pytest.raises(BadInputError, match="no "):
            run([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer=tokenizer, force=True)
        assert not (tmp_path / "out/manifest.json").exists()


def test_a_short_text_is_said(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    printed = io.StringIO()
    config = PrepareConfig(paths=(str(tmp_path / "a.txt"),), out=str(tmp_path / "out"))
    prepare.prepare(config, Console(file=printed))
    assert "only 2 tokens" in printed.getvalue()
    assert "validation" in printed.getvalue()


def test_truncated_input_needs_leave_each_time(tmp_path, monkeypatch):
    path, out = tmp_path / "a.jsonl.gz", tmp_path / "out"
    data = gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(50_000)))
    path.write_bytes(data[:-100])
    with pytest.raises(BadInputError, match=r"a\.jsonl\.gz.*truncated.*--allow-truncated"):
        run([path], out)
    manifest = run([path], out, allow_truncated=True)
    assert manifest.sources[0].truncated
    assert sum(c.num_documents for c in manifest.splits.values()) > 49_000


def test_sets_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "MAX_SETS", 3)
    line = '{"text": "x", "meta": {"pile_set_name": "%d"}}\n'
    (tmp_path / "a.jsonl").write_text("".join(line % (i % 9) for i in range(90)))
    manifest = run([tmp_path / "a.jsonl"], tmp_path / "out")
    assert list(manifest.sets) == ["0", "1", "2", "(other)"]
    assert sum(c.num_documents for c in manifest.sets["(other)"].values()) == 60


def test_validation_documents_do_not_depend_on_the_other_documents(tmp_path):
    texts = [f"document {i}" for i in range(300)]
    held = []
    for order in (texts, texts[:1] + texts[:0:-1]):
        lines = "".join(json.dumps({"text": t}) + "\n" for t in order)
        (tmp_path / "a.jsonl").write_text(lines)
        run([tmp_path / "a.jsonl"], tmp_path / "out", val_fraction=0.3, force=True)
        store = TokenStore.open(tmp_path / "out")
        whole = store.tokenizer.decode(store.read("val", 0, store.num_tokens("val")).tolist())
        held.append(set(whole.split("<|endoftext|>")))
    assert held[0] == held[1]
    assert 60 < len(held[0]) < 120


def test_the_tokenizer_learns_from_a_bounded_sample_of_training_documents(monkeypatch):
    monkeypatch.setattr(sample, "SAMPLE_BYTES", 1000)
    texts = [f"document {i} " + "x" * (i % 50) for i in range(300)]
    records = [
        (0, prepare.Record(f":{i}", i, json.dumps({"text": t}).encode()))
        for i, t in enumerate(texts)
    ]
    chosen = sample.sample_texts(records, 0.2)
    size = sum(map(len, chosen))
    assert 1000 <= size < 1100
    assert sorted(sample.sample_texts(records[::-1], 0.2)) == sorted(chosen)


@pytest.mark.parametrize(
    ("number", "workers", "code"), [(signal.SIGTERM, 2, 75), (signal.SIGINT, 1, 130)]
)
def test_a_signal_stops_with_its_exit_code(corpus, expected, tmp_path, number, workers, code):
    out = tmp_path / "out"
    process = start(tmp_path, workers, "gpt2", out, corpus)
    journal_file = out / "unfinished/journal.jsonl"
    deadline = time.monotonic() + 60
    while not (journal_file.exists() and journal_file.read_bytes().count(b"\n") > 1):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors == "stopped; the same command goes on from here\n"
    run([corpus], out, val_fraction=0.1)
    assert contents(out) == expected["gpt2"]


def _peak_mb(folder: Path, *paths: Path, code: int) -> float:
    process = start(folder, 1, "gpt2", folder / "out", *paths)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    return int(printed) / 1000


def test_bombs_and_endless_lines_need_no_memory(tmp_path):
    zstd = zstandard.ZstdCompressor(level=3)
    (tmp_path / "ok.jsonl").write_text('{"text": "x"}\n')
    base_mb = _peak_mb(tmp_path, tmp_path / "ok.jsonl", code=0)
    blocks = zstd.compressobj()
    bomb = tmp_path / "bomb.jsonl.zst"
    with open(bomb, "wb") as file:
        file.write(blocks.compress(b'{"text": "'))
        for _ in range(1024):
            file.write(blocks.compress(b"a" * (1 << 20)))
        file.write(blocks.compress(b'"}\n') + blocks.flush())
    assert bomb.stat().st_size * 8000 < 1 << 30
    # One line of a gibibyte, from a file of a ten-thousandth: one document, bad, so no text at all.
    (tmp_path / "out").rename(tmp_path / "done")
    assert _peak_mb(tmp_path, bomb, code=3) < base_mb + 120


@pytest.mark.parametrize(
    "options",
    [
        {"val_fraction": 1.0},
        {"val_fraction": float("nan")},
        {"max_bad_documents": -0.1},
        {"workers": 0},
        {"tokenizer": "train:"},
        {"tokenizer": "train:12"},
        {"tokenizer": "no/such/file"},
    ],
)
def test_nonsense_options_are_usage_errors(tmp_path, options):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UsageError):
        run([tmp_path / "a.txt"], tmp_path / "out", **options)
