"""The command for OpenAI's batch files: `run-batch`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

import gserve
from gserve_core.errors import ConfigError, GserveError

from .display import print_stderr, progress
from .options import Attach, ConfigFileOrNot, Overrides, Verbose
from .service import changes, open_service, serving, split_words


def run_batch(
    config: ConfigFileOrNot = None,
    source: Annotated[
        Path,
        typer.Option(
            "--input", "-i", metavar="BATCH.jsonl",
            help="Requests of OpenAI's API, one per line:"
            ' {"custom_id": …, "method": "POST", "url": "/v1/chat/completions", "body": {…}}.',
        ),
    ] = ...,  # type: ignore[assignment]
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="OUT.jsonl",
            help="Write the answers to this file. If it exists, the batch is continued.",
        ),
    ] = ...,  # type: ignore[assignment]
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew, and remove OUT.jsonl.")] = False,
    attach: Attach = None,
    overrides: Overrides = None,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Answer a batch file of OpenAI's. The same command continues it, and tries failed lines again."""
    from gserve_launchers.slurm.query import is_over

    file, words = split_words("run-batch", config, (), attach)
    if words:
        raise ConfigError(f"unexpected argument '{words[0]}': a batch is read from a file (--input)")
    service = open_service(file, attach, changes(overrides, verbose), gserve.GatewayConfig())

    @contextmanager
    def shown(lines: int) -> Iterator[Callable[[], object]]:
        with serving(service), progress(lines, sys.stderr.buffer) as advance:
            yield advance

    try:
        summary = service.run_batch(source, output, overwrite=overwrite, serving=shown, is_over=is_over)
    finally:
        service.shutdown()  # if there was nothing to send
    print_stderr(str(summary))
    if summary.failed:
        raise GserveError(f"{summary.failed} of {summary.lines} lines failed")
