"""Readers: input files become records, in order, without ever holding a whole file.

What stops a file from being read at all is an error; what cannot be read as a document is a record
with the reason.
"""

import codecs
import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from meshlm.core.errors import BadInputError, UsageError
from meshlm.data import kinds
from meshlm.data.bpe import CutPoint, cut_point
from meshlm.data.columns import table_records
from meshlm.data.compression import HEAD_BYTES, NAMES, compression_of, decompress
from meshlm.data.inputs import InputFile, is_hidden
from meshlm.data.kinds import LABELS, Found, named_compression, named_kind
from meshlm.data.records import Record, json_lines, json_records, text_records
from meshlm.data.streams import CHUNK_BYTES, Peeked
from meshlm.formats import tar
from meshlm.formats.byte_source import ByteSource, Chunks, DamagedStreamError, RefusedStreamError

END_OF_TEXT = "<|endoftext|>"
_WITHOUT_TEXT = (b"1", b"2", b"3", b"4", tar.FOLDER, b"6", b"D", b"V")
"""Types of tar members: links, devices, folders, pipes, and the name of the whole archive."""
RULES = 1
"""Counts up when the same files and options come to give other records."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How input files are read.

    Attributes:
        text_field: field or column that holds the text; a dot goes one level down.
        split_on: separator between the documents in a text or a field, "" for none; None splits
            files of text, not fields, at END_OF_TEXT.
        format: what a file is that is no table and no archive.
        allow_truncated: use what is there of a file that stops too early.
        cut_point: where a long text may be cut into pieces.
    """

    text_field: str = "text"
    split_on: str | None = None
    format: kinds.Format = "auto"
    allow_truncated: bool = False
    cut_point: CutPoint = cut_point


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """The first `num_bytes` of a file, by their sha256."""

    num_bytes: int
    sha256: str


@dataclass
class _Cut:
    """Whether a stream stopped too early, which was allowed."""

    is_cut: bool = False


@dataclass
class _Content:
    """A file, or a member of an archive, on its way to records.

    Attributes:
        name: of the file, or of the member.
        where: "" for a file, "!name" for a member.
        named: given by name, not found in a folder or an archive.
        compression: a suffix of NAMES, or None.
        encoding: what a byte-order mark says, or None for UTF-8.
    """

    name: str
    where: str
    named: bool
    cut: _Cut
    compression: str | None = None
    encoding: str | None = None


class FileReader:
    """Reads one input file.

    Attributes:
        kind: what the file holds, a key of kinds.LABELS; known once the records have ended.
        note: in what it was read otherwise than its name says, or "".
        truncated: the file stopped too early, which was allowed.
    """

    def __init__(
        self, file: InputFile, reading: Reading | None = None, *, expected: Prefix | None = None
    ) -> None:
        """Args: expected: what the file has to begin with, from an earlier reading."""
        self.kind = ""
        self.note = ""
        self._cut = _Cut()
        self._file = file
        self._reading = reading or Reading()
        self._expected = expected
        self._sha256 = hashlib.sha256()
        self._num_bytes = 0
        self._numbers = itertools.count()

    @property
    def truncated(self) -> bool:
        """Whether the file stopped too early, which was allowed."""
        return self._cut.is_cut

    @property
    def prefix(self) -> Prefix:
        """What has been read so far; once the records have ended, the whole file."""
        return Prefix(num_bytes=self._num_bytes, sha256=self._sha256.hexdigest())

    def records(self) -> Iterator[Record]:
        """The file's records, in order.

        Raises:
            BadInputError: damaged, truncated, of a wrong kind, or other than `expected`.
            UsageError: unreadable, or a format whose library is not installed.
        """
        path = self._file.path
        try:
            yield from self._records()
            for _ in self._raw():  # what follows an archive's end counts in the hash
                pass
        except EOFError:
            what = (
                "the file is empty: get it again"
                if not self._file.size_bytes
                else "the file stops too early, it is truncated: get it again"
            )
            raise BadInputError(
                f"{path}: {what}, or use what is there with --allow-truncated"
            ) from None
        except DamagedStreamError as error:
            raise BadInputError(f"{path}: the file is damaged ({error}): get it again") from None
        except RefusedStreamError as error:
            raise BadInputError(f"{path}: {error}") from None
        except OSError as error:
            raise UsageError(f"{path}: cannot read it ({error.strerror})") from None
        if self._expected and self._num_bytes < self._expected.num_bytes:
            raise self._changed()

    def _records(self) -> Iterator[Record]:
        content = _Content(self._file.path, "", self._file.named, self._cut)
        peeked, found = self._opened(Peeked(self._raw()), content)
        self.kind, self.note = found.kind, self._note(content, found)
        if found.kind in ("parquet", "arrow"):
            yield from self._table(peeked, content, found.kind)
        elif found.kind == "tar":
            yield from self._tar(peeked)
        else:
            again = self._again(content)
            records = self._content_records(peeked, content, found, again)
            yield from self._noting_splits(records) if found.kind == "text" else records

    def _opened(self, raw: Peeked, content: _Content) -> tuple[Peeked, Found]:
        """The content without compression and in UTF-8, and what it is."""
        named = named_compression(content.name)
        head = raw.head(HEAD_BYTES)
        content.compression = compression_of(head, named)
        if named and not head:
            content.compression = named  # nothing is no compressed file: EOFError
        peeked = Peeked(self._decompressed(raw.chunks(), content))
        head = peeked.head(kinds.LOOK_BYTES)
        content.encoding = kinds.encoding_of(head)
        if content.encoding:
            peeked = Peeked(_to_utf8(peeked.chunks(), content.encoding, content.cut))
        found = kinds.find_kind(
            peeked,
            content.name,
            named=content.named,
            text_field=self._reading.text_field,
            format=self._reading.format,
        )
        if named and not content.compression and not _begins_as_text(head):
            found = Found(
                kind="left out",
                reason=f"it is named {NAMES[named]} but is not compressed, nor text: get it again",
                is_fatal=True,
            )
        if found.is_fatal and not content.where:
            raise RefusedStreamError(found.reason)
        return peeked, found

    def _content_records(
        self,
        peeked: Peeked,
        content: _Content,
        found: Found,
        again: Callable[[], Chunks] | None = None,
    ) -> Iterator[Record]:
        where, numbers, chunks = content.where, self._numbers, peeked.chunks()

        def is_cut() -> bool:
            return content.cut.is_cut

        if found.kind == "jsonl":
            yield from json_lines(chunks, where, numbers, is_cut=is_cut)
        elif found.kind == "json":
            yield from json_records(chunks, where, numbers, is_cut=is_cut)
        elif found.kind == "text":
            split_on = self._reading.split_on
            separator = (END_OF_TEXT if split_on is None else split_on).encode() or None
            yield from text_records(
                chunks,
                where,
                numbers,
                separator=separator,
                again=again,
                is_cut=is_cut,
                cut_point=self._reading.cut_point,
            )
        else:
            for _ in chunks:
                pass
            yield Record(where, 0, last=False, left_out=found.reason)

    def _table(self, peeked: Peeked, content: _Content, kind: str) -> Iterator[Record]:
        if content.compression:
            name = NAMES[content.compression]
            raise RefusedStreamError(f"{LABELS[kind]} compressed with {name}: decompress it first")
        for _ in peeked.chunks():
            pass
        allow_cut = self._reading.allow_truncated
        try:
            yield from table_records(
                self._file.path, kind, self._reading.text_field, allow_cut=allow_cut
            )
        except EOFError:
            if not allow_cut:
                raise
            self._cut.is_cut = True

    def _tar(self, peeked: Peeked) -> Iterator[Record]:
        try:
            for member in tar.tar_members(ByteSource(peeked.chunks())):
                if is_hidden(member.name) or member.kind in _WITHOUT_TEXT:
                    continue
                if member.kind == tar.FILE:
                    yield from self._member(member.name, member.chunks())
                else:
                    reason = _why_left_out(member.kind)
                    yield Record(f"!{member.name}", 0, last=False, left_out=reason)
        except EOFError:
            if not self._reading.allow_truncated:
                raise
            self._cut.is_cut = True

    def _member(self, name: str, chunks: Chunks) -> Iterator[Record]:
        content = _Content(name, f"!{name}", False, _Cut())
        try:
            peeked, found = self._opened(Peeked(self._tolerant(chunks, content.cut)), content)
            if found.kind in ("parquet", "arrow", "tar"):
                reason = f"{LABELS[found.kind]} inside an archive: unpack the archive"
                found = Found(kind="left out", reason=reason)
            yield from self._content_records(peeked, content, found)
        except (DamagedStreamError, RefusedStreamError) as error:
            raise type(error)(f"member {name}: {error}") from None
        self._cut.is_cut = self._cut.is_cut or content.cut.is_cut

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

    def _decompressed(self, raw: Chunks, content: _Content) -> Chunks:
        if content.compression is None:
            return raw
        return self._tolerant(decompress(raw, content.compression), content.cut)

    def _again(self, content: _Content) -> Callable[[], Chunks]:
        def raw() -> Chunks:
            with open(self._file.path, "rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk

        def again() -> Chunks:
            chunks = self._decompressed(raw(), content)
            return _to_utf8(chunks, content.encoding, content.cut) if content.encoding else chunks

        return again

    def _tolerant(self, chunks: Chunks, cut: _Cut) -> Chunks:
        try:
            yield from chunks
        except EOFError:
            if not self._reading.allow_truncated:
                raise
            cut.is_cut = True

    def _note(self, content: _Content, found: Found) -> str:
        """In what the file is read otherwise than its name says, or ""."""
        named, expected = named_compression(content.name), named_kind(content.name) or "text"
        parts = []
        if found.kind not in (expected, "left out"):
            parts.append(f"read as {LABELS[found.kind]}")
        if content.encoding and found.kind != "left out":
            parts.append(f"converted from {content.encoding}")
        if content.compression != named:
            suffix = content.compression
            parts.append(f"compressed with {NAMES[suffix]}" if suffix else "not compressed")
        if found.hint:
            parts.append(f"one text: {found.hint}")
        return ", ".join(parts)

    def _noting_splits(self, records: Iterator[Record]) -> Iterator[Record]:
        """The records of a text; notes that it is split, where nobody asked for that."""
        is_noted = self._reading.split_on is not None
        for record in records:
            if record.document and not is_noted:
                split = f"split at each {END_OF_TEXT} (--split-on '' keeps it one text)"
                self.note, is_noted = f"{self.note}, {split}".removeprefix(", "), True
            yield record

    def _changed(self) -> BadInputError:
        return BadInputError(
            f"{self._file.path}: the file changed since the work on it began; "
            "begin again with --force"
        )


def _begins_as_text(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return kinds.encoding_of(head) is not None
    return b"\0" not in head


def _to_utf8(chunks: Chunks, encoding: str, cut: _Cut) -> Chunks:
    """Text in `encoding`, which its byte-order mark tells, as UTF-8."""
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for chunk in chunks:
            yield decoder.decode(chunk).encode()
        yield decoder.decode(b"", final=not cut.is_cut).encode()
    except UnicodeError as error:
        raise DamagedStreamError(f"not {encoding}: {error}") from None


def _why_left_out(kind: bytes) -> str:
    """Returns why the content of a tar member of this type is not the text of a file."""
    if kind == tar.VOLUME_PART:
        return "the rest of a file that begins in another volume of the archive"
    return f"a tar member of an unknown type ({kind!r})"
