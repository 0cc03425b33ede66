"""Tables of answers: every format and compression, types that are kept, and files that are never half written."""

import csv
import datetime
import decimal
import json
import math
import os
import stat
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gserve_core.errors import ConfigError
from gserve_core.rows.formats import FileType, Format, Source, find_sources, output_type
from gserve_core.rows.reading import Row, read_rows
from gserve_core.rows.writing import check_row, check_sources, encode_row, write_table

COUNT = 1000
COMPRESSIONS = ["", ".gz", ".zst"]
TEXTS = ["plain", "né 😀 漢字", 'a "quote", comma\tand tab', "two\nlines\r\nand a \r", " spaces ", "null", "1", "=1"]


def answer(place: int) -> dict[str, Any] | None:
    """The answer of every row but each tenth."""
    if place % 10 == 9:
        return None
    return {"response": TEXTS[place % len(TEXTS)] if place % 3 else None, "completion_tokens": place}


def rows_with(**columns: Any) -> list[dict[str, Any]]:
    return [{name: make(number) for name, make in columns.items()} for number in range(COUNT)]


PLAIN = rows_with(text=lambda n: TEXTS[n % len(TEXTS)], maybe=lambda n: None if n % 2 else "x", none=lambda _: None)
NESTED = rows_with(
    id=lambda n: n,
    text=lambda n: TEXTS[n % len(TEXTS)],
    score=lambda n: None if n % 5 == 0 else n / 7,
    good=lambda n: n % 2 == 0,
    messages=lambda n: [{"role": "user", "content": TEXTS[n % len(TEXTS)]}, {"role": "tool", "content": None}],
    meta=lambda n: None if n % 3 == 0 else {"tags": ["a", None], "depth": {"n": n}},
)
BINARY = [
    row | {"image": None if n % 4 == 0 else n.to_bytes(2, "big"), "at": datetime.datetime(2026, 1, 1, n % 24)}  # noqa: DTZ001
    for n, row in enumerate(NESTED)
]
CAN_HOLD = {"csv": PLAIN, "tsv": PLAIN, "jsonl": NESTED, "json": NESTED, "parquet": BINARY, "arrow": BINARY}


def sources_of(path: Path) -> list[Source]:
    return find_sources(str(path))


def jsonl(path: Path, rows: list[dict[str, Any]]) -> list[Source]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sources_of(path)


def arrow(path: Path, table: Any) -> list[Source]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    return sources_of(path)


def write(path: Path, sources: list[Source], answers: Any = answer) -> Path:
    write_table(path, output_type(path), sources, answers)
    return path


def read(path: Path) -> list[Any]:
    rows = list(read_rows(sources_of(path)))
    assert [row.error for row in rows] == [None] * len(rows)
    return [row.values for row in rows]


def all_rows(_place: int) -> dict[str, Any]:
    return {}


# -------------------------------------------------------------------------------------------------------- round trips


@pytest.fixture(scope="module", params=["jsonl", "json", "csv", "tsv", "parquet", "arrow"])
def given(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Source]]:
    """A format, and a source that holds what it can hold."""
    import pyarrow as pa

    folder, rows = tmp_path_factory.mktemp("given"), CAN_HOLD[request.param]
    if rows is BINARY:
        return request.param, arrow(folder / "in.arrow", pa.Table.from_pylist(rows))
    return request.param, jsonl(folder / "in.jsonl", rows)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_every_format_gives_back_what_was_written(
    given: tuple[str, list[Source]], compression: str, tmp_path: Path
) -> None:
    name, sources = given
    out = write(tmp_path / f"out.{name}{compression}", sources)
    expected = [row | found for place, row in enumerate(CAN_HOLD[name]) if (found := answer(place)) is not None]
    if name in ("csv", "tsv"):
        expected = [{k: None if v is None else str(v) for k, v in row.items()} for row in expected]
    assert len(expected) == 900
    assert read(out) == expected
    again = write(tmp_path / f"again.{name}{compression}", sources_of(out), all_rows)
    assert read(again) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([out.name, again.name])


def test_json_lines_keep_the_text_of_their_rows(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"b": 1.0,  "a":"\\u00e9", "big": 12345678901234567890123}\r\n{ }\n"bare"\n')
    out = write(tmp_path / "out.jsonl", sources_of(path), lambda place: {"response": place})
    assert out.read_bytes().splitlines() == [
        b'{"b": 1.0,  "a":"\\u00e9", "big": 12345678901234567890123,"response":0}',
        b'{"response":1}',
        b'{"prompt":"bare","response":2}',
    ]
    document = write(tmp_path / "out.json", sources_of(path), lambda place: {"response": place})
    assert b'{"b": 1.0,  "a":"\\u00e9", "big": 12345678901234567890123,"response":0}' in document.read_bytes()
    assert len(json.loads(document.read_bytes())) == 3


def test_other_programs_read_the_tables(tmp_path: Path) -> None:
    import pandas as pd
    import polars as pl

    sources = jsonl(tmp_path / "in.jsonl", PLAIN)
    expected = [{"text": row["text"], "maybe": row["maybe"], "n": n} for n, row in enumerate(PLAIN)]
    for name in ("out.parquet", "out.arrow", "out.jsonl", "out.csv.gz", "out.parquet.zst", "out.json"):
        write(tmp_path / name, sources, lambda place: {"n": place})
    for frame in (
        pl.read_parquet(tmp_path / "out.parquet"), pl.read_ipc(tmp_path / "out.arrow"),
        pl.read_ndjson(tmp_path / "out.jsonl"), pl.read_json(tmp_path / "out.json"),
    ):  # fmt: skip
        assert frame.select("text", "maybe", "n").to_dicts() == expected
    table = pd.read_csv(tmp_path / "out.csv.gz", keep_default_na=False, lineterminator="\n")
    assert table["text"].tolist() == [row["text"] for row in expected]
    assert pd.read_feather(tmp_path / "out.arrow")["n"].tolist() == list(range(COUNT))


# -------------------------------------------------------------------------------------------------------------- types


def typed_table() -> Any:
    import pyarrow as pa

    return pa.table(
        {
            "small": pa.array([1, None, 3], pa.int8()),
            "binary": pa.array([b"\xff", None, b""], pa.large_binary()),
            "at": pa.array([1, 2, None], pa.timestamp("ns", "Europe/Zurich")),
            "day": pa.array([datetime.date(2026, 1, 2), None, None]),
            "price": pa.array([decimal.Decimal("1.50"), None, decimal.Decimal("2.25")], pa.decimal128(12, 2)),
            "kind": pa.array(["a", "b", "a"]).dictionary_encode(),
            "nested": pa.array([[{"a": 1.5}], [], None], pa.list_(pa.struct([("a", pa.float32())]))),
            "map": pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int16())),
            "half": pa.array([1.5, None, 2.5], pa.float32()),
        }
    )


@pytest.mark.parametrize("start", ["in.parquet", "in.arrow"])
@pytest.mark.parametrize("end", ["out.parquet", "out.arrow", "out.arrow.gz"])
def test_columns_of_tables_keep_their_types_exactly(tmp_path: Path, start: str, end: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = typed_table()
    out = write(tmp_path / end, arrow(tmp_path / start, table), lambda place: {"response": "r"} if place != 1 else None)
    if end == "out.parquet":
        found = pq.read_table(out)
    else:
        content = pa.input_stream(str(out), compression="gzip" if end.endswith("gz") else None).read()
        found = pa.ipc.open_stream(content).read_all()  # a file cannot hold several dictionaries
    assert found.select(table.column_names).schema.types == table.schema.types
    assert found.drop(["response"]).to_pylist() == table.take([0, 2]).to_pylist()
    assert found.column("response").to_pylist() == ["r", "r"]


def test_dictionaries_may_differ_from_file_to_file(tmp_path: Path) -> None:
    import pyarrow as pa

    for name, words in (("a.arrow", ["x", "y"]), ("b.arrow", ["z", "x"]), ("c.parquet", ["y", "w"])):
        arrow(tmp_path / name, pa.table({"word": pa.array(words).dictionary_encode()}))
    sources = sources_of(tmp_path)
    for name in ("out.arrow", "out.parquet"):
        assert read(write(tmp_path / name, sources, all_rows)) == [{"word": word} for word in "xyzxyw"]


@pytest.mark.parametrize("start", ["in.arrow", "in.parquet"])
def test_tables_of_polars_are_read_and_written(tmp_path: Path, start: str) -> None:
    import polars as pl

    at = datetime.datetime(2026, 1, 1)  # noqa: DTZ001 - the column has no zone
    columns = {
        "text": ["a", None, "é"], "list": [[1], [], None], "struct": [{"a": at}, {"a": None}, None],
        "binary": [b"x", b"y", None], "span": [datetime.timedelta(1)] * 3, "huge": [2**63] * 3,
        "kind": pl.Series(["x", "y", "x"], dtype=pl.Categorical), "enum": pl.Series(["x"] * 3, dtype=pl.Enum(["x"])),
        "times": pl.Series([[at]] * 3, dtype=pl.List(pl.Datetime("ns"))),
    }  # fmt: skip
    frame = pl.DataFrame(columns)
    (frame.write_ipc if start == "in.arrow" else frame.write_parquet)(tmp_path / start)
    assert read(tmp_path / start) == frame.to_dicts()
    for name in ("out.parquet", "out.arrow.gz"):
        assert read(write(tmp_path / name, sources_of(tmp_path / start), all_rows)) == frame.to_dicts()


def test_some_rows_of_a_table_of_views_are_read_and_written(tmp_path: Path) -> None:
    """Tables of polars have views, of which pyarrow takes no rows. A job that was interrupted needs some of them."""
    import polars as pl

    frame = pl.DataFrame({"text": ["a", "b", None, "d"], "nested": [{"a": "x"}] * 4})
    frame.write_ipc(tmp_path / "in.arrow")
    sources = sources_of(tmp_path / "in.arrow")
    assert [row.values for row in read_rows(sources, lambda place: place % 2 == 1)] == frame.to_dicts()[1::2]
    for name in ("out.parquet", "out.arrow", "out.csv"):
        rows = read(write(tmp_path / name, sources, lambda place: {"r": "x"} if place != 1 else None))
        assert [row["text"] for row in rows] == ["a", None, "d"]


def test_types_follow_from_all_rows(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    last: dict[str, Any] = {
        "number": 1.5, "late": "x", "mixed": "a", "none": None, "struct": {"b": 2}, "list": ["a"], "big": 0.5,
        "empty": {}, "emptylist": [], "flag": True, "huge": 2**70,
    }  # fmt: skip
    first: dict[str, Any] = {
        "number": 1, "late": None, "mixed": 1, "none": None, "struct": {"a": 1}, "list": [], "big": 2**53 + 1,
        "empty": {}, "emptylist": [], "flag": None, "huge": 1,
    }  # fmt: skip
    sources = jsonl(tmp_path / "in.jsonl", [*[first] * 3000, last])
    out = write(tmp_path / "out.parquet", sources, lambda place: {"parsed": {"n": place} if place else "text"})
    types = {field.name: str(field.type) for field in pq.read_schema(out)}
    assert types == {
        "number": "double", "late": "string", "mixed": "string", "none": "string", "big": "string", "empty": "string",
        "struct": "struct<a: int64, b: int64>", "list": "list<element: string>", "emptylist": "list<element: string>",
        "flag": "bool", "huge": "string", "parsed": "string",
    }  # fmt: skip
    rows = read(out)
    assert rows[0] == first | {"number": 1.0, "mixed": "1", "struct": {"a": 1, "b": None}, "big": "9007199254740993",
                               "empty": "{}", "huge": "1", "parsed": '"text"'}  # fmt: skip
    assert rows[-1] == last | {"mixed": '"a"', "struct": {"a": None, "b": 2}, "big": "0.5", "empty": "{}",
                               "huge": str(2**70), "parsed": '{"n":3000}'}  # fmt: skip


def test_objects_with_very_many_names_become_json_text(tmp_path: Path) -> None:
    rows = [{"scores": [{f"token{number}": {"x": 1}}]} for number in range(3 * COUNT)]
    out = write(tmp_path / "out.parquet", jsonl(tmp_path / "in.jsonl", rows), all_rows)
    assert read(out)[7] == {"scores": '[{"token7":{"x":1}}]'}


def test_deeply_nested_values_become_json_text(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"deep": ' + "[" * 500 + "]" * 500 + "}\n")
    for name in ("out.parquet", "out.csv"):
        assert read(write(tmp_path / name, sources_of(tmp_path / "in.jsonl"), all_rows)) == [
            {"deep": "[" * 500 + "]" * 500}
        ]


def test_several_sources_give_all_their_columns(tmp_path: Path) -> None:
    import pyarrow as pa

    folder = tmp_path / "in"
    folder.mkdir()
    arrow(folder / "1.parquet", pa.table({"id": pa.array([1, 2], pa.int32()), "a": ["x", "y"], "x": [1, 2]}))
    jsonl(folder / "2.jsonl", [{"id": 3, "b": [1]}, {"id": 4, "x": True}])
    (folder / "3.csv").write_text("c,a\nd,z\n")
    names = ["id", "a", "x", "b", "c", "n"]
    expected = [
        dict(zip(names, row, strict=True))
        for row in (
            (1, "x", "1", None, None, 0),
            (3, None, None, [1], None, 2),
            (4, None, "true", None, None, 3),
            (None, "z", None, None, "d", 4),
        )
    ]

    def some(place: int) -> dict[str, Any] | None:
        return {"n": place} if place != 1 else None

    for name in ("out.parquet", "out.arrow"):
        assert read(write(tmp_path / name, sources_of(folder), some)) == expected
    with write(tmp_path / "out.csv", sources_of(folder), some).open(newline="") as stream:
        header, first, *_ = csv.reader(stream)
    assert header == names
    assert first == ["1", "x", "1", "", "", "0"]


def test_no_rows_make_an_empty_table(tmp_path: Path) -> None:
    sources = jsonl(tmp_path / "in.jsonl", [])
    for name, content in (("o.jsonl", b""), ("o.json", b"[]\n"), ("o.csv", b"\n")):
        assert write(tmp_path / name, sources).read_bytes() == content
    for name in ("o.parquet", "o.arrow"):
        assert read(write(tmp_path / name, sources)) == []


def test_a_row_that_cannot_be_read_has_only_its_answer(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"a": 1}\nnot JSON\n')
    for name in ("out.jsonl", "out.parquet"):
        out = write(tmp_path / name, sources_of(tmp_path / "in.jsonl"), lambda place: {"error": f"e{place}"})
        assert read(out)[1].get("a") is None
        assert read(out)[1]["error"] == "e1"


# --------------------------------------------------------------------------------------------------------------- text


def test_csv_holds_text_of_every_value(tmp_path: Path) -> None:
    import pyarrow as pa

    table = typed_table().drop(["binary"]).append_column("float", pa.array([math.nan, math.inf, 0.1]))
    sources = arrow(tmp_path / "in.arrow", table)
    out = write(tmp_path / "out.csv", sources, lambda place: {"good": place == 0})
    assert read(out)[0] == {
        "small": "1", "at": "1970-01-01T01:00:00+01:00", "day": "2026-01-02", "price": "1.50", "kind": "a",
        "nested": '[{"a":1.5}]', "map": '[["k",1]]', "half": "1.5", "float": None, "good": "true",
    }  # fmt: skip
    assert [row["float"] for row in read(out)] == [None, None, "0.1"]
    lines = read(write(tmp_path / "out.jsonl", sources, all_rows))
    assert (lines[0]["at"], lines[0]["price"], lines[0]["float"]) == ("1970-01-01T01:00:00+01:00", "1.50", None)


@pytest.mark.parametrize("name", ["out.csv", "out.tsv.gz", "out.jsonl", "out.json.zst"])
@pytest.mark.parametrize("nested", [False, True])
def test_bytes_are_refused_by_text_formats(tmp_path: Path, name: str, nested: bool) -> None:
    import pyarrow as pa

    column = [{"image": [b"\xff"]}] if nested else [b"\xff"]
    sources = arrow(tmp_path / "in.parquet", pa.table({"picture": column}))
    with pytest.raises(ConfigError, match=r"the column 'picture' holds bytes, .*: choose \.parquet or \.arrow"):
        write(tmp_path / name, sources, all_rows)
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


@pytest.mark.parametrize("name", ["out.csv", "out.tsv.gz", "out.json", "out.jsonl"])
def test_bytes_in_a_late_row_of_a_table_are_found_before_anything_is_written(tmp_path: Path, name: str) -> None:
    import pyarrow as pa

    file_type = output_type(tmp_path / name)
    late = [None] * 3000 + [b"x"]
    kinds: dict[str, Any] = {
        "plain": pa.array(late), "large": pa.array(late, pa.large_binary()), "view": pa.array(late, pa.binary_view()),
        "fixed": pa.array(late, pa.binary(1)), "dictionary": pa.array(late).dictionary_encode(),
        "nested": pa.array([[{"bytes": one}] for one in late]),
        "map": pa.array([[("k", one)] for one in late], pa.map_(pa.string(), pa.binary())),
    }  # fmt: skip
    first = jsonl(tmp_path / "0.jsonl", [{"text": "x"}])
    for kind, column in kinds.items():
        sources = [*first, *arrow(tmp_path / f"{kind}.arrow", pa.table({"id": range(3001), "c": column}))]
        with pytest.raises(ConfigError, match="the column 'c' holds bytes, which this format cannot hold") as refused:
            check_sources(file_type, sources)
        assert (Path(str(refused.value.file)).name, refused.value.line) == (f"{kind}.arrow", 3001)
        check_sources(file_type, sources, lambda place: place < 3001)  # as with --limit
    ids = pa.array([uuid.UUID(int=1).bytes], pa.uuid())
    check_sources(file_type, arrow(tmp_path / "ids.arrow", pa.table({"id": ids, "none": pa.nulls(1, pa.binary())})))
    check_sources(file_type, first)


def test_a_type_that_parquet_does_not_store_is_refused_with_its_column(tmp_path: Path) -> None:
    import pyarrow as pa

    kinds: dict[str, Any] = {
        "month_day_nano_interval": pa.array([(1, 2, 3)], pa.month_day_nano_interval()),
        "dictionary": pa.DictionaryArray.from_arrays(pa.array([0]), pa.array([[1]])),
    }
    for kind, column in kinds.items():
        sources = arrow(tmp_path / "in.arrow", pa.table({"id": [1], "odd": column}))
        with pytest.raises(ConfigError, match=f"the column 'odd' has the type {kind}.*, which parquet cannot hold: "):
            check_sources(output_type(Path("out.parquet")), sources)
        check_sources(output_type(Path("out.arrow")), sources)
        assert len(read(write(tmp_path / "out.arrow", sources, all_rows))) == 1
    check_sources(output_type(Path("out.parquet")), arrow(tmp_path / "in.arrow", pa.Table.from_pylist(BINARY)))


def test_a_row_is_checked_as_it_would_be_written() -> None:
    row = Row(0, 1, "f", {"a": {"b": [b"x"]}})
    for text_format in (Format.CSV, Format.TSV, Format.JSON, Format.JSONL):
        with pytest.raises(ConfigError, match="the column 'a' holds bytes"):
            check_row(text_format, row)
        check_row(text_format, Row(0, 1, "f", {"a": {"b": ["x", None, 1.5]}, "day": datetime.date(2026, 1, 1)}))
        check_row(text_format, Row(0, 1, "f", None, error="cannot be read"))
    check_row(Format.PARQUET, row)


@pytest.mark.parametrize("name", ["out.parquet", "out.arrow"])
def test_a_column_of_a_table_that_becomes_text_holds_any_value(tmp_path: Path, name: str) -> None:
    """Else a job whose rows are all answered could never write them."""
    import pyarrow as pa

    table = pa.table({"mixed": [b"\xff", None], "at": pa.array([1, None], pa.timestamp("ns"))})
    sources = [
        *arrow(tmp_path / "1.parquet", table),
        *jsonl(tmp_path / "2.jsonl", [{"mixed": {"a": 1}, "at": "now"}, {"mixed": 3, "at": [1]}]),
    ]
    check_sources(output_type(tmp_path / name), sources)
    assert read(write(tmp_path / name, sources, all_rows)) == [
        {"mixed": '"/w=="', "at": '"1970-01-01T00:00:00"'}, {"mixed": None, "at": None},
        {"mixed": '{"a":1}', "at": '"now"'}, {"mixed": "3", "at": "[1]"},
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl", "out.parquet"])
def test_stdin_cannot_be_read_again(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="stdin can be read once: store the input in a file"):
        write(tmp_path / name, [Source(None, FileType(Format.JSONL))])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "raw", "extra", "line"),
    [
        ({"a": 1}, b'{"a" : 1 }', {"r": "x"}, b'{"a" : 1 ,"r":"x"}\n'),
        ({}, b"{ }", {"r": "x"}, b'{"r":"x"}\n'),
        ({"a": 1}, b'{"a":1.0}', {}, b'{"a":1.0}\n'),
        ({"a": 1}, None, {"a": 2, "r": None}, b'{"a":2,"r":null}\n'),
        ({"a": math.nan}, None, {"b": math.inf}, b'{"a":null,"b":null}\n'),
        ({}, None, {}, b"{}\n"),
        (
            {"t": datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC), "d": datetime.date(2026, 1, 2)},
            None,
            {"p": decimal.Decimal("1.50"), "u": uuid.UUID(int=1)},
            b'{"t":"2026-01-02T03:04:05Z","d":"2026-01-02","p":"1.50","u":"00000000-0000-0000-0000-000000000001"}\n',
        ),
    ],
)
def test_a_line_has_the_columns_of_its_row_and_of_its_answer(
    values: dict[str, Any], raw: bytes | None, extra: dict[str, Any], line: bytes
) -> None:
    assert encode_row(values, raw, extra) == line


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"x", "the column 'x' holds bytes"),
        ({"a": [bytearray(b"x")]}, "the column 'x' holds bytes"),
        (object(), "the column 'x' cannot be written as JSON: "),
        ("\ud83d", "the column 'x' cannot be written as JSON: "),
    ],
)
def test_a_value_that_is_no_json_is_refused_with_its_column(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encode_row({"ok": 1, "x": value}, None, {"response": "r"})


# -------------------------------------------------------------------------------------------------------------- files


def fail_at(place: int) -> Any:
    def answers(asked: int) -> dict[str, Any]:
        if asked == place:
            raise RuntimeError("stop")
        return {"response": "r"}

    return answers


@pytest.mark.parametrize("name", ["out.jsonl", "out.json.gz", "out.csv", "out.parquet", "out.parquet.zst", "out.arrow"])
def test_after_an_error_the_old_file_is_as_it_was(tmp_path: Path, name: str) -> None:
    sources = jsonl(tmp_path / "in.jsonl", PLAIN)
    (tmp_path / name).write_text("old")
    with pytest.raises(RuntimeError, match="stop"):
        write(tmp_path / name, sources, fail_at(900))
    assert (tmp_path / name).read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in.jsonl", name])


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    program = """
import os, sys
from pathlib import Path
from gserve_core.rows.formats import find_sources, output_type
from gserve_core.rows.writing import write_table
path = Path("out.arrow.gz")
write_table(path, output_type(path), find_sources("in.jsonl"), lambda place: os.kill(os.getpid(), 9))
"""
    sources = jsonl(tmp_path / "in.jsonl", PLAIN)
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )  # fmt: skip
    assert ran.returncode == -9
    assert len(list(tmp_path.glob(".out.arrow.gz.*.part"))) == 1
    assert len(read(write(tmp_path / "out.arrow.gz", sources))) == 900
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.arrow.gz"]


def test_a_new_file_has_the_mode_of_the_umask_and_an_old_one_keeps_its_own(tmp_path: Path) -> None:
    sources = jsonl(tmp_path / "in.jsonl", PLAIN[:1])
    out = tmp_path / "out.jsonl"
    usual = stat.S_IMODE((tmp_path / "in.jsonl").stat().st_mode)
    assert stat.S_IMODE(write(out, sources).stat().st_mode) == usual
    out.chmod(0o604)
    assert stat.S_IMODE(write(out, sources).stat().st_mode) == 0o604


def test_a_link_stays_and_the_file_to_which_it_leads_is_replaced(tmp_path: Path) -> None:
    sources = jsonl(tmp_path / "in.jsonl", PLAIN[:1])
    other = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path  # another file system
    target = other / f"gserve-test-{os.getpid()}.parquet"
    (tmp_path / "out.parquet").symlink_to(target)
    try:
        for _ in range(2):
            out = write(tmp_path / "out.parquet", sources)
            assert out.is_symlink()
            assert len(read(out)) == 1
        assert not list(other.glob(f".{target.name}*"))
    finally:
        target.unlink()


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv.gz", "out.parquet"])
def test_a_folder_is_no_output(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=r"cannot write the results: .*[Ii]s a directory"):
        write(tmp_path / name, jsonl(tmp_path / "in.jsonl", PLAIN))


def test_a_folder_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write the results: No such file or directory"):
        write(tmp_path / "missing" / "out.jsonl", jsonl(tmp_path / "in.jsonl", PLAIN))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    "name", ["out.jsonl", "out.csv.gz", "out.jsonl.zst", "out.parquet", "out.arrow", "out.arrow.gz"]
)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(small_disk: Path, tmp_path: Path, name: str) -> None:
    sources = jsonl(tmp_path / "in.jsonl", [{"text": os.urandom(1000).hex()} for _ in range(3000)])
    out = small_disk / name
    with pytest.raises(ConfigError, match=r"cannot write the results: .*No space left on device") as refused:
        write(out, sources, lambda place: {"response": place})
    assert str(refused.value).startswith(f"{out}: ")
    assert not list(small_disk.iterdir())


def test_an_output_may_replace_its_input(tmp_path: Path) -> None:
    sources = jsonl(tmp_path / "in.jsonl", PLAIN)
    assert len(read(write(tmp_path / "in.jsonl", sources))) == 900


def test_rows_can_be_written_to_a_pipe(tmp_path: Path) -> None:
    sources = jsonl(tmp_path / "in.jsonl", PLAIN[:3])
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE) as reader:
        write(pipe, sources)
        assert reader.stdout is not None
        assert len(reader.stdout.read().splitlines()) == 3
    assert pipe.is_fifo()


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
from gserve_core.rows.formats import find_sources, output_type
from gserve_core.rows.writing import write_table
def peak(): return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
sources, grown = find_sources({str(tmp_path / "in.jsonl")!r}), []
for name in ("o.jsonl", "o.csv"):
    path = Path({str(tmp_path)!r}, name)
    before = peak()
    write_table(path, output_type(path), sources, lambda place: {{"response": "x" * 100}})
    grown.append(int(peak() - before))
print(*grown)
"""
    text = "x" * 4000
    with (tmp_path / "in.jsonl").open("w") as stream:
        stream.writelines(f'{{"id": {number}, "text": "{number} {text}"}}\n' for number in range(15_000))
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )  # fmt: skip
    assert max(map(int, ran.stdout.split())) < 30


def test_parquet_has_row_groups_of_a_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet as pq

    monkeypatch.setattr("gserve_core.rows.writing.CHUNK_BYTES", 100_000)
    monkeypatch.setattr("gserve_core.rows.writing.GROUP_BYTES", 1_000_000)
    sources = jsonl(tmp_path / "in.jsonl", [{"text": "x" * 50_000}] * 50)
    metadata = pq.read_metadata(write(tmp_path / "out.parquet", sources, lambda place: {"n": place}))
    assert [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)] == [20, 20, 10]
    many = jsonl(tmp_path / "many.jsonl", [{}] * 150_000)
    metadata = pq.read_metadata(write(tmp_path / "out.parquet", many, lambda place: {"n": place}))
    assert [metadata.row_group(number).num_rows // 1000 for number in range(metadata.num_row_groups)] == [100, 49]
