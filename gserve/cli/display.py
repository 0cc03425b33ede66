"""The output of commands, for a terminal or another program. Results go to stdout, everything else to stderr."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, BinaryIO

from gserve_core.host.logs import flush

if TYPE_CHECKING:
    from gserve_core.service.service import VLLMService


TICK = 0.1
"""Interval between two checks of servers or processes, in seconds."""
COLOURS = {"ok": "green", "note": "yellow", "problem": "red"}


def print_stderr(text: str) -> None:
    """Write a line to stderr."""
    flush()  # the log comes first
    with suppress(OSError):  # after SIGHUP the terminal may be closed
        print(text, file=sys.stderr, flush=True)


def show_phases(service: "VLLMService", starting: Future[None]) -> None:
    """Show the phases of the servers until they have started: in place on a terminal, else one line per change."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    shown: dict[str, str] = {}
    with console.status("starting") if console.is_terminal else nullcontext() as status:
        is_over = False
        while not is_over:
            is_over = bool(wait([starting], TICK).done)
            servers = [it for it in service.status() if (it.name in shown if is_over else it.state != "stopped")]
            servers = [it for it in servers if it.usable or not is_over]
            doing = {it.name: it.phase if it.phase and it.returns else it.state for it in servers}
            if status is not None:
                status.update(Text("\n  ".join(f"{name}: {phase}" for name, phase in doing.items())))
            else:
                for name, phase in doing.items():
                    if shown.get(name) != phase:
                        print_stderr(f"{name}: {phase}")
            shown = doing


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a table to stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    wide = None if sys.stdout.isatty() else 10_000  # another program needs unwrapped lines
    Console(markup=False, highlight=False, emoji=False, width=wide).print(table)


@contextmanager
def progress(total: int, stream: BinaryIO) -> Iterator[Callable[[], object]]:
    """Show a progress bar, if stderr is a terminal and the results do not go to it.

    Yields a function to call once for each finished item.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    is_quiet = not sys.stderr.isatty() or (stream is sys.stdout.buffer and sys.stdout.isatty())
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=is_quiet, redirect_stdout=False) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)
