"""`meshlm data prepare`: input files become a token store.

One process reads the files in order and cuts their records into batches; the workers encode
batches; the first process appends the results in order. So the store does not depend on the number
of workers, nor on where the work was interrupted.
"""

import dataclasses
import functools
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from rich.console import Console
from tyro.conf import Positional

from meshlm.core import files
from meshlm.core.errors import MeshLMError, StoppedError, UsageError
from meshlm.data.batches import Batch, check_ended, hash_input, read_batches
from meshlm.data.display import Display
from meshlm.data.encode import Encoded, Submit, encoders
from meshlm.data.inputs import Inputs, LeftOut, find_inputs
from meshlm.data.journal import Appender, Plan, Position, Totals, Workspace, split_counts
from meshlm.data.judging import Judge
from meshlm.data.kinds import Format
from meshlm.data.names import printable, to_json_name
from meshlm.data.parsing import Parser
from meshlm.data.readers import RULES, Reading
from meshlm.data.records import Record
from meshlm.data.sample import train_on_sample
from meshlm.data.store import (
    FORMAT,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    SPLITS,
    TOKENIZER,
    UNFINISHED,
    VERSION,
    Counts,
    Manifest,
    Source,
    TokenizerEntry,
    documents_file,
    hash_file,
    parse_manifest,
    token_dtype,
    tokens_file,
)
from meshlm.data.tokenizer import Tokenizer, from_json
from meshlm.data.tokenizer_folder import read_tokenizer
from meshlm.data.tokenizer_json import SpecialTokenMode

_DATA_FILES = tuple(name for s in SPLITS for name in (tokens_file(s), documents_file(s)))
_FLUSH_EVERY_S = 5.0
_WAITING_BYTES = 64 << 20
_MAX_DIGITS = 20
_BYTES_PER_WORKER = 2 << 20  # of input: starting a process costs as much as encoding this


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Turn text into a token store, which `meshlm train` reads."""

    paths: Positional[tuple[str, ...]]
    """Files, folders, patterns: text, JSON lines or lists, parquet, Arrow, tar; also compressed."""
    out: str
    """Folder of the token store."""
    tokenizer: str = "gpt2"
    """gpt2, a tokenizer.json or its folder, or train:VOCAB_SIZE to learn one from the input."""
    special_tokens: SpecialTokenMode | None = None
    """Whether <|endoftext|> and other special tokens in the texts become tokens (parse) or stay
    text. [parse for a tokenizer.json or its folder, else text]"""
    text_field: str = "text"
    """Field of JSON, or column of a table, that holds the text; a dot goes one level down."""
    split_on: str | None = None
    """Separator between documents in a text or field; by default files of text are split at
    <|endoftext|>; '' splits nothing."""
    format: Format = "auto"
    """What files hold that are no tables and no archives: text, json, or what they look like."""
    val_fraction: float = 0.01
    """Share of the documents held out for validation, chosen by a hash of their text."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """At most so many processes encode; the store does not depend on it."""
    max_bad_documents: float = 0.001
    """Share of unreadable documents above which the work ends with exit code 3."""
    allow_truncated: bool = False
    """Use what is there of a compressed file or an archive that stops too early."""
    force: bool = False
    """Replace the store, or the unfinished work, that is at `out`."""

    @property
    def reading(self) -> Reading:
        """How the input files are read."""
        return Reading(
            text_field=self.text_field,
            split_on=self.split_on,
            format=self.format,
            allow_truncated=self.allow_truncated,
        )

    def __post_init__(self) -> None:
        for name, value in (("text-field", self.text_field), ("split-on", self.split_on)):
            if value is not None and not value.isprintable() and _is_not_utf8(value):
                raise UsageError(f"--{name} {value!r} is not UTF-8")
        if not self.text_field:
            raise UsageError("--text-field is empty: name a field, for example content")
        if not 0 <= self.val_fraction < 1:
            raise UsageError(
                f"--val-fraction {self.val_fraction} is not in 0 .. 1 (without 1): 0.01 is usual"
            )
        if not 0 <= self.max_bad_documents <= 1:
            raise UsageError(
                f"--max-bad-documents {self.max_bad_documents} is not in 0 .. 1: 0.001 is 0.1 %"
            )
        if not 1 <= self.workers <= 1024:
            raise UsageError(f"--workers {self.workers} is not in 1 .. 1024")


def _given_tokenizer(config: PrepareConfig) -> Tokenizer:
    """The tokenizer that is named, with the mode that is asked for or its origin's."""
    tokenizer, declared = read_tokenizer(config.tokenizer)
    return tokenizer.with_special_tokens(config.special_tokens or declared.mode)


def _is_not_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _options(config: PrepareConfig, tokenizer: Tokenizer | None) -> dict[str, str | float]:
    """The options that change the store; those on reading only where they are not the default."""
    chosen = {
        "text_field": config.text_field,
        "split_on": config.split_on,
        "format": config.format,
        "special_tokens": tokenizer.special_tokens if tokenizer else config.special_tokens,
    }
    defaults = {"text_field": "text", "split_on": None, "format": "auto", "special_tokens": "text"}
    return {
        "tokenizer": tokenizer.fingerprint if tokenizer else config.tokenizer,
        "val_fraction": config.val_fraction,
        **{name: v for name, v in chosen.items() if v is not None and v != defaults[name]},
    }


def prepare(config: PrepareConfig, console: Console | None = None) -> Manifest:
    """The manifest of the finished store at `config.out`; work that was interrupted there goes on.

    Args:
        console: where progress and notes go; None for nowhere.

    Raises:
        UsageError: a path or option is wrong, or another store is there already.
        BadInputError: the input cannot be used, or changed since the work began.
        BusyError: another process makes this store.
        MeshLMError: the disk is full, or a worker was killed; the same call goes on.
        StoppedError: SIGTERM or SIGINT; the same call goes on.
    """
    console = console or Console(quiet=True)
    out = Path(config.out)
    inputs = find_inputs(config.paths, exclude=out)
    size = _vocab_size_to_learn(config)
    given = _given_tokenizer(config) if size is None else None
    plan = Plan(
        options=_options(config, given),
        inputs=[(to_json_name(file.path), file.size_bytes) for file in inputs.files],
        rules=RULES,
    )
    _check_folder(out)
    try:
        return _make(config, inputs, plan, given, size, out, console)
    except OSError as error:
        raise MeshLMError(
            f"{out}: cannot write there ({error.strerror}): "
            "make room, then run the same command again"
        ) from error


def _make(
    config: PrepareConfig,
    inputs: Inputs,
    plan: Plan,
    given: Tokenizer | None,
    vocab_size: int | None,
    out: Path,
    console: Console,
) -> Manifest:
    with Workspace(out) as workspace, _stopped_by_signals():
        finished = None if config.force else _finished(plan, inputs, out)
        if finished:
            workspace.remove()
            console.print(f"{out}: already done with these inputs and options", soft_wrap=True)
            return finished
        _begin_or_go_on(config, plan, workspace)
        ready = workspace.path / MANIFEST
        if not ready.exists():
            work = _Preparation(config, inputs, workspace, console)
            manifest = work.run(plan, given, vocab_size)
            files.replace(ready, msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
        manifest = _publish(out, workspace)
        console.print(_result(out, manifest), highlight=False, markup=False, soft_wrap=True)
        return manifest


def _result(out: Path, manifest: Manifest) -> str:
    train, val = (manifest.splits[split] for split in SPLITS)
    return printable(
        f"{out}: {train.num_tokens:,} tokens in {train.num_documents:,} documents to train on, "
        f"{val.num_tokens:,} in {val.num_documents:,} for validation"
    )


def _vocab_size_to_learn(config: PrepareConfig) -> int | None:
    if not config.tokenizer.startswith("train:"):
        return None
    size = config.tokenizer.removeprefix("train:")
    if not (size.isascii() and size.isdigit()):
        raise UsageError(f"--tokenizer {config.tokenizer}: give a size, for example train:4096")
    if len(size) > _MAX_DIGITS:  # int() has a limit of its own
        raise UsageError(f"--tokenizer train:{size[:_MAX_DIGITS]}...: no size has so many digits")
    return int(size)


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: a file is there; --out names a folder")
    known = {MANIFEST, TOKENIZER, UNFINISHED, *_DATA_FILES}
    names = [p.name for p in out.iterdir()] if out.exists() else []
    strange = sorted(n for n in names if n not in known and not files.is_litter(n))
    if strange:
        raise UsageError(f"{out}: holds {strange[0]}; --out wants a folder of its own")


def _finished(plan: Plan, inputs: Inputs, out: Path) -> Manifest | None:
    """The manifest of the store at `out` if it is of `plan`, None if there is no store."""
    path = out / MANIFEST
    if not path.exists():
        return None
    manifest = parse_manifest(files.read(path, MAX_MANIFEST_BYTES), path)
    before = [(source.path, source.num_bytes) for source in manifest.sources]
    difference = Plan(options=manifest.options, inputs=before).difference(plan)
    if difference is None:
        for file, source in zip(inputs.files, manifest.sources, strict=True):
            if hash_input(file.path) != source.sha256:
                difference = f"the content of {file.path} changed"
                break
    if difference:
        raise UsageError(
            f"{out}: another token store is there ({difference}): "
            "give another --out, or replace it with --force"
        )
    return manifest


def _begin_or_go_on(config: PrepareConfig, plan: Plan, workspace: Workspace) -> None:
    found = workspace.read_plan()
    difference = found.difference(plan) if found else None
    if found and not difference and found.rules != plan.rules:
        difference = "it was begun by another version of meshlm"
    if difference and not config.force:
        raise UsageError(
            f"{workspace.path.parent}: unfinished work of another kind is there ({difference}): "
            "run the command it began with, or begin again with --force"
        )
    if found is None or difference:
        workspace.begin(plan)


def _publish(out: Path, workspace: Workspace) -> Manifest:
    """Moves the finished files to their place, the manifest last; a kill between leaves the rest to
    the next run."""
    ready = workspace.path / MANIFEST
    manifest = parse_manifest(files.read(ready, MAX_MANIFEST_BYTES), ready)
    (out / MANIFEST).unlink(missing_ok=True)
    files.sync_folder(out)
    for name in manifest.files:
        if (workspace.path / name).exists():
            os.replace(workspace.path / name, out / name)
    files.sync_folder(out)
    os.replace(ready, out / MANIFEST)
    files.sync_folder(out)
    workspace.remove()
    return manifest


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    codes: dict[int, int] = {signal.SIGTERM: 75, signal.SIGINT: 130}

    def stop(number: int, _: object) -> None:
        raise StoppedError("stopped; the same command goes on from here", codes[number])

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in codes}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Preparation:
    """One run of the work, from wherever an earlier one stopped, to the manifest."""

    def __init__(
        self,
        config: PrepareConfig,
        inputs: Inputs,
        workspace: Workspace,
        console: Console,
    ) -> None:
        self._config, self._inputs, self._left_out = config, inputs.files, inputs.left_out
        self._folder, self._workspace, self._console = workspace.path, workspace, console
        self._input_bytes = sum(file.size_bytes for file in inputs.files)
        self._judge = Judge(config.max_bad_documents, config.val_fraction, self._inputs)

    def run(self, plan: Plan, given: Tokenizer | None, vocab_size: int | None) -> Manifest:
        """The manifest of the files in the workspace, which are whole then."""
        path = self._folder / TOKENIZER
        if path.exists():
            tokenizer = given or from_json(files.read(path))
        else:
            tokenizer = given or self._learn(vocab_size or 0)
            files.replace(path, tokenizer.to_json())
        if self._config.special_tokens is not None:
            tokenizer = tokenizer.with_special_tokens(self._config.special_tokens)
        totals = self._encode(plan, tokenizer)
        for note in self._judge.check_result(
            totals, self._left_out, split_on=self._config.split_on or ""
        ):
            self._note(note)
        return self._manifest(plan, totals, tokenizer)

    def _note(self, text: str) -> None:
        self._console.print(printable(text), highlight=False, markup=False, soft_wrap=True)

    def _learn(self, vocab_size: int) -> Tokenizer:
        with Display(self._console, "reading for the tokenizer", self._input_bytes) as display:
            reading = self._config.reading
            tokenizer = train_on_sample(
                self._all_records(display),
                Parser(reading.text_field, reading.split_on),
                vocab_size,
                self._config.val_fraction,
            )
        self._note(f"learned a tokenizer of {tokenizer.vocab_size} tokens")
        return tokenizer

    def _all_records(self, display: Display) -> Iterator[tuple[int, Record]]:
        for batch in read_batches(self._inputs, Position(), self._config.reading):
            yield from batch.records
            display.update(batch.done_bytes, batch.num_bytes)

    def _encode(self, plan: Plan, tokenizer: Tokenizer) -> Totals:
        reading = self._config.reading
        totals = self._workspace.read_totals()
        began_with = self._workspace.read_plan() or plan
        check_ended(self._inputs, began_with, totals, allow_truncated=reading.allow_truncated)
        position = totals.position
        done_bytes = sum(file.size_bytes for file in self._inputs[: position.source])
        if position != Position():
            self._note(f"going on at input file {position.source + 1} of {len(self._inputs)}")
        appender = Appender(self._folder, totals, token_dtype(tokenizer.vocab_size))
        cut = functools.partial(tokenizer.cut_point, special_tokens=tokenizer.special_tokens)
        reading = dataclasses.replace(reading, cut_point=cut)
        batches = read_batches(self._inputs, position, reading)
        title = f"encoding with {tokenizer.name}"
        workers = min(self._config.workers, 1 + self._input_bytes // _BYTES_PER_WORKER)
        try:
            with (
                encoders(reading, tokenizer, self._config.val_fraction, workers) as submit,
                Display(self._console, title, self._input_bytes, done_bytes) as display,
            ):
                self._append(self._in_order(batches, submit), appender, display)
        except BrokenExecutor:
            raise MeshLMError(
                "a worker process was ended from outside, perhaps for want of memory: "
                "run the same command again, with fewer --workers"
            ) from None
        finally:
            appender.close()
        return totals

    def _in_order(
        self, batches: Iterator[Batch], submit: Submit
    ) -> Iterator[tuple[Batch, Encoded]]:
        """The encoded batches in the order of the files, with a bounded number under way."""
        waiting: deque[tuple[Batch, Future[Encoded]]] = deque()
        for batch in batches:
            waiting.append((batch, submit(batch.records)))
            while (
                len(waiting) >= 2 * self._config.workers
                or sum(batch.num_bytes for batch, _ in waiting) > _WAITING_BYTES
            ):
                first, future = waiting.popleft()
                yield first, future.result()
                if not waiting:
                    break
        for first, future in waiting:
            yield first, future.result()

    def _append(
        self, results: Iterator[tuple[Batch, Encoded]], appender: Appender, display: Display
    ) -> None:
        totals, flushed_s = appender.totals, time.monotonic()
        for batch, encoded in results:
            added = Totals(
                position=batch.position,
                sources=encoded.sources,
                sets=totals.bounded(encoded.sets),
                ended=batch.ended,
                num_seen=encoded.num_ended,
                num_bad=len(encoded.bad),
                num_empty=encoded.num_empty,
                num_marked=encoded.num_marked,
                num_boms=encoded.num_boms,
                num_spelled=encoded.num_spelled,
                num_split=encoded.num_split,
                bad_examples=[
                    f"{self._name(source, where)}: {why}" for _, source, where, why in encoded.bad
                ],
                left_out=[
                    LeftOut(path=self._name(source, where), reason=to_json_name(why))
                    for source, where, why in encoded.left_out
                ],
            )
            self._judge.add(totals, added, [bad[0] for bad in encoded.bad])
            appender.append(encoded, added)
            counts = split_counts(encoded.sources)
            display.update(batch.done_bytes, sum(c.num_bytes for c in counts.values()))
            if time.monotonic() - flushed_s > _FLUSH_EVERY_S:
                appender.flush()
                flushed_s = time.monotonic()
        appender.flush()

    def _name(self, source: int, where: str) -> str:
        return to_json_name(f"{self._inputs[source].path}{where}")

    def _manifest(self, plan: Plan, totals: Totals, tokenizer: Tokenizer) -> Manifest:
        sources = [
            Source(
                path=to_json_name(file.path),
                num_bytes=totals.ended[i].num_bytes,
                sha256=totals.ended[i].sha256,
                truncated=totals.ended[i].truncated,
                counts=totals.sources.get(i, {}),
                kind=totals.ended[i].kind,
                note=totals.ended[i].note,
            )
            for i, file in enumerate(self._inputs)
        ]
        return Manifest(
            format=FORMAT,
            version=VERSION,
            options=plan.options,
            tokenizer=TokenizerEntry(
                name=tokenizer.name,
                vocab_size=tokenizer.vocab_size,
                end_of_text_id=tokenizer.end_of_text_id,
                fingerprint=tokenizer.fingerprint,
                end_of_text=tokenizer.end_of_text,
                special_tokens=tokenizer.special_tokens,
            ),
            dtype=token_dtype(tokenizer.vocab_size).name,
            splits={**{s: Counts() for s in SPLITS}, **split_counts(totals.sources)},
            files={name: hash_file(self._folder / name) for name in (*_DATA_FILES, TOKENIZER)},
            sets=totals.sets,
            num_bad_documents=totals.num_bad,
            bad_documents=totals.bad_examples,
            num_empty_documents=totals.num_empty,
            sources=sources,
            left_out=[
                *(LeftOut(path=to_json_name(l.path), reason=l.reason) for l in self._left_out),
                *totals.left_out,
            ],
        )
