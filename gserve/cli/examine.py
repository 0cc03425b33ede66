"""The commands that inspect and start no server: `check`, `doctor`, `plugins`."""

import shlex
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from gserve_core.errors import GserveError
from gserve_core.host.redaction import hidden

from .display import COLOURS, print_stderr, print_table
from .options import ConfigFile, Overrides


def check(config: ConfigFile, overrides: Overrides = None) -> None:
    """Check CONFIG, and print the commands that would run. Starts nothing, and uses no network."""
    from gserve_core.doctor.examination import check_config

    shown = None
    for model, job, command in check_config(config, overrides or ()):
        if model.choice is not None and model.name != shown:
            print(f"# {'' if model.is_alone else f'{model.name}: '}{model.choice}")
        shown = model.name
        gpus = f" on GPU {','.join(map(str, job.gpu_ids))}" if job.gpu_ids else ""
        of = "" if model.is_alone else f" of the model {model.name}"
        print(f"# {job.name}{of}{gpus}")
        print(*(f"{key}={shlex.quote(value)}" for key, value in hidden(job.env).items()), shlex.join(command))


def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Also check what it needs, and try its launcher.")
    ] = None,
    on_node: Annotated[bool, typer.Option("--on-node", help="Also check a node on which servers would run.")] = False,
    overrides: Overrides = None,
) -> None:
    """Check that everything the servers need works: vLLM, GPUs, the model, SLURM, the connection to a node."""
    from gserve_core.doctor.examination import examine

    problems = 0
    with closing(examine(config, overrides or (), on_node=on_node, waiting=print_stderr)) as findings:
        for finding in findings:
            problems += finding.state == "problem"
            state = typer.style(f"{finding.state:<8}", fg=COLOURS[finding.state])
            typer.echo(f"{state} {finding.subject:<16} {finding.text}")
            if finding.hint:
                typer.echo(f"{'':<25} -> {finding.hint}")
    if problems:
        raise GserveError(f"{problems} problem{'s' * (problems > 1)}, see above")


def list_plugins(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Also load the plugins that it names.")
    ] = None,
) -> None:
    """List all available launchers, transports and engines."""
    from gserve_core import plugins
    from gserve_core.config import load

    if config is None:
        registry = plugins.load()
    else:
        loaded, document = load(config)
        with document.located():
            registry = plugins.load(loaded.plugins, document.file.parent)
    rows = [
        (kind, name, f"{cls.__module__}.{cls.__qualname__}", registry.sources[cls])
        for kind, classes in registry.classes.items()
        for name, cls in sorted(classes.items())
    ]
    broken = [("broken", name, "-", reason) for name, reason in registry.broken.items()]
    print_table(("kind", "name", "class", "from"), [*rows, *broken])
