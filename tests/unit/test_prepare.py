"""`meshlm data prepare`: the same store however it is made, and nothing quietly lost."""

import errno
import gzip
import io
import json
import os
import random
import re
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
from meshlm.data import batches, journal, prepare, sample
from meshlm.data.inspection import render
from meshlm.data.names import from_json_name
from meshlm.data.parsing import Parser
from meshlm.data.prepare import PrepareConfig
from meshlm.data.records import Record
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

    def stop(*_, **__):
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
        (b'{"text": 3, ', "not JSON"),
        (b'{"text": 3, "k": "\xff"}', "not UTF-8"),
        (b'{"text": 3, "k": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "JSON nested too deep"),
        (b'{"text": "a', "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "a \\u escape is half of a UTF-16 pair"),
        (b'{"text": "a", "k": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "JSON nested too deep"),
    ],
)
def test_bad_documents_are_counted_and_named(tmp_path, line, reason):
    path = _jsonl(tmp_path / "a.jsonl", 10, {3: line})
    with pytest.raises(BadInputError, match=rf"1 of 10 documents.*a\.jsonl:3: {re.escape(reason)}"):
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
        (0, Record(f":{i}", i, json.dumps({"text": t}).encode())) for i, t in enumerate(texts)
    ]
    chosen = sample.sample_texts(records, Parser(), 0.2)
    size = sum(map(len, chosen))
    assert 1000 <= size < 1100
    assert sorted(sample.sample_texts(records[::-1], Parser(), 0.2)) == sorted(chosen)


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
        {"text_field": ""},
        {"text_field": "caf\udce9"},
        {"split_on": "\udce9"},
    ],
)
def test_nonsense_options_are_usage_errors(tmp_path, options):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UsageError):
        run([tmp_path / "a.txt"], tmp_path / "out", **options)


def printed_by(*paths, out, **options) -> str:
    printed = io.StringIO()
    config = PrepareConfig(paths=tuple(map(str, paths)), out=str(out), **options)
    prepare.prepare(config, Console(file=printed, width=500))
    return printed.getvalue()


def test_the_same_input_in_another_spelling_is_recognised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = '{"text": "some words"}\n' * 3
    Path("a.jsonl").write_text(lines)
    Path("b.jsonl").write_text(lines.replace("some", "more"))
    first = run(["a.jsonl", "b.jsonl"], "out")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/link.jsonl").symlink_to("../a.jsonl")
    for a in ("./a.jsonl", tmp_path / "a.jsonl", "in/../a.jsonl", "in/link.jsonl"):
        assert run([a, "b.jsonl"], "out") == first
    monkeypatch.chdir(tmp_path / "in")
    assert run(["../a.jsonl", "../b.jsonl"], "../out") == first
    with pytest.raises(UsageError, match=r"the content of \.\./b\.jsonl changed"):
        run(["../b.jsonl", "../a.jsonl"], "../out")
    Path("a.txt").write_text(lines)
    with pytest.raises(UsageError, match=r"input a\.jsonl is now a\.txt"):
        run(["a.txt", "../b.jsonl"], "../out")


def test_interrupted_work_goes_on_in_another_spelling_but_not_on_other_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        Path(name).write_text(f"text {name} " * 200_000)
        os.utime(name, ns=(10**18, 10**18))  # as files that were unpacked together have them
    paths = ["a", "b"]
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
            run(paths, "out", workers=1)
    with pytest.raises(BadInputError, match="b: the file changed"):
        run(["b", "a"], "out", workers=1)
    run([tmp_path / "a", "./b"], "out", workers=1)
    run(paths, "fresh", workers=1)
    assert Path("out/train.tokens.bin").read_bytes() == Path("fresh/train.tokens.bin").read_bytes()


@pytest.mark.parametrize(
    "options", [{"text_field": "content"}, {"split_on": "|"}, {"split_on": ""}, {"format": "json"}]
)
def test_options_of_reading_belong_to_a_store(tmp_path, monkeypatch, options):
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_text('{"text": "a|b", "content": "c|d"}\n' * 300)
    monkeypatch.setattr("meshlm.data.batches._BATCH_RECORDS", 100)
    name, value = next(iter(options.items()))
    option = f"--{name.replace('_', '-')}"
    _interrupted(monkeypatch, [path], out, **options)
    with pytest.raises(UsageError, match=rf"{option} was {re.escape(value)}, now not given"):
        run([path], out)
    manifest = run([path], out, **options)
    assert manifest == run([path], tmp_path / "fresh", **options)
    assert contents(out) == contents(tmp_path / "fresh")
    assert manifest.options[name] == value
    assert run([path], out, **options) == manifest
    with pytest.raises(UsageError, match=rf"{option} was {re.escape(value)}, now not given"):
        run([path], out)
    run([path], out, force=True)
    with pytest.raises(UsageError, match=rf"{option} was not given, now {re.escape(value)}"):
        run([path], out, **options)


def test_work_that_another_version_began_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "some words"}\n' * 20_000)
    _interrupted(monkeypatch, [tmp_path / "a.jsonl"], tmp_path / "out")
    monkeypatch.setattr(prepare, "RULES", prepare.RULES + 1)
    with pytest.raises(UsageError, match=r"begun by another version.*--force"):
        run([tmp_path / "a.jsonl"], tmp_path / "out")


def test_manifests_of_before_are_read(tmp_path):
    """Without kinds and with `binary`, as the first stores of format 1 have it."""
    (tmp_path / "a.txt").write_text("one")
    first = run([tmp_path / "a.txt"], tmp_path / "out")
    path = tmp_path / "out/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["left_out"]
    for source in manifest["sources"]:
        del source["kind"], source["note"]
        source["binary"] = False
    path.write_text(json.dumps(manifest))
    again = run([tmp_path / "a.txt"], tmp_path / "out")
    assert again.splits == first.splits
    verify_store(tmp_path / "out")


def test_names_that_are_not_utf8_are_kept_and_shown(tmp_path, monkeypatch):
    name = os.fsdecode(b"caf\xe9\n.txt")
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / name).write_text("words of a text\n" * 100_000)
    (folder / os.fsdecode(b"\xff.npy")).write_bytes(b"\x93NUMPY\0")
    _interrupted(monkeypatch, [folder], tmp_path / "out")
    printed = printed_by(folder, out=tmp_path / "out")
    assert "in/\\xff.npy: a NumPy array" in printed
    assert "going on at input file" in printed
    manifest = TokenStore.open(tmp_path / "out").manifest
    assert [from_json_name(s.path) for s in manifest.sources] == [
        str(folder / name),
        str(folder / os.fsdecode(b"\xff.npy")),
    ]
    assert from_json_name(manifest.left_out[0].path) == str(folder / os.fsdecode(b"\xff.npy"))
    assert "caf\\xe9" in render(TokenStore.open(tmp_path / "out"), 1)
    run([folder], tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert "already done" in printed_by(folder, out=tmp_path / "out")


def test_what_was_read_and_left_out_is_said(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(25):
        (folder / f"{i:02}.bin").write_bytes(b"\0\1")
    (folder / "c4.json.gz").write_bytes(gzip.compress(b'{"text": "words"}\n' * 3))
    (folder / "tales.txt").write_text("one<|endoftext|>two")
    printed = printed_by(folder, out=tmp_path / "out").splitlines()
    assert "files by kind: 1 JSON lines, 1 text" in printed
    assert f"{folder}/c4.json.gz: read as JSON lines" in printed
    split = f"{folder}/tales.txt: split at each <|endoftext|> (--split-on '' keeps it one text)"
    assert split in printed
    named = [line for line in printed if line.startswith("left out: /")]
    assert named == [f"left out: {folder}/{i:02}.bin: binary: byte 0 is NUL" for i in range(20)]
    assert "and 5 more; the manifest has all of them" in printed
    manifest = TokenStore.open(tmp_path / "out").manifest
    assert [o.path for o in manifest.left_out] == [f"{folder}/{i:02}.bin" for i in range(25)]
    assert {s.kind for s in manifest.sources} == {"left out", "jsonl", "text"}
    assert sum(c.num_documents for c in manifest.splits.values()) == 5
    assert printed[-1].endswith("10 tokens in 5 documents to train on, 0 in 0 for validation")
    inspected = render(TokenStore.open(tmp_path / "out"), 0)
    assert "left out: 25 files, members or folders\n" in inspected
    assert inspected.endswith("and 15 more (--json has all)")


def test_end_of_text_and_byte_order_marks_within_fields_are_counted(tmp_path):
    rows = [{"text": "one<|endoftext|>two"}, {"text": "a\ufeffb"}, {"text": "plain"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    printed = printed_by(path, out=tmp_path / "out")
    assert "<|endoftext|> is written out in 1 documents" in printed
    assert "--split-on '<|endoftext|>'" in printed
    assert "1 documents hold a byte-order mark (U+FEFF)" in printed
    options = {"split_on": "<|endoftext|>", "force": True, "val_fraction": 0.0}
    printed = printed_by(path, out=tmp_path / "out", **options)
    assert "written out" not in printed
    store = TokenStore.open(tmp_path / "out")
    text = store.tokenizer.decode(store.read("train", 0, store.num_tokens("train")).tolist())
    assert text == "one<|endoftext|>two<|endoftext|>a\ufeffb<|endoftext|>plain<|endoftext|>"
    assert store.read("train", 0, store.num_tokens("train")).tolist().count(50256) == 4


def test_documents_of_one_field_are_held_out_alone(tmp_path):
    """Of the very first field only the first document is kept for training whatever its hash."""
    texts = [f"document {i}" for i in range(300)]
    held = []
    for name, data in [
        ("a.jsonl", json.dumps({"text": "|".join(texts)})),
        ("b.txt", "|".join(texts)),
        ("c.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in texts)),
    ]:
        (tmp_path / name).write_text(data)
        run([tmp_path / name], tmp_path / "out", val_fraction=0.3, split_on="|", force=True)
        held.append((tmp_path / "out/val.tokens.bin").read_bytes())
    assert held[0] == held[1] == held[2]
    assert len(held[0]) > 60


@pytest.mark.parametrize(
    ("separator", "hint"),
    [
        ("\n\n", r"; files with Windows' line ends have \r\n"),
        ("\\n", r"; a shell writes"),
        ("~", ""),
    ],
)
def test_a_separator_that_splits_nothing_is_said(tmp_path, separator, hint):
    said = io.StringIO()
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\ntwo\r\n")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}')
    config = PrepareConfig(
        paths=(str(tmp_path),), out=str(tmp_path / "out"), split_on=separator, val_fraction=0.0
    )
    prepare.prepare(config, Console(file=said))
    assert f"stands between no two texts, so nothing was split{hint}" in said.getvalue()


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_separator_that_splits_is_not_talked_about(tmp_path, name):
    said = io.StringIO()
    (tmp_path / name).write_text('{"text": "one~two"}')
    config = PrepareConfig(
        paths=(str(tmp_path / name),), out=str(tmp_path / "out"), split_on="~", val_fraction=0.0
    )
    prepare.prepare(config, Console(file=said))
    assert "nothing was split" not in said.getvalue()


def test_an_input_that_cannot_be_read_again_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("words")
    run([tmp_path / "a.txt"], tmp_path / "out", val_fraction=0.0)

    def fails(_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(batches, "hash_file", fails)
    with pytest.raises(UsageError, match=r"a\.txt: cannot read it \(Permission denied\)"):
        run([tmp_path / "a.txt"], tmp_path / "out", val_fraction=0.0)


def test_a_size_of_many_digits_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(UsageError, match="no size has so many digits"):
        run([tmp_path / "a.txt"], tmp_path / "out", tokenizer="train:" + "9" * 5000)


def test_names_in_what_inspect_prints_are_one_line(tmp_path):
    (tmp_path / "a\n\x1b[31m.txt").write_text("words")
    run([tmp_path / "a\n\x1b[31m.txt"], tmp_path / "out", val_fraction=0.0)
    assert r"a\n\x1b[31m.txt: " in render(TokenStore.open(tmp_path / "out"), 0)
