"""Readers: input files become records, in order, without ever holding a whole file.

A record is a document (a line of JSON, a row, a text) or a part of a long text. What cannot be read
as a document is a record too, with the reason; what stops a file from being read at all is an
error.
"""

import codecs
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from meshlm.core.errors import BadInputError, UsageError
from meshlm.data.bpe import MAX_UNBROKEN_CHARACTERS, cut_point
from meshlm.data.inputs import InputFile, compression_of, format_of, is_hidden
from meshlm.data.streams import (
    CHUNK_BYTES,
    ByteSource,
    Chunks,
    DamagedStreamError,
    decompress,
    lines,
    tar_members,
)

MAX_DOCUMENT_BYTES = 32 << 20
"""A longer line, row or archive member is a bad document. A text file may be of any length."""

PIECE_CHARACTERS = 1 << 20
KEY_BYTES = 64 << 10
_BOM = codecs.BOM_UTF8
_BINARY_LOOK_BYTES = 8 << 10


class Record(NamedTuple):
    """A document, a part of one, or what should have been one.

    Attributes:
        where: what to add to the file's name to find it: ":12" (line), "!name" (archive member),
        ":row 3". document: its number among the documents of its file, from 0.
        line: a line of JSON that is not parsed yet, or None.
        text: text, where `line` is None.
        key: 8 bytes that choose by hash; of the first part, for all parts.
        set_name: the Pile's `meta.pile_set_name`, where the reader knows it.
        first: begins its document.
        last: ends its document.
        bad: the reason why it is none, or None.
    """

    where: str
    document: int
    line: bytes | None = None
    text: str = ""
    key: bytes = b""
    set_name: str | None = None
    first: bool = True
    last: bool = True
    bad: str | None = None


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """The first `num_bytes` of a file, by their sha256."""

    num_bytes: int
    sha256: str


def document_key(text: str) -> bytes:
    """8 bytes that depend on the beginning of a document alone (64 KiB): they choose its split."""
    return hashlib.blake2b(text[:KEY_BYTES].encode()[:KEY_BYTES], digest_size=8).digest()


class FileReader:
    """Reads one input file.

    Attributes:
        truncated: the file stopped too early, which was allowed.
        binary: the file was passed over as binary.
    """

    def __init__(
        self, file: InputFile, *, allow_truncated: bool = False, expected: Prefix | None = None
    ) -> None:
        """Args: expected: what the file has to begin with, from an earlier reading."""
        self.truncated = False
        self.binary = False
        self._file = file
        self._allow_truncated = allow_truncated
        self._expected = expected
        self._sha256 = hashlib.sha256()
        self._num_bytes = 0

    @property
    def prefix(self) -> Prefix:
        """What has been read so far; once the records have ended, the whole file."""
        return Prefix(num_bytes=self._num_bytes, sha256=self._sha256.hexdigest())

    def records(self) -> Iterator[Record]:
        """The file's records, in order.

        Raises:
            BadInputError: damaged, truncated, or other than `expected`.
            UsageError: unreadable, or a format whose library is not installed.
        """
        path = self._file.path
        try:
            yield from self._records()
            for _ in self._raw():  # what follows an archive's end counts in the hash
                pass
        except EOFError:
            raise BadInputError(
                f"{path}: the file stops too early, it is truncated: get it again, "
                "or use what is there with --allow-truncated"
            ) from None
        except DamagedStreamError as error:
            raise BadInputError(f"{path}: the file is damaged ({error}): get it again") from None
        except OSError as error:
            raise UsageError(f"{path}: cannot read it ({error.strerror})") from None
        if self._expected and self._num_bytes < self._expected.num_bytes:
            raise self._changed()

    def _records(self) -> Iterator[Record]:
        kind = format_of(self._file.path)
        if kind == "parquet":
            for _ in self._raw():
                pass
            yield from parquet_records(self._file.path)
            return
        chunks = self._tolerant(self._open(self._raw()))
        head = b""
        while len(head) < _BINARY_LOOK_BYTES and (chunk := next(chunks, None)) is not None:
            head += chunk
        chunks = itertools.chain([head], chunks)
        if kind == "tar" or head[257:262] == b"ustar":
            yield from self._tar_records(chunks)
        elif kind == "jsonl":
            yield from json_records(chunks, is_cut=lambda: self.truncated)
        elif not self._file.named and b"\0" in head[:_BINARY_LOOK_BYTES]:
            self.binary = True
            for _ in chunks:
                pass
        else:
            yield from text_records(chunks, "", 0, again=self._again, is_cut=lambda: self.truncated)

    def _tar_records(self, chunks: Chunks) -> Iterator[Record]:
        number = 0
        try:
            for name, size, content in tar_members(ByteSource(chunks)):
                if is_hidden(name):
                    continue
                where = f"!{name}"
                if size > MAX_DOCUMENT_BYTES:
                    yield Record(where, number, bad=_too_long())
                else:
                    yield from text_records(iter([b"".join(content)]), where, number)
                number += 1
        except EOFError:
            if not self._allow_truncated:
                raise
            self.truncated = True

    def _raw(self) -> Chunks:
        """The rest of the file's bytes, hashed and compared with what is expected as they pass."""
        with open(self._file.path, "rb") as file:
            file.seek(self._num_bytes)
            while chunk := file.read(CHUNK_BYTES):
                expected = self._expected
                if expected and self._num_bytes < expected.num_bytes <= self._num_bytes + len(
                    chunk
                ):
                    seen = self._sha256.copy()
                    seen.update(chunk[: expected.num_bytes - self._num_bytes])
                    if seen.hexdigest() != expected.sha256:
                        raise self._changed()
                self._sha256.update(chunk)
                self._num_bytes += len(chunk)
                yield chunk

    def _open(self, raw: Chunks) -> Chunks:
        compression = compression_of(self._file.path)
        return decompress(raw, compression) if compression else raw

    def _again(self) -> Chunks:
        def raw() -> Chunks:
            with open(self._file.path, "rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk

        return self._tolerant(self._open(raw()))

    def _tolerant(self, chunks: Chunks) -> Chunks:
        try:
            yield from chunks
        except EOFError:
            if not self._allow_truncated:
                raise
            self.truncated = True

    def _changed(self) -> BadInputError:
        return BadInputError(
            f"{self._file.path}: the file changed since the work on it began; "
            "begin again with --force"
        )


def json_records(chunks: Iterable[bytes], *, is_cut: Callable[[], bool]) -> Iterator[Record]:
    """A record for each line that is not blank. The last one is left out if the stream `is_cut`."""
    number = 0
    pending: Record | None = None
    for count, line in enumerate(lines(_without_bom(chunks), MAX_DOCUMENT_BYTES), start=1):
        if pending:
            yield pending
        pending = None
        if line is None:
            pending = Record(f":{count}", number, bad=_too_long())
        elif line and not line.isspace():
            pending = Record(f":{count}", number, line)
        number += pending is not None
    if pending and not is_cut():
        yield pending


def text_records(
    chunks: Chunks,
    where: str,
    number: int,
    *,
    again: Callable[[], Chunks] | None = None,
    is_cut: Callable[[], bool] = lambda: False,
) -> Iterator[Record]:
    """The records of one text: as many as it has pieces, once all of it is known to be UTF-8; one
    if it is not.

    Args:
        again: gives the same chunks from the start, for a text too long to be held.
    """
    held = []
    size = 0
    while size <= MAX_DOCUMENT_BYTES and (chunk := next(chunks, None)) is not None:
        held.append(chunk)
        size += len(chunk)
    is_long = size > MAX_DOCUMENT_BYTES
    reason = _not_text(again() if is_long and again else held, is_cut)
    if reason:
        line, why = reason
        for _ in chunks:
            pass
        yield Record(f"{where}:{line}", number, bad=why)
        return
    key = b""
    pieces = _pieces(_decoded(itertools.chain(_drain(held), chunks), is_cut))
    following = next(pieces, "")
    first = True
    while following or first:
        piece, following = following, next(pieces, "")
        key = key or document_key(piece)
        yield Record(where, number, text=piece, key=key, first=first, last=not following)
        first = False


def parquet_records(path: str) -> Iterator[Record]:
    """A record for each row: `text`, and `meta.pile_set_name` where there is one.

    Raises:
        UsageError: pyarrow is not installed.
        BadInputError: no parquet file, or one without a column of strings named `text`.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError(
            f"{path}: reading parquet needs pyarrow: install meshlm[parquet]"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as table:
            schema = table.schema_arrow
            columns = [name for name in ("text", "meta") if name in schema.names]
            kinds = (pyarrow.types.is_string, pyarrow.types.is_large_string)
            if "text" not in columns or not any(kind(schema.field("text").type) for kind in kinds):
                names = ", ".join(schema.names)
                raise BadInputError(f"{path}: no column `text` of strings among {names}")
            batches = table.iter_batches(batch_size=256, columns=columns, use_threads=False)
            rows = (row for batch in batches for row in _rows(batch))
            for number, (text, meta) in enumerate(rows):
                yield _row_record(number, text, meta)
    except pyarrow.ArrowException as error:
        raise DamagedStreamError(str(error).splitlines()[0]) from error


def _rows(batch: Any) -> Iterator[tuple[bytes | None, object]]:
    import pyarrow

    binary = pyarrow.large_binary()
    texts = batch.column(batch.schema.get_field_index("text")).cast(pyarrow.large_string())
    index = batch.schema.get_field_index("meta")
    metas = batch.column(index).to_pylist() if index >= 0 else [None] * len(texts)
    return zip(texts.cast(binary).to_pylist(), metas, strict=True)


def _row_record(number: int, text: bytes | None, meta: object) -> Record:
    where = f":row {number}"
    if text is None:
        return Record(where, number, bad="`text` is null")
    if len(text) > MAX_DOCUMENT_BYTES:
        return Record(where, number, bad=_too_long())
    try:
        decoded = text.decode()
    except UnicodeDecodeError:
        return Record(where, number, bad="not UTF-8")
    key = document_key(decoded)
    return Record(where, number, text=decoded, key=key, set_name=pile_set_name(meta))


def pile_set_name(meta: object) -> str | None:
    """`pile_set_name` in a document's `meta`, or None."""
    name = meta.get("pile_set_name") if isinstance(meta, dict) else None
    return name if isinstance(name, str) else None


def _too_long() -> str:
    return f"longer than {MAX_DOCUMENT_BYTES >> 20} MiB"


def _without_bom(chunks: Iterable[bytes]) -> Chunks:
    chunks = iter(chunks)
    head = b""
    while len(head) < len(_BOM) and (chunk := next(chunks, None)) is not None:
        head += chunk
    yield head.removeprefix(_BOM)
    yield from chunks


def _drain(held: list[bytes]) -> Chunks:
    """The chunks, each let go as it is used."""
    held.reverse()
    while held:
        yield held.pop()


def _decoded(chunks: Iterable[bytes], is_cut: Callable[[], bool]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for chunk in _without_bom(chunks):
        yield decoder.decode(chunk)
    yield decoder.decode(b"", final=not is_cut())


def _not_text(chunks: Iterable[bytes], is_cut: Callable[[], bool]) -> tuple[int, str] | None:
    """The line, from 1, of the first byte that is not UTF-8, and the reason; None if all is
    text."""
    line = 1
    texts = _decoded(chunks, is_cut)
    while True:
        try:
            text = next(texts, None)
        except UnicodeDecodeError as error:
            return line + error.object[: error.start].count(b"\n"), f"not UTF-8 ({error.reason})"
        if text is None:
            return None
        line += text.count("\n")


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """The text in parts of about PIECE_CHARACTERS, cut where it changes no token."""
    held, size = [], 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size < PIECE_CHARACTERS + CHUNK_BYTES:
            continue
        whole = "".join(held)
        cut = cut_point(whole, PIECE_CHARACTERS, len(whole) - 1)
        if cut is None and size > PIECE_CHARACTERS + MAX_UNBROKEN_CHARACTERS:
            cut = len(whole)
        if cut is not None:
            yield whole[:cut]
            whole = whole[cut:]
        held, size = [whole], len(whole)
    if rest := "".join(held):
        yield rest
