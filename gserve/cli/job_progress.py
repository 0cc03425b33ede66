"""The progress of a job on a file: a bar on a terminal, and a line each half minute elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from .display import print_stderr

if TYPE_CHECKING:
    from gserve_core.rows.output import Totals
    from gserve_core.service.model import Model
    from gserve_core.service.service import VLLMService

LINE_SECONDS = 30.0
"""Time between two lines of a job without a terminal, in seconds."""
BAR_SECONDS = 0.5
"""Time between two changes of the bar, in seconds."""


@contextmanager
def show_progress(totals: "Totals", model: "VLLMService | Model") -> "Iterator[Callable[[Totals], object]]":
    """Show the progress of a job. Yields a function to call with the totals after each step."""
    is_bar = sys.stderr.isatty()
    interval, shown_at = BAR_SECONDS if is_bar else LINE_SECONDS, time.monotonic()
    with _bar(totals) if is_bar else nullcontext(lambda totals, text: print_stderr(text)) as show_text:

        def show(totals: "Totals") -> None:
            nonlocal shown_at
            now = time.monotonic()
            if now >= shown_at + interval:
                shown_at = now
                show_text(totals, describe(totals, sum(it.usable for it in model.status())))

        yield show


@contextmanager
def _bar(totals: "Totals") -> "Iterator[Callable[[Totals, str], object]]":
    """Show a bar on the terminal. Yields a function that changes it, and the text beside it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (BarColumn(bar_width=20), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=False) as bar:
        task = bar.add_task("", total=totals.rows, completed=totals.before)
        yield lambda totals, text: bar.update(task, completed=totals.ended, description=text)


def describe(totals: "Totals", servers: int) -> str:
    """Return the progress in one line. `servers`: number of ready servers."""
    seconds = max(totals.seconds, 1e-9)
    ended = totals.done + totals.failed
    parts = [
        f"{totals.ended:,}" + ("" if totals.rows is None else f" of {totals.rows:,}") + " rows",
        f"{ended / seconds:,.1f} rows/s",
        f"{totals.prompt_tokens / seconds:,.0f} tokens/s in"
        + (f", {totals.completion_tokens / seconds:,.0f} out" if totals.completion_tokens else ""),
    ]
    if totals.rows is not None and ended:
        parts.append(f"{_duration((totals.rows - totals.ended) * seconds / ended)} left")
    if totals.failed:
        parts.append(f"{totals.failed:,} failed")
    parts.append(f"{servers} server{'' if servers == 1 else 's'} ready")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    """Return a time as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
