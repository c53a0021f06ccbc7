"""A bounded sample of a corpus, chosen by hash, and the tokenizer learned from it."""

import hashlib
import heapq
from collections.abc import Iterable

from meshlm.core.errors import BadInputError
from meshlm.data.encode import split_of
from meshlm.data.parsing import Parser
from meshlm.data.records import Record
from meshlm.data.tokenizer import Tokenizer, train_bpe

SAMPLE_BYTES = 32 << 20


def train_on_sample(
    records: Iterable[tuple[int, Record]], parser: Parser, vocab_size: int, val_fraction: float
) -> Tokenizer:
    """A tokenizer learned from a sample of the training documents in `records`.

    Raises:
        BadInputError: there is no text to learn from.
    """
    texts = sample_texts(records, parser, val_fraction)
    if not texts:
        raise BadInputError("no document with text in the input: there is nothing to learn from")
    return train_bpe(texts, vocab_size)


def sample_texts(
    records: Iterable[tuple[int, Record]], parser: Parser, val_fraction: float
) -> list[str]:
    """The training documents with the lowest hashes, just as many as come to SAMPLE_BYTES.

    Of a long text its first piece counts. The choice does not depend on the order of the documents.
    """
    heap: list[tuple[int, int, str]] = []  # the highest hash first
    size = 0
    documents = (
        (source, document)
        for source, record in records
        if record.first
        for document in parser.documents(record)
    )
    for number, (source, document) in enumerate(documents):
        if document.bad or document.left_out or not document.text:
            continue
        if split_of(source, document, val_fraction) != "train":
            continue
        digest = hashlib.blake2b(document.key, digest_size=8, person=b"sample").digest()
        heapq.heappush(heap, (-int.from_bytes(digest, "big"), -number, document.text))
        size += _utf8_bytes(document.text)
        while size - (highest := _utf8_bytes(heap[0][2])) >= SAMPLE_BYTES:
            heapq.heappop(heap)
            size -= highest
    return [text for _, _, text in heap]


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
