"""The command line: `launch`, `generate`, `chat`, `embed`, `run`, `sbatch`, `check`, `doctor`, `ps` and more.

An error is written to stderr after "error:". The exit code is 2 for a config, a plugin or an argument, and 1 for other
errors. For a signal it is 128 plus the signal's number.
"""

import gc
import logging
import os
import signal
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from gserve_core.errors import ConfigError, GserveError, PluginError
from gserve_core.host.environment import open_missing_descriptors
from gserve_core.host.logs import LEVEL_VARIABLE, setup_logging

from . import batch, checkpoints, examine, run_batch, serve, slurm, tune, watch
from .display import print_stderr
from .signals import Signalled, ignore, on_signals, raise_signalled

logger = logging.getLogger("gserve.cli")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, rich_markup_mode=None)


def main() -> None:
    """Run the command line, and exit."""
    open_missing_descriptors()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if it is ignored, the exit codes of commands are lost
    on_signals(raise_signalled)
    signal.signal(signal.SIGUSR1, ignore)  # SLURM may send its notice to all processes of a job
    gc.disable()  # nearly all objects of the start remain: looking for garbage among them takes a tenth of its time
    # None: not imported. `import httpx` would load its own command line, with rich and pygments, which takes 90 ms
    sys.modules["httpx._main"] = None  # type: ignore[assignment]
    try:
        app(prog_name="gserve")
    except Signalled as signalled:
        sys.exit(128 + signalled.number)
    except (GserveError, OSError) as error:
        logger.debug("the command failed", exc_info=True)
        print_stderr(f"error: {error}")
        sys.exit(2 if isinstance(error, (ConfigError, PluginError)) else 1)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"gserve {version('gserve')}")
        raise typer.Exit


@app.callback()
def _prepare(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Run vLLM servers on your GPUs, and send batches of requests to them."""
    gc.freeze()
    gc.enable()
    if LEVEL_VARIABLE in os.environ:  # else Python shows warnings and errors, and the servers log at level INFO
        setup_logging()


app.command()(serve.launch)
app.command()(batch.generate)
app.command()(batch.chat)
app.command()(batch.embed)
app.command()(batch.run)
app.command()(run_batch.run_batch)
app.command()(tune.tune)
app.command()(slurm.sbatch)
app.command()(slurm.status)
app.command()(examine.check)
app.command()(examine.doctor)
app.command("plugins")(examine.list_plugins)
app.command()(serve.wait)
app.command()(serve.env)
app.command()(watch.ps)
app.command()(watch.logs)
app.command()(watch.top)
app.command()(serve.scale)
app.command()(serve.reload)
app.command()(serve.adapters)
app.command()(serve.update)
app.command()(checkpoints.watch)
app.command()(serve.stop)
app.command()(serve.reap)
