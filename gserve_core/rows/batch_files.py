"""The two files of a batch of OpenAI's: requests, one per line, and their answers, one per line.

The format: https://platform.openai.com/docs/guides/batch
"""

import contextlib
import hashlib
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

import msgspec
from msgspec import Raw, Struct

from ..errors import ConfigError, GserveError, did_you_mean
from ..openai_api import ROUTES, Kind
from .formats import MAGIC
from .id_set import IdSet

URLS = sorted(path for (method, path), kind in ROUTES.items() if method == "POST" and kind is not Kind.HEARS)
"""The values of `url` that a line may have."""
BLOCK = 1 << 20
"""Size of the parts in which files are read, in bytes."""
SHOWN = 200
"""Maximum length of a value in a message, in characters."""
BOM = b"\xef\xbb\xbf"


@dataclass
class BatchSummary:
    """The result of a job, and of its earlier runs on the same output.

    `lines`: number of lines of the input that are not blank.
    `answered`, `failed`: number of lines with an answer of status 200, and of all others. They add up to `lines`.
    `skipped`: number of lines that an earlier run has finished.
    `failures`: number of failed lines by kind, such as "status 404".
    `example`: the message of one failed line.
    `prompt_tokens`, `completion_tokens`: totals of all answers.
    """

    lines: int = 0
    answered: int = 0
    failed: int = 0
    skipped: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    example: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __str__(self) -> str:
        """Return two or three lines of text for people."""
        skipped = f" ({self.skipped:,} by an earlier run)" if self.skipped else ""
        text = (
            f"{self.lines:,} lines{skipped}: {self.answered:,} answered, {self.failed:,} failed;"
            f" {self.prompt_tokens:,} tokens in, {self.completion_tokens:,} tokens out"
        )
        if self.failed:
            text += "\nfailed: " + ", ".join(f"{count:,} x {kind}" for kind, count in self.failures.most_common())
            text += f"\nfor example: {self.example}" if self.example else ""
        return text

    def add(self, line: "Answered") -> None:
        """Count a line of the output."""
        if line.response is not None and line.response.status_code == 200:
            self.answered += 1
            usage = _decoded(line.response.body, _Body).usage
            tokens = usage if isinstance(usage, dict) else {}
            self.prompt_tokens += _number(tokens, "prompt_tokens", "input_tokens")
            self.completion_tokens += _number(tokens, "completion_tokens", "output_tokens")
            return
        self.failed += 1
        if line.error is not None:
            kind, why = line.error.code, line.error.message
        else:
            kind = "no answer" if line.response is None else f"status {line.response.status_code}"
            why = "" if line.response is None else _error_message(line.response.body)
        self.failures[kind] += 1
        if not self.example and why:
            name = "" if line.custom_id is None else f"{line.custom_id!r:.{SHOWN}}: "
            self.example = f"{name}{' '.join(why.split()):.{SHOWN}}"


# ------------------------------------------------------------------------------------------------------- forms of lines


class _Asked(Struct):
    """A line of the input."""

    custom_id: Any = None
    method: Any = None
    url: Any = None
    body: Raw = Raw(b"null")


class _AskedBody(Struct):
    """The field of a request's body that matters here."""

    stream: Any = None


class Response(Struct):
    """The answer of a server."""

    status_code: int
    request_id: str
    body: Raw


class Failure(Struct):
    """Why a line has no answer. `line`: its number in the input, from 1."""

    code: str
    message: str
    line: int | None = None


class Answered(Struct):
    """A line of the output."""

    id: str
    custom_id: str | None
    response: Response | None
    error: Failure | None

    @property
    def is_final(self) -> bool:
        """Whether another attempt would give the same answer."""
        if self.error is not None or self.response is None:
            return False
        return self.response.status_code < 500 and self.response.status_code != 429


class _Body(Struct):
    """The fields of an answer's body that matter here."""

    usage: Any = None
    error: Any = None
    message: Any = None


@dataclass(frozen=True)
class Request:
    """A line of the input that is to be sent. `number`: of the line, from 1."""

    number: int
    custom_id: str
    path: str
    body: bytes


class _WrongLine(Exception):
    """A line of the input is not a request."""


def _decoded[T](text: bytes | Raw, form: type[T]) -> T:
    """Return JSON in a form whose fields are all optional, and the empty form if it is something else."""
    try:
        return msgspec.json.decode(text, type=form)
    except (ValueError, RecursionError):
        return form()


def _number(tokens: dict[str, Any], *names: str) -> int:
    """Return the number under the first of these names; 0 if there is none."""
    return next((value for name in names if isinstance(value := tokens.get(name), int)), 0)


def _error_message(body: Raw) -> str:
    """Return the message of an error in the forms of OpenAI, Anthropic and others."""
    found = _decoded(body, _Body)
    error = found.error if isinstance(found.error, dict) else {}
    return str(error.get("message") or found.message or found.error or "")


def one_line(body: bytes) -> Raw:
    """Return an answer's body as JSON without line ends. What is not JSON becomes a text."""
    try:
        body.decode()
        text = msgspec.json.format(body, indent=-1) if b"\n" in body or b"\r" in body else body
        msgspec.json.decode(text, type=Any if not text.startswith(b"{") else _Body)
    except (ValueError, RecursionError):
        return Raw(msgspec.json.encode(body.decode(errors="replace")))
    return Raw(text)


# ---------------------------------------------------------------------------------------------------------------- input


class BatchInput:
    """A batch file. Raises ConfigError: it cannot be read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        if not path.is_file():
            what = "is not a file" if path.exists() else "does not exist"
            raise ConfigError(f"expected a batch file, but '{path}' {what}")
        digest = hashlib.blake2b(digest_size=16)
        self.lines = 0
        """Number of lines that are not blank."""
        with self._open() as stream:
            for row in stream:
                if self.lines == 0 and row.startswith((*MAGIC.values(),)):
                    raise ConfigError("it is compressed: expected a batch file of plain text, so unpack it", file=path)
                digest.update(row)
                self.lines += not row.isspace()
        self.digest = f"blake2b:{digest.hexdigest()}"

    @contextlib.contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        try:
            with self._path.open("rb", buffering=BLOCK) as stream:
                yield stream
        except OSError as error:
            raise ConfigError(f"cannot read the input: {error.strerror}", file=self._path) from error

    def requests(self) -> Iterator[Request | Answered]:
        """Yield each line as a request, or as the line of the output that says what is wrong with it."""
        seen = IdSet()
        with self._open() as stream:
            for number, row in enumerate(stream, 1):
                text = (row.removeprefix(BOM) if number == 1 else row).strip()
                if not text:
                    continue
                name: str | None = None
                try:
                    asked = _parse(text)
                    if not isinstance(asked.custom_id, str) or not asked.custom_id:
                        raise _WrongLine(
                            f"expected a custom_id, a text that is not empty, got {_shown(asked.custom_id)}"
                        )
                    if not seen.add(asked.custom_id):  # without its id: each stands once in the output
                        raise _WrongLine(f"the custom_id {_shown(asked.custom_id)} stands on an earlier line too")
                    name = asked.custom_id
                    _check(asked)
                    yield Request(number, name, asked.url, bytes(asked.body))
                except _WrongLine as error:
                    failure = Failure("invalid_line", f"line {number}: {error}", number)
                    yield Answered(new_id(), name, None, failure)


def _parse(text: bytes) -> _Asked:
    """Return a line of the input. Raises _WrongLine: it is not a JSON object."""
    try:
        text.decode()
        return msgspec.json.decode(text, type=_Asked)
    except msgspec.ValidationError as error:
        raise _WrongLine("expected a JSON object with custom_id, method, url and body") from error
    except (ValueError, RecursionError) as error:
        raise _WrongLine(f"not JSON: {error}") from error


def _check(asked: _Asked) -> None:
    """Check all fields but the custom_id. Raises _WrongLine: the line cannot be sent."""
    if asked.method != "POST":
        raise _WrongLine(f"expected the method 'POST', got {_shown(asked.method)}")
    if asked.url not in URLS:
        if not isinstance(asked.url, str):
            raise _WrongLine(f"expected a url such as '/v1/chat/completions', got {_shown(asked.url)}")
        hint = "; audio is sent as a form, not in a batch" if "/audio/" in asked.url else did_you_mean(asked.url, URLS)
        raise _WrongLine(f"a batch cannot use the url {_shown(asked.url)}{hint}")
    try:
        body = msgspec.json.decode(asked.body, type=_AskedBody)
    except (ValueError, RecursionError) as error:
        raise _WrongLine(
            f"expected a JSON object as the body, got {bytes(asked.body)[:40].decode(errors='replace')}"
        ) from error
    if body.stream:
        raise _WrongLine("an answer in a batch cannot be streamed: leave 'stream' out of the body")


def _shown(value: Any) -> str:
    return f"{value!r:.{SHOWN}}"


def new_id() -> str:
    """Return the id of a line of the output."""
    return f"batch_req_{secrets.token_hex(16)}"


# --------------------------------------------------------------------------------------------------------------- output


class BatchOutput:
    """The file with the answers, to which this process alone writes. A context manager.

    `finished`: the ids of the lines that an earlier run has finished. Its other lines are removed.

    Raises ConfigError: the file cannot be opened, or another program has written to it.
    """

    def __init__(self, path: Path, summary: BatchSummary) -> None:
        self._path = path.resolve()
        self._summary = summary
        self.finished = IdSet()
        try:
            if self._path.exists():
                self._read()
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._size = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise self._failed(error, ConfigError) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def _read(self) -> None:
        """Count the finished lines, and remove all others. A line that was cut off when a run was killed is one."""
        size = unfinished = 0
        with self._path.open("rb", buffering=BLOCK) as stream:
            for number, row in enumerate(stream, 1):
                if not row.endswith(b"\n"):
                    break
                size += len(row)
                line = self._decode(row, number)
                if line.is_final and line.custom_id is not None and self.finished.add(line.custom_id):
                    self._summary.add(line)
                else:
                    unfinished += 1
        if self._path.stat().st_size > size:
            os.truncate(self._path, size)
        if unfinished:
            self._rewrite()
        self._summary.skipped = len(self.finished)

    def _rewrite(self) -> None:
        """Remove all lines that are to be tried again. The file is complete at every moment."""
        kept = IdSet()
        scratch = self._path.with_name(f".{self._path.name}.scratch")
        with scratch.open("wb", buffering=BLOCK) as new, self._path.open("rb", buffering=BLOCK) as old:
            for number, row in enumerate(old, 1):
                line = self._decode(row, number)
                if line.is_final and line.custom_id is not None and kept.add(line.custom_id):
                    new.write(row)
        shutil.copymode(self._path, scratch)
        scratch.replace(self._path)

    def _decode(self, row: bytes, number: int) -> Answered:
        try:
            return msgspec.json.decode(row, type=Answered)
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                "not a line of a batch output: choose another --output, or --overwrite", file=self._path, line=number
            ) from error

    def write(self, line: Answered) -> None:
        """Append a line, and count it. Raises GserveError: the disk is full, for example. No part of it remains."""
        text = msgspec.json.encode(line) + b"\n"
        done = 0
        try:
            while done < len(text):
                done += os.write(self._descriptor, text[done:] if done else text)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self._descriptor, self._size)
            raise self._failed(error, GserveError) from error
        self._size += len(text)
        self._summary.add(line)

    def _failed(self, error: OSError, kind: type[GserveError]) -> GserveError:
        return kind(f"{self._path}: cannot write the results: {error.strerror}; the same command continues")
