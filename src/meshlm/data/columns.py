"""Tables: the rows of parquet and Arrow files become records. They need pyarrow."""

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from meshlm.core.errors import UsageError
from meshlm.data.parsing import pile_set_name, text_field_hint
from meshlm.data.records import MAX_DOCUMENT_BYTES, Record, document_key, not_utf8, too_long
from meshlm.formats.byte_source import DamagedStreamError, RefusedStreamError

_ROWS = 256  # held at once
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"

Open = Callable[[str, str, bool], AbstractContextManager[tuple[Any, Iterator[Any]]]]


def table_records(path: str, kind: str, text_field: str, *, allow_cut: bool) -> Iterator[Record]:
    """A record for each row of a file: the text, and `meta.pile_set_name` where there is one.

    Args:
        kind: "parquet" or "arrow".
        text_field: name of the column; a dot goes into a struct, unless a column has the whole
            name.
        allow_cut: give the rows before the end of an Arrow stream that is cut, then EOFError.

    Raises:
        UsageError: pyarrow is not installed.
        RefusedStreamError: there is no such column, or it holds no text.
        DamagedStreamError: the file is damaged.
        EOFError: it is an Arrow stream that stops too early.
    """
    try:
        import pyarrow
    except ImportError:
        raise UsageError(f"{path}: reading {kind} needs pyarrow: install meshlm[parquet]") from None
    open_file: Open = _parquet if kind == "parquet" else _arrow
    try:
        with open_file(path, text_field, allow_cut) as (schema, batches):
            numbers = itertools.count()
            for batch in batches:
                texts = _column(batch, _steps(schema, text_field))
                index = schema.get_field_index("meta")
                metas = batch.column("meta") if index >= 0 and text_field != "meta" else None
                for text, meta in zip(texts, metas or [None] * len(texts), strict=True):
                    yield _row(next(numbers), text, meta, text_field)
    except (pyarrow.ArrowException, OSError) as error:
        # pyarrow raises an OSError without a number for bytes that it cannot decode.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DamagedStreamError(next(iter(str(error).splitlines()), "no reason given")) from error


@contextmanager
def _parquet(path: str, text_field: str, _: bool) -> Iterator[tuple[Any, Iterator[Any]]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(
        path,
        buffer_size=1 << 20,
        pre_buffer=False,
        page_checksum_verification=True,
    ) as table:
        schema = table.schema_arrow
        _check_column(schema, text_field)
        steps = _steps(schema, text_field)
        columns = [".".join(steps), *(["meta"] if steps[0] != "meta" else [])]
        columns = [name for name in columns if name != "meta" or "meta" in schema.names]
        yield schema, table.iter_batches(batch_size=_ROWS, columns=columns, use_threads=False)


@contextmanager
def _arrow(path: str, text_field: str, allow_cut: bool) -> Iterator[tuple[Any, Iterator[Any]]]:
    import pyarrow

    # Not mapped: a file that is cut while it is read must be an error, and no SIGBUS.
    with pyarrow.OSFile(path) as file:
        is_stream = file.read(6) != b"ARROW1"
        file.seek(0)
        opened = pyarrow.ipc.open_stream(file) if is_stream else pyarrow.ipc.open_file(file)
        with opened as table:
            _check_column(table.schema, text_field)

            def batches() -> Iterator[Any]:
                count = None if is_stream else table.num_record_batches
                whole = table if count is None else map(table.get_batch, range(count))
                for batch in whole:
                    yield from (batch.slice(i, _ROWS) for i in range(0, batch.num_rows, _ROWS))

            is_cut = is_stream and not _ends_well(path)
            if is_cut and not allow_cut:
                raise EOFError
            yield table.schema, _until_cut(batches()) if is_cut else batches()
            if is_cut:
                raise EOFError


def _until_cut(batches: Iterator[Any]) -> Iterator[Any]:
    import pyarrow

    try:
        yield from batches
    except (pyarrow.ArrowException, OSError):
        return


def _ends_well(path: str) -> bool:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - len(_END_OF_STREAM)))
        return file.read() == _END_OF_STREAM


def _steps(schema: Any, text_field: str) -> list[str]:
    """The column, and the fields of structs below it, that `text_field` names."""
    return [text_field] if text_field in schema.names else text_field.split(".")


def _check_column(schema: Any, text_field: str) -> None:
    """Raises RefusedStreamError unless there is one such column, with text."""
    import pyarrow

    names, (name, *inner) = schema.names, _steps(schema, text_field)
    if names.count(name) > 1:
        raise RefusedStreamError(
            f"{names.count(name)} columns are named `{name}`: rename all but one"
        )
    kind = schema.field(name).type if name in names else None
    for step in inner:
        is_struct = kind is not None and pyarrow.types.is_struct(kind)
        index = kind.get_field_index(step) if kind is not None and is_struct else -1
        kind = kind.field(index).type if kind is not None and index >= 0 else None
    if kind is None:
        hint = text_field_hint([f.name for f in schema if _holds_text(f.type)])
        listed = ", ".join(names[:20]) or "none"
        raise RefusedStreamError(
            f"no column `{text_field}` among {listed}{hint or '; none of them holds text'}"
        )
    if not (_holds_text(kind) or pyarrow.types.is_null(kind)):
        raise RefusedStreamError(f"the column `{text_field}` holds {kind}, not text")


def _holds_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    tests = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    is_one = any(getattr(types, f"is_{test}")(kind) for test in tests)
    return is_one or types.is_fixed_size_binary(kind)


def _column(batch: Any, steps: list[str]) -> Any:
    import pyarrow.compute

    column = batch.column(steps[0])
    if not steps[1:]:
        return column
    return pyarrow.compute.call_function(
        "struct_field", [column], pyarrow.compute.StructFieldOptions(steps[1:])
    )


def _row(number: int, value: Any, meta: Any, text_field: str) -> Record:
    where = f":row {number}"
    # A value of a dictionary is looked up alone: all of a batch decoded might not fit in memory.
    value = value.value if hasattr(value, "dictionary") else value
    buffer = value.as_buffer() if value is not None and value.is_valid else None
    if buffer is None:
        return Record(where, number, bad=f"`{text_field}` is null")
    if buffer.size > MAX_DOCUMENT_BYTES:
        return Record(where, number, bad=too_long())
    try:
        text = buffer.to_pybytes().decode()
    except UnicodeDecodeError as error:
        return Record(where, number, bad=not_utf8(error))
    set_name = pile_set_name(meta.as_py()) if meta is not None else None
    return Record(where, number, text=text, key=document_key(text), set_name=set_name)
