"""The output of a job on a file: which rows it holds, and the lines that are appended to it."""

import array
import contextlib
import fnmatch
import mmap
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ..batch.pieces import Outcome
from ..errors import ConfigError, GserveError, ItemError
from . import fingerprint
from .answers import CUT, ERROR, FILE, LINE, PLACE, Answers
from .formats import SUFFIXES, FileType, Source
from .reading import Row
from .writing import encode, encode_row, join_objects, write_table

STDIO = "-"
"""The name of stdin or stdout."""
FAILED_SUFFIX = ".failed.jsonl"
MAX_KINDS = 5
"""Maximum number of kinds of failures in a summary."""
MAX_KIND = 100
"""Maximum length of a kind of failures, in characters."""
_NUMBER = re.compile(r"\d+")


@dataclass
class Totals:
    """The state of a job.

    `rows`: number of rows to answer; None if unknown. `before`: number of rows that earlier runs have answered.
    `done`, `failed`: number of rows of this run that were answered, and that failed.
    `cut`: number of answers that were cut at max_tokens. `prompt_tokens`, `completion_tokens`: of this run.
    `failures`: number of failed rows for each kind of error.
    `seconds`: time since the first row was sent.
    """

    rows: int | None = None
    before: int = 0
    done: int = 0
    failed: int = 0
    cut: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def ended(self) -> int:
        """The number of rows that need nothing more, or have failed."""
        return self.before + self.done + self.failed

    def __str__(self) -> str:
        """Return a summary in one line."""
        rows = [f"{self.done:,} answered"]
        if self.before:
            rows.append(f"{self.before:,} answered before")
        if self.failed:
            kinds = "; ".join(f"{count:,} x {kind}" for kind, count in self.failures.most_common(MAX_KINDS))
            rows.append(f"{self.failed:,} failed ({kinds})")
        parts = [f"rows: {', '.join(rows)}"]
        if self.cut:
            parts.append(f"answers cut at max_tokens: {self.cut:,}")
        if self.done:
            out = f", {self.completion_tokens:,} out" if self.completion_tokens else ""
            parts.append(f"tokens: {self.prompt_tokens:,} in{out}")
            parts.append(f"{self.seconds:.1f} s")
        return "; ".join(parts)


class Sink:
    """Writes rows with their outcomes, and counts both.

    `answers`: makes the columns of answers.
    `good`, `bad`: the streams for answered and for failed rows. None as `bad`: both go to `good`.
    `is_whole`: whether a line holds the columns of the row too, not only those of the answer.
    `names_files`: whether a failed row names its file.
    """

    def __init__(
        self, answers: Answers, totals: Totals, good: "Stream", bad: "Stream | None", *,
        is_whole: bool, names_files: bool,
    ) -> None:  # fmt: skip
        self._answers = answers
        self._prefix = answers.prefix
        self._totals = totals
        self._good, self._bad = good, bad or good
        self._is_whole, self._names_files = is_whole, names_files

    def write(self, outcomes: Sequence[tuple[Row, Outcome]]) -> None:
        """Write the lines of rows that have ended. Raises GserveError: they cannot be written."""
        good: list[bytes] = []
        bad = good if self._bad is self._good else []
        totals, encode_answer, is_whole = self._totals, self._answers.encode, self._is_whole
        done = cut = prompt_tokens = completion_tokens = 0  # faster than those of `totals`
        for row, outcome in outcomes:
            try:
                if not isinstance(outcome, list):
                    raise outcome
                answer = encode_answer(outcome, row.place)
                good.append(join_objects(_own_columns(row), answer) if is_whole else answer + b"\n")
            except (ItemError, ConfigError) as error:
                totals.failed += 1
                totals.failures[_NUMBER.sub("N", str(error))[:MAX_KIND]] += 1
                bad.append(self._failed_line(row, error))
                continue
            done += 1
            for output in outcome:
                cut += output.finish_reason == CUT
                completion_tokens += len(output.token_ids)
            prompt_tokens += outcome[0].prompt_tokens or 0 if outcome else 0
        self._good.write(b"".join(good))
        if bad is not good:
            self._bad.write(b"".join(bad))
        totals.done += done
        totals.cut += cut
        totals.prompt_tokens += prompt_tokens
        totals.completion_tokens += completion_tokens

    def _failed_line(self, row: Row, error: GserveError) -> bytes:
        about: dict[str, Any] = {ERROR: str(error), PLACE: row.place, LINE: row.line}
        if self._names_files:
            about[FILE] = row.file
        about = {self._prefix + name: value for name, value in about.items()}
        values = {name: value for name, value in (row.values or {}).items() if name not in about}
        try:
            return encode_row(values, row.raw if len(values) == len(row.values or {}) else None, about)
        except ConfigError:  # a column of bytes, say
            return encode_row({name: str(value) for name, value in values.items()}, None, about)


def _is_failed_row(row: Any) -> bool:
    """Return whether a line is a failed row of some job, whose prefix may have been another one."""
    if not isinstance(row, dict):
        return False
    prefixes = [name.removesuffix(PLACE) for name in row if name.endswith(PLACE)]
    return any(row.keys() >= {prefix + name for name in (ERROR, LINE)} for prefix in prefixes)


def _own_columns(row: Row) -> bytes:
    """Return the columns of a row as a JSON object; b"" if it has none. Raises ConfigError: a value cannot be JSON."""
    if not row.values:
        return b""
    return encode(row.values) if row.raw is None else row.raw


class Stream:
    """A file to which whole lines are appended. A descriptor of its own: nothing waits in a buffer."""

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self._name = name

    def write(self, data: bytes) -> None:
        """Append to the file. Raises GserveError: it cannot be written. Raises BrokenPipeError: its reader has gone."""
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except BrokenPipeError:
            raise
        except OSError as error:
            raise GserveError(
                f"{self._name}: cannot write the results: {error.strerror}; what is written stays, and the same command"
                " continues there"
            ) from error


@contextlib.contextmanager
def open_stream(path: Path | None, flags: int = 0) -> Iterator[Stream]:
    """Open a file to write to it. `path` None: stdout. Raises ConfigError: it cannot be opened."""
    if path is None:
        sys.stdout.flush()
        yield Stream(sys.stdout.fileno(), "stdout")
        return
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | flags, 0o644)
    except OSError as error:
        raise ConfigError(f"cannot write the results: {error.strerror}", file=path) from error
    try:
        yield Stream(descriptor, str(path))
    finally:
        os.close(descriptor)


def journal_of(output: Path) -> Path:
    """Return the path of the journal of an output, which exists while its job is unfinished."""
    path = output.resolve()
    return path.with_name(f".{path.name}.gserve.journal")


class JobFiles:
    """The files of a job: the output, what lies beside it, and which rows they hold.

    `answers`: made the columns of the answers.
    `is_direct`: whether answers are appended to the output itself, and not to a journal.
    """

    def __init__(
        self, output: Path, type_: FileType, failed: Path | None, answers: Answers, *, is_direct: bool
    ) -> None:
        self._output = output.resolve()
        self._type = type_
        self._place = answers.prefix + PLACE
        self._vectors = answers.vectors
        self.is_direct = is_direct
        self.failed = self._beside_failed() if failed is None else failed.resolve()
        self.journal = journal_of(output)
        self.input = self._output.with_name(f".{self._output.name}.gserve.input")
        self._lines = array.array("q")
        """Where the line of each row begins in the journal or the output, plus 1, by the place of the row; 0: none."""

    def _beside_failed(self) -> Path:
        stem = self._output
        for suffixes in ((".gz", ".zst"), tuple(SUFFIXES)):
            if stem.suffix.lower() in suffixes:
                stem = stem.with_suffix("")
        return stem.with_name(stem.name + FAILED_SUFFIX)

    @property
    def _written(self) -> Path:
        """The file to which answers are appended."""
        return self._output if self.is_direct else self.journal

    @property
    def finished_rows(self) -> int | None:
        """The number of rows in a finished table, whose journal has been removed; None: it is not finished."""
        if self.is_direct or self.journal.exists() or not self._output.exists():
            return None
        known = fingerprint.read(self._output)
        progress = None if known is None else known.progress
        return None if progress is None or progress.failed else progress.rows

    def check_apart(self, given: Path, sources: Sequence[Source]) -> None:
        """Raise ConfigError: the job would write into its input, or the next run would read the answers as input.

        `given`: the file, folder or pattern of the input.
        """
        given = given.resolve()
        inputs = {source.path.resolve() for source in sources if source.path is not None}
        for path in (self._output, self.failed):
            if path in inputs or path.parent == given or _would_match(path.parts, given.parts):
                raise ConfigError("the output is among the files of the input: write it elsewhere", file=path)

    def check_failed(self) -> None:
        """Raise ConfigError if a job must not write failed rows anew to their file, and remove it once it is empty."""
        own = (self._output, self.journal, self.input, fingerprint.path_beside(self._output))
        if self.failed in own:
            raise ConfigError("failed rows need a file of their own", file=self.failed)
        try:
            if not self.failed.exists():
                return
            if not self.failed.is_file():
                raise ConfigError(
                    "expected a file for failed rows, and this is a device, a pipe or a folder", file=self.failed
                )
            with self.failed.open("rb") as stream:
                first, rest = stream.readline(), stream.read(1)
        except OSError as error:
            raise ConfigError(
                f"cannot read the failed rows of an earlier run: {error.strerror}", file=self.failed
            ) from error
        try:
            is_ours = _is_failed_row(msgspec.json.decode(first))
        except (ValueError, RecursionError):
            is_cut = first.startswith(b"{") and not first.endswith(b"\n") and not rest  # by a kill
            is_ours = not first or is_cut
        if not is_ours:
            raise ConfigError(
                "this file is not one of failed rows, and would be lost: move it, or choose another one for failed"
                " rows (--failed)",
                file=self.failed,
            )

    def remove(self) -> None:
        """Remove all files of an earlier job."""
        for path in (self._output, self.failed, self.journal, fingerprint.path_beside(self._output)):
            path.unlink(missing_ok=True)

    def copy_input(self, given: Any) -> None:
        """Copy stdin or rows to a file, since a job reads its input more than once. Raises ConfigError."""
        try:
            with self.input.open("wb") as copy:
                if given == STDIO:
                    shutil.copyfileobj(sys.stdin.buffer, copy)
                else:
                    copy.writelines(encode_row(dict(row), None, {}) for row in given)
        except OSError as error:
            raise ConfigError(f"cannot copy the input to {self.input}: {error.strerror}") from error

    @property
    def has_answers(self) -> bool:
        """Whether any row has been answered."""
        return len(self._lines) > 0

    def is_done(self, place: int) -> bool:
        """Return whether the row at a place of the input has been answered."""
        return place < len(self._lines) and self._lines[place] > 0

    def scan(self) -> None:
        """Find out which rows have been answered. Remove a last line that was cut off when a run was killed.

        Raises ConfigError: a line is no answer of gserve.
        """
        line = msgspec.defstruct("Line", [("place", int)], rename={"place": self._place})
        decode = msgspec.json.Decoder(line).decode
        position = 0
        try:
            with self._written.open("r+b") as stream:
                for number, row in enumerate(stream, 1):
                    if not row.endswith(b"\n"):
                        stream.truncate(position)
                        break
                    try:
                        self._note(decode(row).place, position)  # type: ignore[attr-defined]
                    except (ValueError, RecursionError) as error:
                        text = "not an answer of gserve: choose another --output, or --overwrite"
                        raise ConfigError(text, file=self._written, line=number) from error
                    position += len(row)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ConfigError(f"cannot read earlier results: {error.strerror}", file=self._written) from error

    def _note(self, place: int, position: int) -> None:
        missing = place + 1 - len(self._lines)
        if missing > 0:
            self._lines.frombytes(bytes(8 * max(missing, len(self._lines) // 2)))
        self._lines[place] = position + 1

    @contextlib.contextmanager
    def open(self) -> "Iterator[tuple[Stream, Stream]]":
        """Open the files for answers and for failed rows. The latter begins anew: these rows are tried again."""
        with open_stream(self._written, os.O_APPEND) as good, open_stream(self.failed, os.O_TRUNC) as bad:
            yield good, bad

    def complete(self, sources: Sequence[Source], totals: Totals, *, is_last: bool) -> None:
        """Make the output of the journal, and remove what is needed no more.

        `is_last`: whether there are no other rows to answer, so that the journal is not needed any more.

        Raises ConfigError: the output cannot be written.
        """
        if self.is_direct:
            self._output.touch()
        else:
            self.scan()
            with self._answers() as answer:
                write_table(self._output, self._type, sources, answer, self._vectors)
        answered = totals.before + totals.done
        fingerprint.note(self._output, progress=fingerprint.Progress(totals.rows, answered, totals.failed))
        if not totals.failed:
            self.failed.unlink(missing_ok=True)
            if is_last:
                self.journal.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _answers(self) -> "Iterator[Callable[[int], dict[str, Any] | None]]":
        """Yield a function that returns the columns of a row's answer by its place, from the journal."""
        decode = msgspec.json.Decoder(dict[str, Any]).decode
        if not any(self._lines):  # a file without content cannot be mapped
            yield lambda place: None
            return
        with self.journal.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as journal:

            def answer(place: int) -> dict[str, Any] | None:
                if not self.is_done(place):
                    return None
                start = self._lines[place] - 1
                columns = decode(journal[start : journal.find(b"\n", start)])
                del columns[self._place]
                return columns

            yield answer


def _would_match(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether `glob` would find a path by a pattern, if the path existed. Both are given as their parts."""
    if not path or not pattern:
        return not path and all(it == "**" for it in pattern)
    if pattern[0] == "**":
        is_below = not path[0].startswith(".") and _would_match(path[1:], pattern)
        return is_below or _would_match(path, pattern[1:])
    is_seen = pattern[0].startswith(".") or not path[0].startswith(".")
    return is_seen and fnmatch.fnmatchcase(path[0], pattern[0]) and _would_match(path[1:], pattern[1:])
