"""Rows out of files: every format, bad rows, large files, and whether a file has changed."""

import datetime
import gzip
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from gserve_core.errors import ConfigError
from gserve_core.rows.formats import FileType, Format, Source, find_sources
from gserve_core.rows.reading import Digest, Row, begins_as, count_rows, digest, read_rows


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path, given: str | None = None, **options: Any) -> list[Row]:
    return list(read_rows(find_sources(str(path), given), **options))


def values(rows: Iterable[Row]) -> list[Any]:
    return [row.values for row in rows]


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, **options)
    return path


# --------------------------------------------------------------------------------------------------------- JSON lines


def test_a_json_line_keeps_its_bytes(tmp_path: Path) -> None:
    lines = b'\xef\xbb\xbf {"b": 1.0, "a": "\\u00e9"}\r\n\n \t\n{"big":123456789012345678901234567890 }'
    one, two = read(write(tmp_path / "a.jsonl", lines))
    file = str(tmp_path / "a.jsonl")
    assert one == Row(0, 1, file, {"b": 1.0, "a": "é"}, b'{"b": 1.0, "a": "\\u00e9"}', None)
    assert (two.place, two.line, two.raw) == (1, 4, b'{"big":123456789012345678901234567890 }')


def test_a_line_may_be_a_bare_prompt_conversation_or_list_of_tokens(tmp_path: Path) -> None:
    rows = read(write(tmp_path / "a.jsonl", '"hello"\n[{"role": "user", "content": "hi"}]\n[1, 2]\n'))
    assert values(rows) == [
        {"prompt": "hello"}, {"messages": [{"role": "user", "content": "hi"}]}, {"prompt": [1, 2]},
    ]  # fmt: skip
    assert [row.raw for row in rows] == [None] * 3


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b'{"prompt": "\\ud83d"}', r"half a character, which is no text \(lone surrogate '\\ud83d'\)"),
        (b'{"prompt": "abc', "not JSON: Unterminated string"),
        (b'{"prompt": "\xff"}', "not UTF-8: byte 0xff at position 13 of the line"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b"[1, true]", "expected an object, found a list that begins with a number"),
        (b'[{"a": 1}, 2]', "expected an object, found a list that begins with an object"),
        (b"[" * 900 + b"]" * 900, "expected an object, found a list that begins with a list"),
        (b"[]", "expected an object, found an empty list"),
        (b"7", "expected an object, found a number"),
        (b"null", "expected an object, found null"),
        (b"true", "expected an object, found true"),
        (b"{} {}", "not JSON: Extra data"),
    ],
)
def test_a_bad_line_is_one_error_and_the_others_are_read(tmp_path: Path, line: bytes, error: str) -> None:
    good = b'{"prompt": "a"}\n'
    first, bad, last = read(write(tmp_path / "a.jsonl", good + line + b"\n" + good))
    assert (bad.place, bad.line, bad.values, bad.raw) == (1, 2, None, None)
    assert bad.error is not None
    assert re.search(error, bad.error), bad.error
    assert first.values == last.values == {"prompt": "a"}


def test_nan_of_python_is_read_though_it_is_no_json(tmp_path: Path) -> None:
    (row,) = read(write(tmp_path / "a.jsonl", '{"x": NaN, "y": -Infinity}\n'))
    assert row.values is not None
    assert str(row.values) == "{'x': nan, 'y': -inf}"
    assert row.raw is None


def test_rows_that_are_not_wanted_are_counted_and_not_decoded(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "not JSON\n\n{}\n")
    write(tmp_path / "b.txt", "x\ny\n")
    rows = read(tmp_path, wanted=lambda place: place in (1, 3))
    assert [(row.place, row.line, row.values, row.error) for row in rows] == [
        (1, 3, {}, None),
        (3, 2, {"text": "y"}, None),
    ]


def test_a_hundred_thousand_rows_take_less_than_a_second(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "".join(f'{{"id": {n}, "prompt": "a prompt {n}"}}\n' for n in range(100_000)))
    began = time.process_time()
    assert sum(1 for _ in read_rows(find_sources(str(path)))) == 100_000
    assert time.process_time() - began < 1
    began = time.process_time()
    assert not read(path, wanted=lambda _place: False)
    assert time.process_time() - began < 0.5


def test_a_line_may_be_very_long(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"prompt": "' + b"a" * 50_000_000 + b'"}\r\n{"prompt": "b"}\r\n')
    assert [len(row.values["prompt"]) for row in read(path) if row.values] == [50_000_000, 1]


# ----------------------------------------------------------------------------------------------------------- text, CSV


def test_a_line_of_text_is_a_row(tmp_path: Path) -> None:
    rows = read(write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n\n  two \n\xff\nthree"))
    assert values(rows) == [{"text": "one"}, {"text": "  two "}, None, {"text": "three"}]
    assert rows[2].error == "not UTF-8: byte 0xff at position 1 of the line"
    assert [row.line for row in rows] == [1, 3, 4, 5]


def test_csv_has_a_header_quoted_newlines_and_empty_fields(tmp_path: Path) -> None:
    rows = read(write(tmp_path / "a.csv", '\ufeffid,"the ""text"""\r\n1,"a\nb, c"\r\n\r\n2,\r\n3\r\n'))
    name = 'the "text"'
    assert values(rows) == [{"id": "1", name: "a\nb, c"}, {"id": "2", name: None}, {"id": "3", name: None}]
    assert [row.line for row in rows] == [2, 5, 6]


def test_tsv_is_delimited_by_tabs(tmp_path: Path) -> None:
    assert values(read(write(tmp_path / "a.tsv", "a\tb\n1,2\té\n"))) == [{"a": "1,2", "b": "é"}]


def test_a_field_of_csv_may_be_of_any_size(tmp_path: Path) -> None:
    (row,) = read(write(tmp_path / "a.csv", "a,b\n1," + "x" * 1_000_000 + "\n"))
    assert row.values is not None
    assert len(row.values["b"]) == 1_000_000


def test_a_bad_row_of_csv_is_one_error(tmp_path: Path) -> None:
    rows = read(write(tmp_path / "a.csv", b'a,b\n1,2,3\nok,1\n\xe4,"x\ny"\n"a"b,c\nok,2\n"open,3\n'))
    assert [(row.line, row.error) for row in rows if row.error] == [
        (2, "expected 2 fields as in the header, found 3: quote a field that holds delimiters"),
        (4, "not UTF-8: byte 0xe4 at position 1 of line 4"),
        (6, "not CSV: ',' expected after '\"'"),
        (8, "not CSV: a quote is never closed"),
    ]
    assert values(row for row in rows if not row.error) == [{"a": "ok", "b": "1"}, {"a": "ok", "b": "2"}]
    assert [row.place for row in rows] == list(range(6))


def test_a_quote_that_takes_the_rest_of_a_csv_is_refused_with_the_line_of_its_row(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", 'a,b\n"two\nlines",1\nok,"open\nlost,2\nlost,3\n')
    rows = read_rows(find_sources(str(file)))
    assert next(rows).values == {"a": "two\nlines", "b": "1"}
    with pytest.raises(ConfigError) as refused:
        next(rows)
    assert (refused.value.file, refused.value.line) == (str(file), 4)
    assert "a quote in the row that begins in this line is never closed" in refused.value.message
    assert "takes all lines up to the last, 6" in refused.value.message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a header with the names of the columns, found nothing"),
        (b"a,b,a\n", "the column 'a' occurs twice in the header"),
        (b"a,,b\n", "column 2 has no name in the header"),
        (b'"a', "the header is wrong"),
        (b"a,\xe4\n", "the header is not UTF-8: byte 0xe4 at position 3 of line 1"),
    ],
)
def test_a_wrong_header_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(write(tmp_path / "a.csv", content))


# --------------------------------------------------------------------------------------------------------------- JSON


FRAME = [{"id": 1, "text": "é"}, {"id": 2, "text": None}]


@pytest.mark.parametrize("orient", ["records", "columns", "index", "split", "table"])
@pytest.mark.parametrize("pretty", [None, 2])
def test_what_pandas_writes_as_json_is_read(tmp_path: Path, orient: Any, pretty: int | None) -> None:
    import pandas as pd

    frame = pd.DataFrame(FRAME)
    text = frame.to_json(orient=orient, indent=pretty)
    assert values(read(write(tmp_path / "a.json", text))) == FRAME


def test_values_of_pandas_have_numbers_as_columns(tmp_path: Path) -> None:
    assert values(read(write(tmp_path / "a.json", '[[1, "é"], [2, null]]'))) == [
        {"0": 1, "1": "é"},
        {"0": 2, "1": None},
    ]


@pytest.mark.parametrize(
    ("document", "rows"),
    [
        ({"version": 1, "data": FRAME}, FRAME),
        ({"rows": FRAME, "errors": []}, FRAME),
        ({"id": [1, 2], "text": ["é", None]}, FRAME),
        (["a", "b"], [{"prompt": "a"}, {"prompt": "b"}]),
        ([[1, 2], [3, 4]], [{"prompt": [1, 2]}, {"prompt": [3, 4]}]),
        ([[{"role": "user"}]], [{"messages": [{"role": "user"}]}]),
        ([], []),
    ],
)
def test_a_json_document_holds_a_list_of_rows(tmp_path: Path, document: Any, rows: Any) -> None:
    assert values(read(write(tmp_path / "a.json", json.dumps(document)))) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a", "id": 1}', "found an object with 'prompt', 'id': for one object a line, give --format jsonl"),
        ('{"train": [{"a": 1}], "test": [{"a": 2}]}', "found an object with 'train', 'test'"),
        ('{"x": {"a": 1}, "y": {"a": 2}}', "found an object with 'x', 'y'"),
        ("{}", "found an empty object"),
        ("7", "found a number"),
        ('[\n{"a": 1},\n]', r"not JSON: .* at column \d+"),
        ("[" * 200_000, "not JSON: "),
    ],
)
def test_a_json_document_without_rows_is_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(write(tmp_path / "a.json", content))


def test_a_json_document_in_another_encoding_is_refused_with_byte_and_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.json:2: not UTF-8: byte 0xe4 at position 11 of the file"):
        read(write(tmp_path / "a.json", b'[\n{"a": "\xe4"}]'.replace(b'"a"', b'"ab"')))


def test_a_bad_row_of_a_json_document_is_one_error(tmp_path: Path) -> None:
    rows = read(write(tmp_path / "a.json", r'[{"a": "\ud83d"}, {"a": "b"}, 7]'))
    assert [row.error for row in rows] == [
        r"half a character, which is no text (lone surrogate '\ud83d')", None, "expected an object, found a number",
    ]  # fmt: skip
    assert values(rows) == [None, {"a": "b"}, None]


# ------------------------------------------------------------------------------------------------------------- tables


def test_tables_are_read_in_batches_with_only_the_columns_asked_for(tmp_path: Path) -> None:
    count = 5000
    path = write_parquet(
        tmp_path / "a.parquet", {"a": range(count), "b.c": ["x"] * count, "d": [{"e": 1}] * count}, row_group_size=1500
    )
    assert [row.line for row in read(path)] == list(range(1, count + 1))
    wanted = read(path, wanted=lambda place: place in (0, 1, 2999, 4999), columns=["b.c", "a", "missing"])
    assert [(row.place, row.values) for row in wanted] == [
        (place, {"a": place, "b.c": "x"}) for place in (0, 1, 2999, 4999)
    ]
    assert values(read(path, wanted=lambda place: place == 7, columns=[])) == [{}]


def test_an_arrow_file_and_an_arrow_stream_are_read(tmp_path: Path) -> None:
    import pyarrow as pa

    table = pa.table({"a": range(3000)})
    for new, name in ((pa.ipc.new_file, "file.arrow"), (pa.ipc.new_stream, "stream.arrow")):
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table, 1700)
    rows = read(tmp_path, wanted=lambda place: place != 1)
    assert values(rows) == [{"a": n} for n in (0, *range(2, 3000), *range(3000))]
    assert [row.place for row in rows] == [0, *range(2, 6000)]
    assert rows[-1].line == 3000


def test_a_dataset_of_hugging_face_is_read_as_a_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}]).save_to_disk(str(tmp_path / "set"))
    assert values(read(tmp_path / "set")) == [{"prompt": "a"}, {"prompt": "b"}]


def test_values_that_python_lacks_cost_digits_or_one_row(tmp_path: Path) -> None:
    import pyarrow as pa

    times = pa.array([1_500, 2], pa.timestamp("ns"))
    nested = pa.array([[{"at": 1_500}], []], pa.list_(pa.struct([("at", pa.timestamp("ns"))])))
    days = pa.array([0, 10**9], pa.date32())
    one, two = read(write_parquet(tmp_path / "a.parquet", {"time": times, "nested": nested, "day": days}))
    moment = datetime.datetime(1970, 1, 1, microsecond=1)  # noqa: DTZ001 - the column has no zone
    assert one.values == {"time": moment, "nested": [{"at": moment}], "day": datetime.date(1970, 1, 1)}
    assert two.values is None
    assert two.error is not None
    assert two.error.startswith("cannot decode the row: ")


def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa

    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ConfigError, match="the column 'a' occurs twice"):
        read(tmp_path / "a.arrow")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz", "a.jsonl.zst", "a.parquet.gz"])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, name: str) -> None:
    import pyarrow as pa

    write_parquet(tmp_path / "whole.parquet", {"a": [os.urandom(20).hex() for _ in range(9000)]})
    content = (tmp_path / "whole.parquet").read_bytes()
    if name == "a.arrow":
        sink = pa.BufferOutputStream()
        table = pa.table({"a": range(9000)})
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        content = sink.getvalue().to_pybytes()
    lines = b"".join(b'{"a": "%b"}\n' % os.urandom(20).hex().encode() for _ in range(9000))
    content = {
        "a.jsonl.gz": gzip.compress(lines),
        "a.jsonl.zst": pa.Codec("zstd").compress(lines, asbytes=True),
        "a.parquet.gz": gzip.compress(content),
    }.get(name, content)
    path = write(tmp_path / name, content[: -len(content) // 10])
    with pytest.raises(ConfigError) as refused:
        read(path)
    assert str(refused.value).startswith(f"{path}: "), refused.value


# ------------------------------------------------------------------------------------------------- compression, stdin


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_compressed_files_may_have_several_parts(tmp_path: Path, compression: str, parts: int) -> None:
    import pyarrow as pa

    line = b'{"a": 1}\n'
    packed = gzip.compress(line) if compression == "gz" else pa.Codec("zstd").compress(line, asbytes=True)
    assert len(read(write(tmp_path / f"a.jsonl.{compression}", packed * parts))) == parts


def test_stdin_is_read_once_whatever_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (
        b'{"a": 1}\n{"a": 2}\n',
        write_parquet(tmp_path / "a.parquet", {"a": [1, 2]}).read_bytes(),
        gzip.compress((tmp_path / "a.parquet").read_bytes()),
    ):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))
        rows = list(read_rows(find_sources("-", "parquet" if content[:1] == b"\x1f" else None)))
        assert values(rows) == [{"a": 1}, {"a": 2}]
        assert {row.file for row in rows} == {"stdin"}


def test_a_crash_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    path = write_parquet(tmp_path / "a.parquet", {"a": [1, 2]})
    packed = write(tmp_path / "a.parquet.gz", gzip.compress(path.read_bytes()))
    rows = read_rows(find_sources(str(packed)))
    assert next(rows).values == {"a": 1}
    assert not list((tmp_path / "tmp").iterdir())  # it never had a name
    assert next(rows).values == {"a": 2}


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    text = "x" * 1000
    with (tmp_path / "a.jsonl").open("w") as stream:
        stream.writelines(f'{{"id": {number}, "text": "{text}"}}\n' for number in range(200_000))
    program = f"""
from gserve_core.rows.formats import find_sources
from gserve_core.rows.reading import read_rows
def peak(): return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
sources = find_sources({str(tmp_path / "a.jsonl")!r})
before = peak()
count = sum(len(row.values["text"]) for row in read_rows(sources))
print(count, int(peak() - before))
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )  # fmt: skip
    count, grown = map(int, ran.stdout.split())
    assert count == 200_000_000
    assert grown < 100


# ------------------------------------------------------------------------------------------------------------ digests


def test_a_digest_says_whether_a_file_has_changed_or_only_grown(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"a": 1}\n' * 300_000)
    (known,) = digest(find_sources(str(path)))
    assert (known.name, known.size) == ("a.jsonl", 2_700_000)
    source = Source(path, FileType(Format.JSONL))
    with path.open("ab") as stream:
        stream.write(b'{"a": 2}\n')
    assert digest([source]) != [known]
    assert begins_as(source, known)
    path.write_bytes(b'{"a": 2}\n' + path.read_bytes()[9:])
    assert not begins_as(source, known)
    path.write_bytes(b'{"a": 1}\n')
    assert not begins_as(source, known)


def test_a_digest_survives_json_and_leaves_out_stdin(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"a\n")
    (known,) = digest([Source(path, FileType(Format.TXT)), Source(None, FileType(Format.TXT))])
    assert Digest(*json.loads(json.dumps(known))) == known


def test_the_digest_of_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the input: No such file"):
        digest([Source(tmp_path / "a.txt", FileType(Format.TXT))])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b""),
        ("a.jsonl", b'\xef\xbb\xbf\n{"a": 1}\n \t\r\n{"a": 2}'),
        ("a.jsonl", b'\xef\xbb\xbf{"a": 1}\nnot JSON\n\n'),
        ("a.txt", b"one\n\n\xff\n"),
        ("a.txt", b"\n\xef\xbb\xbf\n"),
        ("a.csv", b'a,b\n1,"x\ny"\n\n2,3\n'),
        ("a.json", b'[{"a": 1}, {"a": 2}]'),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n\n{"a": 2}\n', mtime=0)),
    ],
)
def test_as_many_rows_are_counted_as_are_read(tmp_path: Path, name: str, content: bytes) -> None:
    write(tmp_path / "first.csv", b"a\n1\n2\n3\n")
    sources = [*find_sources(str(tmp_path / "first.csv")), *find_sources(str(write(tmp_path / name, content)))]
    assert count_rows(sources) == len(list(read_rows(sources)))
