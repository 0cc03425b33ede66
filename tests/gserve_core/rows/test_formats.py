"""Which format a file has: by its name, by its content, and what is refused."""

import gzip
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gserve_core.errors import ConfigError
from gserve_core.rows.formats import FileType, Format, Source, find_sources, output_type

ROW = b'{"prompt": "a"}\n'


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def arrow_bytes(kind: str) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"prompt": ["a"]})
    sink = pa.BufferOutputStream()
    if kind == "parquet":
        pq.write_table(table, sink)
    else:
        new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with new(sink, table.schema) as writer:
            writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def zstd(content: bytes) -> bytes:
    import pyarrow as pa

    packed: bytes = pa.Codec("zstd").compress(content, asbytes=True)
    return packed


@pytest.mark.parametrize(
    ("name", "file_type"),
    [
        ("a.jsonl", FileType(Format.JSONL)),
        ("a.NDJSON", FileType(Format.JSONL)),
        ("a.json", FileType(Format.JSON)),
        ("A.Csv", FileType(Format.CSV)),
        ("a.tsv.gz", FileType(Format.TSV, "gz")),
        ("a.b.PARQUET", FileType(Format.PARQUET)),
        ("a.pq", FileType(Format.PARQUET)),
        ("a.arrow.ZST", FileType(Format.ARROW, "zst")),
        ("a.feather", FileType(Format.ARROW)),
        ("a.ipc", FileType(Format.ARROW)),
    ],
)
def test_the_name_of_an_output_decides_on_its_format(name: str, file_type: FileType) -> None:
    assert output_type(Path("folder") / name) == file_type


@pytest.mark.parametrize("name", ["out", "out.gz", "out.xlsx", "out.jsonl.bz2", "csv", "out.jsonl.gz.zst"])
def test_an_output_of_an_unknown_format_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=r"expected jsonl, ndjson, json, csv, tsv, parquet, arrow, each also with"):
        output_type(Path(name))


def test_a_text_file_is_no_output() -> None:
    with pytest.raises(ConfigError, match="holds no columns: choose jsonl"):
        output_type(Path("out.txt"))


@pytest.mark.parametrize(
    ("name", "content", "file_type"),
    [
        ("x.jsonl", ROW, FileType(Format.JSONL)),
        ("x.JSONL", b"\xef\xbb\xbf" + ROW, FileType(Format.JSONL)),
        ("x.json", b'[{"prompt": "a"}]', FileType(Format.JSON)),
        ("x.json", ROW + ROW, FileType(Format.JSONL)),
        ("x.json", b'{"data": [{"prompt": "a"}]}\n', FileType(Format.JSON)),
        ("x.csv", b"prompt\na\n", FileType(Format.CSV)),
        ("x.txt", ROW, FileType(Format.TXT)),
        ("x.txt", b"", FileType(Format.TXT)),
        ("x.jsonl", gzip.compress(ROW, mtime=0), FileType(Format.JSONL, "gz")),
        ("x.jsonl", zstd(ROW), FileType(Format.JSONL, "zst")),
        ("x.jsonl.gz", ROW, FileType(Format.JSONL)),
        ("x.csv.gz", zstd(b"prompt\na\n"), FileType(Format.CSV, "zst")),
        ("x.parquet", arrow_bytes("parquet"), FileType(Format.PARQUET)),
        ("x.arrow", arrow_bytes("file"), FileType(Format.ARROW)),
        ("x.arrow", arrow_bytes("stream"), FileType(Format.ARROW)),
        ("x.parquet.zst", zstd(arrow_bytes("parquet")), FileType(Format.PARQUET, "zst")),
        ("x", arrow_bytes("parquet"), FileType(Format.PARQUET)),
        ("x.data", arrow_bytes("stream"), FileType(Format.ARROW)),
        ("x", b"\n  " + ROW, FileType(Format.JSONL)),
        ("x", b'{"prompt": "' + 100_000 * b"a" + b'"}\n', FileType(Format.JSONL)),
        ("x", b'{\n "data": []\n}', FileType(Format.JSON)),
        ("x", b'[\n{"prompt": "a"}]', FileType(Format.JSON)),
        ("x.gz", gzip.compress(ROW, mtime=0), FileType(Format.JSONL, "gz")),
    ],
)
def test_name_and_content_decide_on_the_format_of_an_input(
    tmp_path: Path, name: str, content: bytes, file_type: FileType
) -> None:
    path = write(tmp_path / name, content)
    assert find_sources(str(path)) == [Source(path, file_type)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x", b"just text\n", "cannot tell the format .*: jsonl, ndjson, json, csv, tsv, parquet, arrow or txt"),
        ("x.xlsx", b"PK\x03\x04", "cannot tell the format"),
        ("x.gz", gzip.compress(b"text", mtime=0), "cannot tell the format"),
        ("x", b"", "cannot tell the format"),
        ("x.jsonl", arrow_bytes("parquet"), "expected jsonl, found parquet: rename it or give --format"),
        ("x.csv", arrow_bytes("file"), "expected csv, found arrow"),
        ("x.parquet", ROW, "expected parquet, found something else"),
        ("x.parquet", b"", "expected parquet, found an empty file"),
        ("x.arrow", arrow_bytes("parquet"), "expected arrow, found parquet"),
        ("x.csv", ROW, "expected csv, found JSON"),
        ("x.tsv.gz", gzip.compress(ROW, mtime=0), "expected tsv, found JSON"),
        ("x.jsonl", b'[\n{"prompt": "a"}\n]', "found one JSON document: give --format json"),
        ("x.csv", "prompt\na".encode("utf-16"), "found UTF-16: convert it"),
        ("x.jsonl.gz", gzip.compress(ROW, mtime=0)[:-12] + b"\0" * 12, "the file is damaged"),
        ("x.jsonl.gz", gzip.compress(ROW, mtime=0)[:-9], "the file is damaged"),
        ("x.jsonl.zst", zstd(ROW)[:-3], "cannot read the input: Truncated compressed stream"),
    ],
)
def test_an_input_of_no_known_format_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ConfigError, match=message) as refused:
        find_sources(str(path))
    assert str(refused.value).startswith(f"{path}: ")


def test_a_given_format_is_used_for_every_file(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", b"a\n1\n"), write(tmp_path / "two.dat", gzip.compress(b"a\n1\n", mtime=0))
    assert find_sources(str(tmp_path), "CSV") == [
        Source(one, FileType(Format.CSV)),
        Source(two, FileType(Format.CSV, "gz")),
    ]


def test_an_unknown_given_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown format 'excel': expected jsonl, ndjson"):
        find_sources("-", "excel")


def test_a_folder_is_read_by_name_without_what_is_no_input(tmp_path: Path) -> None:
    for name in (
        "b.jsonl",
        "a.csv",
        ".hidden.jsonl",
        "b.jsonl.lock",
        "b.failed.jsonl",
        "b.failed.jsonl.gz",
        "_SUCCESS",
    ):
        write(tmp_path / name, b"a\n1\n" if name == "a.csv" else ROW)
    write(tmp_path / "below" / "c.jsonl", ROW)
    assert [source.path for source in find_sources(str(tmp_path))] == [tmp_path / "a.csv", tmp_path / "b.jsonl"]


def test_a_glob_finds_files_below_and_leaves_out_the_same(tmp_path: Path) -> None:
    for name in ("x/2.jsonl", "x/1.jsonl", "x/1.failed.jsonl", "y.jsonl", "z.csv"):
        write(tmp_path / name, ROW)
    found = find_sources(f"{tmp_path}/**/*.jsonl")
    assert [str(source.path) for source in found] == [f"{tmp_path}/{n}" for n in ("x/1.jsonl", "x/2.jsonl", "y.jsonl")]
    assert len(find_sources(f"{tmp_path}/x/*.failed.jsonl")) == 1


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    path = write(tmp_path / "part[1].jsonl", ROW)
    assert [source.path for source in find_sources(str(path))] == [path]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("missing.jsonl", "no such file or folder"),
        (300 * "x", "cannot read the input: File name too long"),
        ("*.jsonl", "no files match"),
        ("empty", "no files of rows in this folder$"),
        ("deep", r"no files of rows in this folder: for subfolders, give '.*deep/\*\*/\*.parquet'"),
    ],
)
def test_an_input_without_files_is_refused(tmp_path: Path, given: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "deep" / "below" / "a.jsonl", ROW)
    with pytest.raises(ConfigError, match=message):
        find_sources(str(tmp_path / given))


def test_a_pipe_needs_a_name_with_its_format(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    os.mkfifo(path)  # it is not opened: its bytes can be read only once
    assert find_sources(str(path)) == [Source(path, FileType(Format.JSONL))]
    os.mkfifo(tmp_path / "nameless")
    with pytest.raises(ConfigError, match="cannot tell the format of the rows: expected --format"):
        find_sources(str(tmp_path / "nameless"))


@pytest.mark.parametrize(
    ("content", "given", "file_type"),
    [
        (ROW, None, FileType(Format.JSONL)),
        (b'[{"prompt": "a"}]', None, FileType(Format.JSON)),
        (arrow_bytes("parquet"), None, FileType(Format.PARQUET)),
        (b"a line\n", "txt", FileType(Format.TXT)),
        (b"", "jsonl", FileType(Format.JSONL)),
        (gzip.compress(ROW, mtime=0), "jsonl", FileType(Format.JSONL, "gz")),
        (zstd(b"a\n1\n"), "csv", FileType(Format.CSV, "zst")),
    ],
)
def test_the_format_of_stdin_is_given_or_its_content_decides(
    monkeypatch: pytest.MonkeyPatch, content: bytes, given: str | None, file_type: FileType
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))
    assert find_sources("-", given) == [Source(None, file_type)]
    assert sys.stdin.buffer.read() == content


@pytest.mark.parametrize("content", [b"text\n", gzip.compress(ROW, mtime=0)])
def test_stdin_of_an_unknown_format_is_refused(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))
    with pytest.raises(ConfigError, match="stdin: cannot tell the format"):
        find_sources("-")


def test_without_pyarrow_tables_and_zst_are_refused_and_the_rest_works(tmp_path: Path) -> None:
    write(tmp_path / "t.parquet", arrow_bytes("parquet"))
    write(tmp_path / "z.jsonl.zst", zstd(ROW))
    write(tmp_path / "j.jsonl.gz", gzip.compress(ROW, mtime=0))
    program = """
import sys
sys.modules["pyarrow"] = None
from pathlib import Path
from gserve_core.rows.formats import find_sources, output_type
from gserve_core.rows.reading import read_rows
for ask in (lambda: find_sources("t.parquet"), lambda: find_sources("z.jsonl.zst"),
            lambda: output_type(Path("o.arrow")), lambda: output_type(Path("o.csv.zst"))):
    try:
        ask()
    except Exception as error:
        print(type(error).__name__, error)
print([row.values for row in read_rows(find_sources("j.jsonl.gz"))], output_type(Path("o.csv.gz")))
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )  # fmt: skip
    needs = "needs pyarrow: pip install 'gserve[data]'"
    assert ran.stdout.splitlines() == [
        f"ConfigError t.parquet: the format parquet {needs}",
        f"ConfigError z.jsonl.zst: the format jsonl.zst {needs}",
        f"ConfigError o.arrow: the format arrow {needs}",
        f"ConfigError o.csv.zst: the format csv.zst {needs}",
        "[{'prompt': 'a'}] csv.gz",
    ]
