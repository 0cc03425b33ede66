"""The output of commands, for a terminal or another program. Results go to stdout, everything else to stderr."""

import os
import re
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from gserve_core.host.logs import flush

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from gserve_core.service.service import VLLMService


TICK = 0.1
"""Interval between two checks of servers or processes, in seconds."""
PAGE_SECONDS = 1.0
"""Time between two pages of a live view, in seconds."""
WIDE = 10_000
"""Width of a table for another program, in characters."""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Pattern of the characters that may control a terminal."""
COLOURS = {"ok": "green", "note": "yellow", "problem": "red"}


def print_stderr(text: str) -> None:
    """Write a line to stderr."""
    flush()  # the log comes first
    with suppress(OSError):  # after SIGHUP the terminal may be closed
        print(printable(text) if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Return a text whose control characters a terminal does not interpret, except line ends and tabs.

    They are written as in JSON: JSON remains JSON.
    """
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def show_phases(service: "VLLMService", starting: Future[None]) -> None:
    """Show the phases of the servers until they have started: in place on a terminal, else one line per change."""
    shown: dict[str, str] = {}
    with _lines_in_place("starting") if sys.stderr.isatty() else nullcontext() as show_lines:
        is_over = False
        while not is_over:
            is_over = bool(wait([starting], TICK).done)
            servers = [it for it in service.status() if (it.name in shown if is_over else it.state != "stopped")]
            servers = [it for it in servers if it.usable or not is_over]
            doing = {it.name: it.phase if it.phase and it.returns else it.state for it in servers}
            if show_lines is not None:
                show_lines(f"{name}: {phase}" for name, phase in doing.items())
            else:
                for name, phase in doing.items():
                    if shown.get(name) != phase:
                        print_stderr(f"{name}: {phase}")
            shown = doing


@contextmanager
def _lines_in_place(first: str) -> Iterator[Callable[[Iterable[str]], object]]:
    """Show a line on the terminal. Yields a function that shows other lines in its place."""
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(first) as status:
        yield lambda lines: status.update(Text("\n  ".join(lines)))


def print_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: Container[int] = (),
    wrapped: Container[int] | None = None,
    is_last_apart: bool = False,
) -> None:
    """Write a table to stdout.

    `numbers`: the columns that are aligned to the right.
    `wrapped`: the columns that may be wrapped on a narrow terminal; None: all.
    `is_last_apart`: whether the last column is written below the table if a terminal is too narrow for it.
    """
    from rich.console import Console
    from rich.measure import Measurement

    wide = None if sys.stdout.isatty() else WIDE  # another program needs unwrapped lines
    console = Console(markup=False, highlight=False, emoji=False, width=wide)
    table = _table(header, rows, numbers, wrapped)
    needed = Measurement.get(console, console.options.update(max_width=WIDE), table).maximum
    if not is_last_apart or needed <= console.width:
        console.print(table)
        return
    console.print(_table(header[:-1], [row[:-1] for row in rows], numbers, wrapped))
    console.print()
    console.print(_table(header[-1:], [row[-1:] for row in rows], (), None))


def _table(
    header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Container[int], wrapped: Container[int] | None
) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(header):
        is_number, is_whole = index in numbers, wrapped is not None and index not in wrapped
        table.add_column(name, justify="right" if is_number else "left", no_wrap=is_whole, overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    return table


@dataclass(frozen=True)
class Page:
    """A table with a title above it and notes below it.

    Its second column may be wrapped. From the third on, it holds numbers.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]


def _renderable(page: Page) -> "Group":
    from rich.console import Group
    from rich.text import Text

    table = _table(page.header, page.rows, range(2, len(page.header)), {1})
    notes = [Text(printable(note)) for note in page.notes]
    return Group(Text(printable(page.title)), Text(), table, *([Text(), *notes] if notes else []))


def print_page(page: Page) -> None:
    """Write a page to stdout, in lines that are not wrapped."""
    from rich.console import Console

    Console(markup=False, highlight=False, emoji=False, width=WIDE).print(_renderable(page))


def show_live(pages: Iterable[Page]) -> bool:
    """Show pages on the terminal, each in the place of the last one. Each stays for `PAGE_SECONDS`.

    Return True after the last page, and False if the user has pressed q.
    """
    from rich.console import Console
    from rich.live import Live

    console = Console(markup=False, highlight=False, emoji=False)
    with Live(console=console, screen=True, auto_refresh=False) as live, _keys() as wait_key:
        for page in pages:
            live.update(_renderable(page), refresh=True)
            if "q" in wait_key(PAGE_SECONDS).lower():
                return False
    return True


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Yield a function that returns the keys that are pressed within some seconds, without waiting for a line."""
    keyboard = sys.stdin.fileno() if sys.stdin.isatty() else None

    def wait_key(seconds: float) -> str:
        if keyboard is None:
            time.sleep(seconds)
        elif select.select([keyboard], [], [], seconds)[0]:
            return (os.read(keyboard, 64) or b"q").decode(errors="replace")  # nothing: the terminal was closed
        return ""

    if keyboard is None:
        yield wait_key
        return
    before = termios.tcgetattr(keyboard)
    tty.setcbreak(keyboard)
    try:
        yield wait_key
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


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
