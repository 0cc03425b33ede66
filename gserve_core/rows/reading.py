"""Rows out of files, one after the other, whatever the format of each file."""

import contextlib
import csv
import functools
import hashlib
import itertools
import json
import re
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from ..errors import ConfigError
from .formats import BOM, BUFFER, Format, Source, open_bytes, reading, require_pyarrow

BATCH_BYTES = 8 * 1024 * 1024
"""Size of the rows of a table that are decoded at once, in bytes, as far as it is known."""
BATCH_ROWS = 1024
"""Maximum number of rows of a table that are decoded at once."""
INDEX = re.compile(r"-?\d+")
"""Names that pandas gives to rows."""

UNCLOSED = "unexpected end of data"
"""What Python's csv says at the end of a file if a quote is open."""
UNDECODABLE = (ValueError, OverflowError)
"""Errors of Arrow values that Python's types do not have, such as a date in the year 20000."""

type Wanted = Callable[[int], bool]
type Values = dict[str, Any]
type Rows = Generator["Row", None, int]
"""Yields the rows of one source, and returns the place after its last row."""


class Row(Struct, frozen=True, gc=False):
    """One row of the input.

    `place`: index in the whole input, over all sources, from 0.
    `line`: line of a text format, else number of the row, in its file, from 1.
    `file`: path of its file, or "stdin".
    `values`: its columns; None if there is an error.
    `raw`: exact bytes of an object in JSON lines, else None.
    `error`: why the row cannot be read.
    """

    place: int
    line: int
    file: str
    values: Values | None
    raw: bytes | None = None
    error: str | None = None


def read_rows(
    sources: Sequence[Source], wanted: Wanted | None = None, columns: Sequence[str] | None = None
) -> Iterator[Row]:
    """Yield the rows of all sources, in order. A row that cannot be read has an error; the others follow.

    Rows are streamed, except that a JSON file is held in memory whole.

    `wanted`: whether the row at a place is yielded. Rows that are not are counted, and decoded only for a CSV or JSON.
    `columns`: names that are enough. Parquet and Arrow files decode no other; other formats give all columns.

    Raises ConfigError: a file cannot be read, is damaged, or has no rows in a known form.
    """
    place = 0
    for source in sources:
        place = yield from _rows(source, place, wanted, columns)


def count_rows(sources: Sequence[Source]) -> int:
    """Return the number of rows of all sources. Raises ConfigError: see `read_rows`."""
    count = 0

    def add(place: int) -> bool:
        nonlocal count
        count += 1
        return False

    for source in sources:
        if source.type.format in (Format.JSONL, Format.TXT):  # in a short way, since there may be millions
            with open_bytes(source) as stream:
                first = next(stream, b"").removeprefix(BOM)
                count += bool(first.strip()) + sum(not line.isspace() for line in stream)
        else:
            deque(read_rows([source], add), maxlen=0)
    return count


def _rows(source: Source, place: int, wanted: Wanted | None, columns: Sequence[str] | None) -> Rows:
    match source.type.format:
        case Format.JSONL:
            return _read_lines(source, place, wanted, _parse_json_line)
        case Format.TXT:
            return _read_lines(source, place, wanted, _parse_text_line)
        case Format.CSV:
            return _read_csv(source, place, wanted, ",")
        case Format.TSV:
            return _read_csv(source, place, wanted, "\t")
        case Format.JSON:
            return _read_json(source, place, wanted)
        case Format.PARQUET | Format.ARROW:
            return _read_table(source, place, wanted, columns)


# -------------------------------------------------------------------------------------------------------------- lines


type Parsed = tuple[Values | None, bytes | None, str | None]
"""The values, the raw bytes and the error of a row."""


def _read_lines(source: Source, place: int, wanted: Wanted | None, parse: Callable[[bytes], Parsed]) -> Rows:
    file = str(source)
    with open_bytes(source) as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                line = line.removeprefix(BOM)
            if not line or line.isspace():
                continue
            if wanted is None or wanted(place):
                values, raw, error = parse(line)
                yield Row(place, number, file, values, raw, error)
            place += 1
    return place


_decode_json = msgspec.json.Decoder().decode


def _parse_json_line(line: bytes) -> Parsed:
    raw = line.strip()
    try:
        values = _decode_json(raw)
    except (ValueError, RecursionError):
        value, error = _decode_leniently(raw)
        values, error = (None, error) if error else _bare_row(value)
        return values, None, error  # without `raw`, which is no JSON by the standard
    if type(values) is dict:
        return values, raw, None
    values, error = _bare_row(values)
    return values, None, error


def _parse_text_line(line: bytes) -> Parsed:
    try:
        return {"text": line.rstrip(b"\r\n").decode()}, None, None
    except UnicodeDecodeError as error:
        return None, None, _encoding_error(error, "the line")


def _decode_leniently(raw: bytes) -> tuple[Any, str | None]:
    """Return the value of JSON that msgspec refuses, and an error. NaN and infinities are no error."""
    try:
        value = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        return None, _encoding_error(error, "the line")
    except RecursionError:
        return None, "nested too deeply"
    except ValueError as error:
        return None, f"not JSON: {error}"
    return value, _surrogate_error(value)


def _surrogate_error(value: Any) -> str | None:
    try:
        msgspec.json.encode(value)
    except UnicodeEncodeError as error:
        return f"half a character, which is no text (lone surrogate {error.object[error.start]!a})"
    except RecursionError:
        return "nested too deeply"
    return None


def _encoding_error(error: UnicodeDecodeError, where: str) -> str:
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start + 1} of {where}"


def _bare_row(value: Any) -> tuple[Values | None, str | None]:
    """Return the columns of a row that is not an object, and an error."""
    if isinstance(value, dict):
        return value, None
    if isinstance(value, str):
        return {"prompt": value}, None
    if isinstance(value, list) and value:
        if all(type(one) is dict for one in value):
            return {"messages": value}, None
        if all(type(one) is int for one in value):
            return {"prompt": value}, None
    return None, f"expected an object, found {_describe(value)}"


def _describe(value: Any) -> str:
    if isinstance(value, dict) and value:
        names = ", ".join(repr(name) for name in itertools.islice(value, 5))
        return f"an object with {names}{', …' if len(value) > 5 else ''}"
    if isinstance(value, list) and value:
        return f"a list that begins with {_describe_kind(value[0])}"
    return _describe_kind(value)


def _describe_kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, dict):
        return "an object" if value else "an empty object"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return "a text" if isinstance(value, str) else "a number"


# ---------------------------------------------------------------------------------------------------------------- CSV


def _read_csv(source: Source, place: int, wanted: Wanted | None, delimiter: str) -> Rows:
    file = str(source)
    csv.field_size_limit(sys.maxsize)
    with open_bytes(source) as stream:
        undecoded: list[str] = []
        # strict: else a quote that is never closed takes the rest of the file, without an error
        reader = csv.reader(_decoded(stream, undecoded), delimiter=delimiter, strict=True)
        names = _header(reader, undecoded, file)
        while True:
            line = reader.line_num + 1
            error: str | None = None
            try:
                fields = next(reader)
            except StopIteration:
                return place
            except csv.Error as wrong:
                if str(wrong) == UNCLOSED and reader.line_num > line:  # it has taken rows that would be lost
                    raise ConfigError(
                        "a quote in the row that begins in this line is never closed, and so takes all lines up to the"
                        f" last, {reader.line_num}: close it; a quote within a quoted field must be doubled",
                        file=file, line=line,
                    ) from wrong  # fmt: skip
                why = "a quote is never closed" if str(wrong) == UNCLOSED else wrong
                fields, error = [""], f"not {source.type.format.upper()}: {why}"
            if undecoded:
                error = undecoded[0]
                undecoded.clear()
            if not fields:  # a blank line
                continue
            if wanted is None or wanted(place):
                values, error = (None, error) if error else _named_fields(names, fields)
                yield Row(place, line, file, values, None, error)
            place += 1


def _decoded(stream: Iterator[bytes], errors: list[str]) -> Iterator[str]:
    """Yield lines as text, and append to `errors` for each that is not UTF-8. It does not end the rows."""
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(BOM)
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            errors.append(_encoding_error(error, f"line {number}"))
            yield line.decode(errors="surrogateescape")


def _header(reader: Any, undecoded: list[str], file: str) -> list[str]:
    try:
        names: list[str] = next((fields for fields in reader if fields), [])
    except csv.Error as error:
        raise ConfigError(f"the header is wrong: {error}", file=file, line=1) from error
    if undecoded:
        raise ConfigError(f"the header is {undecoded[0]}", file=file, line=1)
    if not names:
        raise ConfigError("expected a header with the names of the columns, found nothing", file=file)
    if "" in names:
        raise ConfigError(
            f"column {names.index('') + 1} has no name in the header; pandas writes such a column of row numbers unless"
            " it is told index=False",
            file=file, line=1,
        )  # fmt: skip
    if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ConfigError(f"the column {repeated[0]!r} occurs twice in the header", file=file, line=1)
    return names


def _named_fields(names: list[str], fields: list[str]) -> tuple[Values | None, str | None]:
    """Return the columns of a row, and an error. An empty or missing field is None."""
    if len(fields) > len(names):
        wrong = f"expected {len(names)} fields as in the header, found {len(fields)}"
        return None, f"{wrong}: quote a field that holds delimiters"
    values: Values = {name: field or None for name, field in zip(names, fields, strict=False)}
    return values if len(fields) == len(names) else dict.fromkeys(names) | values, None


# --------------------------------------------------------------------------------------------------------------- JSON


def _read_json(source: Source, place: int, wanted: Wanted | None) -> Rows:
    file = str(source)
    with open_bytes(source) as stream:
        raw = stream.read().removeprefix(BOM)
    for number, value in enumerate(_rows_of_document(_parse_document(raw, file), file), 1):
        if wanted is None or wanted(place):
            values, error = _bare_row(value)
            if values is not None and (error := _surrogate_error(values)):
                values = None
            yield Row(place, number, file, values, None, error)
        place += 1
    return place


def _parse_document(raw: bytes, file: str) -> Any:
    try:
        return _decode_json(raw)
    except (ValueError, RecursionError):
        pass
    try:  # one lone surrogate must not cost all rows
        return json.loads(raw.decode())
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(_encoding_error(error, "the file"), file=file, line=line) from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"not JSON: {error.msg} at column {error.colno}", file=file, line=error.lineno) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not JSON: {error}", file=file) from error


def _rows_of_document(document: Any, file: str) -> list[Any]:
    """Return the rows of a JSON document: a list, one list in an object, or what pandas' `to_json` writes."""
    if isinstance(document, list):
        return _rows_of_values(document)
    if isinstance(document, dict) and document:
        for rows_of in (_rows_of_split, _rows_of_frame, _rows_of_columns, _rows_of_list):
            if (rows := rows_of(document)) is not None:
                return rows
    raise ConfigError(
        f"expected a list of objects, one object that holds such a list, or what pandas writes with to_json; "
        f"found {_describe(document)}: for one object a line, give --format jsonl",
        file=file,
    )


def _rows_of_values(rows: list[Any]) -> list[Any]:
    """Return rows as they are, but with numbers as names for the columns of lists of values (`orient="values"`)."""
    first = rows[0] if rows else None
    if not isinstance(first, list) or not all(isinstance(row, list) and len(row) == len(first) for row in rows):
        return rows
    if all(_bare_row(row)[0] is not None for row in rows):
        return rows  # conversations, or token ids
    names = [str(number) for number in range(len(first))]
    return [dict(zip(names, row, strict=True)) for row in rows]


def _rows_of_split(document: Values) -> list[Any] | None:
    names, rows = document.get("columns"), document.get("data")
    if document.keys() - {"columns", "index", "data"} or not isinstance(names, list) or not isinstance(rows, list):
        return None
    names = [name if isinstance(name, str) else json.dumps(name) for name in names]
    return [dict(zip(names, row, strict=False)) if isinstance(row, list) else row for row in rows]


def _rows_of_frame(document: Values) -> list[Any] | None:
    """Return the rows of `orient="table"`. The index is left out unless it has a name of its own."""
    schema, rows = document.get("schema"), document.get("data")
    if not (isinstance(schema, dict) and isinstance(rows, list) and "fields" in schema):
        return None
    if schema.get("primaryKey") == ["index"]:
        return [{k: v for k, v in row.items() if k != "index"} if isinstance(row, dict) else row for row in rows]
    return rows


def _rows_of_columns(document: Values) -> list[Any] | None:
    """Return the rows of an object of objects or lists: by column, or by the name of the row."""
    parts = list(document.values())
    if all(isinstance(part, dict) for part in parts):
        if all(INDEX.fullmatch(name) for part in parts for name in part):
            index = dict.fromkeys(itertools.chain.from_iterable(parts))
            return [{name: part.get(row) for name, part in document.items()} for row in index]
        return parts if all(INDEX.fullmatch(name) for name in document) else None
    if all(isinstance(part, list) and len(part) == len(parts[0]) for part in parts) and not all(map(_is_rows, parts)):
        return [dict(zip(document, row, strict=True)) for row in zip(*parts, strict=True)]
    return None


def _rows_of_list(document: Values) -> list[Any] | None:
    found = [part for part in document.values() if _is_rows(part)]
    return found[0] if len(found) == 1 else None


def _is_rows(part: Any) -> bool:
    return isinstance(part, list) and bool(part) and all(isinstance(row, dict) for row in part)


# ------------------------------------------------------------------------------------------------------------- tables


type Groups = Iterator[tuple[int, Callable[[], Iterable[Any]]]]
"""Yields the number of rows of each stored group, and a function that decodes it into record batches of few rows."""


class Table:
    """An open Parquet or Arrow file. `schema`: its Arrow schema."""

    def __init__(self, schema: Any, groups: Callable[[list[str] | None], Groups]) -> None:
        self.schema = schema
        self._groups = groups

    def groups(self, columns: list[str] | None = None) -> Groups:
        """Yield the groups in which rows are stored. `columns`: those that are decoded; None: all."""
        return self._groups(columns)

    def batches(self, columns: list[str] | None = None) -> Iterator[Any]:
        """Yield all record batches, of few rows each. `columns`: those that are decoded; None: all."""
        for _, decode in self._groups(columns):
            yield from decode()


@contextlib.contextmanager
def open_table(source: Source) -> Iterator[Table]:
    """Open a Parquet or Arrow source.

    A compressed one, or stdin, is first copied to a temporary file in `$TMPDIR`.

    Raises ConfigError: it cannot be read, is damaged, or has two columns of one name.
    """
    require_pyarrow(source.type, str(source))
    import pyarrow as pa

    with contextlib.ExitStack() as stack:
        stack.enter_context(reading(source))
        path = source.path
        if path is None or source.type.compression:
            scratch = stack.enter_context(tempfile.TemporaryFile())  # it has no name, so that no crash leaves it
            with open_bytes(source) as stream:
                shutil.copyfileobj(stream, scratch, BUFFER)
            scratch.flush()
            path = Path(f"/proc/self/fd/{scratch.fileno()}")
        try:
            open_file = _open_parquet if source.type.format is Format.PARQUET else _open_arrow
            table = stack.enter_context(open_file(path))
            names = table.schema.names
            if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
                raise ConfigError(f"the column {repeated[0]!r} occurs twice", file=str(source))
            yield table
        except pa.ArrowException as error:
            raise ConfigError(f"cannot read the table: {error}", file=str(source)) from error


@contextlib.contextmanager
def _open_parquet(path: Path) -> Iterator[Table]:
    import pyarrow.parquet as pq

    # A small buffer and no read-ahead: else whole column chunks are in memory.
    with pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as file:

        def groups(columns: list[str] | None) -> Groups:
            for number in range(file.metadata.num_row_groups):
                group = file.metadata.row_group(number)
                options = {"row_groups": [number], "columns": columns, "use_threads": False}
                size = _batch_rows(group.num_rows, group.total_byte_size)
                yield group.num_rows, functools.partial(file.iter_batches, size, **options)

        yield Table(file.schema_arrow, groups)


@contextlib.contextmanager
def _open_arrow(path: Path) -> Iterator[Table]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as mapped:
        is_file = mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        reader = pa.ipc.open_file(mapped) if is_file else pa.ipc.open_stream(mapped)

        def groups(columns: list[str] | None) -> Groups:
            for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
                chosen = batch if columns is None else batch.select(columns)
                yield batch.num_rows, functools.partial(_slices, chosen, _batch_rows(batch.num_rows, batch.nbytes))

        yield Table(reader.schema, groups)


def _batch_rows(rows: int, size: int) -> int:
    """Return how many rows are decoded at once, of rows with a size in bytes."""
    return max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(1, size)))


def _slices(batch: Any, rows: int) -> Iterator[Any]:
    return (batch.slice(start, rows) for start in range(0, batch.num_rows, rows))


def _read_table(source: Source, place: int, wanted: Wanted | None, columns: Sequence[str] | None) -> Rows:
    file, begin = str(source), place
    with open_table(source) as table:
        chosen = None if columns is None else [name for name in table.schema.names if name in columns]
        for count, decode in table.groups(chosen):
            marks = bytes(map(wanted, range(place, place + count))) if wanted else b"\1" * count
            if any(marks):
                at = 0
                for batch in decode():
                    for index, values, error in _decode_batch(batch, marks[at : at + batch.num_rows]):
                        number = place - begin + at + index
                        yield Row(begin + number, number + 1, file, values, None, error)
                    at += batch.num_rows
            place += count
    return place


def _decode_batch(batch: Any, marks: bytes) -> Iterator[tuple[int, Values | None, str | None]]:
    """Yield the index, the values and the error of each row of a batch that is marked."""
    indices = [index for index, mark in enumerate(marks) if mark]
    if not indices:
        return
    batch = rows_at(batch, indices)
    decoded: list[tuple[Values | None, str | None]]
    if not batch.num_columns:
        decoded = [({}, None)] * len(indices)
    else:
        batch = to_microseconds(batch)
        try:
            decoded = [(values, None) for values in batch.to_pylist()]
        except UNDECODABLE:
            decoded = [_decode_row(batch, at) for at in range(batch.num_rows)]
    yield from ((index, *one) for index, one in zip(indices, decoded, strict=True))


def rows_at(batch: Any, indices: Sequence[int]) -> Any:
    """Return the rows of a record batch at some places, of which there is at least one."""
    import pyarrow as pa

    if len(indices) == batch.num_rows:
        return batch
    try:
        return batch.take(pa.array(indices))
    except pa.ArrowNotImplementedError:  # pyarrow takes none of views, which polars writes
        slices = pa.Table.from_batches([batch.slice(index, 1) for index in indices])
        return slices.combine_chunks().to_batches()[0]


def _decode_row(batch: Any, at: int) -> tuple[Values | None, str | None]:
    try:
        return batch.slice(at, 1).to_pylist()[0], None
    except UNDECODABLE as error:
        return None, f"cannot decode the row: {error}"


def to_microseconds(batch: Any) -> Any:
    """Return a batch whose times have no nanoseconds, which Python's types do not have."""
    import pyarrow as pa

    schema = pa.schema([field.with_type(_microseconds(field.type)) for field in batch.schema])
    return batch if schema.equals(batch.schema) else batch.cast(schema, safe=False)


def _microseconds(kind: Any) -> Any:
    import pyarrow as pa

    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        return pa.timestamp("us", kind.tz)
    if pa.types.is_duration(kind) and kind.unit == "ns":
        return pa.duration("us")
    if pa.types.is_time64(kind) and kind.unit == "ns":
        return pa.time64("us")
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_microseconds(field.type)) for field in kind])
    for is_list, make in ((pa.types.is_list, pa.list_), (pa.types.is_large_list, pa.large_list)):
        if is_list(kind):
            return make(kind.value_field.with_type(_microseconds(kind.value_type)))
    return kind


# ------------------------------------------------------------------------------------------------------------ digests


class Digest(NamedTuple):
    """The content of a file at one time.

    `name`: name of the file, without its folder.
    `size`: number of bytes.
    `digest`: BLAKE2b of the bytes, hexadecimal.
    """

    name: str
    size: int
    digest: str


def digest(sources: Sequence[Source]) -> list[Digest]:
    """Return the content of each source, as it is stored. Stdin is left out: it can be read once.

    Raises ConfigError: a file cannot be read.
    """
    return [_digest(source) for source in sources if source.path is not None]


def begins_as(source: Source, known: Digest) -> bool:
    """Return whether a source begins with the lines that it had. Raises ConfigError: it cannot be read.

    A file to which lines were appended does. One whose last line has become longer does not.
    """
    assert source.path is not None
    if known.size:
        with reading(source), source.path.open("rb") as stream:
            stream.seek(known.size - 1)
            around = stream.read(2)
        if len(around) == 2 and not any(byte in b"\r\n" for byte in around):
            return False
    return _digest(source, known.size).digest == known.digest


def _digest(source: Source, limit: int | None = None) -> Digest:
    assert source.path is not None
    hashed, size, buffer = hashlib.blake2b(digest_size=16), 0, bytearray(BUFFER)
    view = memoryview(buffer)
    with reading(source), source.path.open("rb", buffering=0) as stream:
        while count := stream.readinto(view if limit is None else view[: limit - size]):
            hashed.update(view[:count])
            size += count
    return Digest(source.path.name, size, hashed.hexdigest())
