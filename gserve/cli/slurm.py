"""The command `sbatch`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

import gserve
from gserve_core.batch.item_files import STDIO, ConversationLine, Line, PromptLine, parse_params, read_items
from gserve_core.errors import ConfigError

from .options import CommandOrNot, ConfigFile, Output, Overrides, ParamsText, SlurmNumber, SlurmText


def sbatch(
    config: ConfigFile,
    command: CommandOrNot = None,
    source: Annotated[
        Path | None, typer.Option("--input", "-i", metavar="IN", help="Without COMMAND: generate from these prompts.")
    ] = None,
    output: Output = None,
    params: ParamsText = None,
    is_chat: Annotated[bool, typer.Option("--chat", help="IN contains conversations.")] = False,
    overrides: Overrides = None,
    only_print: Annotated[bool, typer.Option("--print", help="Only show what would be submitted.")] = False,
    partition: SlurmText = None,
    account: SlurmText = None,
    time: SlurmText = None,
    nodes: SlurmNumber = None,
) -> None:
    """Submit a job to SLURM that starts the servers of CONFIG and runs COMMAND, with $GSERVE_ATTACH set, to its end.

    The launcher slurm in CONFIG describes the job. --partition, --account, --time and --nodes override it, and --set
    changes any other option, as in launcher.mem=64G. Write COMMAND after --.
    """
    from gserve_core.document import Document
    from gserve_core.host.redaction import secret_values
    from gserve_launchers.slurm import batch

    given = {"partition": partition, "account": account, "time": time, "nodes": nodes}
    if bool(command) == (source is not None):
        raise ConfigError("expected either a COMMAND after -- or --input")
    if source is not None:
        command = _answering(source, output, params, ConversationLine if is_chat else PromptLine)
    elif output is not None or params is not None or is_chat:
        raise ConfigError("--output, --params and --chat require --input")
    service = gserve.VLLMService.from_yaml(config, overrides=overrides or ())
    if secret_values(Document(config, overrides or ()).data) - secret_values(Document(config).data):
        raise ConfigError("--set contains a secret: write it into CONFIG or the environment")
    launcher = batch.configured(service.launcher, {name: value for name, value in given.items() if value is not None})
    jobs = [job for job, _ in service.jobs()]
    order = batch.Order(
        config=str(config.absolute()), overrides=overrides or [], command=command or [],
        patience=batch.notice(launcher) * batch.COMMAND_SHARE, requeue=launcher.requeue, notice=batch.notice(launcher),
        output=str(output.absolute()) if output else "",
    )  # fmt: skip
    if only_print:
        print(batch.SCRIPT.read_text())
        if command:
            print(f"# In the job: {shlex.join(command)}")
        print(shlex.join(batch.command(launcher, jobs, order, f"{batch.folder()}/….json")))
        return
    number = batch.submit(launcher, jobs, order)
    print(f"job {number}: its output goes to {Path.cwd() / f'slurm-{number}.out'}")


def _answering(source: Path, output: Path | None, params: str | None, kind: "type[Line]") -> list[str]:
    """Return the command that runs `generate` or `chat` with the service in $GSERVE_ATTACH.

    Raises ConfigError: the files or parameters are invalid.
    """
    if output is None or STDIO in (source, output):
        raise ConfigError("a job has no stdin, and nobody reads its stdout: expected files as --input and --output")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"cannot write the results: the folder {output.absolute().parent} does not exist")
    read_items(source, kind)  # report errors now, before the job waits in the queue
    parse_params(params)
    command = [sys.executable, "-P", "-m", "gserve.cli", "chat" if kind is ConversationLine else "generate"]
    command += ["--input", str(source.absolute()), "--output", str(output.absolute())]
    return command if params is None else [*command, "--params", params]
