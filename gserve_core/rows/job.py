"""A job on a file: each row of the input is answered once, whatever interrupts the job.

Answers are appended as they come: to the output if it is JSON lines, else to a journal beside it. The same job
continues where it was interrupted: a row is done if its answer has been written, and all other rows are tried again. At
the end, a table is made of the input and the journal.

Beside the output `NAME` there are, as long as they are needed: `.NAME.lock` (see `batch.output_lock`),
`.NAME.gserve.json` (see `rows.fingerprint`), `.NAME.gserve.journal` and `.NAME.gserve.input` (a copy of stdin).
"""

import contextlib
import functools
import itertools
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..batch.batch import in_order, outcome_lists
from ..batch.dispatcher import Dispatcher
from ..batch.items import INVALID, SeedOf, error_of
from ..batch.output_lock import check_free, only_writer
from ..batch.pieces import Outcome
from ..errors import ConfigError, GserveError, ItemError
from ..tasks import GENERATE
from . import fingerprint
from .answers import Answers, VectorAnswers
from .formats import STDIN, FileType, Format, Source, find_sources, output_type
from .output import STDIO, JobFiles, Sink, Totals, open_stream
from .prompts import Prompts, RowOptions
from .reading import Digest, Row, begins_as, count_rows, digest, read_rows
from .row_items import RowItems
from .writing import check_row, check_sources

TRIED = 10
"""Number of rows of which prompts are made before servers start. If all fail, the job does not begin."""
HOPELESS = 1_000
"""Number of rows at the begin of a job after which it ends, if all of them have failed for one reason."""
JSON_LINES = FileType(Format.JSONL, "")
GROWING = {JSON_LINES, FileType(Format.TXT), FileType(Format.CSV), FileType(Format.TSV)}
"""Types of files to which rows may be appended. The places of the earlier rows remain."""
COPY = "stdin"
"""The name of an input that is not in files, in a fingerprint."""
ARGUMENTS = "arguments"
"""The name of rows that are not in files, in messages."""
_CONTENT = re.compile(r"(\d+) bytes of \w+, ([0-9a-f]+)")
_SHARD = re.compile(r"([0-9]{1,6})/([0-9]{1,6})")

type Report = Callable[[Totals], object]


@dataclass(frozen=True, kw_only=True)
class FileJob:
    """A job on a file.

    `source`: a file, a folder, a pattern such as `data/*.parquet`, `-` for stdin, or rows as mappings.
    `output`: the file for the answers; None: stdout, in JSON lines.
    `prompts`: how prompts are made of rows.
    `format`: the format of the input, if its name does not tell, such as "csv".
    `prefix`, `extra`: see `Answers`.
    `ordered`: whether JSON lines are in the order of the input. Tables always are.
    `failed`: the file for failed rows; None: beside the output, with the suffix `.failed.jsonl`.
    `limit`: number of rows of the input to work on; None: all.
    `shard`: "I/N": work on every N-th row, from the I-th on, counted from 1.
    `overwrite`: whether an earlier output is discarded. A text names the SLURM job that discards it: only in its first
    run, since SLURM may run a job again.

    Raises ConfigError: an option is wrong.
    """

    source: str | Path | Sequence[Mapping[str, Any]]
    output: Path | None = None
    prompts: RowOptions = field(default_factory=RowOptions)
    format: str | None = None
    prefix: str = ""
    extra: bool = False
    ordered: bool = False
    failed: Path | None = None
    limit: int | None = None
    shard: str | None = None
    overwrite: bool | str = False

    def __post_init__(self) -> None:
        if not isinstance(self.source, (str, Path, Sequence)):
            raise ConfigError(
                f"expected a file, a folder or a pattern as input, got {type(self.source).__name__}: 'map' takes tables"
            )
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"expected a limit of at least 1 row, got {self.limit}")
        self.wanted()
        if self.output is None and (self.failed is not None or self.overwrite):
            raise ConfigError("a file for failed rows and overwrite are for an output file")
        self.make_prompts()
        self.make_answers()
        self.output_type  # noqa: B018 - checks the name

    def make_prompts(self) -> Prompts:
        """Return what makes prompts of rows."""
        return Prompts(self.prompts)

    def make_answers(self) -> Answers:
        """Return what makes the columns of answers."""
        if self.prompts.task == GENERATE:
            return Answers(prefix=self.prefix, extra=self.extra, schema=self.prompts.schema, has_place=True)
        if self.extra:
            raise ConfigError("'extra' is for answers that are texts: use generate or chat")
        return VectorAnswers(prefix=self.prefix, has_place=True)

    @property
    def output_type(self) -> FileType:
        """The format of the output."""
        return JSON_LINES if self.output is None or self._is_stream else output_type(self.output)

    @property
    def _is_stream(self) -> bool:
        """Whether the output is stdout, a pipe or a device, so that the job cannot be continued."""
        return self.output is None or (self.output.exists() and not self.output.is_file())

    def wanted(self) -> Callable[[int], bool] | None:
        """Return a function that returns whether the job works on the row at a place of the input; None: on all rows.

        Raises ConfigError: the shard is wrong.
        """
        found = _SHARD.fullmatch("1/1" if self.shard is None else self.shard)
        part, number = (0, 0) if found is None else (int(found[1]), int(found[2]))
        if not 1 <= part <= number:
            raise ConfigError(f"expected a shard like 1/4, from 1/4 to 4/4, got '{self.shard}'")
        if self.limit is None and number == 1:
            return None
        limit = math.inf if self.limit is None else self.limit
        return lambda place: place < limit and place % number == part - 1

    @property
    def _is_stored(self) -> bool:
        """Whether the input is in files, so that it can be read twice."""
        return isinstance(self.source, (str, Path)) and str(self.source) != STDIO

    def sources(self) -> list[Source]:
        """Return the files of the input; none for rows. Raises ConfigError: they are missing, or of unknown format."""
        return find_sources(str(self.source), self.format) if isinstance(self.source, (str, Path)) else []

    def rows(self, sources: Sequence[Source], wanted: Callable[[int], bool] | None) -> Iterator[Row]:
        """Yield the rows of the input at wanted places; None: at all."""
        if sources or isinstance(self.source, (str, Path)):
            return read_rows(sources, wanted)
        places = enumerate(self.source)
        return (Row(place, place + 1, ARGUMENTS, dict(row)) for place, row in places if wanted is None or wanted(place))

    def previews(self, count: int) -> Iterator[tuple[Row, Any]]:
        """Yield the first rows, each with its prompt or its error. Raises ConfigError."""
        prompts, answers = self.make_prompts(), self.make_answers()
        for row in itertools.islice(self.rows(self.sources(), self.wanted()), count):
            try:
                if row.values is None:
                    raise ItemError(row.error or "it cannot be read")
                answers.check_columns(row.values)
                yield row, prompts.make(row.values)[0]
            except INVALID as error:
                yield row, error_of(error, row.place)

    def check(self) -> None:
        """Raise ConfigError if the input is wrong, the output cannot hold it, or no prompt can be made of it."""
        self._try_some(self)

    def is_done(self, model: Mapping[str, Any], is_over: Callable[[str], bool] = lambda job: False) -> bool:
        """Return whether the output is complete: all rows are answered, and no process writes it. See `begin`.

        Raises ConfigError: it was made by another job; or the input is wrong.
        """
        if self.output is None or not self.output.exists():
            return False
        try:
            check_free(self.output, is_over)
        except ConfigError:
            return False
        with self.begin(model, is_over) as run:
            if run.remaining == 0:
                run.complete()
        return run.remaining == 0

    @property
    def failed_file(self) -> Path | None:
        """The file for failed rows; None without an output."""
        return None if self.output is None or self._is_stream else self._files(self.output).failed

    def _files(self, output: Path) -> "JobFiles":
        is_direct = self.output_type == JSON_LINES and not self.ordered
        return JobFiles(output, self.output_type, self.failed, self.make_answers(), is_direct=is_direct)

    def facts(self) -> dict[str, Any]:
        """Return the facts that decide the answers, besides the model. None: not set."""
        options, prompts = self.prompts, self.make_prompts()
        return {
            "command": "chat" if options.is_chat else options.task,
            "template": options.template, "column": options.column, "system": options.system,
            "drop_answer": options.drop_answer or None, "parameters": prompts.params, "tools": options.tools,
            "adapter_name": options.adapter,
            "media_root": None if options.media_root is None else str(Path(options.media_root).resolve()),
            "prefix": self.prefix or None, "extra": self.extra or None, "shard": self.shard,
            "ordered": True if self.ordered and self.output_type == JSON_LINES else None,  # tables always are
        }  # fmt: skip

    @contextlib.contextmanager
    def begin(self, model: Mapping[str, Any], is_over: Callable[[str], bool] = lambda job: False) -> "Iterator[Run]":
        """Become the only writer of the output, and find out what remains to do. Yields the run.

        `model`: the facts about the model.
        `is_over`: see `only_writer`.

        Raises ConfigError: another process writes the output, or it was made by another job; or the input is wrong.
        """
        output = self.output
        if output is None or self._is_stream:
            if self.source != STDIO:
                self.check()
            yield Run(self, self.sources(), None)
            return
        with only_writer(output, is_over):
            files = self._files(output)
            try:
                yield Run(self, self._prepare(files, output, model), files)
            except ConfigError as error:
                if str(error.file) == str(files.input):  # the copy is hidden, and is removed now
                    error.file = STDIN if self.source == STDIO else ARGUMENTS
                raise
            finally:
                files.input.unlink(missing_ok=True)

    def _prepare(self, files: "JobFiles", output: Path, model: Mapping[str, Any]) -> "list[Source]":
        """Check what is given, and the output of an earlier run, before anything is removed. Return the input."""
        if self._is_stored:
            files.check_apart(Path(str(self.source)), self.sources())
        files.check_failed()
        job = self
        if not self._is_stored:
            files.copy_input(self.source)
            job = replace(self, source=files.input, format=self.format if self.source == STDIO else Format.JSONL)
        sources = job.sources()
        self._try_some(job)
        if self._begins_anew(output):
            files.remove()
        facts = {**self.facts(), **model, "input": _input_facts(sources, output, is_copy=job is not self)}
        fingerprint.check_or_write(output, facts, overwrite=False, parts=[files.journal])
        if isinstance(self.overwrite, str):
            fingerprint.note(output, begun_by=self.overwrite)
        return sources

    def _begins_anew(self, output: Path) -> bool:
        """Return whether this run discards an earlier output."""
        if not isinstance(self.overwrite, str):
            return self.overwrite
        try:
            known = fingerprint.read(output)
        except ConfigError:  # it is damaged
            return True
        return known is None or known.begun_by != self.overwrite

    def _try_some(self, job: "FileJob") -> None:
        """Raise ConfigError if no prompt can be made of any of the first rows, or the output cannot hold the first."""
        first: tuple[Row, ItemError] | None = None
        check_sources(self.output_type, job.sources(), job.wanted())
        for row, prompt in job.previews(TRIED):
            check_row(self.output_type.format, row)
            if not isinstance(prompt, ItemError):
                return
            first = first or (row, prompt)
        if first is not None:
            row, error = first
            raise ConfigError(f"no prompt can be made of the first rows: {error}", file=row.file, line=row.line)


class Run:
    """One run of a job, which has its output to itself.

    `totals`: how far it is.
    """

    def __init__(self, job: FileJob, sources: Sequence[Source], files: "JobFiles | None") -> None:
        self._job = job
        self._sources = sources
        self._files = files
        self.totals = Totals()
        if files is not None:
            files.scan()
            self._count_rows()

    def _count_rows(self) -> None:
        """Count the rows to answer, without decoding them."""
        assert self._files is not None
        wanted, is_done = self._job.wanted(), self._files.is_done
        rows = before = 0

        def count(place: int) -> bool:
            nonlocal rows, before
            if wanted is None or wanted(place):
                rows += 1
                before += is_done(place)
            return False

        if wanted is None and not self._files.has_answers:
            rows = count_rows(self._sources)
        else:
            for _ in self._job.rows(self._sources, count):
                pass
        finished = self._files.finished_rows
        if finished is not None and rows > finished:
            raise ConfigError(
                f"this output is finished, with {finished} rows, and the input has {rows} now: rows are added only to"
                " JSON lines without --ordered; put the new rows into a file of their own, choose another --output,"
                " or answer all rows again with --overwrite",
                file=self._job.output,
            )
        self.totals.rows, self.totals.before = rows, before if finished is None else rows  # fewer: --limit

    @property
    def remaining(self) -> int | None:
        """The number of rows that have no answer yet; None if unknown."""
        return None if self.totals.rows is None else self.totals.rows - self.totals.before

    def complete(self) -> None:
        """Complete the output, once all rows have ended. Idempotent.

        Raises ConfigError: it cannot be written.
        """
        if self._files is not None and self._files.finished_rows is None:
            self._files.complete(self._sources, self.totals, is_last=self._job.limit is None)

    def answer(self, dispatcher: Dispatcher, seed: SeedOf | None, report: Report | None = None) -> Totals:
        """Answer the remaining rows, and complete the output. Return the totals.

        `seed`: returns the seed of an item by the place of its row; None: there are no seeds.
        `report`: called with the totals after each step.

        Raises GserveError: the output cannot be written, or the service ends before all rows are answered.
        """
        job, totals = self._job, self.totals
        rows, is_stored = job.rows(self._sources, self._open()), all(it.path is not None for it in self._sources)
        check = functools.partial(check_row, job.output_type.format)
        items = RowItems(
            rows, job.make_prompts(), job.make_answers(), seed, dispatcher, check_row=check, is_at_hand=is_stored
        )
        steps: Iterable[Sequence[tuple[int, Outcome]]] = outcome_lists(dispatcher, items, None)
        if self._files is None and job.ordered:
            steps = ([one] for one in in_order(itertools.chain.from_iterable(steps)))
        began = time.monotonic()
        take = items.take
        first = 0
        """Number of the first rows that have failed. Rows are read ahead, so that others may fail before them."""
        with self._sink() as sink:
            for outcomes in steps:
                sink.write([(take(index), outcome) for index, outcome in outcomes])
                totals.seconds = time.monotonic() - began
                if not totals.done and not totals.before:
                    first += sum(index < HOPELESS for index, _ in outcomes)
                if first == HOPELESS and not totals.done and len(totals.failures) == 1:
                    raise GserveError(f"{totals}: the job ends, since the first rows fail for one reason")
                if report is not None:
                    report(totals)
        if (why := dispatcher.ending) is not None and (
            totals.rows is None or totals.rows > totals.before + totals.done
        ):
            raise GserveError(f"{totals}; the other rows were not answered: {why}; the same command continues")
        self.complete()
        return totals

    def _open(self) -> Callable[[int], bool] | None:
        """Return a function that returns whether the row at a place is still to be answered; None: all rows are."""
        wanted = self._job.wanted()
        if self._files is None or not self.totals.before:
            return wanted
        is_done = self._files.is_done
        return lambda place: (wanted is None or wanted(place)) and not is_done(place)

    @contextlib.contextmanager
    def _sink(self) -> "Iterator[Sink]":
        answers, names_files = self._job.make_answers(), len(self._sources) > 1
        if self._files is None:
            with open_stream(self._job.output) as stream:
                yield Sink(answers, self.totals, stream, None, is_whole=True, names_files=names_files)
            return
        with self._files.open() as (good, bad):
            is_whole = self._files.is_direct
            yield Sink(answers, self.totals, good, bad, is_whole=is_whole, names_files=names_files)


def _input_facts(sources: Sequence[Source], output: Path, *, is_copy: bool) -> dict[str, Any]:
    """Return the name of each file of the input, with its size, digest and format.

    The last file keeps its earlier facts if rows were appended to it, so that a job goes on with these.
    """
    earlier = fingerprint.read(output)
    known = {} if earlier is None else earlier.facts.get("input")
    if not isinstance(known, Mapping):  # of a batch file, say
        known = {}
    found: dict[str, str] = {}
    for number, (source, now) in enumerate(zip(sources, digest(sources), strict=True), 1):
        name = COPY if is_copy else f"{now.name} ({number})" if now.name in found else now.name
        text = _content(source, now)
        before = _CONTENT.fullmatch(known.get(name, "")) if number == len(sources) else None
        if before is not None and source.type in GROWING:
            begin = Digest(name, int(before[1]), before[2])
            if begin.size < now.size and begins_as(source, begin):
                text = _content(source, begin)
        found[name] = text
    return found


def _content(source: Source, content: Digest) -> str:
    """Return the content of a file as a fact."""
    return f"{content.size} bytes of {source.type.format}, {content.digest}"
