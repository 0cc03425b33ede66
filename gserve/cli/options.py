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
    typer.Option(metavar="NAME", help="Use a launched service (see: gserve ps) or the URL of a gateway."),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Show the servers' logs on stderr, as serve.verbose=true does.")
]
ParamsText = Annotated[
    str | None,
    typer.Option("--params", metavar="JSON", help='Sampling parameters, as in {"max_tokens": 64, "temperature": 0}.'),
]
Command = Annotated[list[str], typer.Argument(metavar="-- COMMAND", help="A program and its arguments.")]
CommandOrNot = Annotated[
    list[str] | None, typer.Argument(metavar="[-- COMMAND]", help="A program and its arguments.", show_default=False)
]
SlurmText = Annotated[str | None, typer.Option(help="As under 'launcher' in CONFIG.")]
SlurmNumber = Annotated[int | None, typer.Option(help="As under 'launcher' in CONFIG.")]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="OUT.jsonl",
        help="Write JSON lines to this file. Items with results in it are skipped.",
    ),
]  # fmt: skip
