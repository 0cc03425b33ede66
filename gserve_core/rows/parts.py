"""The outputs in a folder: the parts that the tasks of a job array write, and their states."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..batch.output_lock import check_free
from ..errors import ConfigError
from . import fingerprint
from .formats import Format
from .output import FAILED_SUFFIX, journal_of

READ_BYTES = 1 << 20
"""Size of the parts in which answers are counted, in bytes."""
PART = re.compile(r"part-([0-9]+)-of-([0-9]+)\..+")


@dataclass(frozen=True)
class Part:
    """The output of a job.

    `state`: "running", "done", "failed" (rows have failed), "interrupted", or "pending" (no task has begun it).
    `answered`: number of rows that have an answer. `failed`, `rows`: numbers of rows; None if unknown.
    """

    name: str
    state: str
    answered: int = 0
    failed: int | None = None
    rows: int | None = None


def part_name(number: str, parts: int, file_type: str) -> str:
    """Return the name of a part's file. Raises ConfigError: the format is unknown."""
    name, _, compression = file_type.partition(".")
    if name not in set(Format) - {Format.TXT} or compression not in ("", "gz", "zst"):
        raise ConfigError(f"unknown format '{file_type}': expected jsonl, csv, parquet or another format of outputs")
    return f"part-{number}-of-{parts}.{file_type}"


def check_parts(folder: Path, parts: int, file_type: str) -> None:
    """Check that a folder has no parts of another number or format: its rows would be there twice.

    Raises ConfigError: it has, or the format is unknown.
    """
    for name in sorted(path.name for path in folder.iterdir()) if folder.is_dir() else ():
        found = PART.fullmatch(name)
        if found and not name.endswith(FAILED_SUFFIX) and name != part_name(found[1], parts, file_type):
            raise ConfigError(
                f"the folder has parts of another job, such as {name}: give its --shards and --part-format, or choose"
                " another --output",
                file=folder,
            )


def parts_in(folder: Path, is_over: Callable[[str], bool] = lambda job: False) -> list[Part]:
    """Return the outputs of jobs in a folder, and the parts that are missing.

    `is_over`: see `output_lock.only_writer`.

    Raises ConfigError: the folder or a fingerprint cannot be read.
    """
    try:
        outputs = [output for path in folder.iterdir() if (output := fingerprint.output_of(path)) is not None]
    except OSError as error:
        raise ConfigError(f"cannot read the folder: {error.strerror}", file=folder) from error
    found = {output.name: _part(output, is_over) for output in outputs}
    for name in list(found):
        if match := PART.fullmatch(name):
            for number in range(1, int(match[2]) + 1):
                other = name.replace(f"part-{match[1]}-", f"part-{number}-", 1)
                found.setdefault(other, Part(other, "pending"))
    return sorted(found.values(), key=_order)


def _order(part: Part) -> tuple[str, int]:
    match = PART.fullmatch(part.name)
    return ("part-", int(match[1])) if match else (part.name, 0)


def _part(output: Path, is_over: Callable[[str], bool]) -> Part:
    known = fingerprint.read(output)
    progress = None if known is None else known.progress
    try:
        check_free(output, is_over)
    except ConfigError:
        return Part(output.name, "running", _count_answers(output), rows=progress.rows if progress else None)
    if progress is None or progress.rows is None:
        return Part(output.name, "interrupted", _count_answers(output))
    state = "failed" if progress.failed else "done" if progress.answered == progress.rows else "interrupted"
    return Part(output.name, state, progress.answered, progress.failed, progress.rows)


def _count_answers(output: Path) -> int:
    """Return the number of answers that a job has written so far."""
    journal = journal_of(output)
    path = journal if journal.exists() else output
    try:
        with path.open("rb") as stream:
            return sum(part.count(b"\n") for part in iter(lambda: stream.read(READ_BYTES), b""))
    except FileNotFoundError:
        return 0
