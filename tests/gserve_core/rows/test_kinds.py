"""Kinds of tables: plain rows out of them, and the same kind back with the answers."""

import dataclasses
import datetime
import subprocess
import sys
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gserve_core.errors import ConfigError
from gserve_core.rows.kinds import CHUNK, row_with, table_of

np: Any = pytest.importorskip("numpy")
pd: Any = pytest.importorskip("pandas")
pl: Any = pytest.importorskip("polars")
pa: Any = pytest.importorskip("pyarrow")
hf: Any = pytest.importorskip("datasets")
pydantic: Any = pytest.importorskip("pydantic")

ROWS: list[dict[str, Any]] = [
    {"id": 7, "prompt": "one", "score": 0.5, "tags": ["a", "b"], "meta": {"k": 1}},
    {"id": 8, "prompt": None, "score": None, "tags": None, "meta": {"k": None}},
    {"id": 9, "prompt": "drei ü", "score": 2.5, "tags": [], "meta": {"k": 3}},
]
ANSWERS = [
    {"response": "x", "prompt_tokens": 3, "parsed": {"label": "up"}},
    None,
    {"response": "y", "prompt_tokens": 4, "parsed": {"label": "down", "why": "it fell"}},
]
WITH_ANSWERS = [
    ROWS[0] | {"response": "x", "prompt_tokens": 3, "parsed": {"label": "up"}},
    ROWS[1] | {"response": None, "prompt_tokens": None, "parsed": None},
    ROWS[2] | {"response": "y", "prompt_tokens": 4, "parsed": {"label": "down", "why": "it fell"}},
]
NAMES = list(WITH_ANSWERS[0])

MAKERS: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "list": list,
    "tuple": tuple,
    "columns": lambda rows: {name: [row[name] for row in rows] for name in rows[0]},
    "pandas": pd.DataFrame,
    "polars": pl.DataFrame,
    "polars lazy": pl.LazyFrame,
    "arrow table": pa.Table.from_pylist,
    "arrow batch": pa.RecordBatch.from_pylist,
    "datasets": hf.Dataset.from_list,
}
LAZY_MAKERS: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "generator": lambda rows: (row for row in rows),
    "dict view": lambda rows: dict(enumerate(rows)).values(),
    "arrow reader": lambda rows: pa.Table.from_pylist(rows).to_reader(max_chunksize=2),
    "streaming dataset": lambda rows: hf.Dataset.from_list(rows).to_iterable_dataset(),
}
KINDS = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
UNTYPED = ("list", "tuple", "columns")
TABLES = pytest.mark.parametrize("make", [make for name, make in MAKERS.items() if name not in UNTYPED])
TYPED = pytest.mark.parametrize("make", [make for name, make in MAKERS.items() if name not in (*UNTYPED, "pandas")])
LAZY_KINDS = pytest.mark.parametrize("make", LAZY_MAKERS.values(), ids=LAZY_MAKERS.keys())


def filled(answer: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return an answer as typed tables give it back: with None for fields that only others have."""
    return answer and {"label": answer["label"], "why": answer.get("why")}


def refusal(given: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        list(table_of(given).rows())
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------- every kind


@KINDS
def test_the_rows_of_every_kind_are_the_same_plain_ones(make: Callable[..., Any]) -> None:
    table = table_of(make(ROWS))
    assert (table.size, table.is_lazy) == (3, False)
    assert list(table.rows()) == ROWS
    assert list(table.rows()) == ROWS, "a table can be read again"


@KINDS
def test_every_kind_comes_back_with_all_rows_in_order_and_the_answers_columns_last(make: Callable[..., Any]) -> None:
    given = make(ROWS)
    kind = list if isinstance(given, tuple) else type(given)
    made = table_of(given).with_answers(ANSWERS)
    assert type(made) is kind
    again = list(table_of(made).rows())
    for row in again:
        row["parsed"] = filled(row["parsed"])
    assert again == [row | {"parsed": filled(row["parsed"])} for row in WITH_ANSWERS]
    assert [list(row) for row in again] == [NAMES] * 3
    assert list(table_of(given).rows()) == ROWS, "the given table is as before"


@KINDS
def test_a_column_can_be_asked_for_that_no_answer_has(make: Callable[..., Any]) -> None:
    made = table_of(make(ROWS)).with_answers([None] * 3, names=["response", "error"])
    assert list(table_of(made).rows()) == [row | {"response": None, "error": None} for row in ROWS]


@KINDS
def test_several_answers_of_a_row_are_a_list(make: Callable[..., Any]) -> None:
    answers = [{"response": ["a", "b"]}, None, {"response": ["c", "d"]}]
    made = table_of(make(ROWS)).with_answers(answers)
    assert [row["response"] for row in table_of(made).rows()] == [["a", "b"], None, ["c", "d"]]


@KINDS
def test_an_answer_column_that_the_rows_have_is_refused_with_its_name(make: Callable[..., Any]) -> None:
    table = table_of(make(ROWS))
    with pytest.raises(ConfigError, match=r"already have the answers' column 'score'.*prefix="):
        table.with_answers([None, {"score": 1}, None])


@KINDS
def test_there_is_one_answer_for_each_row(make: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"each of 3 rows, got 2"):
        table_of(make(ROWS)).with_answers(ANSWERS[:2])


@TABLES
def test_the_columns_of_a_table_are_known_before_its_rows_are_read(make: Callable[..., Any]) -> None:
    assert table_of(make(ROWS)).columns == ("id", "prompt", "score", "tags", "meta")


MIXED: list[dict[str, Any] | None] = [{"parsed": 1}, {"parsed": "é"}, {"parsed": {"a": [None]}}]


@TYPED
def test_values_that_no_type_holds_become_json_texts(make: Callable[..., Any]) -> None:
    made = table_of(make(ROWS)).with_answers(MIXED)
    assert [row["parsed"] for row in table_of(made).rows()] == ["1", '"é"', '{"a":[null]}']


def test_a_column_of_pandas_holds_values_of_any_types() -> None:
    assert table_of(pd.DataFrame(ROWS)).with_answers(MIXED)["parsed"].tolist() == [1, "é", {"a": [None]}]


@TABLES
def test_fields_that_only_late_answers_have_are_kept(make: Callable[..., Any]) -> None:
    count = 300
    given = make([{"id": number} for number in range(count)])
    answers = [{"parsed": [{"a": 1}], "n": 1} for _ in range(count - 1)] + [
        {"parsed": [{"a": 2.5, "b": "late"}], "n": 2.5}
    ]
    last = list(table_of(table_of(given).with_answers(answers)).rows())[-1]
    assert last == {"id": count - 1, "parsed": [{"a": 2.5, "b": "late"}], "n": 2.5}


@TABLES
def test_a_table_without_rows_has_none_and_comes_back(make: Callable[..., Any]) -> None:
    given = make(ROWS)
    empty = (
        given.iloc[:0]
        if isinstance(given, pd.DataFrame)
        else given.select([])
        if isinstance(given, hf.Dataset)
        else given.slice(0, 0)
    )
    table = table_of(empty)
    assert (table.size, list(table.rows())) == (0, [])
    assert table_of(table.with_answers([], names=["response"])).columns == (*(table.columns or ()), "response")


@TABLES
def test_more_rows_than_one_chunk_come_in_order(make: Callable[..., Any]) -> None:
    rows = [{"id": number} for number in range(2 * CHUNK + 1)]
    assert list(table_of(make(rows)).rows()) == rows


@LAZY_KINDS
def test_a_lazy_kind_yields_plain_rows_and_each_takes_its_answer(make: Callable[..., Any]) -> None:
    table = table_of(make(ROWS))
    assert table.is_lazy
    rows = list(table.rows())
    assert rows == ROWS
    assert [row_with(row, {"response": "x"}) for row in rows] == [row | {"response": "x"} for row in ROWS]
    with pytest.raises(TypeError, match="row_with"):
        table.with_answers([None] * 3)


def test_a_row_with_the_answers_column_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'response'.*prefix="):
        row_with({"response": "mine"}, {"response": "the model's"})


def test_a_generator_is_read_no_further_than_its_rows_are_taken() -> None:
    read: list[int] = []

    def endless() -> Iterator[dict[str, int]]:
        number = 0
        while True:
            read.append(number)
            yield {"id": number}
            number += 1

    rows = table_of(endless()).rows()
    assert not read
    assert [next(rows), next(rows)] == [{"id": 0}, {"id": 1}]
    assert read == [0, 1]


def test_a_lazy_kind_says_its_size_and_its_columns_where_it_knows_them() -> None:
    assert table_of({1: {"a": 1}, 2: {"a": 2}}.values()).size == 2
    assert table_of(row for row in ROWS).size is None
    assert table_of(pa.Table.from_pylist(ROWS).to_reader()).columns == ("id", "prompt", "score", "tags", "meta")
    assert table_of(hf.Dataset.from_list(ROWS).to_iterable_dataset()).columns == table_of(pd.DataFrame(ROWS)).columns


# ---------------------------------------------------------------------------------------------------- rows as objects

Point = namedtuple("Point", ["prompt", "level"])


@dataclasses.dataclass
class Data:
    prompt: str
    level: Any


class Record(msgspec.Struct):
    prompt: str
    level: Any


class Model(pydantic.BaseModel):  # type: ignore[misc]
    prompt: str
    level: Any


class Keyed:
    """As rows of a database are: `sqlite3.Row` has keys, but is no mapping."""

    def __init__(self, **values: Any) -> None:
        self._values = values

    def keys(self) -> list[str]:
        return list(self._values)

    def __getitem__(self, key: str) -> Any:
        return self._values[key]


@pytest.mark.parametrize("cls", [dict, Point, Data, Record, Model, Keyed, lambda **row: UserDict(row)])
def test_a_row_may_be_an_object_with_fields(cls: Callable[..., Any]) -> None:
    given = [cls(prompt="p", level=Data("inner", 1)), cls(prompt="q", level=None)]
    assert list(table_of(given).rows()) == [
        {"prompt": "p", "level": {"prompt": "inner", "level": 1}},
        {"prompt": "q", "level": None},
    ]
    assert table_of(given).with_answers([None, {"response": "r"}]) == [
        {"prompt": "p", "level": Data("inner", 1), "response": None},
        {"prompt": "q", "level": None, "response": "r"},
    ]


def test_rows_of_a_list_need_not_have_the_same_columns() -> None:
    table = table_of([{"a": 1}, {"b": 2}])
    assert table.columns == ("a", "b")
    assert table.with_answers([None, {"response": "r"}]) == [{"a": 1, "response": None}, {"b": 2, "response": "r"}]


def test_a_list_comes_back_with_its_values_as_they_were() -> None:
    ids = np.arange(3)
    (made,) = table_of([{"ids": ids}]).with_answers([{"response": "r"}])
    assert made["ids"] is ids


def test_columns_may_be_any_sequences_of_one_length() -> None:
    given = {"a": np.array([1, 2]), "b": pd.Series([0.5, None]), "c": ("x", "y"), "d": pa.array([None, [1]])}
    rows = list(table_of(given).rows())
    assert rows == [{"a": 1, "b": 0.5, "c": "x", "d": None}, {"a": 2, "b": None, "c": "y", "d": [1]}]
    made = table_of(given).with_answers([{"response": "r"}, None])
    assert list(made) == ["a", "b", "c", "d", "response"]
    assert made["a"] is given["a"]
    assert made["response"] == ["r", None]


# ------------------------------------------------------------------------------------------------------- plain values


class Unknown:
    pass


UNKNOWN = Unknown()
MOMENT = datetime.datetime(2026, 3, 1, 12, 30)  # noqa: DTZ001


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.str_("text"), "text"),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (np.array([{"role": "user", "n": np.int8(1)}], dtype=object), [{"role": "user", "n": 1}]),
        (np.datetime64("2026-03-01T12:30", "ns"), MOMENT),
        (np.array(["2026-03-01T12:30", "NaT"], dtype="datetime64[ns]"), [MOMENT, None]),
        (np.timedelta64(1500, "ms"), datetime.timedelta(seconds=1.5)),
        (pd.NA, None),
        (pd.NaT, None),
        (pd.Timestamp("2026-03-01 12:30:00.000000001"), MOMENT),
        (pd.Timedelta(seconds=1.5), datetime.timedelta(seconds=1.5)),
        (pd.Period("2026-03", "M"), "2026-03"),
        (pd.Interval(0, 1), "(0, 1]"),
        (pd.Series([1, 2]), [1, 2]),
        (pl.Series([1, None]), [1, None]),
        (pa.scalar("text"), "text"),
        (pa.array([[1], None]), [[1], None]),
        ({"a": ({"b": np.int64(1)},)}, {"a": [{"b": 1}]}),
        (Decimal("1.50"), Decimal("1.50")),
        (b"\x00\xff", b"\x00\xff"),
        (UNKNOWN, UNKNOWN),
    ],
)
def test_values_come_out_as_plain_python(given: Any, plain: Any) -> None:
    (row,) = table_of([{"value": given}]).rows()
    assert row == {"value": plain}
    assert type(row["value"]) is type(plain)
    if isinstance(plain, list) and not isinstance(plain[0], (list, dict)):
        assert type(row["value"][0]) is type(plain[0])


def test_tensors_of_torch_come_out_as_lists() -> None:
    torch: Any = pytest.importorskip("torch")
    assert list(table_of([{"ids": torch.tensor([5, 6])}]).rows()) == [{"ids": [5, 6]}]


def test_names_of_columns_come_out_as_texts() -> None:
    assert list(table_of(pd.DataFrame([[1, 2]])).rows()) == [{"0": 1, "1": 2}]
    assert list(table_of([{0: "a"}]).rows()) == [{"0": "a"}]


def test_what_is_missing_in_pandas_is_none_in_every_type() -> None:
    frame = pd.DataFrame(
        {
            "text": pd.Series(["a", None]),
            "objects": pd.Series(["a", float("nan")], dtype=object),
            "lists": pd.Series([[1], None], dtype=object),
            "floats": pd.Series([1.5, None]),
            "ints": pd.Series([1, None], dtype="Int64"),
            "flags": pd.Series([True, None], dtype="boolean"),
            "moments": pd.Series([pd.Timestamp(MOMENT), None]),
            "zoned": pd.Series([pd.Timestamp(MOMENT, tz="UTC"), None]),
            "kinds": pd.Series(["a", None], dtype="category"),
            "arrow": pd.Series([1, None], dtype=pd.ArrowDtype(pa.int64())),
        }
    )
    first, second = table_of(frame).rows()
    assert first == {
        "text": "a",
        "objects": "a",
        "lists": [1],
        "floats": 1.5,
        "ints": 1,
        "flags": True,
        "moments": MOMENT,
        "zoned": MOMENT.replace(tzinfo=datetime.UTC),
        "kinds": "a",
        "arrow": 1,
    }
    assert second == dict.fromkeys(first)
    assert {type(first[name]) for name in ("ints", "arrow")} == {int}
    assert type(first["moments"]) is datetime.datetime


@pytest.mark.parametrize("make", [pl.DataFrame, pa.table, hf.Dataset.from_dict])
def test_a_number_that_is_none_stays_one_where_the_table_has_nulls_too(make: Callable[..., Any]) -> None:
    first, second = table_of(make({"floats": [float("nan"), None]})).rows()
    assert first["floats"] != first["floats"]
    assert second["floats"] is None


# ------------------------------------------------------------------------------------------------------------- pandas


def test_a_frame_of_pandas_keeps_its_index_and_the_types_of_its_columns() -> None:
    frame = pd.DataFrame(
        {
            "small": pd.Series([1, 2, 3], dtype="int8"),
            "kind": pd.Series(["a", "b", "a"], dtype="category"),
            "moment": pd.to_datetime(["2026-01-01", None, "2026-01-03"]),
            "nullable": pd.Series([1, None, 3], dtype="Int32"),
            "floats": pd.Series([1.0, None, 3.0], dtype="float32"),
        }
    )
    frame.index = pd.Index(["x", "x", "y"], name="key")
    frame.attrs["source"] = "here"
    made = table_of(frame).with_answers(ANSWERS)
    pd.testing.assert_frame_equal(made[list(frame.columns)], frame)
    assert made.attrs == {"source": "here"}
    assert made["response"].tolist()[::2] == ["x", "y"]
    assert list(frame.columns) == ["small", "kind", "moment", "nullable", "floats"]


def test_numbers_of_answers_have_a_type_with_nulls_only_where_some_are_missing() -> None:
    frame = pd.DataFrame(ROWS)
    assert table_of(frame).with_answers(ANSWERS)["prompt_tokens"].dtype == "Int64"
    answers = [{"prompt_tokens": 1, "ok": True, "mean": 1, "response": ["a"]} for _ in ROWS]
    answers[0]["mean"] = 0.5
    made = table_of(frame).with_answers(answers)
    assert {name: str(made[name].dtype) for name in answers[0]} == {
        "prompt_tokens": "int64", "ok": "bool", "mean": "float64", "response": "object",
    }  # fmt: skip


def test_a_frame_of_pandas_with_a_column_twice_is_refused() -> None:
    assert "'a' twice" in refusal(pd.DataFrame([[1, 2]], columns=["a", "a"]))
    assert "'1' twice" in refusal(pd.DataFrame([[1, 2]], columns=[1, "1"]))


def test_a_frame_of_pandas_with_levels_of_names_is_refused() -> None:
    frame = pd.DataFrame([[1, 2]], columns=pd.MultiIndex.from_tuples([("a", "x"), ("a", "y")]))
    assert "got 2 levels of names: join them" in refusal(frame)


# ------------------------------------------------------------------------------------------------- pyarrow and datasets


def test_an_arrow_table_keeps_its_schema_and_metadata() -> None:
    schema = pa.schema([pa.field("id", pa.int8(), nullable=False), ("kind", pa.dictionary(pa.int8(), pa.string()))])
    given = pa.table(
        {"id": [1], "kind": pa.array(["a"]).dictionary_encode().cast(schema.field("kind").type)}, schema=schema
    )
    given = given.replace_schema_metadata({"source": "here"})
    made = table_of(given).with_answers([{"response": "r", "prompt_tokens": 3}])
    assert list(made.schema)[:2] == list(given.schema)
    assert made.schema.metadata == {b"source": b"here"}
    assert list(made.schema)[2:] == [pa.field("response", pa.string()), pa.field("prompt_tokens", pa.int64())]


def test_an_arrow_table_with_a_column_twice_is_refused() -> None:
    given = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    assert "'a' twice" in refusal(given)
    assert "'a' twice" in refusal(given.to_reader())


def test_a_dataset_keeps_its_features_and_its_format() -> None:
    features = hf.Features(
        {"id": hf.Value("int8"), "label": hf.ClassLabel(names=["no", "yes"]), "x": hf.List(hf.Value("float32"))}
    )
    given = hf.Dataset.from_dict({"id": [1, 2], "label": [0, 1], "x": [[0.5], None]}, features=features, split="train")
    given = given.with_format("numpy")
    assert list(table_of(given).rows()) == [{"id": 1, "label": 0, "x": [0.5]}, {"id": 2, "label": 1, "x": None}]
    made = table_of(given).with_answers([{"response": "r", "prompt_tokens": 3}, None])
    assert {name: made.features[name] for name in features} == features
    assert made.features["response"] == hf.Value("string")
    assert made.features["prompt_tokens"] == hf.Value("int64")
    assert made.format["type"] == "numpy"
    assert str(made.split) == "train"


def test_a_dataset_that_was_shuffled_or_filtered_keeps_its_order() -> None:
    given = hf.Dataset.from_dict({"id": list(range(10))}).select([7, 1, 4])
    assert [row["id"] for row in table_of(given).rows()] == [7, 1, 4]
    made = table_of(given).with_answers([{"response": str(number)} for number in (7, 1, 4)])
    assert made.to_list() == [{"id": number, "response": str(number)} for number in (7, 1, 4)]


def test_an_image_of_a_dataset_is_not_decoded() -> None:
    image = {"bytes": b"no image", "path": None}
    given = hf.Dataset.from_dict({"prompt": ["p"], "image": [image]}).cast_column("image", hf.Image())
    assert list(table_of(given).rows()) == [{"prompt": "p", "image": image}]


def test_the_rows_of_a_large_dataset_are_never_in_memory_at_once(tmp_path: Path) -> None:
    path = tmp_path / "large.arrow"
    block = pa.table({"text": ["x" * 1000] * 1000})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, block.schema) as writer:
        for _ in range(200):
            writer.write_table(block)
    table = table_of(hf.Dataset.from_file(str(path)))
    before = pa.total_allocated_bytes()
    peak = 0
    for place, _ in enumerate(table.rows()):
        if place % 10_000 == 0:
            peak = max(peak, pa.total_allocated_bytes() - before)
    assert place == 199_999
    assert peak < 20e6, "of 200 MB"


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a", "b"], "as row 0, got str: for prompts without columns use generate"),
        ([{"a": 1}, "b"], "as row 1, got str"),
        ([[1, 2]], "as row 0, got list: for token ids use generate, for conversations use chat"),
        ([[{"role": "user", "content": "hi"}]], "for conversations use chat"),
        ((text for text in ["a"]), "as row 0, got str"),
        ("rows.jsonl", "got str: for a file use run_file"),
        (Path("rows.jsonl"), "PosixPath: for a file use run_file"),
        ([pd.DataFrame({"a": [1]})], "as row 0, got pandas.DataFrame"),
        (None, "expected rows: .* got NoneType"),
        (3, "got int"),
        (Data("a", 1), "Data: pass a list of rows, \\[row\\]"),
        (Point("a", 1), "Point: pass a list of rows"),
        ({"prompt": "one"}, "got str as column 'prompt': for a single row pass a list"),
        ({"a": [1, 2], "b": [1]}, "of one length, got {'a': 2, 'b': 1}"),
        (pd.Series(["a"]), r"got pandas.Series: pass df, or use generate\(df\['prompt'\]\)"),
        (pl.Series(["a"]), "got polars.Series: pass the table of this column, or use generate"),
        (pa.array(["a"]), "pyarrow.StringArray: pass the table"),
        (pa.chunked_array([["a"]]), "pyarrow.ChunkedArray: pass the table"),
        (np.array(["a"]), "numpy.ndarray: pass the table"),
        (hf.Dataset.from_dict({"prompt": ["a"]})["prompt"], "datasets.Column: pass the table"),
        (hf.DatasetDict({"test": hf.Dataset.from_dict({"a": [1]})}), r"DatasetDict: choose a split: data\['test'\]"),
        (hf.IterableDatasetDict(), r"choose a split: data\['train'\]"),
    ],
)  # fmt: skip
def test_what_is_no_rows_is_refused_with_its_type_and_what_to_do(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(table_of(given).rows())


def test_no_library_of_tables_is_imported_for_plain_rows() -> None:
    program = """
import sys
from gserve_core.rows.kinds import table_of
table = table_of([{"a": 1}])
list(table.rows()), table.with_answers([{"b": 2}]), list(table_of(iter([{"a": [1]}])).rows())
heavy = {"pandas", "polars", "pyarrow", "datasets", "numpy", "torch"} & set(sys.modules)
sys.exit(", ".join(heavy) or None)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stderr
