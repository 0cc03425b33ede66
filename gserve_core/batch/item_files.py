"""Files of items and of their answers: read and checked as a whole, written line by line, completed by later runs."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import msgspec
from msgspec import Struct

from gserve_core.errors import ConfigError, ItemError
from gserve_core.messages import ResponseOutput, json_safe

STDIO = Path("-")
RECORD_START = b'{"id":'


type Params = dict[str, Any]


type Outcomes = Iterator[tuple[int, list[ResponseOutput] | ItemError]]


class Line(Struct, kw_only=True, forbid_unknown_fields=True):
    """One item of the input, as a line of JSON."""

    field: ClassVar[str]
    id: int | str
    params: Params | None = None

    @property
    def content(self) -> Any:
        """The prompt or the messages."""
        return getattr(self, self.field)


class PromptLine(Line):
    """A prompt: a text or a list of token ids."""

    field: ClassVar[str] = "prompt"
    prompt: str | list[int]


class ConversationLine(Line):
    """A conversation."""

    field: ClassVar[str] = "messages"
    messages: list[Any]


class Record(Struct, kw_only=True, omit_defaults=True):
    """One line of the output: the outcome of an item, under its id."""

    id: int | str
    prompt: str | list[int] | None = None
    messages: list[Any] | None = None
    outputs: list[Any] | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        if self.outputs is None and self.error is None:
            raise ValueError("neither 'outputs' nor 'error'")

    @property
    def content(self) -> Any:
        """The prompt or the messages."""
        return self.prompt if self.messages is None else self.messages


def number_items[T: Line](values: Iterable[Any], kind: type[T]) -> list[T]:
    """Return items without ids of their own. Their ids are their places.

    Raises ConfigError: they are not UTF-8 text.
    """
    try:
        lines = [kind(**{"id": index, kind.field: value}) for index, value in enumerate(values)]
        msgspec.json.encode(lines)
    except UnicodeEncodeError as error:
        raise ConfigError(f"the arguments are not UTF-8 text: {error.reason}") from error
    return lines


def read_items[T: Line](path: Path, kind: type[T]) -> list[T]:
    """Read all items of an input, so that its errors are known before a server starts.

    Raises ConfigError: the input cannot be read, a line is wrong, or an id is repeated.
    """
    try:
        text = (sys.stdin.buffer.read() if path == STDIO else path.read_bytes()).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read the input: {error.strerror}", file=path) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"expected UTF-8 text: {error.reason} at byte {error.start}", file=path) from error
    rows = [(number, row.rstrip("\r")) for number, row in enumerate(text.split("\n"), 1) if row.strip()]
    if kind is PromptLine and not _has_json(path, rows):
        return number_items((row for _, row in rows), kind)
    lines: dict[int | str, T] = {}
    for index, (number, row) in enumerate(rows):
        try:
            value = msgspec.json.decode(row)
            given = value if isinstance(value, dict) else {kind.field: value}
            line = msgspec.convert({"id": index} | given, kind)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"not a {kind.field} line: {error}".replace("`", "'"), file=path, line=number) from error
        if line.id in lines:
            raise ConfigError(f"the id {line.id!r} occurs twice", file=path, line=number)
        lines[line.id] = line
    return list(lines.values())


def _has_json(path: Path, rows: Sequence[tuple[int, str]]) -> bool:
    """Return whether an input is JSON lines. The file name decides, or for stdin the first line."""
    if path != STDIO or not rows:
        return path.suffix == ".jsonl"
    try:
        return isinstance(msgspec.json.decode(rows[0][1]), (str, dict))
    except (ValueError, RecursionError):
        return False


def has_system(messages: Sequence[Any]) -> bool:
    """Return whether a conversation begins with a system message."""
    return bool(messages) and isinstance(messages[0], dict) and messages[0].get("role") == "system"


def parse_params(text: str | None) -> Params | None:
    """Return sampling parameters from JSON text. Raises ConfigError: it is not a JSON object."""
    if text is None:
        return None
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"expected --params as a JSON object like {{\"max_tokens\": 64}}, got '{text}'") from error


def encode(line: Line, outcome: list[ResponseOutput] | ItemError) -> bytes:
    """Return the output line of an item."""
    if isinstance(outcome, ItemError):
        record = Record(id=line.id, error=str(outcome))
    else:
        outputs = [json_safe(output) for output in outcome]
        record = Record(id=line.id, outputs=outputs, **{line.field: line.content})
    return msgspec.json.encode(record) + b"\n"


def in_order(outcomes: Outcomes) -> Outcomes:
    """Yield outcomes in the order of their items."""
    waiting: dict[int, list[ResponseOutput] | ItemError] = {}
    turn = 0
    for index, outcome in outcomes:
        waiting[index] = outcome
        while turn in waiting:
            yield turn, waiting.pop(turn)
            turn += 1


def finished_ids(path: Path, lines: Sequence[Line]) -> set[int | str]:
    """Return the ids that an earlier run has finished, and remove its unfinished lines from the file.

    Unfinished lines are errors, and a last line that was cut off when the run was killed.

    Raises ConfigError: the file holds something else, or another prompt for an id.
    """
    asked = {line.id: line.content for line in lines}
    finished: set[int | str] = set()
    unfinished: set[int] = set()
    with path.open("rb") as stream:
        for number, row in enumerate(stream, 1):
            torn = not row.endswith(b"\n") and (row.startswith(RECORD_START) or RECORD_START.startswith(row))
            try:
                record = None if torn else msgspec.json.decode(row, type=Record)
            except (ValueError, RecursionError) as error:
                raise ConfigError("not a result of gserve: choose another --output", file=path, line=number) from error
            if record is None or record.error is not None:
                unfinished.add(number)
                continue
            if record.id in asked and record.content != asked[record.id]:
                raise ConfigError(
                    f"the id {record.id!r} has a different prompt here than in the input: choose another --output",
                    file=path, line=number,
                )  # fmt: skip
            finished.add(record.id)
    if unfinished:
        _rewrite(path, without=unfinished)
    return finished


def _rewrite(path: Path, without: set[int]) -> None:
    """Rewrite a file without some of its lines. It is complete at every moment."""
    descriptor, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as new, path.open("rb") as old:
            new.writelines(row.rstrip(b"\n") + b"\n" for number, row in enumerate(old, 1) if number not in without)
        shutil.copymode(path, scratch)
        Path(scratch).replace(path.resolve())
    except BaseException:
        Path(scratch).unlink()
        raise


@contextmanager
def open_output(path: Path | None) -> Iterator[BinaryIO]:
    """Open the file for results, to append to it; None: stdout. Raises ConfigError: it cannot be opened."""
    if path is None:
        yield sys.stdout.buffer
        return
    try:
        stream = path.open("ab")
    except OSError as error:
        raise ConfigError(f"cannot write the results: {error.strerror}", file=path) from error
    with stream:
        yield stream
