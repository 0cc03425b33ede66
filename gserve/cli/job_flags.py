"""The options of a job on a file, which `generate`, `chat`, `embed`, `tune` and `sbatch` share."""

import inspect
import os
from collections.abc import Callable, Container, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, get_type_hints

import msgspec
import typer

from gserve_core.errors import ConfigError
from gserve_core.messages import Params
from gserve_core.tasks import GENERATE

from .options import Model

if TYPE_CHECKING:
    from gserve_core.rows.job import FileJob

FILES, TEMPLATES = {"source", "output", "schema", "tools", "media_root", "failed"}, {"template", "system"}
"""Options that are paths, and options that may be @ and a path."""
FORMATS = ".jsonl .ndjson .json .csv .tsv .parquet .arrow .txt, also with .gz or .zst"


@dataclass(frozen=True, kw_only=True)
class JobFlags:
    """The options. Each field is one option of the command line."""

    source: Annotated[
        str | None,
        typer.Option("--input", "-i", metavar="ROWS", help=f"A file, a folder, a pattern in quotes, or - ({FORMATS})."),
    ] = None
    model: Model = None
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="Write each row with its answer into OUT, in one of these formats. The same command continues an"
            " interrupted job.",
        ),
    ] = None
    format: Annotated[str | None, typer.Option(help="The format of ROWS if its name does not tell, as in csv.")] = None
    template: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="Make each prompt by this template of Jinja2, as in '{{title}}: {{body}}'; @FILE."
        ),
    ] = None
    column: Annotated[str | None, typer.Option(metavar="NAME", help="The column with the prompt.")] = None
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="chat: a system message, which may be a template; @FILE.")
    ] = None
    params: Annotated[
        str | None,
        typer.Option(
            "--params",
            metavar="JSON",
            help='Sampling parameters, as in {"max_tokens": 64, "temperature": 0}; embed: as in {"dimensions": 256}.',
        ),
    ] = None
    adapter: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The LoRA adapter of prompts that name no other in a column 'adapter'."),
    ] = None
    schema: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A JSON schema that each answer must fit. It adds the column 'parsed'."),
    ] = None
    tools: Annotated[Path | None, typer.Option(metavar="FILE", help="chat: a JSON list of tools for all rows.")] = None
    drop_answer: Annotated[
        bool,
        typer.Option("--drop-answer", help="chat: leave out the assistant's message at the end of a conversation."),
    ] = False
    media_root: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="chat: the images of conversations may be files below DIR."),
    ] = None
    prefix: Annotated[str, typer.Option(metavar="TEXT", help="Begin the names of the answer's columns with TEXT.")] = ""
    extra: Annotated[bool, typer.Option("--extra", help="Add token ids and log probabilities.")] = False
    ordered: Annotated[bool, typer.Option("--ordered", help="Write JSON lines in the order of ROWS too.")] = False
    failed: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The file for failed rows [default: OUT with .failed.jsonl].")
    ] = None
    limit: Annotated[int | None, typer.Option(metavar="N", help="Work on the first N rows only.")] = None
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="Work on every N-th row, from the I-th on.")] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Discard an earlier OUT.")] = False
    overwrite_once: Annotated[bool, typer.Option("--overwrite-once", hidden=True)] = False
    """In a SLURM job: discard an earlier output, but not that of an earlier run of this job."""
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the first prompts, and start nothing.")] = False

    def job(self, rows: Sequence[Any] = (), *, is_chat: bool = False, task: str = GENERATE) -> "FileJob":
        """Return the job. `rows`: the input, if it is not in files. `task`: see `RowOptions`.

        Raises ConfigError: an option is wrong.
        """
        from gserve_core.rows.job import FileJob
        from gserve_core.rows.output import STDIO
        from gserve_core.rows.prompts import RowOptions

        options = RowOptions(
            is_chat=is_chat, task=task, template=_text(self.template), column=self.column, system=_text(self.system),
            params=parse_params(self.params), tools=_json(self.tools, list, "a list of tools"),
            schema=_json(self.schema, dict, "a JSON schema"), drop_answer=self.drop_answer,
            adapter=self.adapter or None, media_root=self.media_root,
        )  # fmt: skip
        return FileJob(
            source=rows if self.source is None else self.source,
            output=None if self.output is None or str(self.output) == STDIO else self.output,
            prompts=options, format=self.format, prefix=self.prefix, extra=self.extra, ordered=self.ordered,
            failed=self.failed, limit=self.limit, shard=self.shard,
            overwrite=os.environ.get("SLURM_JOB_ID") or True if self.overwrite_once else self.overwrite,
        )  # fmt: skip

    def replaced(self, **changes: Any) -> Self:
        """Return these options with other values."""
        return replace(self, **changes)

    def words(self) -> list[str]:
        """Return the options as words of a command line, with absolute paths."""
        made = []
        for it in fields(self):
            value = getattr(self, it.name)
            if value == it.default:
                continue
            name = _option(it.name)
            if it.name in FILES or (it.name in TEMPLATES and value.startswith("@")):
                mark = "@" if it.name in TEMPLATES else ""
                value = f"{mark}{Path(str(value).removeprefix(mark)).absolute()}"
            made += [name] if value is True else [name, str(value)]
        return made

    @property
    def given(self) -> list[str]:
        """The names of the options that are set, as in `--drop-answer`."""
        return [_option(it.name) for it in fields(self) if getattr(self, it.name) != it.default]


def _option(field: str) -> str:
    """Return the option of a field, as in `--drop-answer`."""
    return "--input" if field == "source" else f"--{field.replace('_', '-')}"


def with_job_flags(command: Callable[..., None], names: Container[str] | None = None) -> Callable[..., None]:
    """Give a command the options of `JobFlags` in the place of its parameter `flags`. `names`: only these fields."""
    hints = get_type_hints(JobFlags, include_extras=True)
    own = {
        it.name: inspect.Parameter(
            it.name, inspect.Parameter.KEYWORD_ONLY, annotation=hints[it.name],
            default=inspect.Parameter.empty if it.default is MISSING else it.default,
        )
        for it in fields(JobFlags) if names is None or it.name in names
    }  # fmt: skip
    parameters: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        parameters |= own if name == "flags" else {name: parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)}

    @wraps(command)
    def run(**given: Any) -> None:
        command(flags=JobFlags(**{name: given.pop(name) for name in own}), **given)

    run.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    del run.__wrapped__
    return run


def parse_params(text: str | None) -> Params | None:
    """Return sampling parameters from JSON text. Raises ConfigError: it is not a JSON object."""
    if text is None:
        return None
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"expected --params as a JSON object like {{\"max_tokens\": 64}}, got '{text}'") from error


def _text(given: str | None) -> str | None:
    """Return a text of the command line, or the text of the file that it names with @."""
    if given is None or not given.startswith("@"):
        return given
    file = Path(given[1:])
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the template: {getattr(error, 'strerror', None) or error}", file=file
        ) from error


def _json[T](file: Path | None, kind: type[T], what: str) -> T | None:
    """Return the value in a JSON file. Raises ConfigError: it cannot be read, or is something else."""
    if file is None:
        return None
    try:
        found = msgspec.json.decode(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {what}: {error.strerror}", file=file) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"expected {what}, and it is not JSON: {error}", file=file) from error
    if not isinstance(found, kind):
        raise ConfigError(f"expected {what}, got {type(found).__name__}", file=file)
    return found
