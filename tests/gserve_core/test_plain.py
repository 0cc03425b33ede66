"""Values of other libraries as plain ones, and tables told from lists."""

import datetime
import subprocess
import sys
from collections import deque
from typing import Any

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch

from gserve_core.plain import encodable, is_table, plain, without_none


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a", "a"),
        (None, None),
        (1.5, 1.5),
        ((1, (2, "a")), [1, [2, "a"]]),
        (range(3), [0, 1, 2]),
        (deque([1, np.int64(2)]), [1, 2]),
        ({"a": (1,), np.str_("b"): {"c": np.float32(0.5)}}, {"a": [1], "b": {"c": 0.5}}),
        (np.array([1, 2]), [1, 2]),
        (np.array([[1], [2]]), [[1], [2]]),
        (np.array(5), 5),
        (np.int64(3), 3),
        (np.float64(2.5), 2.5),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (np.array([{"a": np.array(["x"], dtype=object)}], dtype=object), [{"a": ["x"]}]),
        (pa.array([1, None]), [1, None]),
        (pa.chunked_array([["a"], ["b"]]), ["a", "b"]),
        (pa.scalar("x"), "x"),
        (pa.scalar([{"a": 1, "b": None}]), [{"a": 1, "b": None}]),
        (torch.tensor([1, 2]), [1, 2]),
        (torch.tensor(3), 3),
        (pd.Series(["a", "b"]), ["a", "b"]),
        (pd.array([1, None]), [1, None]),
        (pd.NA, None),
        (pd.NaT, None),
        (pl.Series(["x"]), ["x"]),
        (datasets.Dataset.from_dict({"a": [1, 2]})["a"], [1, 2]),
        (np.datetime64("2020-01-01"), datetime.date(2020, 1, 1)),
    ],
)
def test_a_value_of_another_library_becomes_plain(given: Any, expected: Any) -> None:
    made = plain(given)
    assert made == expected
    assert type(made) is type(expected)


def test_what_has_no_plain_form_stays_as_it_is() -> None:
    given = object()
    assert plain(given) is given
    assert plain([given]) == [given]
    assert plain(b"ab") == b"ab"
    with pytest.raises(TypeError, match="expected texts, numbers, lists and mappings, got object"):
        encodable(given)
    assert encodable(np.int64(3)) == 3


def test_keys_without_a_value_go_at_every_depth() -> None:
    given = {"a": None, "b": [None, {"c": None, "d": 0}], "e": ""}
    assert without_none(given) == {"b": [None, {"d": 0}], "e": ""}


ROWS = datasets.Dataset.from_dict({"prompt": ["a", "b"]})
TABLE = pa.table({"prompt": ["a"]})


@pytest.mark.parametrize(
    "table",
    [
        ROWS, ROWS.to_iterable_dataset(), datasets.DatasetDict({"train": ROWS}), TABLE, TABLE.to_batches()[0],
        pd.DataFrame({"p": ["a"]}), pl.DataFrame({"p": ["a"]}), pl.LazyFrame({"p": ["a"]}), {"p": ["a"], "q": [1]},
        {"p": np.array(["a"])},
    ],
    ids=lambda it: type(it).__name__,
)  # fmt: skip
def test_a_table_is_known_as_one(table: Any) -> None:
    assert is_table(table)


@pytest.mark.parametrize(
    "column",
    [
        ["a"], (), "a", {"p": "a"}, {}, 7, None, ROWS["prompt"], TABLE["prompt"], pd.Series(["a"]), pl.Series(["a"]),
        np.array(["a"]), np.zeros(1, [("a", "i4")]), torch.tensor([1]), iter(["a"]), [{"p": ["a"]}],
    ],
    ids=lambda it: type(it).__name__,
)  # fmt: skip
def test_a_column_and_a_list_are_no_tables(column: Any) -> None:
    assert not is_table(column)


def test_no_library_of_tables_or_tensors_is_imported() -> None:
    program = (
        "import sys; from gserve_core.plain import plain, is_table; plain([1, {'a': (2,)}]); is_table([1]);"
        "assert not {'numpy', 'pandas', 'polars', 'pyarrow', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
