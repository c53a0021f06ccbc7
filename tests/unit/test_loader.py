"""Batches: a pure function of seed and step, cut as the original cuts, each row accounted for."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.core.errors import BadInputError, UsageError
from meshlm.data.loader import Batch, BatchSource, eval_batches, parse_mixture
from meshlm.data.prepare import PrepareConfig, prepare
from meshlm.data.store import TokenStore


@dataclass(frozen=True)
class LetterTokenizer:
    """Token i stands for i bytes; 0 is end-of-text."""

    name: str = "letters"
    vocab_size: int = 1000
    end_of_text_id: int = 0
    fingerprint: str = "0123456789abcdef"

    def token_bytes(self, token: int) -> bytes:
        return b"x" * (token % 5) if token else b"<|endoftext|>"


@dataclass
class MemoryStore:
    """A token store in memory that counts what is read."""

    documents: list[list[int]]
    path: Path = Path("store")
    tokenizer: LetterTokenizer = field(default_factory=LetterTokenizer)
    reads: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = np.array([t for d in self.documents for t in [*d, 0]], np.uint16)
        lengths = [0, *(len(d) + 1 for d in self.documents)]
        self.starts = np.cumsum(lengths, dtype=np.uint64)[: len(self.documents)]

    def num_tokens(self, split: str) -> int:
        return len(self.tokens)

    def read(self, split: str, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= len(self.tokens)
        self.reads.append((start, stop))
        return self.tokens[start:stop].astype(np.int32)

    def document_starts(self, split: str) -> np.ndarray:
        return self.starts


def counting_store(count: int, path: str = "store") -> MemoryStore:
    """One document of `count` tokens with its end: token i is i + 1, the end is 0."""
    return MemoryStore([list(range(1, count))], path=Path(path))


documents = st.lists(st.lists(st.integers(1, 999), max_size=12), min_size=1, max_size=20)


def assert_same(left: Batch, right: Batch) -> None:
    for name in ("tokens", "targets", "loss_mask", "segment_ids"):
        assert np.array_equal(getattr(left, name), getattr(right, name)), name


# Rows.


def test_one_epoch_is_every_window_once_in_another_order_each_time() -> None:
    store = counting_store(1003)  # 200 windows of 5, and 3 tokens that are not used
    source = BatchSource([(store, 1.0)], seq_len=4, batch_size=10, seed=3)
    assert source.num_windows == [200]
    orders = []
    for epoch in range(3):
        rows = [source.rows(step, range(10)) for step in range(20 * epoch, 20 * (epoch + 1))]
        tokens = np.concatenate([r.tokens for r in rows])
        targets = np.concatenate([r.targets for r in rows])
        assert tokens.dtype == targets.dtype == np.int32
        assert np.array_equal(tokens[:, 1:], targets[:, :-1])
        assert np.array_equal(targets, tokens + 1)
        assert all((r.loss_mask == 1).all() and r.segment_ids is None for r in rows)
        orders.append(tuple((tokens[:, 0] - 1) // 5))
        assert sorted(tokens[:, 0]) == list(range(1, 1001, 5))
    assert len(set(orders)) == 3
    # A shuffle, not a rotation: neighbours are rarely neighbours before.
    steps = np.diff(np.array(orders[0]))
    assert Counter(steps).most_common(1)[0][1] < 20


def test_the_order_is_frozen() -> None:
    """A run that resumes under a newer Grain must see the rows that it would have seen."""
    source = BatchSource([(counting_store(160), 1.0)], seq_len=15, batch_size=10, seed=0)
    windows = [[r.start // 16 for r in source.provenance(step)] for step in range(2)]
    assert windows == FROZEN


FROZEN = [[5, 8, 9, 7, 4, 2, 1, 0, 3, 6], [6, 9, 4, 8, 0, 7, 3, 2, 1, 5]]


@settings(max_examples=50)
@given(
    text=documents,
    other=documents,
    seq_len=st.integers(1, 7),
    batch_size=st.integers(1, 8),
    seed=st.integers(0, 2**40),
    step=st.integers(0, 10**9),
    cuts=st.lists(st.integers(1, 7), max_size=3),
    mask=st.booleans(),
)
def test_any_split_over_processes_reads_the_same_batch(
    text: list[list[int]],
    other: list[list[int]],
    seq_len: int,
    batch_size: int,
    seed: int,
    step: int,
    cuts: list[int],
    mask: bool,
) -> None:
    stores = [MemoryStore([*d, [1] * 9], path=Path(n)) for n, d in (("a", text), ("b", other))]
    options = {"seq_len": seq_len, "batch_size": batch_size, "seed": seed, "document_mask": mask}
    mixture = [(stores[0], 0.7), (stores[1], 0.3)]
    whole = BatchSource(mixture, **options).rows(step, range(batch_size))
    edges = [0, *sorted({c for c in cuts if c < batch_size}), batch_size]
    for start, stop in itertools.pairwise(edges):
        for store in stores:
            store.reads.clear()
        part = BatchSource(mixture, **options).rows(step, range(start, stop))
        # Only its own rows are read.
        assert sum(len(s.reads) for s in stores) == stop - start
        assert_same(
            part,
            Batch(
                **{
                    name: None if getattr(whole, name) is None else getattr(whole, name)[start:stop]
                    for name in ("tokens", "targets", "loss_mask", "segment_ids")
                }
            ),
        )
    # Every row is where provenance says, and a whole window of seq_len + 1 tokens.
    for row, origin in enumerate(BatchSource(mixture, **options).provenance(step)):
        store = next(s for s in stores if s.path == origin.store)
        assert origin.start % (seq_len + 1) == 0
        window = store.tokens[origin.start : origin.start + seq_len + 1]
        assert np.array_equal(whole.tokens[row], window[:-1])
        assert np.array_equal(whole.targets[row], window[1:])


def test_seeds_and_stores_differ() -> None:
    def order(seed: int, store: int = 0) -> list[int]:
        stores = [(counting_store(5000, "a"), 1.0), (counting_store(5000, "b"), 1.0)]
        source = BatchSource(stores, seq_len=4, batch_size=100, seed=seed)
        return [r.start for r in source.provenance(0) if r.store.name == "ab"[store]]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0, 0) != order(0, 1)


# Mixtures.


@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=5), steps=st.integers(1, 40))
def test_every_prefix_has_the_shares_asked_for(weights: list[float], steps: int) -> None:
    stores = [(counting_store(20_000, str(i)), w) for i, w in enumerate(weights)]
    source = BatchSource(stores, seq_len=4, batch_size=7, seed=0)
    picked = [r.store.name for step in range(steps) for r in source.provenance(step)]
    counts = Counter(picked)
    for i, weight in enumerate(weights):
        share = weight / sum(weights)
        assert abs(counts[str(i)] - share * len(picked)) < len(weights)


def test_a_mixture_does_not_skip_windows_of_a_store() -> None:
    """Each store's own epochs stay whole, however its rows are interleaved."""
    stores = [(counting_store(500, "a"), 0.8), (counting_store(100, "b"), 0.2)]
    source = BatchSource(stores, seq_len=4, batch_size=5, seed=1)
    starts: dict[str, list[int]] = {"a": [], "b": []}
    for step in range(25):  # 125 rows: one epoch of 100 windows of a, and 25 of b's 20
        for origin in source.provenance(step):
            starts[origin.store.name].append(origin.start)
    assert sorted(starts["a"]) == list(range(0, 500, 5))
    assert sorted(starts["b"][:20]) == list(range(0, 100, 5))


def test_parse_mixture() -> None:
    assert parse_mixture(["A"]) == [(Path("A"), 1.0)]
    assert parse_mixture(["A=0.7", "B=0.3"]) == [(Path("A"), 0.7), (Path("B"), 0.3)]
    assert parse_mixture(["dir/A=3", "B"]) == [(Path("dir/A"), 0.75), (Path("B"), 0.25)]
    assert parse_mixture(["a=b=2"]) == [(Path("a=b"), 1.0)]


def test_stores_whose_path_holds_an_equals_sign(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("lang=en", "v=2", "w=2", "w"):
        Path(name).mkdir()
    assert parse_mixture(["lang=en", "v=2"]) == [(Path("lang=en"), 0.5), (Path("v=2"), 0.5)]
    assert parse_mixture(["lang=en=3", "v=2=1"]) == [(Path("lang=en"), 0.75), (Path("v=2"), 0.25)]
    assert parse_mixture(["w=2", "v=2=2"]) == [(Path("w"), 0.5), (Path("v=2"), 0.5)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no store given"),
        (["A=x"], "'x' is not a weight"),
        (["A="], "'' is not a weight"),
        (["=0.5"], "the path is missing"),
        ([""], "the path is missing"),
        (["A=0"], "above 0"),
        (["A=-1"], "above 0"),
        (["A=nan"], "above 0"),
        (["A=inf"], "above 0"),
        (["A=1", "A=2"], "given twice"),
        (["A=1", "./A=2"], "given twice"),
    ],
)
def test_bad_mixtures(arguments: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        parse_mixture(arguments)
    assert str(caught.value).startswith("--data")


# Document masks.


@settings(max_examples=50)
@given(text=documents, seq_len=st.integers(1, 9), seed=st.integers(0, 99))
def test_document_mask(text: list[list[int]], seq_len: int, seed: int) -> None:
    store = MemoryStore([*text, [7] * 10])
    source = BatchSource(
        [(store, 1.0)], seq_len=seq_len, batch_size=4, seed=seed, document_mask=True
    )
    batch = source.rows(0, range(4))
    assert batch.segment_ids is not None
    # Which document each token is of, said without the starts: an end-of-text ends one.
    document = np.concatenate([[0], np.cumsum(store.tokens == 0)[:-1]])
    for row, origin in enumerate(source.provenance(0)):
        window = document[origin.start : origin.start + seq_len + 1]
        assert origin.documents == range(window[0], window[-1] + 1)
        assert np.array_equal(batch.segment_ids[row], window[:-1] - window[0])
        assert np.array_equal(batch.loss_mask[row], window[1:] == window[:-1])


def test_document_starts_are_not_converted() -> None:
    """A search with a key of another type would copy them all into floats."""
    store = counting_store(200)
    store.starts = np.arange(2_000_000, dtype=np.uint64)
    source = BatchSource([(store, 1.0)], seq_len=4, batch_size=4, seed=0, document_mask=True)
    tracemalloc.start()
    source.rows(0, range(4))
    source.provenance(0)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1_000_000  # a copy of the starts has 16,000,000


# Reading ahead.


def test_iterate_is_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    source = BatchSource([(counting_store(5000), 1.0)], seq_len=9, batch_size=6, seed=5)
    iterator = source.iterate(17, range(2, 5))
    for step in range(17, 60):
        assert_same(next(iterator), source.rows(step, range(2, 5)))
    assert [t for t in threading.enumerate() if t.name.startswith("grain")]
    iterator.close()
    deadline = time.monotonic() + 10
    while [t for t in threading.enumerate() if t.name.startswith("grain")]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_error_while_reading_ahead_arrives() -> None:
    class Broken(MemoryStore):
        def read(self, split: str, start: int, stop: int) -> np.ndarray:
            raise BadInputError("train.tokens.bin is cut short")

    source = BatchSource([(Broken([[1] * 50]), 1.0)], seq_len=9, batch_size=2, seed=5)
    iterator = source.iterate(0, range(2))
    with pytest.raises(BadInputError, match="cut short"):
        next(iterator)


def test_import_and_use_say_nothing() -> None:
    """No line on a terminal, and no process is started."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import test_loader as t, os\n"
        "s = t.BatchSource([(t.counting_store(99), 1.0)], seq_len=4, batch_size=2, seed=0)\n"
        "i = s.iterate(0, range(2)); next(i); next(i); i.close()\n"
        "assert not t.Path(f'/proc/self/task/{os.getpid()}/children').read_text()\n"
    )
    folder = str(Path(__file__).parent)
    command = [sys.executable, "-W", "error", "-c", code, folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# What is refused.


def test_a_corpus_shorter_than_a_sequence() -> None:
    options = {"batch_size": 1, "seed": 0}
    with pytest.raises(BadInputError) as caught:
        BatchSource([(counting_store(8), 1.0)], seq_len=8, **options)
    message = str(caught.value)
    for words in ("8 tokens", "needs 9", "--seq-len to 7 or less", "more text", "store:"):
        assert words in message
    assert BatchSource([(counting_store(8), 1.0)], seq_len=7, **options).num_windows == [1]
    with pytest.raises(BadInputError, match="prepare more text"):
        BatchSource([(MemoryStore([[]]), 1.0)], seq_len=1, **options)


def test_different_vocabularies() -> None:
    other = LetterTokenizer(name="bpe-512", vocab_size=512, fingerprint="fedcba9876543210")
    stores = [
        (counting_store(99, "a"), 1.0),
        (MemoryStore([[1] * 99], path=Path("b"), tokenizer=other), 1.0),
    ]
    with pytest.raises(BadInputError) as caught:
        BatchSource(stores, seq_len=4, batch_size=1, seed=0)
    assert str(caught.value) == (
        "b has the vocabulary bpe-512 (512 tokens, fedcba98), but a has letters (1000 tokens, "
        "01234567); prepare both with the same --tokenizer"
    )


@pytest.mark.parametrize("bad", [{"seq_len": 0}, {"batch_size": 0}, {"seed": -1}])
def test_bad_sizes(bad: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=r"--(seq-len|batch-size|seed) (0|-1): give"):
        BatchSource(
            [(counting_store(99), 1.0)], **{"seq_len": 4, "batch_size": 1, "seed": 0, **bad}
        )


# Evaluation.


@given(text=documents, seq_len=st.integers(1, 9), batch_size=st.integers(1, 4), mask=st.booleans())
def test_eval_covers_the_split_once(
    text: list[list[int]], seq_len: int, batch_size: int, mask: bool
) -> None:
    store = MemoryStore(text)
    batches = list(
        eval_batches(store, "val", seq_len=seq_len, batch_size=batch_size, document_mask=mask)
    )
    seen = [
        (int(t), int(n))
        for b in batches
        for t, n, m in zip(
            b.batch.tokens.flat, b.batch.targets.flat, b.batch.loss_mask.flat, strict=True
        )
        if m
    ]
    pairs = [(int(a), int(b)) for a, b in itertools.pairwise(store.tokens)]
    wanted = [p for p in pairs if not (mask and p[0] == 0)]
    assert seen == wanted
    assert sum(b.num_targets for b in batches) == len(wanted)
    assert sum(b.num_bytes for b in batches) == sum(n % 5 for _, n in wanted)
    assert all(b.batch.tokens.shape == (batch_size, seq_len) for b in batches)
    assert len(batches) == -(-(len(store.tokens) - 1) // (seq_len * batch_size))


def test_eval_of_part_of_a_split_is_spread_over_it() -> None:
    store = counting_store(1000)
    options = {"seq_len": 10, "batch_size": 3}
    (batch, last) = eval_batches(store, "val", max_tokens=49, **options)
    first_tokens = [*batch.batch.tokens[:, 0], last.batch.tokens[0, 0]]
    assert first_tokens == [1, 251, 501, 751]
    assert (batch.num_targets, last.num_targets) == (30, 10)
    (one,) = eval_batches(store, "val", max_tokens=1, **options)
    assert one.num_targets == 10
    everything = list(eval_batches(store, "val", max_tokens=10**9, **options))
    assert sum(b.num_targets for b in everything) == 999


def test_eval_of_a_split_shorter_than_a_sequence() -> None:
    (only,) = eval_batches(MemoryStore([[3, 4]]), "val", seq_len=8, batch_size=2)
    assert only.batch.tokens[0].tolist() == [3, 4, 0, 0, 0, 0, 0, 0]
    assert only.batch.loss_mask.sum(axis=1).tolist() == [2, 0]
    assert (only.num_targets, only.num_bytes) == (2, 4)
    assert list(eval_batches(MemoryStore([[]]), "val", seq_len=8, batch_size=2)) == []


# A real store.


def test_a_store_on_disk(tmp_path: Path) -> None:
    """Bytes are counted against the text itself, rows against the decoded text."""
    folder = tmp_path / "texts"
    folder.mkdir()
    texts = [f"# file {i}\n" + f"def naïve_{i}(x): return '€' * {i}\n" * (i + 3) for i in range(40)]
    for i, text in enumerate(texts):
        (folder / f"{i:02}.txt").write_text(text, encoding="utf-8")
    out = tmp_path / "store"
    prepare(
        PrepareConfig(
            paths=(str(folder),), out=str(out), tokenizer="train:300", val_fraction=0.3, workers=1
        )
    )
    store = TokenStore.open(out)
    assert store.num_tokens("val") > 100
    for split in ("train", "val"):
        batches = list(eval_batches(store, split, seq_len=32, batch_size=4))
        first = store.tokenizer.token_bytes(int(store.read(split, 0, 1)[0]))
        total = sum(b.num_bytes for b in batches) + len(first)
        assert total == store.manifest.splits[split].num_bytes
    in_all = sum(store.manifest.splits[split].num_bytes for split in ("train", "val"))
    assert in_all == sum(len(text.encode()) for text in texts)
    source = BatchSource([(store, 1.0)], seq_len=16, batch_size=8, seed=0, document_mask=True)
    everything = store.tokenizer.decode(store.read("train", 0, store.num_tokens("train")).tolist())
    for step, batch in zip(range(3, 9), source.iterate(3, range(8)), strict=False):
        for row, origin in enumerate(source.provenance(step)):
            assert origin.store == out
            assert store.tokenizer.decode(batch.tokens[row].tolist()).strip("�") in everything
