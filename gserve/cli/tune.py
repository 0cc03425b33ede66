"""The command that measures settings on a user's own rows: `tune`."""

import shlex
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gserve_core.errors import ConfigError

from .display import print_stderr, print_table
from .job_flags import JobFlags, with_job_flags
from .options import ConfigFile, Overrides

if TYPE_CHECKING:
    from gserve_core.tune.search import Measured, Search, Setting

ROW_FLAGS = {
    "source", "model", "format", "template", "column", "system", "params", "adapter", "schema", "tools", "drop_answer",
    "media_root", "limit",
}  # fmt: skip
"""The options of jobs that decide about prompts and answers."""
WITHOUT_ROWS = {"--model", "--params", "--system", "--adapter", "--limit"}
"""Those that apply to made-up prompts too."""
BAR = 30
"""Length of the longest bar, in characters."""


@partial(with_job_flags, names=ROW_FLAGS)
def tune(
    flags: JobFlags,
    config: ConfigFile,
    chat: Annotated[
        bool, typer.Option("--chat", help="Each row is a conversation, as for gserve chat, and not a text to complete.")
    ] = False,
    minutes: Annotated[float, typer.Option(min=0.05, help="Time for all of it, with the starts of servers.")] = 10.0,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="OUT.yaml",
            help="Write CONFIG with the best settings to this file [default: CONFIG with .tuned.yaml].",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier OUT.yaml.")] = False,
    overrides: Overrides = None,
) -> None:  # fmt: skip
    """Measure settings of CONFIG on rows of yours, and write the best ones to a new YAML file.

    It tries the number of servers, max_num_seqs, max_num_batched_tokens, prefix caching and CUDA graphs, one after the
    other. Answers are thrown away. Without --input, prompts are made up.
    """
    from gserve_core.tune.trials import MADE_UP_PARAMS, Trials, made_up_rows, setting_text

    from .batch import prepare_for_rows

    if flags.source is None:
        if wrong := set(flags.given) - WITHOUT_ROWS:
            raise ConfigError(f"{min(wrong)} requires --input")
        flags = flags.replaced(params=flags.params or MADE_UP_PARAMS)
    job = flags.job(made_up_rows() if flags.source is None else (), is_chat=chat)
    out = output or config.with_name(f"{config.stem}.tuned.yaml")
    trials = Trials(
        config, overrides or (), job, model=flags.model, seconds=minutes * 60, output=out, overwrite=overwrite
    )
    prepare_for_rows()
    print_stderr(f"measuring settings of {config.name} for at most {minutes:g} minutes")
    with trials:
        search = trials.search(lambda it: print_stderr(f"{setting_text(it.setting)}: {_outcome(it)}"))
    _print_results(search, setting_text)
    if trials.rows < trials.fitting_rows / 2:
        print_stderr(f"measured with {trials.rows} rows, and {trials.fitting_rows:,} fit: give more rows by --input")
    if search.untried:
        untried = ", ".join(map(setting_text, search.untried))
        print_stderr(f"with more time (--minutes), it would try: {untried}")
    why = "nothing was faster than " if not search.best else f"{search.ratio(search.best):.2f} times the rows/s of "
    trials.write(search.best, f"gserve tune, {time.strftime('%Y-%m-%d')}: {why}{config.name}")
    print_stderr(f"{setting_text(search.best)}, {why}{config.name}: written to {out}")
    name = config.stem
    print_stderr(
        f"start it with: {shlex.join(['gserve', 'launch', str(out), '--name', name])}; if it runs already:"
        f" {shlex.join(['gserve', 'reload', name, str(out)])}"
    )


def _outcome(measured: "Measured") -> str:
    """Return the outcome of a trial as text."""
    rates = f"{measured.rows:,.1f} rows/s, {measured.tokens:,.0f} tokens/s"
    return f"{measured.failure or rates} ({measured.seconds:.0f} s)"


def _print_results(search: "Search", text: "Callable[[Setting], str]") -> None:
    """Write the outcomes of all trials to stdout, in order, with a bar for each rate."""
    fastest, seen = max(it.rows for it in search.measured), set()
    rows = []
    for it in search.measured:
        name = f"{text(it.setting)}{' (again)' * (it.setting in seen)}"
        seen.add(it.setting)
        if it.failure:
            rows.append((name, "-", "-", "-", it.failure))
        else:
            ratio = it.rows / search.rate(())
            rows.append(
                (name, f"{it.rows:,.1f}", f"{it.tokens:,.0f}", f"{ratio:.2f}", "#" * round(BAR * it.rows / fastest))
            )
    print_table(("setting", "rows/s", "tokens/s", "ratio", ""), rows, numbers={1, 2, 3})
    if len(seen) < len(search.measured):
        print_stderr(f"noise: {search.noise:.1%}, the largest difference between two trials of the same setting")
