"""Batches: the records of all input files in order, in portions that a worker encodes at once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from meshlm.core.errors import BadInputError, UsageError
from meshlm.data.inputs import InputFile
from meshlm.data.journal import Ended, Plan, Position, Totals
from meshlm.data.names import to_json_name
from meshlm.data.readers import FileReader, Reading
from meshlm.data.records import Record
from meshlm.data.store import hash_file

_BATCH_BYTES = 1 << 20
_BATCH_RECORDS = 10_000


@dataclass(kw_only=True)
class Batch:
    """The unit of work.

    Attributes:
        records: (index of the file, record).
        num_bytes: size of the records, about.
        done_bytes: of the input files, read when the batch was complete.
        position: where reading goes on after it.
        ended: files whose last record is in it.
    """

    records: list[tuple[int, Record]] = field(default_factory=list)
    num_bytes: int = 0
    done_bytes: int = 0
    position: Position = field(default_factory=Position)
    ended: dict[int, Ended] = field(default_factory=dict)


def read_batches(
    inputs: Sequence[InputFile], position: Position, reading: Reading
) -> Iterator[Batch]:
    """The batches after `position`. Raises as `FileReader.records`."""
    batch = Batch()
    done_bytes = sum(file.size_bytes for file in inputs[: position.source])
    for source in range(position.source, len(inputs)):
        here = position if source == position.source else Position(source=source)
        reader = FileReader(
            inputs[source],
            reading,
            expected=here.prefix if here.num_records else None,
        )
        for number, record in enumerate(reader.records(), start=1):
            if number <= here.num_records:
                continue
            batch.records.append((source, record))
            batch.num_bytes += len(record.line or b"") + len(record.text)
            if batch.num_bytes >= _BATCH_BYTES or len(batch.records) >= _BATCH_RECORDS:
                batch.position = Position(source=source, num_records=number, prefix=reader.prefix)
                batch.done_bytes = done_bytes + reader.prefix.num_bytes
                yield batch
                batch = Batch()
        whole = reader.prefix
        batch.ended[source] = Ended(
            num_bytes=whole.num_bytes,
            sha256=whole.sha256,
            modified_ns=inputs[source].modified_ns,
            truncated=reader.truncated,
            kind=reader.kind,
            note=reader.note,
        )
        batch.position = Position(source=source + 1)
        done_bytes += whole.num_bytes
        batch.done_bytes = done_bytes
    # With all files read there is nothing to add, and an empty batch would lead back to the start.
    if batch.ended:
        yield batch


def hash_input(path: str) -> str:
    """The sha256 of an input file. Raises UsageError if it cannot be read."""
    try:
        return hash_file(path).sha256
    except OSError as error:
        raise UsageError(f"{path}: cannot read it ({error.strerror})") from None


def check_ended(
    inputs: Sequence[InputFile], began_with: Plan, totals: Totals, *, allow_truncated: bool
) -> None:
    """Raises BadInputError if a file that was read to its end is another now, or was cut and must
    not be.

    Args:
        began_with: the plan with which the work began.
    """
    for source, ended in totals.ended.items():
        file = inputs[source]
        is_same = ended.modified_ns == file.modified_ns and (
            began_with.inputs[source][0] == to_json_name(file.path)
        )
        if ended.truncated and not allow_truncated:
            raise BadInputError(
                f"{file.path}: the file is truncated and was read with --allow-truncated: "
                "give that again, or begin again with --force"
            )
        if not is_same and hash_input(file.path) != ended.sha256:
            raise BadInputError(
                f"{file.path}: the file changed since the work on it began; "
                "begin again with --force"
            )
