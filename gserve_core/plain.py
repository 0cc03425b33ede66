"""Plain values in place of those of NumPy, pandas, Polars, PyArrow and PyTorch, none of which is imported."""

import datetime
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

PLAIN = frozenset({str, int, float, bool, type(None), bytes, datetime.datetime, datetime.date, datetime.time})
"""Types of values that are plain already."""
METHODS = ("as_py", "to_pylist", "tolist", "to_list")
"""Methods that return plain values: of PyArrow's scalars, of its arrays, of most arrays and tensors, of Polars."""
MISSING = frozenset({"NAType", "NaTType"})
"""Names of the types of a missing value in pandas."""


def plain(value: Any) -> Any:
    """Return `value` with plain texts, numbers, lists and dictionaries at every depth.

    Arrays, tensors, columns, tuples and other sequences become lists. Scalars of an array become Python's numbers.
    A value that has no plain form is returned as it is.
    """
    kind = type(value)
    if kind in PLAIN:
        return value
    if kind is list or kind is tuple:
        return [plain(below) for below in value]
    if isinstance(value, Mapping):
        return {plain(key): plain(below) for key, below in value.items()}
    if isinstance(value, str):  # a subclass, such as NumPy's
        return str.__str__(value)
    if kind.__name__ in MISSING:
        return None
    for name in METHODS:
        if callable(convert := getattr(value, name, None)):
            made = convert()
            return made if type(made) is kind else plain(made)
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [plain(below) for below in value]
    return value


def is_missing(value: Any) -> bool:
    """Return whether `value` stands for no value: None, or NaN and the like, which pandas has in empty cells."""
    return value is None or type(value).__name__ in MISSING or (isinstance(value, float) and value != value)


def encodable(value: Any) -> Any:
    """Return a value that msgspec cannot encode as a plain one. Raises TypeError: it has no plain form."""
    made = plain(value)
    if made is value:
        raise TypeError(f"expected texts, numbers, lists and mappings, got {type(value).__name__}")
    return made


def without_none(value: Any) -> Any:
    """Return `value` without the keys whose value is None, at every depth. Arrow makes them for absent keys.

    None in a list stays.
    """
    if isinstance(value, dict):
        return {key: without_none(below) for key, below in value.items() if below is not None}
    if isinstance(value, list):
        return [without_none(below) for below in value]
    return value


def is_table(value: Any) -> bool:
    """Return whether `value` is a table: a DataFrame, a `pyarrow.Table`, a `datasets.Dataset`, or a dict of columns."""
    if isinstance(value, Mapping):
        return bool(value) and all(_is_column(column) for column in value.values())
    kind = type(value)
    return not isinstance(value, Sequence) and (hasattr(kind, "columns") or hasattr(kind, "column_names"))


def _is_column(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))
