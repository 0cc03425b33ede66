"""The formats of files of rows: which one a file has, and the bytes in it without their compression."""

import contextlib
import glob
import gzip
import io
import stat
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, cast

import msgspec

from ..errors import ConfigError

HEAD = 64 * 1024
"""Number of bytes, after decompression, that decide on the format of a file."""
BUFFER = 1024 * 1024
"""Size of a read from a file, in bytes."""
BOM = b"\xef\xbb\xbf"
"""The bytes with which some programs mark UTF-8 text."""
STDIN = "stdin"
"""The name of standard input in messages."""
UTF16 = (b"\xff\xfe", b"\xfe\xff")
"""The bytes with which UTF-16 text begins."""
MAGIC = {"gz": b"\x1f\x8b", "zst": b"\x28\xb5\x2f\xfd"}
"""The first bytes of a compressed file."""
MARKERS = {
    "_SUCCESS", "_metadata", "_common_metadata", "dataset_info.json", "dataset_dict.json", "state.json",
}  # fmt: skip
"""Names of files that Spark and `datasets` write beside their tables. They hold no rows."""


class Format(StrEnum):
    """How rows stand in a file."""

    JSONL = "jsonl"
    JSON = "json"
    CSV = "csv"
    TSV = "tsv"
    PARQUET = "parquet"
    ARROW = "arrow"
    TXT = "txt"


SUFFIXES = {f".{one}": one for one in Format} | {
    ".ndjson": Format.JSONL,
    ".pq": Format.PARQUET,
    ".feather": Format.ARROW,
    ".ipc": Format.ARROW,
}
COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
TABLES = {Format.PARQUET, Format.ARROW}
"""Formats that pyarrow reads and writes. Their columns have types."""
KNOWN = "jsonl, ndjson, json, csv, tsv, parquet, arrow or txt, each also with .gz or .zst"
"""The formats, as messages name them."""


@dataclass(frozen=True)
class FileType:
    """What a file holds.

    `compression`: of the whole file: "" for none, "gz" or "zst".
    """

    format: Format
    compression: str = ""

    def __str__(self) -> str:
        return f"{self.format}.{self.compression}" if self.compression else self.format


@dataclass(frozen=True)
class Source:
    """One file of rows. `path` None: stdin, which can be read once."""

    path: Path | None
    type: FileType

    def __str__(self) -> str:
        return STDIN if self.path is None else str(self.path)


# ------------------------------------------------------------------------------------------------------------ by name


def output_type(path: Path) -> FileType:
    """Return the type that the name of an output asks for. Raises ConfigError: it asks for none that is written."""
    named = _named_type(path.name)
    if named is None:
        raise ConfigError(f"cannot tell the format from the name: expected {KNOWN.replace(' or txt', '')}", file=path)
    if named.format is Format.TXT:
        raise ConfigError("a text file holds no columns: choose jsonl, csv, parquet or another format", file=path)
    if named.format in TABLES or named.compression == "zst":
        require_pyarrow(named, path)
    return named


def _named_type(name: str) -> FileType | None:
    stem, dot, last = name.lower().rpartition(".")
    compression = COMPRESSIONS.get(dot + last, "")
    if compression:
        _, dot, last = stem.rpartition(".")
    found = SUFFIXES.get(dot + last)
    return None if found is None else FileType(found, compression)


def _given_type(text: str) -> FileType:
    named = _named_type(f"x.{text.strip().lstrip('.')}")
    if named is None:
        raise ConfigError(f"unknown format '{text}': expected {KNOWN}")
    return named


def require_pyarrow(needed_by: FileType, file: Path | str | None = None) -> None:
    """Check that pyarrow is installed, which some types need. Raises ConfigError: it is not."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"the format {needed_by} needs pyarrow: pip install 'gserve[data]'", file=file) from error


# ------------------------------------------------------------------------------------------------------------ sources


def find_sources(given: str, format: str | None = None) -> list[Source]:  # noqa: A002
    """Return the files that an argument names, sorted by name: a file, a folder, a glob, or "-" for stdin.

    Names and first bytes decide on the type of each file. A folder is read without its subfolders. Left out of folders
    and globs are hidden files, locks, files of failed rows, and marker files of Spark and `datasets`.

    `format`: the format of all of them, such as "csv" or "jsonl.gz".

    Raises ConfigError: there is no such file, or the format of one is unknown or contradicts its name.
    """
    asked = None if format is None else _given_type(format)
    if given == "-":
        return [_stdin_source(asked)]
    try:
        return [Source(path, _file_type(path, asked)) for path in _find_files(given)]
    except OSError as error:
        raise ConfigError(f"cannot read the input: {error.strerror}", file=error.filename) from error


def _find_files(given: str) -> list[Path]:
    path = Path(given)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and not _is_left_out(file.name))
        if not files:
            hint = (
                f": for subfolders, give '{path}/**/*.parquet'" if any(one.is_dir() for one in path.iterdir()) else ""
            )
            raise ConfigError(f"no files of rows in this folder{hint}", file=path)
        return files
    if path.exists():
        return [path]
    if not glob.has_magic(given):
        raise ConfigError("no such file or folder", file=path)
    keeps_all = _is_left_out(path.name)  # asked for by name
    found = sorted(Path(name) for name in glob.glob(given, recursive=True))  # noqa: PTH207 - absolute patterns too
    files = [file for file in found if file.is_file() and (keeps_all or not _is_left_out(file.name))]
    if not files:
        raise ConfigError(f"no files match '{given}'")
    return files


def _is_left_out(name: str) -> bool:
    bare = name.lower().removesuffix(".gz").removesuffix(".zst")
    return name.startswith(".") or bare.endswith((".lock", ".failed.jsonl")) or name in MARKERS


def _stdin_source(asked: FileType | None) -> Source:
    first = cast(io.BufferedReader, sys.stdin.buffer).peek(BUFFER)
    compression = _compression(first)
    if not compression:
        return Source(None, FileType(_checked_format(first, asked.format if asked else None, STDIN)))
    if asked is None:
        raise ConfigError(f"cannot tell the format of compressed rows: give --format: {KNOWN}", file=STDIN)
    source = Source(None, FileType(asked.format, compression))
    if compression == "zst" or asked.format in TABLES:
        require_pyarrow(source.type, STDIN)
    return source


def _file_type(path: Path, asked: FileType | None) -> FileType:
    named = asked or _named_type(path.name)
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe, say: its first bytes can be read only once
        if named is None:
            raise ConfigError(f"cannot tell the format of the rows: expected --format {KNOWN}", file=path)
        return named
    with path.open("rb") as stream:
        first = stream.read(HEAD)
    compression = _compression(first)
    if compression == "zst":
        require_pyarrow(FileType(named.format if named else Format.JSONL, compression), path)
    if compression:
        with open_bytes(Source(path, FileType(Format.TXT, compression))) as plain:
            first = plain.read(HEAD)
    found = FileType(_checked_format(first, named.format if named else None, path), compression)
    if found.format in TABLES:
        require_pyarrow(found, path)
    return found


# --------------------------------------------------------------------------------------------------------- by content


def _compression(first: bytes) -> str:
    return next((name for name, magic in MAGIC.items() if first.startswith(magic)), "")


def _checked_format(head: bytes, named: Format | None, file: Path | str) -> Format:
    """Return the format of a file from its name and the beginning of its content.

    Raises ConfigError: they contradict each other, or neither is known.
    """
    table = _table_format(head)
    if table is None and head.startswith(UTF16):
        raise ConfigError("expected UTF-8 text, found UTF-16: convert it, as with iconv -f UTF-16 -t UTF-8", file=file)
    if named is None:
        found = table or _text_format(head)
        if found is None:
            raise ConfigError(f"cannot tell the format of the rows: name it or give --format: {KNOWN}", file=file)
        return found
    if named in TABLES or table is not None:
        if table is not named:
            found_name = table or ("an empty file" if not head else "something else")
            raise ConfigError(f"expected {named}, found {found_name}: rename it or give --format", file=file)
        return named
    first, rest = _first_line(head)
    if named is Format.JSON and rest.strip() and _is_object(first):
        return Format.JSONL
    if named is Format.JSONL and first in (b"{", b"["):
        raise ConfigError("expected one JSON object a line, found one JSON document: give --format json", file=file)
    if named in (Format.CSV, Format.TSV) and _is_object(first):
        raise ConfigError(f"expected {named}, found JSON: rename it or give --format", file=file)
    return named


def _table_format(head: bytes) -> Format | None:
    if head.startswith((b"PAR1", b"PARE")):
        return Format.PARQUET
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff", b"FEA1")):
        return Format.ARROW
    return None


def _text_format(head: bytes) -> Format | None:
    first, rest = _first_line(head)
    if first.startswith(b"{"):
        is_long = not rest and len(head) >= HEAD
        return Format.JSONL if is_long or _is_object(first) else Format.JSON
    return Format.JSON if first.startswith(b"[") else None


def _first_line(head: bytes) -> tuple[bytes, bytes]:
    first, _, rest = head.removeprefix(BOM).lstrip().partition(b"\n")
    return first.strip(), rest


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(msgspec.json.decode(line), dict)
    except (ValueError, RecursionError):
        return False


# -------------------------------------------------------------------------------------------------------------- bytes


@contextlib.contextmanager
def open_bytes(source: Source) -> Iterator[BinaryIO]:
    """Open the bytes of a source without their compression. They can be read line by line.

    Raises ConfigError, also within the context: the file cannot be read, is damaged, or needs pyarrow.
    """
    with reading(source), contextlib.ExitStack() as stack:
        raw: Any = sys.stdin.buffer
        if source.path is not None:
            raw = stack.enter_context(source.path.open("rb", buffering=BUFFER))
        if source.type.compression == "gz":
            raw = stack.enter_context(io.BufferedReader(gzip.GzipFile(fileobj=raw), BUFFER))
        elif source.type.compression == "zst":
            require_pyarrow(source.type, source.path)
            import pyarrow as pa

            native = stack.enter_context(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd"))
            raw = io.BufferedReader(native, BUFFER)
        yield raw


@contextlib.contextmanager
def reading(source: Source) -> Iterator[None]:
    """Turn errors of reading a source, within the context, into ConfigErrors that name it."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ConfigError(f"the file is damaged: {error}", file=str(source)) from error
    except OSError as error:
        raise ConfigError(f"cannot read the input: {error.strerror or error}", file=str(source)) from error
