"""The token store: tokens on disk, at random access.

A store is a folder, version 1:

    manifest.json           what is in it (the `Manifest` below, as JSON); written last: where it
                            is, the store is whole
    tokenizer.json          the tokenizer, as Hugging Face's `tokenizers` reads it
    {split}.tokens.bin      token ids of all documents, one after another, each document ended by
                            end-of-text; little-endian uint16 if the vocabulary has at most 65,536
                            ids, else uint32
    {split}.documents.bin   index of the first token of each document, little-endian uint64

for the splits `train` and `val`. Nothing depends on the time, the machine or the number of workers:
the same inputs and options give the same bytes. A store in the making has a folder `unfinished`
instead of a manifest. Readers refuse a version that is newer than theirs.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from meshlm.core import files, strict_json
from meshlm.core.errors import BadInputError, UsageError
from meshlm.data.inputs import LeftOut
from meshlm.data.number_file import NumberFile
from meshlm.data.tokenizer import END_OF_TEXT, Tokenizer, from_json
from meshlm.data.tokenizer_json import MAX_FILE_BYTES, SpecialTokenMode

FORMAT = "meshlm-token-store"
VERSION = 1
MAX_MANIFEST_BYTES = 1 << 30
"""Some 300 bytes for each file that the store was made of."""
SPLITS: tuple[str, ...] = ("train", "val")
MANIFEST, TOKENIZER, UNFINISHED = "manifest.json", "tokenizer.json", "unfinished"
DOCUMENT_DTYPE = np.dtype("<u8")


def tokens_file(split: str) -> str:
    """The name of the file with the tokens of `split`."""
    return f"{split}.tokens.bin"


def documents_file(split: str) -> str:
    """The name of the file with the document starts of `split`."""
    return f"{split}.documents.bin"


def token_dtype(vocab_size: int) -> np.dtype:
    """The type that tokens are stored in."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclass(kw_only=True)
class Counts:
    """How much there is of something: tokens count end-of-text, bytes are those of the UTF-8
    text."""

    num_documents: int = 0
    num_tokens: int = 0
    num_bytes: int = 0

    def add(self, other: "Counts") -> None:
        """Adds `other` to this."""
        self.num_documents += other.num_documents
        self.num_tokens += other.num_tokens
        self.num_bytes += other.num_bytes


SplitCounts = dict[str, Counts]
"""Counts by split."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file of the store."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """An input file, with the sha256 of its bytes as they were read.

    Attributes:
        path: as it was given; `names.from_json_name` makes a name for the file system of it.
        kind: what it was read as, a key of kinds.LABELS.
        note: in what it was read otherwise than its name says, or "".
    """

    path: str
    num_bytes: int
    sha256: str
    truncated: bool
    counts: SplitCounts
    kind: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class TokenizerEntry:
    """The tokenizer's name, size and the sha256 of its canonical JSON."""

    name: str
    vocab_size: int
    end_of_text_id: int
    fingerprint: str
    end_of_text: str = END_OF_TEXT
    special_tokens: SpecialTokenMode = "text"
    """What the spelling of a special token in the texts became."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a store holds and what it was made from."""

    format: str
    version: int
    options: dict[str, str | float]
    tokenizer: TokenizerEntry
    dtype: str
    splits: SplitCounts
    files: dict[str, FileEntry]
    sets: dict[str, SplitCounts]
    """Counts by the Pile's `meta.pile_set_name`."""
    num_bad_documents: int
    bad_documents: list[str] = field(default_factory=list)
    """The first of them, as file, line and reason."""
    num_empty_documents: int
    sources: list[Source]
    left_out: list[LeftOut] = field(default_factory=list)
    """Files, folders and archive members that were not read."""


class TokenStore:
    """A finished store, opened for reading. Its files are read piece by piece, see `NumberFile`.

    Attributes:
        path: the folder.
        manifest: what it holds.
        tokenizer: the tokenizer it was made with.
        fingerprint: sha256 of the tokens, the boundaries and the tokenizer: equal for equal
        content.
    """

    def __init__(self, path: Path, manifest: Manifest, tokenizer: Tokenizer) -> None:
        self.path = path
        self.manifest = manifest
        self.tokenizer = tokenizer
        content = "".join(f"{n} {e.sha256}\n" for n, e in sorted(manifest.files.items()))
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()
        dtype = np.dtype(manifest.dtype)
        self._tokens = {s: self._open(tokens_file(s), dtype) for s in SPLITS}
        self._documents = {s: self._open(documents_file(s), DOCUMENT_DTYPE) for s in SPLITS}

    def _open(self, name: str, dtype: np.dtype) -> NumberFile:
        entry = self.manifest.files[name]
        return NumberFile(self.path / name, dtype, entry.num_bytes, entry.sha256)

    @classmethod
    def open(cls, path: str | Path) -> "TokenStore":
        """The store at `path`, its files' sizes and its tokenizer checked against the manifest.

        Raises:
            UsageError: there is no store.
            BadInputError: it is unfinished, damaged, or of a newer version.
        """
        path = Path(path)
        manifest = read_manifest(path)
        for name, entry in manifest.files.items():
            size = (path / name).stat().st_size if (path / name).is_file() else None
            if size != entry.num_bytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise _damaged(path / name, f"{found}, the manifest says {entry.num_bytes}")
        try:
            data = files.read(path / TOKENIZER, MAX_FILE_BYTES)
            tokenizer = from_json(data, manifest.tokenizer.end_of_text)
        except BadInputError as error:
            raise BadInputError(f"{path / TOKENIZER}: {error}") from None
        if tokenizer.fingerprint != manifest.tokenizer.fingerprint:
            raise _damaged(path / TOKENIZER, "not the tokenizer that the manifest names")
        return cls(path, manifest, tokenizer)

    def num_tokens(self, split: str) -> int:
        """Tokens in `split`, end-of-text included."""
        return len(self._tokens[split])

    def read(self, split: str, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of `split`, int32.

        Raises:
            ValueError: a range that is not within the split.
            BadInputError: an id that the tokenizer does not have, or a file that was cut or changed
                since it was opened.
            MeshLMError: the file cannot be read now.
        """
        if not 0 <= start <= stop <= self.num_tokens(split):
            raise ValueError(
                f"tokens [{start}, {stop}) are not within the {self.num_tokens(split)} of {split}"
            )
        tokens = self._tokens[split][start:stop]
        if tokens.size and tokens.max() >= self.tokenizer.vocab_size:
            where = f"token {int(tokens.max())} between {start} and {stop}"
            raise _damaged(self.path / tokens_file(split), f"{where} is not in the vocabulary")
        return tokens.astype(np.int32)

    def largest_token(self) -> int:
        """The largest id in it, found by reading all of it; -1 where there is none."""
        largest, step = -1, 1 << 24
        for tokens in self._tokens.values():
            for start in range(0, len(tokens), step):
                largest = max(largest, int(tokens[start : start + step].max()))
        return largest

    def document_starts(self, split: str) -> NumberFile:
        """Index of the first token of each document of `split`, uint64, read at each access."""
        return self._documents[split]


def read_manifest(path: Path) -> Manifest:
    """The manifest of the store at `path`. Raises as `TokenStore.open`."""
    try:
        data = files.read(path / MANIFEST, MAX_MANIFEST_BYTES)
    except OSError:
        if (path / UNFINISHED).is_dir():
            raise BadInputError(
                f"{path}: this token store is unfinished: run the same command again, or another "
                "with --force"
            ) from None
        remedy = "make one with: meshlm data prepare PATH... --out DIR"
        raise UsageError(f"{path}: no token store there; {remedy}") from None
    return parse_manifest(data, path / MANIFEST)


def parse_manifest(data: bytes, name: Path) -> Manifest:
    """The manifest in `data`. Raises BadInputError as `TokenStore.open`."""
    try:
        head = strict_json.parse_object(
            data,
            str(name),
            max_bytes=MAX_MANIFEST_BYTES,
            remedy="prepare the store again with --force",
        )
        if head.get("format") != FORMAT:
            raise BadInputError(f"{name}: not the manifest of a token store")
        if not isinstance(head.get("version"), int) or head["version"] > VERSION:
            raise BadInputError(
                f"{name}: version {head.get('version')} of the token store is newer than this "
                f"meshlm reads ({VERSION}): update meshlm"
            )
        manifest = msgspec.convert(head, Manifest)
        _check(manifest)
    except ValueError as error:
        if isinstance(error, BadInputError):
            raise
        raise _damaged(name, str(error)) from None
    return manifest


def hash_file(path: str | Path) -> FileEntry:
    """Size and sha256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(num_bytes=file.tell(), sha256=digest)


def verify_store(path: str | Path) -> TokenStore:
    """The store at `path`, once every byte of it has been checked: checksums, ids, boundaries.

    Raises:
        UsageError: there is no store.
        BadInputError: the first file that is damaged, by name.
    """
    store = TokenStore.open(path)
    for name, entry in store.manifest.files.items():
        if hash_file(store.path / name) != entry:
            raise _damaged(store.path / name, "its checksum is not that of the manifest")
    for split in SPLITS:
        _verify_documents(store, split)
    return store


def _verify_documents(store: TokenStore, split: str) -> None:
    starts, total = store.document_starts(split), store.num_tokens(split)
    step = 1 << 24
    ordered = all(
        bool(np.all(np.diff(starts[first : first + step + 1].astype(np.int64)) > 0))
        for first in range(0, len(starts), step)
    )
    if len(starts) and not (starts[0] == 0 and ordered and int(starts[-1]) < total):
        raise _damaged(store.path / documents_file(split), "document starts are out of order")
    for start in range(0, total, step):
        store.read(split, start, min(start + step, total))


def _check(manifest: Manifest) -> None:
    dtype = token_dtype(manifest.tokenizer.vocab_size)
    if manifest.dtype != dtype.name or set(manifest.splits) != set(SPLITS):
        raise ValueError(f"dtype {manifest.dtype} or splits {list(manifest.splits)} do not fit")
    sizes: Mapping[str, int] = {
        **{tokens_file(s): manifest.splits[s].num_tokens * dtype.itemsize for s in SPLITS},
        **{documents_file(s): manifest.splits[s].num_documents * 8 for s in SPLITS},
    }
    for name, size in sizes.items():
        if name not in manifest.files or manifest.files[name].num_bytes != size:
            raise ValueError(f"the size of {name} does not follow from the counts")
    if set(manifest.files) != {*sizes, TOKENIZER}:
        raise ValueError("it names other files than a store has")


def _damaged(path: Path, why: str) -> BadInputError:
    return BadInputError(f"{path}: damaged ({why}): prepare the store again with --force")
