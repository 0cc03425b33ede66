"""Tables of answers: the rows of the input, each with the columns of its answer, in any format."""

import contextlib
import csv
import glob
import gzip
import io
import math
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import msgspec

from ..errors import ConfigError
from .formats import BUFFER, TABLES, FileType, Format, Source
from .reading import Row, open_table, read_rows, rows_at, to_microseconds

GROUP_BYTES = 64 * 1024 * 1024
"""Size of a row group of Parquet, in bytes before compression. This much is held in memory."""
GROUP_ROWS = 100_000
"""Maximum number of rows in a row group of Parquet, and in a record batch of Arrow."""
CHUNK_ROWS = 1024
"""Maximum number of rows that become Arrow columns at once."""
CHUNK_BYTES = 8 * 1024 * 1024
"""Size of their text, in bytes, beyond which there are fewer."""
MAX_NAMES = 256
"""Number of names in the objects of a column, beyond which they are stored as JSON text."""
MAX_DEPTH = 32
"""Number of objects and lists inside each other, beyond which a column is stored as JSON text."""
PART = ".part"
"""Suffix of a file that is being written."""
PLAIN = (str, int, float, bool, type(None))

type Values = dict[str, Any]
type Answers = Callable[[int], Values | None]


def write_table(
    path: Path,
    type: FileType,  # noqa: A002
    sources: Sequence[Source],
    answers: Answers,
    vectors: Collection[str] = (),
) -> None:
    """Write the rows that have an answer to `path`, in the order of the input. The file appears whole, or not at all.

    The caller makes sure that no other process writes this file. Memory does not grow with the rows.
    The columns are those of all these rows, then those of their answers.

    - JSON and JSON lines: objects of JSON lines keep their exact text. NaN and infinities become null.
    - CSV and TSV: None, NaN and infinities are empty; nested values are JSON text.
    - Times, decimals and UUIDs are text in all of these. Bytes are refused.
    - Parquet and Arrow: columns of Parquet and Arrow sources keep their types. Others get the type of their values.
      Text beside numbers, or objects with more than `MAX_NAMES` names, become JSON text, and bytes in it Base64.
      Columns of None are text.

    `sources`: files; they are read twice, except for JSON and JSON lines.
    `answers`: returns the columns of the answer to the row at a place; None for none. It is called as often.
    `vectors`: columns of answers that are lists of 32-bit floats in Parquet and Arrow.

    Raises ConfigError: a source cannot be read or is stdin, the file cannot be written, or it cannot hold a value.
    """
    if any(source.path is None for source in sources):
        raise ConfigError(f"{type} needs the input again, and stdin can be read once: store the input in a file")
    with _replacing(path) as scratch:
        if type.format in TABLES:
            _write_typed(scratch, type, sources, answers, vectors)
            return
        with _open_compressed(scratch, type.compression) as stream:
            if type.format in (Format.CSV, Format.TSV):
                _write_csv(stream, type.format, sources, answers)
            else:
                _write_json(stream, type.format, sources, answers)


def encode_row(values: Values, raw: bytes | None, extra: Values) -> bytes:
    r"""Return a line of JSON lines: the columns of a row, then extra ones, and "\n".

    `raw`: the row as JSON; if given, its text is kept exactly, and `values` says only whether it has columns.

    Raises ConfigError: a value cannot be JSON. The message names its column.
    """
    if raw is None:
        return encode(values | extra) + b"\n"
    return join_objects(raw if values else b"", encode(extra)) if extra else raw + b"\n"


def check_row(text_format: Format, row: Row) -> None:
    """Raise ConfigError if a format cannot hold the columns of a row. The message names the column."""
    if text_format in (Format.CSV, Format.TSV):
        for name, value in (row.values or {}).items():
            _field(name, value)
    elif text_format not in TABLES and row.raw is None:
        encode(row.values or {})


def check_sources(file_type: FileType, sources: Sequence[Source], wanted: Callable[[int], bool] | None = None) -> None:
    """Check by the types of columns that an output can hold the sources that are tables.

    A column that may have bytes is read up to the first ones.

    `wanted`: whether the row at a place is for the output; None: all are.

    Raises ConfigError: it cannot; the message names the column. Or a source cannot be read.
    """
    tables = [source for source in sources if source.type.format in TABLES and source.path is not None]
    if file_type.format in TABLES:
        _check_types(file_type.format, tables)
        return
    names = {field.name for field in _fields_of_tables(tables) if _holds(field.type, _may_be_bytes)}
    if not names:
        return
    for row in read_rows(sources, wanted, list(names)):
        try:
            encode({name: value for name, value in (row.values or {}).items() if name in names})
        except ConfigError as error:
            error.file, error.line = row.file, row.line
            raise


def join_objects(first: bytes, second: bytes) -> bytes:
    r"""Return a line of JSON lines: the columns of two objects of JSON, then "\n".

    `first`: b"" if it has none. `second` has at least one.
    """
    return b"%b,%b\n" % (first[:-1], second[1:]) if first else second + b"\n"


# --------------------------------------------------------------------------------------------------------------- text


def encode(values: Values, *, takes_bytes: bool = False) -> bytes:
    """Return columns as a JSON object.

    `takes_bytes`: whether bytes become Base64, and are no error.

    Raises ConfigError: a value cannot be JSON. The message names its column.
    """
    for name, value in () if takes_bytes else values.items():
        if type(value) not in PLAIN:
            _check_text(name, value)
    try:
        return msgspec.json.encode(values)
    except (TypeError, ValueError, RecursionError) as error:
        for name, value in values.items():
            try:
                msgspec.json.encode(value)
            except (TypeError, ValueError, RecursionError) as wrong:
                raise ConfigError(f"the column {name!r} cannot be written as JSON: {wrong}") from wrong
        raise ConfigError(f"a row cannot be written as JSON: {error}") from error


def _check_text(name: str, value: Any) -> None:
    """Raise ConfigError if a value holds bytes, which msgspec would write as Base64."""
    values = [value]
    while values:
        one = values.pop()
        if isinstance(one, (bytes, bytearray, memoryview)):
            raise ConfigError(
                f"the column {name!r} holds bytes, which this format cannot hold: choose .parquet or .arrow"
            )
        inner = one.values() if isinstance(one, dict) else one if isinstance(one, (list, tuple)) else ()
        values += [each for each in inner if type(each) not in PLAIN]


def _answered(sources: Sequence[Source], answers: Answers) -> Iterator[tuple[Row, Values]]:
    for row in read_rows(sources):
        if (answer := answers(row.place)) is not None:
            yield row, answer


def _write_json(stream: BinaryIO, text_format: Format, sources: Sequence[Source], answers: Answers) -> None:
    lines = (encode_row(row.values or {}, row.raw, answer) for row, answer in _answered(sources, answers))
    if text_format is Format.JSONL:
        stream.writelines(lines)
        return
    between = b"[\n"
    for line in lines:
        stream.write(between + line[:-1])
        between = b",\n"
    stream.write(b"\n]\n" if between == b",\n" else b"[]\n")


def _write_csv(stream: BinaryIO, text_format: Format, sources: Sequence[Source], answers: Answers) -> None:
    columns = dict.fromkeys(field.name for field in _fields_of_tables(sources))
    answer_columns: dict[str, None] = {}
    for chunk in _chunks(sources, answers, columns=[]):
        columns.update(dict.fromkeys(name for row in chunk.rows for name in row))
        answer_columns.update(dict.fromkeys(name for answer in chunk.answers for name in answer))
    names = list(columns | answer_columns)
    text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
    delimiter = "," if text_format is Format.CSV else "\t"
    write = csv.writer(text, delimiter=delimiter, lineterminator="\n").writerow
    # Python 3.12 does not quote a carriage return, and reads it as the end of the row.
    write_quoted = csv.writer(text, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL).writerow
    write(names)
    for row, answer in _answered(sources, answers):
        values = (row.values or {}) | answer
        fields = [_field(name, values.get(name)) for name in names]
        (write_quoted if any("\r" in field for field in fields) else write)(fields)
    text.detach()


def _field(name: str, value: Any) -> str:
    """Return a value as a field of CSV."""
    if isinstance(value, str):
        return value
    if type(value) is int:
        return str(value)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    text = _json_text(name, value)
    return cast(str, msgspec.json.decode(text)) if text.startswith('"') else text


def _json_text(name: str, value: Any, *, takes_bytes: bool = False) -> str:
    """Return the JSON text of a value in a column. `takes_bytes`: see `encode`."""
    return encode({name: value}, takes_bytes=takes_bytes)[len(msgspec.json.encode(name)) + 2 : -1].decode()


# ------------------------------------------------------------------------------------------------------------- tables


class _MisfitError(Exception):
    """A column whose values do not fit its type."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Chunk:
    """Some answered rows: a record batch or decoded rows, and the answer of each."""

    def __init__(self, batch: Any, rows: list[Values], answers: list[Values]) -> None:
        self.batch = batch
        self.rows = rows
        self.answers = answers


class _Columns:
    """The names and types of the columns of a table, as far as they are known.

    `types`: type by name of the column.
    `texts`: columns that are JSON text.
    `inferred`: columns whose type follows from values, and the names in their objects.
    `known`: columns whose type is given, whatever their values.
    """

    def __init__(self, known: Mapping[str, Any] | None = None) -> None:
        self.known = known or {}
        self.types: dict[str, Any] = dict(self.known)
        self.texts: set[str] = set()
        self.inferred: dict[str, set[str]] = {}

    def add_type(self, name: str, kind: Any) -> None:
        """Widen a column so that it holds a type too. What has no common type becomes JSON text."""
        import pyarrow as pa

        known = self.types.setdefault(name, kind)
        if known.equals(kind):
            return
        if pa.types.is_dictionary(known) or pa.types.is_dictionary(kind):
            known, kind = (one.value_type if pa.types.is_dictionary(one) else one for one in (known, kind))
        try:
            schemas = [pa.schema([(name, one)]) for one in (known, kind)]
            self.types[name] = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
        except pa.ArrowException:
            self.texts.add(name)

    def add_values(self, rows: list[Values]) -> None:
        """Add the columns of rows, with the types of their values."""
        import pyarrow as pa

        for name in dict.fromkeys(name for row in rows for name in row):
            if name in self.texts or name in self.known:
                continue
            values = [row.get(name) for row in rows]
            names = self.inferred.setdefault(name, set())
            kind = pa.string()
            try:
                nested = (value for value in values if isinstance(value, (dict, list)))
                if any(_collect_names(value, names) > MAX_DEPTH for value in nested) or len(names) > MAX_NAMES:
                    self.texts.add(name)
                else:
                    kind = pa.array(values).type
            except (pa.ArrowException, ValueError, TypeError, OverflowError):
                self.texts.add(name)
            self.add_type(name, kind)

    def schema(self) -> Any:
        """Return the Arrow schema."""
        import pyarrow as pa

        fields = []
        for name, kind in self.types.items():
            if name in self.inferred:
                kind = _without_nulls(kind)
            if _holds(kind, lambda one: pa.types.is_struct(one) and one.num_fields == 0):  # Parquet cannot store it
                self.texts.add(name)
            fields.append(pa.field(name, pa.string() if name in self.texts else kind))
        return pa.schema(fields)


def _without_nulls(kind: Any) -> Any:
    import pyarrow as pa

    if pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_nulls(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_without_nulls(kind.value_type)))
    return kind


def _collect_names(value: Any, names: set[str]) -> int:
    """Add the names of all objects in a value, and return how deep it is nested."""
    depth, level = 0, [value]
    while level := [one for one in level if isinstance(one, (dict, list))]:
        depth += 1
        names.update(*(one for one in level if isinstance(one, dict)))
        level = [each for one in level for each in (one.values() if isinstance(one, dict) else one)]
    return depth


def _holds(kind: Any, matches: Callable[[Any], bool]) -> bool:
    """Return whether a type, or one inside it, matches."""
    return matches(kind) or any(_holds(kind.field(index).type, matches) for index in range(kind.num_fields))


def _may_be_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _holds(kind.value_type, _may_be_bytes)
    if isinstance(kind, pa.BaseExtensionType):
        return kind != pa.uuid() and _holds(kind.storage_type, _may_be_bytes)
    is_bytes = pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary
    return any(matches(kind) for matches in is_bytes)


def _check_types(file_format: Format, tables: Sequence[Source]) -> None:
    """Raise ConfigError: a format does not store a type of these tables."""
    import pyarrow as pa

    columns = _Columns()
    for field in _fields_of_tables(tables):
        columns.add_type(field.name, _storable(field.type))
    for field in columns.schema():
        schema = pa.schema([field])
        try:
            with _open_writer(pa.BufferOutputStream(), file_format, schema) as writer:
                writer.write_table(pa.Table.from_arrays([pa.nulls(1, field.type)], schema=schema))
        except pa.ArrowNotImplementedError as error:
            raise ConfigError(
                f"the column {field.name!r} has the type {field.type}, which {file_format} cannot hold: {error}"
            ) from error


def _storable(kind: Any) -> Any:
    """Return a type, or the nearest one that Parquet stores: no dictionary of views, which polars writes."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind) and pa.types.is_string_view(kind.value_type):
        return pa.dictionary(kind.index_type, pa.large_string(), kind.ordered)
    return kind


def _write_typed(
    scratch: Path, file_type: FileType, sources: Sequence[Source], answers: Answers, vectors: Collection[str]
) -> None:
    import pyarrow as pa

    columns, answer_columns = _Columns(), _Columns(dict.fromkeys(vectors, pa.list_(pa.float32())))
    for field in _fields_of_tables(sources):
        columns.add_type(field.name, _storable(field.type))
    for chunk in _chunks(sources, answers, columns=[]):
        columns.add_values(chunk.rows)
        answer_columns.add_values(chunk.answers)
    plain = scratch if not file_type.compression else scratch.with_suffix(f".plain{PART}")
    try:
        while True:
            schema = columns.schema(), answer_columns.schema()
            try:
                _write_batches(
                    plain, file_type.format, schema, columns.texts | answer_columns.texts, _chunks(sources, answers)
                )
                break
            except pa.ArrowException as error:
                raise ConfigError(f"cannot write the table: {error}") from error
            except _MisfitError as misfit:  # such as integers that a float cannot hold
                (answer_columns if misfit.name in answer_columns.types else columns).texts.add(misfit.name)
        if file_type.compression:
            with plain.open("rb") as source_stream, _open_compressed(scratch, file_type.compression) as stream:
                shutil.copyfileobj(source_stream, stream, BUFFER)
    finally:
        if file_type.compression:
            plain.unlink(missing_ok=True)


def _fields_of_tables(sources: Sequence[Source]) -> Iterator[Any]:
    """Yield the Arrow fields of all sources that are tables."""
    for source in sources:
        if source.type.format in TABLES:
            with open_table(source) as table:
                yield from table.schema


def _chunks(sources: Sequence[Source], answers: Answers, columns: list[str] | None = None) -> Iterator[_Chunk]:
    """Yield the answered rows of all sources. `columns`: those that record batches have; None: all."""
    place = 0
    for source in sources:
        if source.type.format in TABLES:
            with open_table(source) as table:
                for batch in table.batches(columns):
                    found = [answers(place + index) for index in range(batch.num_rows)]
                    place += batch.num_rows
                    kept = [answer for answer in found if answer is not None]
                    if kept:
                        places = [index for index, answer in enumerate(found) if answer is not None]
                        yield _Chunk(rows_at(batch, places), [], kept)
            continue
        rows: list[Values] = []
        kept = []
        size = last = 0
        for row in read_rows([source]):
            last = row.place + 1
            if (answer := answers(place + row.place)) is None:
                continue
            rows.append(row.values or {})
            kept.append(answer)
            size += len(row.raw) if row.raw else sum(len(one) for one in rows[-1].values() if isinstance(one, str))
            if len(rows) >= CHUNK_ROWS or size >= CHUNK_BYTES:
                yield _Chunk(None, rows, kept)
                rows, kept, size = [], [], 0
        place += last
        if rows:
            yield _Chunk(None, rows, kept)


def _write_batches(
    path: Path, file_format: Format, schemas: tuple[Any, Any], texts: set[str], chunks: Iterable[_Chunk]
) -> None:
    import pyarrow as pa

    own, answered = schemas
    own = pa.schema([field for field in own if field.name not in answered.names])
    schema = pa.schema([*own, *answered])
    with pa.OSFile(str(path), "wb") as sink, _open_writer(sink, file_format, schema) as writer:
        for group in _grouped(_batches(own, answered, schema, texts, chunks)):
            table = pa.Table.from_batches(group, schema)
            writer.write_table(table, table.num_rows or None)


def _open_writer(sink: Any, file_format: Format, schema: Any) -> Any:
    """Return what writes tables of a schema into a sink, which it finishes as a context manager."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file_format is Format.PARQUET:
        return pq.ParquetWriter(sink, schema)
    if any(_holds(field.type, pa.types.is_dictionary) for field in schema):
        return pa.ipc.new_stream(sink, schema)  # the file format has one dictionary for all batches
    return pa.ipc.new_file(sink, schema)


def _batches(own: Any, answered: Any, schema: Any, texts: set[str], chunks: Iterable[_Chunk]) -> Iterator[Any]:
    import pyarrow as pa

    for chunk in chunks:
        columns = [
            _build(chunk.rows, field, field.name in texts) if chunk.batch is None
            else _convert(chunk.batch, field, field.name in texts)
            for field in own
        ]  # fmt: skip
        columns += [_build(chunk.answers, field, field.name in texts) for field in answered]
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


def _build(rows: list[Values], field: Any, as_text: bool) -> Any:
    """Return a column of rows as an array."""
    import pyarrow as pa

    values = [row.get(field.name) for row in rows]
    if as_text:
        values = [None if value is None else _json_text(field.name, value, takes_bytes=True) for value in values]
    try:
        return pa.array(values, type=field.type)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        if as_text:
            raise ConfigError(f"the column {field.name!r} cannot be written: {error}") from error
        raise _MisfitError(field.name) from error


def _convert(batch: Any, field: Any, as_text: bool) -> Any:
    """Return a column of a batch as an array of the field's type."""
    import pyarrow as pa

    if field.name not in batch.schema.names:
        return pa.nulls(batch.num_rows, field.type)
    column = batch.column(field.name)
    if not as_text:
        if column.type.equals(field.type):
            return column
        with contextlib.suppress(pa.ArrowException):
            return column.cast(field.type)
    values = to_microseconds(batch.select([field.name])).column(0).to_pylist()
    return _build([{field.name: value} for value in values], field, as_text)


def _grouped(batches: Iterable[Any]) -> Iterator[list[Any]]:
    """Yield batches together that make one row group."""
    group: list[Any] = []
    size = rows = 0
    for batch in batches:
        group.append(batch)
        size += batch.nbytes
        rows += batch.num_rows
        if size >= GROUP_BYTES or rows >= GROUP_ROWS:
            yield group
            group, size, rows = [], 0, 0
    if group:
        yield group


# -------------------------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a new file, beside the one that a path leads to, that replaces it at the end. It keeps its mode.

    A device or pipe is given as it is. After an error the new file is removed, and the old one is as it was.

    Raises ConfigError: it cannot be written, also within the context.
    """
    target = path.resolve()
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}{PART}")
    try:
        if target.exists() and not target.is_file():
            yield target
            return
        for left in target.parent.glob(f".{glob.escape(target.name)}.*{PART}"):  # by a process that was killed
            left.unlink(missing_ok=True)
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)  # less the umask
        try:
            os.close(descriptor)
            if target.exists():
                shutil.copymode(target, scratch)
            yield scratch
            _sync(scratch)
            scratch.replace(target)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
        _sync(target.parent)
    except OSError as error:
        raise ConfigError(f"cannot write the results: {error.strerror or error}", file=path) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _open_compressed(path: Path, compression: str) -> Iterator[BinaryIO]:
    """Open a file to write bytes into it, which are compressed."""
    with contextlib.ExitStack() as stack:
        raw: Any = stack.enter_context(path.open("wb", buffering=BUFFER))
        if compression == "gz":
            raw = stack.enter_context(gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=6, mtime=0))
        elif compression == "zst":
            import pyarrow as pa

            raw = stack.enter_context(pa.CompressedOutputStream(pa.PythonFile(raw, mode="w"), "zstd"))
        if compression:
            raw = stack.enter_context(io.BufferedWriter(raw, BUFFER))
        yield raw
