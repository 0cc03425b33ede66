"""The commands `sbatch` and `status`: jobs of SLURM, and the parts of a job on a file."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import gserve
from gserve_core.errors import ConfigError

from .batch import PREVIEWS, show_previews
from .display import print_table
from .job_flags import JobFlags, with_job_flags
from .options import CommandOrNot, ConfigFile, Overrides, SlurmNumber, SlurmText
from .service import chosen

if TYPE_CHECKING:
    from gserve_core.rows.job import FileJob


PART_FORMAT = "jsonl"


@with_job_flags
def sbatch(
    flags: JobFlags,
    config: ConfigFile,
    command: CommandOrNot = None,
    is_chat: Annotated[bool, typer.Option("--chat", help="ROWS hold conversations, or texts for a chat.")] = False,
    shards: Annotated[
        int | None,
        typer.Option(metavar="N", help="Submit an array of N jobs. OUT is a folder, and each job writes a part of it."),
    ] = None,
    part_format: Annotated[
        str, typer.Option(metavar="FORMAT", help="With --shards: the format of the parts, as in parquet.")
    ] = PART_FORMAT,
    overrides: Overrides = None,
    only_print: Annotated[bool, typer.Option("--print", help="Only show what would be submitted.")] = False,
    partition: SlurmText = None,
    account: SlurmText = None,
    time: SlurmText = None,
    nodes: SlurmNumber = None,
) -> None:
    """Submit a job to SLURM that starts the servers of CONFIG and runs COMMAND, with $GSERVE_ATTACH set, to its end.

    With --input instead of COMMAND, it answers the rows of a file, like generate. Submitted again, it continues.

    The launcher slurm in CONFIG describes the job. --partition, --account, --time and --nodes override it, and --set
    changes any other option, as in launcher.mem=64G. Write COMMAND after --.
    """
    from gserve_core.document import Document
    from gserve_core.host.redaction import secret_values
    from gserve_launchers.slurm import batch, query

    given = {"partition": partition, "account": account, "time": time, "nodes": nodes}
    if bool(command) == (flags.source is not None):
        raise ConfigError("expected either a COMMAND after -- or --input")
    output = ""
    if flags.source is not None:
        output = _output(flags, shards, part_format, batch.TASK)
        command = _answering(flags, output, shards, batch.TASK, is_chat=is_chat)
        if part_format != PART_FORMAT and shards is None:
            raise ConfigError("--part-format requires --shards")
    elif wrong := [*flags.given, *(["--chat"] if is_chat else ()), *(["--shards"] if shards else ())]:
        raise ConfigError(f"{wrong[0]} requires --input")
    service = gserve.VLLMService.from_yaml(config, overrides=overrides or ())
    if secret_values(Document(config, overrides or ()).data) - secret_values(Document(config).data):
        raise ConfigError("--set contains a secret: write it into CONFIG or the environment")
    launcher = batch.configured(service.launcher, {name: value for name, value in given.items() if value is not None})
    jobs = [job for job, _ in service.jobs()]
    model = chosen(service, flags.model) if flags.source is not None else None
    if model is not None:
        first = _task(flags, output, shards, 1, is_chat=is_chat)
        model.check_params(first.make_prompts().params)
        if flags.dry_run:
            show_previews(first, flags.limit or PREVIEWS, model)
            return
    tasks = list(range(1, (shards or 0) + 1))
    if shards and not flags.overwrite:
        facts = {} if model is None else model.model_facts()
        tasks = [
            it for it in tasks if not _task(flags, output, shards, it, is_chat=is_chat).is_done(facts, query.is_over)
        ]
        if not tasks:
            print(f"all rows are answered already: {flags.output}")
            return
    order = batch.Order(
        config=str(config.absolute()), overrides=overrides or [], command=command or [],
        patience=batch.notice(launcher) * batch.COMMAND_SHARE, requeue=launcher.requeue, notice=batch.notice(launcher),
        output=output, tasks=tasks,
    )  # fmt: skip
    if only_print:
        print(batch.SCRIPT.read_text())
        if command:
            print(f"# In the job: {shlex.join(command)}")
        print(shlex.join(batch.command(launcher, jobs, order, f"{batch.folder()}/….json")))
        return
    if shards:
        Path(output).parent.mkdir(exist_ok=True)
    number = batch.submit(launcher, jobs, order)
    log = Path.cwd() / f"slurm-{'N' if shards else number}.out"
    print(f"job {number}: its output goes to {log}" + (", with the number N of each task" if shards else ""))


def _output(flags: JobFlags, shards: int | None, part_format: str, task: str) -> str:
    """Return the path of the output of a job, or of a task. Raises ConfigError: it cannot be written."""
    from gserve_core.rows.output import STDIO
    from gserve_core.rows.parts import check_parts, part_name

    if flags.output is None or STDIO in (flags.source, str(flags.output)):
        raise ConfigError("a job has no stdin, and nobody reads its stdout: expected files as --input and --output")
    path = flags.output.absolute()
    if not path.parent.is_dir():
        raise ConfigError(f"cannot write the results: the folder {path.parent} does not exist")
    if shards is None:
        return str(path)
    if shards < 1 or flags.shard is not None:
        raise ConfigError(f"expected a number of shards from 1 up, without --shard; got {shards}")
    if flags.failed is not None:
        raise ConfigError("with --shards, each part has a file of its own for failed rows: remove --failed")
    if path.exists() and not path.is_dir():
        raise ConfigError("is a file: with --shards, expected a folder", file=path)
    check_parts(path, shards, part_format)
    return str(path / part_name(task, shards, part_format))


def _answering(flags: JobFlags, output: str, shards: int | None, task: str, *, is_chat: bool) -> list[str]:
    """Return the command that works on the rows with the service in $GSERVE_ATTACH.

    Raises ConfigError: the files or the options are wrong. They are checked before the job waits in the queue.
    """
    _task(flags, output, shards, 1, is_chat=is_chat).check()
    shard = f"{task}/{shards}" if shards else flags.shard
    words = flags.replaced(output=Path(output), shard=shard, overwrite=False, overwrite_once=flags.overwrite).words()
    return [sys.executable, "-P", "-m", "gserve.cli", "chat" if is_chat else "generate", *words]


def _task(flags: JobFlags, output: str, shards: int | None, number: int, *, is_chat: bool) -> "FileJob":
    """Return the job of a task."""
    from gserve_launchers.slurm.batch import TASK

    own = Path(output.replace(TASK, str(number)))
    return flags.replaced(output=own, shard=f"{number}/{shards}" if shards else flags.shard).job(is_chat=is_chat)


def status(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder with outputs of jobs, as of --shards.")],
) -> None:
    """Show how far the jobs are that write their output into FOLDER."""
    from gserve_core.rows.parts import parts_in
    from gserve_launchers.slurm.query import is_over

    parts = parts_in(folder, is_over)
    if not parts:
        raise ConfigError("no output of gserve is in this folder", file=folder)
    header = ("OUTPUT", "STATE", "ANSWERED", "FAILED", "ROWS")
    rows = [(it.name, it.state, f"{it.answered:,}", _number(it.failed), _number(it.rows)) for it in parts]
    print_table(header, rows, numbers={2, 3, 4})


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"
