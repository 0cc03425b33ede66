"""The commands that send items: `generate`, `chat`, `embed`, `run`."""

import gc
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

import gserve
from gserve_core.errors import ConfigError, GserveError, ItemError
from gserve_core.images import summary
from gserve_core.messages import Conversation
from gserve_core.tasks import EMBED

from .cuts import cut_notice
from .display import print_stderr, printable
from .job_flags import JobFlags, with_job_flags
from .job_progress import show_progress
from .options import Attach, Command, ConfigFile, ConfigFileOrNot, Overrides, Verbose
from .service import changes, chosen, open_service, serving, split_words

if TYPE_CHECKING:
    from gserve_core.rows.job import FileJob
    from gserve_core.service.model import Model
    from gserve_core.service.service import VLLMService

PREVIEWS = 3
"""Number of prompts that --dry-run shows, unless --limit gives another one."""
GC_THRESHOLD = 100_000
"""Number of new objects after which Python looks for garbage. By default, that takes a fifth of a job."""
SWITCH_SECONDS = 0.001
"""Time after which the thread of a job that reads and writes rows lets the one run that sends them, in seconds.
Python's 5 ms delay each packet to and from a server."""
NO_ROWS = "the input has no rows"
FOR_TEXTS = {
    "--model", "--output", "--system", "--params", "--adapter", "--schema", "--failed", "--overwrite", "--prefix",
    "--extra",
}  # fmt: skip
"""Options of a job whose prompts are arguments."""


@with_job_flags
def generate(
    flags: JobFlags,
    config: ConfigFileOrNot = None,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Texts to complete.")] = None,
    attach: Attach = None,
    overrides: Overrides = None,
    verbose: Verbose = False,
) -> None:
    """Complete prompts: texts, or one for each row of a file."""
    file, texts = split_words("generate", config, prompts or (), attach)
    if bool(texts) == (flags.source is not None):
        raise ConfigError("expected prompts, either as arguments after CONFIG or in a file (--input)")
    job = flags.job([{"prompt": text} for text in texts], is_chat=False)
    _answer(flags, job, file, attach, changes(overrides, verbose))


@with_job_flags
def chat(
    flags: JobFlags,
    config: ConfigFileOrNot = None,
    message: Annotated[str | None, typer.Argument(metavar="MESSAGE", help="A user message, in quotes.")] = None,
    attach: Attach = None,
    overrides: Overrides = None,
    verbose: Verbose = False,
) -> None:
    """Continue conversations. Without MESSAGE and --input, chat at the terminal (/exit or Ctrl-D ends it)."""
    from gserve.cli.conversation import converse

    file, texts = split_words("chat", config, [message] if message is not None else [], attach)
    if len(texts) + (flags.source is not None) > 1:
        raise ConfigError("expected one MESSAGE (in quotes), or conversations in a file (--input)")
    job = flags.job([{"prompt": text} for text in texts], is_chat=True)
    if flags.source is None and not texts:
        if given := set(flags.given) - {"--system", "--params", "--model", "--adapter"}:
            raise ConfigError(f"{min(given)} requires a MESSAGE or --input")
        gateway = gserve.GatewayConfig()  # it streams the answers
        opening = [{"role": "system", "content": flags.system}] if flags.system else []
        service = open_service(file, attach, changes(overrides, verbose), gateway)
        model = chosen(service, flags.model)
        converse(service, model, opening, job.prompts.params, job.prompts.adapter)
        return
    _answer(flags, job, file, attach, changes(overrides, verbose))


@with_job_flags
def embed(
    flags: JobFlags,
    config: ConfigFileOrNot = None,
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT", help="Texts to embed.")] = None,
    attach: Attach = None,
    overrides: Overrides = None,
    verbose: Verbose = False,
) -> None:
    """Embed texts, or one for each row of a file. Write the vectors beside the rows."""
    file, given = split_words("embed", config, texts or (), attach)
    if bool(given) == (flags.source is not None):
        raise ConfigError("expected texts, either as arguments after CONFIG or in a file (--input)")
    job = flags.job([{"text": text} for text in given], task=EMBED)
    _answer(flags, job, file, attach, changes(overrides, verbose))


def run(
    config: ConfigFile,
    command: Command,
    patience: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Time for COMMAND to end after SIGUSR1 [default: 80, or 2/3 of the job's remaining time if less].",
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Start the servers of CONFIG, run COMMAND with $GSERVE_ATTACH set, and exit with its exit code.

    SIGUSR1 means that the job's time limit is near: no more items are accepted, those in flight finish, and COMMAND
    gets the others back as errors.
    """
    from gserve.cli import batch_job

    ended = batch_job.run(config, overrides or (), command, patience)
    raise typer.Exit(ended.code)


def _answer(flags: JobFlags, job: "FileJob", config: Path | None, attach: str | None, changes: Sequence[str]) -> None:
    """Answer the rows of a job, or the texts of the command line. Raises GserveError: at least one failed."""
    if flags.source is None and (wrong := set(flags.given) - FOR_TEXTS):
        raise ConfigError(f"{min(wrong)} requires --input")
    if flags.dry_run:
        model = chosen(open_service(config, None, changes), flags.model) if config is not None else None
        if model is not None and job.prompts.task != EMBED:
            model.check_params(job.make_prompts().params)
        show_previews(job, flags.limit or PREVIEWS, model)
        return
    service = open_service(config, attach, changes)
    model = chosen(service, flags.model)
    if job.prompts.task == EMBED:
        if flags.source is None:
            job = replace(job, ordered=True)
        _answer_rows(job, service, model)
        return
    model.check_params(job.make_prompts().params)
    if flags.source is None and job.output is None:
        _answer_texts(job, service, model)
    else:
        _answer_rows(job, service, model)


def _answer_texts(job: "FileJob", service: "VLLMService", model: "VLLMService | Model") -> None:
    """Write the answers to the texts of the command line to stdout, in order."""
    from gserve_core.batch.batch import in_order

    prompts, adapter = job.make_prompts(), job.prompts.adapter
    assert not isinstance(job.source, (str, Path))
    rows = job.source
    made: list[Any] = [prompts.make(row)[0] for row in rows]
    failed, ended = 0, []
    with serving(service):
        outcomes = (
            model.chat_iter([msgspec.to_builtins(it.messages) for it in made], prompts.params, adapter=adapter)
            if job.prompts.is_chat
            else model.generate_iter(made, prompts.params, adapter=adapter)
        )
        for index, outcome in in_order(outcomes):
            ended.append(outcome)
            if isinstance(outcome, ItemError):
                failed += 1
                print_stderr(f"error: item {index}: {outcome}")
                continue
            text = "".join(f"{it.text}\n" for it in outcome)
            print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)
    if (notice := cut_notice(ended, prompts.params)) is not None:
        print_stderr(notice)
    if failed:
        raise GserveError(f"{failed} of {len(rows)} items failed")


def prepare_for_rows() -> None:
    """Make this process fast for a job on rows."""
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)  # thousands of rows wait in memory, and are no garbage
    sys.setswitchinterval(SWITCH_SECONDS)


def _answer_rows(job: "FileJob", service: "VLLMService", model: "VLLMService | Model") -> None:
    """Write each row of a file with its answer."""
    from gserve_launchers.slurm.query import is_over

    prepare_for_rows()
    with job.begin(model.model_facts(), is_over) as run:
        totals = run.totals
        if run.remaining == 0:
            run.complete()
            print_stderr(f"all {totals.before:,} rows are answered already: {job.output}" if totals.rows else NO_ROWS)
            return
        if totals.before:
            print_stderr(f"{totals.before:,} of {totals.rows:,} rows are answered already")
        with serving(service), show_progress(totals, model) as show:
            model.answer_rows(run, show)
    if totals.failed:
        raise GserveError(f"{totals}" + (f"; the failed rows: {job.failed_file}" if job.failed_file else ""))
    print_stderr(str(totals))


def show_previews(job: "FileJob", count: int, model: "VLLMService | Model | None") -> None:
    """Write the first prompts to stdout, with their lengths if they can be counted here."""
    shown = list(job.previews(count))
    good = [prompt for _, prompt in shown if not isinstance(prompt, ItemError)]
    lengths: Iterator[int] = iter(())
    if model is not None:
        try:
            lengths = iter(model.prompt_lengths(good) or ())
        except GserveError as error:
            print_stderr(str(error))
    for row, prompt in shown:
        length = None if isinstance(prompt, ItemError) else next(lengths, None)
        tokens = "" if length is None else f", {length} tokens"
        print(printable(f"--- row {row.place} ({row.file}:{row.line}{tokens})\n{_shown(prompt)}"))


def _shown(prompt: Any) -> str:
    """Return a prompt, or its error, as text."""
    if isinstance(prompt, ItemError):
        return f"error: {prompt}"
    if not isinstance(prompt, Conversation):
        return str(prompt)
    messages = msgspec.to_builtins(prompt.messages)
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if "image_url" in part:
                part["image_url"] = summary(part["image_url"]["url"])
    return "\n".join(f"{message.pop('role')}> {_content(message)}" for message in messages)


def _content(message: dict[str, Any]) -> str:
    """Return a message without its role as text."""
    if message.keys() == {"content"} and isinstance(message["content"], str):
        return message["content"]
    return msgspec.json.encode(message).decode()
