"""Kinds of tables in memory: rows out of them, and the same kind back with the answers.

No library of tables is imported here. Whoever gives a table has imported its library, so `sys.modules` has it.
"""

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from datetime import datetime
from os import PathLike
from typing import Any

import msgspec

from ..errors import ConfigError

CHUNK = 1024
"""Rows of a table that are converted at a time. More rows need more memory, fewer need more time."""

EXPECTED = (
    "expected rows: a list of mappings, a DataFrame of pandas or polars, an Arrow table, a datasets.Dataset, "
    "a mapping of columns, or another iterable of mappings"
)

type Row = dict[str, Any]


class Table:
    """Rows of some kind, and the way back to that kind.

    `size`: number of rows; None if unknown.
    `columns`: the names of the columns; None if they are known only after the rows have been read.
    `is_lazy`: whether the rows come one by one. Then each one is yielded with its answer, as `row_with` makes it.
    """

    size: int | None = None
    columns: tuple[str, ...] | None = None
    is_lazy = False

    def rows(self) -> Iterator[Row]:
        """Yield the rows in order, with plain Python values. A missing value is None.

        A lazy table can be read once. Raises ConfigError: one of its rows is no mapping.
        """
        raise NotImplementedError

    def with_answers(self, answers: Sequence[Row | None], names: Iterable[str] = ()) -> Any:
        """Return all rows in order, in the same kind, with the columns of the answers after their own.

        `answers`: one for each row. A row without an answer has nulls.
        `names`: columns that are added even if no answer has them.

        A column of a typed table whose values have different types becomes a column of JSON texts.

        Raises ConfigError: the rows have one of these columns already.
        Raises TypeError: the table is lazy. Raises ValueError: there are more or fewer answers than rows.
        """
        if self.is_lazy:
            raise TypeError("the rows of a lazy table are yielded one by one: use row_with")
        if len(answers) != self.size:
            raise ValueError(f"expected an answer or None for each of {self.size} rows, got {len(answers)}")
        columns: dict[str, list[Any]] = {name: [] for name in names}
        for answer in answers:
            columns.update({name: [] for name in answer or () if name not in columns})
        for name, values in columns.items():
            values.extend(None if answer is None else answer.get(name) for answer in answers)
        if self.columns is not None:
            _refuse_taken(self.columns, columns)
        return self._extended(columns)

    def _extended(self, columns: dict[str, list[Any]]) -> Any:
        """Return the table with more columns, which it does not have yet."""
        raise NotImplementedError


def table_of(given: Any) -> Table:
    """Return the rows that `service.map` was given as a table.

    A polars LazyFrame is collected here. Iterators and streaming datasets are not read before `rows`.

    Raises ConfigError: they are not rows, or two columns have the same name.
    """
    for library, name, kind in _KINDS:
        if _is(given, library, name):
            return kind(given)
    _refuse_columns(given)
    if isinstance(given, Mapping):
        return _Columns(given)
    if isinstance(given, (list, tuple)) and not hasattr(given, "_fields"):
        return _Rows(given)
    if isinstance(given, Iterable) and not _is_row(given):
        return _Stream(given, len(given) if isinstance(given, Sized) else None)
    hint = ": pass a list of rows, [row]" if _is_row(given) else ""
    raise ConfigError(f"{EXPECTED}; got {_name(given)}{hint}")


def row_with(row: Row, answer: Row) -> Row:
    """Return a row with its answer's columns after its own. Raises ConfigError: it has one of them already."""
    _refuse_taken(row, answer)
    return row | answer


def _refuse_taken(own: Iterable[str], added: Iterable[str]) -> None:
    taken = set(added).intersection(own)
    if taken:
        names = ", ".join(repr(name) for name in sorted(taken))
        raise ConfigError(
            f"the rows already have the answers' column {names}: rename it, or set a prefix for the answers' columns, "
            "like prefix='model_'"
        )


def _refuse_columns(given: Any) -> None:
    """Raise ConfigError if only one column was given, a text, or a path."""
    if isinstance(given, (str, bytes, PathLike)):
        raise ConfigError(f"{EXPECTED}; got {_name(given)}: for a file use run_file, for one prompt use generate")
    if _is(given, "datasets", "DatasetDict") or _is(given, "datasets", "IterableDatasetDict"):
        split = next(iter(given), "train")
        raise ConfigError(f"expected the rows of one split, got {_name(given)}: choose a split: data[{split!r}]")
    if _is(given, "pandas", "Series"):
        raise ConfigError(f"{EXPECTED}; got {_name(given)}: pass df, or use generate(df['prompt'])")
    for library, name in (
        ("polars", "Series"),
        ("pyarrow", "Array"),
        ("pyarrow", "ChunkedArray"),
        ("numpy", "ndarray"),
        ("torch", "Tensor"),
        ("datasets", "Column"),
    ):
        if _is(given, library, name):
            raise ConfigError(f"{EXPECTED}; got {_name(given)}: pass the table of this column, or use generate(column)")


# ------------------------------------------------------------------------------------------------ plain Python objects


class _Rows(Table):
    """A list or tuple of rows. The way back is a list of dicts, which keep the values as they were given."""

    def __init__(self, given: Sequence[Any]) -> None:
        for place, row in enumerate(given):
            if not _is_row(row):
                raise _no_row(place, row)
        self.size = len(given)
        self.columns = tuple(dict.fromkeys(str(name) for row in given for name in _fields(row)))
        self._given = given

    def rows(self) -> Iterator[Row]:
        return map(_plain_row, self._given)

    def _extended(self, columns: dict[str, list[Any]]) -> list[Row]:
        made = [dict(_fields(row)) for row in self._given]
        for place, row in enumerate(made):
            row.update({name: values[place] for name, values in columns.items()})
        return made


class _Columns(Table):
    """A mapping of columns. The way back is a dict with the same columns, and lists of answers."""

    def __init__(self, given: Mapping[Any, Any]) -> None:
        for name, values in given.items():
            if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Sized):
                raise ConfigError(
                    f"expected a mapping of columns, each a list; got {_name(values)} as column {str(name)!r}: "
                    "for a single row pass a list, [row]"
                )
        sizes = {str(name): len(values) for name, values in given.items()}
        if len(set(sizes.values())) > 1:
            raise ConfigError(f"expected columns of one length, got {sizes}")
        self.size = next(iter(sizes.values()), 0)
        self.columns = _distinct(given)
        self._given = dict(given)

    def rows(self) -> Iterator[Row]:
        columns = [
            _pandas_values(values) if _is(values, "pandas", "Series") else map(_plain, values)
            for values in self._given.values()
        ]
        for values in zip(*columns, strict=True):
            yield dict(zip(self.columns or (), values, strict=True))

    def _extended(self, columns: dict[str, list[Any]]) -> dict[Any, Any]:
        return self._given | columns


class _Stream(Table):
    """An iterable of rows."""

    is_lazy = True

    def __init__(self, given: Iterable[Any], size: int | None = None) -> None:
        self.size = size
        self._given = given

    def rows(self) -> Iterator[Row]:
        for place, row in enumerate(self._given):
            if not _is_row(row):
                raise _no_row(place, row)
            yield _plain_row(row)


def _is_row(given: Any) -> bool:
    """Return whether an object has named fields."""
    if isinstance(given, type):
        return False
    return (
        isinstance(given, (Mapping, msgspec.Struct))
        or dataclasses.is_dataclass(given)
        or hasattr(given, "_asdict")  # a named tuple
        or hasattr(given, "model_dump")  # a pydantic model
        or (hasattr(given, "keys") and hasattr(given, "__getitem__") and not hasattr(given, "columns"))  # of a database
    )


def _fields(row: Any) -> Mapping[Any, Any]:
    """Return the fields of a row, with their values as they are."""
    if isinstance(row, Mapping):
        return row
    if isinstance(row, msgspec.Struct):
        return {name: getattr(row, name) for name in row.__struct_fields__}
    if dataclasses.is_dataclass(row):
        return {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    if hasattr(row, "_asdict"):
        return dict(row._asdict())
    return dict(row)  # pydantic models yield pairs; others have keys


def _plain_row(row: Any) -> Row:
    return {name if type(name) is str else str(name): _plain(value) for name, value in _fields(row).items()}


def _no_row(place: int, row: Any) -> ConfigError:
    hint = ""
    if isinstance(row, str):
        hint = ": for prompts without columns use generate"
    elif isinstance(row, (list, tuple)):
        hint = ": for token ids use generate, for conversations use chat"
    return ConfigError(f"expected a mapping of columns as row {place}, got {_name(row)}{hint}")


# ------------------------------------------------------------------------------------------------- libraries of tables


class _Pandas(Table):
    """A DataFrame of pandas. Its index and the types of its columns are kept.

    A value is missing where `isna` says so. In a column of floats that is NaN, as in a Parquet file of the table.
    """

    def __init__(self, given: Any) -> None:
        if given.columns.nlevels > 1:
            raise ConfigError(
                f"expected columns with one name each, got {given.columns.nlevels} levels of names: "
                "join them, as in df.columns = df.columns.map('_'.join)"
            )
        self.size = len(given)
        self.columns = _distinct(given.columns)
        self._given = given

    def rows(self) -> Iterator[Row]:
        names = self.columns or ()
        for start in range(0, len(self._given), CHUNK):
            part = self._given.iloc[start : start + CHUNK]
            columns = [_pandas_values(part.iloc[:, place]) for place in range(len(names))]
            for place in range(len(part)):
                yield {name: values[place] for name, values in zip(names, columns, strict=True)}

    def _extended(self, columns: dict[str, list[Any]]) -> Any:
        made = self._given.copy(deep=False)
        for name, values in columns.items():
            made[name] = _pandas_column(values, self._given.index)
        return made


def _pandas_values(series: Any) -> list[Any]:
    """Return the values of a column, with None for missing ones."""
    return [
        None if missing else _plain(value)
        for value, missing in zip(series.tolist(), series.isna().tolist(), strict=True)
    ]


def _pandas_column(values: list[Any], index: Any) -> Any:
    """Return values as a column. Integers and booleans with nulls get a type that has nulls."""
    kinds = {type(value) for value in values if value is not None}
    has_nulls = None in values
    dtype: str | None = "object"
    if kinds == {str}:
        dtype = None  # a setting of pandas decides between `str` and `object`
    elif kinds == {bool}:
        dtype = "boolean" if has_nulls else "bool"
    elif kinds == {int} and all(value is None or -(1 << 63) <= value < 1 << 63 for value in values):
        dtype = "Int64" if has_nulls else "int64"
    elif kinds and kinds <= {int, float}:
        dtype = "float64"
    return sys.modules["pandas"].Series(values, index=index, dtype=dtype)


class _Polars(Table):
    """A DataFrame of polars, or a LazyFrame, which is collected. The way back is a frame of the same kind."""

    def __init__(self, given: Any) -> None:
        self._is_lazy_frame = _is(given, "polars", "LazyFrame")
        self._frame = given.collect() if self._is_lazy_frame else given
        self.size = self._frame.height
        self.columns = tuple(self._frame.columns)

    def rows(self) -> Iterator[Row]:
        return map(_plain_row, self._frame.iter_rows(named=True))

    def _extended(self, columns: dict[str, list[Any]]) -> Any:
        made = self._frame.with_columns([_polars_column(name, values) for name, values in columns.items()])
        return made.lazy() if self._is_lazy_frame else made


def _polars_column(name: str, values: list[Any]) -> Any:
    polars: Any = sys.modules["polars"]
    try:
        return polars.Series(name, values, dtype=_polars_type(polars, values))
    except (TypeError, OverflowError):
        return polars.Series(name, _json_texts(values), dtype=polars.String)


def _polars_type(polars: Any, values: Iterable[Any]) -> Any:
    """Return the type of values. Polars' own inference drops fields that the first values do not have.

    Raises TypeError: they have different types.
    """
    found = [value for value in values if value is not None]
    kinds = {type(value) for value in found}
    simple = {str: polars.String, bool: polars.Boolean, int: polars.Int64, float: polars.Float64, bytes: polars.Binary}
    if not kinds:
        return polars.Null
    if kinds == {list}:
        return polars.List(_polars_type(polars, (item for value in found for item in value)))
    if kinds == {dict}:
        names = dict.fromkeys(name for value in found for name in value)
        if names:
            return polars.Struct({name: _polars_type(polars, (it.get(name) for it in found)) for name in names})
    if kinds == {int, float}:
        return polars.Float64
    if len(kinds) == 1 and (kind := kinds.pop()) in simple:
        return simple[kind]
    raise TypeError("no type of polars holds these values")


class _Arrow(Table):
    """A Table or a RecordBatch of pyarrow. The metadata of its schema are kept."""

    def __init__(self, given: Any) -> None:
        self.size = given.num_rows
        self.columns = _distinct(given.schema.names)
        self._given = given

    def rows(self) -> Iterator[Row]:
        batches = [self._given] if _is(self._given, "pyarrow", "RecordBatch") else self._given.to_batches()
        for batch in batches:
            for start in range(0, batch.num_rows, CHUNK):
                yield from map(_plain_row, batch.slice(start, CHUNK).to_pylist())

    def _extended(self, columns: dict[str, list[Any]]) -> Any:
        made = self._given
        for name, values in columns.items():
            made = made.append_column(name, _arrow_column(values))
        return made


class _ArrowReader(Table):
    """A RecordBatchReader of pyarrow."""

    is_lazy = True

    def __init__(self, given: Any) -> None:
        self.columns = _distinct(given.schema.names)
        self._given = given

    def rows(self) -> Iterator[Row]:
        for batch in self._given:
            yield from _Arrow(batch).rows()


def _arrow_column(values: list[Any]) -> Any:
    pyarrow: Any = sys.modules["pyarrow"]
    try:
        return pyarrow.array(values)
    except (TypeError, OverflowError, pyarrow.ArrowInvalid):
        return pyarrow.array(_json_texts(values), pyarrow.string())


class _Dataset(Table):
    """A Dataset of `datasets`. Its features and its format are kept.

    Rows are read in chunks from its Arrow table. So images and audio are not decoded.
    """

    def __init__(self, given: Any) -> None:
        self.size = given.num_rows
        self.columns = tuple(given.column_names)
        self._given = given

    def rows(self) -> Iterator[Row]:
        for part in self._given.with_format("arrow").iter(CHUNK):
            yield from map(_plain_row, part.to_pylist())

    def _extended(self, columns: dict[str, list[Any]]) -> Any:
        made = self._given
        for name, values in columns.items():
            made = made.add_column(name, _arrow_column(values))
        return made


class _StreamingDataset(_Stream):
    """An IterableDataset of `datasets`."""

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.columns = tuple(given.column_names) if given.column_names else None


_KINDS: tuple[tuple[str, str, Callable[[Any], Table]], ...] = (
    ("pandas", "DataFrame", _Pandas),
    ("polars", "DataFrame", _Polars),
    ("polars", "LazyFrame", _Polars),
    ("pyarrow", "Table", _Arrow),
    ("pyarrow", "RecordBatch", _Arrow),
    ("pyarrow", "RecordBatchReader", _ArrowReader),
    ("datasets", "Dataset", _Dataset),
    ("datasets", "IterableDataset", _StreamingDataset),
)
"""Library, class, and its table."""


def _is(given: Any, library: str, name: str) -> bool:
    """Return whether an object is an instance of a library's class. The library is not imported."""
    cls = getattr(sys.modules.get(library), name, None)
    return isinstance(cls, type) and isinstance(given, cls)


def _distinct(names: Iterable[Any]) -> tuple[str, ...]:
    """Return names of columns as texts. Raises ConfigError: one occurs twice."""
    texts = tuple(str(name) for name in names)
    twice = [name for name, count in Counter(texts).items() if count > 1]
    if twice:
        raise ConfigError(f"expected distinct columns, got {twice[0]!r} twice: rename or drop one")
    return texts


def _json_texts(values: Iterable[Any]) -> list[str | None]:
    return [None if value is None else msgspec.json.encode(value, enc_hook=str).decode() for value in values]


def _name(given: Any) -> str:
    """Return the name of an object's type, with its library if that is not built in."""
    library = type(given).__module__.partition(".")[0]
    return type(given).__name__ if library == "builtins" else f"{library}.{type(given).__name__}"


# -------------------------------------------------------------------------------------------------------- plain values


_PLAIN = {str, int, float, bool, bytes, type(None), datetime}


def _plain(value: Any) -> Any:
    """Return a value as plain Python objects, with those in it. An object of a class unknown here stays as it is."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind.__name__ in ("NAType", "NaTType"):  # the missing values of pandas
        return None
    if _is(value, "pandas", "Period") or _is(value, "pandas", "Interval"):
        return str(value)
    if isinstance(value, (list, tuple, set, frozenset)) and not hasattr(value, "_asdict"):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return str.__str__(value)
    if (_is(value, "numpy", "generic") or _is(value, "numpy", "ndarray")) and value.dtype.kind in "mM":
        return value.astype(f"{value.dtype.kind}8[us]").tolist()  # of nanoseconds, NumPy makes integers
    if isinstance(value, datetime):
        return value.to_pydatetime(warn=False) if hasattr(value, "to_pydatetime") else value
    for method in ("to_pytimedelta", "as_py", "to_pylist", "to_list", "tolist"):  # pandas, Arrow, polars, NumPy, torch
        if hasattr(value, method):
            return _plain(getattr(value, method)())
    return _plain_row(value) if _is_row(value) else value
