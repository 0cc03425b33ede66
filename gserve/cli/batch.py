"""The commands that send items: `generate`, `chat`, `run`."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import gserve
from gserve_core.batch.item_files import (
    STDIO,
    ConversationLine,
    Line,
    Outcomes,
    Params,
    PromptLine,
    encode,
    finished_ids,
    has_system,
    in_order,
    number_items,
    open_output,
    parse_params,
    read_items,
)
from gserve_core.errors import ConfigError, GserveError, ItemError

from .display import print_stderr, printable, progress
from .options import Attach, Command, ConfigFile, ConfigFileOrNot, Output, Overrides, ParamsText, Verbose
from .service import changes, open_service, serving, split_words

if TYPE_CHECKING:
    from gserve_core.service.service import VLLMService


def generate(
    config: ConfigFileOrNot = None,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Texts to complete.")] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--input", "-i", metavar="IN",
            help="Prompts: a text file with one prompt per line, or a .jsonl file of texts or"
            ' {"prompt": …, "id": …, "params": {…}}; - for stdin (either format).',
        ),
    ] = None,
    output: Output = None,
    params: ParamsText = None,
    attach: Attach = None,
    overrides: Overrides = None,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Complete prompts."""
    file, texts = split_words("generate", config, prompts or (), attach)
    if bool(texts) == (source is not None):
        raise ConfigError("expected prompts, either as arguments after CONFIG or in a file (--input)")
    lines = read_items(source, PromptLine) if source else number_items(texts, PromptLine)
    shared = parse_params(params)
    service = open_service(file, attach, changes(overrides, verbose))
    _answer(service, lines, shared, output, as_text=not source and not output)


def chat(
    config: ConfigFileOrNot = None,
    message: Annotated[str | None, typer.Argument(metavar="MESSAGE", help="A user message, in quotes.")] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--input", "-i", metavar="IN.jsonl",
            help='Conversations, one per line: [{"role": …, "content": …}, …] or'
            ' {"messages": […], "id": …, "params": {…}}; - for stdin.',
        ),
    ] = None,
    output: Output = None,
    params: ParamsText = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="Begin with this system message.")] = None,
    attach: Attach = None,
    overrides: Overrides = None,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Continue conversations. Without MESSAGE and --input, chat at the terminal (/exit or Ctrl-D ends it)."""
    from gserve.cli.conversation import converse

    file, texts = split_words("chat", config, [message] if message is not None else [], attach)
    if len(texts) + (source is not None) > 1:
        raise ConfigError("expected one MESSAGE (in quotes), or conversations in a file (--input)")
    shared = parse_params(params)
    opening = [{"role": "system", "content": system}] if system else []
    if source is None and not texts:
        if output is not None:
            raise ConfigError("--output requires a MESSAGE or --input")
        gateway = gserve.GatewayConfig()  # it streams the answers
        converse(open_service(file, attach, changes(overrides, verbose), gateway), opening, shared)
        return
    if source is None:
        lines = number_items([[{"role": "user", "content": texts[0]}]], ConversationLine)
    else:
        lines = read_items(source, ConversationLine)
    for line in lines:
        if not has_system(line.messages):
            line.messages[:0] = opening
    service = open_service(file, attach, changes(overrides, verbose))
    _answer(service, lines, shared, output, as_text=not source and not output)


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


def _answer(
    service: "VLLMService", lines: Sequence[Line], params: Params | None, output: Path | None, *, as_text: bool
) -> None:
    """Send items, and write each result as soon as possible: texts in order, JSON lines as they arrive.

    Raises GserveError: at least one item failed.
    """
    from gserve_core.batch.output_lock import only_writer
    from gserve_launchers.slurm.batch import is_over

    output = None if output == STDIO else output
    with nullcontext() if output is None else only_writer(output, is_over):
        _answer_into(output, service, lines, params, as_text=as_text)


def _answer_into(
    output: Path | None, service: "VLLMService", lines: Sequence[Line], params: Params | None, *, as_text: bool
) -> None:
    finished = finished_ids(output, lines) if output is not None and output.is_file() else set()
    todo = [line for line in lines if line.id not in finished]
    if len(todo) < len(lines):
        print_stderr(f"skipped {len(lines) - len(todo)} of {len(lines)} items: already in {output}")
    if not todo:
        return
    contents = [line.content for line in todo]
    each = [params if line.params is None else (params or {}) | line.params for line in todo]
    failed = 0
    with open_output(output) as stream, serving(service), progress(len(todo), stream) as advance:
        outcomes: Outcomes = (
            service.generate_iter(contents, each)
            if isinstance(todo[0], PromptLine)
            else service.chat_iter(contents, each)
        )
        is_terminal = stream.isatty()
        for index, outcome in in_order(outcomes) if as_text else outcomes:
            failed += isinstance(outcome, ItemError)
            if not as_text:
                result = encode(todo[index], outcome)
            elif isinstance(outcome, ItemError):
                print_stderr(f"error: item {index}: {outcome}")
                result = b""
            else:
                result = "".join(f"{it.text}\n" for it in outcome).encode()
            stream.write(printable(result.decode()).encode() if is_terminal else result)
            stream.flush()
            advance()
    if failed:
        raise GserveError(f"{failed} of {len(todo)} items failed")
