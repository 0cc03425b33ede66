"""Options and arguments that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file.")]
ConfigFileOrNot = Annotated[
    str | None,
    typer.Argument(metavar="CONFIG", help="A YAML file. Not with --attach or $GSERVE_ATTACH.", show_default=False),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.KEY=VALUE", help="Change the config, as in serve.port=8000. Repeatable."),
]
Attach = Annotated[
    str | None,
    typer.Option(
        "--attach", "--url", metavar="NAME", help="Use a launched service (see: gserve ps) or the URL of a gateway."
    ),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Show the servers' logs on stderr, as serve.verbose=true does.")
]
Model = Annotated[str | None, typer.Option(metavar="NAME", help="One of several models: its name under 'models'.")]
Command = Annotated[list[str], typer.Argument(metavar="-- COMMAND", help="A program and its arguments.")]
CommandOrNot = Annotated[
    list[str] | None, typer.Argument(metavar="[-- COMMAND]", help="A program and its arguments.", show_default=False)
]
SlurmText = Annotated[str | None, typer.Option(help="As under 'launcher' in CONFIG.")]
SlurmNumber = Annotated[int | None, typer.Option(help="As under 'launcher' in CONFIG.")]
